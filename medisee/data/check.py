"""Looks at what records hold before a run reads them: images, masks, boxes and words.

Nothing here imports torch, so that processes which only read files start fast. No record is kept.
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
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from medisee.config import Config, Eval
from medisee.config.model import Model
from medisee.foundation.errors import InputError
from medisee.records.images import read_image
from medisee.records.jsonl import read_lines
from medisee.records.manifest import Manifest
from medisee.records.prompts import ANSWERS, CANDIDATE_TOKENS, CLASS_QUESTIONS, candidate_text
from medisee.records.records import QA, Record, Target

MOST = 20_000  # records of a manifest whose files are read before a training; of more, a sample
LONG = 512  # bytes from which a text is tokenised: no usual tokenizer makes two tokens of a byte
_PART = 64  # records that a process reads at a time
_AHEAD = 4  # parts for each process, so that none waits and none piles up
_WORTH = 16  # parts for each process from which it is worth starting
_LETTERS = 2_000  # of a word; a tokenizer that is trained on longer ones takes minutes
_ROWS = 20  # of a table, for each of category, modality and size
_ALL = candidate_text(CANDIDATE_TOKENS)  # in an answer it stands for the model's own candidate tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The records to look at: those of a manifest at `places`."""

    manifest: Manifest
    places: Sequence[int]
    files: frozenset[int] | None = None  # the places of those whose images and masks are read; None: all
    tokens: tuple[str, ...] = ()  # what every answer must hold
    answer: str | None = None  # given instead of every answer, as in validation
    by_category: bool = False  # whether targets that have questions are also asked for by their category
    images: bool = False  # whether to list the images
    texts: bool = False  # whether to collect what a tokenizer learns from


@dataclass(frozen=True, slots=True)
class Said:
    """A question with its answer, and where it is: a place in the manifest, the ids of record and target."""

    place: int
    record: str
    target: str
    qa: QA

    def __str__(self) -> str:
        turns = [f"{turn.question} {turn.answer}" for turn in self.qa.history]
        return " ".join([*turns, self.qa.question, self.qa.answer])


@dataclass(slots=True)
class Found:
    """What records hold, and what is wrong with them."""

    problems: list[tuple[int, str]] = field(default_factory=list)  # each with its record's place in the manifest
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # of a noun, such as ("modality ct", "targets")
    words: list[Said] = field(default_factory=list)  # what a model may find too long, or hold its mark for the image
    longest: Said | None = None  # by characters
    tokens: int = 0  # of `longest`, where they were counted
    images: list[Path] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)

    def add(self, other: Found) -> None:
        """Takes in what was found in other records."""
        self.problems += other.problems
        self.counts.update(other.counts)
        self.words += other.words
        self.images += other.images
        self.texts |= other.texts
        self.longest = max(self.longest, other.longest, key=lambda said: len(str(said or "")))


def training_job(config: Config, manifest: Manifest) -> Job:
    """Returns what a training reads of a manifest."""
    by_category = bool(config.loss.js or config.loss.mse)
    tokens, places = config.model.candidate_tokens, range(len(manifest))
    return Job(manifest=manifest, places=places, tokens=tokens, by_category=by_category)


def forced_answer(settings: Eval, model: Model) -> str:
    """Returns `settings.forced_answer` with a model's candidate tokens."""
    return settings.forced_answer.format(candidates=candidate_text(model.candidate_tokens))


def scored_job(config: Config, manifest: Manifest, limit: int | None) -> Job:
    """Returns what is read of a manifest whose records are scored, `limit` of them: answers are the model's own."""
    answer = forced_answer(config.eval, config.model)
    return Job(manifest=manifest, places=spread(len(manifest), limit), answer=answer)


def spread(length: int, limit: int | None) -> Sequence[int]:
    """Returns the places of all records of a manifest, or of `limit` records spread evenly over it."""
    count = length if limit is None else min(limit, length)
    return [index * length // count for index in range(count)]


def sample(places: Sequence[int], seed: int) -> Sequence[int]:
    """Returns the places, or of more than `MOST` as many as that, drawn by the seed."""
    return places if len(places) <= MOST else sorted(random.Random(seed).sample(places, MOST))


def look(job: Job, workers: int = 1) -> Iterator[Found]:
    """Reads a job's records in parts, with several workers in processes of their own."""
    parts = [job.places[first : first + _PART] for first in range(0, len(job.places), _PART)]
    workers = min(workers, len(parts) // _WORTH)
    found = _in_processes(job, parts, workers) if workers > 1 else map(partial(_read_part, job), parts)
    name = f"check {job.manifest.path.name}"
    with tqdm(total=len(job.places), desc=name, unit=" records", disable=None, leave=False) as progress:
        for part, one in zip(parts, found, strict=True):
            yield one
            progress.update(len(part))


def _in_processes(job: Job, parts: Sequence[Sequence[int]], workers: int) -> Iterator[Found]:
    # Not forked: a parent that has run torch holds threads and locks that a fork would copy.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_take, initargs=(job,))
    waiting: deque[Future[Found]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(_read_own_part, part))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(f"{job.manifest.path}: a process was ended while it read files; use fewer workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


_JOBS: list[Job] = []  # in a process that reads files: its job, sent once, since it holds the offsets of all lines


def _take(job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    _JOBS.append(job)


def _read_own_part(places: Sequence[int]) -> Found:
    return _read_part(_JOBS[0], places)


def _read_part(job: Job, places: Sequence[int]) -> Found:
    found = Found()
    for place in places:
        problems, size = [], "not read"
        try:
            record = job.manifest[place]
            if job.images:
                found.images.append(job.manifest.image_path(record))
            problems += [problem for target in record.targets for problem in _words(job, place, record, target, found)]
            if job.files is None or place in job.files:
                size, more = _files(job.manifest, record)
                problems += more
            _count(record, size, found.counts)
        except InputError as error:
            problems += error.problems
        found.counts["", "empty"] += sum(" is empty; expected a pixel" in problem for problem in problems)
        found.counts["", "usable targets"] += 0 if problems else len(record.targets)
        found.problems += [(place, problem) for problem in problems]
    return found


def _files(manifest: Manifest, record: Record) -> tuple[str, list[str]]:
    """Reads image and masks, and returns the image's size and the problems."""
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


def _words(job: Job, place: int, record: Record, target: Target, found: Found) -> Iterator[str]:
    """Keeps what is needed of a target's words, and yields what its answers lack."""
    texts = {question.format(name=target.category) for question in CLASS_QUESTIONS}
    texts |= {text for qa in target.qa for text in (qa.question, qa.answer)}
    if long := [word for text in texts for word in text.split() if len(word) > _LETTERS]:
        yield (
            f"record {record.id!r}, target {target.id!r}: has a word of {len(long[0]):,} letters, {long[0][:20]!r}...; "
            f"expected at most {_LETTERS:,}; correct it."
        )
        return
    if job.texts:
        found.texts |= texts
    asked = target.qa
    if job.by_category or not asked:
        question = max(CLASS_QUESTIONS, key=len).format(name=target.category)
        asked += (QA(question, max(ANSWERS, key=len).format(candidates=_ALL), "class", "short"),)
    for qa in asked:
        said = Said(place, record.id, target.id, qa if job.answer is None else replace(qa, answer=job.answer))
        answer = qa.answer.replace(_ALL, candidate_text(job.tokens)) if job.tokens else ""
        if lacking := [token for token in job.tokens if token not in answer]:
            yield (
                f"record {record.id!r}, target {target.id!r}: the answer {qa.answer[:80]!r} lacks "
                f"{' and '.join(lacking)}; write {_ALL!r} in it, as in 'It is {_ALL}.'."
            )
        words = str(said)
        if len(words) > len(str(found.longest or "")):
            found.longest = said
        if len(words.encode()) >= LONG or "<image>" in words:
            found.words.append(said)


def _count(record: Record, size: str, counts: Counter[tuple[str, str]]) -> None:
    groups = dict.fromkeys(("all", f"modality {record.modality}", f"size {size}"), record.targets)
    for target in record.targets:
        name = f"category {target.category}"
        groups[name] = (*groups.get(name, ()), target)
    for name, targets in groups.items():
        counts[name, "images"] += 1
        counts[name, "targets"] += len(targets)
        counts[name, "questions"] += sum(len(target.qa) for target in targets)
    counts["", "no targets"] += not record.targets


def with_lines(manifest: Manifest, problems: Iterable[tuple[int, str]]) -> list[str]:
    """Puts file and line before each problem, in the order of the lines."""
    ordered = sorted(dict.fromkeys(problems), key=itemgetter(0))
    lines = islice(read_lines(manifest.path), ordered[-1][0] + 1 if ordered else 0)
    places = {place for place, _ in ordered}
    where = {place: line.where for place, line in enumerate(lines) if place in places}
    prefix = f"{manifest.path}: "
    return [f"{where.get(place, manifest.path)}: {problem.removeprefix(prefix)}" for place, problem in ordered]


def no_target(manifest: Manifest) -> str:
    """Returns the problem of a manifest that asks nothing."""
    return f"{manifest.path}: no record has a target; at least one is needed."


def table(manifest: Manifest, found: Found) -> str:
    """Describes what a manifest holds."""
    counts, nouns = found.counts, ("images", "targets", "questions")
    lines = [f"{manifest.path}", " " * 40 + "".join(f"{noun:>12}" for noun in nouns)]
    for kind in ("all", "category ", "modality ", "size "):
        names = sorted({name for name, _ in counts if name.startswith(kind)}, key=lambda one: -counts[one, "images"])
        for name in names[:_ROWS]:
            lines.append(f"  {name[:38]:<38}" + "".join(f"{counts[name, noun]:>12,}" for noun in nouns))
        lines += [f"  and {len(names) - _ROWS:,} more"] if len(names) > _ROWS else []
    lines.append(f"  records without targets: {counts['', 'no targets']:,}")
    lines.append(f"  targets without a pixel in their mask: {counts['', 'empty']:,}")
    if found.longest is not None:
        words, where = str(found.longest), f"record {found.longest.record!r}, target {found.longest.target!r}"
        size = f"{len(words):,} characters, {len(words.split()):,} words" + (
            f", {found.tokens:,} tokens" if found.tokens else ""
        )
        lines.append(f"  longest text: {size} ({where})")
    return "\n".join(lines)
