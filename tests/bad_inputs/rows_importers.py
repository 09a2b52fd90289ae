"""Folders, annotations, volumes and archives that cannot become records."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
from rows import Make, Row, Workspace

SHARED = ("--val", "0", "--test", "0")


def folder(w: Workspace, *more: str | Path) -> list[str | Path]:
    places = ("--images", w.folder / "img", "--masks", w.folder / "msk")
    return ["folder", *places, "--modality", "ct", "--out", w.out, *SHARED, *more]


def pair(w: Workspace, name: str = "a", mask: object = ((0, 255), (0, 0))) -> Workspace:
    w.picture(f"img/{name}.png", [[1, 2], [3, 4]])
    w.picture(f"msk/{name}.png", mask)
    return w


def volume(w: Workspace, name: str, voxels: object, affine: object = None) -> Path:
    path = w.folder / "vol" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(voxels, np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else np.asarray(affine)), path)
    return path


def nifti(
    *more: str, image: object = np.ones((3, 3, 3)), labels: object = np.ones((3, 3, 3)), **options: object
) -> Make:
    def make(w: Workspace) -> list[str | Path]:
        volume(w, "p1_frame1.nii", image, options.get("affine"))
        volume(w, "p1_frame1_gt.nii", labels, options.get("affine"))
        named = () if options.get("unnamed") else ("--labels", "1=liver")
        return ["nifti", "--root", w.folder / "vol", "--modality", "mr", "--out", w.out, *SHARED, *named, *more]

    return make


def coco(**changes: object) -> Make:
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 1, 0, 1, 1]]}],
    }

    def make(w: Workspace) -> list[str | Path]:
        pair(w)
        path = w.text("coco.json", json.dumps({**content, **changes}))
        return [
            "coco",
            "--annotations",
            path,
            "--images",
            w.folder / "img",
            "--modality",
            "em",
            "--out",
            w.out,
            *SHARED,
        ]

    return make


def public(*more: str | Path) -> Make:
    return lambda w: ["public", "--from", w.folder / "archives", "--out", w.out, *SHARED, *more]


def archive(content: bytes) -> Make:
    def make(w: Workspace) -> list[str | Path]:
        w.text("archives/kvasir-seg.zip", content)
        return list(public("--sets", "kvasir_seg", "--accept-licences")(w))

    return make


SHEARED = [[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
CASES: list[tuple[str, Make, tuple[str, ...]]] = [
    ("folder: no images", lambda w: folder(w, "--category", "x"), ("img: expected a folder", "msk: expected a folder")),
    ("folder: no category", lambda w: folder(pair(w)), ("--category", "--labels")),
    (
        "folder: both",
        lambda w: folder(pair(w), "--category", "x", "--labels", "1=a"),
        ("--category and --labels", "leave one"),
    ),
    ("folder: labels", lambda w: folder(pair(w), "--labels", "liver"), ("'liver'", "NUMBER=CATEGORY")),
    ("folder: label 0", lambda w: folder(pair(w), "--labels", "0=air"), ("'0=air'", "above 0")),
    ("folder: label twice", lambda w: folder(pair(w), "--labels", "1=a", "1=b"), ("'1=b'", "remove one")),
    ("folder: expression", lambda w: folder(pair(w), "--category", "x", "--case", "("), ("--case '('", "regular")),
    ("folder: no patient", lambda w: folder(pair(w), "--category", "x", "--case", "p1"), ("a.png", "finds no patient")),
    ("folder: root", lambda w: folder(pair(w), "--category", "x", "--root", w.folder / "data"), ("--root", "above")),
    ("folder: shares", lambda w: folder(pair(w), "--category", "x", "--val", "0.9", "--test", "0.2"), ("--val 0.9",)),
    (
        "folder: no pair",
        lambda w: folder(pair(w), "--category", "x", "--pattern", "{stem}_m.png"),
        ("picture without",),
    ),
    ("folder: empty mask", lambda w: folder(pair(w, mask=[[0, 0], [0, 0]]), "--category", "x"), ("unusable mask",)),
    ("folder: other size", lambda w: folder(pair(w, mask=[[0, 9]]), "--category", "x"), ("2 x 1", "2 x 2")),
    ("folder: map", lambda w: folder(pair(w, mask=[[1, 2], [3, 0]]), "--category", "x"), ("found 4", "0, 1, 2, 3")),
    ("folder: unknown label", lambda w: folder(pair(w, mask=[[7, 0], [0, 0]]), "--labels", "1=a"), ("[7]", "--labels")),
    ("coco: no list", coco(images={}), ("'images' is not a list",)),
    ("coco: foreign image", coco(images=[{"id": 2, "file_name": "a.png"}]), ("annotations[0] has image 1",)),
    ("coco: no name", coco(categories=[{"id": 1}]), ("categories[0]", "name")),
    ("coco: missing image", coco(images=[{"id": 1, "file_name": "b.png"}]), ("b.png", "unreadable image")),
    ("coco: two points", coco(annotations=[{"image_id": 1, "category_id": 1, "segmentation": [[0, 1]]}]), ("three",)),
    ("nifti: empty folder", lambda w: [*nifti()(w)[:2], w.folder / "data", *nifti()(w)[3:]], ("imagesTr",)),
    ("nifti: no names", nifti(unnamed=True), ("dataset.json", "--labels")),
    ("nifti: sheared", nifti(affine=SHEARED), ("is sheared",)),
    ("nifti: 4-D", nifti(image=np.ones((3, 3, 3, 2))), ("4-D", "--channel")),
    ("nifti: no such channel", nifti("--channel", "5", image=np.ones((3, 3, 3, 2))), ("2 channels",)),
    ("nifti: other grid", nifti(labels=np.ones((3, 3, 2))), ("another grid",)),
    ("nifti: unknown label", nifti(labels=np.full((3, 3, 3), 4)), ("[4]", "no name")),
    ("nifti: nothing marked", nifti(labels=np.zeros((3, 3, 3))), ("marks nothing",)),
    ("nifti: window", nifti("--window", "40"), ("--window '40'", "center and width")),
    ("nifti: plane", nifti("--plane", "oblique"), ("oblique", "axial")),
    ("public: licence", public("--sets", "kvasir_seg"), ("licence", "--accept-licences")),
    ("public: unknown", public("--sets", "kvasir", "--accept-licences"), ("kvasir", "'kvasir_seg'")),
    ("public: by form", public("--sets", "acdc", "--accept-licences"), ("acdc.zip", "form")),
    ("public: not an archive", archive(b"<html>"), ("kvasir-seg.zip", "is damaged")),
    ("public: empty archive", archive(b"PK\5\6" + bytes(18)), ("Kvasir-SEG/images",)),
]
ROWS = [Row(name, "prepare", make, words) for name, make, words in CASES]
