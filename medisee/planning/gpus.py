"""The GPUs that a run can be planned for: memory and dense arithmetic, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medisee.foundation.errors import InputError, nearest

USABLE = 0.95  # share of memory that a plan may fill: the rest holds CUDA's own context and gaps between tensors


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    name: str  # the maker's
    memory: float  # GiB
    bfloat16: float  # dense tensor-core TFLOP/s with float32 accumulation; data sheets often print the double, "sparse"
    float32: float  # TFLOP/s outside the tensor cores, which torch uses for float32 by default

    def tflops(self, dtype: torch.dtype) -> float:
        return self.float32 if dtype == torch.float32 else self.bfloat16

    @property
    def usable(self) -> float:
        return USABLE * self.memory * 2**30


GPUS = {  # by the names that --gpu takes
    "a6000": Gpu("RTX A6000", 48, 154.8, 38.7),  # data sheet "NVIDIA RTX A6000": 309.7 with sparsity
    "a40": Gpu("A40", 48, 149.7, 37.4),  # data sheet "NVIDIA A40": 149.7 | 299.4
    "a10": Gpu("A10", 24, 125.0, 31.2),  # data sheet "NVIDIA A10": 125 | 250
    "a100-40": Gpu("A100 40 GB", 40, 312.0, 19.5),  # data sheet "NVIDIA A100": 312 | 624
    "a100-80": Gpu("A100 80 GB", 80, 312.0, 19.5),
    "h100": Gpu("H100 SXM", 80, 989.4, 67.0),  # data sheet "NVIDIA H100": 1979 with sparsity
    "h200": Gpu("H200 SXM", 141, 989.4, 67.0),  # data sheet "NVIDIA H200": as H100
    "l4": Gpu("L4", 24, 121.0, 30.3),  # data sheet "NVIDIA L4": 242 with sparsity
    "l40s": Gpu("L40S", 48, 362.0, 91.6),  # data sheet "NVIDIA L40S": 362 | 733
    "rtx3090": Gpu("GeForce RTX 3090", 24, 71.0, 35.6),  # white paper "NVIDIA Ampere GA102", float32 accumulation
    "rtx4090": Gpu("GeForce RTX 4090", 24, 165.2, 82.6),  # white paper "NVIDIA Ada", float32 accumulation
    "rtx6000ada": Gpu("RTX 6000 Ada", 48, 364.2, 91.1),  # data sheet: 1457 in 8 bits with sparsity, a quarter of it
}


def find_gpu(name: str) -> Gpu:
    """Returns a GPU by name; case, spaces and dashes do not matter."""

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    for key, gpu in GPUS.items():
        if plain(name) in (plain(key), plain(gpu.name)):
            return gpu
    hint = nearest(name.lower(), GPUS)
    raise InputError(f"--gpu {name!r}: unknown GPU; expected one of {', '.join(GPUS)}.{hint}")
