"""Activation checkpointing: layers keep their inputs only and compute the rest again in the backward pass."""

from __future__ import annotations

from typing import Any

from transformers import LlavaForConditionalGeneration


def recompute_layers(llava: LlavaForConditionalGeneration) -> None:
    """Lets the language model's layers compute again what the backward pass needs; results stay the same."""
    language: Any = llava.model.language_model
    # transformers renamed it on the way to version 6.
    enable = getattr(language, "activation_checkpointing_enable", None) or language.gradient_checkpointing_enable
    enable({"use_reentrant": False})
