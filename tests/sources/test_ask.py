"""Manifests get questions of a bank: wordings and cases stay in their splits, pictures and masks agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medisee.foundation.errors import InputError
from medisee.foundation.files import sha256
from medisee.records.manifest import Manifest
from medisee.records.masks import encode_mask, mask_box
from medisee.records.records import Record, Target, write_records
from medisee.sources.ask import COPY_SIDE, prepare
from medisee.sources.query_bank import BANKS, load_bank, split_bank

BANK = BANKS["abdomen"]
CASES = {"train": ("a", "b", "c"), "val": ("d",), "test": ("e", "f")}
HEIGHT, WIDTH = 300, 360


def _record(root: Path, case: str) -> Record:
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    liver = (rows > 60) & (rows < 200) & (columns > 30) & (columns < 150)
    spleen = (rows - 150) ** 2 + (columns - 280) ** 2 < 40**2
    tumour = (rows > 90) & (rows < 120) & (columns > 60) & (columns < 100)
    noise = np.random.default_rng(ord(case)).integers(0, 30, (HEIGHT, WIDTH))
    Image.fromarray((noise + 180 * liver + 90 * spleen).astype(np.uint8)).save(root / f"{case}.png")
    masks = {"liver": liver, "kidney right": spleen, "polyp": tumour}
    targets = tuple(
        Target(id=str(number), category=name, mask=encode_mask(mask), box=mask_box(mask))
        for number, (name, mask) in enumerate(masks.items())
    )
    return Record(id=case, image=f"{case}.png", modality="ct", source="s", case=f"s/{case}", targets=targets, plane="z")


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Manifests without questions, with a category that the bank lacks and one that it calls otherwise."""
    folder = tmp_path / "given"
    folder.mkdir()
    for split, cases in CASES.items():
        write_records(folder / f"{split}.jsonl", [_record(folder, case) for case in cases])
    return folder


@pytest.fixture
def out(given: Path, tmp_path: Path) -> Path:
    prepare(given, tmp_path / "out", bank=BANK, copies=2)
    return tmp_path / "out"


def _records(folder: Path, name: str) -> list[Record]:
    return list(Manifest(folder / f"{name}.jsonl"))


def _questions(records: list[Record]) -> list[str]:
    return [qa.question for record in records for target in record.targets for qa in target.qa]


def _wordings(split: str) -> set[str]:
    pools = split_bank(load_bank(BANK, None), 0)
    return {query for pool in pools[split].values() for cell in pool.queries.values() for query in cell}  # type: ignore[index]


def _bytes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_split_asks_in_wordings_of_its_own(out: Path) -> None:
    manifests = {"train_reasoning": "train", "val": "val", "test": "test", "test_seen": "train"}
    for name, split in manifests.items():
        asked, own = _questions(_records(out, name)), _wordings(split)
        assert asked
        assert all(any(question.startswith(wording) for wording in own) for question in asked), name
    assert not _questions(_records(out, "train_class"))
    assert all(len(target.qa) == 8 for record in _records(out, "train_reasoning") for target in record.targets)
    assert all(len(target.qa) == 2 for record in _records(out, "test") for target in record.targets)


def test_cases_stay_in_their_split(out: Path) -> None:
    for split, cases in CASES.items():
        name = "train_class" if split == "train" else split
        assert {record.case for record in _records(out, name)} == {f"s/{case}" for case in cases}
    assert [r.image for r in _records(out, "test_seen")] == [r.image for r in _records(out, "test")]
    assert not {r.id for r in _records(out, "test_seen")} & {r.id for r in _records(out, "test")}


def test_categories_take_the_bank_s_names_and_unknown_ones_are_left_out_and_told(given: Path, tmp_path: Path) -> None:
    done = prepare(given, tmp_path / "out", bank=BANK, copies=0)
    assert done.unknown == {"polyp": 6}
    assert done.images == {"train_class": 3, "train_reasoning": 3, "val": 1, "test": 2, "test_seen": 2}
    found = {target.category for record in _records(tmp_path / "out", "test") for target in record.targets}
    assert found == {"liver", "right kidney"}
    categories = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert categories["right kidney"][:2] == ["right kidney", "kidney right"]


def test_pictures_and_masks_agree(given: Path, out: Path) -> None:
    for name in ("train_class", "val", "test"):
        manifest = Manifest(out / f"{name}.jsonl")
        manifest.check_files()
        for record in manifest:
            pixels = np.asarray(Image.open(manifest.image_path(record)))
            assert pixels.ndim == 2
            assert max(pixels.shape) == (COPY_SIDE if "_a" in record.id else WIDTH)
            for target in record.targets:
                mask = manifest.mask(record, target)
                assert target.box == mask_box(mask)
                # Both organs are brighter than what surrounds them, warped or not.
                assert pixels[mask].mean() > pixels[~mask].mean() + 15, (record.id, target.category)
    original = Manifest(given / "test.jsonl")
    kept = Manifest(out / "test.jsonl")
    assert np.array_equal(kept.mask(kept[0], kept[0].targets[0]), original.mask(original[0], original[0].targets[0]))


def test_only_training_has_copies_that_differ(out: Path) -> None:
    names = [record.id for record in _records(out, "train_class")]
    assert sorted(names) == ["a", "a_a1", "a_a2", "b", "b_a1", "b_a2", "c", "c_a1", "c_a2"]
    assert not [r.id for name in ("val", "test") for r in _records(out, name) if "_a" in r.id]
    pictures = {path.name: sha256(path) for path in (out / "images").iterdir()}
    assert len(set(pictures.values())) == len(pictures)


def test_of_overlapping_targets_a_copy_keeps_the_smaller_whole(given: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank.yaml"
    bank.write_text(BANK.read_text(encoding="utf-8").replace("  gallbladder:", "  polyp:"), encoding="utf-8")
    prepare(given, tmp_path / "out", bank=bank, copies=1)
    manifest = Manifest(tmp_path / "out" / "train_class.jsonl")
    copy = next(record for record in manifest if record.id == "a_a1")
    areas = {target.category: int(manifest.mask(copy, target).sum()) for target in copy.targets}
    assert areas["polyp"] > 0.6 * 29 * 39 * (COPY_SIDE / WIDTH) ** 2
    assert areas["liver"] > 5 * areas["polyp"]


def test_two_runs_give_the_same_bytes_and_another_seed_others(given: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(given, tmp_path / name, bank=BANK, copies=1, seed=seed)
    first, again, other = (_bytes(tmp_path / name) for name in "abc")
    assert first == again
    assert first["train_reasoning.jsonl"] != other["train_reasoning.jsonl"]
    assert first["images/train_000000_a1.png"] != other["images/train_000000_a1.png"]


def test_val_may_be_empty(given: Path, tmp_path: Path) -> None:
    (given / "val.jsonl").write_text("")
    assert prepare(given, tmp_path / "out", bank=BANK, copies=0).images["val"] == 0


def test_a_case_in_two_splits_is_refused(given: Path, tmp_path: Path) -> None:
    records = list(Manifest(given / "test.jsonl"))
    write_records(given / "test.jsonl", [replace(records[0], case="s/a"), records[1]])
    with pytest.raises(InputError, match=r"test\.jsonl: case 's/a' is also in train\.jsonl"):
        prepare(given, tmp_path / "out", bank=BANK)
    assert not (tmp_path / "out").exists()


def test_colour_pictures_are_augmented_in_colour(given: Path, tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(given / "a.png"))
    Image.fromarray(np.dstack([pixels, pixels // 2, pixels // 4])).save(given / "a.png")
    prepare(given, tmp_path / "out", bank=BANK, copies=2)
    manifest = Manifest(tmp_path / "out" / "train_class.jsonl")
    copies = [record for record in manifest if record.case == "s/a" and "_a" in record.id]
    assert len(copies) == 2
    for record in copies:
        shown = np.asarray(Image.open(manifest.image_path(record))).astype(int)
        liver = manifest.mask(record, next(target for target in record.targets if target.category == "liver"))
        assert shown.shape == (*liver.shape, 3)
        red, green, blue = shown[liver].mean(axis=0)
        assert red > 1.3 * green > 1.3 * 1.2 * blue, "the channels keep their order"
        assert red > 2 * shown[~liver, 0].mean()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda given: (given / "test.jsonl").unlink(), "test.jsonl: expected a manifest"),
        (lambda given: (given / "a.png").unlink(), "a.png: expected an image file, found none"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    given: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(given)
    with pytest.raises(InputError) as error:
        prepare(given, tmp_path / "out", bank=BANK, copies=1)
    assert said in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_wrong_numbers_a_foreign_folder_and_a_foreign_bank(given: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        prepare(given, given, bank=BANK, copies=-1, train_questions=0)
    assert len(error.value.problems) == 3
    with pytest.raises(InputError, match="no target in train and test"):
        prepare(given, tmp_path / "out", bank=BANKS["brain"])
