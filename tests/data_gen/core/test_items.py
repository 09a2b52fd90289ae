"""Drawing targets: one per image, balanced, the same every time, with boxes as fractions of the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_gen.core.items import items_from_manifest, length_of, perspective_of
from medisee.foundation.errors import InputError
from medisee.foundation.files import sha256
from medisee.records.manifest import Manifest
from medisee.records.masks import Rle
from medisee.records.records import Record, Target, write_records


def test_boxes_are_fractions_and_masks_are_unchanged(tiny_manifest: Path) -> None:
    items = list(items_from_manifest(Manifest(tiny_manifest), 0))
    assert len(items) == 4
    for item, record in zip(items, Manifest(tiny_manifest), strict=True):
        target = next(target for target in record.targets if target.id == item.target)
        assert item.id == f"{record.id}/{target.id}" and item.category == target.category
        assert item.mask == target.mask and item.image == record.image
        assert item.image_sha256 == sha256(tiny_manifest.parent / item.image)
        is_file = isinstance(item.mask, str)
        assert item.mask_sha256 == (sha256(tiny_manifest.parent / str(item.mask)) if is_file else "")
        assert {entity.category for entity in item.entities} == {"liver", "left kidney"}
        assert item.box in {entity.box for entity in item.entities if entity.category == item.category}
        assert all(0 <= side <= 1 for entity in item.entities for side in entity.box)
        assert item.box[0] < item.box[2] and item.box[1] < item.box[3]
    liver = (
        next(item for item in items if item.record == "r1" and item.category == "liver")
        if any(item.record == "r1" and item.category == "liver" for item in items)
        else None
    )
    if liver:
        assert liver.box == pytest.approx((4 / 40, 4 / 64, 20 / 40, 32 / 64))


def test_objects_of_a_case_are_drawn_once_while_others_are_left(records: Callable[[int], Path]) -> None:
    items = list(items_from_manifest(Manifest(records(20)), 3))
    drawn = Counter((item.case, item.category) for item in items)
    assert set(drawn.values()) == {1}, "two images of a case hold two objects: each is drawn once"
    assert set(Counter(item.category for item in items).values()) == {10}


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000))
def test_the_same_seed_draws_the_same(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "many.jsonl"
    if not path.exists():
        mask = Rle((2, 2), "112")
        targets = tuple(Target(id=f"t{n}", category=f"organ {n % 3}", mask=mask) for n in range(4))
        from PIL import Image

        Image.new("L", (2, 2)).save(tmp_path / "i.png")
        write_records(
            path,
            (
                Record(id=f"r{n}", image="i.png", modality="ct", source="s", case=f"c{n}", targets=targets)
                for n in range(9)
            ),
        )
    first, second = (list(items_from_manifest(Manifest(path), seed)) for _ in range(2))
    assert first == second
    counts = Counter(item.category for item in first)
    assert counts["organ 0"] == 0, "an image holds it twice, so a question about one of them is ambiguous"
    assert abs(counts["organ 1"] - counts["organ 2"]) <= 1


def test_records_without_targets_are_skipped(tmp_path: Path) -> None:
    write_records(
        tmp_path / "r.jsonl", [Record(id="r", image="i.png", modality="ct", source="s", case="c", targets=())]
    )
    assert list(items_from_manifest(Manifest(tmp_path / "r.jsonl"), 0)) == []


def test_all_wrong_masks_of_a_record_are_named(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (2, 2)).save(tmp_path / "i.png")
    targets = (
        Target(id="a", category="liver", mask="gone.png"),
        Target(id="b", category="spleen", mask=Rle((3, 3), "9")),
    )
    write_records(
        tmp_path / "r.jsonl", [Record(id="r", image="i.png", modality="ct", source="s", case="c", targets=targets)]
    )
    with pytest.raises(InputError) as caught:
        list(items_from_manifest(Manifest(tmp_path / "r.jsonl"), 0))
    assert len(caught.value.problems) == 2
    assert "gone.png" in caught.value.problems[0] and "'b'" in caught.value.problems[1]


def test_cells_have_a_perspective_and_a_length() -> None:
    assert perspective_of("location-short") == "location"
    assert length_of("location-short") == "short"
