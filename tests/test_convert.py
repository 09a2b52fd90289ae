"""The two conversions, from files in the authors' format and from our own checkpoints; bad files, one sentence each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from medisee import MediSee
from medisee.config.load import config_from, load_config
from medisee.config.model import SegHeadConfig
from medisee.convert import main
from medisee.foundation.errors import InputError, exit_code
from medisee.models.mllm import load_tokenizer
from medisee.models.processing import Example, Query
from medisee.models.seg_head import sam_head
from medisee.weights.medisee_release import our_values, release_key
from medisee.weights.tokenizer import add_candidate_tokens, train_tokenizer

TEXTS = ("[INST] Where is the left lung in this scan? [/INST] It is here.", "Find the spleen and the liver.")
SIZE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 48}
MODEL: dict[str, Any] = {
    "mllm": {
        "size": SIZE,
        "vision_hidden": 32,
        "vision_layers": 2,
        "vision_heads": 2,
        "vision_size": 28,
        "lora": {"rank": 2, "dropout": 0.0},
    },
    "seg_head": {"vit": "micro", "size": 64},
    "router_hidden": 16,
    "box_hidden": 16,
}
SHARDS = 3


def random_model(values: dict[str, Any], seed: int = 0) -> MediSee:
    """Builds a model in which LoRA and the box decoder have left their zeros."""
    tokenizer = train_tokenizer(TEXTS, 300)
    config = config_from({"compat": "release", "model": values}, where="test").model
    add_candidate_tokens(tokenizer, config.candidate_tokens)
    torch.manual_seed(seed)
    model = MediSee(config, tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "box_decoder" in name or "lora_" in name:
                parameter.normal_(0, 0.3)
    return model


def released(model: MediSee, *, spelling: str) -> dict[str, Tensor]:
    """Returns a model's state as the authors save it."""
    state = {}
    for name, value in model.state_dict().items():
        key, value = release_key(name), our_values(name, value, model.config.candidate_tokens)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = model.state_dict()[name][:-1]
        adapted = "language_model" in name and ".base_layer." in name
        if spelling == "later" and adapted:
            key = key.replace("_proj.weight", "_proj.base_layer.weight")
        state[key] = value.contiguous().clone()
    return state


def write_release(folder: Path, state: dict[str, Tensor], kind: str) -> None:
    """Writes a state as shards with an index, beside the other files of the authors' folder."""
    folder.mkdir()
    names = list(state)
    places = {}
    for number in range(SHARDS):
        stem = "pytorch_model" if kind == "bin" else "model"
        file = f"{stem}-{number + 1:05d}-of-{SHARDS:05d}.{kind}"
        part = {name: state[name] for name in names[number::SHARDS]}
        (torch.save if kind == "bin" else save_file)(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": places}))
    train_tokenizer(TEXTS, 300).save_pretrained(folder)
    stated = {"num_attention_heads": SIZE["heads"], "num_hidden_layers": SIZE["layers"], "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(stated))


@pytest.fixture(scope="module")
def original() -> MediSee:
    return random_model(MODEL)


@pytest.fixture
def release(original: MediSee, tmp_path: Path) -> Path:
    """Returns the folder of a release, with the YAML run of its model beside it."""
    write_release(tmp_path / "release", released(original, spelling="0.4"), "bin")
    # What a paper's run names and a converted checkpoint does not need.
    named = {**MODEL, "mllm": {**MODEL["mllm"], "source": "weights/llava-med"}}
    named["seg_head"] = {**MODEL["seg_head"], "checkpoint": "weights/medsam.pth"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": named}))
    return tmp_path / "release"


def arguments(folder: Path, *overrides: str) -> list[str]:
    config, out = folder.with_name("run.yaml"), folder.with_name("out")
    return ["from-release", "--weights", str(folder), "--config", str(config), "--out", str(out), *overrides]


def outputs(model: MediSee) -> dict[str, Tensor]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    queries = [
        Query(record="r", target=str(number), question=question, answer="It is [SEG] and [BBOX].")
        for number, question in enumerate(("Where?", "Find the spleen."))
    ]
    with torch.inference_mode():
        output = model(model.processor([Example(pixels, 40, 64, tuple(queries))]))
    return {field.name: getattr(output, field.name) for field in fields(output)}


def agree(ours: MediSee, theirs: MediSee, tolerance: float) -> None:
    expected = outputs(theirs)
    for name, value in outputs(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("kind", "spelling"), [("bin", "0.4"), ("safetensors", "later")])
def test_a_release_becomes_a_checkpoint(
    original: MediSee, release: Path, kind: str, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(release)
    write_release(release, released(original, spelling=spelling), kind)
    main(arguments(release))
    out = release.with_name("out")
    loaded = MediSee.from_pretrained(out)
    agree(loaded, original, 0.0)
    assert loaded.config.mllm.source is loaded.config.seg_head.checkpoint is None
    switches = (loaded.config.box_frame, loaded.config.box_dtype, loaded.config.mllm.vision_input)
    assert switches == ("frame", "bfloat16", "centre_crop")
    learning = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert not [name for name in learning if "projector" in name or "vision_tower" in name]
    printed = capsys.readouterr().out
    assert f"seg head           {len(original.seg_head.state_dict()):>3} tensors" in printed
    assert len(list(out.glob("*.safetensors"))) == SHARDS
    assert json.loads((out / "config.json").read_text())["frozen"] == []


def test_a_missing_shard_of_the_result_is_named(release: Path) -> None:
    main(arguments(release))
    (release.with_name("out") / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-00002-of-00003.safetensors, which is not there"):
        MediSee.from_pretrained(release.with_name("out"))


def test_settings_win_over_the_releases(release: Path) -> None:
    main(arguments(release, "model.box_frame=resized"))
    config = MediSee.from_pretrained(release.with_name("out")).config
    assert (config.box_frame, config.box_dtype) == ("resized", "bfloat16")
    main(arguments(release, "compat=none"))
    config = MediSee.from_pretrained(release.with_name("out")).config
    assert (config.box_frame, config.box_dtype, config.mllm.vision_input) == ("resized", "float32", "pad")


def test_a_release_in_16_bits_stays_so(original: MediSee, release: Path) -> None:
    shutil.rmtree(release)
    state = {key: value.bfloat16() for key, value in released(original, spelling="0.4").items()}
    write_release(release, state, "bin")
    main(arguments(release))
    loaded = MediSee.from_pretrained(release.with_name("out"))
    layer = loaded.mllm.model.language_model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == torch.bfloat16
    assert loaded.mllm.lm_head.weight.dtype == loaded.box_decoder.layers[0].weight.dtype == torch.float32
    agree(loaded, original, 0.1)


def test_a_merged_release_needs_no_lora(original: MediSee, release: Path, tmp_path: Path) -> None:
    main(arguments(release))
    main(["merge", "--checkpoint", str(release.with_name("out")), "--out", str(tmp_path / "merged")])
    merged = MediSee.from_pretrained(tmp_path / "merged")
    agree(merged, original, 1e-5)
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    shutil.rmtree(release)
    write_release(release, released(merged, spelling="0.4"), "bin")
    main(arguments(release, "model.mllm.train=frozen"))
    agree(MediSee.from_pretrained(release.with_name("out")), merged, 0.0)


def remove_shard(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def change(folder: Path, action: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the shard that holds the output layer, and the index with it."""
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    file = index["weight_map"]["base_model.model.lm_head.weight"]
    state = torch.load(folder / file, weights_only=True)
    action(state)
    torch.save(state, folder / file)
    kept = {name: place for name, place in index["weight_map"].items() if place != file}
    index["weight_map"] = kept | dict.fromkeys(state, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


class Command:
    """What pickle turns into a call of the shell when it is read carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def damage(folder: Path, what: str) -> None:
    shard = folder / "pytorch_model-00001-of-00003.bin"
    head = "base_model.model.lm_head.weight"
    if what == "missing shard":
        remove_shard(folder)
    elif what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-2000])
    elif what == "code":
        torch.save({"weight": Command(folder / "executed")}, shard)
    elif what == "foreign":
        change(folder, lambda state: state.update(stranger=torch.zeros(2)))
    elif what == "missing":
        change(folder, lambda state: state.pop(head))
    elif what == "whole numbers":
        change(folder, lambda state: state.update({head: state[head].long()}))
    elif what == "vocabulary":
        change(folder, lambda state: state.update({head: state[head][:-5]}))
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "image token":
        tokenizer = train_tokenizer(TEXTS, 300)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
    elif what == "heads":
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": 8}))


@pytest.mark.parametrize(
    ("what", "overrides", "message"),
    [
        ("missing shard", (), "names pytorch_model-00002-of-00003.bin, which is not there"),
        ("truncated", (), "pytorch_model-00001-of-00003.bin: truncated"),
        ("code", (), "pytorch_model-00001-of-00003.bin: reading it needs posix.system, which could run code"),
        ("foreign", (), "unknown tensor stranger"),
        ("whole numbers", (), "lm_head.weight holds torch.int64 numbers, which cannot be weights"),
        ("missing", (), "release: lacks base_model.model.lm_head.weight"),
        ("vocabulary", (), r"lm_head.weight has \d+ rows of 32, but the tokenizer has \d+ tokens beside <image>"),
        ("no tokenizer", (), "release: holds neither tokenizer.model nor tokenizer.json"),
        ("image token", (), "release: <image> has id 300, expected the last one, 302"),
        ("heads", (), "config.json: num_attention_heads is 8, but model.mllm.size.heads is 4"),
        ("", ("model.router_hidden=8",), r"router_seg.gate.0.weight has shape \(16, 64\), .* expects \(8, 64\)"),
        ("", ("model.fusion=hard",), "model.fusion = 'hard': the release has 'soft'"),
        ("", ("model.box_start=map",), "model.box_start = 'map': the release has 'centre'"),
        ("", ("model.mllm.train_tokens=new",), "model.mllm.train_tokens = 'new': the release has 'all'"),
        ("", ("model.candidate_tokens=['[SEG]', '[BOX]']",), r"the release has \['\[BBOX\]', '\[SEG\]'\]"),
        ("", ("model.mllm.train=frozen",), "the weights have LoRA, so set model.mllm.train=lora"),
    ],
)
def test_a_damaged_release_is_named(
    release: Path, what: str, overrides: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(release, what)
    with pytest.raises(InputError, match=message):
        main(arguments(release, *overrides))
    assert exit_code(main, arguments(release, *overrides)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors and all(line.startswith("error: ") for line in errors)
    assert not release.with_name("out").exists()
    assert not (release / "executed").exists()


def test_values_that_are_not_finite_are_not_converted(release: Path) -> None:
    head = "base_model.model.lm_head.weight"
    change(release, lambda state: state.update({head: state[head] * float("nan")}))
    with pytest.raises(InputError, match=r"bin: base_model.model.lm_head.weight holds NaN or infinite numbers"):
        main(arguments(release))
    assert not list(release.parent.glob("*out*"))


def test_conversions_replace_nothing_but_checkpoints(release: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("")
    for command in (arguments(release), ["merge", "--checkpoint", str(tiny_checkpoint), "--out", str(out)]):
        with pytest.raises(InputError, match=r"out: holds 'thesis\.txt', which is not of an earlier checkpoint"):
            main(command)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.fixture
def adapted(original: MediSee, tmp_path: Path) -> Path:
    """Returns a checkpoint with LoRA on a published language model whose vocabulary is padded, and that model."""
    return adapt(tmp_path)


def adapt(tmp_path: Path, *, stored: torch.dtype = torch.float32, **mllm: Any) -> Path:
    """Makes what `adapted` returns, with other settings of the language model, or stored in 16 bits."""
    source = tmp_path / "llava"
    plain = random_model({**MODEL, "mllm": {**MODEL["mllm"], "train": "frozen"}}, seed=1)
    train_tokenizer(TEXTS, 300).save_pretrained(source)
    tokens = len(plain.tokenizer) - 3
    plain.mllm.resize_token_embeddings(tokens + 20)
    plain.mllm.to(stored).save_pretrained(source)  # pyright: ignore[reportArgumentType]: see load_mllm
    values = {**MODEL, "mllm": {**MODEL["mllm"], "source": str(source), "attention": "eager", **mllm}}
    config = config_from({"model": values}, where="test").model
    torch.manual_seed(2)
    model = MediSee(config, load_tokenizer(config.mllm, config.candidate_tokens))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "box_decoder" in name or "lora_" in name or "tokens_delta" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "adapted")
    return tmp_path / "adapted"


def test_merging_makes_a_checkpoint_of_its_own(adapted: Path, tmp_path: Path) -> None:
    """It computes the same, and needs neither LoRA nor the published model that it was trained from."""
    before = MediSee.from_pretrained(adapted)
    expected = outputs(before)
    main(["merge", "--checkpoint", str(adapted), "--out", str(tmp_path / "merged")])
    shutil.rmtree(tmp_path / "llava")
    merged = MediSee.from_pretrained(tmp_path / "merged")
    tokens = len(merged.tokenizer)
    for name, value in outputs(merged).items():
        # Rows behind the last token were padding.
        theirs = expected[name][:, :tokens] if name == "text_logits_NV" else expected[name]
        torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-5)
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    assert (merged.config.mllm.train, merged.config.mllm.train_projector) == ("frozen", False)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["run"]["merged"] is True
    kept = load_file(tmp_path / "merged" / "model.safetensors")
    assert "mllm.model.language_model.layers.0.self_attn.q_proj.weight" in kept


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_merged_model_of_16_bits_stays_so(tmp_path: Path, stored: torch.dtype) -> None:
    adapted = adapt(tmp_path, stored=stored)
    before = MediSee.from_pretrained(adapted)
    expected = outputs(before)["boxes_I4"]
    main(["merge", "--checkpoint", str(adapted), "--out", str(tmp_path / "merged")])
    shutil.rmtree(tmp_path / "llava")
    merged = MediSee.from_pretrained(tmp_path / "merged")
    assert f"torch.{merged.config.mllm.dtype}" == str(stored)
    kept = load_file(tmp_path / "merged" / "model.safetensors")
    found = merged.state_dict()
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in kept.items()}
    assert found["mllm.model.language_model.layers.0.self_attn.q_proj.weight"].dtype == stored
    assert found["mllm.lm_head.weight"].dtype == torch.float32
    # LoRA is rounded to 16 bits with the weights.
    torch.testing.assert_close(outputs(merged)["boxes_I4"], expected, rtol=0, atol=0.05)


def test_merging_changes_what_lora_adapts_and_nothing_else(adapted: Path, tmp_path: Path) -> None:
    before = MediSee.from_pretrained(adapted).state_dict()
    main(["merge", "--checkpoint", str(adapted), "--out", str(tmp_path / "merged")])
    after = MediSee.from_pretrained(tmp_path / "merged").state_dict()
    changed = {
        name
        for name, value in after.items()
        if value.shape == (old := before.get(name.replace("_proj.", "_proj.base_layer."), before.get(name))).shape  # type: ignore[union-attr]
        and not torch.equal(value, old)  # type: ignore[arg-type]
    }
    expected = {
        f"mllm.model.language_model.layers.{layer}.self_attn.{which}_proj.weight"
        for layer in range(SIZE["layers"])
        for which in "qv"
    }
    assert changed == expected


@pytest.mark.parametrize("train", ["lora", "frozen"])
def test_rows_that_learnt_by_themselves_are_merged(tmp_path: Path, train: str) -> None:
    adapted = adapt(tmp_path, train=train, train_tokens="new")
    kept = load_file(adapted / "model.safetensors")
    vocabulary = {
        name: tuple(value.shape) for name, value in kept.items() if "embed_tokens" in name or "lm_head" in name
    }
    # The checkpoint holds the two rows, and none of the published ones.
    assert len(vocabulary) == 2 and set(vocabulary.values()) == {(2, SIZE["hidden"])}
    before = MediSee.from_pretrained(adapted)
    expected, ids = outputs(before), before.processor.candidate_ids
    main(["merge", "--checkpoint", str(adapted), "--out", str(tmp_path / "merged")])
    shutil.rmtree(tmp_path / "llava")
    merged = MediSee.from_pretrained(tmp_path / "merged")
    assert (merged.config.mllm.train, merged.config.mllm.train_tokens) == ("frozen", "all")
    state = merged.state_dict()
    assert not [name for name in state if "token_adapter" in name or "lora" in name or "base_layer" in name]
    for name, rows in kept.items():
        if name in vocabulary:
            plain = name.removesuffix(".token_adapter.trainable_tokens_delta.default")
            assert torch.equal(state[f"{plain}.weight"][ids], rows)
    for name, value in outputs(merged).items():
        theirs = expected[name][:, : len(merged.tokenizer)] if name == "text_logits_NV" else expected[name]
        torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-5)


def test_a_demo_model_merges_into_itself(tiny_checkpoint: Path, tmp_path: Path) -> None:
    main(["merge", "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "merged")])
    before, after = (MediSee.from_pretrained(folder).state_dict() for folder in (tiny_checkpoint, tmp_path / "merged"))
    assert set(before) == set(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def forget_bases(checkpoint: Path) -> None:
    """Takes out what a checkpoint says of the published weights, so that others are accepted."""
    described = checkpoint / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"frozen": []}))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("hidden_act", "gelu", "text hidden_act of .*llava is 'gelu', but models built from sizes have 'silu'"),
        ("rope_type", "linear", "rope_type of .*llava is 'linear'"),
    ],
)
def test_a_language_model_of_another_kind_is_not_merged(
    adapted: Path, tmp_path: Path, setting: str, value: str, message: str
) -> None:
    described = tmp_path / "llava" / "config.json"
    content = json.loads(described.read_text())
    text = content["text_config"]
    if setting == "rope_type":
        text["rope_parameters"] |= {"rope_type": value, "factor": 2.0}
    else:
        text[setting] = value
    described.write_text(json.dumps(content))
    forget_bases(adapted)
    with pytest.raises(InputError, match=message):
        main(["merge", "--checkpoint", str(adapted), "--out", str(tmp_path / "merged")])


def test_a_seg_head_is_exported_for_transformers(tmp_path: Path) -> None:
    values = {**MODEL, "seg_head": {**MODEL["seg_head"], "lora": {"rank": 2, "dropout": 0.0}}}
    model = random_model(values)
    model.save_pretrained(tmp_path / "checkpoint")
    command = ["export-sam", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "sam")]
    main(command)
    exported = sam_head(SegHeadConfig(vit="micro", size=64, checkpoint=str(tmp_path / "sam"))).eval()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(exported.encode(pixels), model.seg_head.encode(pixels), rtol=1e-4, atol=1e-5)
    trained = model.seg_head.mask_decoder.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in exported.mask_decoder.state_dict().items())
    with pytest.raises(InputError, match="sam: is there already"):
        main(command)


def test_no_checkpoint_to_merge(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        main(["merge", "--checkpoint", str(tmp_path / "none" / "there"), "--out", str(tmp_path / "merged")])


def test_the_releases_run_is_a_config() -> None:
    root = Path(__file__).parents[1] / "configs"
    ours, theirs = load_config(root / "medisee_7b.yaml"), load_config(root / "medisee_release.yaml")
    assert (ours.model.seg_head.resize, ours.model.seg_head.pixels) == ("stretch", "minmax")
    assert (theirs.model.seg_head.resize, theirs.model.seg_head.pixels) == ("longest", "sam")
    assert theirs.train == ours.train.model_copy(update={"out": "runs/medisee_release"}), "neither overwrites the other"
    assert (theirs.data.selection, ours.data.selection) == ("data/mlmr_sd/test.jsonl", "data/mlmr_sd/val.jsonl")
