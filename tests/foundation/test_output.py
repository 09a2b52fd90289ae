from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from medisee.foundation import output
from medisee.foundation.errors import InputError, exit_code
from medisee.foundation.files import atomic_path, write_json, write_text
from medisee.foundation.output import Result, check_output, locked, replaced_folder

RESULT = Result("test", r"a\.json|pictures/\d+\.png", "a.json", "made.by", value="us")
MARK = {"made": {"by": "us"}}


def write_result(folder: Path, content: str = "new") -> None:
    (folder / "pictures").mkdir()
    (folder / "pictures/1.png").write_text(content)
    write_json(folder / "a.json", {**MARK, "content": content})


def contents(folder: Path) -> dict[str, str]:
    """Returns every file and link below a folder, hidden ones too."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(folder)): f"-> {os.readlink(path)}" if path.is_symlink() else path.read_text()
        for path in paths
    }


def in_other_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    head = (
        "import os, signal, sys; from pathlib import Path; from medisee.foundation.errors import exit_code\n"
        "from medisee.foundation.files import atomic_path, write_text\n"
        "from medisee.foundation.output import Result, locked, replaced_folder\n"
        f"RESULT = Result({RESULT.what!r}, {RESULT.files!r}, {RESULT.mark!r}, {RESULT.key!r}, {RESULT.value!r})\n"
        "out = Path(sys.argv[1])\n"
    )
    return subprocess.run([sys.executable, "-c", head + code, *map(str, arguments)], capture_output=True, text=True)


def test_a_second_run_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    with locked(out):
        other = in_other_process("sys.exit(exit_code(lambda _: locked(out).__enter__()))", out)
        assert (other.returncode, "another run is writing here" in other.stderr) == (2, True)
        (out / "result").touch()
    assert [path.name for path in out.iterdir()] == ["result"]
    with locked(out):
        pass


def test_a_second_run_is_kept_off_a_folder_that_is_replaced(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "out", RESULT) as folder:
        write_result(folder)
        other = in_other_process(
            "sys.exit(exit_code(lambda _: replaced_folder(out, RESULT).__enter__()))", tmp_path / "out"
        )
        assert (other.returncode, "another run is writing here" in other.stderr) == (2, True)
    assert contents(tmp_path).keys() == {"out/a.json", "out/pictures/1.png"}


def test_a_folder_without_a_result_is_not_left(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_an_error_inside_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mine"), locked(tmp_path):
        raise InputError("mine")
    with locked(tmp_path):
        pass


def test_a_disk_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = errno.ENOLCK

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with replaced_folder(tmp_path / "out", RESULT) as folder:
        write_result(folder)
    assert "its disk knows no locks" in capsys.readouterr().err
    assert (tmp_path / "out/a.json").is_file()
    number = errno.EACCES
    with pytest.raises(PermissionError), locked(tmp_path):
        pass


@pytest.mark.parametrize("where", ["before", "between"])
def test_a_killed_run_leaves_the_earlier_result_and_the_next_one_cleans_up(tmp_path: Path, where: str) -> None:
    """The kill comes while the new folder is written, or between the two renames that put it in place."""
    out = tmp_path / "out[1]"
    with replaced_folder(out, RESULT) as folder:
        write_result(folder, "old")
    renamed = (
        "rename = os.rename\nos.rename = lambda old, new: (rename(old, new), os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    killed = in_other_process(
        (renamed if where == "between" else "")
        + "with replaced_folder(out, RESULT) as folder:\n"
        + "    (folder / 'a.json').write_text('half')\n"
        + ("" if where == "between" else "    os.kill(os.getpid(), signal.SIGKILL)\n"),
        out,
    )
    assert killed.returncode == -signal.SIGKILL
    kept = out if where == "before" else tmp_path / ".out[1].old"
    assert (kept / "pictures/1.png").read_text() == "old"
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    with pytest.raises(InputError, match="mine"), replaced_folder(out, RESULT):
        assert (out / "pictures/1.png").read_text() == "old"
        raise InputError("mine")
    assert {path.name for path in tmp_path.iterdir()} == {"out[1]"}
    assert (out / "pictures/1.png").read_text() == "old"


def test_half_written_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = in_other_process(
        "with locked(out), atomic_path(out / 'x' / 'mask.png') as path, atomic_path(out / 'checkpoint') as folder:\n"
        "    path.write_text('half')\n"
        "    folder.mkdir(), (folder / 'config.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
        out,
    )
    assert killed.returncode == -signal.SIGKILL
    write_text(out / ".notes.tmp", "mine")
    with locked(out):
        pass
    assert contents(out) == {".notes.tmp": "mine"}


def test_an_error_leaves_the_earlier_result(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with replaced_folder(tmp_path / "out", RESULT) as folder:
            write_result(folder, content)
    before = contents(tmp_path)
    assert before["out/pictures/1.png"] == "new"
    with pytest.raises(ZeroDivisionError), replaced_folder(tmp_path / "out", RESULT) as folder:
        write_result(folder, "half")
        raise ZeroDivisionError
    assert contents(tmp_path) == before


@pytest.mark.parametrize("through", ["link", "link/", "x/../link", "."])
def test_the_folder_that_is_meant_is_replaced(tmp_path: Path, through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a link the folder that it leads to; the link stays."""
    (tmp_path / "large disk").mkdir()
    (tmp_path / "large disk/out").mkdir()
    (tmp_path / "link").symlink_to("large disk/out")
    monkeypatch.chdir(tmp_path / "large disk/out" if through == "." else tmp_path)
    with replaced_folder(Path(through), RESULT) as folder:
        write_result(folder)
    assert contents(tmp_path) == {
        "link": "-> large disk/out",
        "large disk/out/pictures/1.png": "new",
        "large disk/out/a.json": (tmp_path / "large disk/out/a.json").read_text(),
    }


def test_a_link_in_the_place_of_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoint").symlink_to("disk")
    with atomic_path(tmp_path / "checkpoint") as new:
        new.mkdir()
        (new / "x").write_text("new")
    assert contents(tmp_path) == {"checkpoint": "-> disk", "disk/x": "new"}


def test_what_systems_leave_is_not_the_users(tmp_path: Path) -> None:
    with replaced_folder(tmp_path, RESULT) as folder:
        write_result(folder)
    for name in (".DS_Store", "pictures/Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    check_output(tmp_path, RESULT, whole=True)


def test_files_of_others_stay_where_single_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    check_output(tmp_path, RESULT)
    (tmp_path / "a.json").write_text('{"made": {"by": "others"}}')
    with pytest.raises(InputError, match=r"holds 'a\.json', which is not of an earlier test and would be lost"):
        check_output(tmp_path, RESULT)
    for content in ('{"made": "by us"}', '["made"]', "{", '{"made": {"by": "us"}, "made": {"by": "us"}}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(InputError, match=r"holds 'a\.json'"):
            check_output(tmp_path, RESULT)
    write_json(tmp_path / "a.json", MARK)
    check_output(tmp_path, RESULT)
    with pytest.raises(InputError, match=r"holds 'notes\.txt'"):
        check_output(tmp_path, RESULT, whole=True)


def test_inputs_are_found_through_links_and_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    for out in ("data", "data/", "./data/../data", "link"):
        for given in (tmp_path / "data", "link", "data/."):
            with pytest.raises(InputError, match=r"is the root .*, which would be lost or mixed up"):
                check_output(Path(out), inputs={"the root": given, "nothing": None})
    with pytest.raises(InputError, match="holds the image"):
        check_output(Path("link"), inputs={"the image": "data/a.png"}, whole=True)
    check_output(Path("link"), inputs={"the image": "data/a.png"})
    check_output(Path("data/new"), inputs={"the root": "data"}, whole=True)
    many = {f"image {number}": f"data/{number}.png" for number in range(1000)}
    with pytest.raises(InputError) as error:
        check_output(Path("data"), inputs=many, whole=True)
    assert len(error.value.problems) == 9 and "and 992 more" in error.value.problems[-1]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("file", "file is a file; expected a folder"),
        ("file/below", "file is a file; expected a folder"),
        ("gone", "is a link to nowhere, which does not exist"),
        ("gone/below", "gone is a link to nowhere, which does not exist"),
        ("circle", "circle: "),
        ("x" * 231, "more than 230 bytes"),
        ("missing/" + "ü" * 120 + "/out", "more than 230 bytes"),
        ("a\0b", "cannot be written"),
        ("a/" * 2100, "cannot be written"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_places_that_cannot_be_written_are_told(tmp_path: Path, name: str, told: str, whole: bool) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=told) as error:
        check_output(tmp_path / name, whole=whole)
    assert len(error.value.problems) == 1
    assert contents(tmp_path) == before


def test_names_that_are_unusual_are_taken(tmp_path: Path) -> None:
    for name in ("x" * 230, "-rf", "a b\n", "ü" * 100, ".hidden", "new/er/est", "[x]*"):
        with replaced_folder(tmp_path / name, RESULT) as folder:
            write_result(folder)
        with replaced_folder(tmp_path / name, RESULT) as folder:
            write_result(folder, "again")
        assert (tmp_path / name / "pictures/1.png").read_text() == "again"
        assert not [
            path for path in (tmp_path / name).parent.iterdir() if path.name.endswith((".tmp", ".old", ".lock"))
        ]


def test_space_that_is_known_to_be_needed_must_be_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        output.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 10**10 - 2_000_000, 2_000_000)
    )  # pyright: ignore
    check_output(tmp_path)
    with pytest.raises(InputError, match="out: 15 MB are needed, 2 MB are free; make room or choose another disk"):
        check_output(tmp_path / "out", need=15_000_000)


def test_a_folder_among_others_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a shared disk, where only the folder itself is the user's."""
    access = os.access
    monkeypatch.setattr(output.os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    (tmp_path / "out").mkdir()
    with pytest.raises(
        InputError, match=r"cannot be replaced, since .* cannot be written; choose a folder in it, such"
    ):
        check_output(tmp_path / "out", whole=True)
    check_output(tmp_path / "out")
    check_output(tmp_path / "out" / "result", whole=True)


@pytest.mark.parametrize("written", ["text", "safetensors"])
def test_a_file_that_does_not_fit_is_told_in_a_sentence(tmp_path: Path, written: str) -> None:
    """A limit on the size of files stands for a full disk, which cannot be made here."""
    saved = (
        "import torch; from safetensors.torch import save_file\n"
        "def write(path): save_file({'x': torch.zeros(10000)}, path)\n"
        if written == "safetensors"
        else "def write(path): path.write_text('x' * 10000)\n"
    )
    done = in_other_process(
        "import resource\n"
        + saved
        + "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        + "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        + "def main(_):\n"
        + "    with atomic_path(out / 'x.bin') as path: write(path)\n"
        + "sys.exit(exit_code(main))",
        tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'x.bin'}: File too large; mend this, or choose another place.\n"
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.ELOOP])
def test_errors_of_the_disk_are_told_and_bugs_are_not_hidden(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: object) -> None:
        with atomic_path(tmp_path / "x"):
            raise OSError(number, os.strerror(number))

    assert exit_code(main) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'x'}: {os.strerror(number)};")
    for bug in (FileNotFoundError(errno.ENOENT, "x", "y"), OSError("no number"), ValueError("v")):
        with pytest.raises(type(bug)):
            exit_code(lambda _, bug=bug: (_ for _ in ()).throw(bug))  # pyright: ignore


def _state(folder: Path, rng: random.Random) -> tuple[Path, dict[str, str]]:
    """Makes a folder at random; returns what is given as its output folder, and all that is not an earlier result."""
    home = folder / "home"
    home.mkdir(parents=True)
    (home / "mine.txt").write_text("mine")
    kind = rng.choice(["folder"] * 6 + ["missing", "file", "link", "dangling"])
    out = place = folder / "out"
    if kind == "link":
        place = folder / "elsewhere"
        out.symlink_to("elsewhere")
    elif kind == "dangling":
        out.symlink_to("nowhere")
    elif kind == "file":
        out.write_text("mine")
    if kind in ("folder", "link"):
        place.mkdir()
        marked = rng.random() < 0.6
        if marked or rng.random() < 0.3:
            mark = MARK if marked else rng.choice([{}, {"made": {}}, {"made": {"by": "me"}}, {"other": MARK}])
            write_json(place / "a.json", mark)
        own = [f"pictures/{number}.png" for number in range(rng.randrange(3))]
        foreign = ["notes.txt", "pictures/mine.png", "pictures/1.png.bak", ".env", "deep/er/x", "a.json.old", "A.json"]
        for name in own + rng.sample(foreign, rng.choice([0, 0, 0, 1, 2])):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("ours" if marked and name in own else "mine")
        if rng.random() < 0.15:
            (place / "link").symlink_to(rng.choice([home, home / "mine.txt", "nowhere"]))
        if rng.random() < 0.2:
            (place / "empty").mkdir()
        ours = {str((place / name).relative_to(folder)) for name in [*own, "a.json"]} if marked else set[str]()
    else:
        ours = set[str]()
    return out, {name: content for name, content in contents(folder).items() if name not in ours}


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_of_the_users_is_lost_in_any_folder(tmp_path: Path, whole: bool) -> None:
    """200 folders at random: each is refused and stays as it is, or gets the result, and what else was there stays."""
    rng = random.Random(14)
    outcomes = {"refused": 0, "written": 0}
    for number in range(200):
        folder = tmp_path / str(number)
        out, mine = _state(folder, rng)
        before = contents(folder)
        try:
            if whole:
                with replaced_folder(out, RESULT) as new:
                    write_result(new)
            else:
                check_output(out, RESULT)
                with locked(out):
                    write_text(out / "pictures/1.png", "new") if not (out / "pictures").exists() else None
                    write_json(out / "a.json", {**MARK, "content": "new"})
        except InputError as error:
            outcomes["refused"] += 1
            assert all(str(out) in problem for problem in error.problems)
            assert contents(folder) == before
        else:
            outcomes["written"] += 1
            after = contents(folder)
            assert mine.items() <= after.items(), (number, mine, after)
            assert (out / "a.json").read_text().find("new") > 0
            assert not [name for name in after if name.endswith((".tmp", ".lock", ".old")) and name not in before]
    assert min(outcomes.values()) > 40, outcomes


def test_what_a_running_process_writes_is_left_alone(tmp_path: Path) -> None:
    mine, ended = tmp_path / f".eval.{os.getpid()}.tmp", tmp_path / ".eval.999999999.tmp"
    theirs = tmp_path / f".train.jsonl.{os.getpid()}.tmp"
    mine.mkdir()
    for path in (mine / "summary.json", theirs, ended):
        path.write_text("x")
    with locked(tmp_path):
        assert theirs.exists()
        assert not ended.exists()
    assert (mine / "summary.json").exists()
