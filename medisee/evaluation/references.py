"""Two references that never see a question: the average shape of a category, and the most similar training slice.

Both are given the true category, which a system has to infer from the query. A system that does not score higher has
only learned where categories usually are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medisee.records.images import read_image
from medisee.records.manifest import Manifest
from medisee.records.records import Record

GRID = 128  # side of the common grid on which training masks are averaged
THUMBNAIL = 32  # side of the grey pictures by which slices are compared
CUTS = tuple(tenth / 10 for tenth in range(1, 10))  # candidate thresholds of the mean mask
MOST_IMAGES = 12_000  # training images that are read, spread evenly: what is kept of them stays in memory

Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class MeanMask:
    """Where a category usually is: cells (GRID, GRID) whose `share` of covering training masks is at least `cut`."""

    share: NDArray[np.float32]
    cut: float


@dataclass(frozen=True, slots=True)
class References:
    """Both references, learned from one training manifest."""

    train: Manifest
    slices: Sequence[Sequence[int]]  # for each distinct image, the indices of the records that show it
    thumbnails: NDArray[np.uint8]  # (slices, THUMBNAIL * THUMBNAIL), grey values
    means: Mapping[tuple[str, str | None], MeanMask]  # by (category, plane)
    showing: Mapping[tuple[str, str | None, str], Sequence[int]]  # indices of slices, by (category, plane, modality)

    def masks(self, image: NDArray[np.uint8], record: Record, category: str) -> dict[str, Mask | None]:
        """Returns both masks (H, W) of the true category for an image (H, W, 3), by the reference's name.

        A mask is None where no training image of the record's plane (and modality, for the slice) shows the category.
        """
        size = image.shape[1::-1]
        masks: dict[str, Mask | None] = {"mean_mask": None, "nearest_slice": None}
        if mean := self.means.get((category, record.plane)):
            share = Image.fromarray(mean.share).resize(size, Image.Resampling.BILINEAR)
            masks["mean_mask"] = np.asarray(share) >= mean.cut
        if candidates := self.showing.get((category, record.plane, record.modality)):
            differences = self.thumbnails[candidates].astype(np.float32) - _thumbnail(image)
            nearest = candidates[int(np.square(differences).mean(axis=1).argmin())]
            mask = _masks_by_category(self.train, self.slices[nearest])[category]
            masks["nearest_slice"] = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        return masks


def learn_references(train: Manifest) -> References:
    """Reads the training images and masks once, and chooses the threshold of each mean mask on them."""
    # Several records may show the same image, for example one per target.
    records_of_image: dict[Path, list[int]] = {}
    for index, record in enumerate(train):
        records_of_image.setdefault(train.image_path(record), []).append(index)
    paths = list(records_of_image)
    count = min(len(paths), MOST_IMAGES)
    paths = [paths[place * len(paths) // count] for place in range(count)]
    thumbnails: list[NDArray[np.uint8]] = []
    covered: defaultdict[tuple[str, str | None], list[NDArray[np.uint8]]] = defaultdict(list)
    showing: defaultdict[tuple[str, str | None, str], list[int]] = defaultdict(list)
    for index, path in enumerate(tqdm(paths, desc="references", unit="image")):
        thumbnails.append(_thumbnail(read_image(path)))
        first = train[records_of_image[path][0]]
        for category, mask in _masks_by_category(train, records_of_image[path]).items():
            # Averaging over areas keeps what is thinner than a cell.
            grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
            coverage = np.asarray(grey.resize((GRID, GRID), Image.Resampling.BOX))
            covered[category, first.plane].append(coverage)
            showing[category, first.plane, first.modality].append(index)
    means = {group: mean_mask(coverage) for group, coverage in covered.items()}
    return References(train, [records_of_image[path] for path in paths], np.stack(thumbnails), means, dict(showing))


def mean_mask(coverage: Sequence[NDArray[np.uint8]]) -> MeanMask:
    """Averages masks; the threshold is the one with the highest mean Dice on these same masks.

    Each `coverage` is (GRID, GRID), 255 where a mask covers a cell completely.
    """
    covered = np.stack(coverage)
    share = covered.mean(axis=0, dtype=np.float32) / 255
    areas = covered.sum(axis=(1, 2), dtype=np.float64) / 255
    dice: dict[float, float] = {}
    for cut in CUTS:
        inside = share >= cut
        overlaps = covered[:, inside].sum(axis=1, dtype=np.float64) / 255
        dice[cut] = float(np.mean(2 * overlaps / (areas + np.count_nonzero(inside))))
    # Of equal thresholds the one nearest to 0.5: in a larger image a low one widens the outline, a high one narrows it.
    return MeanMask(share, max(CUTS, key=lambda cut: (dice[cut], -abs(cut - 0.5))))


def _masks_by_category(train: Manifest, records: Iterable[int]) -> dict[str, Mask]:
    """Returns the union of each category's targets in the records of one image."""
    masks: dict[str, Mask] = {}
    for record in (train[index] for index in records):
        for target in record.targets:
            mask = train.mask(record, target)
            masks[target.category] = masks[target.category] | mask if target.category in masks else mask
    return masks


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).reshape(-1)
