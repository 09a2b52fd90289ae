"""Answers that the language model writes itself: greedy, with a KV cache, the prefix of an image read once.

Shapes: B images, S sequences (one a query), P prefix length, L longest question, A longest answer, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache, LlavaForConditionalGeneration


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What the language model made of the images' prefixes.

    Attributes:
        cache: keys and values.
        states_BPD: last states.
    """

    cache: DynamicCache
    states_BPD: Tensor


@dataclass(frozen=True, slots=True)
class Questions:
    """What stands behind the prefixes, with the padding on the left: generation appends on the right.

    Attributes:
        input_ids_SL: token ids.
        mask_SL: 1 at tokens, 0 at padding.
    """

    input_ids_SL: Tensor
    mask_SL: Tensor


@dataclass(frozen=True, slots=True)
class Written:
    """Answers.

    Attributes:
        ids_SA: token ids, padded on the right.
        states_SAD: the last states that predicted them: those which the routers are trained on.
    """

    ids_SA: Tensor
    states_SAD: Tensor


def left_padded(input_ids_SL: Tensor, segments_SL: Tensor) -> Questions:
    """Moves the padding, segment -1, of right-padded sequences to the left."""
    own_SL = segments_SL >= 0
    order = torch.argsort(own_SL.int(), dim=1, stable=True)
    return Questions(input_ids_SL.gather(1, order), own_SL.gather(1, order).long())


def read_prefix(language_model: Any, inputs_BPD: Tensor, mask_BPP: Tensor | BlockMask) -> Prefixes:
    """Reads the prefix of every image.

    Args:
        language_model: the decoder of a Llava.
        inputs_BPD: embedded prefixes.
        mask_BPP: the attention kernel's mask, (B, 1, P, P).
    """
    read = language_model(inputs_embeds=inputs_BPD, attention_mask=mask_BPP, use_cache=True)
    return Prefixes(read.past_key_values, read.last_hidden_state)


def write_answers(
    llava: LlavaForConditionalGeneration,
    cache: DynamicCache,
    prefix_ids_P: Tensor,
    questions: Questions,
    *,
    image_of_sequence_S: Tensor,
    max_new_tokens: int,
    end_id: int,
    pad_id: int,
    never: int,
) -> Written:
    """Writes one answer a question.

    Args:
        llava: the language model.
        cache: `Prefixes.cache`; changed by this call.
        prefix_ids_P: token ids of the prefix, the same for all images.
        questions: what stands behind it.
        image_of_sequence_S: the image that each question is about.
        max_new_tokens: longest answer.
        end_id: id that ends an answer.
        pad_id: id of the padding.
        never: id that is not to be written.
    """
    cache.batch_select_indices(image_of_sequence_S)
    prefix_SP = prefix_ids_P.expand(len(questions.input_ids_SL), -1)
    # The padding stands between prefix and question; positions are counted over what the mask shows.
    input_ids = torch.cat([prefix_SP, questions.input_ids_SL], dim=1)
    model: Any = llava
    result: Any = model.generate(
        input_ids=input_ids,
        attention_mask=torch.cat([torch.ones_like(prefix_SP), questions.mask_SL], dim=1),
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
    return Written(result.sequences[:, input_ids.shape[1] :], states_SAD)
