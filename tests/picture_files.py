"""Image files that Pillow cannot write, made by hand, and what a viewer shows of a turned one."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from numpy.typing import NDArray

TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
"""Stored pixels (H, W, ...) to shown ones, by the orientation tag (TIFF 6.0, page 36)."""


def chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a block of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values: NDArray[Any], tag: int = 1, *, late_tag: bool = False) -> bytes:
    """Returns a PNG of 8 or 16-bit values (H, W, 1 to 4), with an orientation tag before or behind its pixels."""
    height, width, channels = values.shape
    rows = values.astype(values.dtype.newbyteorder(">"))
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * values.dtype.itemsize, colour, 0, 0, 0)
    exif = chunk(b"eXIf", b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 274, 3, 1, tag, 0, 0)) if tag > 1 else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    blocks = [pixels, exif] if late_tag else [exif, pixels]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(blocks) + chunk(b"IEND", b"")


def tiff(
    values: NDArray[Any],
    tag: int = 1,
    *,
    order: Literal["<", ">"] = "<",
    deflated: bool = False,
    separate: bool = False,
    photometric: int | None = None,
    extra: Sequence[int] = (),
) -> bytes:
    """Returns a TIFF of values (H, W, C) of any type; `extra` are the meanings of channels beyond the colours."""
    height, width, channels = values.shape
    ordered = values.astype(values.dtype.newbyteorder(order))
    planes = [p.tobytes() for p in ordered.transpose(2, 0, 1)] if separate else [ordered.tobytes()]
    planes = [zlib.compress(plane) for plane in planes] if deflated else planes
    photometric = (2 if channels > 2 else 1) if photometric is None else photometric
    number = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    body = b"".join(planes)
    starts = [8 + sum(map(len, planes[:n])) for n in range(len(planes))]
    tags: list[tuple[int, str, Sequence[int]]] = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [8 * values.dtype.itemsize] * channels),
        (259, "H", [8 if deflated else 1]),
        (262, "H", [photometric]),
        (273, "I", starts),
        (274, "H", [tag]),
        (277, "H", [channels]),
        (278, "I", [height]),
        (279, "I", [len(plane) for plane in planes]),
        (284, "H", [2 if separate else 1]),
        *([(338, "H", list(extra))] if extra else []),
        (339, "H", [number] * channels),
    ]
    entries = b""
    for code, kind, numbers in tags:
        content = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(content) > 4:
            content, body = struct.pack(f"{order}I", 8 + len(body)), body + content
        entries += struct.pack(f"{order}HHI", code, {"H": 3, "I": 4}[kind], len(numbers)) + content.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(body))
    return start + body + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
