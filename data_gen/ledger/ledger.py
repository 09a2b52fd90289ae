"""The ledger: one SQLite file that holds all that was asked, answered, made, dropped and decided.

What is stored is on the disk (WAL, synchronous=FULL) before anything is built on it. So a run can be killed at any
moment and started again, and nothing that has an answer is asked again. Times are in the ledger only: what is read
back, and so every export, is a pure function of its content.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from data_gen.core.calls import canonical
from data_gen.core.items import Decision, Drop, Entity, Item, Pair
from data_gen.core.names import Names, load_names
from data_gen.ledger.answers import Answers, Count
from data_gen.ledger.store import Store
from medisee.foundation.errors import InputError
from medisee.records.masks import Rle

VERSION = 1
_TABLES = Path(__file__).with_name("ledger.sql")


class Ledger:
    """The store of a data set in the making. Use it as a context manager; every method may be called in any thread.

    Attributes:
        path: the SQLite file.
        answers: its requests and answers.
    """

    def __init__(self, path: Path | str, *, create: bool = False) -> None:
        """Opens a ledger.

        Args:
            path: the SQLite file.
            create: whether a missing file is made; commands that only read leave it at False.

        Raises:
            InputError: the file is missing, cannot be opened or is not a ledger of this version.
        """
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise InputError(
                f"{self.path}: no such ledger; expected one made by `python -m data_gen run`; correct the path."
            )
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._store = Store(self.path, lambda connection: _prepare(connection, self.path))
        except (OSError, sqlite3.Error) as error:
            raise InputError(
                f"{self.path}: not a ledger ({error}); expected an SQLite file made by `python -m data_gen run`; "
                "correct the path."
            ) from error
        self.answers = Answers(self._store)

    def close(self) -> None:
        """Writes what is under way and closes the file."""
        self._store.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fact(self, name: str) -> str | None:
        rows = self._store.read("SELECT value FROM facts WHERE name=?", (name,))
        return rows[0][0] if rows else None

    # Runs and items

    def start_run(self, fixed: dict[str, Any], free: dict[str, Any]) -> int:
        """Notes that a run begins, and returns its number.

        Args:
            fixed: settings that all runs of a ledger share, since what they make would not fit together otherwise.
            free: settings that may differ, kept for the record.

        Raises:
            InputError: the ledger was begun with other fixed settings; each is named.
        """
        known = self.settings() or fixed
        keys = sorted(known.keys() | fixed.keys())
        problems = [
            f"{self.path}: was begun with {key} = {json.dumps(known.get(key))}, this run has "
            f"{json.dumps(fixed.get(key))}; use the same or name another --ledger."
            for key in keys
            if known.get(key) != fixed.get(key)
        ]
        if problems:
            raise InputError(problems)

        def operation(connection: sqlite3.Connection) -> int:
            connection.execute("INSERT OR IGNORE INTO facts VALUES('settings', ?)", (canonical(fixed),))
            done = connection.execute(
                "INSERT INTO runs(settings, started) VALUES(?, ?)", (canonical({**fixed, **free}), time.time())
            )
            return done.lastrowid or 0

        return self._store.submit(operation).result()

    def end_run(self, number: int, outcome: str) -> None:
        """Notes how a run ended."""
        self._store.submit(
            lambda connection: connection.execute(
                "UPDATE runs SET ended=?, outcome=? WHERE number=?", (time.time(), outcome, number)
            )
        ).result()

    def settings(self) -> dict[str, Any]:
        """Returns the settings that all runs of this ledger share; empty before the first run."""
        return json.loads(self._fact("settings") or "{}")

    def keep_names(self, text: str | None) -> None:
        """Stores the further names of categories that the runs were given, so that every command counts them."""
        if text is not None:
            self._store.submit(
                lambda connection: connection.execute("INSERT OR REPLACE INTO facts VALUES('names', ?)", (text,))
            ).result()

    def names(self) -> Names:
        """Returns what counts as naming a category: the package's table and the names that the runs were given."""
        return load_names(self._fact("names"), f"{self.path}: its further names")

    def root(self) -> Path:
        """Returns the folder that the items' image and mask paths are relative to.

        Raises:
            InputError: no run has begun.
        """
        relative = self._fact("root")
        if relative is None:
            raise InputError(f"{self.path}: holds no items yet; start with `python -m data_gen run`.")
        return Path(os.path.normpath(self.path.resolve().parent / relative))

    def add_items(self, items: Iterable[Item], root: Path, *, complete: bool) -> None:
        """Stores items that are not there yet, in one go, and the folder of their images.

        Args:
            items: in the order of the manifest.
            root: kept relative to the ledger's folder, so that both can be moved together.
            complete: whether the manifest has no others.
        """
        rows = [(item.id, _dump(item)) for item in items]
        relative = os.path.relpath(root.resolve(), self.path.resolve().parent)

        def operation(connection: sqlite3.Connection) -> None:
            facts = [("root", relative), ("complete", str(int(complete)))]
            connection.executemany("INSERT OR REPLACE INTO facts VALUES(?, ?)", facts)
            connection.executemany(
                "INSERT OR IGNORE INTO items VALUES(?, (SELECT coalesce(max(number), 0) + 1 FROM items), ?)", rows
            )

        self._store.submit(operation).result()

    def has_items(self, limit: int | None) -> bool:
        """Returns whether all items are there, or the first so many."""
        count = self._store.read("SELECT count(*) FROM items")[0][0]
        return self._fact("complete") == "1" or (limit is not None and count >= limit)

    def count_open(self, style: str, limit: int | None = None) -> tuple[int, int]:
        """Returns how many items have no outcome in a style, and how many there are, among the first `limit`."""
        ((done, count),) = self._store.read(
            "SELECT count(outcomes.item), count(*) FROM items LEFT JOIN outcomes ON item = id AND style = ? "
            "WHERE ? IS NULL OR number <= ?",
            (style, limit, limit),
        )
        return count - done, count

    def item(self, identity: str) -> Item:
        """Returns the item with an id.

        Raises:
            KeyError: there is none.
        """
        rows = self._store.read("SELECT content FROM items WHERE id=?", (identity,))
        if not rows:
            raise KeyError(identity)
        return _item(rows[0][0])

    def items(self) -> list[Item]:
        """Returns all items in the order of their ids."""
        return [_item(content) for (content,) in self._store.read("SELECT content FROM items ORDER BY id")]

    def open_items(self, style: str, limit: int | None = None) -> Iterator[Item]:
        """Yields the items without an outcome in a style, in the order of the manifest.

        Args:
            style: "single" or "multi-turn".
            limit: look at the first so many items only.
        """
        for _, content in self._store.pages(
            "SELECT number, content FROM items WHERE number > ? AND (? IS NULL OR number <= ?) AND NOT EXISTS "
            "(SELECT 1 FROM outcomes WHERE item = items.id AND style = ?) ORDER BY number",
            0,
            (limit, limit, style),
        ):
            yield _item(content)

    def counts(self) -> list[Count]:
        """Returns what each stage asked of each model, ordered by stage and model."""
        return self.answers.counts()

    def faults(self) -> dict[str, int]:
        """Returns how often the rules found each fault in an answer, those that were mended later among them."""
        return self.answers.faults()

    # Outcomes

    def finish(self, item: str, style: str, pairs: list[Pair], drops: list[Drop]) -> Future[None]:
        """Stores what became of an item, once; the future is done when it is on the disk."""
        pair_rows = [(pair.id, _dump(pair)) for pair in pairs]
        drop_rows = [dataclasses.astuple(drop) for drop in drops]

        def operation(connection: sqlite3.Connection) -> None:
            if connection.execute("INSERT OR IGNORE INTO outcomes VALUES(?, ?)", (item, style)).rowcount:
                connection.executemany("INSERT OR REPLACE INTO pairs VALUES(?, ?, 'new')", pair_rows)
                connection.executemany("INSERT OR IGNORE INTO drops VALUES(?, ?, ?, ?, ?)", drop_rows)

        return self._store.submit(operation)

    def pairs(self) -> list[Pair]:
        """Returns the pairs that the machine accepts, in the order of their ids."""
        rows = self._store.read("SELECT content FROM pairs WHERE state IN ('new', 'kept') ORDER BY id")
        return [Pair(**json.loads(content)) for (content,) in rows]

    def pairs_in(self, state: str) -> Iterator[Pair]:
        """Yields the pairs in a state, in the order of their ids.

        "new" has not been compared with the others, "kept" has been and stays, "duplicate" says what another says.
        """
        for _, content in self._store.pages(
            f"SELECT id, content FROM pairs WHERE id > ? AND state='{state}' ORDER BY id", ""
        ):
            yield Pair(**json.loads(content))

    def count_pairs(self) -> dict[str, int]:
        """Returns how many pairs are "new", "kept" and "duplicate"; see `pairs_in`."""
        found = dict(self._store.read("SELECT state, count(*) FROM pairs GROUP BY state"))
        return {state: found.get(state, 0) for state in ("new", "kept", "duplicate")}

    def settled(self) -> bool:
        """Returns whether all pairs have been compared with each other."""
        return not self._store.read("SELECT 1 FROM pairs WHERE state='new' LIMIT 1")

    def settle(self, rewritten: list[Pair], drops: list[Drop]) -> None:
        """Ends a pass over near-duplicates: of the new pairs some have another wording, some go, the others stay."""
        pair_rows = [(_dump(pair), pair.id) for pair in rewritten]
        drop_rows = [dataclasses.astuple(drop) for drop in drops]

        def operation(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE pairs SET state='kept' WHERE state='new'")
            connection.executemany("UPDATE pairs SET content=? WHERE id=?", pair_rows)
            connection.executemany("UPDATE pairs SET state='duplicate' WHERE id=?", [(drop.pair,) for drop in drops])
            connection.executemany("INSERT OR IGNORE INTO drops VALUES(?, ?, ?, ?, ?)", drop_rows)

        self._store.submit(operation).result()

    def drops(self) -> list[Drop]:
        """Returns what was dropped and why, in the order of items, stages and pairs."""
        rows = self._store.read(
            "SELECT item, stage, rule, reason, pair FROM drops ORDER BY item, stage, pair, rule, reason"
        )
        return [Drop(*row) for row in rows]

    # Decisions of people

    def decide(self, decision: Decision) -> None:
        """Stores what a reviewer says about a pair; it is on the disk when this returns.

        Raises:
            InputError: the ledger has no such pair.
        """
        row = dataclasses.astuple(decision)

        def operation(connection: sqlite3.Connection) -> bool:
            if not connection.execute("SELECT 1 FROM pairs WHERE id=?", (decision.pair,)).fetchone():
                return False
            connection.execute(
                "INSERT INTO decisions(pair, reviewer, verdict, reason, question, answer, created) "
                "VALUES(?, ?, ?, ?, ?, ?, ?)",
                (*row, time.time()),
            )
            return True

        if not self._store.submit(operation).result():
            raise InputError(f"{self.path}: has no pair {decision.pair!r}; expected one of its pairs; reload the page.")

    def undo(self, reviewer: str) -> Decision | None:
        """Takes back a reviewer's last decision that stands and returns it; None when there is none."""

        def operation(connection: sqlite3.Connection) -> Decision | None:
            found = connection.execute(
                f"SELECT number, {_DECISION} FROM decisions WHERE reviewer=? AND undone IS NULL "
                "ORDER BY number DESC LIMIT 1",
                (reviewer,),
            ).fetchone()
            if found is None:
                return None
            connection.execute("UPDATE decisions SET undone=? WHERE number=?", (time.time(), found[0]))
            return Decision(*found[1:])

        return self._store.submit(operation).result()

    def decisions(self) -> list[Decision]:
        """Returns the latest decision that stands of each reviewer about each pair, ordered by pair and reviewer."""
        rows = self._store.read(
            f"SELECT {_DECISION} FROM decisions WHERE number IN (SELECT max(number) FROM decisions "
            "WHERE undone IS NULL GROUP BY pair, reviewer) ORDER BY pair, reviewer"
        )
        return [Decision(*row) for row in rows]


_DECISION = "pair, reviewer, verdict, reason, question, answer"


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the tables of a new file, or refuses one that is not ours."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    tables = _TABLES.read_text(encoding="utf-8")
    if version == VERSION and found.issuperset(re.findall(r"CREATE TABLE (\w+)", tables)):
        return
    if version or found:
        raise InputError(
            f"{path}: is another program's SQLite file or a ledger of another version ({version}); expected a ledger of "
            f"version {VERSION}; name another file."
        )
    connection.executescript(f"BEGIN EXCLUSIVE; {tables} PRAGMA user_version={VERSION}; COMMIT;")


def _dump(value: Item | Pair) -> str:
    return json.dumps(dataclasses.asdict(value), ensure_ascii=True)


def _item(content: str) -> Item:
    values = json.loads(content)
    mask = values["mask"]
    values["mask"] = Rle((mask["size"][0], mask["size"][1]), mask["counts"]) if isinstance(mask, dict) else mask
    values["box"] = tuple(values["box"])
    values["entities"] = tuple(Entity(each["category"], tuple(each["box"])) for each in values["entities"])
    return Item(**values)
