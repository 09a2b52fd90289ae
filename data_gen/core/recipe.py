"""The recipe that all items of a run are made with, and the requests that it leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_gen.core.calls import Request
from data_gen.core.items import Drop, Item, Pair, Template
from data_gen.core.names import Names
from data_gen.core.pixels import identify
from data_gen.core.prompts import MAX_TOKENS, request
from data_gen.core.schemas import Mode, Stage

OFFLINE = "offline"
Style = Literal["single", "multi-turn"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all items of a run are made with.

    Attributes:
        model: whom to ask; "offline" for the offline author.
        names: how categories are called.
        root: folder of the images.
        style: single questions or conversations.
        mode: how the server is held to the schemas.
        caption_mode: the same for the captioner.
        again: how often a faulty answer is asked for again, with the reasons.
        variants: passes of each template; each asks for something else.
        captioner: the model that captions the images; None goes without.
        captions: given captions by record id; they win over the captioner.
        limit_name: how the server calls the most tokens of an answer.
        parameters: further keys of each request, as temperature.
        seed: of what is drawn: the cells of conversations, the offline author's wordings.
    """

    model: str
    names: Names
    root: Path
    style: Style = "single"
    mode: Mode = "strict"
    caption_mode: Mode = "strict"
    again: int = 2
    variants: int = 2
    captioner: str | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_completion_tokens"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item."""

    pairs: list[Pair]
    drops: list[Drop]


def pair_id(item: str, template: str, cell: str, variant: int) -> str:
    """Returns the id of a pair: "<item id>#<template>-<perspective>-<length>", then "-2" in a second variant."""
    return f"{item}#{template}-{cell}{f'-{variant}' if variant > 1 else ''}"


def fields_of(
    item: Item, names: Names, caption: str, *, template: Template = "first", variant: int = 1
) -> dict[str, Any]:
    """Returns the facts that prompts are filled with and that the offline author answers from.

    Categories have their canonical names: what answers are to say.
    """
    return {
        "item": item.id,
        "modality": item.modality,
        "category": names.canonical(item.category),
        "box": list(item.box),
        "entities": [
            {"category": names.canonical(entity.category), "box": list(entity.box)} for entity in item.entities
        ],
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
        # Prompts do not hold the item's id or the seed, by which the offline author varies what it says.
        parameters = {"item": item.id, "seed": recipe.seed}
    needs_image = is_caption and model != OFFLINE
    return request(
        stage,
        fields,
        model=model,
        mode=recipe.caption_mode if is_caption else recipe.mode,
        parameters=parameters,
        image=identify(recipe.root, item.image) if needs_image else None,
    )
