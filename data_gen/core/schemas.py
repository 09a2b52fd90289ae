"""What each stage answers, as pydantic models and as the strict JSON schemas that servers are asked to follow.

Schemas say the shape and nothing else (servers differ in what they support beyond it); the rules judge the content.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

Stage = Literal["caption", "describe", "revise", "transform", "converse"]
Cell = Literal["attribute-short", "attribute-long", "location-short", "location-long"]
Mode = Literal["strict", "json_object", "none"]

CELLS: tuple[Cell, ...] = ("attribute-short", "attribute-long", "location-short", "location-long")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Caption(_Answer):
    """A few plain sentences about an image."""

    caption: str


class Descriptions(_Answer):
    """Four descriptions of one target that do not name it."""

    attribute_short: str
    attribute_long: str
    location_short: str
    location_long: str

    def text(self, cell: Cell) -> str:
        """Returns the description of a cell."""
        return getattr(self, cell.replace("-", "_"))


class Revision(_Answer):
    """What becomes of one description; `text` is empty when it is removed."""

    cell: Cell
    verdict: Literal["keep", "revise", "remove"]
    text: str
    reason: str


class Revisions(_Answer):
    """What becomes of each description."""

    descriptions: list[Revision]


class CellPair(_Answer):
    """The question and the answer that one description became."""

    cell: Cell
    question: str
    answer: str


class CellPairs(_Answer):
    """The question and the answer that each description became."""

    pairs: list[CellPair]


class Turn(_Answer):
    """One turn of a conversation."""

    question: str
    answer: str


class Conversation(_Answer):
    """The turns of a conversation, in order; the last asks for the target."""

    turns: list[Turn]


ANSWERS: dict[Stage, type[BaseModel]] = {
    "caption": Caption,
    "describe": Descriptions,
    "revise": Revisions,
    "transform": CellPairs,
    "converse": Conversation,
}


@cache
def json_schema(stage: Stage) -> dict[str, Any]:
    """Returns the JSON schema of a stage's answer: every key required, no other key allowed, nothing referenced.

    It is made once: do not change it.
    """
    schema = ANSWERS[stage].model_json_schema()
    parts = schema.pop("$defs", {})

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return plain(parts[value["$ref"].rsplit("/", 1)[-1]])
        # pydantic's titles and our docstrings say nothing to a model and would be paid for with every request.
        shown = {key: each for key, each in value.items() if not (key in _SILENT and isinstance(each, str))}
        return {key: plain(each) for key, each in shown.items()}

    return plain(schema)


_SILENT = ("title", "description")


def response_format(stage: Stage, mode: Mode) -> dict[str, Any] | None:
    """Returns the chat completion's `response_format` in the nested form; None when the server knows none."""
    if mode == "none":
        return None
    if mode == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": stage, "strict": True, "schema": json_schema(stage)}}


def read_answer(stage: Stage, text: str, mode: Mode = "strict") -> BaseModel:
    """Returns a stage's answer from the text of a reply.

    A server that follows no schema may wrap its JSON in words or a fenced block: with mode "none" the outermost braces
    are taken, and a caption may be plain text.

    Raises:
        ValueError: it is not the JSON of this stage; the message says why, briefly.
    """
    text = text.strip()
    if mode == "none":
        start, end = text.find("{"), text.rfind("}")
        if start >= 0 and end > start:
            text = text[start : end + 1]
        elif stage == "caption" and text:
            text = json.dumps({"caption": text})
    try:
        return ANSWERS[stage].model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error
