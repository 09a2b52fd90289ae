"""What a training run leaves behind: log.jsonl, tensorboard/, run.json and a line on the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from medisee.config import Config
from medisee.evaluation.metrics import Summary
from medisee.foundation.files import write_json, write_text
from medisee.foundation.json_files import parse_json
from medisee.foundation.provenance import run_facts
from medisee.models.losses import Terms
from medisee.models.medisee import MediSee
from medisee.training.ranks import Place, gather
from medisee.training.validation import figures

TELEMETRY = ("seconds", "images_per_second", "tokens_per_second", "data_wait", "peak_memory_gib")
"""Keys of a log line that depend on the machine; all other figures of a run are reproducible."""


@dataclass(slots=True)
class Throughput:
    """What this rank has done since the last line of the log; validation and saving do not count."""

    seconds: float = 0.0  # in optimizer steps
    waiting: float = 0.0  # of these, seconds in which no batch was ready
    images: int = 0
    tokens: int = 0  # that the language model has read, image tokens and computed padding included

    def over_ranks(self, place: Place) -> dict[str, float]:
        """Returns figures of all ranks together, with the longest wait and the highest memory; every rank calls it."""
        own = (self.seconds, self.waiting, self.images, self.tokens, peak_memory(place.device))
        seconds, waiting, images, tokens, memory = zip(*gather(own, place), strict=True)
        longest = max(seconds) or 1.0
        return {
            "images_per_second": sum(images) / longest,
            "tokens_per_second": sum(tokens) / longest,
            "data_wait": max(waiting) / longest,
            "peak_memory_gib": max(memory) / 2**30,
        }


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes so far: of tensors on a GPU; resident, of the process, on a CPU (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class RunLog:
    """Appends to a run's logs; a resumed run cuts off what was logged after its saved state. Silent except on rank 0."""

    def __init__(self, out: Path, *, config: Config, model: MediSee, first_step: int, active: bool) -> None:
        self.out, self.active = out, active
        self.began = time.perf_counter()
        if not active:
            return
        self.path = out / "log.jsonl"
        write_text(self.path, "".join(self._kept(first_step)) if first_step else "")
        self.board = SummaryWriter(out / "tensorboard", purge_step=first_step + 1)
        self.facts: dict[str, Any] = run_facts(
            config.model_dump(mode="json"), config.train.seed, next(model.parameters()).device
        )
        # ZeRO 3 leaves a part of each weight here, and records the full size.
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
        self.facts |= {"first_step": first_step, "parameters": total, "trained_parameters": trained}
        write_json(out / "run.json", self.facts)
        print(f"model: {total / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of them trainable", flush=True)

    def losses(self, step: int, mean: Terms, progress: tqdm, *, more: Mapping[str, float]) -> None:
        """Logs the mean of the terms since the last line, and `more`: `learning_rate`, all of `Throughput.over_ranks`, others."""
        if not self.active:
            return
        values = {field.name: float(getattr(mean, field.name)) for field in fields(Terms)}
        self._append({"step": step, **values, **more, "seconds": time.perf_counter() - self.began})
        progress.set_postfix_str(
            f"loss={values['total']:.2f}, text={values['text']:.2f}, giou={values['giou']:.2f}, "
            f"lr={more['learning_rate']:.1e}, {more['images_per_second']:.3g} images/s, "
            f"{more['tokens_per_second']:.3g} tokens/s, {more['data_wait']:.0%} waiting, {more['peak_memory_gib']:.1f} GiB"
        )

    def validation(self, step: int, summary: Summary, split: str) -> None:
        """Logs the figures on the split that chooses the checkpoint."""
        if not self.active:
            return
        values = {f"{split}_{name}": value for name, value in figures(summary).items() if name != "n"}
        self._append({"step": step, **values, "seconds": time.perf_counter() - self.began})
        tqdm.write(f"step {step}: {split} Dice {summary.dice.value:.3f}, box IoU {summary.iou.value:.3f}")

    def end(self) -> None:
        """Closes the logs and adds the run's time to run.json, which marks the run as finished."""
        if self.active:
            self.close()
            write_json(self.out / "run.json", {**self.facts, "seconds": time.perf_counter() - self.began})

    def close(self) -> None:
        if self.active:
            self.board.close()

    def _kept(self, last_step: int) -> list[str]:
        """Returns the lines up to a step, without its validation, which is repeated; damaged lines are left out."""
        kept, damaged = [], []
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                continue  # it was being written when the process was killed
            try:
                values = parse_json(line)
                if values["step"] < last_step or (values["step"] == last_step and "total" in values):
                    kept.append(line.decode("utf-8"))
            except (ValueError, LookupError, TypeError):
                damaged.append(str(number))
        if damaged:
            left_out = f"warning: {self.path}: damaged, and left out: line {', '.join(damaged[:10])}."
            print(left_out, file=sys.stderr, flush=True)
        return kept

    def _append(self, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as handle:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            handle.write(json.dumps(finite) + "\n")
        for name, value in values.items():
            if name not in ("step", "seconds"):
                self.board.add_scalar(name, value, int(values["step"]))
