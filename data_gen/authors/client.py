"""The way to a model behind an OpenAI-compatible server: paced, patient, and silent about the key."""

from __future__ import annotations

import asyncio
import json
import os
import random
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from typing import Any

import httpx2
import openai

from data_gen.authors.transport import HttpClient
from data_gen.core.calls import Reply, Request, Status
from data_gen.core.pixels import with_pixels
from data_gen.core.prices import Price, size_of
from data_gen.ledger.limits import MoneyBudget, RateLimit, StopRun
from medisee.foundation.errors import InputError

OPENAI = "https://api.openai.com/v1"
KEY, CAPTION_KEY = "OPENAI_API_KEY", "MEDISEE_CAPTION_KEY"
_NO_KEY = "none"  # what servers of one's own are sent
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two sends of one request; doubles from send to send
_LONGEST_PAUSE = 600.0  # seconds; a server that asks for more than that is down
_HOPELESS = (401, 403, 404)
_ANOTHER_TIME = (408, 409, 425, 429)
_LONGEST_TOLD = 300  # characters of a server's message


class Unreachable(Exception):
    """No answer after all sends: the server or the net, not the request, is at fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a model is and how to treat it.

    Attributes:
        base_url: as "http://127.0.0.1:8000/v1"; None is OpenAI.
        key_name: the environment variable that holds its key.
        concurrency: most requests under way at once.
        timeout: seconds to wait for an answer.
        sends: how many times a request is sent when the server or the net fails.
    """

    base_url: str | None = None
    key_name: str = KEY
    concurrency: int = 64
    timeout: float = 120.0
    sends: int = 8


def is_same(first: str | None, second: str | None) -> bool:
    """Returns whether two base URLs name one server; None is OpenAI."""
    return (first or OPENAI).rstrip("/") == (second or OPENAI).rstrip("/")


def api_key(server: Server) -> str:
    """Returns the server's key from the environment; servers of one's own need none.

    Raises:
        InputError: there is none, and the server is OpenAI's; or it is no key.
    """
    key = os.environ.get(server.key_name, "").strip()
    if not key and is_same(server.base_url, None):
        raise InputError(
            f"{server.key_name} is not set; expected the key of your account in the environment; set it, name your own "
            "server with --base-url, or take --author offline, which needs none."
        )
    if not all("!" <= character <= "~" for character in key):
        raise InputError(
            f"{server.key_name}: holds characters that no key has; expected printable ASCII without spaces; set it anew."
        )
    return key or _NO_KEY


def client_for(server: Server, key: str, *, retries: int = 0, patience: int = 2) -> openai.AsyncOpenAI:
    """Returns a client for one server.

    Args:
        server: where it is.
        key: of the server.
        retries: how often the client itself sends again. `Client` does that, within the limits that all calls share.
        patience: timeouts that a whole request may take.
    """
    return openai.AsyncOpenAI(
        api_key=key,
        base_url=server.base_url or OPENAI,
        max_retries=retries,
        http_client=HttpClient(
            timeout=server.timeout, longest=patience * server.timeout, connections=server.concurrency
        ),
    )


class Client:
    """Sends requests to one server."""

    def __init__(self, server: Server, *, root: Path, price: Price, rate: RateLimit, money: MoneyBudget) -> None:
        """Connects to nothing yet.

        Args:
            server: where the model is.
            root: folder of the images.
            price: what the model costs.
            rate: the limits that all calls share.
            money: the money that all calls share.

        Raises:
            InputError: there is no key, or it is none.
        """
        self._server, self._root, self._price = server, root, price
        self._rate, self._purse = rate, money
        self._key = api_key(server)
        self._client = client_for(server, self._key)
        self._free = asyncio.Semaphore(server.concurrency)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def send(self, request: Request) -> Reply:
        """Asks, as often as it takes within the server's `sends`.

        Raises:
            Unreachable: the server or the net failed every time.
            StopRun: no request can succeed (key, model, address, schema), or the money does not suffice.
            InputError: an image of the request cannot be read.
        """
        body = with_pixels(request.body, self._root)
        size = size_of(request.body)
        held = size.most(self._price)
        tokens = size.tokens(self._price) + size.answer
        async with self._free:
            return await self._send(body, held, tokens)

    async def _send(self, body: dict[str, Any], held: float, tokens: float) -> Reply:
        why = ""
        for sends in range(1, self._server.sends + 1):
            self._purse.hold(held)
            paid, is_lost = 0.0, False
            try:
                await self._rate.take(tokens)
                reply = await self._post(body, sends)
                paid = reply.price
                self._rate.give_back(tokens - reply.usage_in - reply.usage_out)
                return reply
            except openai.APIConnectionError as error:
                # The server may have worked and may charge for it; nobody will ever tell.
                is_lost = is_late(error)
                late = f"no answer within {self._server.timeout:g} s"
                failed = f"the connection failed ({error.__cause__ or error})"
                why = late if is_lost else redacted(failed, self._server, self._key)
            except openai.APIStatusError as error:
                why = redacted(f"status {error.status_code}: {_message(error)}", self._server, self._key)
                if reply := rejection(error.status_code, error.code, why, self._server):
                    return replace(reply, sends=sends)
                self._obey(error)
            except NoCompletion as error:
                why = redacted(str(error), self._server, self._key)
            finally:
                if is_lost:
                    self._purse.lose(held)
                else:
                    self._purse.release(held, paid)
            if sends < self._server.sends:
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (sends - 1))
                await asyncio.sleep(wait * random.uniform(0.75, 1.25))
        raise Unreachable(why)

    async def _post(self, body: dict[str, Any], sends: int) -> Reply:
        # The client's typed method would check the request and the answer field by field: half of its time, for a
        # body that is ours and an answer that `_reply` checks.
        response = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body)
        return _reply(response.content, self._price, sends)

    def _obey(self, error: openai.APIStatusError) -> None:
        """Pauses all calls when the server asks for it."""
        seconds = retry_after(error.response.headers)
        if seconds > _LONGEST_PAUSE:
            raise StopRun(f"stopped: the server asks to wait {seconds:.0f} s; run again after that to go on.")
        if seconds > 0:
            self._rate.pause(seconds)


def is_late(error: openai.APIConnectionError) -> bool:
    """Returns whether an answer did not come in time. The transport calls every failed connection a connect timeout."""
    return isinstance(error, openai.APITimeoutError) and not isinstance(error.__cause__, httpx2.ConnectTimeout)


def redacted(text: str, server: Server, key: str) -> str:
    """Returns what a server said, short, on one line and without the key, which some repeat in their errors."""
    line = _storable(" ".join(text.split()))
    return (line if key == _NO_KEY else line.replace(key, f"[{server.key_name}]"))[:_LONGEST_TOLD]


def is_lasting(status: int) -> bool:
    """Returns whether a status is about the request, so that sending it once more would not help."""
    return 400 <= status < 500 and status not in _ANOTHER_TIME


def rejection(status: int, code: str | None, why: str, server: Server) -> Reply | None:
    """Judges a status that is no success, of a call or of a batch's line.

    Args:
        status: of HTTP.
        code: of the error, as OpenAI calls them.
        why: what the server said; see `redacted`.
        server: which said it.

    Returns:
        The reply that the request has for good; None when it can be sent again.

    Raises:
        StopRun: no request can succeed.
    """
    if code == "insufficient_quota":
        raise StopRun("stopped: the account's quota is used up; add credit or wait, then run again to go on.")
    if not is_lasting(status):
        return None
    if status in _HOPELESS:
        what = f"{server.key_name}, the model's name and the server's address"
        raise StopRun(f"stopped: the server answers {why}; check {what}, then run again.")
    if code == "content_filter" or "content management policy" in why:
        return Reply(status="rejected", text="", why="the server's content filter kept it back")
    if any(word in why for word in ("response_format", "json_schema", "guided", "grammar")):
        raise StopRun(f"stopped: the server takes no strict schema ({why}); run with --schema json_object or none.")
    return Reply(status="rejected", text="", why=f"the server does not take the request ({why})")


def _storable(text: str) -> str:
    """Replaces halves of surrogate pairs, which UTF-8 has no bytes for."""
    return text.encode("utf-8", "replace").decode("utf-8")


class NoCompletion(Exception):
    """Status 200 with something else than a chat completion: a proxy's page, or an answer that was cut on the way."""


def retry_after(headers: httpx2.Headers) -> float:
    """Returns the seconds that a Retry-After header asks for, given as seconds, milliseconds or a date; 0 for none."""
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


def _message(error: openai.APIStatusError) -> str:
    body: Any = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error.message)


def _reply(content: bytes, price: Price, sends: int) -> Reply:
    try:
        completion = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NoCompletion(f"the answer is not JSON ({error})") from error
    return reply_from(completion, price, sends=sends)


def reply_from(completion: Any, price: Price, *, sends: int = 1, batch: bool = False) -> Reply:
    """Reads a chat completion.

    Raises:
        NoCompletion: it is none.
    """
    try:
        choice = completion["choices"][0]
        message = choice["message"]
        text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        usage = completion.get("usage") or {}
        tokens_in, tokens_out = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise NoCompletion(f"the answer is no chat completion ({type(error).__name__}: {error})") from error
    status: Status = "ok"
    why = ""
    if refusal:
        status, why = "refused", "the model refused to answer"
    elif finish == "content_filter":
        status, why = "filtered", "the server's content filter kept it back"
    elif finish == "length":
        status, why = "truncated", "the answer was cut off at the most tokens allowed"
    elif not isinstance(text, str):
        status, why = "malformed", "the answer holds no text"
    return Reply(
        status=status,
        text=_storable(str(refusal or text or "")),
        usage_in=tokens_in,
        usage_cached=cached,
        usage_out=tokens_out,
        price=price.of(tokens_in, cached, tokens_out, batch=batch),
        sends=sends,
        why=why,
    )
