"""Rate limits on a simulated clock, the budget of errors, the budget of money."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.ledger.ledger import Ledger
from data_gen.ledger.limits import ErrorBudget, MoneyBudget, RateLimit, StopRun


class Clock:
    """Time that passes only during a sleep."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        await asyncio.sleep(0)


def limit(clock: Clock, requests: float | None = None, tokens: float | None = None) -> RateLimit:
    return RateLimit(requests, tokens, clock=clock, sleep=clock.sleep)


def test_without_limits_nothing_waits() -> None:
    clock = Clock()
    rate = limit(clock)

    async def work() -> None:
        for _ in range(1000):
            await rate.take(1e6)

    asyncio.run(work())
    assert clock.now == 100.0


@given(
    rpm=st.floats(10, 6000),
    tpm=st.floats(1000, 1e6),
    sizes=st.lists(st.floats(1, 5000), min_size=5, max_size=60),
)
def test_no_minute_holds_more_than_the_limits(rpm: float, tpm: float, sizes: list[float]) -> None:
    clock = Clock()
    rate = limit(clock, rpm, tpm)
    sent: list[tuple[float, float]] = []

    async def one(size: float) -> None:
        await rate.take(size)
        sent.append((clock.now, size))

    async def work() -> None:
        await asyncio.gather(*(one(size) for size in sizes))

    asyncio.run(work())
    assert [size for _, size in sent] == sizes, "first come, first served"
    for start, _ in sent:
        window = [size for at, size in sent if start <= at < start + 60]
        assert len(window) <= rpm + max(1.0, rpm / 60) + 1e-6
        assert sum(window) <= tpm + max(1.0, tpm / 60) + max(sizes) + 1e-6
    # While it waits for one bucket the other may run over, so the two times add up at worst.
    slowest = len(sizes) * 60 / rpm + sum(sizes) * 60 / tpm + 0.002 * len(sizes)
    assert clock.now - 100 <= slowest, "and no slower than they allow"


def test_what_was_not_needed_is_given_back() -> None:
    clock = Clock()
    rate = limit(clock, tokens=60)

    async def work() -> None:
        for _ in range(10):
            await rate.take(100)
            rate.give_back(99)

    asyncio.run(work())
    assert clock.now - 100 == pytest.approx(9, abs=0.01), "one token each at one a second"


def test_a_pause_delays_all_calls() -> None:
    clock = Clock()
    rate = limit(clock)
    at: list[float] = []

    async def one() -> None:
        await rate.take(1)
        at.append(clock.now)

    async def work() -> None:
        rate.pause(7)
        rate.pause(3)
        await asyncio.gather(*(one() for _ in range(5)))

    asyncio.run(work())
    assert min(at) >= 107 and max(at) == pytest.approx(107)


def test_failures_in_a_row_end_a_run() -> None:
    budget = ErrorBudget(in_a_row=3)
    for _ in range(5):
        budget.bad("status 500")
        budget.bad("status 502")
        budget.good()
    budget.bad("status 500")
    budget.bad("status 500")
    with pytest.raises(StopRun, match=r"3 calls in a row failed.*status 500"):
        budget.bad("status 500")


def test_a_large_share_of_failures_ends_a_run() -> None:
    budget = ErrorBudget(in_a_row=100, share=0.5, window=20)
    with pytest.raises(StopRun, match=r"1\d of the last 20 .*refused"):
        for _ in range(20):
            budget.good()
            budget.bad("refused")
            budget.bad("refused")


def test_the_budget_of_money_is_never_exceeded() -> None:
    money = MoneyBudget(limit=1.0, spent=0.5)
    money.hold(0.3)
    with pytest.raises(StopRun, match="--max-cost"):
        money.hold(0.3)
    money.release(0.3, 0.1)
    money.hold(0.3)
    assert money.spent == pytest.approx(0.6)


def test_what_may_have_been_charged_is_known_to_the_next_run(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite", create=True) as ledger:
        money = MoneyBudget(1.0, ledger.answers.spent(), ledger.answers)
        for _ in range(2):
            money.hold(0.25)
            money.lose(0.25)
        money.hold(0.5)
        assert money.spent == 0.5
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ledger.answers.spent() == pytest.approx(0.5)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=40), st.floats(0, 5))
def test_the_money_set_aside_suffices(calls: list[tuple[float, float]], most: float) -> None:
    money = MoneyBudget(most)
    for held, share in calls:
        try:
            money.hold(held)
        except StopRun:
            continue
        money.release(held, held * share)
    assert money.spent <= most + 1e-9
