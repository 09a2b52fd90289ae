"""Conversations: several turns about one image, the last of which asks for the target.

The form is that of MedSeg-QA (MedSeg-R, arXiv 2506.10465): from the image as a whole to one structure and its mask.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

from pydantic import BaseModel

from data_gen.core.calls import Fault
from data_gen.core.items import Drop, Item, Pair
from data_gen.core.recipe import Recipe, fields_of, pair_id, request_of
from data_gen.core.schemas import Conversation, ConversationTurn
from data_gen.pipeline.asking import Ask
from data_gen.pipeline.retry import ask_until_valid
from data_gen.rules import checks as rules
from medisee.records.records import LENGTHS, PERSPECTIVES


async def converse(item: Item, recipe: Recipe, ask: Ask, *, caption: str, drops: list[Drop]) -> list[Pair]:
    """Makes one conversation of 2 to 4 turns; the perspective and length of its last question are drawn."""
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
