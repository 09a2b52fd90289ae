"""Manifests that open by their kept offsets: at once, and never for a file that has changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from medisee.foundation.errors import InputError
from medisee.records import manifest as manifests
from medisee.records import offsets
from medisee.records.jsonl import Line
from medisee.records.manifest import Manifest
from medisee.records.offsets import file_stamp, keep_offsets, kept_offsets
from medisee.records.records import Record, Target, write_records


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a manifest of 200 records that counts as large."""
    monkeypatch.setattr(offsets, "LARGE", 1000)
    return written(tmp_path / "r.jsonl", 200)


def written(path: Path, count: int) -> Path:
    target = Target(id="t", category="liver", mask="m.png")
    write_records(
        path,
        (
            Record(id=f"r{n}", image="a.png", modality="ct", source="demo", case="c", targets=(target,))
            for n in range(count)
        ),
    )
    return path


def sidecar(path: Path) -> Path:
    return path.with_name("r.offsets.safetensors")


def test_a_large_manifest_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.chmod(0o644)
    first = Manifest(path)
    assert sidecar(path).stat().st_mode == path.stat().st_mode

    def refuse(_: Path) -> Iterator[Line]:
        raise RuntimeError("the lines were read")

    monkeypatch.setattr(manifests, "read_lines", refuse)
    second = Manifest(path)
    assert len(second) == 200
    assert [second[n] for n in (0, 100, -1)] == [first[n] for n in (0, 100, -1)]


def test_of_a_small_manifest_nothing_is_kept(tmp_path: Path) -> None:
    assert len(Manifest(written(tmp_path / "r.jsonl", 200))) == 200
    assert [found.name for found in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_changed_manifest_is_checked_again(path: Path) -> None:
    Manifest(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"r5"', b'"r4"'))  # of the same size
    os.utime(path, ns=(0, 7))
    with pytest.raises(InputError, match="id 'r4' is also that of"):
        Manifest(path)
    path.write_bytes(content + content[: content.index(b"\n") + 1].replace(b'"r0"', b'"x"'))
    assert len(Manifest(path)) == 201 and len(Manifest(path)) == 201


@pytest.mark.parametrize(
    "found",
    [
        np.array([0.0, 10.0]),
        np.array([[0, 10]]),
        np.array([], dtype=np.int64),
        np.array([10, 10]),
        np.array([-1, 10]),
        np.array([0, 1 << 40]),
    ],
)
def test_offsets_that_cannot_be_are_not_believed(path: Path, found: np.ndarray) -> None:
    save_file({"offsets": found}, sidecar(path), metadata={"stamp": file_stamp(path)})
    assert kept_offsets(path) is None
    assert len(Manifest(path)) == 200
    assert kept_offsets(path) is not None


@pytest.mark.parametrize("damage", [b"", b"junk", b"\xff" * 100], ids=["nothing", "short", "long"])
def test_damaged_offsets_are_made_anew(path: Path, damage: bytes) -> None:
    Manifest(path)
    whole = sidecar(path).read_bytes()
    for content in (damage, whole[:100], whole[:-1]):
        sidecar(path).write_bytes(content)
        assert kept_offsets(path) is None
        assert len(Manifest(path)) == 200
        assert sidecar(path).read_bytes() == whole


def test_where_nothing_can_be_written_the_manifest_opens_all_the_same(path: Path) -> None:
    sidecar(path).mkdir()
    (sidecar(path) / "in the way").touch()
    assert len(Manifest(path)) == 200
    assert sorted(found.name for found in path.parent.iterdir()) == ["r.jsonl", sidecar(path).name]


def test_a_file_that_is_not_there_has_no_offsets(tmp_path: Path) -> None:
    assert kept_offsets(tmp_path / "none.jsonl") is None
    assert file_stamp(tmp_path / "none.jsonl") == ""
    with pytest.raises(InputError, match="cannot be read"):
        Manifest(tmp_path / "none.jsonl")


def test_offsets_written_with_the_lines_are_those_of_the_lines(path: Path) -> None:
    Manifest(path)
    read = kept_offsets(path)
    assert read is not None
    content = path.read_bytes()
    assert read[0] == 0 and all(content[offset - 1 : offset + 6] == b'\n{"id":' for offset in read[1:])
    keep_offsets(path, read, "another state")
    assert kept_offsets(path) is None
