"""The requests and answers of a ledger: what was asked, what came back, what it cost."""

from __future__ import annotations

import json
import sqlite3
import time
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from typing import Any

from data_gen.core.calls import Answer, Fault, Reply, Request, canonical
from data_gen.core.schemas import Stage
from data_gen.ledger.store import Store

_REPLY = ("status", "text", "usage_in", "usage_cached", "usage_out", "price", "sends", "why")
_STORE = (
    f"INSERT INTO answers VALUES({', '.join('?' * 12)}) "
    "ON CONFLICT(key, attempt) DO UPDATE SET verdict=excluded.verdict"
)


@dataclass(frozen=True, slots=True)
class Count:
    """The requests of one stage to one model."""

    stage: str
    model: str
    requests: int
    answers: int  # of all attempts
    good: int
    usage_in: int  # tokens
    usage_out: int
    price: float  # in US dollars


class Answers:
    """Requests by key, and the answers of each attempt."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def store_requests(self, requests: list[Request]) -> Future[None]:
        """Stores new requests, in one transaction."""
        rows: list[tuple[str, tuple[Any, ...], str]] = []
        for each in requests:
            # A form is what many requests share: model, system message, schema, parameters.
            first, *rest = each.body["messages"]
            form = canonical({**each.body, "messages": [first]})
            rows.append((form, (each.key, each.stage, each.item, each.body["model"]), canonical(rest)))

        def operation(connection: sqlite3.Connection) -> None:
            for form, identity, prompt in rows:
                connection.execute("INSERT OR IGNORE INTO forms(content) VALUES(?)", (form,))
                connection.execute(
                    "INSERT OR IGNORE INTO requests VALUES(?, ?, ?, ?, (SELECT id FROM forms WHERE content=?), ?, ?)",
                    (*identity, form, prompt, time.time()),
                )

        return self._store.submit(operation)

    def body(self, key: str) -> dict[str, Any]:
        """Returns the body of a stored request, as it is sent."""
        ((form, prompt),) = self._store.read(
            "SELECT forms.content, prompt FROM requests JOIN forms ON forms.id = form WHERE key=?", key
        )
        try:
            shared = json.loads(form)
            return {**shared, "messages": [*shared["messages"], *json.loads(prompt)]}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._store.damaged(f"request {key}: {error!r}") from error

    def find(self, key: str) -> Answer | None:
        """Returns the first good answer to a request, on which all later ones build; else the last attempt's."""
        rows = self._store.read(
            f"SELECT attempt, verdict, {', '.join(_REPLY)} FROM answers WHERE key=? "
            "ORDER BY status='ok' DESC, CASE status WHEN 'ok' THEN attempt ELSE -attempt END LIMIT 1",
            key,
        )
        if not rows:
            return None
        attempt, verdict, *reply = rows[0]
        listed = [] if verdict is None else self._store.json(list[tuple[str, str, str]], verdict)
        faults = None if verdict is None else tuple(Fault(*each) for each in listed)
        return Answer(self._store.typed(Reply, dict(zip(_REPLY, reply, strict=True))), attempt, faults)

    def attempts(self, key: str) -> int:
        """Returns how often a request was answered."""
        return self._store.read("SELECT coalesce(max(attempt), 0) FROM answers WHERE key=?", key)[0][0]

    def store(self, key: str, answer: Answer) -> Future[None]:
        """Stores an answer, or adds its verdict to the stored one; the future is done when it is on the disk."""
        return self._store.execute(_STORE, *_row(key, answer))

    def stage(self, key: str) -> Stage | None:
        """Returns the stage of a request; None when there is no such request."""
        rows = self._store.read("SELECT stage FROM requests WHERE key=?", key)
        return self._store.typed(Stage, rows[0][0]) if rows else None

    def start_batch(self, token: str, requests: int) -> None:
        """Stores a batch before it is submitted, so that one whose id was never stored can be found again."""
        self._store.execute("INSERT INTO batches VALUES(?, NULL, 'begun', ?, ?)", token, requests, time.time()).result()

    def mark_batch(self, token: str, identity: str | None, status: str) -> None:
        """Stores a batch's id and status."""
        self._store.execute("UPDATE batches SET id=?, status=? WHERE token=?", identity, status, token).result()

    def open_batches(self) -> list[tuple[str, str | None]]:
        """Returns token and id of the batches whose answers have not been collected, oldest first."""
        return self._store.read("SELECT token, id FROM batches WHERE status IN ('begun', 'submitted') ORDER BY created")

    def collect_batch(self, token: str, answers: list[tuple[str, Answer]]) -> None:
        """Stores the answers of a batch and closes it, in one transaction."""
        rows = [_row(key, answer) for key, answer in answers]

        def operation(connection: sqlite3.Connection) -> None:
            connection.executemany(_STORE, rows)
            connection.execute("UPDATE batches SET status='collected' WHERE token=?", (token,))

        self._store.submit(operation).result()

    def spent(self) -> float:
        """Returns the price of all answers and all charges so far, in US dollars."""
        charged = "SELECT total(value) FROM facts WHERE name='charged'"
        return self._store.read(f"SELECT (SELECT total(price) FROM answers) + ({charged})")[0][0]

    def charge(self, price: float) -> Future[None]:
        """Adds what a call may have cost whose answer never came, in US dollars."""
        add = "INSERT INTO facts VALUES('charged', ?) ON CONFLICT(name) DO UPDATE SET value = value + excluded.value"
        return self._store.execute(add, price)

    def counts(self) -> list[Count]:
        """Returns the requests of each stage to each model, ordered by stage and model."""
        return self._store.rows(
            Count,
            "SELECT stage, model, count(DISTINCT requests.key), count(attempt), "
            "count(CASE status WHEN 'ok' THEN 1 END), coalesce(sum(usage_in), 0), coalesce(sum(usage_out), 0), total(price) "
            "FROM requests LEFT JOIN answers USING(key) GROUP BY 1, 2 ORDER BY 1, 2",
        )

    def faults(self) -> dict[str, int]:
        """Returns how often each rule was broken in an answer, including faults that were corrected later."""
        query = (
            "SELECT json_extract(each.value, '$[1]'), count(*) FROM answers, json_each(answers.verdict) AS each "
            "WHERE verdict IS NOT NULL GROUP BY 1 ORDER BY 1"
        )
        return self._store.typed(dict[str, int], dict(self._store.read(query)))


def _row(key: str, answer: Answer) -> tuple[Any, ...]:
    reply = answer.reply
    verdict = None if answer.verdict is None else canonical([astuple(each) for each in answer.verdict])
    usage = reply.usage_in, reply.usage_cached, reply.usage_out, reply.price, reply.sends
    return key, answer.attempt, reply.status, reply.text, reply.why, *usage, verdict, time.time()
