"""The wordings of the offline author: descriptions, the questions made from them, and answers.

A description is "The <head> that <phrase>", where the head is a general noun and, for one of two, the patient's side.
So the phrase can be found again in a description, and every question and answer about it is grammatical.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from data_gen.core.items import Template
from data_gen.core.names import words
from data_gen.rules.checks import ANSWER_WORDS, TEXT_WORDS, count_words
from medisee.records.records import Length

_DESCRIPTIONS: dict[Template, tuple[str, ...]] = {
    "first": ("The {head} that {phrase}",),
    "second": ("This {head} {phrase}", "{a_head} which {phrase}"),
}
_ASKING = ("Can you {}?", "Could you {}?", "Would you {}?", "Please {}.")
_DOING: dict[Template, tuple[str, ...]] = {
    "first": ("segment", "outline", "find", "show me", "mark", "point out"),
    "second": ("locate", "highlight", "delineate", "identify", "trace", "indicate"),
}
_QUESTIONS: dict[Template, tuple[str, ...]] = {
    "first": ("Which {head} {phrase}?", "Where is the {head} that {phrase}?"),
    "second": (
        "Which {head} {phrase}?",
        "Where do you see the {head} that {phrase}?",
        "Where can I find the {head} that {phrase}?",
    ),
}
_ANSWERS = (
    "The {name} {phrase}, and it {also_more}.",
    "It is the {name}, which {phrase} and {also_more}.",
    "This is the {name}: it {phrase}, and it {more}.",
    "The answer is the {name}, because it {phrase}, and it {also_more}.",
    "This is the {name}, because it {phrase}.",
    "The {name} is the {noun} that {phrase}.",
    "It is the {name}, the {noun} that {phrase}.",
    "The {name} fits this description, because it {phrase}.",
)
_PLURAL_ANSWERS = (
    "These are the {name}: this {noun} {phrase} and {also_more}.",
    "The answer is the {name}, a {noun} that {phrase} and that {also_more}.",
    "These are the {name}, the {noun} that {phrase}.",
    "The {name} are the {noun} that {phrase}.",
    "The {name} fit this description, as a {noun} that {phrase}.",
)
_EXPLAINING = 0.8
_AUXILIARIES = ("is", "was", "can", "may", "must")
_SMALL_WORDS = "a an and as at by for from has in into is it its lies of on or the to with"
_USUAL_ANSWER = (11, 20)  # words: about 15; others are taken only when none fits


@dataclass(frozen=True, slots=True)
class Subject:
    name: str  # the category's name, as answers use it
    noun: str  # what it is in general
    side: str | None = None  # "left" or "right" of the patient, for one of two
    plural: bool = False  # the name is a plural

    def head(self, sided: bool) -> str:
        """Returns the noun, with the patient's side if it is one of two and `sided`."""
        return f"{self.noun} on the patient's {self.side}" if self.side and sided else self.noun


def descriptions(subject: Subject, phrase: str, template: Template, *, sided: bool) -> Iterator[str]:
    """Yields the wordings of a description in the style of a template."""
    head = subject.head(sided)
    for form in _DESCRIPTIONS[template]:
        text = form.format(head=head, phrase=phrase, a_head=article(head))
        yield text[0].upper() + text[1:]


def read(subject: Subject, description: str) -> tuple[str, bool] | None:
    """Returns the phrase of a description and whether it gives the side; None when it has another form."""
    for sided in (True, False):
        pattern = rf"(?:The|This|An?) {re.escape(subject.head(sided))} (?:(?:that|which) )?(?P<phrase>.+?)\.?"
        if found := re.fullmatch(pattern, description.strip()):
            return found["phrase"], sided
    return None


def question(subject: Subject, phrase: str, template: Template, length: Length, rng: Random, *, sided: bool) -> str:
    """Draws a question, if possible one with the right number of words."""
    head = subject.head(sided)
    forms = [ask.format(f"{do} the {{head}} that {{phrase}}") for ask in _ASKING for do in _DOING[template]]
    # Plain questions are drawn half the time, though there are fewer of them.
    plain, requests = list(_QUESTIONS[template]), rng.sample(forms, len(forms))
    rng.shuffle(plain)
    listed = [*plain, *requests] if rng.random() < 0.5 else [*requests, *plain]
    worded = [form.format(head=head, phrase=phrase) for form in listed]
    least, most = TEXT_WORDS[length]
    return next((text for text in worded if least <= count_words(text) <= most), worded[0])


def answer(subject: Subject, phrase: str, more: Sequence[str], rng: Random) -> str:
    """Draws an answer of about 15 words: the question's phrase and, with room, one of the facts in `more`, in order.

    It is empty when the phrase is too long for any answer.
    """
    forms = list(_PLURAL_ANSWERS if subject.plural else _ANSWERS)
    rng.shuffle(forms)
    # An answer that explains goes beyond the question, so forms with another fact mostly come first.
    if rng.random() < _EXPLAINING:
        forms.sort(key=lambda form: "more}" not in form)
    extra = [each for each in more if " and " not in each]
    if " and " in phrase or ", " in phrase:
        # A third "and" needs a separate clause to be understood.
        forms = [form for form in forms if "more}" not in form or ", and it" in form]
    # The first of two facts alone is stated only if both are too long.
    first = phrase.partition(", here ")[0]
    for stated in [phrase, first] if "between" in phrase else [phrase, first, first.partition(" and ")[0]]:
        worded = [
            form.format(name=subject.name, noun=subject.noun, phrase=stated, more=fact, also_more=_also(fact))
            for form in forms
            for fact in (extra if "more}" in form else [""])
        ]
        for least, most in (_USUAL_ANSWER, ANSWER_WORDS):
            for text in worded:
                if least <= count_words(text) <= most:
                    return text
    return ""


def article(noun: str) -> str:
    """Returns a noun with "a" or "an"."""
    spelt = noun.split()[0] in ("MRI", "X-ray", "ultrasound")  # said as em, ex, ul
    return f"{'an' if spelt or noun[0].lower() in 'aeio' else 'a'} {noun}"


def join(first: str, second: str) -> str | None:
    """Joins two phrases; None when the result would be hard to understand or redundant."""
    if " and " in first + second or ", " in first + second or alike(first, second):
        return None
    verb, other_verb = first.split()[0], second.split()[0]
    if verb == other_verb == "lies" and second.endswith("image"):
        return f"{first}, here {second.removeprefix('lies ')}"
    return f"{first} and {second.removeprefix(f'{verb} ') if verb not in _AUXILIARIES else second}"


def alike(first: str, second: str) -> bool:
    """Returns whether two phrases share more than half of their words, so that one says little beyond the other."""
    one, other = ({word.text for word in words(text)}.difference(_SMALL_WORDS.split()) for text in (first, second))
    return 2 * len(one & other) > min(len(one), len(other))


def _also(phrase: str) -> str:
    """Puts "also" where it belongs: "is also embedded", "also makes"."""
    verb, _, rest = phrase.partition(" ")
    return f"{verb} also {rest}" if verb in _AUXILIARIES else f"also {phrase}"
