"""Answers that the language model writes: greedily, with a KV cache that already holds the images' prefixes.

Shapes: S sequences (one per query), L longest sequence, P prefix length, A longest answer, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from medisee.models.packing import PADDING
from medisee.models.processing import Batch


def write_answers(
    llava: LlavaForConditionalGeneration,
    cache: DynamicCache,
    batch: Batch,
    *,
    prefix: int,
    max_new_tokens: int,
    end_id: int,
    pad_id: int,
    never: int,
) -> tuple[Tensor, Tensor]:
    """Writes one answer per query, ended by `end_id` and without the id `never`.

    Args:
        llava: the language model.
        cache: keys and values of each image's prefix; changed by this call.
        batch: unpacked, without answers.
        prefix: P, the number of tokens that all sequences of an image share.
        max_new_tokens, end_id, pad_id, never: longest answer, and token ids.

    Returns:
        Token ids (S, A), padded on the right, and the last states (S, A, D) that predicted them.
    """
    cache.batch_select_indices(batch.image_of_sequence_S)
    # Generation appends on the right, so the padding moves between prefix and question; positions do not count it.
    prefix_SP, question_SL = batch.input_ids_SL[:, :prefix], batch.input_ids_SL[:, prefix:]
    own_SL = batch.segments_SL[:, prefix:] != PADDING
    order_SL = torch.argsort(own_SL.int(), dim=1, stable=True)
    input_ids_SL = torch.cat([prefix_SP, question_SL.gather(1, order_SL)], dim=1)
    mask_SL = torch.cat([torch.ones_like(prefix_SP), own_SL.gather(1, order_SL).long()], dim=1)
    model: Any = llava
    result: Any = model.generate(
        input_ids=input_ids_SL,
        attention_mask=mask_SL,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=end_id,
        pad_token_id=pad_id,
        suppress_tokens=[never],
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    states_SAD = torch.stack([step[-1][:, -1] for step in result.hidden_states], dim=1)
    return result.sequences[:, input_ids_SL.shape[1] :], states_SAD
