"""What one micro-batch of a run looks like: how many questions, of how many tokens, computed in which mode.

It is read from the run's own manifests where they exist. Otherwise it is assumed, following the paper: every image has
as many targets as the run draws at most, and 3 of 10 images have implicit queries with explained answers.

Shapes: B images, S sequences, L sequence length, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from medisee.config import Config
from medisee.config.model import MAX_TOKENS
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.models.processing import Batch, Example, Query
from medisee.records.jsonl import read_line, read_lines
from medisee.records.prompts import ANSWERS, CANDIDATE_TOKENS, CLASS_QUESTIONS, candidate_text
from medisee.records.records import Record, Target

IMAGE_SIDE = 512  # side of an image whose size is not known, pixels; SA-Med2D-20M's are mostly 200 to 1000
SAMPLE = 300  # records that are read from a manifest
CHARACTERS_PER_TOKEN = 4  # of English text, for the usual vocabularies of 32,000
TEMPLATE_TOKENS = 9  # of "[INST] ", the line break and " [/INST]" in Mistral's vocabulary
ANSWER_TOKENS = 7  # of "[SEG] and [BBOX]." and the end


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a question without its template, and of an answer with its candidate tokens and its end."""

    question: int
    answer: int


CLASS_QUERY = Lengths(20, 12)  # a question that names the class, and its answer
REASONING_QUERY = Lengths(45, 45)  # an implicit query of up to 20 words with its request, and an explained answer
REASONING_SHARE = 0.3  # of images with implicit queries (paper, section 5.1: SA-Med2D-20M : MLMR-SD = 7 : 3)


@dataclass(frozen=True, slots=True)
class Workload:
    """The questions about each image of one micro-batch; `measured` on the run's manifests, or assumed."""

    images: tuple[tuple[Lengths, ...], ...]
    measured: bool


@dataclass(frozen=True, slots=True)
class ComputeMode:
    """How a micro-batch is computed."""

    name: str  # for tables
    packed: bool = True  # one sequence per image; otherwise one per query
    all_logits: bool = False  # logits at every position; otherwise at supervised ones only
    vision_per_query: bool = False  # the vision tower reads an image once for each of its queries; otherwise once
    cached: bool = False  # the image encoder's features are read from a cache


RELEASE = ComputeMode("the release's way", packed=False, all_logits=True, vision_per_query=True)
OURS = ComputeMode("ours")
CACHED = ComputeMode("ours, features cached", cached=True)


def training_workload(config: Config) -> Workload:
    """Returns a micro-batch whose images represent the run's mixture evenly, the shortest and the longest among them."""
    train, data = config.train, config.data
    measured = bool(data.train) and all(Path(source.records).is_file() for source in data.train)
    images: list[tuple[Lengths, ...]] = []
    if measured:
        for source in data.train:
            # A target that has several questions is drawn with one of them.
            sample = [
                tuple(map(_lengths, record.targets[: data.targets_per_image]))
                for record in _sample(Path(source.records))
            ]
            images += [sample[n % len(sample)] for n in range(SAMPLE * source.weight)]
    else:
        reasoning = round(100 * REASONING_SHARE)
        kinds = [CLASS_QUERY] * (100 - reasoning) + [REASONING_QUERY] * reasoning
        images = [(kind,) * data.targets_per_image for kind in kinds]
    images.sort(key=lambda queries: sum(query.question + query.answer for query in queries))
    places = [int((n + 0.5) / train.batch_size * len(images)) for n in range(train.batch_size)]
    return Workload(tuple(images[place] for place in places), measured)


def _sample(path: Path) -> list[Record]:
    problems: list[str] = []
    records = [read_line(Record, line, problems) for line in islice(read_lines(path), SAMPLE)]
    if not records:
        problems.append(f"{path}: no record; expected one JSON object per line. Check how the file was made.")
    if problems:
        raise InputError(problems)
    return [record for record in records if record is not None]


def _lengths(target: Target) -> Lengths:
    if not target.qa:
        question = max(CLASS_QUESTIONS, key=len).format(name=target.category)
        return Lengths(_tokens(question), _tokens(max(ANSWERS, key=len)) + ANSWER_TOKENS)
    questions = [_tokens(qa.question) + sum(_tokens(t.question + t.answer) for t in qa.history) for qa in target.qa]
    answers = [_tokens(qa.answer.replace(candidate_text(CANDIDATE_TOKENS), "")) + ANSWER_TOKENS for qa in target.qa]
    return Lengths(*(max(1, round(sum(values) / len(values))) for values in (questions, answers)))


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def make_batch(model: MediSee, workload: Workload, config: Config, mode: ComputeMode) -> Batch:
    """Builds the micro-batch with the model's own processor; `add_pixels` gives it its images.

    The model's tokenizer has one token per word.
    """
    mask = np.zeros((IMAGE_SIDE, IMAGE_SIDE), dtype=bool)
    mask[: IMAGE_SIDE // 4, : IMAGE_SIDE // 4] = True
    pixel, embedding = np.zeros((1, 1, 3), dtype=np.uint8), torch.empty(model.seg_head.spec.channels, 0, 0)
    most = config.train.masks_per_image or len(mask)
    examples = []
    for image in workload.images:
        queries = tuple(_query(lengths, mask, masked=place < most) for place, lengths in enumerate(image))
        examples.append(Example(pixel, IMAGE_SIDE, IMAGE_SIDE, queries, embedding))
    batch = model.processor(examples, mask_resolution=config.loss.mask_resolution, packed=mode.packed)
    if mode.all_logits:
        sequences, length = batch.input_ids_SL.shape
        everywhere_N2 = torch.cartesian_prod(torch.arange(sequences), torch.arange(length))
        batch = replace(batch, supervised_N2=everywhere_N2, labels_N=batch.input_ids_SL.flatten())
    return batch


def _query(lengths: Lengths, mask: np.ndarray, *, masked: bool) -> Query:
    tokens = candidate_text(CANDIDATE_TOKENS)
    question = "word3 " * min(lengths.question + TEMPLATE_TOKENS - 2, MAX_TOKENS // 2)
    answer = "word3 " * min(max(0, lengths.answer - len(tokens.split()) - 1), MAX_TOKENS // 2)
    return Query(record="plan", target="plan", question=question, answer=answer + tokens, mask=mask, masked=masked)


def add_pixels(batch: Batch, model: MediSee, mode: ComputeMode) -> Batch:
    """Adds the images, zeros in the default device's memory: pixels, or cached features."""
    spec, images = model.seg_head.spec, len(batch.frames)
    if mode.cached:
        cached_BCGG = torch.zeros(images, spec.channels, spec.grid, spec.grid)
        batch = replace(batch, pixels_B3FF=None, embedding_BCGG=cached_BCGG)
    else:
        batch = replace(batch, pixels_B3FF=torch.zeros(images, 3, spec.size, spec.size), embedding_BCGG=None)
    if batch.vision_B3VV is None:
        return batch
    if mode.vision_per_query:
        images = len(batch.input_ids_SL)
        batch = replace(batch, image_of_sequence_S=torch.arange(images))
    side = model.config.mllm.vision_size
    return replace(batch, vision_B3VV=torch.zeros(images, 3, side, side))
