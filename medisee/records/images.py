"""The single entry point for image files: how one is opened, checked, turned and scaled, be it an image, its size or a mask."""

from __future__ import annotations

import re
import stat
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from medisee.foundation.errors import InputError, first_line

FORMATS = ("PNG", "JPEG", "TIFF")
MAX_PIXELS = 1 << 26  # of a picture that is decoded: 8192 x 8192. Below Pillow's limit, so that our message is shown
PERCENTILES = (0.5, 99.5)  # of a 16 or 32-bit image, become 0 and 255: a few hot pixels must not darken all others
VOLUMES = {".dcm": "DICOM", ".dicom": "DICOM", ".ima": "DICOM", ".nii": "NIfTI", ".nii.gz": "NIfTI"}
"""Endings of formats that are not read here."""
_STARTS = {
    "DICOM": rb".{128}DICM",
    "NIfTI": rb".{344}(n\+1|ni1)\0",
    "a gzip file, perhaps NIfTI": rb"\x1f\x8b",
    "GIF": rb"GIF8",
    "BMP": rb"BM.{4}\0{4}",
    "WebP": rb"RIFF.{4}WEBP",
    "HEIC or AVIF": rb".{4}ftyp(hei[cx]|hev[cx]|mif1|msf1|avi[fs])",
}
_OWN_STARTS = rb"\x89PNG|\xff\xd8\xff|II[*+]\0|MM\0[*+]"
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_MISREAD = {("L", 2): np.int8, ("I", 1): np.uint32}
_BITS = TiffImagePlugin.BITSPERSAMPLE
_WHITE_IS_ZERO, _SEPARATE_CHANNELS = 0, 2  # values of TIFF tags
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow's decoders raise on broken files, besides OSError; found by flipping bytes in good ones.
_DECODE_ERRORS = (SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error)


def read_image(path: Path | str, page: int | None = None) -> NDArray[np.uint8]:
    """Reads one picture as an image viewer shows it.

    8-bit values are kept as they are. Values of 16 or 32 bits (integer or float, grey or colour) are scaled so that their
    `PERCENTILES`, those of all channels together, become 0 and 255. The orientation tag is applied; transparency is
    blended with black.

    Args:
        path: a PNG, JPEG or TIFF file: 1-bit, grey, palette, RGB, CMYK, with alpha or without.
        page: which page of a TIFF or animated PNG, from 0; None where there is one.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        InputError: the file is missing, empty, truncated, too large, not one of the formats, or the page is unclear.
    """
    path, where = Path(path), str(path)
    with open_picture(path, where, page=page) as image:
        deep = deep_values(image, path, where, page)
        if deep is not None:
            colours, alpha = split_alpha(deep)
            rgb, opaque = _scale(colours, where), 65535
        else:
            picture = decoded(image)
            if not picture.has_transparency_data:
                return np.array(picture.convert("RGB"))
            picture = picture.convert("LA") if picture.mode == "La" else picture
            rgb, alpha = split_alpha(np.asarray(picture.convert("RGBA")))
            opaque = 255
    return ((rgb.astype(np.uint32) * alpha + opaque // 2) // opaque).astype(np.uint8) if alpha.size else rgb


def image_size(path: Path, where: str) -> tuple[int, int]:
    """Returns an image's (height, width) as `read_image` gives it, from its header; `where` names it in messages."""
    with open_picture(path, where) as image:
        return shown_size(image)


@contextmanager
def open_picture(
    path: Path, where: str, formats: tuple[str, ...] | None = FORMATS, page: int | None = None
) -> Iterator[Image.Image]:
    """Opens an image file without decoding it; InputError says what is wrong with it, also when it is decoded inside.

    `where` names the file in messages; `formats` are Pillow's, None for any; `page` is that of `read_image`.
    """
    try:
        _check_file(path, where)
        # Not by its path: Pillow would map an uncompressed TIFF into memory with the size that it has when turned.
        with path.open("rb") as handle, Image.open(handle, formats=formats) as image:
            _select_page(image, where, page)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            _look_through_png(image, pixels=False)
            yield image
    except (OSError, MemoryError, *_BOMBS, *_DECODE_ERRORS) as error:
        raise InputError(f"{where}: {_reason(path, error)}.") from error


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Returns an open picture's (height, width) as it is shown, without decoding it."""
    tags = getattr(image, "tag_v2", None)  # versions of Pillow differ in whether a TIFF's size is turned already
    width, height = (tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]) if tags else image.size
    # Not PNG's own getexif, which decodes the picture to look for a tag behind it.
    turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def decoded(image: Image.Image, raw_mode: str = "") -> Image.Image:
    """Decodes an open picture and turns it as its orientation tag says; `raw_mode` replaces Pillow's layout of bytes."""
    tiles: Any = image.tile if raw_mode else ()  # pyright: ignore[reportAttributeAccessIssue]
    for place, tile in enumerate(tiles):
        tiles[place] = tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
    _look_through_png(image, pixels=True)
    Image.Image.getexif(image)  # now, so that what Pillow finds behind the pixels does not turn them
    return ImageOps.exif_transpose(image)


def deep_values(image: Image.Image, path: Path, where: str, page: int | None = None) -> NDArray[Any] | None:
    """Returns an open picture's values (H, W, C) of 16 or 32 bits, C from 1 to 4; None for a picture of 8 bits.

    Pillow decodes only the high bytes of colours. The low ones come from decoding again as if in the other byte order.
    """
    tags = getattr(image, "tag_v2", {})
    # Pillow takes signed bytes for unsigned ones, and unsigned 32 bits for signed ones.
    kind = _MISREAD.get((image.mode, tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0])) if tags else None
    if kind or image.mode in _DEEP_MODES:
        values = np.asarray(decoded(image))
        values = values.view(kind or values.dtype)[..., None]
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) != _WHITE_IS_ZERO:
            return values
        return 65535 - values if values.dtype.itemsize == 2 else -values  # Pillow turns those of 1 and 8 bits
    args = next((tile.args for tile in getattr(image, "tile", [])), "")
    raw = str(args if isinstance(args, str) else next(iter(args or ()), ""))
    if raw == "LA;16B":
        return np.array(decoded(image, "RGBA")).view(">u2").astype(np.uint16)
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == _SEPARATE_CHANNELS and max(tags.get(_BITS, (1,))) > 8:
        raise InputError(f"{where}: has 16-bit channels one after the other; save them interleaved, or save as PNG.")
    if not (raw.startswith("RGB") and ";16" in raw):
        return None
    layout, order = raw.replace("RGBa", "RGBA")[:-1], raw[-1]
    other = "L" if order == "B" or (order == "N" and sys.byteorder == "big") else "B"
    high = np.asarray(decoded(image, layout + order)).astype(np.uint16)
    with open_picture(path, where, page=page) as again:
        values = high << 8 | np.asarray(decoded(again, layout + other))
    return values[..., :3] if raw.startswith("RGBa") else values  # premultiplied colours are on black already


def split_alpha(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the colours (H, W, 1 or 3) and the alpha channel (H, W, 0 or 1) of values (H, W, C)."""
    return np.split(values, [1 if values.shape[2] < 3 else 3], axis=2)  # pyright: ignore[reportReturnType]


def _check_file(path: Path, where: str) -> None:
    status = path.stat()
    ending = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
    if kind := VOLUMES.get(ending):
        raise InputError(f"{where}: expected a PNG, JPEG or TIFF, found {kind} ({ending}); export the slice as PNG.")
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return
    found = "an empty file (0 bytes)" if stat.S_ISREG(status.st_mode) else "a pipe or a device"
    found = "a folder" if stat.S_ISDIR(status.st_mode) else found
    raise InputError(f"{where}: expected an image file, found {found}; copy the image to a file and name that.")


def _select_page(image: Image.Image, where: str, page: int | None) -> None:
    pages = getattr(image, "n_frames", 1)
    if page is None and (pages == 1 or image.format == "MPO"):  # a phone's JPEG, with previews and depth maps
        return
    if page is None or not 0 <= page < pages:
        found = f"{pages} pages" if page is None else f"no page {page}"
        fix = f"name a page from 0 to {pages - 1} (--page of medisee ask, page= of read_image), or save it as a file of its own"
        raise InputError(f"{where}: expected one picture, found {found}; {fix}.")
    image.seek(page)


def _look_through_png(image: Image.Image, *, pixels: bool) -> None:
    """Finds a PNG's EXIF behind its pixels, which Pillow sees too late, and checks their checksums, which it does not."""
    handle = getattr(image, "fp", None)
    if image.format != "PNG" or handle is None:
        return
    place = handle.tell()
    handle.seek(8)
    while len(head := handle.read(8)) == 8 and (kind := head[4:]) != b"IEND":
        length = int.from_bytes(head[:4], "big")
        if kind != b"eXIf" and not (pixels and kind in (b"IDAT", b"fdAT")):
            handle.seek(length + 4, 1)
            continue
        content, checksum = handle.read(length), handle.read(4)
        if len(checksum) == 4 and zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
            raise OSError(f"wrong checksum of a block {kind.decode()}")
        if kind == b"eXIf":
            image.info.setdefault("exif", b"Exif\0\0" + content)
    handle.seek(place)


def _reason(path: Path, error: Exception) -> str:
    """Says what an error of the system or of Pillow means, and what to do."""
    if isinstance(error, (MemoryError, *_BOMBS)):
        return f"expected at most {MAX_PIXELS:,} pixels, found {first_line(error)}; crop it or scale it down"
    if isinstance(error, FileNotFoundError):
        hint = "write / instead of \\" if "\\" in path.name else "check the path, or a manifest's root (--root)"
        return f"expected an image file, found none: {path} does not exist; {hint}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror}); check the file and your permission to read it"
    reason = first_line(error)
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as handle:
            start = handle.read(352)
            for kind, pattern in _STARTS.items():
                if re.match(pattern, start, re.DOTALL):
                    fix = "export the slice as PNG" if "DICOM" in kind or "NIfTI" in kind else "convert it to PNG"
                    return f"expected a PNG, JPEG or TIFF, found {kind}; {fix}"
            if not re.match(_OWN_STARTS, start):
                return f"expected a PNG, JPEG or TIFF, found a file that starts with {start[:8]!r}; convert it to PNG"
            with suppress(OSError, *_DECODE_ERRORS):  # not a TIFF, or a damaged one
                tags = TiffImagePlugin.ImageFileDirectory_v2(start[: 16 if 43 in start[2:4] else 8])
                handle.seek(tags.next)
                tags.load(handle)
                numbers = "floats" if 3 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()) else "integers"
                found = f"{tags[TiffImagePlugin.SAMPLESPERPIXEL]} channel(s) of {max(tags[_BITS])}-bit {numbers}"
                return f"expected a TIFF of 8 or 16-bit grey or RGB, found {found} in an unknown layout; save it as PNG"
        reason = "its header is wrong"
    expected = "expected a whole PNG, JPEG or TIFF, found a truncated or damaged one"
    return f"cannot be decoded ({reason}); {expected}; copy or export it again"


def _scale(values: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Scales (H, W, 1 or 3) values to (H, W, 3) of 0..255; one that is not finite becomes 0."""
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise InputError(f"{where}: expected finite pixel values, found none; export the image again.")
    low, high = np.percentile(finite, PERCENTILES)
    if low == high:  # a few bright pixels on a constant ground: keep them visible
        low, high = finite.min(), finite.max()
    if low == high:
        return np.zeros((*values.shape[:2], 3), np.uint8)
    values = np.nan_to_num(values, nan=low, posinf=low, neginf=low)
    scaled = np.rint((np.clip(values, low, high) - low) * (255 / (high - low))).astype(np.uint8)
    return np.repeat(scaled, 3 // scaled.shape[2], axis=2)
