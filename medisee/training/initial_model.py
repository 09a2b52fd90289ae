"""The model that a training run starts with, and what its records contribute to it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medisee.config import Config
from medisee.config.model import Model
from medisee.data.check import Found, Kept, look, run_job, sample, with_lines
from medisee.foundation.errors import InputError, first_line, shortened
from medisee.models.medisee import MediSee
from medisee.models.mllm import load_tokenizer
from medisee.models.processing import Example, MediSeeProcessor, Query
from medisee.models.seg_head import SegHeadSpec
from medisee.records.manifest import Manifest
from medisee.records.prompts import ANSWERS, REQUESTS, candidate_text
from medisee.training.ranks import Place, gather, raise_on_all_ranks
from medisee.weights.checkpoints import check_same_model, load_checkpoint, local_checkpoint
from medisee.weights.tokenizer import add_candidate_tokens, train_tokenizer


@dataclass(frozen=True, slots=True)
class Read:
    """What a run takes from its records before it starts: its tokenizer, the images whose features are cached (none
    without a cache), and under `data.skip_corrupt` the ids of the records of val that cannot be scored."""

    tokenizer: PreTrainedTokenizerBase
    images: list[Path]
    unusable: frozenset[str]


def read_records(
    config: Config,
    manifests: Sequence[Manifest],
    val: Manifest | None,
    place: Place,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Read:
    """Looks at images, masks, boxes and words before the run reads them, in one pass; every rank calls it.

    The files are divided among the ranks; of a manifest of more than `check.MOST` records a sample is looked at. A
    tokenizer that is not given is loaded, or trained on the texts. The first rank raises InputError with the first
    problems, or prints them under `data.skip_corrupt`.
    """
    texts = tokenizer is None and config.train.init is None and config.model.mllm.source is None
    looked: list[tuple[Manifest, int, Found]] = []
    for manifest in (*manifests, *([val] if val is not None else [])):
        job, found = run_job(config, manifest, is_val=manifest is val), Found()
        chosen = sample(job.places, config.train.seed)
        if place.rank == 0 and len(chosen) < len(job.places):
            print(f"{manifest.path}: {len(chosen):,} of {len(job.places):,} records are checked", flush=True)
        wanted = {"images": config.data.cache is not None, "texts": texts and manifest is not val}
        own = chosen[place.rank :: place.world]
        places = range(len(manifest)) if any(wanted.values()) else own
        job = replace(job, places=places, files=frozenset(own), **wanted)
        for part in look(job, config.data.workers, f"check {manifest.path.name}"):
            found.add(part)
        looked.append((manifest, len(chosen), found))
    problems: list[str] = []
    try:
        tokenizer = tokenizer or build_tokenizer(config, {text for *_, found in looked for text in found.texts})
    except InputError as error:
        problems += error.problems
    unusable: set[str] = set()
    for manifest, count, found in looked:
        own_problems = found.problems + (too_long(config.model, tokenizer, found.words) if tokenizer else [])
        everyones = list(dict.fromkeys(one for part in gather(own_problems, place) for one in part))
        bad = {at for at, _ in everyones}
        skipped = config.data.skip_corrupt and len(bad) < count
        if not sum(gather(found.counts["", "", "targets"], place)):
            problems.append(f"{manifest.path}: no record has a target; at least one is needed.")
        if place.rank > 0 or not (everyones and skipped):
            problems += with_lines(manifest, everyones) if place.rank == 0 else ()
        else:
            shown = shortened(with_lines(manifest, everyones), str(manifest.path), 3)
            print(f"{manifest.path}: {len(bad):,} record(s) are skipped:", *shown, sep="\n", file=sys.stderr)
        if manifest is val and skipped:
            unusable = {manifest[at].id for at in bad}
    raise_on_all_ranks(shortened(problems, "`medisee prepare check --config` with this configuration", 10), place)
    assert tokenizer is not None
    return Read(tokenizer, [image for *_, found in looked for image in found.images], frozenset(unusable))


def too_long(model: Model, tokenizer: PreTrainedTokenizerBase, words: Iterable[Kept]) -> list[tuple[int, str]]:
    """Returns what a model cannot read of the words that a look at records kept, with the records' places."""
    head, problems = model.seg_head, []
    # Nothing but words is read with it.
    processor = MediSeeProcessor(model, tokenizer, SegHeadSpec(head.size, head.resize, head.pixels, 0, 0))
    for at, record, target, qa in words:
        query = Query(record=record, target=target, question=qa.question, answer=qa.answer, history=qa.history)
        try:
            processor.check(Example(None, 0, 0, (query,)))
        except InputError as error:
            problems += [(at, problem) for problem in error.problems]
    return problems


def build_tokenizer(config: Config, texts: Set[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the checkpoint or language model that the run starts from, or trains one on the texts."""
    if config.train.init is not None:
        folder = local_checkpoint(config.train.init)
        check_same_model(folder, config.model)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{folder}: unreadable tokenizer ({first_line(error)}); copy it again.") from error
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
