"""Turns data sets into manifests, one record per line. Run it as

  python scripts/prepare_data.py demo --out data/demo
  python scripts/prepare_data.py sa-med2d --root SAMed2Dv1 --out data/sa_med2d --workers 8
  python scripts/prepare_data.py mlmr-sd --root MLMR-SD --out data/mlmr_sd
  python scripts/prepare_data.py ask --records data/sa_med2d --root SAMed2Dv1 --bank abdomen --out data/abdomen
  python scripts/prepare_data.py check --records mine.jsonl

Each command has its own --help, which lists what is written; run.json in the folder records how it was made.
`check` writes nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os.path import expanduser
from pathlib import Path
from typing import Any

from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError, exit_code, nearest
from medisee.foundation.files import write_json
from medisee.foundation.output import Result, check_output, locked

DEMO = """Makes the demo data set, offline and in about a minute: MRI slices of an averaged brain with the outlines of
its structures, and questions that describe a structure without naming it.

  python scripts/prepare_data.py demo --out data/demo
  python scripts/prepare_data.py demo --out data/tiny --limit 4 --copies 0      a few slices, to try things out

Writes into OUT, which must be new, empty or an earlier demo data set: images/, train_class.jsonl (questions come from
class-name templates), train_reasoning.jsonl (the same slices with questions that reason), val.jsonl and test.jsonl
(slices and wordings that training never sees), test_seen.jsonl (test's slices with wordings of training),
categories.json (the names that count as naming a structure), data.json (sources, licences, counts) and run.json.
"""
SA_MED2D = """Makes manifests of SA-Med2D-20M. Get SAMed2Dv1.zip from its authors and unzip it; no image is copied.

  python scripts/prepare_data.py sa-med2d --root SAMed2Dv1 --out data/sa_med2d --workers 8
  python scripts/prepare_data.py sa-med2d --root SAMed2Dv1 --out data/small --subset 500 liver=2000 --min-area 100

Writes into OUT: train.jsonl, val.jsonl and test.jsonl (no case is in two), rejects.jsonl (the files that were left out,
and why), run.json, and *.offsets.safetensors beside large manifests, which then open at once. Paths in the manifests
are relative to ROOT, so name it as their root when you train or evaluate. Every mask is read and measured: all 15.8
million take one core half a day. --index-only takes minutes; masks are then joined and measured when they are used, a
wrong one ends a training (unless data.skip_corrupt is set), and Brain_PTM is left out. It excludes --min-area and
--workers. --subset caps count over all splits together; which targets are chosen depends only on --seed.
"""
MLMR_SD = """Makes manifests of MLMR-SD, in the JSON formats of the authors' release or in Parquet files of a dataset hub.
What `python -m data_gen export` writes holds manifests already and needs no preparing.

  python scripts/prepare_data.py mlmr-sd --root MLMR-SD --out data/mlmr_sd

ROOT holds train.json, val.json and test.json, {image: {mask: class}}, with the questions beside them as .jsonl (keys:
id, image, mask, category, question, answer, perspective, length, and history in a conversation), or data/*.parquet.
Writes into OUT: train.jsonl, val.jsonl, test.jsonl, the paper's two test sets test_short.jsonl and test_long.jsonl,
run.json and, from Parquet files, images/ and masks/. Paths in the manifests are relative to ROOT (from Parquet files:
to OUT), so name it as their root when you train. Targets without questions get class-name questions.
"""
ASK = """Adds questions that describe a target without naming it to manifests that have none, such as those of sa-med2d.

  python scripts/prepare_data.py ask --records data/btcv --root SAMed2Dv1 --bank abdomen --out data/abdomen

BANK is `abdomen` (13 abdominal organs, CT), `brain` (the demo's structures) or a YAML file of the same form; targets
that it does not know are left out. Pictures are copied, so this is for thousands of images, not millions. Writes into
OUT, which must be new, empty or an earlier result of this command, with the splits of RECORDS: images/ (with augmented
copies of training's), the manifests and categories.json of `demo`, asked.json (counts, and what was left out) and
run.json.
"""

_FILLED = {
    name: Result(name, rf"({files})\.jsonl|run\.json|{more}", "run.json", "settings.data", value=name)
    for name, files, more in (
        ("sa-med2d", "train|val|test|rejects", ""),
        ("mlmr-sd", "train|val|test|test_short|test_long", "images|masks"),
    )
}
"""The results that are written into OUT file by file, beside what else lies in it."""

CHECK = """Reads all records, images, masks, boxes and texts before a training does, and writes nothing.

  python scripts/prepare_data.py check --records mine.jsonl --root images --workers 8
  python scripts/prepare_data.py check --config configs/demo.yaml

Prints what the records hold (images, targets and questions by category, modality and size, the longest text) and every
problem with its file and line. Exits with 2 if a training would refuse something. With --config it also reads what that
run validates on and its categories file, and holds texts and answers against its model; without --records it reads all
manifests of the run.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Prepares a data set from the command line."""
    options = vars(parse_words(_parser(), argv))
    command = options.pop("command")
    if command == "check":
        _check(**options)
        return
    # Reading the index of a whole data set takes minutes, so what can be checked before is checked before.
    if problems := _problems(command, options):
        raise InputError(problems)
    started = time.perf_counter()
    # The others replace OUT as a whole, and hold it themselves.
    with locked(options["out"]) if command in _FILLED else nullcontext():
        {"demo": _demo, "sa-med2d": _sa_med2d, "mlmr-sd": _mlmr_sd, "ask": _ask}[command](options)
    seconds = round(time.perf_counter() - started, 3)
    # Late: the processes that read masks import this module and do not need torch.
    from medisee.foundation.provenance import run_facts

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    facts = run_facts({"data": command, **settings}, options["seed"], "cpu")
    write_json(options["out"] / "run.json", {**facts, "seconds": seconds})


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo|sa-med2d|mlmr-sd|ask|check")
    add = commands.add_parser("demo", help="the offline demo", description=DEMO, formatter_class=raw).add_argument
    add("--out", type=a_path, required=True, help="folder to write")
    add("--copies", type=int, default=3, metavar="N", help="augmented copies of a training slice (default: 3)")
    add("--seed", type=int, default=0, help="of augmentation and wordings (default: 0)")
    add("--limit", type=int, metavar="N", help="maximum slices per plane and split (default: all)")
    add("--train-questions", type=int, default=8, metavar="N", help="questions per training target (default: 8)")
    add = commands.add_parser("sa-med2d", help="SA-Med2D-20M", description=SA_MED2D, formatter_class=raw).add_argument
    add("--root", type=a_path, required=True, help="the unzipped folder SAMed2Dv1")
    add("--out", type=a_path, required=True, help="folder to write; an earlier result in it is replaced")
    add("--val", type=float, default=0.1, metavar="SHARE", help="of each data set's cases (default: 0.1)")
    add("--test", type=float, default=0.1, metavar="SHARE", help="of each data set's cases (default: 0.1)")
    add("--seed", type=int, default=0, help="of the split and the subset (default: 0)")
    add("--min-area", type=int, default=0, metavar="PIXELS", help="leave out smaller targets (default: 0)")
    add("--datasets", nargs="+", metavar="NAME", help="take only these (default: all)")
    add("--subset", nargs="+", metavar="CAP", help="maximum targets per category; CATEGORY=CAP for one (default: all)")
    add("--index-only", action="store_true", help="use only the names in the index, open no image")
    add("--workers", type=int, default=1, metavar="N", help="processes that read masks (default: 1)")
    add = commands.add_parser("mlmr-sd", help="MLMR-SD", description=MLMR_SD, formatter_class=raw).add_argument
    add("--root", type=a_path, required=True, help="the data set's folder")
    add("--out", type=a_path, required=True, help="folder to write; an earlier result in it is replaced")
    add("--seed", type=int, default=0, help="of the words around questions and answers (default: 0)")
    add = commands.add_parser("ask", help="adds questions", description=ASK, formatter_class=raw).add_argument
    add("--records", type=a_path, required=True, help="folder with train.jsonl, val.jsonl and test.jsonl")
    add("--root", type=a_path, help="folder that paths in them are relative to (default: their own)")
    add("--bank", type=expanduser, required=True, help="abdomen, brain or a YAML file")
    add("--out", type=a_path, required=True, help="folder to write")
    add("--copies", type=int, default=3, metavar="N", help="augmented copies of a training image (default: 3)")
    add("--seed", type=int, default=0, help="of wordings and augmentation (default: 0)")
    add("--train-questions", type=int, default=8, metavar="N", help="questions per training target (default: 8)")
    add = commands.add_parser("check", help="looks at records", description=CHECK, formatter_class=raw).add_argument
    add("--records", type=a_path, nargs="+", default=[], help="manifests (default: those of --config)")
    add("--root", type=a_path, help="folder that paths in them are relative to (default: as in --config, or their own)")
    add("--config", help="YAML run that is to read them")
    add("--workers", type=int, default=1, metavar="N", help="processes that read files (default: 1)")
    return parser


def _demo(options: dict[str, Any]) -> None:
    from medisee.sources.demo import prepare_demo

    _print_counts(options["out"], prepare_demo(**options))


def _sa_med2d(options: dict[str, Any]) -> None:
    from medisee.sources.sa_med2d import prepare
    from medisee.sources.subset import parse_subset

    subset = parse_subset(options["subset"], options["seed"]) if options["subset"] else None
    done = prepare(**{**options, "subset": subset})
    print(f"{'split':<8}{'images':>12}{'targets':>12}{'cases':>12}")
    for split, images in done.images.items():
        print(f"{split:<8}{images:>12,}{done.targets[split]:>12,}{done.cases[split]:>12,}")
    for reason, files in sorted(done.rejects.items(), key=lambda one: -one[1]):
        print(f"left out: {files:,} file(s), {reason}")
    print(f"done: {sum(done.images.values()):,} images in {options['out']}; their root is {options['root']}")


def _mlmr_sd(options: dict[str, Any]) -> None:
    from medisee.sources.mlmr_sd import prepare

    _print_counts(options["out"], prepare(**options))


def _ask(options: dict[str, Any]) -> None:
    from medisee.sources.ask import prepare
    from medisee.sources.query_bank import BANKS

    name = options["bank"]
    bank = BANKS.get(name, Path(name))
    if not bank.is_file():
        raise InputError(
            f"--bank {name}: is neither {' nor '.join(sorted(BANKS))} nor a YAML file; correct it.{nearest(name, BANKS)}"
        )
    done = prepare(**{**options, "bank": bank})
    for category, targets in sorted(done.unknown.items()):
        print(f"left out: {targets:,} target(s) of {category!r}, which the bank does not know")
    _print_counts(options["out"], done.images)


def _check(*, records: Sequence[Path], root: Path | None, config: str | None, workers: int) -> None:
    from medisee.config.load import load_config
    from medisee.data.check import Found, Job, look, no_target, scored_job, table, training_job, with_lines
    from medisee.records.manifest import Manifest

    run = load_config(config)
    known = [(Path(one.records), one.root) for one in run.data.train]
    val = Path(run.data.selection) if run.data.selection else None
    known += [(val, run.data.root)] if val is not None else []
    wanted = [next((one for one in known if one[0] == path), (path, None)) for path in records] or known
    if not wanted or workers < 1:
        raise InputError("give --records or a --config with data.train, and --workers of 1 or more.")
    problems: list[str] = []
    jobs: list[Job] = []
    for path, own in wanted:
        try:
            one = Manifest(path, root or own)
            scored = path == val and path not in [Path(source.records) for source in run.data.train]
            jobs.append(scored_job(run, one, run.train.val_limit) if scored else training_job(run, one))
        except InputError as error:
            problems += error.problems
    every: list[Found] = []
    if config is not None:
        from medisee.evaluation.scoring import read_categories
        from medisee.training.initial_model import known_words, look_at

        try:
            read_categories(run.data.categories) if run.data.categories else None
        except InputError as error:
            problems += error.problems
        try:
            words = known_words(run)
        except InputError as error:
            print(f"tokens are not counted: {error}")
        else:
            _, every = look_at(run, jobs, words, workers=workers)
    for job in jobs[len(every) :]:
        every.append(Found())
        for part in look(job, workers):
            part.words.clear()  # what is too long depends on the model
            every[-1].add(part)
    for job, found in zip(jobs, every, strict=True):
        print(table(job.manifest, found))
        problems += with_lines(job.manifest, found.problems)
        if not found.counts["all", "targets"]:
            problems.append(no_target(job.manifest))
    if problems:
        raise InputError(problems)
    print(f"done: no problem in {sum(found.counts['all', 'images'] for found in every):,} records")


def _print_counts(out: Path, counts: Mapping[str, int]) -> None:
    print(f"done: {out} holds " + ", ".join(f"{name}.jsonl ({count} images)" for name, count in counts.items()))


def _problems(command: str, options: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    try:
        check_output(options["out"], _FILLED.get(command), inputs={"the root": options.get("root")})
    except InputError as error:
        problems += error.problems
    if command != "sa-med2d":
        return problems
    from medisee.sources.subset import parse_subset

    try:
        parse_subset(options["subset"] or [], options["seed"])
    except InputError as error:
        problems += error.problems
    for option, value, least in (("--min-area", options["min_area"], 0), ("--workers", options["workers"], 1)):
        if options["index_only"] and value > least:
            problems.append(f"{option}: is about masks, which --index-only does not read; leave one of them out.")
        if value < least:
            problems.append(f"{option} is {value}; expected {least} or more; raise it.")
    shares = options["val"], options["test"]
    if not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) >= 1:
        problems.append(f"--val {shares[0]} --test {shares[1]}: expected shares >= 0 with a sum below 1; correct them.")
    return problems


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
