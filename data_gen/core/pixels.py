"""Images on their way to a model: known by their hash in a request, base64 in a data URL on the wire."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from data_gen.core.calls import IMAGE_PREFIX
from medisee.foundation.errors import InputError
from medisee.foundation.files import inside, sha256
from medisee.records.images import read_image


def identify(root: Path, image: str) -> tuple[str, str]:
    """Returns an image's sha256 and its path relative to the root: what a request names it by.

    Raises:
        InputError: it cannot be read.
    """
    path = inside(root, image, "the ledger")
    try:
        return sha256(path), image
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image; check --root.") from error


def with_pixels(body: dict[str, Any], root: Path) -> dict[str, Any]:
    """Returns a request's body with each image in it as a data URL of a PNG: 8-bit, as a viewer shows it.

    Raises:
        InputError: an image cannot be read, or is no longer the one that the request was made for.
    """
    if not any(isinstance(message["content"], list) for message in body["messages"]):
        return body
    messages = [
        {**message, "content": [_part(part, root) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in body["messages"]
    ]
    return {**body, "messages": messages}


def _part(part: dict[str, Any], root: Path) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    digest, _, name = part["image_url"]["url"].removeprefix(IMAGE_PREFIX).partition(":")
    if identify(root, name)[0] != digest:
        raise InputError(f"{root / name}: has changed since this run read it; put the old image back or start anew.")
    data = io.BytesIO()
    Image.fromarray(read_image(root / name)).save(data, format="PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"},
    }
