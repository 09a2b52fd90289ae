"""Records and predictions: written, read back, and refused with the reason."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medisee.foundation.errors import InputError
from medisee.records.jsonl import Line, read_line
from medisee.records.masks import MaskFiles, encode_mask
from medisee.records.records import (
    QA,
    Prediction,
    Record,
    Target,
    Turn,
    read_predictions,
    write_predictions,
    write_records,
)

RLE = encode_mask(np.eye(3, 4, dtype=bool))
FILES = MaskFiles(("masks/a.png", "masks/b.png"))
INVERTED = MaskFiles(("masks/a.png",), inverted=True)
PREDICTION = {"record": "r", "target": "t", "question": "Where?", "text": "Here.", "emitted": True}
RECORD: dict[str, Any] = {
    "id": "r1",
    "image": "images/a.png",
    "modality": "ct",
    "source": "demo",
    "case": "c1",
    "targets": [
        {
            "id": "t1",
            "category": "liver",
            "mask": "masks/a.png",
            "box": [3, 4, 4, 5],
            "qa": [{"question": "Where?", "answer": "[SEG]", "perspective": "location", "length": "short"}],
        }
    ],
}

words = st.text(min_size=1).filter(str.strip)
coordinates = st.floats(0, 1000, allow_nan=False)
boxes = st.none() | st.builds(
    lambda x, y, w, h: (x, y, x + w, y + h), coordinates, coordinates, st.floats(1, 9), st.floats(1, 9)
)
turns = st.lists(st.builds(Turn, words, st.text()), max_size=2).map(tuple)
qas = st.builds(QA, words, st.text(), st.sampled_from(["attribute", "location", "class"]), st.just("long"), turns)
masks = words | st.sampled_from([RLE, FILES, INVERTED])
targets = st.builds(Target, id=words, category=words, mask=masks, box=boxes, qa=st.tuples(qas))
records = st.builds(
    Record,
    id=words,
    image=words,
    modality=words,
    source=words,
    case=words,
    targets=st.lists(targets, max_size=3, unique_by=lambda target: target.id).map(tuple),
    plane=st.none() | words,
)
predictions = st.builds(
    Prediction,
    record=words,
    target=words,
    question=words,
    mode=words,
    text=st.text(),
    emitted=st.booleans(),
    mask=st.none() | st.just(RLE),
    box=boxes,
    scores=st.dictionaries(st.text(), st.floats(-1e9, 1e9)),
)


def problems_of(change: dict[str, Any] | None = None, target: dict[str, Any] | None = None) -> str:
    """Reads the good record with some keys changed and returns what is wrong with it."""
    record = copy.deepcopy(RECORD)
    record.update(change or {})
    if target:
        record["targets"][0].update(target)
    problems: list[str] = []
    read_line(Record, Line("m.jsonl:7", 0, json.dumps(record).encode()), problems)
    return "\n".join(problems)


@given(st.lists(records, min_size=1, max_size=4))
def test_records_round_trip(tmp_path_factory: pytest.TempPathFactory, written: list[Record]) -> None:
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    write_records(path, written)
    problems: list[str] = []
    lines = path.read_bytes().split(b"\n")[:-1]
    assert [read_line(Record, Line("r", 0, line), problems) for line in lines] == written
    assert not problems


@given(st.lists(predictions, max_size=4))
def test_predictions_round_trip(tmp_path_factory: pytest.TempPathFactory, written: list[Prediction]) -> None:
    path = tmp_path_factory.mktemp("predictions") / "p.jsonl"
    write_predictions(path, written)
    assert read_predictions(path) == written


def test_a_query_without_history_is_written_as_before(tmp_path: Path) -> None:
    plain = QA("Where?", "[SEG]", "location", "short")
    told = replace(plain, history=(Turn("What is shown?", "A belly."),), author="offline")
    target = Target(id="t", category="liver", mask=RLE, qa=(plain, told))
    record = Record(id="r", image="a.png", modality="ct", source="s", case="c", targets=(target,))
    write_records(tmp_path / "r.jsonl", [record])
    qa = json.loads((tmp_path / "r.jsonl").read_text())["targets"][0]["qa"]
    assert list(qa[0]) == ["question", "answer", "perspective", "length"]
    assert qa[1]["history"] == [{"question": "What is shown?", "answer": "A belly."}]
    assert qa[1]["author"] == "offline"


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("so", 'targets[0].qa[0].history is "so"; expected a list'),
        ([{"question": "What?"}], "key 'targets[0].qa[0].history[0].answer' is missing"),
        ([{"question": " ", "answer": ""}], "targets[0].qa[0].history[0].question"),
        ([{"question": "What?", "answer": "", "who": "me"}], "unknown key 'targets[0].qa[0].history[0].who'"),
    ],
)
def test_a_wrong_history_is_refused(history: Any, message: str) -> None:
    qa = {**RECORD["targets"][0]["qa"][0], "history": history}
    assert message in problems_of(target={"qa": [qa]})


def test_a_users_predictions_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(PREDICTION) + "\r\n\n", encoding="utf-8-sig")
    (prediction,) = read_predictions(path)
    assert (prediction.mode, prediction.mask, prediction.box, prediction.scores) == ("generated", None, None, {})


def test_numpy_numbers_are_written(tmp_path: Path) -> None:
    scores = {"confidence": float(np.float32(0.5)), "pixels": np.int64(3)}
    odd = Prediction(record="r", target="t", question="q", text="é", emitted=False, scores=scores)  # pyright: ignore[reportArgumentType]
    write_predictions(tmp_path / "p.jsonl", [odd])
    assert read_predictions(tmp_path / "p.jsonl") == [odd]


@pytest.mark.parametrize("odd", [{"scores": {"x": float("nan")}}, {"text": "\ud800"}, {"question": "\udcff?"}])
def test_what_no_reader_takes_is_not_written_and_leaves_no_file(tmp_path: Path, odd: dict[str, Any]) -> None:
    prediction = Prediction(**{"record": "r", "target": "t", "question": "q", "text": "", "emitted": True, **odd})
    with pytest.raises(ValueError):
        write_predictions(tmp_path / "p.jsonl", [prediction])
    assert list(tmp_path.iterdir()) == []


def test_good_record_has_no_problem() -> None:
    assert problems_of() == ""
    assert problems_of({"plane": None}, {"box": None}) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imagee": "a"}, "m.jsonl:7: unknown key 'imagee'"),
        ({"imagee": "a"}, "Did you mean 'image'?"),
        ({"id": 3}, "m.jsonl:7: id is 3; expected a string; write it in double quotes"),
        ({"case": "  "}, 'm.jsonl:7: case is "  "; expected a text that is not empty'),
        ({"targets": None}, "m.jsonl:7: targets is null; expected a list"),
        ({"targets": [3]}, "m.jsonl:7: targets[0] is 3; expected an object"),
        ({"plane": 1}, "m.jsonl:7: plane is 1; expected a string"),
        ({"targets": RECORD["targets"] * 2}, "targets[1].id 't1' is also that of targets[0]; rename one"),
    ],
)
def test_bad_record_is_refused(change: dict[str, Any], message: str) -> None:
    assert message in problems_of(change)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"box": [4, 4, 4, 5]}, "targets[0].box is [4, 4, 4, 5]; expected [x0, y0, x1, y1] in pixels"),
        ({"box": [-1, 4, 4, 5]}, "0 <= x0 < x1"),
        ({"box": [1, 2, 3]}, "targets[0].box is [1, 2, 3]"),
        ({"box": [1, 2, 3, True]}, "targets[0].box is [1, 2, 3, true]"),
        ({"box": [1, 2, 3, 10**400]}, "targets[0].box is [1, 2, 3, 1000"),
        ({"box": "1 2 3 4"}, 'targets[0].box is "1 2 3 4"'),
        ({"mask": None}, "targets[0].mask is null; expected a string"),
        ({"mask": {"files": []}}, "targets[0].mask.files is []; expected a list of one path or more"),
        ({"mask": {"files": "a.png"}}, 'targets[0].mask.files is "a.png"; expected a list; write it in'),
        ({"mask": {"files": ["a.png", 3]}}, "targets[0].mask.files[1] is 3; expected a string"),
        ({"mask": {"files": ["a.png"], "inverted": 1}}, "targets[0].mask.inverted is 1; expected true or false"),
        ({"mask": {"files": ["a.png"], "size": [4, 4]}}, "unknown key 'targets[0].mask.size'"),
        ({"mask": {"size": [4, 4]}}, "key 'targets[0].mask.counts' is missing"),
        (
            {"mask": {"size": [4, 4], "counts": "0"}},
            'targets[0].mask is {"size": [4, 4], "counts": "0"}; RLE counts cover 0 pixels; expected 4 x 4 = 16',
        ),
        ({"mask": {"size": [4, 4, 4], "counts": "0"}}, "mask.size is [4, 4, 4]; expected a list of at most 2"),
        ({"mask": {"size": [4.5, 4], "counts": "0"}}, "targets[0].mask.size[0] is 4.5; expected a whole number"),
        ({"qa": [{"question": ""}]}, 'targets[0].qa[0].question is ""; expected a text that is not empty'),
        ({"qa": [{"question": ""}]}, "key 'targets[0].qa[0].answer' is missing"),
        ({"qa": [{"perspective": "clas"}]}, "expected 'attribute', 'location' or 'class'"),
        ({"qa": [{"length": "medium"}]}, "targets[0].qa[0].length is \"medium\"; expected 'short' or 'long'"),
    ],
)
def test_bad_target_is_refused(target: dict[str, Any], message: str) -> None:
    assert message in problems_of(target=target)


def test_bad_predictions_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [
        "{",
        json.dumps(PREDICTION),
        json.dumps({**PREDICTION, "emitted": "yes"}),
        json.dumps({**PREDICTION, "box": [5, 0, 1, 1]}),
        json.dumps({**PREDICTION, "scores": {"p": "high"}}),
        json.dumps({**PREDICTION, "scores": {"p": 1}}).replace("1}", "NaN}"),
        "[" * 100_000,
        "3",
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        read_predictions(path)
    problems = caught.value.problems
    assert [problem.split(":")[1] for problem in problems] == ["1", "3", "4", "5", "6", "7", "8"]
    expected = [
        "not JSON",
        'emitted is "yes"',
        "x0 <= x1",
        "finite numbers",
        "NaN is not JSON",
        "not JSON",
        "an object",
    ]
    assert all(text in problem for text, problem in zip(expected, problems, strict=True))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: cannot be read \(No such file"):
        read_predictions(tmp_path / "nowhere.jsonl")


@given(st.binary(max_size=80) | st.recursive(st.none() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_any_line_is_read_or_refused(content: bytes) -> None:
    problems: list[str] = []
    read_line(Record, Line("m:1", 0, content), problems)
    assert problems and all(problem.startswith("m:1: ") for problem in problems)


@given(st.dictionaries(st.sampled_from(list(RECORD)), st.none() | st.floats() | st.text() | st.lists(st.integers())))
def test_any_object_is_read_or_refused(content: dict[str, Any]) -> None:
    problems: list[str] = []
    read_line(Record, Line("m:1", 0, json.dumps({**content, "id": 1}).encode()), problems)
    assert problems
