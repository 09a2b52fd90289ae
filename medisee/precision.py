"""Which floating-point type a run computes in, and which ones it stores."""

from __future__ import annotations

import torch
from torch import nn


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolves `float32`, `bfloat16` or `auto`.

    `auto` is bfloat16 where the device multiplies it faster than float32: GPUs since Ampere, CPUs with AMX or AVX-512's
    bfloat16 products (AMD since Zen 4).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def is_mixed(model: nn.Module) -> bool:
    """Tells whether some weights are stored in 16 bit beside others in 32, so that autocast has to join them."""
    return len({parameter.dtype for parameter in model.parameters()}) > 1


def to_training_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores what learns in float32, where small steps count; frozen 16-bit weights stay so in a 16-bit run.

    Frozen float16 weights become bfloat16 in a bfloat16 run: beside it, float16 would make float32 of every sum. Packed
    weights of 4 or 8 bits, which are integers, stay as they are.

    Args:
        model: changed in place.
        dtype: what the run computes in.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.requires_grad or dtype == torch.float32:
            parameter.data = parameter.data.float()
        elif parameter.dtype == torch.float16 and dtype == torch.bfloat16:
            parameter.data = parameter.data.bfloat16()
