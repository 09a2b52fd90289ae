"""Options, captions, names, prices and requests of the data engine's `plan` and `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rows import Row, Workspace

URL = "http://127.0.0.1:9/v1"


def plan(w: Workspace, *extra: str | Path) -> list[str]:
    base = [] if {"--author", "--model"} & {*extra} else ["--author", "offline"]
    return [str(word) for word in ["plan", "--records", w.manifest, *base, *extra]]


def run(w: Workspace, *extra: str | Path) -> list[str]:
    """Nothing listens at the address, so that a row that asked anything would end otherwise."""
    base = [] if {"--author", "--model"} & {*extra} else ["--model", "m", "--free", "--base-url", URL]
    return [str(word) for word in ["run", "--records", w.manifest, "--ledger", w.folder / "l.sqlite", *base, *extra]]


def _edited(w: Workspace, target: dict[str, Any]) -> list[str]:
    w.edit_target(**target)
    return run(w)


_OPTIONS = [
    ("variants of none", ["--variants", "0"], ("--variants is 0", "1 to 4")),
    ("too many variants", ["--variants", "5"], ("--variants is 5", "1 to 4")),
    ("asked again for ever", ["--again", "11"], ("--again is 11", "0 to 10")),
    ("asked again less than never", ["--again", "-1"], ("--again is -1", "0 to 10")),
    ("limit of none", ["--limit", "0"], ("--limit is 0",)),
    ("limit beyond all", ["--limit", "9" * 20], ("--limit is 99999", "1000000000")),
    ("hot", ["--temperature", "3"], ("--temperature is 3.0", "0 to 2")),
    ("no temperature", ["--temperature", "nan"], ("--temperature is nan", "0 to 2")),
    ("no tokens", ["--max-tokens", "0"], ("--max-tokens is 0",)),
    ("tokens without end", ["--max-tokens", "9" * 12], ("--max-tokens is 99999",)),
    ("blank effort", ["--reasoning-effort", " "], ("--reasoning-effort ' '",)),
    ("effort on two lines", ["--reasoning-effort", "low\nhigh"], ("--reasoning-effort 'low\\nhigh'",)),
    ("two authors", ["--model", "m", "--author", "offline"], ("--model NAME or --author offline",)),
    ("offline with a captioner", ["--author", "offline", "--captioner", "v"], ("leave out --captioner",)),
    ("offline with a server", ["--author", "offline", "--base-url", URL], ("leave out", "--base-url")),
    ("blank model", ["--model", " ", "--free"], ("--model ' '",)),
    ("model that is no text", ["--model", "\udcff", "--free"], ("'\\udcff'", "not UTF-8")),
    ("blank captioner", ["--model", "m", "--free", "--captioner", ""], ("--captioner ''",)),
    ("model without a price", ["--model", "gpt-4oo"], ("gpt-4oo", "'gpt-4o'", "--prices")),
    ("captioner without a price", ["--model", "gpt-4o", "--captioner", "eyes"], ("eyes", "--prices")),
    (
        "address without a scheme",
        ["--model", "m", "--free", "--base-url", "localhost:8000"],
        ("--base-url 'localhost",),
    ),
    ("address of a file", ["--model", "m", "--free", "--base-url", "file:///etc"], ("--base-url 'file:///etc'",)),
    ("half an address", ["--model", "m", "--free", "--caption-url", "http://["], ("--caption-url 'http://['",)),
    ("no captions", ["--model", "m", "--free", "--captions", "none.jsonl"], ("none.jsonl", "cannot be read")),
    ("captions twice", ["--model", "m", "--free", "--captions", "c", "--captioner", "v"], ("leave one out",)),
    ("no names", ["--names", "none.yaml"], ("none.yaml", "cannot be read")),
    ("no prices", ["--prices", "none.yaml"], ("none.yaml",)),
]
_OF_RUN = [
    ("none at once", ["--concurrency", "0"], ("--concurrency is 0",)),
    ("all at once", ["--concurrency", "999999999"], ("--concurrency is 999999999", "10,000")),
    ("no timeout", ["--timeout", "0"], ("--timeout is 0",)),
    ("endless timeout", ["--timeout", "inf"], ("--timeout is inf",)),
    ("no sends", ["--sends", "0"], ("--sends is 0",)),
    ("no attempts", ["--attempts", "0"], ("--attempts is 0",)),
    ("no failures", ["--max-failures", "-3"], ("--max-failures is -3",)),
    ("no money", ["--max-cost", "0"], ("--max-cost is 0",)),
    ("money that is no number", ["--max-cost", "nan"], ("--max-cost is nan",)),
    ("no requests a minute", ["--rpm", "0"], ("--rpm is 0",)),
    ("no tokens a minute", ["--tpm", "-1"], ("--tpm is -1",)),
    ("no pause between looks", ["--batch", "--poll", "0"], ("--poll is 0",)),
    ("offline in batches", ["--author", "offline", "--batch"], ("--batch", "leave it out")),
]
_CAPTIONS = [
    ("not JSON", "{", ("c.jsonl:1", "not JSON")),
    ("a number", '{"record": "r0", "caption": 3}', ("c.jsonl:1", "caption is 3", "string")),
    ("blank", '{"record": "r0", "caption": " "}', ("c.jsonl:1", "caption", "not empty")),
    ("without a record", '{"caption": "A slice."}', ("c.jsonl:1", "'record'", "missing")),
    ("unknown key", '{"record": "r0", "caption": "A slice.", "more": 1}', ("c.jsonl:1", "'more'")),
    ("nested", "[" * 9999, ("c.jsonl:1",)),
    ("record twice", '{"record": "r", "caption": "A."}\n{"record": "r", "caption": "B."}', ("c.jsonl:2", "'r'")),
]
_NAMES = [
    ("not YAML", "spleen: [", ("n.yaml", "cannot be read")),
    ("a list", "- spleen", ("n.yaml", "holds list")),
    ("unknown key", "spleen: {synonyms: [lien]}", ("n.yaml", "spleen")),
    ("a name of two", "spleen: {names: [liver]}", ("n.yaml", "'liver'")),
    ("a name without a word", 'spleen: {names: ["-"]}', ("n.yaml", "spleen")),
]
_PRICES = [
    ("not YAML", "m: [", ("p.yaml",)),
    ("incomplete", "m: {input: 1}", ("p.yaml", "m.cached")),
    ("negative", "m: {input: -1, cached: 1, output: 1, batch_input: 1, batch_output: 1}", ("p.yaml", "m.input")),
    ("a text", "m: cheap", ("p.yaml", "m")),
]
_TARGETS = [
    ("blank category", {"category": " "}, ("tiny.jsonl:1", "category")),
    ("no mask there", {"mask": "none.png"}, ("none.png", "does not exist")),
    ("broken RLE", {"mask": {"size": [48, 64], "counts": "!"}}, ("tiny.jsonl:1", "RLE")),
    ("box outside", {"box": [0, 0, 900, 9]}, ("900", "leaves the image")),
]

ROWS = [
    *(Row(f"plan: {name}", "data_gen", lambda w, more=more: plan(w, *more), words) for name, more, words in _OPTIONS),
    *(Row(f"run: {name}", "data_gen", lambda w, more=more: run(w, *more), words) for name, more, words in _OF_RUN),
    *(
        Row(f"captions: {name}", "data_gen", lambda w, text=text: run(w, "--captions", w.text("c.jsonl", text)), words)
        for name, text, words in _CAPTIONS
    ),
    *(
        Row(f"names: {name}", "data_gen", lambda w, text=text: plan(w, "--names", w.text("n.yaml", text)), words)
        for name, text, words in _NAMES
    ),
    *(
        Row(f"prices: {name}", "data_gen", lambda w, text=text: plan(w, "--prices", w.text("p.yaml", text)), words)
        for name, text, words in _PRICES
    ),
    *(
        Row(f"run: {name}", "data_gen", lambda w, target=target: _edited(w, target), words)
        for name, target, words in _TARGETS
    ),
    Row("run: not a manifest", "data_gen", lambda w: (w.write_records(["{"]), run(w))[1], ("tiny.jsonl:1", "not JSON")),
    Row("run: no targets", "data_gen", lambda w: (w.write_records([]), run(w))[1], ("tiny.jsonl",)),
    Row("run: no image there", "data_gen", lambda w: (w.edit_record(image="none.png"), run(w))[1], ("none.png",)),
    Row(
        "run: ledger in a file", "data_gen", lambda w: run(w, "--ledger", w.text("f", "") / "l.sqlite"), ("is a file",)
    ),
    Row("run: ledger is a folder", "data_gen", lambda w: run(w, "--ledger", w.manifest.parent), ("data", "ledger")),
    Row("run: no ledger named", "data_gen", lambda w: ["run", "--records", str(w.manifest)], ("--ledger",)),
]
