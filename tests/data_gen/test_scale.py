"""Throughput and memory over 20,000 calls to a server that takes half a second for each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_up import write_manifest

CALLS, AT_ONCE, DELAY = 20_000, 64, 0.5


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[str]:
    """Runs a fake server in a process of its own; yields its address."""
    (folder / "server.json").write_text(json.dumps(settings))
    argv = [sys.executable, str(Path(__file__).with_name("fake_server.py")), str(folder / "server.json")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def counted(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/count") as answer:
        return json.load(answer)


def resident(process: int) -> float:
    """Returns the memory of a process in MB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


@pytest.mark.scale
def test_twenty_thousand_calls(tmp_path: Path) -> None:
    records = write_manifest(
        tmp_path / "records", CALLS // 12 + 20
    )  # twelve calls an image, fewer where all is removed
    with serving(tmp_path, delay=DELAY, remember=False) as url:
        argv = ["--records", str(records), "--ledger", str(tmp_path / "l.sqlite"), "--model", "m", "--free"]
        argv += ["--base-url", f"{url}/v1", "--concurrency", str(AT_ONCE)]
        with (tmp_path / "out").open("w") as out:
            process = subprocess.Popen([sys.executable, "-m", "data_gen", "run", *argv], stdout=out, stderr=out)
        early = 0.0
        memory = [0.0]
        while process.poll() is None:
            count, now = counted(url)["count"], resident(process.pid)
            if count >= 1000:
                early = early or now
                memory.append(now)
            time.sleep(0.5)
        facts = counted(url)
    print((tmp_path / "out").read_text())
    assert process.returncode == 0
    share = facts["count"] / (facts["last"] - facts["first"]) / (AT_ONCE / DELAY)
    growth = max(memory) - early
    print(
        f"{facts['count']:,.0f} calls, {share:.1%} of the ideal throughput, {facts['most']:.0f} at once, "
        f"{early:.0f} MB after 1,000 calls, {growth:.1f} MB more at most, load {os.getloadavg()[0]:.1f}"
    )
    assert facts["count"] >= CALLS and facts["most"] <= AT_ONCE
    assert share >= 0.9
    assert growth < 50
