"""Splits: the paper's counts, whole cases, categories that stay in train, independence of order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.core.items import Entity, Item
from data_gen.publishing.splits import PAPER_COUNTS, SPLITS, split_items


def an_item(case: str, number: int, category: str = "liver", source: str = "s") -> Item:
    box = (0.0, 0.0, 0.5, 0.5)
    return Item(
        id=f"{source}-{case}-{number:05d}/t",
        record=f"{source}-{case}-{number:05d}",
        target="t",
        image="a.png",
        mask="m.png",
        modality="ct",
        source=source,
        case=case,
        category=category,
        box=box,
        entities=(Entity(category, box),),
        width=8,
        height=8,
    )


def cases_of(items: list[Item]) -> set[tuple[str, str]]:
    return {(item.source, item.case) for item in items}


def many(total: int, categories: int = 20) -> list[Item]:
    """Cases of 1 to 40 images, as volumes have them."""
    rng = random.Random(total)
    items: list[Item] = []
    while len(items) < total:
        case = f"c{len(items)}"
        for _ in range(min(rng.randint(1, 40), total - len(items))):
            items.append(an_item(case, len(items), f"category {rng.randrange(categories)}"))
    return items


@pytest.mark.parametrize("total", [12_652, 13_000])
def test_the_papers_counts_exactly_where_there_are_enough(total: int) -> None:
    splits = split_items(many(total))
    assert {split: len(items) for split, items in splits.items()} == PAPER_COUNTS
    whole = [cases_of(splits[split]) for split in SPLITS]
    assert not whole[0] & whole[1] and not whole[0] & whole[2] and not whole[1] & whole[2]


def test_what_is_too_much_is_taken_from_the_most_frequent_categories() -> None:
    items = many(13_500)
    rare = [an_item(f"rare{n}", n, "rare") for n in range(10)]
    splits = split_items(items + rare)
    kept = [item for listed in splits.values() for item in listed if item.category == "rare"]
    assert len(kept) == 10


def test_the_papers_proportions_where_there_are_fewer() -> None:
    splits = split_items(many(1265))
    assert (len(splits["val"]), len(splits["test"])) == (126, 127)
    assert sum(map(len, splits.values())) == 1265


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=60), st.integers(0, 3))
def test_no_case_is_cut_and_no_item_lost_or_doubled(drawn: list[tuple[int, int]], seed: int) -> None:
    items = [an_item(f"c{case}", n, f"k{category}") for n, (case, category) in enumerate(drawn)]
    splits = split_items(items, seed)
    assert sorted(item.id for listed in splits.values() for item in listed) == sorted(item.id for item in items)
    owners = [split for split in SPLITS for _ in cases_of(splits[split])]
    assert len(owners) == len(cases_of(items))
    if len(cases_of(items)) >= 3:
        assert all(splits.values())


def test_the_order_of_items_does_not_matter() -> None:
    items = many(600)
    shuffled = items.copy()
    random.Random(1).shuffle(shuffled)
    assert split_items(shuffled) == split_items(items)
    assert split_items(items, seed=1) != split_items(items)


def test_cases_of_two_data_sets_with_one_name_are_two() -> None:
    items = [an_item(case, n, source=source) for source in "ab" for case in "xyz" for n in range(2)]
    splits = split_items(items)
    assert sum(len(cases_of(listed)) for listed in splits.values()) == 6


def test_train_keeps_a_case_of_every_category() -> None:
    items = [an_item(f"c{n}", n, "common") for n in range(30)] + [an_item("only", 99, "lonely")]
    for seed in range(10):
        assert "lonely" in {item.category for item in split_items(items, seed)["train"]}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_cases_are_all_for_training(count: int) -> None:
    splits = split_items([an_item(f"c{n}", n) for n in range(count)])
    assert [len(splits[split]) for split in SPLITS] == [count, 0, 0]


def test_cases_that_are_larger_than_their_share_still_give_one_each() -> None:
    splits = split_items([an_item(f"c{case}", n) for case in range(3) for n in range(20)])
    assert [len(splits[split]) for split in SPLITS] == [20, 20, 20]
