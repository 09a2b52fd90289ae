"""The READMEs: their commands parse, the files, settings and tests that they name exist, their links resolve."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import medisee
from data_gen.__main__ import COMMANDS as ENGINE
from medisee.cli import ALL, main
from medisee.config import Config
from medisee.config.load import load_config
from medisee.foundation import command_line
from medisee.records.manifest import Manifest

ROOT = Path(__file__).parents[1]
READMES = sorted([ROOT / "README.md", *ROOT.glob("*/README.md")])
CONFIGS, TESTS = ROOT / "configs" / "README.md", ROOT / "tests" / "README.md"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
OWN = "configs/own.yaml"
"""What the reader is to write."""
PROGRAMS = ("medisee ", "python ", "pytest ", "deepspeed ", "sbatch ", "./scripts/", "pip ")
QUICK = ("--help", "--print-config", "--list", "info")
"""Commands with one of these words are run, not only parsed."""


class Parsed(Exception):
    """Carries what a command would have run with."""

    def __init__(self, values: argparse.Namespace) -> None:
        super().__init__()
        self.values = values


def text_of(readme: Path) -> str:
    return readme.read_text(encoding="utf-8")


def blocks(readme: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation that lists give them."""
    found = FENCE.findall(text_of(readme))
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, kind, body in found if kind == language]


def inline_code(readme: Path) -> list[str]:
    """Text between single backticks, on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text_of(readme)))]


def fenced_commands(readme: Path) -> Iterator[list[str]]:
    """The words of every command; arrays such as run=(...) are put in, settings of the environment left out."""
    for block in blocks(readme, "bash"):
        arrays: dict[str, list[str]] = {}
        for line in block.splitlines():
            if assigned := re.match(r"(\w+)=\((.*?)\)", line):
                arrays[assigned[1]] = shlex.split(assigned[2])
                continue
            words = []
            for word in shlex.split(line, comments=True):
                array = re.fullmatch(r"\$\{(\w+)\[@\]\}", word)
                words += arrays[array[1]] if array else [word]
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and words[0] not in ("source", "export"):
                yield words


FENCED = [(readme, words) for readme in READMES for words in fenced_commands(readme)]
INLINE = [(readme, code) for readme in READMES for code in inline_code(readme) if code.startswith(PROGRAMS)]


def names(pairs: list[tuple[Path, Any]]) -> list[str]:
    return [f"{readme.parent.name}: {' '.join(w) if isinstance(w, list) else w}"[:100] for readme, w in pairs]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that lets a command parse its words and stops it there."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def stopping(original: Any) -> Any:
        def parse(*args: Any, **options: Any) -> None:
            raise Parsed(original(*args, **options))

        return parse

    for place, name in ((argparse.ArgumentParser, "parse_args"), (command_line, "_parsed")):
        monkeypatch.setattr(place, name, stopping(getattr(place, name)))

    def run(words: list[str]) -> argparse.Namespace | None:
        command, argv = python_command(words)
        try:
            command(argv)
        except Parsed as parsed:
            return parsed.values
        return None

    return run


def python_command(words: list[str]) -> tuple[Any, list[str]]:
    """The main function that a command calls, and its arguments."""
    if words[0] == "medisee":
        return main, words[1:]
    if words[:3] == ["python", "-m", "data_gen"]:
        for package in ENGINE[words[3]] if len(words) > 3 else ():
            pytest.importorskip(package)
        return importlib.import_module("data_gen.__main__").main, words[3:]
    script = next(index for index, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word))
    spec = importlib.util.spec_from_file_location(f"readme_{Path(words[script]).stem}", ROOT / words[script])
    assert spec is not None and spec.loader is not None, words[script]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main, words[script + 1 :]


def check_shell_script(words: list[str]) -> None:
    """Options are in the script's own text; what looks like a configuration is one."""
    script = ROOT / next(word for word in words if word.endswith(".sh"))
    content = script.read_text(encoding="utf-8")
    for word in words[words.index(next(w for w in words if w.endswith(".sh"))) + 1 :]:
        if word.startswith("--"):
            assert word in content, f"{script.name} has no {word}"
        elif word.endswith(".yaml"):
            load_config(ROOT / word)


def check_pytest(words: list[str]) -> None:
    for word in words[1:]:
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), word
    if "-m" in words:
        assert words[words.index("-m") + 1] in markers()


def check_pip(words: list[str]) -> None:
    project = tomllib().loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        if extras := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()


def tomllib() -> Any:
    return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def markers() -> set[str]:
    options = tomllib().loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    return {marker.partition(":")[0] for marker in options["markers"]}


@pytest.mark.parametrize(("readme", "words"), FENCED, ids=names(FENCED))
def test_a_command_parses(readme: Path, words: list[str], parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if any(word.endswith(".sh") for word in words):
        check_shell_script(words)
    elif words[0] == "pytest":
        check_pytest(words)
    elif words[0] == "pip":
        check_pip(words)
    else:
        values = parse(words)
        if values is not None and getattr(values, "config", None):
            assert Path(values.config).is_file() or values.config == OWN
            load_config(values.config, getattr(values, "overrides", ()))


@pytest.mark.parametrize(("readme", "code"), INLINE, ids=names(INLINE))
def test_a_command_in_a_sentence_names_what_exists(
    readme: Path, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be cut short, so its options are looked up in the help of what it calls."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    words = shlex.split(code)
    if any(word.endswith(".sh") for word in words):
        return check_shell_script(words)
    if words[0] in ("pytest", "pip"):
        return check_pytest(words) if words[0] == "pytest" else check_pip(words)
    command, argv = python_command(words)
    if command is main and argv:
        assert argv[0] in ALL or argv[0].startswith("--"), code
    options = {word.partition("=")[0] for word in argv if word.startswith("--")}
    sub = (
        [word for word in argv[:2] if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
        if command is main or len(words) > 2
        else []
    )
    if options:
        with pytest.raises(SystemExit):
            command([*help_words(sub), "--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert options <= known, f"{code}: unknown {sorted(options - known)}"
    for word in argv:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file() or word == OWN, code


def help_words(words: list[str]) -> list[str]:
    """The subcommands before --help: two of `medisee prepare` and `medisee convert`, one of all others."""
    return words[:2] if words[:1] and words[0] in ("prepare", "convert") else words[:1]


QUICK_COMMANDS = [pair for pair in FENCED if pair[1][0] == "medisee" and any(word in QUICK for word in pair[1][1:])]


@pytest.mark.parametrize(("readme", "words"), QUICK_COMMANDS, ids=names(QUICK_COMMANDS))
def test_a_quick_command_runs(
    readme: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.chdir(ROOT)
    main(words[1:])
    assert len(capsys.readouterr().out) > 100


def test_a_small_run_is_planned(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_config), encoding="utf-8")
    main(["plan", "--config", str(tmp_path / "run.yaml"), "--gpu", "l4", "--gpus", "1"])
    assert "It fits" in capsys.readouterr().out


def test_the_front_page_is_short_and_no_lab_log() -> None:
    text = text_of(ROOT / "README.md")
    assert 1000 <= len(text.split()) <= 1300
    assert not re.search(r"\bcommit [0-9a-f]{7}\b", text)
    assert "Not a medical device" in text


def anchors(readme: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(readme)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_resolve(readme: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(readme)))
    assert targets or readme == TESTS
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (readme.parent / path).resolve() if path else readme
        assert file.exists() and ROOT in (file, *file.parents), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_paths_and_settings_in_sentences_exist(readme: Path) -> None:
    for code in inline_code(readme):
        if re.fullmatch(r"(medisee|data_gen|configs|scripts|tests|\.github|\.ci)/[\w./-]*", code) and code != OWN:
            assert (ROOT / code).exists(), code
        name = re.split(r"[=:]", code)[0]
        if re.fullmatch(r"(model|loss|data|train|eval)\.[a-z][\w.\[\]]*", name) and not re.search(
            r"\.(py|jsonl?|yaml)$", name
        ):
            assert is_setting(name), code


def is_setting(name: str) -> bool:
    """Whether a dotted name is a key of a configuration."""
    section: Any = Config
    for part in name.replace("[]", "").split("."):
        if not (isinstance(section, type) and issubclass(section, BaseModel) and part in section.model_fields):
            return False
        section = section_of(section.model_fields[part].annotation)
    return True


def section_of(annotation: Any) -> Any:
    """The section within a field's type, such as that of tuple[Source, ...] or Lora | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for one in get_args(annotation) if (inner := section_of(one)) is not None), None)


def test_every_configuration_is_listed() -> None:
    text = text_of(CONFIGS)
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"({path.relative_to(ROOT / 'configs')})" in text, path


def test_the_paper_index_is_complete_and_its_tests_exist() -> None:
    section = text_of(CONFIGS).split("## Paper index")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:1] == "|"
    ][2:]
    assert {f"eq. {number}" for number in range(1, 6)} <= {row[0].partition(":")[0] for row in rows}
    assert all(
        any(f"Table {number}" in row[0] or f"Tables {number}" in row[0] for row in rows) for number in (1, 3, 4, 5, 6)
    )
    for what, where, tests in rows:
        files = re.findall(r"`(tests/[^`]+)`", tests)
        assert files or "not here yet" in where, what
        assert all((ROOT / file).is_file() for file in files), what
    ablations = {path.name for path in (ROOT / "configs" / "ablations").glob("*.yaml")}
    assert ablations <= set(re.findall(r"ablations/([\w.]+)\)", section))


def test_every_script_wing_and_command_is_listed() -> None:
    scripts = text_of(ROOT / "scripts" / "README.md")
    for path in (ROOT / "scripts").glob("*.*"):
        assert path.name in scripts
    code = text_of(ROOT / "medisee" / "README.md")
    for path in (ROOT / "medisee").glob("*/__init__.py"):
        assert f"({path.parent.name})" in code, path
    assert all(f"medisee {command} " in code for command in ALL)
    engine = text_of(ROOT / "data_gen" / "README.md")
    assert all(f"**{path.parent.name}**" in engine for path in (ROOT / "data_gen").glob("*/__init__.py"))
    assert all(f"python -m data_gen {command} " in engine for command in ENGINE)


def test_markers_are_listed_with_the_tests_that_have_them() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text_of(TESTS), flags=re.MULTILINE)
    assert {name for name, _ in rows} == markers()
    for name, listed in rows:
        used = {
            str(path.relative_to(ROOT))
            for path in (ROOT / "tests").rglob("test_*.py")
            if f"pytest.mark.{name}" in path.read_text(encoding="utf-8")
        }
        assert set(re.findall(r"`([^`]+)`", listed)) == used, name


def test_examples_of_files_are_read(tmp_path: Path) -> None:
    (line,) = blocks(ROOT / "medisee" / "README.md", "json")
    json.loads(line)
    (tmp_path / "own.jsonl").write_text(line, encoding="utf-8")
    (record,) = Manifest(tmp_path / "own.jsonl")
    assert record.targets[0].qa[0].question == "Which organ makes bile?"
    (example,) = blocks(CONFIGS, "yaml")
    (tmp_path / "own.yaml").write_text(example.replace("demo.yaml", str(ROOT / "configs/demo.yaml")), encoding="utf-8")
    assert load_config(tmp_path / "own.yaml").train.out == "runs/own"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_python_examples_import_public_names(readme: Path) -> None:
    for block in blocks(readme, "python"):
        compile(block, str(readme), "exec")
        for line in re.findall(r"^from medisee import (.*)$", block, flags=re.MULTILINE):
            assert set(line.split(", ")) <= set(medisee.__all__)
