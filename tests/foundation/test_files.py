"""Files hashed once while they stay the same, and repeated names found by their fingerprints."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medisee.foundation import files
from medisee.foundation.files import Fingerprints, cached_sha256, fingerprint, safe_name, sha256


def test_a_file_is_hashed_again_only_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(str(path)) or sha256(path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    assert cached_sha256(path) == cached_sha256("weights.pth") == hashlib.sha256(b"one").hexdigest()
    assert hashed == [str(path)]
    path.write_bytes(b"two")
    os.utime(path, ns=(2, 2))
    assert cached_sha256(path) == hashlib.sha256(b"two").hexdigest()
    path.write_bytes(b"three")
    os.utime(path, ns=(2, 2))
    assert cached_sha256(path) == hashlib.sha256(b"three").hexdigest()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        cached_sha256(path)


@given(st.lists(st.sampled_from(["a", "b", "ab", "", "é", "\ud800", "images/x.png"])))
def test_what_is_added_twice_is_found(names: list[str]) -> None:
    seen = Fingerprints()
    for name in names:
        seen.add(name)
    assert seen.repeated() == {fingerprint(name) for name, count in Counter(names).items() if count > 1}


def test_a_fingerprint_is_fixed() -> None:
    assert fingerprint("a") == fingerprint("a") != fingerprint("b")
    assert 0 <= fingerprint("a") < 2**64


def test_names_that_are_safe_stay() -> None:
    taken = {"run.json"}
    for name, expected in {
        "slice_012": "slice_012",
        "Leber (axial), 3": "Leber (axial), 3",
        "肝臓": "肝臓",
        "..": "image",
        "": "image-2",
        " .-.": "image-3",
        "../../etc/passwd": "_.._etc_passwd",
        "C:\\x": "C__x",
        "-rf": "rf",
        ".hidden": "hidden",
        "a\nb\0c\x1b": "a_b_c_",
        "SLICE_012": "SLICE_012-2",
        "u\u0308": "ü",
        "Ü": "Ü-2",
        "nul": "_nul",
        "com1.x": "_com1.x",
        "run.json": "run.json-2",
        "end. ": "end",
        "\udcff": "_",
    }.items():
        assert safe_name(name, taken) == expected, name
    assert safe_name("a/b ü", set(), only_ascii=True) == "a_b__"
    long = [safe_name("x" * 300 + end, taken) for end in "ab"]
    assert len({*long}) == 2 and all(len(name) == 163 and name.startswith("x" * 150 + "-") for name in long)


@settings(max_examples=200, derandomize=True)
@given(st.lists(st.one_of(st.text(), st.sampled_from(["..", "a", "A", "con", "é", "e\u0301", "x" * 400, "ß", "SS"]))))
@pytest.mark.parametrize("only_ascii", [True, False])
def test_every_name_becomes_a_file_of_its_own_inside_the_folder(only_ascii: bool, names: list[str]) -> None:
    with TemporaryDirectory() as temporary:
        folder, taken = Path(temporary) / "out", set[str]()
        folder.mkdir()
        made = [safe_name(name, taken, only_ascii=only_ascii) for name in names]
        for name in made:
            (folder / f".{name}.png.4194304.tmp").touch()  # the longest name that is written beside it
            assert (folder / f"{name}.png").resolve().parent == folder.resolve()
            (folder / f"{name}.png").open("x").close()
            assert name[0] not in ".- " and name[-1] not in ". "
            assert re.fullmatch(r"[\w.-]+", name, re.ASCII) or not only_ascii
        assert len({unicodedata.normalize("NFC", name.casefold()) for name in made}) == len(names)
        assert [path.name for path in Path(temporary).iterdir()] == ["out"]
