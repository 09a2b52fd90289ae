"""The client of an OpenAI-compatible server: it keeps to the limits, sends again, and never shows the key."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from typing import Any

import aiohttp
import httpx2
import openai
from tqdm import tqdm

from data_gen.core.calls import Reply, Request, Status
from data_gen.core.pictures import with_pixels
from data_gen.core.prices import Price, Size, size_of
from data_gen.ledger.limits import MoneyBudget, RateLimit, StopRun
from medisee.foundation.errors import InputError

OPENAI = "https://api.openai.com/v1"
KEY, CAPTION_KEY = "OPENAI_API_KEY", "MEDISEE_CAPTION_KEY"
_NO_KEY = "none"  # what a server without a key is sent
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two sends of one request; doubles from send to send
_LONGEST_PAUSE = 600.0  # seconds; a server that asks for more is down
_LONGEST_MESSAGE = 300  # characters of a server's message
BLOCKED = "the server's content filter blocked it"
_MOST_USAGE = 2**40  # tokens; a server that counts more counts wrong
# The two names of the most tokens of an answer, of which each server knows at least one.
_LIMITS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_UNSUPPORTED = re.compile(r"unsupported|not support|unrecogni|unknown|unexpected|extra|not (?:permitted|allowed)", re.I)


class Unreachable(Exception):
    """No answer after all sends: the server or the network is at fault, not the request."""


class NotAccepted(Unreachable):
    """The server does not take the request; the fault may be the request's, the settings' or the server's."""


class NoCompletion(Exception):
    """Status 200 without a chat completion: a proxy's page, or an answer that was cut on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a model is and how to call it."""

    base_url: str | None = None  # such as "http://127.0.0.1:8000/v1"; None is OpenAI
    key_name: str = KEY  # the environment variable with its key
    concurrency: int = 64  # most requests under way at once
    timeout: float = 120.0  # seconds to wait for an answer
    sends: int = 8  # how often a request is sent when the server or the network fails
    max_tokens: int | None = None  # of every answer; None leaves each stage its own


def is_same(first: str | None, second: str | None) -> bool:
    """Returns whether two base URLs are those of one server; None is OpenAI."""
    return (first or OPENAI).rstrip("/") == (second or OPENAI).rstrip("/")


def api_key(server: Server) -> str:
    """Returns the server's key from the environment; only OpenAI's server needs one."""
    key = os.environ.get(server.key_name, "").strip()
    if not key and is_same(server.base_url, None):
        raise InputError(
            f"{server.key_name} is not set; expected the key of your account in the environment. Set it, name your own "
            "server with --base-url, or use --author offline, which needs none."
        )
    if not all("!" <= character <= "~" for character in key):
        raise InputError(
            f"{server.key_name}: holds characters that no key has; expected printable ASCII without spaces; correct it."
        )
    return key or _NO_KEY


class _HttpClient(openai.DefaultAioHttpClient):
    """openai's aiohttp client (quicker than its default), with a limit on a whole request, and httpx2's errors only."""

    def __init__(self, timeout: float, *, longest: float, connections: int) -> None:
        """`timeout` limits the seconds without a byte of the answer, `longest` those of a whole request."""
        super().__init__(timeout=httpx2.Timeout(timeout, pool=None), limits=httpx2.Limits(max_connections=connections))
        self._longest = longest

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            # aiohttp has no limit for name look-ups, proxies and uploads.
            return await asyncio.wait_for(super().send(request, **options), self._longest)
        except asyncio.TimeoutError as error:
            raise httpx2.ReadTimeout(f"no whole answer within {self._longest:g} s", request=request) from error
        except aiohttp.ClientError as error:  # such as a malformed status line
            raise httpx2.RemoteProtocolError(str(error), request=request) from error


def client_for(server: Server, key: str, *, retries: int = 0, patience: int = 2) -> openai.AsyncOpenAI:
    """Returns openai's client; it sends again `retries` times, and a whole request may take `patience` timeouts."""
    http = _HttpClient(server.timeout, longest=patience * server.timeout, connections=server.concurrency)
    return openai.AsyncOpenAI(api_key=key, base_url=server.base_url or OPENAI, max_retries=retries, http_client=http)


class Parameters:
    """The parameters of requests in the form that one server takes.

    The ledger knows a request by its own parameters, so the form may change from run to run.
    """

    def __init__(self, server: Server) -> None:
        self._most = server.max_tokens
        self._names: dict[str, str] = {}  # what is sent instead of a parameter; empty: nothing

    def apply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the body as it is sent."""
        made = {self._names.get(name, name): value for name, value in body.items()}
        made.pop("", None)
        return made | ({name: self._most for name in _LIMITS if name in made} if self._most else {})

    def learn(self, message: str, sent: Mapping[str, Any]) -> bool:
        """Returns whether a server's message is about a parameter of `sent` that it will not be sent again."""
        named = [name for name in (*_LIMITS, "temperature", "reasoning_effort") if re.search(rf"\b{name}\b", message)]
        name = next((name for name in named if name in sent), None)
        if name is None or name in self._names.values() or not _UNSUPPORTED.search(message):
            return False
        if name not in self._names:
            other = self._names[name] = _LIMITS.get(name, "")
            tqdm.write(f"the server takes no {name}: " + (f"sent as {other}" if other else "left out"), file=sys.stderr)
        return True


class Client:
    """Sends requests to one server, within the rate and the money that all calls share."""

    def __init__(self, server: Server, *, root: Path, price: Price, rate: RateLimit, money: MoneyBudget) -> None:
        """Reads the key and connects to nothing yet; `root` is the folder of the images."""
        self._server, self._root, self._price = server, root, price
        self._rate, self._money = rate, money
        self._key = api_key(server)
        self._client = client_for(server, self._key)
        self._parameters = Parameters(server)
        self._answered: Counter[str] = Counter()  # answers by stage
        self._not_accepted: dict[str, int] = {}  # by the request's key: what `_answered` was at the first refusal
        self._free = asyncio.Semaphore(server.concurrency)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def send(self, request: Request) -> Reply:
        """Sends a request until it is answered, at most `Server.sends` times, then raises Unreachable.

        NotAccepted: the server does not take it. When the server has answered others of the stage in the meantime, the
        fault is this request's, and the reply says so. StopRun: no request can succeed (key, model, address, schema),
        or the money does not suffice.
        """
        body, sends, why = with_pixels(request.body, self._root), 0, ""
        async with self._free:
            while sends < self._server.sends:
                if sends:
                    wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (sends - 1))
                    await asyncio.sleep(wait * random.uniform(0.75, 1.25))
                sent = self._parameters.apply(body)
                try:
                    reply, why = await self._send(sent, size_of(self._parameters.apply(request.body)))
                except NotAccepted as error:
                    if self._parameters.learn(str(error), sent):
                        continue
                    answered = self._answered[request.stage]
                    if answered <= self._not_accepted.setdefault(request.key, answered):
                        raise
                    reply = rejected(str(error))
                sends += 1
                if reply:
                    self._answered[request.stage] += reply.status != "rejected"
                    return replace(reply, sends=sends)
        raise Unreachable(why)

    async def _send(self, body: dict[str, Any], size: Size) -> tuple[Reply | None, str]:
        """Sends once; returns the reply, or why there is none."""
        held, tokens = size.most(self._price), size.tokens(self._price) + size.answer
        self._money.hold(held)
        reply, is_lost = None, False
        try:
            await self._rate.take(tokens)
            # openai's typed method would check the request and the answer field by field: half of the time, for a body
            # that is ours and an answer that `reply_from` checks.
            response = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body)
            reply, why = reply_from(from_json(response.content), self._price), ""
            self._rate.give_back(tokens - reply.usage_in - reply.usage_out)
        except openai.APIConnectionError as error:
            # A server that is too late may have worked and may charge for it. openai's aiohttp transport calls every
            # failed connection a connect timeout.
            cause = error.__cause__
            is_lost = isinstance(error, openai.APITimeoutError) and not isinstance(cause, httpx2.ConnectTimeout)
            late = f"no answer within {self._server.timeout:g} s"
            why = late if is_lost else f"the connection failed ({cause or error})"
        except openai.APIStatusError as error:
            content: Any = error.body
            message = (content.get("message") if isinstance(content, dict) else None) or error.message
            why = redacted(f"status {error.status_code}: {message}", self._server, self._key)
            reply = rejection(error.status_code, str(error.code or ""), why, self._server)
            if reply is None:
                seconds = retry_after(error.response.headers)
                if seconds > _LONGEST_PAUSE:
                    raise StopRun(
                        f"stopped: the server asks to wait {seconds:.0f} s; run again after that to continue."
                    ) from error
                self._rate.pause(seconds)
        except NoCompletion as error:
            why = str(error)
        finally:
            if is_lost:
                self._money.lose(held)
            else:
                self._money.release(held, reply.price if reply else 0.0)
        return reply, redacted(why, self._server, self._key)


def retry_after(headers: httpx2.Headers) -> float:
    """Returns the seconds of a Retry-After header, given as seconds, milliseconds or a date; 0 for none."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / scale
        except ValueError:
            continue
        return seconds if 0 < seconds < float("inf") else 0.0
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time())
    except (KeyError, ValueError):
        return 0.0


def redacted(text: str, server: Server, key: str) -> str:
    """Returns a server's message, short, on one line and without the key, which some servers repeat."""
    line = _storable(" ".join(text.split()))
    return (line if key == _NO_KEY else line.replace(key, f"[{server.key_name}]"))[:_LONGEST_MESSAGE]


def _storable(text: str) -> str:
    """Replaces halves of surrogate pairs, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_lasting(status: int) -> bool:
    """Returns whether an HTTP status is about the request, so that sending it again would not help."""
    return 400 <= status < 500 and status not in (408, 409, 425, 429)


def rejection(status: int, code: str, why: str, server: Server) -> Reply | None:
    """Returns the final reply to a request whose content the server's filter blocks, None when it can be sent again.

    NotAccepted when sending it again does not help, StopRun when no request can succeed. `code` is that of OpenAI's
    error object, `why` the server's message (see `redacted`).
    """
    if code == "insufficient_quota" or status == 402:
        raise StopRun("stopped: the account's quota is used up; add credit or wait, then run again to continue.")
    if not is_lasting(status):
        return None
    if status in (401, 403, 404):
        what = f"{server.key_name}, the model's name and the server's address"
        raise StopRun(f"stopped: the server answers {why}; check {what}, then run again.")
    if code == "content_filter" or "content management policy" in why:
        return Reply(status="rejected", text="", why=BLOCKED)
    if any(word in why for word in ("response_format", "json_schema", "guided", "grammar")):
        raise StopRun(f"stopped: the server takes no strict schema ({why}); run with --schema json_object or none.")
    raise NotAccepted(why)


def rejected(why: str) -> Reply:
    """Returns the final reply to a request that the server does not accept though it accepts others."""
    return Reply(status="rejected", text="", why=f"the server does not accept the request ({why})")


def from_json(text: bytes | str) -> Any:
    """Reads what a server sent; NoCompletion if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoCompletion(f"the answer is not JSON ({error})") from error


def reply_from(completion: Any, price: Price, *, batch: bool = False) -> Reply:
    """Reads a chat completion; NoCompletion when it is not one. A model's thoughts in fields of their own are ignored."""
    try:
        choice = completion["choices"][0]
        message = choice["message"]
        text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        if isinstance(text, list):  # of parts, which may be thoughts
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        usage = completion.get("usage") or {}
        given = usage.get("prompt_tokens"), usage.get("completion_tokens")
        tokens_in, tokens_out = (min(max(int(count or 0), 0), _MOST_USAGE) for count in given)
        cached = min(max(int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0), 0), tokens_in)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise NoCompletion(f"the answer is not a chat completion ({type(error).__name__}: {error})") from error
    status: Status = "ok"
    why = ""
    if refusal or finish == "refusal":
        status, why = "refused", "the model refused to answer"
    elif finish == "content_filter":
        status, why = "filtered", BLOCKED
    elif finish == "length":
        status, why = "truncated", "the answer was cut off at the most tokens allowed; raise --max-tokens"
    elif not isinstance(text, str):
        status, why = "malformed", "the answer holds no text"
    return Reply(
        status=status,
        text=_storable(str(refusal or text or "")),
        usage_in=tokens_in,
        usage_cached=cached,
        usage_out=tokens_out,
        price=price.of(tokens_in, cached, tokens_out, batch=batch),
        why=why,
    )
