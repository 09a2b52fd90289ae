"""Made-up items, pairs and manifests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_gen.core.items import Entity, Item, Pair
from medisee.records.masks import encode_mask
from medisee.records.records import Perspective, Record, write_records
from medisee.records.records import Target as RecordTarget

TEXTS: dict[str, dict[Perspective, tuple[str, str, str]]] = {
    "liver": {
        "attribute": (
            "Which organ here makes bile for digestion?",
            "Which large organ in this scan makes bile, stores sugar and clears drugs from blood?",
            "It is the liver, because the liver makes bile and clears many drugs from the blood.",
        ),
        "location": (
            "What lies in the upper left of this image?",
            "Which organ lies in the upper left of this image, above the other marked one?",
            "It is the liver, because the liver lies in the upper left part of this image.",
        ),
    },
    "spleen": {
        "attribute": (
            "Which organ here filters old red blood cells?",
            "Which soft organ in this scan filters old red blood cells and keeps many immune cells?",
            "It is the spleen, because the spleen filters old blood cells and holds immune cells.",
        ),
        "location": (
            "What lies in the lower right of this image?",
            "Which organ lies in the lower right of this image, below the other marked one?",
            "It is the spleen, because the spleen lies in the lower right part of this image.",
        ),
    },
}
"""Of each category and perspective: the short question, the long one and the answer; all keep the rules."""


def an_item(folder: Path, case: int, number: int, category: str) -> Item:
    """Writes an image of 48 x 32 pixels, with the mask as a file for the liver and as an RLE for the spleen."""
    record = f"case{case}_{number}"
    masks = {name: np.zeros((32, 48), np.bool_) for name in TEXTS}
    masks["liver"][3:15, 4:20] = True
    masks["spleen"][18:30, 30:44] = True
    image = np.random.default_rng(10 * case + number).integers(0, 60, (32, 48)).astype(np.uint8)
    image[masks["liver"]] += 120
    image[masks["spleen"]] += 60
    (folder / "slices").mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"slices/{record}.png")
    Image.fromarray(masks["liver"]).save(folder / f"slices/{record}_liver.png")
    boxes = {"liver": (4 / 48, 3 / 32, 20 / 48, 15 / 32), "spleen": (30 / 48, 18 / 32, 44 / 48, 30 / 32)}
    return Item(
        id=f"{record}/{category}",
        record=record,
        target=category,
        image=f"slices/{record}.png",
        mask=f"slices/{record}_liver.png" if category == "liver" else encode_mask(masks["spleen"]),
        modality="ct",
        source="phantom",
        case=f"case{case}",
        category=category,
        box=boxes[category],
        entities=tuple(Entity(name, box) for name, box in boxes.items()),
        width=48,
        height=32,
    )


def pairs_of(item: Item, author: str = "some-model") -> list[Pair]:
    """Returns the four pairs of an item."""
    return [
        Pair(
            id=f"{item.id}#first-{perspective}-{length}",
            item=item.id,
            template="first",
            perspective=perspective,
            length=length,
            question=texts[length == "long"],
            answer=texts[2],
            author=author,
        )
        for perspective, texts in TEXTS[item.category].items()
        for length in ("short", "long")
    ]


def conversation_of(item: Item) -> list[Pair]:
    """Returns a conversation of three turns about an item; the last asks for its target."""
    short, _, answer = TEXTS[item.category]["attribute"]
    turns = [
        ("What kind of image is this?", "This is a slice of a computed tomography of the belly."),
        ("Which part of the body does it show?", "It shows the upper belly with several solid organs."),
        (short, answer),
    ]
    talk = f"{item.id}#first-attribute-short"
    return [
        Pair(
            id=f"{talk}-t{number}",
            item=item.id,
            template="first",
            perspective="attribute",
            length="short",
            question=question,
            answer=answer,
            turn=number,
            conversation=talk,
            author="some-model",
        )
        for number, (question, answer) in enumerate(turns, 1)
    ]


LedgerMaker = Callable[..., Path]


def write_manifest(folder: Path, count: int) -> Path:
    """Writes `count` records that share one image of 48 x 32 pixels, each with two different targets."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(folder / "slice.png")

    def record(number: int) -> Record:
        targets = []
        for place, category in enumerate(("left kidney", "spleen")):
            mask = np.zeros((32, 48), np.bool_)
            left, right, top, bottom = number % 6, number // 6 % 12, number // 72 % 8, number // 576 % 12
            mask[top : 12 + bottom, 20 * place + left : 20 * place + 10 + right] = True
            targets.append(RecordTarget(id=f"t{place}", category=category, mask=encode_mask(mask)))
        return Record(
            id=f"r{number:05}",
            image="slice.png",
            modality="ct",
            source="phantom",
            case=f"case{number // 2}",
            targets=tuple(targets),
        )

    write_records(folder / "records.jsonl", (record(number) for number in range(count)))
    return folder / "records.jsonl"


def placed_item(category: str = "liver", *others: str) -> Item:
    """Returns an item without files whose target is in the upper left of its image."""
    box = (0.1, 0.1, 0.4, 0.4)
    entities = [Entity(category, box), *(Entity(other, (0.6, 0.1, 0.9, 0.9)) for other in others)]
    return Item(
        id="r/t",
        record="r",
        target="t",
        image="r.png",
        mask="m.png",
        modality="ct",
        source="s",
        case="c",
        category=category,
        box=box,
        entities=tuple(entities),
        width=64,
        height=64,
    )
