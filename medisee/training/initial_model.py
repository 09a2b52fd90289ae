"""The model that a training run starts with, and what its records contribute to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from medisee.config import Config
from medisee.config.model import Model
from medisee.data.check import Found, Job, Said, look, no_target, sample, scored_job, training_job, with_lines
from medisee.foundation.errors import InputError, shortened
from medisee.models.medisee import MediSee
from medisee.models.mllm import load_tokenizer
from medisee.models.processing import MediSeeProcessor, Query
from medisee.models.seg_head import SegHeadSpec
from medisee.records.manifest import Manifest
from medisee.records.prompts import ANSWERS, REQUESTS, candidate_text
from medisee.training.ranks import Place, errors_on_all_ranks, gather, raise_on_all_ranks
from medisee.weights.checkpoints import check_same_model, load_checkpoint, local_checkpoint
from medisee.weights.tokenizer import add_candidate_tokens, read_tokenizer, train_tokenizer

SHOWN = 10  # problems of the records that a training prints


@dataclass(frozen=True, slots=True)
class Read:
    """What a run takes from its records before it starts: its tokenizer, the images whose features are cached (none
    without a cache), and under `data.skip_corrupt` the ids of the records of val that cannot be scored."""

    tokenizer: PreTrainedTokenizerBase
    images: list[Path]
    unusable: frozenset[str]


def read_records(config: Config, manifests: Sequence[Manifest], val: Manifest | None, place: Place) -> Read:
    """Looks at images, masks, boxes and words before the run reads them, in one pass; every rank calls it.

    The files are divided among the ranks; of a manifest of more than `check.MOST` records a sample is looked at. The
    first rank raises InputError with the first problems, or prints them under `data.skip_corrupt`.
    """
    with errors_on_all_ranks(place):
        processor = known_words(config)
    jobs, sizes = [], []
    wanted = [training_job(config, manifest) for manifest in manifests]
    wanted += [scored_job(config, val, config.train.val_limit)] if val is not None else []
    for job in wanted:
        manifest = job.manifest
        chosen = sample(job.places, config.train.seed)
        if place.rank == 0 and len(chosen) < len(job.places):
            print(f"{manifest.path}: {len(chosen):,} of {len(job.places):,} records are checked", flush=True)
        own, images = chosen[place.rank :: place.world], config.data.cache is not None
        reads_all = images or (processor is None and manifest is not val)
        jobs.append(replace(job, places=job.places if reads_all else own, files=frozenset(own), images=images))
        sizes.append(len(job.places if reads_all else chosen))
    with errors_on_all_ranks(place):
        processor, found = look_at(config, jobs, processor, workers=config.data.workers)
    problems: list[str] = []
    unusable: set[str] = set()
    for job, size, one in zip(jobs, sizes, found, strict=True):
        parts = gather((one.problems, one.counts["", "usable targets"]), place)
        own_problems = [problem for part, _ in parts for problem in part]
        bad = {at for at, _ in own_problems}
        if not sum(targets for _, targets in parts) and (config.data.skip_corrupt or not own_problems):
            problems.append(no_target(job.manifest))
        lines = with_lines(job.manifest, own_problems) if place.rank == 0 else []
        if not config.data.skip_corrupt or len(bad) == size:
            problems += lines
            continue
        if job.manifest is val:
            unusable = {job.manifest[at].id for at in bad}
        if lines:
            shown = shortened(lines, str(job.manifest.path), 3)
            print(f"{job.manifest.path}: skips {len(bad):,} of {size:,} records", *shown, sep="\n", file=sys.stderr)
    problems = list(dict.fromkeys(problems))
    rest = f"and {len(problems) - SHOWN} more; medisee prepare check --config lists all."
    problems[SHOWN:] = [rest] if len(problems) > SHOWN else []
    raise_on_all_ranks(problems, place)
    return Read(processor.tokenizer, [image for one in found for image in one.images], frozenset(unusable))


def look_at(
    config: Config, jobs: Sequence[Job], processor: MediSeeProcessor | None, *, workers: int
) -> tuple[MediSeeProcessor, list[Found]]:
    """Looks at records and counts the tokens of long texts; `processor`: see `known_words`. Returns it, or a new one."""
    every: list[Found] = []
    for job in jobs:
        every.append(Found())
        for part in look(replace(job, texts=processor is None and job.answer is None), workers):
            if processor is not None:
                _hold_against(processor, part)
            every[-1].add(part)
    if processor is None:
        texts = {text for found in every for text in found.texts}
        processor = words_processor(config.model, build_tokenizer(config, texts))
        for found in every:
            _hold_against(processor, found)
    for found in every:
        if found.longest is not None:
            with suppress(InputError):  # which is already among the problems
                found.tokens = count_tokens(processor, found.longest)
    return processor, every


def _hold_against(processor: MediSeeProcessor, found: Found) -> None:
    for said in found.words:
        try:
            count_tokens(processor, said)
        except InputError as error:
            found.problems += [(said.place, problem) for problem in error.problems]
    found.words.clear()


def count_tokens(processor: MediSeeProcessor, said: Said) -> int:
    """Returns the tokens of a question with its answer; InputError where the model cannot read it."""
    words = {"question": said.qa.question, "answer": said.qa.answer, "history": said.qa.history}
    return processor.count_tokens([Query(record=said.record, target=said.target, **words)])


def known_words(config: Config) -> MediSeeProcessor | None:
    """Returns what counts the tokens of a run; None where its tokenizer is trained on its texts."""
    if config.train.init is None and config.model.mllm.source is None:
        return None
    return words_processor(config.model, build_tokenizer(config, set()))


def words_processor(model: Model, tokenizer: PreTrainedTokenizerBase) -> MediSeeProcessor:
    """Returns a processor for words only, for which no seg head is built."""
    head = model.seg_head
    return MediSeeProcessor(model, tokenizer, SegHeadSpec(head.size, head.resize, head.pixels, channels=0, grid=0))


def build_tokenizer(config: Config, texts: Set[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the checkpoint or language model that the run starts from, or trains one on the texts."""
    if config.train.init is not None:
        folder = local_checkpoint(config.train.init)
        check_same_model(folder, config.model)
        return read_tokenizer(folder)
    if config.model.mllm.source is not None:
        return load_tokenizer(config.model.mllm, config.model.candidate_tokens)
    candidates = candidate_text(config.model.candidate_tokens)
    always = {text.format(candidates=candidates) for text in ANSWERS} | {*REQUESTS, "[INST] ", " [/INST]"}
    tokenizer = train_tokenizer(texts | always, config.model.mllm.vocabulary)
    add_candidate_tokens(tokenizer, config.model.candidate_tokens)
    return tokenizer


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> MediSee:
    """Builds the model, or loads the one that the run starts from, which has the same tokenizer."""
    if config.train.init is not None:
        return load_checkpoint(local_checkpoint(config.train.init), MediSee)
    return MediSee(config.model, tokenizer)
