from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from medisee.foundation.errors import InputError
from medisee.records.manifest import Manifest
from medisee.records.masks import MaskFiles, Rle, decode_mask
from medisee.records.records import Record
from medisee.sources.sa_med2d import prepare, read_images
from medisee.sources.sa_med2d_index import CLASSES_FILE, INDEX_FILE, Entry, Index
from medisee.sources.splits import split_cases
from medisee.sources.subset import Subset

SHAPE = (20, 30)


def block(x0: int, y0: int, x1: int, y1: int, shape: tuple[int, int] = SHAPE) -> NDArray[np.bool_]:
    mask = np.zeros(shape, np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


class Tree:
    """A small SA-Med2D folder; each method writes files, `write` writes the two JSON files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index: dict[str, list[str]] = {}
        self.classes: dict[str, dict[str, int]] = {}
        (root / "images").mkdir(parents=True)
        (root / "masks").mkdir()

    def add(self, stem: str, masks: dict[str, NDArray[np.bool_]], pixels: NDArray[np.uint8] | None = None) -> None:
        if pixels is None:
            pixels = np.arange(SHAPE[0] * SHAPE[1], dtype=np.int64).reshape(SHAPE).astype(np.uint8)
        Image.fromarray(pixels).save(self.root / "images" / f"{stem}.png")
        self.index[f"images/{stem}.png"] = [f"masks/{stem}--{code}.png" for code in masks]
        for code, mask in masks.items():
            Image.fromarray(mask.astype(np.uint8) * 255).save(self.root / "masks" / f"{stem}--{code}.png")

    def write(self) -> Path:
        (self.root / INDEX_FILE).write_text(json.dumps(self.index))
        (self.root / CLASSES_FILE).write_text(json.dumps(self.classes))
        return self.root

    def read(self, *, min_area: int = 0, workers: int = 1) -> tuple[list[Record], dict[str, str]]:
        """Returns the records, and the reason for each file that was left out."""
        entries = Index(self.write()).entries()
        found = list(read_images(self.root, entries, min_area=min_area, workers=workers))
        rejects = {reject.file: reject.reason for one in found for reject in one.rejects}
        return [one.record for one in found if one.record], rejects


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "SAMed2Dv1")


def test_a_mask_of_one_file_stays_a_path(tree: Tree) -> None:
    tree.classes = {"BTCV": {"kidney_left": 2, "liver": 5}}
    tree.add("ct_00--BTCV--ABD_001--z_0100", {"0005_000": block(3, 4, 10, 9), "0002_000": block(20, 10, 30, 20)})
    (record,), rejects = tree.read()
    assert rejects == {}
    assert record.id == "ct_00--BTCV--ABD_001--z_0100"
    assert record.image == "images/ct_00--BTCV--ABD_001--z_0100.png"
    assert (record.modality, record.source, record.case, record.plane) == ("ct", "BTCV", "BTCV/ABD_001", "axial")
    kidney, liver = record.targets
    assert (kidney.id, kidney.category, kidney.qa) == ("0002", "kidney left", ())
    assert kidney.box == (20, 10, 30, 20)  # half-open: it holds the last row and column
    assert liver.mask == "masks/ct_00--BTCV--ABD_001--z_0100--0005_000.png"
    assert liver.box == (3, 4, 10, 9)


@pytest.mark.parametrize(
    ("stem", "modality", "case", "plane"),
    [
        ("ct_00--d--a.b_c-d--x_0001", "ct", "d/a.b_c-d", "sagittal"),
        ("mr_t1--d--a--y_0001", "mr", "d/a", "coronal"),
        ("mr_flair--d--a---z_0001", "mr", "d/a-", "axial"),
        ("x_ray--d--1.2.826--2d_none", "x-ray", "d/1.2.826", None),
        ("fundus_photography--d--T0001--2d_none", "fundus photography", "d/T0001", None),
        ("ultrasound_00--d--a_2d_none--2d_none", "ultrasound", "d/a_2d_none", None),
    ],
)
def test_names_are_split_on_double_dashes_only(
    tree: Tree, stem: str, modality: str, case: str, plane: str | None
) -> None:
    tree.classes = {"d": {"organ": 0}}
    tree.add(stem, {"0000_000": block(0, 0, 5, 5)})
    (record,), rejects = tree.read()
    assert rejects == {}
    assert (record.modality, record.source, record.case, record.plane) == (modality, "d", case, plane)


def test_instances_are_joined_to_one_target(tree: Tree) -> None:
    tree.classes = {"d": {"polyp": 7}}
    masks = {"0007_000": block(0, 0, 4, 4), "0007_001": block(2, 2, 8, 6)}
    tree.add("endoscopy_00--d--a--2d_none", masks)
    (record,), _ = tree.read()
    (target,) = record.targets
    assert isinstance(target.mask, Rle)
    assert (decode_mask(target.mask) == masks["0007_000"] | masks["0007_001"]).all()
    assert target.box == (0, 0, 8, 6)


def test_unions_are_dropped_in_silence(tree: Tree) -> None:
    tree.classes = {"d": {"union_kidney_and_tumor": 0, "kidney_union_part": 1}}
    tree.add("ct_00--d--a--z_0", {"0000_000": block(0, 0, 9, 9), "0001_000": block(0, 0, 5, 5)})
    (record,), rejects = tree.read()
    assert [target.category for target in record.targets] == ["kidney union part"]
    assert rejects == {}


def test_inverted_masks_are_turned(tree: Tree) -> None:
    tree.classes = {"ichallenge_adam_task2": {"optic_disc": 0}}
    stem = "fundus_photography--ichallenge_adam_task2--A1--2d_none"
    tree.add(stem, {"0000_000": ~block(10, 5, 15, 12)})
    (record,), _ = tree.read()
    (target,) = record.targets
    assert isinstance(target.mask, Rle)
    assert (decode_mask(target.mask) == block(10, 5, 15, 12)).all()
    assert target.box == (10, 5, 15, 12)


def test_binary_brain_ptm_images_and_brain_growth_are_skipped(tree: Tree) -> None:
    tree.classes = {"Brain_PTM": {"tract": 0}, "QUBIQ2020": {"growth": 0}}
    mask = {"0000_000": block(0, 0, 5, 5)}
    tree.add("mr_t1--Brain_PTM--good--z_1", mask)
    tree.add("mr_t1--Brain_PTM--bad--z_1", mask, block(2, 2, 9, 9).astype(np.uint8) * 255)
    tree.add("mr_00--QUBIQ2020--brain-growth_case01--z_1", mask)
    tree.add("mr_00--QUBIQ2020--brain-tumor_case01--z_1", mask)
    records, rejects = tree.read()
    assert [record.case for record in records] == ["Brain_PTM/good", "QUBIQ2020/brain-tumor_case01"]
    assert rejects == {
        "images/mr_t1--Brain_PTM--bad--z_1.png": "unusable image",
        "images/mr_00--QUBIQ2020--brain-growth_case01--z_1.png": "unusable image",
    }


def test_bad_masks_are_told_and_the_others_stay(tree: Tree) -> None:
    tree.classes = {"d": {"a": 0, "b": 1, "c": 2, "e": 3, "f": 3}}
    masks = {
        "0000_000": block(0, 0, 5, 5),
        "0000_001": block(0, 0, 5, 5, (30, 20)),
        "0001_000": block(0, 0, 0, 0),
        "0002_000": block(0, 0, 5, 5),
        "0003_000": block(0, 0, 5, 5),
        "0009_000": block(0, 0, 5, 5),
    }
    stem = "ct_00--d--a--z_0"
    tree.add(stem, masks)
    (tree.root / f"masks/{stem}--0002_000.png").unlink()
    tree.index[f"images/{stem}.png"] += [f"masks/{stem}--0001.png", "masks/ct_00--d--other--z_0--0001_000.png"]
    (record,), rejects = tree.read()
    assert [target.mask for target in record.targets] == [f"masks/{stem}--0000_000.png"]
    assert rejects == {
        f"masks/{stem}--0000_001.png": "other shape",
        f"masks/{stem}--0001_000.png": "empty mask",
        f"masks/{stem}--0002_000.png": "unreadable mask",
        f"masks/{stem}--0003_000.png": "unknown class",
        f"masks/{stem}--0009_000.png": "unknown class",
        f"masks/{stem}--0001.png": "unreadable name",
        "masks/ct_00--d--other--z_0--0001_000.png": "unreadable name",
    }
    (found,) = read_images(tree.root, Index(tree.root).entries())
    assert len(found.rejects) == 7  # each is told once
    details = {reject.file: reject.detail for reject in found.rejects}
    assert "(30, 20), its image has (20, 30)" in details[f"masks/{stem}--0000_001.png"]
    assert "2 names (e, f) for class id 0003" in details[f"masks/{stem}--0003_000.png"]


def test_bad_images_are_told(tree: Tree) -> None:
    tree.classes = {"d": {"a": 0}}
    for name in ("ct_00--d--a--z_0", "ct_00--d--b--z_0", "ct_00--d--c--z_0", "ct_00--d--z_0", "ct_00--d--e--w_0"):
        tree.add(name, {"0000_000": block(0, 0, 5, 5)})
    (tree.root / "images/ct_00--d--a--z_0.png").unlink()
    (tree.root / "images/ct_00--d--b--z_0.png").write_bytes(b"no image")
    (tree.root / "masks/ct_00--d--c--z_0--0000_000.png").unlink()
    records, rejects = tree.read()
    assert records == []
    assert rejects == {
        "images/ct_00--d--a--z_0.png": "unreadable image",
        "images/ct_00--d--b--z_0.png": "unreadable image",
        "images/ct_00--d--c--z_0.png": "no target",
        "masks/ct_00--d--c--z_0--0000_000.png": "unreadable mask",
        "images/ct_00--d--z_0.png": "unreadable name",
        "images/ct_00--d--e--w_0.png": "unreadable name",
    }


def test_small_targets_are_left_out_by_their_joined_area(tree: Tree) -> None:
    tree.classes = {"d": {"two_parts": 0, "dot": 1}}
    masks = {"0000_000": block(0, 0, 2, 3), "0000_001": block(5, 5, 7, 8), "0001_000": block(9, 9, 10, 11)}
    tree.add("ct_00--d--a--z_0", masks)
    (record,), rejects = tree.read(min_area=12)
    assert [target.category for target in record.targets] == ["two parts"]
    assert rejects == {"masks/ct_00--d--a--z_0--0001_000.png": "small target"}


def test_folders_are_never_listed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.classes = {"d": {"a": 0}}
    tree.add("ct_00--d--a--z_0", {"0000_000": block(0, 0, 5, 5)})
    tree.write()

    def refuse(*_: object) -> None:
        raise RuntimeError("a folder was listed")

    for name in ("os.listdir", "os.scandir"):
        monkeypatch.setattr(name, refuse)
    (found,) = read_images(tree.root, Index(tree.root).entries())
    assert found.record


def test_workers_give_the_same_records(tree: Tree) -> None:
    tree.classes = {"d": {"a": 0}}
    for slice_ in range(3):
        tree.add(f"ct_00--d--a--z_{slice_}", {"0000_000": block(slice_, 0, 9, 9)})
    alone = tree.read()
    assert tree.read(workers=2) == alone
    assert len(alone[0]) == 3


def test_datasets_can_be_chosen(tree: Tree) -> None:
    tree.classes = {"BTCV": {"a": 0}, "KiTS": {"a": 0}}
    for dataset in tree.classes:
        tree.add(f"ct_00--{dataset}--a--z_0", {"0000_000": block(0, 0, 5, 5)})
    index = Index(tree.write(), datasets=["KiTS"])
    assert index.cases() == {"KiTS/a"}
    assert [entry.name.dataset for entry in index.entries() if isinstance(entry, Entry)] == ["KiTS"]
    with pytest.raises(InputError, match=r"expected the data set 'Kits'.*Did you mean 'KiTS'"):
        Index(tree.root, datasets=["Kits"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX_FILE, None, "No such file.*give the unzipped folder SAMed2Dv1"),
        (CLASSES_FILE, None, "No such file"),
        (INDEX_FILE, "{", "found no valid JSON"),
        (INDEX_FILE, "[]", r"found '\['"),
        (CLASSES_FILE, "[]", r"found the file: \[\]"),
        (INDEX_FILE, '{"images/a.png": "masks/a.png"}', r"expected .*images/<stem>.png.* found 'images/a.png'"),
        (INDEX_FILE, '{"images/../../a.png": []}', r"images/\.\./\.\./a.png"),
        (INDEX_FILE, '{"images/a.png": ["masks/b/../a.png"]}', "found 'images/a.png'"),
        (CLASSES_FILE, '{"d": {"a": "0"}}', r"expected .*<class id>.* found 'd' > 'a': '0'"),
        (CLASSES_FILE, '{"d": ["a"]}', "found 'd'"),
    ],
)
def test_json_of_another_layout_is_refused(tree: Tree, name: str, content: str | None, message: str) -> None:
    path = tree.write() / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Index(tree.root).cases()
    assert all(problem.startswith(f"{path}: ") and "expected {" in problem for problem in caught.value.problems)


def test_of_many_equal_problems_a_few_are_shown(tree: Tree) -> None:
    tree.index = {f"images/{number}.jpg": [] for number in range(50)}
    with pytest.raises(InputError) as caught:
        Index(tree.write()).cases()
    assert len(caught.value.problems) == 6
    assert "45 more entries" in caught.value.problems[-1]


def test_the_split_is_exact_and_follows_the_seed() -> None:
    cases = [f"BTCV/ABD_{number:03d}" for number in range(21)]
    splits = split_cases(cases)
    assert [list(splits.values()).count(split) for split in ("train", "val", "test")] == [17, 2, 2]
    assert split_cases(reversed(cases)) == splits
    assert split_cases(cases, seed=1) != splits
    # Fixed for good: a new release must not move a case from test to train.
    assert sorted(case for case, split in splits.items() if split == "test") == ["BTCV/ABD_011", "BTCV/ABD_014"]


@given(st.sets(st.sampled_from([f"{source}/{n}" for source in "ab" for n in range(30)])), st.integers(0, 9))
def test_every_data_set_of_three_cases_is_in_all_splits(cases: set[str], seed: int) -> None:
    splits = split_cases(cases, seed=seed, val=0.3, test=0.3)
    assert splits.keys() == cases
    for source in "ab":
        own = {case: split for case, split in splits.items() if case.startswith(source)}
        assert set(own.values()) == ({"train", "val", "test"} if len(own) >= 3 else {"train"} if own else set())
        assert split_cases(own, seed=seed, val=0.3, test=0.3) == own  # the other data set moves nothing


def test_a_share_of_nothing_gives_nothing() -> None:
    cases = [f"d/{number}" for number in range(10)]
    assert set(split_cases(cases, val=0).values()) == {"train", "test"}
    assert set(split_cases(cases, val=0, test=0).values()) == {"train"}


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5)])
def test_wrong_shares_are_refused(val: float, test: float) -> None:
    with pytest.raises(InputError, match=rf"val={val}, test={test}: expected shares >= 0 with a sum below 1"):
        split_cases(["d/a"], val=val, test=test)


def test_prepare_writes_manifests_that_open_with_the_root(tree: Tree, tmp_path: Path) -> None:
    tree.classes = {"d": {"organ": 0, "dot": 1}}
    for case in range(5):
        for slice_ in range(2):
            masks = {"0000_000": block(0, 0, 5 + case, 5), "0001_000": block(1, 1, 2, 2)}
            tree.add(f"ct_00--d--c{case}--z_{slice_}", masks)
    prepared = prepare(tree.write(), tmp_path / "out", min_area=2)
    assert prepared.images == {"train": 6, "val": 2, "test": 2}
    assert prepared.targets == {"train": 6, "val": 2, "test": 2}
    assert prepared.cases == {"train": 3, "val": 1, "test": 1}
    assert prepared.rejects == {"small target": 10}
    manifests = {split: Manifest(tmp_path / f"out/{split}.jsonl", root=tree.root) for split in prepared.images}
    cases = [{record.case for record in manifest} for manifest in manifests.values()]
    assert sum(map(len, cases)) == len(set.union(*cases)) == 5  # no case is in two splits
    for manifest in manifests.values():
        manifest.check_files()
    lines = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    assert len(lines) == 10
    assert json.loads(lines[0]).keys() == {"file", "reason", "detail"}


def test_prepare_says_when_nothing_can_be_used(tree: Tree, tmp_path: Path) -> None:
    tree.classes = {"d": {"organ": 0}}
    tree.index = {"images/ct_00--d--a--z_0.png": ["masks/ct_00--d--a--z_0--0000_000.png"]}
    with pytest.raises(InputError, match=r"found none that can be used; .*rejects.jsonl says why for each of 1 files"):
        prepare(tree.write(), tmp_path / "out")


def test_names_alone_give_the_same_targets_and_masks(tree: Tree, tmp_path: Path) -> None:
    """What pixels give at once, names give when a mask is used; Brain_PTM is left out."""
    tree.classes = {"d": {"union_all": 0, "organ": 1, "dots": 2}, "ichallenge_adam_task2": {"disc": 0}}
    tree.classes["Brain_PTM"] = {"tract": 0}
    dots = {"0002_000": block(0, 0, 2, 2), "0002_001": block(9, 9, 12, 12)}
    for case in range(3):
        masks = {"0001_000": block(case, 1, 9, 9), "0000_000": block(0, 0, 9, 9)}
        tree.add(f"ct_00--d--c{case}--z_0", masks | dots)
        stem = f"fundus_photography--ichallenge_adam_task2--c{case}--2d_none"
        tree.add(stem, {"0000_000": ~block(10, 5, 15, 12 + case)})
    tree.add("mr_t1--Brain_PTM--a--z_1", {"0000_000": block(0, 0, 5, 5)})
    prepare(tree.write(), tmp_path / "pixels")
    named = prepare(tree.root, tmp_path / "names", index_only=True)
    assert named.rejects == {"unchecked image": 1}
    for split in ("train", "val", "test"):
        pixels = Manifest(tmp_path / f"pixels/{split}.jsonl", root=tree.root)
        names = Manifest(tmp_path / f"names/{split}.jsonl", root=tree.root)
        names.check_files()
        for slow in (record for record in pixels if record.source != "Brain_PTM"):
            (quick,) = (record for record in names if record.id == slow.id)
            assert [(t.id, t.category) for t in quick.targets] == [(t.id, t.category) for t in slow.targets]
            for one, other in zip(quick.targets, slow.targets, strict=True):
                assert isinstance(one.mask, MaskFiles) == isinstance(other.mask, Rle)
                assert (names.mask(quick, one) == pixels.mask(slow, other)).all()


def test_an_area_needs_pixels(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"min_area=3: .* index_only"):
        prepare(tree.write(), tmp_path / "out", min_area=3, index_only=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_subset_is_filled_with_what_is_usable(tree: Tree, tmp_path: Path, workers: int) -> None:
    """Of twelve organs four are too small: a cap of five is met by others, whatever the order of the index."""
    tree.classes = {"d": {"organ": 0, "other": 1}}
    for case in range(12):
        masks = {"0000_000": block(0, 0, 5, 5 if case % 3 else 1), "0001_000": block(9, 9, 14, 14)}
        tree.add(f"ct_00--d--c{case}--z_0", masks)
    subset = Subset(cap=5, caps={"other": 2})

    def taken(out: Path) -> set[tuple[str, str]]:
        prepare(tree.write(), out, min_area=10, subset=subset, workers=workers, val=0, test=0)
        return {
            (record.id, target.id) for record in Manifest(out / "train.jsonl", tree.root) for target in record.targets
        }

    found = taken(tmp_path / "a")
    rejects = (tmp_path / "a/rejects.jsonl").read_bytes()
    assert [sum(target == kind for _, target in found) for kind in ("0000", "0001")] == [5, 2]
    assert all(int(record.split("--")[2][1:]) % 3 for record, target in found if target == "0000")
    tree.index = dict(reversed(tree.index.items()))
    assert taken(tmp_path / "b") == found
    assert sorted((tmp_path / "b/rejects.jsonl").read_bytes().splitlines()) == sorted(rejects.splitlines())


def test_a_subset_of_what_is_not_there_is_told(tree: Tree, tmp_path: Path) -> None:
    tree.classes = {"d": {"left_kidney": 0}}
    tree.add("ct_00--d--a--z_0", {"0000_000": block(0, 0, 5, 5)})
    with pytest.raises(InputError, match=r"--subset kidney left=3: .*Did you mean 'left kidney'"):
        prepare(tree.write(), tmp_path / "out", subset=Subset(caps={"kidney left": 3}))
    assert not (tmp_path / "out").exists()
