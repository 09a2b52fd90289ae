"""Subsets by caps: exact, bounded, and the same whatever the order."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medisee.foundation.errors import InputError
from medisee.sources.subset import Chosen, Subset, check_categories, parse_subset

NAMES = [(category, f"{category}/{n}") for category in ("liver", "spleen", "aorta") for n in range(40)]
caps = st.dictionaries(st.sampled_from(["liver", "spleen"]), st.integers(0, 50))


def chosen(subset: Subset, names: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns what a subset takes, as in a data set that is read twice."""
    choice = Chosen(subset)
    for category, name in names:
        if choice.wants(category, name):
            choice.add(category, name)
    return [one for one in names if choice.wants(*one)]


@given(st.none() | st.integers(0, 50), caps, st.integers(0, 3), st.randoms())
def test_caps_are_met_in_any_order(cap: int | None, own: dict[str, int], seed: int, random: Random) -> None:
    subset = Subset(cap=cap, caps=own, seed=seed)
    shuffled = random.sample(NAMES, len(NAMES))
    taken = chosen(subset, NAMES)
    assert sorted(chosen(subset, shuffled)) == sorted(taken)
    counts = Counter(category for category, _ in taken)
    for category in ("liver", "spleen", "aorta"):
        most = own.get(category, cap)
        assert counts[category] == (40 if most is None else min(most, 40))


def test_a_larger_cap_holds_the_smaller_and_the_seed_decides() -> None:
    few, more = chosen(Subset(cap=5), NAMES), chosen(Subset(cap=9), NAMES)
    assert set(few) < set(more)
    assert set(chosen(Subset(cap=5, seed=1), NAMES)) != set(few)


def test_what_cannot_be_used_is_replaced() -> None:
    choice = Chosen(Subset(cap=3))
    ranked = [set(chosen(Subset(cap=n), NAMES[:40])) for n in range(5)]
    (unusable,) = ranked[1]
    for one in NAMES[:40]:
        if choice.wants(*one) and one != unusable:
            choice.add(*one)
    assert {one for one in NAMES[:40] if choice.wants(*one)} == ranked[4]  # the unusable one is looked at again
    assert len(ranked[4] - ranked[1]) == 3


def test_few_of_many_are_looked_at() -> None:
    choice = Chosen(Subset(cap=10))
    looked_at = 0
    for n in range(20_000):
        if choice.wants("liver", str(n)):
            looked_at += 1
            choice.add("liver", str(n))
    assert looked_at < 200  # about 10 x (1 + ln(2000))


def test_words_of_the_command() -> None:
    assert parse_subset(["500", "liver=2000", "left kidney=0", "a=b=3"], seed=2) == Subset(
        cap=500, caps={"liver": 2000, "left kidney": 0, "a=b": 3}, seed=2
    )
    assert parse_subset(["liver=1"], seed=0).cap is None


def test_all_wrong_words_are_told() -> None:
    with pytest.raises(InputError) as caught:
        parse_subset(["liver", "=3", "-1", "spleen=x", "5", "6", "aorta=1", "aorta=2"], seed=0)
    told = caught.value.problems
    assert [problem.split(":")[0] for problem in told] == [
        f"--subset {word!r}" for word in ("liver", "=3", "-1", "spleen=x", "6", "aorta=2")
    ]
    assert "CATEGORY=NUMBER such as liver=2000" in told[0]
    assert "second cap of all categories" in told[4] and "second cap of 'aorta'" in told[5]


def test_unknown_categories_are_told() -> None:
    check_categories(Subset(caps={"liver": 1}), ["liver"])
    with pytest.raises(InputError, match=r"--subset livre=1: .*Did you mean 'liver'"):
        check_categories(Subset(caps={"livre": 1}), ["liver"])
