"""The single entry point for JSON: what it takes says exactly one thing, or is refused with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from medisee.foundation.errors import InputError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """Parses a JSON text; ValueError gives the reason in a few words.

    Refused, besides what is not JSON: NaN and Infinity, a key that is twice in an object, lone surrogates (no UTF-8 file
    can hold them) and nesting that Python cannot follow.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _SURROGATE.search(text):  # only an escape can bring one in
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("a \\ud800-\\udfff escape without its pair, which is not a character") from error
    return value


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """Reads a JSON file that holds one object; `expected` says what it should be, such as "a checkpoint's config.json"."""
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); expected {expected}.") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); expected {expected}; make or copy it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; expected {expected}; make or copy it again.")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {repeated!r} is twice in one object")
    return value
