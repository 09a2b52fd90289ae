"""Makes question-answer pairs: describe, revise, transform, with rules on every answer, into a ledger. Run it as

  python -m data_gen run --records data/demo/train_class.jsonl --ledger data/mlmr_sd/ledger.sqlite --author offline
  python -m data_gen run --records data/train.jsonl --ledger data/mlmr_sd/ledger.sqlite --model gpt-4o --max-cost 50
  python -m data_gen run ... --model NAME --base-url http://127.0.0.1:8000/v1 --free      vLLM, llama.cpp, your own

Everything is in the ledger before anything is built on it. Stop a run in any way and start the same command again: what
has an answer is not asked again. The key of the model's server is read from OPENAI_API_KEY, that of a captioner's own
server (--caption-url) from MEDISEE_CAPTION_KEY; neither is ever written to disk.

Exits with 0 when all images are done and there are pairs, 1 when the run stopped before that or made no pair (it says
why), 2 when the input is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data_gen.authors.client import CAPTION_KEY, KEY, Client, NotAccepted, Server, Unreachable, api_key, is_same
from data_gen.authors.offline import OfflineAuthor
from data_gen.core.calls import Request
from data_gen.core.items import Item, items_from_manifest
from data_gen.core.prices import Price
from data_gen.core.recipe import OFFLINE, Recipe
from data_gen.core.workers import work_through
from data_gen.ledger.ledger import Ledger
from data_gen.ledger.limits import ErrorBudget, MoneyBudget, RateLimit, StopRun
from data_gen.options import LOCAL, Inputs, add_options, fixed_settings, read_inputs
from data_gen.pipeline.asking import Answered, Ask, Asker, Author, Check, Pending
from data_gen.pipeline.batch import CORRECT, BatchServer, Waves
from data_gen.pipeline.deduplicate import deduplicate
from data_gen.pipeline.stages import make
from data_gen.plan import count_items
from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError
from medisee.foundation.output import check_output, locked

_MOST_AT_ONCE = 10_000  # requests; each has a task and a connection
_ROUNDS = 3  # over items that the server did not answer for
_EMPTY = 3  # batches without any answer
_GRACE = 20.0  # seconds that calls under way are given after the first signal
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_INTERRUPTED = "interrupted; run again to go on"


def main(argv: Sequence[str] | None = None) -> None:
    """Makes pairs from the command line."""
    arguments = _arguments(argv)
    check_output(arguments.ledger.parent, option="--ledger")
    inputs = read_inputs(arguments)
    style, limit = inputs.recipe.style, arguments.limit
    if not arguments.author:
        for server in _servers(arguments):
            api_key(server)
    path: Path = arguments.ledger
    # A second run would ask the same questions.
    with locked(path, path.with_name(f".{path.name}.lock")), Ledger(path, create=True) as ledger:
        free = {"style": style, "limit": limit, "batch": arguments.batch, "max_tokens": arguments.max_tokens}
        number = ledger.start_run(fixed_settings(arguments, inputs.recipe), free)
        ledger.keep_names(inputs.names)
        _add_items(ledger, inputs, limit)
        stopped, signals = "", list[int]()
        try:
            asyncio.run(_run(ledger, inputs, arguments, signals))
        except StopRun as error:
            stopped = str(error)
        except asyncio.CancelledError:
            stopped = _INTERRUPTED
        if not (stopped or ledger.has_pairs(style)):
            stopped = "no pair was made: all were dropped, for the reasons above; try another model or other settings."
        ledger.end_run(number, stopped or "done")
        print(_summary(ledger, limit, style))
    if signals:
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
    if stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(1)


async def _run(ledger: Ledger, inputs: Inputs, arguments: argparse.Namespace, signals: list[int]) -> None:
    """Connects to what answers, and works until everything is done or the run stops."""
    recipe = inputs.recipe
    rate = RateLimit(arguments.rpm, arguments.tpm)
    money = MoneyBudget(arguments.max_cost, ledger.answers.spent(), ledger.answers)
    budget = ErrorBudget(arguments.max_failures)
    server, caption_server = _servers(arguments)
    clients: list[Client | BatchServer] = []

    def connect(server: Server, price: Price) -> Author:
        client = Client(server, root=recipe.root, price=price, rate=rate, money=money)
        clients.append(client)
        return client

    author = OfflineAuthor(recipe.seed) if recipe.model == OFFLINE else connect(server, inputs.price)
    captioner = author
    if recipe.captioner and recipe.captioner.startswith(LOCAL):
        from data_gen.authors.captioner import LocalCaptioner  # late: it imports torch

        captioner = LocalCaptioner(arguments.captioner.removeprefix(LOCAL), recipe.root)
    elif recipe.captioner not in (None, OFFLINE):
        captioner = connect(caption_server, inputs.caption_price)
    asker = Asker(ledger.answers, author, captioner, attempts=arguments.attempts, budget=budget)
    try:
        with _handled(asker, signals):
            if not arguments.batch:
                # What a batch will answer would be asked, and paid for, a second time.
                if count := len(ledger.answers.open_batches()):
                    raise StopRun(
                        f"stopped: {count} batches have answers that were not collected; run the same command with --batch "
                        "until they are. To give a batch up, cancel it at the server, then run with --batch."
                    )
                await _run_live(ledger, recipe, asker, arguments)
                return
            waves = Waves(ledger.answers, attempts=arguments.attempts)
            batches = BatchServer(
                server=server,
                root=recipe.root,
                answers=ledger.answers,
                price=inputs.price,
                money=money,
                mode=recipe.mode,
                attempts=arguments.attempts,
                budget=budget,
                poll=arguments.poll,
            )
            clients.append(batches)

            async def ask(request: Request, check: Check) -> Answered:
                # Captions are asked for live: their captioner may be another server or this machine.
                return await (asker if request.stage == "caption" else waves)(request, check)

            await _run_waves(ledger, recipe, ask, arguments, waves=waves, server=batches)
    finally:
        for client in clients:
            await client.close()


@contextmanager
def _handled(asker: Asker, signals: list[int]) -> Iterator[None]:
    """Ends a run at SIGINT or SIGTERM, whose number is added to `signals`.

    No further call begins, and those under way get some time to finish. After that, or at a second signal, the run's
    task, which is the one in this block, is cancelled.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def handle(number: int) -> None:
        signals.append(number)
        if len(signals) > 1:
            task.cancel()
            return
        asker.stopping = _INTERRUPTED
        loop.call_later(_GRACE, task.cancel)

    for number in _SIGNALS:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _run_live(ledger: Ledger, recipe: Recipe, asker: Asker, arguments: argparse.Namespace) -> None:
    """Finishes all items: the calls of one pass follow each other, many items are worked on at once."""
    for _ in range(_ROUNDS):
        left, why = await _pass(ledger, recipe, asker, arguments)
        if not left:
            break
    else:
        raise StopRun(f"stopped: {left:,} items had no answer from the server ({why}); run again to go on.")
    try:
        await deduplicate(ledger, recipe, asker, workers=arguments.workers)
    except Unreachable as error:
        raise StopRun(f"stopped: the server does not answer ({error}); run again to go on.") from error


async def _run_waves(
    ledger: Ledger, recipe: Recipe, ask: Ask, arguments: argparse.Namespace, *, waves: Waves, server: BatchServer
) -> None:
    """Finishes all items in waves of the Batch API; `ask` asks `waves`, but for what is answered at once."""
    await server.collect()
    empty = 0
    while empty < _EMPTY:
        left, why = await _pass(ledger, recipe, ask, arguments)
        if not left:
            try:
                await deduplicate(ledger, recipe, ask, workers=1)
                return
            except Pending:
                pass
        keys = waves.take()
        if not keys:
            raise StopRun(f"stopped: {left:,} items had no answer from the server ({why}); run again to go on.")
        await server.submit(keys)
        empty += not await server.collect()
    raise StopRun(f"stopped: {_EMPTY} batches brought no answer; look at them, then run again to go on.")


async def _pass(ledger: Ledger, recipe: Recipe, ask: Ask, arguments: argparse.Namespace) -> tuple[int, str]:
    """Works on all items without an outcome; returns how many still have none, and why."""
    style, limit = recipe.style, arguments.limit
    open_count, count = ledger.count_open(style, limit)
    left, refused, why, made, dropped, done = 0, 0, "", 0, 0, 0
    with tqdm(total=count, initial=count - open_count, unit="image", disable=None, desc="making pairs") as bar:

        async def work(item: Item) -> None:
            nonlocal left, refused, why, made, dropped, done
            try:
                outcome = await make(item, recipe, ask)
            except (Unreachable, Pending) as error:
                left, refused, why = left + 1, refused + isinstance(error, NotAccepted), str(error)
                return
            await asyncio.wrap_future(ledger.finish(item.id, style, outcome.pairs, outcome.drops))
            made, dropped, done = made + len(outcome.pairs), dropped + len(outcome.drops), done + 1
            bar.update()
            bar.set_postfix(pairs=made, dropped=dropped, refresh=False)

        await work_through(ledger.open_items(style, limit), work, arguments.workers)
    if refused == left > done == 0:
        raise StopRun(f"stopped: the server does not accept the requests of {left:,} items ({why}); {CORRECT}.")
    return left, why


def _servers(arguments: argparse.Namespace) -> tuple[Server, Server]:
    """Returns the model's server and the captioner's, which does not get the model's key if it is another one."""
    given = {name: getattr(arguments, name) for name in ("base_url", "concurrency", "timeout", "sends", "max_tokens")}
    server = Server(**given)
    url = arguments.caption_url or arguments.base_url
    return server, replace(server, base_url=url, key_name=KEY if is_same(url, arguments.base_url) else CAPTION_KEY)


def _add_items(ledger: Ledger, inputs: Inputs, limit: int | None) -> None:
    """Draws the targets, once per ledger: it reads every mask."""
    if ledger.has_items(limit):
        return
    count = count_items(inputs.manifest, limit)
    if not count:
        raise InputError(f"{inputs.manifest.path}: no record has a target; use a manifest with labelled masks.")
    drawn = islice(items_from_manifest(inputs.manifest, inputs.recipe.seed), count)
    shown = tqdm(drawn, total=count, unit="image", disable=None, desc="reading masks")
    ledger.add_items(shown, inputs.manifest.root, complete=count == count_items(inputs.manifest, None))


def _summary(ledger: Ledger, limit: int | None, style: str) -> str:
    left, count = ledger.count_open(style, limit)
    states = ledger.count_pairs()
    lines = [f"images {count - left:,} of {count:,}, pairs {states['new'] + states['kept']:,}"]
    if states["new"]:
        lines[0] += " (not yet deduplicated)"
    for rule, number in Counter(f"{drop.stage}: {drop.rule}" for drop in ledger.drops()).most_common():
        lines.append(f"dropped {number:>8,}  {rule}")
    for each in ledger.answers.counts():
        lines.append(
            f"{each.stage:<10} {each.model}: {each.requests:,} requests, {each.answers:,} answers ({each.good:,} good), "
            f"{each.usage_in:,} tokens in, {each.usage_out:,} out, {each.price:.2f} USD"
        )
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen run", description=__doc__, formatter_class=raw)
    parser.add_argument("--ledger", type=a_path, required=True, metavar="FILE", help="SQLite file; created if missing")
    add_options(parser)
    add = parser.add_argument_group("speed and retries").add_argument
    add("--concurrency", type=int, default=64, metavar="N", help="concurrent requests (default: 64)")
    add("--rpm", type=float, metavar="N", help="most requests per minute (default: no limit)")
    add("--tpm", type=float, metavar="N", help="most tokens per minute (default: no limit)")
    add("--timeout", type=float, default=120, metavar="S", help="seconds to wait for an answer (default: 120)")
    add("--sends", type=int, default=8, metavar="N", help="most sends of a request that fails (default: 8)")
    add("--attempts", type=int, default=4, metavar="N", help="answers tried until one has the right form (default: 4)")
    add("--max-failures", type=int, default=20, metavar="N", help="failed calls in a row that end a run (default: 20)")
    add("--max-cost", type=float, metavar="USD", help="most that all runs of this ledger may cost (default: no limit)")
    add("--batch", action="store_true", help="use the Batch API: half the price, answers within a day")
    add("--poll", type=float, default=30, metavar="S", help="seconds between status checks of a batch (default: 30)")
    arguments = parse_words(parser, argv)
    numbers = ("concurrency", "rpm", "tpm", "timeout", "sends", "attempts", "max_failures", "max_cost", "poll")
    problems = [
        f"--{name.replace('_', '-')} is {value}; expected a number above 0; correct it."
        for name in numbers
        if (value := getattr(arguments, name)) is not None and not 0 < value < float("inf")
    ]
    if arguments.concurrency > _MOST_AT_ONCE:
        problems.append(f"--concurrency is {arguments.concurrency}; expected at most {_MOST_AT_ONCE:,}; correct it.")
    if arguments.batch and arguments.author:
        problems.append("--batch: the offline author has no batches; leave it out.")
    if problems:
        raise InputError(problems)
    # A few more images in progress than requests: while one answer is judged, another image's request takes its place.
    arguments.workers = arguments.concurrency * 5 // 4
    return arguments
