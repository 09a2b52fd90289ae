"""The data set as a folder of Parquet files that Hugging Face `datasets` loads, pictures included.

One row is one image with its target and all its pairs. The files are written by pyarrow with fixed settings, so that
the same rows give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_gen.publishing.entries import Entry
from data_gen.publishing.splits import SPLITS
from medisee.sources.mlmr_sd import HUB_NAMES

ROWS_PER_FILE = 2000  # a few hundred megabytes of slices
_ROWS_PER_GROUP = 100
_OF_ITEM = ("target", "category", "modality", "source", "case")
_OF_PAIR = ("id", "question", "answer", "perspective", "length", "template", "conversation", "turn", "author")


def write_parquet(folder: Path, pictures: Path, entries: Sequence[Entry]) -> None:
    """Writes `data/<split>-00000-of-00001.parquet` and so on into a folder; a split without an image has no file.

    Image and mask paths of the entries are relative to the folder `pictures`.
    """
    import pyarrow
    import pyarrow.parquet

    schema = _schema()
    (folder / "data").mkdir(parents=True)
    for split in SPLITS:
        listed = [entry for entry in entries if entry.split == split]
        starts = range(0, len(listed), ROWS_PER_FILE)
        for number, start in enumerate(starts):
            path = folder / "data" / f"{HUB_NAMES[split]}-{number:05d}-of-{len(starts):05d}.parquet"
            end = min(start + ROWS_PER_FILE, len(listed))
            with pyarrow.parquet.ParquetWriter(path, schema, compression="snappy", version="2.6") as writer:
                for first in range(start, end, _ROWS_PER_GROUP):
                    rows = [_row(entry, pictures) for entry in listed[first : min(first + _ROWS_PER_GROUP, end)]]
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _schema() -> Any:
    from datasets import Features, Image, List, Value

    text = Value("string")
    row = dict.fromkeys(("id", "target", "image", "mask", "category", "box", "modality", "source", "case"), text)
    row |= {"image": Image(), "mask": Image(), "box": List(Value("float32"), length=4)}
    row["qa"] = List(dict.fromkeys((*_OF_PAIR, "screening"), text) | {"turn": Value("int32")})
    return Features(row).arrow_schema


def _row(entry: Entry, pictures: Path) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(entry.item, name) for name in _OF_ITEM}
    for kind, path in (("image", entry.image), ("mask", entry.mask)):
        row[kind] = {"bytes": (pictures / path).read_bytes(), "path": Path(path).name}
    qa = [{**{name: getattr(one.pair, name) for name in _OF_PAIR}, "screening": one.outcome} for one in entry.pairs]
    return {**row, "id": entry.item.record, "box": list(entry.box), "qa": qa}
