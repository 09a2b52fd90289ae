"""An item's image and mask as pixels, as the PNGs that the review page overlays, and on their way to a model.

Shapes: H, W image; h, w overlay.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_gen.core.calls import IMAGE_PREFIX
from data_gen.core.items import Item
from medisee.evaluation.drawing import PREDICTION, contour
from medisee.foundation.errors import InputError
from medisee.foundation.files import inside, sha256
from medisee.records.images import read_image
from medisee.records.masks import check_size, decode_mask, read_mask

_FILL = 90  # of 255: the image below must stay visible
_SHORTEST_SIDE_SHOWN = 640


def item_image(item: Item, root: Path) -> NDArray[np.uint8]:
    """Reads an item's image (H, W, 3), RGB; it must be the one that the item was made from."""
    path, where = inside(root, item.image, f"item {item.id!r}"), f"item {item.id!r}: image {item.image!r}"
    image = read_image(path)
    if image.shape[:2] != (item.height, item.width):
        raise InputError(
            f"{where} is {image.shape[1]} x {image.shape[0]} (width x height); expected {item.width} x {item.height}, "
            "as when the ledger was created; put the old file back."
        )
    _check_content(path, item.image_sha256, where)
    return image


def item_mask(item: Item, root: Path) -> NDArray[np.bool_]:
    """Reads an item's mask (H, W); it must be the one that the item was made from."""
    where, size = f"item {item.id!r}", (item.height, item.width)
    if isinstance(item.mask, str):
        path, named = inside(root, item.mask, where), f"{where}: mask {item.mask!r}"
        mask = read_mask(path, named, size)
        _check_content(path, item.mask_sha256, named)
        return mask
    check_size(item.mask.size, size, f"{where}: mask (RLE)")
    return decode_mask(item.mask)


def _check_content(path: Path, expected: str, where: str) -> None:
    if expected and (found := sha256(path)) != expected:
        raise InputError(
            f"{where} has the SHA-256 {found[:12]}...; expected {expected[:12]}..., as when the ledger was created; "
            "put the old file back or start a new ledger."
        )


def image_png(item: Item, root: Path) -> bytes:
    """Returns an item's image as PNG, in its original size."""
    return _png(item_image(item, root))


def mask_png(item: Item, root: Path) -> bytes:
    """Returns an item's mask as a PNG overlay, enlarged by a whole number: filled lightly, with a solid, thin contour."""
    mask = item_mask(item, root)
    scale = max(1, math.ceil(_SHORTEST_SIDE_SHOWN / max(mask.shape)))
    large = mask.repeat(scale, axis=0).repeat(scale, axis=1)
    picture_hw4 = np.zeros((*large.shape, 4), np.uint8)
    picture_hw4[..., :3] = PREDICTION
    picture_hw4[large, 3] = _FILL
    picture_hw4[contour(large), 3] = 255
    return _png(picture_hw4)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def identify(root: Path, image: str) -> tuple[str, str]:
    """Returns an image's SHA-256 and its path relative to the root, which name it in a stored request."""
    path = inside(root, image, "the ledger")
    try:
        return sha256(path), image
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image; check --root.") from error


def with_pixels(body: dict[str, Any], root: Path) -> dict[str, Any]:
    """Returns a request's body with each image in it as a data URL of an 8-bit PNG, as a viewer shows it."""

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image_url":
            return part
        digest, _, name = part["image_url"]["url"].removeprefix(IMAGE_PREFIX).partition(":")
        if identify(root, name)[0] != digest:
            raise InputError(
                f"{root / name}: has changed since this run read it; restore the image or start a new ledger."
            )
        url = f"data:image/png;base64,{base64.b64encode(_png(read_image(root / name))).decode('ascii')}"
        return {"type": "image_url", "image_url": {"url": url}}

    contents = [message["content"] for message in body["messages"]]
    shown = [[filled(part) for part in each] if isinstance(each, list) else each for each in contents]
    messages = zip(body["messages"], shown, strict=True)
    return {**body, "messages": [{**message, "content": content} for message, content in messages]}
