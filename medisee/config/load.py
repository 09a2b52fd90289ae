"""Reads a run's configuration from YAML.

A file may name a `base: other.yaml` and hold only the difference. Dotted overrides (`train.lr=1e-4`) win over files; two
that contradict each other are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from medisee.config.model import Section
from medisee.config.run import Config, merge
from medisee.foundation.errors import InputError, nearest, shortened
from medisee.foundation.yaml_files import parse_yaml

_FOLLOWS_COMPAT = {  # old keys that `compat` replaces, with their value under each `compat`
    ("loss", "degenerate_giou"): {"finite": "none", "constant": "release"},
    ("data", "boxes"): {"half_open": "none", "inclusive": "release"},
    ("data", "draws"): {"epochs": "none", "unseeded": "release"},
    ("eval", "decoding"): {"routed": "none", "plain": "release"},
}


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML run with its bases and applies dotted overrides."""
    values = _read(Path(os.path.expanduser(path)), ()) if path is not None else {}
    said: dict[tuple[str, ...], tuple[Any, str]] = {}
    for override in overrides:
        nested = _nested(override)
        for place, value in _leaves(nested):
            for other, (their, first) in said.items():
                least = min(len(place), len(other))
                if place[:least] == other[:least] and (place != other or value != their):
                    raise InputError(
                        f"overrides {first!r:.100} and {override!r:.100} contradict each other; leave one out."
                    )
            said[place] = (value, override)
        values = merge(values, nested)
    return config_from(values, where=str(path) if path is not None else "overrides")


def _nested(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r:.100}: expected key=value, for example train.lr=1e-4.")
    try:
        nested = _numbers(parse_yaml(text))
    except ValueError as error:
        raise InputError(f"override {override!r:.100}: the value is not valid YAML ({error}); quote it.") from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _with_new_names(nested)


def _leaves(values: Mapping[Any, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        own = (*place, str(key))
        yield from _leaves(value, own) if isinstance(value, Mapping) and value else [(own, value)]


def config_from(values: Mapping[str, Any], where: str) -> Config:
    """Validates a nested mapping; `where` names its file in messages."""
    values, problems = _without_old_keys(_with_new_names(values), where)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        # A value of several possible types has a problem for each; the last one is told.
        told = {
            _location(problem): _explain(problem, where)
            for problem in error.errors()
            if problem["type"] != "too_short" or not problem["input"]  # else its items have problems
        }
        raise InputError(shortened([*problems, *told.values()], where, most=10)) from error
    if problems:
        raise InputError(problems)
    return config


def dump_config(config: Config) -> str:
    """Returns the resolved run as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    train = values.get("train")
    if isinstance(train, Mapping) and "one_by_one" in train and "unpadded" not in train:
        values = {**values, "train": {{"one_by_one": "unpadded"}.get(key, key): value for key, value in train.items()}}
    return dict(values)


def _without_old_keys(values: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    problems = []
    for (section, key), implied in _FOLLOWS_COMPAT.items():
        held = values.get(section)
        if isinstance(held, Mapping) and key in held:
            compat = implied.get(str(held[key]))
            values = {**values, section: {name: value for name, value in held.items() if name != key}}
            if compat != values.get("compat", "none"):
                fix = f"set compat: {compat}" if compat else "remove it"
                problems.append(f"{where}: {section}.{key} now follows compat; {fix}.")
    return values, problems


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path}: `base` leads back to this file; remove the circle.")
    try:
        values = parse_yaml(path.read_bytes())
    except OSError as error:
        fix = f"correct `base` in {seen[-1]}" if seen else "give an existing YAML file"
        raise InputError(f"{path}: cannot read the configuration ({error.strerror}); {fix}.") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML ({error}); fix the file.") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: expected a mapping of sections (model, loss, data, train, eval), found {type(values).__name__}."
        )
    base = values.pop("base", None)
    values = _with_new_names(_numbers(values))
    if base is None:
        return values
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise InputError(f"{path}: base = {base!r:.80}: expected the path of another YAML file; correct it.")
    return merge(_read(path.parent / os.path.expanduser(base), (*seen, path.resolve())), values)


def _numbers(values: Any) -> Any:
    # YAML 1.1 reads 1e-4 as a string, and people write it all the time.
    if isinstance(values, dict):
        return {key: _numbers(value) for key, value in values.items()}
    if isinstance(values, str) and values.startswith(tuple("0123456789-+.")) and "e" in values.lower():
        with suppress(ValueError):
            return float(values)
    return values


def _location(problem: Any) -> str:
    # Without the names that pydantic gives to the types of a union.
    union = ("bool", "int", "str", "constrained-", "function-")
    return ".".join(str(part) for part in problem["loc"] if not str(part).startswith(union))


def _explain(problem: Any, where: str) -> str:
    location, value, reason = _location(problem), problem.get("input"), problem["msg"]
    if problem["type"] == "extra_forbidden":
        known = _known(problem["loc"][:-1])
        hint = nearest(str(problem["loc"][-1]), known)
        return f"{where}: unknown key {location!r}; known here: {', '.join(known)}.{hint}"
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])
        if isinstance(value, Mapping):
            # Settings that exclude each other: the input would be their whole section.
            return f"{where}: {location}: {reason}; fix the value." if location else f"{where}: {reason}."
    if problem["type"] == "string_type" and isinstance(value, bool | int | float):
        reason += ", in quotes where YAML would read a number, yes or no"
    return f"{where}: {location or 'configuration'} = {value!r:.80}: {reason}; fix the value."


def _known(location: Sequence[Any]) -> list[str]:
    section: type[Section] = Config
    for part in location:
        kind = section.model_fields[part].annotation if isinstance(part, str) else section
        kinds = (one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, Section))
        section = next(kinds, section)
    return list(section.model_fields)
