"""Checkpoints and published weights that are damaged, incomplete, of another model, or hold what is not a weight."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import Row, Workspace
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ROUTER = "seg_router.gate.0.weight"
EMBEDDING = "mllm.model.language_model.embed_tokens.weight"
PAGE = "<!DOCTYPE html><html><body>404</body></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
Change = Callable[[dict[str, Any]], Any]


def with_tensors(w: Workspace, change: Change) -> Path:
    """A copy of the checkpoint with changed tensors."""
    folder = w.own_checkpoint()
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def with_values(w: Workspace, name: str, value: float) -> Path:
    """A copy of the checkpoint with one number of a tensor changed."""
    return with_tensors(w, lambda tensors: tensors[name].view(-1)[:1].fill_(value))


def with_type(w: Workspace, dtype: torch.dtype, name: str = ROUTER) -> Path:
    """A copy of the checkpoint with one tensor of another type."""
    return with_tensors(w, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def with_model(w: Workspace, change: Change) -> Path:
    """A copy of the checkpoint whose config.json describes another model."""
    return with_json(w, CONFIG, lambda content: change(content["model"]))


def with_json(w: Workspace, name: str, change: Change) -> Path:
    """A copy of the checkpoint with one JSON file changed."""
    folder = w.own_checkpoint()
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def with_file(w: Workspace, name: str, content: str | bytes | None) -> Path:
    """A copy of the checkpoint with one file replaced; None removes it."""
    folder = w.own_checkpoint()
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        w.text(f"checkpoint/{name}", content)
    return folder


def folder_as_weights(w: Workspace) -> Path:
    folder = with_file(w, WEIGHTS, None)
    (folder / WEIGHTS).mkdir()
    return folder


def cut(w: Workspace, count: int) -> Path:
    """A copy of the checkpoint whose weights lack their last bytes."""
    return with_file(w, WEIGHTS, (w.checkpoint / WEIGHTS).read_bytes()[:-count])


def in_shards(w: Workspace, places: dict[str, str] | None = None, *, twice: bool = False) -> Path:
    """A copy of the checkpoint in two files with an index, in which `places` are changed."""
    folder = w.own_checkpoint()
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2] + (names[:1] if twice else [])}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    named = {name: file for file, own in parts.items() for name in own} | (places or {})
    (folder / INDEX).write_text(json.dumps({"weight_map": named}), encoding="utf-8")
    return folder


def ask(name: str, make: Callable[[Workspace], Path], *words: str) -> Row:
    """A row of `medisee ask` with the checkpoint that `make` returns."""
    return Row(name, "ask", lambda w: w.ask(checkpoint=make(w)), words)


def huge(w: Workspace) -> Path:
    folder = w.own_checkpoint()
    os.truncate(folder / TOKENIZER, 1 << 29)
    return folder


def auto_map(content: dict[str, Any]) -> None:
    content["tokenizer_class"] = "OwnTokenizer"
    content["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}


def without_token(w: Workspace, token: str) -> Path:
    """A copy of the checkpoint whose tokenizer lacks an added token."""

    def change(content: dict[str, Any]) -> None:
        content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] != token]

    return with_json(w, TOKENIZER, change)


def leave_a_gap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[next(reversed(vocabulary))] = 90_000


def run_folder(w: Workspace, name: str) -> Path:
    shutil.copytree(w.checkpoint, w.folder / "runs" / "demo" / name)
    return w.folder / "runs" / "demo"


def sam(w: Workspace) -> dict[str, torch.Tensor]:
    """The tensors of a SAM that fits the workspace's model."""
    tensors = load_file(w.checkpoint / WEIGHTS)
    return {name.removeprefix("seg_head."): value for name, value in tensors.items() if name.startswith("seg_head.")}


def train(name: str, make: Callable[[Workspace], Any], *words: str, **head: Any) -> Row:
    """A row of `medisee train` with a SAM's file, or with what `make` returns, saved as one."""

    def arguments(w: Workspace) -> list[str]:
        path = content = make(w)
        if not isinstance(content, Path):
            path = w.folder / "sam.pth"
            torch.save(content, path)
        model = w.settings["model"]
        return w.train(model={"seg_head": {**model["seg_head"], "checkpoint": str(path), **head}})

    return Row(f"SAM {name}", "train", arguments, words)


def changed(w: Workspace, name: str, change: Callable[[torch.Tensor], Any]) -> dict[str, torch.Tensor]:
    """A SAM with one tensor changed."""
    return {**sam(w), name: change(sam(w)[name])}


def cut_sam(w: Workspace) -> Path:
    torch.save(sam(w), w.folder / "whole.pth")
    return w.text("sam.pth", (w.folder / "whole.pth").read_bytes()[:-5000])


class Harmful:
    """Reading this carelessly writes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


MICRO = {"width": 32, "depth": 2, "heads": 2, "global_attention": [1], "channels": 32}
TOKEN = "mask_decoder.iou_token.weight"
SAMS = [
    train("of code", lambda w: {TOKEN: Harmful()}, "sam.pth", "posix.system", "none of it was executed"),
    train("of arguments", lambda w: {"model": sam(w), "args": Namespace(lr=1)}, "argparse.Namespace", "state_dict()"),
    train("cut", cut_sam, "sam.pth", "truncated"),
    train("empty", lambda w: w.text("sam.pth", ""), "sam.pth", "an empty file"),
    train("page", lambda w: w.text("sam.pth", PAGE), "sam.pth", "a web page"),
    train("pointer", lambda w: w.text("sam.pth", POINTER), "sam.pth", "Git LFS"),
    train("page as safetensors", lambda w: w.text("sam.safetensors", PAGE), "sam.safetensors", "a web page"),
    train("missing", lambda w: w.folder / "none.pth", "none.pth", "no such weights file"),
    train("list", lambda w: [1, 2], "sam.pth", "found list"),
    train("epoch alone", lambda w: {"epoch": 3}, "sam.pth", "expected names and tensors"),
    train("two states", lambda w: {"model": sam(w), "ema": sam(w)}, "sam.pth", "'model', 'ema'"),
    train(
        "two models",
        lambda w: {f"{whose}.{name}": value for whose in ("student", "teacher") for name, value in sam(w).items()},
        "several SAMs",
        "'student.', 'teacher.'",
    ),
    train("NaN", lambda w: changed(w, TOKEN, lambda t: t / 0 * 0), "sam.pth", TOKEN, "NaN"),
    train("int64", lambda w: changed(w, TOKEN, torch.Tensor.long), "sam.pth", TOKEN, "int64"),
    train("complex", lambda w: changed(w, TOKEN, lambda t: t.to(torch.complex64)), TOKEN, "complex64"),
    train("sparse", lambda w: changed(w, TOKEN, torch.Tensor.to_sparse), "sam.pth", "expected names and tensors"),
    train("shape", lambda w: changed(w, TOKEN, lambda t: t[:, 1:].clone()), TOKEN, "has shape", "model.seg_head.vit"),
    train(
        "of DataParallel, one missing",
        lambda w: {f"module.{name}": value for name, value in sam(w).items() if name != TOKEN},
        f"missing tensor module.{TOKEN}",
    ),
    train("wide", sam, "has shape", sizes={**MICRO, "width": 65536}),
    train("deep", sam, "too few for 999 blocks", sizes={**MICRO, "depth": 999}),
    train("folder", lambda w: w.folder / "data", "config.json", "missing"),
    train("other folder", lambda w: w.text("x/config.json", '{"model_type": "vit"}').parent, "'vit'", "expected 'sam'"),
    train("broken folder", lambda w: w.text("x/config.json", "{").parent, "config.json", "not JSON"),
]


LLAVA = {
    "model_type": "llava",
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 400,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}
ORIGINAL = {"model_type": "llava_mistral", "mm_vision_tower": "./none", "mm_projector_type": "mlp2x_gelu"}


def llava(name: str, config: Any, *words: str, **files: str | bytes) -> Row:
    """A row of `medisee train` with the folder of a language model: its config.json, tokenizer and one weight."""

    def arguments(w: Workspace) -> list[str]:
        folder = w.text("llava/config.json", config if isinstance(config, str) else json.dumps(config)).parent
        for file in (TOKENIZER, TOKENIZER_CONFIG):
            shutil.copy(w.checkpoint / file, folder / file)
        save_file(
            {"lm_head.weight": torch.ones(400, 32), "model.language_model.norm.weight": torch.ones(32)},
            folder / WEIGHTS,
        )
        for file, content in files.items():
            w.text(f"llava/{file.replace('__', '.')}", content)
        model = w.settings["model"]
        mllm = {**model["mllm"], "source": str(folder), "converted": str(w.folder / "converted")}
        return w.train(model={"mllm": mllm})

    return Row(f"language model {name}", "train", arguments, words)


def gguf(name: str, content: str | bytes, *words: str) -> Row:
    """A row of `medisee train` with a GGUF file."""

    def arguments(w: Workspace) -> list[str]:
        mllm = {**w.settings["model"]["mllm"], "converted": str(w.folder / "converted")}
        return w.train(model={"mllm": {**mllm, "source": str(w.text("tiny.gguf", content))}})

    return Row(f"GGUF {name}", "train", arguments, words)


LANGUAGE_MODELS = [
    llava("of no kind", {"model_type": "mistral"}, "config.json", "'mistral', which is not a Llava"),
    llava("list as config", "[1]", "config.json", "no JSON object"),
    llava("nested config", "[" * 100_000, "config.json", "nested too deeply"),
    llava(
        "many layers",
        {**LLAVA, "text_config": {**LLAVA["text_config"], "num_hidden_layers": 100_000}},
        "100,001 layers",
    ),
    llava(
        "wide",
        {**LLAVA, "text_config": {**LLAVA["text_config"], "hidden_size": 1 << 20}},
        "config.json",
        "weights, but",
    ),
    llava("text as width", {**LLAVA, "text_config": {**LLAVA["text_config"], "hidden_size": "wide"}}, "config.json"),
    llava("list as text_config", {**LLAVA, "text_config": [1]}, "config.json", "does not describe"),
    llava("no heads", {**LLAVA, "text_config": {**LLAVA["text_config"], "num_attention_heads": 0}}, "config.json"),
    llava("one weight", LLAVA, "config.json", "does not describe the model of these weights"),
    llava("pointer", LLAVA, "model.safetensors", "Git LFS", model__safetensors=POINTER),
    llava("page as tokenizer", LLAVA, "tokenizer.json", "not JSON", tokenizer__json=PAGE),
    llava(
        "code of a model", {**LLAVA, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "'own'", "not a Llava"
    ),
    llava("original without a vision tower", ORIGINAL, "./none", "needs this vision tower"),
    gguf("text", "hello", "tiny.gguf", "not a language model"),
    gguf("empty", "", "tiny.gguf", "not a language model"),
    gguf("page", PAGE, "tiny.gguf", "not a language model"),
    gguf("cut", b"GGUF\x03\0\0\0" + b"\x01\0\0\0\0\0\0\0" * 2, "tiny.gguf", "not a language model"),
]

ROWS = [
    ask("NaN", lambda w: with_values(w, ROUTER, float("nan")), WEIGHTS, ROUTER, "NaN or infinite"),
    ask("infinite", lambda w: with_values(w, ROUTER, float("inf")), ROUTER, "NaN or infinite"),
    ask("minus infinite", lambda w: with_values(w, EMBEDDING, float("-inf")), EMBEDDING, "NaN or infinite"),
    ask("int64", lambda w: with_type(w, torch.int64), ROUTER, "int64", "cannot be weights"),
    ask("uint8", lambda w: with_type(w, torch.uint8), ROUTER, "uint8", "cannot be weights"),
    ask("bool", lambda w: with_type(w, torch.bool), ROUTER, "bool", "cannot be weights"),
    ask("float8", lambda w: with_type(w, torch.float8_e4m3fn), ROUTER, "F8_E4M3", "without quantization"),
    ask("complex", lambda w: with_type(w, torch.complex64), ROUTER, "C64", "16, 32 or 64 bits"),
    ask("missing tensor", lambda w: with_tensors(w, lambda t: t.pop(ROUTER)), f"missing tensor {ROUTER}"),
    ask("strange tensor", lambda w: with_tensors(w, lambda t: t.update(x=torch.ones(1))), "left-over tensor x"),
    ask(
        "other shape",
        lambda w: with_tensors(w, lambda t: t.update({ROUTER: t[ROUTER][:-1].clone()})),
        f"{ROUTER} has shape (15, 64), expected (16, 64)",
    ),
    ask(
        "all that does not fit",
        lambda w: with_tensors(
            w, lambda t: t.update({"x": t.pop(ROUTER), "seg_router.gate.0.bias": t["seg_router.gate.0.bias"].long()})
        ),
        f"missing tensor {ROUTER}",
        "left-over tensor x",
        "int64",
    ),
    ask("cut weights", lambda w: cut(w, 100), WEIGHTS, "truncated"),
    ask("empty weights", lambda w: with_file(w, WEIGHTS, ""), WEIGHTS, "an empty file"),
    ask("page as weights", lambda w: with_file(w, WEIGHTS, PAGE), WEIGHTS, "a web page"),
    ask("pointer as weights", lambda w: with_file(w, WEIGHTS, POINTER), WEIGHTS, "Git LFS"),
    ask("pickle as weights", lambda w: with_file(w, WEIGHTS, b"\x80\x02}q\x00."), WEIGHTS, "not a safetensors file"),
    ask("long header", lambda w: with_file(w, WEIGHTS, b"\xff" * 64), WEIGHTS, "not a safetensors file"),
    ask("no weights", lambda w: with_file(w, WEIGHTS, None), WEIGHTS, "missing", "copy the whole"),
    ask("folder as weights", folder_as_weights, WEIGHTS, "not a safetensors file"),
    ask("numbers as frozen", lambda w: w.own_checkpoint(frozen=[1]), CONFIG, "frozen.0"),
    ask("text as frozen", lambda w: w.own_checkpoint(frozen="no"), CONFIG, "frozen"),
    ask("list as run", lambda w: w.own_checkpoint(run=[1]), CONFIG, "run"),
    ask("list as model", lambda w: w.own_checkpoint(model=[1]), CONFIG, "model"),
    ask("no model", lambda w: w.own_checkpoint(model=None), CONFIG, "not a medisee checkpoint"),
    ask("other format", lambda w: w.own_checkpoint(format=2), CONFIG, "of format 1"),
    ask("unknown key", lambda w: with_model(w, lambda m: m.update(router_hiden=8)), "router_hiden", "'router_hidden'"),
    ask("no heads", lambda w: with_model(w, lambda m: m["mllm"]["size"].update(heads=0)), CONFIG),
    ask("text as width", lambda w: with_model(w, lambda m: m["mllm"]["size"].update(hidden="wide")), CONFIG, "hidden"),
    ask("many layers", lambda w: with_model(w, lambda m: m["mllm"]["size"].update(layers=999)), CONFIG, "layers"),
    ask("wide model", lambda w: with_model(w, lambda m: m["mllm"]["size"].update(hidden=8192)), "has shape"),
    ask(
        "wide router", lambda w: with_model(w, lambda m: m.update(router_hidden=32768)), f"{ROUTER} has shape (16, 64)"
    ),
    ask("large SAM", lambda w: with_model(w, lambda m: m["seg_head"].update(vit="h")), "missing tensor seg_head"),
    ask("other tokens", lambda w: with_model(w, lambda m: m.update(candidate_tokens=["[A]", "[B]"])), "[A], [B]"),
    ask("empty config", lambda w: with_file(w, CONFIG, ""), CONFIG, "not JSON"),
    ask("list as config", lambda w: with_file(w, CONFIG, "[1]"), CONFIG, "no JSON object"),
    ask("nested config", lambda w: with_file(w, CONFIG, "[" * 100_000), CONFIG, "nested too deeply"),
    ask("NaN in config", lambda w: with_file(w, CONFIG, '{"format": NaN}'), CONFIG, "NaN is not JSON"),
    ask("config twice", lambda w: with_file(w, CONFIG, '{"format": 1, "format": 1}'), CONFIG, "'format' is twice"),
    ask("half a character", lambda w: with_file(w, CONFIG, '{"format": "\\ud800"}'), CONFIG, "not a character"),
    ask("bytes as config", lambda w: with_file(w, CONFIG, b"\xff\xfe{}"), CONFIG, "not JSON"),
    ask("no tokenizer", lambda w: with_file(w, TOKENIZER, None), f"no {TOKENIZER}", "copy the tokenizer again"),
    ask("empty tokenizer", lambda w: with_file(w, TOKENIZER, ""), TOKENIZER, "not JSON"),
    ask("other tokenizer", lambda w: with_file(w, TOKENIZER, "{}"), "its tokenizer cannot be used"),
    ask("nested tokenizer", lambda w: with_file(w, TOKENIZER, '{"a":' * 50_000), TOKENIZER, "nested too deeply"),
    ask("tokenizer twice", lambda w: with_file(w, TOKENIZER, '{"model": {}, "model": {}}'), TOKENIZER, "is twice"),
    ask("huge tokenizer", huge, TOKENIZER, "too large", "512 MiB"),
    ask("page as tokenizer", lambda w: with_file(w, TOKENIZER_CONFIG, PAGE), TOKENIZER_CONFIG, "not JSON"),
    ask("code of a tokenizer", lambda w: with_json(w, TOKENIZER_CONFIG, auto_map), TOKENIZER_CONFIG, "never run"),
    ask("no [SEG]", lambda w: without_token(w, "[SEG]"), CONFIG, "[SEG]", "not in the checkpoint's tokenizer"),
    ask("no <image>", lambda w: without_token(w, "<image>"), "checkpoint", "no token for <image>"),
    ask("gap in ids", lambda w: with_json(w, TOKENIZER, leave_a_gap), "leaves out ids"),
    ask(
        "more tokens", lambda w: with_tensors(w, lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1].clone()})), EMBEDDING
    ),
    ask("index leads out", lambda w: in_shards(w, {ROUTER: "../model.safetensors"}), INDEX, "files beside it"),
    ask("index at root", lambda w: in_shards(w, {ROUTER: "/etc/passwd"}), INDEX, "files beside it"),
    ask("index of dots", lambda w: in_shards(w, {ROUTER: ".."}), INDEX, "files beside it"),
    ask("long name in index", lambda w: in_shards(w, {ROUTER: "x" * 5000}), INDEX, "files beside it"),
    ask("missing shard", lambda w: in_shards(w, {ROUTER: "model-3.safetensors"}), "model-3.safetensors", "not there"),
    ask("tensor in two shards", lambda w: in_shards(w, twice=True), "model-", "which"),
    ask("empty index", lambda w: with_file(w, INDEX, "{}"), INDEX, "no weight_map"),
    ask("page as index", lambda w: with_file(w, INDEX, PAGE), INDEX, "not JSON"),
    ask("run", lambda w: run_folder(w, "checkpoint"), "the folder of a run", "demo/checkpoint"),
    ask("run without checkpoint", lambda w: run_folder(w, "last-00000002"), "the folder of a run", "last-00000002"),
    ask("other folder", lambda w: w.folder / "data", CONFIG, "no checkpoint here"),
    Row(
        "NaN in weights", "eval", lambda w: w.evaluate(checkpoint=with_values(w, ROUTER, float("nan"))), (ROUTER, "NaN")
    ),
    Row("numbers as frozen", "eval", lambda w: w.evaluate(checkpoint=w.own_checkpoint(frozen=[1])), ("frozen.0",)),
    Row("NaN", "train", lambda w: w.train(train={"init": str(with_values(w, ROUTER, float("nan")))}), (ROUTER, "NaN")),
    Row("run as init", "train", lambda w: w.train(train={"init": str(run_folder(w, "checkpoint"))}), ("of a run",)),
    Row(
        "plan of a list as model",
        "ask",
        lambda w: ["--plan", "--checkpoint", w.own_checkpoint(model=[1])],
        ("config.json", "model"),
    ),
    *SAMS,
    *LANGUAGE_MODELS,
]
