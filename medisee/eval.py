"""Evaluation of a checkpoint, or of any system's predictions file, against records. Run it as

  python scripts/eval.py --config configs/demo.yaml --checkpoint runs/demo/checkpoint --records test.jsonl --out OUT
  python scripts/eval.py --predictions theirs.jsonl --records test.jsonl --out OUT

Scores masks and boxes in the pixels of the original images. A checkpoint answers twice: `forced`, with the answer
given, as papers of this kind score, and `generated`, as a user gets it. Forced answers to questions about other
categories, and two references that see no question, say how much of a score comes from understanding the query.

Writes OUT/: table.md and table.tex, gallery.html (the best, middle and worst cases), summary.json, scores.csv (a row a
prediction), predictions.jsonl, run.json. OUT appears whole, at the end.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from medisee.config import Config
from medisee.config.load import load_config
from medisee.config.model import PLACING, Mllm
from medisee.data.features import FeatureCache, fill_cache
from medisee.evaluation.metrics import score
from medisee.evaluation.naming import named_category, read_categories
from medisee.evaluation.prediction import Mode, RecordQuestions, all_questions, predict, shuffled_questions
from medisee.evaluation.references import References, learn_references
from medisee.evaluation.report import (
    REFERENCES,
    RESERVED,
    Case,
    Results,
    Scored,
    check_out,
    summarise_split,
    to_text,
    write_report,
)
from medisee.foundation.errors import InputError, exit_code, nearest
from medisee.foundation.files import atomic_path, write_json
from medisee.foundation.hardware import compute_dtype, keep_freed_memory
from medisee.foundation.provenance import run_facts
from medisee.models.medisee import MediSee
from medisee.records.manifest import Manifest
from medisee.records.masks import decode_mask
from medisee.records.records import QA, Prediction, Target, read_predictions
from medisee.weights.checkpoints import load_checkpoint

DECODED: dict[str, tuple[Mode, ...]] = {
    "forced": ("forced",),
    "generate": ("generated",),
    "both": ("forced", "generated"),
}

_MOST_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Split:
    """A manifest and what is asked of it.

    Attributes:
        name: the manifest's file name without its ending.
        manifest: the records.
        known: every question, by record.
        asked: those that are scored; fewer than are known under --limit.
    """

    name: str
    manifest: Manifest
    known: dict[str, RecordQuestions]
    asked: tuple[RecordQuestions, ...]

    @property
    def cases(self) -> list[Case]:
        """The questions that are scored, in order."""
        return [Case(one.record, target, qa) for one in self.asked for target, qa in one.questions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Predictions on one split, each list in the order of the split's cases; None is a missing one.

    Attributes:
        modes: the system's, by mode.
        written: the mode whose answers the system wrote itself, if there is one.
        shuffled: forced answers to questions about other categories.
    """

    modes: dict[str, list[Prediction | None]]
    written: str | None
    shuffled: list[Prediction | None] | None = None


def open_splits(paths: Sequence[Path], root: Path | None, limit: int | None) -> list[Split]:
    """Opens the manifests and checks every file that they name.

    Raises:
        InputError: bad records, images or masks, nothing to ask, or two manifests that share a name or a record id;
            all problems are named.
    """
    problems: list[str] = []
    splits: list[Split] = []
    for path in paths:
        try:
            manifest = Manifest(path, root)
            manifest.check_files()
            splits.append(_split(manifest, limit))
        except InputError as error:
            problems.extend(error.problems)
    problems += [
        f"--records: {count} manifests are called {name!r}; expected a name for each split; rename one."
        for name, count in Counter(path.stem for path in paths).items()
        if count > 1
    ]
    # Predictions name a record by its id alone, so one id must not stand for two records.
    count_of_id = Counter(record for split in splits for record in split.known)
    shared = [record for record, count in count_of_id.items() if count > 1]
    if shared and not problems:
        problems.append(
            f"--records: {len(shared)} record ids are in more than one manifest, as {shared[0]!r}; "
            "expected ids of one record each; evaluate the manifests one at a time."
        )
    if problems:
        raise InputError(problems)
    return splits


def _split(manifest: Manifest, limit: int | None) -> Split:
    known = {one.record.id: _without_repeats(one) for one in all_questions(manifest) if one.questions}
    asked = [known[one.record.id] for one in all_questions(manifest, limit) if one.questions]
    if not asked:
        raise InputError(f"{manifest.path}: no record has a target; expected at least one; check how it was made.")
    return Split(manifest.path.stem, manifest, known, tuple(asked))


def _without_repeats(asked: RecordQuestions) -> RecordQuestions:
    """Keeps the first of equal questions about a target: their answers could not be told apart."""
    questions: dict[tuple[str, str], tuple[Target, QA]] = {}
    for target, qa in asked.questions:
        questions.setdefault((target.id, qa.question), (target, qa))
    return RecordQuestions(asked.record, tuple(questions.values()))


def answers_from_file(path: Path, splits: Sequence[Split]) -> list[Answers]:
    """Reads any system's predictions and lays them beside the questions.

    Raises:
        InputError: wrong lines, predictions for unknown records, targets or questions, two for one question and mode,
            masks of another size than the image, a mode that the summary needs as a key, or no prediction.
    """
    predictions = read_predictions(path)
    modes = list(dict.fromkeys(prediction.mode for prediction in predictions))
    problems = [] if modes else ["no prediction; expected one JSON object a line; check how it was made."]
    problems += [
        f"mode {mode!r} is a key of summary.json already; expected another label, as 'generated'; rename it."
        for mode in modes
        if mode in RESERVED
    ]
    found: dict[tuple[str, str, str, str], Prediction] = {}
    for prediction in predictions:
        key = (prediction.record, prediction.target, prediction.question, prediction.mode)
        if problem := _problem(prediction, splits, again=key in found, hints=len(problems) < _MOST_PROBLEMS):
            where = f"record {prediction.record!r}, target {prediction.target!r}, mode {prediction.mode!r}"
            problems.append(f"{where}, question {prediction.question!r}: {problem}")
        found[key] = prediction
    if problems:
        more = [f"and {len(problems) - _MOST_PROBLEMS} more problems"] if len(problems) > _MOST_PROBLEMS else []
        raise InputError(f"{path}: {problem}" for problem in problems[:_MOST_PROBLEMS] + more)
    # Forced answers were given to the system, so what they say does not count as its own.
    own = ["generated"] if "generated" in modes else [mode for mode in modes if mode != "forced"]
    return [
        Answers(
            modes={
                mode: [found.get((c.record.id, c.target.id, c.qa.question, mode)) for c in split.cases]
                for mode in modes
            },
            written=own[0] if len(own) == 1 else None,
        )
        for split in splits
    ]


def _problem(prediction: Prediction, splits: Sequence[Split], *, again: bool, hints: bool) -> str | None:
    split = next((split for split in splits if prediction.record in split.known), None)
    if split is None:
        files = ", ".join(str(split.manifest.path) for split in splits)
        hint = nearest(prediction.record, (record for split in splits for record in split.known)) if hints else ""
        return f"unknown record; expected one with targets of {files}; give the manifest that it belongs to.{hint}"
    asked = split.known[prediction.record]
    targets = list(dict.fromkeys(target.id for target, _ in asked.questions))
    if prediction.target not in targets:
        return f"unknown target; expected one of {', '.join(map(repr, targets))}; correct the id."
    questions = [qa.question for target, qa in asked.questions if target.id == prediction.target]
    if prediction.question not in questions:
        return f"unknown question; expected one of {', '.join(map(repr, questions))}, to the letter; ask that."
    if again:
        return "there is more than one prediction; expected one a question and mode; remove the others."
    if prediction.mask is None:
        return None
    target = next(target for target, _ in asked.questions if target.id == prediction.target)
    size = split.manifest.image_size(asked.record) or split.manifest.mask(asked.record, target).shape
    if prediction.mask.size != size:
        return (
            f"the mask is {list(prediction.mask.size)} ([height, width]); expected the image's {list(size)}; "
            "write masks in the pixels of the original image."
        )
    return None


def load_model(folder: Path, expected: Config | None) -> MediSee:
    """Loads a checkpoint for evaluation, on the GPU if there is one.

    Args:
        folder: the checkpoint.
        expected: a run whose model section must be the checkpoint's, but for `bits` and `device_map`, which are the
            run's where it has them; None takes the checkpoint's own.

    Raises:
        InputError: a bad checkpoint, or one of another model.
    """
    asked = expected.model.mllm if expected is not None else Mllm()
    model = load_checkpoint(folder, MediSee, bits=asked.bits, device_map=asked.device_map)
    if expected is not None:
        own, wanted = _flat(model.config.model_dump()), _flat(expected.model.model_dump())
        differing = [
            f"{key} = {wanted.get(key)!r} but the checkpoint has {own.get(key)!r}"
            for key in own | wanted
            if own.get(key) != wanted.get(key) and not {*key.split(".")} & {*PLACING}
        ]
        if differing:
            raise InputError(
                f"{folder}: was trained with another model section than the configuration's: "
                f"{'; '.join(differing[:5])}; give the configuration of its training."
            )
    keep_freed_memory()
    return model.placed(model.pinned_device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _flat(section: Mapping[str, Any], prefix: str = "model") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}.{key}") if isinstance(value, Mapping) else {f"{prefix}.{key}": value}
    return flat


def answers_from_model(model: MediSee, splits: Sequence[Split], config: Config, decode: str) -> list[Answers]:
    """Asks the model every question, in each mode, and forced also about categories that are not the target's."""
    cache = _features(model, splits, config)

    def ask(split: Split, asked: Sequence[RecordQuestions], mode: Mode) -> list[Prediction | None]:
        settings, release = config.eval, config.release
        return list(predict(model, split.manifest, asked, mode, settings=settings, cache=cache, release=release))

    modes = DECODED[decode]
    return [
        Answers(
            modes={mode: ask(split, split.asked, mode) for mode in modes},
            written="generated" if "generated" in modes else None,
            shuffled=ask(split, shuffled_questions(split.asked), "forced") if "forced" in modes else None,
        )
        for split in splits
    ]


def _features(model: MediSee, splits: Sequence[Split], config: Config) -> FeatureCache | None:
    if config.data.cache is None:
        return None
    images = [split.manifest.image_path(one.record) for split in splits for one in split.asked]
    dtype = compute_dtype(config.data.cache_dtype, next(model.parameters()).device)
    return fill_cache(images, model.seg_head, model.processor, Path(config.data.cache), dtype)


def score_split(
    split: Split, answers: Answers, references: References | None, categories: Mapping[str, Sequence[str]]
) -> Results:
    """Scores all answers on a split, and those of the references.

    Args:
        split: the questions and the truth.
        answers: of the system.
        references: None leaves them out.
        categories: names that count as naming a category; one that is not among them has its own name.
    """
    systems = {**answers.modes, **(_reference_answers(references, split) if references else {})}
    if answers.shuffled is not None:
        systems["shuffled"] = answers.shuffled
    own = {target.category: (target.category,) for one in split.known.values() for target, _ in one.questions}
    names = {**own, **categories}
    scored: dict[str, list[Scored]] = {name: [] for name in systems}
    for index, case in enumerate(tqdm(split.cases, desc=f"scoring {split.name}", unit="question")):
        truth = split.manifest.mask(case.record, case.target)
        for name, predictions in systems.items():
            is_written = name in answers.modes and name != "forced"
            scored[name].append(_scored(case, predictions[index], truth, names if is_written else None))
    return Results(
        split=split.name,
        manifest=split.manifest,
        modes={mode: scored[mode] for mode in answers.modes},
        written=answers.written,
        shuffled=scored.get("shuffled", ()),
        references={name: scored[name] for name in REFERENCES if name in scored},
    )


def _reference_answers(references: References, split: Split) -> dict[str, list[Prediction | None]]:
    answers: dict[str, list[Prediction | None]] = {name: [] for name in REFERENCES}
    for one in tqdm(split.asked, desc=f"references on {split.name}", unit="image"):
        for name, predictions in references.predict(split.manifest, one.record, one.questions).items():
            answers[name].extend(predictions)
    return answers


def _scored(
    case: Case,
    prediction: Prediction | None,
    truth: NDArray[np.bool_],
    categories: Mapping[str, Sequence[str]] | None,
) -> Scored:
    missing = prediction is None
    if prediction is None:
        prediction = Prediction(
            record=case.record.id, target=case.target.id, question=case.qa.question, text="", emitted=False
        )
    mask = decode_mask(prediction.mask) if prediction.mask else None
    named = named_category(prediction.text, categories) == case.target.category if categories is not None else None
    scores = score(mask, truth, prediction.box, case.target.box)
    return Scored(case=case, prediction=prediction, score=scores, named=named, missing=missing)


def evaluate(arguments: argparse.Namespace) -> None:
    """Does what the parsed command line says; nothing is written before all of it is done.

    Raises:
        InputError: bad input of any kind.
    """
    started = time.perf_counter()
    check_out(arguments.out)
    config = load_config(arguments.config, arguments.overrides)
    categories = read_categories(config.data.categories) if config.data.categories is not None else {}
    train = Manifest(config.data.train[0].records, config.data.train[0].root) if config.data.train else None
    splits = open_splits(arguments.records, arguments.root, arguments.limit)
    if arguments.predictions is not None:
        system = arguments.predictions.stem
        facts = run_facts(config.model_dump(mode="json"), config.train.seed, "cpu")
        answers = answers_from_file(arguments.predictions, splits)
    else:
        system = "MediSee"
        says_model = arguments.config is not None or any(text.startswith("model.") for text in arguments.overrides)
        model = load_model(arguments.checkpoint, config if says_model else None)
        config = config.model_copy(update={"model": model.config})
        facts = run_facts(config.model_dump(mode="json"), config.train.seed, next(model.parameters()).device)
        answers = answers_from_model(model, splits, config, arguments.decode or "both")
    references = learn_references(train) if train is not None else None
    results = [score_split(s, a, references, categories) for s, a in zip(splits, answers, strict=True)]
    summaries = {one.split: summarise_split(one, config.eval.resamples) for one in results}
    with atomic_path(arguments.out) as temporary:
        temporary.mkdir()
        write_report(temporary, results, summaries, system)
        write_json(temporary / "run.json", {**facts, "seconds": round(time.perf_counter() - started, 1)})
    print(to_text(summaries, system))
    print(f"done: the tables are in {arguments.out / 'table.md'}, cases to look at in {arguments.out / 'gallery.html'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="folder that training wrote, such as runs/demo/checkpoint")
    add("--predictions", type=Path, help="instead of a checkpoint: predictions of any system, JSON Lines")
    again = "manifest to score on; again for more splits, each named like its file; the gallery shows the first"
    add("--records", type=Path, action="append", required=True, help=again)
    add("--root", type=Path, help="folder that paths in the manifests are relative to (default: the manifest's own)")
    add("--out", type=Path, required=True, help="folder for the results; an earlier evaluation there is replaced")
    add("--config", help="YAML run; its data.train brings the references, data.categories the names of categories")
    add("--decode", choices=DECODED, help="which answers of a checkpoint to score (default: both)")
    add("--limit", type=int, help="score only this many records of each manifest, taken evenly")
    add("overrides", nargs="*", help="dotted overrides, such as eval.batch_size=4, or with --config model.mllm.bits=4")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.checkpoint is None) == (arguments.predictions is None):
        raise InputError("expected either --checkpoint or --predictions; give one of them.")
    if arguments.predictions is not None and arguments.decode is not None:
        raise InputError("--decode: a predictions file says its modes itself; leave --decode out.")
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit {arguments.limit}: expected 1 or more; leave it out to score every record.")
    evaluate(arguments)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
