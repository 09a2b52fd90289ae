"""Files of a Hugging Face repository: fetched once, resumed after an interruption, the weights in one format only."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache, verify_repo_checksums
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]: of whichever library it uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from medisee.foundation.errors import InputError, first_line

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_id(source: Path | str) -> bool:
    """Tells whether a name is not an existing path but could be a hub repository's."""
    return not Path(source).exists() and _HUB_ID.fullmatch(str(source)) is not None


def cached_folder(source: str, member: str, revision: str | None = None) -> Path | None:
    """Returns the folder in the hub's cache that holds a repository's file `member`; None where there is none."""
    if not is_hub_id(source) or source.count("/") != 1:
        return None
    cached = try_to_load_from_cache(source, member, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def fetch(repository: str, revision: str | None = None, folder: Path | None = None, *, weights: bool = True) -> Path:
    """Fetches configuration, tokenizer and weights of a repository and returns the folder that holds them.

    Safetensors are preferred; .bin and .pth files are fetched only where there are none. Complete files are kept, and
    an interrupted download is resumed.

    Args:
        repository: hub id, "owner/name".
        revision: branch, tag or commit; None: the main branch.
        folder: where to put the files; None: the hub's cache.
        weights: whether to fetch the weights too.
    """

    def snapshot(*patterns: str) -> Path:
        wanted = ["*.json", "tokenizer.model", *patterns]
        return Path(snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=wanted))

    try:
        if not weights:
            return snapshot()
        found = snapshot("*.safetensors")
        return found if any(found.glob("*.safetensors")) else snapshot("pytorch_model*.bin", "*.pth")
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(f"{repository}: cannot be fetched: {_reason(error, repository, revision)}") from error


def verify(repository: str, revision: str | None, folder: Path) -> None:
    """Compares the fetched files of a folder with the hub's checksums; does nothing where the hub is out of reach.

    Raises:
        InputError: names every file that differs.
    """
    try:
        found = verify_repo_checksums(repository, revision=revision, local_dir=folder)
    except (HTTPError, OSError, ValueError):
        return  # `fetch` has accepted the files that are there, and reading them is checked elsewhere
    if found.mismatches:
        raise InputError(
            f"{folder / one['path']}: {one['algorithm']} is {one['actual']}, but the hub has {one['expected']}; "
            "delete the file and start again."
            for one in found.mismatches
        )


def foreign_content(path: Path) -> str | None:
    """Says what often lies in the place of weights; None if the file is nothing of that kind."""
    try:
        with path.open("rb") as handle:
            begin = handle.read(64).lstrip().lower()
    except OSError:
        return None
    if not begin:
        return "an empty file"
    if begin.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in the place of the file (git lfs pull gets it)"
    return "a web page in the place of the file" if begin.startswith(b"<") else None


def _reason(error: Exception, repository: str, revision: str | None) -> str:
    known = {
        GatedRepoError: f"its terms have to be accepted at https://huggingface.co/{repository}; "
        "accept them and run `hf auth login`.",
        RepositoryNotFoundError: "the hub has no such repository, or it is private; check the id and `hf auth whoami`.",
        RevisionNotFoundError: f"it has no revision {revision!r}; leave it out, or give one of its commits.",
        OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it, or copy the files from a machine that has them.",
        LocalEntryNotFoundError: "no network, and it was not fetched before; connect, or copy the files here.",
        EntryNotFoundError: "it lacks a file that its list names; try again later.",
    }
    for kind, text in known.items():
        if isinstance(error, kind):
            return text
    if isinstance(error, OSError) and error.errno is not None:
        return f"{first_line(error)}; make room or correct the folder, and start again."
    return f"no network, or the hub does not answer ({first_line(error)}); start again, the download is resumed."
