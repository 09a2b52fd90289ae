"""Converts whole models to checkpoint folders, and a checkpoint's SAM to transformers' format. Run it as

  python scripts/convert_checkpoint.py from-release --weights weights/medisee --config configs/medisee_7b.yaml --out new
  python scripts/convert_checkpoint.py merge --checkpoint runs/medisee_7b/checkpoint --out merged
  python scripts/convert_checkpoint.py export-sam --checkpoint runs/medisee_7b/checkpoint --out sam

The first two write all of a model's weights, except LiteMedSAM's, which come with a package. The result is loaded like
any checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medisee.config.load import load_config
from medisee.config.model import PLACING, LanguageSize, Mllm, Model
from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError, exit_code
from medisee.foundation.files import atomic_path
from medisee.foundation.json_files import read_json
from medisee.foundation.output import check_output, replaced_folder
from medisee.models.medisee import MediSee
from medisee.models.seg_head import vit_sizes
from medisee.weights.checkpoints import (
    CHECKPOINT,
    load_checkpoint,
    local_checkpoint,
    merge_adapters,
    read_description,
    save_checkpoint,
    without_bases,
    write_description,
)
from medisee.weights.llava_format import original_tokenizer
from medisee.weights.medisee_release import RELEASE_TOKENS, Report, our_values, place, release_key
from medisee.weights.sam_format import write_transformers
from medisee.weights.shards import CONFIG, plan_shards, shard_paths, some, write_shards
from medisee.weights.tokenizer import IMAGE_TOKEN, add_candidate_tokens, token_id

FROM_RELEASE = """Converts the authors' checkpoint strictly: a tensor without a place, or a missing one, is an error.
The weights are read file by file; nothing in them is executed.

Sizes come from the configuration and are compared with the weights. The model computes as the release does
(compat=release), since its weights were trained so; add compat=none, or single settings such as
model.box_frame=resized, for the correct behaviour. Merged weights have no LoRA: add model.mllm.train=frozen.
"""
MERGE = """Folds LoRA and separately trained token rows into the weights that they adapt. The result is one model that
needs no other weights and computes the same.

The whole model is held in memory. 16-bit weights stay so, which rounds what is folded into them.
"""
EXPORT = """Writes the SAM or MedSAM of a checkpoint, with its trained mask decoder, as a folder of transformers'
SamModel, which model.seg_head.checkpoint takes as well.

LoRA on its image encoder is folded in. The whole model is held in memory.
"""

_LANGUAGE_SIZES = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "intermediate",
    "rms_norm_eps": "rms_eps",
}
"""Names of sizes in a config.json of transformers or the release, and in model.mllm.size."""


def from_release(weights: Path, model: Model, tokenizer_folder: Path, out: Path) -> Report:
    """Converts the authors' .bin or .safetensors files to a checkpoint folder, which replaces a checkpoint at `out`.

    The release's weights replace the published ones that `model` names. The tokenizer's folder may lack the candidate
    tokens, which are added in the release's order.
    """
    need = sum(path.stat().st_size for path in shard_paths(weights))
    inputs = {"the weights": weights, "the tokenizer": tokenizer_folder}
    check_output(out, CHECKPOINT, inputs=inputs, whole=True, need=need)
    _check_model(model, weights)
    tokenizer = _release_tokenizer(tokenizer_folder)
    mllm = model.mllm.model_copy(update={"train_projector": False})
    model = without_bases(model.model_copy(update={"mllm": mllm}))
    with torch.device("meta"):
        built = MediSee(model, tokenizer, weights=False)
    expected = {name: value.shape for name, value in built.state_dict().items()}
    report = Report()
    plans, problems = plan_shards(weights, lambda shard: place(shard, expected=expected, config=model, report=report))
    missing = expected.keys() - {name for plan in plans for name in plan.tensors}
    if missing and not problems:  # what could not be placed is missing as well, and was named already
        lacking = some(release_key(name) for name in missing)
        problems = [f"{weights}: lacks {lacking}; fetch the checkpoint again, or correct the configuration."]
    if problems:
        raise InputError(problems)
    if report.dtypes.most_common(1)[0][0] == "bfloat16":
        model = model.model_copy(update={"mllm": model.mllm.model_copy(update={"dtype": "bfloat16"})})
    run = {"converted": "release", "weights": weights.absolute().name, "tensors": dict(report.placed)}
    with replaced_folder(out, CHECKPOINT) as temporary:
        write_shards(plans, temporary, lambda name, values: our_values(name, values, model.candidate_tokens))
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
        f"{name} = {value!r}: the release has {expected!r}; use that."
        for name, (value, expected) in wanted.items()
        if value != expected
    ]
    described = weights / CONFIG
    stated = read_json(described, "the release's settings") if described.exists() else {}
    # Shapes do not show heads, base and epsilon.
    problems += [
        f"{described}: {key} is {stated[key]}, but model.mllm.size.{name} is {value}; correct the configuration."
        for key, name in {**_LANGUAGE_SIZES, "rope_theta": "rope_theta"}.items()
        if key in stated and stated[key] != (value := getattr(model.mllm.size, name))
    ]
    if problems:
        raise InputError(problems)


def _release_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give that of the release's tokenizer.")
    tokenizer = original_tokenizer(folder)
    tokenizer.pad_token = tokenizer.unk_token
    add_candidate_tokens(tokenizer, tuple(reversed(RELEASE_TOKENS)))
    image, last = token_id(tokenizer, IMAGE_TOKEN), len(tokenizer) - 1
    if image != last:
        raise InputError(
            f"{folder}: {IMAGE_TOKEN} has id {image}, expected the last one, {last}; "
            "give the release's own tokenizer, or that of the LLaVA-Med from which it was trained."
        )
    return tokenizer


def merge(checkpoint: Path, out: Path) -> None:
    """Writes a checkpoint as one model without LoRA that needs no other weights; replaces a checkpoint at `out`."""
    folder = local_checkpoint(checkpoint)
    need = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_output(out, CHECKPOINT, inputs={"the checkpoint": folder}, whole=True, need=need)
    model = load_checkpoint(folder, _in_full)
    merge_adapters(model)
    model.config = _standalone(model, folder)
    save_checkpoint(model, out, {**(read_description(folder).run or {}), "merged": True})


def export_sam(checkpoint: Path, out: Path) -> None:
    """Writes a checkpoint's seg head as a new folder of transformers' SamModel."""
    if out.exists():
        raise InputError(f"{out}: is there already; name a new folder.")
    check_output(out)
    folder = local_checkpoint(checkpoint)
    model = load_checkpoint(folder, _in_full)
    head = model.config.seg_head
    if head.kind not in ("sam", "medsam"):
        raise InputError(f"{folder}: model.seg_head.kind is {head.kind!r}; give a checkpoint with 'sam' or 'medsam'.")
    merge_adapters(model)
    with atomic_path(out) as temporary:
        write_transformers(model.seg_head.state_dict(), vit_sizes(head), head.size, temporary)


def _in_full(config: Model, tokenizer: PreTrainedTokenizerBase, *, weights: bool = True) -> MediSee:
    # LoRA cannot be folded into layers of 4 bits or on a disk.
    mllm = config.mllm.model_copy(update=dict.fromkeys(PLACING))
    return MediSee(config.model_copy(update={"mllm": mllm}), tokenizer, weights=weights)


def _standalone(model: MediSee, folder: Path) -> Model:
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
        f"{folder}: cannot be merged, since {name} of {mllm.source} is {value!r}, "
        f"but models built from sizes have {expected!r}."
        for name, (value, expected) in given.items()
        if value != expected
    ]
    if problems:
        raise InputError(problems)
    ours = {name: getattr(text, key) for key, name in _LANGUAGE_SIZES.items()}
    size = LanguageSize(**ours, rope_theta=rope["rope_theta"], dropout=text.attention_dropout)
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
    arguments = parse_words(_parser(), argv, more="overrides")
    if arguments.command == "from-release":
        # Only the model matters here: not what a run would choose its checkpoint on, nor how answers would be decoded.
        named = {word.partition("=")[0] for word in arguments.overrides}
        ours = [f"{key}={value}" for key, value in (("compat", "release"), ("data.select", "val")) if key not in named]
        model = load_config(arguments.config, [*ours, *arguments.overrides]).model
        report = from_release(arguments.weights, model, arguments.tokenizer or arguments.weights, arguments.out)
        print("\n".join(report.lines()))
    elif arguments.command == "merge":
        merge(arguments.checkpoint, arguments.out)
    else:
        export_sam(arguments.checkpoint, arguments.out)
    print(f"done: the {'SAM' if arguments.command == 'export-sam' else 'checkpoint'} is in {arguments.out}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="from-release|merge|export-sam")
    release = commands.add_parser(
        "from-release", help="the authors' checkpoint", description=FROM_RELEASE, formatter_class=raw
    )
    add = release.add_argument
    add("--weights", type=a_path, required=True, help="folder with the authors' .bin or .safetensors files")
    add(
        "--config",
        type=a_path,
        required=True,
        help="YAML run that describes the model, such as configs/medisee_7b.yaml",
    )
    add("--tokenizer", type=a_path, help="folder with its tokenizer (default: that of the weights)")
    add("--out", type=a_path, required=True, help="checkpoint folder to write")
    add("overrides", nargs="*", help="dotted overrides, such as compat=none")
    merged = commands.add_parser("merge", help="a checkpoint without LoRA", description=MERGE, formatter_class=raw)
    sam = commands.add_parser("export-sam", help="a checkpoint's SAM", description=EXPORT, formatter_class=raw)
    for command, what in ((merged, "checkpoint folder"), (sam, "folder")):
        command.add_argument("--checkpoint", type=a_path, required=True, help="checkpoint folder, or hub id")
        command.add_argument("--out", type=a_path, required=True, help=f"{what} to write")
    return parser


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
