"""Downloads of weights that do not exist or are not as they were; nothing here reaches the network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rows import Row, Workspace
from rows_checkpoints import PAGE, POINTER

NOTES, MANUAL = "out/weights.json", "sam-med2d_b.pth"


def notes(w: Workspace, content: Any) -> list[str | Path]:
    """Arguments of a check of OUT, with this weights.json."""
    w.text(NOTES, content if isinstance(content, (str, bytes)) else json.dumps(content))
    return ["--check", "--out", w.out]


def downloaded(w: Workspace, content: bytes, *, size: int = 4, name: str = "sam/x.bin") -> list[str | Path]:
    """Arguments of a check where the file was noted as b"good", and now has this content."""
    w.text(f"out/{name}", content)
    note = {"sha256": hashlib.sha256(b"good").hexdigest(), "size": size}
    return notes(w, {"format": 1, "weights": {"sam": {"files": {name: note}}}})


def by_hand(w: Workspace, content: str) -> list[str | Path]:
    """Arguments of a download whose file a user has saved."""
    w.text(f"out/sam-med2d/{MANUAL}", content)
    return ["sam-med2d", "--out", w.out]


ROWS = [
    Row("nothing", "download", lambda w: ["--out", w.out], ("no weights named", "--list")),
    Row("no revision", "download", lambda w: ["sam@", "--out", w.out], ("sam@", "commit after the @")),
    Row("revision of a set", "download", lambda w: ["medisee-7b@main"], ("medisee-7b@main",)),
    Row("two revisions", "download", lambda w: ["sam@a", "sam@b", "--out", w.out], ("sam@b", "two revisions")),
    Row("nothing to check", "download", lambda w: ["--check", "--out", w.out], ("weights.json", "is not there")),
    Row("empty notes", "download", lambda w: notes(w, ""), ("weights.json", "format 1")),
    Row("list as notes", "download", lambda w: notes(w, [1]), ("weights.json", "format 1")),
    Row("nested notes", "download", lambda w: notes(w, "[" * 100_000), ("weights.json", "format 1")),
    Row("notes twice", "download", lambda w: notes(w, '{"format": 1, "weights": {}, "weights": {}}'), ("format 1",)),
    Row("bytes as notes", "download", lambda w: notes(w, b"\xff\xfe"), ("weights.json", "format 1")),
    Row("other format", "download", lambda w: notes(w, {"format": 2, "weights": {}}), ("weights.json", "format 1")),
    Row("changed", "download", lambda w: downloaded(w, b"evil"), ("x.bin", "SHA-256 is")),
    Row("cut", "download", lambda w: downloaded(w, b"goo"), ("x.bin", "has 3 bytes instead of 4")),
    Row("path leads out", "download", lambda w: downloaded(w, b"good", name="../x.bin"), ("weights.json", "../x.bin")),
    Row("never downloaded", "download", lambda w: [*downloaded(w, b"good"), "clip"], ("clip was never downloaded",)),
    Row("by hand, missing", "download", lambda w: ["sam-med2d", "--out", w.out], (MANUAL, "github.com/OpenGVLab")),
    Row("by hand, a page", "download", lambda w: by_hand(w, PAGE), (MANUAL, "a web page", "download it again")),
    Row("by hand, a pointer", "download", lambda w: by_hand(w, POINTER), (MANUAL, "Git LFS")),
    Row("by hand, empty", "download", lambda w: by_hand(w, ""), (MANUAL, "an empty file")),
]
