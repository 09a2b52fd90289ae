"""MLMR-SD as Records: from the JSON formats of the authors' release, or from the Parquet files of a dataset hub.

The release's form is `<split>.json`, {image: {mask: class}}, and `<split>.jsonl`, one Question a line. The authors
published neither data nor these files, so the keys of a line are ours, as `python -m data_gen export` writes them.
The hub's form is `data/<split>-*.parquet`, one row for each image, pictures included.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any, get_args

from tqdm import tqdm

from medisee.foundation.errors import InputError
from medisee.foundation.files import inside
from medisee.records.jsonl import Fields, parse, read_lines
from medisee.records.prompts import reasoning_answer, reasoning_question
from medisee.records.records import QA, Length, Perspective, Record, Target, Turn, write_records
from medisee.sources.image_name import parse_name
from medisee.sources.sa_med2d import Split

SPLITS: tuple[Split, ...] = get_args(Split)
_HUB_NAMES = {"train": "train", "val": "validation", "test": "test"}
_PICTURE = re.compile(r"[\w-][\w.-]*\.(png|jpe?g|tiff?)", re.ASCII | re.IGNORECASE)
_KINDS = ("image", "mask")
_PAIR_KEYS = ("id", "question", "answer", "perspective", "length", "conversation")
_COLUMNS = ("id", "target", "image", "mask", "category", "box", "modality", "source", "case", "qa")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One line of the release's form.

    Attributes:
        id: unique.
        image: path of the image.
        mask: path of the target's mask.
        category: the target's class.
        question: an implicit query, without a request for a mask.
        answer: the explanation, without candidate tokens.
        perspective: "attribute" or "location".
        length: "short" or "long".
        history: the earlier turns of a conversation, oldest first.
        author: "offline" or the name of the model that wrote it; empty when it is not known.
    """

    id: str
    image: str
    mask: str
    category: str
    question: str
    answer: str
    perspective: Perspective
    length: Length
    history: tuple[Turn, ...] = ()
    author: str = ""


@dataclass(frozen=True, slots=True)
class _Pair:
    """What is read of one question of a hub's row."""

    id: str
    question: str
    answer: str
    perspective: str
    length: str
    conversation: str | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a hub's file, but for its two pictures."""

    id: str
    target: str
    category: str
    box: list[float]
    modality: str
    source: str
    case: str
    qa: list[_Pair]


@dataclass(frozen=True, slots=True)
class _Unpacking:
    """What the rows of all files share.

    Attributes:
        out: the folder that pictures go to.
        seed: draws the words around questions and answers.
        saved: the SHA-256 of each picture that has been written, by its path in small letters.
        problems: what is wrong with the rows.
    """

    out: Path
    seed: int
    saved: dict[str, str]
    problems: list[str]


@dataclass(frozen=True, slots=True)
class Release:
    """One split in the release's form: {image: {mask: class}}, and the questions about these masks."""

    classes: dict[str, dict[str, str]]
    questions: tuple[Question, ...]


def worded(question: Question, seed: int) -> QA:
    """Returns a question as the model is asked: a request follows it, and the answer begins with the candidate tokens.

    Which words are drawn depends on the seed and the question's id alone. The turns before it stay as they were said.
    """
    rng = Random(f"{seed}/{question.id}")
    return QA(
        question=reasoning_question(question.question, rng),
        answer=reasoning_answer(question.answer, rng),
        perspective=question.perspective,
        length=question.length,
        history=question.history,
        author=question.author,
    )


def of_length(records: Iterable[Record], length: Length) -> Iterator[Record]:
    """Yields the records with their questions of one length only; those without any are left out."""
    for record in records:
        targets = [replace(t, qa=tuple(qa for qa in t.qa if qa.length == length)) for t in record.targets]
        if asked := tuple(target for target in targets if target.qa):
            yield replace(record, targets=asked)


def write_splits(out: Path, splits: Mapping[str, list[Record]]) -> dict[str, int]:
    """Writes a manifest for each split that has records, and test_short and test_long, the paper's two test sets.

    Returns:
        The number of records in each file, by its name without suffix.
    """
    files: dict[str, list[Record]] = {
        **splits,
        "test_short": list(of_length(splits.get("test", []), "short")),
        "test_long": list(of_length(splits.get("test", []), "long")),
    }
    for name, records in files.items():
        if records:
            write_records(out / f"{name}.jsonl", records)
    return {name: len(records) for name, records in files.items() if records}


def prepare(root: Path | str, out: Path | str, *, seed: int = 0) -> dict[str, int]:
    """Writes manifests of a data set in either form into `out`.

    Of the release's form nothing is copied: open the manifests with `root`. From the hub's form the pictures are
    unpacked into `out`, which is then the manifests' root. A folder may hold both, as an export does: then the
    release's form is taken.

    Returns:
        The number of records in each manifest, by its name without suffix.

    Raises:
        InputError: the folder holds neither form, or files are wrong; all problems of a file are named.
    """
    root, out = Path(root), Path(out)
    listed = {split: found[0] for split in SPLITS if (found := _first_of(root, (".", "release"), f"{split}.json"))}
    if listed:
        read = {split: _release_records(read_release(path, root), seed) for split, path in listed.items()}
        return write_splits(out, read)
    packed = {split: _first_of(root, ("data", "hub/data"), f"{_HUB_NAMES[split]}-*.parquet") for split in SPLITS}
    if not any(packed.values()):
        raise InputError(
            f"{root}: expected train.json, val.json or test.json ({{image: {{mask: class}}}}), there or in release/, or "
            "data/train-*.parquet; found none; name the data set's folder."
        )
    unpacking = _Unpacking(out, seed, {}, [])
    unpacked = {split: [r for file in files for r in _unpack(file, unpacking)] for split, files in packed.items()}
    return write_splits(out, unpacked)


def _first_of(root: Path, folders: Iterable[str], pattern: str) -> list[Path]:
    return next((found for folder in folders if (found := sorted((root / folder).glob(pattern)))), [])


def read_release(path: Path, root: Path) -> Release:
    """Reads one split of the release's form.

    Args:
        path: its JSON file; the JSON Lines file of the same name holds the questions, without it there are none.
        root: the folder that paths in them are relative to.

    Raises:
        InputError: a file cannot be read, lines are wrong, a path leaves `root`, or a question is about an image, mask
            or class that the JSON does not have; all problems are named.
    """
    try:
        images = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable JSON ({error}); expected {{image: {{mask: class}}}}; fix it."
        ) from error
    if not isinstance(images, dict) or not all(_is_class_map(masks) for masks in images.values()):
        raise InputError(f"{path}: expected {{image: {{mask: class}}}} with texts only; fix it.")
    problems: list[str] = []
    questions: list[Question] = []
    lines = path.with_suffix(".jsonl")
    for where, question in _questions(lines, problems) if lines.is_file() else ():
        questions.append(question)
        if images.get(question.image, {}).get(question.mask) != question.category:
            problems.append(
                f"{where}: image {question.image!r} with mask {question.mask!r} and class {question.category!r}; "
                f"expected what {path.name} holds; correct one of them."
            )
    for name in [*images, *(mask for masks in images.values() for mask in masks)]:
        try:
            inside(root, name, str(path))
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(problems)
    return Release(images, tuple(questions))


def _release_records(release: Release, seed: int) -> list[Record]:
    asked: dict[tuple[str, str], list[QA]] = {}
    for question in release.questions:
        asked.setdefault((question.image, question.mask), []).append(worded(question, seed))
    return [_record(image, masks, asked) for image, masks in release.classes.items() if masks]


def _is_class_map(masks: Any) -> bool:
    return isinstance(masks, dict) and all(isinstance(name, str) and name.strip() for name in masks.values())


def _questions(path: Path, problems: list[str]) -> Iterator[tuple[str, Question]]:
    for line in read_lines(path):
        try:
            value = parse(line.content)
        except ValueError as error:
            problems.append(f"{line.where}: not JSON ({error}); expected one object a line; correct or remove it.")
            continue
        wrong = len(problems)
        fields = Fields(value, Question, line.where, "", problems)
        question = Question(
            **{key: fields.text(key) for key in ("id", "image", "mask", "category", "question", "answer")},
            perspective=fields.choice("perspective", get_args(Perspective)),
            length=fields.choice("length", get_args(Length)),
            history=tuple(Turn(each.text("question"), each.text("answer")) for each in fields.objects("history", Turn)),
            author=fields.text("author") if fields.has("author") else "",
        )
        if len(problems) == wrong:
            yield line.where, question


def _record(image: str, masks: dict[str, str], asked: dict[tuple[str, str], list[QA]]) -> Record:
    stem = PurePosixPath(image).stem
    name = parse_name(image)
    return Record(
        id=image,
        image=image,
        modality=name.modality if name else "unknown",
        source=name.dataset if name else "mlmr-sd",
        # A name that says nothing about the patient: each image is a case of its own.
        case=name.case if name else stem,
        plane=name.plane if name else None,
        targets=tuple(
            Target(id=mask, category=category, mask=mask, qa=tuple(asked.get((image, mask), ())))
            for mask, category in masks.items()
        ),
    )


def _unpack(path: Path, unpacking: _Unpacking) -> Iterator[Record]:
    """Yields the rows of a file as records; at its end all that is wrong with its rows is told."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: needs pyarrow; install it with `pip install -e '.[engine]'`.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise InputError(
                    f"{path}: lacks the columns {', '.join(missing)}; expected {', '.join(_COLUMNS)}, as "
                    "`python -m data_gen export` writes them; take its hub/ folder."
                )
            number = 0
            with tqdm(total=file.metadata.num_rows, desc=path.name, unit=" images", disable=None) as bar:
                for batch in file.iter_batches(batch_size=64, columns=list(_COLUMNS)):
                    for row in batch.to_pylist():
                        number += 1
                        yield from _unpacked(row, f"{path}: row {number}", unpacking)
                    bar.update(batch.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a Parquet file; download it again.") from error
    if unpacking.problems:
        raise InputError(unpacking.problems)


def _unpacked(row: dict[str, Any], where: str, unpacking: _Unpacking) -> Iterator[Record]:
    """Yields the record of a row, or none when something is wrong with it."""
    problems, wrong = unpacking.problems, len(unpacking.problems)
    record = _hub_record(Fields(_known(row), _Row, where, "", problems), unpacking.seed)
    pictures = {kind: _picture(row[kind], kind, where, problems) for kind in _KINDS}
    if len(problems) > wrong:
        return
    for kind, (name, content) in pictures.items():
        _save(content, f"{kind}s/{name}", where, unpacking)
    if len(problems) == wrong:
        image, mask = (f"{kind}s/{pictures[kind][0]}" for kind in _KINDS)
        (target,) = record.targets
        yield replace(record, image=image, targets=(replace(target, mask=mask),))


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what is read of a row besides its pictures; a pair may have more keys, as "screening"."""
    pairs = row["qa"]
    if isinstance(pairs, list):
        pairs = [{k: pair[k] for k in _PAIR_KEYS if k in pair} if isinstance(pair, dict) else pair for pair in pairs]
    return {name: row[name] for name in _COLUMNS if name not in _KINDS} | {"qa": pairs}


def _hub_record(fields: Fields, seed: int) -> Record:
    """Reads what a row says besides its pictures, whose paths are left empty."""
    expected = "four pixels x0, y0, x1, y1 with 0 <= x0 < x1 and 0 <= y0 < y1"
    fix = "take a file that `python -m data_gen export` wrote"
    x0, y0, x1, y1 = fields.numbers("box", 4, expected, fix) or (0, 0, 1, 1)
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        fields.refuse("box", expected, fix)
    category = fields.text("category")
    target = Target(
        id=fields.text("target"),
        category=category,
        mask="",
        box=(x0, y0, x1, y1),
        qa=tuple(worded(question, seed) for question in _hub_questions(fields, category)),
    )
    return Record(
        id=fields.text("id"),
        image="",
        modality=fields.text("modality"),
        source=fields.text("source"),
        case=fields.text("case"),
        targets=(target,),
    )


def _hub_questions(fields: Fields, category: str) -> list[Question]:
    """The pairs come in the order of conversations and turns; a turn is history for those that follow it."""
    talks: dict[str, list[Question]] = {}
    for pair in fields.objects("qa", _Pair):
        question = Question(
            id=pair.text("id"),
            question=pair.text("question"),
            answer=pair.text("answer"),
            image="",
            mask="",
            category=category,
            perspective=pair.choice("perspective", get_args(Perspective)),
            length=pair.choice("length", get_args(Length)),
        )
        talk = pair.text("conversation") if pair.has("conversation") else question.id
        talks.setdefault(talk, []).append(question)
    return [
        replace(last, history=tuple(Turn(turn.question, turn.answer) for turn in earlier))
        for *earlier, last in talks.values()
    ]


def _picture(cell: Any, kind: str, where: str, problems: list[str]) -> tuple[str, bytes]:
    """Returns the name of a picture, which must be a plain one (the file may be anybody's), and its bytes."""
    name, content = (cell.get("path"), cell.get("bytes")) if isinstance(cell, dict) else (None, None)
    if isinstance(name, str) and _PICTURE.fullmatch(name) and isinstance(content, bytes):
        return name, content
    problems.append(
        f"{where}: the {kind} holds a picture named {name!r}; expected a plain file name as 'slice.png' and its bytes; "
        "take a file that `python -m data_gen export` wrote."
    )
    return "", b""


def _save(content: bytes, name: str, where: str, unpacking: _Unpacking) -> None:
    """Writes a picture; another one of the same name is a problem."""
    digest = hashlib.sha256(content).hexdigest()
    # In small letters, since some file systems hold "A.png" and "a.png" for the same.
    if unpacking.saved.setdefault(name.lower(), digest) != digest:
        unpacking.problems.append(
            f"{where}: {name} has the name of another picture; expected a name of its own for each; rename one of them."
        )
        return
    path = unpacking.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
