"""The pass over near-duplicates: asked again, dropped, compared with what was kept before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up import an_item
from scripted import Author, keeping, recipe, run, usual

from data_gen.core.calls import Request
from data_gen.core.items import Drop, Item, Pair
from data_gen.ledger.ledger import Ledger
from data_gen.pipeline.asking import Asker
from data_gen.pipeline.deduplicate import deduplicate


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "l.sqlite", create=True) as ledger:
        yield ledger


def store(ledger: Ledger, root: Path, items: list[Item], author: Author, **changes: Any) -> None:
    ledger.add_items(items, root, complete=True)
    for item in items:
        outcome = run(item, recipe(root, **changes), ledger, author)
        ledger.finish(item.id, recipe(root, **changes).style, outcome.pairs, outcome.drops).result()


def settled(ledger: Ledger, root: Path, author: Author, **changes: Any) -> list[Pair]:
    asker = Asker(ledger.answers, author, author)
    asyncio.run(deduplicate(ledger, recipe(root, **changes), asker, workers=4))
    return ledger.pairs()


def test_duplicates_are_put_anew(ledger: Ledger, tmp_path: Path) -> None:
    items = [an_item(tmp_path, case, 0, "liver") for case in range(2)]  # two images that ask the very same
    author = Author(keeping)
    store(ledger, tmp_path, items, author)
    before = ledger.pairs()
    assert len({pair.question for pair in before}) == 8 and len(before) == 16
    author.asked.clear()
    pairs = settled(ledger, tmp_path, author)
    assert len(pairs) == 16 == len({pair.question for pair in pairs}) and ledger.is_deduplicated()
    assert [pair for pair in pairs if pair.item == items[0].id] == before[:8], "the first one stays"
    assert author.stages() == ["transform+"] * 8
    assert "repeats the words of" in author.asked[0].body["messages"][-1]["content"]


def test_duplicates_that_stay_so_are_dropped(ledger: Ledger, tmp_path: Path) -> None:
    def stubborn(request: Request) -> dict[str, Any]:
        if request.fields["attempt"] and request.stage == "transform":
            return json.loads(request.body["messages"][2]["content"])
        return keeping(request)

    items = [an_item(tmp_path, case, 0, "liver") for case in range(2)]
    author = Author(stubborn)
    store(ledger, tmp_path, items, author)
    assert len(settled(ledger, tmp_path, author)) == 8
    drops = [drop for drop in ledger.drops() if drop.stage == "duplicates"]
    assert len(drops) == 8 and {drop.item for drop in drops} == {items[1].id}
    assert all(isinstance(drop, Drop) and drop.rule == "duplicate" and drop.pair for drop in drops)


def test_later_pairs_are_compared_with_those_kept(ledger: Ledger, tmp_path: Path) -> None:
    items = [an_item(tmp_path, case, 0, "liver") for case in (1, 0)]
    author = Author(keeping)
    store(ledger, tmp_path, items[:1], author)
    kept = settled(ledger, tmp_path, author)
    store(ledger, tmp_path, items[1:], author)
    ledger_pairs = settled(ledger, tmp_path, author)
    assert [pair for pair in ledger_pairs if pair.item == items[0].id] == kept, "though its id comes later"


def test_the_last_turn_of_a_conversation_is_put_anew(ledger: Ledger, tmp_path: Path) -> None:
    items = [an_item(tmp_path, case, 0, "liver") for case in range(13)]  # twelve kinds, so two are the same
    author = Author(usual)
    store(ledger, tmp_path, items, author, style="multi-turn")
    before = {pair.id: pair for pair in ledger.pairs()}
    pairs = settled(ledger, tmp_path, author, style="multi-turn")
    changed = [pair for pair in pairs if before[pair.id] != pair]
    talks = {pair.conversation: pair.turn for pair in pairs}
    assert changed and all(pair.turn == talks[pair.conversation] for pair in changed)
    assert len(pairs) == len(before)
