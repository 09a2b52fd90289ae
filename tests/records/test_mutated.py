"""Damaged manifests and predictions: what is read says what the file says, and all else is refused in a sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medisee.foundation.errors import InputError
from medisee.records.jsonl import Line, read_line
from medisee.records.manifest import Manifest
from medisee.records.records import Prediction, Record, read_predictions

FILES = 200


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def dropped(line: str, rng: random.Random) -> str:
    value = json.loads(line)
    *outer, key = rng.choice(list(places(value)))
    del at(value, tuple(outer))[key]
    return json.dumps(value)


def replaced(line: str, rng: random.Random) -> str:
    value = json.loads(line)
    *outer, key = rng.choice(list(places(value)))
    at(value, tuple(outer))[key] = rng.choice(
        [None, -1, 1e300, "", "x", [], {}, [[]], True, at(value, tuple(rng.choice(list(places(value)))))]
    )
    return json.dumps(value)


def doubled(line: str, rng: random.Random) -> str:
    """Writes a key of some object twice."""
    cut = rng.choice([place for place, letter in enumerate(line) if letter == "{"]) + 1
    key = line[cut:].split(":")[0]
    return f"{line[:cut]}{key}: null, {line[cut:]}"


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Flips bytes, cuts, or drops, replaces or doubles a field of one line."""
    kind = rng.choice(["flip", "cut", "field"])
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    lines = content.decode("utf-8").splitlines()
    place = rng.randrange(len(lines))
    lines[place] = rng.choice([dropped, replaced, doubled])(lines[place], rng)
    return "\n".join(lines).encode("utf-8")


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a key that is twice was read"
    return dict(pairs)


def plain(value: Any) -> Any:
    """Leaves out what means the same as nothing."""
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: plain(inner) for key, inner in value.items() if (key, inner) not in (("inverted", False), ("author", ""))
    }
    if "emitted" in kept:
        kept["mode"] = kept.get("mode") or "generated"
    return {key: inner for key, inner in kept.items() if inner is not None and inner != [] and inner != {}}


def same(read: Any, line: bytes | str) -> bool:
    written = json.loads(json.dumps(dataclasses.asdict(read)))
    return plain(written) == plain(json.loads(line, object_pairs_hook=unrepeated))


def read_all(path: Path, root: Path) -> list[Any]:
    manifest = Manifest(path, root)
    records = list(manifest)
    for record in records:
        try:
            masks = manifest.masks(record)
        except InputError as error:
            told(error, path)
        else:
            assert len(masks) == len(record.targets) and all(mask.any() for mask in masks)
    return records


def told(error: InputError, path: Path) -> None:
    assert error.problems and all(str(path) in problem and len(problem) < 900 for problem in error.problems)


def predictions_of(manifest: Path) -> bytes:
    lines = []
    for number, record in enumerate(Manifest(manifest)):
        for target in record.targets:
            mask = {"size": [3, 4], "counts": "<"} if number % 2 else None
            one = {
                "record": record.id,
                "target": target.id,
                "question": target.qa[0].question,
                "text": "It is é.",
                "mask": mask,
            }
            lines.append(
                json.dumps({**one, "emitted": True, "box": [1, 2, 3.5, 4], "scores": {"p": 0.5}, "mode": None})
            )
    return "\n".join(lines).encode("utf-8")


@pytest.mark.parametrize("kind", ["manifest", "predictions"])
def test_a_mutated_file_is_read_as_it_says_or_refused(kind: str, tiny_manifest: Path, tmp_path: Path) -> None:
    whole = tiny_manifest.read_bytes() if kind == "manifest" else predictions_of(tiny_manifest)
    read: Callable[[Path], list[Any]] = read_predictions
    if kind == "manifest":
        read = lambda path: read_all(path, tiny_manifest.parent)  # noqa: E731
    rng, taken = random.Random(f"mutated {kind}"), 0
    path = tmp_path / "m.jsonl"
    for _ in range(FILES):
        content = mutated(whole, rng)
        path.write_bytes(content)
        try:
            found = read(path)
        except InputError as error:
            told(error, path)
            continue
        taken += 1
        lines = [line for line in content.split(b"\n") if line.strip()]
        assert len(found) == len(lines)
        assert all(same(one, line) for one, line in zip(found, lines, strict=True))
    assert 0.02 * FILES < taken < 0.6 * FILES, "some mutations are harmless, most are not"


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
QUERY = {
    "question": "Where?",
    "answer": "[SEG]",
    "perspective": "location",
    "length": "short",
    "history": [{"question": "a", "answer": "b"}],
}
TARGET = {"id": "t", "category": "liver", "mask": {"files": ["a.png"]}, "box": [3, 4, 4, 5], "qa": [QUERY]}
RECORD = {"id": "r", "image": "a.png", "modality": "ct", "source": "s", "case": "c", "targets": [TARGET]}
PREDICTION = {
    "record": "r",
    "target": "t",
    "question": "q",
    "text": "",
    "emitted": True,
    "box": [0, 0, 1, 1],
    "scores": {"p": 1},
}


@given(st.sampled_from([(Record, RECORD), (Prediction, PREDICTION)]), st.data())
def test_any_json_says_what_it_says_or_is_refused_with_its_line(
    kind: tuple[type, dict[str, Any]], data: st.DataObject
) -> None:
    noun, good = kind
    value = copy.deepcopy(good)
    *outer, key = data.draw(st.sampled_from(list(places(value))))
    at(value, tuple(outer))[key] = data.draw(anything)
    line, problems = json.dumps(value), []
    read = read_line(noun, Line("m.jsonl:7", 0, line.encode("utf-8")), problems)
    if read is None:
        assert problems and all(problem.startswith("m.jsonl:7: ") for problem in problems)
    else:
        assert not problems and same(read, line)
