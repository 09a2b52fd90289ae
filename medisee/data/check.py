"""Looks at all that a manifest's records hold before a run reads them: images, masks, boxes, words.

Nothing here needs torch, so that processes which only read files start fast. Records are read in parts and not kept.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from medisee.config import Config
from medisee.foundation.errors import InputError
from medisee.records.images import read_image
from medisee.records.jsonl import read_lines
from medisee.records.manifest import Manifest
from medisee.records.prompts import ANSWERS, CANDIDATE_TOKENS, CLASS_QUESTIONS, candidate_text
from medisee.records.records import QA, Record

MOST = 20_000  # records of a manifest whose files are read before a training; of more, a sample
LONG = 512  # bytes from which a question with its answer is tokenised: no usual tokenizer makes two tokens of a byte
MARK = "<image>"
_PART = 64  # records that a process reads at a time
_AHEAD = 4  # parts for each process, so that none waits and none piles up
_WORTH = 16  # parts for each process from which it is worth starting

ALL = candidate_text(CANDIDATE_TOKENS)  # in an answer it becomes the model's own candidate tokens

Kept = tuple[int, str, str, QA]
"""Words to tokenise later: the record's place in its manifest, its id, the target's id, the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A manifest, and what is looked at in its records.

    Attributes:
        manifest: the manifest.
        places: the records that are read.
        files: those of them whose images and masks are read; None: all.
        tokens: what each answer must hold; empty: answers are not read.
        answer: replaces every answer, as in validation.
        classes: whether targets that have questions are also asked for by their category.
        images, texts: whether the images' paths and the texts that a tokenizer learns from are returned.
    """

    manifest: Manifest
    places: Sequence[int]
    files: frozenset[int] | None = None
    tokens: tuple[str, ...] = ()
    answer: str | None = None
    classes: bool = False
    images: bool = False
    texts: bool = False


@dataclass(slots=True)
class Found:
    """What the records of a manifest hold, and what is wrong with them.

    Attributes:
        problems: each with its record's place in the manifest.
        counts: (kind, value, noun), such as ("modality", "ct", "targets").
        words: questions that a model may refuse: of `LONG` bytes or more, or with LLaVA's mark for the image.
        longest: the characters of the longest question with its answer, and what it is.
        images, texts: see `Job`.
    """

    problems: list[tuple[int, str]] = field(default_factory=list)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    words: list[Kept] = field(default_factory=list)
    longest: tuple[int, Kept | None] = (0, None)
    images: list[Path] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)

    def add(self, other: Found) -> None:
        """Takes in what was found in another part."""
        self.problems += other.problems
        self.counts.update(other.counts)
        self.words += other.words
        self.images += other.images
        self.texts |= other.texts
        self.longest = max(self.longest, other.longest, key=itemgetter(0))


def look(job: Job, workers: int = 1, what: str = "check") -> Iterator[Found]:
    """Reads a job's records in parts, with several workers in processes of their own."""
    parts = [job.places[first : first + _PART] for first in range(0, len(job.places), _PART)]
    workers = min(workers, len(parts) // _WORTH)
    found = _in_processes(job, parts, workers) if workers > 1 else (_part(job, part) for part in parts)
    with tqdm(total=len(job.places), desc=what, unit=" records", disable=None, leave=False) as progress:
        for part, one in zip(parts, found, strict=True):
            yield one
            progress.update(len(part))


def with_lines(manifest: Manifest, problems: Iterable[tuple[int, str]]) -> list[str]:
    """Puts file and line before problems, each with its record's place in the manifest, and orders them by line."""
    ordered = sorted(problems, key=itemgetter(0))
    places = {place for place, _ in ordered}
    lines = islice(read_lines(manifest.path), max(places) + 1) if places else ()
    where = {place: line.where for place, line in enumerate(lines) if place in places}
    unlined = f"{manifest.path}: "
    return [f"{where.get(place, manifest.path)}: {problem.removeprefix(unlined)}" for place, problem in ordered]


def run_job(config: Config, manifest: Manifest, *, is_val: bool = False) -> Job:
    """Returns what a run reads of a manifest: all of a training one, or what it scores of val."""
    tokens, count = config.model.candidate_tokens, len(manifest)
    if is_val:
        answer = config.eval.forced_answer.format(candidates=candidate_text(tokens))
        return Job(manifest=manifest, places=spread(count, config.train.val_limit), answer=answer)
    return Job(manifest=manifest, places=range(count), tokens=tokens, classes=bool(config.loss.js or config.loss.mse))


def spread(length: int, limit: int | None) -> Sequence[int]:
    """Returns the places of all records of a manifest, or of `limit` records spread evenly over it."""
    count = length if limit is None else min(limit, length)
    return [index * length // count for index in range(count)] if count < length else range(length)


def sample(places: Sequence[int], seed: int) -> Sequence[int]:
    """Returns the places, or of more than `MOST` so many, drawn by the seed, in order."""
    return places if len(places) <= MOST else sorted(random.Random(seed).sample(places, MOST))


def spoken(qa: QA) -> str:
    """Joins all words of a question: earlier turns, question, answer."""
    return " ".join([*(f"{turn.question} {turn.answer}" for turn in qa.history), qa.question, qa.answer])


def _in_processes(job: Job, parts: Iterable[Sequence[int]], workers: int) -> Iterator[Found]:
    # Not forked: a parent that has run torch holds threads and locks that a fork would copy.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_take, initargs=(job,))
    waiting: deque[Future[Found]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(_own_part, part))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            f"{job.manifest.path}: a process that read its files was ended from outside, as for want of memory; "
            "use fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_JOB: list[Job] = []  # of a process that reads parts; sent once, since a manifest has the offsets of all its lines


def _take(job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    _JOB[:] = [job]


def _own_part(places: Sequence[int]) -> Found:
    return _part(_JOB[0], places)


def _part(job: Job, places: Sequence[int]) -> Found:
    found = Found()
    for place in places:
        problems, size = [], "not read"
        try:
            record = job.manifest[place]
            if job.images:
                found.images.append(job.manifest.image_path(record))
            problems += _read_words(job, place, record, found)
            if job.files is None or place in job.files:
                size, more = _read_files(job.manifest, record)
                problems += more
            _count(record, size, found.counts)
        except InputError as error:
            problems += error.problems
        found.problems += [(place, problem) for problem in problems]
    return found


def _read_files(manifest: Manifest, record: Record) -> tuple[str, list[str]]:
    """Reads a record's image and masks and returns the image's size and the problems."""
    size, problems = "unreadable", []
    try:
        manifest.masks(record)
    except InputError as error:
        problems += error.problems
    try:
        height, width = read_image(manifest.image_path(record)).shape[:2]
        size = f"{width} x {height}"
    except InputError as error:
        if not any(f"image {record.image!r}" in problem for problem in problems):
            problems += [f"record {record.id!r}: {problem}" for problem in error.problems]
    return size, problems


def _read_words(job: Job, place: int, record: Record, found: Found) -> list[str]:
    """Keeps the texts and the long questions of a record, and returns what its answers lack."""
    problems = []
    for target in record.targets:
        if job.texts:
            found.texts |= {question.format(name=target.category) for question in CLASS_QUESTIONS}
            found.texts |= {text for qa in target.qa for text in (qa.question, qa.answer)}
        asked = target.qa
        if job.classes or not asked:
            question = max(CLASS_QUESTIONS, key=len).format(name=target.category)
            asked += (QA(question, max(ANSWERS, key=len).format(candidates=ALL), "class", "short"),)
        for qa in asked:
            if job.answer is not None:
                qa = replace(qa, answer=job.answer)
            problems += _lacking(job.tokens, qa, f"record {record.id!r}, target {target.id!r}")
            said = spoken(qa)
            kept = (place, record.id, target.id, qa)
            if len(said) > found.longest[0]:
                found.longest = (len(said), kept)
            if len(said.encode()) >= LONG or MARK in said:
                found.words.append(kept)
    return problems


def _lacking(tokens: Sequence[str], qa: QA, where: str) -> list[str]:
    answer = qa.answer.replace(ALL, candidate_text(tokens)) if tokens else ""
    lacking = [token for token in tokens if token not in answer]
    if not lacking:
        return []
    shown = repr(qa.answer) if len(qa.answer) <= 80 else f"{qa.answer[:77]!r}..."
    return [f"{where}: the answer {shown} lacks {' and '.join(lacking)}; write {ALL!r} in it, such as 'It is {ALL}.'."]


def _count(record: Record, size: str, counts: Counter[tuple[str, str, str]]) -> None:
    categories = {target.category for target in record.targets}
    own = {category: [one for one in record.targets if one.category == category] for category in categories}
    groups = [("category", category, targets) for category, targets in own.items()]
    groups += [
        (kind, value, record.targets) for kind, value in (("", ""), ("modality", record.modality), ("size", size))
    ]
    for kind, value, targets in groups:
        counts[kind, value, "images"] += 1
        counts[kind, value, "targets"] += len(targets)
        counts[kind, value, "questions"] += sum(len(target.qa) for target in targets)
    counts["", "", "no targets"] += not record.targets
