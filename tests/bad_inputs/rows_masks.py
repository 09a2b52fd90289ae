"""Masks that are not two-valued, of another size, or in a wrong form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from picture_files import png, tiff
from PIL import Image
from rows import Row, Workspace

SHAPE = (48, 64)  # of the first image
OBJECT = np.zeros(SHAPE, np.uint8)
OBJECT[4:24, 3:32] = 1
LABELS = OBJECT.copy()
LABELS[30:40, 40:60] = 2
COLOURS = OBJECT[..., None] * np.array([200, 30, 90], np.uint8)
COLOURS[30:40, 40:60] = 30, 200, 90


def file(name: str, make: Any, *words: str, mask: Any = None, suffix: str = "png", **options: Any) -> Row:
    """A row of a manifest whose first target's mask is a file: of an array, of bytes, or as `make(path)` writes it."""

    def made(w: Workspace) -> list[str]:
        path = w.folder / "data" / f"m.{suffix}"
        if callable(make):
            make(path)
        elif isinstance(make, bytes):
            path.write_bytes(make)
        else:
            Image.fromarray(make).save(path, **options)
        w.edit_target(mask=f"m.{suffix}" if mask is None else mask)
        return w.evaluate()

    return Row(f"mask: {name}", "eval", made, (f"m.{suffix}", "'r0'", *words))


def form(name: str, mask: Any, *words: str) -> Row:
    """A row of a manifest whose first target's mask is this JSON value."""
    return Row(f"mask: {name}", "eval", lambda w: (w.edit_target(mask=mask), w.evaluate())[1], ("tiny.jsonl:1", *words))


def predicted(name: str, mask: Any, *words: str) -> Row:
    """A row of predictions whose mask is this JSON value."""

    def made(w: Workspace) -> list[str]:
        one = {"record": "r0", "target": "a", "question": "Which organ makes bile?", "text": "", "emitted": True}
        path = w.text("p.jsonl", json.dumps({**one, "mask": mask}))
        return ["--predictions", str(path), "--records", str(w.manifest), "--out", str(w.out)]

    return Row(f"predicted mask: {name}", "eval", made, ("p.jsonl:1", *words))


def _smooth(path: Path) -> None:
    Image.fromarray(OBJECT * 255).resize((32, 24)).resize((64, 48), Image.Resampling.BILINEAR).save(path)


def _palette(path: Path) -> None:
    picture = Image.fromarray(OBJECT)
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(path)


SQUARE = [1, 1, 9, 1, 9, 9, 1, 9]
TALL = [1, 1, 9, 1, 9, 50]

ROWS = [
    file("label map", LABELS, "found 3: 0, 1, 2;", '{"files": [...], "value": N}'),
    file("label map in a TIFF", LABELS, "found 3: 0, 1, 2", suffix="tif"),
    file("label map of 16 bits", LABELS.astype(np.uint16) * 300, "found 3: 0, 300, 600;"),
    file("label map of floats", tiff(LABELS[..., None].astype(np.float32)), "found 3: 0, 1, 2", suffix="tif"),
    file("16-bit colours", png(LABELS[..., None].repeat(3, axis=2).astype(np.uint16)), "found 3: 0, 1, 2;"),
    file("smoothed", _smooth, "one other value, found ", "without smoothing"),
    file("colours", COLOURS, "found 3: 0/0/0, 30/200/90, 200/30/90;", "a mask per object"),
    file("colours by value", COLOURS, "in colour", mask={"files": ["m.png"], "value": 200}),
    file("absent value", LABELS, "(value 3) is empty", mask={"files": ["m.png"], "value": 3}),
    file("JPEG label map", LABELS * np.uint8(127), "one bright object", suffix="jpg", quality=95),
    file("dark JPEG", OBJECT * np.uint8(40), "one bright object", suffix="jpg", quality=95),
    file("JPEG by value", OBJECT * np.uint8(255), "is a JPEG", suffix="jpg", mask={"files": ["m.jpg"], "value": 255}),
    file("inverted palette", _palette, "palette shows 0 bright"),
    file("alpha only", np.dstack([np.full((*SHAPE, 3), 255, np.uint8), OBJECT * 255]), "transparency only"),
    file("black", OBJECT * 0, "is empty"),
    file("black JPEG", OBJECT * 0, "is empty", suffix="jpg"),
    file("inverted white", OBJECT * 0 + 255, "is empty", mask={"files": ["m.png"], "inverted": True}),
    file("turned by its tag", png(OBJECT[..., None], 6), "48 x 64", "expected the image's 64 x 48"),
    file("turned back by its tag", png(OBJECT.T[..., None].copy()), "48 x 64", "64 x 48"),
    file("an empty file", b"", "empty file"),
    file("cut off", png(OBJECT[..., None])[:60], "cannot be decoded"),
    file("wrong bit", png(OBJECT[..., None])[:44] + b"\0" + png(OBJECT[..., None])[45:], "wrong checksum"),
    file("a folder", lambda path: path.mkdir(), "found a folder"),
    file("a loop", lambda path: path.symlink_to(path.name), "Too many levels"),
    file("DICOM", b"\0" * 128 + b"DICM\2\0", "found DICOM", suffix="bin"),
    file("NIfTI", b"\x1f\x8b\x08", "found NIfTI", suffix="nii.gz"),
    file(
        "pages",
        lambda path: Image.fromarray(OBJECT).save(path, save_all=True, append_images=[Image.fromarray(LABELS)]),
        "found 2 pages",
        suffix="tif",
    ),
    Row(
        "mask of a windows path",
        "eval",
        lambda w: (w.edit_target(mask="masks\\m.png"), w.evaluate())[1],
        ("does not exist", "write / instead of \\"),
    ),
    form("value of zero", {"files": ["0_liver.png"], "value": 0}, "value is 0", "1 or more"),
    form("value in words", {"files": ["0_liver.png"], "value": "liver"}, "value is", "whole number"),
    form("value of true", {"files": ["0_liver.png"], "value": True}, "value is true", "whole number"),
    form("bare polygons", [SQUARE], '{"size": [height, width], "segmentation": [[...]]}'),
    form("polygons without size", {"segmentation": [SQUARE]}, '"size": [height, width]'),
    form("polygons of a wrong size", {"size": [48.0, 64], "segmentation": [SQUARE]}, '"size": [height, width]'),
    form("no polygon", {"size": [48, 64], "segmentation": []}, "three points or more"),
    form("a box for a polygon", {"size": [48, 64], "segmentation": [[1, 1, 9, 9]]}, "three points or more"),
    form("an odd polygon", {"size": [48, 64], "segmentation": [SQUARE[:7]]}, "three points or more"),
    form("words in a polygon", {"size": [48, 64], "segmentation": [["1", *SQUARE[1:]]]}, "three points or more"),
    form("polygon outside", {"size": [48, 64], "segmentation": [TALL]}, "0 <= x <= 64 and 0 <= y <= 48"),
    form("negative counts", {"size": [48, 64], "counts": [9, -9, 3072]}, "whole numbers, 0 or more"),
    form("counts in halves", {"size": [48, 64], "counts": [9, 3063.0]}, "whole numbers, 0 or more"),
    form("no counts", {"size": [48, 64], "counts": []}, "whole numbers, 0 or more"),
    form("few counts", {"size": [48, 64], "counts": [9, 9]}, "cover 18 pixels", "48 x 64 = 3072"),
    form("counts without size", {"counts": [9, 9]}, "mask.size' is missing"),
    form("bytes as text", {"size": [48, 64], "counts": "b'04'"}, "RLE counts do not decode"),
    form("a number", 3, "string"),
    Row(
        "polygons of another image",
        "eval",
        lambda w: (w.edit_target(mask={"size": [64, 48], "segmentation": [SQUARE]}), w.evaluate())[1],
        ("'r0'", "mask (RLE) is 48 x 64", "64 x 48"),
    ),
    Row(
        "polygon without a pixel",
        "eval",
        lambda w: (w.edit_target(mask={"size": [48, 64], "segmentation": [[1, 1, 1, 1, 1, 1]]}), w.evaluate())[1],
        ("'r0'", "is empty"),
    ),
    predicted("polygons", [SQUARE], '"size"'),
    predicted("polygon outside", {"size": [48, 64], "segmentation": [TALL]}, "0 <= y <= 48"),
    predicted("negative counts", {"size": [48, 64], "counts": [-1, 3073]}, "whole numbers, 0 or more"),
    predicted("few counts", {"size": [48, 64], "counts": [1, 3]}, "cover 4 pixels"),
    predicted("string", {"size": [48, 64], "counts": "!"}, "RLE counts do not decode"),
    predicted("size", {"size": [0, 64], "counts": "0"}, "RLE size [0, 64] is wrong"),
    predicted("huge size", {"size": [10**6, 10**6], "counts": [10**6]}, "RLE size"),
]
