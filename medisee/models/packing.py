"""One language-model sequence an image: a shared prefix, then each query's own tokens, blind to the other queries.

Positions restart behind the prefix, so every query computes what it would compute alone.

Shapes: S sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
