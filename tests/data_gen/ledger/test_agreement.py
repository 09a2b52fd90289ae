"""Agreement of two reviewers: worked examples, limits and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.core.items import Decision
from data_gen.ledger.agreement import Agreement, agreements, cohen_kappa, raw_agreement

labels = st.lists(st.tuples(st.sampled_from("are"), st.sampled_from("are")), min_size=1, max_size=30)


def test_kappa_of_a_textbook_example() -> None:
    # 50 grant proposals read by two: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no; kappa is 0.4.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert raw_agreement(first, second) == pytest.approx(0.7)
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_chance_alone_is_zero_and_the_opposite_is_minus_one() -> None:
    assert cohen_kappa(["a", "a", "b", "b"], ["a", "b", "a", "b"]) == pytest.approx(0)
    assert cohen_kappa(["a", "b"], ["b", "a"]) == pytest.approx(-1)


def test_kappa_is_not_defined_without_pairs_or_without_variety() -> None:
    assert raw_agreement([], []) is None
    assert cohen_kappa([], []) is None
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        cohen_kappa(["a"], ["a", "b"])


@given(labels)
def test_kappa_is_symmetric_and_at_most_the_raw_share(pairs: list[tuple[str, str]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    kappa, raw = cohen_kappa(first, second), raw_agreement(first, second)
    assert kappa == cohen_kappa(second, first)
    assert raw is not None
    assert kappa is None or -1 <= kappa <= raw + 1e-12


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
