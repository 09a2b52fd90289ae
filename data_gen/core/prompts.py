"""The prompts: text files with named fields, filled in for one item.

A file holds the system message, a line `=== user ===` and the user message. Fields are in braces. Everything that
changes from item to item is in the user message, so that servers can cache the system message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from data_gen.core.calls import IMAGE_PREFIX, Fault, Request
from data_gen.core.schemas import Mode, Stage, json_schema, response_format

FOLDER = Path(__file__).with_name("prompts")
# The most tokens of an answer: about three times the usual number, so that few are cut off.
MAX_TOKENS: dict[Stage, int] = {"caption": 200, "describe": 400, "revise": 600, "transform": 800, "converse": 800}
_FOCUS = (
    "Tell what is most telling.",
    "Leave out what comes to mind first; tell something less usual, and put it in other words.",
    "Tell a detail that only somebody with much experience would think of.",
    "Be as plain as you can, in everyday words.",
)
MOST_VARIANTS = len(_FOCUS)  # of a template; each asks for something else


@cache
def load(name: str) -> tuple[str, str]:
    """Returns the system and the user part of a prompt; the system part may be empty."""
    system, _, user = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").partition("=== user ===\n")
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
    """Returns the request of a stage; without strict schemas the schema is part of the prompt.

    `fields` are those of `data_gen.core.recipe.fields_of`, `parameters` further keys of the chat completion, and
    `image` is the SHA-256 and the path of the image to show.
    """
    system, user = load(f"describe_{fields['template']}" if stage == "describe" else stage)
    if mode != "strict":
        system = f"{system}\n\n{load('form')[1].format(schema=json.dumps(json_schema(stage)))}"
    content: Any = user.format_map(_in_words(fields)).strip()
    if image:
        url = f"{IMAGE_PREFIX}{image[0]}:{image[1]}"
        content = [{"type": "text", "text": content}, {"type": "image_url", "image_url": {"url": url}}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": content}],
        **(parameters or {}),
    }
    if form := response_format(stage, mode):
        body["response_format"] = form
    return Request(stage, fields["item"], body, mode, dict(fields))


def ask_again(asked: Request, answer: str, faults: Sequence[Fault], attempt: int) -> Request:
    """Returns a request that repeats another one after a faulty answer and gives the reasons."""
    listed = "\n".join(f"- {fault.cell}: {fault.reason}" if fault.cell else f"- {fault.reason}" for fault in faults)
    messages = [
        *asked.body["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": load("again")[1].format(attempt=attempt, faults=listed)},
    ]
    fields = {**asked.fields, "attempt": attempt, "faults": [asdict(fault) for fault in faults]}
    return Request(asked.stage, asked.item, {**asked.body, "messages": messages}, asked.mode, fields)


def _in_words(fields: Mapping[str, Any]) -> dict[str, Any]:
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
