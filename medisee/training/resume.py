"""Saved states for an exact resume, <train.out>/last-<step>/, and finding the newest undamaged one.

A folder is a checkpoint, so a resumed run depends on nothing that its data would give anew, and the state can be used
as a model. In addition it holds AdamW's moments under the parameters' names (so that any number of ranks and any ZeRO
stage can read them), the progress of the run with what identifies its data, and files.json with the size and SHA-256 of
each file. It gets its name once all of it is on the disk.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from medisee.config import Config
from medisee.config.load import config_from
from medisee.foundation.errors import InputError, first_line
from medisee.foundation.files import cached_sha256, replace_folder, sha256, write_json
from medisee.foundation.hardware import compute_dtype
from medisee.foundation.json_files import parse_json, read_json
from medisee.foundation.output import check_output, filled_folder
from medisee.models.medisee import MediSee
from medisee.records.manifest import Manifest
from medisee.training.optimization import MOMENTS, Optimization
from medisee.training.ranks import Place, errors_on_all_ranks, gather, raise_on_all_ranks
from medisee.weights.checkpoints import WEIGHTS, check_replaceable, trained_state, write_checkpoint
from medisee.weights.shards import CONFIG

CHECKPOINT = "checkpoint"  # folder of the best checkpoint, next to the saved states
PREFIX = "last-"
OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
FILES = "files.json"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_MAY_CHANGE = {
    "only what is kept": "train.out train.log_every train.save_every train.keep_last",
    "the effective batch, which is compared, stays": "train.batch_size train.accumulation train.global_batch",
    "how ranks share the work": "train.zero_stage train.offload train.deepspeed train.recompute_layers",
    "only rounding differs": "train.unpadded train.compile_layers eval.batch_size",
    "draws follow from their numbers": "data.workers",
    "where images are": "data.root data.train[].root",
    "records that can be read stay the same": "data.skip_corrupt",
    "training does not read it": "data.categories eval.max_new_tokens eval.resamples",
}
MAY_CHANGE = frozenset(name for names in _MAY_CHANGE.values() for name in names.split())
"""Settings that may differ in a resumed run; `_MAY_CHANGE` says why."""

PLACES = ("data.cache", "data.train[].records", "data.val", "data.test")
"""Paths that may differ, but not come or go: features are found by content, and a manifest elsewhere must be the same."""


class Content(BaseModel):
    """What identifies a manifest wherever it lies."""

    model_config = ConfigDict(strict=True, frozen=True)
    records: int = Field(ge=1)
    sha256: str


class Origin(BaseModel):
    """What a run is computed from, besides its configuration."""

    model_config = ConfigDict(strict=True, frozen=True)
    effective_batch: int = Field(ge=1)
    manifests: dict[str, Content] = {}  # by the setting that names them
    dtypes: dict[str, str] = {}  # what each setting `auto` has become here


class _Facts(Origin):
    """progress.json."""

    step: int = Field(ge=1)
    best: float = Field(ge=-1, le=1)
    skipped: int = Field(ge=0)
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    best: float = -1.0  # the best figure on val before this step's validation, if it has one
    skipped: int = 0  # draws that were replaced because their image or mask cannot be read


@dataclass(frozen=True, slots=True)
class Saved:
    """One saved state, as progress.json describes it."""

    folder: Path
    progress: Progress
    origin: Origin
    config: Config
    is_checkpoint: bool = True  # earlier versions saved neither tokenizer nor config.json


def origin_of(
    config: Config, effective_batch: int, place: Place, *, manifests: Sequence[Manifest], val: Manifest | None
) -> Origin:
    """Describes what a run is computed from; the manifests are read once, by the first rank."""
    named = {f"data.train[{number}].records": manifest for number, manifest in enumerate(manifests)}
    named |= {f"data.{config.data.select}": val} if val is not None else {}
    contents = {
        name: Content(records=len(manifest), sha256=cached_sha256(manifest.path))
        for name, manifest in named.items()
        if place.rank == 0
    }
    auto = {"train.dtype": config.train.dtype, "data.cache_dtype": config.data.cache_dtype if config.data.cache else ""}
    dtypes = {name: str(compute_dtype("auto", place.device)) for name, value in auto.items() if value == "auto"}
    return Origin(effective_batch=effective_batch, manifests=contents, dtypes=dtypes)


class LastStates:
    """The states that a run saves: the last `keep` of them stay."""

    def __init__(self, out: Path, keep: int, found: Path | None = None) -> None:
        self.out, self.keep = out, keep
        # Others are damaged, or an earlier run's: they go when this run has saved its first state.
        self._own = [] if found is None else [one for one in map(_step, saved_folders(out)) if one <= _step(found)]

    @property
    def newest(self) -> Path | None:
        return self.out / _name(self._own[-1]) if self._own else None

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yields a folder for one state's files, names it when all are written, and then removes older states.

        An error, in the files or of the disk, leaves older states untouched.
        """
        folder = self.out / _name(step)
        new = self.out / f".{folder.name}.new"
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            yield new
            files = [path for path in sorted(new.iterdir()) if path.is_file()]
            write_json(new / FILES, {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files})
            replace_folder(new, folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._own = [*(one for one in self._own if one < step), step][-self.keep :]
        for folder in saved_folders(self.out):
            if _step(folder) not in self._own:
                _remove(folder)
        for left in self.out.glob(f".{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)


def save_state(
    states: LastStates,
    progress: Progress,
    origin: Origin,
    *,
    config: Config,
    model: MediSee,
    optimization: Optimization,
    place: Place,
) -> None:
    """Saves all that an exact resume needs; every rank calls it, the first one writes. A failure leaves older states."""
    moments = optimization.moments()
    with optimization.whole_parameters():
        # Each with its own memory, contiguous, on the CPU: safetensors refuses others.
        kept = trained_state(model) if place.rank == 0 else {}
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in kept.items()}
    problems = []
    if place.rank == 0:
        facts = origin.model_dump() | asdict(progress) | {"config": config.model_dump(mode="json")}
        try:
            with states.writing(progress.step) as folder:
                write_checkpoint(model, folder, {"step": progress.step}, weights)
                save_file(moments, str(folder / OPTIMIZER), metadata={"format": "pt"})
                write_json(folder / PROGRESS, facts)
        except (OSError, SafetensorError, InputError) as error:
            problems = [_not_saved(states, progress.step, error)]
    raise_on_all_ranks(problems, place)


@contextmanager
def only_run(out: Path, *, is_new: bool) -> Iterator[None]:
    """Holds a run's folder for this process, before anything is written; `is_new` refuses one that holds a run."""
    with filled_folder(out, option="train.out"):
        if is_new:
            check_no_run(out)
        _check_names(out)
        yield


def _check_names(out: Path) -> None:
    taken = [out / name for name in ("log.jsonl", "run.json") if (out / name).is_dir()]
    taken += [path for path in [out / "tensorboard"] if path.is_file()]
    if taken:
        fix = "rename it, or set train.out to another folder"
        raise InputError(f"{path}: is a {'folder' if path.is_dir() else 'file'} in the way; {fix}." for path in taken)
    check_replaceable(out / CHECKPOINT)


def check_space(out: Path, model: MediSee) -> None:
    """Checks that the disk can hold one saved state of a model before its first step."""
    learning = sum(value.numel() for value in model.parameters() if value.requires_grad)
    weights = sum(value.nbytes for value in trained_state(model).values())
    check_output(out, option="train.out", need=weights + 4 * len(MOMENTS) * learning)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns the error of a full disk into an InputError, whichever file did not fit."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in _DISK_FULL or "No space left" in str(error):
            raise InputError(
                f"{out}: the disk is full ({str(error).strip()}). Earlier saves are untouched: free some space and "
                "continue with --resume."
            ) from error
        raise


def find_last(out: Path) -> Saved:
    """Returns the newest undamaged state; newer ones that are damaged are named on stderr."""
    damaged: list[str] = []
    for folder in reversed(saved_folders(out)):
        try:
            saved = read_state(folder)
        except InputError as error:
            damaged.append(error.problems[0].rstrip("."))
            continue
        for one in damaged:
            print(f"warning: {one}; continuing from {folder}.", file=sys.stderr, flush=True)
        return saved
    if damaged:
        raise InputError(f"{one}; all saved states are damaged, so start again with --fresh." for one in damaged)
    raise InputError(
        f"{out}: nothing to resume; start without --resume, or set train.out to the folder of a run that has saved."
    )


def read_state(folder: Path) -> Saved:
    """Reads the description of one saved state; InputError says what is damaged."""
    if (problem := damage(folder)) is not None:
        raise InputError(f"{folder}: {problem}.")
    path = folder / PROGRESS
    try:
        facts = _Facts.model_validate(read_json(path, "the progress of a saved run"))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {name} = {str(first['input'])[:60]} is wrong ({first['msg'].lower()}).") from error
    config = config_from(facts.config, where=str(path))
    if facts.step != _step(folder):
        raise InputError(f"{path}: step = {facts.step}, but the folder's name says another.")
    if facts.step > config.train.steps:
        raise InputError(f"{path}: step = {facts.step}, but the run has {config.train.steps}.")
    progress = Progress(facts.step, facts.best, facts.skipped)
    return Saved(folder, progress, facts, config, is_checkpoint=(folder / CONFIG).exists())


def find_last_on_all_ranks(out: Path, place: Place) -> Saved:
    """Lets the first rank find the state, and returns the same one on every rank; see `find_last`."""
    found = None
    with errors_on_all_ranks(place):
        if place.rank == 0:
            found = find_last(out)
    first = gather(found, place)[0]
    if first is None:
        raise ValueError("the first rank found neither a state nor a problem")
    return first


def starting_from(saved: Saved, config: Config) -> Config:
    """Returns a configuration whose model starts as the state, with the state's tokenizer.

    A state of an earlier version has no tokenizer: it can be used where the tokenizer does not come from the data.
    """
    if saved.is_checkpoint:
        return config.model_copy(update={"train": config.train.model_copy(update={"init": str(saved.folder)})})
    if config.train.init is None and config.model.mllm.source is None:
        raise InputError(
            f"{saved.folder}: was saved by an earlier version, without the tokenizer that the run had made of its data; "
            "start again with --fresh."
        )
    return config


def check_no_run(out: Path) -> None:
    """Refuses to start where a run would be replaced."""
    states = saved_folders(out)
    found = [*states[-1:], *(path for path in [out / CHECKPOINT] if path.exists())]
    if found:
        resume = "continue it with --resume, " if states else ""
        raise InputError(
            f"{out}: already holds a run ({' and '.join(path.name for path in found)}); {resume}replace it with --fresh, "
            "or set train.out to another folder."
        )


def remove_states(out: Path) -> None:
    """Removes the saved states of an earlier run, which --resume would otherwise take for this one's."""
    for folder in saved_folders(out):
        _remove(folder)


def _remove(folder: Path) -> None:
    # Renamed first, so that a half-removed state is never taken for one.
    old = folder.with_name(f".{folder.name}.old")
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def check_same_run(saved: Saved, config: Config, origin: Origin) -> None:
    """Refuses to continue with what would be another run."""
    where = saved.folder / PROGRESS
    old, new = _settings(saved.config), _settings(config)
    problems = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if before == now or _may_change(name, before, now, saved.origin, origin):
            continue
        fix = "resume with the original one"
        if name == "train.steps":
            fix = f"resume with that, or train on with another schedule: train.init={saved.folder} and a new train.out"
        if name in saved.origin.manifests:
            fix = "its content is another one: resume with the original, or put the new one in its place"
        problems.append(
            f"{where}: the run was started with another configuration, {name} = {before!r}, not {now!r}; {fix}."
        )
    if saved.origin.effective_batch != origin.effective_batch:
        problems.append(
            f"{where}: the run was started with an effective batch of {saved.origin.effective_batch} images, now it is "
            f"{origin.effective_batch}; set train.global_batch={saved.origin.effective_batch}."
        )
    if problems:
        raise InputError(problems)


def _may_change(name: str, before: Any, now: Any, saved: Origin, origin: Origin) -> bool:
    any_number = re.sub(r"\[\d+\]", "[]", name)
    if any_number not in PLACES:
        return any_number in MAY_CHANGE
    content = saved.manifests.get(name)
    is_same = name == "data.cache" or (content is not None and content == origin.manifests.get(name))
    return is_same and None not in (before, now)


def changed_since(saved: Saved, origin: Origin) -> list[str]:
    """Describes what is no longer as it was when a state was saved, although the run can go on."""
    told = []
    for name, before in saved.origin.manifests.items():
        if (now := origin.manifests.get(name, before)) != before:
            effect = "the run goes on with what it says now"
            if now.records != before.records:
                effect += f", {now.records} records instead of {before.records}, in another order"
            told.append(f"{name}: changed after step {saved.progress.step} was saved; {effect}.")
    for name, now in origin.dtypes.items():
        if (before := saved.origin.dtypes.get(name, now)) != now:
            told.append(f"{name} = auto: {now} here, {before} before; figures differ in their last digits.")
    return told


def saved_folders(out: Path) -> list[Path]:
    """Lists the saved states of a run's folder, oldest first, whole or not."""
    folders = [folder for folder in out.glob(f"{PREFIX}*") if re.fullmatch(r"[0-9]+", folder.name[len(PREFIX) :])]
    return sorted((folder for folder in folders if folder.is_dir()), key=_step)


def damage(folder: Path) -> str | None:
    """Describes what is wrong with a saved state's files; None if every file is as it was written."""
    try:
        files = parse_json((folder / FILES).read_bytes())
        expected = {str(name): (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except FileNotFoundError:
        return f"{FILES} is missing"
    except OSError as error:
        return f"{FILES} cannot be read ({error.strerror})"
    except (ValueError, AttributeError, KeyError, TypeError):
        return f"{FILES} is damaged"
    needed = [WEIGHTS, OPTIMIZER, PROGRESS]
    if {*expected} != {*needed}:  # earlier versions saved only these
        needed.append(CONFIG)
    for name in dict.fromkeys([*needed, *expected]):
        path = folder / Path(name).name
        try:
            if name not in expected or not path.is_file():
                return f"{name} is missing"
            size, digest = expected[name]
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if sha256(path) != digest:
                return f"{name} is damaged (its SHA-256 is not that of {FILES})"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _settings(config: Config) -> dict[str, Any]:
    def flat(value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, dict) and name not in MAY_CHANGE:
            inner = {f"{name}.{key}" if name else key: one for key, one in value.items()}
        elif name == "data.train":
            inner = {f"{name}[{number}]": one for number, one in enumerate(value)}
        else:
            return {name: value}
        return {key: one for place, each in inner.items() for key, one in flat(each, place).items()}

    found = flat(config.model_dump(mode="json"), "")
    found.pop("data.val" if config.data.select == "test" else "data.test")
    return found


def _not_saved(states: LastStates, step: int, error: Exception) -> str:
    fix = "free some space and start again with --fresh"
    if states.newest is not None:
        fix = f"{states.newest} is untouched: free some space and continue with --resume"
    return f"{states.out / _name(step)}: cannot be saved ({first_line(error)}); {fix}."


def _name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))
