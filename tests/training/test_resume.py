"""Saved states: which stay, what damage is found, and that no failure of writing harms an older one."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medisee.config import Config
from medisee.config.load import config_from
from medisee.foundation.errors import InputError
from medisee.training.resume import (
    FILES,
    OPTIMIZER,
    PROGRESS,
    LastStates,
    Progress,
    Saved,
    check_same_run,
    damage,
    find_last,
    saved_folders,
)

FACTS = {"step": 0, "best": 0.25, "skipped": 3, "effective_batch": 4, "config": Config().model_dump(mode="json")}
NAMES = ("model.safetensors", OPTIMIZER, PROGRESS, FILES)


def tensors(step: int) -> dict[str, Tensor]:
    return {"a": torch.full((3, 4), float(step)), "b": torch.arange(5.0)}


def write(states: LastStates, *steps: int) -> None:
    for step in steps:
        states.write(step, tensors(step), tensors(-step), {**FACTS, "step": step})


def steps_in(out: Path) -> list[int]:
    return [int(folder.name.removeprefix("last-")) for folder in saved_folders(out)]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A run's folder with the states of steps 5, 10 and 15."""
    write(LastStates(tmp_path, keep=3), 5, 10, 15)
    return tmp_path


def test_the_newest_state_is_found_and_read(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = find_last(three)
    assert saved == Saved(three / "last-00000015", Progress(15, 0.25, 3), 4, Config())
    assert torch.equal(load_file(saved.folder / "model.safetensors")["a"], tensors(15)["a"])
    assert capsys.readouterr().err == ""


def test_only_the_last_stay(tmp_path: Path) -> None:
    states = LastStates(tmp_path, keep=2)
    write(states, 5, 10, 15, 20)
    assert steps_in(tmp_path) == [15, 20]
    assert states.newest == tmp_path / "last-00000020"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-00000015", "last-00000020"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(LastStates(tmp_path, keep=3), 99_999_999, 100_000_000)
    assert find_last(tmp_path).progress.step == 100_000_000


def test_a_new_run_removes_an_older_ones_states_with_its_first(three: Path) -> None:
    states = LastStates(three, keep=2)
    assert steps_in(three) == [5, 10, 15]
    write(states, 2)
    assert steps_in(three) == [2]


def test_a_resumed_run_keeps_what_it_came_from_and_drops_what_was_damaged(three: Path) -> None:
    (three / "last-00000015" / PROGRESS).write_text("{}")
    states = LastStates(three, keep=2, found=find_last(three).folder)
    write(states, 12)
    assert steps_in(three) == [10, 12]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    place=st.floats(0, 1, exclude_max=True),
    how=st.sampled_from(["cut", "flip", "gone", "longer"]),
)
def test_damage_is_found_and_the_one_before_is_used(three: Path, name: str, place: float, how: str) -> None:
    path = three / "last-00000015" / name
    content = path.read_bytes()
    at = int(place * len(content))
    changed = {
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :],
        "longer": content + b"\0",
        "gone": b"",
    }[how]
    try:
        path.write_bytes(changed)
        if how == "gone":
            path.unlink()
        # A flipped space in files.json's layout still says the same.
        if name != FILES or damage(path.parent) is not None:
            assert damage(path.parent) is not None
            assert find_last(three).progress.step == 10
    finally:
        path.write_bytes(content)
    assert damage(path.parent) is None


def test_damaged_states_are_named(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, middle = three / "last-00000015", three / "last-00000010"
    (newest / "model.safetensors").write_bytes(b"short")
    (middle / FILES).unlink()
    assert find_last(three).progress.step == 5
    size = json.loads((newest / FILES).read_text())["model.safetensors"]["bytes"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {newest}: model.safetensors has 5 bytes instead of {size}; continuing from {three / 'last-00000005'}.",
        f"warning: {middle}: files.json is missing; continuing from {three / 'last-00000005'}.",
    ]


def test_nothing_that_could_be_resumed(tmp_path: Path, three: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        find_last(tmp_path / "none")
    for step in (5, 10, 15):
        (three / f"last-{step:08d}" / OPTIMIZER).unlink()
    with pytest.raises(InputError, match=r"optimizer\.safetensors is missing; all saved states are damaged") as caught:
        find_last(three)
    assert len(caught.value.problems) == 3


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *, at: str) -> None:
    """Makes the writing of one file end in the middle."""
    from safetensors.torch import save_file

    def half(state: Mapping[str, Tensor], path: str, metadata: Any = None) -> None:
        save_file(dict(state), path, metadata=metadata)
        if Path(path).name == at:
            Path(path).write_bytes(Path(path).read_bytes()[:20])
            raise error

    monkeypatch.setattr("medisee.training.resume.save_file", half)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
    ],
    ids=["disk", "safetensors", "interrupt"],
)
@pytest.mark.parametrize("at", ["model.safetensors", OPTIMIZER])
def test_a_save_that_fails_harms_nothing(
    three: Path, error: BaseException, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in three.rglob("*") if path.is_file()}
    states = LastStates(three, keep=1, found=three / "last-00000015")
    failing(monkeypatch, error, at=at)
    with pytest.raises(type(error)):
        write(states, 20)
    assert {path: path.read_bytes() for path in three.rglob("*") if path.is_file()} == before
    assert find_last(three).progress.step == 15
    monkeypatch.undo()
    write(states, 20)
    assert steps_in(three) == [20]


def test_what_a_killed_save_left_is_no_state_and_goes_with_the_next(three: Path) -> None:
    shutil.copytree(three / "last-00000015", three / ".last-00000020.new")
    shutil.copytree(three / "last-00000015", three / ".last-00000003.old")
    assert find_last(three).progress.step == 15
    write(LastStates(three, keep=3, found=three / "last-00000015"), 25)
    assert sorted(path.name for path in three.iterdir()) == ["last-00000010", "last-00000015", "last-00000025"]


def settings_of(**train: Any) -> Config:
    return config_from({"train": train}, where="test")


def saved_by(config: Config, effective_batch: int = 600) -> Saved:
    return Saved(Path("runs/x/last-00000010"), Progress(10), effective_batch, config)


def test_how_a_run_is_computed_may_change() -> None:
    old = settings_of(batch_size=15, accumulation=40, zero_stage=2)
    new = settings_of(batch_size=30, global_batch=600, zero_stage=3, offload="parameters", keep_last=5, out="moved")
    check_same_run(saved_by(old), new, 600)
    check_same_run(saved_by(old), settings_of(accumulation=40, deepspeed={"zero_optimization": {"a": 1}}), 600)


def test_another_run_is_refused_and_every_difference_named() -> None:
    new = config_from({"train": {"lr": 1e-5, "seed": 3}, "data": {"workers": 4, "val": "x.jsonl"}}, where="test")
    with pytest.raises(InputError) as caught:
        check_same_run(saved_by(Config()), new, 300)
    named = [problem.split(": ", 1)[1].split(";")[0] for problem in caught.value.problems]
    assert named == [
        "the run was started with another configuration, data.val = None, not 'x.jsonl'",
        "the run was started with another configuration, train.lr = 0.0003, not 1e-05",
        "the run was started with another configuration, train.seed = 0, not 3",
        "the run was started with an effective batch of 600 images, now it is 300",
    ]
    assert "set train.global_batch=600" in caught.value.problems[-1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MB, where the user may mount one."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("may not mount a disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.faults
def test_a_disk_that_is_really_full(
    tiny_config: dict[str, Any], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import subprocess

    import yaml

    from medisee.foundation.errors import exit_code
    from medisee.train import main

    section = {"out": str(small_disk / "run"), "steps": 12, "save_every": 2, "keep_last": 5, "log_every": 1}
    path = small_disk.parent / "run.yaml"
    path.write_text(yaml.safe_dump({**tiny_config, "train": {**tiny_config["train"], **section}}))
    assert exit_code(main, ["--config", str(path)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "No space left" in message and "--resume" in message
    folders = saved_folders(small_disk / "run")
    assert folders and [damage(folder) for folder in folders] == [None] * len(folders)
    subprocess.run(["mount", "-o", "remount,size=80m", str(small_disk)], check=True)
    assert exit_code(main, ["--config", str(path), "--resume"]) == 0
    assert find_last(small_disk / "run").progress.step == 12
