"""Commands called with words that they do not know, or that do not go together."""

from __future__ import annotations

from rows import Row

ROWS = [
    Row("no checkpoint", "ask", lambda w: w.ask(checkpoint=w.folder / "none"), ("none", "no such folder")),
    Row("empty query", "ask", lambda w: w.ask("--query", "  "), ("query 1", "no text")),
    Row("no tokens", "ask", lambda w: w.ask("--max-new-tokens", "0"), ("--max-new-tokens is 0", "1 or more")),
    Row("unknown device", "ask", lambda w: w.ask("--device", "gpu0"), ("--device 'gpu0'", "cpu, cuda")),
    Row("out is a file", "ask", lambda w: w.ask("--out", w.text("taken", "x")), ("taken is a file", "choose another")),
    Row(
        "image would be replaced",
        "ask",
        lambda w: w.ask("--out", w.image.parent, image=w.picture("data/mask.png", [[0]])),
        ("would be replaced",),
    ),
    Row(
        "neither system", "eval", lambda w: ["--records", w.manifest, "--out", w.out], ("--checkpoint", "--predictions")
    ),
    Row("limit of zero", "eval", lambda w: w.evaluate("--limit", "0"), ("--limit 0", "1 or more")),
    Row(
        "no manifest",
        "eval",
        lambda w: ["--checkpoint", w.checkpoint, "--records", w.folder / "no.jsonl", "--out", w.out],
        ("no.jsonl", "cannot be read"),
    ),
    Row(
        "out holds other files",
        "eval",
        lambda w: w.evaluate("--out", w.text("mine/notes.txt", "x").parent),
        ("notes.txt", "choose another folder"),
    ),
    Row(
        "decode of a file",
        "eval",
        lambda w: [
            "--predictions",
            w.text("p.jsonl", ""),
            "--records",
            w.manifest,
            "--out",
            w.out,
            "--decode",
            "forced",
        ],
        ("--decode",),
    ),
    Row(
        "unknown bank",
        "prepare",
        lambda w: ["ask", "--records", w.folder / "data", "--bank", "brian", "--out", w.out],
        ("brian", "'brain'"),
    ),
    Row(
        "no data set",
        "prepare",
        lambda w: ["sa-med2d", "--root", w.folder / "none", "--out", w.out],
        ("none", "SAMed2D"),
    ),
    Row("unknown weights", "download", lambda w: ["medise", "--out", w.out], ("medise", "'medisee'")),
    Row("unknown command", "data_gen", lambda w: ["plam"], ("plam", "'plan'")),
    Row(
        "no model", "data_gen", lambda w: ["plan", "--records", w.manifest, "--model", "gpt-4z"], ("gpt-4z", "--prices")
    ),
    Row(
        "no ledger",
        "data_gen",
        lambda w: ["export", "--ledger", w.folder / "no.sqlite", "--out", w.out],
        ("no.sqlite", "no such ledger"),
    ),
    Row(
        "not a ledger",
        "data_gen",
        lambda w: ["stats", "--ledger", w.text("l.sqlite", "hello" * 99), "--out", w.out],
        ("l.sqlite", "not a ledger"),
    ),
    Row(
        "no release",
        "convert",
        lambda w: ["merge", "--checkpoint", w.folder / "none", "--out", w.out],
        ("none", "no such folder"),
    ),
]
