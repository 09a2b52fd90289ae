"""The demo's wordings, which people wrote by hand, keep the rules that any author's must keep.

They are judged as if all twelve structures were labelled in one image, the strictest case. One rule has another measure:
the long wordings have up to 27 words, where the engine asks for 10 to 20.
"""

from __future__ import annotations

import pytest
from made_up import placed_item

from data_gen.duplicates import Duplicates
from data_gen.items import Item
from data_gen.names import load_names
from data_gen.positions import claims
from data_gen.rules import ANSWER_WORDS, TEXT_WORDS, check_pair, count_words
from medisee.data.query_bank import load_bank

BANK, NAMES = load_bank(), load_names()
WORDS = {"short": TEXT_WORDS["short"], "long": (15, 27)}


def item_of(structure: str) -> Item:
    return placed_item(structure, *(other for other in BANK if other != structure))


@pytest.mark.parametrize("structure", BANK)
def test_every_wording_asks_for_its_target(structure: str) -> None:
    answer = f"It is the {structure}, as everybody knows who has seen a brain."
    for (_, length), queries in BANK[structure].queries.items():
        least, most = WORDS[length]
        for query in queries:
            found = {b.rule: b.reason for b in check_pair(query, answer, length, item_of(structure), NAMES)}
            assert found.keys() <= {"words"}, (query, found)
            assert least <= count_words(query) <= most, query


@pytest.mark.parametrize("structure", BANK)
def test_every_explanation_names_its_target(structure: str) -> None:
    for texts in BANK[structure].explanations.values():
        for text in texts:
            assert check_pair("Which part of the brain is it?", text, "short", item_of(structure), NAMES) == [], text
            assert ANSWER_WORDS[0] <= count_words(text) <= ANSWER_WORDS[1], text


def test_no_wording_says_where_in_the_image_its_target_lies() -> None:
    """So the rule about positions holds whatever the slice."""
    texts = [
        text
        for pool in BANK.values()
        for each in (pool.queries, pool.explanations)
        for t in each.values()
        for text in t
    ]
    assert len(texts) > 12 * 256 and [text for text in texts if claims(text)] == []


def test_no_wording_says_what_another_one_says() -> None:
    seen = Duplicates()
    wordings = [
        (f"{structure}#{perspective}-{length}-{number}", query)
        for structure, pool in BANK.items()
        for (perspective, length), queries in pool.queries.items()
        for number, query in enumerate(queries)
    ]
    found = {query: breach.reason for name, query in wordings if (breach := seen.add(name, query))}
    assert found == {}
