"""configs/laptop.yaml: a run with its own settings on a tiny GGUF file and tiny data, with and without CT slices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_gguf import TEXTS, tiny_llama, write_gguf

from medisee.config import Config, load_config
from medisee.eval import main as evaluate
from medisee.models.medisee import MediSee
from medisee.models.tokenizer import train_tokenizer
from medisee.train import train

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
