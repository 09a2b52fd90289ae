"""The words around a query: questions that name a class, requests after an implicit query, and answers.

Every answer begins with the candidate tokens; the explanation follows, so it does not change where they are read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

CANDIDATE_TOKENS = ("[SEG]", "[BBOX]")

CLASS_QUESTIONS = (
    "Can you segment and locate the {name} in this image?",
    "Where is the {name}? Please give its mask and its bounding box.",
    "Please outline the {name} and draw a box around it.",
    "Show me the {name} in this scan as a mask and a box.",
    "Find the {name} and mark both its outline and its extent.",
    "Could you delineate the {name} and tell me where it lies?",
    "I need the {name} segmented and boxed in this picture.",
    "Which pixels belong to the {name}, and which box holds them?",
    "Mark the {name} in this medical image with a mask and a bounding box.",
    "Please segment the {name} and report its position.",
    "What is the region of the {name}? Answer with a mask and a box.",
    "Detect the {name} here and give its precise shape.",
)
"""Questions for targets that have none; `{name}` is the class in plain words."""

ANSWERS = (
    "It is {candidates}.",
    "Here it is: {candidates}.",
    "The region you ask for is {candidates}.",
    "This is the result: {candidates}.",
    "Sure, {candidates}.",
    "I have marked it as {candidates}.",
)
"""Answers; teacher-forced scoring gives the first one."""

REQUESTS = (
    "Please output the segmentation mask and the bounding box, and explain why.",
    "Answer with a mask and a box, and give your reasons.",
    "Segment and locate it, then explain your choice.",
    "Show it as a mask with its bounding box and say why.",
    "Please mark the region, box it and justify the answer.",
    "Give its mask and its position, and tell me how you know.",
    "Outline it, put a box around it and add a short explanation.",
    "Please provide mask, box and the reasoning behind them.",
)
"""What follows an implicit query: a request for mask, box and explanation."""


def candidate_text(tokens: Sequence[str]) -> str:
    """Joins candidate tokens as a sentence does: "[SEG]", "[SEG] and [BBOX]", "[SEG], [BBOX] and [TGT3]"."""
    if not tokens:
        raise ValueError("candidate_text needs at least one candidate token, got none")
    *head, last = tokens
    return f"{', '.join(head)} and {last}" if head else last


FORCED_ANSWER = ANSWERS[0].format(candidates=candidate_text(CANDIDATE_TOKENS))


def class_question(name: str, rng: random.Random) -> str:
    """Draws a question that names a class, such as "left kidney"."""
    return rng.choice(CLASS_QUESTIONS).format(name=name)


def class_answer(rng: random.Random, tokens: Sequence[str] = CANDIDATE_TOKENS) -> str:
    """Draws an answer that holds only the candidate tokens."""
    return rng.choice(ANSWERS).format(candidates=candidate_text(tokens))


def reasoning_question(query: str, rng: random.Random) -> str:
    """Returns an implicit query followed by a drawn request for mask, box and explanation."""
    query = query.strip()
    stop = "" if query.endswith((".", "?", "!")) else "."
    return f"{query}{stop} {rng.choice(REQUESTS)}"


def reasoning_answer(explanation: str, rng: random.Random, tokens: Sequence[str] = CANDIDATE_TOKENS) -> str:
    """Draws an answer: the candidate tokens, then the explanation (which may be empty)."""
    return f"{class_answer(rng, tokens)} {explanation.strip()}".rstrip()
