"""One language-model sequence per image: a shared prefix, then each query's tokens, which cannot see other queries.

Positions restart after the prefix, so every query computes what it would compute alone. The attention mask has two
forms: a dense one for all kernels, and torch's block mask for flex attention, which skips blocks that nobody sees. Flex
attention is for training on GPUs: torch has no backward pass of it on the CPU.

Shapes: S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import LlavaForConditionalGeneration

from medisee.foundation.errors import InputError

PREFIX, PADDING = 0, -1


@dataclass(frozen=True, slots=True)
class Packed:
    """Packed token ids, padded on the right."""

    input_ids_SL: Tensor
    positions_SL: Tensor  # rotary positions, which restart after the prefix
    segments_SL: Tensor  # 0 in the prefix, 1, 2, ... in the queries, -1 in the padding
    starts: tuple[tuple[int, ...], ...]  # where each query of each sequence begins
    lengths: tuple[int, ...]  # of the sequences, rounded up to `multiple`


def pack(
    prefixes: Sequence[Sequence[int]], queries: Sequence[Sequence[Sequence[int]]], pad: int, *, multiple: int = 1
) -> Packed:
    """Packs each prefix with its queries, all token ids, and pads to a multiple of `multiple` with the id `pad`."""
    exact = [len(p) + sum(map(len, q)) for p, q in zip(prefixes, queries, strict=True)]
    lengths = tuple(-(-length // multiple) * multiple for length in exact)
    shape = (len(prefixes), max(lengths))
    input_ids = torch.full(shape, pad, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.long)
    starts: list[tuple[int, ...]] = []
    for row, (prefix, own) in enumerate(zip(prefixes, queries, strict=True)):
        end, begins = 0, []
        for number, tokens in enumerate([prefix, *own]):
            begins.append(end)
            first, stop = 0 if number == PREFIX else len(prefix), end + len(tokens)
            input_ids[row, end:stop] = torch.tensor(list(tokens), dtype=torch.long)
            positions[row, end:stop] = torch.arange(first, first + len(tokens))
            segments[row, end:stop] = number
            end = stop
        starts.append(tuple(begins[1:]))
    return Packed(input_ids, positions, segments, tuple(starts), lengths)


def sees(segments_SL: Tensor, sequence: Tensor, query: Tensor, key: Tensor, *, full_prefix: bool) -> Tensor:
    """Returns whether the token at `query` sees the one at `key`: earlier tokens of the prefix, or of its own query.

    The indices broadcast. `full_prefix`: the prefix's tokens see all of the prefix.
    """
    own, other = segments_SL[sequence, query], segments_SL[sequence, key]
    behind = key <= query
    if full_prefix:
        behind = behind | ((own == PREFIX) & (other == PREFIX))
    return behind & ((other == PREFIX) | (other == own))


def block_mask(segments_SL: Tensor, dtype: torch.dtype, *, full_prefix: bool = False) -> Tensor:
    """Returns `sees` as an additive attention mask (S, 1, L, L) of the states' type."""
    sequences, tokens = (torch.arange(size, device=segments_SL.device) for size in segments_SL.shape)
    at = sequences[:, None, None], tokens[None, :, None], tokens[None, None, :]
    visible = sees(segments_SL, *at, full_prefix=full_prefix)
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments_SL.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


DEVICES = ("cuda", "xpu", "hpu")  # on which torch has a backward pass of flex attention


def check_flex(device: torch.device) -> None:
    """Raises an InputError if a device cannot train with flex attention."""
    if device.type not in DEVICES:
        raise InputError(
            f"model.mllm.attention = 'flex': torch's flex attention has no backward pass on {device.type!r}; "
            "train on a GPU, or set it to sdpa."
        )


def use_flex(llava: LlavaForConditionalGeneration, *, training: bool) -> None:
    """Sets the language model's attention kernel: flex attention in training, SDPA otherwise."""
    language = llava.model.language_model
    if dropout := language.config.attention_dropout:
        raise InputError(
            f"model.mllm.attention = 'flex': flex attention does not support the attention dropout of {dropout}; "
            "set model.mllm.size.dropout to 0, or use sdpa."
        )
    language.set_attn_implementation("flex_attention" if training else "sdpa")


def flex_mask(segments_SL: Tensor, *, full_prefix: bool = False) -> BlockMask:
    """Returns `sees` as the mask of flex attention, (S, 1, L, L)."""
    check_flex(segments_SL.device)

    def rule(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(segments_SL, sequence, query, key, full_prefix=full_prefix)

    sequences, length = segments_SL.shape
    return create_block_mask(rule, sequences, None, length, length, device=segments_SL.device)
