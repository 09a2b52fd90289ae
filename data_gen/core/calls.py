"""A Request to a model, known by the hash of what is asked, and the Reply that came back."""

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
    """Returns JSON that is the same for the same value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Attributes:
        stage: what kind of answer is wanted.
        item: the id of the item that first asked; two items may ask the same.
        body: what a chat completion takes: model, messages, response_format and parameters. An image in it is
            "image:<sha256>:<path relative to the root>"; only the wire turns it into pixels.
        mode: how the server is held to the schema.
        fields: what the prompt was filled with; not part of the key. The offline author answers from it.
    """

    stage: Stage
    item: str
    body: dict[str, Any]
    mode: Mode = "strict"
    fields: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """The sha256 of the body's canonical JSON: model, messages, schema and parameters."""
        return hashlib.sha256(canonical(self.body).encode("ascii")).hexdigest()

    @property
    def model(self) -> str:
        """The model that is asked."""
        return self.body["model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back.

    Attributes:
        status: "ok", or why it is of no use: not the JSON asked for, cut off, refused by the model, kept back by the
            server's content filter, or the request was rejected, as it would be whenever it is sent.
        text: the answer as it came; of a refusal its words.
        usage_in: tokens of the prompt, the cached among them.
        usage_cached: tokens of the prompt that the server had cached.
        usage_out: tokens of the answer.
        price: in US dollars.
        sends: how many times it was sent until the server answered.
        why: what is wrong with it, for people.
    """

    status: Status
    text: str
    usage_in: int = 0
    usage_cached: int = 0
    usage_out: int = 0
    price: float = 0.0
    sends: int = 1
    why: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one part of an answer: the cell (empty for the whole), the rule and a sentence."""

    cell: str
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A stored reply and its verdict: the faults that the rules found, None when nobody has looked yet."""

    reply: Reply
    attempt: int
    verdict: tuple[Fault, ...] | None
