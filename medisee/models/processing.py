"""MediSeeProcessor: images and queries -> Batch, and the model's output -> original pixels.

Shapes: B images, S sequences, I targets, J targets whose masks are decoded, K candidate tokens, Q class queries, L sequence length, N supervised tokens, T image tokens,
F frame side, h decoder output side, H W original image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from medisee.config.model import MAX_TOKENS, Model
from medisee.config.run import MaskResolution
from medisee.foundation.errors import InputError
from medisee.models.geometry import Frame, bounded_mask, fit, mask_to_frame, normalise_box, square_of, to_frame
from medisee.models.packing import pack
from medisee.models.seg_head import SegHeadSpec
from medisee.records.masks import mask_box
from medisee.records.prompts import CANDIDATE_TOKENS, FORCED_ANSWER, candidate_text
from medisee.records.records import Turn
from medisee.weights.tokenizer import IMAGE_TOKEN, answer_end, token_id

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One question about an image, with its truth while training.

    Attributes:
        record, target: ids, kept for predictions and messages.
        question: the text asked.
        answer: the true or forced answer; None when the model is to generate it.
        history: the earlier turns of a conversation, oldest first; the model reads them and does not learn them.
        mask: bool (H, W); box: original pixels, half-open.
        true_box: prompt the mask decoder with the true box instead of the predicted one.
        masked: decode this query's mask.
        class_query: a question that names the class, whose similarity map is this query's target in L_sim; None: no target.
    """

    record: str
    target: str
    question: str
    answer: str | None = None
    history: tuple[Turn, ...] = ()
    mask: np.ndarray | None = None
    box: tuple[float, float, float, float] | None = None
    true_box: bool = False
    masked: bool = True
    class_query: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One image with its queries. `embedding` (C, G, G) replaces the image where frozen features are cached."""

    image: np.ndarray | None
    height: int
    width: int
    queries: tuple[Query, ...]
    embedding: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one forward pass reads. A position is that of the state which predicts a token, one before the token.

    Class queries stand behind the queries of their sequence; they are no targets and nothing of them is supervised.
    """

    queries: tuple[Query, ...]
    frames: tuple[Frame, ...]
    pixels_B3FF: Tensor | None
    embedding_BCGG: Tensor | None
    vision_B3VV: Tensor | None
    input_ids_SL: Tensor
    positions_SL: Tensor
    segments_SL: Tensor
    lengths: tuple[int, ...]
    image_of_sequence_S: Tensor
    sequence_of_target_I: Tensor
    image_of_target_I: Tensor
    candidates_IK: Tensor
    supervised_N2: Tensor
    labels_N: Tensor
    boxes_I4: Tensor | None
    masks: tuple[Tensor, ...]
    coverage_IT: Tensor | None
    true_box_I: Tensor
    masked_J: Tensor
    class_candidates_QK: Tensor
    class_sequence_Q: Tensor
    target_of_class_query_Q: Tensor

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in moved.items()}
        moved["masks"] = tuple(mask.to(device) for mask in self.masks)
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: list[int]
    answer_start: int


@dataclass(frozen=True, slots=True)
class _Images:
    pixels_B3FF: Tensor | None
    embedding_BCGG: Tensor | None
    vision_B3VV: Tensor | None


@dataclass(frozen=True, slots=True)
class _Truth:
    boxes_I4: Tensor | None
    masks: tuple[Tensor, ...]
    coverage_IT: Tensor | None


@dataclass(frozen=True, slots=True)
class _Plain:
    candidates_QK: Tensor
    sequence_Q: Tensor
    target_Q: Tensor


class MediSeeProcessor:
    """Turns examples into batches by the model's own rules: tokenizer, seg head's frame, vision tower's input."""

    def __init__(self, config: Model, tokenizer: PreTrainedTokenizerBase, spec: SegHeadSpec) -> None:
        self.config, self.tokenizer, self.spec = config, tokenizer, spec
        self.candidate_ids = [token_id(tokenizer, token) for token in config.candidate_tokens]
        self.image_id = token_id(tokenizer, IMAGE_TOKEN)
        self.end_id = token_id(tokenizer, str(tokenizer.eos_token))
        self.pad_id = token_id(tokenizer, str(tokenizer.pad_token))
        self.answer_end = answer_end(tokenizer)
        self.image_tokens = config.mllm.image_token_count
        self.image_grid = int(self.image_tokens**0.5)
        self.mask_side = 4 * spec.grid
        before = tokenizer("[INST] ", add_special_tokens=False).input_ids
        self.prefix: list[int] = [
            token_id(tokenizer, str(tokenizer.bos_token)),
            *before,
            *[self.image_id] * self.image_tokens,
        ]
        self.image_start = 1 + len(before)

    def frame(self, height: int, width: int) -> Frame:
        """Places an image in the seg head's frame."""
        return fit(height, width, self.spec.size, self.spec.resize)

    def seg_pixels(self, image: np.ndarray) -> Tensor:
        """Standardises an image (H, W, 3) for the seg head: (3, F, F)."""
        return to_frame(image, self.frame(*image.shape[:2]), self.spec.pixels)

    def vision_pixels(self, image: np.ndarray) -> Tensor:
        """Makes an image the vision tower's standardised square (3, V, V): padded in CLIP's mean colour, or its centre.

        `Mllm.vision_input` says which. The centre is cut from the resized image, as CLIP's own processor does it.
        """
        size, rule = self.config.mllm.vision_size, self.config.mllm.vision_input
        square = _padded(image, size) if rule == "pad" else _centre(image, size)
        values = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)
        return (values - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]

    def answer_text(self, text: str) -> str:
        """Rewrites "[SEG] and [BBOX]" of an answer for this model's candidate tokens."""
        return text.replace(candidate_text(CANDIDATE_TOKENS), candidate_text(self.config.candidate_tokens))

    def __call__(
        self,
        examples: Sequence[Example],
        *,
        mask_resolution: MaskResolution = "original",
        boxes: Literal["half_open", "inclusive"] = "half_open",
        packed: bool = True,
    ) -> Batch:
        """Builds a batch.

        Args:
            examples: images with one or more queries each.
            mask_resolution: see Loss.mask_resolution.
            boxes: see Data.boxes.
            packed: one sequence an image; otherwise one a query.

        Raises:
            InputError: a query without text, or one that is too long.
        """
        images = [(index, example) for index, example in enumerate(examples)]
        rows = (
            [(index, example.queries) for index, example in images]
            if packed
            else [(index, (query,)) for index, example in images for query in example.queries]
        )
        tokens = [[self._tokens(query) for query in queries] for _, queries in rows]
        plain = [
            [self._tokens(_class_query(query)) for query in queries if query.class_query is not None]
            for _, queries in rows
        ]
        segments = [[t.ids for t in (*row, *behind)] for row, behind in zip(tokens, plain, strict=True)]
        sequences = pack([self.prefix] * len(rows), segments, self.pad_id, multiple=self.config.mllm.pad_to)
        targets = [(row, n) for row, (_, queries) in enumerate(rows) for n in range(len(queries))]
        supervised, labels, candidates = self._supervision(tokens, sequences.starts, targets)
        queries = tuple(rows[row][1][n] for row, n in targets)
        image_of_target = [rows[row][0] for row, _ in targets]
        frames = tuple(self.frame(example.height, example.width) for example in examples)
        target_frames = [frames[index] for index in image_of_target]
        behind = self._class_query_places(plain, sequences.starts, queries)
        images, truth = self._images(examples), self._truth(queries, target_frames, mask_resolution, boxes)
        return Batch(
            queries=queries,
            frames=frames,
            pixels_B3FF=images.pixels_B3FF,
            embedding_BCGG=images.embedding_BCGG,
            vision_B3VV=images.vision_B3VV,
            input_ids_SL=sequences.input_ids_SL,
            positions_SL=sequences.positions_SL,
            segments_SL=sequences.segments_SL,
            lengths=sequences.lengths,
            image_of_sequence_S=torch.tensor([index for index, _ in rows]),
            sequence_of_target_I=torch.tensor([row for row, _ in targets]),
            image_of_target_I=torch.tensor(image_of_target),
            candidates_IK=torch.tensor(candidates),
            supervised_N2=torch.tensor(supervised).reshape(-1, 2),
            labels_N=torch.tensor(labels, dtype=torch.long),
            boxes_I4=truth.boxes_I4,
            masks=truth.masks,
            coverage_IT=truth.coverage_IT,
            true_box_I=torch.tensor([query.true_box for query in queries]),
            masked_J=torch.tensor([index for index, query in enumerate(queries) if query.masked], dtype=torch.long),
            class_candidates_QK=behind.candidates_QK,
            class_sequence_Q=behind.sequence_Q,
            target_of_class_query_Q=behind.target_Q,
        )

    def prompt_ids(self, question: str) -> list[int]:
        """Tokenises what stands behind the image up to the answer."""
        return self._ids(f"\n{question.strip()} [/INST]")

    def _conversation(self, query: Query) -> str:
        """Returns `\n{q1} [/INST] {a1} </s>[INST] {q2} [/INST]`: every turn as if it were the one to learn."""
        turns = [turn.question for turn in query.history] + [query.question]
        text = f"\n{turns[0].strip()} [/INST]"
        for turn, question in zip(query.history, turns[1:], strict=True):
            text += f" {self.answer_text(turn.answer)}{self.answer_end}[INST] {question.strip()} [/INST]"
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _tokens(self, query: Query) -> _Tokens:
        where = f"record {query.record!r}, target {query.target!r}"
        if not query.question.strip():
            raise InputError(f"{where}: the query has no text; ask something.")
        text = self._conversation(query)
        prompt = ids = self._ids(text)
        if query.answer is not None:
            # As one text: what stands before a token decides how its space is encoded.
            ids = self._ids(f"{text} {self.answer_text(query.answer)}{self.answer_end}")
        if ids[: len(prompt)] != prompt:
            raise InputError(f"{where}: the tokenizer joins question and answer; start the answer with another letter.")
        if len(self.prefix) + len(ids) > MAX_TOKENS + self.image_tokens:
            raise InputError(
                f"{where}: question and answer have {len(ids)} tokens; at most {MAX_TOKENS} fit, shorten them."
            )
        if self.image_id in ids:
            raise InputError(f"{where}: the text holds {IMAGE_TOKEN!r}, which stands for the image; remove it.")
        return _Tokens(ids, len(prompt))

    def _supervision(
        self, tokens: list[list[_Tokens]], starts: tuple[tuple[int, ...], ...], targets: list[tuple[int, int]]
    ) -> tuple[list[list[int]], list[int], list[list[int]]]:
        supervised, labels, candidates = [], [], []
        for row, n in targets:
            own, start = tokens[row][n], starts[row][n]
            for place in range(own.answer_start, len(own.ids)):
                supervised.append([row, start + place - 1])
                labels.append(own.ids[place])
            candidates.append(self._candidates(own, start))
        return supervised, labels, candidates

    def _candidates(self, own: _Tokens, start: int) -> list[int]:
        answer = own.ids[own.answer_start :]
        return [
            start + own.answer_start + answer.index(token) - 1 if token in answer else -1
            for token in self.candidate_ids
        ]

    def _class_query_places(
        self, plain: list[list[_Tokens]], starts: tuple[tuple[int, ...], ...], queries: Sequence[Query]
    ) -> _Plain:
        candidates, sequences = [], []
        for row, behind in enumerate(plain):
            for own, start in zip(behind, starts[row][len(starts[row]) - len(behind) :], strict=True):
                candidates.append(self._candidates(own, start))
                sequences.append(row)
        targets = [index for index, query in enumerate(queries) if query.class_query is not None]
        return _Plain(
            torch.tensor(candidates, dtype=torch.long).reshape(-1, len(self.candidate_ids)),
            torch.tensor(sequences, dtype=torch.long),
            torch.tensor(targets, dtype=torch.long),
        )

    def _images(self, examples: Sequence[Example]) -> _Images:
        cached = all(example.embedding is not None for example in examples)
        pixels = embedding = vision = None
        if cached:
            # Each by itself first: under a CPU's autocast torch stacks no float16.
            embedding = torch.stack(
                [example.embedding.float() for example in examples if example.embedding is not None]
            )
        else:
            pixels = torch.stack([self.seg_pixels(example.image) for example in examples if example.image is not None])
        if self.config.mllm.image_tokens == "vision_tower":
            vision = torch.stack(
                [self.vision_pixels(example.image) for example in examples if example.image is not None]
            )
        return _Images(pixels, embedding, vision)

    def _truth(
        self,
        queries: Sequence[Query],
        frames: Sequence[Frame],
        resolution: MaskResolution,
        ends: Literal["half_open", "inclusive"],
    ) -> _Truth:
        if any(query.mask is None for query in queries):
            return _Truth(None, (), None)
        masks, boxes, coverage = [], [], []
        for query, frame in zip(queries, frames, strict=True):
            mask = query.mask if query.mask is not None else np.zeros((frame.height, frame.width), dtype=bool)
            box = query.box or mask_box(mask)
            if box is None:
                raise InputError(
                    f"record {query.record!r}, target {query.target!r}: the mask is empty; remove the target."
                )
            boxes.append(normalise_box(box, frame.height, frame.width, ends))
            inside = mask_to_frame(mask, frame, self.mask_side)
            masks.append(_mask_of_loss(mask, inside, resolution))
            coverage.append(self._token_coverage(mask, frame, inside))
        return _Truth(torch.tensor(boxes, dtype=torch.float32), tuple(masks), torch.stack(coverage))

    def _token_coverage(self, mask: np.ndarray, frame: Frame, inside: Tensor) -> Tensor:
        # Image tokens of the seg head lie on its frame, those of a vision tower on the padded square or the centre.
        if self.config.mllm.image_tokens == "vision_tower":
            kind, (height, width) = self.config.mllm.vision_input, mask.shape
            side, top, left = square_of(height, width, kind)
            if kind == "pad":
                mask = np.pad(mask, ((-top, side - height + top), (-left, side - width + left)))
            else:
                mask = mask[top : top + side, left : left + side]
            inside = torch.from_numpy(mask).float()
        return torch.nn.functional.adaptive_avg_pool2d(inside[None], self.image_grid).flatten()


def _mask_of_loss(mask: np.ndarray, inside: Tensor, resolution: MaskResolution) -> Tensor:
    if isinstance(resolution, int):
        return bounded_mask(mask, resolution)
    return inside if resolution == "decoder" else torch.from_numpy(mask).float()


def _class_query(query: Query) -> Query:
    return replace(query, question=query.class_query or "", answer=FORCED_ANSWER, history=())


def _padded(image: np.ndarray, size: int) -> Image.Image:
    side, top, left = square_of(image.shape[0], image.shape[1], "pad")
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in CLIP_MEAN))
    square.paste(Image.fromarray(image), (-left, -top))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def _centre(image: np.ndarray, size: int) -> Image.Image:
    height, width = image.shape[:2]
    shortest = min(height, width)
    resized = Image.fromarray(image).resize(
        (size * width // shortest, size * height // shortest), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))
