"""What decisions make of pairs: one reviewer, two who disagree, conversations, repeats."""

from __future__ import annotations

import pytest

from data_gen.core.items import Decision, Pair, Verdict
from data_gen.ledger.screening import OUTCOMES, screen


def a_pair(name: str, question: str = "Which organ makes bile?", talk: str | None = None, turn: int = 0) -> Pair:
    return Pair(
        id=name,
        item="r/t",
        template="first",
        perspective="attribute",
        length="short",
        question=question,
        answer="The liver.",
        turn=turn,
        conversation=talk,
        author="m",
    )


def edit(reviewer: str, question: str) -> Decision:
    return Decision("p", reviewer, "edit", "", question, "The liver does.")


@pytest.mark.parametrize(
    ("decisions", "outcome"),
    [
        ([], "unscreened"),
        ([Decision("p", "a", "accept")], "accepted"),
        ([Decision("p", "a", "reject", "wrong")], "rejected"),
        ([Decision("p", "a", "accept"), Decision("p", "b", "reject", "wrong")], "rejected"),
        ([edit("a", "What makes bile?"), Decision("p", "b", "reject", "wrong")], "rejected"),
        ([edit("a", "What makes bile?"), Decision("p", "b", "accept")], "edited"),
        ([edit("a", "What makes bile?"), edit("b", "What makes bile? ")], "edited"),
        ([edit("a", "What makes bile?"), edit("b", "Who makes bile?")], "disagreed"),
        ([Decision("other", "a", "reject", "wrong")], "unscreened"),
    ],
)
def test_what_becomes_of_a_pair(decisions: list[Decision], outcome: str) -> None:
    screening = screen([a_pair("p")], decisions)
    assert {name for name, count in screening.counts.items() if count} == {outcome}
    assert screening.counts.keys() == set(OUTCOMES)
    assert len(screening.pairs) == (outcome in ("unscreened", "accepted", "edited"))
    assert screening.judged == (outcome != "unscreened")


@pytest.mark.parametrize(
    "question", ["I'm sorry, but I can't help with that.", "Which organ [SEG] makes bile?", "</s> Which organ is it?"]
)
def test_what_training_would_not_take_is_left_out(question: str) -> None:
    """Older ledgers may hold such pairs; a person's edit mends one."""
    screening = screen([a_pair("p", question)], [Decision("p", "a", "accept")])
    assert screening.pairs == () and screening.counts["unusable"] == 1
    assert len(screen([a_pair("p", question)], [edit("a", "What makes bile?")]).pairs) == 1
    talk = [a_pair("t1", question, "talk", 1), a_pair("t2", "Which organ?", "talk", 2)]
    assert screen(talk, []).pairs == () and screen(talk, []).counts["cut"] == 1


def test_edited_words_go_in() -> None:
    (one,) = screen([a_pair("p")], [edit("a", "What makes bile?")]).pairs
    assert (one.pair.question, one.pair.answer, one.outcome) == ("What makes bile?", "The liver does.", "edited")


def test_screened_only_leaves_out_what_nobody_judged() -> None:
    pairs = [a_pair("p"), a_pair("q", "Which organ is largest?")]
    screening = screen(pairs, [Decision("q", "a", "accept")], screened_only=True)
    assert [one.pair.id for one in screening.pairs] == ["q"]
    assert screening.counts["unscreened"] == 1


@pytest.mark.parametrize("verdict", ["reject", "accept"])
def test_a_conversation_stays_or_goes_as_a_whole(verdict: Verdict) -> None:
    pairs = [a_pair(f"t{n}", f"Question {n}?", "talk", n) for n in (1, 2, 3)] + [a_pair("alone")]
    screening = screen(pairs, [Decision("t2", "a", verdict, "why")])
    kept = [one.pair.id for one in screening.pairs]
    assert kept == (["t1", "t2", "t3", "alone"] if verdict == "accept" else ["alone"])
    assert screening.counts["cut"] == (0 if verdict == "accept" else 2)


def test_with_screened_only_every_turn_must_have_been_judged() -> None:
    pairs = [a_pair(f"t{n}", f"Question {n}?", "talk", n) for n in (1, 2)]
    assert not screen(pairs, [Decision("t2", "a", "accept")], screened_only=True).pairs
    both = [Decision(f"t{n}", "a", "accept") for n in (1, 2)]
    assert len(screen(pairs, both, screened_only=True).pairs) == 2


def test_an_edit_that_repeats_another_pair_goes() -> None:
    pairs = [a_pair("a", "What makes bile?"), a_pair("p")]
    screening = screen(pairs, [edit("r", "what  makes BILE?")])
    assert [one.pair.id for one in screening.pairs] == ["a"]
    assert screening.counts["repeated"] == 1
