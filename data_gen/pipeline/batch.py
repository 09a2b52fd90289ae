"""The Batch API: half the price, answers within a day. All requests that can be sent now form one wave, then the next.

A stage's requests are built from the answers of the stage before, so a data set takes a few waves: describe, revise,
transform, and what is asked again. Every step is in the ledger before the next begins, so a run can be killed at any
time and the next one goes on from there.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import openai
from tqdm import tqdm

from data_gen.authors import client
from data_gen.authors.client import BLOCKED, NoCompletion, NotAccepted, Parameters, Server, rejected
from data_gen.core.calls import Answer, Request
from data_gen.core.pictures import with_pixels
from data_gen.core.prices import Price, size_of
from data_gen.core.schemas import Mode
from data_gen.ledger.answers import Answers
from data_gen.ledger.limits import ErrorBudget, MoneyBudget, StopRun
from data_gen.pipeline.asking import Answered, Check, Pending, count_answer, is_final, judge, read_stored

ENDPOINT = "/v1/chat/completions"
MOST_REQUESTS = 20_000  # of one batch; OpenAI takes 50,000 and 200 MB
MOST_BYTES = 90_000_000
CORRECT = "correct the settings or the server, then run again"
_ENDED = ("completed", "expired", "cancelled", "failed")
_TOKEN = "medisee"
_MOMENT = 5.0  # seconds after which a batch that was just created is listed for sure


class Waves:
    """An `Ask` that answers from the ledger and notes what is missing for the next wave."""

    def __init__(self, answers: Answers, *, attempts: int = 4) -> None:
        self._answers, self._attempts = answers, attempts
        self._missing: dict[str, None] = {}
        self._unstored: list[Request] = []

    async def __call__(self, request: Request, check: Check) -> Answered:
        """Returns the final answer to a request, or notes the request and raises Pending."""
        found = self._answers.find(request.key)
        if found is None or not is_final(found, self._attempts):
            if request.key not in self._missing:
                self._missing[request.key] = None
                self._unstored.append(request)
            if len(self._unstored) >= 500:
                self._store()
            raise Pending
        return await read_stored(self._answers, request, found, check)

    def take(self) -> list[str]:
        """Returns the keys of the wave, whose requests are then all in the ledger, and begins the next."""
        self._store()
        keys, self._missing = list(self._missing), {}
        return keys

    def _store(self) -> None:
        self._answers.store_requests(self._unstored).result()
        self._unstored = []


@dataclass(kw_only=True)
class BatchServer:
    """Submits waves, waits for them and collects their answers."""

    server: Server
    root: Path  # folder of the images
    answers: Answers
    price: Price
    money: MoneyBudget
    mode: Mode
    attempts: int  # answers to one request until one has the right form
    budget: ErrorBudget
    poll: float  # seconds between two looks at a batch
    _held: float = 0.0

    def __post_init__(self) -> None:
        self._key = client.api_key(self.server)
        self._parameters = Parameters(self.server)
        self._client = client.client_for(self.server, self._key, retries=self.server.sends, patience=20)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def submit(self, keys: list[str]) -> None:
        """Sends a wave as one or more batches."""
        for key in keys:
            most = size_of(self._parameters.apply(self.answers.body(key))).most(self.price, batch=True)
            self.money.hold(most)
            self._held += most
        with tempfile.TemporaryDirectory(prefix="data_gen-") as folder:
            for path, size in _files(self._lines(keys), Path(folder)):
                token = uuid.uuid4().hex
                self.answers.start_batch(token, size)
                try:
                    with path.open("rb") as handle:
                        await self._create(token, handle)
                except openai.APIError as error:
                    raise StopRun(
                        f"stopped: the server takes no batch ({self._redacted(error.message)}); run again to go on."
                    ) from error
                tqdm.write(f"submitted a batch of {size:,} requests")

    async def _create(self, token: str, handle: IO[bytes]) -> None:
        try:
            uploaded = await self._client.files.create(file=(f"{token}.jsonl", handle), purpose="batch")
        except openai.APIError:
            self.answers.mark_batch(token, None, "abandoned")
            raise
        # The client must not send it again: a call that fails may have created a batch, and a second one is paid for, too.
        once = self._client.with_options(max_retries=0)
        for left in reversed(range(self.server.sends)):
            try:
                options = {"endpoint": ENDPOINT, "input_file_id": uploaded.id, "metadata": {_TOKEN: token}}
                identity = (await once.batches.create(completion_window="24h", **options)).id
            except openai.APIError as error:
                is_refused = isinstance(error, openai.APIStatusError) and client.is_lasting(error.status_code)
                identity = None if is_refused else await self._find(token)
                if identity is None and (is_refused or not left):
                    self.answers.mark_batch(token, None, "abandoned")
                    raise
            if identity is not None:
                self.answers.mark_batch(token, identity, "submitted")
                return

    def _lines(self, keys: list[str]) -> Iterator[bytes]:
        for key in keys:
            body = self._parameters.apply(with_pixels(self.answers.body(key), self.root))
            line = {"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body}
            yield json.dumps(line, ensure_ascii=False).encode() + b"\n"

    async def collect(self) -> int:
        """Waits for all batches under way, stores their answers and returns how many came."""
        collected = 0
        try:
            for token, identity in self.answers.open_batches():
                identity = identity or await self._find(token)
                if identity is None:  # it was never created
                    self.answers.mark_batch(token, None, "abandoned")
                    continue
                self.answers.mark_batch(token, identity, "submitted")
                collected += await self._collect(token, identity)
        except openai.APIError as error:
            raise StopRun(
                f"stopped: the server cannot be reached ({self._redacted(error.message)}); run again to go on."
            ) from error
        self.money.release(self._held, 0)
        self._held = 0.0
        return collected

    async def _find(self, token: str) -> str | None:
        """Looks for a batch whose id was never stored: the run or the connection ended right after its creation."""
        for pause in (0.0, _MOMENT):
            await asyncio.sleep(pause)
            async for batch in self._client.batches.list(limit=100):
                if (batch.metadata or {}).get(_TOKEN) == token:
                    return batch.id
        return None

    async def _collect(self, token: str, identity: str) -> int:
        while (batch := await self._client.batches.retrieve(identity)).status not in _ENDED:
            counts = batch.request_counts
            tqdm.write(f"batch {batch.status}" + (f" {counts.completed:,} of {counts.total:,}" if counts else ""))
            await asyncio.sleep(self.poll)
        if batch.status == "failed":
            self.answers.mark_batch(token, identity, "failed")
            why = "; ".join(error.message or "" for error in (batch.errors.data if batch.errors else None) or [])
            why = self._redacted(why) or "no reason given"
            raise StopRun(f"stopped: the server refused the batch ({why}); correct that, then run again.")
        found: dict[str, Answer] = {}
        empty: list[str] = []
        stops: list[StopRun] = []
        for file in (batch.output_file_id, batch.error_file_id):
            content = (await self._client.files.content(file)).content if file is not None else b""
            # Not splitlines: texts may contain other line ends, such as U+2028.
            for line in filter(str.strip, content.decode("utf-8", "replace").split("\n")):
                try:
                    key, answer = self._answer(line)
                    found.setdefault(key, answer)
                except NoCompletion as error:
                    empty.append(str(error))
                except StopRun as error:
                    stops.append(error)
        refused = [answer.reply.why for answer in found.values() if answer.reply.status == "rejected"]
        why = next((why for why in refused if why != BLOCKED), None)
        if why and len(refused) == len(found):
            # Where others are answered the fault is the request's; here it may be the settings' or the server's.
            found.clear()
            stops.append(StopRun(f"stopped: {why}; {CORRECT}."))
        for answer in found.values():
            self.money.release(0, answer.reply.price)
        self.answers.collect_batch(token, list(found.items()))
        if empty:
            tqdm.write(f"{len(empty):,} lines of the batch hold no answer; the first: {self._redacted(empty[0])}")
        if stops:  # only now, when the others are stored
            raise stops[0]
        # Keys are hashes: in their order good and bad are mixed, while the server puts all bad ones at the end.
        for _, answer in sorted(found.items()):
            if is_final(answer, self.attempts):
                count_answer(self.budget, answer)
        return len(found)

    def _answer(self, text: str) -> tuple[str, Answer]:
        """Reads one line of an output or error file; after NoCompletion its request stays open."""
        line = client.from_json(text)
        key = line.get("custom_id") if isinstance(line, dict) else None
        stage = self.answers.stage(key) if isinstance(key, str) and key.isascii() else None
        if key is None or stage is None:
            raise NoCompletion("it answers no request of this ledger")
        response = line.get("response")
        if not isinstance(response, dict):
            raise NoCompletion(_error(line)[1] or "it holds no response")
        status, body = response.get("status_code"), response.get("body")
        reply = None
        if isinstance(status, int) and status >= 400:
            code, message = _error(body)
            why = self._redacted(f"status {status}: {message}")
            try:
                reply = client.rejection(status, code, why, self.server)
            except NotAccepted:
                reply = None if self._parameters.learn(why, self.answers.body(key)) else rejected(why)
            if reply is None:
                raise NoCompletion(why)
        reply = reply or client.reply_from(body, self.price, batch=True)
        return key, judge(stage, self.mode, reply, attempt=self.answers.attempts(key) + 1, check=None)

    def _redacted(self, text: str) -> str:
        return client.redacted(text, self.server, self._key)


def _error(value: Any) -> tuple[str, str]:
    """Returns code and message of the error that an object holds, empty where it has none."""
    error = value.get("error") if isinstance(value, dict) else None
    found = error if isinstance(error, dict) else {}
    return str(found.get("code") or ""), str(found.get("message") or "")


def _files(lines: Iterator[bytes], folder: Path) -> Iterator[tuple[Path, int]]:
    """Yields files of lines, none larger than a batch may be, with their numbers of lines; each replaces the last."""
    path = folder / "requests.jsonl"
    line = next(lines, None)
    while line is not None:
        number = size = 0
        with path.open("wb") as handle:
            while line is not None and not (number and (number >= MOST_REQUESTS or size + len(line) > MOST_BYTES)):
                handle.write(line)
                number, size = number + 1, size + len(line)
                line = next(lines, None)
        yield path, number
