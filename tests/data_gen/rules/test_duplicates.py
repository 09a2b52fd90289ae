"""Near-duplicates are found exactly, within an image by meaning and across images by wording."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.core.names import words
from data_gen.rules.duplicates import ACROSS_IMAGES, Duplicates

BILE = "Which organ makes bile and stores sugar as glycogen between two meals of the day?"


def test_the_same_meaning_in_one_image_is_a_duplicate() -> None:
    seen = Duplicates()
    assert seen.add("a#first-attribute-short", "Which organ makes bile?") is None
    breach = seen.add("a#second-attribute-short", "Please find the organ that makes bile.")
    assert breach and breach.rule == "duplicate" and "a#first-attribute-short" in breach.reason
    assert seen.add("a#second-attribute-short", "Which organ stores sugar as glycogen?") is None


def test_across_images_only_the_wording_counts() -> None:
    seen = Duplicates()
    assert seen.add("a#1", "Which organ makes bile?") is None
    assert seen.add("b#1", "Please find the organ that makes bile.") is None
    assert seen.add("c#1", "WHICH organ makes bile") is not None
    assert seen.add("c#1", "Which organ makes insulin?") is None
    assert seen.add("a#2", BILE) is None
    # British and American spelling, case and punctuation make no difference.
    assert seen.add("b#2", BILE.replace("?", " ...").upper()) is not None


def test_what_was_refused_is_not_remembered() -> None:
    seen = Duplicates()
    seen.add("a#1", BILE)
    assert seen.add("b#1", f"{BILE} Please") is not None
    assert seen.add("b#2", "Where do you see the spleen's left neighbour?") is None


def _similarity(first: str, second: str) -> float:
    def parts(text: str) -> set[tuple[str, ...]]:
        spoken = [word.text for word in words(text)]
        return {(word,) for word in spoken} | set(pairwise(spoken))

    one, other = parts(first), parts(second)
    return len(one & other) / len(one | other)


LONG = tuple(f"w{number}" for number in range(22))


@st.composite
def _sentences(draw: st.DrawFn) -> str:
    """Draws a part of one long sentence with a word or two replaced: many are just alike enough, or just not."""
    spoken = list(LONG[: draw(st.integers(1, len(LONG)))])
    for _ in range(draw(st.integers(0, 2))):
        spoken[draw(st.integers(0, len(spoken) - 1))] = draw(st.sampled_from(("x", "y")))
    return " ".join(spoken)


@settings(max_examples=150)
@given(st.lists(_sentences(), max_size=25))
def test_the_fast_search_finds_what_comparing_all_finds(sentences: list[str]) -> None:
    seen, kept = Duplicates(), []
    for place, text in enumerate(sentences):
        expected = any(_similarity(text, other) >= ACROSS_IMAGES for other in kept)
        assert (seen.add(f"{place}#x", text) is not None) == expected
        kept += [] if expected else [text]


@pytest.mark.scale
def test_fifty_thousand_questions() -> None:
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(400)]
    seen, repeated = Duplicates(), 0
    texts = [" ".join(["Which organ in this image", *rng.choices(vocabulary, k=8)]) for _ in range(45_000)]
    for place, text in enumerate(texts):
        assert seen.add(f"{place}#x", text) is None
    for place, text in enumerate(rng.sample(texts, 5_000)):
        repeated += seen.add(f"again{place}#x", f"{text}?!") is not None
    assert repeated == 5_000
