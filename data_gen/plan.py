"""Estimates a run before its first call: requests, tokens and cost of each stage. Run it as

  python -m data_gen plan --records data/train.jsonl --model gpt-4o
  python -m data_gen plan --records data/train.jsonl --model gpt-4o-mini --captioner gpt-4o-mini --limit 1000

The real prompts of up to 200 images are built and measured, with placeholder texts of the usual length as answers.
Tokens are counted as characters over 3.8, which is right within 10 to 20% for English. "USD" assumes that every answer
keeps the rules, "at most USD" that every one is asked for again as often as --again allows; failed calls and the last
pass over near-duplicates come on top. Captions are asked for live even in a run with --batch, at the usual price.
`run --max-cost` keeps a run within an amount.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import BaseModel

from data_gen.core.calls import Fault, Request
from data_gen.core.items import Item, items_from_manifest
from data_gen.core.prices import CHARACTERS, size_of
from data_gen.core.prompts import ask_again
from data_gen.core.schemas import ANSWERS, CELLS, Stage
from data_gen.options import Inputs, add_options, read_inputs
from data_gen.pipeline.asking import Answered, Check
from data_gen.pipeline.stages import make
from medisee.records.manifest import Manifest

SAMPLE = 200
_WORD = "anatomical"  # with its space as long as a token and a half: medical English has long words
_REASON = "the description has 17 words; write 5 to 15"


@dataclass
class StagePlan:
    """What a stage sends: calls and tokens as planned, and what comes on top when everything is asked for again."""

    calls: float = 0
    tokens_in: float = 0
    tokens_out: float = 0
    again_in: float = 0
    again_out: float = 0


@dataclass
class Measure:
    """An `Ask` that answers with placeholder texts of the usual length, and measures the requests."""

    inputs: Inputs
    stages: defaultdict[Stage, StagePlan] = field(default_factory=lambda: defaultdict(StagePlan))

    async def __call__(self, request: Request, check: Check) -> Answered:
        """Returns a placeholder answer."""
        value = _placeholder(request.stage, request.fields)
        text = value.model_dump_json()
        price = self.inputs.caption_price if request.stage == "caption" else self.inputs.price
        again = self.inputs.recipe.again
        repeated = ask_again(request, text, [Fault("attribute-short", "words", _REASON)] * 2, 1)
        plan = self.stages[request.stage]
        plan.calls += 1
        plan.tokens_in += size_of(request.body).tokens(price)
        plan.tokens_out += len(text) / CHARACTERS
        plan.again_in += again * size_of(repeated.body).tokens(price)
        plan.again_out += again * len(text) / CHARACTERS
        return Answered(value, text, ())


def _placeholder(stage: Stage, fields: dict[str, Any]) -> BaseModel:
    def words(count: int) -> str:
        return " ".join([_WORD] * count)

    cells: list[str] = list(fields.get("descriptions", CELLS))
    descriptions = {cell: words(10 if cell.endswith("short") else 15) for cell in cells}
    values: dict[Stage, Any] = {
        "caption": {"caption": words(40)},
        "describe": {cell.replace("-", "_"): text for cell, text in descriptions.items()},
        "revise": {
            "descriptions": [
                {"cell": cell, "verdict": "revise", "text": text, "reason": words(8)}
                for cell, text in descriptions.items()
            ]
        },
        "transform": {
            "pairs": [{"cell": cell, "question": text, "answer": words(15)} for cell, text in descriptions.items()]
        },
        "converse": {"turns": [{"question": words(12), "answer": words(15)}] * fields.get("turns", 0)},
    }
    return ANSWERS[stage].model_validate_json(json.dumps(values[stage]))


def main(argv: Sequence[str] | None = None) -> None:
    """Plans a run from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen plan", description=__doc__, formatter_class=raw)
    add_options(parser)
    arguments = parser.parse_args(argv)
    inputs = read_inputs(arguments)
    count = count_items(inputs.manifest, arguments.limit)
    items = islice(items_from_manifest(inputs.manifest, inputs.recipe.seed), min(SAMPLE, count))
    stages, measured, pairs = asyncio.run(_measure(items, inputs))
    print(_report(stages, inputs, count, pairs, factor=count / measured if measured else 0.0))


async def _measure(items: Iterable[Item], inputs: Inputs) -> tuple[dict[Stage, StagePlan], int, int]:
    """Returns what the items' stages send, how many items there are, and how many pairs they can become."""
    measure, measured, pairs = Measure(inputs), 0, 0
    for item in items:
        outcome = await make(item, inputs.recipe, measure)
        measured, pairs = measured + 1, pairs + len(outcome.pairs)
    return measure.stages, measured, pairs


def count_items(manifest: Manifest, limit: int | None) -> int:
    """Returns how many images have a target, at most `limit`."""
    count = sum(bool(record.targets) for record in manifest)
    return count if limit is None else min(count, limit)


def _report(stages: dict[Stage, StagePlan], inputs: Inputs, count: int, pairs: int, *, factor: float) -> str:
    """Returns the plan of `count` images as a table, `factor` times as many as were measured."""
    recipe = inputs.recipe
    lines = [
        f"{count:,} images, at most {round(pairs * factor):,} question-answer pairs, written by {recipe.model}"
        + (f", captions by {recipe.captioner}" if recipe.captioner else ""),
        f"{'stage':<11}{'calls':>12}{'tokens in':>15}{'tokens out':>14}{'USD':>12}{'USD batch':>12}{'at most USD':>14}",
    ]
    rows: dict[str, list[float]] = {}
    for stage, plan in stages.items():
        price = inputs.caption_price if stage == "caption" else inputs.price
        usd = price.of(plan.tokens_in, 0, plan.tokens_out)
        batch = usd if stage == "caption" else price.of(plan.tokens_in, 0, plan.tokens_out, batch=True)
        most = usd + price.of(plan.again_in, 0, plan.again_out)
        rows[stage] = [factor * value for value in (plan.calls, plan.tokens_in, plan.tokens_out, usd, batch, most)]
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)] or [0.0] * 6
    lines += [
        f"{stage:<11}{calls:>12,.0f}{tokens_in:>15,.0f}{tokens_out:>14,.0f}{usd:>12,.2f}{batch:>12,.2f}{most:>14,.2f}"
        for stage, (calls, tokens_in, tokens_out, usd, batch, most) in rows.items()
    ]
    return "\n".join(lines)
