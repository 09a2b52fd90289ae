"""An SQLite file for many threads: one thread writes, and whoever waits for the disk waits together with all others.

A commit with synchronous=FULL takes milliseconds. Operations that arrive while one is under way share the next.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from medisee.foundation.errors import InputError

Operation: TypeAlias = Callable[[sqlite3.Connection], Any]
_Job: TypeAlias = tuple[Operation, "Future[Any]"]

BUSY_SECONDS = 60.0  # another process, as a review page beside a run, may hold the lock for a moment


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Opens a file for use from any thread; the caller keeps two threads from using it at once."""
    if read_only:
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS, check_same_thread=False
        )
    else:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
    return connection


class Store:
    """Reads at once; runs writing operations in order, the future of each is done when its transaction is on the disk."""

    def __init__(self, path: Path, prepare: Operation) -> None:
        """Opens a file, which is made when it is missing.

        Args:
            path: the file.
            prepare: is given the writing connection first, to make or check the tables.

        Raises:
            sqlite3.Error: it is no SQLite file or cannot be opened.
        """
        self.path = path
        self._lock = threading.Lock()
        self._connection = _connect(path)
        try:
            prepare(self._connection)  # first of all: a file of somebody else stays as it is
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._reader = _connect(path, read_only=True)
        except BaseException:
            self._connection.close()
            raise
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._thread.start()

    def read(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        """Returns the rows of a query."""
        with self._lock:
            return self._reader.execute(query, tuple(values)).fetchall()

    def pages(self, query: str, start: str | int, values: Iterable[Any] = ()) -> Iterator[Any]:
        """Yields the rows of a query a page at a time, so that memory stays flat.

        Its first column rises from its first `?`, which is given `start` and then the last value seen.
        """
        values = tuple(values)
        while rows := self.read(f"{query} LIMIT 500", (start, *values)):
            yield from rows
            start = rows[-1][0]

    def submit(self, operation: Operation) -> Future[Any]:
        """Hands in an operation; its result or its InputError is the future's."""
        future: Future[Any] = Future()
        # It is done in any case, so whoever gives up waiting must not cancel it: its result could not be set then.
        future.set_running_or_notify_cancel()
        self._jobs.put((operation, future))
        return future

    def close(self) -> None:
        """Writes what has been handed in, then closes the file."""
        self._jobs.put(None)
        self._thread.join()
        # The writer last: only it can fold the WAL back, so that the ledger is one file again.
        self._reader.close()
        self._connection.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            group = [job]
            while not self._jobs.empty():
                more = self._jobs.get()
                if more is None:
                    self._jobs.put(None)
                    break
                group.append(more)
            self._commit(group)

    def _commit(self, group: list[_Job]) -> None:
        results: list[Any] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                results = [operation(self._connection) for operation, _ in group]
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            problem = InputError(
                f"{self.path}: cannot be written ({error}); expected a ledger on a disk with space; "
                "nothing that was stored before is lost: make room or correct the path and run again."
            )
            for _, future in group:
                future.set_exception(problem)
        except Exception as error:  # whatever an operation raised goes to those who wait, not to this thread
            for _, future in group:
                future.set_exception(error)
        else:
            for (_, future), result in zip(group, results, strict=True):
                future.set_result(result)
