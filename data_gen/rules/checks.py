"""Rules that code can check, for the texts of any author: descriptions, questions, answers, turns of conversations.

data_gen/README.md lists them by the short names that a breach has, with a reason that can be sent to a model. Names are
matched as described in `data_gen.core.names`. Another labelled object is allowed as a landmark ("the organ to the right
of the spleen"). Whether a statement is medically true is not checked; people screen that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from data_gen.core.items import Item
from data_gen.core.names import Mention, Names, Word, words
from data_gen.rules.positions import claims, contradiction
from data_gen.rules.refusals import refuses
from medisee.records.prompts import CANDIDATE_TOKENS
from medisee.records.records import Length

TEXT_WORDS: dict[Length, tuple[int, int]] = {"short": (5, 15), "long": (10, 20)}
ANSWER_WORDS = (8, 25)
TURN_WORDS = (2, 40)
_LONGEST_WORD = 15  # characters with the space, on average: a text that is much longer does not fit into training
# Tokens of chat formats and of our answers; in a question or an explanation they would be read as such.
_SPECIAL = re.compile(
    "|".join((*map(re.escape, CANDIDATE_TOKENS), r"\[TGT\d+\]", r"\[/?INST\]", r"</?[a-z]\w*>", r"<\|.*?\|>"))
)

_NUMBER = r"-?\d*[.,]?\d+"
# Words before a list of numbers that are not positions: "areas 1, 2 and 3".
_NUMBERED = "areas segments grades levels stages types ribs zones nerves groups vertebrae chromosomes ages"
_LIST = (
    r"(?<![\w.,])(?<!\d, )" + "".join(rf"(?<!\b{noun} )" for noun in _NUMBERED.split()) + r"\d+(?:\.\d+)?"
    r"(?:\s*,\s+|,(?!\d{3}(?!\d)))\d"  # "1,500" is one number
)
_COORDINATES = re.compile(
    rf"[\[(<]\s*{_NUMBER}\s*(?:(?:[,;:x]\s*|\s){_NUMBER}\s*)+[\])>]"  # (0.1, 0.2), [12, 40, 90, 80]
    rf"|\b[xyXY][0-2]?\s*(?:=|≈|:|is|from|between)\s*{_NUMBER}"  # x = 12, y0: 0.4
    rf"|{_NUMBER}\s*(?:px|pixels?)\b|\bpixels?\s+{_NUMBER}|{_LIST}"  # 120, 45, 200, 90
    r"|\b(?:rows?|columns?) (?:number |no\.? )?\d|\b\d+[snrt][tdh] (?:row|column)\b"
    r"|(?<![\w.])0?\.\d+|(?<![\w.,])0,\d+"  # a share
    rf"|\d+\s*(?:%|per ?cent)\s+(?:of|from|to|down|up|across|along|in)\b[^.;]*?"
    r"\b(?:image|picture|slice|scan|width|height|left|right|top|bottom|edge|border)"
    r"|\b(?:the|these|those|its|with|at|of|pixel|image|box) coordinates?\b|\bcoordinates? (?:of|are|is|at)\b|\bxyxy\b|\bbbox\b|\bbounding box\w*\s+(?:is|at|of|with|=|:)?\s*[\[(\d]",
    re.IGNORECASE,
)
# A request for something: between its verb and its object may be an article, an adjective or two.
_VERBS = (
    "segment|outline|delineate|contour|mark|show|find|locate|localize|localise|identify|highlight|detect|trace|"
    "select|spot|indicate|point|point out|point to|draw|box|name|give|look for|tell|describe|pick|pick out|see|display|"
    "reveal|colour|color"
)
_QUALITY = r"(?:left|right|upper|lower|whole|entire|visible|shown|large|small|big|healthy|normal|[a-z]+(?:ish|al|ed)) "
_FILL = rf"(?:(?:me|us|out|to|at|where|is|are|the|a|an|this|that|these|those) |{_QUALITY})"
# A word like these before "is the spleen" makes the spleen a landmark: "whose neighbour is the spleen".
_AWAY = (
    "whose|that|which|where|whom|what|and|but|if|when|as|of|to|from|by|with|above|below|behind|beside|under|over|near|"
    "next|between|before|after|neighbor|border|edge|wall|roof|floor|side|landmark"
)
_NOUN = rf"(?:(?!(?:{_AWAY})\b)[a-z0-9]+ |of (?:the|this) (?:image|picture|slice|scan|body|belly|abdomen|brain|chest) )"
# What may follow a name that a sentence ends with or goes on about: "is the spleen in this image", "the spleen, which".
_THEN = (
    r"(?= (?:in|on|at|within|inside|here|seen|shown|visible|located|lying|which|that|who|where|because|since|as|so|but|not|"
    "beside|near|next|behind|above|below|under|between)\\b|$)"
)
_CALLED = r"(?:known as|called|named|termed|labell?ed(?: as)?|referred to as|identified as)"
# "it is the spleen", "this organ is the spleen", "the organ known as the spleen"
_IT_IS_OTHER = (
    r"^(?:yes |here |so |well )?(?:(?:it(?: is)?|(?:this|that|these|those|they) (?:is|are)|"
    rf"(?:the|this|that|an?|these|those) {_NOUN}{{1,4}}(?:(?:that|which) )?(?:is|are)) (?:{_CALLED} )?{_FILL}{{0,3}}OTHER{_THEN}"
    rf"|(?:the|this|that|an?|these|those) {_NOUN}{{1,4}}{_CALLED} {_FILL}{{0,3}}OTHER(?! (?:OWNS|NEXT)))"
)
_LIES = "lie|sit|appear|rest|reside|stand|show up|show"
# "which spleen" asks for it, "against which the spleen" and "where the spleen ends" do not.
_ASKS_FOR_OTHER = re.compile(
    rf"(?:\b(?:which|what) (?:{_QUALITY}){{0,3}}|\b(?:which|what|where) (?:is|are) {_FILL}{{0,4}}"
    rf"|\bwhere (?:do you see|can i (?:find|see)) {_FILL}{{0,4}}|\b(?:{_VERBS}) {_FILL}{{0,4}})OTHER(?! (?:OWNS|NEXT))"
    rf"|\bwhere (?:in|on|within|inside) {_NOUN}{{1,4}}(?:is|are) {_FILL}{{0,3}}OTHER{_THEN}"
    rf"|\bwhere (?:does|do|did|can|could|will|would) {_FILL}{{0,3}}OTHER (?:{_LIES})(?= (?:in|on|within|here)\b|$)"
    rf"|\b(?:which|what)(?: one)?(?: of)? {_NOUN}{{1,7}}(?:is|are) (?:{_CALLED} )?{_FILL}{{0,3}}OTHER{_THEN}"
    rf"|{_IT_IS_OTHER}"
)
_IS_ABOUT_OTHER = re.compile(
    rf"^(?:it |this |here |that )?(?:is |are |shows )?{_FILL}{{0,3}}OTHER(?! (?:OWNS|NEXT))|{_IT_IS_OTHER}"
)
_SAYS_IT_IS_OTHER = re.compile(_IT_IS_OTHER)
_DENIED = re.compile(
    rf"\b(?:not|[a-z]+n t|no|neither|nor|never|rather than|instead of|unlike) {_FILL}{{0,3}}OTHER(?! (?:OWNS|NEXT))"
)
# After another object's name these make it a part of a larger phrase: "the liver edge", "the spleen-sided organ".
_NEXT = (
    "side sided edge border margin surface neighbor neighboring neighbors adjacent region area like tip contact fissure "
    "bed hilum level shaped based facing bound near dependent"
)
_REQUEST = re.compile(
    r"^(?:(?:please|kindly|now|then|also|and|so|first|next|just) )*"
    rf"(?:(?:can|could|would|will) you (?:please )?|help me |let me |let us |i (?:would like|want|need|wish|am looking|like)\b|"
    rf"i'd like|we (?:need|want|are looking)\b|(?:{_VERBS})\b)",
    re.IGNORECASE,
)
_WANTS = re.compile(
    rf"\bplease (?:\w+ )?(?:{_VERBS})\b|\b(?:i|we) (?:need|want|mean|seek|would like|am looking|are looking|am after)\b"
    r"|\b(?:to|should) be (?:segmented|outlined|traced|delineated|contoured|marked|highlighted|shown|colou?red)\b"
    r"|\b(?:is|are) my (?:target|question)\b|\bto (?:find|segment|outline|mark)[.!]?$",
    re.IGNORECASE,
)
_CLAUSES = re.compile(r"[.;:,!–—]\s+|\s-\s")
_OPPOSITE = {"left": "right", "right": "left", "upper": "lower", "lower": "upper"}
_PATIENT = re.compile(
    r"\b(left|right)(?:[- ]hand)? side of the (?:patient|body)|\bpatient['’]s (left|right)\b", re.IGNORECASE
)
_EXTREMES = (
    (re.compile(r"\b(?:largest|biggest)\b", re.IGNORECASE), re.compile(r"\bsmallest\b", re.IGNORECASE)),
    (re.compile(r"\b(?:tallest|longest)\b", re.IGNORECASE), re.compile(r"\bshortest\b", re.IGNORECASE)),
)


@dataclass(frozen=True, slots=True)
class Breach:
    rule: str  # which a text breaks
    reason: str


def check_description(text: str, length: Length, item: Item, names: Names) -> list[Breach]:
    """Returns the rules that a description of the item's target breaks."""
    breaches = [
        *check_text(text),
        *_words(text, "the description", *TEXT_WORDS[length]),
        *_before_answer(text, item, names),
        *_names_other(text, item, names, _IS_ABOUT_OTHER, "is about"),
    ]
    if "?" in text:
        breaches.append(Breach("question", "the description is a question; write a phrase without a question mark"))
    return breaches


def check_pair(question: str, answer: str, length: Length, item: Item, names: Names) -> list[Breach]:
    """Returns the rules that a question about the item's target or its answer breaks."""
    return [
        *check_text(question),
        *check_text(answer),
        *_words(question, "the question", *TEXT_WORDS[length]),
        *_before_answer(question, item, names),
        *_is_asked(question),
        *_words(answer, "the answer", *ANSWER_WORDS),
        *_position(answer, item),
        *_names_label(answer, item, names),
    ]


def check_turn(question: str, answer: str, item: Item, names: Names) -> list[Breach]:
    """Returns the rules that a turn before a conversation's last one breaks; it must not give the target away."""
    return [
        *check_text(question),
        *check_text(answer),
        *_words(question, "the question", *TURN_WORDS),
        *_words(answer, "the answer", *TURN_WORDS),
        *_is_asked(question),
        *_before_answer(f"{question} {answer}", item, names),
    ]


def check_text(text: str) -> Iterator[Breach]:
    """Yields the rules that keep a text from being one for people and for training, whatever it is about."""
    if refuses(text):
        yield Breach("refused", "the text refuses to answer; write what is asked for")
    if found := _SPECIAL.search(text):
        yield Breach("special_token", f'"{found.group()}" is a special token of language models; write words only')


def check_same_target(short: str, long: str, item: Item, names: Names) -> list[Breach]:
    """Returns why the short and the long text of one perspective cannot be about the same target: they contradict each
    other about sides, halves of the image or sizes, or name different objects first (only answers should name any)."""
    reasons = [
        f'the short text says "{first}" of the image and the long one "{second}"'
        for first, second in product(claims(short), claims(long))
        if _OPPOSITE[first] == second
    ]
    sides = [{(left or right).lower() for left, right in _PATIENT.findall(text)} for text in (short, long)]
    reasons += [
        f"one text says the patient's {first} and the other the patient's {second}"
        for first, second in product(*sides)
        if first != second
    ]
    reasons += [
        "one text says that it is the largest or longest, the other that it is the smallest or shortest"
        for one, other in _EXTREMES
        if (one.search(short) and other.search(long)) or (other.search(short) and one.search(long))
    ]
    target = names.canonical(item.category)
    mentioned = [names.find(words(text), _categories(item)) for text in (short, long)]
    found = {mentions[0].category for mentions in mentioned if mentions}
    if target in found and len(found) > 1:
        reasons.append(f"one text names the {target}, the other the {next(iter(found - {target}))}")
    return [Breach("same_target", f"{reason}; both must be about the same target") for reason in dict.fromkeys(reasons)]


def count_words(text: str) -> int:
    """Returns the number of words: parts between spaces that contain a letter or a digit."""
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


def _words(text: str, what: str, least: int, most: int) -> Iterator[Breach]:
    count = count_words(text)
    if not least <= count <= most:
        yield Breach("words", f"{what} has {count} words; write {least} to {most}")
    elif len(text) > _LONGEST_WORD * most:
        yield Breach("words", f"{what} has {len(text)} characters; write at most {_LONGEST_WORD * most}")


def _before_answer(text: str, item: Item, names: Names) -> Iterator[Breach]:
    if found := names.betrays(text, item.category):
        yield Breach("names_target", f'"{found}" gives the target away; describe it without its name or parts of it')
    yield from _position(text, item)
    yield from _names_other(text, item, names, _ASKS_FOR_OTHER, "asks for")


def _position(text: str, item: Item) -> Iterator[Breach]:
    if found := _COORDINATES.search(text):
        yield Breach("coordinates", f'"{found.group().strip()}" is a position in numbers; put it into words')
    if found := contradiction(text, item.box):
        yield Breach("position", f'the target does not lie in "{found}"; left and right are those of the image')


def _names_other(text: str, item: Item, names: Names, pattern: re.Pattern[str], does: str) -> Iterator[Breach]:
    spoken = words(text)
    others = _labelled(item, names) - {names.canonical(item.category)}
    for mention in names.find(spoken, _categories(item)):
        if mention.category in others and pattern.search(_masked(spoken, mention)):
            reason = f"the text {does} the {mention.category}, another labelled object; it may only be a landmark"
            yield Breach("names_other", reason)
            return


def _masked(spoken: tuple[Word, ...], mention: Mention) -> str:
    """Returns a text with one name replaced by OTHER, and a mark where that is only a part of a larger phrase."""
    texts = [word.text for word in spoken]
    owns = ["OWNS"] if spoken[mention.stop - 1].owns else []
    following = texts[mention.stop :]
    if following and following[0] in _NEXT.split():
        following[0] = "NEXT"
    return " ".join([*texts[: mention.start], "OTHER", *owns, *following])


def _is_asked(question: str) -> Iterator[Breach]:
    text = question.strip()
    is_request = _WANTS.search(text) or any(_REQUEST.match(clause.strip()) for clause in _CLAUSES.split(text))
    if not text.endswith("?") and not is_request:
        reason = "it is neither a question nor a request; ask for the target and end with a question mark"
        yield Breach("question", reason)


def _names_label(answer: str, item: Item, names: Names) -> Iterator[Breach]:
    target, spoken = names.canonical(item.category), words(answer)
    mentions = names.find(spoken, _categories(item))
    if target not in {mention.category for mention in mentions}:
        yield Breach("answer_names_label", f'the answer does not name the target; write "{target}"')
        return
    first = mentions[0]
    is_said = first.category in _labelled(item, names) or _SAYS_IT_IS_OTHER.search(_masked(spoken, first))
    if first.category != target and is_said:
        reason = f"the answer names the {first.category} before the {target}; name the target first"
        yield Breach("answer_names_label", reason)
    elif any(_DENIED.search(_masked(spoken, mention)) for mention in mentions if mention.category == target):
        yield Breach("answer_names_label", f"the answer says what is not the {target}; say only that it is the target")


def _labelled(item: Item, names: Names) -> set[str]:
    return {names.canonical(entity.category) for entity in item.entities}


def _categories(item: Item) -> list[str]:
    return [item.category, *(entity.category for entity in item.entities)]
