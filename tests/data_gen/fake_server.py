"""A small OpenAI-compatible server whose answers are a pure function of the request, and that misbehaves on request.

It knows chat completions, files and batches. As a program it is `python fake_server.py SETTINGS.json`: it prints its
port, and appends a line to the log for every request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.core.calls import canonical

CELLS = ("attribute-short", "attribute-long", "location-short", "location-long")
SYLLABLES = (
    "bal",
    "cor",
    "den",
    "fim",
    "gor",
    "hup",
    "jal",
    "kem",
    "lor",
    "mip",
    "nas",
    "pol",
    "rud",
    "sev",
    "tam",
    "vik",
)


@dataclass
class Settings:
    """How the server behaves; may be changed while it runs.

    Attributes:
        delay: seconds until an answer.
        faults: kinds to draw from: "429", "500", "timeout", "drop", "garbage", "html", "refusal", "truncated",
            "malformed", "filter", "words" (a refusal in every text), "tool" (a call of a tool), or a status such as "422".
        share: of requests with a fault.
        in_a_row: most consecutive faults of one request.
        seed: of the draw.
        slips: share of answers that break a rule when first asked; half of them do so again whenever asked.
        retry_after: headers of a 429.
        strict: whether it takes `response_format` json_schema; otherwise status 400.
        prose: answers are wrapped in words and a code fence.
        thoughts: what precedes an answer.
        takes_no: parameters that get a status 400, in OpenAI's words.
        log: file that requests are appended to.
        remember: whether it keeps the bodies.
    """

    delay: float = 0.0
    faults: tuple[str, ...] = ()
    share: float = 1.0
    in_a_row: int = 3
    seed: int = 0
    slips: float = 0.0
    retry_after: dict[str, str] = field(default_factory=dict)
    strict: bool = True
    prose: bool = False
    thoughts: str = ""
    takes_no: tuple[str, ...] = ()
    log: str | None = None
    remember: bool = True


def key_of(body: dict[str, Any]) -> str:
    """Returns the key that the ledger has for a request's body without images."""
    return hashlib.sha256(canonical(body).encode()).hexdigest()


class FakeServer:
    """Listens on 127.0.0.1, in a thread or as a separate program."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at: list[float] = []
        self.most_at_once = 0
        self.under_way = 0
        self.count = 0
        self.first = self.last = 0.0  # times of the first request and of the last answer
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.batch_looks = 1  # how many looks at a batch find it under way
        self.batch_errors: set[int] = set()  # lines of a batch that fail with status 500
        self.batch_rejects: dict[int, tuple[int, str]] = {}  # lines that fail with another status and message
        self.batch_noise = b""  # stands before the lines of an output file
        self.batch_refusal = ""  # why batches fail as a whole
        self.batch_failures: list[int] = []  # statuses of the next creations, which create nothing
        self.fail_after_batch = False  # creates a batch and drops the connection
        self._random = random.Random(settings.seed)
        self._faults: Counter[str] = Counter()
        self._log = Path(settings.log) if settings.log else None
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Serves in a thread."""
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def serve(self) -> None:
        """Serves until the process ends."""
        self._loop.run_forever()

    def stop(self) -> None:
        """Ends a thread's serving."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def respond(self, connection: _Connection, *, method: str, path: str, headers: dict[str, str], data: bytes) -> None:
        """Answers one HTTP request."""
        if path == "/v1/chat/completions":
            self._chat(connection, headers, json.loads(data))
        elif path == "/count":
            facts = {"count": self.count, "first": self.first, "last": self.last, "most": self.most_at_once}
            connection.send(200, json.dumps(facts).encode())
        else:
            connection.send(*self._batch_api(connection, method=method, path=path, headers=headers, data=data))

    def _chat(self, connection: _Connection, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.count += 1
        self.first = self.first or time.time()
        key = key_of(body)
        if self.settings.remember:
            self.bodies.append(body)
            self.headers.append(headers)
            self.at.append(time.time())
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        fault = self._draw(key)
        if self._log:
            line = {"key": key, "at": time.time(), "fault": fault, "count": self.count}
            with self._log.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        asyncio.get_running_loop().call_later(self.settings.delay, self._finish, connection, body, fault)

    def _draw(self, key: str) -> str | None:
        settings = self.settings
        if settings.faults and self._faults[key] < settings.in_a_row and self._random.random() < settings.share:
            self._faults[key] += 1
            return self._random.choice(settings.faults)
        self._faults[key] = 0
        return None

    def _finish(self, connection: _Connection, body: dict[str, Any], fault: str | None) -> None:
        self.under_way -= 1
        self.last = time.time()
        if fault == "timeout":
            return
        if fault == "drop":
            connection.drop()
        elif fault == "garbage":
            connection.send_bytes(b"this is no HTTP\r\n\r\n")
        elif fault == "429":
            connection.send(429, _error("slow down", "rate_limit_exceeded"), self.settings.retry_after)
        elif fault == "quota":
            connection.send(429, _error("no credit", "insufficient_quota"))
        elif fault == "500":
            connection.send(500, _error("internal", None))
        elif fault == "401":
            connection.send(401, _error("wrong key: " + connection.authorization, "invalid_api_key"))
        elif fault == "400":
            connection.send(400, _error("too long", "context_length_exceeded"))
        elif fault in ("402", "403", "404", "413", "422"):
            connection.send(int(fault), _error("not like this", None))
        elif wrong := next((name for name in self.settings.takes_no if name in body), None):
            told = f"Unsupported parameter: '{wrong}' is not supported with this model."
            told += " Use 'max_completion_tokens' instead." if wrong == "max_tokens" else ""
            connection.send(400, _error(told, "unsupported_parameter"))
        elif fault == "echo":  # half a surrogate pair, then the key where a long message is cut
            connection.send(400, _error("\ud800" + "x" * 280 + connection.authorization, None))
        elif fault == "html":
            connection.send(200, b"<html>a proxy's page</html>")
        elif not self.settings.strict and (body.get("response_format") or {}).get("type") == "json_schema":
            connection.send(400, _error("response_format json_schema is not supported", None))
        else:
            connection.send(200, json.dumps(completion(body, fault, self.settings)).encode())

    def _batch_api(
        self, connection: _Connection, *, method: str, path: str, headers: dict[str, str], data: bytes
    ) -> tuple[int, bytes]:
        path, _, _ = path.partition("?")
        if (method, path) == ("POST", "/v1/files"):
            identity = f"file-{len(self.files)}"
            self.files[identity] = _uploaded(headers["content-type"], data)
            made = {
                "id": identity,
                "object": "file",
                "bytes": len(data),
                "created_at": 1,
                "filename": "x",
                "purpose": "batch",
            }
            return 200, json.dumps({**made, "status": "processed"}).encode()
        if (method, path) == ("POST", "/v1/batches") and self.batch_failures:
            return self.batch_failures.pop(0), _error("no batch today", None)
        if (method, path) == ("POST", "/v1/batches"):
            batch = self._make_batch(json.loads(data))
            if self.fail_after_batch:
                connection.drop()
            return 200, json.dumps(batch).encode()
        if (method, path) == ("GET", "/v1/batches"):
            listed = {"object": "list", "data": list(self.batches.values()), "has_more": False}
            return 200, json.dumps(listed).encode()
        if found := re.fullmatch(r"/v1/batches/(\S+)", path):
            batch = self.batches[found[1]]
            batch["looks"] += 1
            if batch["looks"] > self.batch_looks:
                batch["status"] = "failed" if self.batch_refusal else "completed"
                batch["errors"] = {"data": [{"message": self.batch_refusal}]}
            return 200, json.dumps(batch).encode()
        if found := re.fullmatch(r"/v1/files/(\S+)/content", path):
            return 200, self.files[found[1]]
        return 404, _error("no such page", None)

    def _make_batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        outputs: dict[bool, list[str]] = defaultdict(list)
        for number, text in enumerate(self.files[wanted["input_file_id"]].decode().splitlines()):
            line = json.loads(text)
            self.bodies.append(line["body"])
            rejects = {**dict.fromkeys(self.batch_errors, (500, "internal")), **self.batch_rejects}
            fails = number in rejects
            response: dict[str, Any] = {"status_code": 200, "body": completion(line["body"], None, self.settings)}
            if fails:
                status, message = rejects[number]
                response = {"status_code": status, "body": {"error": {"message": message, "code": None}}}
            # Its id holds an end of line that JSON lets stand as it is.
            made = {"id": "a\u2028b", "custom_id": line["custom_id"], "response": response}
            outputs[fails].append(json.dumps(made, ensure_ascii=False))
        self.batch_errors, self.batch_rejects = set(), {}
        identity = f"batch-{len(self.batches)}"
        for fails, lines in outputs.items():
            noise = b"" if fails else self.batch_noise
            self.files[f"{identity}-{fails}"] = noise + "\n".join(lines).encode()
        batch = {
            "id": identity,
            "object": "batch",
            "endpoint": wanted["endpoint"],
            "completion_window": "24h",
            "created_at": 1,
            "input_file_id": wanted["input_file_id"],
            "status": "in_progress",
            "metadata": wanted["metadata"],
            "output_file_id": f"{identity}-False" if outputs[False] else None,
            "error_file_id": f"{identity}-True" if outputs[True] else None,
            "request_counts": {"completed": 0, "failed": 0, "total": len(outputs[False]) + len(outputs[True])},
            "looks": 0,
        }
        self.batches[identity] = batch
        return batch


class _Connection(asyncio.Protocol):
    def __init__(self, server: FakeServer) -> None:
        self._server, self._buffer = server, b""
        self.authorization = ""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            stop = end + 4 + int(headers.get("content-length", 0))
            if len(self._buffer) < stop:
                return
            body, self._buffer = self._buffer[end + 4 : stop], self._buffer[stop:]
            method, path, _ = first.split(" ")
            self.authorization = headers.get("authorization", "")
            self._server.respond(self, method=method, path=path, headers=headers, data=body)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        """Sends a response; a page that begins with "<" is HTML."""
        kind = "text/html" if content.startswith(b"<") else "application/json"
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._transport.write("\r\n".join([*lines, "", ""]).encode() + content)

    def send_bytes(self, content: bytes) -> None:
        """Sends what need not be HTTP, and closes."""
        self._transport.write(content)
        self._transport.close()

    def drop(self) -> None:
        """Closes without an answer."""
        self._transport.abort()


def _error(message: str, code: str | None) -> bytes:
    return json.dumps({"error": {"message": message, "type": "x", "code": code, "param": None}}).encode()


def _uploaded(content_type: str, data: bytes) -> bytes:
    boundary = content_type.partition("boundary=")[2].encode()
    part = next(part for part in data.split(b"--" + boundary) if b'name="file"' in part)
    return part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")


def completion(body: dict[str, Any], fault: str | None, settings: Settings) -> dict[str, Any]:
    """Returns the chat completion that answers a body."""
    text = json.dumps(answer(body, settings.slips))
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    finish = "stop"
    if settings.prose:
        message["content"] = f"Sure, here it is:\n```json\n{text}\n```\nI hope this helps."
    message["content"] = settings.thoughts + message["content"]
    if settings.thoughts:
        message["reasoning_content"] = "Let me think."
    if fault == "words":
        message["content"] = json.dumps(_refusing(answer(body, 0.0)))
    elif fault == "tool":
        message |= {"content": None, "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f"}}]}
    elif fault == "refusal":
        message |= {"content": None, "refusal": "I cannot help with that."}
    elif fault == "truncated":
        message["content"], finish = text[: len(text) // 2], "length"
    elif fault == "malformed":
        message["content"] = text[: len(text) // 2]
    elif fault == "filter":
        message["content"], finish = "", "content_filter"
    usage = {"prompt_tokens": 400, "completion_tokens": 100, "total_tokens": 500}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
        "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 100}},
    }


REFUSAL = "I'm sorry, but I can't help with interpreting medical images."


def _refusing(value: Any) -> Any:
    if isinstance(value, list):
        return [_refusing(each) for each in value]
    if isinstance(value, dict):
        kept = {"cell": value.get("cell"), "verdict": "revise"}
        return {key: kept[key] if key in kept else _refusing(each) for key, each in value.items()}
    return REFUSAL


def answer(body: dict[str, Any], slips: float) -> dict[str, Any]:
    """Returns what the stage of a request asks for, in words that mean nothing and keep the rules."""
    whole = json.dumps(body)
    first = body["messages"][1]["content"]
    first = first if isinstance(first, str) else first[0]["text"]
    chance = int(hashlib.sha256(first.encode()).hexdigest()[:8], 16) / 16**8
    is_first = len(body["messages"]) == 2
    slip = chance < slips / 2 or (chance < slips and is_first)
    label = (re.search(r"^Target: (.*):", first, re.M) or ["", "thing"])[1]
    told = dict(re.findall(r"^((?:attribute|location)-(?:short|long)): (.*)$", first, re.M))
    draw = random.Random(canonical(body))
    if '"attribute_short"' in whole or "attribute_short\\" in whole:
        texts = {cell.replace("-", "_"): description(draw, cell.endswith("long")) for cell in CELLS}
        return {**texts, **({"attribute_short": f"the {label} that is named here by mistake"} if slip else {})}
    if "verdict" in whole:
        return {"descriptions": [_revision(draw, cell) for cell in told]}
    if '"pairs"' in whole or "pairs\\" in whole:
        explained = f"The {label} is meant, since it {_word(draw)}s the {_word(draw)} and the {_word(draw)}."
        pairs = [{"cell": cell, "question": f"Which is {text}?", "answer": explained} for cell, text in told.items()]
        if not is_first:
            for pair in pairs:
                pair["question"] = f"Which is {description(draw, pair['cell'].endswith('long'))}?"
        return {"pairs": pairs}
    if '"turns"' in whole or "turns\\" in whole:
        count = int((re.search(r"^Turns: (\d+)", first, re.M) or ["", "2"])[1])
        turn = {"question": f"What does this {_word(draw)} image show?", "answer": f"It shows a {_word(draw)} view."}
        asks_long = "Last question: long" in first
        last = {
            "question": f"Which is {label if slip else description(draw, asks_long)}?",
            "answer": f"The {label} is meant, since it {_word(draw)}s the {_word(draw)} and the {_word(draw)}.",
        }
        return {"turns": [turn] * (count - 1) + [last]}
    return {"caption": "It may be a liver." if slip else f"A {_word(draw)} slice of the {_word(draw)}."}


def description(draw: random.Random, is_long: bool) -> str:
    """Returns 8 words, or 13."""
    text = f"the {_word(draw)} part that {_word(draw)}s the {_word(draw)} {_word(draw)}"
    return f"{text} and {_word(draw)}s the {_word(draw)} {_word(draw)}" if is_long else text


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(SYLLABLES, k=3))


def _revision(draw: random.Random, cell: str) -> dict[str, str]:
    verdict = draw.choice(["keep"] * 8 + ["revise", "remove"])
    text = description(draw, cell.endswith("long")) if verdict == "revise" else ""
    return {"cell": cell, "verdict": verdict, "text": text, "reason": f"it is {_word(draw)}"}


if __name__ == "__main__":
    server = FakeServer(Settings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    print(server.port, flush=True)
    server.serve()
