"""Strict JSON Lines: one object a line, written atomically; on reading every problem of a file is told at once."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medisee.foundation.errors import InputError, nearest
from medisee.foundation.files import atomic_path


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank: `where` is "file:number" for messages, `offset` its first byte in the file."""

    where: str
    offset: int
    content: bytes


def read_lines(path: Path) -> Iterator[Line]:
    """Yields the lines of a file that are not blank.

    Raises:
        InputError: the file cannot be read.
    """
    offset = 0
    try:
        with path.open("rb") as handle:
            for number, content in enumerate(handle, 1):
                if content.strip():
                    yield Line(f"{path}:{number}", offset, content)
                offset += len(content)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read ({reason}); expected a JSON Lines file; check the path.") from error


def parse(content: bytes) -> Any:
    """Returns the JSON value of a line.

    Raises:
        ValueError: the line is not UTF-8 JSON, or holds NaN or Infinity, which JSON does not have.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class LineWriter:
    """Writes dataclasses as JSON Lines into an open file.

    Attributes:
        offsets: the first byte of each line so far.
    """

    def __init__(self, handle: BinaryIO, omit_empty: Collection[str]) -> None:
        self.offsets = array("q")
        self._handle, self._omit, self._end = handle, frozenset(omit_empty), 0
        self._encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=self._plain).encode

    def write(self, value: Any) -> None:
        """Adds a line.

        Raises:
            TypeError: the value, or a part of it, is neither a dataclass nor of JSON's kinds.
            ValueError: a number is NaN or infinite.
        """
        # A lone surrogate has no UTF-8 form; backslashreplace writes it as \udXXX, which is its JSON escape.
        line = self._encode(value).encode("utf-8", "backslashreplace") + b"\n"
        self.offsets.append(self._end)
        self._end += len(line)
        self._handle.write(line)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        plain = {name: getattr(value, name) for name in _field_names(type(value))}
        for name in self._omit:
            if name in plain and not plain[name]:
                del plain[name]
        return plain


@cache
def _field_names(noun: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(noun))


@contextmanager
def line_writer(path: Path | str, *, omit_empty: Collection[str] = ()) -> Iterator[LineWriter]:
    """Opens a file for lines; it takes its place when all of them are written, and not on an exception.

    Args:
        path: the file.
        omit_empty: names of fields that are left out where they are empty, at any depth.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        yield LineWriter(handle, omit_empty)


def write_lines(path: Path | str, values: Iterable[Any], *, omit_empty: Collection[str] = ()) -> None:
    """Writes dataclasses as JSON Lines, atomically and one at a time, so that `values` may be a generator.

    Args:
        path: the file.
        values: the dataclasses, one for each line.
        omit_empty: names of fields that are left out where they are empty, at any depth.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    with line_writer(path, omit_empty=omit_empty) as writer:
        for value in values:
            writer.write(value)


class Fields:
    """A JSON object that is read as a dataclass: getters return checked values.

    A getter that finds a wrong value notes the problem and returns a stand-in, so that one pass finds all problems.
    Whoever reads throws the result away when `problems` is not empty.
    """

    def __init__(self, value: Any, noun: type, where: str, spot: str, problems: list[str]) -> None:
        """Checks the keys against the fields of `noun`; those without a default are required.

        Args:
            value: the JSON value.
            noun: the dataclass it should become.
            where: "file:line".
            spot: the way from the line to this object, as "targets[0]."; empty for the line itself.
            problems: the list that problems are added to.
        """
        self.where, self.spot, self.problems = where, spot, problems
        self._values: dict[str, Any] = value if isinstance(value, dict) else {}
        known = {field.name: field for field in dataclasses.fields(noun)}
        if not isinstance(value, dict):
            named = f"{spot.rstrip('.') or 'the line'} is {_shown(value)}"
            problems.append(f"{where}: {named}; expected an object; write it with the keys {_listed(known)}.")
            return
        for key in value.keys() - known.keys():
            hint = nearest(key, known) or " Remove it."
            problems.append(f"{where}: unknown key {spot + key!r}; expected one of {_listed(known)}.{hint}")
        for key, field in known.items():
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            if key not in value and not has_default:
                problems.append(f"{where}: key {spot + key!r} is missing; expected {_listed(known)}; add it.")

    def has(self, key: str) -> bool:
        """Returns whether the key is there and is not null."""
        return self._values.get(key) is not None

    def refuse(self, key: str, expected: str, fix: str) -> None:
        """Notes that a key's value is not what was expected."""
        self.problems.append(
            f"{self.where}: {self.spot}{key} is {_shown(self._values.get(key))}; expected {expected}; {fix}."
        )

    def get(self, key: str, kind: type, expected: str, fix: str) -> Any:
        """Returns the value of a key if it is of a kind, else None."""
        value = self._values.get(key)
        if isinstance(value, kind) or key not in self._values:
            return value
        self.refuse(key, expected, fix)
        return None

    def text(self, key: str, may_be_empty: bool = False) -> str:
        """Returns a string, by default one with more than white space in it."""
        value = self.get(key, str, "a string", "write it in double quotes")
        if value is not None and not may_be_empty and not value.strip():
            self.refuse(key, "a text that is not empty", "fill it in")
        return value or ""

    def choice(self, key: str, choices: Iterable[str]) -> Any:
        """Returns a string out of a few."""
        value = self.text(key)
        if value and value not in choices:
            self.refuse(key, f"one of {_listed(choices)}", "use one of these")
        return value

    def flag(self, key: str) -> bool:
        """Returns true or false."""
        return bool(self.get(key, bool, "true or false", "write it without quotes"))

    def numbers(self, key: str, count: int, expected: str, fix: str) -> tuple[float, ...] | None:
        """Returns a list of `count` finite numbers, else None."""
        value = self.get(key, list, expected, fix)
        if value is None:
            return None
        if len(value) != count or not all(is_number(number) for number in value):
            self.refuse(key, expected, fix)
            return None
        return tuple(value)

    def objects(self, key: str, noun: type) -> list[Fields]:
        """Returns the objects of a list; a missing key is an empty list."""
        values = self.get(key, list, "a list", "write it in square brackets")
        return [
            Fields(value, noun, self.where, f"{self.spot}{key}[{index}].", self.problems)
            for index, value in enumerate(values or [])
        ]

    def object(self, key: str, noun: type) -> Fields:
        """Returns the object under a key."""
        return Fields(self._values.get(key), noun, self.where, f"{self.spot}{key}.", self.problems)

    def raw(self, key: str) -> Any:
        """Returns a value as it is."""
        return self._values.get(key)


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a finite number of a size that pixels and scores can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
