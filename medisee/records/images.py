"""Reads a PNG, JPEG or TIFF of any depth as 8-bit RGB, the only form that the rest of the package knows."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from medisee.foundation.errors import InputError

FORMATS = ("PNG", "JPEG", "TIFF")
MAX_PIXELS = 1 << 26  # of a picture that is decoded: 8192 x 8192. Below Pillow's limit, so that our message is shown
PERCENTILES = (0.5, 99.5)  # of a 16 or 32-bit image, become 0 and 255: a few hot pixels must not darken all others
_OTHER_READERS = {".dcm": "DICOM", ".dicom": "DICOM", ".ima": "DICOM", ".nii": "NIfTI", ".nii.gz": "NIfTI"}
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_WHITE_IS_ZERO = 0
# What Pillow's decoders raise on broken files, besides OSError; found by flipping bytes in good ones.
_DECODE_ERRORS = (SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error)


def read_image(path: Path | str, page: int = 0) -> NDArray[np.uint8]:
    """Reads one picture as an image viewer shows it.

    8-bit values are kept as they are. Grey values of 16 or 32 bits (integer or float) are scaled so that their
    `PERCENTILES` become 0 and 255. 16-bit colour keeps its high byte. The EXIF orientation is applied; transparency is
    blended with black.

    Args:
        path: a PNG, JPEG or TIFF file: 1-bit, grey, palette, RGB, CMYK, with alpha or without.
        page: which page of a multi-page TIFF, from 0.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        InputError: the file is missing, empty, truncated, too large, not one of the formats, or has no such page.
    """
    path = Path(path)
    _check_file(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            pages = getattr(image, "n_frames", 1)
            if not 0 <= page < pages:
                raise InputError(
                    f"{path}: expected page {page}, found {pages} page(s); choose a page from 0 to {pages - 1}."
                )
            image.seek(page)
            if image.width * image.height > MAX_PIXELS:
                raise InputError(_too_large(path, f"{image.width} x {image.height}"))
            return _to_rgb(image, path)
    except UnidentifiedImageError as error:
        with path.open("rb") as handle:
            start = handle.read(8)
        raise InputError(
            f"{path}: expected a PNG, JPEG or TIFF, found a file that starts with {start!r}; convert it to PNG."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise InputError(_too_large(path, "more")) from error
    except (OSError, *_DECODE_ERRORS) as error:
        raise InputError(
            f"{path}: cannot be decoded ({error}); expected a whole PNG, JPEG or TIFF, found a truncated or damaged one; "
            "copy or export it again."
        ) from error


def _check_file(path: Path) -> None:
    suffix = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
    if kind := _OTHER_READERS.get(suffix):
        raise InputError(f"{path}: expected a PNG, JPEG or TIFF, found {kind} ({suffix}); export the slice as PNG.")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: expected an image file, found none ({error.strerror}); check the path.") from error
    if path.is_dir():
        raise InputError(f"{path}: expected an image file, found a folder; name one file in it.")
    if size == 0:
        raise InputError(f"{path}: expected a PNG, JPEG or TIFF, found an empty file (0 bytes); copy it again.")


def _too_large(path: Path, found: str) -> str:
    return f"{path}: expected at most {MAX_PIXELS:,} pixels, found {found}; crop it or scale it down."


def _to_rgb(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    image.load()
    # Pillow inverts the white-is-zero TIFFs of 1 and 8 bits, common among radiographs, but not the deep ones.
    inverted = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == _WHITE_IS_ZERO
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:
        grey = _scale(np.asarray(image).astype(np.float64), path)
        return np.repeat((255 - grey if inverted else grey)[..., None], 3, axis=2)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
    return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)


def _scale(values: NDArray[np.float64], path: Path) -> NDArray[np.uint8]:
    """Scales (H, W) values to 0..255; a pixel that is not finite becomes 0."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise InputError(f"{path}: expected finite pixel values, found none; export the image again.")
    low, high = np.percentile(finite, PERCENTILES)
    if low == high:  # a few bright pixels on a constant ground: keep them visible
        low, high = finite.min(), finite.max()
    if low == high:
        return np.zeros(values.shape, np.uint8)
    values = np.nan_to_num(values, nan=low, posinf=low, neginf=low)
    return np.rint((np.clip(values, low, high) - low) * (255 / (high - low))).astype(np.uint8)
