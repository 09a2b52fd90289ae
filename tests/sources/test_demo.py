"""The written demo data set: splits do not leak, masks and boxes agree, and every run gives the same bytes."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medisee.foundation.errors import InputError
from medisee.foundation.files import sha256
from medisee.records.manifest import Manifest
from medisee.records.masks import mask_box
from medisee.records.records import Record, Split
from medisee.sources import demo as demo_module
from medisee.sources.brain import PLANES, STRUCTURES
from medisee.sources.demo import prepare_demo
from medisee.sources.query_bank import load_bank, split_bank

MANIFESTS = ("train_class", "train_reasoning", "val", "test", "test_seen")


def _records(demo: Path, name: str) -> list[Record]:
    return list(Manifest(demo / f"{name}.jsonl"))


def _index(record: Record) -> int:
    return int(record.id.split("_")[1])


def _questions(records: list[Record]) -> list[str]:
    return [qa.question for record in records for target in record.targets for qa in target.qa]


def _bytes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", MANIFESTS)
def test_masks_and_boxes_agree_with_the_images(demo: Path, name: str) -> None:
    manifest = Manifest(demo / f"{name}.jsonl")
    manifest.check_files()
    for record in manifest:
        assert record.targets
        for target in record.targets:
            mask = manifest.mask(record, target)
            assert mask.sum() >= 40
            assert target.box == mask_box(mask)


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_held_out_slices_are_more_than_3_mm_from_training(demo: Path, held_out: str) -> None:
    train, others = _records(demo, "train_reasoning"), _records(demo, held_out)
    for mine, other in product(train, others):
        assert mine.plane != other.plane or abs(_index(mine) - _index(other)) > 3
        assert mine.case != other.case
    assert {record.plane for record in others} == set(PLANES)


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_no_held_out_wording_is_in_training(demo: Path, held_out: Split) -> None:
    pools = split_bank(load_bank(), 0)[held_out].values()
    wordings = {query for pool in pools for queries in pool.queries.values() for query in queries}
    assert not [q for q in _questions(_records(demo, "train_reasoning")) if any(wording in q for wording in wordings)]
    asked = _questions(_records(demo, held_out))
    assert asked
    assert all(any(question.startswith(wording) for wording in wordings) for question in asked)


def test_seen_wordings_are_asked_about_the_pictures_of_test(demo: Path) -> None:
    seen, test = _records(demo, "test_seen"), _records(demo, "test")
    assert [record.image for record in seen] == [record.image for record in test]
    assert not {record.id for record in seen} & {record.id for record in test}
    training = {
        query
        for pool in split_bank(load_bank(), 0)["train"].values()
        for cell in pool.queries.values()
        for query in cell
    }
    assert all(any(question.startswith(wording) for wording in training) for question in _questions(seen))


def test_val_and_test_share_no_wording_and_no_image(demo: Path) -> None:
    val, test = _records(demo, "val"), _records(demo, "test")
    assert not {record.image for record in val} & {record.image for record in test}
    assert not {record.case for record in val} & {record.case for record in test}


def test_training_targets_have_eight_questions_and_held_out_two(demo: Path) -> None:
    assert all(len(target.qa) == 8 for record in _records(demo, "train_reasoning") for target in record.targets)
    held_out = [target.qa for record in _records(demo, "val") for target in record.targets]
    assert all([qa.length for qa in asked] == ["short", "long"] for asked in held_out)
    assert all({qa.perspective for qa in asked} == {"attribute", "location"} for asked in held_out)
    assert {asked[0].perspective for asked in held_out} == {"attribute", "location"}


def test_class_and_reasoning_manifests_show_the_same(demo: Path) -> None:
    plain, asked = _records(demo, "train_class"), _records(demo, "train_reasoning")
    assert not _questions(plain)
    assert [(r.id, [(t.id, t.mask) for t in r.targets]) for r in plain] == [
        (r.id, [(t.id, t.mask) for t in r.targets]) for r in asked
    ]


def test_only_training_slices_are_augmented(demo: Path) -> None:
    assert not [record.id for name in ("val", "test") for record in _records(demo, name) if "_a" in record.id[3:]]
    train = {record.id for record in _records(demo, "train_class")}
    copied = {name.removesuffix("_a1") for name in train if name.endswith("_a1")}
    assert copied == {name for name in train if not name.endswith("_a1")}


def test_images_are_grey_and_one_size_a_plane(demo: Path) -> None:
    sizes: dict[str, set] = {}
    for path in (demo / "images").iterdir():
        with Image.open(path) as image:
            assert image.mode == "L"
            sizes.setdefault(path.name.split("_")[0], set()).add(image.size)
    assert all(len(found) == 1 for found in sizes.values())
    assert len(set.union(*sizes.values())) == 3


def test_summary_counts_what_was_written(demo: Path) -> None:
    summary = json.loads((demo / "data.json").read_text(encoding="utf-8"))
    for split, name in (("train", "train_reasoning"), ("val", "val"), ("test", "test")):
        records, counts = _records(demo, name), summary["counts"][split]
        assert counts["images"] == len(records) == sum(counts["planes"].values())
        assert counts["targets"] == sum(len(r.targets) for r in records) == sum(counts["structures"].values())
        assert counts["questions"] == len(_questions(records))
    assert all(len(source["sha256"]) == 64 and source["licence"] for source in summary["sources"])
    assert "ONE averaged brain" in summary["note"]
    categories = json.loads((demo / "categories.json").read_text(encoding="utf-8"))
    assert list(categories) == list(STRUCTURES)
    assert all(names[0] == category for category, names in categories.items())


def test_two_runs_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_demo(tmp_path / name, copies=1, limit=1, seed=seed)
    first, again, other = (_bytes(tmp_path / name) for name in "abc")
    assert first == again
    assert first["train_reasoning.jsonl"] != other["train_reasoning.jsonl"]
    assert first["test.jsonl"] != other["test.jsonl"]


def test_a_slice_does_not_depend_on_the_others(demo: Path, tmp_path: Path) -> None:
    prepare_demo(tmp_path / "more", copies=2, limit=3)
    small, large = _bytes(demo / "images"), _bytes(tmp_path / "more" / "images")
    assert small.items() <= large.items()
    assert len(large) > len(small)


def test_an_earlier_set_is_replaced_and_anything_else_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    prepare_demo(out, copies=0, limit=2)
    before = len(_bytes(out))
    prepare_demo(out, copies=0, limit=1)
    assert len(_bytes(out)) < before
    # An export of data_gen has a data.json too.
    (tmp_path / "export").mkdir()
    (tmp_path / "export/data.json").write_text('{"author": "offline", "screening": {}}')
    with pytest.raises(InputError, match="not of an earlier demo data set"):
        prepare_demo(tmp_path / "export")
    assert (tmp_path / "export/data.json").is_file()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").touch()
    with pytest.raises(InputError, match="not of an earlier demo data set"):
        prepare_demo(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "text.tex").is_file()


def test_wrong_numbers_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        prepare_demo(tmp_path / "set", copies=-1, limit=0, min_area=0)
    assert len(error.value.problems) == 3


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(demo_module, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_demo(tmp_path / "set", copies=0, limit=1)
    assert not list(tmp_path.iterdir())


def test_augmented_masks_still_cover_their_structure(demo: Path) -> None:
    """In an augmented picture as in the original, fluid is darker than the nuclei beside it."""
    manifest = Manifest(demo / "train_class.jsonl")
    for record in manifest:
        pixels = np.asarray(Image.open(manifest.image_path(record)))
        mean = {target.id: pixels[manifest.mask(record, target)].mean() for target in record.targets}
        if {"lateral_ventricle", "putamen"} <= mean.keys():
            assert mean["lateral_ventricle"] + 15 < mean["putamen"], record.id
