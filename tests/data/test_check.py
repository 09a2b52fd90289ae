"""What `medisee prepare check` and the start of a training find in records, before anything reads them for good."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medisee.config.load import config_from, load_config
from medisee.data import check
from medisee.data.check import Found, look, sample, scored_job, spread, training_job, with_lines
from medisee.data.dataset import asked_questions, record_example
from medisee.foundation.errors import InputError, exit_code
from medisee.prepare_data import main as prepare
from medisee.records.manifest import Manifest
from medisee.training.initial_model import read_records
from medisee.training.ranks import Place

ANSWER = "It is [SEG] and [BBOX]."
PLACE = Place(0, 1, torch.device("cpu"))
NOISE = "".join(random.Random(0).choices("bcdfghjklmnpqrstvwxz ", k=2500))  # which no tokenizer makes short
Run = dict[str, Any]


@pytest.fixture
def data(tmp_path: Path, tiny_manifest: Path) -> Path:
    """A copy of the tiny manifest; its images and masks are beside it."""
    shutil.copytree(tiny_manifest.parent, tmp_path / "data")
    return tmp_path / "data" / "tiny.jsonl"


def edit(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def everything(path: Path, workers: int = 1) -> Found:
    found = Found()
    for part in look(training_job(load_config(None), Manifest(path)), workers):
        found.add(part)
    return found


def checked(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = exit_code(prepare, ["check", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def qa(question: str, answer: str = ANSWER, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, "perspective": "attribute", "length": "short", **more}


def test_a_good_manifest_is_described(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(data, lambda records: records[3].update(targets=[], modality="mr"))
    code, out, err = checked(capsys, "--records", data)
    assert (code, err) == (0, "")
    rows = {" ".join(line.split()[:-3]): line.split()[-3:] for line in out.splitlines() if line.startswith("  ")}
    assert rows["all"] == ["4", "6", "12"]
    assert rows["category liver"] == rows["category left kidney"] == ["3", "3", "6"]
    assert rows["modality ct"] == ["3", "6", "12"] and rows["modality mr"] == ["1", "0", "0"]
    assert rows["size 64 x 48"] == ["1", "2", "4"] and rows["size 64 x 40"] == ["1", "0", "0"]
    assert "records without targets: 1\n" in out and "without a pixel in their mask: 0\n" in out
    longest = "Which large organ lies at the upper left here? It is [SEG] and [BBOX]. This is the left kidney."
    assert len(longest) > 80 and "longest text: " in out and "characters" in out and "tokens" not in out
    assert out.endswith("done: no problem in 4 records\n")


def test_every_problem_is_named_with_its_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(records: list[dict[str, Any]]) -> None:
        records[0]["targets"][0]["qa"][1]["answer"] = "The liver makes bile."
        records[1]["image"] = "none.png"
        records[3]["targets"][1]["box"] = [0, 0, 900, 9]
        records[3]["targets"][0]["mask"] = "3.png"

    lines = edit(data, spoil).read_text().splitlines()
    data.write_text("\n\n".join(lines[:2]) + "\n \n" + "\n".join(lines[2:]) + "\n")
    (data.parent / "2.png").write_bytes((data.parent / "2.png").read_bytes()[:90])
    Image.fromarray(np.zeros((40, 64), np.uint8)).save(data.parent / "3.png")
    code, out, err = checked(capsys, "--records", data)
    assert code == 2 and "without a pixel in their mask: 1\n" in out and "done" not in out
    problems = [line.removeprefix(f"error: {data}:") for line in err.splitlines()]
    expected = [
        ("1: record 'r0', target 'a': the answer 'The liver makes bile.' lacks [SEG] and [BBOX]",),
        ("3: record 'r1': image 'none.png'",),
        ("5: record 'r2': ", "2.png"),
        ("6: record 'r3', target 'a': mask '3.png' is empty",),
        ("6: record 'r3', target 'b': box", "leaves the image"),
    ]
    assert len(problems) == len(expected), problems
    for problem, (start, *words) in zip(problems, expected, strict=True):
        assert problem.startswith(start) and all(word in problem for word in words), problem


def test_all_manifests_and_all_their_lines_are_looked_at(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, other = data.with_name("broken.jsonl"), data.with_name("other.jsonl")
    broken.write_text('{"id": 3}\n[]\n')
    shutil.copy(data, other)
    edit(other, lambda records: records[1].update(image="none.png"))
    code, out, err = checked(capsys, "--records", broken, data, other)
    assert code == 2 and f"{data}\n" in out
    assert f"error: {broken}:1: " in err and f"error: {broken}:2: " in err and f"error: {other}:2: " in err


@pytest.mark.parametrize(
    ("answer", "tokens", "lacking"),
    [
        ("The liver makes bile.", ["[SEG]", "[BBOX]"], "[SEG] and [BBOX]"),
        ("", ["[SEG]", "[BBOX]"], "[SEG] and [BBOX]"),
        ("It is [seg] and [bbox].", ["[SEG]", "[BBOX]"], "[SEG] and [BBOX]"),
        ("It is [SEG].", ["[SEG]", "[BBOX]"], "[BBOX]"),
        ("[SEG], [BBOX]", ["[SEG]", "[BBOX]", "[TGT3]"], "[TGT3]"),
        ("It is [BBOX].", ["[SEG]"], "[SEG]"),
        # Taken: the model's own tokens replace the usual words; a second one, or another order, does no harm.
        ("It is [SEG] and [BBOX].", ["[SEG]", "[BBOX]", "[TGT3]"], None),
        ("It is [SEG] and [BBOX].", ["[SEG]"], None),
        ("It is [SEG].", ["[SEG]"], None),
        ("[BBOX] before [SEG]", ["[SEG]", "[BBOX]"], None),
        ("[SEG] [SEG] [BBOX] [BBOX]", ["[SEG]", "[BBOX]"], None),
    ],
)
def test_an_answer_holds_all_candidate_tokens(
    data: Path, tiny_config: Run, answer: str, tokens: list[str], lacking: str | None
) -> None:
    history = [{"question": "Where is it? [SEG]", "answer": "[SEG] [BBOX] [TGT3]"}]  # earlier turns do not count
    edit(data, lambda records: records[1]["targets"][0].update(qa=[qa("Which?", answer, history=history)]))
    values = {**tiny_config, "model": {**tiny_config["model"], "candidate_tokens": tokens}}
    config = config_from(values, where="test")
    if lacking is None:
        read_records(config, [Manifest(data)], None, PLACE)
        return
    with pytest.raises(InputError, match=r"tiny\.jsonl:2: record 'r1', target 'a': the answer '.*' lacks ") as caught:
        read_records(config, [Manifest(data)], None, PLACE)
    assert [f"lacks {lacking};" in problem for problem in caught.value.problems] == [True]


@pytest.mark.parametrize(
    "text", ["tab\tand\nline", "\x00\x01\x07", "\u200b", "é\u0301 肝臓 \U0001fac0", "a" * 400, "<unk>", "…" * 60]
)
def test_unusual_words_are_taken(data: Path, tiny_config: Run, text: str) -> None:
    edit(data, lambda records: records[0]["targets"][0].update(qa=[qa(text, f"{ANSWER} {text}")]))
    read = read_records(config_from(tiny_config, where="test"), [Manifest(data)], None, PLACE)
    ids = read.tokenizer(text, add_special_tokens=False).input_ids
    assert read.tokenizer.decode(ids) == text


def test_long_words_are_refused_by_what_a_tokenizer_makes_of_them(
    data: Path, tiny_config: Run, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text of many letters but few tokens is taken; so is one that only a smaller vocabulary finds too long."""
    path = data.with_name("run.yaml")

    def write(**train: Any) -> None:
        values = {**tiny_config, "data": {"train": [{"records": str(data)}]}}
        path.write_text(json.dumps({**values, "train": {**tiny_config["train"], **train}}))

    edit(data, lambda records: records[2]["targets"][1].update(qa=[qa("Which organ makes bile? " * 100)]))
    write()
    code, out, err = checked(capsys, "--config", path)
    assert (code, err) == (0, "") and " tokens (record 'r2', target 'b')" in out
    assert int(out.split(" words, ")[1].split(" tokens")[0].replace(",", "")) < 1024
    edit(data, lambda records: records[2]["targets"][1].update(qa=[qa(NOISE), qa("short")]))
    for init in (None, str(tiny_checkpoint)):
        write(init=init)
        code, _, err = checked(capsys, "--config", path)
        assert code == 2 and f"{data}:3: record 'r2', target 'b': the text has " in err and "at most 1024" in err


def test_history_counts_as_words(data: Path, tiny_config: Run) -> None:
    history = [{"question": NOISE, "answer": ANSWER}] * 2
    edit(data, lambda records: records[0]["targets"][0].update(qa=[qa("Which?", history=history)]))
    with pytest.raises(InputError, match=r"tiny\.jsonl:1: .*the text has \d+ tokens; expected at most 1024"):
        read_records(config_from(tiny_config, where="test"), [Manifest(data)], None, PLACE)


def test_a_category_is_asked_for_where_there_is_no_question(data: Path, tiny_config: Run) -> None:
    edit(data, lambda records: records[0]["targets"][0].update(category=NOISE))
    read_records(config_from(tiny_config, where="test"), [Manifest(data)], None, PLACE)
    compares = config_from({**tiny_config, "loss": {"js": 2.0}}, where="test")
    with pytest.raises(InputError, match=r"tiny\.jsonl:1: .*tokens"):
        read_records(compares, [Manifest(data)], None, PLACE)
    edit(data, lambda records: records[0]["targets"][0].update(qa=[]))
    with pytest.raises(InputError, match=r"tiny\.jsonl:1: .*tokens"):
        read_records(config_from(tiny_config, where="test"), [Manifest(data)], None, PLACE)


def test_val_needs_no_answers_but_all_else(data: Path, tiny_config: Run) -> None:
    val = data.with_name("val.jsonl")
    shutil.copy(data, val)
    edit(val, lambda records: [t.update(qa=[qa("Which?", "Bile.")]) for one in records for t in one["targets"]])
    values = {**tiny_config, "data": {**tiny_config["data"], "val": str(val)}}
    read_records(config_from(values, where="test"), [Manifest(data)], Manifest(val), PLACE)
    edit(val, lambda records: records[3]["targets"][0].update(qa=[qa(NOISE, "Bile.")]))
    with pytest.raises(InputError, match=r"val\.jsonl:4: .*the text has"):
        read_records(config_from(values, where="test"), [Manifest(data)], Manifest(val), PLACE)
    # The limit leaves records 1 and 3 out.
    limited = config_from({**values, "train": {**tiny_config["train"], "val_limit": 2}}, where="test")
    read_records(limited, [Manifest(data)], Manifest(val), PLACE)


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_manifest_that_asks_nothing_is_refused(data: Path, tiny_config: Run, which: str) -> None:
    nothing = data.with_name("nothing.jsonl")
    shutil.copy(data, nothing)
    edit(nothing, lambda records: [record.update(targets=[]) for record in records])
    manifests = [Manifest(data), *([Manifest(nothing)] if which == "train" else [])]
    val = Manifest(nothing) if which == "val" else None
    with pytest.raises(InputError, match=r"nothing\.jsonl: no record has a target; at least one is needed"):
        read_records(config_from(tiny_config, where="test"), manifests, val, PLACE)


def test_ten_problems_are_shown_and_the_others_counted(data: Path, tiny_config: Run) -> None:
    edit(
        data,
        lambda records: [
            t.update(qa=[qa("Which?", "Bile."), qa("What?", "Gall.")]) for one in records for t in one["targets"]
        ],
    )
    with pytest.raises(InputError) as caught:
        read_records(config_from(tiny_config, where="test"), [Manifest(data), Manifest(data)], None, PLACE)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1].startswith("and 6 more; medisee prepare check --config")


def test_a_large_manifest_is_sampled(
    data: Path, tiny_config: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST", 2)
    (data.parent / "1.png").unlink()
    config = config_from(tiny_config, where="test")
    left_out = {seed for seed in range(40) if 1 not in sample(range(4), seed)}
    assert 10 < len(left_out) < 30 and all(list(sample(range(4), 3)) == sample(range(4), 3) for _ in range(3))
    for seed in range(6):
        seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
        if seed in left_out:
            read_records(seeded, [Manifest(data)], None, PLACE)
            assert f"{data}: 2 of 4 records are checked\n" in capsys.readouterr().out
        else:
            with pytest.raises(InputError, match=r"tiny\.jsonl:2: .*1\.png"):
                read_records(seeded, [Manifest(data)], None, PLACE)


def test_records_are_spread_evenly() -> None:
    assert [list(spread(5, limit)) for limit in (None, 9, 5, 2, 1)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 2],
        [0],
    ]


def test_ranks_divide_the_files_and_find_the_same(
    data: Path, tiny_config: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks in turn, each with what the other found."""
    (data.parent / "1.png").unlink()
    (data.parent / "2.png").unlink()
    opened: list[list[str]] = [[], []]
    read = check.read_image
    for rank in (0, 1):
        monkeypatch.setattr(
            check, "read_image", lambda path, rank=rank: (opened[rank].append(path.name), read(path))[1]
        )
        monkeypatch.setattr("medisee.training.initial_model.gather", lambda value, _: [value, value])
        monkeypatch.setattr("medisee.training.initial_model.raise_on_all_ranks", _raise)
        monkeypatch.setattr("medisee.training.initial_model.errors_on_all_ranks", nullcontext)
        place = Place(rank, 2, torch.device("cpu"))
        if rank:
            read_records(config_from(tiny_config, where="test"), [Manifest(data)], None, place)
        else:
            with pytest.raises(InputError, match=r"tiny\.jsonl:3: .*2\.png"):
                read_records(config_from(tiny_config, where="test"), [Manifest(data)], None, place)
    assert opened == [["0.png", "2.png"], ["1.png", "3.png"]]


def _raise(problems: list[str], place: Place) -> None:
    if problems and place.rank == 0:
        raise InputError(problems)


def test_several_processes_find_what_one_finds(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(data, lambda records: records[2]["targets"][0]["qa"][0].update(answer="Bile."))
    (data.parent / "1.png").write_bytes(b"no image")
    alone = everything(data)
    monkeypatch.setattr(check, "_PART", 1)
    monkeypatch.setattr(check, "_WORTH", 1)
    together = everything(data, workers=2)
    assert together == alone and len(alone.problems) == 2
    manifest = Manifest(data)
    assert [line.split(": ")[0] for line in with_lines(manifest, alone.problems)] == [f"{data}:2", f"{data}:3"]


def test_processes_that_read_files_do_without_torch() -> None:
    code = "import sys, medisee.prepare_data, medisee.data.check; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_of_a_run_have_its_roots(data: Path, tiny_config: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path, moved = data.parent.parent / "run.yaml", data.parent.parent / "moved.jsonl"
    data.rename(moved)
    source = {"records": str(moved), "root": str(data.parent)}
    path.write_text(json.dumps({**tiny_config, "data": {"train": [source], "categories": str(path)}}))
    code, _, err = checked(capsys, "--config", path, "--records", moved)
    assert code == 2 and all(f"error: {path}: category " in line for line in err.splitlines())  # it names none
    path.write_text(json.dumps({**tiny_config, "data": {"train": [source]}}))
    assert checked(capsys, "--config", path)[0] == 0
    assert checked(capsys, "--records", moved)[0] == 2
    assert checked(capsys, "--records", moved, "--root", data.parent)[0] == 0


def test_without_the_model_s_files_tokens_are_not_counted(
    data: Path, tiny_config: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data.with_name("run.yaml")
    model = {"mllm": {"source": str(data.parent / "none")}}
    path.write_text(json.dumps({"model": model, "data": {"train": [{"records": str(data)}]}}))
    code, out, err = checked(capsys, "--config", path)
    assert (code, err) == (0, "") and "tokens are not counted: " in out and "characters" in out


def test_scored_records_are_held_against_the_given_answer(data: Path) -> None:
    job = scored_job(load_config(None), Manifest(data), 3)
    assert list(job.places) == [0, 1, 2] and job.answer == ANSWER and job.tokens == ()


def _mutate(rng: random.Random, path: Path, content: bytes) -> bytes:
    kind = rng.choice(["flip", "cut", "drop", "double"] if path.suffix == ".jsonl" else ["flip", "cut"])
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 4, 20))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    lines = content.decode().splitlines()
    place = rng.randrange(len(lines))
    fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in json.loads(lines[place]).items()]
    at = rng.randrange(len(fields))
    fields[at : at + 1] = [] if kind == "drop" else [fields[at]] * 2
    lines[place] = f"{{{', '.join(fields)}}}"
    return "\n".join(lines).encode() + b"\n"


def test_of_damaged_files_each_is_named_or_reads_right(
    data: Path, tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the check takes, training reads: every example of it."""
    rng, taken = random.Random(0), 0
    files = [path for path in sorted(data.parent.iterdir()) if path.name != "categories.json"]
    whole = {path: path.read_bytes() for path in files}
    for _ in range(200):
        path = rng.choice([data, *files])
        path.write_bytes(_mutate(rng, path, whole[path]))
        code, _, err = checked(capsys, "--records", data)
        assert code == (2 if err else 0)
        assert all(line.startswith("error: ") and len(line) < 700 for line in err.splitlines()), err
        if code == 0:
            taken += 1
            manifest = Manifest(data)
            for record in manifest:
                questions = [(t, q) for t in record.targets for q in asked_questions(t, t.category, rng)]
                example = record_example(manifest, record, questions, None)
                assert len(tiny_model.processor([example]).frames) == 1
        path.write_bytes(whole[path])
    assert 10 < taken < 190, "both outcomes are tested"
