"""Checkpoints: saved and loaded to the last bit, damaged ones named, hub ids fetched and pushed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from medisee import MediSee
from medisee.foundation import files
from medisee.foundation.errors import InputError
from medisee.foundation.files import sha256
from medisee.foundation.json_files import read_json
from medisee.models.processing import Example, Query
from medisee.weights import checkpoints, hub


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> MediSee:
    return MediSee.from_pretrained(tiny_checkpoint)


def damage(checkpoint: Path, what: str) -> None:
    """Breaks one thing in a checkpoint folder."""
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    if what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "tokenizer":
        (checkpoint / "tokenizer.json").write_text("{}")
    elif what in ("missing", "left-over"):
        state = load_file(weights)
        tensor = state.pop("seg_router.gate.0.bias") if what == "missing" else torch.zeros(1)
        save_file(state if what == "missing" else {**state, "stranger": tensor}, weights)
    else:
        key, value = {
            "width": ("router_hidden", 8),
            "unknown": ("router_hiden", 16),
            "tokens": ("candidate_tokens", ["[SEG]", "[BOX]"]),
            "base": ("seg_head", {"vit": "micro", "size": 64, "checkpoint": "no/sam.pth"}),
        }[what]
        content = json.loads(config.read_text())
        content["model"][key] = value
        config.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", "model.safetensors: missing; copy the whole folder"),
        ("truncated", "model.safetensors: truncated or not a safetensors file"),
        ("missing", "model.safetensors: missing tensor seg_router.gate.0.bias"),
        ("left-over", "model.safetensors: left-over tensor stranger"),
        ("tokenizer", "checkpoint: its tokenizer cannot be used"),
        ("tokens", r"config.json: candidate_tokens \[BOX\] are not in the checkpoint's tokenizer"),
        ("base", "no/sam.pth: the seg head's frozen weights cannot be read"),
        ("width", r"seg_router.*has shape \(16"),
        ("unknown", "config.json: unknown key 'model.router_hiden'.*Did you mean 'router_hidden'"),
    ],
)
def test_a_damaged_checkpoint_is_named(tiny_checkpoint: Path, tmp_path: Path, what: str, message: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    damage(folder, what)
    with pytest.raises(InputError, match=message):
        MediSee.from_pretrained(folder)


def test_saved_and_loaded_models_agree_to_the_last_bit(model: MediSee, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")  # a checkpoint may be replaced
    loaded = MediSee.from_pretrained(str(tmp_path / "saved"))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    batch = model.processor(
        [Example(pixels, 40, 64, (Query(record="r", target="t", question="Where?", answer="It is [SEG] and [BBOX]."),))]
    )
    with torch.inference_mode():
        ours, theirs = model(batch), loaded(batch)
    for field in fields(ours):
        mine, yours = getattr(ours, field.name), getattr(theirs, field.name)
        assert (mine is None) == (yours is None), field.name
        if mine is not None and yours is not None:
            assert torch.equal(mine, yours), field.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_taken(tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    state = load_file(folder / "model.safetensors")
    save_file({name: value.to(dtype) for name, value in state.items()}, folder / "model.safetensors")
    for name, value in MediSee.from_pretrained(folder).state_dict().items():
        assert torch.equal(value, state[name].to(dtype).float()), name


def test_shards_may_be_links_as_in_the_hubs_cache(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder, names = (
        Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")),
        ("model-1.safetensors", "b.safetensors"),
    )
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: names[number % 2] for number, name in enumerate(state)}
    for number, file in enumerate(names):
        save_file({name: state[name] for name in places if places[name] == file}, tmp_path / str(number))
        (folder / file).symlink_to(tmp_path / str(number))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = MediSee.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_checkpoint_may_lie_beside_other_files(model: MediSee, tmp_path: Path) -> None:
    """As in a saved state of a run."""
    (tmp_path / "progress.json").write_text("{}")
    files = checkpoints.write_checkpoint(model, tmp_path, {"step": 3}, checkpoints.trained_state(model))
    assert {*files, tmp_path / "progress.json"} == set(tmp_path.iterdir())
    assert checkpoints.read_description(tmp_path).run == {"step": 3}
    loaded = MediSee.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["OwnTokenizer", None])
def test_code_of_a_tokenizer_is_never_run(
    tiny_checkpoint: Path, tmp_path: Path, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")), []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    settings |= {"tokenizer_class": kind} if kind else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass OwnTokenizer: pass\n")
    if kind is None:  # the tokenizer's own class is one of transformers'
        assert isinstance(MediSee.from_pretrained(folder), MediSee)
    else:
        with pytest.raises(
            InputError, match=r"tokenizer_config\.json: auto_map names code of its own, which is never run"
        ):
            MediSee.from_pretrained(folder)
    assert not (tmp_path / "executed").exists() and not asked


def test_memory_is_not_taken_for_what_does_not_fit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    content = json.loads((folder / "config.json").read_text())
    content["model"]["router_hidden"] = 32768
    (folder / "config.json").write_text(json.dumps(content))
    built = []

    def build(*arguments: Any, weights: bool = True) -> MediSee:
        model = MediSee(*arguments, weights=weights)
        built.append(next(model.parameters()).device.type)
        return model

    with pytest.raises(InputError, match=r"seg_router\.gate\.0\.weight has shape \(16, 64\), expected \(32768, 64\)"):
        checkpoints.load_checkpoint(folder, build)
    assert built == ["meta"]


def test_files_are_read_once(
    build_tiny: Callable[..., MediSee], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen seg head's weights are hashed once for all saving and loading; config.json is read once per loading."""
    save_file(build_tiny().seg_head.state_dict(), tmp_path / "sam.safetensors")
    model = build_tiny(seg_head={"vit": "micro", "size": 64, "checkpoint": str(tmp_path / "sam.safetensors")})
    hashed: list[Path] = []
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(Path(path)) or sha256(path))
    model.save_pretrained(tmp_path / "checkpoint")
    read: list[Path] = []
    monkeypatch.setattr(checkpoints, "read_json", lambda path, expected: read.append(path) or read_json(path, expected))
    MediSee.from_pretrained(tmp_path / "checkpoint")
    assert hashed == [tmp_path / "sam.safetensors"]
    assert read == [tmp_path / "checkpoint" / "config.json"]


def test_bits_need_a_published_language_model(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"holds all of its language model, so bits cannot be chosen"):
        MediSee.from_pretrained(tiny_checkpoint, bits=4)


def test_saving_replaces_nothing_but_checkpoints(model: MediSee, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    for folder, told in (
        (tmp_path, r"holds 'thesis\.txt', which is not of an earlier"),
        (tmp_path / "thesis.txt", "a file"),
    ):
        with pytest.raises(InputError, match=told):
            model.save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    out = tmp_path / "checkpoint"
    model.save_pretrained(out)
    model.save_pretrained(out)
    (out / "README.md").write_text("mine")
    with pytest.raises(
        InputError, match=r"holds 'README\.md', which is not of an earlier checkpoint and would be lost"
    ):
        model.save_pretrained(out)


def test_a_hub_id_is_fetched(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []
    fetch = lambda hub_id, revision, **_: requested.append((hub_id, revision)) or str(tiny_checkpoint)  # noqa: E731
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert isinstance(MediSee.from_pretrained("lab/medisee", revision="v1"), MediSee)
    assert requested == [("lab/medisee", "v1")]
    with pytest.raises(InputError, match="runs/no/checkpoint: no such folder; give the folder that training wrote"):
        MediSee.from_pretrained("runs/no/checkpoint")
    assert len(requested) == 1


def test_a_hub_out_of_reach_is_reported(model: MediSee, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("401 Client Error.\nmore")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        InputError, match=r"lab/no: no such folder, and as a hub id it cannot be fetched: .* \(401 Client Error.\)"
    ):
        MediSee.from_pretrained("lab/no")
    monkeypatch.setattr(checkpoints.HfApi, "create_repo", fail)
    with pytest.raises(InputError, match=r"lab/no: cannot be pushed \(401 Client Error.\)"):
        model.push_to_hub("lab/no")


@pytest.mark.parametrize("there", [False, True])
def test_push_uploads_a_checkpoint(model: MediSee, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    uploaded: dict[str, str] = {}

    def upload(_: object, *, repo_id: str, folder_path: Path, **__: object) -> str:
        names = sorted(path.name for path in folder_path.iterdir())
        uploaded.update({name: (folder_path / name).read_text() for name in names if name == "README.md"})
        return f"{repo_id}: {[name for name in names if name != 'README.md']}"

    monkeypatch.setattr(checkpoints.HfApi, "create_repo", lambda _, hub_id, **__: SimpleNamespace(repo_id=hub_id))
    monkeypatch.setattr(checkpoints.HfApi, "file_exists", lambda *_: there)
    monkeypatch.setattr(checkpoints.HfApi, "upload_folder", upload)
    pushed = model.push_to_hub("lab/medisee", private=True)
    assert pushed == "lab/medisee: ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']"
    assert ("README.md" in uploaded) is not there
    if not there:
        _, front, text = uploaded["README.md"].split("---\n", 2)
        assert yaml.safe_load(front)["library_name"] == "medisee"
        assert 'from_pretrained("lab/medisee")' in text
        assert "`[SEG]`, `[BBOX]`" in text
