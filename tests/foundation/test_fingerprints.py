"""Names that are there twice, found by their fingerprints."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from medisee.foundation.files import Fingerprints, fingerprint


@given(st.lists(st.sampled_from(["a", "b", "ab", "", "é", "\ud800", "images/x.png"])))
def test_what_is_added_twice_is_found(names: list[str]) -> None:
    seen = Fingerprints()
    for name in names:
        seen.add(name)
    assert seen.repeated() == {fingerprint(name) for name, count in Counter(names).items() if count > 1}


def test_a_fingerprint_is_fixed() -> None:
    assert fingerprint("a") == fingerprint("a") != fingerprint("b")
    assert 0 <= fingerprint("a") < 2**64
