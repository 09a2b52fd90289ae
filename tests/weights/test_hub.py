"""Repositories of the hub: one weight format, and a sentence for each reason why not. No network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import HfApi, RepoFile
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from medisee.foundation.errors import InputError
from medisee.weights import hub
from medisee.weights.hub import fetch, verify

RESPONSE = Mock(headers={})


class FakeHub:
    """Makes the files that the patterns ask for, out of those that the repository has."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder, self.files, self.requested = folder, files, []

    def __call__(self, repository: str, **settings: Any) -> str:
        self.requested.append({"repository": repository, **settings})
        folder = Path(settings["local_dir"] or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if any(Path(file).match(pattern) for pattern in settings["allow_patterns"]):
                (folder / file).write_text(file)
        return str(folder)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def make(*files: str) -> FakeHub:
        fake = FakeHub(tmp_path / "cache", *files)
        monkeypatch.setattr(hub, "snapshot_download", fake)
        return fake

    return make


def test_safetensors_are_preferred(install: Callable[..., FakeHub]) -> None:
    fake = install("config.json", "tokenizer.model", "model.safetensors", "pytorch_model.bin", "tf_model.h5")
    found = {path.name for path in fetch("owner/name", "abc").iterdir()}
    assert found == {"config.json", "tokenizer.model", "model.safetensors"}
    assert fake.requested[0] == {
        "repository": "owner/name",
        "revision": "abc",
        "local_dir": None,
        "allow_patterns": ["*.json", "tokenizer.model", "*.safetensors"],
    }


def test_bin_files_come_where_there_is_nothing_else(install: Callable[..., FakeHub], tmp_path: Path) -> None:
    install("config.json", "pytorch_model-00001-of-00002.bin", "mm_projector.bin", "training_args.bin", "flax.msgpack")
    found = {path.name for path in fetch("owner/name", folder=tmp_path / "own").iterdir()}
    assert found == {"config.json", "pytorch_model-00001-of-00002.bin"}


def test_weights_can_be_left_out(install: Callable[..., FakeHub]) -> None:
    install("config.json", "model.safetensors")
    assert [path.name for path in fetch("owner/name", weights=False).iterdir()] == ["config.json"]


def test_files_that_are_not_the_hubs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own function compares them; it lists one large file, kept by its SHA-256, and one small file."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_bytes(b"{}")
    large = hashlib.sha256(b"weights").hexdigest()
    small = hashlib.sha1(b"blob 2\0{}").hexdigest()
    listed = [
        RepoFile(path="model.safetensors", size=7, oid="", lfs={"oid": large, "size": 7, "pointerSize": 0}),
        RepoFile(path="config.json", size=2, oid=small),
        RepoFile(path="flax.msgpack", size=2, oid=""),
    ]
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *_, **__: iter(listed))
    verify("owner/name", None, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weightS")
    with pytest.raises(InputError, match=rf"model.safetensors: sha256 is \w+, but the hub has {large}; delete"):
        verify("owner/name", None, tmp_path)


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("x"), ConnectionError("refused")])
def test_nothing_is_compared_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(HfApi, "list_repo_tree", Mock(side_effect=error))
    verify("owner/name", None, tmp_path)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (GatedRepoError("", response=RESPONSE), "terms have to be accepted at https://huggingface.co/owner/name"),
        (RepositoryNotFoundError("", response=RESPONSE), "no such repository"),
        (RevisionNotFoundError("", response=RESPONSE), "no revision 'abc'"),
        (LocalEntryNotFoundError("x"), "no network"),
        (OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (ConnectionError("refused\nlong"), "does not answer (refused)"),
        (OSError(28, "No space left on device"), "No space left on device; make room"),
        (ValueError(""), "ValueError"),
    ],
)
def test_every_reason_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        fetch("owner/name", "abc")
    (problem,) = caught.value.problems
    assert problem.startswith("owner/name: cannot be fetched: ")
    assert text in problem and "\n" not in problem
