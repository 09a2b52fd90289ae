"""A manifest: the records of a JSON Lines file as a read-only sequence, and the image and mask files they name."""

from __future__ import annotations

import mmap
import operator
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from medisee.foundation.errors import InputError
from medisee.foundation.files import Fingerprints, fingerprint, inside
from medisee.records.boxes import box_problem
from medisee.records.jsonl import Line, read_line, read_lines
from medisee.records.masks import MaskFiles, Rle, decode_mask
from medisee.records.offsets import file_stamp, keep_offsets, kept_offsets
from medisee.records.records import Record, Target

_NOT_PILLOWS = (".dcm", ".dicom", ".ima", ".nii", ".nii.gz")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
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
        """Returns an image's (height, width) from its header, with the EXIF orientation applied.

        None for DICOM and NIfTI, which Pillow does not read.
        """
        path = self.image_path(record)
        where = f"{self._where(record)}: image {record.image!r}"
        if path.name.lower().endswith(_NOT_PILLOWS):
            if not path.is_file():
                raise InputError(_missing(where, self.root))
            return None
        with _open_image(path, where, self.root) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)

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
            _check_size(target.mask.size, size, where)
            mask = decode_mask(target.mask)
        else:
            named = target.mask if isinstance(target.mask, MaskFiles) else MaskFiles((target.mask,))
            masks = [
                read_mask(inside(self.root, file, where), f"{where}: mask {file!r}", self.root, size) ^ named.inverted
                for file in named.files
            ]
            where = f"{where}: mask {', '.join(map(repr, named.files))}"
            if any(mask.shape != masks[0].shape for mask in masks):
                raise InputError(f"{where} is in files of several sizes; expected one size; make them again.")
            mask = np.logical_or.reduce(masks)
        if not mask.any():
            raise InputError(f"{where} is empty; expected a pixel > 0; correct it or remove the target.")
        return mask

    def _where(self, record: Record) -> str:
        return f"{self.path}: record {record.id!r}"


def read_mask(path: Path, where: str, root: Path, size: tuple[int, int] | None) -> NDArray[np.bool_]:
    """Reads a mask image (height, width): foreground is any value > 0, an alpha channel is ignored.

    `where` (what the mask is) and `root` are for messages; `size` is the (height, width) that it must have, None takes
    any.
    """
    with _open_image(path, where, root) as image:
        _check_size((image.height, image.width), size, where)
        pixels = np.asarray(image)
        # An opaque alpha channel is 255 everywhere: it says nothing about the foreground.
        if image.mode in ("LA", "PA", "RGBA"):
            pixels = pixels[..., :-1]
    foreground: NDArray[np.bool_] = np.greater(pixels, 0)
    return np.logical_or.reduce(foreground, axis=-1) if foreground.ndim == 3 else foreground


@contextmanager
def _open_image(path: Path, where: str, root: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise InputError(_missing(where, root)) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{where} cannot be read ({error}); expected an image file; make it again.") from error


def _check_size(found: tuple[int, int], expected: tuple[int, int] | None, where: str) -> None:
    if expected and found != expected:
        raise InputError(
            f"{where} is {found[1]} x {found[0]} (width x height); expected the image's {expected[1]} x {expected[0]}; "
            "make it again from this image."
        )


def _missing(where: str, root: Path) -> str:
    return (
        f"{where} does not exist; expected it under the root {str(root)!r}; correct the path, or name the root (--root, or "
        "data.root in a configuration)."
    )
