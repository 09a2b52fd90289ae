"""Training: one visible loop. Run it as

  python scripts/train.py --config configs/demo.yaml [--resume] [train.lr=1e-4 ...]      one GPU, or the CPU
  deepspeed scripts/train.py --config configs/medisee_7b.yaml                            all GPUs of a machine

Writes <train.out>/: checkpoint/ (best on val), last/ (for --resume), log.jsonl, tensorboard/, run.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from medisee.config import Config, dump_config, load_config
from medisee.data.dataset import training_batches
from medisee.data.features import FeatureCache, fill_cache
from medisee.data.prompts import ANSWERS, CLASS_QUESTIONS, REQUESTS, candidate_text
from medisee.errors import InputError, exit_code
from medisee.files import replace_folder, write_json
from medisee.manifest import Manifest
from medisee.masks import decode_mask, mask_box
from medisee.metrics import score, summarise
from medisee.models.checkpoints import WEIGHTS, load_trained, save_checkpoint, trained_state
from medisee.models.medisee import MediSee
from medisee.models.mllm import load_tokenizer
from medisee.models.objective import Terms, end_to_end_loss, mean_terms
from medisee.models.tokenizer import add_candidate_tokens, train_tokenizer
from medisee.optimization import DeepSpeedOptimization, Optimization, TorchOptimization, world_from_environment
from medisee.precision import compute_dtype
from medisee.prediction import all_questions, predict
from medisee.processing import Batch
from medisee.run_log import RunLog

CHECKPOINT = "checkpoint"
LAST = "last"
PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int
    world: int
    device: torch.device


def train(config: Config, *, resume: bool = False) -> Path:
    """Trains a model and returns the folder of the best checkpoint.

    Args:
        config: the run.
        resume: continue from <train.out>/last.

    Raises:
        InputError: bad data, a run folder of another configuration, nothing to resume.
    """
    settings, out = config.train, Path(config.train.out)
    manifests = _training_manifests(config)
    val = Manifest(config.data.val, config.data.root) if config.data.val else None
    _check_run_folder(out, config, resume)
    place = _join_ranks()
    _seed(settings.seed)
    model = build_model(config, manifests).to(place.device)
    cache = _features(config, model, [*manifests, *([val] if val else [])], place)
    launched = "LOCAL_RANK" in os.environ
    optimization = (DeepSpeedOptimization if launched else TorchOptimization)(model, settings)
    start = _restore(out / LAST, model, optimization) if resume else Progress(0, -1.0)
    first_step, best = start.step, start.best
    log = RunLog(out, config=config, model=model, first_step=first_step, active=place.rank == 0)
    batches = training_batches(
        config, manifests, model.processor, cache, first_step=first_step, rank=place.rank, world=place.world
    )
    dtype = compute_dtype(settings.dtype, place.device)
    model.train()
    progress = tqdm(
        range(first_step + 1, settings.steps + 1),
        desc="training",
        disable=place.rank > 0,
        initial=first_step,
        total=settings.steps,
    )
    since_log: list[Terms] = []
    for step in progress:
        for _ in range(settings.accumulation):
            batch = next(batches).to(place.device)
            with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
                output = model(batch, masks=step > settings.mask_from)
                terms = end_to_end_loss(output, batch, config.loss, world=place.world)
            _check_finite(terms, batch, step)
            optimization.backward(terms.total)
            since_log.append(terms.detach())
        norm = optimization.step()
        last = step == settings.steps
        if last or step % settings.log_every == 0:
            log.losses(step, mean_terms(since_log, world=place.world), norm, progress)
            since_log.clear()
        if val is not None and (last or step % settings.val_every == 0):
            best = _validate(config, model, val, cache, step=step, best=best, log=log, place=place)
        if last or step % settings.save_every == 0:
            _save_last(out / LAST, config, model, optimization, Progress(step, best))
    if val is None and place.rank == 0:
        save_checkpoint(model, out / CHECKPOINT, {"step": settings.steps})
    log.end()
    return out / CHECKPOINT


def build_model(config: Config, manifests: Sequence[Manifest]) -> MediSee:
    """Builds the model, with a tokenizer trained on the manifests' texts where no language model is named."""
    if config.model.mllm.source is not None:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model.mllm, config.model.candidate_tokens)
    else:
        tokenizer = train_tokenizer(_texts(config, manifests), config.model.mllm.vocabulary)
        add_candidate_tokens(tokenizer, config.model.candidate_tokens)
    return MediSee(config.model, tokenizer)


def _texts(config: Config, manifests: Sequence[Manifest]) -> set[str]:
    candidates = candidate_text(config.model.candidate_tokens)
    texts = {text.format(candidates=candidates) for text in ANSWERS} | set(REQUESTS) | {"[INST] ", " [/INST]"}
    for manifest in manifests:
        for record in manifest:
            for target in record.targets:
                texts |= {question.format(name=target.category) for question in CLASS_QUESTIONS}
                texts |= {text for qa in target.qa for text in (qa.question, qa.answer)}
    return texts


def _training_manifests(config: Config) -> list[Manifest]:
    if not config.data.train:
        raise InputError("data.train: no training manifest; name at least one, such as data/demo/train_class.jsonl.")
    return [Manifest(source.records, source.root) for source in config.data.train]


def _check_run_folder(out: Path, config: Config, resume: bool) -> None:
    state = out / LAST / PROGRESS
    if not resume:
        return
    if not state.exists():
        raise InputError(f"{state}: nothing to resume; start without --resume, or set train.out to the run's folder.")
    old = json.loads(state.read_text(encoding="utf-8"))["config"]
    if old != config.model_dump(mode="json"):
        raise InputError(f"{state}: the run was started with another configuration; resume with the same one.")


def _join_ranks() -> Place:
    rank, local, world = world_from_environment()
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    return Place(rank, world, device)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _features(config: Config, model: MediSee, manifests: Sequence[Manifest], place: Place) -> FeatureCache | None:
    if config.data.cache is None:
        return None
    images = [manifest.image_path(record) for manifest in manifests for record in manifest]
    dtype = compute_dtype(config.data.cache_dtype, place.device)
    if place.rank > 0:
        _wait_for_ranks()
    cache = fill_cache(images, model.seg_head, model.processor, Path(config.data.cache), dtype)
    if place.rank == 0:
        _wait_for_ranks()
    return cache


def _check_finite(terms: Terms, batch: Batch, step: int) -> None:
    if not bool(torch.isfinite(terms.total)):
        ids = sorted({query.record for query in batch.queries})
        raise InputError(
            f"step {step}: the loss is not finite on records {', '.join(ids)}; look at them, or lower train.lr."
        )


def _validate(
    config: Config,
    model: MediSee,
    val: Manifest,
    cache: FeatureCache | None,
    *,
    step: int,
    best: float,
    log: RunLog,
    place: Place,
) -> float:
    """Scores teacher-forced answers on val; the mean of Dice and box IoU decides which checkpoint is kept."""
    if place.rank > 0:
        return best
    model.eval()
    asked = all_questions(val, config.train.val_limit)
    predictions = predict(model, val, asked, "forced", settings=config.eval, cache=cache, quiet=True)
    truths = [(val.mask(one.record, target), target) for one in asked for target, _ in one.questions]
    scores = [
        score(
            decode_mask(prediction.mask) if prediction.mask else None,
            mask,
            prediction.box,
            target.box or mask_box(mask),
        )
        for prediction, (mask, target) in zip(predictions, truths, strict=True)
    ]
    model.train()
    summary = summarise(scores, resamples=1)
    log.validation(step, summary)
    figure = (summary.dice.value + summary.iou.value) / 2
    if figure > best:
        save_checkpoint(model, Path(config.train.out) / CHECKPOINT, {"step": step, "val": summary.to_json()})
    return max(best, figure)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: steps done and the best figure on val."""

    step: int
    best: float


def _save_last(folder: Path, config: Config, model: MediSee, optimization: Optimization, progress: Progress) -> None:
    """Writes all that an exact resume needs; the old folder is replaced only when the new one is complete."""
    rank = world_from_environment()[0]
    new = folder.with_name(f".{folder.name}.new")
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    _wait_for_ranks()
    optimization.save(new)
    torch.save(torch.get_rng_state(), new / f"rng_{rank}.pt")
    if rank == 0:
        state = {name: value.detach().cpu().contiguous() for name, value in trained_state(model).items()}
        save_file(state, str(new / WEIGHTS))
        facts = {"step": progress.step, "best": progress.best, "config": config.model_dump(mode="json")}
        write_json(new / PROGRESS, facts)
    _wait_for_ranks()
    if rank == 0:
        replace_folder(new, folder)
    _wait_for_ranks()


def _restore(folder: Path, model: MediSee, optimization: Optimization) -> Progress:
    load_trained(model, load_file(folder / WEIGHTS), folder / WEIGHTS)
    optimization.load(folder)
    rank = world_from_environment()[0]
    torch.set_rng_state(torch.load(folder / f"rng_{rank}.pt", weights_only=True))
    facts = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return Progress(facts["step"], facts["best"])


def _wait_for_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def main(argv: Sequence[str] | None = None) -> None:
    """Trains from the command line."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML run, such as configs/demo.yaml")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of train.out")
    parser.add_argument("--print-config", action="store_true", help="print the resolved run and end")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="dotted overrides, such as train.lr=1e-4")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump_config(config), end="")
        return
    folder = train(config, resume=arguments.resume)
    if world_from_environment()[0] == 0:
        print(f"done: the best checkpoint is in {folder}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
