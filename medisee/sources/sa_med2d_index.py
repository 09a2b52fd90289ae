"""The index of SA-Med2D-20M, read as a stream: modality, data set, case, plane and classes of each image by file names.

`SAMed2D_v1.json` is one JSON object, {image: [masks]}, with millions of entries; no folder is ever listed. An image is
named `<modality>_<submodality>--<dataset>--<case>--<axis>_<slice>`, and a mask adds `--<class>_<instance>`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ijson
from pydantic import StrictInt, TypeAdapter, ValidationError

from medisee.foundation.errors import InputError, nearest
from medisee.foundation.files import Fingerprints, fingerprint
from medisee.foundation.json_files import parse_json
from medisee.sources.splits import Reject

INDEX_FILE = "SAMed2D_v1.json"
CLASSES_FILE = "SAMed2D_v1_class_mapping_id.json"

_INDEX_FORM = '{"images/<stem>.png": ["masks/<stem>--<class>_<instance>.png", ...]}'
_CLASSES_FORM = '{"<dataset>": {"<class name>": <class id>}}'
# Names with no folder in them cannot lead out of the root; lone surrogates cannot be written.
_IMAGE = re.compile(r"images/[^/\\\0\ud800-\udfff]+\.png")
_MASK = re.compile(r"masks/[^/\\\0\ud800-\udfff]+\.png")
_CODE = re.compile(r"([0-9]{1,9})_[0-9]+\.png")
_UNION = -1  # the class id of all merged regions
_PIECE = 1 << 16  # bytes that are parsed at a time
_SHOWN = 5  # of millions of equal problems
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
    """Reads `images/<modality>_<submodality>--<dataset>--<case>--<axis>_<slice>.png`; None for any other name."""
    # From the right first: a case may end in "-" and contain anything but "--".
    file = image.rpartition("/")[2]
    head, _, view = (file.rpartition(".")[0] or file).rpartition("--")
    parts = head.split("--", 2)
    match = _VIEW.fullmatch(view)
    if len(parts) != 3 or not all(parts) or match is None:
        return None
    name, dataset, case = parts
    modality = _WITHOUT_SUBMODALITY.get(name) or name.partition("_")[0]
    return ImageName(modality, dataset, f"{dataset}/{case}", _PLANES[match[1] or match[2]])


@dataclass(frozen=True, slots=True)
class ClassMasks:
    """A class in an image: the id of the target that it becomes, its name, and the files of its instances."""

    target: str
    category: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of the index."""

    image: str  # its path relative to the root
    name: ImageName
    classes: tuple[ClassMasks, ...]  # by id, without `union_*`: merged regions, which repeat what the others hold
    rejects: tuple[Reject, ...]  # masks that are left out because of their names
    masks: int  # how many masks the index gives it

    @property
    def stem(self) -> str:
        """The image's name without folder and ending."""
        return self.image.removeprefix("images/").removesuffix(".png")


class Index:
    """The two JSON files of an SA-Med2D-20M folder; each method that returns images reads all of the index."""

    def __init__(self, root: Path, datasets: Collection[str] | None = None) -> None:
        """Reads the names of the classes and checks that the index exists; takes only `datasets`, None takes all."""
        self._path = root / INDEX_FILE
        _opened(self._path).close()
        self._classes = _read_classes(root / CLASSES_FILE)
        # Millions of masks share a few codes: {dataset: {"0003_000.png": class id}}.
        self._codes: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._datasets = None if datasets is None else set(datasets)
        if unknown := (self._datasets or set()) - self._classes.keys():
            raise InputError(
                f"{root / CLASSES_FILE}: expected the data set {name!r}, found none of this name."
                f"{nearest(name, self._classes) or ' Remove it from the list.'}"
                for name in sorted(unknown)
            )

    def categories(self) -> set[str]:
        """Returns the names of all classes, as targets have them."""
        chosen = self._classes if self._datasets is None else self._datasets
        names = (name for dataset in chosen for names in self._classes[dataset].values() for name in names)
        return {name.replace("_", " ") for name in names}

    def cases(self) -> set[str]:
        """Returns all cases, each "<dataset>/<case>"."""
        found = (parse_name(image) for image, _ in _pairs(self._path))
        return {name.case for name in found if name is not None and self._takes(name)}

    def entries(self) -> Iterator[Entry | Reject]:
        """Yields each image, or why it is left out, in the order of the index; what can be read before any InputError."""
        for image, masks in _pairs(self._path):
            name = parse_name(image)
            if name is None:
                yield Reject(image, "unreadable name", "expected <modality>--<dataset>--<case>--<axis>_<slice>.png")
            elif self._takes(name):
                yield self._entry(image, name, masks)

    def _takes(self, name: ImageName) -> bool:
        return self._datasets is None or name.dataset in self._datasets

    def _entry(self, image: str, name: ImageName, masks: list[str]) -> Entry | Reject:
        if name.dataset.casefold().startswith("qubiq") and "brain-growth" in name.case.casefold():
            return Reject(image, "unusable image", "QUBIQ's brain-growth images are not usable")
        prefix = f"masks/{image.removeprefix('images/').removesuffix('.png')}--"
        known = self._codes[name.dataset]
        groups: defaultdict[int, list[str]] = defaultdict(list)
        rejects: list[Reject] = []
        for mask in dict.fromkeys(masks):
            code = mask.removeprefix(prefix)
            if (found := known.get(code)) is None:
                found = self._look_up(name.dataset, mask, code)
            if isinstance(found, Reject):
                rejects.append(found)
            elif found != _UNION:
                groups[found].append(mask)
        names = {number: self._classes[name.dataset][number][0].replace("_", " ") for number in sorted(groups)}
        classes = [ClassMasks(f"{number:04d}", names[number], tuple(groups[number])) for number in names]
        return Entry(image, name, tuple(classes), tuple(rejects), len(masks))

    def _look_up(self, dataset: str, mask: str, code: str) -> int | Reject:
        """Returns the class id of a mask, whose `code` is what its name adds to the image's; caches good codes."""
        match = _CODE.fullmatch(code)
        if match is None:
            return Reject(mask, "unreadable name", "expected its image's name and --<class>_<instance>.png")
        names = self._classes.get(dataset, {}).get(int(match[1]), [])
        if len(names) != 1:
            found = f"{len(names)} names ({', '.join(names)})" if names else "no name"
            return Reject(mask, "unknown class", f"{dataset} has {found} for class id {match[1]}")
        self._codes[dataset][code] = _UNION if names[0].startswith("union_") else int(match[1])
        return self._codes[dataset][code]


def _pairs(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the well-formed entries of the index, and raises at the end if there were others."""
    problems: list[str] = []
    number, wrong, image = 0, 0, ""
    images = Fingerprints()
    with _opened(path) as handle:
        try:
            for image, masks in ijson.kvitems(handle, "", buf_size=_PIECE):
                number += 1
                images.add(image)
                if _is_of_form(image, masks):
                    yield image, masks
                    continue
                wrong += 1
                if wrong <= _SHOWN:
                    shown = f"found {image!r}: {masks!r:.100}; correct this entry."
                    problems.append(f"{path}: entry {number:,}: expected {_INDEX_FORM}, {shown}")
        except (ijson.JSONError, UnicodeError) as error:
            after = f"after entry {number:,}, {image!r}" if number else "in the first entry"
            # Only the first line, without the parser's excerpt; for bytes that are not UTF-8 it is a bytes literal.
            reason = str(error).removeprefix("b'").replace("\\n", "\n").splitlines()[0]
            problems.append(
                f"{path}: {after}, and before byte {handle.tell():,}: expected {_INDEX_FORM}, found no valid JSON "
                f"({reason}); unzip it again."
            )
    if wrong > _SHOWN:
        problems.append(f"{path}: and {wrong - _SHOWN:,} more entries like these.")
    if repeated := images.repeated():
        problems += _repeats(path, repeated, last=number)
    if problems:
        raise InputError(problems)


def _is_of_form(image: str, masks: Any) -> bool:
    try:
        return bool(_IMAGE.fullmatch(image)) and type(masks) is list and all(map(_MASK.fullmatch, masks))
    except TypeError:  # a mask is not a string
        return False


def _repeats(path: Path, repeated: frozenset[int], last: int) -> list[str]:
    problems: list[str] = []
    first_seen: dict[str, int] = {}
    with _opened(path) as handle:
        for number, (image, _) in enumerate(ijson.kvitems(handle, "", buf_size=_PIECE), 1):
            if fingerprint(image) in repeated and first_seen.setdefault(image, number) != number:
                problems.append(
                    f"{path}: entry {number:,}: {image!r} is also entry {first_seen[image]:,}; "
                    "expected each image once; join their masks in one entry."
                )
            if number == last:  # what follows may not be JSON, which is reported already
                break
    more = [f"{path}: and {len(problems) - _SHOWN:,} more images that are listed twice."]
    return problems if len(problems) <= _SHOWN else problems[:_SHOWN] + more


def _opened(path: Path) -> BinaryIO:
    try:
        handle = path.open("rb")
    except OSError as error:
        raise InputError(_missing(path, _INDEX_FORM, error)) from error
    start = handle.read(_PIECE).lstrip()[:1]
    if start and start != b"{":
        handle.close()
        raise InputError(
            f"{path}: byte 0: expected {_INDEX_FORM}, found {start.decode('latin-1')!r} at its start; "
            "use the data set's own file."
        )
    handle.seek(0)
    return handle


def _missing(path: Path, expected: str, error: OSError) -> str:
    return (
        f"{path}: expected {expected}, found no such file ({error.strerror}); "
        "give the unzipped folder SAMed2Dv1, which holds it."
    )


def _read_classes(path: Path) -> dict[str, dict[int, list[str]]]:
    """Turns {dataset: {name: id}} into {dataset: {id: names}}; an id with two names is reported where it is used."""
    try:
        mapping = TypeAdapter(dict[str, dict[str, StrictInt]]).validate_python(parse_json(path.read_bytes()))
    except OSError as error:
        raise InputError(_missing(path, _CLASSES_FORM, error)) from error
    except ValidationError as error:
        raise InputError(
            f"{path}: expected {_CLASSES_FORM}, found {' > '.join(map(repr, one['loc'])) or 'the file'}: "
            f"{one['input']!r:.100}; use the data set's own file."
            for one in error.errors()
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: expected {_CLASSES_FORM}, found no valid JSON ({error}); unzip it again.") from error
    classes: dict[str, dict[int, list[str]]] = {dataset: {} for dataset in mapping}
    for dataset, names in mapping.items():
        for name, number in names.items():
            classes[dataset].setdefault(number, []).append(name)
    return classes
