"""Plans: the sums behind them, what they say, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medisee import inference, train
from medisee.config import Config
from medisee.config.load import config_from, load_config
from medisee.foundation.errors import InputError, exit_code
from medisee.planning.gpus import GPUS, find_gpu
from medisee.planning.parameters import PartCount
from medisee.planning.plan import UTILISATION, TrainingPlan, plan_inference, plan_training, render_plan, stage_memory
from medisee.weights.missing import missing_files, missing_weights

CONFIG_7B = Path(__file__).parents[2] / "configs" / "medisee_7b.yaml"


@pytest.fixture(scope="module")
def run(tiny_config: dict[str, Any]) -> Config:
    """The tiny run, on GPUs."""
    values = {**tiny_config, "train": {**tiny_config["train"], "steps": 10, "global_batch": 24, "batch_size": 4}}
    return config_from(values, where="test")


@pytest.fixture(scope="module")
def plan(run: Config) -> TrainingPlan:
    """Its plan."""
    return plan_training(run, gpu="rtx4090", gpus=2)


def test_zero_cuts_what_it_says() -> None:
    parts = [PartCount("a", 100, 0, 200), PartCount("b", 40, 40, 160)]
    settings = config_from({"train": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 5}}}}, "test").train
    stages = [stage_memory(parts, settings, stage=stage, gpus=4, weights=360) for stage in range(4)]
    assert [one.weights for one in stages] == [360, 360, 360, 90]
    assert [one.gradients for one in stages] == [160, 160, 40, 40]
    assert [one.optimizer for one in stages] == [320, 120, 120, 120]
    assert [one.buffers for one in stages] == [0, 20, 20, 20 + 360]
    assert {one.host for one in stages} == {0}


def test_offloading_moves_state_to_the_host() -> None:
    parts = [PartCount("b", 40, 40, 160)]
    settings = config_from({"train": {"offload": "parameters", "zero_stage": 3}}, "test").train
    third = stage_memory(parts, settings, stage=3, gpus=2, weights=160)
    assert (third.weights, third.optimizer, third.host) == (0, 0, 80 + 240)
    assert stage_memory(parts, settings, stage=0, gpus=2, weights=160).host == 0


def test_time_is_arithmetic_over_speed(plan: TrainingPlan) -> None:
    for one in plan.modes:
        seconds = 10 * 3 * one.cost.flops / (UTILISATION * GPUS["rtx4090"].float32 * 1e12)
        assert one.days * 86400 == pytest.approx(seconds)
    release, ours, cached = plan.modes
    assert release.days > ours.days > cached.days > 0


def test_a_global_batch_sets_the_accumulation(run: Config, plan: TrainingPlan) -> None:
    assert (run.train.accumulation, plan.config.train.accumulation) == (1, 3)


def test_text_names_the_parts_and_the_verdict(plan: TrainingPlan) -> None:
    text = render_plan(plan)
    assert "It fits" in text and "Missing: nothing." in text
    for word in ("2 x GeForce RTX 4090", "ZeRO 2 (set)", "mask decoder", "the release's way", "(read)"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_run_that_does_not_fit_is_told_what_would(plan: TrainingPlan) -> None:
    room = plan.memory[2].total / 2**30
    small = TrainingPlan(**{**values_of(plan), "gpu": tiny_gpu(room + plan.recomputed / 2**31), "recompute": True})
    assert "It does not fit" in render_plan(small) and "train.batch_size=" in render_plan(small)
    smaller = TrainingPlan(**{**values_of(plan), "gpu": tiny_gpu(room / 2), "recompute": True})
    assert "even one image does not fit" in render_plan(smaller)
    enough = TrainingPlan(**{**values_of(plan), "gpu": tiny_gpu(2 * room + 1), "recompute": True})
    assert "only with train.recompute_layers=true" in render_plan(enough)


def test_a_plan_recomputes_as_many_layers_as_are_set(run: Config, plan: TrainingPlan) -> None:
    size = {**run.model.mllm.size.model_dump(), "layers": 2}
    values = run.model_dump(mode="json")
    values["model"]["mllm"]["size"] = size
    values["train"]["recompute_layers"] = 1
    half = plan_training(config_from(values, where="test"), gpu="rtx4090", gpus=2)
    assert half.recompute == 0.5
    assert half.peak - half.memory[2].total == pytest.approx((half.kept_all + half.recomputed) / 2)
    assert "(50% recomputed)" in render_plan(half)
    assert "(layers kept)" in render_plan(plan)
    room = (half.memory[2].total + half.recomputed) / 2**30
    tight = TrainingPlan(**{**values_of(half), "gpu": tiny_gpu(room)})
    assert "train.recompute_layers=true would fit" in render_plan(tight)


def values_of(plan: TrainingPlan) -> dict[str, Any]:
    """The fields of a plan."""
    return {name: getattr(plan, name) for name in TrainingPlan.__dataclass_fields__}


def tiny_gpu(memory: float) -> Any:
    """A GPU with as much memory that can be filled, GiB."""
    from medisee.planning.gpus import USABLE, Gpu

    return Gpu("tiny", memory / USABLE, 1.0, 1.0)


def test_gpus_are_found_by_any_spelling() -> None:
    assert find_gpu("RTX A6000") is find_gpu("A6000") is GPUS["a6000"]
    assert find_gpu("rtx-4090").tflops(torch.float32) == 82.6
    with pytest.raises(InputError, match=r"--gpu 'a600': .* Did you mean 'a6000'\?"):
        find_gpu("a600")


def test_all_bad_options_are_told_at_once(run: Config) -> None:
    with pytest.raises(InputError) as error:
        plan_training(run, gpu="h10", gpus=0)
    assert len(error.value.problems) == 2
    assert "Did you mean 'h100'?" in error.value.problems[0] and "--gpus 0" in error.value.problems[1]


def test_missing_files_are_named_all_at_once() -> None:
    found = {one.setting: one for one in missing_files(load_config(CONFIG_7B))}
    expected = {"model.mllm.source", "model.seg_head.checkpoint", "data.val"}
    assert expected | {"data.train[0].records", "data.train[1].records"} < set(found)
    assert "download_weights.py llava-med" in found["model.mllm.source"].source
    assert sum(one.path == "data/SAMed2Dv1" for one in found.values()) == 1


def test_a_folder_is_there_when_all_its_shards_are(tmp_path: Path) -> None:
    values = {"source": "lab/none", "vision_source": str(tmp_path), "vision_size": 28}
    model = config_from({"model": {"mllm": values}}, "test").model

    def missing() -> set[str]:
        return {one.setting for one in missing_weights(model)}

    assert missing() == {"model.mllm.source", "model.mllm.vision_source"}
    shard = tmp_path / "model-00001-of-00001.safetensors"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard.name}}))
    assert missing() == {"model.mllm.source", "model.mllm.vision_source"}
    shard.write_bytes(b"")
    assert missing() == {"model.mllm.source"}


def test_nothing_is_missing_where_all_is_there(run: Config) -> None:
    assert missing_files(run) == [] == missing_weights(run.model)
    empty = missing_files(config_from({"model": run.model.model_dump()}, "test"))
    assert [one.setting for one in empty] == ["data.train"]


def write_run(folder: Path, config: Config, **changes: Any) -> str:
    """Writes a run as YAML."""
    import yaml

    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**config.model_dump(mode="json"), **changes}), encoding="utf-8")
    return str(path)


def test_train_plans_without_its_files(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**run.train.model_dump(mode="json"), "out": str(tmp_path / "out")}
    path = write_run(tmp_path, run, data={"train": [{"records": "gone.jsonl"}]}, train=settings)
    assert exit_code(train.main, ["--config", path, "--plan", "--gpu", "l4", "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert "data.train[0].records: gone.jsonl" in out and "1 x L4" in out and "assumed" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "a60000"], "Did you mean 'a6000'?"),
        (["--gpus", "0"], "expected 1 or more"),
        (["--gpus", "-3"], "--gpus -3"),
    ],
)
def test_bad_options_of_train(
    options: list[str], message: str, run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, run)
    assert exit_code(train.main, ["--config", path, "--plan", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_inference_plans_a_checkpoint(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(inference.main, ["--plan", "--checkpoint", str(tiny_checkpoint), "--gpu", "a10"]) == 0
    out = capsys.readouterr().out
    assert "Fits on A10 (24 GiB): 16 bits: yes" in out and "Missing: nothing." in out


def test_bad_options_of_inference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(inference.main, ["--plan", "--checkpoint", str(tmp_path)]) == 2
    assert "no checkpoint here" in capsys.readouterr().err
    assert exit_code(inference.main, ["--plan", "--config", str(CONFIG_7B), "--gpu", "tpu"]) == 2
    assert "unknown GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        inference.main(["--plan"])
    assert ended.value.code == 2


def test_inference_holds_keys_and_values_of_every_layer(run: Config) -> None:
    planned = plan_inference(run, gpu="a10")
    size = run.model.mllm.size
    tokens = run.model.mllm.image_grid**2 + 45 + 9 + run.eval.max_new_tokens
    assert planned.cache == 2 * size.layers * size.kv_heads * (size.hidden // size.heads) * tokens * 2
    assert list(planned.stored) == [16]


@pytest.mark.scale
def test_the_papers_run_comes_near_its_days() -> None:
    plan = plan_training(load_config(CONFIG_7B), gpu="a6000", gpus=4)
    release, ours, _ = plan.modes
    assert 2.5 / 2 < release.days < 2.5 * 2
    assert ours.days < release.days / 2
    assert plan.peak <= plan.gpu.usable and plan.memory[2].total + plan.kept_all > plan.gpu.usable
    assert plan.stored[4] < plan.stored[8] < plan.stored[16]
