"""Says what a run will ask and cost, before its first call: calls, tokens and money of each stage. Run it as

  python -m data_gen plan --records data/train.jsonl --model gpt-4o
  python -m data_gen plan --records data/train.jsonl --model gpt-4o-mini --captioner gpt-4o-mini --limit 1000

The real prompts of up to 200 images are built and measured; in place of answers stand texts of the length that is asked
for. Tokens are counted as characters over 3.8, which is right within a tenth or two for English. "USD" is when every
answer keeps the rules, "at most USD" when every one is asked for again as often as --again allows; calls that fail and
the last pass over near-duplicates come on top. Captions are asked for at once even in a run with --batch, at the usual
price. `run --max-cost` holds a run to an amount.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import BaseModel

from data_gen.core.calls import Fault, Request
from data_gen.core.items import Item, items_from_manifest
from data_gen.core.prices import CHARACTERS, Price, size_of
from data_gen.core.prompts import ask_again
from data_gen.core.schemas import ANSWERS, CELLS, Stage
from data_gen.options import Made, add_options, make
from data_gen.pipeline.asking import Answered, Check
from data_gen.pipeline.stages import make as make_pairs
from medisee.records.manifest import Manifest

SAMPLE = 200
_WORD = "anatomical"  # with its space as long as a token and a half: medical English has long words
_REASON = "the description has 17 words; write 5 to 15"


@dataclass
class StagePlan:
    """What a stage asks: calls and tokens as planned, and what comes on top when all is asked for again."""

    calls: float = 0
    tokens_in: float = 0
    tokens_out: float = 0
    again_calls: float = 0
    again_in: float = 0
    again_out: float = 0

    def times(self, factor: float) -> StagePlan:
        """Returns the plan for `factor` times as many images."""
        return StagePlan(*(getattr(self, name) * factor for name in self.__dataclass_fields__))


@dataclass
class Measure:
    """An `Ask` that answers with texts of the length asked for, and measures the requests."""

    made: Made
    stages: defaultdict[Stage, StagePlan] = field(default_factory=lambda: defaultdict(StagePlan))

    async def __call__(self, request: Request, check: Check) -> Answered:
        """Returns a stand-in for the answer."""
        value = _stand_in(request.stage, request.fields)
        text = value.model_dump_json()
        price = self.made.caption_price if request.stage == "caption" else self.made.price
        plan = self.stages[request.stage]
        answer = len(text) / CHARACTERS
        plan.calls += 1
        plan.tokens_in += size_of(request.body).tokens(price)
        plan.tokens_out += answer
        repeated = ask_again(request, text, [Fault("attribute-short", "words", _REASON)] * 2, 1)
        again = self.made.recipe.again
        plan.again_calls += again
        plan.again_in += again * size_of(repeated.body).tokens(price)
        plan.again_out += again * answer
        return Answered(value, text, ())


def _stand_in(stage: Stage, fields: dict[str, Any]) -> BaseModel:
    def words(count: int) -> str:
        return " ".join([_WORD] * count)

    def description(cell: str) -> str:
        return words(10 if cell.endswith("short") else 15)

    cells = list(fields.get("descriptions", CELLS))
    values: dict[Stage, Any] = {
        "caption": {"caption": words(40)},
        "describe": {cell.replace("-", "_"): description(cell) for cell in CELLS},
        "revise": {
            "descriptions": [
                {"cell": cell, "verdict": "revise", "text": description(cell), "reason": words(8)} for cell in cells
            ]
        },
        "transform": {"pairs": [{"cell": cell, "question": description(cell), "answer": words(15)} for cell in cells]},
        "converse": {"turns": [{"question": words(12), "answer": words(15)}] * fields.get("turns", 0)},
    }
    return ANSWERS[stage].model_validate_json(json.dumps(values[stage]))


async def measure(items: Iterable[Item], made: Made) -> tuple[dict[Stage, StagePlan], int, int]:
    """Returns what the items' stages ask, how many items there are, and how many pairs they can become."""
    ask, counts = Measure(made), Counter[str]()
    for item in items:
        outcome = await make_pairs(item, made.recipe, ask)
        counts.update(items=1, pairs=len(outcome.pairs))
    return dict(ask.stages), counts["items"], counts["pairs"]


def main(argv: Sequence[str] | None = None) -> None:
    """Plans a run from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen plan", description=__doc__, formatter_class=raw)
    add_options(parser)
    arguments = parser.parse_args(argv)
    made = make(arguments)
    count = count_items(made.manifest, arguments.limit)
    items = islice(items_from_manifest(made.manifest, made.recipe.seed), min(SAMPLE, count))
    stages, measured, pairs = asyncio.run(measure(items, made))
    factor = count / measured if measured else 0.0
    print(report({stage: plan.times(factor) for stage, plan in stages.items()}, made, count, round(pairs * factor)))


def count_items(manifest: Manifest, limit: int | None) -> int:
    """Returns how many images have a target, at most `limit`."""
    count = sum(bool(record.targets) for record in manifest)
    return count if limit is None else min(count, limit)


def report(stages: dict[Stage, StagePlan], made: Made, count: int, pairs: int) -> str:
    """Returns the plan as a table."""
    recipe = made.recipe
    lines = [
        f"{count:,} images, at most {pairs:,} question-answer pairs, written by {recipe.model}"
        + (f", captions by {recipe.captioner}" if recipe.captioner else ""),
        f"{'stage':<11}{'calls':>12}{'tokens in':>15}{'tokens out':>14}{'USD':>12}{'USD batch':>12}{'at most USD':>14}",
    ]
    sums = [0.0] * 6
    for stage, plan in stages.items():
        price = made.caption_price if stage == "caption" else made.price
        row = _row(plan, price, live_only=stage == "caption")
        sums = [total + value for total, value in zip(sums, row, strict=True)]
        lines.append(_line(stage, row))
    return "\n".join([*lines, _line("all", sums)])


def _row(plan: StagePlan, price: Price, *, live_only: bool) -> list[float]:
    usd = price.of(plan.tokens_in, 0, plan.tokens_out)
    batch = usd if live_only else price.of(plan.tokens_in, 0, plan.tokens_out, batch=True)
    most = usd + price.of(plan.again_in, 0, plan.again_out)
    return [plan.calls, plan.tokens_in, plan.tokens_out, usd, batch, most]


def _line(stage: str, row: Sequence[float]) -> str:
    calls, tokens_in, tokens_out, usd, batch, most = row
    return (
        f"{stage:<11}{calls:>12,.0f}{tokens_in:>15,.0f}{tokens_out:>14,.0f}{usd:>12,.2f}{batch:>12,.2f}{most:>14,.2f}"
    )
