"""The stages of an item, with an author that says what the test wants: rules, asking again, drops, conversations."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import REFUSAL
from made_up import an_item
from scripted import Author, keeping, recipe, run, usual

from data_gen.authors.client import Unreachable
from data_gen.core.calls import Reply, Request, canonical
from data_gen.core.items import Drop, Item
from data_gen.core.recipe import Outcome
from data_gen.ledger.ledger import Ledger
from data_gen.ledger.limits import ErrorBudget, StopRun
from data_gen.pipeline.asking import Asker
from data_gen.pipeline.stages import make


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "l.sqlite", create=True) as ledger:
        yield ledger


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return an_item(tmp_path, 0, 0, "liver")


def test_each_template_makes_four_pairs(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    author = Author(keeping)
    outcome = run(item, recipe(tmp_path), ledger, author)
    assert sorted(author.stages()) == sorted(2 * ["describe", "revise", "transform"])
    assert [pair.id for pair in outcome.pairs] == [
        f"{item.id}#{template}-{perspective}-{length}"
        for template in ("first", "second")
        for perspective in ("attribute", "location")
        for length in ("short", "long")
    ]
    assert not outcome.drops
    pair = outcome.pairs[1]
    assert (pair.perspective, pair.length, pair.author, pair.turn) == ("attribute", "long", "m", 0)
    assert pair.question.startswith("Which is the") and "liver" in pair.answer
    text = author.asked[0].body["messages"][1]["content"]
    assert "- liver: " in text and "- spleen: " in text and "Target: liver: 0.08, 0.09, 0.42, 0.47" in text


def test_variants_ask_for_something_else(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    author = Author(keeping)
    outcome = run(item, recipe(tmp_path, variants=3), ledger, author)
    assert len(outcome.pairs) == 24 and len({pair.question for pair in outcome.pairs}) == 24
    assert outcome.pairs[4].id.endswith("-short-2") and outcome.pairs[8].id.endswith("-short-3")


def test_nothing_is_asked_twice(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    first = run(item, recipe(tmp_path), ledger, Author(usual))
    silent = Author(lambda _: AssertionError("asked again"))
    assert run(item, recipe(tmp_path), ledger, silent) == first
    assert silent.asked == []


def test_two_items_that_ask_the_same_share_the_answer(ledger: Ledger, tmp_path: Path) -> None:
    items = [an_item(tmp_path, case, 0, "liver") for case in range(3)]
    author = Author(keeping)
    asker = Asker(ledger.answers, author, author)

    async def work() -> list[Outcome]:
        return list(await asyncio.gather(*(make(item, recipe(tmp_path), asker) for item in items)))

    outcomes = asyncio.run(work())
    assert len(author.asked) == 6
    assert len({tuple(pair.question for pair in outcome.pairs) for outcome in outcomes}) == 1


def test_what_breaks_a_rule_is_asked_for_again_with_the_reason(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        if request.stage == "describe" and not request.fields["attempt"]:
            said["attribute_short"] = "the liver that makes bile for us"
            said["attribute_long"] = "too short"
        elif request.stage == "describe":
            said["location_short"] = "far too short"  # was good before, so nobody looks at it again
        return said

    author = Author(say)
    outcome = run(item, recipe(tmp_path), ledger, author)
    assert author.stages().count("describe+") == 2 and "describe++" not in author.stages()
    assert len(outcome.pairs) == 8 and not outcome.drops
    again = next(each for each in author.asked if each.fields["attempt"])
    reasons = again.body["messages"][-1]["content"]
    assert '"liver" gives the target away' in reasons and "2 words; write 10 to 20" in reasons
    revised = next(each for each in author.asked if each.stage == "revise")
    assert "far too short" not in str(revised.body)


def test_what_keeps_breaking_a_rule_is_dropped_with_its_reason(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        if request.stage == "describe":
            said["location_long"] = "the structure at (0.1, 0.2) which is left of many other things in this image"
        if request.stage == "transform":
            for pair in said["pairs"]:
                if pair["cell"] == "attribute-long":
                    pair["answer"] = "It is the spleen, because the spleen does all of what is asked for here."
        return said

    author = Author(say)
    outcome = run(item, recipe(tmp_path, again=1), ledger, author)
    assert [(drop.stage, drop.rule, drop.pair.partition("#")[2]) for drop in outcome.drops] == [
        (stage, rule, f"{template}-{cell}")
        for template in ("first", "second")
        for stage, rule, cell in (
            ("describe", "coordinates", "location-long"),
            ("transform", "answer_names_label", "attribute-long"),
        )
    ]
    assert len(outcome.pairs) == 4
    assert author.stages().count("describe+") == 2 and "describe++" not in author.stages()


def test_short_and_long_must_say_the_same(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        if request.stage == "describe":
            said["attribute_short"] = "the largest of all the organs in this scan"
            said["attribute_long"] = "the smallest of all the organs that anybody could ever find in this kind of scan"
        return said

    outcome = run(item, recipe(tmp_path, again=0), ledger, Author(say))
    assert [(drop.rule, drop.pair.partition("#")[2]) for drop in outcome.drops] == [
        ("same_target", "first-attribute-long"),
        ("same_target", "second-attribute-long"),
    ], "the long one answers for it"


def test_short_and_long_questions_must_ask_for_the_same(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    asked = {
        "attribute-short": "Which of them is the largest organ here?",
        "attribute-long": "Which is the smallest of all the organs that anybody could find in this scan?",
    }

    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        if request.stage == "transform":
            for pair in said["pairs"]:
                pair["question"] = asked.get(pair["cell"], pair["question"])
        return said

    outcome = run(item, recipe(tmp_path, again=0), ledger, Author(say))
    assert [(drop.stage, drop.rule, drop.pair.partition("#")[2]) for drop in outcome.drops] == [
        ("transform", "same_target", "first-attribute-long"),
        ("transform", "same_target", "second-attribute-long"),
    ], "the long one answers for it"


def test_the_evaluator_keeps_revises_and_removes(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    new = "the organ that stores sugar and makes bile"

    def say(request: Request) -> dict[str, Any]:
        if request.stage != "revise":
            return keeping(request)
        said = {
            "attribute-short": ("revise", new, "clearer"),
            "attribute-long": ("keep", "something else that nobody wants", "good"),
            "location-short": ("remove", "", "too simple"),
            "location-long": ("revise", "", "wrong"),
        }
        return {
            "descriptions": [
                {"cell": cell, "verdict": verdict, "text": text, "reason": reason}
                for cell, (verdict, text, reason) in said.items()
            ]
        }

    author = Author(say)
    outcome = run(item, recipe(tmp_path), ledger, author)
    told = [each.fields["descriptions"] for each in author.asked if each.stage == "transform"]
    assert [list(each) for each in told] == [["attribute-short", "attribute-long"]] * 2
    described = next(each.fields["descriptions"] for each in author.asked if each.stage == "revise")
    assert told[0] == {"attribute-short": new, "attribute-long": described["attribute-long"]}, "kept is kept"
    assert {(drop.rule, drop.reason) for drop in outcome.drops} == {("removed", "too simple"), ("removed", "wrong")}
    assert len(outcome.pairs) == 4


def test_all_removed_leaves_nothing_to_transform(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        for each in said.get("descriptions", []):
            each["verdict"] = "remove"
        return said

    author = Author(say)
    outcome = run(item, recipe(tmp_path), ledger, author)
    assert not outcome.pairs and len(outcome.drops) == 8 and "transform" not in author.stages()


@pytest.mark.parametrize("wrong", ["missing", "twice"])
def test_every_cell_is_answered_once(ledger: Ledger, item: Item, tmp_path: Path, wrong: str) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        if request.stage == "transform":
            said["pairs"] = said["pairs"][:-1] if wrong == "missing" else [*said["pairs"][:-1], said["pairs"][0]]
        return said

    outcome = run(item, recipe(tmp_path, again=1), ledger, Author(say))
    assert not outcome.pairs and {drop.rule for drop in outcome.drops} == {"cells"} and len(outcome.drops) == 8


@pytest.mark.parametrize(
    ("reply", "sends", "rule"),
    [
        (Reply(status="ok", text="{"), 4 * 3, "malformed"),
        (Reply(status="truncated", text="{", why="cut"), 4 * 3, "truncated"),
        (Reply(status="refused", text="no", why="refused"), 4, "refused"),
        (Reply(status="filtered", text="", why="filter"), 4, "filtered"),
        (Reply(status="rejected", text="", why="too long"), 1, "rejected"),
    ],
)
def test_answers_of_no_use_are_tried_again_then_dropped(
    ledger: Ledger, item: Item, tmp_path: Path, reply: Reply, sends: int, rule: str
) -> None:
    """Four attempts each; a refusal is not argued with, a faulty form is asked for again with the reason.

    What the server does not take it would not take the next time either.
    """
    author = Author(lambda _: reply)
    outcome = run(item, recipe(tmp_path), ledger, author, budget=ErrorBudget(in_a_row=1000))
    assert len(author.asked) == 2 * sends
    assert {drop.rule for drop in outcome.drops} == {rule} and len(outcome.drops) == 8
    silent = Author(lambda _: AssertionError("asked again"))
    assert run(item, recipe(tmp_path), ledger, silent) == outcome, "attempts that are used up are used up for good"


def test_a_bad_attempt_costs_nothing_but_itself(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    """The same request again brings what it would have brought at once: the outcome is that of a calm run."""
    seen: dict[str, int] = {}

    def say(request: Request) -> dict[str, Any] | Reply:
        seen[request.key] = seen.get(request.key, 0) + 1
        return Reply(status="refused", text="no", why="no") if seen[request.key] < 3 else usual(request)

    stormy = run(item, recipe(tmp_path), ledger, Author(say))
    with Ledger(tmp_path / "calm.sqlite", create=True) as calm:
        assert run(item, recipe(tmp_path), calm, Author(usual)) == stormy
    assert {count.stage: count.answers // count.requests for count in ledger.answers.counts()} == {
        "describe": 3,
        "revise": 3,
        "transform": 3,
    }


def test_an_unreachable_server_leaves_the_item_open(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any] | Exception:
        return Unreachable("status 500") if request.stage == "revise" else usual(request)

    with pytest.raises(Unreachable):
        run(item, recipe(tmp_path), ledger, Author(say))
    author = Author(usual)
    assert run(item, recipe(tmp_path), ledger, author).pairs
    assert "describe" not in author.stages()


def test_the_budget_of_errors_ends_a_run(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    author = Author(lambda _: Reply(status="ok", text="{"))
    with pytest.raises(StopRun, match=r"2 calls in a row failed.*malformed"):
        run(item, recipe(tmp_path), ledger, author, budget=ErrorBudget(in_a_row=2))


def test_captions_are_asked_for_and_told(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        if request.stage == "caption":
            return {"caption": "It may be a belly." if not request.fields["attempt"] else "A slice of the belly."}
        return usual(request)

    author = Author(say)
    run(item, recipe(tmp_path, captioner="v"), ledger, author)
    assert author.stages()[:2] == ["caption", "caption+"] and author.asked[0].body["model"] == "v"
    assert 'leave out "may"' in author.asked[1].body["messages"][-1]["content"]
    assert "Caption: A slice of the belly." in author.asked[2].body["messages"][1]["content"]


def test_an_image_without_a_good_caption_goes_without(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        return {"caption": "perhaps"} if request.stage == "caption" else usual(request)

    outcome = run(item, recipe(tmp_path, captioner="v"), ledger, Author(say))
    assert outcome.pairs and (outcome.drops[0].stage, outcome.drops[0].rule) == ("caption", "uncertain")


@pytest.mark.parametrize("form", ["{}", '{{"caption": "{}"}}', '{{"error": "{}"}}', "```json\n{{'caption': {}}}\n```"])
@pytest.mark.parametrize("mode", ["strict", "none"])
def test_a_caption_that_refuses_is_in_no_prompt(
    ledger: Ledger, item: Item, tmp_path: Path, form: str, mode: str
) -> None:
    def say(request: Request) -> dict[str, Any] | Reply:
        return Reply(status="ok", text=form.format(REFUSAL)) if request.stage == "caption" else usual(request)

    author = Author(say)
    outcome = run(item, recipe(tmp_path, captioner="v", caption_mode=mode), ledger, author)
    assert outcome.pairs and (outcome.drops[0].stage, outcome.drops[0].rule) == ("caption", "refused")
    later = [each for each in author.asked if each.stage != "caption"]
    assert later and not any("sorry" in str(each.body) for each in later)
    assert all("Caption: none" in str(each.body) for each in later if each.stage != "transform")


def test_a_given_caption_that_refuses_is_dropped(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    author = Author(usual)
    outcome = run(item, recipe(tmp_path, captions={item.record: REFUSAL}), ledger, author)
    assert outcome.drops[0].rule == "refused" and "sorry" not in str([each.body for each in author.asked])


def test_a_caption_that_an_older_ledger_took_for_good_is_not_used(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    author = Author(lambda request: {"caption": "A belly."} if request.stage == "caption" else usual(request))
    run(item, recipe(tmp_path, captioner="v"), ledger, author)
    ledger._store.execute(
        "UPDATE answers SET text=? WHERE text LIKE '%belly%'", canonical({"caption": REFUSAL})
    ).result()
    again = Author(usual)
    run(item, recipe(tmp_path, captioner="v"), ledger, again)
    assert again.asked and "sorry" not in str([each.body for each in again.asked])


@pytest.mark.parametrize("stage", ["describe", "revise", "transform"])
def test_a_refusal_in_words_becomes_no_text(ledger: Ledger, item: Item, tmp_path: Path, stage: str) -> None:
    """One cell refuses, and stays so; the others are kept."""

    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        if request.stage == stage == "describe":
            said["attribute_short"] = REFUSAL
        elif request.stage == stage == "revise":
            said["descriptions"][0] |= {"verdict": "revise", "text": REFUSAL}
        elif request.stage == stage:
            said["pairs"][0]["answer"] = f"As an AI, I cannot say that it is the liver. {REFUSAL}"
        return said

    outcome = run(item, recipe(tmp_path, again=1), ledger, Author(say))
    assert [(drop.stage, drop.rule, drop.pair.partition("#")[2]) for drop in outcome.drops] == [
        (stage, "refused", "first-attribute-short"),
        (stage, "refused", "second-attribute-short"),
    ]
    assert len(outcome.pairs) == 6 and "sorry" not in str(outcome.pairs)


def test_an_evaluator_that_refuses_removes_nothing(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        if request.stage == "revise" and not request.fields["attempt"]:
            said["descriptions"] = [{**each, "verdict": "remove", "reason": REFUSAL} for each in said["descriptions"]]
        return said

    outcome = run(item, recipe(tmp_path), ledger, Author(say))
    assert len(outcome.pairs) == 8 and not outcome.drops


def test_a_conversation_that_refuses_is_dropped(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = usual(request)
        said["turns"][0]["answer"] = REFUSAL
        return said

    outcome = run(item, recipe(tmp_path, style="multi-turn", again=1), ledger, Author(say))
    assert not outcome.pairs and outcome.drops[0].rule == "refused" and "turn 1" in outcome.drops[0].reason


@pytest.mark.parametrize("token", ["[SEG]", "[BBOX]", "<image>", "</s>", "[INST]", "<|im_end|>"])
def test_special_tokens_become_no_text(ledger: Ledger, item: Item, tmp_path: Path, token: str) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        for pair in said.get("pairs", []):
            pair["answer"] = pair["answer"].replace(".", f" {token}.")
        return said

    outcome = run(item, recipe(tmp_path, again=0), ledger, Author(say))
    assert not outcome.pairs and {drop.rule for drop in outcome.drops} == {"special_token"}
    assert token in outcome.drops[0].reason


def test_a_word_without_an_end_is_too_long(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = keeping(request)
        for pair in said.get("pairs", []):
            pair["answer"] += f" {'a' * 5000}"
        return said

    outcome = run(item, recipe(tmp_path, again=0), ledger, Author(say))
    assert not outcome.pairs and "characters; write at most 375" in outcome.drops[0].reason


def test_refusals_in_words_use_up_the_budget_of_errors(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    author = Author(lambda request: dict.fromkeys(usual(request), REFUSAL))
    with pytest.raises(StopRun, match=r"calls in a row failed.*refused"):
        run(item, recipe(tmp_path), ledger, author, budget=ErrorBudget(in_a_row=2))


def test_thoughts_are_neither_stored_nor_sent_again(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> Reply:
        said = keeping(request)
        if request.stage == "describe" and not request.fields["attempt"]:
            said["attribute_short"] = "too short"
        return Reply(status="ok", text=f"<think>A {{zebra}}.</think>{json.dumps(said)}")

    author = Author(say)
    assert len(run(item, recipe(tmp_path), ledger, author).pairs) == 8
    assert any(each.fields["attempt"] for each in author.asked)
    assert "zebra" not in str([each.body for each in author.asked])
    assert ledger._store.read("SELECT 1 FROM answers WHERE text LIKE '%zebra%'") == []


def test_given_captions_win(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    author = Author(usual)
    run(item, recipe(tmp_path, captioner="v", captions={item.record: "A belly."}), ledger, author)
    assert "caption" not in author.stages()
    assert "Caption: A belly." in author.asked[0].body["messages"][1]["content"]


def test_conversations_end_at_the_target(ledger: Ledger, tmp_path: Path) -> None:
    items = [an_item(tmp_path, case, 0, "liver") for case in range(12)]
    author = Author(usual)
    outcomes = [run(item, recipe(tmp_path, style="multi-turn"), ledger, author) for item in items]
    lengths = {len(outcome.pairs) for outcome in outcomes}
    assert lengths == {2, 3, 4}
    assert len({(pairs[0].perspective, pairs[0].length) for pairs in (outcome.pairs for outcome in outcomes)}) == 4
    pairs = outcomes[0].pairs
    assert [pair.turn for pair in pairs] == list(range(1, len(pairs) + 1))
    assert {pair.conversation for pair in pairs} == {pairs[0].id.removesuffix("-t1")}
    assert "liver" in pairs[-1].answer and not any("liver" in pair.question for pair in pairs)


def test_a_conversation_that_gives_the_target_away_is_dropped(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    def say(request: Request) -> dict[str, Any]:
        said = usual(request)
        said["turns"][0]["answer"] = "It shows the liver and more."
        return said

    outcome = run(item, recipe(tmp_path, style="multi-turn", again=1), ledger, Author(say))
    assert not outcome.pairs and outcome.drops[0].rule == "names_target" and "turn 1" in outcome.drops[0].reason
    author = Author(lambda request: {"turns": usual(request)["turns"][:1]})
    outcome = run(an_item(tmp_path, 7, 1, "spleen"), recipe(tmp_path, style="multi-turn", again=1), ledger, author)
    assert outcome.drops[0].rule == "turns"


def test_an_outcome_is_stored_once(ledger: Ledger, item: Item, tmp_path: Path) -> None:
    outcome = run(item, recipe(tmp_path), ledger, Author(keeping))
    ledger.add_items([item], tmp_path, complete=True)
    ledger.finish(item.id, "single", outcome.pairs, []).result()
    ledger.mark_deduplicated([], [])
    ledger.finish(item.id, "single", [], [Drop(item.id, "revise", "removed", "late")]).result()
    assert ledger.is_deduplicated() and len(ledger.pairs()) == 8 and not ledger.drops()
