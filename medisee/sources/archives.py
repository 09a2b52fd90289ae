"""Archives of public data sets: fetched from an address, whole or continued, and unpacked without leaving their folder."""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from medisee.foundation.errors import InputError, first_line
from medisee.foundation.files import sha256

_PIECE = 1 << 20
_TIMEOUT = 60  # seconds without a byte


def fetch(address: str, path: Path) -> str:
    """Downloads a file, continuing an interrupted download, and returns its SHA-256; an existing file is left alone.

    Raises:
        InputError: the server cannot be reached, sends a page instead of an archive, or sends fewer bytes than it says.
    """
    if not path.is_file():
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(address, part)
        if not _is_archive(part):
            part.unlink()
            raise InputError(
                f"{address}: sent no archive; open the address in a browser, and give the file with --from."
            )
        part.replace(path)
    return sha256(path)


def _download(address: str, part: Path) -> None:
    have = part.stat().st_size if part.is_file() else 0
    try:
        with urlopen(Request(address, headers={"Range": f"bytes={have}-"} if have else {}), timeout=_TIMEOUT) as answer:
            if answer.status != 206:  # the server starts again
                have = 0
            left = answer.headers.get("Content-Length")
            total = None if left is None else have + int(left)
            bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=None)
            with bar, part.open("ab" if have else "wb") as handle:
                while piece := answer.read(_PIECE):
                    handle.write(piece)
                    bar.update(len(piece))
    except HTTPError as error:
        if error.code == 416 and have:  # nothing is left, or the file has changed
            part.unlink()
            return _download(address, part)
        raise InputError(
            f"{address}: answers {error.code} {error.reason}; download it by hand, and use --from."
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(
            f"{address}: the download broke off ({first_line(error)}); start again to continue it, or use --from."
        ) from error
    if total is not None and part.stat().st_size != total:
        raise InputError(
            f"{address}: sent {part.stat().st_size} of {total} bytes; start again to continue it, or use --from."
        )
    return None


def _is_archive(path: Path) -> bool:
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    size: int
    content: Any  # a ZipInfo or TarInfo


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip or tar file into a new folder.

    Raises:
        InputError: the archive is damaged, is too large for the disk, or has a name that leaves the folder.
    """
    try:
        with _members(archive) as (members, opened):
            bad = [one.name for one in members if _leaves(one.name)]
            if bad:
                raise InputError(
                    f"{archive}: has a name that leaves its folder, {bad[0]!r}; get the archive from its authors."
                )
            need, free = sum(one.size for one in members), shutil.disk_usage(_existing(folder)).free
            if need > free:
                raise InputError(f"{folder}: needs {need >> 20:,} MiB and has {free >> 20:,}; free some space.")
            for member in tqdm(members, desc=f"unpack {archive.name}", unit=" files", disable=None):
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened(member.content) as source, target.open("wb") as handle:
                    shutil.copyfileobj(source, handle, _PIECE)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{archive}: is damaged ({first_line(error)}); download it again.") from error
    except OSError as error:
        raise InputError(f"{archive}: cannot be unpacked into {folder} ({first_line(error)}); correct this.") from error


@contextmanager
def _members(archive: Path) -> Iterator[tuple[list[_Member], Any]]:
    """Opens an archive; yields its files, without links and folders, and what opens one of them."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            files = [one for one in packed.infolist() if not one.is_dir() and not stat.S_ISLNK(one.external_attr >> 16)]
            yield [_Member(one.filename, one.file_size, one) for one in files], packed.open
        return
    with tarfile.open(archive) as packed:

        def opened(member: tarfile.TarInfo) -> IO[bytes]:
            source = packed.extractfile(member)
            assert source is not None  # a regular file
            return source

        yield [_Member(one.name, one.size, one) for one in packed if one.isreg()], opened


def _leaves(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
