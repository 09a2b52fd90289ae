"""Images that cannot be read, or could be read in two ways."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from picture_files import png, tiff
from PIL import Image
from rows import Row, Workspace

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8, 1)
PNG = png(RAMP)


def saved(kind: str, *, mode: str = "L", pages: int = 1, **options: object) -> bytes:
    """Returns small pictures as a file of Pillow's."""
    buffer = io.BytesIO()
    pictures = [Image.fromarray(RAMP[..., 0] * np.uint8(n)).convert(mode) for n in range(1, pages + 1)]
    pictures[0].save(
        buffer, kind, **({"save_all": True, "append_images": pictures[1:]} if pages > 1 else {}), **options
    )
    return buffer.getvalue()


def ask(name: str, content: bytes, *words: str) -> Row:
    """A row of `medisee ask` about a file of these bytes."""
    return Row(f"{name}: {words[0]}", "ask", lambda w: w.ask(image=w.text(name, content)), (name, *words))


def special(name: str, make: Callable[[Path], None], *words: str) -> Row:
    """A row of `medisee ask` about what is no plain file."""

    def made(w: Workspace) -> list[str]:
        make(w.folder / name)
        return w.ask(image=w.folder / name)

    return Row(name, "ask", made, (name, *words))


def recorded(name: str, content: bytes, *words: str, command: str = "eval") -> Row:
    """A row of a manifest whose second image is a file of these bytes."""

    def made(w: Workspace) -> list[str]:
        w.text(f"data/{name}", content)
        w.edit_record(1, image=name)
        return w.evaluate() if command == "eval" else w.train()

    return Row(f"record of {name}: {words[0]}", command, made, (f"image {name!r}", "'r1'", *words))


def _huge(width: int, height: int) -> bytes:
    header = struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + PNG[33:]


ROWS = [
    Row("missing", "ask", lambda w: w.ask(image=w.folder / "none.png"), ("none.png", "check the path")),
    Row("windows path", "ask", lambda w: w.ask(image=Path("data\\0.png")), ("data\\0.png", "write / instead of \\")),
    Row("name too long", "ask", lambda w: w.ask(image=w.folder / ("a" * 300)), ("cannot be read", "too long")),
    Row("a folder", "ask", lambda w: w.ask(image=w.folder), ("found a folder",)),
    Row("a device", "ask", lambda w: w.ask(image=Path("/dev/zero")), ("/dev/zero", "a pipe or a device")),
    Row("inside a file", "ask", lambda w: w.ask(image=w.image / "1"), ("cannot be read", "Not a directory")),
    special("pipe.png", os.mkfifo, "a pipe or a device"),
    special("loop.png", lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    special("gone.png", lambda path: path.symlink_to("nothing"), "found none", "check the path"),
    special("folder.png", lambda path: path.mkdir(), "found a folder"),
    Row("empty", "ask", lambda w: w.ask(image=w.text("empty.png", b"")), ("empty.png", "empty file")),
    Row("text", "ask", lambda w: w.ask(image=w.text("notes.png", "hello")), ("notes.png", "convert it")),
    ask("scan.dcm", b"\0" * 128 + b"DICM", "found DICOM", "export the slice"),
    ask("IM000001", b"\0" * 128 + b"DICM\2\0", "found DICOM", "export the slice"),
    ask("dicom.png", b"\0" * 128 + b"DICM\2\0", "found DICOM"),
    ask("scan.nii.gz", b"\x1f\x8b\x08", "found NIfTI", "export the slice"),
    ask("volume", b"\x5c\1\0\0" + b"\0" * 340 + b"n+1\0", "found NIfTI"),
    ask("volume.png", b"\x1f\x8b\x08\0", "found a gzip file, perhaps NIfTI"),
    ask("photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0", "found HEIC or AVIF", "convert it to PNG"),
    ask("photo.jpg", b"\0\0\0\x18ftypmif1\0\0\0\0", "found HEIC or AVIF", "convert it to PNG"),
    ask("photo.avif", b"\0\0\0\x18ftypavif\0\0\0\0", "found HEIC or AVIF"),
    ask("slice.webp", saved("WEBP"), "found WebP", "convert it to PNG"),
    ask("webp.png", saved("WEBP"), "found WebP"),
    ask("slice.gif", saved("GIF"), "found GIF", "convert it to PNG"),
    ask("slice.bmp", saved("BMP"), "found BMP"),
    ask("slice.jp2", saved("JPEG2000"), "a file that starts with"),
    ask("pages.tif", saved("TIFF", pages=3), "found 3 pages", "--page"),
    ask("animated.png", saved("PNG", pages=2), "found 2 pages", "--page"),
    Row(
        "no such page",
        "ask",
        lambda w: w.ask("--page", "3", image=w.text("pages.tif", saved("TIFF", pages=3))),
        ("pages.tif", "no page 3", "from 0 to 2"),
    ),
    Row("page of a single picture", "ask", lambda w: w.ask("--page", "1"), ("0.png", "no page 1", "from 0 to 0")),
    Row("negative page", "ask", lambda w: w.ask("--page", "-1"), ("0.png", "no page -1")),
    Row("page in words", "ask", lambda w: w.ask("--page", "two"), ("--page", "'two'")),
    ask("header.png", PNG[:12] + b"XXXX" + PNG[16:], "its header is wrong", "damaged"),
    ask("width.png", PNG[:19] + b"\x40" + PNG[20:], "its header is wrong"),
    ask("cut.png", PNG[:60], "cannot be decoded", "truncated"),
    ask("pixels.png", PNG[:50] + bytes([PNG[50] ^ 1]) + PNG[51:], "wrong checksum of a block IDAT"),
    ask("cut.jpg", saved("JPEG")[:-12], "cannot be decoded", "truncated"),
    ask("cut.tif", saved("TIFF")[:60], "damaged"),
    ask("huge.png", _huge(60_000, 2_000), "60000 x 2000", "crop it"),
    ask("bomb.png", _huge(600_000, 200_000), "expected at most 67,108,864 pixels", "crop it"),
    ask("floats.tif", tiff(np.zeros((4, 5, 3), np.float32)), "3 channel(s) of 32-bit floats", "save it as PNG"),
    ask("doubles.tif", tiff(np.zeros((4, 5, 1))), "1 channel(s) of 64-bit floats"),
    ask("five.tif", tiff(np.zeros((4, 5, 5), np.uint8), photometric=1), "5 channel(s) of 8-bit integers"),
    ask("two.tif", tiff(np.zeros((4, 5, 2), np.uint16), extra=[2]), "2 channel(s) of 16-bit integers"),
    ask("apart.tif", tiff(np.zeros((4, 5, 3), np.uint16), separate=True), "16-bit channels one after the other"),
    ask("nan.tif", tiff(np.full((4, 5, 1), np.nan, np.float32)), "finite pixel values"),
    recorded("pages.tif", saved("TIFF", pages=3), "found 3 pages", "a file of its own"),
    recorded("animated.png", saved("PNG", pages=2), "found 2 pages"),
    recorded("slice.gif", saved("GIF"), "found GIF", "convert it to PNG"),
    recorded("IM1", b"\0" * 128 + b"DICM\2\0", "found DICOM"),
    recorded("huge.png", _huge(60_000, 2_000), "60000 x 2000"),
    recorded("floats.tif", tiff(np.zeros((4, 5, 3), np.float32)), "3 channel(s) of 32-bit floats"),
    recorded("empty.png", b"", "empty file"),
    recorded("header.png", PNG[:12] + b"XXXX" + PNG[16:], "its header is wrong"),
    Row(
        "record of a windows path",
        "eval",
        lambda w: (w.edit_record(image="images\\0.png"), w.evaluate())[1],
        ("does not exist", "write / instead of \\"),
    ),
    Row(
        "record of a folder",
        "eval",
        lambda w: ((w.folder / "data" / "images").mkdir(), w.edit_record(image="images"), w.evaluate())[2],
        ("image 'images'", "found a folder"),
    ),
]
