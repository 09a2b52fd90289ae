"""What depends on the machine: which floating-point types are fast, and how the C library's allocator keeps memory."""

from __future__ import annotations

import ctypes
import sys

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
    """Tells whether a model stores its weights in more than one type, so that autocast has to combine them."""
    return len({parameter.dtype for parameter in model.parameters()}) > 1


def to_training_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores in place what learns in float32, where small steps count; frozen 16-bit weights stay so in a 16-bit run.

    Frozen float16 weights become bfloat16 in a bfloat16 run, since sums of the two would be float32. Packed weights of
    4 or 8 bits, which are integers, stay as they are. `dtype` is the type in which the run computes.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.requires_grad or dtype == torch.float32:
            parameter.data = parameter.data.float()
        elif parameter.dtype == torch.float16 and dtype == torch.bfloat16:
            parameter.data = parameter.data.bfloat16()


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_LARGEST_BLOCKS = (1 << 30, 1 << 25)  # bytes; glibc before 2.35 takes no more than the second
_MOST_FREE = (1 << 31) - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Makes the process reuse the memory of freed CPU tensors; returns False where the C library cannot be set so.

    By default glibc returns large blocks to the system at once, which clears every page before handing it out again.
    macOS, Windows and musl have no such setting.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    blocks = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_BLOCKS)
    return bool(mallopt(_TRIM_THRESHOLD, _MOST_FREE)) and blocks
