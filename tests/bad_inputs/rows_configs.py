"""Configurations that cannot be read, or say what no run can do."""

from __future__ import annotations

from rows import Row

ROWS = [
    Row("missing", "train", lambda w: ["--config", w.folder / "none.yaml"], ("none.yaml", "cannot read")),
    Row("not YAML", "train", lambda w: ["--config", w.text("a.yaml", "train: [")], ("a.yaml", "YAML")),
    Row("a list", "train", lambda w: ["--config", w.text("a.yaml", "- train")], ("a.yaml", "mapping")),
    Row("circular base", "train", lambda w: ["--config", w.text("a.yaml", "base: a.yaml")], ("a.yaml", "circle")),
    Row("unknown key", "train", lambda w: w.train(train={"stepz": 3}), ("train.stepz", "'steps'")),
    Row("text for a number", "train", lambda w: w.train(train={"lr": "fast"}), ("train.lr", "'fast'")),
    Row("no steps", "train", lambda w: w.train("train.steps=0"), ("train.steps", "greater than or equal to 1")),
    Row("override without value", "train", lambda w: w.train("train.steps"), ("train.steps", "key=value")),
    Row("old key against compat", "train", lambda w: w.train("data.draws=unseeded"), ("data.draws", "compat: release")),
    Row("no training manifest", "train", lambda w: w.train(data={"train": []}), ("data.train", "manifest")),
    Row(
        "same token twice",
        "train",
        lambda w: w.train('model.candidate_tokens=["[SEG]", "[SEG]"]'),
        ("candidate_tokens", "different"),
    ),
    Row("nothing to resume", "train", lambda w: w.train("--resume"), ("nothing to resume", "--resume")),
]
