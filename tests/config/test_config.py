"""load_config: bases, overrides, and errors that name the key, the file and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from settings_table import PAPER, settings_table, with_table

from medisee.config import Config, Source
from medisee.config.load import config_from, dump_config, load_config
from medisee.foundation.errors import InputError

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(ROOT.glob("**/*.yaml"))


def write(folder: Path, content: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def problems(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return list(caught.value.problems)


def only_problem(path: Path | None, *overrides: str) -> str:
    (problem,) = problems(path, *overrides)
    return problem


def test_without_a_file_everything_is_the_papers() -> None:
    config = load_config(None)
    assert config == Config()
    assert (config.train.lr, config.train.betas, config.train.weight_decay) == (3e-4, (0.9, 0.95), 0.0)
    assert (config.train.warmup, config.train.batch_size, config.train.accumulation) == (100, 15, 10)
    assert (config.loss.text, config.loss.bce, config.loss.dice) == (1.0, 2.0, 0.5)
    assert (config.loss.box, config.loss.l1, config.loss.giou, config.loss.similarity) == (1.0, 1.0, 1.0, 0.0)
    assert config.model.candidate_tokens == ("[SEG]", "[BBOX]")


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "train: {steps: 7}\nmodel: {mllm: {size: {hidden: 64}}}\n"))
    assert config.train.steps == 7
    assert config.model.mllm.size.hidden == 64
    assert config.model.mllm.size.layers == Config().model.mllm.size.layers
    assert load_config(str(tmp_path / "run.yaml")) == config


def test_a_base_holds_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "train: {steps: 7, lr: 0.5}\nloss: {bce: 3}\n", "base.yaml")
    write(tmp_path, "base: base.yaml\ntrain: {steps: 9}\n", "middle.yaml")
    config = load_config(write(tmp_path, "base: ../middle.yaml\ntrain: {seed: 4}\n", "ablations/run.yaml"))
    assert (config.train.steps, config.train.lr, config.train.seed, config.loss.bce) == (9, 0.5, 4, 3.0)


def test_lists_of_a_base_are_replaced_not_joined(tmp_path: Path) -> None:
    write(tmp_path, "data: {train: [{records: a.jsonl}, {records: b.jsonl}]}\n", "base.yaml")
    config = load_config(write(tmp_path, "base: base.yaml\ndata: {train: [{records: c.jsonl, weight: 2}]}\n"))
    assert config.data.train == (Source(records="c.jsonl", weight=2),)


@pytest.mark.parametrize("name", ["unpadded", "compile_layers"])
def test_what_zero_3_cannot_do_is_refused(name: str) -> None:
    problem = only_problem(None, f"train.{name}=true", "train.zero_stage=3")
    assert f"{name} needs zero_stage 2 or less" in problem


def test_a_base_that_is_missing_names_the_file_that_asks_for_it(tmp_path: Path) -> None:
    path = write(tmp_path, "base: none.yaml\n")
    problem = only_problem(path)
    assert "none.yaml: cannot read the configuration" in problem and f"correct `base` in {path}" in problem


@pytest.mark.parametrize("bases", [{"run.yaml": "run.yaml"}, {"run.yaml": "b.yaml", "b.yaml": "./x/../run.yaml"}])
def test_a_circular_base_is_an_error(tmp_path: Path, bases: dict[str, str]) -> None:
    (tmp_path / "x").mkdir()
    for name, base in bases.items():
        write(tmp_path, f"base: {base}\n", name)
    problem = only_problem(tmp_path / "run.yaml")
    assert "`base` leads back to this file" in problem
    assert "run.yaml" in problem


def test_two_files_may_share_a_base(tmp_path: Path) -> None:
    write(tmp_path, "train: {steps: 7}\n", "base.yaml")
    for name in ("a.yaml", "b.yaml"):
        assert load_config(write(tmp_path, "base: base.yaml\n", name)).train.steps == 7


@pytest.mark.parametrize("base", ["absent.yaml", "folder"])
def test_a_missing_base_is_named(tmp_path: Path, base: str) -> None:
    (tmp_path / "folder").mkdir()
    problem = only_problem(write(tmp_path, f"base: {base}\n"))
    assert str(tmp_path / base) in problem
    assert "cannot read" in problem


def test_overrides_win_over_files(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 7, lr: 0.5}\n")
    config = load_config(path, ["train.steps=9", "model.mllm.size.hidden=64", "train.steps=9"])
    assert (config.train.steps, config.train.lr, config.model.mllm.size.hidden) == (9, 0.5, 64)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.out=runs/a=b", "runs/a=b"),
        ("data.cache=null", None),
        ("data.cache=", None),
        ("model.candidate_tokens=['[A]', '[B]']", ("[A]", "[B]")),
        ("model.prompts=[box]", ("box",)),
        ("data.train=[{records: a.jsonl, weight: 3}]", (Source(records="a.jsonl", weight=3),)),
        ("model.seg_head.size=256", 256),
        ("data.val=data/demo/val.jsonl", "data/demo/val.jsonl"),
    ],
)
def test_an_override_is_yaml(override: str, value: Any) -> None:
    config: Any = load_config(None, [override])
    for part in override.partition("=")[0].split("."):
        config = getattr(config, part)
    assert config == value


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4"])
def test_1e_4_is_a_number(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-4 as a string."""
    assert load_config(None, [f"train.lr={text}"]).train.lr == 1e-4
    assert load_config(write(tmp_path, f"train:\n  lr: {text}\n")).train.lr == 1e-4


def test_1e_4_is_a_number_in_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {betas: [9e-1, 1e-1]}\n")
    assert load_config(path).train.betas == (0.9, 0.1)
    assert load_config(None, ["train.betas=[9e-1, 1e-1]"]).train.betas == (0.9, 0.1)


def test_a_name_with_an_e_stays_a_name(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "train: {out: 0e-run}\n")).train.out == "0e-run"


@pytest.mark.parametrize("override", ["train.lr", "=3", ""])
def test_an_override_without_key_or_value_is_an_error(override: str) -> None:
    problem = only_problem(None, override)
    assert repr(override) in problem
    assert "train.lr=1e-4" in problem


def test_an_override_that_is_no_yaml_is_an_error() -> None:
    assert "not valid YAML" in only_problem(None, "train.out=[a")


UNKNOWN = {
    "top": ("trian: {lr: 1}\n", "trian", "train"),
    "section": ("train: {stepz: 1}\n", "train.stepz", "steps"),
    "nested": ("model: {mllm: {lora: {ranke: 1}}}\n", "model.mllm.lora.ranke", "rank"),
    "list item": ("data: {train: [{records: a, wieght: 3}]}\n", "data.train.0.wieght", "weight"),
}


@pytest.mark.parametrize(("content", "key", "meant"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_unknown_key_names_the_nearest(tmp_path: Path, content: str, key: str, meant: str) -> None:
    path = write(tmp_path, content)
    problem = only_problem(path)
    assert problem.startswith(str(path))
    assert f"unknown key '{key}'" in problem
    assert f"Did you mean '{meant}'?" in problem


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("train.lrr=1", "train.lrr", "lr"),
        ("los.bce=1", "los", "loss"),
        ("model.seg_head.sise=64", "model.seg_head.sise", "size"),
    ],
)
def test_an_unknown_key_in_an_override_names_the_nearest(override: str, key: str, meant: str) -> None:
    problem = only_problem(None, override)
    assert f"unknown key '{key}'" in problem
    assert f"Did you mean '{meant}'?" in problem


def test_an_unknown_key_lists_the_known_ones_of_its_place(tmp_path: Path) -> None:
    problem = only_problem(write(tmp_path, "model: {mllm: {lora: {qqqq: 1}}}\n"))
    assert "rank, alpha, dropout" in problem
    assert "Did you mean" not in problem


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "trian: {}\ntrain: {steps: 0, lr: fast, stepz: 1}\nmodel: {fusion: medium}\n")
    found = problems(path, "loss.bcee=1")
    assert len(found) == 6
    for key in ("trian", "train.steps", "train.lr", "train.stepz", "model.fusion", "loss.bcee"):
        assert sum(f" {key} " in problem.replace("'", " ") for problem in found) == 1, key


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=many",
        "train.steps=1.5",
        "train.steps=0",
        "train.lr=0",
        "train.lr=-1",
        "train.out=3",
        "train=3",
        "train.lr.x=1",
        "train.betas=[0.9]",
        "data.train=a.jsonl",
        "data.train=[a.jsonl]",
        "data.train=[{weight: 1}]",
        "data.word_dropout=1",
        "model.fusion=mean",
        "model.prompts=[]",
        "model.prompts=[text, points]",
        "model.candidate_tokens=[]",
        "model.candidate_tokens=['[A]', '[A]']",
        "model.seg_head.size=16",
        "model.mllm.lora.rank=0",
        "train.zero_stage=4",
        "loss.mask_resolution=half",
        "loss.mask_resolution=31",
        "loss.mask_resolution=512.5",
        "loss.mask_resolution=true",
    ],
)
def test_a_wrong_value_names_its_key(override: str) -> None:
    key = override.partition("=")[0].removesuffix(".x")
    for problem in problems(None, override):
        assert key.split(".")[0] in problem and key.split(".")[-1] in problem
        assert "fix the value" in problem


@pytest.mark.parametrize("value", ["original", "decoder", 32, 512])
def test_mask_resolutions(value: str | int) -> None:
    assert load_config(None, [f"loss.mask_resolution={value}"]).loss.mask_resolution == value


def test_a_wrong_mask_resolution_is_one_problem() -> None:
    assert "expected original, decoder, or the most pixels" in only_problem(None, "loss.mask_resolution=half")


@pytest.mark.parametrize("other", ["compile_layers=true", "unpadded=true"])
def test_settings_that_do_not_go_together_are_told_without_their_section(other: str) -> None:
    problem = only_problem(None, "train.zero_stage=3", f"train.{other}")
    assert problem.startswith(f"overrides: train: {other.partition('=')[0]} needs zero_stage 2 or less")
    assert "accumulation" not in problem


def test_features_of_an_encoder_that_learns_are_refused(tmp_path: Path) -> None:
    """Before anything is built, and without printing the whole configuration."""
    path = write(tmp_path, "model: {seg_head: {lora: {rank: 2}}}\n")
    problem = only_problem(path, "data.cache=features")
    expected = "data.cache needs a frozen encoder, but model.seg_head.lora lets it learn; remove one of them."
    assert problem == f"{path}: {expected}"
    assert load_config(path).model.seg_head.lora is not None
    assert load_config(None, ["data.cache=features"]).data.cache == "features"


def test_a_wrong_value_is_shown() -> None:
    problem = only_problem(None, "train.steps=many")
    assert "train.steps = 'many'" in problem


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    problem = only_problem(tmp_path / "absent.yaml")
    assert str(tmp_path / "absent.yaml") in problem
    assert "No such file" in problem


@pytest.mark.parametrize(
    ("content", "kind"), [("- 1\n- 2\n", "list"), ("", "NoneType"), ("hello\n", "str"), ("3\n", "int")]
)
def test_a_file_without_mapping_is_an_error(tmp_path: Path, content: str, kind: str) -> None:
    problem = only_problem(write(tmp_path, content))
    assert "expected a mapping of sections" in problem
    assert f"found {kind}" in problem


@pytest.mark.parametrize("content", ["a: [1\n", "\ta: 1\n", "a: b: c\n"])
def test_a_file_that_is_no_yaml_is_an_error(tmp_path: Path, content: str) -> None:
    assert "not valid YAML" in only_problem(write(tmp_path, content))


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x80train")
    assert "not valid YAML" in only_problem(tmp_path / "run.yaml")


@pytest.mark.parametrize("content", ["1: 2\n", "train: {1: 2}\n", "null: 1\n"])
def test_a_key_that_is_no_text_is_an_error(tmp_path: Path, content: str) -> None:
    assert problems(write(tmp_path, content))


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    content = f"train: !!python/object/apply:pathlib.Path.touch [!!python/object:pathlib.Path [{tmp_path}/x]]\n"
    assert "not valid YAML" in only_problem(write(tmp_path, content))
    assert not (tmp_path / "x").exists()


def test_a_config_does_not_change() -> None:
    config = Config()
    with pytest.raises(ValidationError):
        config.train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.lr=1e-4", "data.train=[{records: a.jsonl, weight: 3}, {records: b.jsonl}]", "data.cache=x y"],
        ["model.candidate_tokens=['[A]', '[B]', '[C]']", "model.prompts=[box]", "train.lr=1e-20"],
    ],
)
def test_a_dumped_config_loads_as_the_same(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(None, overrides)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert config_from(yaml.safe_load(dump_config(config)), where="dump") == config
    assert config_from(config.model_dump(mode="json"), where="json") == config


def sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        kinds = [field.annotation, *get_args(field.annotation)] if get_origin(field.annotation) else [field.annotation]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


def test_every_field_says_what_it_is() -> None:
    found = list(sections(Config))
    assert Source in found
    assert len(found) >= 11
    for section in found:
        assert section.__doc__
        for name, field in section.model_fields.items():
            text = field.description
            assert text, f"{section.__name__}.{name}"
            assert text.strip().endswith("."), f"{section.__name__}.{name}"


def test_every_section_refuses_what_it_does_not_know() -> None:
    for section in sections(Config):
        assert section.model_config.get("extra") == "forbid", section.__name__


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT)) for path in CONFIGS])
def test_the_projects_own_configs_load(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path, dump_config(config))) == config


FOLLOWS_COMPAT = [
    ("loss.degenerate_giou", "finite", "constant"),
    ("data.boxes", "half_open", "inclusive"),
    ("data.draws", "epochs", "unseeded"),
    ("eval.decoding", "routed", "plain"),
]


@pytest.mark.parametrize(("key", "ours", "theirs"), FOLLOWS_COMPAT)
def test_old_keys_must_agree_with_compat(key: str, ours: str, theirs: str, tmp_path: Path) -> None:
    """Those of earlier files and saved runs; wherever `compat` comes from."""
    assert load_config(None, [f"{key}={ours}"]) == Config()
    assert load_config(None, [f"{key}={theirs}", "compat=release"]) == load_config(None, ["compat=release"])
    section, name = key.split(".")
    write(tmp_path, f"{section}: {{{name}: {theirs}}}\n", "base.yaml")
    assert load_config(write(tmp_path, "base: base.yaml\ncompat: release\n")).release
    assert only_problem(None, f"{key}={theirs}") == f"overrides: {key} now follows compat; set compat: release."
    problem = only_problem(None, f"{key}={ours}", "compat=release")
    assert problem == f"overrides: {key} now follows compat; set compat: none."
    assert only_problem(None, f"{key}=odd") == f"overrides: {key} now follows compat; remove it."
    assert len(problems(None, f"{key}={theirs}", "train.lr=0")) == 2


def test_the_old_name_of_unpadded_still_works() -> None:
    assert config_from({"train": {"one_by_one": True}}, where="test").train.unpadded
    assert not load_config(ROOT / "medisee_7b.yaml", ["train.one_by_one=false"]).train.unpadded
    with pytest.raises(InputError, match=r"unknown key 'train\.one_by_one'"):
        config_from({"train": {"one_by_one": True, "unpadded": True}}, where="test")


CONTRADICTIONS = {
    "section and key": ["train=3", "train.lr=1e-4"],
    "key and section": ["train.lr=1e-4", "train=3"],
    "twice": ["train.lr=1", "train.lr=2"],
    "in a section": ["train={lr: 1, steps: 3}", "train.lr=2"],
    "null and key": ["model.seg_head.lora=null", "model.seg_head.lora.rank=2"],
    "old and new name": ["train.one_by_one=true", "train.unpadded=false"],
}


@pytest.mark.parametrize("overrides", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_overrides_that_contradict_each_other_are_refused(overrides: list[str]) -> None:
    first, second = overrides
    expected = f"overrides {first!r} and {second!r} contradict each other; leave one out."
    assert only_problem(None, *overrides) == expected


def test_overrides_that_agree_are_joined() -> None:
    train = load_config(None, ["train={lr: 1e-4, steps: 3}", "train.seed=5", "train.steps=3", "train.seed=5"]).train
    assert (train.lr, train.steps, train.seed) == (1e-4, 3, 5)


def test_a_key_that_is_twice_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {steps: 7}\nloss: {bce: 3}\ntrain: {lr: 0.5}\n")
    assert "line 3: the key 'train' is already on line 1" in only_problem(path)
    assert str(path) in only_problem(write(tmp_path, "base: run.yaml\n", "own.yaml"))


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "data: {val: ~/val.jsonl, train: [{records: ~/a.jsonl}]}\nmodel: {seg_head: {checkpoint: ~/x}}\n")
    config = load_config("~/run.yaml", ["train.out=~/runs/a", "data.cache=./~x"])
    assert config == load_config(
        write(tmp_path, "base: ~/run.yaml\ntrain: {out: ~/runs/a}\ndata: {cache: ./~x}\n", "b")
    )
    assert (config.train.out, config.data.val) == (f"{tmp_path}/runs/a", f"{tmp_path}/val.jsonl")
    assert (config.data.train[0].records, config.model.seg_head.checkpoint) == (f"{tmp_path}/a.jsonl", f"{tmp_path}/x")
    assert config.data.cache == "./~x"


UNUSUAL = [
    ("train.out=2026-12-01", "2026-12-01"),
    ("train.out='脾 (1)\u3000é'", "脾 (1)\u3000é"),
    ("train.out='no'", "no"),
    ("train.seed=4294967295", 2**32 - 1),
    ("train.steps='7'", 7),
    ("train.steps=1e3", 1000),
    ("train.lr=1e-4", 1e-4),
    ("train.warmup=0", 0),
    ("train.warmup=2000", 2000),
    ("train.mask_from=1500", 1500),
    ("train.recompute_layers=true", True),
    ("train.recompute_layers=4", 4),
    ("train.deepspeed={zero_optimization: {overlap_comm: true}}", {"zero_optimization": {"overlap_comm": True}}),
    ("loss.text=0", 0.0),
    ("eval.forced_answer='Here:\n{candidates}'", "Here: {candidates}"),
    ("model.candidate_tokens=['<seg>', '<|box|>']", ("<seg>", "<|box|>")),
    ("model.candidate_tokens=['[SEG]']", ("[SEG]",)),
    ("model.mllm.max_memory={'0': 20GiB, cpu: 1000}", {"0": "20GiB", "cpu": 1000}),
]


@pytest.mark.parametrize(("override", "value"), UNUSUAL)
def test_unusual_values_are_taken(override: str, value: Any) -> None:
    config: Any = load_config(None, [override])
    for part in override.partition("=")[0].split("."):
        config = getattr(config, part)
    assert config == value and type(config) is type(value)


def test_the_table_of_settings_is_as_the_code() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert settings_table() in readme
    assert with_table(readme) == readme
    rows = settings_table().splitlines()[2:]
    assert len(rows) > 100 and len({row.split(" | ")[0] for row in rows}) == len(rows)
    assert all(row.count(" | ") == 4 and row.endswith(". |") for row in rows)


def test_the_table_says_what_a_run_would_have() -> None:
    row = next(row for row in settings_table().splitlines() if "`train.lr`" in row)
    assert row == "| `train.lr` | number, > 0, ≤ 10 | `0.0003` | `0.0003` | Peak learning rate of AdamW. |"


def test_the_papers_values_belong_to_settings() -> None:
    settings = {row.split("`")[1] for row in settings_table().splitlines()[2:]}
    assert set(PAPER) <= settings
