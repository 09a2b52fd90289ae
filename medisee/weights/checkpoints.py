"""A checkpoint: a folder of config.json, tokenizer, the trained tensors as safetensors, and what the frozen bases are.

Frozen weights that come from a published file are not copied: the folder holds their name and SHA-256, and loading
fails when the file at hand is another one. Of a language model in a folder or in the hub's cache, the SHA-256 is that of
config.json and of its weights' headers (names, types, shapes, places) and sizes: other values in the same places are not
noticed. A model that is built from sizes has no such base: its folder holds all of it. The tensors lie in one file, or in
several with an index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]: of whichever library it uses
from peft.tuners.lora import LoraLayer
from peft.utils import TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medisee.config.load import config_from
from medisee.config.model import PLACING, Mllm, Model
from medisee.foundation.errors import InputError
from medisee.foundation.files import atomic_path, sha256, write_json
from medisee.weights.gguf import gguf_file
from medisee.weights.hub import cached_folder, is_hub_id
from medisee.weights.model_card import CARD, model_card
from medisee.weights.sam_format import packaged_weights, weights_file
from medisee.weights.shards import SAFETENSORS_INDEX, shard_paths, shards_digest

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = 1


class SavedModel(Protocol):
    """What this module needs of a model: MediSee is built above it."""

    config: Model
    tokenizer: PreTrainedTokenizerBase

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


_Built = TypeVar("_Built", bound=SavedModel)

_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class FrozenBase:
    """Published weights that a checkpoint builds on.

    Attributes:
        prefix: the model's tensors that come from it.
        source: file name or hub id.
        revision: hub revision, None for a file.
        sha256: of a file, or of what `shards_digest` reads of a folder; None for a hub id that is not in the cache.
    """

    prefix: str
    source: str
    revision: str | None = None
    sha256: str | None = None


def frozen_bases(config: Model) -> list[FrozenBase]:
    """Lists the published weights that a model of this config is built on."""
    bases = []
    head = config.seg_head
    if head.kind == "lite_medsam" or head.checkpoint is not None:
        path = weights_file(head.checkpoint) if head.checkpoint else packaged_weights()
        bases.append(FrozenBase("seg_head.", str(head.checkpoint or path.name), sha256=_sha256(path)))
    if config.mllm.source is not None:
        digest = _source_digest(config.mllm, config.mllm.source)
        bases.append(FrozenBase("mllm.", config.mllm.source, config.mllm.revision, digest))
    return bases


def _source_digest(config: Mllm, source: str) -> str | None:
    if config.is_gguf:
        return sha256(gguf_file(source))
    return shards_digest(cached_folder(source, CONFIG, config.revision) or Path(source))


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(
            f"{path}: the seg head's frozen weights cannot be read ({error.strerror}); "
            "put the file there or correct model.seg_head.checkpoint."
        ) from error


def trained_state(model: SavedModel) -> dict[str, Tensor]:
    """Returns the tensors that a checkpoint holds: what learns, and what has no published file to come from."""
    published = tuple(base.prefix for base in frozen_bases(model.config))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: value
        for name, value in model.state_dict().items()
        if name in learning or not name.startswith(published or ("\0",))
    }


def save_checkpoint(model: SavedModel, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Writes a checkpoint folder atomically.

    Args:
        model: the model.
        folder: replaced as a whole.
        extra: facts about the run, kept under "run" in config.json.

    Raises:
        InputError: there is something else than a checkpoint, which would be lost.
    """
    check_replaceable(folder)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        model.tokenizer.save_pretrained(temporary)
        state = {name: value.detach().cpu().contiguous() for name, value in trained_state(model).items()}
        save_file(state, str(temporary / WEIGHTS), metadata={"format": "pt"})
        write_description(temporary, model.config, extra or {})


def check_replaceable(folder: Path) -> None:
    """Checks that writing a checkpoint here loses nothing else.

    Raises:
        InputError: there is something else than a checkpoint.
    """
    if folder.exists() and not (folder.is_dir() and (_is_checkpoint(folder) or not any(folder.iterdir()))):
        raise InputError(f"{folder}: holds no checkpoint, but other files; name a new, empty or checkpoint folder.")


def write_description(folder: Path, config: Model, run: dict[str, Any]) -> None:
    """Writes a checkpoint's config.json: the model's configuration, its frozen bases, facts about the run."""
    bases = [
        {"prefix": b.prefix, "source": b.source, "revision": b.revision, "sha256": b.sha256}
        for b in frozen_bases(config)
    ]
    content = {"format": FORMAT, "model": config.model_dump(mode="json"), "frozen": bases, "run": run}
    write_json(folder / CONFIG, content)


def load_checkpoint(
    folder: Path,
    build: Callable[[Model, PreTrainedTokenizerBase], _Built],
    *,
    bits: int | None = None,
    device_map: str | None = None,
) -> _Built:
    """Loads a checkpoint strictly.

    Args:
        folder: a folder written by `save_checkpoint`.
        build: MediSee, which is above this module.
        bits: as `Mllm.bits`, in the place of the checkpoint's own; None keeps that.
        device_map: as `Mllm.device_map`, likewise.

    Raises:
        InputError: no checkpoint, foreign or truncated files, another frozen base, missing, left-over or misshapen
            tensors; bits or a device map for a checkpoint that holds all of its language model.
    """
    content = _read_config(folder)
    config = config_from({"model": content["model"]}, where=str(folder / CONFIG)).model
    config = _placed(config, folder, bits, device_map)
    _check_bases(content.get("frozen", []), config, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        state = _read_state(folder)
    except FileNotFoundError as error:
        raise InputError(f"{folder / WEIGHTS}: missing; copy the whole checkpoint folder.") from error
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: unreadable checkpoint ({_first_line(error)}); copy it again.") from error
    if unknown := [token for token in config.candidate_tokens if token not in tokenizer.get_vocab()]:
        raise InputError(
            f"{folder / CONFIG}: candidate_tokens {', '.join(unknown)} are not in the checkpoint's tokenizer; "
            "use the config.json that was written with it."
        )
    model = build(config, tokenizer)
    load_trained(model, state, folder / WEIGHTS)
    return model


def _placed(config: Model, folder: Path, bits: int | None, device_map: str | None) -> Model:
    asked = {name: value for name, value in (("bits", bits), ("device_map", device_map)) if value is not None}
    if not asked:
        return config
    if config.mllm.source is None:
        raise InputError(
            f"{folder}: holds all of its language model, so {' and '.join(asked)} cannot be chosen; expected a checkpoint "
            "that builds on published weights (model.mllm.source); leave it out."
        )
    # Each takes the place of the other.
    mllm = config.mllm.model_dump() | dict.fromkeys(("bits", "device_map")) | asked
    where = f"{folder / CONFIG} with {', '.join(f'{name}={value}' for name, value in asked.items())}"
    return config_from({"model": config.model_dump() | {"mllm": mllm}}, where=where).model


def _read_state(folder: Path) -> dict[str, Tensor]:
    if not (folder / SAFETENSORS_INDEX).exists():
        return load_file(folder / WEIGHTS)
    return {name: value for path in shard_paths(folder) for name, value in load_file(path).items()}


def read_run(folder: Path) -> dict[str, Any]:
    """Returns the facts that a checkpoint was saved with.

    Raises:
        InputError: no checkpoint.
    """
    return _read_config(folder).get("run") or {}


def check_same_model(folder: Path, config: Model) -> None:
    """Checks that a checkpoint holds the model that a run describes, so that the run can start from it.

    Raises:
        InputError: no checkpoint, or another model: names the first setting that differs.
    """
    saved = config_from({"model": _read_config(folder)["model"]}, where=str(folder / CONFIG)).model
    if difference := _difference("model", saved.model_dump(mode="json"), config.model_dump(mode="json")):
        name, old, new = difference
        raise InputError(
            f"{folder / CONFIG}: train.init holds a model with {name} = {old!r}, the run says {new!r}; "
            "give both the same value, or start from another checkpoint."
        )


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        found = (_difference(f"{name}.{key}", value, new[key]) for key, value in old.items())
        return next((one for one in found if one is not None), None)
    return None if old == new else (name, old, new)


def without_bases(config: Model) -> Model:
    """Returns the configuration of the same model built from sizes, for a checkpoint that holds all its weights.

    The sizes must already be the model's own. LiteMedSAM, which comes with a package, stays where it is.
    """
    named = ("source", "revision", "vision_source", "converted", *PLACING)
    mllm = config.mllm.model_copy(update=dict.fromkeys(named))
    head = config.seg_head
    if head.kind != "lite_medsam":
        head = head.model_copy(update={"checkpoint": None})
    return config.model_copy(update={"mllm": mllm, "seg_head": head})


def merge_adapters(model: SavedModel) -> None:
    """Folds LoRA and token rows that learnt by themselves into their layers, in place: the model computes the same."""
    for name, layer in list(model.named_modules()):
        adapter: Any = layer.token_adapter if isinstance(layer, TrainableTokensWrapper) else layer
        if isinstance(layer, LoraLayer | TrainableTokensWrapper):
            adapter.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapter.get_base_layer())


def local_checkpoint(source: Path | str, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint: `source` itself, or where the files of a hub id were fetched to.

    Raises:
        InputError: there is no such folder, and no such hub repository in reach.
    """
    folder = Path(source)
    if folder.exists():
        _read_config(folder)
        return folder
    problem = f"{source}: no such folder"
    if not is_hub_id(source):
        raise InputError(f"{problem}; give the folder that training wrote, such as runs/demo/checkpoint, or a hub id.")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(_HUB_FILES)))
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{problem}, and no hub repository in reach ({_first_line(error)}); "
            "give the folder that training wrote, such as runs/demo/checkpoint, or a hub id."
        ) from error


def push_checkpoint(model: SavedModel, hub_id: str, *, private: bool | None, token: str | None) -> str:
    """Uploads a checkpoint to the hub and returns the commit's address; see `MediSee.push_to_hub`.

    Raises:
        InputError: the hub refuses it or is out of reach.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        save_checkpoint(model, folder)
        try:
            repository = api.create_repo(hub_id, private=private, exist_ok=True).repo_id
            # A card that is there may have been completed by its owner.
            if not api.file_exists(repository, CARD):
                (folder / CARD).write_text(model_card(model.config, repository), encoding="utf-8")
            return api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add a medisee checkpoint")
        except (HTTPError, OSError, ValueError) as error:
            raise InputError(
                f"{hub_id}: cannot be pushed ({_first_line(error)}); check the id, the connection and `hf auth whoami`."
            ) from error


def load_trained(model: SavedModel, state: dict[str, Tensor], where: Path) -> None:
    """Loads trained tensors into a model, strictly.

    Raises:
        InputError: missing, left-over or misshapen tensors, naming them.
    """
    own = trained_state(model)
    problems = [f"{where}: missing tensor {name}; it was saved from another model" for name in own if name not in state]
    problems += [
        f"{where}: left-over tensor {name}; the config is not that of this checkpoint"
        for name in state
        if name not in own
    ]
    problems += [
        f"{where}: {name} has shape {tuple(state[name].shape)}, the config says {tuple(own[name].shape)}; use the checkpoint's own config.json"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if problems:
        more = [f"{where}: and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise InputError(problems[:8] + more)
    model.load_state_dict(state, strict=False)


def _is_checkpoint(folder: Path) -> bool:
    try:
        return bool(_read_config(folder))
    except InputError:
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: no checkpoint here; give the folder that training wrote, such as runs/demo/checkpoint."
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: no valid JSON ({error}); copy the checkpoint again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise InputError(f"{path}: not a medisee checkpoint of format {FORMAT}; give a folder that medisee wrote.")
    return content


def _check_bases(saved: list[dict[str, Any]], config: Model, folder: Path) -> None:
    for base in frozen_bases(config):
        known = [entry for entry in saved if entry.get("prefix") == base.prefix]
        # Checkpoints of earlier versions have none for a folder.
        saved_digest = known[0].get("sha256") if known else None
        if None not in (saved_digest, base.sha256) and saved_digest != base.sha256:
            raise InputError(
                f"{folder / CONFIG}: was trained on {known[0].get('source')} with SHA-256 {known[0].get('sha256')}, "
                f"but {base.source} here has {base.sha256}; install the same weights."
            )
