"""What one micro-batch of a run looks like: how many questions, of how many tokens, computed in which way.

It is read off the run's own manifests where they exist. Otherwise it is assumed, after the paper: every image has as
many targets as the run draws at most, and 3 images of 10 are asked implicit queries with explained answers.

Shapes: B images, S sequences, L sequence length, N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medisee.config import Config
from medisee.config.model import MAX_TOKENS
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.models.processing import Batch, Example, Query
from medisee.records.jsonl import read_lines
from medisee.records.prompts import ANSWERS, CANDIDATE_TOKENS, CLASS_QUESTIONS, candidate_text
from medisee.records.records import Record, Target, read_record

IMAGE_SIDE = 512
"""Side of an image whose size is not known, pixels; SA-Med2D-20M's are mostly 200 to 1000."""
SAMPLE = 300
"""Records that are read of a manifest."""
CHARACTERS_PER_TOKEN = 4
"""Of English text, for the usual vocabularies of 32,000."""
TEMPLATE_TOKENS = 9
"""What "[INST] ", the line break and " [/INST]" take in Mistral's vocabulary."""
ANSWER_TOKENS = 7
"""What "[SEG] and [BBOX]." and the end take."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a question without its template, and of an answer with its candidate tokens and its end."""

    question: int
    answer: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.question + self.answer


CLASS_QUERY = Lengths(20, 12)
"""A question that names the class, and its answer."""
REASONING_QUERY = Lengths(45, 45)
"""An implicit query of up to 20 words with its request, and an explained answer."""
REASONING_SHARE = 0.3
"""Share of images that are asked implicit queries (paper, section 5.1: SA-Med2D-20M : MLMR-SD = 7 : 3)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The questions asked of each image of one micro-batch; `measured` on the run's manifests, or assumed."""

    images: tuple[tuple[Lengths, ...], ...]
    measured: bool

    @property
    def queries(self) -> float:
        """Questions an image, on average."""
        return sum(map(len, self.images)) / len(self.images)


@dataclass(frozen=True, slots=True)
class ComputeMode:
    """A way of computing a micro-batch.

    Attributes:
        name: for tables.
        packed: one sequence an image; otherwise one a query.
        all_logits: of every position; otherwise of supervised ones.
        vision_per_query: the vision tower reads an image once for each of its queries; otherwise once.
        cached: the image encoder's features are read from a cache.
    """

    name: str
    packed: bool = True
    all_logits: bool = False
    vision_per_query: bool = False
    cached: bool = False


RELEASE = ComputeMode("the release's way", packed=False, all_logits=True, vision_per_query=True)
OURS = ComputeMode("ours")
CACHED = ComputeMode("ours, features cached", cached=True)


def training_workload(config: Config) -> Workload:
    """Returns a micro-batch whose images stand evenly for the run's mixture, the shortest and the longest among them.

    Raises:
        InputError: a manifest that exists cannot be read.
    """
    train, data = config.train, config.data
    paths = [Path(source.records) for source in data.train]
    measured = bool(paths) and all(path.is_file() for path in paths)
    pool: list[tuple[Lengths, ...]] = []
    if measured:
        for path, source in zip(paths, data.train, strict=True):
            sample = [_asked(record, data.targets_per_image) for record in _sample(path)]
            pool += [sample[n % len(sample)] for n in range(SAMPLE * source.weight)]
    else:
        reasoning = round(100 * REASONING_SHARE)
        kinds = [CLASS_QUERY] * (100 - reasoning) + [REASONING_QUERY] * reasoning
        pool = [(kind,) * data.targets_per_image for kind in kinds]
    pool.sort(key=lambda queries: sum(query.total for query in queries))
    places = [int((n + 0.5) / train.batch_size * len(pool)) for n in range(train.batch_size)]
    return Workload(tuple(pool[place] for place in places), measured)


def _sample(path: Path) -> list[Record]:
    problems: list[str] = []
    read = [read_record(line, problems) for line in islice(read_lines(path), SAMPLE)]
    if not read:
        problems.append(f"{path}: no record; expected one JSON object a line; check how it was made.")
    if problems:
        raise InputError(problems)
    return [record for record in read if record is not None]


def _asked(record: Record, most: int) -> tuple[Lengths, ...]:
    # A target that has several questions is asked one of them.
    return tuple(_lengths(target) for target in record.targets[:most])


def _lengths(target: Target) -> Lengths:
    if not target.qa:
        question = max(CLASS_QUESTIONS, key=len).format(name=target.category)
        return Lengths(_tokens(question), _tokens(max(ANSWERS, key=len)) + ANSWER_TOKENS)
    questions = [_tokens(qa.question) + sum(_tokens(t.question + t.answer) for t in qa.history) for qa in target.qa]
    answers = [_tokens(qa.answer.replace(candidate_text(CANDIDATE_TOKENS), "")) + ANSWER_TOKENS for qa in target.qa]
    return Lengths(_mean(questions), _mean(answers))


def _tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def _mean(values: Sequence[int]) -> int:
    return max(1, round(sum(values) / len(values)))


def make_batch(model: MediSee, workload: Workload, config: Config, way: ComputeMode) -> Batch:
    """Builds the micro-batch by the model's own processor; `add_pixels` gives it its images.

    Args:
        model: whose tokenizer has a token a word.
        workload: the questions.
        config: of the run, for the size of true masks.
        way: how they become sequences.
    """
    spec = model.seg_head.spec
    mask = np.zeros((IMAGE_SIDE, IMAGE_SIDE), dtype=bool)
    mask[: IMAGE_SIDE // 4, : IMAGE_SIDE // 4] = True
    pixel, embedding = np.zeros((1, 1, 3), dtype=np.uint8), torch.empty(spec.channels, 0, 0)
    most = config.train.masks_per_image or len(mask)
    examples = [
        Example(
            pixel,
            IMAGE_SIDE,
            IMAGE_SIDE,
            tuple(_query(lengths, mask, masked=place < most) for place, lengths in enumerate(queries)),
            embedding,
        )
        for queries in workload.images
    ]
    batch = model.processor(examples, mask_resolution=config.loss.mask_resolution, packed=way.packed)
    if way.all_logits:
        sequences, length = batch.input_ids_SL.shape
        everywhere_N2 = torch.cartesian_prod(torch.arange(sequences), torch.arange(length))
        batch = replace(batch, supervised_N2=everywhere_N2, labels_N=batch.input_ids_SL.flatten())
    return batch


def _query(lengths: Lengths, mask: np.ndarray, *, masked: bool) -> Query:
    tokens = candidate_text(CANDIDATE_TOKENS)
    question = "word3 " * min(lengths.question + TEMPLATE_TOKENS - 2, MAX_TOKENS // 2)
    answer = "word3 " * min(max(0, lengths.answer - len(tokens.split()) - 1), MAX_TOKENS // 2)
    return Query(record="plan", target="plan", question=question, answer=answer + tokens, mask=mask, masked=masked)


def add_pixels(batch: Batch, model: MediSee, way: ComputeMode) -> Batch:
    """Adds the images, zeros in the default device's memory: pixels, or cached features."""
    spec, images = model.seg_head.spec, len(batch.frames)
    pixels: Tensor | None = None
    embedding: Tensor | None = None
    if way.cached:
        embedding = torch.zeros(images, spec.channels, spec.grid, spec.grid)
    else:
        pixels = torch.zeros(images, 3, spec.size, spec.size)
    batch = replace(batch, pixels_B3FF=pixels, embedding_BCGG=embedding)
    if batch.vision_B3VV is None:
        return batch
    side = model.config.mllm.vision_size
    if way.vision_per_query:
        images = len(batch.input_ids_SL)
        batch = replace(batch, image_of_sequence_S=torch.arange(images))
    return replace(batch, vision_B3VV=torch.zeros(images, 3, side, side))
