"""Where things are in an image, from their boxes alone: statements that are true of the target and of no other object.

Left, right, upper and lower are those of the image, never the patient's. What "lies above the liver" has a box above
the liver's; neighbouring organs bulge into each other, so the two boxes may share a quarter of the smaller one's height.
What comes in several parts (both lungs, say) must be wholly above, as its parts could be anywhere in its box. For all
other objects the same statement is read generously (by their centres), so that nothing that a reader could mean as well
counts as excluded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import Literal

from data_gen.core.items import Entity
from medisee.records.masks import Box

Kind = Literal["place", "relation", "extent"]

_MARGIN = 0.02  # of the image: smaller differences count as equal
_CENTRAL = 0.06  # of the image: how far from its centre "at the centre" reaches
_SLACK = 0.25  # of the smaller object: how far two objects side by side may bulge into each other
_CLOSE = 0.1  # of the image: the widest gap to what something lies directly beside
_ALIGNED = 0.4  # the least fraction of their heights that two objects side by side have in common
_LOOSE_SLACK, _LOOSE_ALIGNED = 0.5, 0.15  # the same two, as generous as a reader may be
_MORE = 1.2  # how many times wider or taller the widest or tallest object is than any other

# The axis, and whether lower coordinates are meant.
_HALVES = {"left": (0, True), "right": (0, False), "upper": (1, True), "lower": (1, False)}
_DIRECTIONS = {"to the left of": (0, True), "to the right of": (0, False), "above": (1, True), "below": (1, False)}
_SAME = {"top": "upper", "bottom": "lower"}
_CLAIM = re.compile(
    r"\b(left|right|upper|lower|top|bottom)(?:[- ](left|right))?(?:[- ]hand)?"
    r"(?:(?: (?:half|side|part|corner|quadrant|portion|region|area|third|edge|margin))? of"
    r"| (?:half|side|part|corner|quadrant|portion|region|area|third) in) (?:the|this) (?:\w+ )?(?:image|picture|slice|scan|photograph|frame|view)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Landmark:  # an object that a statement may refer to
    name: str  # such as "the liver"
    box: Box  # (x0, y0, x1, y1) as fractions of width and height
    compact: bool  # it is one piece, about where its box is


@dataclass(frozen=True, slots=True)
class Statement:
    phrase: str  # completes "the organ that ...": "lies above the liver in the image"
    kinds: tuple[Kind, ...]  # of its parts: a place in the image, a relation to landmarks, an extent compared with all


@dataclass(frozen=True, slots=True)
class _Fact:
    phrase: str  # a place or, for an extent, a whole phrase
    kind: Kind
    fits: Sequence[bool]  # of each other object whether a reader could mean it


def statements(
    target: Box, others: Sequence[Entity], landmarks: Sequence[Landmark], *, compact: bool
) -> list[Statement]:
    """Returns statements that are true of the target and of none of the other labelled objects, the simple ones first.

    `target` is its box (x0, y0, x1, y1), as fractions of width and height. `landmarks` are those of the others that may
    be mentioned. The target is `compact` if it is one piece: the box of a pair of organs does not tell what is inside.
    """
    facts = list(_facts(target, [entity.box for entity in others], landmarks, compact))
    found = [Statement(_phrase(fact), (fact.kind,)) for fact in facts if not any(fact.fits)]
    for first, second in combinations([fact for fact in facts if any(fact.fits)], 2):
        if not any(_both(first.fits, second.fits)) and _reads_well(first, second):
            found.append(Statement(_phrase(first, second), (first.kind, second.kind)))
    return found


def _both(first: Sequence[bool], second: Sequence[bool]) -> list[bool]:
    return [one and other for one, other in zip(first, second, strict=True)]


def _reads_well(first: _Fact, second: _Fact) -> bool:
    """Not two places, nor one direction twice, nor "directly"."""
    words = [fact.phrase.partition(" the ")[0] for fact in (first, second)]
    is_direct = any(word.startswith("directly") for word in words)
    return not (first.kind == second.kind == "place") and words[0] != words[1] and not is_direct


def _phrase(*facts: _Fact) -> str:
    phrase = " and ".join(fact.phrase for fact in facts)
    if facts[0].kind == "extent":
        return phrase
    return f"lies {phrase}" if "image" in phrase else f"lies {phrase} in the image"


def _facts(target: Box, others: Sequence[Box], landmarks: Sequence[Landmark], compact: bool) -> Iterator[_Fact]:
    """Yields what is true of the target, read strictly."""
    yield from _places(target, others, compact)
    for landmark in landmarks:
        yield from _relations(target, others, landmark, _slack(compact, landmark))
    for first, second in permutations(landmarks, 2):
        yield from _between(target, others, first, second, _slack(compact, first, second))
    if others:
        for phrase in _extents(target, others):
            yield _Fact(phrase, "extent", [False] * len(others))


def _slack(compact: bool, *landmarks: Landmark) -> float:
    return _SLACK if compact and all(landmark.compact for landmark in landmarks) else 0


def _places(target: Box, others: Sequence[Box], compact: bool) -> Iterator[_Fact]:
    middle, slack = (0.5, 0.5, 0.5, 0.5), _slack(compact)
    halves = {
        name: [_centre(box)[axis] < 0.5 + _MARGIN if low else _centre(box)[axis] > 0.5 - _MARGIN for box in others]
        for name, (axis, low) in _HALVES.items()
        if _gap(target, middle, axis, low) >= -slack * _length(target, axis)
    }
    for name, fits in halves.items():
        yield _Fact(f"in the {name} half of the image", "place", fits)
    for row, column in product(("upper", "lower"), ("left", "right")):
        if row in halves and column in halves:
            yield _Fact(f"in the {row} {column} part of the image", "place", _both(halves[row], halves[column]))
    if compact and _holds_centre(target) and _off_centre(target) < _CENTRAL:
        fits = [_holds_centre(box) or _off_centre(box) < 4 * _CENTRAL for box in others]
        yield _Fact("at the centre of the image", "place", fits)


def _relations(target: Box, others: Sequence[Box], landmark: Landmark, slack: float) -> Iterator[_Fact]:
    """Yields being left or right of a landmark at its height, above or below it in its column; directly, if need be."""
    for words, (axis, before) in _DIRECTIONS.items():
        if not _is_beside(target, landmark.box, axis, before, slack=slack, aligned=_ALIGNED):
            continue
        fits = [_could_be_beside(box, landmark.box, axis, before) for box in others]
        yield _Fact(f"{words} {landmark.name}", "relation", fits)
        gap = _gap(target, landmark.box, axis, before)
        if gap <= _CLOSE and any(fits):
            # The others on that side must be clearly further away, or a reader could mean them.
            near = [_gap(box, landmark.box, axis, before) < gap + _MARGIN for box in others]
            yield _Fact(f"directly {words} {landmark.name}", "relation", _both(fits, near))


def _between(target: Box, others: Sequence[Box], first: Landmark, second: Landmark, slack: float) -> Iterator[_Fact]:
    one, two = first.box, second.box
    for axis in (0, 1):
        is_after_one = _is_beside(target, one, axis, False, slack=slack, aligned=_ALIGNED)
        is_before_two = _is_beside(target, two, axis, True, slack=slack, aligned=_ALIGNED)
        if is_after_one and is_before_two and _apart(one, two, axis, True, slack):
            fits = [
                _could_be_beside(box, one, axis, False) and _could_be_beside(box, two, axis, True) for box in others
            ]
            yield _Fact(f"between {first.name} and {second.name}", "relation", fits)


def _extents(target: Box, others: Sequence[Box]) -> Iterator[str]:
    """Yields what sets the target apart from all others: reaching or stretching further, being the smallest."""
    for words, side, sign in (("left", 0, 1), ("right", 2, -1), ("up", 1, 1), ("down", 3, -1)):
        if all(sign * (other[side] - target[side]) > _MARGIN for other in others):
            yield f"reaches further {words} in the image than any other labelled structure"
    for words, axis in (("left to right", 0), ("top to bottom", 1)):
        if all(_length(target, axis) > _MORE * _length(other, axis) for other in others):
            yield f"stretches further from {words} than any other labelled structure"
    if all(_MORE * _length(target, axis) < _length(other, axis) for other in others for axis in (0, 1)):
        yield "is the smallest labelled structure in both width and height"


def _could_be_beside(box: Box, other: Box, axis: int, before: bool) -> bool:
    return _is_beside(box, other, axis, before, slack=_LOOSE_SLACK, aligned=_LOOSE_ALIGNED)


def _is_beside(box: Box, other: Box, axis: int, before: bool, *, slack: float, aligned: float) -> bool:
    """Whether a box is before (or behind) another along an axis and level with it along the other axis."""
    return _apart(box, other, axis, before, slack) and _shared(box, other, 1 - axis) >= aligned


def _apart(box: Box, other: Box, axis: int, before: bool, slack: float) -> bool:
    """Whether a box is before (or behind) another along an axis, but for a fraction of the smaller."""
    return _gap(box, other, axis, before) >= -slack * min(_length(box, axis), _length(other, axis))


def _gap(box: Box, other: Box, axis: int, before: bool) -> float:
    """Returns how far a box is before (or behind) another one along an axis; negative when they overlap."""
    return other[axis] - box[axis + 2] if before else box[axis] - other[axis + 2]


def _shared(box: Box, other: Box, axis: int) -> float:
    """Returns how much of the shorter extent along an axis two boxes share, in [0, 1]."""
    overlap = min(box[axis + 2], other[axis + 2]) - max(box[axis], other[axis])
    return max(0.0, overlap) / max(1e-9, min(_length(box, axis), _length(other, axis)))


def _length(box: Box, axis: int) -> float:
    return box[axis + 2] - box[axis]


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _off_centre(box: Box) -> float:
    return max(abs(value - 0.5) for value in _centre(box))


def _holds_centre(box: Box) -> bool:
    return box[0] <= 0.5 <= box[2] and box[1] <= 0.5 <= box[3]


def claims(text: str) -> set[str]:
    """Returns the halves of the image in which a text places something: of "left", "right", "upper" and "lower"."""
    return {half for match in _CLAIM.finditer(text) for half in _halves_in(match)}


def contradiction(text: str, box: Box) -> str | None:
    """Returns the words of a text that place the target in a half of the image that its box does not reach.

    Only places "of the image" (or slice, scan, picture) count; sides of the patient and of landmarks do not.
    """
    for match in _CLAIM.finditer(text):
        for axis, low in map(_HALVES.__getitem__, _halves_in(match)):
            if (box[axis] > 0.5) if low else (box[axis + 2] < 0.5):
                return match.group()
    return None


def _halves_in(match: re.Match[str]) -> list[str]:
    return [_SAME.get(word.lower(), word.lower()) for word in match.groups() if word]
