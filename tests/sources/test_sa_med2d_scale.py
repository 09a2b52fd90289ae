"""From names alone to loader processes: a few hundred names by default, all 3.7 million images with `-m scale`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_up_index import UNKNOWN, class_names, sources, write_index

from medisee.foundation.errors import exit_code
from medisee.prepare_data import main
from medisee.records import offsets
from medisee.records.manifest import Manifest
from medisee.records.masks import MaskFiles
from medisee.sources.sa_med2d_index import INDEX_FILE, parse_name

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
LOADER = Path(__file__).with_name("loader_program.py")
IMAGES, MASKS = 3_700_000, 15_800_000
DRAWS = 20_000


def expected_targets(root: Path) -> dict[str, dict[str, list[str]]]:
    """Returns {image: {target: files}} of an index, read whole and by the plainest rules."""
    unions = {source.name: class_names(source)["union_of_all"] for source in sources()}
    found: dict[str, dict[str, list[str]]] = {}
    for image, masks in json.loads((root / INDEX_FILE).read_text()).items():
        name = parse_name(image)
        if name is None or name.dataset == "Brain_PTM" or "brain-growth" in name.case:
            continue
        targets: dict[str, list[str]] = {}
        for mask in masks:
            class_id = int(mask.rpartition("--")[2].partition("_")[0])
            if class_id not in (UNKNOWN, unions[name.dataset]):
                targets.setdefault(f"{class_id:04d}", []).append(mask)
        if targets:
            found[image] = targets
    return found


def load(manifest: Path, root: Path, draws: int) -> dict[str, float]:
    argv = [sys.executable, str(LOADER), str(manifest), str(root), str(draws)]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def test_hundreds_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(offsets, "LARGE", 0)
    root, out = tmp_path / "SAMed2Dv1", tmp_path / "out"
    root.mkdir()
    write_index(root, images=900, masks=3800, slices=2)
    assert exit_code(main, ["sa-med2d", "--root", str(root), "--out", str(out), "--index-only"]) == 0
    printed = capsys.readouterr().out
    for reason in ("unreadable name", "unknown class", "unchecked image", "unusable image", "no target"):
        assert reason in printed
    manifests = [Manifest(out / f"{split}.jsonl", root=root) for split in ("train", "val", "test")]
    found = {
        record.image: {
            target.id: [*target.mask.files] if isinstance(target.mask, MaskFiles) else [target.mask]
            for target in record.targets
        }
        for manifest in manifests
        for record in manifest
    }
    assert found == expected_targets(root)
    assert sum(map(len, manifests)) == len(found)  # no image is there twice
    cases = [{record.case for record in manifest} for manifest in manifests]
    assert sum(map(len, cases)) == len(set.union(*cases))
    inverted = [r for manifest in manifests for r in manifest if r.source == "ichallenge_adam_task2"]
    assert inverted
    assert all(isinstance(t.mask, MaskFiles) and t.mask.inverted for r in inverted for t in r.targets)


def test_a_loader_process_reads_what_is_there(tmp_path: Path) -> None:
    write_index(tmp_path, images=300, masks=1300, slices=2)
    assert exit_code(main, ["sa-med2d", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--index-only"]) == 0
    manifest = Manifest(tmp_path / "out" / "train.jsonl", root=tmp_path)
    facts = load(manifest.path, tmp_path, len(manifest))
    assert facts["records"] == len(manifest)
    assert facts["targets"] == sum(len(record.targets) for record in manifest)  # each once


@pytest.mark.scale
@pytest.mark.timeout(3600)
def test_the_whole_data_set(tmp_path: Path) -> None:
    root, out = tmp_path / "SAMed2Dv1", tmp_path / "out"
    root.mkdir()
    try:
        write_index(root, images=IMAGES, masks=MASKS)
        size = (root / INDEX_FILE).stat().st_size / 1e9
        argv = [sys.executable, str(SCRIPT), "sa-med2d", "--root", str(root), "--out", str(out), "--index-only"]
        started = time.perf_counter()
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            printed = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        minutes = (time.perf_counter() - started) / 60
        print(printed)
        assert process.returncode == 0
        peak = used.ru_maxrss / 2**20
        written = sum(path.stat().st_size for path in out.iterdir()) / 1e9
        print(
            f"{IMAGES:,} images, {MASKS:,} masks, {size:.2f} GB: indexed in {minutes:.1f} min "
            f"({(used.ru_utime + used.ru_stime) / 60:.1f} min of processor time) at a peak of {peak:.2f} GiB, "
            f"{written:.2f} GB written; load {os.getloadavg()[0]:.1f}"
        )
        facts = load(out / "train.jsonl", root, DRAWS)
        print(
            f"loader process over {facts['records']:,.0f} records: opened in {facts['opened']:.2f} s, "
            f"{facts['held'] / 2**20:.0f} MiB at most; a random record takes {facts['median'] * 1e3:.3f} ms (median), "
            f"{facts['slowest'] * 1e3:.1f} ms at most"
        )
    finally:
        shutil.rmtree(root)
        shutil.rmtree(out, ignore_errors=True)
    assert minutes <= 15
    assert peak <= 4
    assert facts["held"] <= 400e6
    assert facts["median"] <= 2e-3
