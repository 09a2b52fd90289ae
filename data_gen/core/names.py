"""What counts as naming a category: the curated table `names.yaml`, and where a text holds one of its names.

Names count as whole words, in any case, with any hyphens or white space between their words, in the singular and the
plural, in British and American spelling. Where several begin at the same place the longest counts: "left kidney cyst"
is not the left kidney.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from medisee.foundation.errors import InputError

NAMES_FILE = Path(__file__).with_name("names.yaml")
SIDES = ("left", "right")

_KEYS = ("names", "labels", "hints", "stems", "sided")
_FORM = "{names: [...], labels: [...], hints: [...], stems: [...], sided: true}"
_WORD = re.compile(r"[^\W_]+(?:['’]s\b)?")
_DOTTED = re.compile(r"(?<![\w.])[^\W\d_](?:\.[^\W\d_])+(?!\w)\.?")  # "I.V.C."
# The British stem and the American one; words are compared in the American spelling.
_SPELLINGS = tuple(
    (re.compile(british), american)
    for british, american in (
        (r"oesoph", "esoph"),
        (r"oedem", "edem"),
        (r"^foet", "fet"),
        (r"haem", "hem"),
        (r"aemi", "emi"),
        (r"caec", "cec"),
        (r"coeli", "celi"),
        (r"paed", "ped"),
        (r"tumour", "tumor"),
        (r"colour", "color"),
        (r"neighbour", "neighbor"),
        (r"grey", "gray"),
        (r"centre", "center"),
        (r"fibre", "fiber"),
        (r"litre", "liter"),
    )
)
_IRREGULAR = {
    "tooth": ("teeth",),
    "foot": ("feet",),
    "vertebra": ("vertebrae", "vertebras"),
    "meniscus": ("menisci", "meniscuses"),
    "plexus": ("plexuses", "plexi"),
    "chiasma": ("chiasmata", "chiasmas"),
    "corpus": ("corpora",),
    "callosum": ("callosa",),
    "matter": (),
}
_ENDINGS = (  # of a noun, and what its plural may end in
    ("us", ("i", "uses")),
    ("um", ("a", "ums")),
    ("a", ("ae", "as")),
    ("is", ("es",)),
    ("ix", ("ices", "ixes")),
    ("ex", ("ices", "exes")),
    ("ma", ("mata", "mas")),
)


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a text as it is compared; `owns` says that it ended in 's."""

    text: str
    owns: bool


@dataclass(frozen=True, slots=True)
class Mention:
    """A place where a text names a category: its words from `start` to before `stop`."""

    category: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table says of one category.

    Attributes:
        names: nouns that name it; the first is the one that answers use.
        labels: what data sets call it, besides; too general to be found in a text.
        hints: words that give it away in a description, though they do not name it.
        stems: parts of words that give it away in any word that holds them, as "splen" in "splenectomy".
        sided: there is a left and a right one.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()
    sided: bool = False


class Names:
    """The names of all categories. A category that is not in the table has its own label as its name."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = {**entries, **dict(_sided(entries))}
        self._labels = {
            _key(name): category
            for category, entry in reversed(self._entries.items())  # so that the earlier one counts
            for name in (*entry.labels, *entry.names)
        }
        self._forms = _Forms((name, category) for category, entry in self._entries.items() for name in entry.names)
        # Several rules look for names in the same text.
        self._mentions = lru_cache(maxsize=4096)(self._find)

    def __contains__(self, category: str) -> bool:
        """Tells whether the table has the category, under any of its names or labels."""
        return _key(category) in self._labels

    def canonical(self, category: str) -> str:
        """Returns the name that answers use: "kidney_left" is the "left kidney", "postcava" the "inferior vena cava"."""
        key = _key(category)
        return self._labels.get(key) or " ".join(_side_first(category.replace("_", " ").split()))

    def side(self, category: str) -> str | None:
        """Returns "left" or "right" for a category that is one of two, else None."""
        name = self.canonical(category)
        side, _, base = name.partition(" ")
        return side if side in SIDES and base in self._entries and self._entries[base].sided else None

    def base(self, category: str) -> str:
        """Returns the canonical name without its side: the "left kidney" is a "kidney"."""
        name = self.canonical(category)
        return name.partition(" ")[2] if self.side(category) else name

    def of(self, category: str) -> tuple[str, ...]:
        """Returns all words that name a category in an answer, the canonical name first, without plurals."""
        name = self.canonical(category)
        entry = self._entries.get(name)
        return entry.names if entry else (name,)

    def mentions(self, text: str, categories: Iterable[str] = ()) -> set[str]:
        """Returns the canonical categories that a text names, of the table and of `categories`."""
        return {mention.category for mention in self.find(words(text), categories)}

    def first(self, text: str, categories: Iterable[str] = ()) -> str | None:
        """Returns the canonical category that a text names first, None when it names none."""
        return next((mention.category for mention in self.find(words(text), categories)), None)

    def find(self, text: tuple[Word, ...], categories: Iterable[str] = ()) -> tuple[Mention, ...]:
        """Returns the places of a text that name a category, in order and without overlap, the longest names first."""
        return self._mentions(text, tuple(self.canonical(category) for category in categories if category not in self))

    def _find(self, text: tuple[Word, ...], unknown: tuple[str, ...]) -> tuple[Mention, ...]:
        tables = [self._forms, _some_forms(unknown)] if unknown else [self._forms]
        spoken = tuple(word.text for word in text)
        found: list[Mention] = []
        place = 0
        while place < len(spoken):
            spans = [span for table in tables for span in table.at(spoken, place)]
            if spans:
                stop, category = max(spans, key=lambda span: span[0])
                found.append(Mention(category, place, stop))
            place = found[-1].stop if spans else place + 1
        return tuple(found)

    def betrays(self, text: str, category: str) -> str | None:
        """Returns the words that name a category or give it away, None when there are none.

        The other side's name gives a sided category away ("the right kidney" is said of the left one), and so does the
        name without a side.
        """
        spoken = words(text)
        own, base = self.canonical(category), self.base(category)
        sides = {own, base, *(f"{side} {base}" for side in SIDES if self.side(category))}
        if category not in self:  # "vertebrae L1" is given away by "vertebra"
            sides |= self.mentions(own)
        texts = tuple(word.text for word in spoken)
        for mention in self.find(spoken, [category]):
            if mention.category in sides:
                return " ".join(texts[mention.start : mention.stop])
        entry = self._entries.get(base) or Entry((base,))
        table = _some_forms((base, *entry.hints))  # a name within a longer one betrays too: "liver" in "liver tumor"
        hint = next((" ".join(texts[i:j]) for i in range(len(texts)) for j, _ in table.at(texts, i)), None)
        return hint or next((word for word in texts if any(stem in word for stem in entry.stems)), None)


def load_names(extra: str | None = None, source: str = "the further names") -> Names:
    """Reads the table, and a text of the same form whose entries add to it or replace those of the same key.

    Args:
        extra: YAML, as `read_names` returns it and a ledger holds it; None for no more.
        source: where it comes from, for messages.

    Raises:
        InputError: the text is of another form, or a name stands for two categories; all is named.
    """
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for place, text in ((str(NAMES_FILE), read_names(NAMES_FILE)), (source, extra)):
        if text is not None:
            entries |= _parse(place, text, problems)
    owner: dict[tuple[str, ...], str] = {}
    for category, entry in entries.items():
        for name in (*entry.names, *entry.labels):
            if owner.setdefault(key := _key(name), category) != category:
                problems.append(
                    f"{source}: {name!r} stands for {owner[key]!r} and for {category!r}; "
                    "expected names of one category each; remove it from one."
                )
    if problems:
        raise InputError(problems)
    return Names(entries)


def read_names(path: Path) -> str:
    """Returns the text of a table of names, for `load_names`.

    Raises:
        InputError: the file is unreadable.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a table of names; name another file.") from error


def _parse(source: str, text: str, problems: list[str]) -> dict[str, Entry]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"{source}: cannot be read ({error}); expected a table of names; correct it.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{source}: holds {type(content).__name__}; expected lines 'category: {_FORM}'; correct it.")
        return {}
    return {str(category): _entry(source, str(category), fields, problems) for category, fields in content.items()}


def _entry(source: str, category: str, fields: Any, problems: list[str]) -> Entry:
    fields = fields or {}
    lists = _KEYS[:-1]
    if (
        not isinstance(fields, dict)
        or set(fields) - set(_KEYS)
        or not isinstance(fields.get("sided", False), bool)
        or not all(isinstance(fields.get(key, []), list) for key in lists)
        or not all(isinstance(name, str) and words(name) for key in lists for name in fields.get(key, []))
        or not all(len(words(stem)) == 1 for stem in fields.get("stems", []))
    ):
        problems.append(f"{source}: {category}: holds {fields!r:.80}; expected {_FORM}, any of them; correct it.")
        return Entry((category,))
    return Entry(
        names=(category, *fields.get("names", [])),
        labels=tuple(fields.get("labels", [])),
        hints=tuple(fields.get("hints", [])),
        stems=tuple(words(stem)[0].text for stem in fields.get("stems", [])),
        sided=fields.get("sided", False),
    )


def _sided(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    for category, entry in entries.items():
        for side in SIDES if entry.sided else ():
            names = tuple(f"{side} {name}" for name in entry.names)
            yield f"{side} {category}", Entry(names, tuple(f"{side} {label}" for label in entry.labels), entry.hints)


@lru_cache(maxsize=4096)
def words(text: str) -> tuple[Word, ...]:
    """Returns the words of a text as they are compared: lower case, no accents, American spelling, no possessive.

    An abbreviation with dots is one word: "I.V.C." is "ivc".
    """
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = _DOTTED.sub(lambda match: match.group().replace(".", ""), plain)
    found = [match.group() for match in _WORD.finditer(plain)]
    return tuple(Word(_american(re.sub(r"['’]s$", "", word)), word.endswith(("'s", "’s"))) for word in found)


@cache
def _american(word: str) -> str:
    for british, american in _SPELLINGS:
        word = british.sub(american, word)
    return word


@lru_cache(maxsize=4096)
def _key(category: str) -> tuple[str, ...]:
    """Returns a label as it is looked up, its side first: "kidney_left", "Left-Kidney" are ("left", "kidney")."""
    return tuple(_side_first(list(_split(category))))


def _side_first(parts: list[str]) -> list[str]:
    sides = [part for part in parts if part.lower() in SIDES]
    # "heart ventricle left" keeps its order behind the side: names.yaml has "left heart ventricle".
    return sides + [part for part in parts if part.lower() not in SIDES] if len(sides) == 1 else parts


class _Forms:
    """The word sequences that stand for categories: names and their plurals."""

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        """Takes pairs of a name and the category that it stands for; of two equal names the later counts."""
        self._categories = {form: category for name, category in names for form in _plurals(_split(name))}
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        for form in self._categories:
            lengths[form[0]].add(len(form))
        self._lengths = {first: sorted(each, reverse=True) for first, each in lengths.items()}

    def at(self, text: tuple[str, ...], start: int) -> list[tuple[int, str]]:
        """Returns the ends and the categories of the names that begin at a word, the longest first."""
        forms = [text[start : start + length] for length in self._lengths.get(text[start], ())]
        return [(start + len(form), self._categories[form]) for form in forms if form in self._categories]


@lru_cache(maxsize=4096)
def _some_forms(names: tuple[str, ...]) -> _Forms:
    return _Forms((name, name) for name in names)


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.text for word in words(text))


@cache
def _plurals(name: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Returns a name and its plurals: of its last word, and of the word before "of" ("heads of the femur")."""
    *front, last = name
    forms = [name, *((*front, plural) for plural in _noun_plurals(last))]
    if "of" in name[1:]:
        place = name.index("of") - 1
        forms += [(*name[:place], plural, *name[place + 1 :]) for plural in _noun_plurals(name[place])]
    return tuple(forms)


def _noun_plurals(noun: str) -> tuple[str, ...]:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    classical = [noun[: -len(end)] + plural for end, plurals in _ENDINGS if noun.endswith(end) for plural in plurals]
    if classical:
        return tuple(classical)
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return (f"{noun}es",)
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return (f"{noun[:-1]}ies",)
    if noun.endswith("f"):
        return f"{noun}s", f"{noun[:-1]}ves"
    return (f"{noun}s",)
