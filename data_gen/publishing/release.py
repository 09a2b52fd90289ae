"""The data set in the JSON formats of the authors' release, which `medisee.sources.mlmr_sd` reads back.

The release's loaders name two kinds of files but come without any: `image -> {mask: class}` as JSON, and the test
questions as JSON Lines. The keys of a line are therefore ours: id, image, mask, category, question, answer,
perspective, length, author ("offline" or a model's name), and in a conversation `history`, the earlier turns. Both
kinds are written for all three splits. Questions and answers are bare: the request for a mask and the candidate tokens
are added when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_gen.publishing.entries import Entry
from data_gen.publishing.splits import SPLITS
from medisee.foundation.files import write_json
from medisee.records.jsonl import write_lines


def write_release(folder: Path, entries: Sequence[Entry]) -> None:
    """Writes `<split>.json` and `<split>.jsonl`; paths in them are relative to the data set's folder.

    A split without an image has no file.
    """
    for split in SPLITS:
        if listed := [entry for entry in entries if entry.split == split]:
            write_json(folder / f"{split}.json", {entry.image: {entry.mask: entry.item.category} for entry in listed})
            lines = (question for entry in listed for question in entry.questions)
            write_lines(folder / f"{split}.jsonl", lines, omit_empty=("history",))
