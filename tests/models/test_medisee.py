"""The whole model: shapes, packing, and generation that reads the same states as teacher forcing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn

from medisee.config import Loss
from medisee.models.losses import end_to_end_loss
from medisee.models.medisee import Generated, MediSee, Output
from medisee.models.processing import Batch, Example
from medisee.records.prompts import candidate_text

BuildModel: TypeAlias = Callable[..., MediSee]
MakeExample: TypeAlias = Callable[..., Example]

QUESTIONS = ["Where is the left lung?", "Find the spleen.", "What could cause the pain on the right side of this scan?"]
FORCED = "It is [SEG] and [BBOX]."


class Scripted(nn.Module):
    """An output layer that writes given tokens one after the other, whatever it reads."""

    def __init__(self, vocabulary: int, scripts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.vocabulary, self.scripts = vocabulary, scripts
        self.step = 0

    def forward(self, states_SLD: Tensor) -> Tensor:
        logits = torch.zeros(*states_SLD.shape[:2], self.vocabulary)
        for row, script in enumerate(self.scripts):
            logits[row, -1, script[min(self.step, len(script) - 1)]] = 1
        self.step += 1
        return logits


def make_it_say(model: MediSee, answers: Sequence[str]) -> None:
    """Makes the next call of generate answer these texts, one a sequence, each ended by EOS."""
    scripts = [
        [*model.tokenizer(f" {answer}", add_special_tokens=False).input_ids, model.tokenizer.eos_token_id]
        for answer in answers
    ]
    model.mllm.set_output_embeddings(Scripted(len(model.tokenizer), scripts))


def with_answer(examples: Sequence[Example], answer: str | None) -> list[Example]:
    return [replace(e, queries=tuple(replace(q, answer=answer) for q in e.queries)) for e in examples]


def generate(model: MediSee, examples: Sequence[Example], answers: Sequence[str], limit: int = 40) -> Generated:
    make_it_say(model, answers)
    batch = model.processor(with_answer(examples, None), packed=False)
    return model.generate(batch, max_new_tokens=limit)


@torch.no_grad()
def forced(model: MediSee, examples: Sequence[Example], *, packed: bool = True) -> Output:
    return model(model.processor(examples, packed=packed))


def same(ours: Tensor | None, theirs: Tensor | None, tolerance: float = 1e-4) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_forward_shapes(tiny_model: MediSee, make_example: MakeExample) -> None:
    examples = [
        make_example(QUESTIONS[:2], answer=FORCED),
        make_example(QUESTIONS[2:], size=(30, 70), seed=1, answer=FORCED),
    ]
    batch = tiny_model.processor(examples)
    output = tiny_model(batch)
    grid = tiny_model.seg_head.spec.grid
    assert output.boxes_I4.shape == (3, 4)
    assert output.boxes_I4.dtype == torch.float32
    assert output.masks_Jhh is not None
    assert output.masks_Jhh.shape == (3, 4 * grid, 4 * grid)
    assert output.text_logits_NV.shape == (len(batch.labels_N), len(tiny_model.tokenizer))
    assert output.similarity_IT.shape == (3, 4)
    assert tiny_model(batch, masks="none").masks_Jhh is None


@pytest.mark.parametrize("image_tokens", ["seg_head", "vision_tower"])
def test_packed_equals_one_query_a_sequence(
    build_tiny: BuildModel, make_example: MakeExample, image_tokens: str
) -> None:
    model = build_tiny(mllm={"image_tokens": image_tokens})
    examples = [
        make_example(QUESTIONS, answer=FORCED),
        make_example(QUESTIONS[1:2], size=(30, 70), seed=1, answer=FORCED),
    ]
    together, alone = forced(model, examples), forced(model, examples, packed=False)
    same(together.boxes_I4, alone.boxes_I4)
    same(together.masks_Jhh, alone.masks_Jhh)
    same(together.text_logits_NV, alone.text_logits_NV)
    same(together.similarity_IT, alone.similarity_IT)
    assert not torch.allclose(together.boxes_I4[0], together.boxes_I4[1], atol=1e-3)


def test_padding_to_a_multiple_changes_nothing(build_tiny: BuildModel, make_example: MakeExample) -> None:
    examples = [make_example(QUESTIONS, answer=FORCED), make_example(QUESTIONS[:2], seed=1, answer=FORCED)]
    plain, padded = build_tiny(), build_tiny(mllm={"pad_to": 32})
    assert plain.processor(examples).input_ids_SL.shape[1] % 32
    assert not padded.processor(examples).input_ids_SL.shape[1] % 32
    expected, found = forced(plain, examples), forced(padded, examples)
    same(found.boxes_I4, expected.boxes_I4, 1e-6)
    same(found.masks_Jhh, expected.masks_Jhh, 1e-6)
    same(found.text_logits_NV, expected.text_logits_NV, 1e-6)


@pytest.mark.parametrize("pad_to", [1, 32])
def test_sequences_read_one_by_one_are_those_read_together(
    build_tiny: BuildModel, make_example: MakeExample, pad_to: int
) -> None:
    examples = [
        make_example(QUESTIONS, answer=FORCED),
        make_example(QUESTIONS[:1], seed=1, answer=FORCED),
        make_example(QUESTIONS[1:], size=(30, 70), seed=2, answer=FORCED),
    ]
    together, alone = (build_tiny(mllm={"pad_to": pad_to}).train() for _ in range(2))
    alone.unpadded = True
    found: list[dict[str, Tensor]] = []
    for model in (together, alone):
        lengths: list[int] = []
        hook = model.mllm.model.language_model.register_forward_pre_hook(
            lambda *given, lengths=lengths: lengths.append(given[2]["inputs_embeds"].shape[1]), with_kwargs=True
        )
        batch = model.processor(examples)
        output = model(batch)
        hook.remove()
        assert lengths == (list(batch.lengths) if model is alone else [max(batch.lengths)])
        assert batch.lengths[1] < batch.lengths[0] and not any(length % pad_to for length in batch.lengths)
        assert output.masks_Jhh is not None
        parts = [output.boxes_I4, output.masks_Jhh, output.text_logits_NV.clamp(min=-1e3), output.similarity_IT]
        torch.stack([part.float().square().mean() for part in parts]).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({**dict(zip("bmts", parts, strict=True)), **gradients})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, expected in found[0].items():
        scale = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(found[1][name] / scale, expected / scale, rtol=1e-5, atol=1e-5, msg=name)


def test_questions_and_images_matter(tiny_model: MediSee, make_example: MakeExample) -> None:
    """Guards the other tests: equal outputs would prove nothing if the output were constant."""
    question = QUESTIONS[:1]
    first = forced(tiny_model, [make_example(question, answer=FORCED)])
    other_image = forced(tiny_model, [make_example(question, seed=5, answer=FORCED)])
    other_words = forced(tiny_model, [make_example(QUESTIONS[1:2], answer=FORCED)])
    assert (first.boxes_I4 - other_image.boxes_I4).abs().max() > 1e-3
    assert (first.boxes_I4 - other_words.boxes_I4).abs().max() > 1e-3
    assert first.masks_Jhh is not None
    assert other_words.masks_Jhh is not None
    assert (first.masks_Jhh - other_words.masks_Jhh).abs().max() > 1e-3


def test_cached_embedding_equals_pixels(tiny_model: MediSee, make_example: MakeExample) -> None:
    example = make_example(QUESTIONS[:1], answer=FORCED)
    assert example.image is not None
    embedding = tiny_model.seg_head.encode(tiny_model.processor.seg_pixels(example.image)[None])[0]
    cached = replace(example, image=None, embedding=embedding)
    ours, theirs = forced(tiny_model, [cached]), forced(tiny_model, [example])
    same(ours.boxes_I4, theirs.boxes_I4, 1e-6)
    same(ours.masks_Jhh, theirs.masks_Jhh, 1e-6)


@pytest.mark.parametrize("image_tokens", ["seg_head", "vision_tower"])
@pytest.mark.parametrize("box_start", ["centre", "map"])
@pytest.mark.parametrize("answer", [FORCED, "[SEG] and [BBOX].", "The organ behind it [BBOX] is here, [SEG] as well."])
def test_generated_states_equal_teacher_forcing(
    build_tiny: BuildModel, make_example: MakeExample, image_tokens: str, box_start: str, answer: str
) -> None:
    model = build_tiny(mllm={"image_tokens": image_tokens}, box_start=box_start)
    example = make_example(QUESTIONS[2:], answer=answer)
    truth = forced(model, [example])
    written = generate(model, [example], [answer])
    assert written.texts == (answer,)
    assert written.emitted == (True,)
    same(written.boxes_I4, truth.boxes_I4)
    same(written.masks_Jhh, truth.masks_Jhh)


@pytest.mark.parametrize("box_start", ["centre", "map"])
@pytest.mark.parametrize("prefix_attention", ["causal", "full"])
def test_several_queries_of_an_image_share_its_prefix(
    build_tiny: BuildModel, make_example: MakeExample, prefix_attention: str, box_start: str
) -> None:
    """The prefix of each image goes through the language model once, and the answers' states are those of forcing."""
    model = build_tiny(mllm={"prefix_attention": prefix_attention}, box_start=box_start)
    examples = [make_example(QUESTIONS, answer=FORCED), make_example(QUESTIONS[:1], size=(30, 70), answer=FORCED)]
    truth = forced(model, examples)
    read: list[tuple[int, ...]] = []
    layer = model.mllm.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape[:2])))
    written = generate(model, examples, [FORCED] * 4)
    same(written.boxes_I4, truth.boxes_I4)
    same(written.masks_Jhh, truth.masks_Jhh)
    prefix = len(model.processor.prefix)
    assert read[0] == (2, prefix)
    assert all(rows == 4 and length < prefix + 40 for rows, length in read[1:])
    assert read[1][1] == max(len(model.processor.prompt_ids(question)) for question in QUESTIONS)


@torch.no_grad()
def test_a_full_prefix_lets_image_tokens_see_those_behind_them(
    build_tiny: BuildModel, make_example: MakeExample
) -> None:
    states = {}
    for kind in ("causal", "full"):
        model = build_tiny(mllm={"prefix_attention": kind})
        batch = model.processor([make_example(QUESTIONS[:1], answer=FORCED)])
        embedding = model.embed_images(batch)
        changed = embedding.clone()
        changed[..., -1, -1] += 5.0 * torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(0))
        first = model.processor.image_start
        before, after = (model.hidden_states(batch, one)[0, first] for one in (embedding, changed))
        states[kind] = float((before - after).abs().max())
    # The features are standardised over the image, so that a change anywhere moves every token a little.
    assert states["full"] > 1.5 * states["causal"]


def test_coarse_masks_have_half_the_side(tiny_model: MediSee, make_example: MakeExample) -> None:
    batch = tiny_model.processor([make_example(QUESTIONS, answer=FORCED)], mask_resolution="decoder")
    with torch.no_grad():
        full, coarse = (tiny_model(batch, masks=detail).masks_Jhh for detail in ("full", "coarse"))
    assert full is not None and coarse is not None
    assert coarse.shape[-1] * 2 == full.shape[-1]
    assert torch.isfinite(coarse).all()


@torch.no_grad()
def test_the_mask_loss_is_bounded_for_large_images_only(tiny_model: MediSee, make_example: MakeExample) -> None:
    terms = {}
    for size in ((48, 40), (150, 60)):
        for bound in ("original", 64):
            batch = tiny_model.processor([make_example(QUESTIONS, answer=FORCED, size=size)], mask_resolution=bound)
            terms[size, bound] = end_to_end_loss(tiny_model(batch), batch, Loss())
    small, whole = terms[(48, 40), 64], terms[(48, 40), "original"]
    assert all(torch.equal(getattr(small, field.name), getattr(whole, field.name)) for field in fields(small))
    bounded, full = terms[(150, 60), 64], terms[(150, 60), "original"]
    assert bounded.bce != full.bce
    # A mean over pixels: scaling down smooths it and leaves its size.
    assert float(bounded.bce) == pytest.approx(float(full.bce), rel=0.1)
    assert torch.equal(bounded.l1, full.l1)


@pytest.mark.parametrize("size", [(120, 48), (48, 120)])
def test_a_right_mask_has_no_loss_at_a_bound(
    tiny_model: MediSee, make_example: MakeExample, size: tuple[int, int]
) -> None:
    """Of an image that is not square, whose frame is padded."""
    example = make_example(QUESTIONS[:1], answer=FORCED, size=size)
    batch = tiny_model.processor([example], mask_resolution=64)
    truth = tiny_model.processor([example], mask_resolution="decoder").masks[0]
    with torch.no_grad():
        output = tiny_model(batch)
    right, wrong = (replace(output, masks_Jhh=20 * one[None] - 10) for one in (truth, truth.roll((3, 3), (0, 1))))
    assert end_to_end_loss(right, batch, Loss()).dice < 0.15 < 0.4 < end_to_end_loss(wrong, batch, Loss()).dice


def test_generation_reads_the_first_of_repeated_tokens(tiny_model: MediSee, make_example: MakeExample) -> None:
    answer = f"{FORCED} And {FORCED}"
    example = make_example(QUESTIONS[:1], answer=answer)
    written, truth = generate(tiny_model, [example], [answer]), forced(tiny_model, [example])
    same(written.boxes_I4, truth.boxes_I4)
    same(written.masks_Jhh, truth.masks_Jhh)


@pytest.mark.parametrize("candidates", [("[SEG]",), ("[SEG]", "[BBOX]", "[TGT3]")])
def test_generation_with_other_candidate_tokens(
    build_tiny: BuildModel, make_example: MakeExample, candidates: tuple[str, ...]
) -> None:
    model = build_tiny(candidate_tokens=candidates)
    example = make_example(QUESTIONS[:1], answer=FORCED)
    written = generate(model, [example], [f"It is {candidate_text(candidates)}."])
    truth = forced(model, [example])
    assert written.emitted == (True,)
    same(written.boxes_I4, truth.boxes_I4)
    same(written.masks_Jhh, truth.masks_Jhh)


def test_generation_in_a_batch_equals_one_by_one(tiny_model: MediSee, make_example: MakeExample) -> None:
    """Questions of different lengths are padded on the left; answers end at different steps."""
    answers = ["[SEG] and [BBOX].", f"Well, {FORCED}", FORCED]
    examples = [make_example(QUESTIONS[:2]), make_example(QUESTIONS[2:], size=(30, 70), seed=1)]
    together = generate(tiny_model, examples, answers)
    lengths = [len(tiny_model.processor.prompt_ids(question)) for question in QUESTIONS]
    assert len(set(lengths)) == 3
    single = [replace(examples[0], queries=(query,)) for query in examples[0].queries] + [examples[1]]
    for row, (example, answer) in enumerate(zip(single, answers, strict=True)):
        alone = generate(tiny_model, [example], [answer])
        assert (alone.texts, alone.emitted) == ((answer,), (True,))
        assert together.texts[row] == answer
        same(together.boxes_I4[row : row + 1], alone.boxes_I4)
        same(together.masks_Jhh[row : row + 1], alone.masks_Jhh)


@pytest.mark.parametrize(
    ("answer", "emitted"),
    [("I cannot see it.", False), ("Only [SEG] here.", False), ("Only [BBOX] here.", False), (FORCED, True)],
)
def test_emitted_needs_every_candidate_token(
    tiny_model: MediSee, make_example: MakeExample, answer: str, emitted: bool
) -> None:
    written = generate(tiny_model, [make_example(QUESTIONS[:1])], [answer])
    assert written.emitted == (emitted,)
    assert written.texts == (answer,)
    assert torch.isfinite(written.boxes_I4).all()


def test_emitted_is_per_query(tiny_model: MediSee, make_example: MakeExample) -> None:
    answers = ["Nothing is there.", FORCED, "Only [SEG] here."]
    written = generate(tiny_model, [make_example(QUESTIONS)], answers)
    assert written.emitted == (False, True, False)
    assert written.texts == tuple(answers)


def test_an_answer_cut_off_before_its_tokens_is_not_emitted(tiny_model: MediSee, make_example: MakeExample) -> None:
    answer = f"A long story comes first. {FORCED}"
    assert generate(tiny_model, [make_example(QUESTIONS[:1])], [answer], limit=3).emitted == (False,)


def trained_to_say(model: MediSee, batch: Batch, steps: int) -> None:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(batch, masks="none").text_logits_NV, batch.labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_trained_model_writes_what_it_learned(tiny_model: MediSee, make_example: MakeExample) -> None:
    """Nothing is scripted here: positions, image tokens and prompt must agree between training and generation."""
    examples = [make_example(QUESTIONS, answer=FORCED)]
    trained_to_say(tiny_model, tiny_model.processor(examples), 60)
    batch = tiny_model.processor(with_answer(examples, None), packed=False)
    written, truth = tiny_model.generate(batch, max_new_tokens=20), forced(tiny_model, examples)
    assert written.texts == (FORCED,) * 3
    assert written.emitted == (True,) * 3
    same(written.boxes_I4, truth.boxes_I4)
    same(written.masks_Jhh, truth.masks_Jhh)


@pytest.mark.parametrize("prompts", [["text"], ["box"], ["text", "box"]])
def test_prompts_decide_what_the_mask_depends_on(
    build_tiny: BuildModel, make_example: MakeExample, prompts: list[str]
) -> None:
    model = build_tiny(prompts=prompts)
    output = model(model.processor([make_example(QUESTIONS[:1], answer=FORCED)]))
    assert output.masks_Jhh is not None
    output.masks_Jhh.square().sum().backward()
    for part, kind in ((model.box_decoder, "box"), (model.text_projection, "text")):
        gradients = [p.grad for p in part.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert bool(gradients) == (kind in prompts)


def test_a_true_box_prompts_only_where_asked(tiny_model: MediSee, make_example: MakeExample) -> None:
    example = make_example(QUESTIONS[:2], answer=FORCED)
    helped = replace(example, queries=(replace(example.queries[0], true_box=True), example.queries[1]))
    plain, hinted = forced(tiny_model, [example]), forced(tiny_model, [helped])
    same(plain.boxes_I4, hinted.boxes_I4, 1e-6)
    assert plain.masks_Jhh is not None
    assert hinted.masks_Jhh is not None
    assert (plain.masks_Jhh[0] - hinted.masks_Jhh[0]).abs().max() > 1e-4
    same(plain.masks_Jhh[1], hinted.masks_Jhh[1], 1e-6)
