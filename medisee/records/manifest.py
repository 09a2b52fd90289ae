"""A manifest: the records of a JSON Lines file as a read-only sequence, and the image and mask files they name."""

from __future__ import annotations

import mmap
import operator
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from medisee.foundation.errors import InputError
from medisee.foundation.files import Fingerprints, fingerprint, inside
from medisee.records.boxes import box_problem
from medisee.records.images import VOLUMES, image_size
from medisee.records.jsonl import Line, read_line, read_lines
from medisee.records.masks import MaskFiles, Rle, check_size, decode_mask, read_mask
from medisee.records.offsets import file_stamp, keep_offsets, kept_offsets
from medisee.records.records import Record, Target

_HELD = 256  # records read before their pages are released: each may have brought 64 KiB into this process


class Manifest(Sequence[Record]):
    """The records of a JSON Lines file `path`, read on demand from a memory map; paths in it are relative to `root`.

    Opening checks every line and keeps only the offset of each, eight bytes per record. The offsets of a large file are
    also written beside it (`medisee.records.offsets`): as long as the file does not change, it opens without being read.
    A copy sent to another process opens the file again when it is first read.
    """

    def __init__(self, path: Path | str, root: Path | str | None = None) -> None:
        """Opens a manifest and checks all its lines, but no image or mask: `check_files` does that.

        `root` is by default the file's own folder. InputError names all wrong lines.
        """
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        kept = kept_offsets(self.path)
        self._offsets = self._check_lines() if kept is None else kept
        self._bytes = self.path.stat().st_size
        self._map: mmap.mmap | None = None
        self._reads = 0

    def _check_lines(self) -> NDArray[np.int64]:
        stamp = file_stamp(self.path)
        problems: defaultdict[int, list[str]] = defaultdict(list)
        offsets = array("q")
        ids = Fingerprints()
        for line in read_lines(self.path):
            offsets.append(line.offset)
            found: list[str] = []
            record = read_line(Record, line, found, self.root)
            if record is None:
                problems[line.offset] = found
            else:
                ids.add(record.id)
        if repeated := ids.repeated():
            first_seen: dict[str, str] = {}
            for line in read_lines(self.path):
                record = read_line(Record, line, [])
                if record is None or fingerprint(record.id) not in repeated:
                    continue
                if (first := first_seen.setdefault(record.id, line.where)) != line.where:
                    problems[line.offset].append(
                        f"{line.where}: id {record.id!r} is also that of {first}; "
                        "expected ids that are unique within the file; rename one."
                    )
        if not offsets:
            raise InputError(f"{self.path}: no record; expected one JSON object per line; check how it was made.")
        if problems:
            raise InputError(problem for offset in sorted(problems) for problem in problems[offset])
        checked = np.array(offsets, dtype=np.int64)
        keep_offsets(self.path, checked, stamp)
        return checked

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        offset = int(self._offsets[operator.index(index)])
        data = self._data()
        end = data.find(b"\n", offset)
        problems: list[str] = []
        record = read_line(Record, Line(str(self.path), offset, data[offset : end if end >= 0 else None]), problems)
        self._reads += 1
        if self._reads % _HELD == 0 and hasattr(mmap, "MADV_DONTNEED"):
            data.madvise(mmap.MADV_DONTNEED)
        if record is None:
            raise InputError([f"{self.path}: changed after it was opened; start again.", *problems])
        return record

    def _data(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as handle:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._map) != self._bytes:
                raise InputError(
                    f"{self.path}: has {len(self._map)} bytes; expected {self._bytes}, as when opened; start again."
                )
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def image_path(self, record: Record) -> Path:
        """Returns the absolute path of a record's image, which must not leave the root."""
        return inside(self.root, record.image, self._where(record))

    def image_size(self, record: Record) -> tuple[int, int] | None:
        """Returns an image's (height, width) as it is shown, from its header.

        None for DICOM and NIfTI, which Pillow does not read.
        """
        path = self.image_path(record)
        where = f"{self._where(record)}: image {record.image!r}"
        if path.name.lower().endswith(tuple(VOLUMES)) and path.is_file():
            return None
        return image_size(path, where)

    def mask(self, record: Record, target: Target) -> NDArray[np.bool_]:
        """Returns the mask of one target; see `masks`."""
        return self.masks(replace(record, targets=(target,)))[0]

    def masks(self, record: Record) -> list[NDArray[np.bool_]]:
        """Returns the mask of each target, boolean (height, width) in the pixels of the original image.

        InputError names all problems: an image or a mask is missing or cannot be read, a mask is empty or not of the
        image's size, or a target's box leaves the image or is not where its mask is.
        """
        size, masks, problems = None, [], []
        try:
            size = self.image_size(record)
        except InputError as error:
            problems += error.problems
        for target in record.targets:
            where = f"{self._where(record)}, target {target.id!r}"
            shape, mask = size, None
            try:
                mask = self._mask(target, where, size)
                masks.append(mask)
                shape = size or mask.shape
            except InputError as error:
                problems += error.problems
            if target.box and shape and (target.box[2] > shape[1] or target.box[3] > shape[0]):
                problems.append(
                    f"{where}: box {list(target.box)} leaves the image; expected x1 <= {shape[1]} and y1 <= {shape[0]}; "
                    "correct it or leave it out."
                )
            elif target.box and mask is not None and (problem := box_problem(target.box, mask)):
                problems.append(f"{where}: {problem}")
        if problems:
            raise InputError(problems)
        return masks

    def check_files(self) -> None:
        """Reads every image's header and every mask; InputError names all problems."""
        problems: list[str] = []
        for record in self:
            try:
                self.masks(record)
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)

    def _mask(self, target: Target, where: str, size: tuple[int, int] | None) -> NDArray[np.bool_]:
        if isinstance(target.mask, Rle):
            where = f"{where}: mask (RLE)"
            check_size(target.mask.size, size, where)
            mask = decode_mask(target.mask)
        else:
            named = target.mask if isinstance(target.mask, MaskFiles) else MaskFiles((target.mask,))
            masks = [
                read_mask(inside(self.root, file, where), f"{where}: mask {file!r}", size, named.value) ^ named.inverted
                for file in named.files
            ]
            value = f" (value {named.value})" if named.value else ""
            where = f"{where}: mask {', '.join(map(repr, named.files))}{value}"
            if any(mask.shape != masks[0].shape for mask in masks):
                raise InputError(f"{where} is in files of several sizes; expected one size; make them again.")
            mask = np.logical_or.reduce(masks)
        if not mask.any():
            raise InputError(f"{where} is empty; expected a pixel > 0; correct it or remove the target.")
        return mask

    def _where(self, record: Record) -> str:
        return f"{self.path}: record {record.id!r}"
