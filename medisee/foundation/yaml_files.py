"""The single entry point for YAML: what it takes says exactly one thing, or is refused with the line and a reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from medisee.foundation.errors import InputError, first_line

MOST_LEVELS = 50
MOST_REPEATED = 10_000  # values that aliases (*name) repeat, all together
_TAG = "tag:yaml.org,2002:"
_TWO_READINGS = re.compile(r"[-+]?(0[0-9_]+|.*:.*)")  # 010 is 8 in YAML 1.1, and 1:30 is 90


class _Loader(yaml.SafeLoader):
    """Builds plain values, and refuses what YAML leaves open."""

    # Dates are text, as in YAML 1.2.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [one for one in resolvers if one[0] != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._nodes = self._repeated = 0
        self._sizes: dict[str, int] = {}  # values below each anchor

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _refused(event, f"*{event.anchor} is inside what it names")
            size = self._sizes.get(event.anchor, 0)
            self._nodes += size
            self._repeated += size
            if self._repeated > MOST_REPEATED:
                raise _refused(event, f"aliases repeat more than {MOST_REPEATED} values")
            return super().compose_node(parent, index)
        if event.tag not in (None, "!", f"{_TAG}str"):
            raise _refused(event, f"the tag {event.tag.replace(_TAG, '!!')} is not taken; write a plain value")
        before = self._nodes
        self._nodes += 1
        self._level += 1
        if self._level > MOST_LEVELS:
            raise _refused(event, f"nested more than {MOST_LEVELS} levels deep")
        node = super().compose_node(parent, index)
        self._level -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        # Before `<<` is resolved, which puts the keys of another mapping beside these.
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                raise _refused(key, f"the key {key.value!r} is already on line {lines[key.value]}; remove one of them")
            lines[key.value] = key.start_mark.line + 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and _TWO_READINGS.fullmatch(node.value):
            raise _refused(node, f"{node.value} can be read in two ways; write a decimal number, or text in quotes")
        value = super().construct_scalar(node)
        if node.style == '"' and any("\ud800" <= character <= "\udfff" for character in value):
            raise _refused(node, "an escape \\ud800-\\udfff is not a character; write the character itself")
        return value


def parse_yaml(text: str | bytes) -> Any:
    """Parses a YAML text of one document; ValueError gives the line and the reason in a few words.

    Refused, besides what is not YAML: a key that is twice in a mapping, tags, deep nesting, aliases without end, lone
    surrogates, and numbers that YAML 1.1 reads as octal (010) or in base 60 (1:30). Dates are text.
    """
    try:
        return _Loader(text.decode("utf-8-sig") if isinstance(text, bytes) else text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"line {mark.line + 1 if mark else 1}: {reason}") from error
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error


def read_yaml(path: Path, expected: str) -> Any:
    """Reads a YAML file; `expected` says what it should be, such as "a table of prices"."""
    try:
        return parse_yaml(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); expected {expected}.") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML ({error}); expected {expected}; correct it.") from error


def _refused(place: yaml.Node | yaml.Event, reason: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=place.start_mark)
