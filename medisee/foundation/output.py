"""The single entry point for output folders: checked before the work starts, held by one run, and a user's own files never lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock, Timeout

from medisee.foundation.errors import InputError, shortened
from medisee.foundation.files import atomic_path, recover_folder
from medisee.foundation.json_files import parse_json

Inputs: TypeAlias = Mapping[str, Path | str | None]
"""What a result is made from, by its name in messages; None is passed over."""
LEAST_SPACE = 1 << 20
"""Bytes that must be free where a command cannot tell how much it writes."""

_LONGEST_NAME = 230  # bytes; file systems take 255, with what is written beside it for a moment
_OF_SYSTEM = frozenset({".DS_Store", ".directory", ".lock", "Thumbs.db", "desktop.ini"})
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK})  # of a network disk


@dataclass(frozen=True, slots=True)
class Result:
    """What a command writes into its folder, by which an earlier result is told from files of a user's."""

    what: str  # its name in messages, such as "evaluation"
    files: str  # regular expression of its files' paths in the folder
    mark: str  # a JSON file that every result holds
    key: str  # a key in it, dotted inside of an object, that no other command's has
    value: str = ""  # what the key has; empty: anything
    listed: Callable[[Path], Collection[str]] = lambda _: ()  # more of its files, which a result names itself

    def lost(self, folder: Path, *, whole: bool) -> list[str]:
        """Returns what would be lost in a folder, in order; of an earlier result that is what others have put there.

        `whole`: all that is in the folder is replaced, not only the result's files.
        """
        found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        paths = found if whole else folder.iterdir()
        names = {path.relative_to(folder).as_posix() for path in paths if path.name not in _OF_SYSTEM}
        own = {name for name in names if re.fullmatch(self.files, name)} | (names & {*self.listed(folder)})
        return sorted((names - own if whole else ()) or (() if self._is_in(folder) else own))

    def _is_in(self, folder: Path) -> bool:
        try:
            found = parse_json((folder / self.mark).read_bytes())
            for key in self.key.split("."):
                found = found[key]
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return self.value in ("", found)


@contextmanager
def locked(folder: Path, lock: Path | None = None) -> Iterator[None]:
    """Holds an output folder for this process, so that two runs never write into one.

    A missing folder is made, and removed if it stays empty. The lock ends with the process, however it ends. Files that
    an ended process has left half-written are removed. `lock` is the lock's file where it cannot be in the folder.
    """
    path = lock or folder / ".lock"
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{folder}: another run is writing here; wait until it ends, or choose another.") from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        print(f"warning: {folder}: its disk knows no locks; start no second run in it.", file=sys.stderr, flush=True)
    try:
        for left in (*folder.glob(".*.[0-9]*.tmp"), *folder.glob("*/.*.[0-9]*.tmp")) if lock is None else ():
            process = left.name.split(".")[-2]
            if process.isdecimal() and not _is_running(int(process)):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        held.release()
        if made:
            with suppress(OSError):  # it is not empty
                path.parent.rmdir()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def check_output(
    out: Path,
    result: Result | None = None,
    *,
    option: str = "--out",
    inputs: Inputs | None = None,
    whole: bool = False,
    need: int = LEAST_SPACE,
) -> None:
    """Checks an output folder before the work: that it can be written, and that nothing else is lost in it.

    Without a `result` nothing in the folder is replaced; `whole` replaces the folder, not only the result's files in it.
    `option` is what a user calls the folder, `inputs` are what the result is made from, `need` are bytes to be free.

    Raises:
        InputError: names every problem.
    """
    start = f"{option} {out}:".lstrip()
    if problem := _place_problem(out, whole=whole, need=need):
        raise InputError(f"{start} {problem}")
    problems = []
    place = out.resolve()
    for name, path in (inputs or {}).items():
        inner = Path(os.path.realpath(path)) if path is not None else Path()
        if inner == place or (whole and inner.is_relative_to(place)):
            verb = "is" if inner == place else "holds"
            problems.append(f"{start} {verb} {name} ({path}), which would be lost or mixed up; choose another folder.")
    if not problems and result is not None and out.is_dir() and (lost := result.lost(out, whole=whole)):
        of = f"is not of an earlier {result.what}"
        problems.append(f"{start} holds {lost[0]!r}, which {of} and would be lost; choose another folder.")
    if problems:
        raise InputError(shortened(problems, start[:-1]))


def _place_problem(out: Path, *, whole: bool, need: int) -> str:
    """Looks at the disk; a folder that is replaced as a whole gets its new one beside it."""
    try:
        place = out.resolve()
        existing = next(path for path in (place, *place.parents) if os.path.lexists(path))
        written = place.parent if whole and existing == place else existing
        if gone := [path for path in (out, *out.parents) if path.is_symlink() and not path.exists()]:
            return f"{gone[0]} is a link to {os.readlink(gone[0])}, which does not exist; correct it or choose another folder."
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in place.parts):
            return f"has a name of more than {_LONGEST_NAME} bytes; choose a shorter one."
        if not existing.is_dir():
            return f"{existing} is a file; expected a folder; choose another."
        if whole and existing == place and (os.path.ismount(place) or not os.access(place.parent, os.W_OK)):
            reason = "a disk is mounted there" if os.path.ismount(place) else f"{place.parent} cannot be written"
            return f"cannot be replaced, since {reason}; choose a folder in it, such as {out / 'result'}."
        with tempfile.TemporaryFile(dir=written) as probe:
            probe.write(b"x")
        if (free := shutil.disk_usage(written).free) < need:
            needed, left = (f"{round(size / 1e6, 1):,g} MB" for size in (need, free))
            return f"{needed} are needed, {left} are free; make room or choose another disk."
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle; ValueError: a NUL
        return f"cannot be written ({getattr(error, 'strerror', None) or error}); choose another folder."
    return ""


@contextmanager
def replaced_folder(
    out: Path, result: Result, *, option: str = "--out", inputs: Inputs | None = None, need: int = LEAST_SPACE
) -> Iterator[Path]:
    """Yields a new folder for a result, which takes the place of `out` when it is complete; see `check_output`.

    Enter it before the work: what is wrong with `out` is then told at once, and other runs are kept off it. On an
    exception `out` stays as it was. Of a link to a folder the folder is replaced.
    """
    check_output(out, result, option=option, inputs=inputs, whole=True, need=need)
    place = out.resolve()
    with locked(out, place.with_name(f".{place.name}.lock")):
        recover_folder(place)
        with atomic_path(place) as temporary:
            temporary.mkdir()
            yield temporary


@contextmanager
def filled_folder(out: Path, *, option: str = "--out") -> Iterator[None]:
    """Holds a folder while files are written into it, each atomically; its other files stay. See `check_output`."""
    check_output(out, option=option)
    with locked(out):
        yield
