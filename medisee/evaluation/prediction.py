"""Our model's answers to a manifest's questions, as arrays (I targets, H W original image)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medisee.config import Eval
from medisee.data.check import forced_answer, spread
from medisee.data.dataset import asked_questions, record_example
from medisee.data.features import FeatureCache
from medisee.models.geometry import denormalise_box, logits_to_original
from medisee.models.medisee import MediSee
from medisee.models.processing import Example
from medisee.records.manifest import Manifest
from medisee.records.masks import Box
from medisee.records.records import QA, Record, Target

Mode = Literal["forced", "generated"]


@dataclass(frozen=True, slots=True)
class RecordQuestions:
    """One record and its questions, each about one of its targets."""

    record: Record
    questions: tuple[tuple[Target, QA], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueryAnswer:
    """The answer to one query, in memory; `Prediction` is its form on disk. Without values it is an empty answer."""

    text: str = ""
    emitted: bool = False  # whether all candidate tokens were written, so that there is a mask
    mask: NDArray[np.bool_] | None = None  # (H, W), in pixels of the original image; None is empty
    box: Box | None = None  # half-open xyxy in the same pixels; None is the smallest box around the mask
    scores: dict[str, float] = field(default_factory=dict)  # `mask_confidence`: mean probability inside the mask


def all_questions(manifest: Manifest, limit: int | None = None, seed: int = 0) -> list[RecordQuestions]:
    """Lists all questions of a manifest's records, or of `limit` records spread evenly over the file.

    A target without questions gets a class-name question, drawn by the seed.
    """
    listed = []
    for record in (manifest[place] for place in spread(len(manifest), limit)):
        rng = random.Random(f"{seed}/{record.id}")
        questions = tuple((t, qa) for t in record.targets for qa in asked_questions(t, t.category, rng))
        listed.append(RecordQuestions(record, questions))
    return listed


def shuffled_questions(asked: Sequence[RecordQuestions], seed: int = 0) -> list[RecordQuestions]:
    """Gives every target a question about another category, so that a high score means guessing, not understanding."""
    rng = random.Random(seed)
    by_category: dict[str, list[QA]] = {}
    for target, qa in (pair for one in asked for pair in one.questions):
        by_category.setdefault(target.category, []).append(qa)

    def foreign(target: Target, own: QA) -> QA:
        others = [category for category in by_category if category != target.category]
        counts = [len(by_category[category]) for category in others]
        return rng.choice(by_category[rng.choices(others, counts)[0]]) if others else own

    return [RecordQuestions(one.record, tuple((t, foreign(t, qa)) for t, qa in one.questions)) for one in asked]


def predict(
    model: MediSee,
    manifest: Manifest,
    asked: Sequence[RecordQuestions],
    mode: Mode,
    *,
    settings: Eval,
    cache: FeatureCache | None = None,
    release: bool = False,
) -> Iterator[QueryAnswer]:
    """Answers every question, in order, with a model in evaluation mode; holds one batch at a time.

    `forced`: the answer is given and read in one pass; `generated`: the model writes it. `release` decodes generated
    answers as the authors' release does, see `MediSee.generate`.
    """
    for first in range(0, len(asked), settings.batch_size):
        part = asked[first : first + settings.batch_size]
        examples = [record_example(manifest, one.record, one.questions, cache, truth=False) for one in part]
        yield from answer_examples(model, examples, mode, settings, release=release)


# Not inference_mode: weights that ZeRO 3 gathers in it could not be trained afterwards.
@torch.no_grad()
def answer_examples(
    model: MediSee, examples: Sequence[Example], mode: Mode, settings: Eval, *, release: bool = False
) -> list[QueryAnswer]:
    """Answers the queries of a few images in one pass, in order; answers, masks and boxes of the examples are not read.

    In mode `forced` every query is given `settings.forced_answer`.
    """
    forced = forced_answer(settings, model.config)
    only_asked = {"answer": forced if mode == "forced" else None, "mask": None, "box": None}
    examples = [
        replace(one, queries=tuple(replace(q, **only_asked, true_box=False, masked=True) for q in one.queries))
        for one in examples
    ]
    batch = model.processor(examples, packed=mode == "forced").to(next(model.parameters()).device)
    if mode == "forced":
        output = model(batch)
        texts, emitted = [forced] * len(batch.queries), [True] * len(batch.queries)
    else:
        output = model.generate(batch, max_new_tokens=settings.max_new_tokens, release=release)
        texts, emitted = output.texts, output.emitted
    answers = []
    for index, text in enumerate(texts):
        if not emitted[index]:
            answers.append(QueryAnswer(text=text))
            continue
        frame = batch.frames[batch.image_of_target[index]]
        logits = logits_to_original(output.masks_Jhh[index], frame)
        mask = logits > 0
        scores = {"mask_confidence": float(logits.sigmoid()[mask].mean()) if bool(mask.any()) else 0.0}
        box = denormalise_box(output.boxes_I4[index], frame.height, frame.width)
        answers.append(QueryAnswer(text=text, emitted=True, mask=mask.cpu().numpy(), box=box, scores=scores))
    return answers
