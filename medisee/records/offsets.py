"""The line offsets of a large manifest, kept beside it, so that it opens without being read.

`<name>.offsets.safetensors` holds an int64 for each line of `<name>.jsonl` that is not blank. The lines were checked
then, and it is valid only for a file of the size and modification time that it names.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medisee.foundation.files import atomic_path

LARGE = 1 << 26  # bytes from which a file's offsets are kept, 64 MiB; a smaller file is checked within seconds
_SUFFIX = ".offsets.safetensors"


def file_stamp(path: Path) -> str:
    """Returns a file's size and modification time, which identify a state of it; "" if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size} bytes, {found.st_mtime_ns} ns"


def keep_offsets(path: Path, offsets: NDArray[np.int64], stamp: str) -> None:
    """Keeps the line offsets of a large file, whose lines were checked; those of a small one are not kept.

    `stamp` is the `file_stamp` from before the lines were read, or after they were written. A folder that cannot be
    written to is not an error: the file is then checked again next time.
    """
    if path.stat().st_size < LARGE:
        return
    with suppress(OSError, SafetensorError), atomic_path(path.with_suffix(_SUFFIX)) as temporary:
        save_file({"offsets": offsets}, temporary, metadata={"stamp": stamp})
        temporary.chmod(path.stat().st_mode)  # or only its writer could read it


def kept_offsets(path: Path) -> NDArray[np.int64] | None:
    """Returns the line offsets of a file; None where they are not known for its present state."""
    try:
        with safe_open(path.with_suffix(_SUFFIX), framework="numpy") as handle:
            if (handle.metadata() or {}).get("stamp") != file_stamp(path):
                return None
            offsets = handle.get_tensor("offsets")
    except (OSError, SafetensorError):
        return None
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not offsets.size:
        return None
    is_sound = offsets[0] >= 0 and offsets[-1] < path.stat().st_size and (offsets[1:] > offsets[:-1]).all()
    return offsets if is_sound else None
