"""An SQLite file for many threads: one thread writes, and operations that wait for the disk share a commit.

A commit with synchronous=FULL takes milliseconds. Operations that arrive during one are committed together next.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import fields
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from data_gen.core.schemas import reasons
from medisee.foundation.errors import InputError, first_line
from medisee.foundation.json_files import parse_json

Operation: TypeAlias = Callable[[sqlite3.Connection], Any]
_Job: TypeAlias = tuple[Operation, "Future[Any]"]
DAMAGED = "restore a copy, or save what is left with `sqlite3 OLD .recover | sqlite3 NEW`"
BUSY_SECONDS = 60.0  # another process, such as a review page beside a run, may hold the lock for a moment


@cache
def _adapter(noun: Any) -> TypeAdapter[Any]:
    return TypeAdapter(noun)


class Store:
    """Reads at once; writes in order: the future of an operation is done when its transaction is on the disk."""

    def __init__(self, path: Path, prepare: Operation) -> None:
        """Opens a file, which is created when missing; `prepare` makes or checks its tables. May raise sqlite3.Error."""
        self.path = path
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        try:
            prepare(self._connection)  # first: the file of another program must stay as it is
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            uri = f"{path.resolve().as_uri()}?mode=ro"
            self._reader = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
        except BaseException:
            self._connection.close()
            raise
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._thread.start()

    def read(self, query: str, *values: Any) -> list[Any]:
        """Returns the rows of a query."""
        try:
            with self._lock:
                return self._reader.execute(query, values).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self.damaged(error) from error

    def damaged(self, reason: object) -> InputError:
        """Returns the error of a file that holds what no run writes."""
        return InputError(f"{self.path}: the ledger cannot be read ({reason}); {DAMAGED}.")

    def rows(self, noun: Any, query: str, *values: Any) -> list[Any]:
        """Returns the rows of a query as `noun`, whose fields are the columns."""
        names = [field.name for field in fields(noun)]
        return [self.typed(noun, dict(zip(names, row, strict=False))) for row in self.read(query, *values)]

    def json(self, noun: Any, text: Any) -> Any:
        """Reads a JSON text of the file as `noun`."""
        try:
            return self.typed(noun, parse_json(text))
        except (TypeError, ValueError) as error:
            raise self.damaged(first_line(error)) from error

    def typed(self, noun: Any, value: Any) -> Any:
        """Returns a value of the file as `noun`."""
        try:
            return _adapter(noun).validate_python(value)
        except ValidationError as error:
            raise self.damaged(reasons(error)[0]) from error

    def pages(self, query: str, start: str | int, *values: Any) -> Iterator[Any]:
        """Yields the rows of a query page by page, so that memory stays flat.

        Its first column must ascend from its first `?`, which is `start` and then the last value seen.
        """
        while rows := self.read(f"{query} LIMIT 500", start, *values):
            yield from rows
            start = rows[-1][0]

    def submit(self, operation: Operation) -> Future[Any]:
        """Queues an operation; its result or its InputError is the future's."""
        future: Future[Any] = Future()
        # It runs in any case, so a waiter that gives up must not cancel it: its result could not be set then.
        future.set_running_or_notify_cancel()
        self._jobs.put((operation, future))
        return future

    def execute(self, statement: str, *values: Any) -> Future[Any]:
        """Queues one statement."""
        return self.submit(lambda connection: connection.execute(statement, values))

    def close(self) -> None:
        """Writes what is queued, then closes the file."""
        self._jobs.put(None)
        self._thread.join()
        # The writer last: only it can fold the WAL back, so that the ledger is one file again.
        self._reader.close()
        self._connection.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            group = [job]
            while not self._jobs.empty() and (job := self._jobs.get()) is not None:
                group.append(job)
            if job is None:
                self._jobs.put(None)
            self._commit(group)

    def _commit(self, group: list[_Job]) -> None:
        try:
            with self._connection:  # commits, or rolls back after an error
                self._connection.execute("BEGIN IMMEDIATE")
                results = [operation(self._connection) for operation, _ in group]
        except Exception as error:  # goes to those who wait, not to this thread
            problem = error
            if isinstance(error, sqlite3.Error):
                problem = InputError(
                    f"{self.path}: cannot be written ({error}); expected a ledger on a disk with space. Nothing that "
                    "was stored before is lost: make room or correct the path, then run again."
                )
            for _, future in group:
                future.set_exception(problem)
        else:
            for (_, future), result in zip(group, results, strict=True):
                future.set_result(result)
