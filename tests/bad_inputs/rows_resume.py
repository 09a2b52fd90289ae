"""Runs that cannot be continued, and folders in which no run can be kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from rows import Row, Workspace

STATE = "last-00000002"
HELD: list[FileLock] = []  # by other runs, until the tests end


def run_of(w: Workspace) -> Path:
    """Copies the run that made the checkpoint to where the configuration writes, and returns its only saved state."""
    shutil.copytree(w.checkpoint.parent, w.folder / "run")
    return w.folder / "run" / STATE


def damaged(damage: Callable[[Path], Any]) -> Callable[[Workspace], Sequence[str]]:
    """A resumed run whose saved state is damaged."""

    def make(w: Workspace) -> Sequence[str]:
        damage(run_of(w))
        return w.train("--resume")

    return make


def progress(**facts: Any) -> Callable[[Workspace], Sequence[str]]:
    """A resumed run whose progress.json was written with other values; None leaves one out."""

    def damage(state: Path) -> None:
        path, files = state / "progress.json", json.loads((state / "files.json").read_text())
        values = {key: value for key, value in {**json.loads(path.read_text()), **facts}.items() if value is not None}
        content = json.dumps(values).encode()
        path.write_bytes(content)
        files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (state / "files.json").write_text(json.dumps(files))

    return damaged(damage)


def without(state: Path, *names: str) -> None:
    """Turns a state into one whose files.json does not name some files."""
    files = json.loads((state / "files.json").read_text())
    (state / "files.json").write_text(json.dumps({key: value for key, value in files.items() if key not in names}))


def as_of_an_earlier_version(state: Path) -> None:
    """Leaves only what earlier versions saved."""
    names = ("model.safetensors", "optimizer.safetensors", "progress.json")
    for path in state.iterdir():
        if path.name not in (*names, "files.json"):
            path.unlink()
    files = json.loads((state / "files.json").read_text())
    (state / "files.json").write_text(json.dumps({name: files[name] for name in names}))


def changed(*words: str, **sections: Any) -> Callable[[Workspace], Sequence[str]]:
    """A resumed run with another configuration."""

    def make(w: Workspace) -> Sequence[str]:
        run_of(w)
        return w.train("--resume", *words, **sections)

    return make


def another_manifest(w: Workspace) -> Sequence[str]:
    """A resumed run on a manifest elsewhere that has other records."""
    run_of(w)
    w.edit_record(0, modality="mr")
    return w.train("--resume")


def in_the_way(name: str, *, folder: bool) -> Callable[[Workspace], Sequence[str]]:
    """A run in whose folder a name is taken."""

    def make(w: Workspace) -> Sequence[str]:
        w.text(f"run/{name}/x" if folder else f"run/{name}", "x")
        return w.train("--fresh")

    return make


def held(*words: str) -> Callable[[Workspace], Sequence[str]]:
    """A run in a folder where another is at work."""

    def make(w: Workspace) -> Sequence[str]:
        run_of(w)
        HELD.append(FileLock(w.folder / "run" / ".lock"))
        HELD[-1].acquire()
        return w.train(*words)

    return make


def dangling(w: Workspace) -> Sequence[str]:
    """A run whose folder is a link to nowhere."""
    (w.folder / "link").symlink_to(w.folder / "nowhere")
    return w.train(train={"out": str(w.folder / "link")})


NAMES = ("config.json", "files.json", "model.safetensors", "optimizer.safetensors", "progress.json", "tokenizer.json")
FRESH = ("all saved states are damaged", "--fresh")
ANOTHER = ("another configuration", "resume with")

ROWS = [
    *(
        Row(f"resume without {name}", "train", damaged(lambda s, n=name: (s / n).unlink()), (name, "missing", *FRESH))
        for name in NAMES
    ),
    *(
        Row(
            f"resume with {name} cut",
            "train",
            damaged(lambda s, n=name: (s / n).write_bytes((s / n).read_bytes()[:-3])),
            (STATE, name, *FRESH),
        )
        for name in NAMES
    ),
    *(
        Row(
            f"resume with a folder {name}",
            "train",
            damaged(lambda s, n=name: ((s / n).unlink(), (s / n).mkdir())),
            (STATE, name, *FRESH),
        )
        for name in ("files.json", "progress.json", "model.safetensors")
    ),
    Row("resume, files.json a list", "train", damaged(lambda s: (s / "files.json").write_text("[]")), FRESH),
    Row("resume, files.json nested", "train", damaged(lambda s: (s / "files.json").write_text("[" * 9999)), FRESH),
    Row("resume, weights not listed", "train", damaged(lambda s: without(s, "model.safetensors")), FRESH),
    Row("resume, config.json not listed", "train", damaged(lambda s: without(s, "config.json")), FRESH),
    Row(
        "resume from an earlier version",
        "train",
        damaged(as_of_an_earlier_version),
        (STATE, "earlier version", "without the tokenizer", "--fresh"),
    ),
    Row(
        "resume, the state is a file",
        "train",
        lambda w: (w.text(f"run/{STATE}", "x"), w.train("--resume"))[1],
        ("nothing to resume",),
    ),
    Row(
        "resume, an empty state",
        "train",
        lambda w: ((w.folder / "run" / STATE).mkdir(parents=True), w.train("--resume"))[1],
        FRESH,
    ),
    Row("resume, step negative", "train", progress(step=-2), ("progress.json", "step = -2", *FRESH)),
    Row("resume, step text", "train", progress(step="2"), ("progress.json", "step = 2 is wrong", *FRESH)),
    Row("resume, step of another state", "train", progress(step=1), ("progress.json", "step = 1", *FRESH)),
    Row("resume, step missing", "train", progress(step=None), ("progress.json", "step", *FRESH)),
    Row("resume, step beyond the end", "train", progress(config={"train": {"steps": 1}}), ("the run has 1", *FRESH)),
    Row("resume, best not a number", "train", progress(best=float("nan")), ("progress.json", "NaN", *FRESH)),
    Row("resume, best above 1", "train", progress(best=40), ("progress.json", "best = 40", *FRESH)),
    Row("resume, skipped a list", "train", progress(skipped=[]), ("progress.json", "skipped = []", *FRESH)),
    Row("resume, batch of none", "train", progress(effective_batch=0), ("effective_batch = 0", *FRESH)),
    Row("resume, no configuration", "train", progress(config=None), ("progress.json", "config", *FRESH)),
    Row("resume, manifests a list", "train", progress(manifests=[1]), ("manifests = [1]", *FRESH)),
    Row("resume, wrong configuration", "train", progress(config={"loss": 3}), ("progress.json", "loss", *FRESH)),
    Row("resume, learning rate", "train", changed("train.lr=1e-5"), ("train.lr", "1e-05", *ANOTHER)),
    Row("resume, seed", "train", changed("train.seed=7"), ("train.seed = 0, not 7", *ANOTHER)),
    Row("resume, more steps", "train", changed("train.steps=9"), ("train.steps = 2, not 9", "train.init=/", STATE)),
    Row("resume, warm-up", "train", changed("train.warmup=1"), ("train.warmup", *ANOTHER)),
    Row("resume, batch", "train", changed("train.batch_size=3"), ("effective batch of 2", "train.global_batch=2")),
    Row("resume, precision", "train", changed("train.dtype=bfloat16"), ("train.dtype", *ANOTHER)),
    Row("resume, loss", "train", changed("loss.text=3"), ("loss.text = 1.0, not 3.0", *ANOTHER)),
    Row("resume, model", "train", changed("model.router_hidden=8"), ("model.router_hidden = 16, not 8", *ANOTHER)),
    Row("resume, LoRA", "train", changed("model.mllm.train=lora"), ("model.mllm.train", *ANOTHER)),
    Row(
        "resume, answers of val",
        "train",
        changed("eval.forced_answer='{candidates}'"),
        ("eval.forced_answer", *ANOTHER),
    ),
    Row(
        "resume, features",
        "train",
        lambda w: (run_of(w), w.train("--resume", f"data.cache={w.folder / 'c'}"))[1],
        ("data.cache = None", *ANOTHER),
    ),
    Row(
        "resume, val",
        "train",
        lambda w: (run_of(w), w.train("--resume", f"data.val={w.manifest}"))[1],
        ("data.val = None", *ANOTHER),
    ),
    Row(
        "resume, weight of a source",
        "train",
        lambda w: (run_of(w), w.train("--resume", data={"train": [{"records": str(w.manifest), "weight": 2}]}))[1],
        ("data.train[0].weight = 1, not 2", *ANOTHER),
    ),
    Row("resume, another manifest", "train", another_manifest, ("data.train[0].records", "its content is another one")),
    Row("a run is there", "train", lambda w: (run_of(w), w.train())[1], ("already holds a run", "--resume", "--fresh")),
    Row("another run is at work", "train", held(), ("another run is writing here",)),
    Row("another run is at work, fresh", "train", held("--fresh"), ("another run is writing here",)),
    Row("another run is at work, resume", "train", held("--resume"), ("another run is writing here",)),
    Row(
        "out is a file",
        "train",
        lambda w: w.train(train={"out": str(w.text("taken", "x"))}),
        ("train.out", "taken is a file"),
    ),
    Row(
        "out below a file",
        "train",
        lambda w: w.train(train={"out": str(w.text("taken", "x") / "run")}),
        ("train.out", "taken is a file"),
    ),
    Row(
        "out in /proc",
        "train",
        lambda w: w.train(train={"out": "/proc/runs"}),
        ("train.out", "/proc/runs", "cannot be written"),
    ),
    Row("out a link to nowhere", "train", dangling, ("train.out", "link", "nowhere", "does not exist")),
    Row(
        "out with a long name",
        "train",
        lambda w: w.train(train={"out": str(w.folder / ("x" * 300))}),
        ("train.out", "xxx"),
    ),
    Row(
        "log.jsonl is a folder",
        "train",
        in_the_way("log.jsonl", folder=True),
        ("log.jsonl: is a folder in the way", "rename it"),
    ),
    Row(
        "run.json is a folder",
        "train",
        in_the_way("run.json", folder=True),
        ("run.json: is a folder in the way", "rename it"),
    ),
    Row(
        "tensorboard is a file",
        "train",
        in_the_way("tensorboard", folder=False),
        ("tensorboard: is a file in the way", "rename it"),
    ),
    Row("checkpoint is a file", "train", in_the_way("checkpoint", folder=False), ("checkpoint", "is a file")),
    Row(
        "checkpoint holds other files",
        "train",
        in_the_way("checkpoint", folder=True),
        ("checkpoint", "not of an earlier checkpoint"),
    ),
]
