"""Strict JSON Lines: one object per line, written atomically; reading reports every problem of a file at once."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar, get_args, get_type_hints

import numpy as np
from pydantic import AfterValidator, Strict, TypeAdapter, ValidationError, ValidationInfo, WrapValidator
from pydantic_core import ErrorDetails

from medisee.foundation.errors import InputError, nearest
from medisee.foundation.files import atomic_path, inside
from medisee.foundation.json_files import parse_json

T = TypeVar("T")


def not_blank(text: str) -> str:
    """Refuses a text of white space alone."""
    if not text.strip():
        raise ValueError("expected a text that is not empty; fill it in")
    return text


def _inside_root(path: str, info: ValidationInfo) -> str:
    # Only the path itself is checked: to resolve millions takes an hour, and each is resolved when it is used.
    if info.context is not None and (path[0] in "/\\" or ".." in path or "\0" in path or ":" in path):
        try:
            inside(info.context, path, "")
        except (InputError, ValueError) as error:
            raise ValueError(f"expected a path inside the root {str(info.context)!r}; correct it") from error
    return path


Text = Annotated[str, Strict(), AfterValidator(not_blank)]
"""A string that holds more than white space."""
FilePath = Annotated[Text, AfterValidator(_inside_root)]
"""A path relative to the manifest's root."""


def null_means(default: Any) -> WrapValidator:
    """Reads null as a default."""
    return WrapValidator(lambda value, validate: default if value is None else validate(value))


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank: `where` is "file:number" for messages, `offset` its first byte in the file."""

    where: str
    offset: int
    content: bytes


def read_lines(path: Path) -> Iterator[Line]:
    """Yields the lines of a file that are not blank."""
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


def read_line(noun: type[T], line: Line, problems: list[str], root: Path | None = None) -> T | None:
    """Reads a line as a dataclass; see `read_object`."""
    try:
        return read_object(noun, parse_json(line.content), line.where, problems, root)
    except (ValueError, RecursionError) as error:
        problems.append(f"{line.where}: not JSON ({error}); expected one object per line; correct or remove it.")
        return None


def read_object(noun: type[T], value: Any, where: str, problems: list[str], root: Path | None = None) -> T | None:
    """Reads a JSON object as a dataclass with pydantic's constraints in its annotations.

    None when something is wrong, which is added to `problems`. `where` is "file:line" for messages, `root` the folder
    that no `FilePath` may leave; None does not check.
    """
    try:
        return _adapter(noun).validate_python(value, context=root)
    except ValidationError as error:
        problems += [f"{where}: {_problem(noun, one)}" for one in error.errors(include_url=False)]
        return None


@cache
def _adapter(noun: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(noun)


_EXPECTED = {
    "string_unicode": "expected valid Unicode; correct it",
    "string_type": "expected a string; write it in double quotes",
    "bool_type": "expected true or false; write it without quotes",
    "bytes_type": "expected the bytes of a file; add them",
    "int_type": "expected a whole number; correct it",
    "tuple_type": "expected a list; write it in square brackets",
    "greater_than_equal": "expected {ge} or more; correct it",
    "too_long": "expected a list of at most {max_length}; shorten it",
    "literal_error": "expected {expected}; use one of these",
    "value_error": "{error}",
}


def _problem(noun: type, error: ErrorDetails) -> str:
    kind, place = error["type"], error["loc"]
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in place if not _is_tag(step)]
    spot = "".join(steps).removeprefix(".")
    if kind == "missing":
        return f"key {spot!r} is missing; add it."
    if kind == "unexpected_keyword_argument":
        known = _keys(noun, place[:-1])
        return (
            f"unknown key {spot!r}; expected one of {_listed(known)}.{nearest(str(place[-1]), known) or ' Remove it.'}"
        )
    if kind == "dataclass_type":
        reason = f"expected an object; write it with the keys {_listed(_keys(noun, place))}"
    else:
        reason = _EXPECTED[kind].format(**error.get("ctx", {})) if kind in _EXPECTED else error["msg"]
    shown = json.dumps(error["input"], ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{spot or 'the line'} is {shown}; {reason}."


def _is_tag(step: int | str) -> bool:
    # The tag of a union's member, such as "(Rle)", is not a key.
    return isinstance(step, str) and step.startswith("(")


def _keys(noun: type, place: tuple[int | str, ...]) -> list[str]:
    nouns = [noun]
    for step in place:
        if _is_tag(step):
            nouns = [one for one in nouns if f"({one.__name__})" == step]
        elif isinstance(step, str):
            nouns = _dataclasses(get_type_hints(nouns[0])[step])
    return [field.name for field in dataclasses.fields(nouns[0])]


def _dataclasses(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [one for part in get_args(hint) for one in _dataclasses(part)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


class LineWriter:
    """Writes dataclasses as JSON Lines into an open file; `offsets` has the first byte of each line so far."""

    def __init__(self, handle: IO[bytes], omit_empty: Collection[str] = ()) -> None:
        self.offsets = array("q")
        self._handle, self._omit, self._end = handle, frozenset(omit_empty), 0
        self._encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=self._plain).encode

    def write(self, value: Any) -> None:
        """Adds a line; ValueError for what no reader would take: NaN, infinite numbers and lone surrogates."""
        line = self._encode(value).encode("utf-8") + b"\n"
        self.offsets.append(self._end)
        self._end += len(line)
        self._handle.write(line)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        fields = {name: getattr(value, name) for name in _field_names(type(value))}
        return {name: content for name, content in fields.items() if name not in self._omit or content}


@cache
def _field_names(noun: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(noun))


@contextmanager
def line_writer(path: Path | str, *, omit_empty: Collection[str] = ()) -> Iterator[LineWriter]:
    """Opens a file for lines; it takes its place when all of them are written, and not on an exception.

    `omit_empty` names fields that are left out where they are empty, at any depth.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        yield LineWriter(handle, omit_empty)


def write_lines(path: Path | str, values: Iterable[Any], *, omit_empty: Collection[str] = ()) -> None:
    """Writes dataclasses as JSON Lines, one at a time, so that `values` may be a generator; see `line_writer`."""
    with line_writer(path, omit_empty=omit_empty) as writer:
        for value in values:
            writer.write(value)
