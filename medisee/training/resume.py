"""Saved states for an exact resume, <train.out>/last-<step>/, and finding the newest undamaged one.

A folder holds the trainable tensors, AdamW's moments under the parameters' names (so that any number of ranks and any
ZeRO stage can read them), the progress of the run, and files.json with the size and SHA-256 of each file. It gets its
name once all of it is on the disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from medisee.config import Config
from medisee.config.load import config_from
from medisee.foundation.errors import InputError, first_line
from medisee.foundation.files import replace_folder, sha256, write_json
from medisee.models.medisee import MediSee
from medisee.training.optimization import Optimization
from medisee.training.ranks import Place, errors_on_all_ranks, gather, raise_on_all_ranks
from medisee.weights.checkpoints import WEIGHTS, trained_state

CHECKPOINT = "checkpoint"  # folder of the best checkpoint, next to the saved states
PREFIX = "last-"
OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
FILES = "files.json"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

MAY_CHANGE = frozenset(
    {
        *(f"train.{name}" for name in ("out", "batch_size", "accumulation", "global_batch", "keep_last", "save_every")),
        *(f"train.{name}" for name in ("log_every", "zero_stage", "offload", "deepspeed", "recompute_layers")),
        "train.unpadded",
        "train.compile_layers",
        "data.workers",
    }
)
"""Settings that may differ in a resumed run: they say how it is computed, not what. The effective batch stays."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    best: float = -1.0  # the best figure on val so far
    skipped: int = 0  # draws that were replaced because their image or mask cannot be read


@dataclass(frozen=True, slots=True)
class Saved:
    """One saved state, as progress.json describes it."""

    folder: Path
    progress: Progress
    effective_batch: int
    config: Config


class LastStates:
    """The states that a run saves: the last `keep` of them stay."""

    def __init__(self, out: Path, keep: int, found: Path | None = None) -> None:
        self.out, self.keep = out, keep
        # Others are damaged, or an earlier run's: they go when this run has saved its first state.
        self._own = [] if found is None else [one for one in map(_step, saved_folders(out)) if one <= _step(found)]

    @property
    def newest(self) -> Path | None:
        return self.out / _name(self._own[-1]) if self._own else None

    def write(
        self, step: int, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> None:
        """Writes one state, and then removes older ones; OSError or SafetensorError leave these untouched."""
        folder = self.out / _name(step)
        new = self.out / f".{folder.name}.new"
        shutil.rmtree(new, ignore_errors=True)
        try:
            new.mkdir(parents=True)
            save_file(dict(weights), str(new / WEIGHTS), metadata={"format": "pt"})
            save_file(dict(moments), str(new / OPTIMIZER), metadata={"format": "pt"})
            write_json(new / PROGRESS, facts)
            files = [new / name for name in (WEIGHTS, OPTIMIZER, PROGRESS)]
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
    *,
    config: Config,
    effective_batch: int,
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
        facts = {**asdict(progress), "effective_batch": effective_batch, "config": config.model_dump(mode="json")}
        try:
            states.write(progress.step, weights, moments, facts)
        except (OSError, SafetensorError) as error:
            problems = [_not_saved(states, progress.step, error)]
    raise_on_all_ranks(problems, place)


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
    damaged = []
    for folder in reversed(saved_folders(out)):
        if (problem := damage(folder)) is None:
            for one in damaged:
                print(f"warning: {one}; continuing from {folder}.", file=sys.stderr, flush=True)
            path = folder / PROGRESS
            facts = json.loads(path.read_text(encoding="utf-8"))
            progress = Progress(facts["step"], facts["best"], facts["skipped"])
            return Saved(folder, progress, facts["effective_batch"], config_from(facts["config"], where=str(path)))
        damaged.append(f"{folder}: {problem}")
    if damaged:
        raise InputError(f"{one}; all saved states are damaged, so start again with --fresh." for one in damaged)
    raise InputError(
        f"{out}: nothing to resume; start without --resume, or set train.out to the folder of a run that has saved."
    )


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


def check_same_run(saved: Saved, config: Config, effective_batch: int) -> None:
    """Refuses to continue with what would be another run."""
    where = saved.folder / PROGRESS
    old, new = _settings(saved.config), _settings(config)
    problems = [
        f"{where}: the run was started with another configuration, {name} = {old.get(name)!r}, not {new.get(name)!r}; "
        "resume with the original one."
        for name in sorted({*old, *new} - MAY_CHANGE)
        if old.get(name) != new.get(name)
    ]
    if saved.effective_batch != effective_batch:
        problems.append(
            f"{where}: the run was started with an effective batch of {saved.effective_batch} images, now it is "
            f"{effective_batch}; set train.global_batch={saved.effective_batch}."
        )
    if problems:
        raise InputError(problems)


def saved_folders(out: Path) -> list[Path]:
    """Lists the saved states of a run's folder, oldest first, whole or not."""
    folders = [folder for folder in out.glob(f"{PREFIX}*") if folder.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=_step)


def damage(folder: Path) -> str | None:
    """Describes what is wrong with a saved state; None if every file is as it was written."""
    try:
        files = json.loads((folder / FILES).read_text(encoding="utf-8"))
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except OSError:
        return f"{FILES} is missing"
    except (ValueError, AttributeError, KeyError, TypeError):
        return f"{FILES} is damaged"
    for name in (WEIGHTS, OPTIMIZER, PROGRESS):
        path = folder / name
        if name not in expected or not path.is_file():
            return f"{name} is missing"
        size, digest = expected[name]
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != digest:
            return f"{name} is damaged (its SHA-256 is not that of {FILES})"
    return None


def _settings(config: Config) -> dict[str, Any]:
    def flat(values: dict[str, Any], above: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            name = f"{above}{key}"
            closed = isinstance(value, dict) and name not in MAY_CHANGE
            found |= flat(value, f"{name}.") if closed else {name: value}
        return found

    return flat(config.model_dump(mode="json"), "")


def _not_saved(states: LastStates, step: int, error: Exception) -> str:
    fix = "free some space and start again with --fresh"
    if states.newest is not None:
        fix = f"{states.newest} is untouched: free some space and continue with --resume"
    return f"{states.out / _name(step)}: cannot be saved ({first_line(error)}); {fix}."


def _name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))
