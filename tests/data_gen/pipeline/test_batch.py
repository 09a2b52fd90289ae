"""The Batch API: waves, resuming at every step, lines that fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_server import FakeServer
from PIL import Image
from run_command import ends, options

from data_gen import run
from data_gen.ledger.answers import Answers
from data_gen.ledger.ledger import Ledger
from data_gen.ledger.limits import StopRun
from data_gen.pipeline import batch
from data_gen.pipeline.batch import Waves

Records = Callable[[int], Path]
Serve = Callable[..., FakeServer]
SECRET = "sk-a-secret-key-of-batches-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(batch, "_MOMENT", 0.01)


def in_batches(path: Path, server: FakeServer, ledger: Path, *more: str) -> list[str]:
    return options(path, server, ledger, "--batch", "--poll", "0.01", *more)


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
        assert ledger.answers.open_batches() == [] and ledger.is_deduplicated()


def test_captions_are_asked_live(records: Records, serve: Serve, tmp_path: Path) -> None:
    server = serve()
    run.main(in_batches(records(2), server, tmp_path / "l.sqlite", "--captioner", "v"))
    assert server.count == 1, "both records share one image and one question"
    assert len(server.batches) >= 3


def test_captions_of_a_wave_are_asked_many_at_once(records: Records, serve: Serve, tmp_path: Path) -> None:
    path, server = records(4), serve(delay=0.3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        Image.new("L", (48, 32), number).save(path.with_name(f"{number}.png"))
        line["image"] = f"{number}.png"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.main(in_batches(path, server, tmp_path / "l.sqlite", "--captioner", "v"))
    assert server.count == 4 and server.most_at_once > 1


def test_a_batch_is_half_the_price(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("m: {input: 10, cached: 5, output: 20, batch_input: 5, batch_output: 10}\n")
    more = ["--prices", str(prices)]
    run.main(in_batches(records(2), serve(), tmp_path / "l.sqlite", *more))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        answers = sum(count.answers for count in ledger.answers.counts())
        assert ledger.answers.spent() == pytest.approx(answers * (400 * 5 + 100 * 10) / 1e6)
    server = serve()
    assert ends(in_batches(records(2), server, tmp_path / "poor.sqlite", *more, "--max-cost", "0.001")) == 1
    assert "--max-cost" in capsys.readouterr().err and not server.batches


def test_a_run_that_ends_while_a_batch_is_under_way_collects_it_later(
    records: Records,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, server, ledger = records(3), serve(), tmp_path / "l.sqlite"
    server.batch_looks = 3

    async def leave(_: float) -> None:
        raise StopRun("left")

    with monkeypatch.context() as patch:
        patch.setattr(batch.asyncio, "sleep", leave)
        assert ends(in_batches(path, server, ledger)) == 1
    assert len(server.batches) == 1
    count = server.count
    assert ends(options(path, server, ledger)) == 1 and server.count == count, "what is paid for is not asked live"
    assert "--batch" in capsys.readouterr().err
    with Ledger(ledger) as found:
        ((token, identity),) = found.answers.open_batches()
        assert identity == "batch-0" and token
    assert ends(in_batches(path, server, ledger)) == 0
    assert each_once(server)


def test_a_batch_whose_creation_was_never_confirmed_has_no_twin(records: Records, serve: Serve, tmp_path: Path) -> None:
    path, server, ledger = records(3), serve(), tmp_path / "l.sqlite"
    server.fail_after_batch = True
    assert ends(in_batches(path, server, ledger)) == 0
    assert each_once(server) and server.batches


def test_a_batch_whose_id_was_never_stored_is_found(
    records: Records, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, server, ledger = records(3), serve(), tmp_path / "l.sqlite"

    def die(*_: object) -> None:
        raise StopRun("the run ended here")

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "mark_batch", die)
        assert ends(in_batches(path, server, ledger)) == 1
    with Ledger(ledger) as found:
        ((_, identity),) = found.answers.open_batches()
        assert identity is None and len(server.batches) == 1
    assert ends(in_batches(path, server, ledger)) == 0
    assert each_once(server)


def test_a_creation_that_fails_is_tried_again_unless_it_cannot_succeed(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, server, ledger = records(2), serve(), tmp_path / "l.sqlite"
    server.batch_failures = [500, 503]
    assert ends(in_batches(path, server, ledger)) == 0
    assert each_once(server)
    other, ledger = serve(), tmp_path / "other.sqlite"
    other.batch_failures = [404]
    assert ends(in_batches(path, other, ledger)) == 1
    assert "no batch today" in capsys.readouterr().err and not other.batches
    assert ends(options(path, other, ledger)) == 0, "nothing is under way, so it may be asked live"
    assert content(ledger) == content(tmp_path / "l.sqlite")


def test_lines_that_fail_are_asked_again(records: Records, serve: Serve, tmp_path: Path) -> None:
    path, server = records(4), serve()
    server.batch_errors = {0, 3}
    run.main(in_batches(path, server, tmp_path / "l.sqlite"))
    run.main(options(path, serve(), tmp_path / "calm.sqlite"))
    assert content(tmp_path / "l.sqlite") == content(tmp_path / "calm.sqlite")


def test_lines_that_say_nothing_are_passed_over(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, server = records(2), serve()
    server.batch_noise = b'\n[1]\n  \nnot JSON\n{"custom_id": 3}\n{"custom_id": "\\ud800"}\n' + b"[" * 100_000 + b"\n"
    run.main(in_batches(path, server, tmp_path / "l.sqlite"))
    assert "5 lines of the batch hold no answer" in capsys.readouterr().out
    run.main(options(path, serve(), tmp_path / "calm.sqlite"))
    assert content(tmp_path / "l.sqlite") == content(tmp_path / "calm.sqlite")


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (401, f"wrong key {SECRET}", "wrong key [OPENAI_API_KEY]"),
        (404, "no such model", "no such model"),
        (400, "response_format is unknown here", "--schema json_object"),
    ],
)
def test_a_line_that_condemns_all_ends_the_run(
    records: Records,
    serve: Serve,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    status: int,
    message: str,
    told: str,
) -> None:
    path, server, ledger = records(2), serve(), tmp_path / "l.sqlite"
    server.batch_rejects = {1: (status, message)}
    assert ends(in_batches(path, server, ledger)) == 1
    err = capsys.readouterr().err
    assert told in err and SECRET not in err
    with Ledger(ledger) as found:
        assert sum(count.answers for count in found.answers.counts()) == 3, "the other answers are stored"
    assert ends(in_batches(path, server, ledger)) == 0
    run.main(options(path, serve(), tmp_path / "calm.sqlite"))
    assert content(ledger) == content(tmp_path / "calm.sqlite"), "nothing was dropped for it"


def test_a_request_that_a_batch_does_not_take_is_dropped_with_the_servers_words(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, server, ledger = records(2), serve(), tmp_path / "l.sqlite"
    server.batch_rejects = {0: (400, f"too long for {SECRET}")}
    assert ends(in_batches(path, server, ledger)) == 0
    with Ledger(ledger) as found:
        (reason,) = {drop.reason for drop in found.drops() if drop.rule == "rejected"}
        assert "too long for [OPENAI_API_KEY]" in reason
    server = serve()
    server.batch_rejects = dict.fromkeys(range(4), (400, "too long"))
    assert ends(in_batches(path, server, tmp_path / "bad.sqlite")) == 1
    assert "does not accept the request (status 400: too long); correct the settings" in capsys.readouterr().err
    assert ends(in_batches(path, server, tmp_path / "bad.sqlite")) == 0
    run.main(options(path, serve(), tmp_path / "calm.sqlite"))
    assert content(tmp_path / "bad.sqlite") == content(tmp_path / "calm.sqlite"), "nothing was dropped for it"


def test_a_batch_learns_the_names_of_parameters(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, server = records(2), serve()
    refusal = "Unsupported parameter: 'max_tokens' is not supported with this model."
    server.batch_rejects = dict.fromkeys(range(4), (400, refusal))
    assert ends(in_batches(path, server, tmp_path / "l.sqlite", "--max-tokens", "5000")) == 0
    assert capsys.readouterr().err.count("the server takes no max_tokens: sent as max_completion_tokens") == 1
    assert "max_tokens" in server.bodies[0] and server.bodies[4]["max_completion_tokens"] == 5000
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert len(ledger.pairs()) > 8 and not any(drop.rule == "rejected" for drop in ledger.drops())


def test_the_key_is_not_told_when_a_batch_is_refused(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    server.batch_refusal = f"nothing for {SECRET}"
    assert ends(in_batches(records(1), server, tmp_path / "l.sqlite")) == 1
    assert "nothing for [OPENAI_API_KEY]" in capsys.readouterr().err


def test_long_waves_are_cut(records: Records, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MOST_REQUESTS", 5)
    server = serve()
    run.main(in_batches(records(4), server, tmp_path / "l.sqlite"))
    assert all(made["request_counts"]["total"] <= 5 for made in server.batches.values())
    assert each_once(server) and len(server.batches) >= 6


def test_waves_keep_few_requests_in_memory(tmp_path: Path) -> None:
    from data_gen.core.calls import Request
    from data_gen.pipeline.asking import Pending

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
