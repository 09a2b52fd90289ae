"""Predictions that cannot be read or scored, and lists of questions that cannot be made."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rows import Make, Row, Workspace

from medisee.records.masks import encode_mask

_GOOD = {"record": "r0", "target": "a", "question": "Which organ makes bile?", "text": "Here.", "emitted": True}


def _scored(w: Workspace, predictions: Path) -> list[Any]:
    return ["--predictions", predictions, "--records", w.manifest, "--out", w.out]


def _lines(*lines: str) -> Make:
    return lambda w: _scored(w, w.text("p.jsonl", "\n".join(lines)))


def _changed(**changes: Any) -> Make:
    """A good prediction, and one with changed keys of the next line."""
    other = {**_GOOD, "question": "Which large organ lies at the upper left here?", **changes}
    return _lines(json.dumps(_GOOD), json.dumps(other))


def _list(*words: str) -> Make:
    return lambda w: ["--list-questions", "--records", w.manifest, *words]


ROWS = [
    Row("no such file", "eval", lambda w: _scored(w, w.folder / "none.jsonl"), ("none.jsonl", "cannot be read")),
    Row("a folder", "eval", lambda w: _scored(w, w.folder), ("cannot be read",)),
    Row("no prediction", "eval", _lines(), ("p.jsonl", "no prediction")),
    Row("a cut prediction", "eval", _lines(json.dumps(_GOOD)[:-5]), ("p.jsonl:1", "not JSON")),
    Row("a list of predictions", "eval", _lines(json.dumps([_GOOD])), ("p.jsonl:1", "object")),
    Row("deep prediction", "eval", _lines('{"scores": ' * 100_000), ("p.jsonl:1", "nested too deeply")),
    Row("prediction key twice", "eval", _lines('{"box": null, "box": null}'), ("p.jsonl:1", "'box' is twice")),
    Row("score twice", "eval", _lines('{"scores": {"p": 1, "p": 0}}'), ("p.jsonl:1", "'p' is twice")),
    Row("a score that is NaN", "eval", _changed(scores={"p": float("nan")}), ("p.jsonl:2", "NaN is not JSON")),
    Row("a score in words", "eval", _changed(scores={"p": "high"}), ("p.jsonl:2", "scores", "finite numbers")),
    Row("a list of scores", "eval", _changed(scores=[1, 2]), ("p.jsonl:2", "scores", "object")),
    Row("surrogate in a text", "eval", _changed(text="a\udcff"), ("p.jsonl:2", "without its pair")),
    Row("surrogate in a mode", "eval", _changed(mode="\ud800"), ("p.jsonl:2", "without its pair")),
    Row("emitted in words", "eval", _changed(emitted="yes"), ("p.jsonl:2", "emitted", "true or false")),
    Row("no text of a prediction", "eval", _changed(text=None), ("p.jsonl:2", "text is null")),
    Row("unknown key of a prediction", "eval", _changed(confidence=1), ("p.jsonl:2", "unknown key 'confidence'")),
    Row("crossed box", "eval", _changed(box=[37, 29, 16, 15]), ("p.jsonl:2", "COCO's [x, y, w, h]")),
    Row("box of a dictionary", "eval", _changed(box={"x": 1}), ("p.jsonl:2", "[x0, y0, x1, y1]")),
    Row(
        "all boxes in shares",
        "eval",
        _changed(box=[0.1, 0.1, 0.5, 0.5]),
        ("p.jsonl", "fit as shares", "convert them all"),
    ),
    Row("mask in words", "eval", _changed(mask="m.png"), ("p.jsonl:2", "mask")),
    Row(
        "mask of wrong counts",
        "eval",
        _changed(mask={"size": [48, 64], "counts": "00"}),
        ("p.jsonl:2", "counts cover 0"),
    ),
    Row(
        "mask of a huge size",
        "eval",
        _changed(mask={"size": [99999, 99999], "counts": "0"}),
        ("p.jsonl:2", "2^31 pixels"),
    ),
    Row(
        "mask turned",
        "eval",
        _changed(mask=asdict(encode_mask(np.zeros((64, 48), bool)))),
        ("p.jsonl", "[64, 48]", "[48, 64]"),
    ),
    Row("unknown record", "eval", _changed(record="r00"), ("p.jsonl", "'r00'", "Did you mean 'r0'?")),
    Row("unknown target", "eval", _changed(target="c"), ("p.jsonl", "'c'", "one of 'a', 'b'")),
    Row("unknown question", "eval", _changed(question="Why?"), ("p.jsonl", "'Why?'", "copy it exactly")),
    Row(
        "answered twice", "eval", _lines(json.dumps(_GOOD), json.dumps(_GOOD)), ("p.jsonl", "more than one prediction")
    ),
    Row("taken mode", "eval", _changed(mode="mean_mask"), ("p.jsonl", "'mean_mask'", "rename it")),
    Row("a blank mode", "eval", _changed(mode=" "), ("p.jsonl:2", "mode", "not empty")),
    Row("no folder for results", "eval", lambda w: _scored(w, w.text("p.jsonl", ""))[:-2], ("--out", "name a folder")),
    Row(
        "list and score",
        "eval",
        lambda w: ["--list-questions", *_scored(w, w.text("p.jsonl", ""))],
        ("--list-questions alone",),
    ),
    Row("list over a file", "eval", lambda w: _list("--out", str(w.manifest))(w), ("tiny.jsonl", "exists already")),
    Row("list into a folder", "eval", lambda w: _list("--out", str(w.folder))(w), ("exists already",)),
    Row("list no record", "eval", _list("--limit", "0"), ("--limit 0", "1 or more")),
    Row("list of a bad manifest", "eval", lambda w: (w.edit_record(id=3), _list()(w))[1], ("tiny.jsonl:1", "id is 3")),
    Row("query that is not Unicode", "ask", lambda w: w.ask("--query", "where\udcff"), ("where\\udcff", "not UTF-8")),
    Row("query of an image mark", "ask", lambda w: w.ask("--query", "<image>\n"), ("query 1", "no text")),
]
