"""The review page's web server: who may ask is checked here; what a request means is ReviewSession's business.

Only this machine can reach it (127.0.0.1), and only with the token of this run. The printed address holds the token
behind the "#", so it is in no request line; the page sends it as a header, which a page of another site cannot do.
The Host header must be this server's own, so that no other site's name can be made to point here.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import secrets
import socket
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from data_gen.publishing.review_session import Refused, ReviewSession
from medisee.foundation.errors import InputError
from medisee.foundation.json_files import parse_json

ADDRESS = "127.0.0.1"
MOST_BYTES = 64 * 1024  # of a request's body: an edited pair is a few hundred bytes
PAGE = Path(__file__).with_name("review_page.html")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class ReviewServer(uvicorn.Server):
    """Serves the review page of one session; `run` returns when `should_exit` is set."""

    def __init__(self, session: ReviewSession, port: int) -> None:
        """Binds the port of 127.0.0.1; 0 takes a free one."""
        try:
            self.socket = socket.create_server((ADDRESS, port))
        except OSError as error:
            raise InputError(f"--port {port}: cannot be used ({error.strerror}); name a free port, or 0.") from error
        self.token = secrets.token_urlsafe(24)  # of every request but the one for the page
        self.port: int = self.socket.getsockname()[1]
        self.url = f"http://{ADDRESS}:{self.port}/#{self.token}"  # to open
        config = uvicorn.Config(
            _app(session, self.token, (f"{ADDRESS}:{self.port}", f"localhost:{self.port}")),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,  # a line for each request would bury what the command prints
            proxy_headers=False,
            server_header=False,
            headers=[("Server", "medisee")],
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until Ctrl-C, which is raised again as a KeyboardInterrupt, or until `should_exit` is set."""
        super().run(sockets or [self.socket])


def _app(session: ReviewSession, token: str, hosts: tuple[str, ...]) -> Starlette:
    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = _refusal(request, token, hosts) or await call_next(request)
        response.headers.update(_HEADERS)
        return response

    async def decide(request: Request) -> Response:
        return _json(await run_in_threadpool(session.decide, await _body(request)))

    async def undo(request: Request) -> Response:
        await _body(request)
        return _json(await run_in_threadpool(session.undo))

    def picture(request: Request) -> Response:
        number, kind = request.path_params["number"], request.path_params["kind"]
        if kind not in ("image", "mask"):
            raise Refused(404, error="there is no such page")
        return Response(session.picture(number, kind), media_type="image/png")

    # Functions that are not `async` run in threads, so that pictures are read side by side.
    app = Starlette(
        routes=[
            Route("/", _page),
            Route("/api/state", lambda _: _json(session.state())),
            Route("/api/agreement", lambda _: _json(session.agreement())),
            Route("/api/items/{number:int}", lambda request: _json(session.item(request.path_params["number"]))),
            Route("/api/items/{number:int}/{kind}", picture),
            Route("/api/decide", decide, methods=["POST"]),
            Route("/api/undo", undo, methods=["POST"]),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers=dict.fromkeys((Refused, InputError, ClientDisconnect, HTTPException, Exception), _explain),
    )
    app.router.redirect_slashes = False
    return app


def _refusal(request: Request, token: str, hosts: tuple[str, ...]) -> Response | None:
    """Returns the answer to a request that is not to be looked at; None lets it pass."""
    length = request.headers.get("Content-Length", "0")
    origin = request.headers.get("Origin")
    given = request.headers.get("X-Review-Token", "")
    is_page = (request.method, request.scope["path"]) == ("GET", "/")
    status, error = 0, ""
    if request.method not in ("GET", "POST"):
        status, error = 501, "expected GET or POST"
    elif "Transfer-Encoding" in request.headers or not re.fullmatch(r"[0-9]{1,12}", length):
        status, error = 411, "expected a Content-Length"
    elif int(length) > MOST_BYTES:
        status, error = 413, f"expected at most {MOST_BYTES} bytes"
    elif request.headers.get("Host") not in hosts:
        status, error = 421, "this is not the host that you asked for"
    elif origin is not None and origin not in [f"http://{host}" for host in hosts]:
        status, error = 403, "pages of other sites may not ask here"
    elif not is_page and not hmac.compare_digest(given.encode(), token.encode()):
        status, error = 403, "open the address that the command printed: it holds the token"
    return _json({"error": error}, status) if status else None


def _explain(_: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return _json(error.content, error.status)
    if isinstance(error, InputError):
        return _json({"error": "\n".join(error.problems)}, 409)
    if isinstance(error, HTTPException):  # no route, or the wrong method for one
        return _json({"error": "there is no such page"}, 404)
    if isinstance(error, ClientDisconnect):  # as when a page is reloaded
        return Response()
    return _json({"error": "the review command failed; its terminal says why"}, 500)


async def _body(request: Request) -> Any:
    """Returns the JSON that a request carries."""
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, error="expected application/json")
    try:
        return parse_json(await request.body())
    except ValueError as error:
        raise Refused(400, error=f"not JSON: {error}") from error


def _page(_: Request) -> Response:
    nonce = base64.b64encode(secrets.token_bytes(16)).decode("ascii")
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    text = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def _json(value: dict[str, Any], status: int = 200) -> Response:
    # Not JSONResponse: ASCII also carries the odd characters that UTF-8 refuses.
    return Response(json.dumps(value), status, media_type="application/json")
