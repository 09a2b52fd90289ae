"""L_sim: class queries ride behind the others, change nothing else, and are a target without gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from medisee.config import Loss
from medisee.foundation.errors import InputError
from medisee.models import losses
from medisee.models.losses import end_to_end_loss, js_divergence, similarity_mse
from medisee.models.medisee import MediSee
from medisee.models.processing import Batch, Example
from medisee.records.prompts import FORCED_ANSWER

MakeExample: TypeAlias = Callable[..., Example]

QUESTIONS = ["What could cause the pain on the right side?", "Find the spleen.", "Where is the left lung?"]
PLAIN = "Please outline the left lung."
SAME_OUTPUTS = ("boxes_I4", "masks_Jhh", "text_logits_NV", "similarity_IT")


def with_plain(example: Example, plain: Sequence[str | None]) -> Example:
    queries = [replace(query, class_query=one) for query, one in zip(example.queries, plain, strict=True)]
    return replace(example, queries=tuple(queries))


@pytest.fixture
def examples(make_example: MakeExample) -> list[Example]:
    """Three targets; none has a class query yet."""
    return [
        make_example(QUESTIONS[:2], answer=FORCED_ANSWER),
        make_example(QUESTIONS[2:], size=(30, 70), seed=1, answer=FORCED_ANSWER),
    ]


@pytest.fixture
def mixed(examples: list[Example]) -> list[Example]:
    """The same three targets; the second and the third have one."""
    return [with_plain(examples[0], [None, "Find the spleen here."]), with_plain(examples[1], [PLAIN])]


def loss_of(model: MediSee, batch: Batch) -> losses.Terms:
    return end_to_end_loss(model(batch), batch, Loss())


def test_plain_queries_are_no_targets(tiny_model: MediSee, examples: list[Example], mixed: list[Example]) -> None:
    without, batch = tiny_model.processor(examples), tiny_model.processor(mixed)
    assert batch.target_of_class_query_Q.tolist() == [1, 2]
    assert batch.class_sequence_Q.tolist() == [0, 1]
    assert without.target_of_class_query_Q.shape == without.class_sequence_Q.shape == (0,)
    assert without.class_candidates_QK.shape == (0, 2)
    assert len(batch.queries) == len(batch.masks) == 3
    for name in ("candidates_IK", "supervised_N2", "labels_N", "boxes_I4", "masked_J", "coverage_IT"):
        assert torch.equal(getattr(batch, name), getattr(without, name)), name
    # The state before a candidate token is read; segments count the class query as one of its own.
    rows = batch.class_sequence_Q[:, None]
    assert (
        batch.input_ids_SL[rows, batch.class_candidates_QK + 1] == torch.tensor(tiny_model.processor.candidate_ids)
    ).all()
    assert batch.segments_SL[rows, batch.class_candidates_QK].tolist() == [[3, 3], [2, 2]]


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_plain_queries_change_no_other_output(
    tiny_model: MediSee, examples: list[Example], mixed: list[Example], packed: bool
) -> None:
    without = tiny_model(tiny_model.processor(examples, packed=packed))
    output = tiny_model(tiny_model.processor(mixed, packed=packed))
    assert without.class_similarity_QT is None
    for name in SAME_OUTPUTS:
        torch.testing.assert_close(getattr(output, name), getattr(without, name), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_a_plain_map_is_that_of_the_question_asked_by_itself(
    tiny_model: MediSee, mixed: list[Example], make_example: MakeExample, packed: bool
) -> None:
    output = tiny_model(tiny_model.processor(mixed, packed=packed))
    alone = tiny_model(tiny_model.processor([make_example([PLAIN], size=(30, 70), seed=1, answer=FORCED_ANSWER)]))
    torch.testing.assert_close(output.class_similarity_QT[1], alone.similarity_IT[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(output.class_similarity_QT[1], output.similarity_IT[2], atol=1e-3)


def test_terms_are_means_over_plain_queries(tiny_model: MediSee, examples: list[Example], mixed: list[Example]) -> None:
    batch = tiny_model.processor(mixed)
    output = tiny_model(batch)
    terms = end_to_end_loss(output, batch, Loss(js=2.0, mse=1.0))
    maps = output.similarity_IT[1:], output.class_similarity_QT
    torch.testing.assert_close(terms.js, js_divergence(*maps).mean())
    torch.testing.assert_close(terms.mse, similarity_mse(*maps).mean())
    assert terms.js > 0 and terms.mse > 0
    reference = loss_of(tiny_model, tiny_model.processor(examples))
    torch.testing.assert_close(terms.total, reference.total + 2 * terms.js + terms.mse, rtol=1e-4, atol=1e-4)
    assert reference.js == reference.mse == 0


def test_only_the_reasoning_side_learns(tiny_model: MediSee, mixed: list[Example]) -> None:
    batch = tiny_model.processor(mixed)
    embedded: list[Tensor] = []
    layer = tiny_model.mllm.get_input_embeddings()
    layer.register_forward_hook(lambda _, __, output: embedded.append(output.requires_grad_()))
    output = tiny_model(batch, masks="none")
    assert not output.class_similarity_QT.requires_grad
    terms = end_to_end_loss(output, batch, Loss())
    (gradient_SLD,) = torch.autograd.grad(terms.js + terms.mse, embedded)
    moved_SL = gradient_SLD.abs().sum(2) > 0
    reasoning, plain = [(0, 2), (1, 1)], [(0, 3), (1, 2)]
    assert all(moved_SL[row][batch.segments_SL[row] == segment].any() for row, segment in reasoning)
    assert not any(moved_SL[row][batch.segments_SL[row] == segment].any() for row, segment in plain)


def test_the_count_of_all_ranks_divides(
    tiny_model: MediSee, examples: list[Example], mixed: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank has the tokens and targets of this one and no class query, or is the one that has none."""
    without, batch = tiny_model.processor(examples), tiny_model.processor(mixed)
    alone = loss_of(tiny_model, batch)

    def ranks(own: Batch, other: Batch) -> losses.Terms:
        more = [len(other.labels_N), len(other.queries), len(other.masked_J), len(other.target_of_class_query_Q)]
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.add_(torch.tensor(more)))
        return end_to_end_loss(tiny_model(own), own, Loss(), world=2)

    pair = ranks(batch, without), ranks(without, batch)
    torch.testing.assert_close((pair[0].js + pair[1].js) / 2, alone.js)
    torch.testing.assert_close((pair[0].mse + pair[1].mse) / 2, alone.mse)
    nobody = ranks(without, without)
    assert nobody.js == nobody.mse == 0 and torch.isfinite(nobody.total)


def test_a_plain_query_without_words_is_an_error(tiny_model: MediSee, examples: list[Example]) -> None:
    with pytest.raises(InputError, match="target 't0': the query has no text"):
        tiny_model.processor([with_plain(examples[1], [" "])])
