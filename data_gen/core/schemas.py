"""The answers of each stage as pydantic models, and as the strict JSON schemas that servers are asked to follow.

Schemas define the shape only (servers differ in what they support beyond it); the rules judge the content.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from medisee.foundation.json_files import parse_json

Stage = Literal["caption", "describe", "revise", "transform", "converse"]
Cell = Literal["attribute-short", "attribute-long", "location-short", "location-long"]
Mode = Literal["strict", "json_object", "none"]

_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)
_TAG = r"(?:think(?:ing)?|thoughts?|reasoning)"
# Up to the last end of thoughts: some chat formats open them in the prompt.
_UNOPENED = re.compile(rf"^.*(?:</{_TAG}>|\[/THINK\]|<\|channel\|>final<\|message\|>)", re.DOTALL | re.IGNORECASE)
_THOUGHTS = re.compile(rf"^\s*(?:<{_TAG}>|\[THINK\]|<\|channel\|>analysis).*", re.DOTALL | re.IGNORECASE)

CELLS: tuple[Cell, ...] = get_args(Cell)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Caption(_Answer):
    caption: str  # a few plain sentences about an image


class Descriptions(_Answer):  # of one target; none of them names it
    attribute_short: str
    attribute_long: str
    location_short: str
    location_long: str

    def text(self, cell: Cell) -> str:
        """Returns the description of a cell."""
        return getattr(self, cell.replace("-", "_"))


class Revision(_Answer):  # the verdict on one description
    cell: Cell
    verdict: Literal["keep", "revise", "remove"]
    text: str  # empty when it is removed
    reason: str


class Revisions(_Answer):
    descriptions: list[Revision]


class CellPair(_Answer):  # made from one description
    cell: Cell
    question: str
    answer: str


class CellPairs(_Answer):
    pairs: list[CellPair]


class ConversationTurn(_Answer):
    question: str
    answer: str


class Conversation(_Answer):
    turns: list[ConversationTurn]  # in order; the last asks for the target


ANSWERS: dict[Stage, type[BaseModel]] = {
    "caption": Caption,
    "describe": Descriptions,
    "revise": Revisions,
    "transform": CellPairs,
    "converse": Conversation,
}


@cache
def json_schema(stage: Stage) -> dict[str, Any]:
    """Returns the JSON schema of a stage's answer, to be left unchanged: all keys required, no others, no references."""
    schema = ANSWERS[stage].model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, list):
            return [inlined(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inlined(parts[value["$ref"].rsplit("/", 1)[-1]])
        # pydantic's titles and our docstrings mean nothing to a model and would be paid for with every request.
        silent = [key for key in ("title", "description") if isinstance(value.get(key), str)]
        return {key: inlined(each) for key, each in value.items() if key not in silent}

    return inlined(schema)


def response_format(stage: Stage, mode: Mode) -> dict[str, Any] | None:
    """Returns the chat completion's `response_format`; None when the server supports none."""
    if mode == "none":
        return None
    if mode == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": stage, "strict": True, "schema": json_schema(stage)}}


def read_answer(stage: Stage, text: str, mode: Mode = "strict") -> BaseModel:
    """Reads a stage's answer from the text of a reply; ValueError gives the first reason why it is not one.

    The JSON may be a fenced block. With mode "none" it may also stand among words, and a caption may be plain text.
    """
    text = text.strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1]
    if mode == "none" and (among := re.search(r"\{.*\}", text, re.DOTALL)):
        text = among[0]
    elif mode == "none" and stage == "caption" and text:
        return Caption(caption=text)
    try:
        return ANSWERS[stage].model_validate_json(json.dumps(parse_json(text)))
    except ValidationError as error:
        raise ValueError(reasons(error)[0]) from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def without_thoughts(text: str) -> str:
    """Returns an answer without the thoughts that some models write before it; empty where they never end."""
    return _THOUGHTS.sub("", _UNOPENED.sub("", text, count=1), count=1)


def reasons(error: ValidationError) -> list[str]:
    """Returns what pydantic found wrong: "key.subkey: why" for each value."""
    found = error.errors(include_url=False, include_context=False)
    return [": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"]))) for each in found]
