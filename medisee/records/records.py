"""The objects of plain files: a Record (image, targets, queries, truth) goes in, a Prediction (mask, box, text) comes out.

Both are JSON Lines, one object per line, with the field names below as keys. `medisee.records.manifest` reads records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, ConfigDict, Discriminator, PlainValidator, StrictBool, StrictStr, Tag, with_config

from medisee.foundation.errors import InputError
from medisee.records.jsonl import (
    FilePath,
    LineWriter,
    Text,
    line_writer,
    not_blank,
    null_means,
    read_line,
    read_lines,
    write_lines,
)
from medisee.records.masks import Box, MaskFiles, SoundRle

Perspective = Literal["attribute", "location", "class"]
Length = Literal["short", "long"]
Split = Literal["train", "val", "test"]
PERSPECTIVES: tuple[Perspective, ...] = ("attribute", "location")  # of questions that reason
LENGTHS: tuple[Length, ...] = get_args(Length)
SPLITS: tuple[Split, ...] = get_args(Split)
_IMAGE_MARK = re.compile(r"\A\s*<image>[^\S\n]*\n|\n\s*<image>\s*\Z")


def without_image_mark(question: str) -> str:
    """Takes off the `<image>` on a line of its own, before or after the question, with which LLaVA's data marks images."""
    return _IMAGE_MARK.sub("", question, count=1)


def _is_number(value: Any) -> bool:
    # Finite, and of a size that pixels and scores can have.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _true_box(value: Any) -> Box:
    if not (_is_box(value) and 0 <= value[0] < value[2] and 0 <= value[1] < value[3]):
        raise ValueError(
            "expected [x0, y0, x1, y1] in pixels of the original image with 0 <= x0 < x1 and 0 <= y0 < y1; write it "
            "half-open (x1 = last column + 1); COCO's [x, y, w, h] is [x, y, x + w, y + h] here; a manifest may leave it out"
        )
    return value[0], value[1], value[2], value[3]


def _predicted_box(value: Any) -> Box:
    # A box of no area is a poor prediction, which scores 0; one with swapped corners is a mistake in the file.
    if not (_is_box(value) and value[0] <= value[2] and value[1] <= value[3]):
        raise ValueError(
            "expected [x0, y0, x1, y1] in pixels of the original image with x0 <= x1 and y0 <= y1; order the corners or "
            "write null; COCO's [x, y, w, h] is [x, y, x + w, y + h] here"
        )
    return value[0], value[1], value[2], value[3]


def _scores(value: Any) -> dict[str, float]:
    if value is not None and not (isinstance(value, dict) and all(map(_is_number, value.values()))):
        raise ValueError("expected an object of finite numbers; remove the others, or write {} for none")
    return value or {}


def _unique_ids(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    places: dict[str, int] = {}
    for place, target in enumerate(targets):
        if (first := places.setdefault(target.id, place)) != place:
            raise ValueError(f"targets[{place}].id {target.id!r} is also that of targets[{first}]; rename one")
    return targets


def _spacing(value: Any) -> tuple[float, float]:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)) and min(value) > 0):
        raise ValueError("expected [height, width] of a pixel in millimetres, both above 0; correct it or leave it out")
    return float(value[0]), float(value[1])


Spacing = Annotated[tuple[float, float], PlainValidator(_spacing)]
QuestionText = Annotated[StrictStr, AfterValidator(without_image_mark), AfterValidator(not_blank)]
TrueBox = Annotated[Box, PlainValidator(_true_box)]
TargetMask: TypeAlias = Annotated[
    Annotated[FilePath, Tag("(path)")] | Annotated[MaskFiles, Tag("(MaskFiles)")] | Annotated[SoundRle, Tag("(Rle)")],
    Discriminator(
        lambda value: "(path)" if not isinstance(value, dict | list) else "(MaskFiles)" if "files" in value else "(Rle)"
    ),
]


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier question of a conversation and its answer."""

    question: QuestionText
    answer: StrictStr


@dataclass(frozen=True, slots=True)
class QA:
    """A query about a target and its answer; `history` and `author` are left out of files where they are empty."""

    question: QuestionText
    answer: StrictStr
    perspective: Perspective  # what the query reasons from
    length: Length  # of the query
    history: tuple[Turn, ...] = ()  # the earlier turns of a conversation, oldest first
    author: Annotated[Text, null_means("")] = ""  # who wrote it in the data engine: "offline" or the name of a model


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One object in an image."""

    id: Text  # unique within its record
    category: Text  # the class name, such as "left kidney"
    mask: TargetMask  # path of a mask image relative to the manifest's root, several, or an RLE
    box: TrueBox | None = None  # pixels of the original image; None means the smallest box around the mask
    qa: tuple[QA, ...] = ()  # the queries; without any, the class-name templates are used


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image and its targets."""

    id: Text  # unique within the manifest
    image: FilePath  # path relative to the manifest's root
    modality: Text  # such as "ct" or "mr"
    source: Text  # the data set that it comes from
    case: Text  # the patient or volume; a split never cuts one
    targets: Annotated[tuple[Target, ...], AfterValidator(_unique_ids)]  # the objects, in any number
    plane: Text | None = None  # the direction of the slice, when it is known
    spacing: Spacing | None = None  # (height, width) of a pixel in millimetres, when it is known


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A system's answer to one query.

    `box` is in pixels of the original image and may reach outside it; None means the smallest box around the mask.
    """

    record: Text  # the record's id
    target: Text  # the target's id
    question: QuestionText  # the query as it was asked
    mode: Annotated[Text, null_means("generated")] = "generated"  # or "forced" (a given answer), "shuffled", any label
    text: StrictStr  # the answer
    emitted: StrictBool  # whether the answer asked for a mask (ours: it holds the [SEG] and [BBOX] tokens)
    mask: SoundRle | None = None  # of the original image's size; None counts as empty
    box: Annotated[Box, PlainValidator(_predicted_box)] | None = None
    scores: Annotated[dict[str, float], PlainValidator(_scores)] = field(default_factory=dict)  # such as a confidence


def record_writer(path: Path | str) -> AbstractContextManager[LineWriter]:
    """Opens a manifest for records; it takes its place when all of them are written."""
    return line_writer(path, omit_empty=("history", "author", "inverted", "value", "spacing"))


def write_records(path: Path | str, records: Iterable[Record]) -> None:
    """Writes a manifest atomically; paths in it stay as they are, relative to the root."""
    with record_writer(path) as writer:
        for record in records:
            writer.write(record)


def write_predictions(path: Path | str, predictions: Iterable[Prediction]) -> None:
    """Writes predictions atomically; ValueError for a box or a score that is NaN or infinite."""
    write_lines(path, predictions)


def read_predictions(path: Path | str) -> list[Prediction]:
    """Reads predictions, from our model or from any other system."""
    problems: list[str] = []
    predictions = [read_line(Prediction, line, problems) for line in read_lines(Path(path))]
    if problems:
        raise InputError(problems)
    return [prediction for prediction in predictions if prediction is not None]
