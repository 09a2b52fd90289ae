"""Turns whole models into checkpoint folders of ours, and a checkpoint's SAM into transformers'. Run it as

  python scripts/convert_checkpoint.py from-release --weights weights/medisee --config configs/medisee_7b.yaml --out converted
  python scripts/convert_checkpoint.py merge --checkpoint runs/medisee_7b/checkpoint --out merged
  python scripts/convert_checkpoint.py export-sam --checkpoint runs/medisee_7b/checkpoint --out sam

What the first two write holds all its weights (but LiteMedSAM's, which come with a package) and is loaded like any
checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from medisee.config.load import load_config
from medisee.config.model import PLACING, LanguageSize, Mllm, Model
from medisee.foundation.errors import InputError, exit_code
from medisee.foundation.files import atomic_path, write_json
from medisee.models.medisee import MediSee
from medisee.models.seg_head import vit_sizes
from medisee.weights.checkpoints import (
    WEIGHTS,
    check_replaceable,
    load_checkpoint,
    local_checkpoint,
    merge_adapters,
    read_run,
    save_checkpoint,
    without_bases,
    write_description,
)
from medisee.weights.llava_format import original_tokenizer
from medisee.weights.medisee_release import RELEASE_TOKENS, PlacedTensor, Report, place, read_placed, release_key
from medisee.weights.sam_format import write_transformers
from medisee.weights.shards import (
    SAFETENSORS_INDEX,
    Shard,
    index_problems,
    open_shard,
    read_json,
    shard_paths,
    some,
    weight_map,
    write_shard,
)
from medisee.weights.tokenizer import IMAGE_TOKEN, add_candidate_tokens, token_id

FROM_RELEASE = """Converts the authors' checkpoint, strictly: every tensor has its place, or the command says which has not.
The weights are read file by file; nothing in them is executed.

  python scripts/convert_checkpoint.py from-release --weights weights/medisee --config configs/medisee_7b.yaml --out converted

Sizes come from the configuration and are compared with the weights. The model computes as the release does
(compat=release), since its weights were trained so; add compat=none, or single settings such as model.box_frame=resized,
for the correct behaviour. Weights that were merged before have no LoRA: add model.mllm.train=frozen.
"""
MERGE = """Folds LoRA and single token rows into the weights that they adapt and writes one model that needs no others
and computes the same.

  python scripts/convert_checkpoint.py merge --checkpoint runs/medisee_7b/checkpoint --out merged

The whole model is held in memory. Weights of 16 bits stay so, which rounds what is folded into them.
"""
EXPORT = """Writes the SAM or MedSAM of a checkpoint, with its trained mask decoder, as a folder of transformers' SamModel,
which model.seg_head.checkpoint takes as well.

  python scripts/convert_checkpoint.py export-sam --checkpoint runs/medisee_7b/checkpoint --out sam

LoRA on its image encoder is folded in. The whole model is held in memory.
"""


@dataclass(frozen=True, slots=True)
class Planned:
    """A file of the release and the place of its tensors."""

    path: Path
    placed: dict[str, PlacedTensor]


def from_release(weights: Path, model: Model, tokenizer_folder: Path, out: Path) -> Report:
    """Converts the authors' checkpoint into a folder of ours.

    Args:
        weights: the authors' folder: sharded .bin or .safetensors.
        model: its configuration; where it names published weights, those of the release take their place.
        tokenizer_folder: with or without the candidate tokens, which are added in the release's order.
        out: replaced as a whole if it holds a checkpoint.

    Returns:
        What went where.

    Raises:
        InputError: another model, foreign or truncated files, missing shards or tensors, keys without a place, other
            shapes, another vocabulary; `out` holds something else.
    """
    check_replaceable(out)
    files = shard_paths(weights)
    _check_model(model, weights)
    tokenizer = _release_tokenizer(tokenizer_folder)
    mllm = model.mllm.model_copy(update={"train_projector": False})
    model = without_bases(model.model_copy(update={"mllm": mllm}))
    report = Report()
    planned = _plan(files, weights, _shapes(model, tokenizer), model, report)
    if report.dtypes.most_common(1)[0][0] == "bfloat16":
        model = model.model_copy(update={"mllm": model.mllm.model_copy(update={"dtype": "bfloat16"})})
    run = {"converted": "release", "weights": weights.absolute().name, "tensors": dict(report.placed)}
    with atomic_path(out) as temporary:
        temporary.mkdir()
        _write(planned, temporary, model)
        tokenizer.save_pretrained(temporary)
        write_description(temporary, model, run)
    return report


def _check_model(model: Model, weights: Path) -> None:
    wanted = {
        "model.fusion": (model.fusion, "soft"),
        "model.box_start": (model.box_start, "centre"),
        "model.mllm.image_tokens": (model.mllm.image_tokens, "vision_tower"),
        "model.mllm.train_tokens": (model.mllm.train_tokens, "all"),
        "model.seg_head.kind": (model.seg_head.kind, "medsam"),
        "model.candidate_tokens": (sorted(model.candidate_tokens), sorted(RELEASE_TOKENS)),
    }
    problems = [
        f"{name} = {value!r}: the release has {expected!r}; set it so."
        for name, (value, expected) in wanted.items()
        if value != expected
    ]
    described = weights / "config.json"
    stated, size = read_json(described) if described.exists() else {}, model.mllm.size
    # Heads, base and epsilon show in no shape.
    sizes = {
        "hidden_size": ("hidden", size.hidden),
        "num_hidden_layers": ("layers", size.layers),
        "num_attention_heads": ("heads", size.heads),
        "num_key_value_heads": ("kv_heads", size.kv_heads),
        "intermediate_size": ("intermediate", size.intermediate),
        "rope_theta": ("rope_theta", size.rope_theta),
        "rms_norm_eps": ("rms_eps", size.rms_eps),
    }
    problems += [
        f"{described}: {key} is {stated[key]}, but model.mllm.size.{name} is {value}; correct the configuration."
        for key, (name, value) in sizes.items()
        if key in stated and stated[key] != value
    ]
    if problems:
        raise InputError(problems)


def _release_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one with the release's tokenizer files.")
    tokenizer = original_tokenizer(folder)
    tokenizer.pad_token = tokenizer.unk_token
    add_candidate_tokens(tokenizer, tuple(reversed(RELEASE_TOKENS)))
    image, last = token_id(tokenizer, IMAGE_TOKEN), len(tokenizer) - 1
    if image != last:
        raise InputError(
            f"{folder}: {IMAGE_TOKEN} has id {image}, expected the last one, {last}, which the release does not use; "
            "give the release's own tokenizer, or that of the LLaVA-Med it was trained from."
        )
    return tokenizer


def _shapes(model: Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Size]:
    with torch.device("meta"):
        built = MediSee(model, tokenizer, weights=False)
    return {name: value.shape for name, value in built.state_dict().items()}


def _plan(
    files: list[Path], weights: Path, expected: Mapping[str, torch.Size], model: Model, report: Report
) -> list[Planned]:
    planned: list[Planned] = []
    problems: list[str] = []
    seen: set[str] = set()
    places = weight_map(weights)
    for path in files:
        try:
            with open_shard(path) as shard:
                problems += index_problems(shard, places)
                placed = place(shard, expected=expected, config=model, report=report)
        except InputError as error:
            problems += error.problems
            continue
        if twice := seen & set(placed):
            problems.append(f"{path}: holds {some({placed[name].key for name in twice})} once more; fetch it again.")
        seen |= set(placed)
        planned.append(Planned(path, placed))
    missing = {release_key(name) for name in expected if name not in seen}
    if missing and not problems:  # what could not be placed is missing as well, and was named already
        problems.append(f"{weights}: lacks {some(missing)}; fetch the checkpoint again, or correct the configuration.")
    if problems:
        raise InputError(problems)
    return [one for one in planned if one.placed]


def _write(planned: list[Planned], folder: Path, model: Model) -> None:
    files: dict[str, str] = {}
    for number, one in enumerate(tqdm(planned, desc="converting", unit="file"), start=1):
        name = WEIGHTS if len(planned) == 1 else f"model-{number:05d}-of-{len(planned):05d}.safetensors"
        with open_shard(one.path) as shard:
            facts = {ours: tensor.facts for ours, tensor in one.placed.items()}
            write_shard(folder / name, facts, _reader(shard, one, model))
        files |= dict.fromkeys(one.placed, name)
    if len(planned) > 1:
        size = sum(tensor.facts.bytes for one in planned for tensor in one.placed.values())
        write_json(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": size}, "weight_map": files})


def _reader(shard: Shard, planned: Planned, model: Model) -> Callable[[str], Tensor]:
    return lambda name: read_placed(shard, planned.placed, name, model)


def merge(checkpoint: Path, out: Path) -> None:
    """Writes a checkpoint as one model without LoRA that needs no other weights.

    Args:
        checkpoint: a checkpoint folder.
        out: replaced as a whole if it holds a checkpoint.

    Raises:
        InputError: no checkpoint; a language model that cannot be built from sizes; `out` holds something else.
    """
    check_replaceable(out)
    folder = local_checkpoint(checkpoint)
    model = load_checkpoint(folder, _in_full)
    merge_adapters(model)
    model.config = _standalone(model, folder)
    save_checkpoint(model, out, {**read_run(folder), "merged": True})


def export_sam(checkpoint: Path, out: Path) -> None:
    """Writes a checkpoint's seg head as a folder of transformers' SamModel.

    Args:
        checkpoint: a checkpoint folder.
        out: a new folder.

    Raises:
        InputError: no checkpoint; a seg head of another kind; `out` is there already.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; name a new folder.")
    folder = local_checkpoint(checkpoint)
    model = load_checkpoint(folder, _in_full)
    head = model.config.seg_head
    if head.kind not in ("sam", "medsam"):
        raise InputError(
            f"{folder}: model.seg_head.kind is {head.kind!r}, which transformers' SamModel is not; expected 'sam' or 'medsam'; "
            "give another checkpoint."
        )
    merge_adapters(model)
    with atomic_path(out) as temporary:
        write_transformers(model.seg_head.state_dict(), vit_sizes(head), head.size, temporary)


def _in_full(config: Model, tokenizer: PreTrainedTokenizerBase) -> MediSee:
    # Layers of 4 bits, or on a disk, cannot take up LoRA.
    mllm = config.mllm.model_copy(update=dict.fromkeys(PLACING))
    return MediSee(config.model_copy(update={"mllm": mllm}), tokenizer)


def _standalone(model: MediSee, folder: Path) -> Model:
    """Describes a merged model by sizes alone."""
    mllm, llava = model.config.mllm, model.mllm
    stored = {value.dtype for value in llava.parameters() if not value.requires_grad}
    changes: dict[str, Any] = {
        "dtype": next((name for name in ("bfloat16", "float16") if getattr(torch, name) in stored), "float32"),
        "train": "frozen" if mllm.train == "lora" else mllm.train,
        "train_tokens": "all",
        "train_projector": any(p.requires_grad for p in llava.model.multi_modal_projector.parameters()),
    }
    if mllm.source is not None:
        changes |= _sizes(llava.config, mllm, folder)
        # Rows behind the last token are padding, which a model built from sizes does not have.
        llava.resize_token_embeddings(len(model.tokenizer))
    head = model.config.seg_head.model_copy(update={"lora": None})
    return without_bases(model.config.model_copy(update={"mllm": mllm.model_copy(update=changes), "seg_head": head}))


def _sizes(llava: Any, mllm: Mllm, folder: Path) -> dict[str, Any]:
    text, vision = llava.text_config, llava.vision_config
    rope, heads_width = text.rope_parameters, text.hidden_size // text.num_attention_heads
    given = {
        "text hidden_act": (text.hidden_act, "silu"),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "sliding_window": (getattr(text, "sliding_window", None), None),
        "head_dim": (text.head_dim or heads_width, heads_width),
        "vision hidden_act": (vision.hidden_act, "quick_gelu"),
        "vision layer_norm_eps": (vision.layer_norm_eps, 1e-5),
        "vision_feature_layer": (llava.vision_feature_layer, -2),
        "vision_feature_select_strategy": (llava.vision_feature_select_strategy, "default"),
    }
    problems = [
        f"{folder}: {name} of {mllm.source} is {value!r}, but models built from sizes have {expected!r}; it cannot be merged."
        for name, (value, expected) in given.items()
        if value != expected
    ]
    if problems:
        raise InputError(problems)
    size = LanguageSize(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        intermediate=text.intermediate_size,
        rope_theta=rope["rope_theta"],
        rms_eps=text.rms_norm_eps,
        dropout=text.attention_dropout,
    )
    if mllm.image_tokens == "seg_head":
        return {"size": size}
    return {
        "size": size,
        "vision_hidden": vision.hidden_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_heads": vision.num_attention_heads,
        "vision_intermediate": vision.intermediate_size,
        "vision_size": vision.image_size,
        "vision_patch": vision.patch_size,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Converts from the command line."""
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)
    print(f"done: the {'SAM' if arguments.command == 'export-sam' else 'checkpoint'} is in {arguments.out}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="convert_checkpoint.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="from-release|merge|export-sam")
    release = commands.add_parser(
        "from-release", help="the authors' checkpoint", description=FROM_RELEASE, formatter_class=raw
    )
    release.set_defaults(run=_from_release)
    add = release.add_argument
    add("--weights", type=Path, required=True, help="folder with the authors' .bin or .safetensors files")
    add("--config", type=Path, required=True, help="YAML run that describes the model, as configs/medisee_7b.yaml")
    add("--tokenizer", type=Path, help="folder with its tokenizer (default: that of the weights)")
    add("--out", type=Path, required=True, help="checkpoint folder to write")
    add("overrides", nargs="*", help="dotted overrides, such as compat=none")
    merged = commands.add_parser("merge", help="a checkpoint without LoRA", description=MERGE, formatter_class=raw)
    merged.set_defaults(run=_merge)
    add = merged.add_argument
    add("--checkpoint", type=Path, required=True, help="checkpoint folder, or hub id")
    add("--out", type=Path, required=True, help="checkpoint folder to write")
    sam = commands.add_parser("export-sam", help="a checkpoint's SAM", description=EXPORT, formatter_class=raw)
    sam.set_defaults(run=_export_sam)
    sam.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder, or hub id")
    sam.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser


def _from_release(arguments: argparse.Namespace) -> None:
    # Only the model matters here, not what a run would choose its checkpoint on.
    config = load_config(arguments.config, ["compat=release", "data.select=val", *arguments.overrides])
    tokenizer = arguments.tokenizer or arguments.weights
    report = from_release(arguments.weights, config.model, tokenizer, arguments.out)
    print("\n".join(report.lines()))


def _merge(arguments: argparse.Namespace) -> None:
    merge(arguments.checkpoint, arguments.out)


def _export_sam(arguments: argparse.Namespace) -> None:
    export_sam(arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
