"""Conversations: several turns about one image, the last of which asks for the target.

The form is that of MedSeg-QA (MedSeg-R, arXiv 2506.10465): from the image as a whole to one structure and its mask.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

from pydantic import BaseModel

from data_gen.core.calls import Fault
from data_gen.core.items import LENGTHS, PERSPECTIVES, Drop, Item, Pair
from data_gen.core.names import Names
from data_gen.core.recipe import Recipe, fields_of, pair_id, request_of
from data_gen.core.schemas import Conversation, ConversationTurn
from data_gen.pipeline.asking import Ask
from data_gen.pipeline.retry import fill
from data_gen.rules import checks as rules
from medisee.records.records import Length


async def converse(item: Item, recipe: Recipe, ask: Ask, *, caption: str, drops: list[Drop]) -> list[Pair]:
    """Makes one conversation: 2 to 4 turns; which cell its last question belongs to is drawn."""
    draw = int.from_bytes(hashlib.sha256(f"{recipe.seed} {item.id}".encode()).digest()[:8], "big")
    turns = 2 + draw % 3
    perspective, length = PERSPECTIVES[draw // 3 % 2], LENGTHS[draw // 6 % 2]
    fields = fields_of(item, recipe.names, caption)
    fields |= {"turns": turns, "perspective": perspective, "length": length}

    def judge(value: BaseModel, _: dict[str, Any]) -> list[Fault]:
        found = cast(Conversation, value).turns
        if len(found) != turns:
            return [Fault("", "turns", f"the conversation has {len(found)} turns; write exactly {turns}")]
        return _judge_turns(found, length, item, recipe.names)

    filled = await fill(
        request_of("converse", fields, recipe, item),
        ["turns"],
        judge,
        lambda value: {"turns": cast(Conversation, value).turns},
        ask=ask,
        again=recipe.again,
    )
    identity = pair_id(item.id, "first", f"{perspective}-{length}", 1)
    drops += [Drop(item.id, "converse", fault.rule, fault.reason, identity) for fault in filled.faults[:1]]
    found: list[ConversationTurn] = filled.parts.get("turns", [])
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
        for number, turn in enumerate(found, 1)
    ]


def _judge_turns(turns: list[ConversationTurn], length: Length, item: Item, names: Names) -> list[Fault]:
    *before, last = turns
    breaches = [
        (number, breach)
        for number, turn in enumerate(before, 1)
        for breach in rules.check_turn(turn.question, turn.answer, item, names)
    ]
    breaches += [(len(turns), breach) for breach in rules.check_pair(last.question, last.answer, length, item, names)]
    return [Fault("", breach.rule, f"turn {number}: {breach.reason}") for number, breach in breaches]
