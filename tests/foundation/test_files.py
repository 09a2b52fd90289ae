"""Files hashed once while they stay the same, and repeated names found by their fingerprints."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medisee.foundation import files
from medisee.foundation.files import Fingerprints, cached_sha256, fingerprint, sha256


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
