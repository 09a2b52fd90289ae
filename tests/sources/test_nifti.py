"""Volumes become slices that a radiologist would recognise, whichever way the file stores them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medisee.foundation.errors import InputError
from medisee.records.masks import Rle, decode_mask
from medisee.sources.nifti import (
    PLANES,
    Pair,
    Plane,
    Slicing,
    find_pairs,
    read_labels,
    read_pair,
    slice_of,
    slice_records,
)
from medisee.sources.splits import Found

LABELS = {1: "liver", 2: "spleen"}
SHAPE = (5, 6, 7)
# Corners of the body that show where a slice's top left pixel is: right, front, head.
_ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def write(path: Path, voxels: Any, affine: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(voxels), np.eye(4) if affine is None else np.asarray(affine)), path)
    return path


def volume() -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def labels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    marked = np.zeros(SHAPE, np.uint8)
    marked[3:, 2, 4:] = 1
    marked[0, 0, 0] = 2
    return marked


def decathlon(root: Path, affine: Any = None) -> Pair:
    image = write(root / "imagesTr" / "a.nii.gz", volume(), affine)
    return Pair(image, write(root / "labelsTr" / "a.nii.gz", labels(), affine), "a")


def read(pair: Pair, folder: Path, slicing: Slicing | None = None) -> list[Found]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    return list(slice_records(pair, LABELS, slicing or Slicing(), modality="ct", source="set", folder=folder))


@pytest.mark.parametrize("order_signs", _ORIENTATIONS, ids=str)
def test_every_stored_orientation_gives_the_same_volume(
    tmp_path: Path, order_signs: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    order, signs = order_signs
    # The same body, stored with its axes in another order and direction.
    flips = tuple(slice(None, None, sign) for sign in signs)
    affine = np.zeros((4, 4))
    for stored, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        affine[axis, stored] = sign * (axis + 1)
        affine[axis, 3] += 0 if sign > 0 else (SHAPE[axis] - 1) * (axis + 1)
    affine[3, 3] = 1
    pair = Pair(
        write(tmp_path / "a.nii", volume().transpose(order)[flips], affine),
        write(tmp_path / "a_gt.nii", labels().transpose(order)[flips], affine),
        "a",
    )
    values, classes, spacing = read_pair(pair, LABELS)
    np.testing.assert_array_equal(values, volume())
    np.testing.assert_array_equal(classes, labels())
    assert spacing == (1, 2, 3)


@pytest.mark.parametrize(
    ("plane", "corner", "right", "down"),
    [
        # What the top left pixel is, and which way the voxels' coordinates go from it.
        ("axial", (4, 5, 3), (-1, 0, 0), (0, -1, 0)),
        ("coronal", (4, 3, 6), (-1, 0, 0), (0, 0, -1)),
        ("sagittal", (3, 5, 6), (0, -1, 0), (0, 0, -1)),
    ],
)
def test_a_slice_is_seen_as_radiologists_see_it(
    plane: Plane, corner: tuple[int, int, int], right: tuple[int, int, int], down: tuple[int, int, int]
) -> None:
    shown = slice_of(volume(), plane, 3)
    for row, column in np.ndindex(shown.shape):
        voxel = tuple(np.array(corner) + row * np.array(down) + column * np.array(right))
        assert shown[row, column] == volume()[voxel]


@pytest.mark.parametrize("plane", PLANES)
def test_masks_lie_on_the_pictures(tmp_path: Path, plane: Plane) -> None:
    pair = decathlon(tmp_path)
    records = [one.record for one in read(pair, tmp_path, Slicing(plane=plane)) if one.record]
    marked = 0
    for record in records:
        picture = np.asarray(Image.open(tmp_path / record.image))
        for target in record.targets:
            assert isinstance(target.mask, Rle)
            mask = decode_mask(target.mask)
            assert mask.shape == picture.shape
            marked += int(mask.sum())
    assert marked == int((labels() > 0).sum())
    assert {target.category for record in records for target in record.targets} == {"liver", "spleen"}
    assert {record.plane for record in records} == {plane}


def test_options_choose_slices_targets_and_grey_levels(tmp_path: Path) -> None:
    affine = np.diag([0.5, 0.75, 4, 1])
    pair = decathlon(tmp_path, affine)
    found = read(pair, tmp_path, Slicing(window=(100, 100), min_area=2, keep_empty=True))
    records = [one.record for one in found if one.record]
    assert len(records) == SHAPE[2]
    assert records[4].spacing == (0.75, 0.5)  # rows run along the front-to-back axis
    assert [reject.reason for one in found for reject in one.rejects] == ["small target"]
    picture = np.asarray(Image.open(tmp_path / records[4].image)).astype(int)
    expected = np.clip(slice_of(volume(), "axial", 4).astype(float), 50, 150)
    np.testing.assert_array_equal(picture, np.rint((expected - 50) * 2.55))


def test_layouts_are_found_and_missing_volumes_told_together(tmp_path: Path) -> None:
    one, two = volume(), labels()
    write(tmp_path / "imagesTr" / "case_0000.nii.gz", one)
    write(tmp_path / "labelsTr" / "case.nii.gz", two)
    write(tmp_path / "patient007" / "patient007_frame01.nii.gz", one)
    write(tmp_path / "patient007" / "patient007_frame01_gt.nii.gz", two)
    write(tmp_path / "img" / "img0003.nii.gz", one)
    write(tmp_path / "label" / "label0003.nii.gz", two)
    assert [pair.case for pair in find_pairs(tmp_path)] == ["0003", "case", "patient007"]
    write(tmp_path / "labelsTr" / "lost.nii.gz", two)
    write(tmp_path / "patient008_frame01_gt.nii.gz", two)
    with pytest.raises(InputError) as caught:
        find_pairs(tmp_path)
    assert [("lost" in problem, "patient008" in problem) for problem in caught.value.problems] == [
        (True, False),
        (False, True),
    ]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="imagesTr"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(
    "content", [{"0": "background", "1": "Liver", "2": "left_kidney"}, {"background": 0, "liver": 1, "left kidney": 2}]
)
def test_labels_of_both_forms(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": content}))
    assert read_labels(tmp_path) == {1: "liver", 2: "left kidney"}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "--labels"), ("{", "not JSON"), ('{"labels": [1]}', "labels"), ('{"labels": {"a": "b"}}', "number")],
)
def test_wrong_labels_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_labels(tmp_path)


SHEARED = np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("image", "marked", "affine", "words"),
    [
        (volume(), labels(), SHEARED, "sheared"),
        (np.stack([volume()] * 2, axis=3), labels(), None, "--channel"),
        (volume()[:3], labels(), None, "another grid"),
        (volume(), labels() * 3, None, r"labels \[3, 6\]"),
        (volume(), labels() * 0, None, "marks nothing"),
        (volume(), labels() * np.float32(0.5), None, "whole numbers"),
        (volume() * np.float32(np.nan), labels(), None, "no finite value"),
    ],
)
def test_a_volume_that_cannot_be_used_is_a_reject_with_its_reason(
    tmp_path: Path, image: Any, marked: Any, affine: Any, words: str
) -> None:
    pair = Pair(write(tmp_path / "a.nii", image, affine), write(tmp_path / "a_gt.nii", marked, affine), "a")
    with pytest.raises(InputError, match=words):
        read_pair(pair, LABELS)
    (found,) = read(pair, tmp_path)
    assert found.record is None
    assert [reject.reason for reject in found.rejects] == ["unusable volume"]
    assert list((tmp_path / "images").iterdir()) == []


def test_a_channel_of_a_4d_volume(tmp_path: Path) -> None:
    both = np.stack([volume(), volume() + 1], axis=3)
    pair = Pair(write(tmp_path / "a.nii", both), write(tmp_path / "a_gt.nii", labels()), "a")
    np.testing.assert_array_equal(read_pair(pair, LABELS, channel=1)[0], volume() + 1)
    with pytest.raises(InputError, match="2 channels"):
        read_pair(pair, LABELS, channel=2)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    pair = decathlon(tmp_path)
    whole = pair.image.read_bytes()
    pair.image.write_bytes(whole[:-30] if content is None else content)
    with pytest.raises(InputError, match=r"a\.nii\.gz.*cannot be read"):
        read_pair(pair, LABELS)


def test_two_volumes_of_one_name_are_refused(tmp_path: Path) -> None:
    decathlon(tmp_path / "Task1")
    decathlon(tmp_path / "Task2")
    with pytest.raises(InputError, match="two volumes called 'a'"):
        find_pairs(tmp_path)
