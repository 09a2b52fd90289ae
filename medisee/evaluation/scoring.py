"""Scores a system's answers to a manifest's questions. The system is our model, or wrote a predictions file."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count as numbers
from itertools import repeat
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from medisee.config import Config
from medisee.data.check import no_target
from medisee.data.features import FeatureCache
from medisee.evaluation.metrics import Score, score
from medisee.evaluation.prediction import Mode, QueryAnswer, RecordQuestions, all_questions, predict, shuffled_questions
from medisee.evaluation.references import References
from medisee.foundation.errors import InputError, nearest
from medisee.foundation.json_files import parse_json
from medisee.models.medisee import MediSee
from medisee.records.boxes import form_of_boxes
from medisee.records.images import read_image
from medisee.records.jsonl import LineWriter
from medisee.records.manifest import Manifest
from medisee.records.masks import decode_mask, encode_mask
from medisee.records.records import QA, Prediction, Record, Target, read_predictions

REFERENCES = {"mean_mask": "mean mask of category and plane", "nearest_slice": "nearest training slice"}

Answers: TypeAlias = Iterator[Mapping[str, tuple[QueryAnswer, Prediction | None]]]
"""For each case of a split, in order: the answer by mode, and the prediction to keep, None where it is missing. Beside
the modes, "shuffled" is the forced answer to a question about another category, and is not kept."""

_MOST_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Case:
    record: Record
    target: Target
    qa: QA


GROUPS: dict[str, Callable[[Case], str]] = {
    "by_length": lambda case: case.qa.length,
    "by_perspective": lambda case: case.qa.perspective,
    "by_category": lambda case: case.target.category,
}
RESERVED = (*REFERENCES, "shuffled", "emission", "named", "missing", *GROUPS)
"""Keys of a split's summary, which cannot also be the mode of a prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A system's score on one case; `prediction` is None where it is missing or, as for references, not kept."""

    case: Case
    prediction: Prediction | None
    score: Score
    named: bool | None = None  # whether the text names the target's category; None where the system did not write it


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All scores on one split."""

    split: Split
    modes: Mapping[str, Sequence[Scored]]
    written: str | None  # the mode whose answers the system wrote itself, if there is one
    shuffled: Sequence[Scored] = ()  # forced answers to questions about other categories
    references: Mapping[str, Sequence[Scored]]  # by the keys of REFERENCES; empty without training manifests


@dataclass(frozen=True, slots=True)
class Split:
    """A manifest and its questions: `known` are all of them, by record; `asked` are scored, with --limit fewer."""

    manifest: Manifest
    known: dict[str, RecordQuestions]
    asked: tuple[RecordQuestions, ...]

    @property
    def name(self) -> str:
        """The manifest's title."""
        return self.manifest.path.stem

    @property
    def cases(self) -> list[Case]:
        """The questions that are scored, in order."""
        return [Case(one.record, target, qa) for one in self.asked for target, qa in one.questions]


def open_splits(paths: Sequence[Path], root: Path | None, limit: int | None, *, files: bool = True) -> list[Split]:
    """Opens the manifests and, if `files`, checks all that they name; names and record ids must differ between them."""
    problems: list[str] = []
    splits: list[Split] = []
    for path in paths:
        try:
            manifest = Manifest(path, root)
            if files:
                manifest.check_files()
            splits.append(_split(manifest, limit))
        except InputError as error:
            problems.extend(error.problems)
    for name, count in Counter(path.stem for path in paths).items():
        if count > 1:
            problems.append(f"--records: {count} manifests are called {name!r}; rename one: each split needs its own.")
    # Predictions name a record by its id alone, so an id must not mean two records.
    counts = Counter(record for split in splits for record in split.known)
    shared = [record for record, count in counts.items() if count > 1]
    if shared and not problems:
        found = f"{len(shared)} record ids are in more than one manifest, such as {shared[0]!r}"
        problems.append(f"--records: {found}; evaluate the manifests one at a time.")
    if problems:
        raise InputError(problems)
    return splits


def _split(manifest: Manifest, limit: int | None) -> Split:
    known: dict[str, RecordQuestions] = {}
    for one in all_questions(manifest):
        # Of equal questions about a target the first: their answers could not be told apart.
        questions: dict[tuple[str, str], tuple[Target, QA]] = {}
        for target, qa in one.questions:
            questions.setdefault((target.id, qa.question), (target, qa))
        if questions:
            known[one.record.id] = RecordQuestions(one.record, tuple(questions.values()))
    asked = [known[one.record.id] for one in all_questions(manifest, limit) if one.questions]
    if not asked:
        raise InputError(no_target(manifest))
    return Split(manifest, known, tuple(asked))


def answers_from_file(path: Path, splits: Sequence[Split]) -> list[Answers]:
    """Reads and checks any system's predictions and returns the answers of each split."""
    predictions = read_predictions(path)
    modes = list(dict.fromkeys(prediction.mode for prediction in predictions))
    problems = [] if modes else ["no prediction; expected one JSON object per line."]
    taken = "is already a key of summary.json; rename it, for example to 'generated'."
    problems += [f"mode {mode!r} {taken}" for mode in modes if mode in RESERVED]
    found: dict[tuple[str, str, str, str], Prediction] = {}
    for prediction in predictions:
        key = (prediction.record, prediction.target, prediction.question, prediction.mode)
        if problem := _problem(prediction, splits, repeated=key in found, hints=len(problems) < _MOST_PROBLEMS):
            where = f"record {prediction.record!r}, target {prediction.target!r}, mode {prediction.mode!r}"
            problems.append(f"{where}, question {prediction.question!r}: {problem}")
        found[key] = prediction
    if form := form_of_boxes((prediction.box, prediction.mask) for prediction in predictions if prediction.box):
        problems.append(f"the boxes fit as {form}; expected [x0, y0, x1, y1] in pixels; convert them all.")
    if problems:
        more = [f"and {len(problems) - _MOST_PROBLEMS} more problems"] if len(problems) > _MOST_PROBLEMS else []
        raise InputError(f"{path}: {problem}" for problem in problems[:_MOST_PROBLEMS] + more)

    def answer(case: Case, mode: str) -> tuple[QueryAnswer, Prediction | None]:
        kept = found.get((case.record.id, case.target.id, case.qa.question, mode))
        if kept is None:
            return QueryAnswer(), None
        mask = decode_mask(kept.mask) if kept.mask else None
        return QueryAnswer(text=kept.text, emitted=kept.emitted, mask=mask, box=kept.box, scores=kept.scores), kept

    return [({mode: answer(case, mode) for mode in modes} for case in split.cases) for split in splits]


def _problem(prediction: Prediction, splits: Sequence[Split], *, repeated: bool, hints: bool) -> str | None:
    split = next((split for split in splits if prediction.record in split.known), None)
    if split is None:
        files = ", ".join(str(split.manifest.path) for split in splits)
        hint = nearest(prediction.record, (record for split in splits for record in split.known)) if hints else ""
        return f"unknown record; expected one that has targets in {files}.{hint}"
    asked = split.known[prediction.record]
    targets = {target.id: target for target, _ in asked.questions}
    if prediction.target not in targets:
        return f"unknown target; expected one of {', '.join(map(repr, targets))}."
    questions = [qa.question for target, qa in asked.questions if target.id == prediction.target]
    if prediction.question not in questions:
        return f"unknown question; expected one of {', '.join(map(repr, questions))}; copy it exactly."
    if repeated:
        return "there is more than one prediction; keep one per question and mode."
    if prediction.mask is None:
        return None
    size = split.manifest.image_size(asked.record)
    size = size or split.manifest.mask(asked.record, targets[prediction.target]).shape
    if prediction.mask.size == size:
        return None
    found = f"{list(prediction.mask.size)} ([height, width]), but the image is {list(size)}"
    return f"the mask is {found}; write masks in the pixels of the original image."


def answers_from_model(
    model: MediSee, split: Split, modes: Sequence[Mode], config: Config, cache: FeatureCache | None
) -> Answers:
    """Asks the model all questions of a split in each mode, batch by batch; with forced answers also shuffled ones."""
    asked: dict[str, tuple[Mode, Sequence[RecordQuestions]]] = {mode: (mode, split.asked) for mode in modes}
    if "forced" in modes:
        asked["shuffled"] = "forced", shuffled_questions(split.asked)
    streams = {
        name: predict(model, split.manifest, questions, mode, settings=config.eval, cache=cache, release=config.release)
        for name, (mode, questions) in asked.items()
    }
    for case, *answers in zip(split.cases, *streams.values(), strict=True):
        named = zip(streams, answers, strict=True)
        yield {name: (a, None if name == "shuffled" else _prediction(case, name, a)) for name, a in named}


def _prediction(case: Case, mode: str, answer: QueryAnswer) -> Prediction:
    return Prediction(
        record=case.record.id,
        target=case.target.id,
        question=case.qa.question,
        mode=mode,
        text=answer.text,
        emitted=answer.emitted,
        mask=encode_mask(answer.mask) if answer.mask is not None else None,
        box=answer.box,
        scores=answer.scores,
    )


@contextmanager
def kept_answers(out: Path) -> Iterator[Callable[[Answers], Answers]]:
    """Yields a function that writes predictions beside `out` as they pass; the file stays only after a failure."""
    out = out.absolute()
    path = next(path for n in numbers(1) if not (path := out.with_name(f"{out.name}.partial{n}.jsonl")).exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb", buffering=0) as handle:
        writer = LineWriter(handle)

        def keep(answers: Answers) -> Answers:
            for of_case in answers:
                for prediction in (prediction for _, prediction in of_case.values() if prediction is not None):
                    writer.write(prediction)
                yield of_case

        try:
            yield keep
        except BaseException:
            if written := len(writer.offsets):
                print(f"{path}: keeps the {written} answers so far; --predictions scores them.", file=sys.stderr)
            else:
                path.unlink()
            raise
    path.unlink()


def answers_from_references(references: References, split: Split) -> Answers:
    """Answers as "mean_mask" and "nearest_slice". Boxes are left out: the smallest ones around the masks count."""
    for one in split.asked:
        image = read_image(split.manifest.image_path(one.record))
        masks = {category: references.masks(image, one.record, category) for category in _categories([one])}
        for target, _ in one.questions:
            of_target = masks[target.category]
            yield {name: (QueryAnswer(emitted=mask is not None, mask=mask), None) for name, mask in of_target.items()}


def score_split(
    split: Split, answers: Answers, references: References | None, categories: Mapping[str, Sequence[str]]
) -> Results:
    """Scores a system's answers to a split's questions, and those of the references, if there are any.

    `categories` holds the names of each category; a category that is not among them has its own name.
    """
    names = {**{category: (category,) for category in _categories(split.known.values())}, **categories}
    cases = split.cases
    more = answers_from_references(references, split) if references else repeat({}, len(cases))
    progress = tqdm(cases, desc=f"scoring {split.name}", unit="question")
    scored: defaultdict[str, list[Scored]] = defaultdict(list)
    for case, of_system, of_references in zip(progress, answers, more, strict=True):
        truth = split.manifest.mask(case.record, case.target)
        for name, (answer, prediction) in {**of_system, **of_references}.items():
            own_text = name not in ("forced", "shuffled", *REFERENCES)
            named = named_category(answer.text, names) == case.target.category if own_text else None
            scores = score(answer.mask, truth, answer.box, case.target.box)
            scored[name].append(Scored(case=case, prediction=prediction, score=scores, named=named))
    modes = {name: of_mode for name, of_mode in scored.items() if name not in RESERVED}
    # Forced answers were given to the system, so their text is not its own.
    own = ["generated"] if "generated" in modes else [mode for mode in modes if mode != "forced"]
    return Results(
        split=split,
        modes=modes,
        written=own[0] if len(own) == 1 else None,
        shuffled=scored.get("shuffled", ()),
        references={name: scored[name] for name in REFERENCES if name in scored},
    )


def _categories(asked: Iterable[RecordQuestions]) -> dict[str, None]:
    return {target.category: None for one in asked for target, _ in one.questions}


def named_category(text: str, categories: Mapping[str, Sequence[str]]) -> str | None:
    """Returns the category that a text names first, None when it names none of the given names.

    Names count as whole words, in any case and with any white space between their words. Where several begin at the
    same place the longest counts: "left kidney cyst" is not the left kidney.
    """
    found = [
        (match.start(), -len(match.group()), category)
        for category, names in categories.items()
        for name in names
        if (match := _pattern(name).search(text))
    ]
    return min(found)[2] if found else None


@cache
def _pattern(name: str) -> re.Pattern[str]:
    # Not \b: it would find no word end behind a name such as "lesion (left)".
    words = r"\s+".join(map(re.escape, name.split()))
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def read_categories(path: Path | str) -> dict[str, tuple[str, ...]]:
    """Reads a JSON file {category: [its names]}; a name belongs to one category."""
    path = Path(path)
    form = '{"liver": ["liver", "hepatic tissue"], ...}'
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); correct data.categories.") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); expected {form}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected {form}.")
    problems: list[str] = []
    owner: dict[str, str] = {}
    for category, names in content.items():
        if not (isinstance(names, list) and names and all(isinstance(name, str) and name.split() for name in names)):
            problems.append(f"{path}: category {category!r} has the names {names!r}; expected a list of words.")
            continue
        for name in names:
            first = owner.setdefault(" ".join(name.lower().split()), category)
            if first != category:
                problems.append(f"{path}: the name {name!r} belongs to {first!r} and {category!r}; remove it from one.")
    if problems:
        raise InputError(problems)
    return {category: tuple(names) for category, names in content.items()}
