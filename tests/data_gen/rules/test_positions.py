"""Statements about random boxes are true of the target and of no other object, by a second reading of their words."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.core.items import Entity
from data_gen.rules.positions import Landmark, claims, contradiction, statements
from medisee.records.masks import Box

ORGANS: tuple[str, ...] = ("alpha", "beta", "gamma", "delta", "epsilon")
SIDES = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}
FURTHEST = {"left": (0, -1), "right": (2, 1), "up": (1, -1), "down": (3, 1)}


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    sides = []
    for _ in range(2):
        low = draw(st.integers(0, 18))
        sides.append((low, draw(st.integers(low + 1, 20))))
    (x0, x1), (y0, y1) = sides
    return x0 / 20, y0 / 20, x1 / 20, y1 / 20


def _gap(box: Box, other: Box, axis: int, sign: int) -> float:
    return other[axis] - box[axis + 2] if sign > 0 else box[axis] - other[axis + 2]


def _length(box: Box, axis: int) -> float:
    return box[axis + 2] - box[axis]


def _beside(box: Box, other: Box, axis: int, sign: int, slack: float) -> bool:
    """Reads "to the left of" and so on: apart along an axis but for a share, level along the other."""
    shorter = [min(_length(box, each), _length(other, each)) for each in (0, 1)]
    cross = 1 - axis
    level = min(box[cross + 2], other[cross + 2]) - max(box[cross], other[cross])
    return _gap(box, other, axis, sign) >= -slack * shorter[axis] - 1e-9 and level >= 0.4 * shorter[cross] - 1e-9


def _holds(part: str, name: str, scene: dict[str, Box], slack: float) -> bool:
    """Tells whether a part of a statement holds of an object, as a reader would check it with a ruler."""
    box, rest = scene[name], [each for other, each in scene.items() if other != name]
    centre = [(box[axis] + box[axis + 2]) / 2 for axis in (0, 1)]
    if match := re.fullmatch(r"in the (left|right|upper|lower)(?: (left|right))? (?:half|part) of the image", part):
        wanted = [word for word in match.groups() if word]
        inside = {
            "left": box[2] - 0.5 <= slack * _length(box, 0) + 1e-9,
            "right": 0.5 - box[0] <= slack * _length(box, 0) + 1e-9,
            "upper": box[3] - 0.5 <= slack * _length(box, 1) + 1e-9,
            "lower": 0.5 - box[1] <= slack * _length(box, 1) + 1e-9,
        }
        return all(inside[word] for word in wanted)
    if part == "at the centre of the image":
        return all(abs(value - 0.5) < 0.06 for value in centre)
    if match := re.fullmatch(r"between the (\w+) and the (\w+)", part):
        first, second = (scene[each] for each in match.groups())
        return any(_beside(box, first, a, -1, slack) and _beside(box, second, a, 1, slack) for a in (0, 1))
    if match := re.fullmatch(r"(directly )?(to the left of|to the right of|above|below) the (\w+)", part):
        axis, sign = SIDES[match[2]]
        landmark = scene[match[3]]
        others = [each for other, each in scene.items() if other not in (name, match[3])]
        rivals = [each for each in others if _beside(each, landmark, axis, sign, slack)]
        gap = _gap(box, landmark, axis, sign)
        nearest = all(_gap(each, landmark, axis, sign) > gap for each in rivals)
        return match[3] != name and _beside(box, landmark, axis, sign, slack) and (not match[1] or nearest)
    if match := re.fullmatch(r"reaches further (\w+) in the image than any other labelled structure", part):
        side, sign = FURTHEST[match[1]]
        return all(sign * box[side] > sign * other[side] for other in rest)
    if match := re.fullmatch(r"stretches further from (left|top) to \w+ than any other labelled structure", part):
        axis = ("left", "top").index(match[1])
        return all(_length(box, axis) > _length(other, axis) for other in rest)
    assert part == "is the smallest labelled structure in both width and height", part
    return all(_length(box, axis) < _length(other, axis) for other in rest for axis in (0, 1))


def _parts(phrase: str) -> list[str]:
    """Takes a statement apart; the "and" of "between a and b" stays."""
    if not phrase.startswith("lies "):
        return [phrase]
    phrase = phrase.removeprefix("lies ")
    phrase = re.sub(r"(?<!of the image)(?<!half of) in the image$", "", phrase)
    return re.split(
        r"(?<!between the alpha)(?<!between the beta)(?<!between the gamma)(?<!between the delta)"
        r"(?<!between the epsilon) and (?=in |at |to |above|below|between|directly)",
        phrase,
    )


def _said(scene: dict[str, Box], compact: bool) -> list[str]:
    others = [Entity(name, box) for name, box in scene.items() if name != "alpha"]
    landmarks = [Landmark(f"the {entity.category}", entity.box, compact) for entity in others]
    return [statement.phrase for statement in statements(scene["alpha"], others, landmarks, compact=compact)]


@settings(max_examples=200)
@given(st.lists(boxes(), min_size=1, max_size=5), st.booleans())
def test_statements_hold_of_the_target_and_of_nothing_else(found: list[Box], compact: bool) -> None:
    scene = dict(zip(ORGANS, found, strict=False))
    slack = 0.25 if compact else 0.0
    for phrase in _said(scene, compact):
        parts = _parts(phrase)
        assert all(_holds(part, "alpha", scene, slack) for part in parts), phrase
        for name in scene.keys() - {"alpha"}:
            assert not all(_holds(part, name, scene, slack) for part in parts), (phrase, name)
        assert contradiction(f"The organ that {phrase}", scene["alpha"]) is None


def test_a_simple_scene_is_described_in_simple_words() -> None:
    scene = {"alpha": (0.05, 0.05, 0.2, 0.2), "beta": (0.05, 0.6, 0.2, 0.75), "gamma": (0.6, 0.05, 0.9, 0.4)}
    said = _said(scene, True)
    assert {
        "lies in the upper left part of the image",
        "lies above the beta in the image",
        "lies to the left of the gamma in the image",
    } <= set(said)
    assert "lies in the left half of the image" not in said  # so does beta


def test_between_and_directly() -> None:
    row = {"alpha": (0.3, 0.4, 0.4, 0.6), "beta": (0.1, 0.4, 0.2, 0.6), "gamma": (0.8, 0.4, 0.9, 0.6)}
    assert "lies between the beta and the gamma in the image" in _said(row, True)
    further = row | {"delta": (0.6, 0.4, 0.7, 0.6)}
    said = _said(further, True)
    assert "lies directly to the right of the beta in the image" in said
    assert "lies to the right of the beta in the image" not in said
    assert "lies between the beta and the delta in the image" in said


def test_what_comes_in_several_parts_has_no_place_at_the_centre() -> None:
    scene = {"alpha": (0.1, 0.3, 0.9, 0.7)}
    assert _said(scene, True) == ["lies at the centre of the image"]
    assert _said(scene, False) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in the lower part of the image", "lower part of the image"),
        ("in the upper right corner of this CT slice", "upper right corner of this CT slice"),
        ("on the right-hand side of the picture", "right-hand side of the picture"),
        ("on the right side of the patient", None),
        ("to the right of the spleen in the image", None),
        ("reaches further right in the image than any other", None),
        ("in the upper left part of the image", None),
    ],
)
def test_contradictions_concern_the_image_only(text: str, found: str | None) -> None:
    assert contradiction(text, (0.1, 0.1, 0.4, 0.4)) == found


def test_claims_are_halves() -> None:
    assert claims("at the top of the image and in the lower left part of this scan") == {"upper", "lower", "left"}
