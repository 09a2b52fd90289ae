"""A Request to a model, identified by the hash of its body, and the Reply that came back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from data_gen.core.schemas import Mode, Stage

Status = Literal["ok", "malformed", "truncated", "refused", "filtered", "rejected"]

IMAGE_PREFIX = "image:"


def canonical(value: Any) -> str:
    """Returns the same JSON for equal values: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Request:
    stage: Stage
    item: str  # the id of the item that first sent it; two items may share a request
    # Of the chat completion: model, messages, response_format and parameters. An image in it is
    # "image:<sha256>:<path relative to the root>"; only the client replaces it with pixels.
    body: dict[str, Any]
    mode: Mode = "strict"
    fields: dict[str, Any] = field(default_factory=dict)  # the values in the prompt, for the offline author; not hashed

    @cached_property
    def key(self) -> str:
        """The SHA-256 of the body's canonical JSON."""
        return hashlib.sha256(canonical(self.body).encode("ascii")).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    # "ok", or why it cannot be used: not the requested JSON, cut off, refused by the model, withheld by the server's
    # content filter, or the request was rejected and always would be.
    status: Status
    text: str  # the answer or the refusal, unchanged
    usage_in: int = 0  # tokens of the prompt, including those that the server had cached
    usage_cached: int = 0
    usage_out: int = 0
    price: float = 0.0  # in US dollars
    sends: int = 1  # until the server answered
    why: str = ""  # what is wrong with it, in words


@dataclass(frozen=True, slots=True)
class Fault:
    cell: str  # the part of an answer that breaks a rule; empty for the whole answer
    rule: str  # its short name
    reason: str  # a sentence


@dataclass(frozen=True, slots=True)
class Answer:
    reply: Reply
    attempt: int
    verdict: tuple[Fault, ...] | None  # the faults that the rules found; None before they were applied
