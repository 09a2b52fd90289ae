"""The commands that prepare data; what the data sets hold is tested beside their readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medisee.foundation.errors import exit_code
from medisee.prepare_data import main
from medisee.records.manifest import Manifest

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def med2d(tmp_path: Path) -> Path:
    """A folder like SA-Med2D-20M: five cases of one data set, one of them with an empty mask."""
    root = tmp_path / "SAMed2Dv1"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    index = {}
    for case in range(5):
        stem = f"ct_00--BTCV--case{case}--z_0001"
        mask = np.zeros((20, 30), np.uint8)
        mask[4:9, 5:15] = 255 * (case > 0)
        Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30).astype(np.uint8)).save(
            root / f"images/{stem}.png"
        )
        Image.fromarray(mask).save(root / f"masks/{stem}--0005_000.png")
        index[f"images/{stem}.png"] = [f"masks/{stem}--0005_000.png"]
    (root / "SAMed2D_v1.json").write_text(json.dumps(index))
    (root / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps({"BTCV": {"liver": 5}, "AMOS": {"liver": 1}}))
    return root


def refused(capsys: Capture, *argv: str | Path) -> str:
    """Runs a command that ends with exit code 2; returns what it says."""
    assert exit_code(main, [str(word) for word in argv]) == 2
    return capsys.readouterr().err


def told(capsys: Capture, argv: Sequence[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_sa_med2d_writes_manifests_counts_and_run_facts(med2d: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    main(["sa-med2d", "--root", str(med2d), "--out", str(out), "--val", "0.2", "--test", "0.2", "--seed", "3"])
    printed = capsys.readouterr().out
    counts = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:4]}
    assert counts.keys() == {"train", "val", "test"}
    assert sum(int(images) for images, _, _ in counts.values()) == 4
    assert "left out: 1 file(s), empty mask" in printed
    assert "left out: 1 file(s), no target" in printed
    assert printed.splitlines()[-1].startswith("done: 4 images in ")
    assert sorted(path.name for path in out.iterdir()) == [
        "rejects.jsonl",
        "run.json",
        "test.jsonl",
        "train.jsonl",
        "val.jsonl",
    ]
    Manifest(out / "train.jsonl", root=med2d).check_files()
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["data"] == "sa-med2d"
    assert run["settings"]["val"] == 0.2
    assert run["seed"] == 3
    assert run["seconds"] >= 0


def test_sa_med2d_tells_all_wrong_options_before_it_reads(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    said = refused(
        capsys, "sa-med2d", "--root", tmp_path, "--out", tmp_path / "file" / "out", "--val", "nan", "--workers", "0"
    ) + refused(capsys, "sa-med2d", "--root", tmp_path, "--out", tmp_path, "--val", ".5", "--test", ".5")
    for options in ("--workers 2 --min-area 5 --index-only", "--subset 5 liver=x"):
        said += refused(capsys, "sa-med2d", "--root", tmp_path, "--out", tmp_path, *options.split())
    assert "--workers: is about masks, which --index-only does not read" in said
    assert "--min-area: is about masks" in said
    assert "--subset 'liver=x': expected a number" in said
    assert f"{tmp_path / 'file'} is a file; expected a folder" in said
    assert "--workers is 0; expected 1 or more" in said
    assert "--val nan --test 0.1: expected shares" in said
    assert "--val 0.5 --test 0.5: expected shares" in said
    assert "SAMed2D_v1" not in said


def test_sa_med2d_takes_a_subset_by_names(med2d: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    main(["sa-med2d", "--root", str(med2d), "--out", str(out), "--subset", "3", "--index-only", "--val", "0"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("done: 3 images in ")
    assert json.loads((out / "run.json").read_text())["settings"]["subset"] == ["3"]
    said = refused(capsys, "sa-med2d", "--root", med2d, "--out", out, "--subset", "3", "livr=2")
    assert "--subset livr=2: expected a category" in said and "Did you mean 'liver'?" in said


def test_sa_med2d_tells_what_is_no_data_set(med2d: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert "SAMed2D_v1.json: expected" in refused(capsys, "sa-med2d", "--root", tmp_path, "--out", out)
    said = refused(capsys, "sa-med2d", "--root", med2d, "--out", out, "--datasets", "BTCW")
    assert "'BTCW'" in said
    assert "Did you mean 'BTCV'?" in said
    assert not out.exists()


def test_demo_writes_data_and_run_facts(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "demo"
    argv = ["demo", "--out", str(out), "--copies", "0", "--limit", "1", "--train-questions", "2"]
    main(argv)
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"done: {out} holds train_class.jsonl (" in last
    assert f"test.jsonl ({len(Manifest(out / 'test.jsonl'))} images)" in last
    run = json.loads((out / "run.json").read_text())
    assert (run["settings"]["copies"], run["settings"]["limit"], run["settings"]["train_questions"]) == (0, 1, 2)
    (out / "run.json").unlink()
    main(argv)  # an earlier demo data set may be replaced
    assert (out / "run.json").is_file()


def test_demo_refuses_wrong_numbers_and_foreign_folders(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "thesis.txt").write_text("")
    said = refused(capsys, "demo", "--out", tmp_path, "--copies", "-1", "--train-questions", "0")
    assert "copies is -1; expected 0 or more" in said
    assert "train_questions is 0; expected 1 or more" in said
    assert "holds 'thesis.txt', which is not of an earlier demo data set" in said
    assert "is a file" in refused(capsys, "demo", "--out", tmp_path / "thesis.txt" / "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_ask_adds_questions_to_what_sa_med2d_wrote(med2d: Path, tmp_path: Path, capsys: Capture) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    main(["sa-med2d", "--root", str(med2d), "--out", str(plain), "--val", "0.2", "--test", "0.2"])
    capsys.readouterr()
    main(
        ["ask", "--records", str(plain), "--root", str(med2d), "--bank", "abdomen", "--out", str(out), "--copies", "1"]
    )
    printed = capsys.readouterr().out.splitlines()
    images = len(Manifest(plain / "train.jsonl", root=med2d))
    assert printed[-1].startswith(f"done: {out} holds train_class.jsonl ({2 * images} images)")
    assert {path.name for path in out.glob("*.json*")} == {
        "asked.json",
        "categories.json",
        "run.json",
        "test.jsonl",
        "test_seen.jsonl",
        "train_class.jsonl",
        "train_reasoning.jsonl",
        "val.jsonl",
    }
    for name in ("train_reasoning", "test", "test_seen"):
        manifest = Manifest(out / f"{name}.jsonl")
        manifest.check_files()
        assert all(qa.perspective != "class" for record in manifest for target in record.targets for qa in target.qa)
    assert json.loads((out / "run.json").read_text())["settings"]["bank"] == "abdomen"


def test_ask_refuses_a_bank_that_is_none(med2d: Path, tmp_path: Path, capsys: Capture) -> None:
    said = refused(capsys, "ask", "--records", med2d, "--bank", "abdomem", "--out", tmp_path / "out")
    assert (
        "--bank abdomem: is neither abdomen nor brain nor patients nor a YAML file" in said
        and "Did you mean 'abdomen'?" in said
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "sa-med2d", "ask"])
def test_help_teaches(command: str, capsys: Capture) -> None:
    assert command in told(capsys, ["--help"])
    said = told(capsys, [command, "--help"])
    assert f"python scripts/prepare_data.py {command}" in said
    assert "run.json" in said
    assert "(default: 0)" in said


def test_no_command_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
