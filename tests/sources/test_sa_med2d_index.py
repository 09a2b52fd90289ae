"""The index of SA-Med2D-20M as a stream: right names, and wrong files told with file, place and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medisee.foundation.errors import InputError
from medisee.sources.sa_med2d_index import CLASSES_FILE, INDEX_FILE, Entry, Index, Reject

CLASSES = {"d": {"union_all": 0, "left_kidney": 1, "liver": 2, "twice": 3, "again": 3}}
STEM = "ct_00--d--a--z_1"
GOOD = {f"images/ct_00--d--{case}--z_1.png": [f"masks/ct_00--d--{case}--z_1--0001_000.png"] for case in "abcdef"}


def index(folder: Path, content: str | bytes | dict[str, Any]) -> Index:
    data = json.dumps(content) if isinstance(content, dict) else content
    (folder / INDEX_FILE).write_bytes(data.encode() if isinstance(data, str) else data)
    (folder / CLASSES_FILE).write_text(json.dumps(CLASSES))
    return Index(folder)


def refused(folder: Path, content: str | bytes | dict[str, Any]) -> tuple[str, ...]:
    """Returns the problems of an index; each names the file."""
    with pytest.raises(InputError) as caught:
        list(index(folder, content).entries())
    problems = caught.value.problems
    assert all(problem.startswith(f"{folder / INDEX_FILE}: ") and "expected" in problem for problem in problems[:5])
    with pytest.raises(InputError) as again:
        Index(folder).cases()
    assert again.value.problems == problems
    return problems


def test_masks_are_grouped_by_class(tmp_path: Path) -> None:
    codes = ("0002_001", "0000_000", "0001_000", "0002_000", "0003_000", "0009_000", "0001", "0002_001")
    masks = [f"masks/{STEM}--{code}.png" for code in codes]
    (entry,) = index(tmp_path, {f"images/{STEM}.png": masks}).entries()
    assert isinstance(entry, Entry)
    assert (entry.stem, entry.name.case, entry.masks) == (STEM, "d/a", 8)
    assert [(one.target, one.category, one.files) for one in entry.classes] == [
        ("0001", "left kidney", (masks[2],)),
        ("0002", "liver", (masks[0], masks[3])),  # a file that is named twice counts once
    ]
    assert [(reject.file, reject.reason) for reject in entry.rejects] == [
        (masks[4], "unknown class"),
        (masks[5], "unknown class"),
        (masks[6], "unreadable name"),
    ]
    assert "2 names (twice, again) for class id 0003" in entry.rejects[0].detail


def test_images_of_another_name_are_left_out(tmp_path: Path) -> None:
    found = list(index(tmp_path, {"images/ct_00--d--z_1.png": [], **GOOD}).entries())
    assert isinstance(found[0], Reject) and found[0].reason == "unreadable name"
    assert Index(tmp_path).cases() == {f"d/{case}" for case in "abcdef"}
    assert Index(tmp_path).categories() == {"union all", "left kidney", "liver", "twice", "again"}


def test_an_index_without_images(tmp_path: Path) -> None:
    assert index(tmp_path, " {\n}\n").cases() == set()


@pytest.mark.parametrize(
    ("content", "place", "found"),
    [
        ("", "in the first entry", "no valid JSON"),
        ("{", "in the first entry", "no valid JSON"),
        ('{"images/a.png": [}', "in the first entry, and before byte 19", "no valid JSON"),
        (json.dumps(GOOD)[:-1], "after entry 5, 'images/ct_00--d--e--z_1.png', and before byte ", "no valid JSON"),
        (json.dumps(GOOD) + "x", "after entry 6", "no valid JSON"),
        (b'{"images/\xff.png": []}', "in the first entry", "no valid JSON"),
        ("[]", "byte 0", "'['"),
        ("  null", "byte 0", "'n'"),
        ({**GOOD, "images/x.png": {"a": []}}, "entry 7", "'images/x.png': {'a': []}; correct this entry"),
        ({**GOOD, "images/x.png": "masks/x.png"}, "entry 7", "'images/x.png': 'masks/x.png'"),
        ({"images/x.png": None}, "entry 1", "'images/x.png': None"),
        ({"images/x.png": [3]}, "entry 1", "'images/x.png': [3]"),
        ({"images/x.png": [["masks/x.png"]]}, "entry 1", "'images/x.png': [['masks/x.png']]"),
        ({"images/../x.png": []}, "entry 1", "'images/../x.png'"),
        ({"images/x.png": ["masks/../x.png"]}, "entry 1", "'images/x.png'"),
        ({"images/x\0.png": []}, "entry 1", r"'images/x\x00.png'"),
        ({"x.png": []}, "entry 1", "'x.png': []"),
    ],
)
def test_wrong_indices(tmp_path: Path, content: str | bytes | dict[str, Any], place: str, found: str) -> None:
    (problem,) = refused(tmp_path, content)
    assert f": {place}" in problem
    assert f"found {found}" in problem
    assert any(fix in problem for fix in ("unzip it again.", "correct this entry.", "use the data set's own file."))


def test_images_that_are_there_twice(tmp_path: Path) -> None:
    entries = [f'"{image}": {json.dumps(masks)}' for image, masks in GOOD.items()]
    (problem,) = refused(tmp_path, "{" + ", ".join([*entries, entries[1]]) + "}")
    assert "entry 7: 'images/ct_00--d--b--z_1.png' is also entry 2; expected each image once; join" in problem
    many = refused(tmp_path, "{" + ", ".join([*entries, *entries]) + "}")
    assert len(many) == 6 and "and 1 more images" in many[-1]
    both = refused(tmp_path, "{" + ", ".join([*entries, entries[0], '"images/x.png": 3, "images/y.png": [], "images']))
    assert ["entry 8: " in both[0], "after entry 8" in both[1], "is also entry 1" in both[2]] == [True] * 3


def test_what_is_right_is_yielded_before_an_error(tmp_path: Path) -> None:
    entries = index(tmp_path, json.dumps(GOOD)[:-1]).entries()
    for image in list(GOOD)[:-1]:  # the last one may go on
        found = next(entries)
        assert isinstance(found, Entry) and found.image == image
    with pytest.raises(InputError):
        next(entries)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(1, 590), st.binary(min_size=1, max_size=3))
def test_damage_is_told_or_harmless(tmp_path: Path, place: int, junk: bytes) -> None:
    """Bytes that are written over the index give an InputError, or entries of the right form: never another error."""
    data = bytearray(json.dumps(GOOD).encode())
    data[place : place + len(junk)] = junk
    try:
        for entry in index(tmp_path, bytes(data)).entries():
            name = entry.image if isinstance(entry, Entry) else entry.file
            assert name.startswith("images/") and "/" not in name.removeprefix("images/")
    except InputError as error:
        assert all(str(tmp_path / INDEX_FILE) in problem for problem in error.problems)
