"""Captions that exist already: a JSON Lines file with the keys "record" and "caption"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, with_config

from medisee.foundation.errors import InputError
from medisee.records.jsonl import Text, read_line, read_lines


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, slots=True)
class CaptionLine:
    """The caption of one record's image."""

    record: Text
    caption: Text


def read_captions(path: Path) -> dict[str, str]:
    """Returns the captions by record id.

    Raises:
        InputError: the file cannot be read, lines are wrong, or a record has two captions; all of them are named.
    """
    problems: list[str] = []
    captions: dict[str, str] = {}
    for line in read_lines(path):
        read = read_line(CaptionLine, line, problems)
        if read is None:
            continue
        if read.record in captions:
            problems.append(
                f"{line.where}: record {read.record!r} has a caption already; expected one per record; remove one."
            )
        captions[read.record] = read.caption
    if problems:
        raise InputError(problems)
    return captions
