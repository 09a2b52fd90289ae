"""Rows of bad input: a command or API call, input made by a few lines, the exit code and words of the sentence.

A row's `make` gets a Workspace, damages something in it and returns the command's arguments.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

COMMANDS = {
    "ask": "medisee.inference",
    "train": "medisee.train",
    "eval": "medisee.eval",
    "prepare": "medisee.prepare_data",
    "convert": "medisee.convert",
    "download": "medisee.download_weights",
    "medisee": "medisee.cli",
    "data_gen": "data_gen.__main__",
}
"""The commands, and the modules whose `main(argv)` they are."""


@dataclass(frozen=True)
class Workspace:
    """A folder of a test's own with a manifest, images, masks, a run's configuration and a checkpoint.

    Attributes:
        folder: holds everything; rows write into it only.
        checkpoint: a micro model's checkpoint, shared by all rows: copy it before you damage it.
        settings: values of a micro run on the manifest; `config` writes them.
    """

    folder: Path
    checkpoint: Path
    settings: dict[str, Any]

    @property
    def manifest(self) -> Path:
        """The workspace's own copy of the tiny manifest; its images and masks are beside it."""
        return self.folder / "data" / "tiny.jsonl"

    @property
    def image(self) -> Path:
        """An image that every reader takes."""
        return self.folder / "data" / "0.png"

    @property
    def out(self) -> Path:
        """Where results go; it does not exist."""
        return self.folder / "out"

    def records(self) -> list[dict[str, Any]]:
        """The manifest's records as JSON values."""
        return [json.loads(line) for line in self.manifest.read_text(encoding="utf-8").splitlines()]

    def write_records(self, records: Sequence[Any]) -> Path:
        """Replaces the manifest; strings are written as they are, other values as JSON."""
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        self.manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self.manifest

    def edit_record(self, index: int = 0, **changes: Any) -> Path:
        """Changes keys of one record; None removes a key."""
        records = self.records()
        records[index] = _edited(records[index], changes)
        return self.write_records(records)

    def edit_target(self, index: int = 0, target: int = 0, **changes: Any) -> Path:
        """Changes keys of one target; None removes a key."""
        records = self.records()
        records[index]["targets"][target] = _edited(records[index]["targets"][target], changes)
        return self.write_records(records)

    def edit_qa(self, index: int = 0, target: int = 0, qa: int = 0, **changes: Any) -> Path:
        """Changes keys of one question; None removes a key."""
        records = self.records()
        pairs = records[index]["targets"][target]["qa"]
        pairs[qa] = _edited(pairs[qa], changes)
        return self.write_records(records)

    def config(self, **sections: Any) -> Path:
        """Writes the run's configuration with changed sections (a dict is merged into its section)."""
        values = {**self.settings}
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def text(self, name: str, content: str | bytes) -> Path:
        """Writes a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def picture(self, name: str, pixels: Any, **options: Any) -> Path:
        """Saves an array as an image, or nested lists as 8 bit; the ending and `options` are Pillow's."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels, None if hasattr(pixels, "dtype") else np.uint8)).save(path, **options)
        return path

    def own_checkpoint(self, **config: Any) -> Path:
        """Returns a copy of the checkpoint whose config.json has these keys changed."""
        copy = self.folder / "checkpoint"
        shutil.copytree(self.checkpoint, copy)
        path = copy / "config.json"
        path.write_text(json.dumps(_edited(json.loads(path.read_text(encoding="utf-8")), config)), encoding="utf-8")
        return copy

    def ask(self, *extra: str | Path, image: Path | None = None, checkpoint: Path | None = None) -> list[str]:
        """Arguments of `medisee ask`."""
        base = ["--checkpoint", checkpoint or self.checkpoint, "--image", image or self.image, "--out", self.out]
        words = [*base, *([] if "--query" in extra else ["--query", "Where is the liver?"]), *extra]
        return [str(word) for word in words]

    def train(self, *extra: str | Path, **sections: Any) -> list[str]:
        """Arguments of `medisee train` on the workspace's configuration."""
        return ["--config", str(self.config(**sections)), *map(str, extra)]

    def evaluate(self, *extra: str | Path, checkpoint: Path | None = None) -> list[str]:
        """Arguments of `medisee eval` with the checkpoint."""
        base = ["--checkpoint", checkpoint or self.checkpoint, "--records", self.manifest, "--out", self.out]
        return [str(word) for word in [*base, *extra]]


Make = Callable[[Workspace], Sequence[str | Path]]


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        name: unique, for the test's id.
        command: a key of COMMANDS.
        make: makes the input and returns the arguments.
        words: all of them are in the message (case counts).
        code: the exit code; 2 is bad input.
    """

    name: str
    command: str
    make: Make
    words: tuple[str, ...]
    code: int = 2

    def main(self) -> Callable[[Sequence[str] | None], None]:
        """The command's main."""
        return import_module(COMMANDS[self.command]).main


def _edited(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in {**value, **changes}.items() if item is not None}
