"""Captions that somebody has already written: a JSON Lines file with the keys "record" and "caption"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medisee.foundation.errors import InputError
from medisee.records.jsonl import Fields, parse, read_lines


@dataclass(frozen=True, slots=True)
class CaptionLine:
    """The caption of one record's image."""

    record: str
    caption: str


def read_captions(path: Path) -> dict[str, str]:
    """Returns the captions by record id.

    Raises:
        InputError: the file cannot be read, lines are wrong, or a record has two captions; all of them are named.
    """
    problems: list[str] = []
    captions: dict[str, str] = {}
    for line in read_lines(path):
        try:
            value = parse(line.content)
        except ValueError as error:
            problems.append(f"{line.where}: not JSON ({error}); expected one object a line; correct the line.")
            continue
        fields = Fields(value, CaptionLine, line.where, "", problems)
        record, caption = fields.text("record"), fields.text("caption")
        if record in captions:
            problems.append(f"{line.where}: record {record!r} has a caption already; expected one each; remove one.")
        captions[record] = caption
    if problems:
        raise InputError(problems)
    return captions
