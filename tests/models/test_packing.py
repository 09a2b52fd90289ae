"""Packing: each query of a packed sequence computes what it computes alone, and would not without mask and restart.

Flex attention runs by torch's reference implementation, whose backward pass torch refuses on the CPU: see test_flex.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torchs_flex
from transformers import MistralConfig, MistralModel

from medisee.models import packing
from medisee.models.packing import PADDING, PREFIX, Packed, block_mask, pack

PAD = 0
PREFIXES = [[1, 5, 6, 7], [1, 8]]
QUERIES = [[[10, 11, 12], [13, 14], [10, 15, 16, 17, 18]], [[19, 20, 21, 22]]]

tokens = st.integers(1, 99)
sequences = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=6),
        st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module", params=["sdpa", "eager", "flex_attention"])
def mistral(request: pytest.FixtureRequest) -> Iterator[MistralModel]:
    torch.manual_seed(0)
    # As a dict, since transformers does not declare the kernel among the parameters.
    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "initializer_range": 0.3,
        "attn_implementation": request.param,
    }
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(packing, "DEVICES", ("cpu",))
        patch.setattr(torchs_flex, "_validate_device", lambda *_: None)
        yield MistralModel(MistralConfig(**sizes)).eval()


def states(
    model: MistralModel, packed: Packed, *, segments: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    segments = packed.segments_SL if segments is None else segments
    flexible = model.config._attn_implementation == "flex_attention"
    mask = packing.flex_mask(segments) if flexible else block_mask(segments, torch.float32)
    return model(
        input_ids=packed.input_ids_SL,
        position_ids=packed.positions_SL if positions is None else positions,
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state


def alone(model: MistralModel, prefix: Sequence[int], query: Sequence[int]) -> Tensor:
    """The plain way: transformers' own causal mask and positions, one sequence."""
    kernel = str(model.config._attn_implementation)
    if kernel == "flex_attention":
        model.set_attn_implementation("sdpa")
    hidden = model(input_ids=torch.tensor([[*prefix, *query]]), use_cache=False).last_hidden_state[0]
    model.set_attn_implementation(kernel)
    return hidden


def largest_difference(model: MistralModel, hidden: Tensor, packed: Packed) -> float:
    worst = 0.0
    for row, (prefix, queries) in enumerate(zip(PREFIXES, QUERIES, strict=True)):
        for query, start in zip(queries, packed.starts[row], strict=True):
            expected = alone(model, prefix, query)
            got = torch.cat([hidden[row, : len(prefix)], hidden[row, start : start + len(query)]])
            worst = max(worst, float((got - expected).abs().max()))
    return worst


@torch.no_grad()
def test_packed_states_equal_unpacked_states(mistral: MistralModel) -> None:
    packed = pack(PREFIXES, QUERIES, PAD)
    assert largest_difference(mistral, states(mistral, packed), packed) < 1e-5


@torch.no_grad()
def test_without_the_block_mask_they_differ(mistral: MistralModel) -> None:
    packed = pack(PREFIXES, QUERIES, PAD)
    one_segment = torch.where(packed.segments_SL > 0, 1, packed.segments_SL)
    hidden = states(mistral, packed, segments=one_segment)
    assert largest_difference(mistral, hidden, packed) > 1e-3


@torch.no_grad()
def test_without_the_position_restart_they_differ(mistral: MistralModel) -> None:
    packed = pack(PREFIXES, QUERIES, PAD)
    running = torch.arange(packed.input_ids_SL.shape[1]).expand_as(packed.input_ids_SL)
    assert largest_difference(mistral, states(mistral, packed, positions=running), packed) > 1e-3


def test_packed_gradients_equal_unpacked_gradients(mistral: MistralModel) -> None:
    packed = pack(PREFIXES, QUERIES, PAD)
    hidden = states(mistral, packed)
    together, single = torch.zeros(()), torch.zeros(())
    for row, (prefix, queries) in enumerate(zip(PREFIXES, QUERIES, strict=True)):
        for number, (query, start) in enumerate(zip(queries, packed.starts[row], strict=True), start=1):
            together = together + number * hidden[row, start : start + len(query)].square().mean()
            single = single + number * alone(mistral, prefix, query)[len(prefix) :].square().mean()
    parameters = dict(mistral.named_parameters())
    ours = torch.autograd.grad(together, list(parameters.values()))
    theirs = torch.autograd.grad(single, list(parameters.values()))
    for name, our, their in zip(parameters, ours, theirs, strict=True):
        assert their.abs().max() > 0, name
        scale = float(their.abs().max())
        assert float((our - their).abs().max()) < 1e-5 * max(1.0, scale), name


@torch.no_grad()
def test_padding_changes_nothing_and_is_finite(mistral: MistralModel) -> None:
    packed = pack(PREFIXES, QUERIES, PAD)
    other = packed.input_ids_SL.masked_fill(packed.segments_SL == PADDING, 77)
    hidden = states(mistral, packed)
    changed = states(mistral, replace(packed, input_ids_SL=other))
    own = packed.segments_SL != PADDING
    assert not own.all()
    assert torch.equal(hidden[own], changed[own])
    assert torch.isfinite(hidden).all()


def test_pack_by_hand() -> None:
    packed = pack([[1, 2], [1]], [[[3, 4], [5]], [[6]]], pad=9)
    assert packed.input_ids_SL.tolist() == [[1, 2, 3, 4, 5], [1, 6, 9, 9, 9]]
    assert packed.positions_SL[0].tolist() == [0, 1, 2, 3, 2]
    assert packed.positions_SL[1, :2].tolist() == [0, 1]
    assert packed.segments_SL.tolist() == [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
    assert packed.starts == ((2, 4), (1,))


@given(sequences)
def test_pack_keeps_every_token_in_its_place(rows: list[tuple[list[int], list[list[int]]]]) -> None:
    packed = pack([prefix for prefix, _ in rows], [queries for _, queries in rows], PAD)
    lengths = [len(prefix) + sum(map(len, queries)) for prefix, queries in rows]
    assert packed.input_ids_SL.shape == (len(rows), max(lengths))
    for row, (prefix, queries) in enumerate(rows):
        ids, positions, segments = packed.input_ids_SL[row], packed.positions_SL[row], packed.segments_SL[row]
        assert ids[: len(prefix)].tolist() == prefix
        assert positions[: len(prefix)].tolist() == list(range(len(prefix)))
        assert (segments == PREFIX).sum() == len(prefix)
        assert len(packed.starts[row]) == len(queries)
        for number, (query, start) in enumerate(zip(queries, packed.starts[row], strict=True), start=1):
            own = slice(start, start + len(query))
            assert ids[own].tolist() == query
            assert positions[own].tolist() == list(range(len(prefix), len(prefix) + len(query)))
            assert (segments == number).nonzero().flatten().tolist() == list(range(own.start, own.stop))
        assert (segments[lengths[row] :] == PADDING).all()
        assert (ids[lengths[row] :] == PAD).all()


@given(sequences)
def test_block_mask_is_causal_and_blind_to_other_queries(rows: list[tuple[list[int], list[list[int]]]]) -> None:
    segments = pack([prefix for prefix, _ in rows], [queries for _, queries in rows], PAD).segments_SL
    mask = block_mask(segments, torch.float32)
    length = segments.shape[1]
    assert mask.shape == (len(rows), 1, length, length)
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    for row, own in enumerate(segments.tolist()):
        for query in range(length):
            if own[query] != PADDING:
                expected = [key <= query and own[key] in (PREFIX, own[query]) for key in range(length)]
                assert (mask[row, 0, query] == 0).tolist() == expected
            assert (mask[row, 0, query] == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_mask_takes_the_dtype_of_the_states(dtype: torch.dtype) -> None:
    mask = block_mask(pack(PREFIXES, QUERIES, PAD).segments_SL, dtype)
    assert mask.dtype == dtype
    assert torch.isfinite(mask).all()


def test_pack_wants_queries_for_every_prefix() -> None:
    with pytest.raises(ValueError, match="zip"):
        pack(PREFIXES, QUERIES[:1], PAD)


def test_a_full_prefix_sees_itself_and_no_query() -> None:
    segments = pack(PREFIXES, QUERIES, PAD).segments_SL
    causal, full = (block_mask(segments, torch.float32, full_prefix=flag)[:, 0] == 0 for flag in (False, True))
    for row, prefix in enumerate(PREFIXES):
        end = len(prefix)
        assert full[row, :end, :end].all()
        assert not full[row, :end, end:].any()
        assert torch.equal(full[row, end:], causal[row, end:])
