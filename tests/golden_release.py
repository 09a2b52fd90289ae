"""Golden values of the release as inputs of our model: its sizes, its state, its token ids, and the states in between.

Every release_<name>.json of a golden folder says how large a model is; the .safetensors beside it is its state under the
release's names, the .npz what the release computed with it. The model is ours, built, loaded and called as users do it;
only the text's token ids are given instead of tokenised.

Shapes: C conversations, L longest sequence, D hidden width; conversation c is target c.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from medisee.config import Config
from medisee.config.load import config_from
from medisee.models.medisee import MediSee, Output
from medisee.models.packing import Packed, pack
from medisee.models.processing import Batch, Example, Query
from medisee.weights.checkpoints import load_trained
from medisee.weights.medisee_release import RELEASE_TOKENS, Report, our_values, place
from medisee.weights.shards import open_shard
from medisee.weights.tokenizer import add_candidate_tokens

TOLERANCE = 1e-4
OUTPUT_TOKENS = 5  # of the mask decoder, before the prompts: one for the quality, four for masks


class Errors:
    """The largest difference of each group of arrays, relative to the largest value of the array it is in."""

    def __init__(self) -> None:
        self.groups: dict[str, float] = {}

    def check(self, group: str, ours: Tensor, theirs: np.ndarray | Tensor) -> None:
        """Compares two arrays of one shape."""
        expected = torch.as_tensor(theirs).double()
        assert ours.shape == expected.shape, group
        assert expected.numel() and torch.isfinite(expected).all(), group
        error = float((ours.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        self.groups[group] = max(error, self.groups.get(group, 0.0))
        assert error <= TOLERANCE, f"{group}: {error:.1e} of the largest value"


@dataclass(frozen=True, slots=True)
class Case:
    """One golden model with its inputs and outputs; `order` is that of our candidate tokens in the release's columns."""

    facts: dict[str, Any]
    arrays: Any
    config: Config
    model: MediSee
    examples: list[Example]
    order: list[int]
    errors: Errors

    def conversations(self, image: int) -> range:
        first, last = self.arrays["offset"][image : image + 2]
        return range(int(first), int(last))

    @property
    def image_of_conversation(self) -> list[int]:
        return [image for image in range(len(self.examples)) for _ in self.conversations(image)]


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation, and where it lies in a batch.

    Attributes:
        ids, labels: with the image's tokens in the place of the image's id, without padding.
        image_end: number of ids up to the image's last.
        row: its sequence.
        shared: number of ids at the sequence's beginning, for all its conversations.
        start: column of the first id that is its own.
    """

    ids: list[int]
    labels: list[int]
    image_end: int
    row: int = 0
    shared: int = 0
    start: int = 0

    @property
    def columns(self) -> list[int]:
        """The column of each of its ids."""
        return [place if place < self.shared else self.start + place - self.shared for place in range(len(self.ids))]

    def states(self, states_SLD: Tensor) -> Tensor:
        """Returns its states as if it stood alone."""
        return states_SLD[self.row, self.columns]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: what went in, what came out, and the states in between by their golden name."""

    batch: Batch
    rows: list[Row]
    output: Output
    hidden_SLD: Tensor
    seen: dict[str, Tensor]


def config_of(facts: dict[str, Any]) -> Config:
    """Translates the sizes of a golden model; the switches come from `compat: release`."""
    sizes, sam, clip = facts["config"], facts["config"]["sam"], facts["config"]["clip"]
    language = sizes["llm"]
    assert language["hidden_act"] == "silu"
    assert not language["tie_word_embeddings"]
    assert sam["vit_patch_size"] == 16
    assert facts["clip"]["select_layer"] == -2
    mllm = {
        "size": {
            "hidden": language["hidden_size"],
            "layers": language["num_hidden_layers"],
            "heads": language["num_attention_heads"],
            "kv_heads": language["num_key_value_heads"],
            "intermediate": language["intermediate_size"],
            "rope_theta": language["rope_theta"],
            "rms_eps": language["rms_norm_eps"],
        },
        "vision_hidden": clip["hidden"],
        "vision_layers": clip["layers"],
        "vision_heads": clip["heads"],
        "vision_intermediate": clip["inter"],
        "vision_size": clip["image"],
        "vision_patch": clip["patch"],
        "lora": {"rank": facts["lora"]["r"], "alpha": facts["lora"]["alpha"], "dropout": facts["lora"]["dropout_used"]},
        "train_projector": False,
    }
    seg_head = {
        "size": sam["image_size"],
        "sizes": {
            "width": sam["encoder_embed_dim"],
            "depth": sam["encoder_depth"],
            "heads": sam["encoder_num_heads"],
            "global_attention": sam["encoder_global_attn_indexes"],
            "window": sam["window_size"],
            "channels": sam["prompt_embed_dim"],
            "decoder_heads": sam["num_heads"],
            "decoder_mlp": sam["mlp_dim"],
            "iou_hidden": sam["iou_head_hidden_dim"],
            "mask_hidden": sam["mask_in_chans"],
        },
    }
    model = {"mllm": mllm, "seg_head": seg_head, "box_dtype": "float32"}
    model |= {"router_hidden": sizes["router_hidden"], "box_hidden": sizes["bbox_hidden"]}
    weights = facts["loss_weights"]
    loss = {"text": weights["ce"], "bce": weights["bce"], "dice": weights["dice"], "box": weights["bbox"]}
    return config_from({"compat": "release", "model": model, "loss": loss}, where="golden")


def tokenizer_of(facts: dict[str, Any], config: Config) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of the golden vocabulary; every word is unknown to it, since the ids are given."""
    words = {f"<{index}>": index for index in range(facts["config"]["llm"]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"<{facts['pad']}>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"pad_token": "pad", "unk_token": "pad", "bos_token": "bos", "eos_token": "eos"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: f"<{facts[key]}>" for name, key in special.items()}
    )
    add_candidate_tokens(made, config.model.candidate_tokens)
    ids = made.convert_tokens_to_ids(["[SEG]", "[BBOX]", "<image>"])
    assert ids == [facts["seg_token_idx"], facts["box_token_idx"], facts["final_vocab"]]
    return made


def load_case(path: Path) -> Case:
    """Builds our model of a golden file's sizes and loads the release's state into it.

    Args:
        path: release_<name>.json.
    """
    facts, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    config = config_of(facts)
    model = MediSee(config.model, tokenizer_of(facts, config))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    report = Report()
    with open_shard(path.with_suffix(".safetensors")) as shard:
        plan = place(shard, expected=expected, config=config.model, report=report)
        tokens = config.model.candidate_tokens
        state = {name: our_values(name, shard.read(key), tokens) for name, key in plan.old_names.items()}
        load_trained(model, state, path)
        assert sum(report.placed.values()) + len(report.dropped) == len(shard.tensors)
    images = len(arrays["offset"]) - 1
    examples = [example_of(arrays, image) for image in range(images)]
    order = [RELEASE_TOKENS.index(token) for token in config.model.candidate_tokens]
    return Case(facts, arrays, config, model, examples, order, Errors())


def example_of(arrays: Any, image: int) -> Example:
    pixels, masks = arrays[f"raw_image_{image}"], arrays[f"gt_masks_{image}"]
    queries = [
        Query(record=str(image), target=str(index), question="?", answer="[SEG] and [BBOX]", mask=mask.astype(bool))
        for index, mask in enumerate(masks)
    ]
    height, width = pixels.shape[:2]
    return Example(pixels, height, width, tuple(queries))


def rows_of(case: Case, ids_CL: np.ndarray, conversations: list[int]) -> list[Row]:
    """Puts each conversation's image tokens in their place and drops its padding."""
    processor, rows = case.model.processor, []
    for own, conversation in zip(ids_CL, conversations, strict=True):
        image = int(np.flatnonzero(own == case.facts["image_token_index"])[0])
        length = int(np.flatnonzero(own != case.facts["pad"])[-1]) + 1
        ids, labels = own[:length].tolist(), case.arrays["labels"][conversation][:length].tolist()
        ids[image : image + 1] = [processor.image_id] * processor.image_tokens
        labels[image : image + 1] = [-100] * processor.image_tokens
        rows.append(Row(ids, labels, image + processor.image_tokens))
    return rows


def common_length(lists: list[list[int]]) -> int:
    """Returns how many first entries all lists have in common."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False)))


def packed_rows(rows: list[Row], groups: list[list[int]], pad: int) -> tuple[Packed, list[Row]]:
    """Packs groups of conversations behind what they have in common up to the image.

    Where they differ before the image, each of them holds it.
    """
    shared = [common_length([rows[index].ids[: rows[index].image_end] for index in group]) for group in groups]
    sequences = pack(
        [rows[group[0]].ids[:common] for group, common in zip(groups, shared, strict=True)],
        [[rows[index].ids[common:] for index in group] for group, common in zip(groups, shared, strict=True)],
        pad,
    )
    placed = [
        replace(rows[index], row=row, shared=shared[row], start=start)
        for row, group in enumerate(groups)
        for index, start in zip(group, sequences.starts[row], strict=True)
    ]
    return sequences, placed


def batch_of(case: Case, images: list[int], ids_CL: np.ndarray, *, packed: bool) -> tuple[Batch, list[Row]]:
    """Builds the processor's batch of some images and puts the golden token ids in the place of its text."""
    processor = case.model.processor
    batch = processor([case.examples[image] for image in images], release=True, packed=False)
    of_image = [list(case.conversations(image)) for image in images]
    flat = [conversation for conversations in of_image for conversation in conversations]
    places = {conversation: place for place, conversation in enumerate(flat)}
    together = [[places[c] for c in conversations] for conversations in of_image]
    alone = [[place] for place in range(len(flat))]
    sequences, rows = packed_rows(rows_of(case, ids_CL, flat), together if packed else alone, processor.pad_id)
    # One entry per image in a sequence.
    times = (sequences.input_ids_SL == processor.image_id).sum(1) // processor.image_tokens
    image_of_sequence = [
        images.index(case.image_of_conversation[flat[group[0]]]) for group in (together if packed else alone)
    ]
    supervised = [
        (row.row, row.columns[place - 1], label)
        for row in rows
        for place, label in enumerate(row.labels)
        if label != -100 and place
    ]
    candidates = [[row.columns[row.ids.index(token) - 1] for token in processor.candidate_ids] for row in rows]
    return replace(
        batch,
        input_ids_SL=sequences.input_ids_SL,
        positions_SL=sequences.positions_SL,
        segments_SL=sequences.segments_SL,
        image_of_sequence_S=torch.tensor(image_of_sequence).repeat_interleave(times),
        sequence_of_target_I=torch.tensor([row.row for row in rows]),
        candidates_IK=torch.tensor(candidates),
        supervised_N2=torch.tensor(supervised)[:, :2],
        labels_N=torch.tensor(supervised)[:, 2],
    ), rows


def run(case: Case, images: list[int], ids_CL: np.ndarray, *, packed: bool) -> Pass:
    """Runs our forward pass and keeps what the release's arrays show of the states in between."""
    model = case.model
    batch, rows = batch_of(case, images, ids_CL, packed=packed)
    seen: dict[str, Tensor] = {}

    def keep(name: str, part: Callable[[Any, Any], Any]) -> Any:
        return lambda _module, inputs, output: seen.__setitem__(name, part(inputs, output))

    llava, decoder = model.mllm.model, model.seg_head.mask_decoder
    first = lambda _, output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    hooks = [
        module.register_forward_hook(keep(name, part))
        for name, module, part in [
            ("clip_features", llava.multi_modal_projector, lambda inputs, _: inputs[0]),
            ("mm_projector", llava.multi_modal_projector, first),
            ("layer0_hidden", llava.language_model.layers[0], first),
            ("last_hidden", llava.language_model, lambda _, output: output.last_hidden_state),
            ("router_seg_logits", model.seg_router.gate, first),
            ("router_box_logits", model.box_router.gate, first),
            ("states", model.seg_router, lambda inputs, _: inputs[0]),
            ("router_seg_fused", model.seg_router, first),
            ("router_box_fused", model.box_router, first),
            ("text_fc", model.text_projection, first),
            ("pred_bboxes_cxcywh", model.box_decoder, first),
            ("sparse_prompt", decoder.transformer, lambda inputs, _: inputs[2][:, OUTPUT_TOKENS:]),
            ("quality_states", decoder.transformer, lambda _, output: output[0][:, 0]),
        ]
    ]
    output = model(batch)
    for hook in hooks:
        hook.remove()
    return Pass(batch, rows, output, seen["last_hidden"], seen)
