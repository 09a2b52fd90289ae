"""Files of a Hugging Face repository: fetched once, resumed after a break, the weights in one format only."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]: of whichever library it uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from medisee.foundation.errors import InputError

TEXTS = ("*.json", "tokenizer.model")
SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "*.pth")

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_id(source: Path | str) -> bool:
    """Tells whether a checkpoint's name is no path here but could be that of a hub repository."""
    return not Path(source).exists() and _HUB_ID.fullmatch(str(source)) is not None


def cached_folder(source: str, member: str, revision: str | None = None) -> Path | None:
    """Returns the folder in the hub's cache that holds a repository's file `member`; None where there is none."""
    if not is_hub_id(source) or source.count("/") != 1:
        return None
    cached = try_to_load_from_cache(source, member, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def fetch(repository: str, revision: str | None = None, folder: Path | None = None, *, weights: bool = True) -> Path:
    """Fetches configuration, tokenizer and weights of a repository and returns the folder that holds them.

    Safetensors are preferred; .bin and .pth files are fetched only where there are none. What is there already is kept,
    and a download that broke off goes on where it ended.

    Args:
        repository: hub id, "owner/name".
        revision: branch, tag or commit; None: the main branch.
        folder: where the files go; None: the hub's own cache.
        weights: False leaves the weights out.

    Raises:
        InputError: no network, no such repository or revision, or terms that have to be accepted first.
    """

    def snapshot(*patterns: str) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=[*TEXTS, *patterns])
        )

    try:
        if not weights:
            return snapshot()
        found = snapshot(*SAFETENSORS)
        return found if any(found.glob("*.safetensors")) else snapshot(*PICKLES)
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(f"{repository}: cannot be fetched: {why(error, repository, revision)}") from error


def why(error: Exception, repository: str, revision: str | None) -> str:
    """Says what hinders a download and what to do about it."""
    known = {
        GatedRepoError: f"its terms have to be accepted at https://huggingface.co/{repository}; "
        "do so and log in by `hf auth login`.",
        RepositoryNotFoundError: "the hub has no such repository, or shows it to members only; "
        "check the id and `hf auth whoami`.",
        RevisionNotFoundError: f"it has no revision {revision!r}; leave it out, or take one of its commits.",
        OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it, or copy the files from a machine that has them.",
        LocalEntryNotFoundError: "no network, and it was not fetched before; connect, or copy the files here.",
        EntryNotFoundError: "it lacks a file that its list names; try again later.",
    }
    for kind, text in known.items():
        if isinstance(error, kind):
            return text
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{first}; make room or correct the folder, and start again."
    return f"no network, or the hub does not answer ({first}); start again, it goes on where it ended."
