from __future__ import annotations

import random

import pytest

from medisee.records import prompts


@pytest.mark.parametrize("templates", [prompts.CLASS_QUESTIONS, prompts.ANSWERS, prompts.REQUESTS])
def test_templates_differ_and_are_sentences(templates: tuple[str, ...]) -> None:
    assert len(set(templates)) == len(templates) >= 6
    assert all(text.endswith((".", "?")) and text[0].isupper() for text in templates)


def test_every_question_names_the_class_once() -> None:
    assert len(prompts.CLASS_QUESTIONS) >= 12
    for template in prompts.CLASS_QUESTIONS:
        question = template.format(name="left kidney")
        assert question.count("left kidney") == 1
        assert "{" not in question


def test_every_answer_names_the_candidates_once_in_order() -> None:
    for template in prompts.ANSWERS:
        answer = template.format(candidates=prompts.candidate_text(prompts.CANDIDATE_TOKENS))
        assert answer.count("[SEG]") == answer.count("[BBOX]") == 1
        assert answer.index("[SEG]") < answer.index("[BBOX]")


def test_the_forced_answer_is_the_first_one() -> None:
    assert prompts.FORCED_ANSWER == "It is [SEG] and [BBOX]."


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["[SEG]"], "[SEG]"),
        (["[SEG]", "[BBOX]"], "[SEG] and [BBOX]"),
        (["[SEG]", "[BBOX]", "[TGT3]"], "[SEG], [BBOX] and [TGT3]"),
        (["[SEG]", "[BBOX]", "[TGT3]", "[TGT4]"], "[SEG], [BBOX], [TGT3] and [TGT4]"),
    ],
)
def test_candidate_text(tokens: list[str], expected: str) -> None:
    assert prompts.candidate_text(tokens) == expected


def test_candidate_text_needs_a_token() -> None:
    with pytest.raises(ValueError, match="at least one candidate token"):
        prompts.candidate_text([])


def test_draws_follow_the_seed_and_reach_every_template() -> None:
    first, second = random.Random(3), random.Random(3)
    questions = [prompts.class_question("liver", first) for _ in range(300)]
    assert questions == [prompts.class_question("liver", second) for _ in range(300)]
    assert len(set(questions)) == len(prompts.CLASS_QUESTIONS)
    assert len({prompts.class_answer(first) for _ in range(300)}) == len(prompts.ANSWERS)


@pytest.mark.parametrize(
    ("query", "start"),
    [
        ("Which organ makes bile?", "Which organ makes bile? "),
        ("  the organ that makes bile\n", "the organ that makes bile. "),
        ("Find the {bile} maker!", "Find the {bile} maker! "),
    ],
)
def test_a_reasoning_question_is_the_query_and_a_request(query: str, start: str) -> None:
    question = prompts.reasoning_question(query, random.Random(0))
    assert question.startswith(start)
    assert question.removeprefix(start) in prompts.REQUESTS


def test_a_reasoning_answer_gives_the_tokens_before_the_explanation() -> None:
    explanation = "The thalamus relays {signals} to the cortex."
    for seed in range(20):
        answer = prompts.reasoning_answer(explanation, random.Random(seed), ["[SEG]", "[BBOX]", "[TGT3]"])
        assert answer.endswith(f" {explanation}")
        assert "[SEG], [BBOX] and [TGT3]" in answer.removesuffix(explanation)


def test_a_reasoning_answer_without_explanation_is_a_plain_answer() -> None:
    assert prompts.reasoning_answer("  ", random.Random(5)) == prompts.class_answer(random.Random(5))
