"""The options that `plan` and `run` share: what to make, the model and server, and pricing."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from data_gen.authors.client import CAPTION_KEY, KEY, is_same
from data_gen.core.items import read_captions
from data_gen.core.names import load_names, read_names
from data_gen.core.prices import FREE, Price, find_price, load_prices
from data_gen.core.prompts import FOLDER, MOST_VARIANTS
from data_gen.core.recipe import OFFLINE, Recipe
from medisee.foundation.command_line import a_path
from medisee.foundation.errors import InputError
from medisee.foundation.files import sha256
from medisee.records.manifest import Manifest

LOCAL = "local:"
_SCHEMAS = ("strict", "json_object", "none")
_BOUNDS = {
    "variants": (1, MOST_VARIANTS),
    "again": (0, 10),
    "limit": (1, 10**9),
    "temperature": (0, 2),
    "max_tokens": (1, 10**7),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the options amount to."""

    manifest: Manifest
    recipe: Recipe
    names: str | None  # additional ones, as YAML
    price: Price  # of the model
    caption_price: Price


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the shared options to a command's parser."""
    add = parser.add_argument_group("what to make").add_argument
    add("--records", type=a_path, required=True, metavar="FILE", help="manifest of images, masks and labels")
    add("--root", type=a_path, metavar="DIR", help="folder that its paths are relative to (default: the manifest's)")
    styles = ("single", "multi-turn")
    add("--style", choices=styles, default="single", help="single questions or conversations (default: single)")
    add("--variants", type=int, default=2, metavar="N", help="passes of each of the two templates (default: 2)")
    add("--again", type=int, default=2, metavar="K", help="retries of an answer that breaks a rule (default: 2)")
    add("--limit", type=int, metavar="N", help="use only the first N images (default: all)")
    add("--seed", type=int, default=0, help="seed of the drawn targets and wordings (default: 0)")
    add("--names", type=a_path, metavar="FILE", help="additional names of categories, as in data_gen/core/names.yaml")
    add = parser.add_argument_group("model and server").add_argument
    add("--model", metavar="NAME", help=f"the model that writes, such as gpt-4o; its key is read from {KEY}")
    add("--author", choices=(OFFLINE,), help="write offline from the package's own knowledge, without a model")
    add("--base-url", metavar="URL", help="another OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    add("--schema", choices=_SCHEMAS, default="strict", help="how the server enforces the JSON form (default: strict)")
    add("--temperature", type=float, metavar="T", help="sampling temperature of the model (default: the server's)")
    add("--reasoning-effort", metavar="LEVEL", help="how long a model thinks, such as low (default: the server's)")
    add("--max-tokens", type=int, metavar="N", help="most tokens of an answer, thoughts included (default: 200 to 800)")
    add("--captioner", metavar="NAME", help=f"a vision model for captions, or {LOCAL}FOLDER of a Llava (default: none)")
    add("--caption-url", metavar="URL", help=f"the captioner's server, key in {CAPTION_KEY} (default: --base-url)")
    add("--caption-schema", choices=_SCHEMAS, help="how the captioner's server does it (default: as --schema)")
    add("--captions", type=a_path, metavar="FILE", help="given captions: JSON Lines of record and caption")
    add = parser.add_argument_group("pricing").add_argument
    add("--prices", type=a_path, metavar="FILE", help="additional prices, in the form of data_gen/core/prices.yaml")
    add("--free", action="store_true", help="the server is your own: all prices are 0")


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """Checks the options and reads the files that they name."""
    _check(arguments)
    prices = load_prices(arguments.prices)
    price, caption_price = (
        FREE if arguments.free or name is None or name.startswith(LOCAL) else find_price(prices, name)
        for name in (arguments.model, arguments.captioner)
    )
    manifest = Manifest(arguments.records, arguments.root)
    names = read_names(arguments.names) if arguments.names else None
    captioner = OFFLINE if arguments.author else arguments.captioner
    if captioner and captioner.startswith(LOCAL):  # the folder's last part is its name
        captioner = LOCAL + Path(captioner.removeprefix(LOCAL)).name
    recipe = Recipe(
        model=arguments.author or arguments.model,
        names=load_names(names, str(arguments.names)),
        root=manifest.root,
        style=arguments.style,
        mode=arguments.schema,
        caption_mode=arguments.caption_schema or arguments.schema,
        again=arguments.again,
        variants=arguments.variants,
        captioner=captioner,
        captions=read_captions(arguments.captions) if arguments.captions else {},
        # OpenAI's newer models accept only the one name, most other servers only the older one.
        limit_name="max_completion_tokens" if is_same(arguments.base_url, None) else "max_tokens",
        parameters={
            name: value
            for name in ("temperature", "reasoning_effort")
            if (value := getattr(arguments, name)) is not None
        },
        seed=arguments.seed,
    )
    return Inputs(manifest, recipe, names, price, caption_price)


def fixed_settings(arguments: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Returns the settings that all runs of a ledger share; files appear as hashes, not paths."""
    prompts = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.txt")):
        prompts.update(f"{path.name}\n{path.read_text(encoding='utf-8')}".encode())
    return {
        "records": sha256(arguments.records),
        "seed": recipe.seed,
        "model": recipe.model,
        "schema": recipe.mode,
        "caption_schema": recipe.caption_mode,
        # Not the address, so that a run may move from one server of your own to another.
        "base_url": "OpenAI's" if recipe.limit_name == "max_completion_tokens" else "another",
        "again": recipe.again,
        "variants": recipe.variants,
        "parameters": dict(recipe.parameters),
        "captioner": recipe.captioner,
        "captions": sha256(arguments.captions) if arguments.captions else None,
        "names": sha256(arguments.names) if arguments.names else None,
        "prompts": prompts.hexdigest(),
    }


def _check(arguments: argparse.Namespace) -> None:
    problems: list[str] = []
    if (arguments.model is None) == (arguments.author is None):
        problems.append("expected either --model NAME or --author offline; name one of them.")
    if arguments.author and (arguments.captioner or arguments.base_url):
        problems.append("--author offline uses no server; leave out --captioner and --base-url.")
    if arguments.captions and arguments.captioner:
        problems.append("expected either --captions or --captioner; leave one out.")
    problems += [
        f"{name} {url!r}: expected an address such as http://127.0.0.1:8000/v1; correct it."
        for name, url in (("--base-url", arguments.base_url), ("--caption-url", arguments.caption_url))
        if url is not None and not _is_address(url)
    ]
    for name, (least, most) in _BOUNDS.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            problems.append(f"--{name.replace('_', '-')} is {value}; expected {least} to {most}; correct it.")
    for name in ("model", "captioner", "reasoning_effort"):
        value = getattr(arguments, name)
        if value is not None and not (value.strip() and value.isprintable()):
            problems.append(f"--{name.replace('_', '-')} {value!r}: expected printable characters; correct it.")
    if problems:
        raise InputError(problems)


def _is_address(url: str) -> bool:
    try:
        httpx2.URL(url)  # which requests are sent with; it takes "http://[" for the name of a host
        parsed = urlsplit(url)
        return parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0
    except (httpx2.InvalidURL, ValueError):
        return False
