from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from medisee.foundation.errors import InputError
from medisee.foundation.yaml_files import parse_yaml, read_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@given(VALUES)
def test_what_it_takes_says_what_was_written(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value
    assert parse_yaml(yaml.safe_dump(value).encode("utf-8")) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-4", {"a": "1e-4"}),
        ("a: 1.0e-4", {"a": 1e-4}),
        ("a: 2026-12-01", {"a": "2026-12-01"}),
        ("a: '010'", {"a": "010"}),
        ("a: !!str 010", {"a": "010"}),
        ("a: [0, -0, 0.5, 0x1F, 1_000]", {"a": [0, 0, 0.5, 31, 1000]}),
        ("a: http://x:80", {"a": "http://x:80"}),
        ("base: &b {x: 1, z: 0}\nown: {<<: *b, x: 2}", {"base": {"x": 1, "z": 0}, "own": {"x": 2, "z": 0}}),
        ("a: &a [1]\nb: [*a, *a]", {"a": [1], "b": [[1], [1]]}),
        ("\ufeffa: Ω", {"a": "Ω"}),
        ("", None),
    ],
)
def test_legitimate_values(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert parse_yaml(text.encode("utf-8")) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is already on line 1"),
        ("a: {x: 1,\n x: 1}", "line 2: the key 'x' is already on line 1"),
        ("no: 1\n'no': 2", "line 2: the key 'no'"),
        ("b: &b {x: 1}\nc: {<<: *b, <<: *b}", "line 2: the key '<<'"),
        ("[" * 100_000, "line 1: nested more than 50"),
        ("- " * 300 + "a", "nested more than 50"),
        ("{a: " * 300, "nested more than 50"),
        (BOMB, "line 5: aliases repeat more than 10000 values"),
        ("a: &a [*a]", "*a is inside what it names"),
        ("a: *b", "undefined alias 'b'"),
        ("a: &a 1\nb: &a 2", "line 2: found duplicate anchor"),
        ("a: !!set {x}", "the tag !!set is not taken"),
        ("a: !!int x", "the tag !!int is not taken"),
        ("a: !!python/name:os.system x", "!!python/name:os.system is not taken"),
        ('a: "\\udcff"', "is not a character"),
        ("a: \udcff", "special characters are not allowed"),
        (b"a: \xff", "utf-8"),
        ("a: \x00", "special characters are not allowed"),
        ("\na: 010", "line 2: 010 can be read in two ways"),
        ("a: 1:30", "1:30 can be read in two ways"),
        ("a: 1\n---\nb: 1", "line 2: expected a single document"),
        ("a: [1", "line 1: while parsing a flow sequence"),
        ("[1]: 2\n", "unhashable key"),
        ("a: " + "9" * 5000, "4300 digits"),
    ],
)
def test_what_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    with pytest.raises(InputError, match=r"prices\.yaml: cannot be read \(No such file.*\); expected a table"):
        read_yaml(path, "a table")
    path.write_text("a: 1\na: 2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"prices\.yaml: not valid YAML \(line 2: the key 'a'.*expected a table"):
        read_yaml(path, "a table")
    path.write_text("a: 1\n", encoding="utf-8")
    assert read_yaml(path, "a table") == {"a": 1}
