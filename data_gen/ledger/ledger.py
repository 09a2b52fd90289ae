"""The ledger: one SQLite file with everything that was asked, answered, made, dropped and decided.

What is stored is on the disk (WAL, synchronous=FULL) before anything is built on it. So a run can be killed at any
moment and started again, and nothing that has an answer is asked again. Times are stored but never read back, so every
export is a pure function of the other content.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, TypeVar

from data_gen.core.calls import canonical
from data_gen.core.items import Decision, Drop, Item, Pair
from data_gen.core.names import Names, load_names
from data_gen.ledger.answers import Answers
from data_gen.ledger.store import DAMAGED, Store
from medisee.foundation.errors import InputError

VERSION = 1
_TABLES = Path(__file__).with_name("ledger.sql")
_DECISION = "pair, reviewer, verdict, reason, question, answer"
Noun = TypeVar("Noun", Item, Pair)
# What no run writes; foreign keys and the file's own structure are checked too.
_WRONG = (
    "SELECT 'pair ' || id FROM pairs WHERE state NOT IN ('new', 'kept', 'duplicate') "
    "OR json_extract(content, '$.item') NOT IN (SELECT id FROM items)",
    "SELECT 'answer ' || key FROM answers WHERE attempt < 1 OR typeof(attempt) != 'integer' OR typeof(price) != 'real'",
    "SELECT 'batch ' || token FROM batches WHERE status NOT IN ('begun', 'submitted', 'collected', 'failed', 'abandoned')",
    "SELECT 'row of ' || \"table\" FROM pragma_foreign_key_check",
    # SQLite 3.40 finds NULLs in `drops` that are not there: its key has the columns in another order.
    "SELECT quick_check FROM sqlite_master, pragma_quick_check(name) "
    "WHERE type = 'table' AND name != 'drops' AND quick_check != 'ok'",
)


class Ledger:
    """The file behind a data set. Use it as a context manager; every method may be called in any thread."""

    def __init__(self, path: Path | str, *, create: bool = False) -> None:
        """Opens a ledger; `create` makes a missing file."""
        self.path = Path(path)
        self._is_new = create and not self.path.exists()
        if not create and not self.path.is_file():
            raise InputError(
                f"{path}: no such ledger; expected one made by `python -m data_gen run`; correct the path."
            )
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._store = Store(self.path, lambda connection: _prepare(connection, self.path))
        except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.path}: not a ledger, or a damaged one ({error}); expected an SQLite file made by `python -m "
                f"data_gen run`; correct the path, or {DAMAGED}."
            ) from error
        self.answers = Answers(self._store)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Closes the file; one that was made for a run which was refused before it drew its items is removed."""
        is_empty = kind is not None and self._is_new and not self._store.read("SELECT 1 FROM items LIMIT 1")
        self._store.close()
        if is_empty:
            self.path.unlink(missing_ok=True)

    def _fact(self, name: str) -> str | None:
        rows = self._store.read("SELECT value FROM facts WHERE name=?", name)
        return rows[0][0] if rows else None

    def start_run(self, fixed: dict[str, Any], free: dict[str, Any]) -> int:
        """Stores that a run begins, and returns its number; all runs of a ledger must share the `fixed` settings."""
        known = self.settings() or fixed
        problems = [
            f"{self.path}: was begun with {key} = {json.dumps(known.get(key))}, this run has "
            f"{json.dumps(fixed.get(key))}; use the same or name another --ledger."
            for key in sorted(known.keys() | fixed.keys())
            if known.get(key) != fixed.get(key)
        ]
        if problems:
            raise InputError(problems)

        def operation(connection: sqlite3.Connection) -> int:
            connection.execute("INSERT OR IGNORE INTO facts VALUES('settings', ?)", (canonical(fixed),))
            row = canonical({**fixed, **free}), time.time()
            return connection.execute("INSERT INTO runs(settings, started) VALUES(?, ?)", row).lastrowid or 0

        return self._store.submit(operation).result()

    def end_run(self, number: int, outcome: str) -> None:
        """Stores how a run ended."""
        self._store.execute("UPDATE runs SET ended=?, outcome=? WHERE number=?", time.time(), outcome, number).result()

    def settings(self) -> dict[str, Any]:
        """Returns the settings that all runs of this ledger share; empty before the first run."""
        return self._store.json(dict[str, Any], self._fact("settings") or "{}")

    def keep_names(self, text: str | None) -> None:
        """Stores the further names of categories that a run was given, so that every command knows them."""
        if text is not None:
            self._store.execute("INSERT OR REPLACE INTO facts VALUES('names', ?)", text).result()

    def names(self) -> Names:
        """Returns the names of categories: the package's table and the further names that the runs were given."""
        return load_names(self._fact("names"), f"{self.path}: its further names")

    def root(self) -> Path:
        """Returns the folder that the items' image and mask paths are relative to."""
        relative = self._fact("root")
        if relative is None:
            raise InputError(f"{self.path}: holds no items yet; start with `python -m data_gen run`.")
        if "\0" in relative:
            raise self._store.damaged("the folder of the images")
        return Path(os.path.normpath(self.path.resolve().parent / relative))

    def add_items(self, items: Iterable[Item], root: Path, *, complete: bool) -> None:
        """Stores new items, in the order of the manifest, in one transaction; `complete` if it has no others."""
        rows = [(item.id, _dump(item)) for item in items]
        # Relative to the ledger's folder, so that both can be moved together.
        relative = os.path.relpath(root.resolve(), self.path.resolve().parent)

        def operation(connection: sqlite3.Connection) -> None:
            facts = [("root", relative), ("complete", str(int(complete)))]
            connection.executemany("INSERT OR REPLACE INTO facts VALUES(?, ?)", facts)
            connection.executemany(
                "INSERT OR IGNORE INTO items VALUES(?, (SELECT coalesce(max(number), 0) + 1 FROM items), ?)", rows
            )

        self._store.submit(operation).result()

    def has_items(self, limit: int | None) -> bool:
        """Returns whether all items are stored, or the first `limit`."""
        count = self._store.read("SELECT count(*) FROM items")[0][0]
        return self._fact("complete") == "1" or (limit is not None and count >= limit)

    def count_open(self, style: str, limit: int | None = None) -> tuple[int, int]:
        """Returns how many of the first `limit` items have no outcome in a style, and how many there are."""
        ((done, count),) = self._store.read(
            "SELECT count(outcomes.item), count(*) FROM items LEFT JOIN outcomes ON item = id AND style = ? "
            "WHERE ? IS NULL OR number <= ?",
            *(style, limit, limit),
        )
        return count - done, count

    def item(self, identity: str) -> Item:
        """Returns the item with an id that the ledger has."""
        return self._read(Item, identity, self._store.read("SELECT content FROM items WHERE id=?", identity)[0][0])

    def items(self) -> list[Item]:
        """Returns all items in the order of their ids."""
        return [self._read(Item, *row) for row in self._store.read("SELECT id, content FROM items ORDER BY id")]

    def open_items(self, style: str, limit: int | None = None) -> Iterator[Item]:
        """Yields those of the first `limit` items that have no outcome in a style, in the order of the manifest."""
        for _, identity, content in self._store.pages(
            "SELECT number, id, content FROM items WHERE number > ? AND (? IS NULL OR number <= ?) AND NOT EXISTS "
            "(SELECT 1 FROM outcomes WHERE item = items.id AND style = ?) ORDER BY number",
            0,
            *(limit, limit, style),
        ):
            yield self._read(Item, identity, content)

    def _read(self, noun: type[Noun], identity: str, content: str) -> Noun:
        """Reads an item or a pair, whose id is that of its row."""
        value = self._store.json(noun, content)
        if value.id != identity:
            raise self._store.damaged(f"{identity!r} and {value.id!r} are in one row")
        return value

    def finish(self, item: str, style: str, pairs: list[Pair], drops: list[Drop]) -> Future[None]:
        """Stores the outcome of an item, once; the future is done when it is on the disk."""
        pair_rows, drop_rows = [(pair.id, _dump(pair)) for pair in pairs], [astuple(drop) for drop in drops]

        def operation(connection: sqlite3.Connection) -> None:
            if connection.execute("INSERT OR IGNORE INTO outcomes VALUES(?, ?)", (item, style)).rowcount:
                connection.executemany("INSERT OR REPLACE INTO pairs VALUES(?, ?, 'new')", pair_rows)
                connection.executemany("INSERT OR IGNORE INTO drops VALUES(?, ?, ?, ?, ?)", drop_rows)

        return self._store.submit(operation)

    def pairs(self) -> list[Pair]:
        """Returns the pairs that are not duplicates, in the order of their ids."""
        rows = self._store.read("SELECT id, content FROM pairs WHERE state IN ('new', 'kept') ORDER BY id")
        return [self._read(Pair, *row) for row in rows]

    def pairs_in(self, state: str) -> Iterator[Pair]:
        """Yields the pairs in a state, in the order of their ids.

        "new" has not been compared with the others, "kept" has been and stays, "duplicate" repeats another pair.
        """
        query = "SELECT id, content FROM pairs WHERE id > ? AND state=? ORDER BY id"
        for row in self._store.pages(query, "", state):
            yield self._read(Pair, *row)

    def has_pairs(self, style: str) -> bool:
        """Returns whether there is a pair in a style."""
        query = "SELECT 1 FROM pairs WHERE state IN ('new', 'kept') AND (json_extract(content, '$.conversation') IS NULL) = ?"
        return bool(self._store.read(f"{query} LIMIT 1", style == "single"))

    def count_pairs(self) -> dict[str, int]:
        """Returns the number of "new", "kept" and "duplicate" pairs; see `pairs_in`."""
        found = dict(self._store.read("SELECT state, count(*) FROM pairs GROUP BY state"))
        return {state: found.get(state, 0) for state in ("new", "kept", "duplicate")}

    def is_deduplicated(self) -> bool:
        """Returns whether all pairs have been compared with each other."""
        return not self._store.read("SELECT 1 FROM pairs WHERE state='new' LIMIT 1")

    def mark_deduplicated(self, rewritten: list[Pair], drops: list[Drop]) -> None:
        """Ends a pass over near-duplicates: of the new pairs some are rewritten, some dropped, the others kept."""
        pair_rows, drop_rows = [(_dump(pair), pair.id) for pair in rewritten], [astuple(drop) for drop in drops]

        def operation(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE pairs SET state='kept' WHERE state='new'")
            connection.executemany("UPDATE pairs SET content=? WHERE id=?", pair_rows)
            connection.executemany("UPDATE pairs SET state='duplicate' WHERE id=?", [(drop.pair,) for drop in drops])
            connection.executemany("INSERT OR IGNORE INTO drops VALUES(?, ?, ?, ?, ?)", drop_rows)

        self._store.submit(operation).result()

    def drops(self) -> list[Drop]:
        """Returns what was dropped and why, in the order of items, stages and pairs."""
        query = "SELECT item, stage, rule, reason, pair FROM drops ORDER BY item, stage, pair, rule, reason"
        return self._store.rows(Drop, query)

    def decide(self, decision: Decision) -> None:
        """Stores a reviewer's decision; it is on the disk when this returns."""
        done = self._store.execute(
            f"INSERT INTO decisions({_DECISION}, created) SELECT ?, ?, ?, ?, ?, ?, ? "
            "WHERE EXISTS (SELECT 1 FROM pairs WHERE id=?)",
            *(*astuple(decision), time.time(), decision.pair),
        )
        if not done.result().rowcount:
            raise InputError(f"{self.path}: has no pair {decision.pair!r}; expected one of its pairs; reload the page.")

    def undo(self, reviewer: str) -> Decision | None:
        """Takes back a reviewer's last decision that is valid and returns it; None when there is none."""

        def operation(connection: sqlite3.Connection) -> Decision | None:
            last = f"SELECT number, {_DECISION} FROM decisions WHERE reviewer=? AND undone IS NULL ORDER BY number DESC"
            found = connection.execute(f"{last} LIMIT 1", (reviewer,)).fetchone()
            if found is None:
                return None
            connection.execute("UPDATE decisions SET undone=? WHERE number=?", (time.time(), found[0]))
            return Decision(*found[1:])

        return self._store.submit(operation).result()

    def decisions(self) -> list[Decision]:
        """Returns each reviewer's latest valid decision about each pair, ordered by pair and reviewer."""
        return self._store.rows(
            Decision,
            f"SELECT {_DECISION} FROM decisions WHERE number IN (SELECT max(number) FROM decisions "
            "WHERE undone IS NULL GROUP BY pair, reviewer) ORDER BY pair, reviewer",
        )


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the tables of a new file, or refuses the file of another program."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    tables = _TABLES.read_text(encoding="utf-8")
    if version == VERSION and found.issuperset(re.findall(r"CREATE TABLE (\w+)", tables)):
        for query in _WRONG:
            if row := connection.execute(f"{query} LIMIT 1").fetchone():
                raise sqlite3.DatabaseError(str(row[0]))
        return
    if version or found:
        raise InputError(
            f"{path}: belongs to another program or is a ledger of another version ({version}); expected a ledger of "
            f"version {VERSION}; name another file."
        )
    connection.executescript(f"BEGIN EXCLUSIVE; {tables} PRAGMA user_version={VERSION}; COMMIT;")


def _dump(value: Item | Pair) -> str:
    return json.dumps(asdict(value), ensure_ascii=True)
