"""The one door for output folders: looked at before the work, held by one run, and never with a loss of a user's files."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock, Timeout

from medisee.foundation.errors import InputError
from medisee.foundation.files import atomic_path, hidden_name, recover_folder
from medisee.foundation.json_files import parse_json

LEAST_SPACE = 1 << 20
"""Bytes that must be free where a command cannot tell how much it writes."""

_LEFT = re.compile(r"\..+\.[0-9]+\.tmp")  # what `atomic_path` calls its temporary files
_OF_SYSTEM = frozenset({".DS_Store", ".directory", ".lock", "Thumbs.db", "desktop.ini"})
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})  # of a network disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a command writes into its folder, so that an earlier result is told from files of a user's.

    Attributes:
        what: the result's name in messages, such as "evaluation".
        files: patterns of its files' paths in the folder; "*" stays within a part of a path.
        mark: a JSON file that every result holds; the dotted `key` in it is in no other command's.
        value: what the key has; None takes any value.
    """

    what: str
    files: tuple[str, ...]
    mark: str
    key: str
    value: str | None = None

    def is_in(self, folder: Path) -> bool:
        """Tells whether a folder holds an earlier result."""
        try:
            found = parse_json((folder / self.mark).read_bytes())
        except (OSError, ValueError):
            return False
        for key in self.key.split("."):
            if not isinstance(found, dict) or key not in found:
                return False
            found = found[key]
        return self.value is None or found == self.value

    def foreign(self, folder: Path) -> list[str]:
        """Returns the paths in a folder that are not files of this result, in order."""
        patterns = [pattern.split("/") for pattern in self.files]

        def is_own(path: Path) -> bool:
            parts = path.relative_to(folder).parts
            return any(len(one) == len(parts) and all(map(fnmatchcase, parts, one)) for one in patterns)

        entries = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(str(one.relative_to(folder)) for one in entries if one.name not in _OF_SYSTEM and not is_own(one))

    def present(self, folder: Path) -> list[str]:
        """Returns the paths of files of this result that are in a folder, in order."""
        return sorted({str(path.relative_to(folder)) for one in self.files for path in folder.glob(one)})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds an output folder for this process, so that two runs never write into one; a missing folder is made.

    The lock ends with the process, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock", folder):
        yield


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{folder}: another run is writing here; wait until it ends, or choose another folder."
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        print(f"warning: {folder}: its disk knows no locks; start no second run in it.", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def check_output(
    out: Path,
    result: Result | None = None,
    *,
    option: str = "--out",
    inputs: Mapping[str, Path | str | None] | None = None,
    whole: bool = False,
    need: int = LEAST_SPACE,
) -> None:
    """Checks an output folder before the work: that it can be written, and that nothing else is lost in it.

    Args:
        out: the folder, which may be missing.
        result: what is written; without it nothing in the folder is replaced.
        option: what the user calls the folder.
        inputs: what the result is made from, by its name in messages; None is passed over.
        whole: the folder is replaced as a whole, not file by file.
        need: bytes that must be free.

    Raises:
        InputError: names every problem.
    """
    problems = _place_problems(out, option, whole=whole, need=need)
    if not problems:
        choose = f"choose another {option}."
        for name, path in (inputs or {}).items():
            if path is not None and (what := _contains(out, Path(path), whole=whole)):
                problems.append(f"{option} {out}: {what} {name} ({path}), which would be lost or mixed up; {choose}")
        if result is not None and out.is_dir():
            lost = result.foreign(out) if whole else []
            if not lost and not result.is_in(out):
                lost = result.present(out)
            if lost:
                problems.append(
                    f"{option} {out}: holds {lost[0]!r}, which is not of an earlier {result.what} and would be lost; {choose}"
                )
    if problems:
        raise InputError(problems)


def _contains(out: Path, path: Path, *, whole: bool) -> str:
    place, inner = out.resolve(), path.resolve()
    if place == inner:
        return "is"
    return "holds" if whole and inner.is_relative_to(place) else ""


def _place_problems(out: Path, option: str, *, whole: bool, need: int) -> list[str]:
    """Looks at the disk; a folder that is replaced as a whole needs its new one beside it."""
    start = f"{option} {out}:"
    try:
        if out.is_symlink() and not os.path.exists(out):
            return [
                f"{start} is a link to {os.readlink(out)}, which does not exist; correct the link or choose another."
            ]
        place = out.resolve()
        if any(len(os.fsencode(part)) > 255 for part in place.parts):
            return [f"{start} a name in it is longer than 255 bytes; choose a shorter one."]
        existing = next(path for path in (place, *place.parents) if os.path.lexists(path))
        if not existing.is_dir():
            return [f"{start} {_as_given(existing, out)} is a file; expected a folder; choose another."]
        if whole and place.exists() and os.path.ismount(place):
            return [
                f"{start} is where a disk is mounted, and cannot be replaced; choose a folder in it, such as {out / 'result'}."
            ]
        written = place.parent if whole and existing == place else existing
        with tempfile.TemporaryFile(dir=written) as probe:
            probe.write(b"x")
        if (free := shutil.disk_usage(written).free) < need:
            return [
                f"{start} {need / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free; make room or choose another disk."
            ]
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle; ValueError: a NUL
        reason = getattr(error, "strerror", None) or error
        return [f"{start} cannot be written ({reason}); correct it or choose another folder."]
    return []


def _as_given(path: Path, out: Path) -> Path:
    """Returns the user's words for a path of a resolved `out`."""
    return next((one for one in (out, *out.parents) if one.resolve() == path), path)


@contextmanager
def replaced_folder(
    out: Path,
    result: Result,
    *,
    option: str = "--out",
    inputs: Mapping[str, Path | str | None] | None = None,
    need: int = LEAST_SPACE,
) -> Iterator[Path]:
    """Yields a new folder for a result, which takes the place of `out` when it is complete; see `check_output`.

    Enter it before the work: what is wrong with `out` is then told at once, and other runs are kept off it. On an
    exception `out` stays as it was. Of a link to a folder the folder is replaced.
    """
    check_output(out, result, option=option, inputs=inputs, whole=True, need=need)
    place = out.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent / f"{hidden_name(place)}.lock", out):
        recover_folder(place)
        with atomic_path(place) as temporary:
            temporary.mkdir()
            yield temporary


@contextmanager
def filled_folder(
    out: Path,
    result: Result | None = None,
    *,
    option: str = "--out",
    inputs: Mapping[str, Path | str | None] | None = None,
    need: int = LEAST_SPACE,
) -> Iterator[None]:
    """Holds a folder while files of a result are written into it, each atomically; its other files stay.

    See `check_output`. What an interrupted run left half-written is removed.
    """
    check_output(out, result, option=option, inputs=inputs, need=need)
    made = not out.exists()
    try:
        with locked(out):
            remove_leftovers(out.iterdir())
            yield
    except BaseException:
        if made:
            with suppress(OSError):  # it is not empty
                out.rmdir()
        raise


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Removes those files that an interrupted `atomic_path` has left."""
    for path in list(paths):
        if _LEFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
