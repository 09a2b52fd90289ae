"""Downloading weights: what is fetched, what is noted, what is missing and why. The hub is a local stand-in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medisee import download_weights
from medisee.config.load import load_config
from medisee.download_weights import MANIFEST, SETS, WEIGHTS, check, main, read_manifest, wanted
from medisee.foundation.errors import InputError, exit_code

Hub = dict[str, dict[str, bytes]]

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Repositories and their files; one that is not here cannot be reached."""
    files: Hub = {
        "microsoft/llava-med-v1.5-mistral-7b": {"config.json": b"{}", "model-00001-of-00001.safetensors": b"weights"},
        "wanglab/medsam-vit-base": {"model.safetensors": b"medsam"},
        "facebook/sam-vit-base": {"model.safetensors": b"sam"},
    }

    def fetch(repository: str, revision: str | None, folder: Path) -> Path:
        if repository not in files:
            raise InputError(f"{repository}: cannot be fetched: no network.")
        (folder / ".cache").mkdir(parents=True, exist_ok=True)
        (folder / ".cache" / "state").write_text("unfinished")
        for name, content in files[repository].items():
            (folder / name).write_bytes(content + (revision or "").encode())
        return folder

    def verify(repository: str, revision: str | None, folder: Path) -> None:
        for name, content in files[repository].items():
            if not (folder / name).read_bytes().startswith(content):
                raise InputError(f"{folder / name}: differs from the hub's.")

    monkeypatch.setattr(download_weights, "fetch", fetch)
    monkeypatch.setattr(download_weights, "verify", verify)
    return files


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def problems(act: Callable[[], Any]) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        act()
    return caught.value.problems


def test_a_set_is_fetched_and_noted(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("medisee-7b", "--out", tmp_path)
    notes = read_manifest(tmp_path)
    assert set(notes) == {"llava-med", "medsam"}
    assert notes["llava-med"].source == "microsoft/llava-med-v1.5-mistral-7b"
    files = notes["llava-med"].files
    assert set(files) == {"llava-med/config.json", "llava-med/model-00001-of-00001.safetensors"}
    expected = {"sha256": hashlib.sha256(b"medsam").hexdigest(), "size": 6}
    written = json.loads((tmp_path / MANIFEST).read_text())
    assert (written["format"], set(written["weights"])) == (1, {"llava-med", "medsam"})
    assert written["weights"]["medsam"] == {
        "source": "wanglab/medsam-vit-base",
        "revision": None,
        "files": {"medsam/model.safetensors": expected},
    }
    assert "done: llava-med, medsam" in capsys.readouterr().out
    run("--check", "--out", tmp_path)
    assert "done: 3 files" in capsys.readouterr().out


def test_a_file_that_is_not_the_hubs_is_not_noted(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        download_weights, "fetch", lambda _, __, folder: (folder / "model.safetensors").write_bytes(b"?")
    )
    (tmp_path / "sam").mkdir()
    (found,) = problems(lambda: run("sam", "--out", tmp_path))
    assert found == f"missing sam: {tmp_path}/sam/model.safetensors: differs from the hub's."
    assert read_manifest(tmp_path) == {}


def test_a_revision_is_fetched_and_noted(hub: Hub, tmp_path: Path) -> None:
    run("sam@abc123", "--out", tmp_path)
    assert (tmp_path / "sam" / "model.safetensors").read_bytes() == b"samabc123"
    assert read_manifest(tmp_path)["sam"].revision == "abc123"


def test_what_is_missing_is_reported_and_the_rest_is_there(hub: Hub, tmp_path: Path) -> None:
    (found,) = problems(lambda: run("clip", "sam", "--out", tmp_path))
    assert found == "missing clip: openai/clip-vit-large-patch14-336: cannot be fetched: no network."
    assert set(read_manifest(tmp_path)) == {"sam"}


def test_weights_without_a_repository_are_saved_by_hand(hub: Hub, tmp_path: Path) -> None:
    (found,) = problems(lambda: run("sam-med2d", "--out", tmp_path))
    assert "sam-med2d_b.pth" in found and "https://github.com/OpenGVLab/SAM-Med2D" in found
    (tmp_path / "sam-med2d").mkdir()
    (tmp_path / "sam-med2d" / "sam-med2d_b.pth").write_bytes(b"own")
    run("sam-med2d", "--out", tmp_path)
    assert set(read_manifest(tmp_path)["sam-med2d"].files) == {"sam-med2d/sam-med2d_b.pth"}


def test_a_changed_file_is_never_accepted_silently(hub: Hub, tmp_path: Path) -> None:
    run("sam", "--out", tmp_path)
    before = (tmp_path / MANIFEST).read_text()
    hub["facebook/sam-vit-base"]["model.safetensors"] = b"other"
    (found,) = problems(lambda: run("sam", "--out", tmp_path))
    assert hashlib.sha256(b"other").hexdigest() in found and hashlib.sha256(b"sam").hexdigest() in found
    assert (tmp_path / MANIFEST).read_text() == before


def test_downloading_twice_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    run("sam", "--out", tmp_path)
    before = (tmp_path / MANIFEST).read_text()
    run("sam", "--out", tmp_path)
    assert (tmp_path / MANIFEST).read_text() == before


def test_check_names_every_file(hub: Hub, tmp_path: Path) -> None:
    run("medisee-7b", "sam", "--out", tmp_path)
    (tmp_path / "llava-med" / "config.json").unlink()
    (tmp_path / "medsam" / "model.safetensors").write_bytes(b"medsaM")
    (tmp_path / "sam" / "model.safetensors").write_bytes(b"sa")
    missing, changed, shorter = problems(lambda: check(tmp_path))
    assert "llava-med/config.json: missing" in missing
    assert "medsam/model.safetensors: SHA-256" in changed
    assert "sam/model.safetensors: has 2 bytes instead of 3" in shorter
    assert len(problems(lambda: check(tmp_path, ["sam"]))) == 1
    assert "weights.json: is not there" in problems(lambda: check(tmp_path / "none"))[0]
    assert "clip was never downloaded" in problems(lambda: check(tmp_path, ["clip"]))[0]


def test_nothing_to_check(tmp_path: Path) -> None:
    assert MANIFEST in problems(lambda: check(tmp_path))[0]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "weights": {}}',
        '{"format": 1, "weights": {"sam": {"files": {"x": 1}}}}',
        '{"weights": {}}',
    ],
)
def test_a_broken_manifest(hub: Hub, tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    for command in (lambda: check(tmp_path), lambda: run("sam", "--out", tmp_path)):
        (found,) = problems(command)
        assert MANIFEST in found


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    note = {"files": {"../secret": {"sha256": "0" * 64, "size": 1}}}
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "weights": {"sam": note}}))
    assert "leaves the root" in problems(lambda: check(tmp_path))[0]


@pytest.mark.parametrize(
    "names", [["sma"], ["medisee-7b@main"], ["sam@"], ["sam@a b"], ["sam@a", "sam@b"], ["sam@a", "sam"]]
)
def test_bad_names(names: list[str]) -> None:
    (found,) = problems(lambda: wanted(names))
    assert names[-1] in found


def test_several_bad_names_are_reported_together() -> None:
    unknown, revision = problems(lambda: wanted(["sma", "sam@"]))
    assert "Did you mean 'sam'?" in unknown
    assert "sam@" in revision


def test_a_model_of_two_sets_is_fetched_once() -> None:
    names = list(wanted(["medisee-7b", "llava-7b", "medsam"]))
    assert sorted(names) == sorted({*SETS["medisee-7b"], *SETS["llava-7b"]})


def test_configs_name_what_the_download_writes() -> None:
    files = [path for path in CONFIGS.rglob("*.yaml") if "laptop" not in path.name]
    found: dict[str, set[Path]] = {}
    for file in files:
        model = load_config(file).model
        named = (model.mllm.source, model.mllm.vision_source, model.seg_head.checkpoint)
        found[file.name] = {Path(path) for path in named if path is not None}
    written = {Path("weights", name, weights.manual) for name, weights in WEIGHTS.items()}
    assert set().union(*found.values()) <= written
    assert found["medisee_7b.yaml"] == {Path("weights", name) for name in SETS["medisee-7b"]}
    assert found["sam_med2d.yaml"] >= {Path("weights/sam-med2d/sam-med2d_b.pth")}


def test_sets_name_known_models() -> None:
    assert {name for members in SETS.values() for name in members} <= set(WEIGHTS)
    assert not set(SETS) & set(WEIGHTS)


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    run("--list")
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*WEIGHTS, *SETS))


def test_errors_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for arguments in ([], ["sma"], ["sam", "--out", str(tmp_path / "file")], ["--check", "--out", str(tmp_path)]):
        assert exit_code(main, arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1
