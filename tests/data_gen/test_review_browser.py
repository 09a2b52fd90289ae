"""The review page in a real headless Chromium: keys become decisions in the ledger, undo, edit, odd texts, pictures."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from chromium import CONTROL, Page, chromium, find_chromium
from PIL import Image

from data_gen.core.items import Decision
from data_gen.ledger.ledger import Ledger

pytestmark = pytest.mark.browser
LedgerMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def program() -> str:
    found = find_chromium()
    if found is None:
        pytest.skip("no Chromium on this machine, and it cannot be installed here")
    return found


@contextmanager
def review(program: str, ledger: Path, *more: str) -> Iterator[Page]:
    """Starts the command, opens the address that it prints and waits for the first image."""
    command = [sys.executable, "-m", "data_gen", "review", "--ledger", str(ledger), "--reviewer", "anna", "--port", "0"]
    with subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(line.strip() for line in process.stdout if line.strip().startswith("http://"))
            with chromium(program, ledger.with_name(f"{ledger.name}.profile")) as page:
                page.open(url)
                page.wait("document.body.dataset.item && document.getElementById('image').naturalWidth")
                yield page
                assert page.errors == []
        finally:
            process.terminate()


def decisions(ledger: Path) -> list[Decision]:
    with Ledger(ledger) as opened:
        return opened.decisions()


def current(page: Page) -> str:
    return page.value("document.querySelector('article.current').dataset.pair")


def test_keys_become_decisions(program: str, make_ledger: LedgerMaker, tmp_path: Path) -> None:
    ledger = make_ledger(cases=1)
    with review(program, ledger) as page:
        first = current(page)
        page.press("a")
        page.wait(f"document.querySelector('article.current').dataset.pair !== {json.dumps(first)}")
        assert decisions(ledger) == [Decision(first, "anna", "accept")]
        second = current(page)
        page.press("r")
        page.wait("document.activeElement.tagName === 'INPUT'")
        page.press("3")
        page.wait(f"document.querySelector('article.current').dataset.pair !== {json.dumps(second)}")
        assert Decision(second, "anna", "reject", "medically wrong") in decisions(ledger)
        third = current(page)
        page.press("r")
        page.write("the wrong side")
        page.press("Enter")
        page.wait(f"document.querySelector('article.current').dataset.pair !== {json.dumps(third)}")
        assert Decision(third, "anna", "reject", "the wrong side") in decisions(ledger)
        assert page.value("document.getElementById('count').textContent") == "3 of 8 pairs"
        page.screenshot(tmp_path / "review.png")
    with Image.open(tmp_path / "review.png") as picture:
        assert picture.size == (1360, 860)
        assert np.asarray(picture.convert("L")).std() > 10


def test_undo_goes_back_to_the_pair(program: str, make_ledger: LedgerMaker) -> None:
    ledger = make_ledger(cases=1)
    with review(program, ledger) as page:
        first = current(page)
        for done in range(1, 5):
            page.press("a")
            page.wait(f"document.getElementById('bar').value === {done}")
        page.wait("document.body.dataset.item === '1'")  # all of the first image are judged: on to the second
        for left in (3, 2, 1, 0):
            page.press("u")
            page.wait(f"document.getElementById('bar').value === {left} && document.body.dataset.item === '0'")
        assert current(page) == first
        assert decisions(ledger) == []
        page.press("u")
        page.wait("document.getElementById('said').textContent === 'there is nothing to undo'")


def test_edits_are_checked_and_stored(program: str, make_ledger: LedgerMaker) -> None:
    ledger = make_ledger(cases=1)
    with review(program, ledger) as page:
        first = current(page)
        category = page.value("document.getElementById('category').textContent")
        page.press("e")
        page.wait("document.activeElement.id === 'question'")
        page.value("document.activeElement.select()")
        page.write(f"Where in this image is the {category}?")
        page.press("Enter", CONTROL)
        page.wait("document.querySelector('#wrong li')")
        assert "names_target" in page.value("document.getElementById('wrong').textContent")
        assert decisions(ledger) == []
        page.value("document.activeElement.select()")
        page.write("Which organ of the belly does this scan show as marked here?")
        page.press("Enter", CONTROL)
        page.wait("document.getElementById('bar').value === 1")
        (decision,) = decisions(ledger)
        assert (decision.pair, decision.verdict) == (first, "edit")
        assert decision.question == "Which organ of the belly does this scan show as marked here?"
        # What was edited is shown with the old words, and Escape leaves a form without a trace.
        assert page.value("document.querySelector('article.edit .old').textContent") != decision.question
        page.press("e")
        page.press("Escape")
        page.wait("!document.querySelector('textarea')")
        assert len(decisions(ledger)) == 1


def test_moving_hiding_and_a_key_held_down(program: str, make_ledger: LedgerMaker) -> None:
    ledger = make_ledger(cases=2)
    with review(program, ledger) as page:
        first = current(page)
        page.press("ArrowDown")
        assert current(page) != first
        page.press("ArrowUp")
        assert current(page) == first
        page.press("ArrowRight")
        page.wait("document.body.dataset.item === '1'")
        page.press("ArrowLeft")
        page.wait("document.body.dataset.item === '0'")
        for key, name in (("m", "mask"), ("b", "box")):
            page.press(key)
            assert page.value(f"getComputedStyle(document.getElementById('{name}')).display") == "none"
            page.press(key)
            assert page.value(f"getComputedStyle(document.getElementById('{name}')).display") != "none"
        page.press("?")
        assert page.value("document.getElementById('help').open")
        page.press("Escape")
        page.wait("!document.getElementById('help').open")
        for _ in range(5):
            page.hold("a")
        assert decisions(ledger) == []


def test_the_box_lies_on_the_mask(program: str, make_ledger: LedgerMaker) -> None:
    with review(program, make_ledger(cases=1)) as page:
        off = page.value(
            """(() => {
              const image = document.getElementById('image').getBoundingClientRect();
              const box = document.getElementById('box').getBoundingClientRect();
              const item = document.getElementById('category').textContent;
              const truth = item === 'liver' ? [4, 3, 20, 15] : [30, 18, 44, 30];
              const seen = [box.left - image.left, box.top - image.top, box.right - image.left, box.bottom - image.top];
              return Math.max(...seen.map((v, i) => Math.abs(v / image.width * 48 - truth[i])));
            })()"""
        )
        assert off < 0.1


def test_texts_are_never_run(program: str, make_ledger: LedgerMaker) -> None:
    ledger = make_ledger(cases=1)
    evil = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script>"
    with sqlite3.connect(ledger) as raw:
        rows = raw.execute("SELECT id, content FROM pairs").fetchall()
        raw.executemany(
            "UPDATE pairs SET content=? WHERE id=?",
            [(json.dumps({**json.loads(c), "question": evil, "author": evil}), i) for i, c in rows],
        )
        rows = raw.execute("SELECT id, content FROM items").fetchall()
        raw.executemany(
            "UPDATE items SET content=? WHERE id=?",
            [(json.dumps({**json.loads(c), "category": evil, "case": evil}), i) for i, c in rows],
        )
    raw.close()
    with review(program, ledger) as page:
        assert page.value("document.querySelector('article.current .question').textContent") == evil
        page.press("e")
        page.press("Escape")
        assert page.value("window.hacked === undefined && !document.querySelector('main img[src=x]')")


def test_without_the_token_nothing_is_shown(program: str, make_ledger: LedgerMaker) -> None:
    with review(program, make_ledger(cases=1)) as page:
        page.open(page.value("location.href.split('#')[0] + '?again#wrong'"))
        page.wait("document.getElementById('said').textContent.includes('token')")
        assert page.value("document.querySelectorAll('article').length") == 0


def test_the_end_and_the_agreement(program: str, make_ledger: LedgerMaker) -> None:
    ledger = make_ledger(cases=1, images=1)
    with Ledger(ledger) as opened:
        for number, pair in enumerate(opened.pairs()):
            verdict = "reject" if number == 0 else "accept"
            opened.decide(Decision(pair.id, "ben", verdict, "wrong" if number == 0 else ""))
    with review(program, ledger) as page:
        for done in range(1, 5):
            page.press("a")
            page.wait(f"document.getElementById('bar').value === {done}")
        page.wait("document.getElementById('said').textContent.startsWith('All pairs are judged')")
        page.wait("document.getElementById('agreement').textContent")
        told = page.value("document.getElementById('agreement').textContent")
        assert told == "with ben: 75% the same on 4 pairs, kappa 0.00"
