"""The stages of one item: caption, describe, revise, transform (or converse). Read this file to see how a pair is made.

The code follows section 3 of the paper: four descriptions of the target by each of two templates, checked by an
evaluator, turned into questions with explanatory answers. Every answer is judged by rules; what breaks one is asked for
again with the reasons, at most `Recipe.again` times, and then dropped with its reason.

What becomes of an item depends on the recipe and on the answers only, so it can be made again at any time from a ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any, cast

from pydantic import BaseModel

from data_gen.core.calls import Fault
from data_gen.core.items import TEMPLATES, Drop, Item, Pair, length_of, perspective_of
from data_gen.core.recipe import Outcome, Recipe, fields_of, pair_id, request_of
from data_gen.core.schemas import (
    CELLS,
    Caption,
    CellPair,
    CellPairs,
    Conversation,
    ConversationTurn,
    Descriptions,
    Revision,
    Revisions,
)
from data_gen.pipeline.asking import Ask, Validated, ask_until_valid
from data_gen.rules import checks as rules
from data_gen.rules.refusals import refuses
from medisee.records.records import LENGTHS, PERSPECTIVES

CAPTION_WORDS = 80
_HEDGES = re.compile(r"\b(may|might|could|possibl[ey]|probabl[ey]|perhaps|likely|appears?|seems?|suggests?)\b", re.I)


async def make(item: Item, recipe: Recipe, ask: Ask) -> Outcome:
    """Makes the pairs of an item, in the style of the recipe."""
    drops: list[Drop] = []
    caption = await _caption(item, recipe, ask, drops)
    if recipe.style == "multi-turn":
        return Outcome(await _converse(item, recipe, ask, caption=caption, drops=drops), drops)
    passes = [
        _one_pass(item, recipe, ask, fields_of(item, recipe.names, caption, template=template, variant=variant))
        for template in TEMPLATES
        for variant in range(1, recipe.variants + 1)
    ]
    pairs: list[Pair] = []
    # All of them run to their end, so that no answer under way is lost when one fails.
    for outcome in await asyncio.gather(*passes, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
        pairs += outcome.pairs
        drops += outcome.drops
    return Outcome(pairs, drops)


async def _caption(item: Item, recipe: Recipe, ask: Ask, drops: list[Drop]) -> str:
    """Returns the caption; empty when there is none. An item without a caption still has its labels."""
    given = recipe.captions.get(item.record, "")
    if given or recipe.captioner is None:
        refused = _judge_refusal("", given)
        drops += [Drop(item.id, "caption", fault.rule, fault.reason) for fault in refused]
        return "" if refused else given

    def judge(value: BaseModel, _: dict[str, Any]) -> list[Fault]:
        text = cast(Caption, value).caption
        hedges = sorted({found.group().lower() for found in _HEDGES.finditer(text)})
        faults = _judge_refusal("", text)
        faults += [Fault("", "uncertain", f'leave out "{hedge}": say only what is certain') for hedge in hedges]
        words = len(text.split())
        if not 1 <= words <= CAPTION_WORDS:
            faults.append(Fault("", "words", f"the caption has {words} words; write 1 to {CAPTION_WORDS}"))
        return faults

    found = await ask_until_valid(
        request_of("caption", fields_of(item, recipe.names, ""), recipe, item),
        ["caption"],
        judge,
        lambda value: {"caption": cast(Caption, value).caption.strip()},
        ask=ask,
        again=recipe.again,
    )
    drops += [Drop(item.id, "caption", fault.rule, fault.reason) for fault in found.faults[:1]]
    caption = found.parts.get("caption", "")
    return "" if refuses(caption) else caption  # which an older ledger may have as a good answer


async def _one_pass(item: Item, recipe: Recipe, ask: Ask, fields: dict[str, Any]) -> Outcome:
    """Makes the pairs of one template and variant: describe, revise and filter, transform."""
    template, variant = fields["template"], fields["variant"]
    drops: list[Drop] = []
    cells: list[str] = list(CELLS)
    parts: dict[str, Any] = {}
    for stage, step in (("describe", _describe), ("revise", _revise), ("transform", _transform)):
        found = await step(item, recipe, ask, fields)
        for cell in cells:
            if cell not in found.parts:
                fault = next(fault for fault in found.faults if fault.cell in (cell, ""))
                drops.append(Drop(item.id, stage, fault.rule, fault.reason, pair_id(item.id, template, cell, variant)))
        parts, cells = found.parts, list(found.parts)
        if not parts:
            break
        fields = {**fields, "descriptions": parts}
    pairs = [
        Pair(
            id=pair_id(item.id, template, cell, variant),
            item=item.id,
            template=template,
            perspective=perspective_of(cell),
            length=length_of(cell),
            question=part.question.strip(),
            answer=part.answer.strip(),
            author=recipe.model,
        )
        for cell, part in parts.items()
    ]
    return Outcome(pairs, drops)


async def _describe(item: Item, recipe: Recipe, ask: Ask, fields: dict[str, Any]) -> Validated:
    def texts(value: BaseModel) -> dict[str, str]:
        return {cell: cast(Descriptions, value).text(cell).strip() for cell in CELLS}

    def judge(value: BaseModel, good: dict[str, Any]) -> list[Fault]:
        return _judge_descriptions({**texts(value), **good}, good, item, recipe)

    request = request_of("describe", fields, recipe, item)
    return await ask_until_valid(request, list(CELLS), judge, texts, ask=ask, again=recipe.again)


async def _revise(item: Item, recipe: Recipe, ask: Ask, fields: dict[str, Any]) -> Validated:
    """Returns the descriptions as the evaluator leaves them; those that it removes are missing, with its reason."""
    before: dict[str, str] = fields["descriptions"]
    removed: dict[str, str] = {}

    def text_of(revision: Revision) -> str:
        if revision.verdict == "keep":
            return before[revision.cell]  # whatever the evaluator repeats
        return "" if revision.verdict == "remove" else revision.text.strip()

    def texts(value: BaseModel) -> dict[str, str]:
        revisions = cast(Revisions, value).descriptions
        for revision in revisions:
            if not text_of(revision) and revision.reason and not refuses(revision.reason):
                removed.setdefault(revision.cell, revision.reason)
        return {revision.cell: text_of(revision) for revision in revisions}

    def judge(value: BaseModel, good: dict[str, Any]) -> list[Fault]:
        revisions = cast(Revisions, value).descriptions
        if faults := _judge_cells([revision.cell for revision in revisions], list(before)):
            return faults
        removing = [each for each in revisions if each.cell not in good and not text_of(each)]
        faults = [fault for each in removing for fault in _judge_refusal(each.cell, each.reason)]
        left = {**{revision.cell: text_of(revision) for revision in revisions}, **good}
        return faults + _judge_descriptions({cell: text for cell, text in left.items() if text}, good, item, recipe)

    request = request_of("revise", fields, recipe, item)
    found = await ask_until_valid(request, list(before), judge, texts, ask=ask, again=recipe.again)
    reasons = {cell: removed.get(cell, "the evaluator gave no reason") for cell in found.parts}
    faults = [Fault(cell, "removed", reasons[cell]) for cell, text in found.parts.items() if not text]
    return Validated({cell: text for cell, text in found.parts.items() if text}, (*faults, *found.faults))


async def _transform(item: Item, recipe: Recipe, ask: Ask, fields: dict[str, Any]) -> Validated:
    cells = list(fields["descriptions"])

    def parts(value: BaseModel) -> dict[str, CellPair]:
        return {each.cell: each for each in cast(CellPairs, value).pairs}

    def judge(value: BaseModel, good: dict[str, Any]) -> list[Fault]:
        if faults := _judge_cells([each.cell for each in cast(CellPairs, value).pairs], cells):
            return faults
        pairs: dict[str, CellPair] = {**parts(value), **good}
        faults = [
            Fault(cell, breach.rule, breach.reason)
            for cell, pair in pairs.items()
            if cell not in good
            for breach in rules.check_pair(pair.question, pair.answer, length_of(cell), item, recipe.names)
        ]
        return faults + _judge_same_target({cell: pair.question for cell, pair in pairs.items()}, good, item, recipe)

    request = request_of("transform", fields, recipe, item)
    return await ask_until_valid(request, cells, judge, parts, ask=ask, again=recipe.again)


def _judge_refusal(cell: str, text: str) -> list[Fault]:
    return [Fault(cell, "refused", "the text refuses to answer; write what is asked for")] if refuses(text) else []


def _judge_cells(found: list[Any], wanted: list[str]) -> list[Fault]:
    if sorted(found) == sorted(wanted):
        return []
    listed = ", ".join(found) or "none"
    return [Fault("", "cells", f"the entries have the cells {listed}; write one entry for each of {', '.join(wanted)}")]


def _judge_descriptions(texts: dict[str, str], good: dict[str, Any], item: Item, recipe: Recipe) -> list[Fault]:
    faults = [
        Fault(cell, breach.rule, breach.reason)
        for cell, text in texts.items()
        if cell not in good
        for breach in rules.check_description(text, length_of(cell), item, recipe.names)
    ]
    return faults + _judge_same_target(texts, good, item, recipe)


def _judge_same_target(texts: dict[str, str], good: dict[str, Any], item: Item, recipe: Recipe) -> list[Fault]:
    """Finds short and long texts that contradict each other; the long one is at fault, unless it is good already."""
    faults: list[Fault] = []
    for perspective in PERSPECTIVES:
        short, long = f"{perspective}-short", f"{perspective}-long"
        if short in texts and long in texts and not {short, long} <= good.keys():
            at_fault = long if long not in good else short
            breaches = rules.check_same_target(texts[short], texts[long], item, recipe.names)
            faults += [Fault(at_fault, breach.rule, breach.reason) for breach in breaches]
    return faults


async def _converse(item: Item, recipe: Recipe, ask: Ask, *, caption: str, drops: list[Drop]) -> list[Pair]:
    """Makes one conversation of 2 to 4 turns, the last of which asks for the target in a drawn perspective and length.

    The form is that of MedSeg-QA (MedSeg-R, arXiv 2506.10465): from the image as a whole to one structure and its mask.
    """
    draw = int.from_bytes(hashlib.sha256(f"{recipe.seed} {item.id}".encode()).digest()[:8], "big")
    turns = 2 + draw % 3
    perspective, length = PERSPECTIVES[draw // 3 % 2], LENGTHS[draw // 6 % 2]
    fields = fields_of(item, recipe.names, caption)
    fields |= {"turns": turns, "perspective": perspective, "length": length}

    def judge(value: BaseModel, _: dict[str, Any]) -> list[Fault]:
        found = cast(Conversation, value).turns
        if len(found) != turns:
            return [Fault("", "turns", f"the conversation has {len(found)} turns; write exactly {turns}")]
        breaches = [
            (number, breach)
            for number, turn in enumerate(found[:-1], 1)
            for breach in rules.check_turn(turn.question, turn.answer, item, recipe.names)
        ]
        last = rules.check_pair(found[-1].question, found[-1].answer, length, item, recipe.names)
        breaches += [(turns, breach) for breach in last]
        return [Fault("", breach.rule, f"turn {number}: {breach.reason}") for number, breach in breaches]

    valid = await ask_until_valid(
        request_of("converse", fields, recipe, item),
        ["turns"],
        judge,
        lambda value: {"turns": cast(Conversation, value).turns},
        ask=ask,
        again=recipe.again,
    )
    identity = pair_id(item.id, "first", f"{perspective}-{length}", 1)
    drops += [Drop(item.id, "converse", fault.rule, fault.reason, identity) for fault in valid.faults[:1]]
    made: list[ConversationTurn] = valid.parts.get("turns", [])
    return [
        Pair(
            id=f"{identity}-t{number}",
            item=item.id,
            template="first",
            perspective=perspective,
            length=length,
            question=turn.question.strip(),
            answer=turn.answer.strip(),
            turn=number,
            conversation=identity,
            author=recipe.model,
        )
        for number, turn in enumerate(made, 1)
    ]
