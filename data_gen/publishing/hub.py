"""The data set as a folder of Parquet files that Hugging Face `datasets` loads, pictures included.

One row is one image with its target and all its pairs. The files are written by pyarrow with fixed settings, so that
the same rows give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_gen.publishing.entries import Entry
from data_gen.publishing.splits import SPLITS, Split

HUB_NAMES: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}
"""What the hub calls the splits."""
ROWS_A_FILE = 2000  # some hundred megabytes of slices
_ROWS_A_GROUP = 100


def write_hub(folder: Path, pictures: Path, entries: Sequence[Entry]) -> None:
    """Writes `data/<split>-00000-of-00001.parquet` and so on; a split without an image has no file.

    Args:
        folder: where `data/` goes.
        pictures: the folder that the entries' image and mask paths are relative to.
        entries: the data set.
    """
    (folder / "data").mkdir(parents=True)
    for split in SPLITS:
        listed = [entry for entry in entries if entry.split == split]
        files = -(-len(listed) // ROWS_A_FILE)
        for number in range(files):
            path = folder / "data" / f"{HUB_NAMES[split]}-{number:05d}-of-{files:05d}.parquet"
            _write(path, pictures, listed[number * ROWS_A_FILE : (number + 1) * ROWS_A_FILE])


def _write(path: Path, pictures: Path, entries: Sequence[Entry]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = _schema()
    with pyarrow.parquet.ParquetWriter(path, schema, compression="snappy", version="2.6") as writer:
        for group in _groups(entries):
            rows = [_row(entry, pictures) for entry in group]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _groups(entries: Sequence[Entry]) -> Iterable[Sequence[Entry]]:
    return (entries[first : first + _ROWS_A_GROUP] for first in range(0, len(entries), _ROWS_A_GROUP))


def _schema() -> Any:
    from datasets import Features, Image, List, Value

    text = Value("string")
    pair = {
        "id": text,
        "question": text,
        "answer": text,
        "perspective": text,
        "length": text,
        "template": text,
        "conversation": text,
        "turn": Value("int32"),
        "author": text,
        "screening": text,
    }
    return Features(
        {
            "id": text,
            "target": text,
            "image": Image(),
            "mask": Image(),
            "category": text,
            "box": List(Value("float32"), length=4),
            "modality": text,
            "source": text,
            "case": text,
            "qa": List(pair),
        }
    ).arrow_schema


def _row(entry: Entry, pictures: Path) -> dict[str, Any]:
    item = entry.item
    return {
        "id": item.record,
        "target": item.target,
        "image": _picture(pictures, entry.image),
        "mask": _picture(pictures, entry.mask),
        "category": item.category,
        "box": list(entry.box),
        "modality": item.modality,
        "source": item.source,
        "case": item.case,
        "qa": list(_pairs(entry)),
    }


def _pairs(entry: Entry) -> Iterator[dict[str, Any]]:
    for one in entry.pairs:
        pair = one.pair
        yield {
            "id": pair.id,
            "question": pair.question,
            "answer": pair.answer,
            "perspective": pair.perspective,
            "length": pair.length,
            "template": pair.template,
            "conversation": pair.conversation,
            "turn": pair.turn,
            "author": pair.author,
            "screening": one.outcome,
        }


def _picture(folder: Path, path: str) -> dict[str, Any]:
    return {"bytes": (folder / path).read_bytes(), "path": Path(path).name}
