"""Near-duplicates among questions: within an image those that tell the same, across images those worded the same.

Two texts are alike by the Jaccard similarity of what they are made of. Of one image, the words that carry meaning are
compared, whatever request they stand in ("Which organ makes bile?", "Please find the organ that makes bile."). Of
different images, all words and pairs of neighbouring words are: a fact may come back in another wording.

The search across images is exact and fast. Two sets of which the smaller has n parts and which are alike by at least t
differ in (1 - t) n / t parts at most, d say. Dealt out to d + 1 heaps by their hashes, they have one heap in common at
least, so only texts with a heap in common are compared (the pigeonhole principle, as in PartEnum: Arasu et al. 2006).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

from data_gen.core.names import words
from data_gen.rules.checks import Breach

WITHIN_IMAGE = 0.8
ACROSS_IMAGES = 0.9
_BUCKETS = 1 << 20

_REQUESTS = (
    "a an and are as at be but by can could do does find for from give has have here highlight i identify image in is it "
    "its like locate look looking mark me need of on one or organ out outline picture please point scan see segment "
    "show shown slice structure tell that the their them there these they this to want was what where which who whose "
    "with would you detect delineate trace indicate spot pick box draw"
)
_REQUEST_WORDS = frozenset(_REQUESTS.split())


class Duplicates:
    """The questions seen so far.

    Args:
        within_image: the similarity from which two questions about one item are duplicates.
        across_images: the same for questions about different items.
    """

    def __init__(self, within_image: float = WITHIN_IMAGE, across_images: float = ACROSS_IMAGES) -> None:
        self._within, self._across = within_image, across_images
        # Arrays and bare numbers, as a data set has hundreds of thousands of questions.
        self._ids: list[str] = []
        self._parts: list[array[int]] = []
        self._of_item: defaultdict[str, list[tuple[str, array[int]]]] = defaultdict(list)
        # Of each heap the latest entry; of each entry the text and the entry before it in the same heap. Heaps that share
        # a bucket are looked through together, which costs a comparison and no more.
        self._latest = array("q", [-1]) * _BUCKETS
        self._texts, self._before = array("q"), array("q")

    def add(self, id: str, text: str) -> Breach | None:
        """Remembers a pair's question, unless it is a near-duplicate of one that was added before.

        Args:
            id: the pair's id; what stands before its "#" is the item's.
            text: the question.

        Returns:
            The breach, which names the other pair; None when the question is new and now remembered.
        """
        item = id.partition("#")[0]
        spoken = tuple(word.text for word in words(text))
        meaning = frozenset(_number(word) for word in spoken if word not in _REQUEST_WORDS)
        meaning = meaning or frozenset(map(_number, spoken))
        for other, content in self._of_item[item]:
            if _jaccard(meaning, content) >= self._within:
                return Breach("duplicate", f"it tells the same as {other}; tell something else about the target")
        parts = frozenset(_shingles(spoken))
        heaps = list(self._heaps(parts))
        for place in sorted({place for heap in heaps for place in self._in(heap)}):
            if _jaccard(parts, self._parts[place]) >= self._across:
                return Breach("duplicate", f"it repeats the words of {self._ids[place]}; put it in other words")
        for heap in heaps:
            self._before.append(self._latest[heap])
            self._latest[heap] = len(self._texts)
            self._texts.append(len(self._ids))
        self._ids.append(id)
        self._parts.append(array("Q", sorted(parts)))
        self._of_item[item].append((id, array("Q", sorted(meaning))))
        return None

    def _in(self, heap: int) -> Iterator[int]:
        """Yields the places of the texts that have a heap."""
        entry = self._latest[heap]
        while entry >= 0:
            yield self._texts[entry]
            entry = self._before[entry]

    def _heaps(self, parts: frozenset[int]) -> Iterator[int]:
        """Yields a number for each heap of a set: of how many there are, which one it is and what is in it.

        A text that is alike has t n to n / t parts; the number of heaps that suits the larger of two is among those
        that both are dealt out to.
        """
        sizes = range(math.floor(self._across * len(parts)), math.ceil(len(parts) / self._across) + 1)
        for count in sorted({math.floor((1 - self._across) * size / self._across + 1e-9) + 1 for size in sizes}):
            for heap in range(count):
                # Python hashes numbers alike in every run; a collision costs a comparison and no more.
                yield hash((count, heap, *sorted(part for part in parts if part % count == heap))) % _BUCKETS


def _jaccard(first: frozenset[int], second: array[int]) -> float:
    shared = len(first.intersection(second))
    return shared / max(1, len(first) + len(second) - shared)


def _shingles(spoken: tuple[str, ...]) -> Iterator[int]:
    """Yields the words and the pairs of neighbours, as numbers."""
    yield from map(_number, spoken)
    for first, second in pairwise(spoken):
        yield _number(f"{first} {second}")


@lru_cache(maxsize=1 << 18)
def _number(shingle: str) -> int:
    # A hash of the text, not Python's own, so that every run deals out alike.
    return int.from_bytes(hashlib.blake2b(shingle.encode(), digest_size=8).digest(), "big")
