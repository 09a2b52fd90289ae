"""MLMR-SD as Records: from the JSON formats of the authors' release, or from the Parquet files of a dataset hub.

The release's form is `<split>.json`, {image: {mask: class}}, and `<split>.jsonl`, one Question per line. The authors
published neither data nor files, so the keys of a line are ours; `python -m data_gen export` writes them. The hub's
form is `data/<split>-*.parquet`, one row per image, pictures included.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from random import Random
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, StrictBytes, StrictStr, TypeAdapter, ValidationError, with_config
from tqdm import tqdm

from medisee.foundation.errors import InputError
from medisee.foundation.files import inside
from medisee.foundation.json_files import parse_json
from medisee.foundation.output import LEAST_SPACE, check_output
from medisee.records.jsonl import Text, null_means, read_line, read_lines, read_object
from medisee.records.prompts import reasoning_answer, reasoning_question
from medisee.records.records import QA, SPLITS, Length, Perspective, Record, Split, Target, TrueBox, Turn, write_records
from medisee.sources.sa_med2d_index import ImageName, parse_name

HUB_NAMES: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}  # of the splits
_CLASSES = TypeAdapter(dict[str, dict[str, Text]])
_PICTURE = re.compile(r"[\w-][\w.-]{,200}\.(png|jpe?g|tiff?)", re.ASCII | re.IGNORECASE)


def _answered(turn: Turn) -> Turn:
    if not turn.answer.strip():
        raise ValueError("expected an answer that is not empty; fill it in")
    return turn


def _plain_name(name: str) -> str:
    if not _PICTURE.fullmatch(name):  # the file may come from anybody
        raise ValueError("expected a plain file name such as 'slice.png'; rename the picture")
    return name


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One line of the release's form."""

    id: Text  # unique
    image: Text  # path of the image
    mask: Text  # path of the target's mask
    category: Text  # the target's class
    question: Text  # an implicit query, without a request for a mask
    answer: Text  # the explanation, without candidate tokens
    perspective: Perspective
    length: Length
    history: tuple[Annotated[Turn, AfterValidator(_answered)], ...] = ()  # the earlier turns, oldest first
    author: Annotated[Text, null_means("")] = ""  # "offline" or the name of a model; empty when it is not known


@dataclass(frozen=True, slots=True)
class _Pair:
    """One question of a hub's row; more keys, such as "screening", are ignored."""

    id: Text
    question: Text
    answer: Text
    perspective: Perspective
    length: Length
    conversation: Text | None = None


@dataclass(frozen=True, slots=True)
class _Picture:
    path: Annotated[StrictStr, AfterValidator(_plain_name)]
    bytes: StrictBytes


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a hub's file; its fields are the columns that are read."""

    id: Text
    target: Text
    image: _Picture
    mask: _Picture
    category: Text
    box: TrueBox
    modality: Text
    source: Text
    case: Text
    qa: tuple[_Pair, ...]


def worded(question: Question | _Pair, seed: int) -> QA:
    """Returns a question as the model is asked: with a request, and an answer that begins with the candidate tokens.

    The words that are drawn depend only on the seed and the question's id. Earlier turns do not change.
    """
    rng = Random(f"{seed}/{question.id}")
    query, answer = reasoning_question(question.question, rng), reasoning_answer(question.answer, rng)
    qa = QA(query, answer, question.perspective, question.length)
    return replace(qa, history=question.history, author=question.author) if isinstance(question, Question) else qa


def write_splits(out: Path, splits: Mapping[str, list[Record]]) -> dict[str, int]:
    """Writes a manifest for each split that has records, and test_short and test_long, the paper's two test sets.

    Returns:
        The number of records in each file, by its name without suffix.
    """
    files = dict(splits)
    for length in ("short", "long"):
        files[f"test_{length}"] = []
        for record in splits.get("test", []):
            targets = [replace(t, qa=tuple(qa for qa in t.qa if qa.length == length)) for t in record.targets]
            if left := tuple(target for target in targets if target.qa):
                files[f"test_{length}"].append(replace(record, targets=left))
    files = {name: records for name, records in files.items() if records}
    for name, records in files.items():
        write_records(out / f"{name}.jsonl", records)
    return {name: len(records) for name, records in files.items()}


def prepare(root: Path | str, out: Path | str, *, seed: int = 0) -> dict[str, int]:
    """Writes manifests of a data set in either form into `out`.

    From the release's form nothing is copied: open the manifests with `root`. From the hub's form the pictures are
    unpacked into `out`, which is then the manifests' root. Of a folder with both, such as an export, the release's form
    is read.

    Returns:
        The number of records in each manifest, by its name without suffix.
    """
    root, out = Path(root), Path(out)
    check_output(out, inputs={"the root": root})
    listed = {split: found[0] for split in SPLITS if (found := _first_of(root, (".", "release"), f"{split}.json"))}
    if listed:
        read = {split: _release_records(*read_release(path, root), seed) for split, path in listed.items()}
        return write_splits(out, read)
    packed = {split: _first_of(root, ("data", "hub/data"), f"{HUB_NAMES[split]}-*.parquet") for split in SPLITS}
    if not any(packed.values()):
        raise InputError(
            f"{root}: expected train.json, val.json or test.json ({{image: {{mask: class}}}}), there or in release/, or "
            "data/train-*.parquet; found none; name the data set's folder."
        )
    size = sum(file.stat().st_size for files in packed.values() for file in files)
    check_output(out, need=max(size, LEAST_SPACE))
    saved: dict[str, str] = {}
    read = {
        split: [one for file in files for one in _unpack(file, out, seed, saved)] for split, files in packed.items()
    }
    return write_splits(out, read)


def _first_of(root: Path, folders: Iterable[str], pattern: str) -> list[Path]:
    return next((found for folder in folders if (found := sorted((root / folder).glob(pattern)))), [])


def read_release(path: Path, root: Path) -> tuple[dict[str, dict[str, str]], list[Question]]:
    """Reads one split of the release's form: {image: {mask: class}}, and the questions about these masks.

    `path` is its JSON file; the JSON Lines file of the same name holds the questions, without it there are none. Paths
    in them are relative to `root`.
    """
    try:
        images = _CLASSES.validate_python(parse_json(path.read_bytes()))
    except ValidationError as error:
        spot = " > ".join(map(repr, error.errors()[0]["loc"])) or "the file"
        raise InputError(f"{path}: expected {{image: {{mask: class}}}} with texts only; correct {spot}.") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable JSON ({error}); expected {{image: {{mask: class}}}}; correct it."
        ) from error
    problems: list[str] = []
    questions: list[Question] = []
    lines = path.with_suffix(".jsonl")
    for line in read_lines(lines) if lines.is_file() else ():
        if (question := read_line(Question, line, problems)) is None:
            continue
        questions.append(question)
        if images.get(question.image, {}).get(question.mask) != question.category:
            problems.append(
                f"{line.where}: image {question.image!r} with mask {question.mask!r} and class {question.category!r}; "
                f"expected what {path.name} holds; correct one of them."
            )
    for name in [*images, *(mask for masks in images.values() for mask in masks)]:
        try:
            inside(root, name, str(path))
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(problems)
    return images, questions


def _release_records(classes: dict[str, dict[str, str]], questions: list[Question], seed: int) -> list[Record]:
    asked: dict[tuple[str, str], list[QA]] = {}
    for question in questions:
        asked.setdefault((question.image, question.mask), []).append(worded(question, seed))
    records: list[Record] = []
    for image, masks in classes.items():
        # Where the name does not tell the patient, each image is a case.
        name = parse_name(image) or ImageName("unknown", "mlmr-sd", PurePosixPath(image).stem, None)
        targets = tuple(
            Target(id=mask, category=category, mask=mask, qa=tuple(asked.get((image, mask), ())))
            for mask, category in masks.items()
        )
        about = Record(
            id=image,
            image=image,
            modality=name.modality,
            source=name.dataset,
            case=name.case,
            plane=name.plane,
            targets=targets,
        )
        records += [about] if targets else []
    return records


def _unpack(path: Path, out: Path, seed: int, saved: dict[str, str]) -> Iterator[Record]:
    """Yields the rows of a file as records, their pictures written; reports all problems of the rows at its end.

    `saved` has the SHA-256 of each picture that has been written, by its path in lower case.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: needs pyarrow; install it with `pip install -e '.[engine]'`.") from error
    columns = [field.name for field in fields(_Row)]
    problems: list[str] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise InputError(
                    f"{path}: lacks the columns {', '.join(missing)}; take the hub/ folder of an export by "
                    "`python -m data_gen export`."
                )
            rows = (row for batch in file.iter_batches(batch_size=64, columns=columns) for row in batch.to_pylist())
            bar = tqdm(rows, total=file.metadata.num_rows, desc=path.name, unit=" images", disable=None)
            for number, content in enumerate(bar, start=1):
                where = f"{path}: row {number}"
                if (row := read_object(_Row, content, where, problems)) is None:
                    continue
                image, mask = f"images/{row.image.path}", f"masks/{row.mask.path}"
                for name, picture in ((image, row.image), (mask, row.mask)):
                    digest = hashlib.sha256(picture.bytes).hexdigest()
                    # In lower case, since some file systems do not tell "A.png" from "a.png".
                    if saved.setdefault(name.lower(), digest) != digest:
                        problems.append(
                            f"{where}: {name} has the name of another picture; expected unique names; rename one of them."
                        )
                        continue
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    (out / name).write_bytes(picture.bytes)
                yield _hub_record(row, image, mask, seed)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a Parquet file; download it again.") from error
    if problems:
        raise InputError(problems)


def _hub_record(row: _Row, image: str, mask: str, seed: int) -> Record:
    # Pairs are in the order of conversations and turns; a turn is history for those that follow it.
    talks: dict[str, list[_Pair]] = {}
    for pair in row.qa:
        talks.setdefault(pair.conversation or pair.id, []).append(pair)
    qa = tuple(
        replace(worded(last, seed), history=tuple(Turn(turn.question, turn.answer) for turn in earlier))
        for *earlier, last in talks.values()
    )
    target = Target(id=row.target, category=row.category, mask=mask, box=row.box, qa=qa)
    return Record(id=row.id, image=image, modality=row.modality, source=row.source, case=row.case, targets=(target,))
