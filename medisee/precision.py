"""Which floating-point type a run computes in."""

from __future__ import annotations

import torch


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolves `float32`, `bfloat16` or `auto`.

    `auto` is bfloat16 where the device multiplies it faster than float32: GPUs since Ampere, CPUs with AMX.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
