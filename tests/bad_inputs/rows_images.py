"""Images that cannot be read, or could be read in two ways."""

from __future__ import annotations

from rows import Row

ROWS = [
    Row("missing", "ask", lambda w: w.ask(image=w.folder / "none.png"), ("none.png", "check the path")),
    Row("empty", "ask", lambda w: w.ask(image=w.text("empty.png", b"")), ("empty.png", "empty file")),
    Row("text", "ask", lambda w: w.ask(image=w.text("notes.png", "hello")), ("notes.png", "convert it")),
]
