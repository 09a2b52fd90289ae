"""The table of all settings in configs/README.md; called with the path of that file, it writes the table anew."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from medisee.config.model import Section
from medisee.config.run import Config

# Settings whose defaults are the paper's or those of the models that it names; of others, what differs. Without a row
# here the paper is silent.
_DEFAULTS = {
    "model": "candidate_tokens fusion router_hidden box_hidden box_start prompts",
    "model.mllm": "image_tokens vision_hidden vision_layers vision_size vision_patch train train_tokens prefix_attention",
    "model.mllm.size": "hidden layers heads kv_heads intermediate rope_theta rms_eps",
    "model.mllm.lora": "rank alpha dropout",
    "model.seg_head": "kind vit size",
    "loss": "text bce dice box l1 giou similarity",
    "data": "targets_per_image word_dropout",
    "train": "batch_size accumulation lr betas weight_decay warmup clip dtype zero_stage mask_from coarse_masks_until "
    "masks_per_image true_box",
}
PAPER = {f"{section}.{name}": "" for section, names in _DEFAULTS.items() for name in names.split()} | {
    "model.mllm.source": "LLaVA-Med v1.5",
    "model.mllm.train_projector": "`false`",
    "loss.js": "`0.0`, `2.0` in fine-tuning",
    "loss.mse": "`0.0`, `1.0` in fine-tuning",
    "data.train[].weight": "`7` for SA-Med2D-20M, `3` for MLMR-SD",
    "train.steps": "`1500`, 10 epochs of 150",
    "train.global_batch": "`600`, 4 x 15 x 10",
}
_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
_KINDS = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping", type(None): "null"}


def settings_table() -> str:
    """Returns a row for every setting: its name, type and bounds, default, the paper's value, and its meaning."""
    lines = ["| setting | value | default | paper | meaning |", "|---|---|---|---|---|"]
    for name, field in _settings(Config, ""):
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        value = ", ".join([" or ".join(dict.fromkeys(_types(field.annotation))), *_bounds(field)])
        paper = PAPER.get(name, "–") or default
        cells = (f"`{name}`", value, default, paper, " ".join((field.description or "").split()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """Returns a README with the table as it is now, in the place of the one that it holds."""
    return re.sub(r"\| setting \| value \|.*?(?=\n\n)", lambda _: settings_table(), readme, flags=re.DOTALL)


def _settings(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = [kind for kind in _parts(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        if not (inner and isinstance(field.default, Section)):
            yield f"{prefix}{name}", field
        for kind in inner:
            yield from _settings(kind, f"{prefix}{name}{'[]' if get_origin(field.annotation) is tuple else ''}.")


def _parts(kind: Any) -> list[Any]:
    return [kind, *(part for one in get_args(kind) if get_origin(kind) is not Literal for part in _parts(one))]


def _types(kind: Any) -> list[str]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [f"`{value}`" for value in inner]
    if origin is Annotated:
        return _types(inner[0])
    if origin is tuple:
        return [f"list of {' or '.join(_types(inner[0]))}"]
    if isinstance(kind, type) and issubclass(kind, Section):
        return ["section"]
    return [_KINDS[origin or kind]] if (origin or kind) in _KINDS else [one for part in inner for one in _types(part)]


def _bounds(field: FieldInfo) -> list[str]:
    constraints = [one for part in (field, *_parts(field.annotation)) for one in getattr(part, "metadata", ())]
    found = [(sign, getattr(one, name, None)) for name, sign in _SIGNS.items() for one in constraints]
    return list(dict.fromkeys(f"{sign} {bound:,}" for sign, bound in found if bound is not None))


def _shown(value: Any) -> str:
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
