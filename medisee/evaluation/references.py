"""Two references that never see a question: what the average shape and the most similar training slice score.

Both are told the true category, which a system has to work out from the query. A system that does not pass them has
learned where things usually lie, and no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medisee.records.images import read_image
from medisee.records.manifest import Manifest
from medisee.records.masks import encode_mask
from medisee.records.records import QA, Prediction, Record, Target

GRID = 128
"""Side of the common grid on which training masks are averaged."""
THUMBNAIL = 32
"""Side of the grey pictures by which slices are compared."""
CUTS = tuple(tenth / 10 for tenth in range(1, 10))
"""Shares of the training masks among which the outline of the mean mask is chosen."""
MOST_IMAGES = 12_000
"""Training images that are read at most, evenly over the manifest: they are all kept in memory."""

Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class MeanMask:
    """Where a category lies: `share` (GRID, GRID) of the training masks that cover a cell, counted from `cut` on."""

    share: NDArray[np.float32]
    cut: float

    def resized(self, height: int, width: int) -> Mask:
        """Returns the mask for an image of another size; it may be empty."""
        share = Image.fromarray(self.share).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(share) >= self.cut


@dataclass(frozen=True, slots=True)
class TrainingSlice:
    """One training image and the places in the manifest of the records that show it."""

    path: Path
    records: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class References:
    """Both references, learned from one training manifest.

    Attributes:
        train: the manifest.
        slices: its distinct images.
        thumbnails: (slices, THUMBNAIL * THUMBNAIL), grey values of 0 to 255.
        means: by (category, plane).
        showing: the slices, as indices, by (category, plane, modality).
    """

    train: Manifest
    slices: tuple[TrainingSlice, ...]
    thumbnails: NDArray[np.uint8]
    means: dict[tuple[str, str | None], MeanMask]
    showing: dict[tuple[str, str | None, str], list[int]]

    def predict(
        self, manifest: Manifest, record: Record, questions: Sequence[tuple[Target, QA]]
    ) -> dict[str, list[Prediction]]:
        """Answers a record's questions as "mean_mask" and as "nearest_slice", in order; their words are not read.

        A prediction is empty where no training image of the record's plane (and modality, for the slice) shows the
        target's category. Boxes are left out: the smallest ones around the masks count.
        """
        image = read_image(manifest.image_path(record))
        categories = {target.category for target, _ in questions}
        masks = {category: self.masks(image, record, category) for category in categories}
        predictions: dict[str, list[Prediction]] = {"mean_mask": [], "nearest_slice": []}
        for mode, answers in predictions.items():
            for target, qa in questions:
                mask = masks[target.category][mode]
                answers.append(
                    Prediction(
                        record=record.id,
                        target=target.id,
                        question=qa.question,
                        mode=mode,
                        text="",
                        emitted=mask is not None,
                        mask=encode_mask(mask) if mask is not None else None,
                    )
                )
        return predictions

    def masks(self, image: NDArray[np.uint8], record: Record, category: str) -> dict[str, Mask | None]:
        """Returns both masks of a category for an image (height, width, 3); the record brings plane and modality."""
        height, width = image.shape[:2]
        mean = self.means.get((category, record.plane))
        return {
            "mean_mask": mean.resized(height, width) if mean else None,
            "nearest_slice": self._nearest(record, image, category),
        }

    def _nearest(self, record: Record, image: NDArray[np.uint8], category: str) -> Mask | None:
        candidates = self.showing.get((category, record.plane, record.modality))
        if not candidates:
            return None
        differences = self.thumbnails[candidates].astype(np.float32) - _thumbnail(image)
        nearest = self.slices[candidates[int(np.square(differences).mean(axis=1).argmin())]]
        mask = _masks(self.train, nearest)[category]
        resized = Image.fromarray(mask).resize((image.shape[1], image.shape[0]), Image.Resampling.NEAREST)
        return np.asarray(resized)


def learn_references(train: Manifest) -> References:
    """Reads the training images and masks once, and chooses the outline of each mean mask on them.

    Raises:
        InputError: an image or a mask cannot be read.
    """
    slices = tuple(_distinct(train))
    thumbnails: list[NDArray[np.uint8]] = []
    covered: defaultdict[tuple[str, str | None], list[NDArray[np.uint8]]] = defaultdict(list)
    showing: defaultdict[tuple[str, str | None, str], list[int]] = defaultdict(list)
    for index, one in enumerate(tqdm(slices, desc="references", unit="image")):
        first = train[one.records[0]]
        thumbnails.append(_thumbnail(read_image(one.path)))
        for category, mask in _masks(train, one).items():
            covered[category, first.plane].append(_coverage(mask))
            showing[category, first.plane, first.modality].append(index)
    means = {group: mean_mask(coverage) for group, coverage in covered.items()}
    return References(train, slices, np.stack(thumbnails), means, dict(showing))


def mean_mask(coverage: Iterable[NDArray[np.uint8]]) -> MeanMask:
    """Averages masks on the common grid; the outline is the cut with the highest mean Dice on these same masks.

    Args:
        coverage: (GRID, GRID) each, 255 where a mask covers a cell wholly.
    """
    covered = np.stack(list(coverage))
    share = covered.mean(axis=0, dtype=np.float32) / 255
    areas = covered.sum(axis=(1, 2), dtype=np.float64) / 255
    dice: dict[float, float] = {}
    for cut in CUTS:
        inside = share >= cut
        overlaps = covered[:, inside].sum(axis=1, dtype=np.float64) / 255
        dice[cut] = float(np.mean(2 * overlaps / (areas + np.count_nonzero(inside))))
    # Among equals the middle one: in a larger image a low cut widens the outline and a high one narrows it.
    return MeanMask(share, max(CUTS, key=lambda cut: (dice[cut], -abs(cut - 0.5))))


def _distinct(train: Manifest) -> Iterator[TrainingSlice]:
    """A manifest may show an image in several records, one a target: they are taken together."""
    records: dict[Path, list[int]] = {}
    for index, record in enumerate(train):
        records.setdefault(train.image_path(record), []).append(index)
    paths = list(records)
    count = min(len(paths), MOST_IMAGES)
    for path in (paths[place * len(paths) // count] for place in range(count)):
        yield TrainingSlice(path, tuple(records[path]))


def _masks(train: Manifest, one: TrainingSlice) -> dict[str, Mask]:
    """Returns a slice's mask of each category, with all its instances."""
    masks: dict[str, Mask] = {}
    for index in one.records:
        record = train[index]
        for target in record.targets:
            mask = train.mask(record, target)
            masks[target.category] = masks[target.category] | mask if target.category in masks else mask
    return masks


def _coverage(mask: Mask) -> NDArray[np.uint8]:
    # Averaging over areas keeps what is thinner than a cell.
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(grey.resize((GRID, GRID), Image.Resampling.BOX))


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).reshape(-1)
