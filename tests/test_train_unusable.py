"""Trainings over records without targets, and over records that are skipped, whatever is wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medisee.config import Loss
from medisee.config.load import config_from
from medisee.foundation.errors import InputError
from medisee.models.losses import end_to_end_loss
from medisee.models.medisee import MediSee
from medisee.models.processing import Example
from medisee.train import train

Run = dict[str, Any]
Edit = Callable[[list[dict[str, Any]], Path], object]


@pytest.fixture
def data(tmp_path: Path, tiny_manifest: Path) -> Path:
    shutil.copytree(tiny_manifest.parent, tmp_path / "data")
    return tmp_path / "data" / "tiny.jsonl"


def edited(path: Path, name: str, change: Edit) -> Path:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records, path.parent)
    new = path.with_name(name)
    new.write_text("".join(json.dumps(record) + "\n" for record in records))
    return new


def run(values: Run, train_on: Path, val: Path | None, **more: Any) -> list[dict[str, Any]]:
    """Trains on one manifest and returns the log."""
    out = train_on.with_name(f"run_{train_on.stem}_{val.stem if val else None}")
    data = {"train": [{"records": str(train_on)}], "val": str(val) if val else None, **more}
    section = {**values["train"], "out": str(out), "steps": 4, "save_every": 4}
    train(config_from({**values, "data": data, "train": section}, where="test"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in log]


@pytest.mark.parametrize("resolution", ["original", "decoder", 64])
@pytest.mark.parametrize("box_start", ["centre", "map"])
def test_a_batch_without_targets_has_a_loss_of_zero_and_all_gradients(
    build_tiny: Callable[..., MediSee], make_example: Callable[..., Example], resolution: Any, box_start: str
) -> None:
    """Ranks wait for each other's gradients, so none may be missing."""
    model = build_tiny(box_start=box_start).train()
    weights = Loss(similarity=1.0, js=1.0, mse=1.0, mask_resolution=resolution)
    whole = make_example(["Where?"], answer="It is [SEG] and [BBOX].")
    without = Example(whole.image, whole.height, whole.width, ())

    def gradients(*examples: Example) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        batch = model.processor(examples, mask_resolution=resolution)
        total = end_to_end_loss(model(batch), batch, weights).total
        total.backward()
        return float(total.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, found = gradients(without, without)
    assert loss == 0 and all(not gradient.any() for gradient in found.values())
    alone, expected = gradients(whole)
    assert alone > 1 and found.keys() == expected.keys()
    mixed, both = gradients(whole, without)
    assert mixed == pytest.approx(alone, rel=1e-5)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=5e-5)


def test_records_without_targets_train_and_validate(every_step: Run, data: Path) -> None:
    """A batch of one record has no target at all in two of four steps."""
    some = edited(data, "some.jsonl", lambda records, _: [records[n].update(targets=[]) for n in (0, 2)])
    without = edited(data, "without.jsonl", lambda records, _: [records.pop(n) for n in (2, 0)])
    one_each = {**every_step, "train": {**every_step["train"], "batch_size": 1, "accumulation": 1}}
    log = run(one_each, some, some)
    losses = [line["total"] for line in log if "total" in line]
    assert len(losses) == 4 and sorted(loss == 0 for loss in losses) == [False, False, True, True]
    (scored,) = (line for line in log if "Dice" in str(line))
    (fewer,) = (
        line for line in run(one_each, some.rename(some.with_name("again.jsonl")), without) if "Dice" in str(line)
    )
    assert scored == fewer


def _long(records: list[dict[str, Any]], _: Path) -> None:
    for target in records[1]["targets"]:
        target["qa"] = [{**target["qa"][0], "question": "".join(map(chr, range(200, 1400)))}]


def _unanswered(records: list[dict[str, Any]], _: Path) -> None:
    for target in records[1]["targets"]:
        target["qa"] = [{**target["qa"][0], "answer": "The liver makes bile."}]


def _black(records: list[dict[str, Any]], folder: Path) -> None:
    Image.fromarray(np.zeros((64, 40), np.uint8)).save(folder / "black.png")
    for target in records[1]["targets"]:
        target["mask"] = "black.png"


def _outside(records: list[dict[str, Any]], _: Path) -> None:
    for target in records[1]["targets"]:
        target["box"] = [0, 0, 900, 9]


def _cut(records: list[dict[str, Any]], folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:100])
    records[1]["image"] = "cut.png"


@pytest.mark.parametrize(
    ("spoil", "words", "cache"),
    [
        (_long, "tokens", False),
        (_unanswered, "lacks [SEG]", False),
        (_black, "is empty", True),
        (_outside, "leaves the image", False),
        (_cut, "cut.png", True),
    ],
)
def test_every_kind_of_bad_record_is_skipped_and_counted(
    every_step: Run, data: Path, capsys: pytest.CaptureFixture[str], spoil: Edit, words: str, cache: bool
) -> None:
    """In training, in the cache of features and in val, where the figures are those of the other records."""
    bad, val = edited(data, "bad.jsonl", spoil), edited(data, "val.jsonl", lambda records, _: records.pop(1))
    more = {"cache": str(data.with_name("cache"))} if cache else {}
    with pytest.raises(InputError) as caught:
        run(every_step, bad, None, **more)
    assert all(f"{bad}:2: record 'r1'" in one and words in one for one in caught.value.problems)
    capsys.readouterr()
    log = run(every_step, bad, None if spoil is _unanswered else bad, skip_corrupt=True, **more)
    err = capsys.readouterr().err
    assert f"{bad}: skips 1 of 4 records\n{bad}:2: record 'r1'" in err and "skipped: " in err
    assert [line["skipped"] for line in log if "total" in line][-1] >= 4  # four passes over the records
    if spoil is not _unanswered:
        (scored,) = (line for line in log if "Dice" in str(line))
        alone = run(every_step, edited(data, "bad2.jsonl", spoil), val, skip_corrupt=True, **more)
        assert [line for line in alone if "Dice" in str(line)] == [scored]
