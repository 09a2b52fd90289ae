"""Images on their way to a model: named by their hash in a stored request, sent as base64 in a data URL."""

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
    """Returns an image's SHA-256 and its path relative to the root, which name it in a request.

    Raises:
        InputError: it cannot be read.
    """
    path = inside(root, image, "the ledger")
    try:
        return sha256(path), image
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image; check --root.") from error


def with_pixels(body: dict[str, Any], root: Path) -> dict[str, Any]:
    """Returns a request's body with each image in it as a data URL of an 8-bit PNG, as a viewer shows it.

    Raises:
        InputError: an image cannot be read, or has changed since the request was made.
    """

    def filled(content: Any) -> Any:
        return [_part(part, root) for part in content] if isinstance(content, list) else content

    return {**body, "messages": [{**each, "content": filled(each["content"])} for each in body["messages"]]}


def _part(part: dict[str, Any], root: Path) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    digest, _, name = part["image_url"]["url"].removeprefix(IMAGE_PREFIX).partition(":")
    if identify(root, name)[0] != digest:
        raise InputError(f"{root / name}: has changed since this run read it; restore the image or start a new ledger.")
    data = io.BytesIO()
    Image.fromarray(read_image(root / name)).save(data, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}
