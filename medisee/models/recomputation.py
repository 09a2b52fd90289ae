"""Activation checkpointing: layers keep their inputs only and compute the rest again in the backward pass."""

from __future__ import annotations

from typing import Any

from transformers import LlavaForConditionalGeneration


def recompute_layers(llava: LlavaForConditionalGeneration, count: bool | int = True) -> None:
    """Lets the language model's layers compute again what the backward pass needs; results stay the same.

    Args:
        llava: whose language model it is.
        count: how many layers, the first ones; True: all.
    """
    language: Any = llava.model.language_model
    # transformers renamed it on the way to version 6.
    enable = getattr(language, "activation_checkpointing_enable", None) or language.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for place, layer in enumerate(language.layers):
        layer.gradient_checkpointing = count is True or place < count
