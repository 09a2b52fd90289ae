"""Files: written completely or not at all, read only from inside their root, compared by hashes of content or name."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import unicodedata
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from medisee.foundation.errors import InputError

_LONGEST_NAME = 150  # bytes; most file systems take 255, with ending and hidden companions


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a new folder, and creates missing parents.

    On success it replaces `path`, or the folder that `path` is a link to; on an exception it is removed. An OSError that
    names no file gets the name of `path`.
    """
    path = Path(path)
    if path.is_symlink() and path.is_dir():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            replace_folder(temporary, path)
        else:
            _sync(temporary)
            os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def replace_folder(new: Path, folder: Path) -> None:
    """Flushes a complete folder to the disk and moves it to `folder`, replacing an older one if there is one."""
    for path in new.rglob("*"):
        _sync(path)
    _sync(new)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        os.rename(folder, old)
    os.rename(new, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undoes a `replace_folder` that was killed between its two renames; removes leftovers of interrupted writes."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)
    for left in (old, *folder.parent.glob(f".{glob.escape(folder.name)}.[0-9]*.tmp")):
        shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Writes indented JSON atomically; NaN, which JSON lacks, raises a ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path | str) -> str:
    """Returns the hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cached_sha256(path: Path | str) -> str:
    """Returns `sha256`, computed once per process unless the file's size or modification time changes."""
    status = os.stat(path)
    return _unchanged_sha256(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@cache
def _unchanged_sha256(path: str, size: int, modified_ns: int) -> str:
    return sha256(path)


def inside(root: Path, relative: str, where: str) -> Path:
    """Resolves a manifest's path, relative to its root folder; `where` is "file:line" for the message."""
    path = Path(os.path.realpath(root / relative))  # unlike resolve(), it raises nothing for a loop of links
    if Path(relative).is_absolute() or not path.is_relative_to(root.resolve()):
        raise InputError(f"{where}: path {relative!r} leaves the root {str(root)!r}; use a path inside it.")
    return path


def safe_name(name: str, taken: set[str], *, only_ascii: bool = False) -> str:
    """Returns a name from outside as the name of a file, without ending; it differs from those in `taken` and joins them.

    What a file system, a shell or Windows takes for something else becomes "_"; a very long name is cut.
    """
    text = unicodedata.normalize("NFC", name)
    if only_ascii:
        kept = re.sub(r"[^\w.-]", "_", text, flags=re.ASCII)
    else:
        kept = "".join("_" if c in '<>:"/\\|?*' or not c.isprintable() else c for c in text)
    kept = kept.lstrip(".- ").rstrip(". ") or "image"
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", kept, re.IGNORECASE):
        kept = f"_{kept}"
    if len(kept.encode()) > _LONGEST_NAME:
        cut = kept.encode()[:_LONGEST_NAME].decode(errors="ignore")
        kept = f"{cut}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    safe, number = kept, 1
    while (key := unicodedata.normalize("NFC", safe.casefold())) in taken:  # some file systems ignore case
        number += 1
        safe = f"{kept}-{number}"
    taken.add(key)
    return safe


class Fingerprints:
    """64-bit hashes of names, in the order in which they were added."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, name: str) -> None:
        """Adds a name."""
        self._hashes.append(fingerprint(name))

    def repeated(self) -> frozenset[int]:
        """Returns the fingerprints that were added twice or more.

        Different names may share one, so the caller compares the few names that have one of these.
        """
        ranked = np.sort(np.frombuffer(self._hashes, np.uint64))
        return frozenset(ranked[1:][ranked[1:] == ranked[:-1]].tolist())


def fingerprint(name: str) -> int:
    """Returns the 64-bit hash of a name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
