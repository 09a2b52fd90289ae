"""Agreement of two reviewers: worked examples, limits and properties."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.core.items import Decision, Verdict
from data_gen.ledger.screening import Agreement, agreements

VERDICTS = st.sampled_from(("accept", "reject", "edit"))


def compared(first: list[str], second: list[str]) -> list[Agreement]:
    return agreements(
        [
            Decision(f"p{number}", reviewer, cast(Verdict, verdict))
            for reviewer, verdicts in (("anna", first), ("ben", second))
            for number, verdict in enumerate(verdicts)
        ]
    )


def test_kappa_of_a_textbook_example() -> None:
    # 50 grant proposals read by two: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no; kappa is 0.4.
    first = ["accept"] * 25 + ["reject"] * 25
    second = ["accept"] * 20 + ["reject"] * 5 + ["accept"] * 10 + ["reject"] * 15
    (found,) = compared(first, second)
    assert found.raw == pytest.approx(0.7) and found.kappa == pytest.approx(0.4)


def test_chance_alone_is_zero_and_the_opposite_is_minus_one() -> None:
    (chance,) = compared(["accept", "accept", "edit", "edit"], ["accept", "edit", "accept", "edit"])
    (opposite,) = compared(["accept", "edit"], ["edit", "accept"])
    assert chance.kappa == pytest.approx(0) and opposite.kappa == pytest.approx(-1)


def test_kappa_is_not_defined_without_variety_and_nothing_is_without_pairs() -> None:
    assert compared(["accept", "accept"], ["accept", "accept"]) == [Agreement("anna", "ben", 2, 1.0, None)]
    assert compared([], []) == compared(["accept"], []) == []


@given(st.lists(st.tuples(VERDICTS, VERDICTS), min_size=1, max_size=30))
def test_kappa_is_symmetric_and_at_most_the_raw_share(pairs: list[tuple[str, str]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    (found,) = compared(first, second)
    assert [found] == compared(second, first)
    assert found.kappa is None or -1 <= found.kappa <= found.raw + 1e-12


def test_only_what_both_have_judged_counts() -> None:
    decisions = [
        Decision("p1", "ben", "accept"),
        Decision("p1", "anna", "accept"),
        Decision("p2", "anna", "reject", "wrong"),
        Decision("p2", "ben", "accept"),
        Decision("p3", "anna", "accept"),
        Decision("p4", "carl", "accept"),
    ]
    assert agreements(decisions) == [Agreement("anna", "ben", 2, 0.5, 0.0)]
