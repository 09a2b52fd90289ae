"""What tokens cost, and how many a request has before anybody has counted them.

There is no tokenizer here for models behind an API, so characters are counted. With the tokenizer of SmolLM2 (49 k
entries) our prompts have 3.5 to 3.9 characters a token, answers 3.7 to 4.9; those of larger vocabularies have a little
more. `CHARACTERS` is thus right within a tenth or two. What must not be exceeded is counted with `FEWEST_CHARACTERS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from medisee.foundation.errors import InputError, nearest

FILE = Path(__file__).with_name("prices.yaml")
CHARACTERS = 3.8
FEWEST_CHARACTERS = 2.5
_MESSAGE_TOKENS = 4  # what a chat format adds to each message
_DATED = re.compile(r"-\d{4}-\d{2}-\d{2}$")


class Price(BaseModel):
    """Of one model, in US dollars per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0)
    cached: float = Field(ge=0)
    output: float = Field(ge=0)
    batch_input: float = Field(ge=0)
    batch_output: float = Field(ge=0)
    image_tokens: int = Field(default=765, ge=0)

    def of(self, tokens_in: float, tokens_cached: float, tokens_out: float, *, batch: bool = False) -> float:
        """Returns what so many tokens cost, in US dollars; `tokens_cached` is a part of `tokens_in`."""
        if batch:
            return (tokens_in * self.batch_input + tokens_out * self.batch_output) / 1e6
        fresh = tokens_in - tokens_cached
        return (fresh * self.input + tokens_cached * self.cached + tokens_out * self.output) / 1e6


FREE = Price(input=0, cached=0, output=0, batch_input=0, batch_output=0)
"""Of the offline author and of servers of one's own."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a request is: its characters of text, its messages, its images, and the most tokens of an answer."""

    characters: int
    messages: int
    images: int
    answer: int

    def tokens(self, price: Price, characters: float = CHARACTERS) -> float:
        """Returns the tokens of the prompt at so many characters a token."""
        return self.characters / characters + self.messages * _MESSAGE_TOKENS + self.images * price.image_tokens

    def most(self, price: Price, *, batch: bool = False) -> float:
        """Returns what the request can cost at most, in US dollars."""
        return price.of(self.tokens(price, FEWEST_CHARACTERS), 0, self.answer, batch=batch)


def size_of(body: Mapping[str, Any]) -> Size:
    """Measures the body of a request; a schema counts, since servers put it into the prompt."""
    characters = images = 0
    for message in body["messages"]:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        characters += sum(len(part.get("text", "")) for part in parts)
        images += sum(part.get("type") == "image_url" for part in parts)
    if form := body.get("response_format"):
        characters += len(json.dumps(form))
    answer = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return Size(characters, len(body["messages"]), images, answer)


def load_prices(extra: Path | None = None) -> dict[str, Price]:
    """Reads our price table and, over it, the user's.

    Raises:
        InputError: a file cannot be read or has another form.
    """
    prices = _read(FILE)
    return prices if extra is None else {**prices, **_read(extra)}


def find_price(prices: dict[str, Price], model: str) -> Price:
    """Returns the price of a model or of the model that it is a dated version of.

    Raises:
        InputError: the table has no price for it.
    """
    if price := prices.get(model) or prices.get(_DATED.sub("", model)):
        return price
    raise InputError(
        f"--model {model}: no price is known for it;{nearest(model, prices)} Add one with --prices FILE (the form of "
        "data_gen/core/prices.yaml), or say --free when the server is your own."
    )


def _read(path: Path) -> dict[str, Price]:
    form = "a mapping from model names to input, cached, output, batch_input and batch_output"
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, Price]).validate_python(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable price table ({error}); expected {form}; correct it.") from error
    except ValidationError as error:
        raise InputError(
            f"{path}: {'.'.join(str(part) for part in each['loc'])}: {each['msg']}; expected {form}; correct it."
            for each in error.errors()
        ) from error
