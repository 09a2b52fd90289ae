"""Ledgers that are damaged or of another program, and the commands that read them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from rows import Row, Workspace


def ledger(w: Workspace, *statements: str) -> Path:
    """Makes a ledger of one item with one pair, then changes it."""
    from data_gen.core.items import Entity, Item, Pair
    from data_gen.ledger.ledger import Ledger
    from medisee.records.images import read_image
    from medisee.records.masks import encode_mask

    path = w.folder / "l.sqlite"
    mask = read_image(w.image)[..., 0] > -1
    box = (0.0, 0.0, 1.0, 1.0)
    item = Item(
        id="r0/t",
        record="r0",
        target="t",
        image=w.image.name,
        mask=encode_mask(mask),
        modality="ct",
        source="s",
        case="c",
        category="liver",
        box=box,
        entities=(Entity("liver", box),),
        width=mask.shape[1],
        height=mask.shape[0],
    )
    question = "Which organ of the belly makes bile?"
    answer = "It is the liver, because the liver makes bile for digestion."
    pair = Pair(
        id="r0/t#p",
        item="r0/t",
        template="first",
        perspective="attribute",
        length="short",
        question=question,
        answer=answer,
        author="m",
    )
    with Ledger(path, create=True) as made:
        made.start_run({"model": "m"}, {})
        made.add_items([item], w.image.parent, complete=True)
        made.finish(item.id, "single", [pair], []).result()
        made.mark_deduplicated([], [])
    with sqlite3.connect(path) as raw:
        for statement in statements:
            raw.execute(statement)
    raw.close()
    return path


def cut(w: Workspace, size: int) -> Path:
    path = ledger(w)
    path.write_bytes(path.read_bytes()[:size])
    return path


def zeroed(w: Workspace, page: int) -> Path:
    path = ledger(w)
    content = path.read_bytes()
    path.write_bytes(content[: 4096 * page] + bytes(4096) + content[4096 * (page + 1) :])
    return path


def call(w: Workspace, command: str, path: Path, *extra: str | Path) -> list[str]:
    more = {"review": ["--reviewer", "anna", "--port", "0"], "run": ["--records", w.manifest, "--author", "offline"]}
    return [str(word) for word in [command, "--ledger", path, *more.get(command, ["--out", w.out]), *extra]]


COMMANDS = ("run", "review", "export", "stats")
READERS = COMMANDS[1:]
_NOT_READ = ("l.sqlite", "not a ledger, or a damaged one")
_CANNOT = ("l.sqlite", "cannot be read")
_WRONG = [
    ("item that is gone", "DELETE FROM items", _NOT_READ),
    ("pair in no state", "UPDATE pairs SET state = 'odd'", _NOT_READ),
    ("pair that is no JSON", "UPDATE pairs SET content = 'odd'", _NOT_READ),
    ("pair of another type", "UPDATE pairs SET content = json_set(content, '$.question', 3)", (*_CANNOT, "question")),
    ("item of another type", "UPDATE items SET content = json_set(content, '$.width', 'odd')", (*_CANNOT, "width")),
    ("item without a case", "UPDATE items SET content = json_remove(content, '$.case')", (*_CANNOT, "case")),
    ("names that are no table", "INSERT INTO facts VALUES('names', '[')", ("l.sqlite", "names", "cannot be read")),
]

ROWS = [
    *(Row(f"{c}: cut ledger", "data_gen", lambda w, c=c: call(w, c, cut(w, 9000)), _NOT_READ) for c in COMMANDS),
    *(Row(f"{c}: cut header", "data_gen", lambda w, c=c: call(w, c, cut(w, 50)), _NOT_READ) for c in COMMANDS),
    *(Row(f"{c}: lost page", "data_gen", lambda w, c=c: call(w, c, zeroed(w, 2)), _NOT_READ) for c in COMMANDS),
    *(
        Row(
            f"{c}: ledger of the future",
            "data_gen",
            lambda w, c=c: call(w, c, ledger(w, "PRAGMA user_version = 9")),
            ("l.sqlite", "another version (9)"),
        )
        for c in COMMANDS
    ),
    *(
        Row(
            f"{c}: ledger without a table",
            "data_gen",
            lambda w, c=c: call(w, c, ledger(w, "DROP TABLE drops")),
            ("l.sqlite", "another program"),
        )
        for c in COMMANDS
    ),
    *(
        Row(f"{c}: {name}", "data_gen", lambda w, c=c, change=change: call(w, c, ledger(w, change)), words)
        for name, change, words in _WRONG
        for c in ("review", "export")
    ),
    Row("stats: pair of another type", "data_gen", lambda w: call(w, "stats", ledger(w, _WRONG[3][1])), _CANNOT),
    Row(
        "export: decision of another kind",
        "data_gen",
        lambda w: call(w, "export", ledger(w, _ODD)),
        (*_CANNOT, "verdict"),
    ),
    Row("run: other settings", "data_gen", lambda w: call(w, "run", ledger(w)), ("l.sqlite", "was begun with model")),
    Row("run: settings that are no JSON", "data_gen", lambda w: call(w, "run", ledger(w, _SETTINGS)), _CANNOT),
    Row("run: text as a ledger", "data_gen", lambda w: call(w, "run", w.text("l.sqlite", "odd" * 999)), _NOT_READ),
    *(
        Row(f"{c}: no ledger there", "data_gen", lambda w, c=c: call(w, c, w.folder / "no"), ("no such ledger",))
        for c in READERS[::2]
    ),
    Row(
        "review: blank name", "data_gen", lambda w: call(w, "review", ledger(w), "--reviewer", " "), ("--reviewer ' '",)
    ),
    Row("review: share of none", "data_gen", lambda w: call(w, "review", ledger(w), "--share", "0"), ("--share 0.0",)),
    Row(
        "review: no such port", "data_gen", lambda w: call(w, "review", ledger(w), "--port", "99999"), ("--port 99999",)
    ),
    Row("export: image that is gone", "data_gen", lambda w: call(w, "export", _without_image(w)), ("0.png",)),
    *(
        Row(
            f"stats: summary with {name}",
            "data_gen",
            lambda w, text=text: ["stats", "--export", str(w.text("e/data.json", text).parent), "--out", str(w.out)],
            ("data.json", *words),
        )
        for name, text, words in (
            ("nesting", "[" * 9999, ("nested too deeply",)),
            ("a key twice", '{"author": "models", "author": "offline"}', ("'author' is twice",)),
            ("NaN", '{"author": NaN}', ("NaN",)),
            ("no drops", '{"author": "models"}', ("dropped",)),
            ("drops of another type", json.dumps({"author": "models", "dropped": [1]}), ("dropped.0",)),
        )
    ),
]

_ODD = "INSERT INTO decisions VALUES(1, 'r0/t#p', 'anna', 'odd', '', '', '', 1.0, NULL)"
_SETTINGS = "UPDATE facts SET value = '{' WHERE name = 'settings'"


def _without_image(w: Workspace) -> Path:
    path = ledger(w)
    w.image.unlink()
    return path
