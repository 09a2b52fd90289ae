"""Saved states: which stay, what damage is found, and that no failure of writing harms an older one."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medisee.config import Config
from medisee.config.load import config_from
from medisee.foundation.errors import InputError
from medisee.foundation.files import sha256
from medisee.training.resume import (
    FILES,
    MAY_CHANGE,
    OPTIMIZER,
    PROGRESS,
    Content,
    LastStates,
    Origin,
    Progress,
    Saved,
    changed_since,
    check_same_run,
    damage,
    find_last,
    only_run,
    read_state,
    saved_folders,
    starting_from,
)

CONTENT = {"records": 4, "sha256": "ab"}
FACTS = {
    "step": 0,
    "best": 0.25,
    "skipped": 3,
    "effective_batch": 4,
    "config": Config().model_dump(mode="json"),
    "manifests": {"data.train[0].records": CONTENT},
    "dtypes": {"train.dtype": "torch.float32"},
}
ORIGIN = Origin(
    effective_batch=4,
    manifests={"data.train[0].records": Content(records=4, sha256="ab")},
    dtypes={"train.dtype": "torch.float32"},
)
NAMES = ("model.safetensors", OPTIMIZER, PROGRESS, "config.json", FILES)


def tensors(step: int) -> dict[str, Tensor]:
    return {"a": torch.full((3, 4), float(step)), "b": torch.arange(5.0)}


def write(states: LastStates, *steps: int) -> None:
    for step in steps:
        with states.writing(step) as folder:
            save_file(tensors(step), folder / "model.safetensors")
            (folder / "config.json").write_text('{"format": 1}')
            save_file(tensors(-step), folder / OPTIMIZER)
            (folder / PROGRESS).write_text(json.dumps({**FACTS, "step": step}))


def steps_in(out: Path) -> list[int]:
    return [int(folder.name.removeprefix("last-")) for folder in saved_folders(out)]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A run's folder with the states of steps 5, 10 and 15."""
    write(LastStates(tmp_path, keep=3), 5, 10, 15)
    return tmp_path


def test_the_newest_state_is_found_and_read(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = find_last(three)
    assert (saved.folder, saved.progress) == (three / "last-00000015", Progress(15, 0.25, 3))
    origin = Origin(**{name: getattr(saved.origin, name) for name in Origin.model_fields})
    assert (origin, saved.config) == (ORIGIN, Config())
    assert torch.equal(load_file(saved.folder / "model.safetensors")["a"], tensors(15)["a"])
    assert capsys.readouterr().err == ""


def test_only_the_last_stay(tmp_path: Path) -> None:
    states = LastStates(tmp_path, keep=2)
    write(states, 5, 10, 15, 20)
    assert steps_in(tmp_path) == [15, 20]
    assert states.newest == tmp_path / "last-00000020"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-00000015", "last-00000020"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(LastStates(tmp_path, keep=3), 999, 1000)
    for step in (999, 1000):  # the names are padded to eight digits, as far as that goes
        (tmp_path / f"last-{step:08d}").rename(tmp_path / f"last-{step}")
    assert find_last(tmp_path).progress.step == 1000


def test_a_new_run_removes_an_older_ones_states_with_its_first(three: Path) -> None:
    states = LastStates(three, keep=2)
    assert steps_in(three) == [5, 10, 15]
    write(states, 2)
    assert steps_in(three) == [2]


def test_a_resumed_run_keeps_what_it_came_from_and_drops_what_was_damaged(three: Path) -> None:
    (three / "last-00000015" / PROGRESS).write_text("{}")
    states = LastStates(three, keep=2, found=find_last(three).folder)
    write(states, 12)
    assert steps_in(three) == [10, 12]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    place=st.floats(0, 1, exclude_max=True),
    how=st.sampled_from(["cut", "flip", "gone", "longer"]),
)
def test_damage_is_found_and_the_one_before_is_used(three: Path, name: str, place: float, how: str) -> None:
    path = three / "last-00000015" / name
    content = path.read_bytes()
    at = int(place * len(content))
    changed = {
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :],
        "longer": content + b"\0",
        "gone": b"",
    }[how]
    try:
        path.write_bytes(changed)
        if how == "gone":
            path.unlink()
        # A flipped space in files.json's layout still says the same.
        if name != FILES or damage(path.parent) is not None:
            assert damage(path.parent) is not None
            assert find_last(three).progress.step == 10
    finally:
        path.write_bytes(content)
    assert damage(path.parent) is None


def rewrite(folder: Path, **facts: Any) -> None:
    """Changes progress.json as its writer could have, so that its SHA-256 fits; None removes a key."""
    values = {**json.loads((folder / PROGRESS).read_text()), **facts}
    (folder / PROGRESS).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    files = json.loads((folder / FILES).read_text())
    files[PROGRESS] = {"bytes": (folder / PROGRESS).stat().st_size, "sha256": sha256(folder / PROGRESS)}
    (folder / FILES).write_text(json.dumps(files))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"step": -15}, "step = -15"),
        ({"step": "15"}, "step = 15 is wrong"),
        ({"step": True}, "step = True"),
        ({"step": 14}, "step = 14, but the folder's name"),
        ({"step": None}, "step"),
        ({"best": 7.5}, "best = 7.5"),
        ({"best": float("nan")}, "NaN is not JSON"),
        ({"best": "high"}, "best = high"),
        ({"skipped": -1}, "skipped = -1"),
        ({"effective_batch": 0}, "effective_batch = 0"),
        ({"config": []}, "config = []"),
        ({"config": {"train": {"steps": 12}}}, "step = 15, but the run has 12"),
        ({"config": {"train": {"stepz": 12}}}, "unknown key 'train.stepz'"),
        ({"manifests": {"data.val": {"records": 0, "sha256": "ab"}}}, "manifests.data.val.records = 0"),
        ({"manifests": []}, "manifests = []"),
        ({"dtypes": {"train.dtype": 16}}, "dtypes.train.dtype = 16"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_progress_that_makes_no_sense_is_named_and_the_one_before_is_used(
    three: Path, facts: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(three / "last-00000015", **facts)
    assert find_last(three).progress == Progress(10, 0.25, 3)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {three / 'last-00000015'}") and words in warning
    assert warning.endswith(f"; continuing from {three / 'last-00000010'}.")


@pytest.mark.parametrize(
    "files", ["[]", "{}", "null", '{"model.safetensors": 3}', "[" * 100_000, '{"a": 1, "a": 1}', "\x00" * 90]
)
def test_a_list_of_files_that_is_none(three: Path, files: str) -> None:
    (three / "last-00000015" / FILES).write_text(files)
    assert find_last(three).progress.step == 10


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_place_of_a_file(three: Path, name: str) -> None:
    (three / "last-00000015" / name).unlink()
    (three / "last-00000015" / name).mkdir()
    assert find_last(three).progress.step == 10


def test_what_only_looks_like_a_state_is_none(three: Path) -> None:
    (three / "last-00000099").write_text("a file")
    (three / "last-\u00b2").mkdir()
    (three / "last-1e9").mkdir()
    assert steps_in(three) == [5, 10, 15]


def test_a_name_that_leaves_the_folder_is_damage(three: Path) -> None:
    files = json.loads((three / "last-00000015" / FILES).read_text())
    files["../last-00000010/model.safetensors"] = files.pop("model.safetensors")
    (three / "last-00000015" / FILES).write_text(json.dumps(files))
    assert damage(three / "last-00000015") == "model.safetensors is missing"


def test_damaged_states_are_named(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, middle = three / "last-00000015", three / "last-00000010"
    (newest / "model.safetensors").write_bytes(b"short")
    (middle / FILES).unlink()
    assert find_last(three).progress.step == 5
    size = json.loads((newest / FILES).read_text())["model.safetensors"]["bytes"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {newest}: model.safetensors has 5 bytes instead of {size}; continuing from {three / 'last-00000005'}.",
        f"warning: {middle}: files.json is missing; continuing from {three / 'last-00000005'}.",
    ]


def test_nothing_that_could_be_resumed(tmp_path: Path, three: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        find_last(tmp_path / "none")
    for step in (5, 10, 15):
        (three / f"last-{step:08d}" / OPTIMIZER).unlink()
    with pytest.raises(InputError, match=r"optimizer\.safetensors is missing; all saved states are damaged") as caught:
        find_last(three)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
    ],
    ids=["disk", "safetensors", "interrupt"],
)
@pytest.mark.parametrize("at", ["model.safetensors", OPTIMIZER])
def test_a_save_that_fails_harms_nothing(three: Path, error: BaseException, at: str) -> None:
    before = {path: path.read_bytes() for path in three.rglob("*") if path.is_file()}
    states = LastStates(three, keep=1, found=three / "last-00000015")
    with pytest.raises(type(error)), states.writing(20) as folder:
        save_file(tensors(20), folder / "model.safetensors")
        (folder / at).write_bytes(b"half")
        raise error
    assert {path: path.read_bytes() for path in three.rglob("*") if path.is_file()} == before
    assert find_last(three).progress.step == 15
    write(states, 20)
    assert steps_in(three) == [20]


def test_what_a_killed_save_left_is_no_state_and_goes_with_the_next(three: Path) -> None:
    shutil.copytree(three / "last-00000015", three / ".last-00000020.new")
    shutil.copytree(three / "last-00000015", three / ".last-00000003.old")
    assert find_last(three).progress.step == 15
    write(LastStates(three, keep=3, found=three / "last-00000015"), 25)
    assert sorted(path.name for path in three.iterdir()) == ["last-00000010", "last-00000015", "last-00000025"]


def settings_of(**train: Any) -> Config:
    return config_from({"train": train}, where="test")


def saved_by(config: Config, effective_batch: int = 600) -> Saved:
    return Saved(Path("runs/x/last-00000010"), Progress(10), Origin(effective_batch=effective_batch), config)


def test_how_a_run_is_computed_may_change() -> None:
    old = settings_of(batch_size=15, accumulation=40, zero_stage=2)
    new = settings_of(batch_size=30, global_batch=600, zero_stage=3, offload="parameters", keep_last=5, out="moved")
    check_same_run(saved_by(old), new, Origin(effective_batch=600))
    check_same_run(
        saved_by(old),
        settings_of(accumulation=40, deepspeed={"zero_optimization": {"a": 1}}),
        Origin(effective_batch=600),
    )
    there = {"cache": "there", "root": "there", "categories": "there.json", "skip_corrupt": True, "workers": 3}
    sections = {"data": there, "eval": {"batch_size": 1, "resamples": 9, "max_new_tokens": 9}}
    check_same_run(
        saved_by(here()),
        config_from(sections | {"train": {"save_every": 7}}, where="test"),
        Origin(effective_batch=600),
    )


def here() -> Config:
    return config_from({"data": {"cache": "here"}}, where="test")


def test_every_setting_that_may_change_is_one() -> None:
    names = {
        f"{section}.{name}" for section in ("train", "data", "eval") for name in getattr(Config(), section).model_dump()
    }
    assert {name for name in MAY_CHANGE if "[]" not in name} <= names


@pytest.mark.parametrize(
    "values",
    [
        {"compat": "release", "data": {"select": "val"}},
        {"model": {"router_hidden": 64}},
        {"loss": {"text": 2.0}},
        {"data": {"cache": None}},
        {"data": {"cache": "here", "word_dropout": 0.5}},
        {"data": {"cache": "here", "cache_dtype": "bfloat16"}},
        {"data": {"cache": "here", "val": "val.jsonl"}},
        {"data": {"cache": "here"}, "train": {"dtype": "float32"}},
        {"data": {"cache": "here"}, "train": {"val_limit": 3}},
        {"data": {"cache": "here"}, "eval": {"forced_answer": "{candidates}!"}},
        {"data": {"cache": "here"}, "train": {"init": "another"}},
    ],
    ids=lambda values: str(list(values.items())[-1])[:60],
)
def test_what_changes_the_run_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="another configuration"):
        check_same_run(saved_by(here()), config_from(values, where="test"), Origin(effective_batch=600))


def test_more_steps_are_another_run_and_the_message_says_how_to_train_on() -> None:
    with pytest.raises(InputError) as caught:
        check_same_run(saved_by(Config()), settings_of(steps=3000), Origin(effective_batch=600))
    (problem,) = caught.value.problems
    assert (
        "train.steps = 1500, not 3000" in problem and "train.init=runs/x/last-00000010 and a new train.out" in problem
    )


def mixture(*records: str, **data: Any) -> Config:
    return config_from({"data": {**data, "train": [{"records": one} for one in records]}}, where="test")


def origin(*digests: str, **named: Content) -> Origin:
    contents = {f"data.train[{n}].records": Content(records=4, sha256=one) for n, one in enumerate(digests)}
    return Origin(effective_batch=600, manifests=contents | {f"data.{name}": one for name, one in named.items()})


def test_a_manifest_may_be_moved_if_it_is_the_same() -> None:
    saved = Saved(Path("last-00000010"), Progress(10), origin("a", "b"), mixture("a.jsonl", "b.jsonl"))
    check_same_run(saved, mixture("there/a.jsonl", "b.jsonl"), origin("a", "b"))
    with pytest.raises(
        InputError, match=r"data\.train\[0\]\.records = 'a\.jsonl', not 'c\.jsonl'; its content is another"
    ):
        check_same_run(saved, mixture("c.jsonl", "b.jsonl"), origin("c", "b"))
    # Where they were it is one mended file; elsewhere it may be another data set.
    check_same_run(saved, mixture("a.jsonl", "b.jsonl"), origin("mended", "b"))
    with pytest.raises(InputError, match=r"data\.train\[1\]"):
        check_same_run(saved, mixture("a.jsonl"), origin("a"))
    with pytest.raises(InputError, match=r"data\.train\[0\]"):
        check_same_run(saved, mixture("b.jsonl", "a.jsonl"), origin("b", "a"))


def test_an_earlier_state_knows_manifests_by_their_place_only() -> None:
    saved = Saved(Path("last-00000010"), Progress(10), Origin(effective_batch=600), mixture("a.jsonl"))
    check_same_run(saved, mixture("a.jsonl"), origin("a"))
    with pytest.raises(InputError, match=r"data\.train\[0\]\.records"):
        check_same_run(saved, mixture("b.jsonl"), origin("a"))


def test_the_manifest_that_does_not_choose_the_checkpoint_is_not_compared() -> None:
    saved = Saved(
        Path("last-00000010"),
        Progress(10),
        Origin(effective_batch=600),
        mixture("a.jsonl", val="v.jsonl", test="t.jsonl"),
    )
    check_same_run(saved, mixture("a.jsonl", val="v.jsonl"), Origin(effective_batch=600))
    with pytest.raises(InputError, match=r"data\.val"):
        check_same_run(saved, mixture("a.jsonl", val="w.jsonl"), Origin(effective_batch=600))


def test_what_changed_since_is_told() -> None:
    val = Content(records=9, sha256="v")
    saved = Saved(Path("last-00000010"), Progress(10, 0.5), origin("a", "b", val=val), Config())
    assert changed_since(saved, origin("a", "b", val=val)) == []
    more = {"data.train[1].records": Content(records=5, sha256="c"), "data.val": Content(records=9, sha256="w")}
    told = changed_since(saved, Origin(effective_batch=600, manifests=origin("mended").manifests | more))
    start, goes_on = "changed after step 10 was saved", "the run goes on with what it says now"
    assert told == [
        f"data.train[0].records: {start}; {goes_on}.",
        f"data.train[1].records: {start}; {goes_on}, 5 records instead of 4, in another order.",
        f"data.val: {start}; {goes_on}.",
    ]


def test_a_precision_that_is_another_one_on_this_machine_is_told() -> None:
    saved = Saved(
        Path("last-00000010"),
        Progress(10),
        Origin(effective_batch=600, dtypes={"train.dtype": "torch.bfloat16"}),
        Config(),
    )
    (told,) = changed_since(saved, Origin(effective_batch=600, dtypes={"train.dtype": "torch.float32"}))
    assert "train.dtype = auto: torch.float32 here, torch.bfloat16 before" in told


@pytest.mark.parametrize(
    ("values", "is_safe"),
    [({}, True), ({"train": {"init": "runs/a/checkpoint"}}, True), ({"model": {"mllm": {"source": None}}}, False)],
    ids=["published tokenizer", "of a checkpoint", "trained on the data"],
)
def test_a_state_without_a_tokenizer_is_used_where_that_is_safe(
    three: Path, values: dict[str, Any], is_safe: bool
) -> None:
    folder = three / "last-00000015"
    (folder / "config.json").unlink()
    files = json.loads((folder / FILES).read_text())
    del files["config.json"]
    (folder / FILES).write_text(json.dumps(files))
    config = config_from({"model": {"mllm": {"source": "weights/llava"}}, **values}, where="test")
    saved = read_state(folder)
    assert not saved.is_checkpoint
    if is_safe:
        assert starting_from(saved, config) is config
    else:
        with pytest.raises(InputError, match="saved by an earlier version, without the tokenizer"):
            starting_from(saved, config)
    whole = starting_from(read_state(three / "last-00000010"), config)
    assert whole.train.init == str(three / "last-00000010")


def test_a_second_run_is_refused_before_anything_is_written(three: Path) -> None:
    before = {path: path.read_bytes() for path in three.rglob("*") if path.is_file()}
    with only_run(three, is_new=False):
        for is_new in (True, False):  # never told to use --fresh while the other is at work
            with pytest.raises(InputError, match="another run is writing here"), only_run(three, is_new=is_new):
                raise AssertionError("both are at work")
    assert {path: path.read_bytes() for path in three.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match=r"already holds a run .*--resume"), only_run(three, is_new=True):
        pass


def test_a_folder_for_a_run_that_was_refused_goes_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refused"), only_run(tmp_path / "run", is_new=True):
        raise InputError("refused")
    assert not (tmp_path / "run").exists()


def test_another_run_is_refused_and_every_difference_named() -> None:
    new = config_from({"train": {"lr": 1e-5, "seed": 3}, "data": {"workers": 4, "val": "x.jsonl"}}, where="test")
    with pytest.raises(InputError) as caught:
        check_same_run(saved_by(Config()), new, Origin(effective_batch=300))
    named = [problem.split(": ", 1)[1].split(";")[0] for problem in caught.value.problems]
    assert named == [
        "the run was started with another configuration, data.val = None, not 'x.jsonl'",
        "the run was started with another configuration, train.lr = 0.0003, not 1e-05",
        "the run was started with another configuration, train.seed = 0, not 3",
        "the run was started with an effective batch of 600 images, now it is 300",
    ]
    assert "set train.global_batch=600" in caught.value.problems[-1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MB, where the user may mount one."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("may not mount a disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.faults
def test_a_disk_that_is_really_full(
    tiny_config: dict[str, Any], small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import subprocess

    import yaml

    from medisee.foundation.errors import exit_code
    from medisee.train import main

    section = {"out": str(small_disk / "run"), "steps": 12, "save_every": 2, "keep_last": 5, "log_every": 1}
    path = small_disk.parent / "run.yaml"
    path.write_text(yaml.safe_dump({**tiny_config, "train": {**tiny_config["train"], **section}}))
    assert exit_code(main, ["--config", str(path)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "No space left" in message and "--resume" in message
    folders = saved_folders(small_disk / "run")
    assert folders and [damage(folder) for folder in folders] == [None] * len(folders)
    subprocess.run(["mount", "-o", "remount,size=80m", str(small_disk)], check=True)
    assert exit_code(main, ["--config", str(path), "--resume"]) == 0
    assert find_last(small_disk / "run").progress.step == 12
