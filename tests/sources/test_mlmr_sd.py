"""MLMR-SD as Records: the release's JSON formats, a hub's Parquet files, the command, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medisee.foundation.errors import InputError, exit_code
from medisee.prepare_data import main
from medisee.records.manifest import Manifest
from medisee.records.records import Turn
from medisee.sources.mlmr_sd import Question, prepare, worded

STEM = "ct_00--BTCV--ABD_001--z_0064"
LINE = {
    "id": "q1",
    "image": f"images/{STEM}.png",
    "mask": f"masks/{STEM}--0006_000.png",
    "category": "liver",
    "question": "Which organ makes bile?",
    "answer": "The liver makes bile.",
    "perspective": "attribute",
    "length": "short",
}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder in the release's form: one test image with two questions, one training image without any."""
    root = tmp_path / "MLMR-SD"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 5:15] = 255
    for name in (STEM, "plain"):
        Image.fromarray(mask // 2).save(root / f"images/{name}.png")
        Image.fromarray(mask).save(root / f"masks/{name}--0006_000.png")
    (root / "test.json").write_text(json.dumps({LINE["image"]: {LINE["mask"]: "liver"}}))
    (root / "train.json").write_text(json.dumps({"images/plain.png": {"masks/plain--0006_000.png": "liver"}}))
    long = {**LINE, "id": "q2", "length": "long", "history": [{"question": "What is it?", "answer": "A scan."}]}
    write_lines(root, LINE, long)
    return root


def write_lines(root: Path, *lines: Any) -> None:
    (root / "test.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def problems_of(release: Path, out: Path) -> str:
    with pytest.raises(InputError) as error:
        prepare(release, out)
    return str(error.value)


def test_the_releases_form_becomes_manifests(release: Path, tmp_path: Path) -> None:
    counts = prepare(release, tmp_path / "out")
    assert counts == {"train": 1, "test": 1, "test_short": 1, "test_long": 1}
    (record,) = test = Manifest(tmp_path / "out/test.jsonl", root=release)
    test.check_files()
    assert (record.modality, record.source, record.case, record.plane) == ("ct", "BTCV", "BTCV/ABD_001", "axial")
    (target,) = record.targets
    assert target.category == "liver"
    assert [qa.question.startswith("Which organ makes bile? ") for qa in target.qa] == [True, True]
    assert target.qa[0].answer.endswith("The liver makes bile.") and "[SEG] and [BBOX]" in target.qa[0].answer
    assert target.qa[1].history == (Turn("What is it?", "A scan."),)
    (short,) = Manifest(tmp_path / "out/test_short.jsonl", root=release)
    assert [qa.length for qa in short.targets[0].qa] == ["short"]


def test_names_that_say_nothing_make_a_case_of_each_image(release: Path, tmp_path: Path) -> None:
    prepare(release, tmp_path / "out")
    (record,) = Manifest(tmp_path / "out/train.jsonl", root=release)
    assert (record.modality, record.source, record.case) == ("unknown", "mlmr-sd", "plain")
    assert record.targets[0].qa == ()


def test_the_seed_draws_the_words_and_nothing_else() -> None:
    question = Question(**LINE)  # pyright: ignore[reportArgumentType]
    drawn = {worded(question, seed).question for seed in range(20)}
    assert len(drawn) > 1 and all(text.startswith(question.question) for text in drawn)
    assert worded(question, 3) == worded(question, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**LINE, "category": "spleen"}, "test.jsonl:1: image"),
        ({**LINE, "image": "images/other.png"}, "expected what test.json holds"),
        ({**LINE, "length": "medium"}, "length is \"medium\"; expected 'short' or 'long'"),
        ({key: value for key, value in LINE.items() if key != "answer"}, "key 'answer' is missing"),
        ({**LINE, "quetsion": "x"}, "unknown key 'quetsion'"),
        ([1], "the line is [1]; expected an object"),
    ],
)
def test_wrong_lines_are_named(release: Path, tmp_path: Path, line: Any, message: str) -> None:
    write_lines(release, line)
    assert message in problems_of(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_named(release: Path, tmp_path: Path) -> None:
    (release / "test.jsonl").write_text("{")
    assert "not JSON" in problems_of(release, tmp_path / "out")
    (release / "test.jsonl").unlink()
    (release / "test.json").write_text('{"images/a.png": ["masks/a.png"]}')
    assert "expected {image: {mask: class}}" in problems_of(release, tmp_path / "out")
    (release / "test.json").write_text('{"../a.png": {"/masks/a.png": "liver"}}')
    told = problems_of(release, tmp_path / "out")
    assert "'../a.png' leaves the root" in told and "'/masks/a.png' leaves the root" in told
    (release / "test.json").write_text("nothing")
    assert "not readable JSON" in problems_of(release, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "found none; name the data set's folder" in problems_of(tmp_path / "empty", tmp_path / "out")


def write_parquet(root: Path, *, more: tuple[dict[str, Any], ...] = (), **changes: Any) -> None:
    """Writes one row with changes, and for each of `more` a further one with these."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (root / "data").mkdir(parents=True, exist_ok=True)
    pictures = {}
    for kind in ("image", "mask"):
        Image.fromarray(np.full((20, 30), 200, np.uint8)).save(root / f"{kind}.png")
        pictures[kind] = {"bytes": (root / f"{kind}.png").read_bytes(), "path": "case1.png"}
    pair = {key: LINE[key] for key in ("id", "question", "answer", "perspective", "length")}
    turns = [{**pair, "id": f"t{n}", "question": f"Turn {n}?", "conversation": "talk", "turn": n} for n in (1, 2)]
    row = {
        "id": "r1",
        "target": "t",
        "category": "liver",
        "box": [1, 1, 29, 19],
        "modality": "ct",
        "source": "s",
        "case": "c",
        "qa": [{**pair, "conversation": None, "turn": 0}, *turns],
        **pictures,
        **changes,
    }
    parquet.write_table(
        pyarrow.Table.from_pylist([row, *({**row, **each} for each in more)]), root / "data/test-00000-of-00001.parquet"
    )


def test_a_hubs_files_are_unpacked(tmp_path: Path) -> None:
    write_parquet(tmp_path / "hub")
    assert prepare(tmp_path / "hub", tmp_path / "out") == {"test": 1, "test_short": 1}
    (record,) = manifest = Manifest(tmp_path / "out/test.jsonl")
    manifest.check_files()
    (target,) = record.targets
    assert (record.id, record.image, target.mask, target.box) == (
        "r1",
        "images/case1.png",
        "masks/case1.png",
        (1, 1, 29, 19),
    )
    assert [qa.question.split("?")[0] for qa in target.qa] == ["Which organ makes bile", "Turn 2"]
    assert [turn.question for turn in target.qa[1].history] == ["Turn 1?"]


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/b.png", ".hidden.png", "evil.sh", ""])
def test_a_picture_with_another_name_than_a_plain_one_is_refused(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "hub", image={"bytes": b"x", "path": name})
    assert f'row 1: image.path is "{name}"; expected a plain file name' in problems_of(
        tmp_path / "hub", tmp_path / "out"
    )
    assert not list(tmp_path.rglob("evil*"))


PAIR = {**{key: LINE[key] for key in ("id", "question", "answer", "perspective", "length")}, "conversation": None}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image": None}, "row 2: image is null; expected an object; write it with the keys 'path', 'bytes'"),
        ({"image": {"bytes": b"x", "path": None}}, "row 2: image.path is null; expected a string"),
        ({"mask": {"bytes": None, "path": "m.png"}}, "row 2: mask.bytes is null; expected the bytes of a file"),
        ({"box": None}, "row 2: box is null; expected [x0, y0, x1, y1] in pixels"),
        ({"box": [3, 4]}, "row 2: box is [3, 4]; expected [x0, y0, x1, y1] in pixels"),
        ({"box": [9, 4, 3, 12]}, "row 2: box is [9, 4, 3, 12]; expected [x0, y0, x1, y1] in pixels"),
        ({"qa": None}, "row 2: qa is null; expected a list"),
        ({"qa": [None]}, "row 2: qa[0] is null; expected an object"),
        (
            {"qa": [{**PAIR, "perspective": "colour"}]},
            "row 2: qa[0].perspective is \"colour\"; expected 'attribute', 'location' or",
        ),
        ({"qa": [{**PAIR, "length": None}]}, "row 2: qa[0].length is null; expected 'short' or 'long'"),
        ({"category": None}, "row 2: category is null; expected a string"),
        (
            {"image": {"bytes": b"another", "path": "CASE1.png"}},
            "row 2: images/CASE1.png has the name of another picture",
        ),
    ],
)
def test_wrong_cells_of_a_hubs_file_are_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    write_parquet(tmp_path / "hub", more=({"id": "r2", **changes},))
    assert told in problems_of(tmp_path / "hub", tmp_path / "out")
    assert not (tmp_path / "out/test.jsonl").exists()


def test_wrong_cells_of_all_rows_are_told_at_once(tmp_path: Path) -> None:
    write_parquet(tmp_path / "hub", more=({"id": "r2", "box": None}, {"id": "r3"}, {"id": "r4", "qa": None}))
    with pytest.raises(InputError) as error:
        prepare(tmp_path / "hub", tmp_path / "out")
    assert [problem.partition("; ")[0].partition("row ")[2] for problem in error.value.problems] == [
        "2: box is null",
        "4: qa is null",
    ]


def test_two_rows_may_share_one_picture(tmp_path: Path) -> None:
    write_parquet(tmp_path / "hub", more=({"id": "r2"},))
    assert prepare(tmp_path / "hub", tmp_path / "out")["test"] == 2


def test_wrong_parquet_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "hub/data").mkdir(parents=True)
    (tmp_path / "hub/data/train-0.parquet").write_bytes(b"PAR1 not really")
    assert "expected a Parquet file" in problems_of(tmp_path / "hub", tmp_path / "out")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": ["r"]}), tmp_path / "hub/data/train-0.parquet")
    assert "lacks the columns target, image" in problems_of(tmp_path / "hub", tmp_path / "out")


def test_the_command(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["mlmr-sd", "--root", str(release), "--out", str(tmp_path / "out"), "--seed", "2"])
    assert "train.jsonl (1 images), test.jsonl (1 images), test_short.jsonl" in capsys.readouterr().out
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (run["settings"]["data"], run["seed"]) == ("mlmr-sd", 2)
    assert exit_code(main, ["mlmr-sd", "--root", str(tmp_path / "no"), "--out", str(tmp_path / "o")]) == 2
    assert "found none" in capsys.readouterr().err
