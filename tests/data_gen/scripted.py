"""An author that says what a test wants, and what runs with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_server import answer

from data_gen.core.calls import Reply, Request
from data_gen.core.items import Item
from data_gen.core.names import load_names
from data_gen.core.recipe import Outcome, Recipe
from data_gen.ledger.ledger import Ledger
from data_gen.pipeline.asking import Asker
from data_gen.pipeline.stages import make

Say = Callable[[Request], "dict[str, Any] | Reply | Exception"]


class Author:
    """Says what a function says, and remembers what it was asked."""

    def __init__(self, say: Say) -> None:
        self.say, self.asked = say, list[Request]()

    async def send(self, request: Request) -> Reply:
        self.asked.append(request)
        await asyncio.sleep(0)
        said = self.say(request)
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, Reply) else Reply(status="ok", text=json.dumps(said), price=0.01)

    def stages(self) -> list[str]:
        """Returns the stages that were asked for, "+" for each time again."""
        return [each.stage + "+" * each.fields["attempt"] for each in self.asked]


def usual(request: Request) -> dict[str, Any]:
    """Says what keeps the rules."""
    return answer(request.body, 0.0)


def keeping(request: Request) -> dict[str, Any]:
    """Says what keeps the rules and lets every description pass."""
    if request.stage != "revise":
        return usual(request)
    kept = [{"cell": cell, "verdict": "keep", "text": "", "reason": "good"} for cell in request.fields["descriptions"]]
    return {"descriptions": kept}


def recipe(root: Path, **changes: Any) -> Recipe:
    return Recipe(**{"model": "m", "names": load_names(), "root": root, "variants": 1, **changes})


def run(item: Item, made_with: Recipe, ledger: Ledger, author: Author, **how: Any) -> Outcome:
    asker = Asker(ledger.answers, author, author, **how)
    return asyncio.run(make(item, made_with, asker))
