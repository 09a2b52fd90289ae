"""The names of categories: the curated table `names.yaml`, and where a text contains one of its names.

Names count as whole words, in any case, with any hyphens or white space between their words, in the singular and the
plural, in British and American spelling. Where several begin at the same word the longest counts: "left kidney cyst"
is not the left kidney.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from medisee.foundation.errors import InputError
from medisee.foundation.yaml_files import parse_yaml

NAMES_FILE = Path(__file__).with_name("names.yaml")
SIDES = ("left", "right")

_FORM = "{names: [...], labels: [...], hints: [...], stems: [...], sided: true}"
_WORD = re.compile(r"[^\W_]+(?:['’]s\b)?")
_DOTTED = re.compile(r"(?<![\w.])[^\W\d_](?:\.[^\W\d_])+(?!\w)\.?")  # "I.V.C."
# The British stem and the American one; words are compared in the American spelling.
_STEMS = (
    "oesoph esoph, oedem edem, ^foet fet, haem hem, aemi emi, caec cec, coeli celi, paed ped, tumour tumor, "
    "colour color, neighbour neighbor, grey gray, centre center, fibre fiber, litre liter"
)
_SPELLINGS = [(re.compile(british), american) for british, american in map(str.split, _STEMS.split(","))]
_IRREGULAR = {
    "tooth": "teeth",
    "foot": "feet",
    "vertebra": "vertebrae vertebras",
    "meniscus": "menisci meniscuses",
    "plexus": "plexuses plexi",
    "chiasma": "chiasmata chiasmas",
    "corpus": "corpora",
    "callosum": "callosa",
    "matter": "",
}
_ENDINGS = (  # of a noun, then of its plural
    *(("us", "i"), ("us", "uses"), ("um", "a"), ("um", "ums"), ("a", "ae"), ("a", "as"), ("is", "es")),
    *(("ix", "ices"), ("ix", "ixes"), ("ex", "ices"), ("ex", "exes"), ("ma", "mata"), ("ma", "mas")),
)


@dataclass(frozen=True, slots=True)
class Word:
    text: str  # as it is compared
    owns: bool  # it ended in 's


@dataclass(frozen=True, slots=True)
class Mention:
    category: str  # which the words of a text name from `start` to before `stop`
    start: int
    stop: int


def _with_a_word(name: str) -> str:
    if not words(name):
        raise ValueError("it contains no word")
    return name


def _one_word(stem: str) -> str:
    (word,) = words(stem)
    return word.text


_Name = Annotated[str, AfterValidator(_with_a_word)]


class Entry(BaseModel):
    """A category of the table."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    names: list[_Name] = []  # nouns that name it; the first is the one that answers use
    labels: list[_Name] = []  # other names in data sets; too general to be searched for in a text
    hints: list[_Name] = []  # words that give it away in a description, though they do not name it
    stems: list[Annotated[str, AfterValidator(_one_word)]] = []  # parts that give it away: "splen" in "splenectomy"
    sided: bool = False  # there is a left and a right one


class Names:
    """The names of all categories. A category that is not in the table has its own label as its name."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        sided = {
            f"{side} {category}": Entry(
                names=[f"{side} {name}" for name in entry.names],
                labels=[f"{side} {name}" for name in entry.labels],
                hints=entry.hints,
            )
            for category, entry in entries.items()
            for side in (SIDES if entry.sided else ())
        }
        self._entries = {**entries, **sided}
        self._labels = {
            _key(name): category
            for category, entry in reversed(self._entries.items())  # so that the earlier one counts
            for name in (*entry.labels, *entry.names)
        }
        self._forms = _Forms((name, category) for category, entry in self._entries.items() for name in entry.names)
        # Several rules look for names in the same text.
        self._mentions = lru_cache(maxsize=4096)(self._find)

    def __contains__(self, category: str) -> bool:
        """Returns whether the table has the category, under any of its names or labels."""
        return _key(category) in self._labels

    def canonical(self, category: str) -> str:
        """Returns the name that answers use: "kidney_left" is the "left kidney", "IVC" the "inferior vena cava"."""
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
        """Returns all names of a category that answers may use, the canonical one first, without plurals."""
        name = self.canonical(category)
        return tuple(self._entries[name].names) if name in self._entries else (name,)

    def find(self, text: tuple[Word, ...], categories: Iterable[str] = ()) -> tuple[Mention, ...]:
        """Returns where a text names a category, in order; of overlapping names the first and then the longest."""
        return self._mentions(text, tuple(self.canonical(category) for category in categories if category not in self))

    def _find(self, text: tuple[Word, ...], unknown: tuple[str, ...]) -> tuple[Mention, ...]:
        tables = [self._forms, _some_forms(unknown)] if unknown else [self._forms]
        texts = tuple(word.text for word in text)
        found: list[Mention] = []
        for place in range(len(texts)):
            spans = [span for table in tables for span in table.at(texts, place)]
            if spans and (not found or place >= found[-1].stop):
                stop, category = max(spans, key=lambda span: span[0])
                found.append(Mention(category, place, stop))
        return tuple(found)

    def betrays(self, text: str, category: str) -> str | None:
        """Returns the words that name a category (with any side or none) or give it away, None when there are none."""
        spoken = words(text)
        own, base = self.canonical(category), self.base(category)
        sides = {own, base, *(f"{side} {base}" for side in SIDES if self.side(category))}
        if category not in self:  # "vertebrae L1" is given away by "vertebra"
            sides |= {mention.category for mention in self.find(words(own))}
        texts = tuple(word.text for word in spoken)
        for mention in self.find(spoken, [category]):
            if mention.category in sides:
                return " ".join(texts[mention.start : mention.stop])
        entry = self._entries.get(base) or Entry()
        table = _some_forms((base, *entry.hints))  # a name within a longer one counts too: "liver" in "liver tumor"
        hint = next((" ".join(texts[i:j]) for i in range(len(texts)) for j, _ in table.at(texts, i)), None)
        return hint or next((word for word in texts if any(stem in word for stem in entry.stems)), None)


def load_names(extra: str | None = None, source: str = "the further names") -> Names:
    """Reads the table, and YAML in the same form whose entries add to it or replace those of the same key."""
    problems: list[str] = []
    entries = _parse(str(NAMES_FILE), read_names(NAMES_FILE), problems)
    if extra is not None:
        entries |= _parse(source, extra, problems)
    owner: dict[tuple[str, ...], str] = {}
    for category, entry in entries.items():
        for name in (*entry.names, *entry.labels):
            if (other := owner.setdefault(_key(name), category)) != category:
                problems.append(
                    f"{source}: {name!r} stands for {other!r} and for {category!r}; expected names of one category "
                    "each; remove it from one."
                )
    if problems:
        raise InputError(problems)
    return Names(entries)


def read_names(path: Path) -> str:
    """Returns the text of a table of names, for `load_names`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a table of names; name another file.") from error


def _parse(source: str, text: str, problems: list[str]) -> dict[str, Entry]:
    try:
        content: Any = parse_yaml(text)
    except ValueError as error:
        problems.append(f"{source}: cannot be read ({error}); expected a table of names; correct it.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{source}: holds {type(content).__name__}; expected lines 'category: {_FORM}'; correct it.")
        return {}
    entries: dict[str, Entry] = {}
    for category, fields in content.items():
        try:
            entry = Entry.model_validate(fields or {})
            entries[str(category)] = entry.model_copy(update={"names": [str(category), *entry.names]})
        except ValidationError:
            problems.append(f"{source}: {category}: holds {fields!r:.80}; expected {_FORM}, any of them; correct it.")
    return entries


@lru_cache(maxsize=4096)
def words(text: str) -> tuple[Word, ...]:
    """Returns the words of a text in lower case and American spelling, without accents, 's and dots ("ivc")."""
    plain = "".join(each for each in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(each))
    found = _WORD.findall(_DOTTED.sub(lambda match: match.group().replace(".", ""), plain))
    return tuple(Word(_american(re.sub(r"['’]s$", "", word)), word.endswith(("'s", "’s"))) for word in found)


@cache
def _american(word: str) -> str:
    for british, american in _SPELLINGS:
        word = british.sub(american, word)
    return word


@lru_cache(maxsize=4096)
def _key(category: str) -> tuple[str, ...]:
    """Returns a label as a key, its side first: "kidney_left" and "Left-Kidney" are ("left", "kidney")."""
    return tuple(_side_first(_split(category)))


def _side_first(parts: Sequence[str]) -> list[str]:
    sides = [part for part in parts if part.lower() in SIDES]
    # "heart ventricle left" keeps its order behind the side: names.yaml has "left heart ventricle".
    return sides + [part for part in parts if part.lower() not in SIDES] if len(sides) == 1 else list(parts)


class _Forms:
    """The word sequences that stand for categories: names and their plurals."""

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        """Takes pairs of a name and its category; of two equal names the later counts."""
        self._categories = {form: category for name, category in names for form in _plurals(_split(name))}
        self._lengths: defaultdict[str, set[int]] = defaultdict(set)
        for form in self._categories:
            self._lengths[form[0]].add(len(form))

    def at(self, text: tuple[str, ...], start: int) -> list[tuple[int, str]]:
        """Returns the ends and the categories of the names that begin at a word, the longest first."""
        forms = [text[start : start + length] for length in sorted(self._lengths.get(text[start], ()), reverse=True)]
        return [(start + len(form), self._categories[form]) for form in forms if form in self._categories]


@lru_cache(maxsize=4096)
def _some_forms(names: tuple[str, ...]) -> _Forms:
    return _Forms((name, name) for name in names)


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.text for word in words(text))


@cache
def _plurals(name: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns a name and its plurals: of its last word, and of the word before "of" ("heads of the femur")."""
    places = [len(name) - 1, *([name.index("of") - 1] if "of" in name[1:] else [])]
    changed = [(*name[:place], plural, *name[place + 1 :]) for place in places for plural in _noun_plurals(name[place])]
    return [name, *changed]


def _noun_plurals(noun: str) -> list[str]:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun].split()
    if classical := [noun.removesuffix(end) + plural for end, plural in _ENDINGS if noun.endswith(end)]:
        return classical
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return [f"{noun}es"]
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return [f"{noun[:-1]}ies"]
    return [f"{noun}s", f"{noun[:-1]}ves"] if noun.endswith("f") else [f"{noun}s"]
