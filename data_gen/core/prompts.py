"""The prompts: text files with named fields, filled in for one item.

A file holds the system message, then a line `=== user ===`, then the user message. Fields stand in braces. All that
changes from item to item stands in the user message, so that servers can cache the system message.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from data_gen.core.calls import IMAGE_PREFIX, Fault, Request
from data_gen.core.schemas import Mode, Stage, json_schema, response_format

Message: TypeAlias = dict[str, Any]

FOLDER = Path(__file__).with_name("prompts")
MARK = "=== user ==="
FIELDS: dict[str, frozenset[str]] = {
    "caption": frozenset({"modality"}),
    "describe_first": frozenset({"modality", "caption", "entities", "target", "focus"}),
    "describe_second": frozenset({"modality", "caption", "entities", "target", "focus"}),
    "revise": frozenset({"modality", "caption", "entities", "target", "descriptions"}),
    "transform": frozenset({"modality", "entities", "target", "descriptions"}),
    "converse": frozenset({"modality", "caption", "entities", "target", "turns", "length", "perspective"}),
    "again": frozenset({"attempt", "faults"}),
    "form": frozenset({"schema"}),
}
"""The prompts and the fields that each of them has."""

MAX_TOKENS: dict[Stage, int] = {"caption": 200, "describe": 400, "revise": 600, "transform": 800, "converse": 800}
"""The most tokens that an answer may have: about three times a usual one, so that few are cut off."""

_FOCUS = (
    "Tell what is most telling.",
    "Leave out what comes to mind first; tell something less usual, and put it in other words.",
    "Tell a detail that only somebody with much experience would think of.",
    "Be as plain as you can, in everyday words.",
)
MOST_VARIANTS = len(_FOCUS)
"""Passes of a template that ask for different things."""


@cache
def load(name: str) -> tuple[str, str]:
    """Returns the system and the user part of a prompt; the system part may be empty.

    Raises:
        ValueError: a file of the package has not the fields that it should have.
    """
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    system, mark, user = text.partition(f"{MARK}\n")
    found = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    if not mark or found != FIELDS[name] or "{" in system:
        raise ValueError(f"prompts/{name}.txt has the fields {sorted(found)}; expected {sorted(FIELDS[name])}")
    return system.strip(), user.strip()


def request(
    stage: Stage,
    fields: Mapping[str, Any],
    *,
    model: str,
    mode: Mode = "strict",
    parameters: Mapping[str, Any] | None = None,
    image: tuple[str, str] | None = None,
) -> Request:
    """Returns the request of a stage.

    Args:
        stage: what kind of answer is wanted.
        fields: facts about the item; see `data_gen.pipeline.stages.fields_of`.
        model: whom to ask.
        mode: how the server is held to the schema; without strict schemas the schema stands in the prompt.
        parameters: further keys of the chat completion, as temperature.
        image: sha256 and path of the image to show.
    """
    system, user = load(f"describe_{fields['template']}" if stage == "describe" else stage)
    if mode != "strict":
        _, form = load("form")
        system = f"{system}\n\n{form.format(schema=json.dumps(json_schema(stage)))}"
    text = user.format_map(_plain(fields)).strip()
    content: Any = text
    if image:
        url = f"{IMAGE_PREFIX}{image[0]}:{image[1]}"
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": content}],
        **(parameters or {}),
    }
    if form := response_format(stage, mode):
        body["response_format"] = form
    return Request(stage, fields["item"], body, mode, dict(fields))


def ask_again(asked: Request, answer: str, faults: Sequence[Fault], attempt: int) -> Request:
    """Returns the request that repeats another one after a faulty answer, with the reasons."""
    _, user = load("again")
    listed = "\n".join(f"- {fault.cell}: {fault.reason}" if fault.cell else f"- {fault.reason}" for fault in faults)
    messages = [
        *asked.body["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": user.format(attempt=attempt, faults=listed)},
    ]
    told = [{"cell": fault.cell, "rule": fault.rule, "reason": fault.reason} for fault in faults]
    fields = {**asked.fields, "attempt": attempt, "faults": told}
    return Request(asked.stage, asked.item, {**asked.body, "messages": messages}, asked.mode, fields)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the fields of an item into words."""
    entities = fields.get("entities", [])
    descriptions = fields.get("descriptions", {})
    return {
        **fields,
        "modality": str(fields["modality"]).replace("_", " "),
        "caption": fields.get("caption") or "none",
        "entities": "\n".join(f"- {each['category']}: {_numbers(each['box'])}" for each in entities),
        "target": f"{fields['category']}: {_numbers(fields['box'])}",
        "descriptions": "\n".join(f"{cell}: {text}" for cell, text in descriptions.items()),
        "focus": _FOCUS[fields.get("variant", 1) - 1],
    }


def _numbers(box: Sequence[float]) -> str:
    return ", ".join(f"{side:.2f}" for side in box)
