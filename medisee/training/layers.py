"""How the language model's layers run in training: compiled by torch.compile, or recomputed in the backward pass.

Layers are compiled separately: they share their code, so the first step compiles one layer, not the whole model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from medisee.foundation.errors import InputError, first_line


def check_compiler(device: torch.device) -> None:
    """Checks that torch.compile can build kernels for a device by building one, which takes seconds the first time."""
    probe = torch.compile(lambda values: (values.sin() + 1).sum())
    try:
        probe(torch.ones(64, device=device, requires_grad=True)).backward()
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"train.compile_layers = true: torch.compile cannot build kernels for {device.type!r} here ({first_line(error)}). Install "
            "g++ (or set CXX) and Python's headers (python3-dev) for a CPU, Triton for a GPU, or set train.compile_layers=false."
        ) from error


def compile_layers(llava: LlavaForConditionalGeneration) -> None:
    """Lets the language model's layers run as compiled kernels.

    Results stay the same except for rounding and for what dropout drops, since kernels draw other random numbers.
    The first length of a batch is compiled, then one kernel for all others.
    """
    for layer in llava.model.language_model.layers:
        layer.compile()


def uncompiled(compiled: bool) -> AbstractContextManager[object]:
    """Returns a context in which layers, if compiled, run uncompiled: where other shapes would be compiled again."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def recompute_layers(llava: LlavaForConditionalGeneration, count: bool | int = True) -> None:
    """Lets the first `count` layers (True: all) recompute what the backward pass needs; results stay the same."""
    language: Any = llava.model.language_model
    # transformers renamed it on the way to version 6.
    enable = getattr(language, "activation_checkpointing_enable", None) or language.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for place, layer in enumerate(language.layers):
        layer.gradient_checkpointing = count is True or place < count
