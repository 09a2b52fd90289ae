"""Fixtures: a small ledger as a finished run leaves it, a fake server, a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_server import FakeServer, Settings
from made_up import LedgerMaker, an_item, conversation_of, pairs_of, write_manifest

from data_gen.core.calls import Request
from data_gen.core.items import Drop
from data_gen.ledger.ledger import Ledger


@pytest.fixture
def make_ledger(tmp_path: Path) -> LedgerMaker:
    """Returns a function that makes a ledger: cases x images items, alternating between liver and spleen."""

    def make(
        *,
        cases: int = 5,
        images: int = 2,
        style: str = "single",
        author: str = "some-model",
        name: str = "ledger.sqlite",
        settled: bool = True,
    ) -> Path:
        folder = tmp_path / "pictures"
        items = [
            an_item(folder, case, number, ("liver", "spleen")[number % 2])
            for case in range(cases)
            for number in range(images)
        ]
        path = tmp_path / name
        with Ledger(path, create=True) as ledger:
            run = ledger.start_run({"style": style}, {})
            ledger.add_items(items, folder, complete=True)
            body = {"model": author, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
            ledger.answers.store_requests([Request("describe", items[0].id, body)]).result()
            for item in items:
                made = pairs_of(item, author) if style == "single" else conversation_of(item)
                ledger.finish(item.id, style, made, []).result()
            drop = Drop(items[0].id, "transform", "words", "it has 30 words", f"{items[0].id}#second-location-long")
            ledger.finish(items[0].id, "other", [], [drop]).result()
            if settled:
                ledger.mark_deduplicated([], [])
            ledger.end_run(run, "done")
        return path

    return make


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """Returns a function that starts a fake OpenAI-compatible server with the given settings."""
    running: list[FakeServer] = []

    def start(**settings: object) -> FakeServer:
        server = FakeServer(Settings(**settings))  # pyright: ignore[reportArgumentType]
        server.start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def records(tmp_path: Path) -> Callable[[int], Path]:
    """Returns a function that writes a manifest of a number of records; see `write_manifest`."""
    return lambda count: write_manifest(tmp_path / "records", count)
