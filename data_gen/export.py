"""Exports the data set from a ledger: what the machine accepted and people did not take out. Run it as

  python -m data_gen export --ledger data/mlmr_sd/ledger.sqlite --out data/mlmr_sd/export

Writes into OUT (which must be new, empty or an earlier export):
  train.jsonl, val.jsonl, test.jsonl     manifests for training and evaluation; test_short and test_long as in the paper
  categories.json                        the names that count as naming a category (data.categories of a run)
  images/, masks/                        the pictures, copied
  release/<split>.json, .jsonl           {image: {mask: class}} and the questions, as the authors' loaders read them
  hub/                                   Parquet files with a card: datasets.load_dataset("OUT/hub")
  data.json                              counts, models, what was dropped and why, screening, sources

One target per image. Splits are by case: 10,129 / 1,257 / 1,266 images where there are enough, else in these
proportions. Of pairs that people judged: one rejection takes a pair out, an edit goes before an accept, edits that
differ take it out, and a conversation stays or goes as a whole. The same ledger gives the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_gen.core.names import Names
from data_gen.core.pictures import item_image, item_mask
from data_gen.ledger.ledger import Ledger
from data_gen.ledger.screening import screen
from data_gen.publishing.card import card
from data_gen.publishing.entries import Entry, entries
from data_gen.publishing.parquet import write_parquet
from data_gen.publishing.splits import SPLITS
from data_gen.publishing.summary import ImageSource, read_sources, summary
from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError
from medisee.foundation.files import inside, write_json, write_text
from medisee.foundation.json_files import read_json
from medisee.foundation.output import Result, check_output, replaced_folder
from medisee.records.jsonl import write_lines
from medisee.sources.mlmr_sd import write_splits

SUMMARY = "data.json"


def export(
    ledger: Ledger, out: Path, *, seed: int = 0, screened_only: bool = False, sources: dict[str, ImageSource]
) -> dict[str, Any]:
    """Writes the data set into a folder, whole or not at all, and returns the content of its data.json.

    The result depends on the ledger and the arguments only. An earlier export in the folder is replaced. The seed draws
    the splits and the words around questions and answers; `sources` says where images come from, for the card.
    """
    candidates = ledger.pairs()
    screening = screen(candidates, ledger.decisions(), screened_only=screened_only)
    listed = entries(ledger.items(), screening.pairs, seed)
    if not listed:
        wanted = "a pair that a person accepted" if screened_only else "a pair"
        raise InputError(f"{ledger.path}: expected {wanted}, found none among {len(candidates)}; go on with the run.")
    settings = {"seed": seed, "screened_only": screened_only}
    facts = summary(ledger, listed, screening, sources=sources, settings=settings)
    with replaced_folder(out, RESULT, inputs=_inputs(ledger, out)) as folder:
        _write_pictures(listed, ledger.root(), folder)
        of_split = {split: [entry for entry in listed if entry.split == split] for split in SPLITS}
        write_splits(folder, {split: [entry.record(seed) for entry in chosen] for split, chosen in of_split.items()})
        write_json(folder / "categories.json", _categories(listed, ledger.names()))
        for split, chosen in of_split.items():
            if chosen:  # the authors' form; they published no example, so a line's keys are those of `Question`
                release = folder / "release" / f"{split}.json"
                write_json(release, {entry.image: {entry.mask: entry.item.category} for entry in chosen})
                questions = (question for entry in chosen for question in entry.questions)
                write_lines(release.with_suffix(".jsonl"), questions, omit_empty=("history",))
        write_parquet(folder / "hub", folder, listed)
        write_text(folder / "hub" / "README.md", card(facts))
        write_json(folder / SUMMARY, facts)
    return facts


def _pictures(folder: Path) -> set[str]:
    """Returns the pictures that an export lists."""
    names: set[str] = set()
    for path in folder.glob("release/*.json"):
        with suppress(InputError, TypeError):
            names.update(*({image, *masks} for image, masks in read_json(path, "an export's pictures").items()))
    return names


_FILES = (
    r"(train|val|test|test_short|test_long)\.(jsonl|offsets\.safetensors)|(categories|data)\.json|"
    r"release/(train|val|test)\.jsonl?|hub/README\.md|hub/data/(train|validation|test)-\d{5}-of-\d{5}\.parquet"
)
RESULT = Result("export", _FILES, SUMMARY, "screening", listed=_pictures)


def _inputs(ledger: Ledger, out: Path) -> dict[str, Path]:
    root = ledger.root()
    inside_root = out.resolve().is_relative_to(root.resolve())
    names = {name for item in ledger.items() for name in (item.image, item.mask)} if inside_root else ()
    pictures = {f"picture {name!r}": root / name for name in names if isinstance(name, str)}
    return {"the ledger": ledger.path, "the folder of the images": root, **pictures}


def _write_pictures(listed: Sequence[Entry], root: Path, folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    problems: list[str] = []
    # disable=None: progress on a terminal only.
    for entry in tqdm(listed, desc="images", unit="image", disable=None):
        try:
            item_image(entry.item, root)
            mask = item_mask(entry.item, root)
        except InputError as error:
            problems.extend(error.problems)
            continue
        shutil.copyfile(inside(root, entry.item.image, f"item {entry.item.id!r}"), folder / entry.image)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / entry.mask)
    if problems:
        raise InputError(problems)


def _categories(listed: Sequence[Entry], names: Names) -> dict[str, list[str]]:
    """Gives each name to one category: the one that has it as its label, else the first one in the alphabet."""
    categories = sorted({entry.item.category for entry in listed})
    owner = {" ".join(category.casefold().split()): category for category in categories}
    result: dict[str, list[str]] = {category: [category] for category in categories}
    for category in categories:
        for name in names.of(category):
            if owner.setdefault(" ".join(name.casefold().split()), category) == category and name != category:
                result[category].append(name)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Exports a data set from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen export", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--ledger", type=a_path, required=True, help="the ledger that `run` wrote")
    add("--out", type=a_path, required=True, help="folder to write; an earlier export in it is replaced")
    add("--screened-only", action="store_true", help="leave out what no person has accepted or edited")
    add("--seed", type=int, default=0, help="seed of splits and wordings (default: 0)")
    add("--sources", type=a_path, metavar="FILE", help="more sources and licences for the card, as in sources.yaml")
    arguments = parse_words(parser, argv)
    check_output(arguments.out, RESULT, whole=True, inputs={"the ledger": arguments.ledger})
    sources = read_sources(*([arguments.sources] if arguments.sources else []))
    with Ledger(arguments.ledger) as ledger:
        if not ledger.is_deduplicated():
            print(
                "warning: the run has not finished, so near-duplicates may be among the pairs; start `python -m data_gen "
                "run` again before you publish this.",
                file=sys.stderr,
            )
        screened_only = arguments.screened_only
        facts = export(ledger, arguments.out, seed=arguments.seed, screened_only=screened_only, sources=sources)
    for split, counts in facts["counts"].items():
        line = f"{counts['images']:,} images of {counts['cases']:,} cases, {counts['pairs']:,} pairs"
        print(f"{split:<6}{line if counts['images'] else 'empty: there are too few cases'}")
    if facts["author"] != "models":
        print(f"made by: {facts['author']}")
    print(f"done: {arguments.out}")
