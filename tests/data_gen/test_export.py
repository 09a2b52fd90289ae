"""Export: what is in the folder, that it can be read back, that it depends on the ledger alone, and bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_gen.core.items import Decision
from data_gen.export import main
from data_gen.ledger.ledger import Ledger
from medisee.data.dataset import record_example
from medisee.evaluation.scoring import read_categories
from medisee.foundation.errors import exit_code
from medisee.foundation.files import sha256
from medisee.records.manifest import Manifest
from medisee.records.records import Turn

Capture = pytest.CaptureFixture[str]
LedgerMaker = Callable[..., Path]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(ledger: Path, out: Path, *more: str) -> None:
    main(["--ledger", str(ledger), "--out", str(out), *more])


def refused(capsys: Capture, *argv: str | Path) -> str:
    assert exit_code(main, [str(word) for word in argv]) == 2
    return capsys.readouterr().err


def test_the_folder_and_its_manifests(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    run(make_ledger(), out)
    assert sorted(path.name for path in out.iterdir()) == [
        *("categories.json", "data.json", "hub", "images", "masks", "release"),
        *("test.jsonl", "test_long.jsonl", "test_short.jsonl", "train.jsonl", "val.jsonl"),
    ]
    manifests = {name: Manifest(out / f"{name}.jsonl") for name in ("train", "val", "test", "test_short", "test_long")}
    for manifest in manifests.values():
        manifest.check_files()
    assert [len(manifests[name]) for name in ("train", "val", "test")] == [6, 2, 2]
    cases = [{record.case for record in manifests[name]} for name in ("train", "val", "test")]
    assert not cases[0] & cases[1] and not cases[0] & cases[2] and not cases[1] & cases[2]
    assert read_categories(out / "categories.json").keys() == {"liver", "spleen"}
    printed = capsys.readouterr().out
    assert "train 6 images of 3 cases, 24 pairs" in printed
    assert printed.endswith(f"done: {out}\n")


def test_a_record_holds_what_the_item_holds(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    ledger = make_ledger()
    run(ledger, tmp_path / "out")
    records = {r.id: r for name in ("train", "val", "test") for r in Manifest(tmp_path / f"out/{name}.jsonl")}
    assert len(records) == 10
    liver, spleen = records["case1_0"].targets[0], records["case1_1"].targets[0]
    assert (liver.box, spleen.box) == ((4, 3, 20, 15), (30, 18, 44, 30))
    mask = np.asarray(Image.open(tmp_path / "out" / str(spleen.mask)))
    assert set(np.unique(mask)) == {0, 255}
    assert mask[18:30, 30:44].all() and (mask > 0).sum() == 12 * 14
    copied = tmp_path / "out" / records["case1_0"].image
    assert copied.read_bytes() == (tmp_path / "pictures/slices/case1_0.png").read_bytes()
    short = next(qa for qa in liver.qa if (qa.perspective, qa.length) == ("attribute", "short"))
    assert short.question.startswith("Which organ here makes bile for digestion? ")
    assert "[SEG] and [BBOX]" in short.answer
    assert short.answer.endswith("because the liver makes bile and clears many drugs from the blood.")
    test = Manifest(tmp_path / "out/test_short.jsonl")
    assert {qa.length for record in test for target in record.targets for qa in target.qa} == {"short"}


def test_the_releases_formats(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    run(make_ledger(), tmp_path / "out")
    classes = json.loads((tmp_path / "out/release/test.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out/release/test.jsonl").read_text().splitlines()]
    assert len(classes) == 2 and len(lines) == 8
    for image, masks in classes.items():
        assert (tmp_path / "out" / image).is_file()
        assert all((tmp_path / "out" / mask).is_file() for mask in masks)
    keys = ["id", "image", "mask", "category", "question", "answer", "perspective", "length", "author"]
    assert {line["author"] for line in lines} == {"some-model"}
    assert all(list(line) == keys and classes[line["image"]][line["mask"]] == line["category"] for line in lines)


def test_datasets_loads_the_hub_folder_offline(
    make_ledger: LedgerMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    run(make_ledger(), tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out/hub"), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_rows for name, split in loaded.items()} == {"train": 6, "validation": 2, "test": 2}
    row = next(row for row in loaded["train"] if row["category"] == "spleen")
    assert row["image"].size == row["mask"].size == (48, 32)
    assert row["box"] == [30, 18, 44, 30]
    assert len(row["qa"]) == 4 and row["qa"][0]["screening"] == "unscreened"


def test_the_same_ledger_gives_the_same_bytes(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    first = make_ledger()
    run(first, tmp_path / "a")
    run(first, tmp_path / "b")
    # Made anew, at another time and under another name: times and places are in no export.
    again = make_ledger(name="again.sqlite")
    run(again, tmp_path / "c")
    run(again, tmp_path / "c")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")
    run(first, tmp_path / "d", "--seed", "1")
    assert hashes(tmp_path / "a") != hashes(tmp_path / "d")


def test_decisions_are_applied(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    path = make_ledger()
    words = "Which organ of the belly makes bile?"
    with Ledger(path) as ledger:
        ledger.decide(Decision("case0_0/liver#first-attribute-short", "anna", "edit", "", words, "The liver makes it."))
        ledger.decide(Decision("case0_0/liver#first-attribute-long", "anna", "reject", "wrong"))
        ledger.decide(Decision("case0_0/liver#first-attribute-long", "ben", "accept"))
        for cell in ("attribute-short", "attribute-long", "location-short", "location-long"):
            ledger.decide(Decision(f"case0_1/spleen#first-{cell}", "anna", "reject", "wrong"))
        ledger.decide(Decision("case2_0/liver#first-location-long", "anna", "reject", "a slip"))
        ledger.undo("anna")
    run(path, tmp_path / "out")
    records = {r.id: r for name in ("train", "val", "test") for r in Manifest(tmp_path / f"out/{name}.jsonl")}
    assert "case0_1" not in records
    qas = records["case0_0"].targets[0].qa
    assert len(qas) == 3 and any(qa.question.startswith(words) for qa in qas)
    assert len(records["case2_0"].targets[0].qa) == 4
    facts = json.loads((tmp_path / "out/data.json").read_text())["screening"]
    assert (facts["outcomes"]["rejected"], facts["outcomes"]["edited"], facts["judged"]) == (5, 1, 6)
    assert facts["agreement"] == [{"first": "reviewer 1", "second": "reviewer 2", "pairs": 1, "raw": 0, "kappa": 0}]
    everything = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert b"anna" not in everything and str(tmp_path).encode() not in everything


def test_screened_only(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    path = make_ledger()
    assert "expected a pair that a person accepted, found none among 40" in refused(
        capsys, "--ledger", path, "--out", tmp_path / "out", "--screened-only"
    )
    with Ledger(path) as ledger:
        ledger.decide(Decision("case0_0/liver#first-attribute-long", "anna", "accept"))
    run(path, tmp_path / "out", "--screened-only")
    (record,) = Manifest(tmp_path / "out/train.jsonl")
    assert len(record.targets[0].qa) == 1
    assert not (tmp_path / "out/val.jsonl").exists()
    assert "val   empty: there are too few cases" in capsys.readouterr().out


def test_a_conversation_is_one_query_with_a_history(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    run(make_ledger(style="multi-turn"), tmp_path / "out")
    record = Manifest(tmp_path / "out/train.jsonl")[0]
    (qa,) = record.targets[0].qa
    assert qa.history[0] == Turn(
        "What kind of image is this?", "This is a slice of a computed tomography of the belly."
    )
    assert len(qa.history) == 2 and "[SEG]" in qa.answer
    # Training reads it with its image, mask and box.
    manifest = Manifest(tmp_path / "out/train.jsonl")
    (query,) = record_example(manifest, record, [(record.targets[0], qa)], None).queries
    assert (query.history, query.question, query.answer) == (qa.history, qa.question, qa.answer)
    line = json.loads((tmp_path / "out/release/train.jsonl").read_text().splitlines()[0])
    assert [turn["question"] for turn in line["history"]][1] == "Which part of the body does it show?"


def test_one_target_for_each_image(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    path = make_ledger()
    # A second item of the same image, with as many pairs: the first one stays.
    with sqlite3.connect(path) as raw:
        content = json.loads(raw.execute("SELECT content FROM items WHERE id='case0_0/liver'").fetchone()[0])
        content |= {"id": "case0_0/zz", "target": "zz"}
        raw.execute("INSERT INTO items VALUES('case0_0/zz', 99, ?)", (json.dumps(content),))
        pair = json.loads(raw.execute("SELECT content FROM pairs ORDER BY id LIMIT 1").fetchone()[0])
        pair |= {"id": "case0_0/zz#p", "item": "case0_0/zz"}
        raw.execute("INSERT INTO pairs VALUES('case0_0/zz#p', ?, 'kept')", (json.dumps(pair),))
    raw.close()
    run(path, tmp_path / "out")
    images = [r.image for name in ("train", "val", "test") for r in Manifest(tmp_path / f"out/{name}.jsonl")]
    assert len(images) == len(set(images)) == 10


def test_what_the_offline_author_made_is_labelled(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    run(make_ledger(author="offline"), tmp_path / "out")
    assert "made by: offline" in capsys.readouterr().out
    assert "**Made by the offline author.**" in (tmp_path / "out/hub/README.md").read_text()
    assert json.loads((tmp_path / "out/data.json").read_text())["author"] == "offline"
    lines = [line for file in (tmp_path / "out/release").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert {json.loads(line)["author"] for line in lines} == {"offline"}
    records = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert {qa["author"] for one in records for target in one["targets"] for qa in target["qa"]} == {"offline"}


def test_pairs_that_training_would_not_take_are_left_out_and_told(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    path = make_ledger()
    wrong = {"question": "I'm sorry, but I can't help.", "answer": "The liver is </s> [SEG] here and makes bile."}
    with sqlite3.connect(path) as raw:
        for (key, text), identity in zip(wrong.items(), ("attribute-short", "attribute-long"), strict=True):
            row = f"case0_0/liver#first-{identity}"
            raw.execute("UPDATE pairs SET content = json_set(content, ?, ?) WHERE id = ?", (f"$.{key}", text, row))
    raw.close()
    run(path, tmp_path / "out")
    records = [record for name in ("train", "val", "test") for record in Manifest(tmp_path / f"out/{name}.jsonl")]
    qas = [qa for record in records for qa in record.targets[0].qa]
    assert len(qas) == 38 and all(qa.answer.count("[SEG]") == qa.answer.count("[BBOX]") == 1 for qa in qas)
    assert json.loads((tmp_path / "out/data.json").read_text())["screening"]["outcomes"]["unusable"] == 2
    assert "or holds a special token, left out | 2 |" in (tmp_path / "out/hub/README.md").read_text()


def test_an_unfinished_run_is_warned_about(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    run(make_ledger(settled=False), tmp_path / "out")
    assert "near-duplicates may be among the pairs" in capsys.readouterr().err


def test_bad_input(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    path = make_ledger()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "holds 'mine.txt', which is not of an earlier export" in refused(
        capsys, "--ledger", path, "--out", tmp_path / "full"
    )
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    assert "no such ledger" in refused(capsys, "--ledger", tmp_path / "none", "--out", tmp_path / "out")
    (tmp_path / "text").write_text("not a database, but long enough to be looked at as one")
    assert "not a ledger" in refused(capsys, "--ledger", tmp_path / "text", "--out", tmp_path / "out")
    (tmp_path / "sources.yaml").write_text("phantom: [1]\n")
    told = refused(capsys, "--ledger", path, "--out", tmp_path / "out", "--sources", tmp_path / "sources.yaml")
    assert "sources.yaml: cannot be used" in told and "ImageSource" in told
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    path = make_ledger()
    out = tmp_path / "out"
    run(path, out)
    run(path, out, "--seed", "1")
    # The demo's data set has a data.json too.
    for content in ('{"note": "n", "settings": {}, "counts": {}, "versions": {}}', "{", "[]"):
        (tmp_path / "demo").mkdir(exist_ok=True)
        (tmp_path / "demo/data.json").write_text(content)
        assert "holds 'data.json'" in refused(capsys, "--ledger", path, "--out", tmp_path / "demo")
        assert (tmp_path / "demo/data.json").read_text() == content
    assert "is a file" in refused(capsys, "--ledger", path, "--out", path)


def test_ledger_and_images_are_never_replaced(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    path = make_ledger()
    run(path, tmp_path / "out")
    shutil.copyfile(tmp_path / "out/data.json", tmp_path / "data.json")
    # The folder of the ledger looks like an earlier export, and so do that of the images and a part of it.
    assert "holds the ledger" in refused(capsys, "--ledger", path, "--out", tmp_path)
    for folder, told in (
        ("pictures", "holds 'slices/case0_0.png', which is not of an earlier export"),
        ("pictures/slices", "holds picture 'slices/case"),
    ):
        shutil.copyfile(tmp_path / "out/data.json", tmp_path / folder / "data.json")
        if folder == "pictures/slices":  # also in what it lists
            (tmp_path / folder / "release").mkdir()
            listed = {path.name: {} for path in (tmp_path / folder).glob("*.png")}
            (tmp_path / folder / "release/train.json").write_text(json.dumps(listed))
        assert told in refused(capsys, "--ledger", path, "--out", tmp_path / folder)
    assert path.is_file() and (tmp_path / "pictures/slices/case0_0.png").is_file()
    run(path, tmp_path / "pictures/export")
    run(path, tmp_path / "pictures/export")


def test_a_changed_picture_of_the_same_size_is_named(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    path = make_ledger()
    slices = tmp_path / "pictures/slices"
    with sqlite3.connect(path) as raw:
        content = json.loads(raw.execute("SELECT content FROM items WHERE id='case0_0/liver'").fetchone()[0])
        noted = {
            f"{kind}_sha256": sha256(slices / f"case0_0{end}.png") for kind, end in (("image", ""), ("mask", "_liver"))
        }
        raw.execute("UPDATE items SET content=? WHERE id='case0_0/liver'", (json.dumps(content | noted),))
    raw.close()
    run(path, tmp_path / "out")
    for name in ("case0_0.png", "case0_0_liver.png"):
        before = (slices / name).read_bytes()
        Image.new("L", (48, 32), 7).save(slices / name)
        told = refused(capsys, "--ledger", path, "--out", tmp_path / "out")
        assert f"'slices/{name}' has the SHA-256" in told and "put the old file back" in told
        (slices / name).write_bytes(before)
    run(path, tmp_path / "out")


def test_a_ledger_without_hashes_stays_readable(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    path = make_ledger()
    with sqlite3.connect(path) as raw:
        for identity, text in raw.execute("SELECT id, content FROM items").fetchall():
            old = {key: value for key, value in json.loads(text).items() if not key.endswith("_sha256")}
            raw.execute("UPDATE items SET content=? WHERE id=?", (json.dumps(old), identity))
    raw.close()
    run(path, tmp_path / "out")
    assert len(Manifest(tmp_path / "out/train.jsonl")) == 6


def test_missing_and_changed_pictures_are_all_named(make_ledger: LedgerMaker, tmp_path: Path, capsys: Capture) -> None:
    path = make_ledger()
    slices = tmp_path / "pictures/slices"
    (slices / "case0_0.png").unlink()
    (slices / "case1_0_liver.png").unlink()
    Image.new("L", (9, 9)).save(slices / "case2_1.png")
    told = refused(capsys, "--ledger", path, "--out", tmp_path / "out").splitlines()
    assert len(told) == 3
    assert any("case0_0.png" in line for line in told) and any("is 9 x 9" in line for line in told)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_empty_ledger_has_nothing_to_export(tmp_path: Path, capsys: Capture) -> None:
    with Ledger(tmp_path / "empty.sqlite", create=True):
        pass
    assert "expected a pair, found none" in refused(
        capsys, "--ledger", tmp_path / "empty.sqlite", "--out", tmp_path / "out"
    )


def test_ledger_and_pictures_may_be_moved_together(make_ledger: LedgerMaker, tmp_path: Path) -> None:
    path = make_ledger()
    run(path, tmp_path / "before")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(tmp_path / "pictures", moved / "pictures")
    for file in tmp_path.glob("ledger.sqlite*"):
        shutil.move(file, moved / file.name)
    run(moved / "ledger.sqlite", tmp_path / "after")
    assert hashes(tmp_path / "before") == hashes(tmp_path / "after")
