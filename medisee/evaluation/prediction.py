"""Our model's predictions: from a manifest's questions to Prediction lines. Nothing here scores.

Shapes: I targets, h decoder output side.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from medisee.config import Eval
from medisee.data.dataset import asked_questions, record_example
from medisee.data.features import FeatureCache
from medisee.models.geometry import denormalise_box, logits_to_original
from medisee.models.medisee import MediSee
from medisee.models.processing import Batch, Example
from medisee.records.manifest import Manifest
from medisee.records.masks import encode_mask
from medisee.records.prompts import candidate_text
from medisee.records.records import QA, Prediction, Record, Target

Mode = Literal["forced", "generated"]


@dataclass(frozen=True, slots=True)
class RecordQuestions:
    """One record and the questions asked about it, each for a target."""

    record: Record
    questions: tuple[tuple[Target, QA], ...]


def all_questions(manifest: Manifest, limit: int | None = None, seed: int = 0) -> list[RecordQuestions]:
    """Lists every question of every target; targets without one get a class-name question, drawn by the seed."""
    count = len(manifest) if limit is None else min(limit, len(manifest))
    # A limit takes records evenly over the file, so that no plane or case is left out.
    records = [manifest[index * len(manifest) // count] for index in range(count)]
    asked = []
    for record in records:
        rng = random.Random(f"{seed}/{record.id}")
        questions = tuple((t, qa) for t in record.targets for qa in asked_questions(t, t.category, rng))
        asked.append(RecordQuestions(record, questions))
    return asked


def shuffled_questions(asked: Sequence[RecordQuestions], seed: int = 0) -> list[RecordQuestions]:
    """Gives every target a question about another category: what scores then is not understood but guessed."""
    rng = random.Random(seed)
    pool: dict[str, list[QA]] = {}
    for target, qa in (pair for one in asked for pair in one.questions):
        pool.setdefault(target.category, []).append(qa)

    def foreign(target: Target, own: QA) -> QA:
        others = [category for category in pool if category != target.category]
        counts = [len(pool[category]) for category in others]
        return rng.choice(pool[rng.choices(others, counts)[0]]) if others else own

    return [RecordQuestions(one.record, tuple((t, foreign(t, qa)) for t, qa in one.questions)) for one in asked]


def predict(
    model: MediSee,
    manifest: Manifest,
    asked: Sequence[RecordQuestions],
    mode: Mode,
    *,
    settings: Eval,
    cache: FeatureCache | None = None,
    quiet: bool = False,
    release: bool = False,
) -> Iterator[Prediction]:
    """Answers every question.

    Args:
        model: in evaluation mode.
        manifest: where images come from.
        asked: the questions.
        mode: `forced`: the answer is given and read in one pass; `generated`: the model writes it.
        settings: forced answer, longest answer, images per pass.
        cache: frozen features.
        quiet: no progress bar.
        release: decode generated answers as the release does, see `MediSee.locate`.
    """
    size = settings.batch_size
    for first in tqdm(range(0, len(asked), size), desc=mode, unit="batch", disable=quiet):
        part = asked[first : first + size]
        examples = [record_example(manifest, one.record, one.questions, cache, truth=False) for one in part]
        yield from answer(model, examples, mode, settings, release=release)


# Not inference_mode: weights that ZeRO 3 gathers in it could not be trained on.
@torch.no_grad()
def answer(
    model: MediSee, examples: Sequence[Example], mode: Mode, settings: Eval, *, release: bool = False
) -> list[Prediction]:
    """Answers the queries of a few images in one pass, in order.

    The answer that an example brings is never shown to the model: `forced` gives the same words to every query.
    """
    device = next(model.parameters()).device
    forced = settings.forced_answer.format(candidates=candidate_text(model.config.candidate_tokens))
    given = forced if mode == "forced" else None
    examples = [
        replace(
            one,
            queries=tuple(
                replace(q, answer=given, mask=None, box=None, true_box=False, masked=True) for q in one.queries
            ),
        )
        for one in examples
    ]
    batch = model.processor(examples, packed=mode == "forced").to(device)
    if mode == "forced":
        output = model(batch)
        return _predictions(batch, output.boxes_I4, output.masks_Jhh, mode, [forced] * len(batch.queries), None)
    written = model.generate(batch, max_new_tokens=settings.max_new_tokens, release=release)
    return _predictions(batch, written.boxes_I4, written.masks_Jhh, mode, written.texts, written.emitted)


def _predictions(
    batch: Batch,
    boxes_I4: Tensor,
    masks_Jhh: Tensor,
    mode: Mode,
    texts: Sequence[str],
    emitted: Sequence[bool] | None,
) -> list[Prediction]:
    predictions = []
    for index, query in enumerate(batch.queries):
        frame = batch.frames[int(batch.image_of_target_I[index])]
        shown = emitted is None or emitted[index]
        logits = logits_to_original(masks_Jhh[index], frame)
        mask = logits > 0
        confidence = float(logits.sigmoid()[mask].mean()) if bool(mask.any()) else 0.0
        predictions.append(
            Prediction(
                record=query.record,
                target=query.target,
                question=query.question,
                mode=mode,
                text=texts[index],
                emitted=shown,
                mask=encode_mask(mask.cpu().numpy()) if shown else None,
                box=denormalise_box(boxes_I4[index], frame.height, frame.width) if shown else None,
                scores={"mask_confidence": confidence} if shown else {},
            )
        )
    return predictions
