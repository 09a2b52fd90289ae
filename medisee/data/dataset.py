"""Records -> examples -> micro-batches. An image's targets and the words of their questions follow from the draw alone.

Nothing here depends on the number of ranks or workers, so a run can be resumed, split or repeated exactly.
"""

from __future__ import annotations

import atexit
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from medisee.config import Config
from medisee.data.features import FeatureCache
from medisee.data.mixture import Draw, Mixture
from medisee.foundation.errors import InputError
from medisee.foundation.signals import ENDING
from medisee.models.processing import Batch, Example, MediSeeProcessor, Query
from medisee.records.images import read_image
from medisee.records.manifest import Manifest
from medisee.records.masks import mask_box
from medisee.records.prompts import class_answer, class_question
from medisee.records.records import QA, Record, Target

ATTEMPTS = 32  # unusable records in a row that end a run with `data.skip_corrupt`


def record_example(
    manifest: Manifest,
    record: Record,
    questions: Sequence[tuple[Target, QA]],
    cache: FeatureCache | None,
    *,
    truth: bool = True,
    keep_image: bool = False,
) -> Example:
    """Reads one record's image, or its cached features, and with `truth` its masks and boxes.

    `keep_image`: read the image even if its features are cached, for a vision tower.
    """
    path = manifest.image_path(record)
    embedding = cache.read(path) if cache is not None and path in cache else None
    queries, mask = [], None
    for target, qa in questions:
        mask = manifest.mask(record, target) if truth else None
        box = target.box or (mask_box(mask) if mask is not None else None)
        words = {"question": qa.question, "answer": qa.answer, "history": qa.history}
        queries.append(Query(record=record.id, target=target.id, mask=mask, box=box, **words))
    if embedding is not None and mask is not None and not keep_image:
        return Example(None, mask.shape[0], mask.shape[1], tuple(queries), embedding)
    image = read_image(path)
    return Example(image, image.shape[0], image.shape[1], tuple(queries), embedding)


def asked_questions(target: Target, category: str, rng: random.Random) -> tuple[QA, ...]:
    """Returns a target's questions, or if it has none, one from the class-name templates."""
    return target.qa or (QA(class_question(category, rng), class_answer(rng), "class", "short"),)


class TrainingData(Dataset[Example]):
    """The mixture as examples, indexed by a `Draw` and its optimizer step."""

    def __init__(
        self,
        config: Config,
        manifests: Sequence[Manifest],
        cache: FeatureCache | None,
        processor: MediSeeProcessor | None = None,
    ) -> None:
        """`processor`: with `data.skip_corrupt` it also looks at the words before a record is taken."""
        self.config, self.manifests, self.cache = config, manifests, cache
        self.processor = processor if config.data.skip_corrupt else None
        self.skipped: list[str] = []  # what was wrong with replaced records, one entry per record

    def __getitem__(self, item: tuple[Draw, int]) -> Example:  # type: ignore[override]
        """Builds one example; all random choices come from the draw's number."""
        draw, step = item
        manifest = self.manifests[draw.source]
        for attempt in range(ATTEMPTS):
            try:
                example = self._example(draw, step)
                if self.processor is not None:
                    self.processor.count_tokens(example.queries)
                return example
            except InputError as error:
                if not self.config.data.skip_corrupt:
                    raise
                self.skipped.append("; ".join(error.problems))
            instead = random.Random(f"{self.config.train.seed}/{draw.number}/instead/{attempt}")
            draw = replace(draw, index=instead.randrange(len(manifest)))
        raise InputError(
            f"{manifest.path}: {ATTEMPTS} records in a row cannot be read, the last because of: {self.skipped[-1]} "
            "Correct the root, or copy the data again."
        )

    def _example(self, draw: Draw, step: int) -> Example:
        data, train = self.config.data, self.config.train
        rng = random.Random(f"{train.seed}/{draw.number}")
        manifest = self.manifests[draw.source]
        record = manifest[draw.index]
        targets = list(record.targets)
        rng.shuffle(targets)
        questions = [
            (target, rng.choice(asked_questions(target, target.category, rng)))
            for target in targets[: data.targets_per_image]
        ]
        keep_image = self.config.model.mllm.image_tokens == "vision_tower"
        example = record_example(manifest, record, questions, self.cache, keep_image=keep_image)
        # A separate generator: L_sim must not change what else is drawn.
        class_rng = random.Random(f"{train.seed}/{draw.number}/plain")
        compares = self.config.loss.js or self.config.loss.mse
        most = train.masks_per_image or len(questions)
        true_box = train.true_box * max(0.0, 1 - step / train.true_box_until) if train.true_box_until else 0.0
        queries = []
        for place, (query, (target, qa)) in enumerate(zip(example.queries, questions, strict=True)):
            words = [word for word in query.question.split() if rng.random() >= data.word_dropout]
            implicit = compares and qa.perspective != "class"
            queries.append(
                replace(
                    query,
                    question=" ".join(words) or query.question,
                    true_box=rng.random() < true_box,
                    masked=place < most,
                    class_query=class_question(target.category, class_rng) if implicit else None,
                )
            )
        return replace(example, queries=tuple(queries))


@dataclass(frozen=True, slots=True)
class MicroBatches(Sampler[list[tuple[Draw, int]]]):
    """One rank's micro-batches from `first_step` on: consecutive parts of each global micro-batch."""

    mixture: Mixture
    config: Config
    first_step: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[tuple[Draw, int]]]:
        train = self.config.train
        size = train.batch_size * self.world
        for step in range(self.first_step, train.steps):
            for micro in range(train.accumulation):
                first = (step * train.accumulation + micro) * size + self.rank * train.batch_size
                yield [(self.mixture.draw(number), step) for number in range(first, first + train.batch_size)]

    def __len__(self) -> int:
        return (self.config.train.steps - self.first_step) * self.config.train.accumulation


@dataclass(frozen=True, slots=True)
class Loaded:
    """A micro-batch from a loader process, or the problems of its InputError, which would arrive with a traceback."""

    batch: Batch | None
    skipped: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def pin_memory(self) -> Loaded:
        """Returns it with a batch in page-locked memory; torch's data loader calls this."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class MicroBatchReader(Dataset[Loaded]):
    """Reads whole micro-batches; picklable for loader processes."""

    def __init__(self, data: TrainingData, processor: MediSeeProcessor) -> None:
        self.data, self.processor = data, processor

    def __getitem__(self, items: list[tuple[Draw, int]]) -> Loaded:  # type: ignore[override]
        config = self.data.config
        self.data.skipped.clear()
        try:
            examples = [self.data[item] for item in items]
            batch = self.processor(examples, mask_resolution=config.loss.mask_resolution, release=config.release)
        except InputError as error:
            return Loaded(None, problems=error.problems)
        return Loaded(batch, tuple(self.data.skipped))


class TrainingBatches(Iterator[Batch]):
    """One rank's micro-batches, in order; one with an unreadable record ends the loader processes."""

    def __init__(self, loader: DataLoader[Loaded]) -> None:
        self._loaded: Iterator[Loaded] = iter(loader)
        self.skipped: list[str] = []  # see `TrainingData`; of all micro-batches so far
        # Loader processes ignore the signal with which Python ends its children; it would wait for them forever.
        atexit.register(self.close)

    def __next__(self) -> Batch:
        try:
            loaded = next(self._loaded)
        except StopIteration:
            self.close()
            raise
        self.skipped += loaded.skipped
        if loaded.batch is None:
            self.close()
            raise InputError(loaded.problems)
        return loaded.batch

    def close(self) -> None:
        """Ends the loader processes and the iteration."""
        self._loaded = iter(())
        atexit.unregister(self.close)


def training_batches(
    config: Config,
    manifests: Sequence[Manifest],
    processor: MediSeeProcessor,
    cache: FeatureCache | None,
    *,
    first_step: int,
    rank: int,
    world: int,
) -> TrainingBatches:
    """Returns one rank's micro-batches from `first_step` to the end of the run."""
    sources, per_step = config.data.train, config.train.batch_size * config.train.accumulation * world
    mixture = Mixture(
        [len(manifest) for manifest in manifests],
        [source.weight for source in sources],
        config.train.seed,
        first_draws=[source.from_step * per_step for source in sources],
        unseeded=config.release,
    )
    loader = DataLoader(
        MicroBatchReader(TrainingData(config, manifests, cache, processor), processor),
        sampler=MicroBatches(mixture, config, first_step, rank, world),
        batch_size=None,
        num_workers=config.data.workers,
        worker_init_fn=leave_to_parent,
        pin_memory=torch.cuda.is_available(),
    )
    return TrainingBatches(loader)


def leave_to_parent(_: int = 0) -> None:
    """Makes a loader process ignore signals to the whole process group, since its parent still needs batches."""
    for number in (*ENDING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
