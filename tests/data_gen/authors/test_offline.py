"""The offline author keeps the rules for every category it knows, varies its wording and answers every stage."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data_gen.authors import offline
from data_gen.authors.knowledge import load_knowledge
from data_gen.authors.wording import Subject, article, descriptions, join, read
from data_gen.core.items import Item, length_of
from data_gen.core.names import load_names
from data_gen.core.schemas import CELLS, read_answer
from data_gen.rules.checks import check_description, check_pair, check_same_target, check_turn

NAMES = load_names()
CATEGORIES = [
    name
    for category in load_knowledge()
    for name in ((category, f"{category} left", f"right_{category}") if NAMES.side(f"left {category}") else (category,))
]
TARGET_BOX = [0.1, 0.1, 0.35, 0.3]


def fields_of(category: str, template: str = "first", variant: int = 1, **more: Any) -> dict[str, Any]:
    entities = [
        {"category": category, "box": TARGET_BOX},
        {"category": "polyp" if category != "polyp" else "liver", "box": [0.6, 0.1, 0.8, 0.3]},
        {"category": "retinal_vessel" if category != "retinal vessel" else "liver", "box": [0.1, 0.6, 0.4, 0.9]},
    ]
    return {
        "item": f"record/{category}",
        "modality": "mri_t1",
        "category": category,
        "box": TARGET_BOX,
        "entities": entities,
        "caption": "",
        "template": template,
        "variant": variant,
        "attempt": 0,
        "faults": [],
    } | more


def item_of(fields: dict[str, Any]) -> Item:
    return offline._item(fields)


def described(fields: dict[str, Any], seed: int = 0) -> dict[str, str]:
    answer = read_answer("describe", json.dumps(offline.answer("describe", fields, seed)))
    texts = {cell: answer.text(cell) for cell in CELLS}  # pyright: ignore[reportAttributeAccessIssue]
    return {cell: text for cell, text in texts.items() if text}


def pairs_of(fields: dict[str, Any], texts: dict[str, str], seed: int = 0) -> dict[str, dict[str, str]]:
    answer = offline.answer("transform", {**fields, "descriptions": texts}, seed)
    read_answer("transform", json.dumps(answer))
    return {pair["cell"]: pair for pair in answer["pairs"]}


@pytest.mark.parametrize("category", CATEGORIES)
def test_all_it_says_keeps_the_rules(category: str) -> None:
    missing = 0
    for template in ("first", "second"):
        fields = fields_of(category, template)
        texts, item = described(fields), item_of(fields)
        missing += len(CELLS) - len(texts)
        for cell, text in texts.items():
            assert check_description(text, length_of(cell), item, NAMES) == []
        for perspective in ("attribute", "location"):
            short, long = (texts.get(f"{perspective}-{length}", "") for length in ("short", "long"))
            assert check_same_target(short, long, item, NAMES) == []
        for cell, pair in pairs_of(fields, texts).items():
            assert check_pair(pair["question"], pair["answer"], length_of(cell), item, NAMES) == [], pair
    # Few things are too long for a short text once the patient's side is named.
    assert missing == 0 if NAMES.side(category) is None else missing <= 4


def test_the_same_fields_and_seed_give_the_same_words_and_others_other_words() -> None:
    fields = fields_of("liver")
    texts = described(fields)
    assert texts == described(fields) and pairs_of(fields, texts) == pairs_of(fields, texts)
    assert texts != described(fields, seed=1)
    assert texts != described(fields | {"item": "other/liver"})
    assert texts != described(fields | {"attempt": 1})


def test_templates_and_variants_tell_different_facts() -> None:
    subject = Subject("liver", "organ")
    phrases: list[str] = []
    for variant in (1, 2):
        for template in ("first", "second"):
            texts = described(fields_of("liver", template, variant))
            phrases += [
                found[0] for cell in CELLS if cell.startswith("attribute") and (found := read(subject, texts[cell]))
            ]
    facts = [fact for phrase in phrases for fact in phrase.split(" and ")]
    assert len(phrases) == 8 and len(set(facts)) == len(facts)


def test_a_repeated_question_is_asked_differently() -> None:
    fields = fields_of("liver")
    before = pairs_of(fields, described(fields))["attribute-short"]
    fault = {"cell": "attribute-short", "rule": "duplicate", "reason": "it tells the same"}
    asked = fields | {"attempt": 1, "faults": [fault]}
    again = pairs_of(asked, {"attribute-short": before["question"]})["attribute-short"]
    assert again["question"] != before["question"]
    assert check_pair(again["question"], again["answer"], "short", item_of(fields), NAMES) == []


def test_one_of_two_is_identified_by_the_patients_side() -> None:
    for category, side in (("kidney_left", "left"), ("right kidney", "right")):
        text = described(fields_of(category))["attribute-short"]
        assert f"on the patient's {side}" in text
        answer = pairs_of(fields_of(category), {"attribute-short": text})["attribute-short"]["answer"]
        assert f"{side} kidney" in answer


def test_of_an_unknown_category_it_tells_where_it_lies_and_no_more() -> None:
    fields = fields_of("some_new_thing")
    texts = described(fields)
    assert texts and all(cell.startswith("location") for cell in texts)
    for pair in pairs_of(fields, texts).values():
        assert "some new thing" in pair["answer"]


def test_revise_keeps_what_is_right_and_removes_what_breaks_a_rule() -> None:
    texts = {"attribute-short": "The organ that makes bile for digestion", "location-short": "The liver at the left"}
    answer = offline.answer("revise", fields_of("liver", descriptions=texts), 0)
    read_answer("revise", json.dumps(answer))
    kept, removed = answer["descriptions"]
    assert (kept["verdict"], kept["text"]) == ("keep", texts["attribute-short"])
    assert (removed["verdict"], removed["text"]) == ("remove", "") and "liver" in removed["reason"]


def test_the_caption_tells_the_kind_of_image_and_its_objects() -> None:
    caption = offline.answer("caption", fields_of("kidney_left"), 0)["caption"]
    assert caption == "This is an MRI image. It shows the left kidney, the polyp and the retinal vessel."


@pytest.mark.parametrize("turns", [2, 3, 4])
@pytest.mark.parametrize("category", ["liver", "kidney_left", "portal_vein_and_splenic_vein", "polyp", "thalamus"])
def test_conversations_keep_the_target_for_the_last_answer(category: str, turns: int) -> None:
    fields = fields_of(category, turns=turns, perspective="attribute", length="long")
    answer = offline.answer("converse", fields, 0)
    read_answer("converse", json.dumps(answer))
    *before, last = answer["turns"]
    assert len(before) == turns - 1
    assert len({turn["question"] for turn in before}) == len(before)
    item = item_of(fields)
    for turn in before:
        assert check_turn(turn["question"], turn["answer"], item, NAMES) == []
    assert check_pair(last["question"], last["answer"], "long", item, NAMES) == []


def test_a_stage_that_does_not_exist() -> None:
    with pytest.raises(KeyError):
        offline.answer("publish", fields_of("liver"), 0)


def test_phrases_are_found_again_in_descriptions() -> None:
    subject = Subject("left kidney", "organ", "left")
    for template in ("first", "second"):
        for sided in (True, False):
            for text in descriptions(subject, "makes urine", template, sided=sided):
                assert read(subject, text) == ("makes urine", sided)
    assert read(subject, "Something else that makes urine") is None


def test_phrases_are_joined_grammatically_or_not_at_all() -> None:
    assert join("makes bile", "stores sugar") == "makes bile and stores sugar"
    assert join("contains a hilum", "contains red pulp") == "contains a hilum and red pulp"
    assert join("is large", "is at risk of stones") == "is large and is at risk of stones"
    assert join("lies behind the stomach", "lies in the left half of the image") == (
        "lies behind the stomach, here in the left half of the image"
    )
    assert join("makes bile and stores sugar", "breaks down alcohol") is None
    assert join("sends out the commands for movement", "commands movement") is None
    assert [article(noun) for noun in ("organ", "gland", "MRI", "CT", "ultrasound")] == [
        "an organ",
        "a gland",
        "an MRI",
        "a CT",
        "an ultrasound",
    ]
