"""The local web server of the review page: what comes in is checked here, what it means is `data_gen.review`'s.

Only this machine can reach it (127.0.0.1), and only who has the token of this run, which stands in the address behind
the "#" and so is in no request line. The page sends it as a header, which no page of another site can do. The Host
header must be ours, or a name of somebody else's could be made to point here.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

from medisee.foundation.errors import InputError

ADDRESS = "127.0.0.1"
MOST_BYTES = 64 * 1024
"""Largest body of a request: an edited pair is a few hundred bytes."""
PAGE = Path(__file__).with_name("review_page.html")

_PICTURE = re.compile(r"/api/items/(\d{1,9})/(image|mask)")
_ITEM = re.compile(r"/api/items/(\d{1,9})")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Refused(Exception):
    """A request that is not carried out: the HTTP status and what the page is told."""

    def __init__(self, status: HTTPStatus, **told: Any) -> None:
        self.status, self.told = status, told
        super().__init__(str(told))


class ReviewApi(Protocol):
    """What the page can ask for; every method may raise Refused or InputError."""

    def state(self) -> dict[str, Any]:
        """Returns reviewer, counts and where to begin."""
        ...

    def agreement(self) -> dict[str, Any]:
        """Returns how far the reviewers agree."""
        ...

    def item(self, number: int) -> dict[str, Any]:
        """Returns one item with its pairs."""
        ...

    def picture(self, number: int, kind: str) -> bytes:
        """Returns one item's "image" or "mask" as PNG."""
        ...

    def decide(self, body: Any) -> dict[str, Any]:
        """Stores a decision."""
        ...

    def undo(self) -> dict[str, Any]:
        """Takes the last decision back."""
        ...


class ReviewServer(ThreadingHTTPServer):
    """Serves the review page of one reviewer until `shutdown`.

    Attributes:
        api: what the requests are handed to.
        token: what every request but that for the page must carry.
    """

    daemon_threads = True

    def __init__(self, api: ReviewApi, port: int) -> None:
        """Binds the port; 0 takes a free one.

        Raises:
            InputError: the port is taken or not allowed.
        """
        self.api = api
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise InputError(
                f"--port {port}: cannot be used ({error.strerror or error}); expected a free port; name another, or 0 "
                "for any."
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing when the browser hung up, as it does when a page is reloaded."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address to open, with the token."""
        return f"http://{ADDRESS}:{self.server_port}/#{self.token}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The Host headers that are ours."""
        return f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version = "medisee"
    sys_version = ""
    timeout: ClassVar[float] = 60.0

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a line for each request would bury what the command prints."""

    def _answer(self, method: str) -> None:
        try:
            body = self._body()
            self._check_host()
            path = urlsplit(self.path).path
            if (method, path) == ("GET", "/"):
                self._send_page()
                return
            self._check_token()
            if method == "GET" and (found := _PICTURE.fullmatch(path)):
                self._send(HTTPStatus.OK, "image/png", self.server.api.picture(int(found[1]), found[2]))
                return
            self._send_json(HTTPStatus.OK, self._call(method, path, body))
        except Refused as refused:
            self._send_json(refused.status, refused.told)
        except InputError as error:
            self._send_json(HTTPStatus.CONFLICT, {"error": "\n".join(error.problems)})

    def _call(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        api = self.server.api
        match method, path:
            case "GET", "/api/state":
                return api.state()
            case "GET", "/api/agreement":
                return api.agreement()
            case "POST", "/api/decide":
                return api.decide(self._json(body))
            case "POST", "/api/undo":
                self._json(body)
                return api.undo()
        if method == "GET" and (found := _ITEM.fullmatch(path)):
            return api.item(int(found[1]))
        raise Refused(HTTPStatus.NOT_FOUND, error="there is no such page")

    def _body(self) -> bytes:
        """Reads the body first of all: what is left unread would be taken for the next request."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"\d{1,12}", length):
            self.close_connection = True
            raise Refused(HTTPStatus.LENGTH_REQUIRED, error="expected a Content-Length")
        if int(length) > MOST_BYTES:
            self.close_connection = True
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, error=f"expected at most {MOST_BYTES} bytes")
        return self.rfile.read(int(length))

    def _check_host(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, error="this is not the host that you asked for")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in self.server.hosts]:
            raise Refused(HTTPStatus.FORBIDDEN, error="pages of other sites may not ask here")

    def _check_token(self) -> None:
        given = self.headers.get("X-Review-Token", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.server.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, error="open the address that the command printed: it holds the token")

    def _json(self, body: bytes) -> Any:
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, error="expected application/json")
        try:
            return json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, error=f"not JSON: {error}") from error

    def _send_page(self) -> None:
        nonce = base64.b64encode(secrets.token_bytes(16)).decode("ascii")
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        text = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", text.encode(), {"Content-Security-Policy": policy})

    def _send_json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value, ensure_ascii=True).encode("ascii"))

    def _send(self, status: HTTPStatus, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
