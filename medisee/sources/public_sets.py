"""Public data sets of real patients, from their official archives: what they are, and how they become Records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medisee.foundation.errors import InputError, nearest
from medisee.sources.archives import fetch, unpack
from medisee.sources.image_folder import Layout, folder_records
from medisee.sources.nifti import Plane, Slicing, find_pairs, slice_records
from medisee.sources.splits import Found

_BTCV = (
    "spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, aorta, inferior vena cava, "
    "portal and splenic vein, pancreas, right adrenal gland, left adrenal gland"
)
LEAST_AREA = 16  # smallest target in a slice of a volume that is kept, pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSet:
    """A data set; `address` is None where its authors give it away only after a form, `form` says where."""

    about: str
    modality: str
    licence: str
    archive: str  # its file name
    address: str | None = None
    form: str = ""
    labels: dict[int, str] | None = None  # of volumes with label maps
    plane: Plane = "axial"
    pictures: str = ""  # folder of pictures in the archive, where these are no volumes
    masks: str = ""
    pattern: str = "{stem}.*"
    case: str = ""  # finds the patient in a picture's path
    category: str = ""
    fill: bool = False  # masks are outlines


PUBLIC_SETS = {
    "kvasir_seg": PublicSet(
        about="1,000 colonoscopy pictures with polyps",
        modality="endoscopy",
        licence="research and education (https://datasets.simula.no/kvasir-seg)",
        archive="kvasir-seg.zip",
        address="https://datasets.simula.no/downloads/kvasir-seg.zip",
        pictures="Kvasir-SEG/images",
        masks="Kvasir-SEG/masks",
        category="polyp",
    ),
    "hc18": PublicSet(
        about="999 ultrasound pictures of fetal heads, of 806 pregnancies",
        modality="ultrasound",
        licence="CC BY 4.0 (https://zenodo.org/record/1327317)",
        archive="training_set.zip",
        address="https://zenodo.org/record/1327317/files/training_set.zip",
        pictures="training_set",
        masks="training_set",
        pattern="{stem}_Annotation.png",
        case=r"(\d+)_\d?HC",
        category="fetal head",
        fill=True,
    ),
    "msd_hippocampus": PublicSet(
        about="263 MRI volumes of the hippocampus (Medical Segmentation Decathlon, task 4)",
        modality="mr",
        licence="CC BY-SA 4.0 (http://medicaldecathlon.com)",
        archive="Task04_Hippocampus.tar",
        address="https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar",
        labels={1: "anterior hippocampus", 2: "posterior hippocampus"},
        plane="sagittal",
    ),
    "acdc": PublicSet(
        about="cine MRI of 100 hearts",
        modality="mr",
        licence="CC BY-NC-SA 4.0 (https://www.creatis.insa-lyon.fr/Challenge/acdc)",
        archive="acdc.zip",
        form="https://humanheart-project.creatis.insa-lyon.fr/database",
        labels={1: "right ventricle", 2: "myocardium", 3: "left ventricle"},
    ),
    "btcv": PublicSet(
        about="abdominal CT of 30 people, 13 organs",
        modality="ct",
        licence="research, by registration (https://www.synapse.org/Synapse:syn3193805)",
        archive="RawData.zip",
        form="https://www.synapse.org/Synapse:syn3193805",
        labels=dict(enumerate(_BTCV.split(", "), start=1)),
    ),
}
"""What `medisee prepare public` knows; the addresses are untested."""


def chosen(names: list[str]) -> dict[str, PublicSet]:
    """Returns the sets of these names."""
    if unknown := [name for name in names if name not in PUBLIC_SETS]:
        raise InputError(
            f"--sets {name}: unknown; expected {', '.join(PUBLIC_SETS)}.{nearest(name, PUBLIC_SETS)}"
            for name in unknown
        )
    return {name: PUBLIC_SETS[name] for name in names}


def unpacked(name: str, archives: Path, folder: Path) -> str:
    """Unpacks a set into `folder`/`name` and returns its archive's SHA-256; a missing archive is downloaded to `archives`."""
    one, path = PUBLIC_SETS[name], archives / PUBLIC_SETS[name].archive
    if not path.is_file() and one.address is None:
        raise InputError(f"{path}: not there, and {name} is given away by a form only ({one.form}); save it as {path}.")
    digest = fetch(one.address or "", path)
    unpack(path, folder / name)
    return digest


def set_records(name: str, unpacked: Path, root: Path) -> Iterator[Found]:
    """Yields the Records of an unpacked set; `root` is the folder that their paths are relative to.

    Slices of volumes are written into `root`/images.
    """
    one = PUBLIC_SETS[name]
    if one.labels is not None:
        window = (40.0, 400.0) if one.modality == "ct" else None
        slicing = Slicing(plane=one.plane, window=window, min_area=LEAST_AREA)
        for pair in find_pairs(unpacked):
            yield from slice_records(pair, one.labels, slicing, modality=one.modality, source=name, folder=root)
        return
    layout = Layout(
        images=unpacked / one.pictures,
        masks=unpacked / one.masks,
        root=root,
        category=one.category,
        pattern=one.pattern,
        case=re.compile(one.case) if one.case else None,
        fill=one.fill,
    )
    if not layout.images.is_dir():
        raise InputError(f"{unpacked}: expected the folder {one.pictures}, found none; get {one.archive} again.")
    yield from folder_records(layout, modality=one.modality, source=name)
