"""MLMR-SD as Records: from the JSON formats of the authors' release, or from the Parquet files of a dataset hub.

The release's form is `<split>.json`, {image: {mask: class}}, and `<split>.jsonl`, one Question a line. The authors
published neither data nor these files, so the keys of a line are ours, as `python -m data_gen export` writes them.
The hub's form is `data/<split>-*.parquet`, one row for each image, pictures included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any, get_args

from tqdm import tqdm

from medisee.data.image_name import parse_name
from medisee.data.prompts import reasoning_answer, reasoning_question
from medisee.data.sa_med2d import Split
from medisee.errors import InputError
from medisee.files import inside
from medisee.jsonl import Fields, parse, read_lines
from medisee.records import QA, Length, Perspective, Record, Target, Turn, write_records

SPLITS: tuple[Split, ...] = get_args(Split)
_HUB_NAMES = {"train": "train", "val": "validation", "test": "test"}
_PICTURE = re.compile(r"[\w-][\w.-]*\.(png|jpe?g|tiff?)", re.ASCII | re.IGNORECASE)
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
    unpacked = {split: [r for file in files for r in _unpack(file, out, seed)] for split, files in packed.items()}
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


def _unpack(path: Path, out: Path, seed: int) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: needs pyarrow; install it with `pip install 'medisee[engine]'`.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise InputError(
                    f"{path}: lacks the columns {', '.join(missing)}; expected {', '.join(_COLUMNS)}, as "
                    "`python -m data_gen export` writes them; take its hub/ folder."
                )
            total = file.metadata.num_rows
            with tqdm(total=total, desc=path.name, unit=" images", disable=None) as bar:
                for batch in file.iter_batches(batch_size=64, columns=list(_COLUMNS)):
                    for row in batch.to_pylist():
                        yield _unpacked(row, path, out, seed)
                    bar.update(batch.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a Parquet file; download it again.") from error


def _unpacked(row: dict[str, Any], path: Path, out: Path, seed: int) -> Record:
    image, mask = (_save(row[kind], path, out / f"{kind}s") for kind in ("image", "mask"))
    questions = _hub_questions(row, image, mask)
    x0, y0, x1, y1 = row["box"]
    return Record(
        id=row["id"],
        image=image,
        modality=row["modality"],
        source=row["source"],
        case=row["case"],
        targets=(
            Target(
                id=row["target"],
                category=row["category"],
                mask=mask,
                box=(x0, y0, x1, y1),
                qa=tuple(worded(question, seed) for question in questions),
            ),
        ),
    )


def _hub_questions(row: dict[str, Any], image: str, mask: str) -> list[Question]:
    """The pairs come in the order of conversations and turns; a turn is history for those that follow it."""
    talks: dict[str, list[dict[str, Any]]] = {}
    for pair in row["qa"]:
        talks.setdefault(pair["conversation"] or pair["id"], []).append(pair)
    return [
        Question(
            id=last["id"],
            image=image,
            mask=mask,
            category=row["category"],
            question=last["question"],
            answer=last["answer"],
            perspective=last["perspective"],
            length=last["length"],
            history=tuple(Turn(turn["question"], turn["answer"]) for turn in earlier),
        )
        for *earlier, last in talks.values()
    ]


def _save(picture: dict[str, Any], path: Path, folder: Path) -> str:
    """Writes a picture under its own name, which must be a plain one: the file may be anybody's."""
    name, content = picture["path"] or "", picture["bytes"]
    if not _PICTURE.fullmatch(name) or content is None:
        raise InputError(
            f"{path}: holds a picture named {name!r}; expected a plain file name as 'slice.png' and its bytes; "
            "take a file that `python -m data_gen export` wrote."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return f"{folder.name}/{name}"
