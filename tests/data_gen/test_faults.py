"""A server that fails in every way and a client that is killed again and again: the data set is that of a calm run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from made_up import write_manifest
from test_scale import counted, serving

from data_gen import run
from data_gen.core.items import TEMPLATES
from data_gen.core.recipe import pair_id
from data_gen.core.schemas import CELLS
from data_gen.export import export
from data_gen.ledger.ledger import Ledger
from data_gen.publishing.summary import read_sources

KILLS, RECORDS = 10, 60
FAULTS = ("429", "500", "timeout", "drop", "html", "refusal", "truncated", "malformed")


def content(ledger: Path, out: Path) -> tuple[object, object, dict[str, bytes]]:
    """Returns pairs, drops and the bytes of all files of the export."""
    with Ledger(ledger) as found:
        export(found, out, sources=read_sources())
        files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
        return found.pairs(), found.drops(), files


@pytest.mark.faults
@pytest.mark.kill
@pytest.mark.parametrize("seed", [0])
def test_faults_and_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    records = write_manifest(tmp_path / "records", RECORDS)
    common = ["--records", str(records), "--model", "m", "--free", "--concurrency", "16", "--timeout", "2"]
    (tmp_path / "calm").mkdir()
    (tmp_path / "stormy").mkdir()
    calm, stormy = tmp_path / "calm" / "l.sqlite", tmp_path / "stormy" / "l.sqlite"
    with serving(tmp_path / "calm", slips=0.3, remember=False) as url:
        run.main([*common, "--ledger", str(calm), "--base-url", f"{url}/v1"])
        calls = counted(url)["count"]
    log = tmp_path / "requests.jsonl"
    settings = {"slips": 0.3, "delay": 0.05, "faults": FAULTS, "share": 0.3, "seed": seed, "remember": False}
    with serving(tmp_path / "stormy", **settings, log=str(log), retry_after={"retry-after-ms": "150"}) as url:
        argv = [sys.executable, "-m", "data_gen", "run", *common, "--ledger", str(stormy), "--base-url", f"{url}/v1"]
        argv += ["--max-failures", "200"]
        for number in range(KILLS):
            goal = counted(url)["count"] + draw.uniform(0.2, 1.2) * calls / KILLS
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while counted(url)["count"] < goal and process.poll() is None:
                time.sleep(draw.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.returncode == -signal.SIGKILL, f"kill {number} came too late"
        for _ in range(3):
            done = subprocess.run(argv, capture_output=True, text=True)
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stderr
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    faulty = sum(each["fault"] is not None for each in requests) / len(requests)
    late = again = 0
    with Ledger(stormy) as ledger:
        assert ledger.count_open("single") == (0, RECORDS) and ledger.is_deduplicated()
        ends = {pair.id for pair in ledger.pairs()} | {drop.pair for drop in ledger.drops() if drop.reason}
        assert ends >= {
            pair_id(item.id, *each) for item in ledger.items() for each in product(TEMPLATES, CELLS, (1, 2))
        }
        rows = ledger.answers._store.read("SELECT key, created FROM answers WHERE status='ok'")
    stored = dict(rows)
    for each in requests:
        late += each["at"] > stored.get(each["key"], float("inf"))
    again = len(requests) - len({each["key"] for each in requests})
    print(
        f"{len(requests):,} requests ({calls:,.0f} in a calm run), {faulty:.1%} with a fault, {KILLS} kills, "
        f"{again:,} sent more than once, {late} of them after their answer was stored"
    )
    assert late == 0 and 0.2 < faulty < 0.4
    assert set(stored) <= {each["key"] for each in requests}
    assert content(stormy, tmp_path / "stormy" / "out") == content(calm, tmp_path / "calm" / "out")
