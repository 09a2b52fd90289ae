"""The launchers, run with a stand-in for deepspeed, srun and scontrol that writes down how it was called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = """#!/usr/bin/env bash
{ printf '%s\\n' "$@"; echo "--- RANK=${RANK:-} LOCAL_RANK=${LOCAL_RANK:-} WORLD_SIZE=${WORLD_SIZE:-} MASTER=${MASTER_ADDR:-}:${MASTER_PORT:-}"; } >> "$RECORDS/${0##*/}"
"""
UNTIL_STOPPED = 'while [[ ! -e $OUT/stop ]]; do sleep 0.1; done; rm "$OUT/stop"\n'


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """A folder of stand-ins first on PATH, and a configuration whose run folder is $OUT."""
    (tmp_path / "bin").mkdir()
    out = tmp_path / "runs" / "x"
    (tmp_path / "run.yaml").write_text(f"train: {{out: {tmp_path / 'elsewhere'}}}\n", encoding="utf-8")
    (tmp_path / "hosts.txt").write_text("node1 slots=4\nnode2 slots=4\n", encoding="utf-8")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    return {**kept, "PATH": path, "PYTHON": sys.executable, "RECORDS": str(tmp_path), "OUT": str(out)}


def stand_in(world: dict[str, str], name: str, more: str = "") -> None:
    path = Path(world["RECORDS"]) / "bin" / name
    path.write_text(RECORD + more, encoding="utf-8")
    path.chmod(0o755)


def called(world: dict[str, str], name: str) -> list[str]:
    return (Path(world["RECORDS"]) / name).read_text(encoding="utf-8").splitlines()


def start(world: dict[str, str], script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, env=world, capture_output=True, text=True, timeout=120)


def run_arguments(world: dict[str, str]) -> list[str]:
    return [str(Path(world["RECORDS"]) / "run.yaml"), "--resume", "train.lr=1e-4", f"train.out={world['OUT']}"]


def test_one_machine(world: dict[str, str]) -> None:
    stand_in(world, "deepspeed")
    done = start(world, "train_4gpu.sh", *run_arguments(world))
    assert done.returncode == 0, done.stderr
    config, *rest = run_arguments(world)
    launcher = ["--num_gpus", "4", "--master_port", "29500"]
    assert called(world, "deepspeed")[:-1] == [*launcher, "scripts/train.py", "--config", config, *rest]
    start({**world, "GPUS": "2", "MASTER_PORT": "1234"}, "train_4gpu.sh", *run_arguments(world))
    assert "--num_gpus 2 --master_port 1234" in " ".join(called(world, "deepspeed"))


def test_several_machines_of_a_hostfile(world: dict[str, str]) -> None:
    stand_in(world, "deepspeed")
    hosts = str(Path(world["RECORDS"]) / "hosts.txt")
    done = start(world, "train_hostfile.sh", hosts, *run_arguments(world))
    assert done.returncode == 0, done.stderr
    config, *rest = run_arguments(world)
    launcher = ["--hostfile", hosts, "--master_port", "29500"]
    assert called(world, "deepspeed")[:-1] == [*launcher, "scripts/train.py", "--config", config, *rest]


@pytest.mark.parametrize("script", ["train_4gpu.sh", "train_hostfile.sh"])
def test_a_signal_becomes_a_file_which_lets_the_ranks_save(world: dict[str, str], script: str) -> None:
    stand_in(world, "deepspeed", UNTIL_STOPPED)
    hosts = [str(Path(world["RECORDS"]) / "hosts.txt")] if "hostfile" in script else []
    command = ["bash", str(ROOT / "scripts" / script), *hosts, *run_arguments(world)]
    process = subprocess.Popen(command, env=world, stderr=subprocess.PIPE, text=True)
    try:
        waiting_until = time.monotonic() + 60
        while not (Path(world["RECORDS"]) / "deepspeed").exists() and time.monotonic() < waiting_until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "asked the ranks to stop" in errors
    assert not (Path(world["OUT"]) / "stop").exists()


def test_the_launchers_exit_code_is_kept(world: dict[str, str]) -> None:
    stand_in(world, "deepspeed", "exit 2\n")
    assert start(world, "train_4gpu.sh", *run_arguments(world)).returncode == 2


SLURM = {"SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "77"}
# What srun does for one of its tasks.
TASK = 'shift; SLURM_PROCID=5 SLURM_LOCALID=1 exec "$@"\n'


def slurm(world: dict[str, str], *arguments: str, task: str = "") -> subprocess.CompletedProcess[str]:
    stand_in(world, "srun", TASK)
    stand_in(world, "scontrol", "[[ $1 == show ]] && printf 'node1\\nnode2\\n' || true\n")
    stand_in(world, "task", task)
    # The configuration is read by Python, the rank is the stand-in.
    python = Path(world["RECORDS"]) / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\n[[ $1 == - ]] && exec "{sys.executable}" "$@"\nexec task "$@"\n')
    python.chmod(0o755)
    return start({**world, **SLURM, "PYTHON": str(python)}, "train_slurm.sh", *arguments)


def test_slurm_gives_every_task_its_rank(world: dict[str, str]) -> None:
    done = slurm(world, *run_arguments(world))
    assert done.returncode == 0, done.stderr
    config, *rest = run_arguments(world)
    ranks = "--- RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 MASTER=node1:29500"
    assert called(world, "task") == ["scripts/train.py", "--config", config, *rest, ranks]
    assert "requeue" not in called(world, "scontrol")


def test_slurm_requeues_only_what_a_signal_has_ended(world: dict[str, str]) -> None:
    assert slurm(world, *run_arguments(world), task="exit 143\n").returncode == 143
    assert called(world, "scontrol")[-3:-1] == ["requeue", "77"]
    assert slurm(world, *run_arguments(world), task="exit 2\n").returncode == 2
    assert called(world, "scontrol").count("requeue") == 1


@pytest.mark.parametrize("given", [[], ["--fresh"], ["--resume"]])
@pytest.mark.parametrize("saved", [True, False])
def test_a_requeued_job_resumes_if_there_is_a_state(world: dict[str, str], saved: bool, given: list[str]) -> None:
    if saved:
        (Path(world["OUT"]) / "last-00000010").mkdir(parents=True)
    config = str(Path(world["RECORDS"]) / "run.yaml")
    done = slurm({**world, "SLURM_RESTART_COUNT": "1"}, config, *given, f"train.out={world['OUT']}")
    assert done.returncode == 0, done.stderr
    found = [argument for argument in called(world, "task") if argument in ("--resume", "--fresh")]
    assert found == (["--resume"] if saved else given)


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("train_4gpu.sh", [], "'' is not a configuration"),
        ("train_4gpu.sh", ["no.yaml"], "'no.yaml' is not a configuration"),
        ("train_hostfile.sh", ["no.txt", "configs/medisee_7b.yaml"], "'no.txt' is not a hostfile"),
        ("train_slurm.sh", ["no.yaml"], "'no.yaml' is not a configuration"),
        ("train_4gpu.sh", ["configs/medisee_7b.yaml", "train.lrr=1"], "Did you mean 'lr'?"),
    ],
)
def test_bad_input_starts_nothing(world: dict[str, str], script: str, arguments: list[str], expected: str) -> None:
    for name in ("deepspeed", "srun", "scontrol"):
        stand_in(world, name)
    done = start(world, script, *arguments)
    assert done.returncode == 2
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not [name for name in ("deepspeed", "srun") if (Path(world["RECORDS"]) / name).exists()]


@pytest.mark.parametrize("gpus", ["0", "two", "1 2", "-1"])
def test_a_wrong_number_of_gpus_starts_nothing(world: dict[str, str], gpus: str) -> None:
    stand_in(world, "deepspeed")
    done = start({**world, "GPUS": gpus}, "train_4gpu.sh", *run_arguments(world))
    assert done.returncode == 2 and f"GPUS='{gpus}' is not a number of GPUs" in done.stderr
    assert not (Path(world["RECORDS"]) / "deepspeed").exists()


def test_a_missing_launcher_is_told(world: dict[str, str]) -> None:
    done = start({**world, "PATH": "/usr/bin:/bin"}, "train_4gpu.sh", *run_arguments(world))
    assert done.returncode == 2 and "'deepspeed' is not installed" in done.stderr


def test_slurm_outside_slurm_is_told(world: dict[str, str]) -> None:
    done = start(world, "train_slurm.sh", *run_arguments(world))
    assert done.returncode != 0 and "start this script with sbatch" in done.stderr


def test_arguments_with_spaces_stay_whole(world: dict[str, str]) -> None:
    stand_in(world, "deepspeed")
    config = Path(world["RECORDS"]) / "a run.yaml"
    config.write_text("train: {steps: 1}\n", encoding="utf-8")
    done = start(world, "train_4gpu.sh", str(config), f"train.out={world['OUT']} x", "data.val='a b'")
    assert done.returncode == 0, done.stderr
    assert called(world, "deepspeed")[-4:-1] == [str(config), f"train.out={world['OUT']} x", "data.val='a b'"]
