"""The Batch API: half the price, an answer within a day. All that can be asked now goes in one wave, then the next.

A stage's requests are built from the answers of the stage before, so a data set takes a few waves: describe, revise,
transform, and those that are asked again. Every step is in the ledger before the next begins, so a run can be ended at
any time; another one goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import openai

from data_gen.answers import Answers
from data_gen.asking import Answered, Check, Pending, answered, is_final, judge
from data_gen.calls import Answer, Reply, Request
from data_gen.limits import Purse, StopRun
from data_gen.pixels import with_pixels
from data_gen.prices import Price, size_of
from data_gen.schemas import Mode
from data_gen.wire import ANOTHER_TIME, NoCompletion, Server, api_key, client_for, hide, reply_from

ENDPOINT = "/v1/chat/completions"
MOST_REQUESTS = 20_000  # of one batch; OpenAI takes 50,000 and 200 MB
MOST_BYTES = 90_000_000
_ENDED = ("completed", "expired", "cancelled", "failed")
_TOKEN = "medisee"


class Waves:
    """An `Ask` that answers from the ledger and notes what is missing for the next wave."""

    def __init__(self, answers: Answers, *, attempts: int = 4) -> None:
        """See `data_gen.asking.Asker`."""
        self._answers, self._attempts = answers, attempts
        self._missing: dict[str, None] = {}
        self._unstored: list[Request] = []

    async def __call__(self, request: Request, check: Check) -> Answered:
        """Returns the final answer to a request.

        Raises:
            Pending: there is none yet; the request is noted.
        """
        found = self._answers.find(request.key)
        if found is None or not is_final(found, self._attempts):
            if request.key not in self._missing:
                self._missing[request.key] = None
                self._unstored.append(request)
            if len(self._unstored) >= 500:
                self._store()
            raise Pending
        if found.verdict is None:
            found = judge(request.stage, request.mode, found.reply, attempt=found.attempt, check=check)
            await asyncio.wrap_future(self._answers.store(request.key, found))
        return answered(request, found)

    def take(self) -> list[str]:
        """Returns the keys of the wave, all of whose requests are in the ledger, and begins the next."""
        self._store()
        keys = list(self._missing)
        self._missing.clear()
        return keys

    def _store(self) -> None:
        self._answers.store_requests(self._unstored).result()
        self._unstored = []


@dataclass(kw_only=True)
class BatchServer:
    """Submits waves, waits for them and collects their answers.

    Attributes:
        server: where the model is.
        root: folder of the images.
        answers: of the ledger.
        price: what the model costs.
        purse: the money of the ledger.
        mode: how the server is held to the schemas.
        poll: seconds between two looks at a batch.
        say: is told what goes on.
    """

    server: Server
    root: Path
    answers: Answers
    price: Price
    purse: Purse
    mode: Mode
    poll: float = 30.0
    say: Callable[[str], None] = print
    _client: openai.AsyncOpenAI = field(init=False)
    _held: float = 0.0

    def __post_init__(self) -> None:
        self._key = api_key(self.server)
        self._client = client_for(self.server, self._key, retries=self.server.sends)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def submit(self, keys: list[str]) -> None:
        """Sends a wave as one or more batches.

        Raises:
            StopRun: the money does not suffice, or the server takes no batch.
        """
        for key in keys:
            most = size_of(self.answers.body(key)).most(self.price, batch=True)
            self.purse.hold(most)
            self._held += most
        with tempfile.TemporaryDirectory(prefix="data_gen-") as folder:
            for path, count in _files(self._lines(keys), Path(folder)):
                token = uuid.uuid4().hex
                self.answers.start_batch(token, count)
                try:
                    with path.open("rb") as handle:
                        await self._create(token, handle)
                except openai.APIError as error:
                    raise StopRun(
                        f"stopped: the server takes no batch ({self._hide(error)}); run again to go on."
                    ) from error
                self.say(f"submitted a batch of {count:,} requests")

    async def _create(self, token: str, handle: IO[bytes]) -> None:
        uploaded = await self._client.files.create(file=(f"{token}.jsonl", handle), purpose="batch")
        created = await self._client.batches.create(
            completion_window="24h",
            endpoint=ENDPOINT,
            input_file_id=uploaded.id,
            metadata={_TOKEN: token},
        )
        self.answers.mark_batch(token, created.id, "submitted")

    def _lines(self, keys: list[str]) -> Iterator[bytes]:
        for key in keys:
            body = with_pixels(self.answers.body(key), self.root)
            line = {"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body}
            yield json.dumps(line, ensure_ascii=False).encode() + b"\n"

    async def collect(self) -> int:
        """Waits for all batches under way, stores their answers and returns how many came.

        Raises:
            StopRun: the server refused a batch, or cannot be asked.
        """
        count = 0
        try:
            for token, identity in self.answers.open_batches():
                identity = identity or await self._find(token)
                if identity is None:  # it was never created
                    self.answers.mark_batch(token, None, "abandoned")
                    continue
                self.answers.mark_batch(token, identity, "submitted")
                count += await self._collect(token, identity)
        except openai.APIError as error:
            raise StopRun(f"stopped: the server cannot be asked ({self._hide(error)}); run again to go on.") from error
        self.purse.release(self._held, 0)
        self._held = 0.0
        return count

    async def _find(self, token: str) -> str | None:
        """Looks for a batch whose id was never stored: the run ended between its creation and that."""
        async for batch in self._client.batches.list(limit=100):
            if (batch.metadata or {}).get(_TOKEN) == token:
                return batch.id
        return None

    async def _collect(self, token: str, identity: str) -> int:
        while (batch := await self._client.batches.retrieve(identity)).status not in _ENDED:
            done = (
                f"{batch.request_counts.completed:,} of {batch.request_counts.total:,}" if batch.request_counts else ""
            )
            self.say(f"batch {batch.status} {done}".rstrip())
            await asyncio.sleep(self.poll)
        if batch.status == "failed":
            self.answers.mark_batch(token, identity, "failed")
            why = "; ".join(error.message or "" for error in (batch.errors.data if batch.errors else None) or [])
            raise StopRun(
                f"stopped: the server refused the batch ({why or 'no reason given'}); mend that, then run again."
            )
        found: list[tuple[str, Answer]] = []
        for file in (batch.output_file_id, batch.error_file_id):
            if file is not None:
                text = (await self._client.files.content(file)).text
                found += [each for line in text.splitlines() if (each := self._answer(line)) is not None]
        for _, answer in found:
            self.purse.release(0, answer.reply.price)
        self.answers.collect_batch(token, found)
        return len(found)

    def _answer(self, text: str) -> tuple[str, Answer] | None:
        """Reads one line of an output or error file; None when it answers nothing: the request stays open."""
        line: Any = json.loads(text)
        key, response = line.get("custom_id"), line.get("response") or {}
        stage, status = self.answers.stage(key), response.get("status_code") or 0
        if stage is None:
            return None
        if 400 <= status < 500 and status not in ANOTHER_TIME:
            reply = Reply(status="refused", text="", why=f"the server does not take the request (status {status})")
        else:
            try:
                reply = reply_from(response.get("body"), self.price, batch=True)
            except NoCompletion:
                return None
        before = self.answers.find(key)
        return key, judge(stage, self.mode, reply, attempt=before.attempt + 1 if before else 1, check=None)

    def _hide(self, error: openai.APIError) -> str:
        return hide(" ".join(str(error.message).split())[:300], self._key)


def _files(lines: Iterator[bytes], folder: Path) -> Iterator[tuple[Path, int]]:
    """Yields files of lines, none longer than a batch may be; each is gone when the next is written."""
    path = folder / "requests.jsonl"
    count = size = 0
    handle = path.open("wb")
    for line in lines:
        if count and (count >= MOST_REQUESTS or size + len(line) > MOST_BYTES):
            handle.close()
            yield path, count
            handle = path.open("wb")
            count = size = 0
        handle.write(line)
        count, size = count + 1, size + len(line)
    handle.close()
    if count:
        yield path, count
