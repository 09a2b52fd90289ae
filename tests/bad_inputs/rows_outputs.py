"""Output folders that cannot be written, or in which something else would be lost; every command refuses them before it works."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import Row, Workspace

_CONFIG = Path(__file__).parents[2] / "configs" / "medisee_7b.yaml"
_Command = Callable[[Workspace, Path | str], Sequence[str | Path]]


def _release(w: Workspace, out: Path | str) -> list[str | Path]:
    weights = w.text("release/pytorch_model.bin", "x").parent
    return ["from-release", "--weights", weights, "--config", _CONFIG, "--out", out]


def _ledger(w: Workspace) -> Path:
    return w.text("ledger.sqlite", "not yet looked at")


_EVAL: tuple[str, _Command] = "eval", lambda w, out: w.evaluate("--out", out)
_ASK: tuple[str, _Command] = "ask", lambda w, out: w.ask("--out", out)
_DEMO: tuple[str, _Command] = "prepare", lambda w, out: ["demo", "--out", out]
_SA_MED2D: tuple[str, _Command] = "prepare", lambda w, out: ["sa-med2d", "--root", w.folder / "data", "--out", out]
_MLMR_SD: tuple[str, _Command] = "prepare", lambda w, out: ["mlmr-sd", "--root", w.folder / "data", "--out", out]
_QUESTIONS: tuple[str, _Command] = (
    "prepare",
    lambda w, out: ["ask", "--records", w.folder / "data", "--bank", "brain", "--out", out],
)
_RELEASE: tuple[str, _Command] = "convert", _release
_MERGE: tuple[str, _Command] = "convert", lambda w, out: ["merge", "--checkpoint", w.checkpoint, "--out", out]
_SAM: tuple[str, _Command] = "convert", lambda w, out: ["export-sam", "--checkpoint", w.checkpoint, "--out", out]
_DOWNLOAD: tuple[str, _Command] = "download", lambda w, out: ["sam", "--out", out]
_EXPORT: tuple[str, _Command] = "data_gen", lambda w, out: ["export", "--ledger", _ledger(w), "--out", out]
_STATS: tuple[str, _Command] = "data_gen", lambda w, out: ["stats", "--ledger", _ledger(w), "--out", out]
_RUN: tuple[str, _Command] = (
    "data_gen",
    lambda w, out: ["run", "--records", w.manifest, "--author", "offline", "--ledger", Path(out) / "l.sqlite"],
)
_COMMANDS = {
    "eval": _EVAL,
    "answer": _ASK,
    "demo": _DEMO,
    "sa-med2d": _SA_MED2D,
    "mlmr-sd": _MLMR_SD,
    "questions": _QUESTIONS,
    "from-release": _RELEASE,
    "merge": _MERGE,
    "sam": _SAM,
    "download": _DOWNLOAD,
    "export": _EXPORT,
    "stats": _STATS,
    "run": _RUN,
}


def _link(w: Workspace, name: str, to: Path | str) -> Path:
    (w.folder / name).symlink_to(to)
    return w.folder / name


def _circle(w: Workspace) -> Path:
    _link(w, "one", "two")
    return _link(w, "two", "one")


_PLACES: dict[str, tuple[Callable[[Workspace], Path], tuple[str, ...]]] = {
    "below a file": (lambda w: w.text("taken", "x") / "out", ("taken is a file", "choose another")),
    "in proc": (lambda w: Path("/proc/medisee/out"), ("/proc/medisee/out: cannot be written", "choose another")),
    "a link to nothing": (lambda w: _link(w, "gone", "nowhere"), ("gone is a link to nowhere", "correct it")),
    "links in a circle": (_circle, ("two: ", "choose another")),
    "a long name": (lambda w: w.folder / ("x" * 250), ("more than 230 bytes", "shorter")),
}
_CANNOT_BE_WRITTEN = [
    Row(f"{what}: out is {place}", command, lambda w, argv=argv, make=make: argv(w, make(w)), words)
    for what, (command, argv) in _COMMANDS.items()
    for place, (make, words) in _PLACES.items()
    if (what, place) != ("run", "a long name")  # the ledger says so
]


def _earlier(w: Workspace, mark: str, content: Any, mine: str) -> Path:
    """Makes an earlier result with a file of the user's in it."""
    w.text(f"earlier/{mark}", json.dumps(content))
    w.text(f"earlier/{mine}", "mine")
    return w.folder / "earlier"


def _merged(w: Workspace) -> Path:
    folder = w.own_checkpoint()
    (folder / "README.md").write_text("mine")
    return folder


def _exported(w: Workspace) -> Path:
    w.text("earlier/release/test.json", '{"images/a.png": {"masks/a.png": "liver"}}')
    w.text("earlier/images/a.png", "")
    return _earlier(w, "data.json", {"screening": {}}, "images/b.png")


def _linked(w: Workspace) -> Path:
    folder = _earlier(w, "summary.json", {"splits": {}}, "table.md")
    (folder / "images").symlink_to(w.folder / "data")
    return folder


_FOREIGN: dict[str, tuple[tuple[str, _Command], Callable[[Workspace], Path], str]] = {
    "notes in an evaluation": (_EVAL, lambda w: _earlier(w, "summary.json", {"splits": {}}, "notes.txt"), "notes.txt"),
    "predictions alone": (_EVAL, lambda w: w.text("mine/predictions.jsonl", "").parent, "predictions.jsonl"),
    "a picture in a demo": (
        _DEMO,
        lambda w: _earlier(w, "data.json", {"versions": {}}, "images/mine.png"),
        "images/mine.png",
    ),
    "a copied picture in a demo": (
        _DEMO,
        lambda w: _earlier(w, "data.json", {"versions": {}}, "images/axial_012 (copy).png"),
        "(copy).png",
    ),
    "an export in a demo's place": (
        _DEMO,
        lambda w: _earlier(w, "data.json", {"screening": {}}, "test.jsonl"),
        "data.json",
    ),
    "notes below a data set": (
        _QUESTIONS,
        lambda w: _earlier(w, "asked.json", {"bank": "brain"}, "old/notes.txt"),
        "old/notes.txt",
    ),
    "a damaged mark": (_QUESTIONS, lambda w: w.text("mine/asked.json", '{"bank": ').parent, "asked.json"),
    "a mark that is twice": (
        _QUESTIONS,
        lambda w: w.text("mine/asked.json", '{"bank": 1, "bank": 2}').parent,
        "asked.json",
    ),
    "a picture in an export": (
        _EXPORT,
        lambda w: _earlier(w, "data.json", {"screening": {}}, "images/mine.png"),
        "images/mine.png",
    ),
    "a picture that the export does not list": (_EXPORT, _exported, "images/b.png"),
    "a demo in an export's place": (
        _EXPORT,
        lambda w: _earlier(w, "data.json", {"versions": {}}, "test.jsonl"),
        "data.json",
    ),
    "a thesis beside statistics": (
        _STATS,
        lambda w: _earlier(w, "stats.json", {"balance": {}}, "thesis.tex"),
        "thesis.tex",
    ),
    "a figure that is not ours": (_STATS, lambda w: w.text("mine/lengths.png", "").parent, "lengths.png"),
    "a README in a checkpoint": (_MERGE, _merged, "README.md"),
    "a model of another kind": (_MERGE, lambda w: w.text("mine/config.json", '{"model": {}}').parent, "config.json"),
    "files in a checkpoint's place": (_RELEASE, lambda w: w.text("mine/notes.txt", "x").parent, "notes.txt"),
    "a mask of the user's": (_ASK, lambda w: w.picture("mine/mask.png", [[0]]).parent, "mask.png"),
    "a training's run.json": (
        _ASK,
        lambda w: w.text("mine/run.json", '{"settings": {"train": {}}}').parent,
        "run.json",
    ),
    "manifests of the user's": (_SA_MED2D, lambda w: w.text("mine/train.jsonl", "").parent, "train.jsonl"),
    "another command's manifests": (
        _MLMR_SD,
        lambda w: _earlier(w, "run.json", {"settings": {"data": "demo"}}, "test.jsonl"),
        "run.json",
    ),
    "a hidden file": (_DEMO, lambda w: w.text("mine/.env", "x").parent, ".env"),
    "a link to a folder": (_EVAL, _linked, "images"),
}
_WOULD_BE_LOST = [
    Row(name, command, lambda w, argv=argv, make=make: argv(w, make(w)), (word, "which is not of an earlier", "lost"))
    for name, ((command, argv), make, word) in _FOREIGN.items()
]


def _answered(w: Workspace) -> list[str]:
    shutil.copy(w.image, w.picture("answer/overlay.png", [[0]]).with_name("mask.png"))
    w.text("answer/prediction.json", '{"plain_text": ""}')
    return w.ask("--out", w.folder / "answer", image=w.folder / "answer" / "mask.png")


def _data(w: Workspace, way: str) -> str:
    """Returns the folder of the manifest, written in another way."""
    folder = w.folder / "data"
    if way == "link":
        return str(_link(w, "link", folder))
    return {"as it is": f"{folder}", "slash": f"{folder}/", "dots": f"{w.folder}/x/../data/.", "cwd": "data"}[way]


_INPUTS = [
    *(
        Row(
            f"{what}: out is its input, {way}",
            command,
            lambda w, argv=argv, way=way: argv(w, _data(w, way)),
            ("is the ", "which would be lost"),
        )
        for what, (command, argv) in {"sa-med2d": _SA_MED2D, "mlmr-sd": _MLMR_SD, "questions": _QUESTIONS}.items()
        for way in ("as it is", "slash", "dots", "link", "cwd")
    ),
    Row(
        "questions: out holds its input",
        *_QUESTIONS[:1],
        lambda w: _QUESTIONS[1](w, w.folder),
        ("holds the man", "lost"),
    ),
    Row("out holds the manifest", "eval", lambda w: w.evaluate("--out", w.folder / "data"), ("holds manifest", "lost")),
    Row("out is the checkpoint", "eval", lambda w: w.evaluate("--out", w.checkpoint), ("is the checkpoint", "lost")),
    Row(
        "out holds the checkpoint", "eval", lambda w: w.evaluate("--out", w.checkpoint.parent), ("holds the ch", "lost")
    ),
    Row(
        "out holds the predictions",
        "eval",
        lambda w: [
            *("--predictions", w.text("theirs/predictions.jsonl", ""), "--records", w.manifest),
            *("--out", w.folder / "theirs"),
        ],
        ("holds the predictions", "lost"),
    ),
    Row("out is the checkpoint", "ask", lambda w: w.ask("--out", w.checkpoint), ("is the checkpoint", "mixed up")),
    Row("the image is an earlier mask", "ask", _answered, ("mask.png: would be replaced", "choose another --out")),
    Row(
        "out is the checkpoint",
        "convert",
        lambda w: ["merge", "--checkpoint", w.own_checkpoint(), "--out", w.folder / "checkpoint"],
        ("is the checkpoint", "lost"),
    ),
    Row("out is the weights", "convert", lambda w: _release(w, w.folder / "release"), ("is the weights", "lost")),
    Row("sam: out exists", "convert", lambda w: _SAM[1](w, w.text("mine/x", "").parent), ("mine: is there already",)),
    Row("export: out holds the ledger", "data_gen", lambda w: _EXPORT[1](w, w.folder), ("holds the ledger", "lost")),
    Row("stats: out holds the ledger", "data_gen", lambda w: _STATS[1](w, w.folder), ("holds the ledger", "lost")),
    Row(
        "stats: out is the export",
        "data_gen",
        lambda w: ["stats", "--export", w.folder / "data", "--out", w.folder / "data"],
        ("is the export", "lost"),
    ),
    Row(
        "answers: one folder is a file",
        "ask",
        lambda w: [*w.ask("--out", w.text("out/1", "x").parent), "--image", str(w.folder / "data" / "1.png")],
        ("1 is a file", "choose another"),
    ),
    Row(
        "answers: one folder holds a mask of the user's",
        "ask",
        lambda w: [
            *w.ask("--out", w.picture("out/1/mask.png", [[0]]).parents[1]),
            *("--image", str(w.folder / "data" / "1.png")),
        ],
        ("1: holds 'mask.png'", "lost"),
    ),
    Row(
        "a mounted disk",
        "eval",
        lambda w: w.evaluate("--out", "/proc"),
        ("since a disk is mounted there", "/proc/result"),
    ),
    Row("the root of all disks", "eval", lambda w: w.evaluate("--out", os.sep), ("/: cannot be replaced", "/result")),
    Row(
        "a cache that is a file",
        "eval",
        lambda w: w.evaluate(f"data.cache={w.text('taken', 'x')}"),
        ("taken is a file", "choose another"),
    ),
]

ROWS = [*_CANNOT_BE_WRITTEN, *_WOULD_BE_LOST, *_INPUTS]
