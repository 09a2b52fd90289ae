"""A checkpoint: a folder of config.json, tokenizer and trained tensors, which says what frozen weights it builds on.

Frozen weights that come from a published file are not copied: config.json holds their name and SHA-256, and loading
fails when the file at hand is another one. For a language model in a folder or in the hub's cache, the SHA-256 is that
of its config.json and of its weight files' sizes and headers (names, types, shapes, offsets): other values in the same
places are not noticed. A model that is built from sizes has no published weights, so its folder holds all of it. The
tensors are in one file, or in several with an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: of whichever library it uses
from peft.tuners.lora import LoraLayer
from peft.utils import TrainableTokensWrapper
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from medisee.config.load import config_from
from medisee.config.model import PLACING, Model
from medisee.foundation.errors import InputError, first_line, library_errors, shortened
from medisee.foundation.files import cached_sha256, write_json
from medisee.foundation.json_files import read_json
from medisee.foundation.output import Result, check_output, replaced_folder
from medisee.weights.gguf import gguf_file
from medisee.weights.hub import cached_folder, fetch, is_hub_id
from medisee.weights.model_card import CARD, model_card
from medisee.weights.sam_format import packaged_weights, weights_file
from medisee.weights.shards import (
    CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    Shard,
    check_shards,
    facts_of,
    misfits,
    not_finite,
    open_shard,
    shard_paths,
    shards_digest,
)
from medisee.weights.tokenizer import IMAGE_TOKEN, read_tokenizer, token_count

WEIGHTS = SAFETENSORS
FORMAT = 1

_FIX = "give the folder that training wrote, such as runs/demo/checkpoint"


_OWN = "use the config.json that was written with the weights"


class SavedModel(Protocol):
    """What this module needs of a MediSee, which is defined in a wing above."""

    config: Model
    tokenizer: PreTrainedTokenizerBase

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


_Built = TypeVar("_Built", bound=SavedModel)

_FILES = r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
_TOKENIZER = r"[^/]*(token|vocab|merges|spiece|sentencepiece|chat_template)[^/]*|additional_chat_templates/[^/]+"
CHECKPOINT = Result("checkpoint", _FILES + _TOKENIZER, CONFIG, "frozen")
"""The files of a checkpoint folder."""


@dataclass(frozen=True, slots=True)
class FrozenBase:
    """Published weights that a checkpoint builds on.

    Attributes:
        prefix: the model's tensors that come from it.
        source: file name or hub id.
        revision: hub revision, None for a file.
        sha256: of a file, or what `shards_digest` returns for a folder; None for a hub id that is not in the cache, and
            for folders in checkpoints of earlier versions.
    """

    prefix: str
    source: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint's config.json: the model's configuration, the frozen bases, facts about the run."""

    format: int
    model: dict[str, Any]
    frozen: tuple[FrozenBase, ...] = ()
    run: dict[str, Any] | None = None


def _has_published_head(config: Model) -> bool:
    return config.seg_head.kind == "lite_medsam" or config.seg_head.checkpoint is not None


def frozen_bases(config: Model) -> list[FrozenBase]:
    """Lists the published weights that a model of this config is built on; each file is hashed once per process."""
    bases = []
    if _has_published_head(config):
        checkpoint = config.seg_head.checkpoint
        path = weights_file(checkpoint) if checkpoint else packaged_weights()
        try:
            digest: str | None = cached_sha256(path)
        except OSError as error:
            raise InputError(
                f"{path}: the seg head's frozen weights cannot be read ({error.strerror}); "
                "put the file there or correct model.seg_head.checkpoint."
            ) from error
        bases.append(FrozenBase("seg_head.", checkpoint or path.name, None, digest))
    mllm = config.mllm
    if mllm.source is not None:
        if mllm.is_gguf:
            digest = cached_sha256(gguf_file(mllm.source))
        else:
            digest = shards_digest(cached_folder(mllm.source, CONFIG, mllm.revision) or Path(mllm.source))
        bases.append(FrozenBase("mllm.", mllm.source, mllm.revision, digest))
    return bases


def trained_state(model: SavedModel) -> dict[str, Tensor]:
    """Returns the tensors that a checkpoint holds: what learns, and what does not come from published weights."""
    published = ("seg_head.",) if _has_published_head(model.config) else ()
    published += ("mllm.",) if model.config.mllm.source is not None else ()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: value for name, value in model.state_dict().items() if name in learning or not name.startswith(published)
    }


def save_checkpoint(model: SavedModel, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Writes a checkpoint folder atomically; an older checkpoint there is replaced as a whole.

    `extra` are facts about the run, kept under "run" in config.json.

    Raises:
        InputError: the folder holds something else, which would be lost.
    """
    with replaced_folder(folder, CHECKPOINT, option="") as temporary:
        write_checkpoint(model, temporary, extra)


def write_checkpoint(
    model: SavedModel, folder: Path, extra: dict[str, Any] | None = None, weights: Mapping[str, Tensor] | None = None
) -> list[Path]:
    """Writes a checkpoint's files into an existing folder and returns their paths.

    `weights` are `trained_state(model)`, each contiguous and on the CPU, where the caller has gathered them already.
    """
    state = trained_state(model) if weights is None else weights
    files = [folder / Path(name).name for name in model.tokenizer.save_pretrained(folder) if Path(name).exists()]
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in state.items()},
        str(folder / WEIGHTS),
        metadata={"format": "pt"},
    )
    write_description(folder, model.config, extra or {})
    return sorted({*files, folder / WEIGHTS, folder / CONFIG})


def check_replaceable(folder: Path) -> None:
    """Checks that writing a checkpoint here loses nothing else."""
    check_output(folder, CHECKPOINT, option="", whole=True)


def write_description(folder: Path, config: Model, run: dict[str, Any]) -> None:
    """Writes a checkpoint's config.json: the model's configuration, its frozen bases, facts about the run."""
    content = Description(FORMAT, config.model_dump(mode="json"), tuple(frozen_bases(config)), run)
    write_json(folder / CONFIG, asdict(content))


def load_checkpoint(
    folder: Path,
    build: Callable[..., _Built],
    *,
    bits: int | None = None,
    device_map: str | None = None,
) -> _Built:
    """Loads a checkpoint strictly.

    Args:
        folder: a folder written by `save_checkpoint`.
        build: MediSee, or a function that takes its arguments and builds one.
        bits: replaces the checkpoint's `Mllm.bits`; None keeps it.
        device_map: replaces the checkpoint's `Mllm.device_map`; None keeps it.

    Raises:
        InputError: no checkpoint, foreign or truncated files, another frozen base, missing, left-over or misshapen
            tensors; bits or a device map for a checkpoint that holds all of its language model.
    """
    description = read_description(folder)
    config = _placed(_model_of(description, folder), folder, {"bits": bits, "device_map": device_map})
    saved = {base.prefix: base for base in description.frozen}
    for base in frozen_bases(config):
        old = saved.get(base.prefix, base)
        if None not in (old.sha256, base.sha256) and old.sha256 != base.sha256:
            raise InputError(
                f"{folder / CONFIG}: was trained on {old.source} with SHA-256 {old.sha256}, but {base.source} here has "
                f"{base.sha256}; install the same weights."
            )
    tokenizer = _tokenizer(config, folder)
    paths = shard_paths(folder) if (folder / SAFETENSORS_INDEX).exists() else [folder / WEIGHTS]
    with ExitStack() as stack:
        shards = [stack.enter_context(open_shard(path)) for path in paths]
        if len(paths) > 1:
            check_shards(folder)
        if config.mllm.source is None:  # else the published model is compared with its own config.json first
            _check_fit(config, tokenizer, shards, build, folder)
        model = build(config, tokenizer)
        load_trained(model, {name: one.read(name) for one in shards for name in one.tensors}, folder / WEIGHTS)
    return model


def _tokenizer(config: Model, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(folder)
    known = tokenizer.get_vocab()
    if unknown := [token for token in config.candidate_tokens if token not in known]:
        raise InputError(
            f"{folder / CONFIG}: candidate_tokens {', '.join(unknown)} are not in the checkpoint's tokenizer; {_OWN}."
        )
    needed = {
        "<image>": IMAGE_TOKEN,
        "beginning": tokenizer.bos_token,
        "end": tokenizer.eos_token,
        "padding": tokenizer.pad_token,
    }
    if lacking := [name for name, token in needed.items() if token not in known]:
        raise InputError(f"{folder}: its tokenizer has no token for {', '.join(lacking)}; copy the tokenizer again.")
    if token_count(tokenizer) > len(tokenizer):
        raise InputError(f"{folder}: its tokenizer leaves out ids; copy the tokenizer again.")
    return tokenizer


def _check_fit(
    config: Model,
    tokenizer: PreTrainedTokenizerBase,
    shards: Sequence[Shard],
    build: Callable[..., SavedModel],
    folder: Path,
) -> None:
    """Compares a checkpoint's tensors with its config.json before memory is taken for what that describes."""
    found = {name: facts for shard in shards for name, facts in shard.tensors.items()}
    sizes, mllm = config.seg_head.sizes, config.mllm
    towers = mllm.vision_layers if mllm.image_tokens == "vision_tower" else 0
    layers = max(mllm.size.layers, towers, sizes.depth if sizes and not _has_published_head(config) else 0)
    with library_errors(folder / CONFIG, "does not describe the model of these weights", _OWN):
        if layers > len(found):
            raise ValueError(f"{layers:,} layers, but the weights are {len(found)} tensors")
        with torch.device("meta"):
            own = facts_of(trained_state(build(config, tokenizer, weights=False)))
    if problems := misfits(own, found, folder / WEIGHTS, _OWN):
        raise InputError(shortened(problems, str(folder / WEIGHTS)))


def _placed(config: Model, folder: Path, chosen: dict[str, Any]) -> Model:
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if not chosen:
        return config
    if config.mllm.source is None:
        raise InputError(
            f"{folder}: holds all of its language model, so {' and '.join(chosen)} cannot be chosen; leave it out, or "
            "give a checkpoint that builds on published weights (model.mllm.source)."
        )
    # Each of the two replaces the other.
    mllm = config.mllm.model_dump() | dict.fromkeys(("bits", "device_map")) | chosen
    where = f"{folder / CONFIG} with {', '.join(f'{name}={value}' for name, value in chosen.items())}"
    return config_from({"model": config.model_dump() | {"mllm": mllm}}, where=where).model


def _model_of(description: Description, folder: Path) -> Model:
    return config_from({"model": description.model}, where=str(folder / CONFIG)).model


def check_same_model(folder: Path, config: Model) -> None:
    """Checks that a checkpoint holds the model that a run describes, so that the run can start from it."""
    saved = _model_of(read_description(folder), folder)
    if difference := _difference("model", saved.model_dump(mode="json"), config.model_dump(mode="json")):
        name, old, new = difference
        raise InputError(
            f"{folder / CONFIG}: train.init holds a model with {name} = {old!r}, but the run says {new!r}; "
            "give both the same value, or start from another checkpoint."
        )


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        found = (_difference(f"{name}.{key}", value, new[key]) for key, value in old.items())
        return next((one for one in found if one is not None), None)
    return None if old == new else (name, old, new)


def without_bases(config: Model) -> Model:
    """Returns the configuration of the same model built from sizes, for a checkpoint that holds all its weights.

    The sizes must already be the model's own. LiteMedSAM's weights, which come with a package, stay there.
    """
    mllm = config.mllm.model_copy(update=dict.fromkeys(("source", "revision", "vision_source", "converted", *PLACING)))
    head = config.seg_head
    if head.kind != "lite_medsam":
        head = head.model_copy(update={"checkpoint": None})
    return config.model_copy(update={"mllm": mllm, "seg_head": head})


def merge_adapters(model: SavedModel) -> None:
    """Folds LoRA and separately trained token rows into their layers, in place: the model computes the same."""
    for name, layer in list(model.named_modules()):
        adapter: Any = layer.token_adapter if isinstance(layer, TrainableTokensWrapper) else layer
        if isinstance(layer, LoraLayer | TrainableTokensWrapper):
            adapter.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapter.get_base_layer())


def local_checkpoint(source: Path | str, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint: `source` itself, or where the files of a hub id were fetched to."""
    if Path(source).exists():
        return Path(source)
    if not is_hub_id(source):
        raise InputError(f"{source}: no such folder; {_FIX}, or a hub id.")
    try:
        return fetch(str(source), revision)
    except InputError as error:
        reason = error.problems[0].removeprefix(f"{source}: ").rstrip(".")
        raise InputError(f"{source}: no such folder, and as a hub id it {reason}. Or {_FIX}.") from error


def push_checkpoint(model: SavedModel, hub_id: str, *, private: bool | None, token: str | None) -> str:
    """Uploads a checkpoint to the hub and returns the commit's URL; see `MediSee.push_to_hub`."""
    api = HfApi(token=token)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        save_checkpoint(model, folder)
        try:
            repository = api.create_repo(hub_id, private=private, exist_ok=True).repo_id
            # The owner may have completed an existing card.
            if not api.file_exists(repository, CARD):
                (folder / CARD).write_text(model_card(model.config, repository), encoding="utf-8")
            return api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add a medisee checkpoint")
        except (HTTPError, OSError, ValueError) as error:
            raise InputError(
                f"{hub_id}: cannot be pushed ({first_line(error)}); check the id, the connection and `hf auth whoami`."
            ) from error


def load_trained(model: SavedModel, state: dict[str, Tensor], where: Path) -> None:
    """Loads trained tensors, read from the file `where`, strictly."""
    problems = misfits(facts_of(trained_state(model)), facts_of(state), where, _OWN) or not_finite(state.items(), where)
    if problems:
        raise InputError(shortened(problems, str(where)))
    model.load_state_dict(state, strict=False)


def read_description(folder: Path) -> Description:
    """Returns what `write_description` wrote."""
    path = folder / CONFIG
    if not path.is_file():
        inner = [folder / "checkpoint", *sorted(folder.glob("last-*"), reverse=True)]
        if found := next((one for one in inner if (one / CONFIG).is_file()), None):
            raise InputError(f"{folder}: the folder of a run, not a checkpoint; give {found}.")
        raise InputError(f"{path}: no checkpoint here; {_FIX}.")
    content = read_json(path, "a checkpoint's config.json")
    if content.get("format") != FORMAT or "model" not in content:
        raise InputError(f"{path}: not a medisee checkpoint of format {FORMAT}; {_FIX}.")
    try:
        return TypeAdapter(Description).validate_python(content)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{path}: {key}: {error.errors()[0]['msg']}; copy the checkpoint again.") from error
