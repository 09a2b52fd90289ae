"""Turns data sets into manifests, one record per line. Run it as

  python scripts/prepare_data.py demo --out data/demo
  python scripts/prepare_data.py sa-med2d --root SAMed2Dv1 --out data/sa_med2d --workers 8
  python scripts/prepare_data.py mlmr-sd --root MLMR-SD --out data/mlmr_sd
  python scripts/prepare_data.py ask --records data/sa_med2d --root SAMed2Dv1 --bank abdomen --out data/abdomen
  python scripts/prepare_data.py folder --images img --masks msk --category polyp --modality endoscopy --out data/polyps
  python scripts/prepare_data.py check --records mine.jsonl

`coco`, `nifti` and `public` are the other importers. Each command has its own --help, which lists what is written;
run.json in the folder records how it was made. `check` writes nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from os.path import expanduser
from pathlib import Path
from typing import Any

from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError, exit_code, nearest
from medisee.foundation.files import write_json
from medisee.foundation.output import Result, check_output, locked, replaced_folder

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

BANK is `abdomen` (13 abdominal organs, CT), `brain` (the demo's structures), `patients` (hearts, fetal heads, polyps, the
hippocampus) or a YAML file of the same form; targets that it does not know are left out. Pictures are copied, so this is
for thousands of images, not millions. Writes into OUT, which must be new, empty or an earlier result of this command, with the splits of RECORDS: images/ (with augmented
copies of training's), the manifests and categories.json of `demo`, asked.json (counts, and what was left out) and
run.json.
"""

FOLDER = """Makes manifests of pictures and masks in folders; no picture is copied.

  medisee prepare folder --images img --masks msk --category polyp --modality endoscopy --out data/polyps
  medisee prepare folder --images img --masks msk --modality ct --out data/organs     masks in msk/liver, msk/spleen, ...
  medisee prepare folder --images img --masks maps --labels 1=liver,2=spleen --modality ct --out data/maps

A mask has the name of its picture, with any ending, or is named by --pattern, such as '{stem}_mask.png'. Writes into OUT:
train.jsonl, val.jsonl and test.jsonl (no patient is in two), rejects.jsonl (what was left out, and why) and run.json.
Paths are relative to --root, which is by default the folder that holds both.
"""
COCO = """Makes manifests of COCO annotations (polygons or RLE): one target for each category in an image, the union of its
instances. Writes the files of `folder`; paths are relative to IMAGES.

  medisee prepare coco --annotations instances.json --images img --modality xray --out data/mine
"""
NIFTI = """Makes pictures and manifests of NIfTI volumes with label maps: the Medical Segmentation Decathlon's and nnU-Net's
folders, ACDC's, BTCV's.

  medisee prepare nifti --root Task09_Spleen --modality ct --window 40,400 --out data/spleen

Slices are shown as radiologists see them, the patient's right at the left. OUT, which must be new, empty or an earlier
result of this command, gets images/ and the files of `folder`.
"""
PUBLIC = """Makes manifests of public data sets of patients from their official archives.

  medisee prepare public --sets kvasir_seg hc18 --accept-licences --out data/patients

Archives are looked for in --from; what is missing there is downloaded to it, if its authors allow that, and continued
after an interruption. The addresses are untested: if one has moved, download the archive by hand. OUT, which
must be new, empty or an earlier result of this command, gets the pictures and the files of `folder`.
"""

_FILLED = {
    name: Result(name, rf"({files})\.jsonl|run\.json|{more}", "run.json", "settings.data", value=name)
    for name, files, more in (
        ("sa-med2d", "train|val|test|rejects", ""),
        ("mlmr-sd", "train|val|test|test_short|test_long", "images|masks"),
        ("folder", "train|val|test|rejects", ""),
        ("coco", "train|val|test|rejects", ""),
    )
}
"""The results that are written into OUT file by file, beside what else lies in it."""
_REPLACED = {
    name: Result(
        name,
        rf"(train|val|test|rejects)\.(jsonl|offsets\.safetensors)|run\.json|{more}/.*",
        "run.json",
        "settings.data",
        value=name,
    )
    for name, more in (("nifti", "images"), ("public", "(images|kvasir_seg|hc18)"))
}
"""The results that replace OUT as a whole."""

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
        _COMMANDS[command](options)
    seconds = round(time.perf_counter() - started, 3)
    # Late: the processes that read masks import this module and do not need torch.
    from medisee.foundation.provenance import run_facts

    digests = {"sha256": options.pop("sha256")} if "sha256" in options else {}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    facts = run_facts({"data": command, **settings}, options["seed"], "cpu")
    write_json(options["out"] / "run.json", {**facts, **digests, "seconds": seconds})


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo|sa-med2d|mlmr-sd|folder|coco|nifti|public|ask|check"
    )
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
    add("--bank", type=expanduser, required=True, help="abdomen, brain, patients or a YAML file")
    add("--out", type=a_path, required=True, help="folder to write")
    add("--copies", type=int, default=3, metavar="N", help="augmented copies of a training image (default: 3)")
    add("--seed", type=int, default=0, help="of wordings and augmentation (default: 0)")
    add("--train-questions", type=int, default=8, metavar="N", help="questions per training target (default: 8)")
    add = commands.add_parser("check", help="looks at records", description=CHECK, formatter_class=raw).add_argument
    add("--records", type=a_path, nargs="+", default=[], help="manifests (default: those of --config)")
    add("--root", type=a_path, help="folder that paths in them are relative to (default: as in --config, or their own)")
    add("--config", help="YAML run that is to read them")
    add("--workers", type=int, default=1, metavar="N", help="processes that read files (default: 1)")
    _add_importers(commands)
    return parser


def _add_importers(commands: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    told = {
        "folder": ("pictures and masks", FOLDER),
        "coco": ("COCO annotations", COCO),
        "nifti": ("volumes", NIFTI),
        "public": ("public sets of patients", PUBLIC),
    }
    add_to = {
        name: commands.add_parser(name, help=words, description=description, formatter_class=raw).add_argument
        for name, (words, description) in told.items()
    }
    add = add_to["folder"]
    add("--images", type=a_path, required=True, help="folder of PNG, JPEG or TIFF pictures")
    add("--masks", type=a_path, required=True, help="folder of masks, or of a folder for each category")
    add("--category", help="category of every mask")
    add("--labels", nargs="+", metavar="N=NAME", help="categories of a label map's values, such as 1=liver,2=spleen")
    add("--pattern", default="{stem}.*", help="a mask's name (default: '{stem}.*')")
    add("--fill", action="store_true", help="masks are closed outlines: fill them")
    add("--root", type=a_path, help="folder that paths are relative to (default: the one that holds both)")
    add = add_to["coco"]
    add("--annotations", type=a_path, required=True, help="JSON file of annotations")
    add("--images", type=a_path, required=True, help="folder that the file names are relative to")
    add = add_to["nifti"]
    add("--root", type=a_path, required=True, help="the data set's folder")
    add("--labels", nargs="+", metavar="N=NAME", help="categories of labels (default: those of dataset.json)")
    add("--plane", choices=("axial", "coronal", "sagittal"), default="axial", help="of the slices (default: axial)")
    add("--window", metavar="C,W", help="center and width of grey levels, such as 40,400 (default: by percentiles)")
    add("--channel", type=int, metavar="N", help="of 4-D volumes, from 0")
    add("--keep-empty", action="store_true", help="also slices without a target")
    add("--min-area", type=int, default=0, metavar="PIXELS", help="leave out smaller targets (default: 0)")
    for name in ("folder", "coco"):
        add_to[name](
            "--case", metavar="REGEX", help="finds the patient in a picture's path (default: a picture is a case)"
        )
    for name in ("folder", "coco", "nifti"):
        add_to[name]("--modality", required=True, help="such as ct, mr, ultrasound, endoscopy")
        add_to[name]("--source", help="name of the data set (default: that of its folder)")
    add = add_to["public"]
    add("--sets", nargs="+", required=True, metavar="NAME", help="kvasir_seg, hc18, msd_hippocampus, acdc, btcv")
    archives = "folder of the archives (default: data/archives)"
    add("--from", dest="archives", type=a_path, default=Path("data/archives"), metavar="DIR", help=archives)
    add("--accept-licences", action="store_true", help="you have read the sets' licences and accept them")
    for add in add_to.values():
        add("--out", type=a_path, required=True, help="folder to write")
        add("--val", type=float, default=0.1, metavar="SHARE", help="of each data set's patients (default: 0.1)")
        add("--test", type=float, default=0.2, metavar="SHARE", help="of each data set's patients (default: 0.2)")
        add("--seed", type=int, default=0, help="of the split (default: 0)")


def _demo(options: dict[str, Any]) -> None:
    from medisee.sources.demo import prepare_demo

    _print_counts(options["out"], prepare_demo(**options))


def _sa_med2d(options: dict[str, Any]) -> None:
    from medisee.sources.sa_med2d import prepare
    from medisee.sources.subset import parse_subset

    subset = parse_subset(options["subset"], options["seed"]) if options["subset"] else None
    _print_prepared(prepare(**{**options, "subset": subset}), options["out"], options["root"])


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


def _folder(options: dict[str, Any]) -> None:
    from medisee.sources.image_folder import Layout, folder_records, parse_labels

    images, masks, labels = options["images"].resolve(), options["masks"].resolve(), options["labels"]
    if options["category"] and labels:
        raise InputError("--category and --labels: a mask is of one category, or a label map; leave one of them out.")
    if missing := [
        f"{path}: expected a folder, found none; check the path." for path in (images, masks) if not path.is_dir()
    ]:
        raise InputError(missing)
    root = options["root"].resolve() if options["root"] else Path(os.path.commonpath([images, masks]))
    for path in (images, masks):
        if not path.is_relative_to(root):
            raise InputError(f"--root {root}: does not hold {path}; name a folder above it.")
    layout = Layout(
        images=images,
        masks=masks,
        root=root,
        category=options["category"],
        labels=parse_labels(labels) if labels else None,
        pattern=options["pattern"],
        case=_expression(options["case"]),
        fill=options["fill"],
    )
    found = folder_records(layout, modality=options["modality"], source=options["source"] or images.name)
    _write_found(found, options["out"], root, options)


def _coco(options: dict[str, Any]) -> None:
    from medisee.sources.coco import coco_records

    annotations, images = options["annotations"], options["images"]
    about = {"modality": options["modality"], "source": options["source"] or annotations.stem}
    found = coco_records(annotations, images, case=_expression(options["case"]), **about)
    _write_found(found, options["out"], images, options)


def _nifti(options: dict[str, Any]) -> None:
    from medisee.sources.image_folder import parse_labels
    from medisee.sources.nifti import Slicing, find_pairs, parse_window, read_labels, slice_records

    root, out = options["root"], options["out"]
    labels = parse_labels(options["labels"]) if options["labels"] else read_labels(root)
    slicing = Slicing(
        plane=options["plane"],
        window=parse_window(options["window"]) if options["window"] else None,
        channel=options["channel"],
        keep_empty=options["keep_empty"],
        min_area=options["min_area"],
    )
    about = {"modality": options["modality"], "source": options["source"] or root.absolute().name}
    pairs = find_pairs(root)
    with replaced_folder(out, _REPLACED["nifti"], inputs={"the root": root}) as folder:
        (folder / "images").mkdir()
        found = (one for pair in pairs for one in slice_records(pair, labels, slicing, folder=folder, **about))
        _write_found(found, folder, out, options)


def _public(options: dict[str, Any]) -> None:
    from medisee.sources.public_sets import chosen, set_records, unpacked

    sets, archives, out = chosen(options["sets"]), options["archives"], options["out"]
    if not options["accept_licences"]:
        terms = (f"{name}: {one.about}; licence: {one.licence}" for name, one in sets.items())
        raise InputError([*terms, "read these licences, and add --accept-licences if you accept them."])
    with replaced_folder(out, _REPLACED["public"], inputs={"the archives": archives}) as folder:
        (folder / "images").mkdir()
        digests = {name: unpacked(name, archives, folder) for name in sets}
        found = (one for name in sets for one in set_records(name, folder / name, folder))
        _write_found(found, folder, out, options)
        for name, one in sets.items():
            if one.labels is not None:  # its slices are in images/
                shutil.rmtree(folder / name)
    options["sha256"] = digests


def _expression(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise InputError(f"--case {text!r}: not a regular expression ({error}); correct it.") from error


def _write_found(found: Any, folder: Path, root: Path, options: dict[str, Any]) -> None:
    from medisee.sources.splits import write_found

    done = write_found(found, folder, val=options["val"], test=options["test"], seed=options["seed"])
    _print_prepared(done, options["out"], root)


def _print_prepared(done: Any, out: Path, root: Path) -> None:
    print(f"{'split':<8}{'images':>12}{'targets':>12}{'cases':>12}")
    for split, images in done.images.items():
        print(f"{split:<8}{images:>12,}{done.targets[split]:>12,}{done.cases[split]:>12,}")
    for reason, files in sorted(done.rejects.items(), key=lambda one: -one[1]):
        print(f"left out: {files:,} file(s), {reason}")
    print(f"done: {sum(done.images.values()):,} images in {out}; their root is {root}")


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
    if "val" in options:
        shares = options["val"], options["test"]
        if not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) >= 1:
            problems.append(
                f"--val {shares[0]} --test {shares[1]}: expected shares >= 0 with a sum below 1; correct them."
            )
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
    return problems


_COMMANDS = {
    "demo": _demo,
    "sa-med2d": _sa_med2d,
    "mlmr-sd": _mlmr_sd,
    "folder": _folder,
    "coco": _coco,
    "nifti": _nifti,
    "public": _public,
    "ask": _ask,
}

if __name__ == "__main__":
    raise SystemExit(exit_code(main))
