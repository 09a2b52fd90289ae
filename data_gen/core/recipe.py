"""The settings that all items of a run share, and the requests that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_gen.core.calls import Request
from data_gen.core.items import Drop, Item, Pair, Template
from data_gen.core.names import Names
from data_gen.core.pictures import identify
from data_gen.core.prompts import MAX_TOKENS, request
from data_gen.core.schemas import Mode, Stage

OFFLINE = "offline"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that all items of a run share."""

    model: str  # its name; "offline" for the offline author
    names: Names
    root: Path  # folder of the images
    style: Literal["single", "multi-turn"] = "single"
    mode: Mode = "strict"  # how the server is held to the schemas
    caption_mode: Mode = "strict"
    again: int = 2  # how often a faulty answer is requested again, with the reasons
    variants: int = 2  # passes of each template; each asks for something else
    captioner: str | None = None  # the model that captions the images
    captions: Mapping[str, str] = field(default_factory=dict)  # given ones by record id; they precede the captioner's
    # The key that the server knows.
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_completion_tokens"
    parameters: Mapping[str, Any] = field(default_factory=dict)  # further keys of each request, such as temperature
    seed: int = 0  # of random choices: the cells of conversations, the offline author's wordings


@dataclass(frozen=True, slots=True)
class Outcome:  # of an item
    pairs: list[Pair]
    drops: list[Drop]


def pair_id(item: str, template: str, cell: str, variant: int) -> str:
    """Returns the id of a pair: "<item id>#<template>-<perspective>-<length>", then "-2" in a second variant."""
    return f"{item}#{template}-{cell}{f'-{variant}' if variant > 1 else ''}"


def fields_of(
    item: Item, names: Names, caption: str, *, template: Template = "first", variant: int = 1
) -> dict[str, Any]:
    """Returns the facts for prompts and the offline author, with the categories' names that answers should use."""
    return {
        "item": item.id,
        "modality": item.modality,
        "category": names.canonical(item.category),
        "box": list(item.box),
        "entities": [{"category": names.canonical(each.category), "box": list(each.box)} for each in item.entities],
        "caption": caption,
        "template": template,
        "variant": variant,
        "attempt": 0,
        "faults": [],
    }


def request_of(stage: Stage, fields: Mapping[str, Any], recipe: Recipe, item: Item) -> Request:
    """Returns the request of a stage about an item."""
    is_caption = stage == "caption"
    model = recipe.captioner if is_caption and recipe.captioner else recipe.model
    parameters: dict[str, Any] = {recipe.limit_name: MAX_TOKENS[stage], **recipe.parameters}
    if model == OFFLINE:
        # Prompts do not contain the item's id or the seed, by which the offline author varies its wording.
        parameters = {"item": item.id, "seed": recipe.seed}
    mode = recipe.caption_mode if is_caption else recipe.mode
    image = identify(recipe.root, item.image) if is_caption and model != OFFLINE else None
    return request(stage, fields, model=model, mode=mode, parameters=parameters, image=image)
