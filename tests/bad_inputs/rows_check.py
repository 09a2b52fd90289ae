"""Records that a training could not read to its end: refused by `prepare check`, and by `train` before it builds a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import Row, Workspace

Spoil = Callable[[Workspace], object]
NOISE = "".join(random.Random(0).choices("bcdfghjklmnpqrstvwxz ", k=2500))  # which no tokenizer makes short


def _qa(question: str, answer: str = "It is [SEG] and [BBOX].", **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, "perspective": "attribute", "length": "short", **more}


def _check(w: Workspace, spoil: Spoil) -> Sequence[str | Path]:
    spoil(w)
    return ["check", "--records", w.manifest]


def _check_config(w: Workspace, spoil: Spoil, **sections: Any) -> Sequence[str | Path]:
    path = w.config(**sections)
    spoil(w)
    return ["check", "--config", path]


def _train(w: Workspace, spoil: Spoil, **sections: Any) -> Sequence[str | Path]:
    spoil(w)
    return w.train(**sections)


def _val(w: Workspace, spoil: Spoil, **settings: Any) -> Sequence[str | Path]:
    """A run whose training manifest is good and whose val is spoilt."""
    good = w.text("data/good.jsonl", w.manifest.read_bytes())
    spoil(w)
    return w.train(data={"train": [{"records": str(good)}], "val": str(w.manifest)}, **settings)


def _both(name: str, spoil: Spoil, *words: str) -> list[Row]:
    return [
        Row(f"records: {name}", "prepare", lambda w: _check(w, spoil), ("tiny.jsonl:", *words)),
        Row(f"records: {name}", "train", lambda w: _train(w, spoil), ("tiny.jsonl:", *words)),
    ]


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


_ANSWERS = [
    row
    for name, answer, lacking in (
        ("answer without tokens", "The liver makes bile.", "lacks [SEG] and [BBOX]"),
        ("empty answer", "", "lacks [SEG] and [BBOX]"),
        ("tokens in small letters", "It is [seg] and [bbox].", "lacks [SEG] and [BBOX]"),
        ("answer without a box", "It is [SEG].", "lacks [BBOX]"),
        ("answer without a mask", "[BBOX], as you see.", "lacks [SEG]"),
        ("tokens without brackets", "It is SEG and BBOX.", "lacks [SEG] and [BBOX]"),
        ("token with a space", "It is [ SEG ] and [BBOX].", "lacks [SEG]"),
    )
    for row in _both(name, lambda w, answer=answer: w.edit_qa(1, 1, 1, answer=answer), "tiny.jsonl:2: ", "'b'", lacking)
]

ROWS = [
    *_ANSWERS,
    *_both(
        "word of a million letters", lambda w: w.edit_qa(question="x" * 10**6), "1,000,000 letters", "at most 2,000"
    ),
    *_both("category of many letters", lambda w: w.edit_target(category="y" * 5000), "letters", "'yyyyy"),
    *_both("image cut off", lambda w: _cut(w.folder / "data/1.png", 60), "tiny.jsonl:2: ", "1.png"),
    *_both("image empty", lambda w: w.text("data/2.png", b""), "tiny.jsonl:3: ", "2.png"),
    *_both("image is text", lambda w: w.text("data/0.png", b"P5 3 3"), "tiny.jsonl:1: ", "0.png"),
    *_both("image gone", lambda w: (w.folder / "data/3.png").unlink(), "tiny.jsonl:4: ", "3.png", "does not exist"),
    *_both("black mask", lambda w: w.picture("data/3_liver.png", [[0] * 64] * 40), "tiny.jsonl:4: ", "is empty"),
    *_both("mask gone", lambda w: (w.folder / "data/0_liver.png").unlink(), "tiny.jsonl:1: ", "0_liver.png"),
    *_both("mask cut off", lambda w: _cut(w.folder / "data/0_liver.png", 50), "tiny.jsonl:1: ", "0_liver.png"),
    *_both("mask too small", lambda w: w.picture("data/0_liver.png", [[255]]), "tiny.jsonl:1: ", "1 x 1"),
    *_both("box outside", lambda w: w.edit_target(2, 0, box=[0, 0, 900, 9]), "tiny.jsonl:3: ", "leaves the image"),
    *_both("a number as question", lambda w: w.edit_qa(question=3), "tiny.jsonl:1: "),
    *_both("white space as question", lambda w: w.edit_qa(2, question=" \t\n"), "tiny.jsonl:3: ", "not empty"),
    *_both("a line of a list", lambda w: w.write_records([*w.records(), []]), "tiny.jsonl:5: "),
    *(
        Row(f"asks nothing: {kind}", kind, make, ("tiny.jsonl: ", "no record has a target"))
        for kind, make in (
            ("prepare", lambda w: _check(w, lambda w: w.write_records([{**r, "targets": []} for r in w.records()]))),
            ("train", lambda w: _train(w, lambda w: w.write_records([{**r, "targets": []} for r in w.records()]))),
        )
    ),
    *(
        row
        for name, spoil in (
            ("question too long", lambda w: w.edit_qa(3, question=NOISE)),
            ("answer too long", lambda w: w.edit_qa(3, answer=f"It is [SEG] and [BBOX]. {NOISE}")),
            ("one endless word", lambda w: w.edit_qa(3, question=NOISE.replace(" ", "-")[:1900])),
            ("category too long", lambda w: w.edit_target(3, category=NOISE, qa=[])),
            ("history too long", lambda w: w.edit_qa(3, history=[{"question": NOISE, "answer": "It is."}])),
        )
        for row in (
            Row(name, "prepare", lambda w, s=spoil: _check_config(w, s), ("tiny.jsonl:4: ", "tokens", "1024")),
            Row(name, "train", lambda w, s=spoil: _train(w, s), ("tiny.jsonl:4: ", "tokens", "1024")),
        )
    ),
    Row(
        "question too long for a checkpoint",
        "train",
        lambda w: _train(w, lambda w: w.edit_qa(question=NOISE), train={"init": str(w.checkpoint)}),
        ("tiny.jsonl:1: ", "tokens", "1024"),
    ),
    Row(
        "answer without the third token",
        "train",
        lambda w: _train(
            w,
            lambda w: w.edit_qa(answer="[SEG], [BBOX]"),
            model={"candidate_tokens": ["[SEG]", "[BBOX]", "[TGT3]"]},
        ),
        ("tiny.jsonl:1: ", "lacks [TGT3]"),
    ),
    Row(
        "black mask in val",
        "train",
        lambda w: _val(w, lambda w: w.edit_target(1, 0, mask=str(w.picture("data/black.png", [[0] * 40] * 64).name))),
        ("tiny.jsonl:2: ", "black.png", "is empty"),
    ),
    Row(
        "image of val cut off",
        "train",
        lambda w: _val(w, lambda w: (w.edit_record(0, image="v.png"), w.text("data/v.png", w.image.read_bytes()[:80]))),
        ("tiny.jsonl:1: ", "v.png"),
    ),
    Row(
        "val question too long",
        "train",
        lambda w: _val(w, lambda w: w.edit_qa(question=NOISE)),
        ("jsonl:1: ", "tokens"),
    ),
    Row(
        "val asks nothing",
        "train",
        lambda w: _val(w, lambda w: w.write_records([{**r, "targets": []} for r in w.records()])),
        ("tiny.jsonl: ", "no record has a target"),
    ),
    Row(
        "every record is skipped",
        "train",
        lambda w: _train(
            w, lambda w: [w.edit_record(n, image="none.png") for n in range(4)], data={"skip_corrupt": True}
        ),
        ("tiny.jsonl:1: ", "tiny.jsonl:4: ", "none.png"),
    ),
    Row(
        "problems of two manifests",
        "train",
        lambda w: _val(
            w,
            lambda w: (
                w.edit_record(3, image="none.png"),
                w.text("data/good.jsonl", w.manifest.read_text().replace("[BBOX]", "[BOX]")),
            ),
        ),
        ("good.jsonl:1: ", "lacks [BBOX]", "good.jsonl:4: ", "tiny.jsonl:4: ", "none.png"),
    ),
    Row("check nothing", "prepare", lambda w: ["check"], ("--records", "--config")),
    Row("no workers", "prepare", lambda w: ["check", "--records", w.manifest, "--workers", "0"], ("--workers",)),
    Row(
        "check no file",
        "prepare",
        lambda w: ["check", "--records", w.folder / "no.jsonl"],
        ("no.jsonl", "cannot be read"),
    ),
    Row(
        "check under another root",
        "prepare",
        lambda w: ["check", "--records", w.manifest, "--root", w.folder / "elsewhere"],
        ("tiny.jsonl:1: ", "elsewhere", "--root"),
    ),
    Row("check no configuration", "prepare", lambda w: ["check", "--config", w.folder / "no.yaml"], ("no.yaml",)),
    Row(
        "categories of a run",
        "prepare",
        lambda w: _check_config(w, lambda w: w.text("data/categories.json", '{"liver": []}')),
        ("categories.json", "'liver'"),
    ),
    Row(
        "val of a run",
        "prepare",
        lambda w: _check_config(w, lambda w: w.text("data/v.jsonl", "{"), data={"val": str(w.folder / "data/v.jsonl")}),
        ("v.jsonl:1: ",),
    ),
    Row(
        "an image found before the first answer",
        "eval",
        lambda w: (_cut(w.folder / "data/1.png", 60), w.evaluate())[1],
        ("1.png",),
    ),
    Row(
        "a question found before the first answer",
        "eval",
        lambda w: (w.edit_qa(2, question=NOISE), w.evaluate())[1],
        ("tiny.jsonl:3: ", "tokens"),
    ),
]
