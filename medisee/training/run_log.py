"""What a training run leaves behind: log.jsonl, tensorboard/, run.json and a line on the terminal."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from medisee.config import Config
from medisee.evaluation.metrics import Summary
from medisee.foundation.files import write_json, write_text
from medisee.foundation.provenance import run_facts
from medisee.models.losses import Terms
from medisee.models.medisee import MediSee


class RunLog:
    """Appends to a run's logs; a resumed run cuts off what was logged after its checkpoint. Silent but on rank 0."""

    def __init__(self, out: Path, *, config: Config, model: MediSee, first_step: int, active: bool) -> None:
        self.out, self.active = out, active
        self.began = time.perf_counter()
        if not active:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.jsonl"
        write_text(self.path, "".join(self._kept(first_step)) if first_step else "")
        self.board = SummaryWriter(out / "tensorboard", purge_step=first_step + 1)
        self.facts: dict[str, Any] = run_facts(
            config.model_dump(mode="json"), config.train.seed, next(model.parameters()).device
        )
        # ZeRO 3 leaves a part of each weight here, and says how large the whole is.
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
        self.facts |= {"first_step": first_step, "parameters": total, "trained_parameters": trained}
        write_json(out / "run.json", self.facts)
        print(f"model: {total / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of them learn", flush=True)

    def losses(self, step: int, mean: Terms, norm: float, progress: tqdm, *, skipped: int = 0) -> None:
        """Logs the mean of the terms since the last line, and how many unreadable records were replaced so far."""
        if not self.active:
            return
        values = {field.name: float(getattr(mean, field.name)) for field in fields(Terms)}
        counts = {"skipped": skipped} if skipped else {}
        seconds = time.perf_counter() - self.began
        self._append({"step": step, **values, "gradient_norm": norm, **counts, "seconds": seconds})
        progress.set_postfix(loss=f"{values['total']:.2f}", text=f"{values['text']:.2f}", giou=f"{values['giou']:.2f}")

    def validation(self, step: int, summary: Summary, split: str) -> None:
        """Logs the figures on the split that chooses the checkpoint."""
        if not self.active:
            return
        figures = {f"{split}_{name}": value for name, value in summary.to_json().items() if isinstance(value, float)}
        self._append({"step": step, **figures, "seconds": time.perf_counter() - self.began})
        tqdm.write(f"step {step}: {split} Dice {summary.dice.value:.3f}, box IoU {summary.iou.value:.3f}")

    def end(self) -> None:
        """Closes the logs and adds the run's time to run.json, which says that the run is finished."""
        if self.active:
            self.close()
            write_json(self.out / "run.json", {**self.facts, "seconds": time.perf_counter() - self.began})

    def close(self) -> None:
        """Closes the logs of a run that may go on later."""
        if self.active:
            self.board.close()

    def _kept(self, last_step: int) -> list[str]:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        # A line without an end was being written when the process was killed.
        return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]

    def _append(self, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if name not in ("step", "seconds"):
                self.board.add_scalar(name, value, int(values["step"]))
