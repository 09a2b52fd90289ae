"""Published language models: loaded completely or not at all; 16-bit bases learn in float32; offloaded layers compute."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_checkpoint import OriginalCheckpoint
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from medisee.config.model import Mllm, Model
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.models.mllm import load_mllm, load_tokenizer
from medisee.models.processing import Example
from medisee.models.seg_head import SegHeadSpec
from medisee.weights import llava as pretrained
from medisee.weights.llava import layer_devices, load_pretrained, quantization_config
from medisee.weights.llava_convert import converted
from medisee.weights.tokenizer import token_id

MakeOriginal = Callable[..., OriginalCheckpoint]

SPEC = SegHeadSpec(size=64, resize="longest", pixels="minmax", channels=32, grid=4)
CANDIDATES = ("[SEG]", "[BBOX]")
HEAD = {"vit": "micro", "size": 64}
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(make_original: MakeOriginal, tmp_path: Path) -> Path:
    """A transformers-format folder, in bfloat16 as most are."""
    checkpoint = make_original(dtype=torch.bfloat16, shards=1)
    return converted(checkpoint.folder, Mllm(source="llava", converted=str(tmp_path / "converted")))


def mllm(folder: Path, **changes: Any) -> Mllm:
    return Mllm.model_validate({"source": str(folder), "vision_size": 28} | changes)


def load(config: Mllm) -> Any:
    torch.manual_seed(0)
    return load_mllm(config, load_tokenizer(config, CANDIDATES), SPEC).eval()


def medisee(folder: Path, **changes: Any) -> MediSee:
    config = Model.model_validate({"mllm": mllm(folder, **changes).model_dump(), "seg_head": HEAD})
    torch.manual_seed(0)
    return MediSee(config, load_tokenizer(config.mllm, CANDIDATES)).eval()


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the weights."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def problems(config: Mllm) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        load_pretrained(config)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


Q_PROJ = "model.language_model.layers.1.self_attn.q_proj.weight"


def test_a_tensor_that_is_missing_is_no_random_one(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(Q_PROJ))
    (found,) = problems(mllm(folder))
    assert Q_PROJ in found and "lacks" in found


def test_all_that_does_not_fit_is_reported_together(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.language_model.layers.1.self_attn.query.weight"] = tensors.pop(Q_PROJ)
        tensors["model.language_model.norm.weight"] = torch.ones(31)

    edit(folder, change)
    lacking, extra, wrong = problems(mllm(folder))
    assert Q_PROJ in lacking
    assert "self_attn.query.weight" in extra
    assert "model.language_model.norm.weight of (31,) instead of (32,)" in wrong


@pytest.mark.parametrize(
    ("change", "said"), [(torch.Tensor.long, "holds whole numbers"), (lambda t: t / 0, "holds NaN")]
)
def test_what_is_not_a_weight_is_refused(folder: Path, change: Callable[[torch.Tensor], Any], said: str) -> None:
    edit(folder, lambda tensors: tensors.update({Q_PROJ: change(tensors[Q_PROJ])}))
    (found,) = problems(mllm(folder))
    assert Q_PROJ in found and said in found


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("text_config", {"num_hidden_layers": 100_000}, "100,002 layers, but the files hold"),
        ("text_config", {"hidden_size": 1 << 20}, "weights, but the files hold"),
        ("vision_config", {"intermediate_size": "wide"}, "does not describe"),
    ],
)
def test_sizes_are_compared_before_memory_is_taken(folder: Path, part: str, changes: dict[str, Any], said: str) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content[part] |= changes
    path.write_text(json.dumps(content))
    (found,) = problems(mllm(folder))
    assert found.startswith(f"{path}: does not describe") and said in found


def test_a_language_model_in_64_bits_computes_the_same(
    make_original: MakeOriginal, tmp_path: Path, make_example: Callable[..., Example]
) -> None:
    checkpoint, outputs = make_original(dtype=torch.float64, shards=1), []
    for dtype in ("float32", "auto"):
        config = Mllm(source="llava", converted=str(tmp_path / "converted"))
        model = medisee(converted(checkpoint.folder, config), dtype=dtype)
        with torch.no_grad():
            outputs.append(model(model.processor([make_example(["Where?"], answer="It is [SEG] and [BBOX].")])))
    torch.testing.assert_close(outputs[0].boxes_I4, outputs[1].boxes_I4)
    torch.testing.assert_close(
        outputs[0].text_logits_NV, outputs[1].text_logits_NV, rtol=1e-3, atol=1e-3, check_dtype=False
    )


def test_a_truncated_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    (found,) = problems(mllm(folder))
    assert WEIGHTS in found and "truncated" in found


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    (found,) = problems(mllm(folder))
    assert "pytorch_model.bin; expected .safetensors files" in found


def test_a_missing_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (found,) = problems(mllm(folder))
    assert WEIGHTS in found


def test_the_tokenizer_of_another_model(folder: Path, make_original: MakeOriginal) -> None:
    tokenizer = load_tokenizer(mllm(folder), CANDIDATES)
    tokenizer.save_pretrained(folder)
    (found,) = problems(mllm(folder))
    assert "tokenizer has 403 tokens, but the embedding has 400 rows" in found


def test_another_model_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (found,) = problems(mllm(folder))
    assert "'mistral', which is not a Llava" in found


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    (found,) = problems(mllm(folder))
    assert "config.json" in found


def test_a_hub_id_is_fetched_at_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def fetch(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
        requested.append((name, revision, weights))
        return folder

    monkeypatch.setattr(pretrained, "fetch", fetch)
    load(Mllm(source="owner/name", revision="abc", vision_size=28))
    assert requested == [("owner/name", "abc", False), ("owner/name", "abc", True)]


def test_a_padded_vocabulary_that_holds_an_image_token(folder: Path) -> None:
    """As transformers' LLaVA-v1.5: <image>, <pad>, then rows without tokens."""
    tokenizer = load_tokenizer(mllm(folder), ())
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    llava: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    llava.resize_token_embeddings(448)
    rows = llava.get_input_embeddings().weight.clone()
    llava.save_pretrained(folder)
    again: Any = load(mllm(folder))
    own = load_tokenizer(mllm(folder), CANDIDATES)
    assert [token_id(own, token) for token in ("<image>", "<pad>", *CANDIDATES)] == [400, 401, 402, 403]
    assert again.config.image_token_id == 400
    found = again.get_input_embeddings().weight
    assert found.shape == rows.shape
    assert torch.equal(found[:402], rows[:402].float())
    assert torch.equal(found[404:], rows[404:].float())
    torch.testing.assert_close(found[402:404], rows[:402].float().mean(dim=0).expand(2, -1), rtol=1e-2, atol=1e-3)


def learning(llava: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in llava.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("train", ["lora", "full", "frozen"])
def test_what_learns_is_float32_and_the_rest_stays_in_16_bits(folder: Path, train: str) -> None:
    llava = load(mllm(folder, train=train))
    assert {value.dtype for value in learning(llava).values()} == {torch.float32}
    rest = [value for name, value in llava.named_parameters() if name not in learning(llava)]
    assert {value.dtype for value in rest} == {torch.bfloat16}
    names = set(dict(llava.named_parameters()))
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= names


@pytest.mark.parametrize("autocast", [True, False])
def test_small_steps_are_not_lost(folder: Path, make_example: Callable[..., Example], autocast: bool) -> None:
    """bfloat16 has 8 bits: next to 1 the smallest step is 0.008."""
    model = medisee(folder)
    batch = model.processor([make_example(["Where is the lung?", "Find it."], answer="It is [SEG] and [BBOX].")])
    head: Any = model.mllm.lm_head
    with torch.no_grad():
        head.weight.fill_(1.0).add_(1e-3 * torch.randn_like(head.weight))
    before = {name: value.detach().clone() for name, value in learning(model.mllm).items()}
    optimizer = torch.optim.AdamW(learning(model.mllm).values(), lr=1e-4, weight_decay=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(batch)
        loss = torch.nn.functional.cross_entropy(output.text_logits_NV.float(), batch.labels_N)
    loss.backward()
    optimizer.step()
    for name, value in learning(model.mllm).items():
        if "lora_A" in name:  # lora_B starts at zero, so lora_A has no gradient yet.
            continue
        step = (value.detach() - before[name]).abs()
        assert 0.9e-4 < step.max() < 1.1e-4, name


@pytest.mark.parametrize("train", ["lora", "frozen"])
def test_single_rows_learn_in_float32_beside_16_bits(
    folder: Path, train: str, make_example: Callable[..., Example]
) -> None:
    model = medisee(folder, train=train, train_tokens="new")
    own, weights = learning(model.mllm), dict(model.mllm.named_parameters())
    assert {value.dtype for value in own.values()} == {torch.float32}
    layers = ("lm_head", "model.language_model.embed_tokens")
    assert {weights[f"{layer}.token_adapter.base_layer.weight"].dtype for layer in layers} == {torch.bfloat16}
    batch = model.processor([make_example(["Where is the lung?"], answer="It is [SEG] and [BBOX].")])
    loss = torch.nn.functional.cross_entropy(model(batch).text_logits_NV.float(), batch.labels_N)
    loss.backward()
    for layer in layers:
        rows = own[f"{layer}.token_adapter.trainable_tokens_delta.default"]
        assert rows.shape[0] == len(CANDIDATES)
        assert rows.grad is not None and rows.grad.abs().max() > 0


@torch.no_grad()
def test_a_16_bit_base_computes_what_the_float32_one_does(folder: Path, make_example: Callable[..., Example]) -> None:
    exact, coarse = medisee(folder, dtype="float32"), medisee(folder)
    batch = exact.processor([make_example(["Where is the lung?"], answer="It is [SEG] and [BBOX].")])
    expected, found = exact(batch), coarse(batch)
    keep = torch.isfinite(expected.text_logits_NV)
    assert found.text_logits_NV.dtype == torch.float32
    torch.testing.assert_close(found.text_logits_NV[keep], expected.text_logits_NV[keep], rtol=0.1, atol=0.3)
    assert not torch.equal(found.text_logits_NV[keep], expected.text_logits_NV[keep])
    question = coarse.processor([make_example(["Where is the lung?"])], packed=False)
    assert len(coarse.generate(question, max_new_tokens=4).texts) == 1


def test_bits_need_a_gpu_and_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda _: None)
    gpu, package = problems(mllm(folder, bits=4))
    assert "model.mllm.bits = 4" in gpu and "GPU" in gpu
    assert "pip install bitsandbytes" in package


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_language_model_is_quantized(folder: Path, bits: int) -> None:
    config = quantization_config(mllm(folder, bits=bits))
    assert (config.load_in_4bit, config.load_in_8bit) == (bits == 4, bits == 8)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    llava: Any = load(mllm(folder, train="frozen"))
    linear = {name for name, part in llava.named_modules() if isinstance(part, torch.nn.Linear)}
    found = {name for name in linear if should_convert_module(name, config.llm_int8_skip_modules)}
    assert found == {name for name in linear if ".language_model.layers." in name}
    assert found != linear


@pytest.mark.parametrize(
    "change",
    [{"source": None, "bits": 4}, {"source": None, "device_map": "auto"}, {"bits": 4, "train": "full"}],
)
def test_settings_that_exclude_each_other(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Mllm.model_validate({"source": "x"} | change)
    with pytest.raises(ValidationError):
        Mllm(source="x", bits=8, device_map="auto")


def memory_for_one_layer(folder: Path) -> int:
    """The parts outside the layers, held in float32, and one layer and a bit, in 16 bits."""
    llava: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    layers = llava.model.language_model.layers
    one = sum(value.numel() for value in layers[0].parameters())
    return 4 * (sum(value.numel() for value in llava.parameters()) - 2 * one) + 2 * one + 4000


@pytest.fixture
def memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {"cpu": memory_for_one_layer(folder)}


def test_offloaded_layers_compute_the_same(
    folder: Path, memory: dict[str, int], tmp_path: Path, make_example: Callable[..., Example]
) -> None:
    offload = {"device_map": "auto", "max_memory": memory, "offload_folder": str(tmp_path / "offload")}
    expected, model = medisee(folder), medisee(folder, **offload)
    layers: Any = model.mllm.model.language_model.layers
    assert layers[1].self_attn.q_proj.base_layer.weight.device.type == "meta"
    adapters = {name: value for name, value in learning(model.mllm).items() if "lora_" in name}
    assert len(adapters) == 8
    assert {value.device.type for value in learning(model.mllm).values()} == {"cpu"}
    assert all(value.abs().sum() > 0 for name, value in adapters.items() if "lora_A" in name)
    model.to("cpu")
    nn_state = {name: value for name, value in expected.state_dict().items() if not name.startswith("mllm.")}
    model.load_state_dict(nn_state, strict=False)
    batch = model.processor([make_example(["Where is the lung?"], answer="It is [SEG] and [BBOX].")])
    with torch.no_grad():
        torch.testing.assert_close(model(batch).boxes_I4, expected(batch).boxes_I4)
        torch.testing.assert_close(model(batch).text_logits_NV, expected(batch).text_logits_NV)
    model.generate(model.processor([make_example(["Where is it?"])], packed=False), max_new_tokens=3)


def test_offloading_needs_a_folder(folder: Path, memory: dict[str, int]) -> None:
    (found,) = problems(mllm(folder, device_map="auto", max_memory=memory))
    assert "offload_folder" in found


@pytest.mark.parametrize("most", [{"cpu": 1000}, {"cpu": "much"}, {"gpu": "20GiB"}])
def test_memory_that_cannot_be(folder: Path, memory: dict[str, int], most: dict[str, Any]) -> None:
    (found,) = problems(mllm(folder, device_map="auto", max_memory=most))
    assert "model.mllm.max_memory" in found


def test_layers_are_spread_over_the_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What learns and what other parts read stays on the first one."""
    monkeypatch.setattr(pretrained, "get_max_memory", lambda _: {0: 10**6, 1: 10**6, "cpu": 10**9})
    places = layer_devices(folder, mllm(folder, device_map="auto"))
    assert places["lm_head"] == places["model.language_model.embed_tokens"] == places["model.vision_tower"] == 0
    llava = LlavaForConditionalGeneration.from_pretrained(folder)
    names = [name for name, _ in llava.named_parameters()]
    assert all(any(name.startswith(f"{key}.") or name == key for key in places) for name in names)
    assert {f"model.language_model.layers.{n}" for n in range(2)} <= set(places)


def test_a_checkpoint_of_a_16_bit_base_comes_back(folder: Path, tmp_path: Path) -> None:
    model = medisee(folder)
    with torch.no_grad():
        model.mllm.lm_head.weight.add_(1e-4)
    model.save_pretrained(tmp_path / "checkpoint")
    again = MediSee.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(again.mllm.lm_head.weight, model.mllm.lm_head.weight)
    assert os.listdir(tmp_path / "checkpoint")


def test_a_checkpoint_knows_its_base(folder: Path, tmp_path: Path) -> None:
    medisee(folder).save_pretrained(tmp_path / "checkpoint")
    described = tmp_path / "checkpoint" / "config.json"
    content = json.loads(described.read_text())
    assert len(content["frozen"][0]["sha256"]) == 64
    edit(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].float()}))
    with pytest.raises(InputError, match=r"was trained on .* with SHA-256"):
        MediSee.from_pretrained(tmp_path / "checkpoint")
    # Earlier versions kept nothing of a folder.
    content["frozen"][0]["sha256"] = None
    described.write_text(json.dumps(content))
    MediSee.from_pretrained(tmp_path / "checkpoint")


def test_bits_and_devices_are_chosen_when_loading(
    folder: Path, memory: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    medisee(folder).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"model\.mllm\.bits = 8: needs an NVIDIA GPU"):
        MediSee.from_pretrained(tmp_path / "checkpoint", bits=8)
    with pytest.raises(InputError, match="bits puts the language model on one GPU"):
        MediSee.from_pretrained(tmp_path / "checkpoint", bits=8, device_map="auto")
    with pytest.raises(InputError, match=r"with bits=3"):
        MediSee.from_pretrained(tmp_path / "checkpoint", bits=3)
    monkeypatch.setattr(pretrained, "get_max_memory", lambda _: {"cpu": 10**9})
    spread = MediSee.from_pretrained(tmp_path / "checkpoint", device_map="auto")
    assert spread.config.mllm.device_map == "auto"
    assert spread.pinned_device == torch.device("cpu")
    assert MediSee.from_pretrained(tmp_path / "checkpoint").pinned_device is None


def test_a_spread_model_goes_nowhere_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "get_max_memory", lambda _: {"cpu": 10**9})
    model = medisee(folder, device_map="auto")
    assert next(model.placed(None).seg_router.parameters()).device.type == "cpu"
    with pytest.raises(InputError, match=r"device = meta: .* takes its inputs on cpu; leave the device out"):
        model.placed("meta")
    assert next(model.parameters()).device.type == "cpu"
