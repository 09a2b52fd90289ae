"""What tokens cost, and how many tokens a request is expected to have.

Models behind an API have no tokenizer here, so characters are counted. With the tokenizer of SmolLM2 (49 k entries) our
prompts have 3.5 to 3.9 characters per token, answers 3.7 to 4.9; larger vocabularies have a bit more. So `CHARACTERS`
is right within a tenth or two. Limits that must not be exceeded are computed with `FEWEST_CHARACTERS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from data_gen.core.schemas import reasons
from medisee.foundation.errors import InputError, nearest
from medisee.foundation.yaml_files import parse_yaml

FILE = Path(__file__).with_name("prices.yaml")
CHARACTERS = 3.8
FEWEST_CHARACTERS = 2.5
_MESSAGE_TOKENS = 4  # what a chat format adds to each message


class Price(BaseModel):
    """The price of one model, in US dollars per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0)
    cached: float = Field(ge=0)
    output: float = Field(ge=0)
    batch_input: float = Field(ge=0)
    batch_output: float = Field(ge=0)
    image_tokens: int = Field(default=765, ge=0)

    def of(self, tokens_in: float, tokens_cached: float, tokens_out: float, *, batch: bool = False) -> float:
        """Returns the cost in US dollars; `tokens_in` includes `tokens_cached`."""
        if batch:
            return (tokens_in * self.batch_input + tokens_out * self.batch_output) / 1e6
        fresh = tokens_in - tokens_cached
        return (fresh * self.input + tokens_cached * self.cached + tokens_out * self.output) / 1e6


# The price of the offline author and of your own servers.
FREE = Price(input=0, cached=0, output=0, batch_input=0, batch_output=0)


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a request."""

    characters: int  # of all texts, with the schema, which servers put into the prompt
    messages: int
    images: int
    answer: int  # the most tokens of it

    def tokens(self, price: Price, characters: float = CHARACTERS) -> float:
        """Returns the tokens of the prompt, given the characters per token."""
        return self.characters / characters + self.messages * _MESSAGE_TOKENS + self.images * price.image_tokens

    def most(self, price: Price, *, batch: bool = False) -> float:
        """Returns the most that the request can cost, in US dollars."""
        return price.of(self.tokens(price, FEWEST_CHARACTERS), 0, self.answer, batch=batch)


def size_of(body: Mapping[str, Any]) -> Size:
    """Measures the body of a request."""
    contents = [message["content"] for message in body["messages"]]
    parts = [part for each in contents for part in (each if isinstance(each, list) else [{"text": each}])]
    characters = sum(len(part.get("text", "")) for part in parts)
    if form := body.get("response_format"):
        characters += len(json.dumps(form))
    images = sum(part.get("type") == "image_url" for part in parts)
    return Size(characters, len(contents), images, body.get("max_completion_tokens") or body.get("max_tokens") or 0)


def load_prices(extra: Path | None = None) -> dict[str, Price]:
    """Reads our price table and, over it, the user's."""
    form = "a mapping from model names to input, cached, output, batch_input and batch_output"
    prices: dict[str, Price] = {}
    for path in filter(None, (FILE, extra)):
        try:
            content = parse_yaml(path.read_bytes())
            prices |= TypeAdapter(dict[str, Price]).validate_python(content)
        except ValidationError as error:
            raise InputError(f"{path}: {reason}; expected {form}; correct it." for reason in reasons(error)) from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable price table ({error}); expected {form}; correct it.") from error
    return prices


def find_price(prices: dict[str, Price], model: str) -> Price:
    """Returns the price of a model, or of the model that it is a dated version of."""
    if price := prices.get(model) or prices.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)):
        return price
    raise InputError(
        f"--model {model}: no price is known for it;{nearest(model, prices)} Add one with --prices FILE (in the form of"
        " data_gen/core/prices.yaml), or pass --free when the server is your own."
    )
