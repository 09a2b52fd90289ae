"""The banks' wordings, which people wrote by hand, keep the rules that any author's must keep.

They are judged as if all of a bank's structures were labelled in one image, the strictest case. One rule has another
measure: the long wordings have up to 27 words, where the engine asks for 10 to 20.
"""

from __future__ import annotations

import pytest
from made_up import placed_item

from data_gen.core.items import Item
from data_gen.core.names import load_names
from data_gen.rules.checks import ANSWER_WORDS, TEXT_WORDS, check_pair, count_words
from data_gen.rules.duplicates import Duplicates
from data_gen.rules.positions import claims
from medisee.sources.query_bank import BANKS, load_bank

LOADED, NAMES = {name: load_bank(path, None) for name, path in BANKS.items()}, load_names()
CASES = [(name, structure) for name, bank in LOADED.items() for structure in bank]
WORDS = {"short": TEXT_WORDS["short"], "long": (10, 27)}


def item_of(name: str, structure: str) -> Item:
    return placed_item(structure, *(other for other in LOADED[name] if other != structure))


@pytest.mark.parametrize(("name", "structure"), CASES)
def test_every_wording_asks_for_its_target(name: str, structure: str) -> None:
    answer = f"It is the {structure}, as everybody knows who has seen some anatomy."
    item = item_of(name, structure)
    for (_, length), queries in LOADED[name][structure].queries.items():
        least, most = WORDS[length]
        for query in queries:
            found = {b.rule: b.reason for b in check_pair(query, answer, length, item, NAMES)}
            assert found.keys() <= {"words"}, (query, found)
            assert least <= count_words(query) <= most, query


@pytest.mark.parametrize(("name", "structure"), CASES)
def test_every_explanation_names_its_target(name: str, structure: str) -> None:
    item = item_of(name, structure)
    for texts in LOADED[name][structure].explanations.values():
        for text in texts:
            assert check_pair("Which part of the body is it?", text, "short", item, NAMES) == [], text
            assert ANSWER_WORDS[0] <= count_words(text) <= ANSWER_WORDS[1], text


@pytest.mark.parametrize(("name", "least"), [("brain", 12 * 256), ("abdomen", 13 * 176)])
def test_no_wording_says_where_in_the_image_its_target_lies(name: str, least: int) -> None:
    """So the rule about positions holds whatever the slice."""
    texts = [
        text
        for pool in LOADED[name].values()
        for each in (pool.queries, pool.explanations)
        for t in each.values()
        for text in t
    ]
    assert len(texts) > least and [text for text in texts if claims(text)] == []


@pytest.mark.parametrize("name", BANKS)
def test_no_wording_says_what_another_one_says(name: str) -> None:
    seen = Duplicates()
    wordings = [
        (f"{structure}#{perspective}-{length}-{number}", query)
        for structure, pool in LOADED[name].items()
        for (perspective, length), queries in pool.queries.items()
        for number, query in enumerate(queries)
    ]
    found = {query: breach.reason for key, query in wordings if (breach := seen.add(key, query))}
    assert found == {}
