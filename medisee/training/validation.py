"""The figures on val that choose the best checkpoint: teacher-forced answers, scored by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch

from medisee.config import Config
from medisee.data.features import FeatureCache
from medisee.evaluation.metrics import Score, Summary, score, summarise
from medisee.evaluation.prediction import RecordQuestions, all_questions, predict
from medisee.foundation.hardware import compute_dtype, is_mixed
from medisee.models.medisee import MediSee
from medisee.records.manifest import Manifest
from medisee.records.masks import mask_box
from medisee.training.interruption import StopRequest
from medisee.training.ranks import Place, gather


def validate(
    model: MediSee,
    val: Manifest,
    config: Config,
    *,
    cache: FeatureCache | None,
    place: Place,
    stop: StopRequest,
    unusable: Set[str] = frozenset(),
) -> Summary | None:
    """Scores val; every rank calls it and gets the same summary, which is also that of a single rank.

    None if the run was asked to stop, after the batch in which it was. The model is left in training mode. `unusable` are
    ids of records that are left out. `val` is the test file only in runs that reproduce the release (`data.select`).
    """
    asked, size = all_questions(val, config.train.val_limit), config.eval.batch_size
    # A record without targets has nothing to score.
    questions = [one for one in asked if one.questions and one.record.id not in unusable]
    # The batches of a single rank, dealt out: what shares a batch, and so is padded together, stays the same.
    parts = [questions[first : first + size] for first in range(0, len(questions), size)]
    own: dict[int, list[Score]] = {}
    dtype = compute_dtype(config.train.dtype, place.device)
    model.eval()
    with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32 and is_mixed(model)):
        for first in range(0, len(parts), place.world):
            # A rank with nothing left repeats the last part, since gathering cut parameters needs every rank.
            number = min(first + place.rank, len(parts) - 1)
            scores = _scores(model, val, parts[number], config=config, cache=cache)
            if number == first + place.rank:
                own[number] = scores
            if stop.request(place):
                return None
    model.train()
    everyones = {number: scores for part in gather(own, place) for number, scores in part.items()}
    return summarise([one for number in sorted(everyones) for one in everyones[number]], resamples=1)


def figures(summary: Summary) -> dict[str, float]:
    """Returns the figures that were computed, and `n`: `validate` resamples nothing, so there is no interval."""
    return {name: value for name, value in summary.to_json().items() if name != "ci95"}


def _scores(
    model: MediSee, val: Manifest, part: Sequence[RecordQuestions], *, config: Config, cache: FeatureCache | None
) -> list[Score]:
    answers = predict(model, val, part, "forced", settings=config.eval, cache=cache)
    truths = [(val.mask(one.record, target), target) for one in part for target, _ in one.questions]
    return [
        score(answer.mask, mask, answer.box, target.box or mask_box(mask))
        for answer, (mask, target) in zip(answers, truths, strict=True)
    ]
