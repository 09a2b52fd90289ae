"""Flex attention for packed sequences: torch skips every block of keys that no query of a block sees.

It computes what the other kernels compute, and is for training: torch has no backward pass of it on the CPU. It has not
run on a GPU yet.

Shapes: S sequences, L longest sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import LlavaForConditionalGeneration

from medisee.errors import InputError
from medisee.models.packing import sees

DEVICES = ("cuda", "xpu", "hpu")
"""Kinds of devices on which torch has a backward pass of flex attention."""


def check_flex(device: torch.device) -> None:
    """Checks that a device can train with flex attention.

    Raises:
        InputError: it cannot.
    """
    if device.type not in DEVICES:
        raise InputError(
            f"model.mllm.attention = 'flex': torch's flex attention has no backward pass on {device.type!r}; "
            "train on a GPU, or set it to sdpa."
        )


def use_flex(llava: LlavaForConditionalGeneration, *, training: bool) -> None:
    """Lets the language model's layers train with flex attention, and compute with SDPA outside training.

    Raises:
        InputError: the layers have attention dropout, which flex attention lacks.
    """
    language = llava.model.language_model
    if dropout := language.config.attention_dropout:
        raise InputError(
            f"model.mllm.attention = 'flex': the language model has an attention dropout of {dropout}, which flex "
            "attention lacks; set model.mllm.size.dropout to 0, or take sdpa."
        )
    language.set_attn_implementation("flex_attention" if training else "sdpa")


def flex_mask(segments_SL: Tensor, *, full_prefix: bool = False) -> BlockMask:
    """Returns the mask of flex attention, (S, 1, L, L), with the rule of `packing.sees`.

    Args:
        segments_SL: from `packing.pack`.
        full_prefix: see `packing.sees`.

    Raises:
        InputError: the segments are on a device that cannot train with it.
    """
    check_flex(segments_SL.device)

    def rule(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(segments_SL, sequence, query, key, full_prefix=full_prefix)

    sequences, length = segments_SL.shape
    return create_block_mask(rule, sequences, None, length, length, device=segments_SL.device)
