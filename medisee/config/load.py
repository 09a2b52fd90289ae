"""Reads a run's configuration from YAML.

Files may start with `base: other.yaml` and then hold only the difference. Dotted overrides (`train.lr=1e-4`) win over
files. An unknown key is an error that names the nearest known one. `--print-config` prints the resolved run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medisee.config.model import Section
from medisee.config.run import Config, Source, merge
from medisee.foundation.errors import InputError, first_line, nearest


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML run with its bases and applies dotted overrides.

    Raises:
        InputError: a missing file, no YAML mapping, a circular base, an unknown key (with the nearest known one), a
            value of the wrong type or out of range; all problems at once.
    """
    values = _read(Path(path), ()) if path is not None else {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(f"override {override!r}: expected key=value, for example train.lr=1e-4.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"override {override!r}: the value is no YAML; quote it.") from error
        nested: Any = _number(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = merge(values, _with_new_names(nested))
    return config_from(values, where=str(path) if path is not None else "overrides")


def config_from(values: Mapping[str, Any], where: str) -> Config:
    """Validates a nested mapping; `where` names its file in messages.

    Raises:
        InputError: every unknown key and bad value.
    """
    try:
        return Config.model_validate(_with_new_names(values))
    except ValidationError as error:
        raise InputError(_explain(problem, where) for problem in error.errors()) from error


def dump_config(config: Config) -> str:
    """Returns the resolved run as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    train = values.get("train")
    if isinstance(train, Mapping) and "one_by_one" in train and "unpadded" not in train:
        train = {"unpadded" if key == "one_by_one" else key: value for key, value in train.items()}
        return {**values, "train": train}
    return dict(values)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as a string; people write it all the time.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path}: `base` leads back to itself; remove the circle.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = f"correct `base` in {seen[-1]}" if seen else "give an existing YAML file"
        raise InputError(f"{path}: cannot read the configuration ({error.strerror}); {fix}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no valid YAML ({first_line(error)}); fix the file.") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: expected a mapping of sections (model, loss, data, train, eval), found {type(values).__name__}."
        )
    base = values.pop("base", None)
    values = _with_new_names(_numbers(values))
    if base is None:
        return values
    return merge(_read(path.parent / str(base), (*seen, path.resolve())), values)


def _numbers(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _numbers(value) for key, value in values.items()}
    if isinstance(values, str) and values[:1] in "0123456789-+." and "e" in values.lower():
        return _number(values)
    return values


def _explain(problem: Any, where: str) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known(problem["loc"][:-1])
        hint = nearest(str(problem["loc"][-1]), known)
        return f"{where}: unknown key {location!r}; known here: {', '.join(known)}.{hint}"
    if problem["type"] == "value_error" and isinstance(problem.get("input"), Mapping):
        # Of settings that do not go together: the input would be their whole section.
        error = problem["ctx"]["error"]
        return f"{where}: {location}: {error}; fix the value." if location else f"{where}: {error}."
    return f"{where}: {location or 'configuration'} = {problem.get('input')!r}: {problem['msg']}; fix the value."


def _known(location: Sequence[Any]) -> list[str]:
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            section = Source
        else:
            section = section.model_fields[part].annotation if part in section.model_fields else section
        if not (isinstance(section, type) and issubclass(section, Section)):
            section = Source
    return list(section.model_fields)
