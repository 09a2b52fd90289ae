"""Two ranks against one: ZeRO 2 and 3, offloading, validation, saving and resuming; and the effective batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from free_port import free_port
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from medisee.config import Config, Train
from medisee.config.load import config_from
from medisee.foundation.errors import InputError
from medisee.train import train
from medisee.training.optimization import deepspeed_config, describe_batch, effective_batch, split_batch, warmup_decay

Run = dict[str, Any]
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""ZeRO 3 leaves small weights whole, which here would be all of them."""
JOBS: dict[str, Run] = {
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3, "deepspeed": CUT_ALL},
    "zero3_bf16": {"zero_stage": 3, "deepspeed": CUT_ALL, "dtype": "bfloat16"},
    "zero3_l_sim": {"zero_stage": 3, "deepspeed": CUT_ALL},
    "offload_optimizer": {"zero_stage": 2, "offload": "optimizer"},
    "offload_parameters": {"zero_stage": 3, "offload": "parameters", "deepspeed": CUT_ALL},
    "zero0": {"zero_stage": 0},
    "resumed_zero2": {"zero_stage": 2},
    "resumed_zero3": {"zero_stage": 3, "deepspeed": CUT_ALL},
    "compiled": {"zero_stage": 2, "compile_layers": True},
    "nan": {"zero_stage": 2},
    "term": {"zero_stage": 2},
    "refused": {"zero_stage": 2},
    "unreadable": {"zero_stage": 3, "deepspeed": CUT_ALL},
}
FAULTS = ("nan", "term", "refused", "unreadable")


def logged(out: Path, key: str = "total") -> dict[int, float]:
    """Returns a figure of every logged step that has it."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def cut_back(run: Path, copy: Path) -> None:
    """Copies a run as it was after step 2 of 4."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "last-00000004")


@pytest.fixture(scope="module")
def base(tiny_config: Run, tiny_manifest: Path) -> Run:
    """Four steps of four images, which one rank reads as 2 x 2 and two ranks as 1 x 2 each."""
    section = {"steps": 4, "log_every": 1, "save_every": 2, "val_every": 2, "warmup": 2, "global_batch": 4, "lr": 1e-3}
    data = {**tiny_config["data"], "val": str(tiny_manifest)}
    # Three images a batch: val's four make two batches, one for each rank.
    evaluation = {**tiny_config["eval"], "batch_size": 3}
    return {**tiny_config, "data": data, "eval": evaluation, "train": {**tiny_config["train"], **section}}


def changed(base: Run, out: Path, **section: Any) -> Config:
    return config_from({**base, "train": {**base["train"], "out": str(out), **section}}, where="test")


def with_l_sim(base: Run) -> Run:
    return {**base, "loss": {"js": 2.0, "mse": 1.0}}


@pytest.fixture(scope="module")
def runs(base: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains once on one rank, here, and once for each job on two ranks; returns the folder of all runs."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    train(changed(base, folder / "one", batch_size=2))
    train(changed(base, folder / "one_bf16", batch_size=2, dtype="bfloat16"))
    train(changed(with_l_sim(base), folder / "one_l_sim", batch_size=2))
    jobs = []
    for name, section in JOBS.items():
        if resumed := name.startswith("resumed"):
            cut_back(folder / "one", folder / name)
        values = with_l_sim(base) if name.endswith("l_sim") else base
        config = changed(values, folder / name, batch_size=1, **section)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        jobs.append({"config": str(path), "resume": resumed, "fault": name if name in FAULTS else None})
    jobs.append({"config": str(folder / "term.yaml"), "resume": True, "fault": None})
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    two_ranks(folder / "jobs.json")
    return folder


def two_ranks(jobs: Path) -> None:
    port = str(free_port())
    shared = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(Path(__file__).with_name("ranks_program.py")), str(jobs)]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(jobs.parent / f"stderr_{rank}.txt").open("w"),
        )
        for rank in (0, 1)
    ]
    try:
        codes = [process.wait(timeout=1000) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [(jobs.parent / f"stderr_{rank}.txt").read_text()[-3000:] for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(errors)


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "offload_optimizer", "offload_parameters"])
def test_two_ranks_are_one(runs: Path, name: str) -> None:
    expected, found = logged(runs / "one"), logged(runs / name)
    assert sorted(found) == list(range(1, 5))
    assert found == pytest.approx(expected, rel=1e-4)
    assert logged(runs / name, "gradient_norm") == pytest.approx(logged(runs / "one", "gradient_norm"), rel=1e-3)
    ours, theirs = (load_file(runs / run / "last-00000004" / "model.safetensors") for run in (name, "one"))
    assert sorted(ours) == sorted(theirs)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-4


def test_two_compiled_ranks_are_one(runs: Path) -> None:
    assert sorted(logged(runs / "compiled")) == list(range(1, 5))
    assert logged(runs / "compiled") == pytest.approx(logged(runs / "one"), rel=1e-4)


def test_two_ranks_are_one_in_bf16(runs: Path) -> None:
    expected, found = logged(runs / "one_bf16"), logged(runs / "zero3_bf16")
    assert found == pytest.approx(expected, rel=2e-4)
    state = load_file(runs / "zero3_bf16" / "last-00000004" / "model.safetensors")
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    # Stored in full: 16-bit weights would have zeros in their lower half.
    assert any(bool((value.view(torch.int32) & 0xFFFF).any()) for value in state.values() if value.dim() == 2)


def test_two_ranks_are_one_in_fine_tuning(runs: Path) -> None:
    """L_sim's second reading of the routers gathers their weights on every rank, whatever its images ask."""
    assert logged(runs / "zero3_l_sim") == pytest.approx(logged(runs / "one_l_sim"), rel=1e-4)
    for key in ("js", "mse"):
        found = logged(runs / "zero3_l_sim", key)
        # Both are made of differences of numbers near 1, which float32 knows to 1e-7.
        assert found == pytest.approx(logged(runs / "one_l_sim", key), rel=1e-3, abs=1e-7)
        assert max(found.values()) > 1e-4


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_validation_is_shared_out_and_is_that_of_one_rank(runs: Path, name: str) -> None:
    for key in ("val_Dice", "val_IoU", "val_gIoU"):
        assert logged(runs / name, key) == pytest.approx(logged(runs / "one", key), abs=1e-3)
    assert sorted(logged(runs / name, "val_Dice")) == [2, 4]
    kept = load_file(runs / name / "checkpoint" / "model.safetensors")
    expected = load_file(runs / "one" / "checkpoint" / "model.safetensors")
    assert {key: value.shape for key, value in kept.items()} == {key: value.shape for key, value in expected.items()}


@pytest.mark.parametrize("name", ["resumed_zero2", "resumed_zero3"])
def test_one_rank_resumed_by_two(runs: Path, name: str) -> None:
    expected, found = logged(runs / "one"), logged(runs / name)
    assert found == pytest.approx(expected, rel=1e-4)
    assert [found[step] for step in (1, 2)] == [expected[step] for step in (1, 2)]


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_ranks_resumed_by_one(runs: Path, base: Run, name: str, tmp_path: Path) -> None:
    cut_back(runs / name, tmp_path / "run")
    train(changed(base, tmp_path / "run", batch_size=2, **JOBS[name]), resume=True)
    assert logged(tmp_path / "run") == pytest.approx(logged(runs / name), rel=1e-4)


def test_moments_are_saved_under_the_parameters_names(runs: Path) -> None:
    """So that any number of ranks can read them. ZeRO also has moments of what never had a gradient: zeros."""
    one, three = (load_file(runs / name / "last-00000002" / "optimizer.safetensors") for name in ("one", "zero3"))
    assert set(one) < set(three)
    for key, value in three.items():
        if key.startswith("exp_avg"):
            torch.testing.assert_close(value, one.get(key, torch.zeros_like(value)), rtol=1e-3, atol=1e-6)


def test_a_loss_that_is_not_finite_on_one_rank_ends_both(runs: Path) -> None:
    first, second = (json.loads((runs / "nan" / f"ended_{rank}.json").read_text()) for rank in (0, 1))
    assert (first["how"], second) == ("error", {"how": "error", "problems": []})
    assert "step 1: the loss is not finite on records r" in first["problems"][0]


def test_a_record_that_one_rank_cannot_read_ends_both_before_the_step(runs: Path) -> None:
    """In the middle of a step: the other rank still needs this one's part of every weight."""
    first, second = (json.loads((runs / "unreadable" / f"ended_{rank}.json").read_text()) for rank in (0, 1))
    problem = "r7.png: cannot be read; copy it again."
    assert (first, second) == ({"how": "error", "problems": [problem]}, {"how": "error", "problems": []})
    assert sorted(logged(runs / "unreadable")) == [1]


def test_what_one_rank_alone_refuses_ends_both(runs: Path) -> None:
    """Such as a manifest that only another machine has."""
    first, second = (json.loads((runs / "refused" / f"ended_{rank}.json").read_text()) for rank in (0, 1))
    problem = "train.jsonl: cannot be read on this machine; copy it there."
    assert (first, second) == ({"how": "error", "problems": [problem]}, {"how": "error", "problems": []})


def test_sigterm_to_one_rank_ends_both_with_their_state_saved_and_both_go_on(runs: Path) -> None:
    ends = [json.loads((runs / "term" / f"ended_{rank}.json").read_text()) for rank in (0, 1)]
    assert ends == [{"how": "stopped", "code": 143}] * 2
    resumed = [json.loads((runs / "term" / f"resumed_{rank}.json").read_text()) for rank in (0, 1)]
    assert resumed == [{"how": "finished"}] * 2
    assert logged(runs / "term") == pytest.approx(logged(runs / "one"), rel=1e-4)
    assert (runs / "term" / "last-00000003" / "files.json").exists()


def section(**values: Any) -> Train:
    return config_from({"train": values}, where="test").train


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 12))
def test_the_effective_batch_stays_when_the_number_of_ranks_changes(world: int, size: int, micros: int) -> None:
    whole = world * size * micros
    split = split_batch(section(global_batch=whole, batch_size=size), world)
    assert (split.accumulation, effective_batch(split, world)) == (micros, whole)


@given(st.integers(1, 700), st.integers(1, 8), st.integers(1, 20))
def test_numbers_that_are_named_do_work(whole: int, world: int, size: int) -> None:
    settings = section(global_batch=whole, batch_size=size)
    try:
        assert effective_batch(split_batch(settings, world), world) == whole
    except InputError as error:
        (problem,) = error.problems
        named = [word.strip(",.") for word in problem.split() if word.startswith("train.") and "=" in word.strip("=")]
        assert named
        for name, value in (word.removeprefix("train.").split("=") for word in named):
            fixed = section(**({"global_batch": whole, "batch_size": size} | {name: int(value)}))
            assert effective_batch(split_batch(fixed, world), world) == fixed.global_batch


def test_without_a_global_batch_nothing_changes() -> None:
    settings = section(batch_size=3, accumulation=7)
    assert split_batch(settings, 4) is settings
    assert describe_batch(settings, 4).startswith("effective batch 84 images = 4 ranks x 3 x 7 (")
    assert describe_batch(section(), 1).startswith("effective batch 150 images = 1 rank x 15 x 10 (")


def test_deepspeeds_settings() -> None:
    assert deepspeed_config(section())["zero_optimization"] == {"stage": 2}
    offloaded = deepspeed_config(section(zero_stage=3, offload="parameters", deepspeed=CUT_ALL, clip=0.5))
    assert offloaded["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    }
    assert (offloaded["gradient_clipping"], offloaded["gradient_accumulation_steps"]) == (0.5, 10)


@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 0), ("parameters", 2)])
def test_offloading_that_the_stage_cannot_do_is_refused(offload: str, stage: int) -> None:
    with pytest.raises(InputError, match=f"offload {offload} needs zero_stage"):
        section(offload=offload, zero_stage=stage)


def test_warmup_decay() -> None:
    settings = section(warmup=4, steps=10)
    assert [warmup_decay(settings, step) for step in range(11)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    )
