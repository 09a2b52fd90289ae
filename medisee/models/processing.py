"""MediSeeProcessor: images and queries -> Batch, what one forward pass reads.

Shapes: B images, S sequences, I targets, J targets whose masks are decoded, K candidate tokens, Q class queries, L
sequence length, N supervised tokens, T image tokens, C channels, G embedding grid, F frame, V vision tower, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from medisee.config.model import MAX_TOKENS, Model
from medisee.config.run import MaskResolution
from medisee.foundation.errors import InputError
from medisee.models.geometry import Frame, bounded_mask, fit, mask_to_frame, normalise_box, square_of, to_frame
from medisee.models.packing import pack
from medisee.models.seg_head import SegHeadSpec
from medisee.models.text_encoder import TextEncoder
from medisee.records.masks import mask_box
from medisee.records.prompts import CANDIDATE_TOKENS, FORCED_ANSWER, candidate_text
from medisee.records.records import Turn, without_image_mark
from medisee.weights.tokenizer import IMAGE_TOKEN, answer_end, token_id

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One question about an image, with its truth in training."""

    record: str  # id, for predictions and messages, as target
    target: str
    question: str
    answer: str | None = None  # the true or forced answer; None if the model writes it
    history: tuple[Turn, ...] = ()  # earlier turns, oldest first; the model reads them but does not learn them
    mask: np.ndarray | None = None  # bool (H, W)
    box: tuple[float, float, float, float] | None = None  # in original pixels, half-open; None: that of the mask
    true_box: bool = False  # prompt the mask decoder with the true box instead of the predicted one
    masked: bool = True  # decode this query's mask
    class_query: str | None = None  # names the class; its similarity map is this query's target in L_sim


@dataclass(frozen=True, slots=True)
class Example:
    """One image with its queries; cached features `embedding` (C, G, G) may replace the image."""

    image: np.ndarray | None
    height: int
    width: int
    queries: tuple[Query, ...]
    embedding: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one forward pass reads. The position of a token is that of the state that predicts it, one before the token.

    Class queries follow the queries of their sequence; they are not targets, and nothing of them is supervised.
    """

    queries: tuple[Query, ...]  # of the targets, image by image
    frames: tuple[Frame, ...]  # of the images
    pixels_B3FF: Tensor | None  # the seg head's input; None if features are cached
    embedding_BCGG: Tensor | None  # cached features
    vision_B3VV: Tensor | None  # the vision tower's input; None without a vision tower
    input_ids_SL: Tensor  # these and lengths: see `Packed`
    positions_SL: Tensor
    segments_SL: Tensor
    lengths: tuple[int, ...]
    image_of_sequence_S: Tensor
    sequence_of_target_I: Tensor
    image_of_target_I: Tensor
    image_of_target: tuple[int, ...]  # as image_of_target_I, on the host
    candidates_IK: Tensor  # positions of the candidate tokens in their sequence; -1 if the answer does not hold them
    supervised_N2: Tensor  # sequence and position of each token of the answers
    labels_N: Tensor  # those tokens
    boxes_I4: Tensor | None  # true boxes, normalised xyxy; None without truth
    masks: tuple[Tensor, ...]  # true masks, float32 in [0, 1], at the mask loss's resolution; empty without truth
    coverage_IT: Tensor | None  # share of each image token's area that the true mask covers; None without truth
    true_box_I: Tensor  # whether the true box prompts the mask decoder
    masked_J: Tensor  # the targets whose masks are decoded
    class_candidates_QK: Tensor  # as candidates_IK, of the class queries
    class_sequence_Q: Tensor  # as sequence_of_target_I, of the class queries
    target_of_class_query_Q: Tensor  # the target that each class query belongs to

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on another device; the host does not wait for the copy of what is pinned."""
        return self._each(lambda value: value.to(device, non_blocking=value.is_pinned()))

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory; torch's data loader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed, masks=tuple(map(change, self.masks)))

    @property
    def masked(self) -> list[int]:
        """`masked_J` on the host, so that nothing waits for the device."""
        return [index for index, query in enumerate(self.queries) if query.masked]


class MediSeeProcessor:
    """Turns examples into batches by the model's rules: tokenizer, seg head's frame, vision tower's input."""

    def __init__(self, config: Model, tokenizer: PreTrainedTokenizerBase, spec: SegHeadSpec) -> None:
        self.config, self.tokenizer, self.spec = config, tokenizer, spec
        self.candidate_ids = [token_id(tokenizer, token) for token in config.candidate_tokens]
        self.image_id = token_id(tokenizer, IMAGE_TOKEN)
        self.end_id = token_id(tokenizer, str(tokenizer.eos_token))
        self.pad_id = token_id(tokenizer, str(tokenizer.pad_token))
        self.image_tokens = config.mllm.image_token_count
        self.image_grid = int(self.image_tokens**0.5)
        self._encode = TextEncoder(tokenizer, (*config.candidate_tokens, IMAGE_TOKEN))
        self._open, self._close, self._end = map(self._encode.parse, ("[INST] ", " [/INST]", answer_end(tokenizer)))
        before = [token_id(tokenizer, str(tokenizer.bos_token)), *self._encode(*self._open)]
        self.image_start = len(before)
        self.prefix = before + [self.image_id] * self.image_tokens

    def frame(self, height: int, width: int) -> Frame:
        """Places an image in the seg head's frame."""
        return fit(height, width, self.spec.size, self.spec.resize)

    def seg_pixels(self, image: np.ndarray) -> Tensor:
        """Standardises an image (H, W, 3) for the seg head: (3, F, F)."""
        return to_frame(image, self.frame(*image.shape[:2]), self.spec.pixels)

    def vision_pixels(self, image: np.ndarray) -> Tensor:
        """Standardises an image (H, W, 3) for the vision tower: (3, V, V), see `Mllm.vision_input`."""
        size, (height, width) = self.config.mllm.vision_size, image.shape[:2]
        picture = Image.fromarray(image)
        if self.config.mllm.vision_input == "pad":
            side, top, left = square_of(height, width, "pad")
            square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in CLIP_MEAN))
            square.paste(picture, (-left, -top))
            square = square.resize((size, size), Image.Resampling.BICUBIC)
        else:
            # As CLIP's own processor does it: first resized, then cut.
            shortest = min(height, width)
            width, height = size * width // shortest, size * height // shortest
            left, top = (width - size) // 2, (height - size) // 2
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            square = picture.crop((left, top, left + size, top + size))
        values = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)
        return (values - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]

    def answer_text(self, text: str) -> str:
        """Replaces "[SEG] and [BBOX]" in an answer with this model's candidate tokens."""
        return text.replace(candidate_text(CANDIDATE_TOKENS), candidate_text(self.config.candidate_tokens))

    def __call__(
        self,
        examples: Sequence[Example],
        *,
        mask_resolution: MaskResolution = "original",
        release: bool = False,
        packed: bool = True,
    ) -> Batch:
        """Builds a batch of images with one or more queries each.

        `packed`: one sequence per image, otherwise one per query. `release`: true boxes end at the mask's last pixel.
        """
        rows = [(index, example.queries) for index, example in enumerate(examples)]
        if not packed:
            rows = [(index, (query,)) for index, queries in rows for query in queries]
        own_ids = [[self._tokens(query) for query in own] for _, own in rows]
        class_ids = [[self._tokens(query) for query in map(_class_query, own) if query is not None] for _, own in rows]
        packed_ids = [[ids for ids, _ in (*own, *behind)] for own, behind in zip(own_ids, class_ids, strict=True)]
        sequences = pack([self.prefix] * len(rows), packed_ids, self.pad_id, multiple=self.config.mllm.pad_to)
        supervised, labels, candidates, class_candidates = [], [], [], []
        for row, (own, behind, starts) in enumerate(zip(own_ids, class_ids, sequences.starts, strict=True)):
            for number, (start, (ids, answer_start)) in enumerate(zip(starts, (*own, *behind), strict=True)):
                answer, first = ids[answer_start:], start + answer_start - 1
                places = [first + answer.index(token) if token in answer else -1 for token in self.candidate_ids]
                if number < len(own):
                    candidates.append(places)
                    labels += answer
                    supervised += [[row, first + place] for place in range(len(answer))]
                else:
                    class_candidates.append(places)
        queries = tuple(query for _, own in rows for query in own)
        image_of_target = [index for index, own in rows for _ in own]
        frames = tuple(self.frame(example.height, example.width) for example in examples)
        owners = [frames[index] for index in image_of_target]
        boxes_I4, masks, coverage_IT = self._truth(queries, owners, mask_resolution, release)
        features = [example.embedding for example in examples if example.embedding is not None]
        pictures = [example.image for example in examples if example.image is not None]
        cached, tower = len(features) == len(examples), self.config.mllm.image_tokens == "vision_tower"
        return Batch(
            queries=queries,
            frames=frames,
            pixels_B3FF=None if cached else torch.stack([self.seg_pixels(picture) for picture in pictures]),
            # Each by itself first: under autocast on a CPU torch cannot stack float16.
            embedding_BCGG=torch.stack([feature.float() for feature in features]) if cached else None,
            vision_B3VV=torch.stack([self.vision_pixels(picture) for picture in pictures]) if tower else None,
            input_ids_SL=sequences.input_ids_SL,
            positions_SL=sequences.positions_SL,
            segments_SL=sequences.segments_SL,
            lengths=sequences.lengths,
            image_of_sequence_S=torch.tensor([index for index, _ in rows]),
            sequence_of_target_I=torch.tensor(
                [row for row, (_, own) in enumerate(rows) for _ in own], dtype=torch.long
            ),
            image_of_target_I=torch.tensor(image_of_target, dtype=torch.long),
            image_of_target=tuple(image_of_target),
            candidates_IK=torch.tensor(candidates, dtype=torch.long).reshape(-1, len(self.candidate_ids)),
            supervised_N2=torch.tensor(supervised, dtype=torch.long).reshape(-1, 2),
            labels_N=torch.tensor(labels, dtype=torch.long),
            boxes_I4=boxes_I4,
            masks=masks,
            coverage_IT=coverage_IT,
            true_box_I=torch.tensor([query.true_box for query in queries], dtype=torch.bool),
            masked_J=_indices(query.masked for query in queries),
            class_candidates_QK=torch.tensor(class_candidates, dtype=torch.long).reshape(-1, len(self.candidate_ids)),
            class_sequence_Q=torch.tensor([row for row, own in enumerate(class_ids) for _ in own], dtype=torch.long),
            target_of_class_query_Q=_indices(query.class_query is not None for query in queries),
        )

    def count_tokens(self, queries: Iterable[Query]) -> int:
        """Returns the tokens of the longest query with its answer; InputError for one that a batch cannot hold."""
        wanted = (one for query in queries for one in (query, _class_query(query)) if one is not None)
        return max((self.image_start + len(self._tokens(one)[0]) for one in wanted), default=0)

    def prompt_ids(self, question: str) -> list[int]:
        """Tokenises what follows the image, up to the answer."""
        return self._encode("\n", *self._question(question))

    def _question(self, text: str) -> list[str | int]:
        return [without_image_mark(text).strip(), *self._close]

    def _answer(self, text: str) -> list[str | int]:
        return [" ", *self._encode.parse(self.answer_text(text), self.config.candidate_tokens), *self._end]

    def _tokens(self, query: Query) -> tuple[list[int], int]:
        """Returns the tokens behind the image, and where the answer starts in them."""
        where = f"record {query.record!r}, target {query.target!r}"
        if not without_image_mark(query.question).strip():
            raise InputError(f"{where}: the query has no text; ask something.")
        # Each earlier turn is written as if it were the one to learn.
        earlier = [(*self._question(turn.question), *self._answer(turn.answer), *self._open) for turn in query.history]
        pieces = ["\n", *chain.from_iterable(earlier), *self._question(query.question)]
        try:
            ids = prompt = self._encode(*pieces)
            if query.answer is not None:
                # As one text: what precedes a token decides how its space is encoded.
                ids = self._encode(*pieces, *self._answer(query.answer))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        if ids[: len(prompt)] != prompt:
            raise InputError(
                f"{where}: the tokenizer merges the end of the question with the start of the answer; change the answer's first letter."
            )
        named = zip(self.config.candidate_tokens, self.candidate_ids, strict=True)
        lacking = [token for token, number in named if number not in ids[len(prompt) :]]
        if query.answer is not None and lacking:
            # Its place would be -1, which is the padding.
            raise InputError(
                f"{where}: the answer {query.answer[:80]!r} lacks {' and '.join(lacking)}; write "
                f"{candidate_text(CANDIDATE_TOKENS)!r} in it."
            )
        length = self.image_start + len(ids)
        if length > MAX_TOKENS:
            raise InputError(f"{where}: the text has {length} tokens; expected at most {MAX_TOKENS}; shorten it.")
        return ids, len(prompt)

    def _truth(
        self, queries: Sequence[Query], frames: Sequence[Frame], resolution: MaskResolution, release: bool
    ) -> tuple[Tensor | None, tuple[Tensor, ...], Tensor | None]:
        """Returns `boxes_I4`, `masks` and `coverage_IT` of the batch."""
        true_masks = [query.mask for query in queries if query.mask is not None]
        if len(true_masks) < len(queries):
            return None, (), None
        masks, boxes, coverage = [], [], []
        for query, mask, frame in zip(queries, true_masks, frames, strict=True):
            box = query.box or mask_box(mask)
            if box is None:
                raise InputError(
                    f"record {query.record!r}, target {query.target!r}: the mask is empty; remove the target."
                )
            boxes.append(normalise_box(box, frame.height, frame.width, inclusive=release))
            inside = mask_to_frame(mask, frame, 4 * self.spec.grid)
            if isinstance(resolution, int):
                masks.append(bounded_mask(mask, resolution))
            else:
                masks.append(inside if resolution == "decoder" else torch.from_numpy(mask).float())
            coverage.append(self._token_coverage(mask, inside))
        boxes_I4 = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        # A batch may have no target at all.
        return boxes_I4, tuple(masks), torch.stack(coverage) if coverage else torch.zeros(0, self.image_tokens)

    def _token_coverage(self, mask: np.ndarray, inside: Tensor) -> Tensor:
        # The seg head's image tokens divide its frame; a vision tower's divide the padded square or the centre.
        if self.config.mllm.image_tokens == "vision_tower":
            kind, (height, width) = self.config.mllm.vision_input, mask.shape
            side, top, left = square_of(height, width, kind)
            if kind == "pad":
                mask = np.pad(mask, ((-top, side - height + top), (-left, side - width + left)))
            else:
                mask = mask[top : top + side, left : left + side]
            inside = torch.from_numpy(mask).float()
        return F.adaptive_avg_pool2d(inside[None], self.image_grid).flatten()


def _class_query(query: Query) -> Query | None:
    if query.class_query is None:
        return None
    return replace(query, question=query.class_query, answer=FORCED_ANSWER, history=())


def _indices(chosen: Iterable[bool]) -> Tensor:
    return torch.tensor([index for index, one in enumerate(chosen) if one], dtype=torch.long)
