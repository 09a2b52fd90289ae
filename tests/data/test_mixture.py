"""The mixture: shares, order, ranks, workers and resuming."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from medisee.config import Config
from medisee.config.load import config_from
from medisee.data.dataset import MicroBatches, TrainingData, training_batches
from medisee.data.mixture import Draw, Mixture
from medisee.foundation.errors import InputError
from medisee.models.processing import Batch, MediSeeProcessor
from medisee.models.seg_head import SegHeadSpec
from medisee.records.manifest import Manifest
from medisee.records.records import QA, Record, Target, write_records
from medisee.training.optimization import split_batch
from medisee.weights.tokenizer import add_candidate_tokens, train_tokenizer

sources = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4)


def mixture(shape: list[tuple[int, int]], seed: int = 0) -> Mixture:
    return Mixture([length for length, _ in shape], [weight for _, weight in shape], seed)


def draws(own: Mixture, count: int) -> list[Draw]:
    return [own.draw(number) for number in range(count)]


@settings(max_examples=30)
@given(sources, st.integers(0, 5))
def test_weights_are_kept_exactly_over_every_cycle(shape: list[tuple[int, int]], turn: int) -> None:
    own = mixture(shape)
    weights = [weight for _, weight in shape]
    length = sum(weights) // int(np.gcd.reduce(weights))
    counts = Counter(own.draw(turn * length + place).source for place in range(length))
    assert [counts[source] * sum(weights) for source in range(len(shape))] == [w * length for w in weights]


def test_seven_to_three() -> None:
    counts = Counter(draw.source for draw in draws(mixture([(50, 7), (50, 3)]), 100))
    assert counts == {0: 70, 1: 30}
    assert Counter(draw.source for draw in draws(mixture([(5, 700), (5, 300)]), 10)) == {0: 7, 1: 3}


@settings(max_examples=30)
@given(sources, st.integers(0, 3))
def test_every_record_comes_once_per_pass(shape: list[tuple[int, int]], seed: int) -> None:
    own = mixture(shape, seed)
    seen: dict[int, list[int]] = {source: [] for source in range(len(shape))}
    for draw in draws(own, 120):
        seen[draw.source].append(draw.index)
    for source, (length, _) in enumerate(shape):
        for first in range(0, len(seen[source]) - length + 1, length):
            assert sorted(seen[source][first : first + length]) == list(range(length))


def test_passes_have_different_orders() -> None:
    own = mixture([(30, 1)])
    first, second = ([own.draw(n).index for n in range(at, at + 30)] for at in (0, 30))
    assert first != second
    assert first != list(range(30))


def test_sources_are_mixed_within_cycles() -> None:
    own = mixture([(50, 7), (50, 3)])
    patterns = {tuple(own.draw(10 * turn + place).source for place in range(10)) for turn in range(10)}
    assert len(patterns) > 5


@settings(max_examples=30)
@given(sources, st.integers(0, 1000))
def test_a_draw_is_a_pure_function_of_its_number(shape: list[tuple[int, int]], number: int) -> None:
    own, other = mixture(shape, 3), mixture(shape, 3)
    for before in (5, 0, 999, number):
        own.draw(before)
    assert own.draw(number) == other.draw(number)
    assert pickle.loads(pickle.dumps(other.draw(number))) == other.draw(number)
    assert own.draw(number).number == number


def test_other_seeds_draw_otherwise() -> None:
    orders = {tuple((d.source, d.index) for d in draws(mixture([(20, 2), (20, 1)], seed), 60)) for seed in range(5)}
    assert len(orders) == 5


def test_unseeded_draws_have_no_epochs_and_no_repetition() -> None:
    """The release's way: shares hold on average only, a record may come again at once, and no two runs are the same."""
    first, second = (draws(Mixture([200, 4], [7, 3], 0, unseeded=True), 1000) for _ in range(2))
    assert first != second
    assert [draw.number for draw in first] == list(range(1000))
    counts = Counter(draw.source for draw in first)
    assert 600 < counts[0] < 800, "seven of ten"
    seen = [draw.index for draw in first if draw.source == 0]
    assert len(set(seen[:200])) < 160, "some before all"
    assert len(set(seen)) > 180, "any of them"


def test_an_unseeded_source_joins_when_it_is_its_turn() -> None:
    own = Mixture([5, 5], [1, 1], 0, first_draws=[0, 50], unseeded=True)
    found = [draw.source for draw in draws(own, 200)]
    assert set(found[:50]) == {0} and set(found[50:]) == {0, 1}


@settings(max_examples=30)
@given(sources, st.integers(1, 40))
def test_a_source_that_joins_later(shape: list[tuple[int, int]], join: int) -> None:
    """Before it joins the others keep their shares; then all do; and passes stay whole across the change."""
    shape = [*shape, (4, 2)]
    last = len(shape) - 1
    own = Mixture([n for n, _ in shape], [w for _, w in shape], 0, first_draws=[0] * last + [join])
    alone = mixture(shape[:-1])
    found = draws(own, join + 120)
    assert [(d.source, d.index) for d in found[:join]] == [(d.source, d.index) for d in draws(alone, join)]
    weights = [weight for _, weight in shape]
    length = sum(weights) // int(np.gcd.reduce(weights))
    cycle = Counter(draw.source for draw in found[join : join + length])
    assert [cycle[source] * sum(weights) for source in range(len(shape))] == [w * length for w in weights]
    for source, (size, _) in enumerate(shape):
        seen = [draw.index for draw in found if draw.source == source]
        for first in range(0, len(seen) - size + 1, size):
            assert sorted(seen[first : first + size]) == list(range(size))


def run(**train: Any) -> Config:
    return config_from({"train": {"steps": 6, "accumulation": 2, "batch_size": 4} | train}, where="test")


def numbers(config: Config, *, first_step: int = 0, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
    batches = MicroBatches(mixture([(9, 2), (5, 1)]), config, first_step, rank, world)
    found = [[(draw.number, step) for draw, step in batch] for batch in batches]
    assert len(batches) == len(found)
    return found


def test_two_ranks_of_half_the_batch_are_one_rank() -> None:
    whole = numbers(run())
    left, right = (numbers(run(batch_size=2), rank=rank, world=2) for rank in (0, 1))
    assert [a + b for a, b in zip(left, right, strict=True)] == whole
    assert [n for batch in whole for n, _ in batch] == list(range(6 * 2 * 4))


def test_accumulation_changes_no_order() -> None:
    parts = numbers(run(accumulation=4, batch_size=2))
    assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == numbers(run())


@settings(max_examples=40)
@given(
    splits=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6, 12])), min_size=1, max_size=6),
    seed=st.integers(0, 3),
)
def test_any_ranks_and_batches_draw_the_same_in_each_step(splits: list[tuple[int, int]], seed: int) -> None:
    """A run of 12 images a step, each step on another number of ranks with another batch size."""
    found = []
    for step, (world, size) in enumerate(splits):
        world = world if 12 % (world * size) == 0 else 1
        train = split_batch(run(steps=6, global_batch=12, batch_size=size, seed=seed).train, world)
        config = Config().model_copy(update={"train": train})
        ranks = [
            list(MicroBatches(mixture([(9, 2), (5, 1)], seed), config, step, rank, world))[: train.accumulation]
            for rank in range(world)
        ]
        found += [draw for micro in zip(*ranks, strict=True) for part in micro for draw, _ in part]
    assert found == draws(mixture([(9, 2), (5, 1)], seed), 12 * len(splits))


@pytest.mark.parametrize("first_step", [1, 3, 5, 6])
def test_resuming_gives_the_tail(first_step: int) -> None:
    assert numbers(run(), first_step=first_step) == numbers(run())[2 * first_step :]


def test_every_batch_knows_its_step() -> None:
    assert [{step for _, step in batch} for batch in numbers(run())] == [{n // 2} for n in range(12)]


def save(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(path)
    return path.name


def record_of(folder: Path, name: str, size: tuple[int, int], x1: int) -> Record:
    """One image of two targets, the first with its own question and the second without."""
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[2:9, 3:x1] = 255
    question = QA(f"What lies at {name}?", "It is [SEG] and [BBOX].", "location", "short")
    targets = (
        Target(id="a", category="disc", mask=save(folder / f"{name}_a.png", pixels), qa=(question,)),
        Target(id="b", category="left lung", mask=save(folder / f"{name}_b.png", np.roll(pixels, 2, axis=0))),
    )
    image = save(folder / f"{name}.png", pixels // 2 + 5 * x1)
    return Record(id=name, image=image, modality="ct", source="test", case=name, targets=targets)


def manifest(folder: Path, prefix: str, count: int, size: tuple[int, int]) -> Manifest:
    path = folder / f"{prefix}.jsonl"
    write_records(path, [record_of(folder, f"{prefix}{number}", size, 9 + number) for number in range(count)])
    return Manifest(path)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    folder = tmp_path_factory.mktemp("mixture")
    return [manifest(folder, "x", 5, (24, 32)), manifest(folder, "y", 3, (40, 20))]


@pytest.fixture(scope="module")
def processor() -> MediSeeProcessor:
    config = config_from({"model": {"mllm": {"image_tokens": "seg_head", "image_grid": 2}}}, where="test").model
    tokenizer = train_tokenizer(["Where is the left lung?", "It is [SEG] and [BBOX]."], 300)
    add_candidate_tokens(tokenizer, config.candidate_tokens)
    return MediSeeProcessor(config, tokenizer, SegHeadSpec(32, "longest", "minmax", 8, 2))


def data_run(manifests: list[Manifest], workers: int = 0, **train: Any) -> Config:
    train_sources = [{"records": str(m.path), "weight": w} for m, w in zip(manifests, (2, 1), strict=True)]
    data = {"train": train_sources, "workers": workers, "word_dropout": 0.3}
    settings_ = {"steps": 3, "accumulation": 2, "batch_size": 4, "true_box": 0.5, "true_box_until": 10}
    return config_from({"data": data, "train": settings_ | train}, where="test")


def batches(config: Config, manifests: list[Manifest], processor: MediSeeProcessor, **place: int) -> list[Batch]:
    where = {"first_step": 0, "rank": 0, "world": 1} | place
    return list(training_batches(config, manifests, processor, None, **where))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert [(q.record, q.target, q.question) for q in one.queries] == [
            (q.record, q.target, q.question) for q in other.queries
        ]
        for field in fields(Batch):
            mine, yours = getattr(one, field.name), getattr(other, field.name)
            if isinstance(mine, Tensor):
                assert torch.equal(mine, yours), field.name
        assert all(torch.equal(a, b) for a, b in zip(one.masks, other.masks, strict=True))


def test_workers_change_nothing(manifests: list[Manifest], processor: MediSeeProcessor) -> None:
    alone = batches(data_run(manifests), manifests, processor)
    assert len(alone) == 6
    assert_same(batches(data_run(manifests, workers=2), manifests, processor), alone)


def test_the_release_reads_other_batches_in_every_run(manifests: list[Manifest], processor: MediSeeProcessor) -> None:
    config = data_run(manifests, steps=6).model_copy(update={"compat": "release"})
    runs = [batches(config, manifests, processor) for _ in range(2)]
    one, other = ([query.record for batch in run for query in batch.queries] for run in runs)
    assert one != other


def test_a_resumed_run_reads_the_same_batches(manifests: list[Manifest], processor: MediSeeProcessor) -> None:
    config = data_run(manifests)
    whole = batches(config, manifests, processor)
    assert_same(batches(config, manifests, processor, first_step=2), whole[4:])


def test_l_sim_adds_plain_queries_and_draws_all_else_as_before(
    manifests: list[Manifest], processor: MediSeeProcessor
) -> None:
    config = data_run(manifests)
    with_l_sim = config.model_copy(update={"loss": config.loss.model_copy(update={"mse": 1.0})})
    before, after = (batches(one, manifests, processor) for one in (config, with_l_sim))
    for one, other in zip(before, after, strict=True):
        assert [q.class_query for q in one.queries] == [None] * len(one.queries)
        assert [(q.target, q.question, q.true_box) for q in one.queries] == [
            (q.target, q.question, q.true_box) for q in other.queries
        ]
        # The disc has its own question; the lung's already names the class.
        assert [q.class_query is not None for q in other.queries] == [q.target == "a" for q in other.queries]
        assert all("the disc" in q.class_query for q in other.queries if q.class_query is not None)
        assert torch.equal(one.labels_N, other.labels_N)
    assert len({q.class_query for batch in after for q in batch.queries}) > 3
    assert_same(batches(with_l_sim, manifests, processor, first_step=2), after[4:])


def test_two_ranks_read_the_same_examples(manifests: list[Manifest], processor: MediSeeProcessor) -> None:
    whole = batches(data_run(manifests), manifests, processor)
    parts = [batches(data_run(manifests, batch_size=2), manifests, processor, rank=rank, world=2) for rank in (0, 1)]
    for one, left, right in zip(whole, *parts, strict=True):
        asked = [(q.record, q.target, q.question, q.true_box) for b in (left, right) for q in b.queries]
        assert asked == [(q.record, q.target, q.question, q.true_box) for q in one.queries]


def test_another_seed_asks_otherwise(manifests: list[Manifest], processor: MediSeeProcessor) -> None:
    asked = [
        [
            (q.record, q.target, q.question)
            for b in batches(data_run(manifests, seed=seed), manifests, processor)
            for q in b.queries
        ]
        for seed in (0, 1)
    ]
    assert asked[0] != asked[1]


def test_targets_per_image_and_their_choice(manifests: list[Manifest]) -> None:
    config = data_run(manifests).model_copy(update={"data": config_from({"data": {"targets_per_image": 1}}, "t").data})
    data = TrainingData(config, manifests, None)
    chosen = [[q.target for q in data[Draw(number, 0, 0), 0].queries] for number in range(20)]
    assert all(len(targets) == 1 for targets in chosen)
    assert {targets[0] for targets in chosen} == {"a", "b"}


def test_word_dropout_leaves_out_words_and_never_all(manifests: list[Manifest]) -> None:
    data = TrainingData(data_run(manifests), manifests, None)
    full = TrainingData(
        data_run(manifests).model_copy(update={"data": config_from({"data": {"targets_per_image": 3}}, "t").data}),
        manifests,
        None,
    )
    shorter = 0
    for number in range(30):
        for less, more in zip(data[Draw(number, 0, 1), 0].queries, full[Draw(number, 0, 1), 0].queries, strict=True):
            words = iter(more.question.split())
            assert less.question
            assert all(word in words for word in less.question.split())
            shorter += less.question != more.question
    assert shorter > 10


def test_the_true_box_fades(manifests: list[Manifest]) -> None:
    data = TrainingData(data_run(manifests, true_box=1.0), manifests, None)

    def share(step: int) -> float:
        drawn = [q.true_box for number in range(60) for q in data[Draw(number, 0, 0), step].queries]
        return sum(drawn) / len(drawn)

    assert share(0) == 1
    assert 0.3 < share(5) < 0.7
    assert share(10) == share(50) == 0


def test_up_to_three_targets_an_image(tmp_path: Path) -> None:
    one = record_of(tmp_path, "many", (24, 32), 9)
    targets = tuple(replace(one.targets[0], id=str(number)) for number in range(7))
    write_records(tmp_path / "many.jsonl", [replace(one, targets=targets)])
    own = [Manifest(tmp_path / "many.jsonl")]
    data = TrainingData(config_from({"data": {"train": [{"records": str(own[0].path)}]}}, "t"), own, None)
    chosen = [tuple(q.target for q in data[Draw(number, 0, 0), 0].queries) for number in range(80)]
    assert {len(set(targets)) for targets in chosen} == {3}
    assert set().union(*chosen) == set("0123456")
    assert len(set(chosen)) > 40


@pytest.fixture
def damaged(tmp_path: Path) -> list[Manifest]:
    """Two sources; of the first's five images one is cut off, one's mask is missing, and one is gone."""
    made = [manifest(tmp_path, "x", 5, (24, 32)), manifest(tmp_path, "y", 3, (40, 20))]
    (tmp_path / "x1.png").write_bytes((tmp_path / "x1.png").read_bytes()[:40])
    (tmp_path / "x2_a.png").unlink()
    (tmp_path / "x3.png").unlink()
    return made


def skipping(manifests: list[Manifest], skip: bool, **more: Any) -> Config:
    config = data_run(manifests, **more)
    return config.model_copy(update={"data": config.data.model_copy(update={"skip_corrupt": skip})})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_cannot_be_read_is_named(
    damaged: list[Manifest], processor: MediSeeProcessor, workers: int
) -> None:
    """From loader processes too, and without their traceback."""
    config = skipping(damaged, False, workers=workers)
    with pytest.raises(InputError) as caught:
        batches(config, damaged, processor)
    assert any(name in str(caught.value) for name in ("x1", "x2_a", "x3"))
    assert "Traceback" not in str(caught.value)
    assert multiprocessing.active_children() == []


ABANDONED = """
import sys
from medisee.data.dataset import TrainingBatches
from medisee.data.dataset import leave_to_parent
from torch.utils.data import DataLoader

kept = TrainingBatches(DataLoader([1, 2, 3], batch_size=None, num_workers=1, worker_init_fn=leave_to_parent))
sys.exit(7)
"""


def test_a_process_that_leaves_its_batches_unread_ends() -> None:
    """Python waits at its end for loader processes, which ignore its signal."""
    assert subprocess.run([sys.executable, "-c", ABANDONED], timeout=120).returncode == 7


def test_records_that_cannot_be_read_are_counted_and_replaced(
    damaged: list[Manifest], processor: MediSeeProcessor
) -> None:
    place = {"first_step": 0, "rank": 0, "world": 1}
    loaded = training_batches(skipping(damaged, True, steps=6), damaged, processor, None, **place)
    read = list(loaded)
    asked = [query.record for batch in read for query in batch.queries]
    assert {"x1", "x2", "x3"}.isdisjoint(asked) and {"x0", "x4", "y0", "y1", "y2"} == set(asked)
    assert all(len(batch.frames) == 4 for batch in read)
    wanted = mixture([(5, 2), (3, 1)])
    first_bad = sum(d.source == 0 and d.index in (1, 2, 3) for d in draws(wanted, 48))
    # What replaces a record may be unreadable too.
    assert len(loaded.skipped) >= first_bad > 0
    assert {"x1.png" in one or "x2_a.png" in one or "x3.png" in one for one in loaded.skipped} == {True}


def test_workers_replace_the_same(damaged: list[Manifest], processor: MediSeeProcessor) -> None:
    alone = batches(skipping(damaged, True), damaged, processor)
    assert_same(batches(skipping(damaged, True, workers=2), damaged, processor), alone)


def test_data_of_which_nothing_can_be_read_ends_the_run(tmp_path: Path, processor: MediSeeProcessor) -> None:
    own = [manifest(tmp_path, "x", 3, (24, 32)), manifest(tmp_path, "y", 3, (40, 20))]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match="32 records in a row cannot be read"):
        batches(skipping(own, True), own, processor)
