"""Evaluates a checkpoint, or any system's predictions file, on records. Run it as

  python scripts/eval.py --config configs/demo.yaml --checkpoint runs/demo/checkpoint --records test.jsonl --out OUT
  python scripts/eval.py --predictions theirs.jsonl --records test.jsonl --out OUT

Scores masks and boxes in the pixels of the original images. A checkpoint answers twice: `forced`, with the answer
given, as such papers do, and `generated`, as a user gets it. Forced answers to questions about other categories, and
two references that see no question, show how much of a score comes from understanding the query.

--list-questions prints the questions that a predictions file has to answer, as JSON Lines, or writes them to a file OUT.

Writes OUT/, once complete: table.md and table.tex, gallery.html (the best, median and worst cases), summary.json,
scores.csv (one row per prediction), predictions.jsonl and run.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from medisee.config import Config
from medisee.config.load import load_config
from medisee.config.model import PLACING, Mllm
from medisee.data.check import scored_job, with_lines
from medisee.data.features import fill_cache
from medisee.evaluation.prediction import Mode
from medisee.evaluation.references import learn_references
from medisee.evaluation.report import REPORT, summarise_split, to_text, write_report
from medisee.evaluation.scoring import (
    answers_from_file,
    answers_from_model,
    kept_answers,
    open_splits,
    read_categories,
    score_split,
)
from medisee.foundation.command_line import a_path, parse_words, path_or_override
from medisee.foundation.errors import InputError, exit_code
from medisee.foundation.files import write_json
from medisee.foundation.hardware import compute_dtype, keep_freed_memory
from medisee.foundation.output import replaced_folder
from medisee.foundation.provenance import run_facts
from medisee.models.medisee import MediSee
from medisee.records.jsonl import write_lines
from medisee.records.manifest import Manifest
from medisee.training.initial_model import look_at
from medisee.weights.checkpoints import load_checkpoint

_MODES: dict[str, Sequence[Mode]] = {"forced": ["forced"], "generate": ["generated"], "both": ["forced", "generated"]}


def load_model(folder: Path, expected: Config | None) -> MediSee:
    """Loads a checkpoint for evaluation, on the GPU if there is one.

    The model section of an `expected` run must equal the checkpoint's, except for `bits` and `device_map`, which are
    the run's where it sets them.
    """
    chosen = expected.model.mllm if expected is not None else Mllm()
    model = load_checkpoint(folder, MediSee, bits=chosen.bits, device_map=chosen.device_map)
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


def _list_questions(records: Sequence[Path], root: Path | None, limit: int | None, out: Path | None) -> None:
    cases = [case for split in open_splits(records, root, limit, files=False) for case in split.cases]
    asked = [{"record": case.record.id, "target": case.target.id, "question": case.qa.question} for case in cases]
    if out is None:
        print("\n".join(json.dumps(one, ensure_ascii=False) for one in asked))
    elif out.exists():
        raise InputError(f"{out}: exists already; --out names a new file for the questions.")
    else:
        write_lines(out, asked)


def _evaluate(arguments: argparse.Namespace, folder: Path) -> None:
    """Evaluates, and writes the report into an empty folder."""
    started = time.perf_counter()
    config = load_config(arguments.config, arguments.overrides)
    categories = read_categories(config.data.categories) if config.data.categories is not None else {}
    train = Manifest(config.data.train[0].records, config.data.train[0].root) if config.data.train else None
    # With a checkpoint, the files are checked below, together with the words, which need its tokenizer.
    splits = open_splits(arguments.records, arguments.root, arguments.limit, files=arguments.predictions is not None)
    device: torch.device | str = "cpu"
    if arguments.predictions is not None:
        system = arguments.predictions.stem
        answers = answers_from_file(arguments.predictions, splits)
    else:
        system = "MediSee"
        says_model = arguments.config is not None or any(text.startswith("model.") for text in arguments.overrides)
        model = load_model(arguments.checkpoint, config if says_model else None)
        config, device = config.model_copy(update={"model": model.config}), next(model.parameters()).device
        # Answers take long: whatever one of them could fail on is found before the first.
        jobs = [scored_job(config, split.manifest, arguments.limit) for split in splits]
        _, every = look_at(config, jobs, model.processor, workers=config.data.workers)
        found = zip(jobs, every, strict=True)
        if problems := [one for job, of in found for one in with_lines(job.manifest, of.problems)]:
            raise InputError(problems)
        cache = None
        if config.data.cache is not None:
            images = [split.manifest.image_path(one.record) for split in splits for one in split.asked]
            dtype = compute_dtype(config.data.cache_dtype, device)
            cache = fill_cache(images, model.seg_head, model.processor, Path(config.data.cache), dtype)
        modes = _MODES[arguments.decode or "both"]
        answers = [answers_from_model(model, split, modes, config, cache) for split in splits]
    facts = run_facts(config.model_dump(mode="json"), config.train.seed, device)
    references = learn_references(train) if train is not None else None
    # The answers of a file are kept already.
    with kept_answers(arguments.out) if arguments.predictions is None else nullcontext(iter) as keep:
        results = [score_split(s, keep(a), references, categories) for s, a in zip(splits, answers, strict=True)]
        summaries = {one.split.name: summarise_split(one, config.eval.resamples) for one in results}
        write_report(folder, results, summaries, system)
        write_json(folder / "run.json", {**facts, "seconds": round(time.perf_counter() - started, 1)})
    print(to_text(summaries, system))


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=a_path, help="folder that training wrote, such as runs/demo/checkpoint")
    add("--predictions", type=a_path, help="instead of a checkpoint: predictions of any system, JSON Lines")
    again = "manifests to score on, splits that are named after their files; the gallery shows the first"
    add("--records", type=path_or_override, nargs="+", action="extend", required=True, help=again)
    add("--root", type=a_path, help="folder that their paths are relative to (default: each manifest's own folder)")
    add("--list-questions", action="store_true", help="instead of either: list what predictions have to answer")
    add("--out", type=a_path, help="folder for the results; an earlier evaluation there is replaced")
    add("--config", help="YAML run; the references learn from its data.train, data.categories names the categories")
    add("--decode", choices=_MODES, help="which answers of a checkpoint to score (default: both)")
    add("--limit", type=int, help="score only this many records of each manifest, spread evenly over it")
    add("overrides", nargs="*", help="dotted overrides, such as eval.batch_size=4, or with --config model.mllm.bits=4")
    arguments = parse_words(parser, argv, more="overrides")
    arguments.overrides += [one for one in arguments.records if isinstance(one, str)]
    arguments.records = [one for one in arguments.records if isinstance(one, Path)]
    if arguments.list_questions + (arguments.checkpoint is not None) + (arguments.predictions is not None) != 1:
        raise InputError("give either --checkpoint or --predictions, or --list-questions alone.")
    if arguments.predictions is not None and arguments.decode is not None:
        raise InputError("--decode: a predictions file has its own modes; leave --decode out.")
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit {arguments.limit}: expected 1 or more; leave it out to score every record.")
    out: Path | None = arguments.out
    if arguments.list_questions and arguments.overrides:
        raise InputError(f"--list-questions: takes no {' '.join(arguments.overrides)}; name a new file with --out.")
    if arguments.list_questions:
        return _list_questions(arguments.records, arguments.root, arguments.limit, out)
    if out is None:
        raise InputError("--out: name a folder for the results.")
    inputs = {"the checkpoint": arguments.checkpoint, "the predictions": arguments.predictions}
    inputs |= {"the root": arguments.root, "the configuration": arguments.config}
    inputs |= {f"manifest {path.name}": path for path in arguments.records}
    with replaced_folder(out, REPORT, inputs=inputs) as folder:
        _evaluate(arguments, folder)
    print(f"done: the tables are in {out / 'table.md'}, cases to look at in {out / 'gallery.html'}")
    return None


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
