"""The plain-file nouns: a Record (image, targets, queries, truth) goes in, a Prediction (mask, box, text) comes out.

Both are JSON Lines, one object a line, with the field names below as keys. `medisee.records.manifest` reads records.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from medisee.foundation.errors import InputError
from medisee.records.jsonl import Fields, Line, LineWriter, is_number, line_writer, parse, read_lines, write_lines
from medisee.records.masks import Box, MaskFiles, Rle, check_rle

Perspective = Literal["attribute", "location", "class"]
Length = Literal["short", "long"]


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier question of a conversation and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class QA:
    """A query about a target and its answer; `perspective` is what it reasons from, `length` how long it is.

    `history` holds the turns of a conversation before the question, oldest first; `author` says who made the data
    engine's pairs: "offline" or a model's name. No line names them where they are empty.
    """

    question: str
    answer: str
    perspective: Perspective
    length: Length
    history: tuple[Turn, ...] = ()
    author: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One object in an image.

    Attributes:
        id: unique within its record.
        category: the class name, as "left kidney".
        mask: path of a mask image relative to the manifest's root (foreground > 0), several of them, or an RLE.
        box: pixels of the original image; None stands for the smallest box around the mask.
        qa: the queries; none stands for the class-name templates.
    """

    id: str
    category: str
    mask: str | MaskFiles | Rle
    box: Box | None = None
    qa: tuple[QA, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image and its targets.

    Attributes:
        id: unique within the manifest.
        image: path relative to the manifest's root.
        modality: as "ct" or "mr".
        source: the data set that it comes from.
        case: the patient or volume; a split never cuts one.
        targets: the objects, in any number.
        plane: the direction of the slice, when it is known.
    """

    id: str
    image: str
    modality: str
    source: str
    case: str
    targets: tuple[Target, ...]
    plane: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a system answered to one query.

    Attributes:
        record: the record's id.
        target: the target's id.
        question: the query as it was asked.
        mode: how the answer came to be: "generated", "forced" (the answer was given), "shuffled" or any label.
        text: the answer.
        emitted: whether the answer asked for a mask (ours: it holds the [SEG] and [BBOX] tokens).
        mask: of the original image's size; None counts as empty.
        box: pixels of the original image, may reach out of it; None stands for the smallest box around the mask.
        scores: named numbers, as a confidence.
    """

    record: str
    target: str
    question: str
    mode: str = "generated"
    text: str
    emitted: bool
    mask: Rle | None = None
    box: Box | None = None
    scores: dict[str, float] = field(default_factory=dict)


def record_writer(path: Path | str) -> AbstractContextManager[LineWriter]:
    """Opens a manifest for records; it takes its place when all of them are written."""
    return line_writer(path, omit_empty=("history", "author", "inverted"))


def write_records(path: Path | str, records: Iterable[Record]) -> None:
    """Writes a manifest atomically; paths in it stay as they are, relative to the root."""
    with record_writer(path) as writer:
        for record in records:
            writer.write(record)


def write_predictions(path: Path | str, predictions: Iterable[Prediction]) -> None:
    """Writes predictions atomically.

    Raises:
        ValueError: a box or a score is NaN or infinite.
    """
    write_lines(path, predictions)


def read_predictions(path: Path | str) -> list[Prediction]:
    """Reads predictions, from our model or from any other system.

    Raises:
        InputError: the file cannot be read or lines are wrong; all of them are named.
    """
    problems: list[str] = []
    predictions = [_prediction(line, problems) for line in read_lines(Path(path))]
    if problems:
        raise InputError(problems)
    return predictions


def read_record(line: Line, problems: list[str]) -> Record:
    """Reads one line of a manifest; what is wrong with it is added to `problems` (then the result is of no use)."""
    fields = _line_fields(line, Record, problems)
    targets = tuple(_target(target) for target in fields.objects("targets", Target))
    seen: set[str] = set()
    for index, target in enumerate(targets):
        if target.id in seen:
            problems.append(
                f"{line.where}: targets[{index}].id {target.id!r} is there twice; "
                "expected ids that are unique within the record; rename one."
            )
        seen.update([target.id] if target.id else [])
    return Record(
        id=fields.text("id"),
        image=fields.text("image"),
        modality=fields.text("modality"),
        source=fields.text("source"),
        case=fields.text("case"),
        targets=targets,
        plane=fields.text("plane") if fields.has("plane") else None,
    )


def _target(fields: Fields) -> Target:
    return Target(
        id=fields.text("id"),
        category=fields.text("category"),
        mask=_mask(fields),
        box=_true_box(fields),
        qa=tuple(_qa(qa) for qa in fields.objects("qa", QA)),
    )


def _mask(fields: Fields) -> str | MaskFiles | Rle:
    value = fields.raw("mask")
    if not isinstance(value, dict):
        return fields.text("mask")
    if "files" not in value:
        return _rle(fields)
    inner = fields.object("mask", MaskFiles)
    expected, fix = "a list of one path or more", "name the mask's files"
    files = inner.get("files", list, expected, fix)
    if files is not None and not (files and all(isinstance(file, str) and file.strip() for file in files)):
        inner.refuse("files", expected, fix)
        files = None
    return MaskFiles(tuple(files or ()), inner.has("inverted") and inner.flag("inverted"))


def _qa(fields: Fields) -> QA:
    return QA(
        question=fields.text("question"),
        answer=fields.text("answer", may_be_empty=True),
        perspective=fields.choice("perspective", get_args(Perspective)),
        length=fields.choice("length", get_args(Length)),
        history=tuple(
            Turn(turn.text("question"), turn.text("answer", may_be_empty=True))
            for turn in fields.objects("history", Turn)
        ),
        author=fields.text("author") if fields.has("author") else "",
    )


def _prediction(line: Line, problems: list[str]) -> Prediction:
    fields = _line_fields(line, Prediction, problems)
    return Prediction(
        record=fields.text("record"),
        target=fields.text("target"),
        question=fields.text("question"),
        mode=fields.text("mode") if fields.has("mode") else "generated",
        text=fields.text("text", may_be_empty=True),
        emitted=fields.flag("emitted"),
        mask=_rle(fields) if fields.has("mask") else None,
        box=_predicted_box(fields),
        scores=_scores(fields),
    )


def _line_fields(line: Line, noun: type, problems: list[str]) -> Fields:
    try:
        value = parse(line.content)
    except ValueError as error:
        problems.append(f"{line.where}: not JSON ({error}); expected one object a line; correct or remove the line.")
        return Fields({}, noun, line.where, "", [])
    return Fields(value, noun, line.where, "", problems)


_BOX = "[x0, y0, x1, y1] in pixels of the original image"


def _true_box(fields: Fields) -> Box | None:
    if not fields.has("box"):
        return None
    expected = f"{_BOX} with 0 <= x0 < x1 and 0 <= y0 < y1"
    fix = "write it half-open (x1 = last column + 1) or leave it out to use the box around the mask"
    box = fields.numbers("box", 4, expected, fix)
    if box and not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        fields.refuse("box", expected, fix)
    return (box[0], box[1], box[2], box[3]) if box else None


def _predicted_box(fields: Fields) -> Box | None:
    """A box of no area is a poor prediction, which scores 0; one turned round is a mistake in the file."""
    if not fields.has("box"):
        return None
    expected, fix = f"{_BOX} with x0 <= x1 and y0 <= y1", "order the corners or write null"
    box = fields.numbers("box", 4, expected, fix)
    if box and not (box[0] <= box[2] and box[1] <= box[3]):
        fields.refuse("box", expected, fix)
    return (box[0], box[1], box[2], box[3]) if box else None


def _rle(fields: Fields) -> Rle:
    inner = fields.object("mask", Rle)
    expected, fix = "[height, width] in whole pixels", "write the size of the image"
    size = inner.numbers("size", 2, expected, fix)
    counts = inner.text("counts")
    if not size or not counts:
        return Rle((1, 1), counts)
    if not all(isinstance(side, int) for side in size):
        inner.refuse("size", expected, fix)
    rle = Rle((int(size[0]), int(size[1])), counts)
    try:
        check_rle(rle)
    except InputError as error:
        fields.problems.extend(f"{fields.where}: {fields.spot}mask: {problem}" for problem in error.problems)
    return rle


def _scores(fields: Fields) -> dict[str, float]:
    scores = fields.get("scores", dict, "an object of numbers", "write {} for none") if fields.has("scores") else {}
    if not all(is_number(score) for score in (scores or {}).values()):
        fields.refuse("scores", "an object of finite numbers", "remove the others")
    return scores or {}
