"""Questions of a bank for the targets of records. What is drawn depends on the seed and on what is asked about alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import Random

from medisee.data.query_bank import Pool, held_out_questions, training_questions
from medisee.records import QA, Record, Target


def ask_training(record: Record, pools: Mapping[str, Pool], seed: int, count: int) -> Record:
    """Gives each target `count` questions, other ones on every record."""
    return _with_questions(
        record, {t.id: training_questions(pools[t.category], count, _rng(seed, record, t)) for t in record.targets}
    )


def ask_held_out(records: Iterable[Record], pools: Mapping[str, Pool], seed: int) -> list[Record]:
    """Gives each target a short and a long question whose perspectives change from record to record and target."""
    return [
        _with_questions(
            record,
            {
                target.id: held_out_questions(pools[target.category], turn + place, _rng(seed, record, target))
                for place, target in enumerate(record.targets)
            },
        )
        for turn, record in enumerate(records)
    ]


def ask_seen(records: Iterable[Record], training: Mapping[str, Pool], seed: int) -> list[Record]:
    """Asks held-out records in the wordings of training: what a model loses there, it does not lose by the words.

    The records get ids of their own, so that one evaluation can take both.
    """
    return ask_held_out((replace(record, id=f"{record.id}_seen") for record in records), training, seed)


def _with_questions(record: Record, qa: Mapping[str, tuple[QA, ...]]) -> Record:
    return replace(record, targets=tuple(replace(target, qa=qa[target.id]) for target in record.targets))


def _rng(seed: int, record: Record, target: Target) -> Random:
    return Random(f"{seed}/{record.id}/{target.id}")
