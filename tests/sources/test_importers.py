"""The commands that turn other people's folders, annotations and archives into records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_archives import tarred, zipped
from test_nifti import decathlon, labels

from medisee.foundation.errors import InputError
from medisee.prepare_data import main
from medisee.records.manifest import Manifest
from medisee.sources import public_sets
from medisee.sources.image_folder import parse_labels

SPLITS = ("train", "val", "test")


def picture(path: Path, pixels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def mask(left: int, value: int = 255) -> Any:
    pixels = np.zeros((12, 16), np.uint8)
    pixels[3:8, left : left + 4] = value
    return pixels


def grey(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (12, 16), dtype=np.uint8)


def manifests(out: Path, root: Path) -> dict[str, Manifest]:
    found = {split: out / f"{split}.jsonl" for split in SPLITS}
    return {split: Manifest(path, root) for split, path in found.items() if path.stat().st_size}


def every_mask(out: Path, root: Path) -> dict[tuple[str, str], Any]:
    """Returns the mask of each target, read as training reads it."""
    return {
        (record.id, target.category): one.mask(record, target)
        for one in manifests(out, root).values()
        for record in one
        for target in record.targets
    }


def rejects(out: Path) -> dict[str, str]:
    lines = (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return {one["file"]: one["reason"] for one in map(json.loads, lines)}


def run(*words: str | Path) -> None:
    main([str(word) for word in words])


def folder(tmp_path: Path, *more: str | Path) -> Path:
    out = tmp_path / "out"
    places = ("--images", tmp_path / "set" / "img", "--masks", tmp_path / "set" / "msk")
    run("folder", *places, "--modality", "ct", "--out", out, *more)
    return out


def test_a_mask_for_each_picture(tmp_path: Path) -> None:
    for number in range(10):
        picture(tmp_path / "set" / "img" / f"p{number // 2}_{number}.jpg", grey(number))
        picture(tmp_path / "set" / "msk" / f"p{number // 2}_{number}.png", mask(number))
    picture(tmp_path / "set" / "img" / "lost.png", grey(99))
    picture(tmp_path / "set" / "msk" / "other.png", mask(0))
    picture(tmp_path / "set" / "img" / "q_empty.png", grey(98))
    picture(tmp_path / "set" / "msk" / "q_empty.png", mask(0) * 0)
    picture(tmp_path / "set" / "img" / "q_size.png", grey(97))
    picture(tmp_path / "set" / "msk" / "q_size.png", mask(0)[:5])
    out = folder(tmp_path, "--category", "polyp", "--case", r"^(p\d|q|lost)", "--val", "0.2", "--test", "0.2")
    read = every_mask(out, tmp_path / "set")
    assert len(read) == 10
    for number in range(10):
        np.testing.assert_array_equal(read[f"img/p{number // 2}_{number}", "polyp"], mask(number) > 0)
    cases = {split: {record.case for record in one} for split, one in manifests(out, tmp_path / "set").items()}
    assert {split: len(own) for split, own in cases.items()} == {"train": 3, "val": 1, "test": 1}
    assert len(set().union(*cases.values())) == 5, "no patient is in two splits"
    assert rejects(out) == {
        "img/lost.png": "picture without a mask",
        "msk/other.png": "mask without a picture",
        "msk/q_empty.png": "unusable mask",
        "img/q_empty.png": "no target",
        "msk/q_size.png": "unusable mask",
        "img/q_size.png": "no target",
    }
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert facts["settings"]["data"] == "folder"
    folder(tmp_path, "--category", "polyp")  # an earlier result is replaced


def test_a_folder_of_masks_for_each_category(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "img" / "deep" / "a.png", grey(0))
    picture(tmp_path / "set" / "msk" / "liver" / "deep" / "a_1.png", mask(0))
    picture(tmp_path / "set" / "msk" / "liver" / "deep" / "a_2.png", mask(6))
    picture(tmp_path / "set" / "msk" / "spleen" / "deep" / "a_1.png", mask(10))
    out = folder(tmp_path, "--pattern", "{stem}_*")
    read = every_mask(out, tmp_path / "set")
    np.testing.assert_array_equal(read["img/deep/a", "liver"], (mask(0) | mask(6)) > 0)
    np.testing.assert_array_equal(read["img/deep/a", "spleen"], mask(10) > 0)


def test_label_maps(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "img" / "a.png", grey(0))
    picture(tmp_path / "set" / "msk" / "a.png", mask(0, 1) + mask(8, 2))
    picture(tmp_path / "set" / "img" / "b.png", grey(1))
    picture(tmp_path / "set" / "msk" / "b.png", mask(0, 3))
    out = folder(tmp_path, "--labels", "1=liver,2=spleen")
    read = every_mask(out, tmp_path / "set")
    np.testing.assert_array_equal(read["img/a", "liver"], mask(0) > 0)
    np.testing.assert_array_equal(read["img/a", "spleen"], mask(8) > 0)
    assert rejects(out)["msk/b.png"] == "unusable mask"
    assert "no name" in (out / "rejects.jsonl").read_text(encoding="utf-8")


def test_outlines_beside_their_pictures_are_filled(tmp_path: Path) -> None:
    outline = np.zeros((12, 16), np.uint8)
    outline[2:9, 3:12] = 255
    outline[3:8, 4:11] = 0
    both = tmp_path / "both"
    picture(both / "001_HC.png", grey(0))
    picture(both / "001_HC_Annotation.png", outline)
    words = ("--category", "fetal head", "--pattern", "{stem}_Annotation.png", "--fill", "--modality", "ultrasound")
    run("folder", "--images", both, "--masks", both, *words, "--out", tmp_path / "out")
    ((key, read),) = every_mask(tmp_path / "out", both).items()
    assert key == ("001_HC", "fetal head")
    assert read[2:9, 3:12].all()
    assert read.sum() == 63


def write_annotations(tmp_path: Path, **changes: Any) -> Path:
    """Writes COCO annotations of two images; None removes a key."""
    picture(tmp_path / "img" / "a.png", grey(0))
    picture(tmp_path / "img" / "b.png", grey(1))
    counts = [3, 2, *([10, 2] * 3), 12 * 16 - 3 - 2 - 36]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 16}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 7, "name": "cell"}, {"id": 8, "name": "nerve"}],
        "annotations": [
            {"image_id": 1, "category_id": 7, "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]], "iscrowd": 0},
            {"image_id": 1, "category_id": 7, "segmentation": [[10, 3, 14, 3, 14, 8, 10, 8]]},
            {"image_id": 1, "category_id": 8, "segmentation": {"size": [12, 16], "counts": counts}},
        ],
        **changes,
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def coco(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    run(
        "coco",
        "--annotations",
        tmp_path / "instances.json",
        "--images",
        tmp_path / "img",
        "--modality",
        "em",
        "--out",
        out,
    )
    return out


def test_coco_instances_are_joined(tmp_path: Path) -> None:
    write_annotations(tmp_path)
    out = coco(tmp_path)
    read = every_mask(out, tmp_path / "img")
    np.testing.assert_array_equal(read["a.png", "cell"], (mask(2) | mask(10)) > 0)
    expected = np.zeros((12, 16), bool)
    expected[3:5, :4] = True
    np.testing.assert_array_equal(read["a.png", "nerve"], expected)
    assert rejects(out) == {"b.png": "image without annotations"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": None}, "'images' is not a list"),
        ({"images": [{"id": "1", "file_name": "a.png"}]}, r"images\[0\].*id"),
        ({"annotations": [{"image_id": 3, "category_id": 7, "segmentation": []}]}, r"annotations\[0\] has image 3"),
        ({"categories": []}, "category 7"),
        ({"annotations": [{"image_id": 1, "category_id": 7, "segmentation": [[1, 2]]}]}, "three points"),
        ({"images": [{"id": 1, "file_name": "../a.png"}, {"id": 2, "file_name": "b.png"}]}, "leaves the root"),
    ],
)
def test_wrong_coco_annotations(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_annotations(tmp_path, **changes)
    with pytest.raises(InputError, match=words):
        coco(tmp_path)
    assert not list(tmp_path.glob("out/*"))


def test_volumes_become_pictures_and_records(tmp_path: Path) -> None:
    decathlon(tmp_path / "set")
    (tmp_path / "set" / "dataset.json").write_text(
        json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}})
    )
    out = tmp_path / "out"
    run("nifti", "--root", tmp_path / "set", "--modality", "ct", "--window", "40,400", "--out", out)
    read = every_mask(out, out)
    assert sum(int(one.sum()) for one in read.values()) == int((labels() > 0).sum())
    run("nifti", "--root", tmp_path / "set", "--modality", "ct", "--plane", "coronal", "--out", out)
    assert all("coronal" in path.name for path in (out / "images").iterdir()), "the earlier result is replaced"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        run("nifti", "--root", tmp_path / "set", "--modality", "ct", "--out", out)


def official(tmp_path: Path) -> Path:
    """Writes archives of the official layouts, with a few small files each."""

    def png(pixels: Any) -> bytes:
        return picture(tmp_path / "one.png", pixels).read_bytes()

    archives = tmp_path / "archives"
    archives.mkdir()
    kvasir = {
        f"Kvasir-SEG/{kind}/c{n}.png": png(of(n)) for n in range(4) for kind, of in (("images", grey), ("masks", mask))
    }
    (archives / "kvasir-seg.zip").write_bytes(zipped(kvasir))
    heads = {f"training_set/00{n}_{k}HC.png": png(grey(n)) for n in range(3) for k in ("", "2")}
    heads |= {name.replace(".png", "_Annotation.png"): png(mask(2)) for name in heads}
    (archives / "training_set.zip").write_bytes(zipped(heads))
    decathlon(tmp_path / "volumes")
    task = {
        f"Task04_Hippocampus/{path.relative_to(tmp_path / 'volumes')}": path.read_bytes()
        for path in (tmp_path / "volumes").rglob("*.gz")
    }
    (archives / "Task04_Hippocampus.tar").write_bytes(tarred(task))
    return archives


def public(tmp_path: Path, *words: str | Path) -> Path:
    out = tmp_path / "out"
    run("public", "--from", tmp_path / "archives", "--out", out, *words)
    return out


def test_public_sets_from_their_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official(tmp_path)
    monkeypatch.setattr("medisee.sources.public_sets.LEAST_AREA", 1)
    out = public(tmp_path, "--sets", "kvasir_seg", "hc18", "msd_hippocampus", "--accept-licences")
    read = every_mask(out, out)
    assert {category for _, category in read} == {
        "polyp",
        "fetal head",
        "anterior hippocampus",
        "posterior hippocampus",
    }
    cases = [record.case for one in manifests(out, out).values() for record in one if record.source == "hc18"]
    assert sorted(set(cases)) == ["hc18/000", "hc18/001", "hc18/002"], "both pictures of a pregnancy are one case"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["hc18", "images", "kvasir_seg"]
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert set(facts["sha256"]) == {"kvasir_seg", "hc18", "msd_hippocampus"}
    public(tmp_path, "--sets", "kvasir_seg", "--accept-licences")  # replaces it


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--sets", "kvasir_seg"), "--accept-licences"),
        (("--sets", "kvazir", "--accept-licences"), "'kvasir_seg'"),
        (("--sets", "acdc", "--accept-licences"), "humanheart"),
    ],
)
def test_public_sets_are_refused(tmp_path: Path, words: Sequence[str], expected: str) -> None:
    official(tmp_path)
    with pytest.raises(InputError, match=expected):
        public(tmp_path, *words)
    assert not (tmp_path / "out").exists()


def test_half_an_archive_leaves_nothing(tmp_path: Path) -> None:
    archive = official(tmp_path) / "kvasir-seg.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"kvasir-seg\.zip: is damaged"):
        public(tmp_path, "--sets", "kvasir_seg", "--accept-licences")
    assert not (tmp_path / "out").exists()


def test_every_public_set_can_be_imported() -> None:
    for name, one in public_sets.PUBLIC_SETS.items():
        assert bool(one.labels) != bool(one.pictures), name
        assert bool(one.address) != bool(one.form), name


@pytest.mark.parametrize("words", [["liver"], ["0=air"], ["1=a,1=b"], ["x=1"], ["1= "], [","]])
def test_wrong_labels(words: list[str]) -> None:
    with pytest.raises(InputError, match="--labels"):
        parse_labels(words)
