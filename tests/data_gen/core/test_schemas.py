"""Answers: the schemas are strict, and other forms are refused with a reason."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.core.schemas import (
    ANSWERS,
    CELLS,
    Caption,
    Descriptions,
    Mode,
    Revisions,
    Stage,
    json_schema,
    read_answer,
    response_format,
    without_thoughts,
)

DESCRIBED = {"attribute_short": "a", "attribute_long": "b", "location_short": "c", "location_long": "d"}


def objects(schema: Any) -> list[dict[str, Any]]:
    """Returns all objects of a JSON schema."""
    if isinstance(schema, list):
        return [found for each in schema for found in objects(each)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" else []
    return own + [found for each in schema.values() for found in objects(each)]


@pytest.mark.parametrize("stage", get_args(Stage))
def test_schemas_are_strict(stage: Stage) -> None:
    schema = json_schema(stage)
    found = objects(schema)
    assert found and schema["type"] == "object"
    for each in found:
        assert each["additionalProperties"] is False
        assert sorted(each["required"]) == sorted(each["properties"]), "strict servers want all keys required"
    assert "$ref" not in json.dumps(schema) and "$defs" not in schema
    assert response_format(stage, "strict") == {
        "type": "json_schema",
        "json_schema": {"name": stage, "strict": True, "schema": schema},
    }


def test_every_stage_has_an_answer() -> None:
    assert set(ANSWERS) == set(get_args(Stage))
    cells = json_schema("revise")["properties"]["descriptions"]["items"]["properties"]["cell"]["enum"]
    assert cells == list(CELLS)


def test_weaker_servers_are_asked_for_less() -> None:
    assert response_format("describe", "json_object") == {"type": "json_object"}
    assert response_format("describe", "none") is None


def test_answers_are_read() -> None:
    answer = read_answer("describe", json.dumps(DESCRIBED))
    assert isinstance(answer, Descriptions)
    assert [answer.text(cell) for cell in CELLS] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        ("describe", "", "JSON"),
        ("describe", "{", "JSON"),
        ("describe", "[]", "object"),
        ("describe", json.dumps({**DESCRIBED, "more": 1}), "more"),
        ("describe", json.dumps({**DESCRIBED, "attribute_short": 3}), "attribute_short"),
        ("describe", json.dumps({"attribute_short": "a"}), "attribute_long"),
        ("revise", json.dumps({"descriptions": [{"cell": "x", "verdict": "keep", "text": "", "reason": ""}]}), "cell"),
        ("caption", "A liver.", "JSON"),
        ("caption", '{"caption": "\\ud800"}', "JSON"),
    ],
)
def test_other_forms_are_refused_with_a_reason(stage: Stage, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_answer(stage, text)


def test_json_is_found_in_prose_when_no_schema_holds_the_server() -> None:
    prose = f"Sure!\n```json\n{json.dumps(DESCRIBED)}\n```\nDone."
    assert isinstance(read_answer("describe", prose, "none"), Descriptions)
    with pytest.raises(ValueError):
        read_answer("describe", prose, "strict")
    caption = read_answer("caption", "A slice of the belly.", "none")
    assert isinstance(caption, Caption) and caption.caption == "A slice of the belly."


@pytest.mark.parametrize("mode", ["strict", "json_object", "none"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("```json\n", "\n```"),
        ("```\n", "```"),
        ("<think>It may be {a liver}.</think>", ""),
        ("<think>\n{}\n</think>\n\n```json\n", "\n```"),
        ("It may be {a liver}.\n</think>\n", ""),
        ("[THINK]{[/THINK]", ""),
        ("<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>", ""),
    ],
)
def test_thoughts_and_fences_are_left_out(mode: Mode, before: str, after: str) -> None:
    answer = read_answer("describe", without_thoughts(before + json.dumps(DESCRIBED) + after), mode)
    assert isinstance(answer, Descriptions) and answer.attribute_short == "a"


@pytest.mark.parametrize("text", ["<think>So {json}", "<thinking>\n", " <think> " + json.dumps(DESCRIBED)])
def test_thoughts_without_an_end_are_no_answer(text: str) -> None:
    assert without_thoughts(text) == ""
    for stage in get_args(Stage):
        with pytest.raises(ValueError, match="JSON"):
            read_answer(stage, without_thoughts(text), "none")


def test_a_text_without_thoughts_stays() -> None:
    assert without_thoughts(" I <think> so. ") == " I <think> so. "


def test_a_doubled_key_says_two_things() -> None:
    with pytest.raises(ValueError, match="'caption' is twice"):
        read_answer("caption", '{"caption": "A liver.", "caption": "A spleen."}')
    with pytest.raises(ValueError, match="nested too deeply"):
        read_answer("caption", "[" * 100_000)


@given(st.text())
def test_any_text_is_an_answer_or_a_value_error(text: str) -> None:
    for stage in get_args(Stage):
        for mode in ("strict", "none"):
            try:
                assert isinstance(read_answer(stage, text, mode), ANSWERS[stage])
            except ValueError as error:
                assert str(error)


@given(st.lists(st.sampled_from(["keep", "revise", "remove"]), max_size=4))
def test_an_answer_survives_its_own_json(verdicts: list[str]) -> None:
    values = [
        {"cell": cell, "verdict": verdict, "text": "é", "reason": ""}
        for cell, verdict in zip(CELLS, verdicts, strict=False)
    ]
    answer = read_answer("revise", json.dumps({"descriptions": values}))
    assert isinstance(answer, Revisions)
    assert read_answer("revise", answer.model_dump_json()) == answer
