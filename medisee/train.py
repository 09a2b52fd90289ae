"""Training: one visible loop. Run it as

  python scripts/train.py --config configs/demo.yaml [--resume | --fresh] [train.lr=1e-4]  one GPU, or the CPU
  deepspeed scripts/train.py --config configs/medisee_7b.yaml                            all GPUs of a machine
  python scripts/train.py --config configs/medisee_7b.yaml --plan --gpu a6000 --gpus 4   what it needs, without starting it

Writes <train.out>/: checkpoint/ (best on val), last-<step>/ (for --resume), log.jsonl, tensorboard/, run.json.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from medisee.config import Config
from medisee.config.load import dump_config, load_config
from medisee.data.dataset import TrainingBatches, training_batches
from medisee.data.features import FeatureCache, fill_cache
from medisee.foundation.command_line import parse_words
from medisee.foundation.errors import InputError, exit_code
from medisee.foundation.files import recover_folder
from medisee.foundation.hardware import compute_dtype, keep_freed_memory, to_training_precision
from medisee.models.losses import Terms, mean_terms
from medisee.models.medisee import MaskDetail, MediSee
from medisee.models.packing import check_flex
from medisee.models.processing import Batch
from medisee.planning.plan import GPU, GPUS, plan_training, render_plan
from medisee.records.manifest import Manifest
from medisee.training.initial_model import build_model, read_records
from medisee.training.interruption import Stopped, StopRequest
from medisee.training.layers import check_compiler, compile_layers, recompute_layers, uncompiled
from medisee.training.optimization import (
    DeepSpeedOptimization,
    Optimization,
    TrainingLoss,
    describe_batch,
    effective_batch,
    split_batch,
    warmup_decay,
)
from medisee.training.ranks import (
    Place,
    errors_on_all_ranks,
    gather,
    join_ranks,
    raise_on_all_ranks,
    world_from_environment,
)
from medisee.training.resume import (
    CHECKPOINT,
    OPTIMIZER,
    LastStates,
    Origin,
    Progress,
    Saved,
    changed_since,
    check_same_run,
    check_space,
    disk_errors,
    find_last_on_all_ranks,
    only_run,
    origin_of,
    remove_states,
    save_state,
    starting_from,
)
from medisee.training.run_log import RunLog, Throughput
from medisee.training.validation import figures, validate
from medisee.weights.checkpoints import WEIGHTS, load_trained, save_checkpoint
from medisee.weights.missing import check_files, with_missing_weights


@dataclass(slots=True)
class Run:
    """What the loop works with."""

    given: Config  # as the user wrote it
    config: Config  # the same with the accumulation that this number of ranks needs
    place: Place
    model: MediSee
    optimization: Optimization
    batches: TrainingBatches
    val: Manifest | None
    unusable: frozenset[str]  # ids of records of val that are not scored
    cache: FeatureCache | None
    states: LastStates
    log: RunLog
    origin: Origin
    start: Progress  # of the state that the run continues from
    best: float  # figure on val so far
    batch: Batch | None = None  # the last micro-batch that could be read
    named: set[str] = field(default_factory=set)  # records that were reported as skipped

    @property
    def out(self) -> Path:
        return Path(self.config.train.out)


def train(config: Config, *, resume: bool = False, fresh: bool = False) -> Path:
    """Trains a model and returns the folder of the best checkpoint.

    `resume` continues from the newest undamaged state in <train.out>; `fresh` starts again even if it holds a run, which
    the new one replaces as it saves. Raises Stopped, with the state saved, if the run was asked to stop.
    """
    given, out, place = config, Path(config.train.out), join_ranks()
    with ExitStack() as held, disk_errors(out):
        stop = StopRequest(out)
        with errors_on_all_ranks(place):
            if place.rank == 0:
                held.enter_context(only_run(out, is_new=not (resume or fresh)))
                stop.remove_file()
        saved = find_last_on_all_ranks(out, place) if resume else None
        with errors_on_all_ranks(place):
            if saved is not None:
                config = starting_from(saved, config)
            check_files(config)
            if not config.data.train:
                raise InputError(
                    "data.train: no training manifest; name at least one, such as data/demo/train_class.jsonl."
                )
            manifests = [Manifest(source.records, source.root) for source in config.data.train]
            val = Manifest(config.data.selection, config.data.root) if config.data.selection else None
            if config.model.mllm.attention == "flex":
                check_flex(place.device)
            if config.train.compile_layers:
                check_compiler(place.device)
            config = config.model_copy(update={"train": split_batch(config.train, place.world)})
            origin = origin_of(config, effective_batch(config.train, place.world), place, manifests=manifests, val=val)
            if saved is not None and place.rank == 0:
                check_same_run(saved, given, origin)
                for change in changed_since(saved, origin):
                    print(f"note: {change}", file=sys.stderr, flush=True)
        if fresh and place.rank == 0:
            remove_states(out)
        run = _prepare(given, config, place, manifests=manifests, val=val, saved=saved, origin=origin)
        with stop, closing(run.batches):
            _steps(run, stop)
        if val is None:
            _save_best(run, {"step": config.train.steps})
        run.log.end()
    return out / CHECKPOINT


def _prepare(
    given: Config,
    config: Config,
    place: Place,
    *,
    manifests: Sequence[Manifest],
    val: Manifest | None,
    saved: Saved | None,
    origin: Origin,
) -> Run:
    """Builds all that the loop needs, as it was when the state was saved."""
    out, settings = Path(config.train.out), config.train
    if place.rank == 0:
        print(describe_batch(settings, place.world), flush=True)
        recover_folder(out / CHECKPOINT)
    if place.device.type == "cpu":
        keep_freed_memory()
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    try:
        read = read_records(config, manifests, val, place)
        model = build_model(config, read.tokenizer).placed(place.device)
    except InputError as error:
        raise with_missing_weights(error, config.model) from error
    cache = None
    if config.data.cache is not None:
        folder, cache_dtype = Path(config.data.cache), compute_dtype(config.data.cache_dtype, place.device)
        skip = config.data.skip_corrupt
        for encodes in (True, False):  # the first rank; the others then find all features there
            with errors_on_all_ranks(place):
                if encodes == (place.rank == 0):
                    cache = fill_cache(
                        read.images, model.seg_head, model.processor, folder, cache_dtype, skip_corrupt=skip
                    )
    dtype = compute_dtype(settings.dtype, place.device)
    to_training_precision(model, dtype)
    if settings.recompute_layers:
        recompute_layers(model.mllm, settings.recompute_layers)
    model.unpadded = settings.unpadded
    if settings.compile_layers:
        compile_layers(model.mllm)
    if saved is not None and not saved.is_checkpoint:
        # Before the optimization is made, which may cut the parameters into parts.
        load_trained(model, load_file(saved.folder / WEIGHTS), saved.folder / WEIGHTS)
    with errors_on_all_ranks(place):
        if place.rank == 0:
            check_space(out, model)
    loss = TrainingLoss(model, config.loss, dtype=dtype, world=place.world, release=config.release)
    # Launchers for several ranks set it, even for a single one.
    optimization = (DeepSpeedOptimization if "LOCAL_RANK" in os.environ else Optimization)(loss, settings)
    start = Progress()
    if saved is not None:
        start = saved.progress
        optimization.load(saved.folder / OPTIMIZER, start.step)
    return Run(
        given=given,
        config=config,
        place=place,
        model=model,
        optimization=optimization,
        batches=training_batches(
            config, manifests, model.processor, cache, first_step=start.step, rank=place.rank, world=place.world
        ),
        val=val,
        unusable=read.unusable,
        cache=cache,
        states=LastStates(out, settings.keep_last, saved.folder if saved is not None else None),
        log=RunLog(out, config=given, model=model, first_step=start.step, active=place.rank == 0),
        origin=origin,
        start=start,
        best=start.best,
    )


def _steps(run: Run, stop: StopRequest) -> None:
    """Takes the steps that are left."""
    settings, place, first = run.config.train, run.place, run.start.step
    run.model.train()
    numbers = range(first + 1, settings.steps + 1)
    progress = tqdm(numbers, desc="training", disable=place.rank > 0, initial=first, total=settings.steps)
    since_log: list[Terms] = []
    throughput = Throughput()
    if first:
        _end_step(run, first, stop, is_saved=True)
    for step in progress:
        norm = _step(run, step, since_log, throughput)
        last = step == settings.steps
        if last or step % settings.log_every == 0:
            more = {"gradient_norm": norm, "learning_rate": settings.lr * warmup_decay(settings, step - 1)}
            if skipped := _skipped(run):
                more["skipped"] = skipped
            mean = mean_terms(since_log, world=place.world)
            run.log.losses(step, mean, progress, more={**more, **throughput.over_ranks(place)})
            since_log.clear()
            throughput = Throughput()
        _end_step(run, step, stop)


def _end_step(run: Run, step: int, stop: StopRequest, *, is_saved: bool = False) -> None:
    """Saves and validates where it is time to, in this order: a fault in val must not cost the steps before it.

    Raises Stopped if the run was asked to stop; `--resume` repeats a validation that came after its step's state.
    """
    settings = run.config.train
    last = step == settings.steps
    validates = run.val is not None and (last or step % settings.val_every == 0)
    request = stop.request(run.place) if validates or not last else 0
    if not is_saved and (last or request or step % settings.save_every == 0):
        _save(run, step)
        is_saved = True
    if run.val is not None and validates and not request:
        _validate(run, run.val, step, stop)
        if (request := stop.request(run.place)) and not is_saved:
            _save(run, step)
    if request:
        run.log.close()
        raise Stopped(step, run.out, request)


def _save(run: Run, step: int) -> None:
    save_state(
        run.states,
        Progress(step, run.best, _skipped(run)),
        run.origin,
        config=run.given,
        model=run.model,
        optimization=run.optimization,
        place=run.place,
    )


def _step(run: Run, step: int, since_log: list[Terms], throughput: Throughput) -> float:
    """Takes one optimizer step and returns the gradient norm.

    The host waits for the device and for the other ranks once, before the weights change: a problem in any micro-batch
    then stops every rank.
    """
    settings = run.config.train
    started = time.perf_counter()
    _seed_step(settings.seed, step, run.place.rank)
    masks: MaskDetail = "coarse" if step <= settings.coarse_masks_until else "full"
    if step <= settings.mask_from:
        masks = "none"
    problems: list[str] = []
    records: list[list[str]] = []
    for _ in range(settings.accumulation):
        waiting_since = time.perf_counter()
        batch = _read_batch(run, problems)
        throughput.waiting += time.perf_counter() - waiting_since
        terms = run.optimization.losses(batch, masks=masks)
        run.optimization.backward(terms.total)
        since_log.append(terms.detach())
        records.append(sorted({query.record for query in batch.queries}))
        throughput.images += len(batch.frames)
        throughput.tokens += sum(batch.lengths) if run.model.unpadded else batch.input_ids_SL.numel()
    totals = torch.stack([terms.total for terms in since_log[-settings.accumulation :]])
    for finite, ids in zip(totals.isfinite().tolist(), records, strict=True):
        if not finite:
            problems.append(
                f"step {step}: the loss is not finite on records {', '.join(ids)}; look at them, or lower train.lr."
            )
    raise_on_all_ranks(problems, run.place)
    norm = run.optimization.step()
    throughput.seconds += time.perf_counter() - started
    return norm


def _read_batch(run: Run, problems: list[str]) -> Batch:
    """Returns this rank's next micro-batch on its device; the last one again after a problem, which it adds to the list.

    Without a batch the other ranks would wait for this one in the model's collective operations. Only a first
    micro-batch that cannot be read, or any on the only rank, raises InputError.
    """
    previous = run.batch
    if previous is not None and problems:
        return previous
    try:
        run.batch = next(run.batches).to(run.place.device)
    except InputError as error:
        problems += error.problems
    for one in run.batches.skipped:
        if one not in run.named:
            run.named.add(one)
            tqdm.write(f"skipped: {one}", file=sys.stderr)
    if previous is None or run.place.world == 1:
        raise_on_all_ranks(problems, run.place)
    if run.batch is None:
        raise ValueError("there is neither a batch nor a problem")
    return run.batch


def _seed_step(seed: int, step: int, rank: int) -> None:
    # Dropout is a function of seed, step and rank, so that no generator's state has to be saved.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def _skipped(run: Run) -> int:
    """Counts the draws that all ranks have replaced since the run's first start."""
    return run.start.skipped + sum(gather(len(run.batches.skipped), run.place))


def _validate(run: Run, val: Manifest, step: int, stop: StopRequest) -> None:
    """Scores val (or what `data.select` names), and saves the checkpoint if it is the best so far."""
    split = run.config.data.select
    with uncompiled(run.config.train.compile_layers):
        summary = validate(
            run.model, val, run.config, unusable=run.unusable, cache=run.cache, place=run.place, stop=stop
        )
    if summary is None:
        return
    run.log.validation(step, summary, split)
    figure = (summary.dice.value + summary.iou.value) / 2
    if figure > run.best:
        try:
            _save_best(run, {"step": step, split: figures(summary)})
        except InputError:  # on every rank
            _save(run, step)
            raise
        run.best = figure


def _save_best(run: Run, facts: dict[str, object]) -> None:
    with run.optimization.whole_parameters(), errors_on_all_ranks(run.place):
        if run.place.rank == 0:
            save_checkpoint(run.model, run.out / CHECKPOINT, facts)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run, such as configs/demo.yaml")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue from the newest undamaged state in train.out")
    start.add_argument("--fresh", action="store_true", help="start again, replacing the run in train.out")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--plan", action="store_true", help="print memory, time and missing files (takes a minute)")
    parser.add_argument("--gpu", default=GPU, metavar="NAME", help=f"GPU for --plan, such as rtx4090 (default: {GPU})")
    parser.add_argument("--gpus", type=int, default=GPUS, metavar="N", help=f"GPUs for --plan (default: {GPUS})")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as train.lr=1e-4")
    arguments = parse_words(parser, argv, more="overrides")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump_config(config), end="")
        return
    if arguments.plan:
        print(render_plan(plan_training(config, gpu=arguments.gpu, gpus=arguments.gpus)), end="")
        return
    try:
        folder = train(config, resume=arguments.resume, fresh=arguments.fresh)
    except Stopped as stopped:
        if world_from_environment()[0] == 0:
            print(stopped, flush=True)
        raise SystemExit(stopped.code) from stopped
    if world_from_environment()[0] == 0:
        print(f"done: the best checkpoint is in {folder}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
