"""The stages of one item: caption, describe, revise, transform (or converse). Read this file to see how a pair is made.

The code follows section 3 of the paper's data set: four descriptions of the target by each of two templates, checked by
an evaluator, turned into questions with explanatory answers. Every answer is judged by rules; what breaks one is asked
for again with the reasons, `Recipe.again` times at most, and dropped with its reason after that.

What is made of an item depends on the recipe and on the answers only. So it can be done anew at any time from a ledger.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

from pydantic import BaseModel

from data_gen.core.calls import Fault
from data_gen.core.items import PERSPECTIVES, TEMPLATES, Drop, Item, Pair, length_of, perspective_of
from data_gen.core.names import Names
from data_gen.core.recipe import Outcome, Recipe, fields_of, pair_id, request_of
from data_gen.core.schemas import CELLS, Caption, Cell, CellPair, CellPairs, Descriptions, Revision, Revisions
from data_gen.pipeline.asking import Ask
from data_gen.pipeline.conversations import converse
from data_gen.pipeline.retry import Filled, fill, in_order
from data_gen.rules import checks as rules
from data_gen.rules.checks import Breach

CAPTION_WORDS = 80
_HEDGES = re.compile(r"\b(may|might|could|possibl[ey]|probabl[ey]|perhaps|likely|appears?|seems?|suggests?)\b", re.I)


async def make(item: Item, recipe: Recipe, ask: Ask) -> Outcome:
    """Makes the pairs of an item, in the style of the recipe."""
    drops: list[Drop] = []
    caption = await _caption(item, recipe, ask, drops)
    if recipe.style == "multi-turn":
        return Outcome(await converse(item, recipe, ask, caption=caption, drops=drops), drops)
    passes = [
        _one_pass(item, recipe, ask, fields_of(item, recipe.names, caption, template=template, variant=variant))
        for template in TEMPLATES
        for variant in range(1, recipe.variants + 1)
    ]
    # All of them run to their end, so that no answer under way is lost when one fails.
    made = await asyncio.gather(*passes, return_exceptions=True)
    outcomes: list[Outcome] = []
    for each in made:
        if isinstance(each, BaseException):
            raise each
        outcomes.append(each)
    return Outcome(
        [pair for each in outcomes for pair in each.pairs], [*drops, *(d for e in outcomes for d in e.drops)]
    )


async def _caption(item: Item, recipe: Recipe, ask: Ask, drops: list[Drop]) -> str:
    """Returns the caption; empty when there is none. An item without a caption still has its labels."""
    if item.record in recipe.captions:
        return recipe.captions[item.record]
    if recipe.captioner is None:
        return ""

    def judge(value: BaseModel, _: dict[str, Any]) -> list[Fault]:
        text = cast(Caption, value).caption
        words = len(text.split())
        faults = [Fault("", "uncertain", f'leave out "{found}": say only what is certain') for found in _hedges(text)]
        if not 1 <= words <= CAPTION_WORDS:
            faults.append(Fault("", "words", f"the caption has {words} words; write 1 to {CAPTION_WORDS}"))
        return faults

    filled = await fill(
        request_of("caption", fields_of(item, recipe.names, ""), recipe, item),
        ["caption"],
        judge,
        lambda value: {"caption": cast(Caption, value).caption.strip()},
        ask=ask,
        again=recipe.again,
    )
    drops += [Drop(item.id, "caption", fault.rule, fault.reason) for fault in filled.faults[:1]]
    return filled.parts.get("caption", "")


def _hedges(text: str) -> list[str]:
    return sorted({found.group().lower() for found in _HEDGES.finditer(text)})


async def _one_pass(item: Item, recipe: Recipe, ask: Ask, fields: dict[str, Any]) -> Outcome:
    """Makes the pairs of one template and variant: describe, revise and filter, transform."""
    template, variant = fields["template"], fields["variant"]
    drops: list[Drop] = []

    def drop(stage: str, filled: Filled, cells: list[str]) -> None:
        for cell in cells:
            if cell not in filled.parts:
                fault = next(fault for fault in filled.faults if fault.cell in (cell, ""))
                drops.append(Drop(item.id, stage, fault.rule, fault.reason, pair_id(item.id, template, cell, variant)))

    cells: list[str] = list(CELLS)
    described = await _describe(item, recipe, ask, fields)
    drop("describe", described, cells)
    if not described.parts:
        return Outcome([], drops)
    fields = {**fields, "descriptions": in_order(described.parts)}
    revised = await _revise(item, recipe, ask, fields)
    drop("revise", revised, list(described.parts))
    texts = in_order({cell: text for cell, text in revised.parts.items() if text})
    if not texts:
        return Outcome([], drops)
    fields = {**fields, "descriptions": texts}
    transformed = await _transform(item, recipe, ask, fields)
    drop("transform", transformed, list(texts))
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
        for cell, part in in_order(transformed.parts).items()
    ]
    return Outcome(pairs, drops)


async def _describe(item: Item, recipe: Recipe, ask: Ask, fields: dict[str, Any]) -> Filled:
    def texts(value: BaseModel) -> dict[str, str]:
        return {cell: cast(Descriptions, value).text(cell).strip() for cell in CELLS}

    def judge(value: BaseModel, good: dict[str, Any]) -> list[Fault]:
        return _judge_texts({**texts(value), **good}, good, item, recipe.names)

    asked = request_of("describe", fields, recipe, item)
    return await fill(asked, list(CELLS), judge, texts, ask=ask, again=recipe.again)


async def _revise(item: Item, recipe: Recipe, ask: Ask, fields: dict[str, Any]) -> Filled:
    """Returns the descriptions as the evaluator leaves them; what it removes is missing, for its own reason."""
    before: dict[str, str] = fields["descriptions"]
    removed: dict[str, str] = {}

    def texts(value: BaseModel) -> dict[str, str]:
        revisions = cast(Revisions, value).descriptions
        for each in revisions:
            if _is_removed(each):
                removed.setdefault(each.cell, each.reason or "the evaluator gave no reason")
        return {each.cell: _revised(each, before) for each in revisions}

    def judge(value: BaseModel, good: dict[str, Any]) -> list[Fault]:
        revisions = cast(Revisions, value).descriptions
        if faults := _judge_cells([each.cell for each in revisions], list(before)):
            return faults
        left = {each.cell: _revised(each, before) for each in revisions}
        left = {cell: text for cell, text in {**left, **good}.items() if text}
        return _judge_texts(left, good, item, recipe.names)

    asked = request_of("revise", fields, recipe, item)
    filled = await fill(asked, list(before), judge, texts, ask=ask, again=recipe.again)
    kept = {cell: text for cell, text in filled.parts.items() if text}
    faults = [Fault(cell, "removed", removed[cell]) for cell, text in filled.parts.items() if not text]
    return Filled(kept, (*faults, *filled.faults))


def _is_removed(revision: Revision) -> bool:
    return revision.verdict == "remove" or (revision.verdict == "revise" and not revision.text.strip())


def _revised(revision: Revision, before: dict[str, str]) -> str:
    """Returns a description's new text; one that is kept stays as it was, whatever the evaluator repeats."""
    if _is_removed(revision):
        return ""
    return before[revision.cell] if revision.verdict == "keep" else revision.text.strip()


async def _transform(item: Item, recipe: Recipe, ask: Ask, fields: dict[str, Any]) -> Filled:
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
        asked = {cell: pair.question for cell, pair in pairs.items()}
        return [*faults, *_judge_same_target(asked, good, item, recipe.names)]

    asked = request_of("transform", fields, recipe, item)
    return await fill(asked, cells, judge, parts, ask=ask, again=recipe.again)


def _judge_cells(found: list[Cell], wanted: list[str]) -> list[Fault]:
    if sorted(found) == sorted(wanted):
        return []
    listed = ", ".join(found) or "none"
    return [Fault("", "cells", f"the entries have the cells {listed}; write one entry for each of {', '.join(wanted)}")]


def _judge_texts(texts: dict[str, str], good: dict[str, Any], item: Item, names: Names) -> list[Fault]:
    """Returns the faults of descriptions that are not good already."""
    faults = [
        Fault(cell, breach.rule, breach.reason)
        for cell, text in texts.items()
        if cell not in good
        for breach in rules.check_description(text, length_of(cell), item, names)
    ]
    return [*faults, *_judge_same_target(texts, good, item, names)]


def _judge_same_target(texts: dict[str, str], good: dict[str, Any], item: Item, names: Names) -> list[Fault]:
    """Returns where short and long texts contradict each other; the long one answers for it, unless it is good already."""
    faults: list[Fault] = []
    for perspective in PERSPECTIVES:
        short, long = f"{perspective}-short", f"{perspective}-long"
        if short in texts and long in texts and not {short, long} <= good.keys():
            blamed = long if long not in good else short
            breaches: list[Breach] = rules.check_same_target(texts[short], texts[long], item, names)
            faults += [Fault(blamed, breach.rule, breach.reason) for breach in breaches]
    return faults
