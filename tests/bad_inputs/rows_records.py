"""Manifests with wrong lines: every problem is named with its file and line, whichever command reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from rows import Make, Row, Workspace

DEEP = '{"id": ' + "[" * 100_000


def _lines(*lines: Any) -> Make:
    return lambda w: (w.write_records(lines), w.evaluate())[1]


def _raw(change: Callable[[str], str]) -> Make:
    """Changes the text of the first line."""
    return lambda w: (w.write_records([change(json.dumps(w.records()[0])), *w.records()[1:]]), w.evaluate())[1]


def _record(index: int = 0, **changes: Any) -> Make:
    return lambda w: (w.edit_record(index, **changes), w.evaluate())[1]


def _target(**changes: Any) -> Make:
    return lambda w: (w.edit_target(**changes), w.evaluate())[1]


def _qa(**changes: Any) -> Make:
    return lambda w: (w.edit_qa(**changes), w.evaluate())[1]


def _box(box: list[float]) -> Make:
    """A box of a target whose mask is [19, 13, 42, 36] of 64 x 48 pixels."""

    def make(w: Workspace) -> list[str]:
        mask = np.zeros((48, 64), np.uint8)
        mask[13:36, 19:42] = 255
        w.picture("data/0_liver.png", mask)
        w.edit_target(box=box)
        return w.evaluate()

    return make


def _engine(w: Workspace) -> list[Any]:
    w.edit_qa(question="\udcff")
    return ["plan", "--records", w.manifest, "--author", "offline"]


def _release(name: str, content: str) -> Make:
    return lambda w: (w.text(f"their/{name}", content), ["mlmr-sd", "--root", w.folder / "their", "--out", w.out])[1]


ROWS = [
    Row("not JSON", "eval", _lines("{"), ("tiny.jsonl:1", "not JSON")),
    Row("a number", "eval", _lines(3), ("tiny.jsonl:1", "object")),
    Row("null", "eval", _lines("null"), ("tiny.jsonl:1", "object")),
    Row("a list", "eval", _lines("[]"), ("tiny.jsonl:1", "object")),
    Row("a text", "eval", _lines('"r0"'), ("tiny.jsonl:1", "object")),
    Row("no line", "eval", _lines(), ("tiny.jsonl", "no record")),
    Row("blank lines", "eval", _lines("", " ", "\t"), ("tiny.jsonl", "no record")),
    Row("cut", "eval", _raw(lambda line: line[:-9]), ("tiny.jsonl:1", "not JSON")),
    Row("two on a line", "eval", _raw(lambda line: line + line), ("tiny.jsonl:1", "not JSON", "Extra data")),
    Row("nested lists", "eval", _lines(DEEP), ("tiny.jsonl:1", "nested too deeply")),
    Row("nested objects", "eval", _lines('{"a":' * 100_000), ("tiny.jsonl:1", "nested too deeply")),
    Row(
        "not UTF-8", "eval", lambda w: (w.text("data/tiny.jsonl", b'{"id": "\xff"}'), w.evaluate())[1], (":1", "utf-8")
    ),
    Row(
        "UTF-16",
        "eval",
        lambda w: (w.text("data/tiny.jsonl", '{"id": "r"}'.encode("utf-16")), w.evaluate())[1],
        ("tiny.jsonl:1", "not JSON"),
    ),
    Row("key twice", "eval", _raw(lambda line: '{"id": "r9", ' + line[1:]), ("tiny.jsonl:1", "'id' is twice")),
    Row(
        "key of a target twice",
        "eval",
        _raw(lambda line: line.replace('"category"', '"category": "spleen", "category"', 1)),
        ("tiny.jsonl:1", "'category' is twice"),
    ),
    Row(
        "key of a question twice",
        "eval",
        _raw(lambda line: line.replace('"answer"', '"answer": "", "answer"', 1)),
        ("tiny.jsonl:1", "'answer' is twice"),
    ),
    Row(
        "polygon of a huge number",
        "eval",
        _target(mask={"size": [48, 64], "segmentation": [[1, 1, 20, 1, 10**400, 20]]}),
        ("tiny.jsonl:1", "polygons"),
    ),
    Row(
        "two forms of a mask",
        "eval",
        _target(mask={"size": [48, 64], "segmentation": [[1, 1, 9, 1, 9, 9]], "counts": [3072]}),
        ("tiny.jsonl:1", "found both"),
    ),
    Row(
        "crowd form",
        "eval",
        _target(mask={"size": [48, 64], "segmentation": {"size": [48, 64], "counts": [3072]}}),
        ("tiny.jsonl:1", 'without "segmentation"'),
    ),
    Row("value 0", "eval", _target(mask={"files": ["0_liver.png"], "value": 0}), ("tiny.jsonl:1", "1 or more")),
    Row("list with a stray word", "eval", lambda w: [*w.evaluate()[2:], "--list-questions", "q.jsonl"], ("q.jsonl",)),
    Row("NaN", "eval", _target(box=[0, 0, float("nan"), 9]), ("tiny.jsonl:1", "NaN is not JSON")),
    Row("infinite", "eval", _target(box=[0, 0, float("inf"), 9]), ("tiny.jsonl:1", "Infinity is not JSON")),
    Row(
        "too large a number",
        "eval",
        _raw(lambda line: line.replace('"mask"', '"box": [0, 0, 1e999, 9], "mask"', 1)),
        (":1", "box"),
    ),
    Row("5,000 digits", "eval", _lines('{"id": ' + "9" * 5000 + "}"), ("tiny.jsonl:1", "not JSON")),
    Row("surrogate in a question", "eval", _qa(question="where\udcff"), ("tiny.jsonl:1", "without its pair")),
    Row("surrogate in an answer", "eval", _qa(answer="\ud800"), ("tiny.jsonl:1", "without its pair")),
    Row("surrogate in a category", "eval", _target(category="liver\udcff"), ("tiny.jsonl:1", "without its pair")),
    Row("surrogate in an id", "eval", _record(2, id="\udfff"), ("tiny.jsonl:3", "without its pair")),
    Row("surrogate in a key", "eval", _record(**{"\udfff": 1}), ("tiny.jsonl:1", "without its pair")),
    Row("surrogate in a path", "eval", _target(mask="\udcff.png"), ("tiny.jsonl:1", "without its pair")),
    Row(
        "surrogate",
        "train",
        lambda w: (w.edit_qa(question="\udcff"), w.train())[1],
        ("tiny.jsonl:1", "without its pair"),
    ),
    Row(
        "record key twice",
        "train",
        lambda w: (w.write_records(['{"id": "a", "id": "a"}']), w.train())[1],
        (":1", "twice"),
    ),
    Row("surrogate", "data_gen", _engine, ("tiny.jsonl:1", "without its pair")),
    Row("no image", "eval", _record(image=None), ("tiny.jsonl:1", "image", "missing")),
    Row("no case", "eval", _record(case=None), ("tiny.jsonl:1", "'case' is missing")),
    Row("an image that is a number", "eval", _record(image=3), ("tiny.jsonl:1", "image is 3", "string")),
    Row("an empty id", "eval", _record(id=" "), ("tiny.jsonl:1", "id is", "not empty")),
    Row("unknown key", "eval", _record(modalty="ct"), ("tiny.jsonl:1", "modalty", "'modality'")),
    Row("unknown key of a target", "eval", _target(bbox=[1, 2, 3, 4]), ("targets[0].bbox", "'box'")),
    Row("unknown key of a question", "eval", _qa(answers="x"), ("targets[0].qa[0].answers", "'answer'")),
    Row("absolute path", "eval", _record(image="/etc/hosts"), ("/etc/hosts", "root")),
    Row("path outside", "eval", _record(2, image="../0.png"), ("tiny.jsonl:3", "../0.png", "root")),
    Row("path with a zero byte", "eval", _target(mask="a\0.png"), ("tiny.jsonl:1", "mask", "root")),
    Row("id twice", "eval", _record(1, id="r0"), ("tiny.jsonl:2", "'r0'", "unique")),
    Row("target id twice", "eval", _target(id="b"), ("tiny.jsonl:1", "'b'", "rename one")),
    Row("targets as an object", "eval", _record(targets={}), ("tiny.jsonl:1", "targets is {}", "list")),
    Row("no such mask", "eval", _target(mask="none.png"), ("'r0'", "none.png", "does not exist")),
    Row("mask as a list", "eval", _target(mask=["0_liver.png"]), ("tiny.jsonl:1", "targets[0].mask")),
    Row("no file of a mask", "eval", _target(mask={"files": []}), ("targets[0].mask.files", "one path or more")),
    Row(
        "inverted as a number",
        "eval",
        _target(mask={"files": ["a.png"], "inverted": 1}),
        ("inverted is 1", "true or false"),
    ),
    Row(
        "mask of another size",
        "eval",
        lambda w: (w.picture("data/0_liver.png", [[255]]), w.evaluate())[1],
        ("0_liver.png", "1 x 1", "64 x 48"),
    ),
    Row(
        "broken RLE",
        "eval",
        lambda w: (w.edit_target(0, 1, mask={"size": [48, 64], "counts": "!"}), w.evaluate())[1],
        (":1", "RLE"),
    ),
    Row("RLE of another size", "eval", _target(mask={"size": [1, 1], "counts": "01"}), ("'r0'", "1 x 1", "64 x 48")),
    Row("box outside", "eval", _target(box=[0, 0, 900, 9]), ("900", "leaves the image")),
    Row("box of three numbers", "eval", _target(box=[0, 0, 9]), ("tiny.jsonl:1", "box is [0, 0, 9]")),
    Row("box of texts", "eval", _target(box=["0", "0", "9", "9"]), ("tiny.jsonl:1", "box is", "[x0, y0, x1, y1]")),
    Row("box below zero", "eval", _target(box=[-1, 0, 9, 9]), ("tiny.jsonl:1", "0 <= x0")),
    Row("box with crossed corners", "eval", _target(box=[37, 29, 16, 15]), ("tiny.jsonl:1", "COCO's [x, y, w, h]")),
    Row("box as COCO", "eval", _box([19, 13, 23, 23]), ("'r0', target 'a'", "[19, 13, 23, 23]", "fits as COCO's")),
    Row(
        "box beside its mask",
        "eval",
        _box([0, 0, 10, 10]),
        ("'r0', target 'a'", "not where its mask is", "leave it out"),
    ),
    Row("box in shares", "eval", _box([0.3, 0.27, 0.66, 0.75]), ("'r0', target 'a'", "fits as shares")),
    Row("box with its axes swapped", "eval", _box([13, 19, 36, 42]), ("'r0', target 'a'", "fits as [y0, x0, y1, x1]")),
    Row("blank question", "eval", _qa(question=" "), ("targets[0].qa[0].question", "not empty")),
    Row("a question of an image mark", "eval", _qa(question="<image>\n"), ("targets[0].qa[0].question", "not empty")),
    Row(
        "an answer that is null",
        "eval",
        _raw(lambda line: line.replace('"answer": "It', '"answer": null, "x": "It', 1)),
        ("answer is null",),
    ),
    Row(
        "another perspective", "eval", _qa(perspective="colour"), ("perspective", "'attribute', 'location' or 'class'")
    ),
    Row("another length", "eval", _qa(length="medium"), ("length", "'short' or 'long'")),
    Row("a history of texts", "eval", _qa(history=["Where?"]), ("history[0]", "object")),
    Row("a turn without answer", "eval", _qa(history=[{"question": "Where?"}]), ("history[0].answer", "missing")),
    Row(
        "classes twice",
        "prepare",
        _release("train.json", '{"a.png": {}, "a.png": {}}'),
        ("train.json", "'a.png' is twice"),
    ),
    Row(
        "classes as numbers",
        "prepare",
        _release("train.json", '{"a.png": {"m.png": 3}}'),
        ("train.json", "'m.png'", "texts only"),
    ),
    Row(
        "classes of a surrogate",
        "prepare",
        _release("val.json", '{"a.png": {"m.png": "\\udcff"}}'),
        ("val.json", "without its pair"),
    ),
    Row(
        "names twice",
        "eval",
        lambda w: w.evaluate("data.categories=" + str(w.text("names.json", '{"liver": ["a"], "liver": ["b"]}'))),
        ("names.json", "'liver' is twice"),
    ),
]
