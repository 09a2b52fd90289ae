from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medisee.foundation.errors import InputError
from medisee.foundation.json_files import parse_json, read_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES)
def test_what_it_takes_says_what_was_written(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8")) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN is not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is twice"),
        ('["\\udcff"]', "escape without its pair"),
        ('{"\\uD800": 1}', "escape without its pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        (b'"\xff"', "utf-8"),
        ("{", "Expecting"),
    ],
)
def test_refused_with_a_reason(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_a_pair_of_surrogate_escapes_is_a_character() -> None:
    assert parse_json('"\\ud83e\\udec0"') == "🫀"


@pytest.mark.parametrize(("content", "word"), [(None, "No such file"), (b"[1]", "no JSON object"), (b"{]", "not JSON")])
def test_a_file_is_named_with_what_it_should_be(tmp_path: Path, content: bytes | None, word: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json.*{word}.*expected a run's settings"):
        read_json(path, "a run's settings")
