"""What lies where in an image, from the boxes alone: statements that are true of the target and of no other object.

Left, right, upper and lower are those of the image, never the patient's. What "lies above the liver" has a box above
the liver's; neighbouring organs bulge into each other, so the two boxes may share a quarter of the smaller one's height.
What comes in several parts (both lungs, say) must be wholly above, as its parts could be anywhere in its box. For all
other objects the same statement is read generously (by their centres), so that nothing which a reader could mean as well
counts as excluded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations, product
from typing import Literal, TypeAlias

from data_gen.core.items import Entity
from medisee.records.masks import Box

Kind = Literal["place", "relation", "extent"]
Test: TypeAlias = Callable[[Box], bool]

_MARGIN = 0.02  # of the image: what differs by less counts as equal
_CENTRAL = 0.06  # of the image: how far from its centre "at the centre" reaches
_SLACK = 0.25  # of the smaller object: how far two objects side by side may bulge into each other
_CLOSE = 0.1  # of the image: the widest gap to what something lies directly beside
_ALIGNED = 0.4  # the least share of their heights that two objects side by side have in common
_LOOSE_SLACK, _LOOSE_ALIGNED = 0.5, 0.15  # the same two, as generous as a reader may be
_MORE = 1.2  # how many times wider or taller the widest or tallest object is than any other

_PLACES = {  # the axis and whether the lower coordinates are meant
    "left": (0, True),
    "right": (0, False),
    "upper": (1, True),
    "top": (1, True),
    "lower": (1, False),
    "bottom": (1, False),
}
_SAME = {"top": "upper", "bottom": "lower"}
_CLAIM = re.compile(
    r"\b(left|right|upper|lower|top|bottom)(?:[- ](left|right))?(?:[- ]hand)?"
    r"(?:(?: (?:half|side|part|corner|quadrant|portion|region|area|third|edge|margin))? of"
    r"| (?:half|side|part|corner|quadrant|portion|region|area|third) in) (?:the|this) (?:\w+ )?(?:image|picture|slice|scan|photograph|frame|view)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Landmark:
    """An object that a statement may refer to.

    Attributes:
        name: how it is spoken of, as "the liver".
        box: as shares of width and height.
        compact: it is one piece, about where its box is.
    """

    name: str
    box: Box
    compact: bool


@dataclass(frozen=True, slots=True)
class Statement:
    """A true statement about the target.

    Attributes:
        phrase: completes "the organ that ...": "lies above the liver in the image".
        kinds: what it is made of: "place" (in the image), "relation" (to landmarks), "extent" (compared with all).
    """

    phrase: str
    kinds: tuple[Kind, ...]


@dataclass(frozen=True, slots=True)
class _Fact:
    """Where something lies or, for an extent, a whole phrase; with its strict and its generous reading."""

    phrase: str
    kind: Kind
    strict: Test
    loose: Test


def statements(
    target: Box, others: Sequence[Entity], landmarks: Sequence[Landmark], *, compact: bool
) -> list[Statement]:
    """Returns statements that hold of the target and of none of the others, the simple ones first.

    Args:
        target: its box, as shares of width and height.
        others: all other labelled objects of the image.
        landmarks: those of the others that may be mentioned, each with a name of its own.
        compact: the target is one piece; the box of a pair of organs tells nothing about what lies at its centre.
    """
    boxes = [entity.box for entity in others]
    true = [fact for fact in _facts(target, boxes, landmarks, compact) if fact.strict(target)]
    excluded = [frozenset(i for i, box in enumerate(boxes) if not fact.loose(box)) for fact in true]
    everyone = frozenset(range(len(boxes)))
    found = [
        Statement(_phrase(fact), (fact.kind,)) for fact, out in zip(true, excluded, strict=True) if out == everyone
    ]
    for i, j in combinations(range(len(true)), 2):
        alone = excluded[i] == everyone or excluded[j] == everyone
        if not alone and excluded[i] | excluded[j] == everyone and _combine(true[i], true[j]):
            found.append(Statement(_phrase(true[i], true[j]), (true[i].kind, true[j].kind)))
    return found


def _combine(first: _Fact, second: _Fact) -> bool:
    """Tells whether two facts make a good sentence: not two places, nor one direction twice, nor "directly"."""
    if first.kind == second.kind == "place":
        return False
    words = [fact.phrase.partition(" the ")[0] for fact in (first, second)]
    return words[0] != words[1] and not any(word.startswith("directly") for word in words)


def _phrase(*facts: _Fact) -> str:
    phrase = " and ".join(fact.phrase for fact in facts)
    if facts[0].kind == "extent":
        return phrase
    return f"lies {phrase}" if "image" in phrase else f"lies {phrase} in the image"


def _facts(target: Box, others: Sequence[Box], landmarks: Sequence[Landmark], compact: bool) -> Iterator[_Fact]:
    yield from _halves(_SLACK if compact else 0)
    if compact:
        yield _Fact("at the centre of the image", "place", _central, _near_centre)
    for landmark in landmarks:
        yield from _relations(target, others, landmark, _slack(compact, landmark))
    for first, second in permutations(landmarks, 2):
        yield from _between(first, second, _slack(compact, first, second))
    if others:
        yield from _extents(others)


def _slack(compact: bool, *landmarks: Landmark) -> float:
    return _SLACK if compact and all(landmark.compact for landmark in landmarks) else 0


def _halves(slack: float) -> Iterator[_Fact]:
    """Yields the halves and quarters of the image."""
    halves = {name: _half(*_PLACES[name], slack) for name in ("left", "right", "upper", "lower")}
    for name, (strict, loose) in halves.items():
        yield _Fact(f"in the {name} half of the image", "place", strict, loose)
    for row, column in product(("upper", "lower"), ("left", "right")):
        yield _Fact(
            f"in the {row} {column} part of the image",
            "place",
            _both(halves[row][0], halves[column][0]),
            _both(halves[row][1], halves[column][1]),
        )


def _half(axis: int, low: bool, slack: float) -> tuple[Test, Test]:
    if low:
        return (
            lambda box: box[axis + 2] - 0.5 <= slack * _length(box, axis),
            lambda box: _centre(box)[axis] < 0.5 + _MARGIN,
        )
    return lambda box: 0.5 - box[axis] <= slack * _length(box, axis), lambda box: _centre(box)[axis] > 0.5 - _MARGIN


def _both(first: Test, second: Test) -> Test:
    return lambda box: first(box) and second(box)


def _central(box: Box) -> bool:
    return _holds_centre(box) and max(abs(value - 0.5) for value in _centre(box)) < _CENTRAL


def _near_centre(box: Box) -> bool:
    return _holds_centre(box) or max(abs(value - 0.5) for value in _centre(box)) < 4 * _CENTRAL


def _holds_centre(box: Box) -> bool:
    return box[0] <= 0.5 <= box[2] and box[1] <= 0.5 <= box[3]


def _relations(target: Box, others: Sequence[Box], landmark: Landmark, slack: float) -> Iterator[_Fact]:
    """Yields being left or right of a landmark at its height, above or below it in its column; directly, if need be."""
    for words, axis, before in (
        ("to the left of", 0, True),
        ("to the right of", 0, False),
        ("above", 1, True),
        ("below", 1, False),
    ):
        strict, loose = _side_of(landmark.box, axis, before, slack)
        yield _Fact(f"{words} {landmark.name}", "relation", strict, loose)
        gap = _gap(target, landmark.box, axis, before)
        if gap <= _CLOSE and any(map(loose, others)):
            # The others on that side must be clearly further away, or a reader could mean them.
            nearer = partial(_is_nearer, landmark.box, axis, before, gap + _MARGIN)
            yield _Fact(f"directly {words} {landmark.name}", "relation", strict, _both(loose, nearer))


def _is_nearer(other: Box, axis: int, before: bool, than: float, box: Box) -> bool:
    return _gap(box, other, axis, before) < than


def _gap(box: Box, other: Box, axis: int, before: bool) -> float:
    """Returns how far a box lies before (or behind) another one along an axis; negative when they overlap."""
    return other[axis] - box[axis + 2] if before else box[axis] - other[axis + 2]


def _side_of(other: Box, axis: int, before: bool, slack: float) -> tuple[Test, Test]:
    return (
        lambda box: _apart(box, other, axis, before, slack) and _shared(box, other, 1 - axis) >= _ALIGNED,
        lambda box: _apart(box, other, axis, before, _LOOSE_SLACK) and _shared(box, other, 1 - axis) >= _LOOSE_ALIGNED,
    )


def _between(first: Landmark, second: Landmark, slack: float) -> Iterator[_Fact]:
    for axis in (0, 1):
        if _apart(first.box, second.box, axis, True, slack):
            behind, before = _side_of(first.box, axis, False, slack), _side_of(second.box, axis, True, slack)
            strict, loose = _both(behind[0], before[0]), _both(behind[1], before[1])
            yield _Fact(f"between {first.name} and {second.name}", "relation", strict, loose)


def _extents(others: Sequence[Box]) -> Iterator[_Fact]:
    """Yields what sets an object apart from all others: reaching further, stretching further, being the smallest."""
    for words, side, low in (("left", 0, True), ("right", 2, False), ("up", 1, True), ("down", 3, False)):
        phrase = f"reaches further {words} in the image than any other labelled structure"
        yield _Fact(phrase, "extent", _furthest(others, side, low), _never)
    for words, axis in (("left to right", 0), ("top to bottom", 1)):
        phrase = f"stretches further from {words} than any other labelled structure"
        yield _Fact(phrase, "extent", _longest(others, axis), _never)
    yield _Fact("is the smallest labelled structure in both width and height", "extent", _smallest(others), _never)


def _furthest(others: Sequence[Box], side: int, low: bool) -> Test:
    sign = 1 if low else -1
    return lambda box: all(sign * (other[side] - box[side]) > _MARGIN for other in others)


def _longest(others: Sequence[Box], axis: int) -> Test:
    return lambda box: all(_length(box, axis) > _MORE * _length(other, axis) for other in others)


def _smallest(others: Sequence[Box]) -> Test:
    return lambda box: all(_MORE * _length(box, axis) < _length(other, axis) for other in others for axis in (0, 1))


def _never(_: Box) -> bool:
    return False


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _length(box: Box, axis: int) -> float:
    return box[axis + 2] - box[axis]


def _apart(box: Box, other: Box, axis: int, before: bool, slack: float) -> bool:
    """Tells whether a box lies before (or behind) another along an axis, but for a share of the smaller of the two."""
    return _gap(box, other, axis, before) >= -slack * min(_length(box, axis), _length(other, axis))


def _shared(box: Box, other: Box, axis: int) -> float:
    """Returns how much of the shorter extent along an axis two boxes share, in [0, 1]."""
    overlap = min(box[axis + 2], other[axis + 2]) - max(box[axis], other[axis])
    return max(0.0, overlap) / max(1e-9, min(_length(box, axis), _length(other, axis)))


def claims(text: str) -> set[str]:
    """Returns the halves of the image in which a text places something: of "left", "right", "upper" and "lower"."""
    return {_SAME.get(word, word) for match in _CLAIM.finditer(text) for word in _places_in(match)}


def contradiction(text: str, box: Box) -> str | None:
    """Returns the words of a text that place the target in a half of the image where its box does not reach.

    Only places "of the image" (or slice, scan, picture, view) count, as "the upper left part of the image"; sides of
    the patient and of landmarks do not.
    """
    for match in _CLAIM.finditer(text):
        for word in _places_in(match):
            axis, low = _PLACES[word]
            if (box[axis] > 0.5) if low else (box[axis + 2] < 0.5):
                return match.group()
    return None


def _places_in(match: re.Match[str]) -> list[str]:
    return [word.lower() for word in match.groups() if word]
