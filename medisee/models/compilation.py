"""Compiled layers: torch.compile fuses what a language model's layer does between its matrix products.

Layers are compiled one by one: they share their code, so that the first step compiles one layer, not the whole model.
"""

from __future__ import annotations

import os
import shutil

import torch
from transformers import LlavaForConditionalGeneration

from medisee.errors import InputError

COMPILERS = ("g++", "clang++", "c++", "cl")
"""C++ compilers that torch.compile takes on a CPU; the variable CXX names another."""


def check_compiler(device: torch.device) -> None:
    """Checks that torch.compile can build kernels for a device.

    Raises:
        InputError: a CPU without a C++ compiler.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        raise InputError(
            f"train.compile_layers = true: no C++ compiler found ({', '.join(names)}), which torch.compile needs on a "
            "CPU; install one, such as g++, or set train.compile_layers=false, which computes the same more slowly."
        )


def compile_layers(llava: LlavaForConditionalGeneration) -> None:
    """Lets the language model's layers run as compiled kernels; results stay the same but for rounding.

    Every new length of a batch is compiled anew, up to torch's limit; `model.mllm.pad_to` keeps them few. Whoever
    reads other shapes for a while does so within `torch.compiler.set_stance("force_eager")`.
    """
    for layer in llava.model.language_model.layers:
        layer.compile()
