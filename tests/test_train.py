"""Training: an exact resume, ending in order, damaged states, a full disk, selection on val, and bad input."""

from __future__ import annotations

import errno
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from free_port import free_port
from safetensors.torch import load_file
from transformers import AutoTokenizer

from medisee.config import Config
from medisee.config.load import config_from
from medisee.data.mixture import Mixture
from medisee.foundation.errors import InputError, exit_code
from medisee.models.medisee import MediSee
from medisee.records.manifest import Manifest
from medisee.records.records import Record
from medisee.train import main, train
from medisee.training.interruption import Stopped
from medisee.training.resume import damage, saved_folders
from medisee.weights.checkpoints import load_checkpoint

Run = dict[str, Any]


def configured(run: Run, **sections: dict[str, Any]) -> Config:
    """Returns a tiny run with sections changed."""
    merged = {name: {**run.get(name, {}), **sections.get(name, {})} for name in {*run, *sections}}
    return config_from(merged, where="test")


def losses(out: Path) -> dict[int, float]:
    """Returns the total loss of every logged step."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["total"] for line in lines if "total" in line}


def test_a_run_leaves_a_checkpoint_logs_and_facts(every_step: Run, tmp_path: Path) -> None:
    folder = train(configured(every_step, train={"out": str(tmp_path / "run")}))
    assert folder == tmp_path / "run" / "checkpoint"
    assert {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert sorted(losses(tmp_path / "run")) == list(range(1, 9))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["settings"]["train"]["steps"] == 8 and facts["seconds"] > 0
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_the_log_tells_speed_memory_and_rate(every_step: Run, tmp_path: Path) -> None:
    train(configured(every_step, train={"out": str(tmp_path), "log_every": 2, "lr": 1e-3}))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "total" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8]
    # The rates of steps 2, 4, 6 and 8: two steps of warm-up, then down to zero at the end.
    assert [line["learning_rate"] for line in logged] == pytest.approx([1e-3, 1e-3 * 5 / 6, 1e-3 * 3 / 6, 1e-3 / 6])
    for line in logged:
        # An image has at least 16 image tokens.
        assert 0 < 16 * line["images_per_second"] < line["tokens_per_second"] < math.inf
        assert 0 <= line["data_wait"] < 1
        assert 0.05 < line["peak_memory_gib"] < 1000


def test_a_checkpoint_s_figures_have_no_interval_that_was_not_computed(every_step: Run, tmp_path: Path) -> None:
    folder = train(configured(every_step, train={"out": str(tmp_path)}))
    figures = json.loads((folder / "config.json").read_text())["run"]["val"]
    assert list(figures) == ["Dice", "gIoU", "cIoU", "IoU", "Acc", "n"]


def test_the_records_are_read_once_before_the_first_step(
    every_step: Run, tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = Manifest.__getitem__

    def counted(manifest: Manifest, index: int) -> Record:
        read.append(index)
        return original(manifest, index)

    monkeypatch.setattr(Manifest, "__getitem__", counted)
    monkeypatch.setattr("medisee.train._steps", lambda *_: None)
    data = {"cache": str(tmp_path / "cache"), "val": None}
    train(configured(every_step, data=data, train={"out": str(tmp_path / "run")}))
    assert read == [*range(len(Manifest(tiny_manifest)))]  # for files, words, tokenizer and cache


def test_the_loss_falls(every_step: Run, tmp_path: Path) -> None:
    train(configured(every_step, train={"out": str(tmp_path), "steps": 40, "lr": 3e-3, "accumulation": 1}))
    curve = losses(tmp_path)
    assert sum(curve[step] for step in range(36, 41)) < 0.8 * sum(curve[step] for step in range(1, 6))


def test_resumed_equals_uninterrupted(every_step: Run, tmp_path: Path) -> None:
    whole = configured(every_step, train={"out": str(tmp_path / "whole")})
    train(whole)
    broken = configured(every_step, train={"out": str(tmp_path / "broken")})
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("medisee.training.run_log.RunLog.losses", _interrupt_at(7))
        train(broken)
    train(broken, resume=True)
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert {step: found[step] for step in (7, 8)} == pytest.approx({step: expected[step] for step in (7, 8)}, rel=1e-6)
    ours, theirs = (load_file(tmp_path / name / "last-00000008" / "model.safetensors") for name in ("broken", "whole"))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-6


def test_a_mended_manifest_changes_nothing_but_its_records(
    every_step: Run, tiny_manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is killed, a record's question mended, and the run resumed: its tokens are those that it has learnt.

    A tokenizer made of the mended texts would have other ids, and the loss would start anew.
    """
    manifest = tmp_path / "data" / "tiny.jsonl"
    shutil.copytree(tiny_manifest.parent, manifest.parent)
    data = {"train": [{"records": str(manifest)}], "val": None}
    section = {"batch_size": 1, "accumulation": 1, "save_every": 4, "steps": 8, "lr": 3e-3}
    whole, broken = (
        configured(every_step, data=data, train={**section, "out": str(tmp_path / name)})
        for name in ("whole", "broken")
    )
    train(whole)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("medisee.training.run_log.RunLog.losses", _interrupt_at(6))
        train(broken)
    order = [Mixture([4], [1], 0).draw(number).index for number in range(8)]
    mended = order[7]  # the last record that is drawn
    lines = manifest.read_text().splitlines()
    for word, other in (("organ", "abdominal viscus"), ("filters", "excretes out of"), ("makes bile", "secretes gall")):
        lines[mended] = lines[mended].replace(word, other)
    manifest.write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    train(broken, resume=True)
    assert "note: data.train[0].records: changed after step 4 was saved" in capsys.readouterr().err
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert {step: found[step] for step in (5, 6, 7)} == pytest.approx(
        {step: expected[step] for step in (5, 6, 7)}, rel=1e-6
    )
    assert found[8] != expected[8] and found[8] == pytest.approx(expected[8], rel=0.2)
    texts = ["Which organ makes bile?", lines[mended], "abdominal viscus"]
    ids = [
        AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
        for folder in (
            tmp_path / "whole" / "checkpoint",
            tmp_path / "broken" / "last-00000008",
            tmp_path / "broken" / "checkpoint",
        )
    ]
    assert ids[0] == ids[1] == ids[2]
    # The same data from the start does give other ids, so the test can tell.
    train(configured(every_step, data=data, train={**section, "out": str(tmp_path / "anew"), "steps": 1}))
    assert AutoTokenizer.from_pretrained(tmp_path / "anew" / "checkpoint")(texts)["input_ids"] != ids[0]


def test_a_saved_state_is_a_checkpoint(every_step: Run, tmp_path: Path) -> None:
    """A run that ended before its first validation: its state answers, and another run can start from it."""
    train(configured(every_step, data={"val": None}, train={"out": str(tmp_path / "run"), "steps": 2}))
    state = tmp_path / "run" / "last-00000002"
    kept, best = (load_checkpoint(folder, MediSee).state_dict() for folder in (state, tmp_path / "run" / "checkpoint"))
    assert all(torch.equal(value, best[name]) for name, value in kept.items())
    assert json.loads((state / "config.json").read_text())["run"] == {"step": 2}
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    section = {"out": str(tmp_path / "next"), "init": str(state), "steps": 1, "lr": 1e-9}
    folder = train(configured(every_step, data={"val": None}, train=section))
    after = load_file(folder / "model.safetensors")
    assert max(float((value - kept[name]).abs().max()) for name, value in after.items()) < 1e-6


def test_a_resumed_run_needs_neither_its_first_checkpoint_nor_its_data_where_they_were(
    every_step: Run, tiny_manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_manifest.parent, tmp_path / "here")

    def settings(where: str, **train: Any) -> Config:
        place = tmp_path / where
        data = {"train": [{"records": str(place / "tiny.jsonl")}], "val": str(place / "tiny.jsonl")}
        return configured(every_step, data={**data, "cache": str(place / "cache")}, train={"steps": 3, **train})

    init = str(train(settings("here", out=str(tmp_path / "first"))))
    expected = settings("here", out=str(tmp_path / "whole"), init=init)
    train(expected)
    train(settings("here", out=str(tmp_path / "broken"), init=init, save_every=2))
    shutil.rmtree(tmp_path / "broken" / "last-00000003")
    shutil.rmtree(init)
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "broken").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    train(settings("there", out=str(tmp_path / "elsewhere"), init=init, save_every=1), resume=True)
    assert "note: " not in capsys.readouterr().err
    assert losses(tmp_path / "elsewhere") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def _interrupt_at(step: int) -> Any:
    from medisee.training.run_log import RunLog

    original = RunLog.losses

    def losses_until(self: RunLog, number: int, *rest: Any, **named: Any) -> None:
        if number == step:
            raise KeyboardInterrupt
        original(self, number, *rest, **named)

    return losses_until


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Does something at the start of a step."""
    import medisee.train

    original = medisee.train._seed_step

    def seed(number: int, current: int, rank: int) -> None:
        original(number, current, rank)
        if current == step:
            act()

    monkeypatch.setattr("medisee.train._seed_step", seed)


@pytest.mark.parametrize(
    ("how", "code"),
    [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130), ("file", 0)],
    ids=["sigterm", "hangup", "ctrl-c", "file"],
)
def test_a_run_that_is_asked_to_end_saves_and_goes_on(
    every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, code: int
) -> None:
    out = tmp_path / "run"
    config = configured(every_step, train={"out": str(out), "save_every": 100, "steps": 4})

    def ask() -> None:
        (out / "stop").touch() if how == "file" else os.kill(os.getpid(), getattr(signal, how))

    at_step(monkeypatch, 3, ask)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped after step 3, which is saved in .*; continue with --resume") as caught:
        train(config)
    assert caught.value.code == code
    assert signal.getsignal(signal.SIGTERM) == before
    assert [folder.name for folder in saved_folders(out)] == ["last-00000003"]
    assert "seconds" not in json.loads((out / "run.json").read_text())
    monkeypatch.undo()
    train(config, resume=True)
    assert sorted(losses(out)) == list(range(1, 5))
    assert not (out / "stop").exists()


def test_a_hangup_is_not_heeded_under_nohup(every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        train(configured(every_step, data={"val": None}, train={"out": str(tmp_path), "steps": 2}))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert sorted(losses(tmp_path)) == [1, 2]


def figures(out: Path) -> dict[int, float]:
    """Returns the Dice of every validation in the log, each of which is there once."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [(line["step"], line["val_Dice"]) for line in lines if "val_Dice" in line]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize(("how", "save_every"), [("stopped", 4), ("stopped", 100), ("killed", 4)])
def test_a_run_that_ends_inside_a_validation_repeats_it(
    every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, save_every: int
) -> None:
    """Its step is saved before it. When it is asked to stop, no further batch is scored."""
    import medisee.training.validation as validation

    section = {"steps": 6, "val_every": 4, "save_every": save_every, "accumulation": 1}
    config = configured(every_step, train={**section, "out": str(tmp_path / "broken")})
    scored: list[int] = []
    original = validation._scores

    def scores(*arguments: Any, **more: Any) -> Any:
        scored.append(len(scored))
        if how == "killed":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGHUP)
        return original(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "_scores", scores)
        with pytest.raises(Stopped if how == "stopped" else KeyboardInterrupt):
            train(config)
    assert scored == [0]
    states = [folder.name for folder in saved_folders(tmp_path / "broken")]
    assert states == ["last-00000004"] and not (tmp_path / "broken" / "checkpoint").exists()
    train(config, resume=True)
    whole = configured(every_step, train={**section, "out": str(tmp_path / "whole")})
    train(whole)
    assert sorted(figures(tmp_path / "whole")) == [4, 6]
    assert figures(tmp_path / "broken") == pytest.approx(figures(tmp_path / "whole"), abs=1e-6)
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    kept = [json.loads((tmp_path / name / "checkpoint" / "config.json").read_text()) for name in ("broken", "whole")]
    assert kept[0]["run"]["step"] == kept[1]["run"]["step"]


@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_before_the_first_step_ends_with_a_sentence_and_leaves_nothing(
    every_step: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    code: int,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**every_step, "train": {**every_step["train"], "out": str(tmp_path / "run")}}))
    ask = getattr(signal, name)
    monkeypatch.setattr("medisee.train.build_model", lambda *_: os.kill(os.getpid(), ask) or time.sleep(5))
    assert exit_code(main, ["--config", str(path)]) == code
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "interrupted" in line]
    assert name == "SIGINT" or f"interrupted by {name}; nothing is half-written" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["scripts/train.py"], ["-m", "medisee", "train"]], ids=["script", "medisee"])
@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_during_the_imports_ends_with_a_sentence(
    tmp_path: Path, command: list[str], name: str, code: int
) -> None:
    (tmp_path / "torch.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    words = [sys.executable, *command, "--config", "configs/demo.yaml"]
    done = subprocess.run(words, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_a_request_during_the_preparation_is_heeded(
    every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers turn signals into the file, and may do so before the first step."""
    import medisee.train

    original = medisee.train.build_model

    def build(*arguments: Any) -> MediSee:
        (tmp_path / "stop").touch()
        return original(*arguments)

    monkeypatch.setattr("medisee.train.build_model", build)
    with pytest.raises(Stopped, match="stopped after step 1"):
        train(configured(every_step, train={"out": str(tmp_path)}))
    assert damage(tmp_path / "last-00000001") is None


def test_a_disk_that_cannot_hold_a_state_is_told_before_the_first_step(
    every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_100_000))
    monkeypatch.setattr("medisee.train._steps", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(InputError, match=r"train\.out .*: .* are needed, 1\.1 MB are free"):
        train(configured(every_step, train={"out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


def test_ctrl_c_twice_ends_at_once(every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(configured(every_step, train={"out": str(tmp_path), "save_every": 100}))
    assert not saved_folders(tmp_path)


def test_a_request_that_is_older_than_the_run_is_not_heeded(every_step: Run, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    (tmp_path / ".lock").touch()  # of a run that was killed
    train(configured(every_step, train={"out": str(tmp_path), "steps": 2}))
    assert sorted(losses(tmp_path)) == [1, 2]


def test_a_signal_to_a_group_with_loader_processes(every_step: Run, tmp_path: Path) -> None:
    """What SLURM, terminals and a lost connection do. The loader processes must outlive the signal, or the step could not end.

    The second run's terminal goes, so that it can neither write there nor be seen any more.
    """
    data = {**every_step["data"], "workers": 1, "val": None}
    runs: list[tuple[Path, subprocess.Popen[Any]]] = []
    terminal, side = os.openpty()
    for name in ("signal", "hangup"):
        section = {**every_step["train"], "out": str(tmp_path / name), "steps": 100_000, "save_every": 100_000}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**every_step, "data": data, "train": section}))
        command = [sys.executable, "-m", "medisee.train", "--config", str(path)]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if name == "hangup":
            # Linux gives a session's leader the terminal that it opens.
            code = "import os, sys; os.open(os.ttyname(1), os.O_RDWR); os.execv(sys.executable, sys.argv[1:])"
            command = [sys.executable, "-c", code, *command]
            streams = {"stdin": side, "stdout": side, "stderr": side}
        runs.append((tmp_path / name, subprocess.Popen(command, start_new_session=True, **streams)))
    (first, signalled), (second, lost) = runs
    try:
        while any(process.poll() is None and not logged(out) for out, process in runs):
            time.sleep(0.2)
            drain(terminal)
        os.killpg(signalled.pid, signal.SIGTERM)
        os.close(side)
        os.close(terminal)  # the kernel sends SIGHUP
        output, errors = signalled.communicate(timeout=300)
        assert lost.wait(timeout=300) == 129
    finally:
        signalled.kill()
        lost.kill()
    assert signalled.returncode == 143, errors[-2000:]
    assert b"which is saved in" in output and b"Traceback" not in errors
    assert [damage(saved_folders(out)[-1]) for out in (first, second)] == [None, None]


def drain(terminal: int) -> None:
    """Reads what a terminal shows, or its writers would wait."""
    while select.select([terminal], [], [], 0)[0]:
        os.read(terminal, 1 << 16)


def logged(out: Path) -> list[int]:
    """Returns the logged steps of a run that may just be writing."""
    try:
        return sorted(losses(out))
    except (OSError, ValueError):
        return []


def test_a_damaged_state_is_named_and_the_one_before_resumed(
    every_step: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(every_step, train={"out": str(tmp_path / "run")})
    train(config)
    expected = losses(tmp_path / "run")
    newest, before = saved_folders(tmp_path / "run")[-1], saved_folders(tmp_path / "run")[-2]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    train(config, resume=True)
    assert f"warning: {newest}: model.safetensors has" in (warning := capsys.readouterr().err)
    assert f"continuing from {before}" in warning
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-6)
    assert damage(newest) is None


def test_a_log_line_that_a_kill_cut_off_is_dropped(every_step: Run, tmp_path: Path) -> None:
    config = configured(every_step, train={"out": str(tmp_path)})
    train(config)
    shutil.rmtree(tmp_path / "last-00000008")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "tot')
    train(config, resume=True)
    assert sorted(losses(tmp_path)) == list(range(1, 9))


def test_damaged_lines_of_the_log_are_named_and_left_out(
    every_step: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(every_step, data={"val": None}, train={"out": str(tmp_path), "steps": 2, "save_every": 1})
    train(config)
    shutil.rmtree(tmp_path / "last-00000002")
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b"\x00\x00\n[3]\n" + b'{"step": "2"}\n{"total": 1.0}\n{"step": NaN}\n\xff\n' + b"[" * 99_999 + b"\n")
    train(config, resume=True)
    assert (
        f"warning: {tmp_path / 'log.jsonl'}: damaged, and left out: line 3, 4, 5, 6, 7, 8, 9."
        in capsys.readouterr().err
    )
    assert sorted(losses(tmp_path)) == [1, 2]


def test_dropout_is_the_same_after_resuming(every_step: Run, tmp_path: Path) -> None:
    model = {**every_step["model"], "mllm": {**every_step["model"]["mllm"], "train": "lora"}}
    model["mllm"]["lora"] = {"rank": 2, "dropout": 0.5}
    whole = configured({**every_step, "model": model}, train={"out": str(tmp_path / "whole"), "lr": 1e-2})
    train(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "last-00000008")
    train(configured({**every_step, "model": model}, train={"out": str(tmp_path / "broken"), "lr": 1e-2}), resume=True)
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_another_batch_size_resumes_the_same_run(every_step: Run, tmp_path: Path) -> None:
    """The draws of a step stay; how they are cut into micro-batches weighs their means a little differently."""
    whole = configured(every_step, train={"out": str(tmp_path / "run"), "global_batch": 4, "batch_size": 2})
    train(whole)
    expected = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "last-00000008")
    train(configured(every_step, train={"out": str(tmp_path / "run"), "global_batch": 4, "batch_size": 4}), resume=True)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-2)
    with pytest.raises(InputError, match=r"effective batch of 4 images, now it is 8; set train\.global_batch=4"):
        train(configured(every_step, train={"out": str(tmp_path / "run"), "global_batch": 8}), resume=True)


def test_a_corrupt_image_ends_the_run_or_is_counted(
    every_step: Run, tiny_manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(tiny_manifest.parent, copy)
    (copy / "1.png").write_bytes((copy / "1.png").read_bytes()[:50])
    data = {"train": [{"records": str(copy / "tiny.jsonl")}], "val": None}
    with pytest.raises(InputError, match=r"1\.png"):
        train(configured(every_step, data=data, train={"out": str(tmp_path / "stops")}))
    skipping = configured(every_step, data={**data, "skip_corrupt": True}, train={"out": str(tmp_path / "skips")})
    train(skipping)
    named = [line for line in capsys.readouterr().err.splitlines() if "skipped: " in line]
    assert len(named) == 1 and "1.png" in named[0]
    counts = [
        json.loads(line).get("skipped", 0) for line in (tmp_path / "skips" / "log.jsonl").read_text().splitlines()
    ]
    assert counts == sorted(counts) and counts[-1] >= 7  # eight passes over four images, one of them unreadable
    shutil.rmtree(tmp_path / "skips" / "last-00000008")
    train(skipping, resume=True)
    again = [json.loads(line).get("skipped", 0) for line in (tmp_path / "skips" / "log.jsonl").read_text().splitlines()]
    assert again == counts


def test_a_corrupt_image_without_cached_features_is_skipped_too(
    every_step: Run, tiny_manifest: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_manifest.parent, tmp_path / "data")
    (tmp_path / "data" / "1.png").write_bytes(b"no image")
    (tmp_path / "data" / "2.png").unlink()
    data = {
        "train": [{"records": str(tmp_path / "data" / "tiny.jsonl")}],
        "val": None,
        "cache": str(tmp_path / "cache"),
    }
    with pytest.raises(InputError, match=r"(1|2)\.png"):
        train(configured(every_step, data=data, train={"out": str(tmp_path / "run"), "steps": 2}))
    train(configured(every_step, data={**data, "skip_corrupt": True}, train={"out": str(tmp_path / "run"), "steps": 3}))
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3]


def test_a_full_disk_ends_with_a_sentence(every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = configured(every_step, train={"out": str(tmp_path)})
    at_step(monkeypatch, 5, lambda: monkeypatch.setattr("medisee.training.resume.save_file", full))
    with pytest.raises(InputError, match=r"last-00000006: cannot be saved .*No space left.*last-00000003 is untouched"):
        train(config)
    assert damage(tmp_path / "last-00000003") is None
    monkeypatch.undo()
    at_step(monkeypatch, 5, lambda: monkeypatch.setattr("medisee.training.run_log.RunLog._append", full))
    with pytest.raises(InputError, match=r"the disk is full .*No space left.*continue with --resume"):
        train(config, resume=True)
    monkeypatch.undo()
    train(config, resume=True)
    assert sorted(losses(tmp_path)) == list(range(1, 9))


def test_two_ranks_with_half_the_batch_equal_one(tiny_config: Run, tmp_path: Path) -> None:
    """Under DeepSpeed's own launcher; `test_optimization.py` starts its ranks itself."""
    section = {"steps": 4, "log_every": 1, "save_every": 4, "warmup": 2, "zero_stage": 2, "dtype": "bfloat16"}
    one = {**tiny_config, "train": {**tiny_config["train"], **section, "batch_size": 2, "out": str(tmp_path / "one")}}
    train(config_from(one, where="test"))
    two = {**tiny_config, "train": {**one["train"], "batch_size": 1, "out": str(tmp_path / "two")}}
    _deepspeed(two, tmp_path / "two.yaml")
    assert sorted(losses(tmp_path / "two")) == [1, 2, 3, 4]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    assert (tmp_path / "two" / "checkpoint" / "model.safetensors").exists()
    assert damage(tmp_path / "two" / "last-00000004") is None


def _deepspeed(run: Run, path: Path) -> None:
    path.write_text(yaml.safe_dump(run))
    launcher = Path(sys.executable).with_name("deepspeed")
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    port = str(free_port())
    command = [sys.executable, str(launcher), "--num_gpus", "2", "--master_port", port, str(script)]
    # Into a file and in a separate session: ranks that hang would outlive the launcher and hold a pipe open for ever.
    with path.with_suffix(".txt").open("w") as output:
        process = subprocess.Popen(
            [*command, "--config", str(path)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=600)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, path.with_suffix(".txt").read_text()[-3000:]


def test_the_checkpoint_is_chosen_on_val(every_step: Run, tmp_path: Path) -> None:
    folder = train(configured(every_step, train={"out": str(tmp_path), "steps": 12}))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    figures = {line["step"]: (line["val_Dice"] + line["val_IoU"]) / 2 for line in lines if "val_Dice" in line}
    kept = json.loads((folder / "config.json").read_text())["run"]["step"]
    assert sorted(figures) == [4, 8, 12]
    assert figures[kept] == max(figures.values())


def test_a_vision_tower_works_beside_cached_features(every_step: Run, tmp_path: Path) -> None:
    vision = {"image_tokens": "vision_tower", "vision_hidden": 64, "vision_layers": 2, "vision_size": 28}
    model = {**every_step["model"], "mllm": {**every_step["model"]["mllm"], **vision}}
    data = {**every_step["data"], "cache": str(tmp_path / "cache")}
    train(configured({**every_step, "model": model, "data": data}, train={"out": str(tmp_path / "run"), "steps": 2}))
    assert sorted(losses(tmp_path / "run")) == [1, 2]


def test_a_source_joins_at_its_step_and_masks_can_be_few(every_step: Run, tiny_manifest: Path, tmp_path: Path) -> None:
    sources = [{"records": str(tiny_manifest)}, {"records": str(tiny_manifest), "from_step": 4, "weight": 3}]
    section = {"out": str(tmp_path), "mask_from": 2, "masks_per_image": 1, "true_box": 1.0, "true_box_until": 6}
    train(configured(every_step, data={"train": sources}, train=section))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    dice = {line["step"]: line["dice"] for line in lines if "dice" in line}
    assert [dice[step] for step in (1, 2)] == [0, 0]
    assert all(dice[step] > 0 for step in range(3, 9))


def test_a_loss_that_is_not_finite_names_the_records(every_step: Run, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"step 1: the loss is not finite on records .+"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("medisee.models.losses.l1_loss", lambda boxes, truth: boxes.sum(1) * torch.nan)
        train(configured(every_step, train={"out": str(tmp_path)}))


@pytest.mark.parametrize("fault", ["loss", "record"])
def test_a_bad_micro_batch_late_in_a_step_changes_no_weight(
    every_step: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The last of a step's two micro-batches is bad; only its records are named."""
    from medisee.data.dataset import TrainingBatches
    from medisee.models.processing import Batch
    from medisee.training.optimization import Optimization

    read: list[list[str]] = []
    original_next, original_losses = TrainingBatches.__next__, Optimization.losses
    taken: list[None] = []

    def next_batch(batches: TrainingBatches) -> Batch:
        if fault == "record" and len(read) == 3:
            raise InputError("x.png: cannot be read.")
        batch = original_next(batches)
        read.append(sorted({query.record for query in batch.queries}))
        return batch

    def losses(self: Optimization, batch: Batch, **more: Any) -> Any:
        terms = original_losses(self, batch, **more)
        return replace(terms, total=terms.total * torch.nan) if fault == "loss" and len(read) == 4 else terms

    monkeypatch.setattr(TrainingBatches, "__next__", next_batch)
    monkeypatch.setattr(Optimization, "losses", losses)
    step = Optimization.step
    monkeypatch.setattr(Optimization, "step", lambda self: (taken.append(None), step(self))[1])
    with pytest.raises(InputError) as caught:
        train(configured(every_step, train={"out": str(tmp_path)}))
    (problem,) = caught.value.problems
    expected = "x.png: cannot be read." if fault == "record" else f"not finite on records {', '.join(read[3])};"
    assert expected in problem
    assert len(taken) == 1


def test_bad_input_ends_with_2_and_a_sentence(
    every_step: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**every_step, "train": {**every_step["train"], "out": str(tmp_path / "new")}}))
    cases = {
        ("--config", str(tmp_path / "none.yaml")): "none.yaml",
        ("--config", str(path), "--resume"): "nothing to resume",
        ("--config", str(path), "train.lrr=1"): "Did you mean 'lr'?",
        ("--config", str(path), "data.train=[]"): "no training manifest",
        ("--config", str(path), "data.val=missing.jsonl"): "missing.jsonl",
    }
    for arguments, expected in cases.items():
        assert exit_code(main, arguments) == 2
        message = capsys.readouterr().err
        assert expected in message and "Traceback" not in message
    assert not (tmp_path / "new").exists()


def test_resuming_with_another_configuration_is_refused(every_step: Run, tmp_path: Path) -> None:
    train(configured(every_step, train={"out": str(tmp_path / "run"), "steps": 3}))
    with pytest.raises(InputError, match="another configuration"):
        train(configured(every_step, train={"out": str(tmp_path / "run"), "steps": 4}), resume=True)
