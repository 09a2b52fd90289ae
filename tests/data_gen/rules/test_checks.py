"""Each rule catches what it is for and lets good texts pass."""

from __future__ import annotations

import pytest
from made_up import placed_item

from data_gen.core.items import Item
from data_gen.core.names import load_names
from data_gen.rules.checks import Breach, check_description, check_pair, check_same_target, check_turn

NAMES = load_names()
ANSWER = "It is the liver, because this organ makes bile and stores sugar as glycogen."
GOOD = "The large organ that makes bile and lies left of the spleen"


LIVER = placed_item("liver", "spleen", "kidney_left")


def _rules(breaches: list[Breach]) -> set[str]:
    assert all(breach.reason for breach in breaches)
    return {breach.rule for breach in breaches}


def _asked(question: str, answer: str = ANSWER, item: Item = LIVER) -> set[str]:
    return _rules(check_pair(question, answer, "short", item, NAMES))


def test_good_texts_pass() -> None:
    assert check_description(GOOD, "short", LIVER, NAMES) == []
    assert check_pair("Which large organ makes bile?", ANSWER, "short", LIVER, NAMES) == []
    assert check_turn("What does this image show?", "A CT slice of the belly, with the spleen.", LIVER, NAMES) == []
    assert check_same_target(GOOD, f"{GOOD} in the upper left of the image", LIVER, NAMES) == []


@pytest.mark.parametrize(
    ("text", "length", "rule"),
    [
        ("The bile organ here", "short", "words"),
        ("The organ that makes bile and " + "very " * 10 + "much more", "short", "words"),
        ("The organ that makes a lot of bile here", "long", "words"),
        ("The liver that makes bile for us", "short", "names_target"),
        ("The LIVERS of two people lie here", "short", "names_target"),
        ("The organ with hepatic arteries and veins", "short", "names_target"),
        ("The spleen, which lies at the right", "short", "names_other"),
        ("This is the left kidney seen here", "short", "names_other"),
        ("This organ is the spleen in the image", "short", "names_other"),
        ("The organ known as the spleen filters old blood cells", "short", "names_other"),
        ("An organ that is called the left kidney in here", "short", "names_other"),
        ("The organ at (0.1, 0.2) which makes bile", "short", "coordinates"),
        ("The organ inside [12 40 90, 80, 3, 4] here", "short", "coordinates"),
        ("The organ from x = 12 to the spleen", "short", "coordinates"),
        ("The organ that begins at 0.35 of the width", "short", "coordinates"),
        ("The organ 120 px away from the spleen", "short", "coordinates"),
        ("The organ 30% from the left of the image", "short", "coordinates"),
        ("The organ with these coordinates in the image", "short", "coordinates"),
        ("The organ spanning 120, 45, 200, 90 here", "short", "coordinates"),
        ("The organ that begins at 120,45 and makes bile", "short", "coordinates"),
        ("The organ in row 45 column 120 of this", "short", "coordinates"),
        ("The organ in the 45th row of this image", "short", "coordinates"),
        ("The organ at 0,35 of the width here", "short", "coordinates"),
        ("The organ in the lower part of the image", "short", "position"),
        ("The organ at the right-hand side of this CT slice", "short", "position"),
        ("Which organ makes bile and stores sugar?", "short", "question"),
    ],
)
def test_each_rule_of_descriptions(text: str, length, rule: str) -> None:
    assert rule in _rules(check_description(text, length, LIVER, NAMES))


@pytest.mark.parametrize(
    "text",
    [
        "The organ that weighs 1.5 kg and makes bile",
        "The organ at the level of the vertebrae T10 to T12",
        "The organ that takes 25% of the cardiac output",
        "The organ of 1,500 grams which makes bile",
        "The organ with segments 5, 6, 7 and 8",
        "The organ whose left neighbour is the spleen here",
        "The organ that is the spleen's large neighbour",
        "The organ in the upper left part of the image",
        "The organ on the right side of the patient's belly",
        "The organ to the right of the kidney in the image",
        "Between the spleen and the wall lies this organ",
        "The spleen's large neighbour that makes bile",
        "The spleen-sided organ that makes bile for us",
    ],
)
def test_landmarks_other_numbers_and_true_places_pass(text: str) -> None:
    assert check_description(text, "short", LIVER, NAMES) == []


@pytest.mark.parametrize(
    "question",
    [
        "Which spleen lies in this image here?",
        "Please find the spleen in this image.",
        "Could you show me the whole spleen here?",
        "Where is the left kidney in this image?",
        "Segment both of it: outline the left kidneys.",
        "Where in this image is the spleen?",
        "Where does the spleen lie in this image?",
        "Which of these organs is the spleen?",
        "Which organ here is called the spleen?",
        "Which organ in the upper part of this image is the spleen?",
        "This organ is the spleen; where is it?",
    ],
)
def test_a_question_for_another_object_is_caught(question: str) -> None:
    assert _asked(question) == {"names_other"}


@pytest.mark.parametrize(
    "question",
    [
        "Which organ lies to the left of the spleen?",
        "Which organ lies beside the spleen?",
        "Which organ is beside the spleen here?",
        "Which organ, whose neighbour is the spleen, makes bile?",
        "Where does the spleen touch an organ that makes bile?",
        "Find the organ between the spleen and the wall.",
        "Where is the spleen's large neighbour in this image?",
        "Show me what touches the left kidney and makes bile.",
        "I would like to see the organ that makes bile.",
        "This organ makes bile; please outline it.",
        "One organ makes bile - mark it.",
        "Reveal the organ that makes bile.",
        "The organ that makes bile should be outlined.",
        "I am after the organ that makes bile.",
    ],
)
def test_questions_and_requests_pass(question: str) -> None:
    assert _asked(question) == set()


@pytest.mark.parametrize(
    "question", ["The organ that makes bile for us.", "This organ makes bile, it finds rest here."]
)
def test_a_statement_is_not_a_question(question: str) -> None:
    assert _asked(question) == {"question"}


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ("It makes bile and stores sugar, as nobody else does here.", "answer_names_label"),
        ("Not the spleen but the liver makes bile and stores sugar here.", "answer_names_label"),
        ("It is the pancreas, which lies beside the liver and makes bile.", "answer_names_label"),
        ("It's the pancreas, because it lies beside the liver and makes bile.", "answer_names_label"),
        ("The organ shown is the pancreas beside the liver and the wall.", "answer_names_label"),
        ("It is not the liver but an organ that makes insulin here.", "answer_names_label"),
        ("It isn't the liver, though it makes bile and stores sugar.", "answer_names_label"),
        ("The liver.", "words"),
        ("It is the liver, " + "which makes bile " * 10, "words"),
        ("It is the liver at [10, 20, 30, 40], which makes bile for us.", "coordinates"),
        ("It is the liver in the lower half of the image, which makes bile.", "position"),
    ],
)
def test_each_rule_of_answers(answer: str, rule: str) -> None:
    assert _asked("Which large organ makes bile?", answer) == {rule}


def test_a_synonym_or_a_plural_names_the_label_but_the_other_side_does_not() -> None:
    assert _asked("Which large organ makes bile?", "Hepatic tissue is the only one that makes bile for us.") == set()
    kidney = placed_item("kidney_left", "kidney_right")
    question = "Which organ on the patient's left makes urine?"
    assert _asked(question, "It is the left kidney, which makes urine on its side.", kidney) == set()
    assert _asked(question, "It is the right kidney, which makes urine on its side.", kidney) == {"answer_names_label"}
    assert _asked(question, "It is the kidney on the left, which makes urine there.", kidney) == {"answer_names_label"}


@pytest.mark.parametrize(
    "answer",
    [
        "Beside the pancreas lies the liver, which makes bile for us.",
        "It is the liver, not the spleen, because it makes bile for us.",
        "The answer is the liver, because no other organ makes bile for us.",
    ],
)
def test_other_organs_may_help_to_explain(answer: str) -> None:
    assert _asked("Which large organ makes bile?", answer) == set()


def test_early_turns_do_not_give_the_target_away() -> None:
    assert _rules(check_turn("What is it?", "It is the liver.", LIVER, NAMES)) == {"names_target"}
    assert _rules(check_turn("This is a CT.", "Yes, it is one.", LIVER, NAMES)) == {"question"}
    assert _rules(check_turn("What is it?", "", LIVER, NAMES)) == {"words"}


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("Which organ lies at the top of this image?", "Which organ in the lower half of the image makes bile for us?"),
        ("The organ in the left half of the image", "The organ in the right half of the image that makes bile"),
        ("The organ at the top of the image", "The organ in the lower part of the image which makes bile"),
        ("The organ on the patient's left side", "The organ on the right side of the patient that makes bile"),
        ("The largest organ of them all here", "The organ that makes bile and is the smallest of all"),
        ("It is the liver, the organ that makes bile.", "It is the spleen, the organ that filters old blood."),
    ],
)
def test_short_and_long_must_not_contradict_each_other(short: str, long: str) -> None:
    assert _rules(check_same_target(short, long, LIVER, NAMES)) == {"same_target"}
    assert _rules(check_same_target(long, short, LIVER, NAMES)) == {"same_target"}
