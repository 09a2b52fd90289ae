"""The references: they know image, plane and category, and never a question."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from medisee.evaluation import references
from medisee.evaluation.prediction import RecordQuestions
from medisee.evaluation.references import GRID, learn_references, mean_mask
from medisee.evaluation.scoring import Split, answers_from_references
from medisee.records.manifest import Manifest
from medisee.records.masks import encode_mask
from medisee.records.records import QA, Record, Target, write_records

SIZE = (40, 60)
Mask = NDArray[np.bool_]


def block(top: int, left: int, height: int = 10, width: int = 12, size: tuple[int, int] = SIZE) -> Mask:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


class Training:
    """Collects records in a folder and opens them as a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[Record] = []

    def add(
        self, grey: int, masks: dict[str, Mask], *, plane: str | None = "axial", modality: str = "ct", image: str = ""
    ) -> Record:
        number = len(self.records)
        name = image or f"{number}.png"
        if not image:
            size = next(iter(masks.values())).shape
            Image.fromarray(np.full(size, grey, dtype=np.uint8)).save(self.folder / name)
        targets = tuple(Target(id=f"t{c}", category=c, mask=encode_mask(mask)) for c, mask in masks.items())
        record = Record(
            id=f"r{number}", image=name, modality=modality, source="s", case="c", targets=targets, plane=plane
        )
        self.records.append(record)
        return record

    def open(self) -> Manifest:
        write_records(self.folder / "train.jsonl", self.records)
        return Manifest(self.folder / "train.jsonl")


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def image(grey: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    return np.full((*size, 3), grey, dtype=np.uint8)


def other_record(plane: str | None = "axial", modality: str = "ct") -> Record:
    return Record(id="new", image="x.png", modality=modality, source="s", case="c", targets=(), plane=plane)


def dice(a: Mask | None, b: Mask) -> float:
    return 0.0 if a is None else float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_the_mean_of_equal_masks_is_the_mask(training: Training) -> None:
    mask = block(8, 20)
    training.add(10, {"liver": mask})
    training.add(20, {"liver": mask})
    found = learn_references(training.open()).masks(image(0), other_record(), "liver")["mean_mask"]
    assert dice(found, mask) > 0.95
    other = learn_references(training.open()).masks(image(0, (80, 30)), other_record(), "liver")["mean_mask"]
    assert dice(other, block(16, 10, 20, 6, (80, 30))) > 0.95


def test_the_cut_is_the_best_on_the_training_masks() -> None:
    one, wide = np.zeros((GRID, GRID), np.uint8), np.zeros((GRID, GRID), np.uint8)
    one[:10, :10], wide[:10, :100] = 255, 255
    # Two in three masks are wide: at a share of 2/3 everything is inside, above it only what all cover.
    mostly_wide = mean_mask([one, wide, wide])
    assert mostly_wide.cut == 0.5 and (mostly_wide.share >= mostly_wide.cut).sum() == 1000
    mostly_small = mean_mask([one, one, one, wide])
    assert mostly_small.cut == 0.5 and (mostly_small.share >= mostly_small.cut).sum() == 100
    # Masks that lie apart: all three places together are half right for each, one place is wrong for two of them.
    middle = np.zeros_like(one)
    middle[50:60, :10] = 255
    assert mean_mask([one, middle, one[::-1]]).cut == 0.3


def test_the_cut_never_sees_the_test_image(training: Training) -> None:
    training.add(10, {"liver": block(8, 20)})
    found = learn_references(training.open())
    before = found.means["liver", "axial"].cut
    found.masks(image(200), other_record(), "liver")
    assert found.means["liver", "axial"].cut == before


def test_each_plane_is_its_own_group_and_no_plane_is_one_too(training: Training) -> None:
    places = {"axial": block(2, 2), "coronal": block(25, 40), None: block(25, 2)}
    for grey, (plane, mask) in enumerate(places.items()):
        training.add(10 * grey, {"liver": mask}, plane=plane)
    found = learn_references(training.open())
    for plane, mask in places.items():
        for answer in found.masks(image(0), other_record(plane), "liver").values():
            assert dice(answer, mask) > 0.9


def test_nearest_slice_is_the_most_similar_one_that_shows_the_category(training: Training) -> None:
    training.add(100, {"spleen": block(2, 2)})
    training.add(140, {"liver": block(5, 30)})
    training.add(200, {"liver": block(20, 10)})
    found = learn_references(training.open())
    assert dice(found.masks(image(100), other_record(), "liver")["nearest_slice"], block(5, 30)) == 1
    assert dice(found.masks(image(190), other_record(), "liver")["nearest_slice"], block(20, 10)) == 1
    small = found.masks(image(190, (20, 30)), other_record(), "liver")["nearest_slice"]
    assert dice(small, block(10, 5, 5, 6, (20, 30))) == 1


def test_nearest_slice_is_of_the_same_modality(training: Training) -> None:
    training.add(100, {"liver": block(2, 2)}, modality="mr")
    training.add(200, {"liver": block(20, 10)}, modality="ct")
    found = learn_references(training.open())
    assert dice(found.masks(image(100), other_record(), "liver")["nearest_slice"], block(20, 10)) == 1
    assert found.masks(image(100), other_record(modality="us"), "liver")["nearest_slice"] is None


def test_what_training_never_showed_is_empty(training: Training) -> None:
    training.add(100, {"liver": block(2, 2)})
    found = learn_references(training.open())
    nothing = {"mean_mask": None, "nearest_slice": None}
    assert found.masks(image(100), other_record(), "spleen") == nothing
    assert found.masks(image(100), other_record("sagittal"), "liver") == nothing


def test_an_image_in_several_records_counts_once(training: Training) -> None:
    first = training.add(100, {"liver": block(2, 2)})
    training.add(100, {"spleen": block(20, 10)}, image=first.image)
    training.add(100, {"liver": block(2, 30)}, image=first.image)
    found = learn_references(training.open())
    assert len(found.slices) == len(found.thumbnails) == 1
    assert found.showing == {("liver", "axial", "ct"): [0], ("spleen", "axial", "ct"): [0]}
    both = found.masks(image(100), other_record(), "liver")["nearest_slice"]
    assert dice(both, block(2, 2) | block(2, 30)) == 1


def test_large_training_sets_are_read_evenly(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MOST_IMAGES", 2)
    for grey in range(4):
        training.add(grey, {"liver": block(2, 2)})
    assert learn_references(training.open()).slices == [[0], [2]]


def test_answers_do_not_depend_on_the_words_of_a_question(training: Training) -> None:
    record = training.add(100, {"liver": block(2, 2)})
    manifest = training.open()
    (target,) = record.targets
    named = QA("Show the liver.", "It is the liver.", "class", "short")
    otherwise = QA("Show the spleen.", "", "location", "long")
    asked = RecordQuestions(record, ((target, named), (target, otherwise)))
    split = Split(manifest, {record.id: asked}, (asked,))
    first, second = answers_from_references(learn_references(manifest), split)
    assert set(first) == set(second) == {"mean_mask", "nearest_slice"}
    for mode, (one, prediction) in first.items():
        other = second[mode][0]
        assert prediction is None and one.mask is not None and other.mask is not None
        assert np.array_equal(one.mask, other.mask)
        assert one.text == "" and one.emitted and one.box is None and dice(one.mask, block(2, 2)) > 0.9
