"""Manifests with wrong lines: every problem is named with its file and line."""

from __future__ import annotations

from rows import Row

ROWS = [
    Row("not JSON", "eval", lambda w: (w.write_records(["{"]), w.evaluate())[1], ("tiny.jsonl:1", "not JSON")),
    Row("a number", "eval", lambda w: (w.write_records([3]), w.evaluate())[1], ("tiny.jsonl:1", "object")),
    Row(
        "no image", "eval", lambda w: (w.edit_record(image=None), w.evaluate())[1], ("tiny.jsonl:1", "image", "missing")
    ),
    Row(
        "unknown key",
        "eval",
        lambda w: (w.edit_record(modalty="ct"), w.evaluate())[1],
        ("tiny.jsonl:1", "modalty", "'modality'"),
    ),
    Row(
        "absolute path", "eval", lambda w: (w.edit_record(image="/etc/hosts"), w.evaluate())[1], ("/etc/hosts", "root")
    ),
    Row(
        "path outside",
        "eval",
        lambda w: (w.edit_record(2, image="../0.png"), w.evaluate())[1],
        ("tiny.jsonl:3", "../0.png", "root"),
    ),
    Row("id twice", "eval", lambda w: (w.edit_record(1, id="r0"), w.evaluate())[1], ("tiny.jsonl:2", "'r0'", "unique")),
    Row(
        "no such mask",
        "eval",
        lambda w: (w.edit_target(mask="none.png"), w.evaluate())[1],
        ("'r0'", "none.png", "does not exist"),
    ),
    Row(
        "mask of another size",
        "eval",
        lambda w: (w.picture("data/0_liver.png", [[255]]), w.evaluate())[1],
        ("0_liver.png", "1 x 1", "64 x 48"),
    ),
    Row(
        "box outside",
        "eval",
        lambda w: (w.edit_target(box=[0, 0, 900, 9]), w.evaluate())[1],
        ("900", "leaves the image"),
    ),
    Row(
        "broken RLE",
        "eval",
        lambda w: (w.edit_target(0, 1, mask={"size": [48, 64], "counts": "!"}), w.evaluate())[1],
        ("tiny.jsonl:1", "RLE"),
    ),
]
