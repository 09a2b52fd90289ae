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
from medisee.foundation.command_line import parse_words
from medisee.records.manifest import Manifest

SAMPLE = 200
_WORD = "anatomical"  # with its space as long as a token and a half: medical English has long words
_REASON = "the description has 17 words; write 5 to 15"


def _placeholder(stage: Stage, fields: dict[str, Any]) -> BaseModel:
    def words(count: int) -> str:
        return " ".join([_WORD] * count)

    cells: list[str] = list(fields.get("descriptions", CELLS))
    texts = {cell: words(10 if cell.endswith("short") else 15) for cell in cells}
    revised = [{"cell": cell, "verdict": "revise", "text": text, "reason": words(8)} for cell, text in texts.items()]
    pairs = [{"cell": cell, "question": text, "answer": words(15)} for cell, text in texts.items()]
    values: dict[Stage, Any] = {
        "caption": {"caption": words(40)},
        "describe": {cell.replace("-", "_"): text for cell, text in texts.items()},
        "revise": {"descriptions": revised},
        "transform": {"pairs": pairs},
        "converse": {"turns": [{"question": words(12), "answer": words(15)}] * fields.get("turns", 0)},
    }
    return ANSWERS[stage].model_validate_json(json.dumps(values[stage]))


def main(argv: Sequence[str] | None = None) -> None:
    """Plans a run from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen plan", description=__doc__, formatter_class=raw)
    add_options(parser)
    arguments = parse_words(parser, argv)
    inputs = read_inputs(arguments)
    count = count_items(inputs.manifest, arguments.limit)
    items = islice(items_from_manifest(inputs.manifest, inputs.recipe.seed), min(SAMPLE, count))
    sums, measured, pairs = asyncio.run(_measure(items, inputs))
    print(_report(sums, inputs, count, pairs, factor=count / measured if measured else 0.0))


async def _measure(items: Iterable[Item], inputs: Inputs) -> tuple[dict[Stage, list[float]], int, int]:
    """Returns the sums by stage, the number of items, and the number of pairs that they can become.

    A stage's sums are the calls, their tokens in and out, and the tokens in and out of what is asked again.
    """
    sums: defaultdict[Stage, list[float]] = defaultdict(lambda: [0.0] * 5)
    again, measured, pairs = inputs.recipe.again, 0, 0

    async def ask(request: Request, _: Check) -> Answered:
        value = _placeholder(request.stage, request.fields)
        text = value.model_dump_json()
        price = inputs.caption_price if request.stage == "caption" else inputs.price
        repeated = ask_again(request, text, [Fault("attribute-short", "words", _REASON)] * 2, 1)
        tokens, repeated_tokens = size_of(request.body).tokens(price), size_of(repeated.body).tokens(price)
        out = len(text) / CHARACTERS
        row = (1, tokens, out, again * repeated_tokens, again * out)
        sums[request.stage] = [total + value for total, value in zip(sums[request.stage], row, strict=True)]
        return Answered(value, text, ())

    for item in items:
        outcome = await make(item, inputs.recipe, ask)
        measured, pairs = measured + 1, pairs + len(outcome.pairs)
    return sums, measured, pairs


def count_items(manifest: Manifest, limit: int | None) -> int:
    """Returns how many images have a target, at most `limit`."""
    count = sum(bool(record.targets) for record in manifest)
    return count if limit is None else min(count, limit)


def _report(sums: dict[Stage, list[float]], inputs: Inputs, count: int, pairs: int, *, factor: float) -> str:
    """Returns the plan of `count` images as a table, `factor` times as many as were measured."""
    recipe = inputs.recipe
    lines = [
        f"{count:,} images, at most {round(pairs * factor):,} question-answer pairs, written by {recipe.model}"
        + (f", captions by {recipe.captioner}" if recipe.captioner else ""),
        f"{'stage':<11}{'calls':>12}{'tokens in':>15}{'tokens out':>14}{'USD':>12}{'USD batch':>12}{'at most USD':>14}",
    ]
    rows: dict[str, list[float]] = {}
    for stage, (calls, tokens_in, tokens_out, again_in, again_out) in sums.items():
        price = inputs.caption_price if stage == "caption" else inputs.price
        usd = price.of(tokens_in, 0, tokens_out)
        batch = usd if stage == "caption" else price.of(tokens_in, 0, tokens_out, batch=True)
        most = usd + price.of(again_in, 0, again_out)
        rows[stage] = [factor * value for value in (calls, tokens_in, tokens_out, usd, batch, most)]
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)] or [0.0] * 6
    lines += [
        f"{stage:<11}{calls:>12,.0f}{tokens_in:>15,.0f}{tokens_out:>14,.0f}{usd:>12,.2f}{batch:>12,.2f}{most:>14,.2f}"
        for stage, (calls, tokens_in, tokens_out, usd, batch, most) in rows.items()
    ]
    return "\n".join(lines)
