"""Pictures for people: an image with the predicted mask and box, the true ones beside them, and a legend below."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from medisee.records.masks import Box

Color = tuple[int, int, int]

PREDICTION: Color = (230, 159, 0)
"""Orange; it differs from the blue of `TRUTH` in every kind of colour blindness (Okabe and Ito)."""
TRUTH: Color = (86, 180, 233)

_SHOWN_SIDE = 512
_NARROWEST_LEGEND = 384
_FILL = 0.35
_LINE = 2
_DASH = 8
_PAPER: Color = (255, 255, 255)
_INK: Color = (30, 30, 30)
_MARGIN = 10
_GAP = 4
_TEXT_SIZE = 14
_ELSEWHERE = "(no font here has these letters; prediction.json has the words)"


def overlay(
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_] | None = None,
    box: Box | None = None,
    *,
    legend: str = "",
    truth: NDArray[np.bool_] | None = None,
    truth_box: Box | None = None,
) -> Image.Image:
    """Draws masks and boxes on an image: the prediction filled and with solid lines, the truth with dashed lines.

    `image` is (H, W, 3) uint8, RGB; masks are (H, W) bool; boxes are half-open xyxy in pixels of the image and cut at
    its border. The `legend` is wrapped below the image; its line breaks are kept. A small image is enlarged by a whole
    factor, so that its longer side has 512 pixels or more.

    Raises:
        ValueError: the image is not (H, W, 3) uint8, or a mask has another size.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"expected an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
    scale = max(1, math.ceil(_SHOWN_SIDE / max(image.shape[:2])))
    size = image.shape[1] * scale, image.shape[0] * scale
    canvas = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    if mask is not None:
        large = _enlarged(mask, image, scale)
        canvas[large] = np.rint((1 - _FILL) * canvas[large] + _FILL * np.array(PREDICTION))
        canvas[contour(large)] = PREDICTION
    # The dashes of the truth come last: where both lines agree, both colours show.
    if truth is not None:
        canvas[contour(_enlarged(truth, image, scale)) & _dashes(canvas.shape[:2])] = TRUTH
    if box is not None:
        canvas[_frame(box, scale, canvas.shape[:2])] = PREDICTION
    if truth_box is not None:
        canvas[_frame(truth_box, scale, canvas.shape[:2]) & _dashes(canvas.shape[:2])] = TRUTH
    swatches = [("prediction", PREDICTION)] if mask is not None or box is not None else []
    swatches += [("truth (dashed)", TRUTH)] if truth is not None or truth_box is not None else []
    return _with_legend(Image.fromarray(canvas), swatches, legend)


def _enlarged(mask: NDArray[np.bool_], image: NDArray[np.uint8], scale: int) -> NDArray[np.bool_]:
    if mask.shape != image.shape[:2]:
        raise ValueError(f"expected a mask of the image's size {image.shape[:2]}, got {mask.shape}")
    return mask.astype(np.bool_).repeat(scale, axis=0).repeat(scale, axis=1)


def contour(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns the outermost `_LINE` pixels of the mask, also along the image's border."""
    inner = np.pad(mask, _LINE)
    for _ in range(_LINE):
        eroded = inner.copy()
        for axis in (0, 1):
            eroded &= np.roll(inner, 1, axis) & np.roll(inner, -1, axis)
        inner = eroded
    return mask & ~inner[_LINE:-_LINE, _LINE:-_LINE]


def _frame(box: Box, scale: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Returns a line of `_LINE` pixels just inside the box; a box without area still shows as a dot or a line."""
    frame = np.zeros(shape, np.bool_)
    if not all(map(math.isfinite, box)):
        return frame
    x0, y0, x1, y1 = np.rint(np.clip(np.array(box) * scale, 0, [shape[1], shape[0]] * 2)).astype(int)
    x1, y1 = max(x1, x0 + _LINE), max(y1, y0 + _LINE)
    frame[y0:y1, x0:x1] = True
    frame[y0 + _LINE : y1 - _LINE, x0 + _LINE : x1 - _LINE] = False
    return frame


def _dashes(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Returns steep stripes across the image, which cut upright, level and diagonal lines into dashes."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (columns + 2 * rows) // _DASH % 2 == 0


def _with_legend(picture: Image.Image, swatches: list[tuple[str, Color]], legend: str) -> Image.Image:
    width = max(picture.width, _NARROWEST_LEGEND)
    readable = [_readable(paragraph) for paragraph in legend.strip().splitlines()]
    lines = [(line, font) for text, font in readable for line in _wrap(text, font, width - 2 * _MARGIN)]
    _, font = _readable("")
    pitch = _TEXT_SIZE * 1.4
    height = round((bool(swatches) + len(lines)) * pitch + 2 * _MARGIN + _GAP) if swatches or lines else 0
    page = Image.new("RGB", (width, picture.height + height), _PAPER)
    page.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(page)
    x, y = float(_MARGIN), float(picture.height + _MARGIN)
    for name, color in swatches:
        draw.rectangle((x, y + 2, x + font.size, y + 2 + font.size), fill=color)
        draw.text((x + font.size + 6, y), name, fill=_INK, font=font)
        x += font.size + 6 + font.getlength(name) + 2 * _MARGIN
    y += pitch + _GAP if swatches else 0
    for line, font in lines:
        draw.text((_MARGIN, y), line, fill=_INK, font=font)
        y += pitch
    return page


def _wrap(paragraph: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Breaks text at spaces, and words that are too long for a line anywhere."""
    lines: list[str] = []
    line = ""
    for word in paragraph.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".lstrip()
        while font.getlength(line) > width:
            fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line]


def _readable(text: str) -> tuple[str, ImageFont.FreeTypeFont]:
    """Returns a text and a font that has its letters; where there is none, a text that says where the words are."""
    shown = (letter for letter in text if not letter.isspace() and unicodedata.category(letter) != "Cf")
    font = _font(frozenset(shown))
    return (text, font) if font else (_ELSEWHERE, _readable(_ELSEWHERE)[1])


@cache
def _font(letters: frozenset[str]) -> ImageFont.FreeTypeFont | None:
    from matplotlib.ft2font import FT2Font

    # From right to left, or joined to each other: Pillow needs this library for such scripts.
    complex_script = any(unicodedata.bidirectional(c) in ("R", "AL") or "\u0900" <= c <= "\u17ff" for c in letters)
    for path in _fonts() if features.check("raqm") or not complex_script else ():
        try:
            if set(map(ord, letters)) <= FT2Font(path).get_charmap().keys():
                return ImageFont.truetype(path, _TEXT_SIZE)
        except (OSError, RuntimeError):  # a damaged font, or one of bitmaps in another size
            continue
    return None


def _fonts() -> Iterator[str]:
    # Pillow's own font has ASCII only; answers contain dashes, accents and Greek letters.
    import matplotlib

    yield str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    from matplotlib import font_manager  # slow when first imported

    yield from sorted(font_manager.findSystemFonts())
