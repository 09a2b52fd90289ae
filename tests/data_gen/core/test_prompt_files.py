"""The prompts: their fields are filled in, they say what the rules ask for, and the same facts make the same request."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest

from data_gen.core.calls import Fault
from data_gen.core.prompts import FOLDER, MOST_VARIANTS, ask_again, load, request
from data_gen.core.schemas import Mode

FACTS: dict[str, Any] = {
    "item": "r1/a",
    "modality": "mr_t1",
    "category": "left kidney",
    "box": [0.1, 0.2, 0.31234, 0.4],
    "entities": [
        {"category": "left kidney", "box": [0.1, 0.2, 0.31234, 0.4]},
        {"category": "spleen", "box": [0, 0, 1, 1]},
    ],
    "caption": "",
    "template": "first",
    "variant": 1,
}
FIELDS: dict[str, set[str]] = {
    "caption": {"modality"},
    "describe_first": {"modality", "caption", "entities", "target", "focus"},
    "describe_second": {"modality", "caption", "entities", "target", "focus"},
    "revise": {"modality", "caption", "entities", "target", "descriptions"},
    "transform": {"modality", "entities", "target", "descriptions"},
    "converse": {"modality", "caption", "entities", "target", "turns", "length", "perspective"},
    "again": {"attempt", "faults"},
    "form": {"schema"},
}
DESCRIBED = {**FACTS, "descriptions": {"attribute-short": "the {organ} that filters"}}


def words_of(body: dict[str, Any]) -> str:
    return "\n".join(str(message["content"]) for message in body["messages"])


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == FIELDS.keys()


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_files_have_their_fields(name: str) -> None:
    system, user = load(name)
    assert user and "{" not in system
    assert {field for _, field, _, _ in string.Formatter().parse(user) if field is not None} == FIELDS[name]
    if name not in ("again", "form"):
        assert len(system) > 100


@pytest.mark.parametrize("name", ["describe_first", "describe_second"])
def test_descriptions_are_asked_for_as_the_paper_says(name: str) -> None:
    system, _ = load(name)
    for word in ("attribute_short", "attribute_long", "location_short", "location_long", "5 to 15", "10 to 20"):
        assert word in system
    for word in ("synonym", "plural", "abbreviation", "coordinates", "labels"):
        assert word in system.lower()


def test_facts_are_in_the_user_message_only() -> None:
    asked = request("describe", FACTS, model="m", parameters={"temperature": 1})
    system, user = asked.body["messages"]
    assert "left kidney" not in system["content"], "servers cache what stays the same"
    assert "Target: left kidney: 0.10, 0.20, 0.31, 0.40" in user["content"]
    assert "- spleen: 0.00, 0.00, 1.00, 1.00" in user["content"]
    assert "Caption: none" in user["content"] and "mr t1" in user["content"]
    assert "{" not in user["content"]
    assert asked.body["temperature"] == 1 and asked.body["model"] == "m" and asked.item == "r1/a"
    assert asked.body["response_format"]["json_schema"]["strict"] is True


def test_braces_in_facts_stay_as_they_are() -> None:
    assert "attribute-short: the {organ} that filters" in words_of(request("transform", DESCRIBED, model="m").body)


def test_keys_depend_on_the_body_and_on_nothing_else() -> None:
    first = request("describe", FACTS, model="m")
    assert first.key == request("describe", dict(reversed(FACTS.items())), model="m").key
    assert first.key == request("describe", {**FACTS, "item": "another"}, model="m").key
    others = [
        request("describe", FACTS, model="n"),
        request("describe", FACTS, model="m", mode="json_object"),
        request("describe", FACTS, model="m", parameters={"temperature": 0}),
        request("describe", {**FACTS, "template": "second"}, model="m"),
        *(request("describe", {**FACTS, "variant": variant}, model="m") for variant in range(2, MOST_VARIANTS + 1)),
        request("caption", FACTS, model="m", image=("aa", "i.png")),
        request("caption", FACTS, model="m", image=("bb", "i.png")),
        request("revise", DESCRIBED, model="m"),
    ]
    assert len({first.key, *(other.key for other in others)}) == len(others) + 1


def test_without_strict_schemas_the_schema_is_in_the_prompt() -> None:
    forms: dict[Mode, Any] = {"json_object": {"type": "json_object"}, "none": None}
    for mode, form in forms.items():
        body = request("describe", FACTS, model="m", mode=mode).body
        assert body.get("response_format") == form
        assert '"attribute_short"' in body["messages"][0]["content"]


def test_images_are_named_by_their_hash() -> None:
    _, user = request("caption", FACTS, model="m", image=("ab12", "images/x y.png")).body["messages"]
    assert [part["type"] for part in user["content"]] == ["text", "image_url"]
    assert user["content"][1]["image_url"] == {"url": "image:ab12:images/x y.png"}


def test_asking_again_gives_the_reasons() -> None:
    asked = request("describe", FACTS, model="m")
    faults = [Fault("attribute-short", "words", "it has 3 words"), Fault("", "cells", "one is missing")]
    again = ask_again(asked, '{"a": 1}', faults, 1)
    *before, answer, reasons = again.body["messages"]
    assert before == asked.body["messages"] and answer == {"role": "assistant", "content": '{"a": 1}'}
    assert "- attribute-short: it has 3 words\n- one is missing" in reasons["content"]
    assert again.fields["attempt"] == 1 and again.fields["faults"][0]["rule"] == "words"
    assert again.key != ask_again(asked, '{"a": 1}', faults, 2).key, "another attempt is another request"
    assert again.key != asked.key and again.body["response_format"] == asked.body["response_format"]
    assert json.dumps(asked.fields) == json.dumps(FACTS), "the first request stays as it was"
