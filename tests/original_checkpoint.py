"""Small checkpoints as LLaVA's own code writes them, with LLaVA's and CLIP's names written out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class OriginalCheckpoint:
    """A small checkpoint as LLaVA's own code writes it."""

    folder: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def write(self, tensors: dict[str, Tensor] | None = None, *, kind: str = "safetensors", shards: int = 4) -> None:
        """Writes weights, in shards with an index, or in one file where `shards` is 1."""
        tensors = self.tensors if tensors is None else tensors
        for old in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.bin"), *self.folder.glob("*.index.json")):
            old.unlink()
        stem = "model" if kind == "safetensors" else "pytorch_model"
        names = sorted(tensors)
        parts = [names[start::shards] for start in range(shards)]
        places = {}
        for number, part in enumerate(parts, start=1):
            file = f"{stem}-{number:05d}-of-{shards:05d}.{kind}" if shards > 1 else f"{stem}.{kind}"
            content = {name: tensors[name] for name in part}
            if kind == "safetensors":
                save_file(content, self.folder / file, metadata={"format": "pt"})
            else:
                torch.save(content, self.folder / file)
            places |= dict.fromkeys(part, file)
        if shards > 1:
            index = {"metadata": {"total_size": 0}, "weight_map": places}
            (self.folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))

    def configure(self, **changes: Any) -> None:
        """Writes config.json."""
        (self.folder / "config.json").write_text(json.dumps(self.settings | changes))


def original_settings(language: str) -> dict[str, Any]:
    """Returns the config.json of such a model."""
    return {
        "architectures": [{"mistral": "LlavaMistralForCausalLM", "llama": "LlavaLlamaForCausalLM"}[language]],
        "model_type": {"mistral": "llava_mistral", "llama": "llava"}[language],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "rms_norm_eps": 1e-5,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }


def original_shapes(
    *, rows: int, vision: bool, width: int = 32, wide: int = 64, layers: int = 2
) -> dict[str, tuple[int, ...]]:
    """Lists LLaVA's names with the shapes of a model with 4 heads, 2 of them for keys, and a CLIP 64 wide."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width), "lm_head.weight": (rows, width)}
    shapes["model.norm.weight"] = (width,)
    shapes |= {"model.mm_projector.0.weight": (width, 64), "model.mm_projector.0.bias": (width,)}
    shapes |= {"model.mm_projector.2.weight": (width, width), "model.mm_projector.2.bias": (width,)}
    half = width // 2
    attention = {"q_proj": (width, width), "k_proj": (half, width), "v_proj": (half, width), "o_proj": (width, width)}
    feed_forward = {"gate_proj": (wide, width), "up_proj": (wide, width), "down_proj": (width, wide)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{start}mlp.{name}.weight": shape for name, shape in feed_forward.items()}
        shapes |= {f"{start}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | (clip_shapes("model.vision_tower.vision_tower.vision_model.") if vision else {})


def clip_shapes(start: str) -> dict[str, tuple[int, ...]]:
    """Lists CLIP's names of its vision model: 28 pixels, patches of 14."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (64,),
        "embeddings.patch_embedding.weight": (64, 3, 14, 14),
        "embeddings.position_embedding.weight": (5, 64),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{name}.weight": (64,), f"{name}.bias": (64,)}
    for layer in range(2):
        own = f"encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{own}self_attn.{name}.weight": (64, 64), f"{own}self_attn.{name}.bias": (64,)}
        shapes |= {f"{own}mlp.fc1.weight": (96, 64), f"{own}mlp.fc1.bias": (96,)}
        shapes |= {f"{own}mlp.fc2.weight": (64, 96), f"{own}mlp.fc2.bias": (64,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{own}{name}.weight": (64,), f"{own}{name}.bias": (64,)}
    return {start + name: shape for name, shape in shapes.items()}


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draws tensors; the scales of norms are near 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (value + ("norm" in name and name.endswith("weight"))).to(dtype) for name, value in tensors.items()}
