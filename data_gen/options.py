"""The options that `plan` and `run` share: what to make, from what, by whom, at which price."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from data_gen.authors.client import CAPTION_KEY, KEY, is_same
from data_gen.core.captions import read_captions
from data_gen.core.names import load_names, read_names
from data_gen.core.prices import FREE, Price, find_price, load_prices
from data_gen.core.prompts import MOST_VARIANTS
from data_gen.core.recipe import OFFLINE, Recipe
from medisee.foundation.errors import InputError
from medisee.foundation.files import sha256
from medisee.records.manifest import Manifest

LOCAL = "local:"
_SCHEMAS = ("strict", "json_object", "none")


@dataclass(frozen=True, slots=True)
class Made:
    """What the options come to: the images, the recipe, the further names as YAML, and the prices of the two models."""

    manifest: Manifest
    recipe: Recipe
    names: str | None
    price: Price
    caption_price: Price


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the shared options to a command's parser."""
    add = parser.add_argument_group("what to make").add_argument
    add("--records", type=Path, required=True, metavar="FILE", help="manifest of images, masks and labels (JSON Lines)")
    add("--root", type=Path, metavar="DIR", help="folder that its paths are relative to (default: the manifest's)")
    add(
        "--style",
        choices=("single", "multi-turn"),
        default="single",
        help="questions or conversations (default: single)",
    )
    add("--variants", type=int, default=2, metavar="N", help="passes of each of the two templates (default: 2)")
    add("--again", type=int, default=2, metavar="K", help="asks again for what breaks a rule, K times (default: 2)")
    add("--limit", type=int, metavar="N", help="only the first N images (default: all)")
    add("--seed", type=int, default=0, help="of the drawn targets and wordings (default: 0)")
    add(
        "--names",
        type=Path,
        metavar="FILE",
        help="further names of categories, in the form of data_gen/core/names.yaml",
    )
    add = parser.add_argument_group("by whom").add_argument
    add("--model", metavar="NAME", help=f"the model that writes, as gpt-4o; its key is read from {KEY}")
    add("--author", choices=(OFFLINE,), help="instead of a model: what the package knows by itself, free of charge")
    add("--base-url", metavar="URL", help="another OpenAI-compatible server, as http://127.0.0.1:8000/v1")
    add("--schema", choices=_SCHEMAS, default="strict", help="how the server is held to the JSON (default: strict)")
    add("--temperature", type=float, metavar="T", help="of the model (default: the server's)")
    add("--captioner", metavar="NAME", help=f"a vision model for captions, or {LOCAL}FOLDER of a Llava (default: none)")
    add(
        "--caption-url",
        metavar="URL",
        help=f"the captioner's server, whose key is read from {CAPTION_KEY} (default: as --base-url, with the same key)",
    )
    add("--caption-schema", choices=_SCHEMAS, help="the same for the captioner (default: as --schema)")
    add("--captions", type=Path, metavar="FILE", help="given captions: JSON Lines of record and caption")
    add = parser.add_argument_group("at which price").add_argument
    add("--prices", type=Path, metavar="FILE", help="further prices, in the form of data_gen/core/prices.yaml")
    add("--free", action="store_true", help="the server is your own: nothing costs anything")


def make(arguments: argparse.Namespace) -> Made:
    """Checks the options and reads the files that they name.

    Raises:
        InputError: an option or a file is wrong.
    """
    _check(arguments)
    price, caption_price = _prices(arguments)
    manifest = Manifest(arguments.records, arguments.root)
    model = OFFLINE if arguments.author else arguments.model
    names = read_names(arguments.names) if arguments.names else None
    is_openai = is_same(arguments.base_url, None)
    recipe = Recipe(
        model=model,
        names=load_names(names, str(arguments.names)),
        root=manifest.root,
        style=arguments.style,
        mode=arguments.schema,
        caption_mode=arguments.caption_schema or arguments.schema,
        again=arguments.again,
        variants=arguments.variants,
        captioner=OFFLINE if arguments.author else _name_only(arguments.captioner),
        captions=read_captions(arguments.captions) if arguments.captions else {},
        # OpenAI's newer models know only the one name, most other servers only the older one.
        limit_name="max_completion_tokens" if is_openai else "max_tokens",
        parameters={} if arguments.temperature is None else {"temperature": arguments.temperature},
        seed=arguments.seed,
    )
    return Made(manifest, recipe, names, price, caption_price)


def fixed_settings(arguments: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Returns the settings that all runs of a ledger share; files stand with their hash, not their path."""
    return {
        "records": sha256(arguments.records),
        "seed": recipe.seed,
        "model": recipe.model,
        "schema": recipe.mode,
        "caption_schema": recipe.caption_mode,
        # By `limit_name` alone, so that one may go from one server of one's own to another.
        "base_url": "OpenAI's" if recipe.limit_name == "max_completion_tokens" else "another",
        "again": recipe.again,
        "variants": recipe.variants,
        "parameters": dict(recipe.parameters),
        "captioner": recipe.captioner,
        "captions": sha256(arguments.captions) if arguments.captions else None,
        "names": sha256(arguments.names) if arguments.names else None,
        "prompts": _prompts_hash(),
    }


def _name_only(captioner: str | None) -> str | None:
    """Returns a captioner's name; of a local one the folder's last part only."""
    if captioner is None or not captioner.startswith(LOCAL):
        return captioner
    return LOCAL + Path(captioner.removeprefix(LOCAL)).name


def _prompts_hash() -> str:
    folder = Path(__file__).with_name("prompts")
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.txt")):
        digest.update(f"{path.name}\n{path.read_text(encoding='utf-8')}".encode())
    return digest.hexdigest()


def _prices(arguments: argparse.Namespace) -> tuple[Price, Price]:
    prices = load_prices(arguments.prices)

    def price(name: str | None) -> Price:
        if arguments.free or name is None or name.startswith(LOCAL):
            return FREE
        return find_price(prices, name)

    return price(arguments.model), price(arguments.captioner)


def _check(arguments: argparse.Namespace) -> None:
    problems: list[str] = []
    if (arguments.model is None) == (arguments.author is None):
        problems.append("expected either --model NAME or --author offline; name one of them.")
    if arguments.author and (arguments.captioner or arguments.base_url):
        problems.append("--author offline asks nobody; leave out --captioner and --base-url.")
    if arguments.captions and arguments.captioner:
        problems.append("expected either --captions or --captioner; leave one out.")
    problems += [
        f"{name} {url!r}: expected an address as http://127.0.0.1:8000/v1; correct it."
        for name, url in (("--base-url", arguments.base_url), ("--caption-url", arguments.caption_url))
        if url is not None and not _is_address(url)
    ]
    bounds = {"variants": (1, MOST_VARIANTS), "again": (0, 10), "limit": (1, None), "temperature": (0, 2)}
    for name, (least, most) in bounds.items():
        value = getattr(arguments, name)
        if value is not None and not (least <= value and (most is None or value <= most)):
            expected = f"{least} or more" if most is None else f"{least} to {most}"
            problems.append(f"--{name} is {value}; expected {expected}; correct it.")
    if problems:
        raise InputError(problems)


def _is_address(url: str) -> bool:
    try:
        httpx2.URL(url)  # which is what is sent to; it takes "http://[" for the name of a host
        parsed = urlsplit(url)
        return parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0
    except (httpx2.InvalidURL, ValueError):
        return False
