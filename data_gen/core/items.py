"""What goes through a run: an Item (one image with one target) goes in, Pairs (question and answer) come out.

What keeps an item from becoming pairs is a Drop; a reviewer's verdict on a pair is a Decision.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, ConfigDict, with_config

from medisee.foundation.errors import InputError
from medisee.foundation.files import sha256
from medisee.records.jsonl import Text, read_line, read_lines
from medisee.records.manifest import Manifest
from medisee.records.masks import Box, MaskFiles, Rle, encode_mask, mask_box
from medisee.records.records import Length, Perspective, Record, Target

Template = Literal["first", "second"]
Verdict = Literal["accept", "reject", "edit"]

TEMPLATES: tuple[Template, ...] = ("first", "second")


def _shares(box: Box) -> Box:
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"the box {list(box)} is not inside the image")
    return box


Shares = Annotated[Box, AfterValidator(_shares)]
"""(x0, y0, x1, y1) as fractions of an image's width and height, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Entity:  # a labelled object of an image
    category: str
    box: Shares


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image with its one target: the unit of work."""

    id: str  # "<record id>/<target id>", unique
    record: str
    target: str
    image: str  # path relative to the root of the images
    mask: str | Rle  # path of a mask image relative to the root, or an RLE
    modality: str  # such as "ct"
    source: str  # the data set that the image comes from
    case: str  # the patient or volume
    category: str  # the target's class name
    box: Shares  # the target's
    entities: tuple[Entity, ...]  # all labelled objects of the image, including the target
    width: int  # of the image, in pixels
    height: int
    image_sha256: str = ""  # of the image file; empty in old ledgers, which did not store it, and then not checked
    mask_sha256: str = ""  # of the mask file; empty for an RLE too


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One question-answer pair about an item's target."""

    id: str  # "<item id>#<template>-<perspective>-<length>"; then "-2" in a second variant, "-t<turn>" of a conversation
    item: str
    template: Template  # the prompt that it comes from
    perspective: Perspective  # what the question reasons from
    length: Length  # of the question's description: short is 5-15 words, long 10-20
    question: Text  # describes the target without its name
    answer: Text  # names the target and explains
    turn: int = 0  # position in a conversation, from 1 on; 0 for a single question
    conversation: str | None = None  # the id that the turns of a conversation share
    author: str  # the model's name, or "offline"


@dataclass(frozen=True, slots=True)
class Drop:
    """What was left out and why."""

    item: str
    stage: str  # where it failed: "caption", "describe", "revise", "transform", "converse" or "duplicates"
    rule: str  # its short name
    reason: str
    pair: str = ""  # the id that the pair would have had; empty when it is not about one pair


@dataclass(frozen=True, slots=True)
class Decision:
    """A reviewer's verdict on a pair; `question` and `answer` are the new wording when the verdict is "edit"."""

    pair: str
    reviewer: str
    verdict: Verdict
    reason: str = ""
    question: str = ""
    answer: str = ""


def items_from_manifest(manifest: Manifest, seed: int) -> Iterator[Item]:
    """Draws one target per image, in the manifest's order; records without targets are skipped.

    An object (a case's category) is not drawn again while others of the image have not been drawn. Then a category
    that the image holds once goes before one that it holds several times (a question about one of two cysts is
    ambiguous), then the category drawn least so far; ties are broken by a hash of the seed and the ids.
    """
    drawn_objects: set[tuple[str, str, str]] = set()
    drawn: Counter[str] = Counter()
    for record in manifest:
        if not record.targets:
            continue
        held = Counter(target.category for target in record.targets)

        def rank(target: Target, record: Record = record, held: Counter[str] = held) -> tuple[bool, bool, int, str]:
            known = (record.source, record.case, target.category) in drawn_objects
            tie = hashlib.sha256(f"{seed} {record.id} {target.id}".encode()).hexdigest()
            return known, held[target.category] > 1, drawn[target.category], tie

        target = min(record.targets, key=rank)
        drawn_objects.add((record.source, record.case, target.category))
        drawn[target.category] += 1
        yield _item(manifest, record, target)


def _item(manifest: Manifest, record: Record, target: Target) -> Item:
    masks = manifest.masks(record)
    height, width = masks[0].shape
    entities: dict[str, Entity] = {}
    for each, mask in zip(record.targets, masks, strict=True):
        if box := each.box or mask_box(mask):  # always so: an empty mask has been refused
            x0, y0, x1, y1 = box
            entities[each.id] = Entity(each.category, (x0 / width, y0 / height, x1 / width, y1 / height))
    return Item(
        id=f"{record.id}/{target.id}",
        record=record.id,
        target=target.id,
        image=record.image,
        mask=encode_mask(masks[record.targets.index(target)]) if isinstance(target.mask, MaskFiles) else target.mask,
        modality=record.modality,
        source=record.source,
        case=record.case,
        category=target.category,
        box=entities[target.id].box,
        entities=tuple(entities.values()),
        width=width,
        height=height,
        image_sha256=sha256(manifest.image_path(record)),
        mask_sha256=sha256(manifest.root / target.mask) if isinstance(target.mask, str) else "",
    )


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class _CaptionLine:
    record: Text
    caption: Text


def read_captions(path: Path) -> dict[str, str]:
    """Reads given captions by record id: a JSON Lines file with the keys "record" and "caption"."""
    problems: list[str] = []
    captions: dict[str, str] = {}
    for line in read_lines(path):
        read = read_line(_CaptionLine, line, problems)
        if read is None:
            continue
        if read.record in captions:
            problems.append(
                f"{line.where}: record {read.record!r} has a caption already; expected one per record; remove one."
            )
        captions[read.record] = read.caption
    if problems:
        raise InputError(problems)
    return captions


def perspective_of(cell: str) -> Perspective:
    """Returns the perspective of a cell such as "attribute-short"."""
    return cast(Perspective, cell.partition("-")[0])


def length_of(cell: str) -> Length:
    """Returns the length of a cell such as "attribute-short"."""
    return cast(Length, cell.partition("-")[2])
