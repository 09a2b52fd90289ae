"""NIfTI volumes with label maps as Records of slices, seen as radiologists see them (the patient's right at the left).

Known layouts: Medical Segmentation Decathlon and nnU-Net (`imagesTr`, `labelsTr`, dataset.json), ACDC
(`patientNNN_frameNN.nii.gz` and `_gt`) and BTCV (`img/imgNNNN.nii.gz`, `label/labelNNNN.nii.gz`).

Axes: X, Y, Z are the patient's right-to-left, posterior-to-anterior and inferior-to-superior axes (RAS+).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medisee.foundation.errors import InputError, first_line
from medisee.foundation.json_files import read_json
from medisee.records.images import PERCENTILES
from medisee.records.masks import encode_mask, mask_box
from medisee.records.records import Record, Target
from medisee.sources.splits import Found, Reject

Plane: TypeAlias = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = get_args(Plane)
# For each plane: the axis across it, then those of its columns and rows.
_AXES: dict[Plane, tuple[int, int, int]] = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
_SHEAR = 1e-3  # largest cosine between two axes of a volume that counts as not sheared
_SUFFIX = re.compile(r"\.nii(\.gz)?$")


@dataclass(frozen=True, slots=True)
class Pair:
    """A volume and its label map; `case` is the patient."""

    image: Path
    labels: Path
    case: str

    @property
    def name(self) -> str:
        """The image's file name without its suffix."""
        return _SUFFIX.sub("", self.image.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slicing:
    """How volumes become pictures."""

    plane: Plane = "axial"
    window: tuple[float, float] | None = None  # center and width in the volume's units; None: PERCENTILES of the volume
    channel: int | None = None  # of a 4-D volume, from 0
    keep_empty: bool = False  # also slices without a target
    min_area: int = 0  # smallest target, pixels


def find_pairs(root: Path) -> list[Pair]:
    """Lists the volumes of a data set in one of the known layouts; InputError names labels without a volume."""
    problems: list[str] = []
    pairs: list[Pair] = []
    for labels in sorted(path for path in root.rglob("*") if _SUFFIX.search(path.name) and path.name[0] != "."):
        stem, suffix = _SUFFIX.sub("", labels.name), labels.name[len(_SUFFIX.sub("", labels.name)) :]
        if labels.parent.name == "labelsTr":
            folder = labels.parent.parent / "imagesTr"
            images, case = [folder / labels.name, folder / f"{stem}_0000{suffix}"], stem
        elif stem.endswith("_gt"):
            images, case = [labels.with_name(f"{stem[:-3]}{suffix}")], stem.partition("_")[0]
        elif labels.parent.name == "label" and stem.startswith("label"):
            images, case = [labels.parent.parent / "img" / f"img{stem[5:]}{suffix}"], stem[5:]
        else:
            continue
        image = next((path for path in images if path.is_file()), None)
        if image is None:
            problems.append(
                f"{labels}: expected its volume {images[0]}, found none; put it there or remove the labels."
            )
        else:
            pairs.append(Pair(image, labels, case))
    problems += [
        f"{root}: has two volumes called {name!r}; name the folder of one data set."
        for name, count in Counter(pair.name for pair in pairs).items()
        if count > 1
    ]
    if not pairs and not problems:
        problems = [
            f"{root}: expected imagesTr/ and labelsTr/, patientNNN_frameNN.nii.gz with _gt, or img/ and label/ with NIfTI "
            "volumes; found none; name the data set's folder."
        ]
    if problems:
        raise InputError(problems)
    return pairs


def parse_window(text: str) -> tuple[float, float]:
    """Reads a window as it is written in a command: center and width, `40,400`."""
    try:
        center, width = (float(word) for word in text.split(","))
    except ValueError:
        center = width = float("nan")
    if not (np.isfinite(center) and np.isfinite(width) and width > 0):
        raise InputError(
            f"--window {text!r}: expected center and width such as 40,400, with a width above 0; correct it."
        )
    return center, width


def read_labels(root: Path) -> dict[int, str]:
    """Returns the category of each label by dataset.json, in the Decathlon's form or nnU-Net's; the background is left out."""
    path = root / "dataset.json"
    if not path.is_file():
        raise InputError(
            f"{root}: has no dataset.json that names the labels; name them with --labels 1=liver,2=spleen."
        )
    named = read_json(path, "a data set with 'labels'").get("labels")
    labels: dict[int, str] = {}
    for key, value in named.items() if isinstance(named, dict) else ():
        number, name = (key, value) if str(key).isdecimal() else (value, key)
        if not (str(number).isdecimal() and isinstance(name, str) and name.strip()):
            raise InputError(
                f"{path}: labels has {key!r}: {value!r}; expected a number and a name; use --labels instead."
            )
        if int(number):
            labels[int(number)] = name.strip().lower().replace("_", " ")
    if not labels:
        raise InputError(
            f"{path}: expected 'labels' with a name for each number; use --labels 1=liver,2=spleen instead."
        )
    return labels


def slice_records(
    pair: Pair, labels: Mapping[int, str], slicing: Slicing, *, modality: str, source: str, folder: Path
) -> Iterator[Found]:
    """Yields a Record for each slice, whose picture it writes into `folder`/images; a volume that is refused is a Reject."""
    try:
        image, classes, spacing = read_pair(pair, labels, slicing.channel)
    except InputError as error:
        yield Found(None, (Reject(str(pair.image), "unusable volume", str(error)),))
        return
    low, high = value_range(image, slicing.window)
    across = _AXES[slicing.plane][0]
    rows, columns = (spacing[axis] for axis in _AXES[slicing.plane][:0:-1])
    for place in range(image.shape[across]):
        shown = slice_of(classes, slicing.plane, place)
        masks = {category: shown == number for number, category in labels.items() if (shown == number).any()}
        small = [category for category, mask in masks.items() if mask.sum() < slicing.min_area]
        name = f"{pair.name}_{slicing.plane}_{place:04d}"
        rejects = tuple(Reject(name, "small target", category) for category in small)
        targets = tuple(
            Target(id=category, category=category, mask=encode_mask(mask), box=mask_box(mask))
            for category, mask in masks.items()
            if category not in small
        )
        if not targets and not slicing.keep_empty:
            yield Found(None, rejects)
            continue
        values = np.nan_to_num(slice_of(image, slicing.plane, place), nan=low)
        grey = (np.clip(values, low, high) - low) * (255 / (high - low))
        Image.fromarray(np.rint(grey).astype(np.uint8)).save(folder / "images" / f"{name}.png")
        record = Record(
            id=name,
            image=f"images/{name}.png",
            modality=modality,
            source=source,
            case=f"{source}/{pair.case}",
            targets=targets,
            plane=slicing.plane,
            spacing=(rows, columns),
        )
        yield Found(record, rejects)


def read_pair(
    pair: Pair, labels: Mapping[int, str], channel: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64], tuple[float, float, float]]:
    """Reads a volume and its label map as (X, Y, Z) arrays in RAS+ order, with the size of a voxel in mm.

    Raises:
        InputError: a file cannot be read, the two do not lie on one grid, the grid is sheared, a value of the label map
            is not a whole number or not in `labels`, or nothing is marked.
    """
    image, marked = _read(pair.image, channel), _read(pair.labels, None)
    values, classes = np.asarray(image.dataobj, np.float32), np.asarray(marked.dataobj)
    where = str(pair.labels)
    if values.shape != classes.shape or not np.allclose(image.affine, marked.affine, atol=1e-2):
        raise InputError(
            f"{where}: has another grid ({classes.shape}) than {pair.image.name} ({values.shape}); expected the same shape "
            "and affine; resample the labels."
        )
    whole = np.rint(classes).astype(np.int64)
    if not np.array_equal(whole, classes):
        raise InputError(f"{where}: has values that are not whole numbers; expected labels; export them again.")
    found = set(np.unique(whole).tolist()) - {0}
    if unknown := sorted(found - set(labels)):
        raise InputError(
            f"{where}: has the labels {unknown[:5]}, which have no name; expected {sorted(labels)}; add --labels."
        )
    if not found:
        raise InputError(f"{where}: marks nothing; expected a label; leave the volume out.")
    if not np.isfinite(values).any():
        raise InputError(f"{pair.image}: has no finite value; export it again.")
    x, y, z = (float(size) for size in image.header.get_zooms()[:3])
    return values, whole, (x, y, z)


def slice_of(volume_XYZ: NDArray[Any], plane: Plane, place: int) -> NDArray[Any]:
    """Returns a slice (height, width) of a RAS+ volume as it is shown.

    Axial: the front is at the top. Coronal: the head. Both have the patient's right at the left. Sagittal: the head is at
    the top, the front at the left.
    """
    # Right, front and head have the highest numbers, and come first on a picture.
    return np.take(volume_XYZ, place, axis=_AXES[plane][0])[::-1, ::-1].T


def value_range(values: NDArray[np.float32], window: tuple[float, float] | None) -> tuple[float, float]:
    """Returns the values that become 0 and 255."""
    if window is not None:
        center, width = window
        return center - width / 2, center + width / 2
    finite = values[np.isfinite(values)]
    low, high = (float(value) for value in np.percentile(finite, PERCENTILES))
    return (low, high) if high > low else (float(finite.min()), max(float(finite.max()), float(finite.min()) + 1))


def _read(path: Path, channel: int | None) -> Any:
    """Reads a volume in RAS+ order."""
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
    except ImportError as error:
        raise InputError(f"{path}: needs nibabel; install it with `pip install -e '.[medical]'`.") from error
    try:
        image: Any = nibabel.load(path)
        shape = image.shape
        if len(shape) == 4 and shape[3] == 1:
            channel = 0
        if len(shape) not in (3, 4) or (len(shape) == 4 and channel is None):
            raise InputError(f"{path}: is {len(shape)}-D {shape}; expected a 3-D volume; choose one with --channel 0.")
        if len(shape) == 4:
            if not 0 <= (channel or 0) < shape[3]:
                raise InputError(f"{path}: has {shape[3]} channels; expected --channel 0 to {shape[3] - 1}.")
            image = image.slicer[..., channel]
        axes = image.affine[:3, :3]
        lengths = np.linalg.norm(axes, axis=0)
        if not np.isfinite(image.affine).all() or not lengths.all():
            raise InputError(
                f"{path}: has no valid affine; expected one that says where its voxels lie; export it again."
            )
        cosines = (axes / lengths).T @ (axes / lengths) - np.eye(3)
        if np.abs(cosines).max() > _SHEAR:
            raise InputError(
                f"{path}: is sheared (its axes are not at right angles); resample it onto a straight grid."
            )
        image = nibabel.as_closest_canonical(image)
        np.asarray(image.dataobj)  # here, so that damaged data has this file's sentence
        return image
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        zlib.error,
        ImageFileError,
    ) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); expected a NIfTI volume; copy it again."
        ) from error
