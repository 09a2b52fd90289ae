"""What holds a run back: the server's rate limits, the budget of errors and the budget of money."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from data_gen.ledger.answers import Answers

_LEAST_SLEEP = 0.001  # seconds; a shorter sleep can end before the clock has advanced


class StopRun(Exception):
    """Ends a run early; the message says why and what to do. All answers so far are in the ledger."""


class RateLimit:
    """Token buckets over requests and tokens per minute, shared by all calls of a run.

    A bucket holds one second's worth, so that no burst breaks a limit that the server counts in short windows. A
    request is sent as soon as its bucket is not empty and may leave a debt, for which the next one waits: the mean rate
    is kept whatever the sizes.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Starts with full buckets; None means unlimited. `clock` and `sleep` are in seconds."""
        self._clock, self._sleep = clock, sleep
        self._requests = _Bucket(requests_per_minute, clock())
        self._tokens = _Bucket(tokens_per_minute, clock())
        self._paused_until = 0.0
        self._turn = asyncio.Lock()

    async def take(self, tokens: float) -> None:
        """Waits until a request of this many tokens may be sent; first come, first served."""
        async with self._turn:
            while (seconds := self._wait()) > 0:
                await self._sleep(max(seconds, _LEAST_SLEEP))
            self._requests.level -= 1.0
            self._tokens.level -= tokens

    def give_back(self, tokens: float) -> None:
        """Corrects the tokens that a request was expected to need; a negative number takes more."""
        self._tokens.level += tokens

    def pause(self, seconds: float) -> None:
        """Delays all calls, as the server asked."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def _wait(self) -> float:
        now = self._clock()
        return max(self._paused_until - now, self._requests.wait(now), self._tokens.wait(now))


class _Bucket:
    def __init__(self, per_minute: float | None, now: float) -> None:
        self._rate = per_minute / 60 if per_minute else float("inf")
        self.level = self._full = max(1.0, self._rate)
        self._at = now

    def wait(self, now: float) -> float:
        """Fills up and returns the seconds until something may be taken."""
        if self._full == float("inf"):
            return 0.0
        self.level = min(self._full, self.level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (1.0 - self.level) / self._rate)


@dataclass
class ErrorBudget:
    """Ends a run in which nothing works, before it costs much."""

    in_a_row: int = 20  # this many consecutive bad calls end the run
    share: float = 0.5  # so does a larger fraction of bad calls among the last `window`
    window: int = 200
    _row: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=self.window)

    def good(self) -> None:
        """Counts a call that worked."""
        self._row = 0
        self._last.append(True)

    def bad(self, reason: str) -> None:
        """Counts a call without a usable answer after all its attempts; StopRun when the budget is used up."""
        self._row += 1
        self._reasons[reason] += 1
        self._last.append(False)
        failed = self._last.count(False)
        if self._row >= self.in_a_row:
            what = f"{self._row} calls in a row failed"
        elif len(self._last) == self.window and failed > self.share * self.window:
            what = f"{failed} of the last {self.window} calls failed"
        else:
            return
        reason, count = self._reasons.most_common(1)[0]
        raise StopRun(f"stopped: {what}; most often ({count} times): {reason}; fix that, then run again to continue.")


@dataclass
class MoneyBudget:
    """The money of a ledger, in US dollars: what is spent, and what calls under way may cost at most."""

    limit: float | None = None  # for all runs of the ledger
    spent: float = 0.0  # so far, in this run and those before
    answers: Answers | None = None  # of the ledger, which stores the charges of `lose` for later runs
    _held: float = 0.0

    def hold(self, most: float) -> None:
        """Sets aside the most that a call can cost; StopRun when it could exceed the limit."""
        if self.limit is not None and self.spent + self._held + most > self.limit:
            raise StopRun(
                f"stopped: {self.spent:.4f} USD are spent and {self._held:.4f} USD set aside for calls under way. One "
                f"more call may cost {most:.4f} USD and exceed --max-cost {self.limit:g}; raise it to continue."
            )
        self._held += most

    def release(self, held: float, price: float) -> None:
        """Pays for a call and frees what was set aside for it."""
        self._held = max(0.0, self._held - held)
        self.spent += price

    def lose(self, held: float) -> None:
        """Pays all that was set aside for a call: its answer never came, but it may be charged for."""
        self.release(held, held)
        if self.answers is not None and held:
            self.answers.charge(held)
