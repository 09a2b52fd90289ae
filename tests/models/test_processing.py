"""MediSeeProcessor: the prompt, what is supervised, where candidate states are read, truth in the model's frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medisee.config.model import Model
from medisee.foundation.errors import InputError
from medisee.models.processing import CLIP_MEAN, CLIP_STD, Batch, Example, MediSeeProcessor, Query
from medisee.models.seg_head import SegHeadSpec
from medisee.records.records import Turn
from medisee.weights.tokenizer import IMAGE_TOKEN, add_candidate_tokens, train_tokenizer

SPEC = SegHeadSpec(size=64, resize="longest", pixels="minmax", channels=8, grid=4)
QUESTIONS = ("Where is the left lung?", "Find the spleen.", "What may hurt on the right side of this scan?")
FORCED = "It is [SEG] and [BBOX]."


def processor(
    candidates: tuple[str, ...] = ("[SEG]", "[BBOX]"), spec: SegHeadSpec = SPEC, **mllm: Any
) -> MediSeeProcessor:
    config = Model.model_validate({"candidate_tokens": candidates, "mllm": {"vision_size": 28, "image_grid": 2} | mllm})
    tokenizer = train_tokenizer([*QUESTIONS, "[INST] ", " [/INST]", FORCED], 320)
    add_candidate_tokens(tokenizer, candidates)
    return MediSeeProcessor(config, tokenizer, spec)


def rectangle(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def query(question: str = QUESTIONS[0], answer: str | None = FORCED, **more: Any) -> Query:
    return Query(record="r1", target="t1", question=question, answer=answer, **more)


def example(*queries: Query, height: int = 40, width: int = 60, seed: int = 0) -> Example:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Example(image, height, width, queries or (query(),))


def decode(own: MediSeeProcessor, ids: list[int]) -> str:
    text = own.tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("image_tokens", ["vision_tower", "seg_head"])
def test_prompt_format(image_tokens: str) -> None:
    own = processor(image_tokens=image_tokens)
    ids = own([example()]).input_ids_SL[0].tolist()
    image = IMAGE_TOKEN * 4
    assert decode(own, ids) == f"<s>[INST] {image}\n{QUESTIONS[0]} [/INST] {FORCED}</s>"


def test_the_text_is_tokenised_in_chunks_around_the_image() -> None:
    own = processor()
    before, after = "[INST] ", f"\n{QUESTIONS[0]} [/INST]"
    chunks = [own.tokenizer(text, add_special_tokens=False).input_ids for text in (before, after, f" {FORCED}")]
    ids = [
        own.tokenizer.bos_token_id,
        *chunks[0],
        *[own.image_id] * 4,
        *chunks[1],
        *chunks[2],
        own.tokenizer.eos_token_id,
    ]
    assert own([example()]).input_ids_SL[0].tolist() == ids
    assert ids[own.image_start : own.image_start + 4] == [own.image_id] * 4
    assert ids.count(own.tokenizer.bos_token_id) == 1


def test_a_prompt_without_answer_ends_where_the_answer_begins() -> None:
    own = processor()
    with_answer = own([example()]).input_ids_SL[0].tolist()
    without = own([example(query(answer=None))])
    ids = without.input_ids_SL[0].tolist()
    assert ids == with_answer[: len(ids)]
    assert decode(own, ids).endswith("[/INST]")
    assert without.supervised_N2.shape == (0, 2)
    assert without.labels_N.shape == (0,)


def test_questions_are_stripped() -> None:
    own = processor()
    plain, padded = own([example()]), own([example(query(f"  {QUESTIONS[0]}\n"))])
    assert torch.equal(plain.input_ids_SL, padded.input_ids_SL)


@pytest.mark.parametrize("packed", [True, False])
def test_labels_are_the_answer_and_its_end_and_nothing_else(packed: bool) -> None:
    own = processor()
    answers = ["It is [SEG] and [BBOX].", "Sure, [SEG] and [BBOX]. It lies behind the stomach.", FORCED]
    queries = [query(q, a) for q, a in zip(QUESTIONS, answers, strict=True)]
    batch = own([example(*queries[:2]), example(queries[2], seed=1)], packed=packed)
    expected = [
        [*own.tokenizer(f" {answer}", add_special_tokens=False).input_ids, own.tokenizer.eos_token_id]
        for answer in answers
    ]
    assert batch.labels_N.tolist() == [token for ids in expected for token in ids]
    rows, places = batch.supervised_N2.unbind(1)
    # Each supervised state is one before its token, inside the same query or, for n = 0, at the question's end.
    assert torch.equal(batch.input_ids_SL[rows, places + 1], batch.labels_N)
    assert torch.equal(batch.segments_SL[rows, places], batch.segments_SL[rows, places + 1])
    assert torch.equal(batch.positions_SL[rows, places] + 1, batch.positions_SL[rows, places + 1])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("candidates", [("[SEG]",), ("[SEG]", "[BBOX]"), ("[SEG]", "[BBOX]", "[TGT3]")])
def test_candidate_positions_predict_the_candidate_tokens(candidates: tuple[str, ...], packed: bool) -> None:
    own = processor(candidates)
    batch = own([example(*[query(q) for q in QUESTIONS]), example(query(), seed=1)], packed=packed)
    assert batch.candidates_IK.shape == (4, len(candidates))
    following = batch.input_ids_SL[batch.sequence_of_target_I[:, None], batch.candidates_IK + 1]
    assert following.tolist() == [own.candidate_ids] * 4
    assert own.candidate_ids == own.tokenizer.convert_tokens_to_ids(list(candidates))
    own_segment = batch.segments_SL[batch.sequence_of_target_I[:, None], batch.candidates_IK]
    assert own_segment[:, 0].tolist() == ([1, 2, 3, 1] if packed else [1, 1, 1, 1])
    assert (own_segment == own_segment[:, :1]).all()


HISTORY = (Turn("What is shown?", "A slice of the chest."), Turn(" Which side? ", "The left, as [SEG] and [BBOX]."))


def test_a_conversation_reads_as_one_prompt() -> None:
    own = processor()
    ids = own([example(query(history=HISTORY))]).input_ids_SL[0].tolist()
    earlier = (
        "\nWhat is shown? [/INST] A slice of the chest.</s>[INST] Which side? [/INST] The left, as [SEG] and [BBOX]."
    )
    assert decode(own, ids) == (f"<s>[INST] {IMAGE_TOKEN * 4}{earlier}</s>[INST] {QUESTIONS[0]} [/INST] {FORCED}</s>")


@pytest.mark.parametrize("packed", [True, False])
def test_only_the_last_answer_of_a_conversation_is_learnt(packed: bool) -> None:
    own = processor()
    alone = own([example(query(), query(QUESTIONS[1]))], packed=packed)
    told = own([example(query(history=HISTORY), query(QUESTIONS[1]))], packed=packed)
    assert torch.equal(told.labels_N, alone.labels_N)
    rows, places = told.supervised_N2.unbind(1)
    assert torch.equal(told.input_ids_SL[rows, places + 1], told.labels_N)
    # The candidate tokens of the earlier answer are not read: all are at or behind the last question's end.
    assert (told.candidates_IK[0] >= told.supervised_N2[0, 1]).all()
    longer = told.input_ids_SL.shape[1] - alone.input_ids_SL.shape[1]
    assert longer > 0
    assert torch.equal(told.candidates_IK[0], alone.candidates_IK[0] + longer)


def test_a_conversation_without_answer_ends_where_it_begins() -> None:
    own = processor()
    ids = own([example(query(answer=None, history=HISTORY))]).input_ids_SL[0].tolist()
    assert decode(own, ids).endswith(f"[BBOX].</s>[INST] {QUESTIONS[0]} [/INST]")


def test_a_history_without_end_is_refused() -> None:
    with pytest.raises(InputError, match="at most"):
        processor()([example(query(history=HISTORY * 200))])


def test_the_first_of_repeated_candidate_tokens_counts() -> None:
    own = processor()
    once = own([example(query(answer="[SEG] and [BBOX]."))]).candidates_IK
    twice = own([example(query(answer="[SEG] and [BBOX]. Again [BBOX] and [SEG]."))]).candidates_IK
    assert torch.equal(once, twice)


def test_candidate_tokens_in_the_question_are_not_read() -> None:
    own = processor()
    batch = own([example(query("Is [SEG] and [BBOX] what I ask?"))])
    answer_start = int(batch.supervised_N2[0, 1])
    assert (batch.candidates_IK >= answer_start).all()


def test_answers_are_rewritten_for_other_candidate_tokens() -> None:
    assert processor(("[SEG]",)).answer_text(FORCED) == "It is [SEG]."
    assert processor().answer_text(FORCED) == FORCED
    assert processor(("[A]", "[B]", "[C]")).answer_text(FORCED) == "It is [A], [B] and [C]."


@pytest.mark.parametrize(("setting", "count"), [({"vision_size": 42}, 9), ({"image_tokens": "seg_head"}, 4)])
def test_image_token_count(setting: dict[str, Any], count: int) -> None:
    own = processor(**setting)
    ids = own([example(query(), query(QUESTIONS[1]))]).input_ids_SL
    assert own.image_tokens == count
    assert (ids == own.image_id).sum() == count


@pytest.mark.parametrize("question", ["", "  \n"])
@pytest.mark.parametrize("answer", [FORCED, None])
def test_an_empty_query_is_refused(question: str, answer: str | None) -> None:
    with pytest.raises(InputError, match=r"'r1'.*'t1'.*no text"):
        processor()([example(query(question, answer))])


@pytest.mark.parametrize("answer", [FORCED, None])
def test_a_query_that_is_too_long_is_refused(answer: str | None) -> None:
    own = processor()
    with pytest.raises(InputError, match=r"'r1'.*'t1'.*at most 1024"):
        own([example(query("spleen " * 1100, answer))])
    own([example(query("spleen " * 200, answer))])


TOKENS = "</s> [SEG] <image> <s> [BBOX] <unk> [/INST]"


@pytest.mark.parametrize("answer", [FORCED, None])
def test_tokens_in_a_users_text_stay_text(answer: str | None) -> None:
    """In questions, in earlier turns and behind the candidate tokens of an answer."""
    own = processor()
    history = (Turn(TOKENS, "So </s> it is <image>."),)
    batch = own([example(query(TOKENS, answer and f"{answer} See </s> and <image>.", history=history))])
    ids = batch.input_ids_SL[0].tolist()
    behind = ids[own.image_start + own.image_tokens :]
    assert ids.count(own.image_id) == own.image_tokens and own.tokenizer.bos_token_id not in behind
    assert behind.count(own.end_id) == (1 if answer is None else 2)
    assert [behind.count(token) for token in own.candidate_ids] == ([0, 0] if answer is None else [1, 1])
    assert decode(own, behind) == (
        f"\n{TOKENS} [/INST] So </s> it is <image>.</s>[INST] {TOKENS} [/INST]"
        + (f" {FORCED} See </s> and <image>.</s>" if answer else "")
    )
    if answer:
        following = batch.input_ids_SL[0, batch.candidates_IK[0] + 1]
        assert following.tolist() == own.candidate_ids


@pytest.mark.parametrize("text", ["{image}\n{q}", "{image} \r\n {q}", "{q}\n{image}", " {image}\n\n{q}"])
def test_the_line_with_which_llava_marks_its_image_is_taken_off(text: str) -> None:
    own = processor()
    marked = query(text.format(image=IMAGE_TOKEN, q=QUESTIONS[0]))
    assert torch.equal(own([example(marked)]).input_ids_SL, own([example()]).input_ids_SL)


@pytest.mark.parametrize("place", ["question", "answer", "history"])
def test_text_that_is_not_unicode_is_refused(place: str) -> None:
    odd = {
        "question": {"question": "a\udcff"},
        "answer": {"answer": "a\udcff"},
        "history": {"history": (Turn("a", "\ud800"),)},
    }
    with pytest.raises(InputError, match=r"'r1'.*'t1'.*not valid Unicode"):
        processor()([example(query(**odd[place]))])


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(InputError, match=r"'r1'.*'t1'.*mask is empty"):
        processor()([example(query(mask=np.zeros((40, 60), dtype=bool)))])


def test_boxes_are_normalised_by_width_and_height() -> None:
    mask = rectangle(40, 60, (15, 10, 30, 40))
    batch = processor()([example(query(mask=mask), query(mask=mask, box=(0.0, 20.0, 60.0, 30.0)))])
    expected = torch.tensor([[0.25, 0.25, 0.5, 1.0], [0.0, 0.5, 1.0, 0.75]])
    assert batch.boxes_I4 is not None
    torch.testing.assert_close(batch.boxes_I4, expected)


def test_masks_at_both_resolutions() -> None:
    own = processor()
    mask = rectangle(40, 60, (0, 0, 30, 20))
    (original,) = own([example(query(mask=mask))]).masks
    assert torch.equal(original, torch.from_numpy(mask).float())
    (decoder,) = own([example(query(mask=mask))], mask_resolution="decoder").masks
    assert decoder.shape == (16, 16)
    # 60 x 40 becomes 16 x 11 of the decoder's 16 x 16 pixels: the left half, the upper half.
    assert decoder[:5, :8].min() == 1
    assert decoder[:, 9:].max() == 0
    assert decoder[7:].max() == 0


def test_a_bound_scales_masks_and_leaves_boxes() -> None:
    own, mask = processor(), rectangle(40, 80, (40, 0, 80, 20))
    given = example(query(mask=mask), height=40, width=80)
    whole, bounded = (own([given], mask_resolution=bound) for bound in ("original", 32))
    (small,) = bounded.masks
    assert torch.equal(small, torch.from_numpy(rectangle(16, 32, (16, 0, 32, 8))).float())
    assert whole.boxes_I4 is not None and bounded.boxes_I4 is not None
    assert torch.equal(whole.boxes_I4, bounded.boxes_I4)
    assert whole.coverage_IT is not None and bounded.coverage_IT is not None
    assert torch.equal(whole.coverage_IT, bounded.coverage_IT)
    (same,) = own([given], mask_resolution=80).masks
    assert torch.equal(same, whole.masks[0])


def test_without_truth_there_is_none() -> None:
    batch = processor()([example(query())])
    assert (batch.boxes_I4, batch.masks, batch.coverage_IT) == (None, (), None)


def coverage(own: MediSeeProcessor, height: int, width: int, mask: np.ndarray) -> list[list[float]]:
    batch = own([example(query(mask=mask), height=height, width=width)])
    assert batch.coverage_IT is not None
    side = int(own.image_tokens**0.5)
    return batch.coverage_IT.reshape(side, side).tolist()


def test_coverage_on_the_seg_heads_frame() -> None:
    """The frame's image is at the top left; below a wide one there is padding."""
    own = processor(image_tokens="seg_head", image_grid=4)
    upper_right = rectangle(32, 64, (32, 0, 64, 16))
    assert coverage(own, 32, 64, upper_right) == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    everything = np.ones((32, 64), dtype=bool)
    assert coverage(own, 32, 64, everything) == [[1] * 4, [1] * 4, [0] * 4, [0] * 4]
    assert coverage(own, 64, 32, np.ones((64, 32), dtype=bool)) == [[1, 1, 0, 0]] * 4


def test_coverage_on_the_vision_towers_padded_square() -> None:
    """The square's image is in the middle."""
    own = processor(vision_size=56)
    upper_right = rectangle(32, 64, (32, 0, 64, 16))
    assert coverage(own, 32, 64, upper_right) == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert coverage(own, 64, 32, np.ones((64, 32), dtype=bool)) == [[0, 1, 1, 0]] * 4


def test_coverage_of_a_stretched_frame() -> None:
    own = processor(spec=replace(SPEC, resize="stretch"), image_tokens="seg_head")
    assert coverage(own, 20, 64, rectangle(20, 64, (0, 10, 32, 20))) == [[0, 0], [1, 0]]


def supervision(batch: Batch) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """For each target: its question, and ids and positions of what is supervised."""
    rows, places = batch.supervised_N2.unbind(1)
    found = []
    for target, one in enumerate(batch.queries):
        row = batch.sequence_of_target_I[target]
        segment = batch.segments_SL[row, batch.candidates_IK[target, 0]]
        own = (rows == row) & (batch.segments_SL[rows, places] == segment)
        positions = batch.positions_SL[rows[own], places[own]].tolist()
        found.append((one.record, one.question, tuple(batch.labels_N[own].tolist()), tuple(positions)))
    return found


def test_packed_and_unpacked_batches_hold_the_same() -> None:
    own = processor()
    mask = rectangle(40, 60, (5, 5, 20, 30))
    examples = [
        example(*[query(q, mask=mask) for q in QUESTIONS]),
        example(replace(query(QUESTIONS[1], mask=mask), record="r2"), seed=1),
    ]
    packed, single = own(examples), own(examples, packed=False)
    assert packed.input_ids_SL.shape[0] == 2
    assert single.input_ids_SL.shape[0] == 4
    assert supervision(packed) == supervision(single)
    assert torch.equal(packed.labels_N, single.labels_N)
    assert packed.image_of_target_I.tolist() == single.image_of_target_I.tolist() == [0, 0, 0, 1]
    assert packed.sequence_of_target_I.tolist() == [0, 0, 0, 1]
    assert single.sequence_of_target_I.tolist() == [0, 1, 2, 3]
    assert packed.image_of_sequence_S.tolist() == [0, 1]
    assert single.image_of_sequence_S.tolist() == [0, 0, 0, 1]
    assert packed.queries == single.queries
    for name in ("boxes_I4", "coverage_IT", "pixels_B3FF", "vision_B3VV"):
        assert torch.equal(getattr(packed, name), getattr(single, name)), name


def test_vision_pixels_show_the_borders_of_a_wide_image() -> None:
    """Padding to a square keeps what a centre crop would cut off."""
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, :10] = (255, 0, 0)
    image[:, -10:] = (0, 255, 0)
    pixels = processor(vision_size=56).vision_pixels(image)
    shown = 255 * (pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None])
    assert pixels.shape == (3, 56, 56)
    middle = shown[:, 28]
    assert middle[:, 2].tolist() == pytest.approx([255, 0, 0], abs=2)
    assert middle[:, -3].tolist() == pytest.approx([0, 255, 0], abs=2)
    # Above and below: CLIP's mean colour, which is 0 after standardisation, up to the rounding to 8 bit.
    for row in (0, 10, 45, 55):
        assert pixels[:, row].abs().max() < 0.02


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40)])
def test_vision_padding_is_on_both_sides(height: int, width: int) -> None:
    pixels = processor(vision_size=56).vision_pixels(np.full((height, width, 3), 255, dtype=np.uint8))
    is_image = (pixels > 1).all(0)
    assert is_image.any(1).sum() == (28 if height == 40 else 56)
    assert torch.equal(is_image, is_image.flip(0)) and torch.equal(is_image, is_image.flip(1))


def test_vision_pixels_of_a_square_image_are_clips() -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    expected = (image / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(processor().vision_pixels(image).permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_seg_pixels_follow_the_seg_heads_rule() -> None:
    image = np.random.default_rng(0).integers(10, 200, (32, 64, 3), dtype=np.uint8)
    pixels = processor().seg_pixels(image)
    expected = (image.astype(np.float32) - image.min()) / (int(image.max()) - int(image.min()))
    np.testing.assert_allclose(pixels[:, :32].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert pixels[:, 32:].abs().max() == 0
    stretched = processor(spec=replace(SPEC, resize="stretch")).seg_pixels(image)
    half = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR), dtype=np.float32)
    expected = (half - half.min()) / (half.max() - half.min())
    np.testing.assert_allclose(stretched.permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_cached_features_replace_the_image(mixed: bool) -> None:
    """Also where a model with 16-bit weights is scored under autocast, which does not know float16 on a CPU."""
    own = processor(image_tokens="seg_head")
    cached = Example(None, 40, 60, (query(),), torch.ones(8, 4, 4, dtype=torch.float16))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        batch = own([cached, cached])
    assert batch.pixels_B3FF is None
    assert batch.embedding_BCGG is not None
    assert batch.embedding_BCGG.shape == (2, 8, 4, 4)
    assert batch.embedding_BCGG.dtype == torch.float32
    assert batch.frames[0].resized_height == 43


def test_a_batch_moves_as_a_whole() -> None:
    batch = processor()([example(query(mask=rectangle(40, 60, (1, 1, 9, 9))))])
    moved = batch.to(torch.device("meta"))
    for name in ("pixels_B3FF", "input_ids_SL", "candidates_IK", "boxes_I4", "true_box_I", "coverage_IT"):
        assert getattr(moved, name).device.type == "meta", name
    assert moved.masks[0].device.type == "meta"
    assert moved.queries is batch.queries
