"""configs/laptop.yaml: a run with its own settings on a tiny GGUF file and tiny data, with and without CT slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_gguf import TEXTS, tiny_llama, write_gguf

from medisee.config import Config
from medisee.config.load import load_config
from medisee.eval import main as evaluate
from medisee.models.medisee import MediSee
from medisee.train import train
from medisee.weights.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]


def overrides(tiny_manifest: Path, folder: Path) -> list[str]:
    """What makes the run tiny and leaves everything else as the file has it."""
    sources = [{"records": str(tiny_manifest), "weight": 2}, {"records": str(tiny_manifest), "from_step": 1}]
    values = {
        "model.mllm.source": str(folder / "tiny.gguf"),
        "model.mllm.converted": str(folder / "converted"),
        "model.mllm.image_grid": 4,
        "model.seg_head": {"kind": "medsam", "vit": "micro", "size": 64},
        "data.train": sources,
        "data.val": str(tiny_manifest),
        "data.categories": str(tiny_manifest.with_name("categories.json")),
        "data.cache": str(folder / "cache"),
        "train.out": str(folder / "run"),
        "train.steps": 2,
        "train.batch_size": 2,
        "train.warmup": 0,
        "train.mask_from": 0,
        "train.coarse_masks_until": 1,
        "train.dtype": "float32",
        "eval.max_new_tokens": 4,
        "eval.resamples": 20,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


@pytest.mark.parametrize("name", ["laptop", "laptop_brain"])
def test_two_steps_and_an_evaluation(name: str, tiny_manifest: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(len(tokenizer)), tokenizer)
    changes = overrides(tiny_manifest, tmp_path)
    config = load_config(ROOT / "configs" / f"{name}.yaml", changes)
    assert config.model.mllm.train == "lora" and config.model.mllm.lora.rank == 8
    checkpoint = train(config)
    model = MediSee.from_pretrained(checkpoint)
    adapters = {key for key, value in model.named_parameters() if "lora_B" in key and bool(value.any())}
    assert len(adapters) == 4  # q_proj and v_proj of two layers have learnt
    argv = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--checkpoint", str(checkpoint)]
    evaluate([*argv, "--records", str(tiny_manifest), "--out", str(tmp_path / "eval"), *changes])
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text(encoding="utf-8"))
    assert summary


def test_the_brain_s_run_differs_in_its_data_alone() -> None:
    both, brain = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("laptop", "laptop_brain"))

    def without_data(config: Config) -> dict:
        values = config.model_dump()
        del values["data"], values["train"]["out"]
        return values

    assert without_data(both) == without_data(brain)
    assert not [source.records for source in brain.data.train if "abdomen" in source.records]
    assert {source.records for source in brain.data.train} < {source.records for source in both.data.train}


def test_from_scratch_differs_in_the_language_model_and_what_it_needs() -> None:
    """The same questions, slices, frozen features and steps; rate and losses are the demo's."""
    pretrained, scratch = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("laptop", "laptop_scratch"))
    demo = load_config(ROOT / "configs" / "demo.yaml")
    assert scratch.data.model_copy(update={"word_dropout": 0.0}) == pretrained.data
    assert scratch.model.mllm == demo.model.mllm.model_copy(
        update={"image_grid": pretrained.model.mllm.image_grid, "lora": pretrained.model.mllm.lora}
    )
    mllm = {"mllm": pretrained.model.mllm}
    assert scratch.model.model_copy(update=mllm) == pretrained.model
    own = {"out", "compile_layers", "lr", "warmup"}
    assert scratch.train.model_dump(exclude=own) == pretrained.train.model_dump(exclude=own)
    assert (scratch.train.lr, scratch.train.warmup) == (demo.train.lr, demo.train.warmup)
    assert scratch.loss == demo.loss


def test_a_step_from_scratch(tiny_manifest: Path, tmp_path: Path) -> None:
    size = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 48}
    changes = [change for change in overrides(tiny_manifest, tmp_path) if not change.startswith("model.mllm.")]
    changes += [f"model.mllm.size={json.dumps(size)}", "model.mllm.vocabulary=300", "model.mllm.image_grid=4"]
    config = load_config(ROOT / "configs" / "laptop_scratch.yaml", changes)
    model = MediSee.from_pretrained(train(config))
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").count("giou") >= 1
