"""Near-duplicates among questions: those with the same meaning within an image, with the same wording across images.

Two texts are compared by the Jaccard similarity of their parts. Within an image, the parts are the words that carry
meaning, in whichever request they occur ("Which organ makes bile?", "Please find the organ that makes bile."). Across
images, they are all words and pairs of neighbouring words: a fact may recur in another wording.

The search across images is exact and fast, as in PartEnum (Arasu et al. 2006). Two sets of which the smaller has n
parts and which have a similarity of at least t differ in at most d = (1 - t) n / t parts. When their parts are
distributed over d + 1 partitions by their hashes, one partition is the same, so only texts that share one are compared.
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

# The similarities from which two questions are duplicates.
WITHIN_IMAGE = 0.8
ACROSS_IMAGES = 0.9
_BUCKETS = 1 << 20

_REQUESTS = (
    "a an and are as at be but by can could do does find for from give has have here highlight i identify image in is "
    "it its like locate look looking mark me need of on one or organ out outline picture please point scan see segment "
    "show shown slice structure tell that the their them there these they this to want was what where which who whose "
    "with would you detect delineate trace indicate spot pick box draw"
)
_REQUEST_WORDS = frozenset(_REQUESTS.split())


class Duplicates:
    """The questions seen so far."""

    def __init__(self) -> None:
        # Arrays and bare numbers, as a data set has hundreds of thousands of questions.
        self._ids: list[str] = []
        self._parts: list[array[int]] = []
        self._of_item: defaultdict[str, list[tuple[str, array[int]]]] = defaultdict(list)
        # Of each partition the latest entry; of each entry the text and the previous entry of the same partition.
        # Partitions that share a bucket are searched together, which costs a comparison and no more.
        self._latest = array("q", [-1]) * _BUCKETS
        self._texts, self._before = array("q"), array("q")

    def add(self, id: str, text: str) -> Breach | None:
        """Remembers a pair's question, or returns a breach if it is a near-duplicate of one that was added before."""
        item = id.partition("#")[0]
        spoken = [word.text for word in words(text)]
        meaning = {_number(word) for word in spoken if word not in _REQUEST_WORDS} or set(map(_number, spoken))
        for other, content in self._of_item[item]:
            if _jaccard(meaning, content) >= WITHIN_IMAGE:
                return Breach("duplicate", f"it tells the same as {other}; tell something else about the target")
        parts = {*map(_number, spoken), *(_number(f"{first} {second}") for first, second in pairwise(spoken))}
        partitions = list(_partitions(parts))
        for place in sorted({place for each in partitions for place in self._texts_in(each)}):
            if _jaccard(parts, self._parts[place]) >= ACROSS_IMAGES:
                return Breach("duplicate", f"it repeats the words of {self._ids[place]}; put it in other words")
        for each in partitions:
            self._before.append(self._latest[each])
            self._latest[each] = len(self._texts)
            self._texts.append(len(self._ids))
        self._ids.append(id)
        self._parts.append(array("Q", sorted(parts)))
        self._of_item[item].append((id, array("Q", sorted(meaning))))
        return None

    def _texts_in(self, partition: int) -> Iterator[int]:
        entry = self._latest[partition]
        while entry >= 0:
            yield self._texts[entry]
            entry = self._before[entry]


def _partitions(parts: set[int]) -> Iterator[int]:
    """Yields a number for each partition of a set, from its content and position."""
    # A similar text has t n to n / t parts; the number of partitions that suits the larger is computed for both.
    sizes = range(math.floor(ACROSS_IMAGES * len(parts)), math.ceil(len(parts) / ACROSS_IMAGES) + 1)
    for count in sorted({math.floor((1 - ACROSS_IMAGES) * size / ACROSS_IMAGES + 1e-9) + 1 for size in sizes}):
        for rest in range(count):
            # Python hashes numbers alike in every run; a collision costs a comparison and no more.
            yield hash((count, rest, *sorted(part for part in parts if part % count == rest))) % _BUCKETS


def _jaccard(first: set[int], second: array[int]) -> float:
    shared = len(first.intersection(second))
    return shared / max(1, len(first) + len(second) - shared)


@lru_cache(maxsize=1 << 18)
def _number(text: str) -> int:
    # A hash of the text, not Python's own, which differs from run to run.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
