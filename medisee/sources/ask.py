"""Manifests of plain targets -> a data set of its own with questions out of a bank, laid out as the demo's is."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medisee.foundation.errors import InputError
from medisee.foundation.files import atomic_path, is_new_or_earlier, write_json
from medisee.records.images import read_image
from medisee.records.manifest import Manifest
from medisee.records.masks import bounded_size, encode_mask, mask_box
from medisee.records.records import SPLITS, Record, Split, Target, write_records
from medisee.sources.augment import augment
from medisee.sources.query_bank import ask_held_out, ask_seen, ask_training, load_bank, split_bank

SUMMARY = "asked.json"
COPY_SIDE = 256
"""Longest side of an augmented copy, pixels: the frame of small seg heads."""
LEAST_AREA = 16
"""Pixels of a target that is kept in an augmented copy."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What `prepare` wrote: images of each manifest, and targets left out by their category."""

    images: dict[str, int]
    unknown: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Source:
    """A manifest of the given folder, and the categories that the bank knows, by every name they have."""

    manifest: Manifest
    split: Split
    known: Mapping[str, str]


def prepare(
    records: Path, out: Path, *, bank: Path, root: Path | None = None, copies: int = 3, seed: int = 0, count: int = 8
) -> Asked:
    """Writes a data set with questions, whole or not at all; pictures are copied, masks become RLEs.

    The splits stay as they are, and each asks in wordings of its own: none of val or test is in training, but those of
    `test_seen.jsonl`, which repeats test's images with wordings of training. Categories take the bank's names.

    Args:
        records: folder of train.jsonl, val.jsonl (which may be missing or empty) and test.jsonl.
        out: the folder to write; if it exists it must be empty or an earlier result, which is replaced.
        bank: the query bank.
        root: folder that paths in the manifests are relative to; None: the manifests' own.
        copies: augmented copies of each training image, of COPY_SIDE pixels at most; they are never mirrored.
        seed: of the split of the wordings, the drawing and the augmentation.
        count: questions for each target of `train_reasoning.jsonl`; a held-out target has two.

    Raises:
        InputError: a bad bank, manifest, image or number; a case in two splits; no target that the bank knows; `out`
            holds something else.
    """
    _check(out, {"copies": (copies, 0), "seed": (seed, 0), "train_questions": (count, 1)})
    pools = load_bank(bank, None)
    known = {name.casefold(): key for key, pool in pools.items() for name in (key, *pool.names)}
    sources = [_Source(manifest, split, known) for split, manifest in _manifests(records, root).items()]
    wordings = split_bank(pools, seed)
    unknown: Counter[str] = Counter()
    with atomic_path(out) as folder:
        (folder / "images").mkdir(parents=True)
        plain: dict[Split, list[Record]] = {"train": [], "val": [], "test": []}
        for source in sources:
            made = tqdm(source.manifest, desc=source.split, unit="image", disable=None)
            for number, record in enumerate(made):
                name = f"{source.split}_{number:06d}"
                plain[source.split] += _copied(source, record, folder / f"images/{name}", copies, seed, unknown)
        if lacking := [split for split in ("train", "test") if not plain[split]]:
            raise InputError(
                f"{records}: no target in {' and '.join(lacking)} that {bank} asks about ({', '.join(pools)}); "
                f"found {', '.join(unknown) or 'none'}; give a bank that has these."
            )
        manifests = {
            "train_class": plain["train"],
            "train_reasoning": [ask_training(one, wordings["train"], seed, count) for one in plain["train"]],
            "val": ask_held_out(plain["val"], wordings["val"], seed),
            "test": ask_held_out(plain["test"], wordings["test"], seed),
            "test_seen": ask_seen(plain["test"], wordings["train"], seed),
        }
        for name, listed in manifests.items():
            write_records(folder / f"{name}.jsonl", listed)
        write_json(folder / "categories.json", {key: pool.names for key, pool in pools.items()})
        images = {name: len(listed) for name, listed in manifests.items()}
        write_json(folder / SUMMARY, {"bank": bank.name, "images": images, "unknown": dict(unknown)})
    return Asked(images, dict(unknown))


def _check(out: Path, numbers: Mapping[str, tuple[int, int]]) -> None:
    problems = [
        f"{name} is {value}; expected {least} or more; raise it."
        for name, (value, least) in numbers.items()
        if value < least
    ]
    if not is_new_or_earlier(out, SUMMARY, "bank"):
        problems.append(
            f"{out}: exists and is no data set of this command; expected a new or empty folder; name another."
        )
    if problems:
        raise InputError(problems)


def _manifests(records: Path, root: Path | None) -> dict[Split, Manifest]:
    """Opens the manifests of all splits and checks that none shares a case with another."""
    paths: dict[Split, Path] = {split: records / f"{split}.jsonl" for split in SPLITS}
    if lacking := [path for path in (paths["train"], paths["test"]) if not path.is_file()]:
        raise InputError(
            f"{path}: expected a manifest, found no such file; name a folder that prepare_data.py sa-med2d wrote."
            for path in lacking
        )
    found: dict[Split, Manifest] = {
        split: Manifest(path, root) for split, path in paths.items() if split != "val" or _has_lines(path)
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


def _has_lines(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _copied(source: _Source, record: Record, path: Path, copies: int, seed: int, unknown: Counter[str]) -> list[Record]:
    """Writes a record's image and, for training, its augmented copies; returns records without questions."""
    unknown.update(target.category for target in record.targets if target.category.casefold() not in source.known)
    kept = [target for target in record.targets if target.category.casefold() in source.known]
    if not kept:
        return []
    image = read_image(source.manifest.image_path(record))
    masks = {target.id: source.manifest.mask(record, target) for target in kept}
    categories = {target.id: source.known[target.category.casefold()] for target in kept}
    made = [_saved(record, image, masks, categories, path)]
    for copy in range(1, copies + 1 if source.split == "train" else 1):
        # Keyed by what it is, not by when it is drawn, so that other images change nothing.
        rng = np.random.default_rng([seed, zlib.crc32(record.id.encode()), copy])
        grey, warped = augment(*_small(record, image, list(masks.values())), rng, mirror=False)
        left = {name: warped == number for number, name in enumerate(masks, start=1)}
        left = {name: mask for name, mask in left.items() if np.count_nonzero(mask) >= LEAST_AREA}
        if left:
            name = f"{path.name}_a{copy}"
            own = replace(record, id=f"{record.id}_a{copy}")
            made.append(_saved(own, grey, left, categories, path.with_name(name)))
    return made


def _saved(
    record: Record,
    image: NDArray[np.uint8],
    masks: Mapping[str, NDArray[np.bool_]],
    categories: Mapping[str, str],
    path: Path,
) -> Record:
    grey = image if image.ndim == 2 or not _is_grey(image) else image[..., 0]
    Image.fromarray(grey).save(f"{path}.png")
    targets = tuple(
        Target(id=name, category=categories[name], mask=encode_mask(mask), box=mask_box(mask))
        for name, mask in masks.items()
    )
    return replace(record, image=f"images/{path.name}.png", targets=targets)


def _small(
    record: Record, image: NDArray[np.uint8], masks: Collection[NDArray[np.bool_]]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Scales an image and its masks down to COPY_SIDE; returns grey levels and class numbers (h, w).

    A pixel belongs to the target that covers most of it; where targets overlap, to the smaller one.
    """
    if not _is_grey(image):
        raise InputError(f"record {record.id!r}: a picture in colour cannot be augmented; set --copies 0.")
    height, width = image.shape[:2]
    rows, columns = bounded_size(height, width, COPY_SIDE)
    size = columns, rows
    grey = np.asarray(Image.fromarray(image[..., 0]).resize(size, Image.Resampling.BOX))
    background = np.full(grey.shape, 127.5)
    shares = [
        np.asarray(Image.fromarray(m.astype(np.uint8) * np.uint8(255)).resize(size, Image.Resampling.BOX))
        for m in masks
    ]
    # In order of size, since of equal shares argmax takes the first.
    order = sorted(range(len(shares)), key=lambda one: int(shares[one].sum(dtype=np.int64)))
    numbers = np.array([0, *(one + 1 for one in order)], dtype=np.uint8)
    best = np.stack([background, *(shares[one] for one in order)]).argmax(axis=0)
    return grey, numbers[best]


def _is_grey(image: NDArray[np.uint8]) -> bool:
    return bool((image == image[..., :1]).all())
