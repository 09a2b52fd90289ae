"""One language-model sequence per image: a shared prefix, then each query's own tokens, blind to the other queries.

Positions restart behind the prefix, so every query computes what it would compute alone. The attention mask comes in two
forms: a dense one for every kernel, and the block mask of torch's flex attention, which skips blocks of keys that no query
of a block sees. Flex attention is for training on GPUs: torch has no backward pass of it on the CPU.

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

PREFIX = 0
PADDING = -1


@dataclass(frozen=True, slots=True)
class Packed:
    """Packed token ids.

    Attributes:
        input_ids_SL: token ids, `pad` behind each sequence's end.
        positions_SL: rotary positions, restarting behind the prefix.
        segments_SL: 0 in the prefix, 1.. in the queries, -1 in the padding.
        starts: for each sequence, where each of its queries begins.
        lengths: of each sequence, without padding but rounded up to `multiple`.
    """

    input_ids_SL: Tensor
    positions_SL: Tensor
    segments_SL: Tensor
    starts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]


def pack(
    prefixes: Sequence[Sequence[int]], queries: Sequence[Sequence[Sequence[int]]], pad: int, *, multiple: int = 1
) -> Packed:
    """Packs each prefix with its queries.

    Args:
        prefixes: token ids that all queries of a sequence share.
        queries: per sequence, the token ids of its queries.
        pad: id of the padding token.
        multiple: what the padded length is a multiple of.
    """
    exact = [len(p) + sum(map(len, q)) for p, q in zip(prefixes, queries, strict=True)]
    lengths = tuple(-(-length // multiple) * multiple for length in exact)
    shape = (len(prefixes), max(lengths))
    input_ids = torch.full(shape, pad, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.long)
    starts: list[tuple[int, ...]] = []
    for row, (prefix, own) in enumerate(zip(prefixes, queries, strict=True)):
        end = len(prefix)
        input_ids[row, :end] = torch.tensor(list(prefix), dtype=torch.long)
        positions[row, :end] = torch.arange(end)
        segments[row, :end] = PREFIX
        begins = []
        for number, tokens in enumerate(own, start=1):
            begins.append(end)
            stop = end + len(tokens)
            input_ids[row, end:stop] = torch.tensor(list(tokens), dtype=torch.long)
            positions[row, end:stop] = torch.arange(len(prefix), len(prefix) + len(tokens))
            segments[row, end:stop] = number
            end = stop
        starts.append(tuple(begins))
    return Packed(input_ids, positions, segments, tuple(starts), lengths)


def sees(segments_SL: Tensor, sequence: Tensor, query: Tensor, key: Tensor, *, full_prefix: bool) -> Tensor:
    """Tells whether the token at `query` sees the one at `key`: causal, prefix or own query only; padding sees itself.

    Args:
        segments_SL: from `pack`.
        sequence, query, key: indices of any shapes that broadcast.
        full_prefix: let the prefix's tokens see those behind them too, up to its end.
    """
    own, other = segments_SL[sequence, query], segments_SL[sequence, key]
    behind = key <= query
    if full_prefix:
        behind = behind | ((own == PREFIX) & (other == PREFIX))
    return behind & ((other == PREFIX) | (other == own))


def block_mask(segments_SL: Tensor, dtype: torch.dtype, *, full_prefix: bool = False) -> Tensor:
    """Returns what `sees` says as an additive attention mask (S, 1, L, L).

    Args:
        segments_SL: from `pack`.
        dtype: of the states.
        full_prefix: see `sees`.
    """
    sequences, tokens = (torch.arange(size, device=segments_SL.device) for size in segments_SL.shape)
    at = sequences[:, None, None], tokens[None, :, None], tokens[None, None, :]
    visible = sees(segments_SL, *at, full_prefix=full_prefix)
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments_SL.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


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
