"""Adds questions from a bank to manifests that have none, as a new data set with the layout of the demo's."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medisee.foundation.errors import InputError
from medisee.foundation.files import write_json
from medisee.foundation.output import Result, replaced_folder
from medisee.records.images import read_image
from medisee.records.manifest import Manifest
from medisee.records.masks import bounded_size, encode_mask, mask_box
from medisee.records.records import SPLITS, Record, Split
from medisee.sources.augment import augment
from medisee.sources.query_bank import QUESTION_FILES, check_settings, load_bank, write_questions

SUMMARY = "asked.json"
_IMAGES = r"images/(train|val|test)_\d{6}(_a\d+)?\.png"
RESULT = Result("data set of this command", rf"{_IMAGES}|asked\.json|{QUESTION_FILES}", SUMMARY, "bank")
COPY_SIDE = 256  # longest side of an augmented copy, pixels: the frame of small seg heads
LEAST_AREA = 16  # smallest target that is kept in an augmented copy, pixels


@dataclass(frozen=True, slots=True)
class Counts:
    """The number of images in each manifest, and of targets left out because of their category."""

    images: dict[str, int]
    unknown: dict[str, int]


def prepare(
    records: Path,
    out: Path,
    *,
    bank: Path,
    root: Path | None = None,
    copies: int = 3,
    seed: int = 0,
    train_questions: int = 8,
) -> Counts:
    """Writes a data set with questions, whole or not at all; pictures are copied, masks become RLEs.

    Images stay in their split, and each split has its own wordings: none of val or test is in training, except in
    `test_seen.jsonl`, which repeats test's images with wordings of training. Categories take the bank's names.

    Args:
        records: folder of train.jsonl, val.jsonl (which may be missing or empty) and test.jsonl.
        out: the folder to write; if it exists it must be empty or an earlier result, which is replaced.
        bank: the query bank.
        root: folder that paths in the manifests are relative to; None: the manifests' own.
        copies: augmented copies of each training image, of COPY_SIDE pixels at most; they are never mirrored.
        seed: of the split of the wordings, the drawing and the augmentation.
        train_questions: questions for each target of `train_reasoning.jsonl`; a held-out target has two.
    """
    numbers = {"copies": (copies, 0), "seed": (seed, 0), "train_questions": (train_questions, 1)}
    inputs = {"the manifests": records, "the root": root, "the bank": bank}
    check_settings(numbers, out, RESULT, inputs)
    unknown: Counter[str] = Counter()
    plain: dict[Split, list[Record]] = {split: [] for split in SPLITS}
    with replaced_folder(out, RESULT, inputs=inputs) as folder:
        pools = load_bank(bank, None)
        known = {name.casefold(): key for key, pool in pools.items() for name in (key, *pool.names)}
        manifests = _manifests(records, root)
        (folder / "images").mkdir()
        for split, manifest in manifests.items():
            for number, record in enumerate(tqdm(manifest, desc=split, unit="image", disable=None)):
                names = {target.id: known.get(target.category.casefold()) for target in record.targets}
                unknown.update(target.category for target in record.targets if not names[target.id])
                kept = [replace(t, category=name, qa=()) for t in record.targets if (name := names[t.id])]
                if kept:
                    one = replace(record, targets=tuple(kept))
                    image, masks = read_image(manifest.image_path(one)), manifest.masks(one)
                    path = folder / f"images/{split}_{number:06d}"
                    plain[split].append(_saved(one, image, masks, path))
                    if split == "train":
                        plain[split] += _copies(one, image, masks, path, copies, seed)
        if lacking := [split for split in ("train", "test") if not plain[split]]:
            raise InputError(
                f"{records}: no target in {' and '.join(lacking)} that {bank} asks about ({', '.join(pools)}); "
                f"found {', '.join(unknown) or 'none'}; give a bank that has these."
            )
        written = write_questions(folder, plain, pools, seed, train_questions)
        images = {name: len(listed) for name, listed in written.items()}
        write_json(folder / SUMMARY, {"bank": bank.name, "images": images, "unknown": dict(unknown)})
    return Counts(images, dict(unknown))


def _manifests(records: Path, root: Path | None) -> dict[Split, Manifest]:
    paths: dict[Split, Path] = {split: records / f"{split}.jsonl" for split in SPLITS}
    if lacking := [path for path in (paths["train"], paths["test"]) if not path.is_file()]:
        raise InputError(
            f"{path}: expected a manifest, found no such file; name a folder that prepare_data.py sa-med2d wrote."
            for path in lacking
        )
    found: dict[Split, Manifest] = {
        split: Manifest(path, root)
        for split, path in paths.items()
        if split != "val" or (path.is_file() and path.stat().st_size > 0)
    }
    owner: dict[str, Split] = {}
    shared: dict[str, Split] = {
        record.case: split
        for split, manifest in found.items()
        for record in manifest
        if owner.setdefault(record.case, split) != split
    }
    if shared:
        raise InputError(
            f"{paths[split]}: case {case!r} is also in {owner[case]}.jsonl; expected each in one split; split by case."
            for case, split in sorted(shared.items())
        )
    return found


def _copies(
    record: Record, image: NDArray[np.uint8], masks: Sequence[NDArray[np.bool_]], path: Path, copies: int, seed: int
) -> list[Record]:
    made: list[Record] = []
    for copy in range(1, copies + 1):
        # Keyed by what it is, not by when it is drawn, so that other images change nothing.
        rng = np.random.default_rng([seed, zlib.crc32(record.id.encode()), copy])
        changed, warped = augment(*_small(image, masks), rng, mirror=False)
        left = {target: warped == number for number, target in enumerate(record.targets, start=1)}
        left = {target: mask for target, mask in left.items() if np.count_nonzero(mask) >= LEAST_AREA}
        if left:
            one = replace(record, id=f"{record.id}_a{copy}", targets=tuple(left))
            made.append(_saved(one, changed, list(left.values()), path.with_name(f"{path.name}_a{copy}")))
    return made


def _saved(record: Record, image: NDArray[np.uint8], masks: Sequence[NDArray[np.bool_]], path: Path) -> Record:
    Image.fromarray(_plain(image)).save(f"{path}.png")
    targets = tuple(
        replace(target, mask=encode_mask(mask), box=mask_box(mask))
        for target, mask in zip(record.targets, masks, strict=True)
    )
    return replace(record, image=f"images/{path.name}.png", targets=targets)


def _small(image: NDArray[np.uint8], masks: Sequence[NDArray[np.bool_]]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Scales an image and its masks down to COPY_SIDE; returns the picture, grey or RGB, and class numbers (h, w).

    A pixel belongs to the target that covers most of it; where targets overlap, to the smaller one.
    """
    height, width = image.shape[:2]
    rows, columns = bounded_size(height, width, COPY_SIDE)
    size = columns, rows
    small = np.asarray(Image.fromarray(_plain(image)).resize(size, Image.Resampling.BOX))
    background = np.full((rows, columns), 127.5)
    shares = [
        np.asarray(Image.fromarray(m.astype(np.uint8) * np.uint8(255)).resize(size, Image.Resampling.BOX))
        for m in masks
    ]
    # In order of size, since of equal shares argmax takes the first.
    order = sorted(range(len(shares)), key=lambda one: int(shares[one].sum(dtype=np.int64)))
    numbers = np.array([0, *(one + 1 for one in order)], dtype=np.uint8)
    best = np.stack([background, *(shares[one] for one in order)]).argmax(axis=0)
    return small, numbers[best]


def _plain(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a picture's grey levels (h, w), or the picture itself if it has colours."""
    is_grey = image.ndim == 3 and bool((image == image[..., :1]).all())
    return image[..., 0] if is_grey else image
