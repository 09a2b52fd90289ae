"""The Batch API: waves, resuming at every step, lines that fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_server import FakeServer

from data_gen import batch, run
from data_gen.batch import Waves
from data_gen.ledger import Ledger
from data_gen.limits import StopRun
from medisee.errors import exit_code

Records = Callable[[int], Path]
Serve = Callable[..., FakeServer]


def options(path: Path, server: FakeServer, ledger: Path, *more: str) -> list[str]:
    common = [
        "--records",
        str(path),
        "--ledger",
        str(ledger),
        "--base-url",
        server.url,
        "--model",
        "m",
        "--variants",
        "1",
    ]
    return [*common, *(["--free"] if "--prices" not in more else []), *more]


def in_batches(path: Path, server: FakeServer, ledger: Path, *more: str) -> list[str]:
    return options(path, server, ledger, "--batch", "--poll", "0.01", *more)


def ends(argv: list[str]) -> int | str | None:
    try:
        return exit_code(run.main, argv)
    except SystemExit as error:
        return error.code


def content(ledger: Path) -> tuple[object, object]:
    with Ledger(ledger) as found:
        return found.pairs(), found.drops()


def each_once(server: FakeServer) -> bool:
    keys = [json.dumps(body, sort_keys=True) for body in server.bodies]
    return len(keys) == len(set(keys))


def test_waves_make_what_calls_make(records: Records, serve: Serve, tmp_path: Path) -> None:
    path, live, waves = records(7), serve(slips=0.5), serve(slips=0.5)
    run.main(options(path, live, tmp_path / "live.sqlite"))
    run.main(in_batches(path, waves, tmp_path / "waves.sqlite"))
    assert content(tmp_path / "live.sqlite") == content(tmp_path / "waves.sqlite")
    assert waves.count == 0 and each_once(waves)
    assert 3 <= len(waves.batches) <= 3 * 3 + 2, "a few waves: one a stage, and those asked again"
    with Ledger(tmp_path / "waves.sqlite") as ledger:
        assert ledger.answers.open_batches() == [] and ledger.settled()


def test_captions_are_asked_live(records: Records, serve: Serve, tmp_path: Path) -> None:
    server = serve()
    run.main(in_batches(records(2), server, tmp_path / "l.sqlite", "--captioner", "v"))
    assert server.count == 1, "both records share one image and one question"
    assert len(server.batches) >= 3


def test_a_batch_is_half_the_price(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("m: {input: 10, cached: 5, output: 20, batch_input: 5, batch_output: 10}\n")
    more = ["--prices", str(prices)]
    run.main(in_batches(records(2), serve(), tmp_path / "l.sqlite", *more))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        answers = sum(count.answers for count in ledger.counts())
        assert ledger.answers.spent() == pytest.approx(answers * (400 * 5 + 100 * 10) / 1e6)
    server = serve()
    assert ends(in_batches(records(2), server, tmp_path / "poor.sqlite", *more, "--max-cost", "0.001")) == 1
    assert "--max-cost" in capsys.readouterr().err and not server.batches


def test_a_run_that_ends_while_a_batch_is_under_way_collects_it_later(
    records: Records, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, server, ledger = records(3), serve(), tmp_path / "l.sqlite"
    server.batch_looks = 3

    async def leave(_: float) -> None:
        raise StopRun("left")

    with monkeypatch.context() as patch:
        patch.setattr(batch.asyncio, "sleep", leave)
        assert ends(in_batches(path, server, ledger)) == 1
    assert len(server.batches) == 1
    with Ledger(ledger) as found:
        ((token, identity),) = found.answers.open_batches()
        assert identity == "batch-0" and token
    assert ends(in_batches(path, server, ledger)) == 0
    assert each_once(server)


def test_a_batch_whose_id_was_never_stored_is_found(records: Records, serve: Serve, tmp_path: Path) -> None:
    path, server, ledger = records(3), serve(), tmp_path / "l.sqlite"
    server.fail_after_batch = True
    assert ends([*in_batches(path, server, ledger), "--sends", "1"]) == 1
    assert len(server.batches) == 2, "the client tries once more, and both were created"
    server.fail_after_batch = False
    assert ends(in_batches(path, server, ledger)) == 0
    asked = [json.dumps(body) for body in server.bodies]
    assert len(asked) - len(set(asked)) == 6, "the twin that the lost connection made is the only thing asked twice"


def test_lines_that_fail_are_asked_again(records: Records, serve: Serve, tmp_path: Path) -> None:
    path, server = records(4), serve()
    server.batch_errors = {0, 3}
    run.main(in_batches(path, server, tmp_path / "l.sqlite"))
    run.main(options(path, serve(), tmp_path / "calm.sqlite"))
    assert content(tmp_path / "l.sqlite") == content(tmp_path / "calm.sqlite")


def test_long_waves_are_cut(records: Records, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MOST_REQUESTS", 5)
    server = serve()
    run.main(in_batches(records(4), server, tmp_path / "l.sqlite"))
    assert all(made["request_counts"]["total"] <= 5 for made in server.batches.values())
    assert each_once(server) and len(server.batches) >= 6


def test_waves_keep_few_requests_in_memory(tmp_path: Path) -> None:
    from data_gen.asking import Pending
    from data_gen.calls import Request

    with Ledger(tmp_path / "l.sqlite", create=True) as ledger:
        waves = Waves(ledger.answers)

        async def ask(number: int) -> None:
            messages = [{"role": "system", "content": "s"}, {"role": "user", "content": str(number)}]
            with pytest.raises(Pending):
                await waves(Request("describe", "r/a", {"model": "m", "messages": messages}), lambda _: [])

        async def work() -> None:
            for number in [*range(1200), *range(10)]:
                await ask(number)

        asyncio.run(work())
        keys = waves.take()
        assert len(keys) == 1200 == len(set(keys)) and waves.take() == []
        assert ledger.answers.body(keys[7])["messages"][1]["content"] == "7"
