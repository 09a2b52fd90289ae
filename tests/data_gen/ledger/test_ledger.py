"""The ledger: what is stored is read back, in every thread and after a kill; what does not fit is refused by name."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_gen.core.calls import Answer, Fault, Reply, Request
from data_gen.core.items import Decision, Drop, Entity, Item, Pair
from data_gen.ledger.ledger import Ledger
from medisee.foundation.errors import InputError
from medisee.records.masks import Rle


def an_item(number: int) -> Item:
    return Item(
        id=f"r{number}/a",
        record=f"r{number}",
        target="a",
        image="i.png",
        mask=Rle((2, 2), "112") if number % 2 else "m.png",
        modality="ct",
        source="s",
        case=f"c{number}",
        category="liver",
        box=(0.0, 0.1, 0.5, 0.6),
        entities=(Entity("liver", (0.0, 0.1, 0.5, 0.6)), Entity("spleen", (0.5, 0.5, 1.0, 1.0))),
        width=4,
        height=5,
    )


def a_pair(item: int, name: str = "first-attribute-short") -> Pair:
    return Pair(
        id=f"r{item}/a#{name}",
        item=f"r{item}/a",
        template="first",
        perspective="attribute",
        length="short",
        question=f"Which {item} é?",
        answer="It.",
        author="m",
    )


def a_request(text: str) -> Request:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": text}]
    return Request("describe", "r0/a", {"model": "m", "messages": messages, "temperature": 1})


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "deep" / "l.sqlite", create=True) as ledger:
        yield ledger


def test_items_come_back_in_the_order_of_their_ids_and_open_ones_in_the_manifests(
    ledger: Ledger, tmp_path: Path
) -> None:
    items = [an_item(number) for number in (3, 1, 2)]
    ledger.add_items(items, tmp_path / "pictures", complete=False)
    ledger.add_items([*items, an_item(0)], tmp_path / "pictures", complete=True)
    assert ledger.items() == [an_item(number) for number in range(4)]
    assert [item.id for item in ledger.open_items("single")] == ["r3/a", "r1/a", "r2/a", "r0/a"]
    assert [item.id for item in ledger.open_items("single", 2)] == ["r3/a", "r1/a"]
    assert ledger.item("r1/a") == an_item(1)
    assert ledger.root() == (tmp_path / "pictures").resolve()
    ledger.finish("r1/a", "single", [a_pair(1)], []).result()
    assert [item.id for item in ledger.open_items("single")] == ["r3/a", "r2/a", "r0/a"]
    assert len(list(ledger.open_items("multi-turn"))) == 4
    assert ledger.count_open("single") == (3, 4) and ledger.count_open("single", 2) == (1, 2)
    assert ledger.has_items(None)


def test_the_root_moves_with_the_ledger(tmp_path: Path) -> None:
    with Ledger(tmp_path / "old" / "l.sqlite", create=True) as ledger:
        ledger.add_items([an_item(0)], tmp_path / "old" / "pictures", complete=True)
    (tmp_path / "old").rename(tmp_path / "new")
    with Ledger(tmp_path / "new" / "l.sqlite") as ledger:
        assert ledger.root() == (tmp_path / "new" / "pictures").resolve()


def test_more_items_than_a_page_are_all_drawn(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_items((an_item(number) for number in range(1203)), tmp_path, complete=True)
    assert [item.record for item in ledger.open_items("single")] == [f"r{number}" for number in range(1203)]


def test_answers_and_their_verdicts_come_back(ledger: Ledger) -> None:
    request, answers = a_request("é \ud800"), ledger.answers
    assert answers.find(request.key) is None
    answers.store_requests([request, request]).result()
    assert answers.body(request.key) == request.body
    bad = Answer(
        Reply(status="malformed", text="{", why="cut", usage_in=5, price=0.5), 1, (Fault("", "malformed", "cut"),)
    )
    good = Answer(Reply(status="ok", text="{}", usage_in=10, usage_out=3, price=0.25, sends=2), 2, None)
    answers.store(request.key, bad).result()
    assert answers.find(request.key) == bad
    answers.store(request.key, good).result()
    assert answers.find(request.key) == good
    judged = Answer(good.reply, 2, (Fault("attribute-short", "words", "too long"),))
    answers.store(request.key, judged).result()
    assert answers.find(request.key) == judged
    assert answers.spent() == 0.75
    (count,) = ledger.answers.counts()
    assert (count.requests, count.answers, count.good, count.usage_in, count.usage_out) == (1, 2, 1, 15, 3)
    assert ledger.answers.faults() == {"malformed": 1, "words": 1}


def test_a_good_answer_precedes_later_ones(ledger: Ledger) -> None:
    request, answers = a_request("x"), ledger.answers
    answers.store_requests([request]).result()
    replies = [("refused", "no"), ("ok", "{}"), ("refused", "no"), ("ok", "[]")]
    for attempt, (status, text) in enumerate(replies, 1):
        answers.store(request.key, Answer(Reply(status=status, text=text), attempt, None)).result()  # pyright: ignore
        assert answers.attempts(request.key) == attempt
        found = answers.find(request.key)
        assert found and (found.attempt, found.reply.text) == ((1, "no") if attempt == 1 else (2, "{}"))
    assert answers.attempts("0" * 64) == 0


def test_an_unknown_request_has_no_answer(ledger: Ledger) -> None:
    """No answer and no stage are stored for an unknown request."""
    assert ledger.answers.find("0" * 64) is None and ledger.answers.stage("0" * 64) is None


def test_pairs_are_kept_renamed_or_dropped(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_items([an_item(0), an_item(1)], tmp_path, complete=True)
    assert ledger.is_deduplicated()
    ledger.finish("r1/a", "single", [a_pair(1)], [Drop("r1/a", "revise", "removed", "poor", "x")]).result()
    ledger.finish("r0/a", "single", [a_pair(0), a_pair(0, "second-location-long")], []).result()
    assert not ledger.is_deduplicated()
    assert [pair.id for pair in ledger.pairs()] == sorted(pair.id for pair in ledger.pairs())
    new = Pair(**{**{f: getattr(a_pair(0), f) for f in Pair.__dataclass_fields__}, "question": "Other?"})
    ledger.mark_deduplicated([new], [Drop("r1/a", "duplicates", "duplicate", "same", a_pair(1).id)])
    assert ledger.is_deduplicated()
    assert ledger.pairs() == [new, a_pair(0, "second-location-long")]
    assert [pair.id for pair in ledger.pairs_in("duplicate")] == [a_pair(1).id]
    assert ledger.count_pairs() == {"new": 0, "kept": 2, "duplicate": 1}
    assert [drop.stage for drop in ledger.drops()] == ["duplicates", "revise"]


def test_decisions_are_valid_until_they_are_undone(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_items([an_item(0)], tmp_path, complete=True)
    ledger.finish("r0/a", "single", [a_pair(0)], []).result()
    first = Decision(a_pair(0).id, "anna", "accept")
    second = Decision(a_pair(0).id, "anna", "edit", "clearer", "Which?", "That.")
    other = Decision(a_pair(0).id, "ben", "reject", "wrong")
    for decision in (first, second, other):
        ledger.decide(decision)
    assert ledger.decisions() == [second, other]
    assert ledger.undo("anna") == second
    assert ledger.decisions() == [first, other]
    assert ledger.undo("anna") == first and ledger.undo("anna") is None
    assert ledger.decisions() == [other]
    with pytest.raises(InputError, match="no pair"):
        ledger.decide(Decision("nobody", "anna", "accept"))


def test_other_settings_are_named(ledger: Ledger) -> None:
    assert ledger.settings() == {}
    first = ledger.start_run({"model": "a", "seed": 1}, {"limit": 3})
    assert ledger.start_run({"model": "a", "seed": 1}, {"limit": 4}) == first + 1
    assert ledger.settings() == {"model": "a", "seed": 1}
    with pytest.raises(InputError) as caught:
        ledger.start_run({"model": "b", "seed": 2}, {})
    assert len(caught.value.problems) == 2
    assert 'model = "a"' in caught.value.problems[0] and "seed = 1" in caught.value.problems[1]


def test_many_threads_write_at_once(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_items((an_item(number) for number in range(160)), tmp_path, complete=True)

    def work(start: int) -> None:
        for number in range(start, start + 20):
            ledger.finish(f"r{number}/a", "single", [a_pair(number)], []).result()
            ledger.decide(Decision(a_pair(number).id, f"t{start}", "accept"))

    threads = [threading.Thread(target=work, args=(20 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.pairs()) == len(ledger.decisions()) == 160
    assert ledger.count_open("single") == (0, 160)


def test_two_processes_share_a_ledger(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_items([an_item(0)], tmp_path, complete=True)
    ledger.finish("r0/a", "single", [a_pair(0)], []).result()
    with Ledger(ledger.path) as other:
        other.decide(Decision(a_pair(0).id, "anna", "accept"))
        assert len(ledger.decisions()) == 1


_WRITER = """
import os, sys
from pathlib import Path
from data_gen.core.items import Drop
from data_gen.ledger.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(50):
    ledger.finish(f"r{number}/a", "single", [], [Drop(f"r{number}/a", "s", "r", "x")]).result()
    print(number, flush=True)
    if number == 20:
        ledger.finish("r49/a", "single", [], [])
        os.kill(os.getpid(), 9)
"""


def test_what_was_acknowledged_survives_a_kill(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_items((an_item(number) for number in range(50)), tmp_path, complete=True)
    done = subprocess.run([sys.executable, "-c", _WRITER, str(ledger.path)], capture_output=True, text=True)
    assert done.returncode == -9
    acknowledged = done.stdout.split()
    assert acknowledged == [str(number) for number in range(21)]
    left = {item.record for item in ledger.open_items("single")}
    assert not left & {f"r{number}" for number in acknowledged}
    assert len(ledger.drops()) in (21, 22)


def test_a_failed_write_reaches_its_waiter_and_the_store_goes_on(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        ledger.answers.store("none", Answer(Reply(status="ok", text=None), 1, None)).result()  # pyright: ignore
    ledger.add_items([an_item(0)], tmp_path, complete=True)
    assert len(ledger.items()) == 1


def test_a_waiter_that_gives_up_does_not_end_the_writer(ledger: Ledger) -> None:
    begun, free = threading.Event(), threading.Event()

    def slow(_: sqlite3.Connection) -> None:
        begun.set()
        free.wait(10)

    async def work() -> None:
        blocking = ledger._store.submit(slow)
        begun.wait(10)
        queued = ledger.answers.store_requests([a_request("queued")])
        waiter = asyncio.ensure_future(asyncio.wrap_future(queued))
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        free.set()
        blocking.result(10)

    asyncio.run(work())
    number = ledger.start_run({"model": "m"}, {})
    ledger.end_run(number, "interrupted")
    assert ledger.answers.stage(a_request("queued").key) == "describe", "queued operations are written"


def test_files_that_are_not_ledgers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such ledger"):
        Ledger(tmp_path / "gone.sqlite")
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but long enough to be taken for one" * 50)
    with pytest.raises(InputError, match="not a ledger"):
        Ledger(text)
    for version in (0, 1, 7):  # other programs count their versions, too
        path = tmp_path / f"other{version}.sqlite"
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE x(y)")
            other.execute(f"PRAGMA user_version={version}")
        other.close()
        before = path.read_bytes()
        with pytest.raises(InputError, match="expected a ledger of version"):
            Ledger(path, create=True)
        assert path.read_bytes() == before, "the file of another program is not changed"
    with pytest.raises(InputError, match="holds no items"), Ledger(tmp_path / "new.sqlite", create=True) as ledger:
        ledger.root()
