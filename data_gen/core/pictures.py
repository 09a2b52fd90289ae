"""An item's image and mask as pixels, and as the PNGs that the review page overlays.

Shapes: H, W image; h, w overlay.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_gen.core.items import Item
from medisee.foundation.errors import InputError
from medisee.foundation.files import inside, sha256
from medisee.records.images import read_image
from medisee.records.manifest import read_mask
from medisee.records.masks import decode_mask

_COLOR = (230, 159, 0)
_FILL = 90  # of 255: the image below must stay visible
_LINE = 2
_SHORTEST_SIDE_SHOWN = 640


def item_image(item: Item, root: Path) -> NDArray[np.uint8]:
    """Reads an item's image (H, W, 3), RGB.

    Raises:
        InputError: it is missing, cannot be read, is outside the root, or is not the one that the item was made from.
    """
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
    """Reads an item's mask (H, W).

    Raises:
        InputError: it is missing, cannot be read, is outside the root, differs from the image in size, or is not the
            one that the item was made from.
    """
    where, size = f"item {item.id!r}", (item.height, item.width)
    if isinstance(item.mask, str):
        path, named = inside(root, item.mask, where), f"{where}: mask {item.mask!r}"
        mask = read_mask(path, named, root, size)
        _check_content(path, item.mask_sha256, named)
        return mask
    mask = decode_mask(item.mask)
    if mask.shape != size:
        raise InputError(
            f"{where}: its mask is {mask.shape[1]} x {mask.shape[0]} (width x height); expected the image's "
            f"{item.width} x {item.height}; start a new ledger from a correct manifest."
        )
    return mask


def _check_content(path: Path, expected: str, where: str) -> None:
    if expected and (found := sha256(path)) != expected:
        raise InputError(
            f"{where} has the SHA-256 {found[:12]}...; expected {expected[:12]}..., as when the ledger was created; "
            "put the old file back or start a new ledger."
        )


def image_png(item: Item, root: Path) -> bytes:
    """Returns an item's image as PNG, in its original size; raises like `item_image`."""
    return _png(Image.fromarray(item_image(item, root)))


def mask_png(item: Item, root: Path) -> bytes:
    """Returns an item's mask as a PNG overlay: filled lightly, with a solid contour.

    It is enlarged by a whole number, so that the contour is thin on a small image, too; raises like `item_mask`.
    """
    mask = item_mask(item, root)
    scale = max(1, math.ceil(_SHORTEST_SIDE_SHOWN / max(mask.shape)))
    large = mask.repeat(scale, axis=0).repeat(scale, axis=1)
    picture_hw4 = np.zeros((*large.shape, 4), np.uint8)
    picture_hw4[..., :3] = _COLOR
    picture_hw4[large, 3] = _FILL
    picture_hw4[_contour(large), 3] = 255
    return _png(Image.fromarray(picture_hw4))


def _contour(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = np.pad(mask, _LINE)
    for _ in range(_LINE):
        shifted = [np.roll(inner, step, axis) for axis in (0, 1) for step in (1, -1)]
        inner = np.logical_and.reduce([inner, *shifted])
    return mask & ~inner[_LINE:-_LINE, _LINE:-_LINE]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
