"""What the name of an SA-Med2D-20M image says about it: modality, data set, case and plane."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PLANES = {"x": "sagittal", "y": "coronal", "z": "axial", "2d": None}
_WITHOUT_SUBMODALITY = {"x_ray": "x-ray", "fundus_photography": "fundus photography"}
_VIEW = re.compile(r"([xyz])_\d+|(2d)_none")


@dataclass(frozen=True, slots=True)
class ImageName:
    """What the name of an image says; `case` is "<dataset>/<case>", `plane` is None for native 2-D images."""

    modality: str
    dataset: str
    case: str
    plane: str | None


def parse_name(image: str) -> ImageName | None:
    """Reads `images/<modality>_<submodality>--<dataset>--<case>--<axis>_<slice>.png`; None for another name."""
    # From the right first: a case may end in "-", and its name may hold anything but "--".
    file = image.rpartition("/")[2]
    head, _, view = (file.rpartition(".")[0] or file).rpartition("--")
    parts = head.split("--", 2)
    match = _VIEW.fullmatch(view)
    if len(parts) != 3 or not all(parts) or match is None:
        return None
    name, dataset, case = parts
    modality = _WITHOUT_SUBMODALITY.get(name) or name.partition("_")[0]
    return ImageName(modality, dataset, f"{dataset}/{case}", _PLANES[match[1] or match[2]])
