"""Which category an answer names: the category whose name, or another word for it, stands first in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from medisee.foundation.errors import InputError

_FORM = '{"liver": ["liver", "hepatic tissue"], ...}'


def named_category(text: str, categories: Mapping[str, Sequence[str]]) -> str | None:
    """Returns the category that a text names first, None when it names none.

    Names count as whole words, in any case and with any white space between their words. Where several begin at the
    same place the longest counts: "left kidney cyst" is not the left kidney.

    Args:
        text: an answer.
        categories: the names of each category; the category's own name counts only if it is among them.
    """
    found = [
        (match.start(), -len(match.group()), category)
        for category, names in categories.items()
        for name in names
        if (match := _pattern(name).search(text))
    ]
    return min(found)[2] if found else None


@cache
def _pattern(name: str) -> re.Pattern[str]:
    # Not \b: it would find no word end behind a name such as "lesion (left)".
    words = r"\s+".join(map(re.escape, name.split()))
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def read_categories(path: Path | str) -> dict[str, tuple[str, ...]]:
    """Reads a JSON file {category: [names that count as naming it]}.

    Raises:
        InputError: the file cannot be read or has another form, a category has no name, or a name stands for two
            categories; all problems are named.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); expected the JSON file of category names; "
            "correct data.categories."
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); expected {_FORM}; correct the file.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}; expected {_FORM}; correct the file.")
    problems = [
        f"{path}: category {category!r} has the names {names!r}; expected a list of one or more words; correct it."
        for category, names in content.items()
        if not (isinstance(names, list) and names and all(isinstance(name, str) and name.split() for name in names))
    ]
    if not problems:
        problems = _shared_names(path, content)
    if problems:
        raise InputError(problems)
    return {category: tuple(names) for category, names in content.items()}


def _shared_names(path: Path, categories: Mapping[str, Sequence[str]]) -> list[str]:
    owner: dict[str, str] = {}
    return [
        f"{path}: the name {name!r} stands for {owner[key]!r} and for {category!r}; "
        "expected names of one category each; remove it from one."
        for category, names in categories.items()
        for name in names
        if owner.setdefault(key := " ".join(name.lower().split()), category) != category
    ]
