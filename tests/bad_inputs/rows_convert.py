"""Conversions of checkpoints and releases that are damaged, or are no such thing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rows import Row, Workspace
from rows_checkpoints import CONFIG, EMBEDDING, INDEX, PAGE, POINTER, ROUTER, WEIGHTS, cut, in_shards, with_values
from safetensors.torch import save_file


def convert(name: str, command: str, make: Any, *words: str) -> Row:
    """A row of a conversion of the checkpoint that `make` returns."""
    return Row(f"{command} {name}", "convert", lambda w: [command, "--checkpoint", make(w), "--out", w.out], words)


def release(name: str, files: dict[str, Any], *words: str, settings: tuple[str, ...] = (), **sections: Any) -> Row:
    """A row of a release's folder with these files: bytes, text, JSON values, or tensors; it has a tokenizer."""

    def arguments(w: Workspace) -> list[str | Path]:
        folder = w.folder / "release"
        folder.mkdir()
        shutil.copy(w.checkpoint / "tokenizer.json", folder)
        for file, content in files.items():
            if file.endswith(".safetensors") and isinstance(content, dict):
                save_file(content, folder / file)
            elif file.endswith(".bin") and not isinstance(content, (str, bytes)):
                torch.save(content, folder / file)
            else:
                w.text(f"release/{file}", content if isinstance(content, (str, bytes)) else json.dumps(content))
        config = w.config(model={"mllm": {"train": "lora", "image_tokens": "vision_tower"}, **sections})
        return ["from-release", "--weights", folder, "--config", config, "--out", w.out, *settings]

    return Row(f"from-release {name}", "convert", arguments, words)


ONE = {"lm_head.weight": torch.ones(4, 4)}

ROWS = [
    convert("NaN", "merge", lambda w: with_values(w, ROUTER, float("nan")), ROUTER, "NaN"),
    convert("infinite", "export-sam", lambda w: with_values(w, EMBEDDING, float("inf")), EMBEDDING, "infinite"),
    convert("cut", "merge", lambda w: cut(w, 9), WEIGHTS, "truncated"),
    convert("numbers as frozen", "merge", lambda w: w.own_checkpoint(frozen=[1]), CONFIG, "frozen.0"),
    convert("list as run", "merge", lambda w: w.own_checkpoint(run=[1]), CONFIG, "run"),
    convert("shard elsewhere", "export-sam", lambda w: in_shards(w, {ROUTER: "../x"}), INDEX, "files beside it"),
    convert("data", "export-sam", lambda w: w.folder / "data", CONFIG, "no checkpoint here"),
    release("nothing", {}, "holds no weights"),
    release("page", {WEIGHTS: PAGE}, WEIGHTS, "a web page"),
    release("pointer", {"pytorch_model.bin": POINTER}, "pytorch_model.bin", "Git LFS"),
    release("empty", {"pytorch_model.bin": b""}, "pytorch_model.bin", "an empty file"),
    release("list", {"pytorch_model.bin": [1]}, "pytorch_model.bin", "found list"),
    release("strange", {WEIGHTS: {"x": torch.ones(1)}}, "unknown tensor x"),
    release("shape", {WEIGHTS: ONE}, "lm_head.weight has 4 rows"),
    release("float8", {WEIGHTS: {"x": torch.ones(1).to(torch.float8_e5m2)}}, WEIGHTS, "F8_E5M2"),
    release("list as config", {WEIGHTS: ONE, CONFIG: "[1]"}, CONFIG, "no JSON object"),
    release("heads", {WEIGHTS: ONE, CONFIG: {"num_attention_heads": 7}}, CONFIG, "num_attention_heads is 7"),
    release("broken tokenizer", {WEIGHTS: ONE, "tokenizer.json": "{"}, "tokenizer.json", "not JSON"),
    release("foreign tokenizer", {WEIGHTS: ONE, "tokenizer.json": {}}, "release", "its tokenizer cannot be used"),
    release("page as tokenizer.model", {WEIGHTS: ONE, "tokenizer.model": PAGE}, "tokenizer.model", "sentencepiece"),
    release("added tokens", {WEIGHTS: ONE, "tokenizer.model": "", "added_tokens.json": "{"}, "tokenizer.model"),
    release("index leads out", {INDEX: {"weight_map": {"x": "../x"}}}, INDEX, "files beside it"),
    release("index without file", {INDEX: {"weight_map": {"x": "x.safetensors"}}}, INDEX, "x.safetensors", "not there"),
    release("hard fusion", {WEIGHTS: ONE}, "model.fusion = 'hard'", fusion="hard"),
]
