"""The command `run`, against a server in a thread and once as a program of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from run_command import ends, options

from data_gen import run
from data_gen.authors import client
from data_gen.core.items import Pair
from data_gen.ledger.ledger import Ledger

Records = Callable[[int], Path]
Serve = Callable[..., FakeServer]
SECRET = "sk-another-secret-key-9876543210"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)


def pairs_of(ledger: Path) -> list[Pair]:
    with Ledger(ledger) as found:
        return found.pairs()


def test_a_run_makes_pairs_and_says_what_it_made(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, ledger = serve(slips=0.4), tmp_path / "l.sqlite"
    run.main(options(records(6), server, ledger))
    pairs = pairs_of(ledger)
    assert 20 < len(pairs) <= 48 and len({pair.question for pair in pairs}) == len(pairs)
    assert {pair.author for pair in pairs} == {"m"}
    told = capsys.readouterr().out
    assert "images 6 of 6" in told and "revise: removed" in told and "0.00 USD" in told
    with Ledger(ledger) as found:
        assert found.is_deduplicated() and found.root() == (tmp_path / "records").resolve()
        assert len(found.pairs()) + sum(bool(drop.pair) for drop in found.drops()) == 48, (
            "each is there or has its reason"
        )


def test_a_second_run_asks_nothing_and_a_longer_one_only_the_rest(
    records: Records, serve: Serve, tmp_path: Path
) -> None:
    path, server, ledger = records(8), serve(), tmp_path / "l.sqlite"
    run.main(options(path, server, ledger, "--limit", "5"))
    first, count = pairs_of(ledger), server.count
    run.main(options(path, server, ledger, "--limit", "5"))
    assert server.count == count and pairs_of(ledger) == first
    run.main(options(path, server, ledger))
    assert count < server.count and set(first) <= set(pairs_of(ledger))
    assert len({pair.item for pair in pairs_of(ledger)}) == 8
    keys = [json.dumps(body, sort_keys=True) for body in server.bodies]
    assert len(keys) == len(set(keys)), "no request was sent twice"


def test_the_same_data_set_whatever_the_concurrency(records: Records, serve: Serve, tmp_path: Path) -> None:
    path = records(10)
    run.main(options(path, serve(slips=0.5), tmp_path / "one.sqlite", "--concurrency", "1"))
    run.main(options(path, serve(slips=0.5, delay=0.02), tmp_path / "many.sqlite", "--concurrency", "16"))
    assert pairs_of(tmp_path / "one.sqlite") == pairs_of(tmp_path / "many.sqlite") != []


def test_the_offline_author_needs_no_server(
    tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    for name in ("one", "two"):
        run.main(["--records", str(tiny_manifest), "--ledger", str(tmp_path / f"{name}.sqlite"), "--author", "offline"])
    pairs = pairs_of(tmp_path / "one.sqlite")
    assert len(pairs) > 20 and {pair.author for pair in pairs} == {"offline"}
    assert pairs == pairs_of(tmp_path / "two.sqlite")
    assert "offline" in capsys.readouterr().out


def test_conversations_join_the_questions_in_one_ledger(records: Records, serve: Serve, tmp_path: Path) -> None:
    path, server, ledger = records(6), serve(), tmp_path / "l.sqlite"
    run.main(options(path, server, ledger))
    alone = pairs_of(ledger)
    run.main(options(path, server, ledger, "--style", "multi-turn"))
    both = pairs_of(ledger)
    assert [pair for pair in both if not pair.conversation] == alone
    talks = {pair.conversation for pair in both if pair.conversation}
    assert len(talks) == 6


@pytest.mark.parametrize(
    ("schema", "settings"), [("json_object", {"strict": False}), ("none", {"strict": False, "prose": True})]
)
def test_servers_without_strict_schemas(
    records: Records, serve: Serve, tmp_path: Path, schema: str, settings: dict[str, bool]
) -> None:
    server, ledger = serve(**settings), tmp_path / "l.sqlite"
    run.main(options(records(2), server, ledger, "--schema", schema))
    assert len(pairs_of(ledger)) > 8
    assert "max_tokens" in server.bodies[0] and "max_completion_tokens" not in server.bodies[0]


def test_captions_by_another_server_or_from_a_file(
    records: Records, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writer, seer = records(3), serve(), serve(slips=1.0)
    more = ["--captioner", "v", "--caption-url", seer.url, "--caption-schema", "json_object", "--temperature", "0.5"]
    run.main(options(path, writer, tmp_path / "l.sqlite", *more))
    assert {body["model"] for body in seer.bodies} == {"v"} and {body["model"] for body in writer.bodies} == {"m"}
    assert seer.bodies[0]["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert seer.bodies[0]["response_format"] == {"type": "json_object"} and seer.bodies[0]["temperature"] == 0.5
    assert {each["authorization"] for each in writer.headers} == {f"Bearer {SECRET}"}
    assert {each["authorization"] for each in seer.headers} == {"Bearer none"}, "the key is not for others"
    monkeypatch.setenv("MEDISEE_CAPTION_KEY", "sk-of-the-captioner")
    run.main(options(path, writer, tmp_path / "second.sqlite", *more))
    assert seer.headers[-1]["authorization"] == "Bearer sk-of-the-captioner"
    both = serve()
    run.main(options(path, both, tmp_path / "both.sqlite", "--captioner", "v", "--caption-url", f"{both.url}/"))
    assert {each["authorization"] for each in both.headers} == {f"Bearer {SECRET}"}
    (tmp_path / "captions.jsonl").write_text('{"record": "r00001", "caption": "A told slice."}\n')
    given = serve()
    run.main(options(path, given, tmp_path / "g.sqlite", "--captions", str(tmp_path / "captions.jsonl")))
    assert sum("Caption: A told slice." in str(body) for body in given.bodies) == 2 + 2


def test_the_money_stops_a_run_and_more_of_it_goes_on(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("m: {input: 10, cached: 5, output: 20, batch_input: 1, batch_output: 1}\n")
    path, server, ledger = records(4), serve(), tmp_path / "l.sqlite"
    argv = options(path, server, ledger, "--prices", str(prices), "--concurrency", "4")
    assert ends([*argv, "--max-cost", "0.1"]) == 1
    told = capsys.readouterr()
    assert "exceed --max-cost 0.1" in told.err and "USD" in told.out
    with Ledger(ledger) as found:
        spent = found.answers.spent()
        assert 0 < spent <= 0.1
    before = server.count
    assert ends(argv) == 0
    assert server.count > before and len({json.dumps(body) for body in server.bodies}) == len(server.bodies)


def test_a_server_that_fails_ends_the_run(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, ledger = serve(faults=("500",), in_a_row=10**6), tmp_path / "l.sqlite"
    argv = options(records(5), server, ledger, "--sends", "2")
    assert ends([*argv, "--max-failures", "6"]) == 1
    assert "calls in a row failed" in capsys.readouterr().err
    assert ends([*argv, "--max-failures", "1000"]) == 1
    assert "5 items had no answer from the server (status 500" in capsys.readouterr().err
    server.settings.faults = ()
    assert ends(argv) == 0 and len(pairs_of(ledger)) > 20


@pytest.mark.parametrize("fault", ["400", "422"])
def test_a_server_that_was_set_up_wrongly_is_asked_again_when_it_is_mended(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    path, server, ledger = records(3), serve(faults=(fault,), in_a_row=10**6), tmp_path / "l.sqlite"
    argv = options(path, server, ledger)
    for _ in range(3):
        assert ends(argv) == 1
        err = capsys.readouterr().err
        assert f"does not accept the requests of 3 items (status {fault}" in err and "correct the settings" in err
    assert server.count == 3 * 6, "each run sends what has no answer once"
    server.settings.faults = ()
    assert ends(argv) == 0
    run.main(options(path, serve(), tmp_path / "calm.sqlite"))
    assert pairs_of(ledger) == pairs_of(tmp_path / "calm.sqlite") != []


@pytest.mark.parametrize("fault", ["401", "402", "403", "404"])
def test_a_wrong_key_or_model_is_stored_for_no_item(records: Records, serve: Serve, tmp_path: Path, fault: str) -> None:
    server, ledger = serve(faults=(fault,), in_a_row=10**6), tmp_path / "l.sqlite"
    assert ends(options(records(3), server, ledger)) == 1
    with Ledger(ledger) as found:
        assert sum(each.answers for each in found.answers.counts()) == 0 and found.count_open("single") == (3, 3)
    server.settings.faults = ()
    assert ends(options(records(3), server, ledger)) == 0 and len(pairs_of(ledger)) > 8


def test_one_image_that_the_server_does_not_take_ends_no_run(
    records: Records, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, ledger = serve(), tmp_path / "l.sqlite"
    finish, targets = server._finish, list[str]()

    def refuse_one(connection: Any, body: dict[str, Any], fault: str | None) -> None:
        targets.append(re.findall(r"Target: [^\\]*", str(body))[0])
        finish(connection, body, "400" if targets[-1] == targets[0] else fault)

    monkeypatch.setattr(server, "_finish", refuse_one)
    assert ends(options(records(4), server, ledger)) == 0
    with Ledger(ledger) as found:
        drops = [drop for drop in found.drops() if drop.rule == "rejected"]
        assert len({drop.item for drop in drops}) == 1 and len(drops) == 8 and found.is_deduplicated()
        assert "status 400: too long" in drops[0].reason and len({pair.item for pair in found.pairs()}) == 3


def test_a_run_without_a_pair_says_so(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(records(1), serve(faults=("words",), in_a_row=10**6), tmp_path / "l.sqlite")
    for _ in range(2):
        assert ends(argv) == 1
        told = capsys.readouterr()
        assert "no pair was made" in told.err and "describe: refused" in told.out
    assert pairs_of(tmp_path / "l.sqlite") == []


def test_refusals_of_a_captioner_are_in_no_prompt_and_no_pair(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seer, writer, ledger = serve(faults=("words",), in_a_row=10**6), serve(), tmp_path / "l.sqlite"
    assert ends(options(records(3), writer, ledger, "--captioner", "v", "--caption-url", seer.url)) == 0
    assert seer.count >= 3 and "caption: refused" in capsys.readouterr().out
    assert writer.bodies and not any("sorry" in str(body) for body in writer.bodies)
    assert not any("sorry" in f"{pair.question} {pair.answer}" for pair in pairs_of(ledger))


def test_a_reasoning_model_is_asked_as_it_likes(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(takes_no=("max_tokens", "temperature"), thoughts="<think>So {it} may be.</think>\n")
    path, ledger = records(2), tmp_path / "l.sqlite"
    argv = options(path, server, ledger, "--temperature", "0.5", "--reasoning-effort", "low", "--max-tokens", "9000")
    assert ends(argv) == 0 and len(pairs_of(ledger)) > 8
    err = capsys.readouterr().err
    assert err.count("takes no max_tokens: sent as max_completion_tokens") == 1
    assert err.count("takes no temperature: left out") == 1
    last = server.bodies[-1]
    assert (last["max_completion_tokens"], last["reasoning_effort"]) == (9000, "low") and "temperature" not in last
    count = server.count
    assert ends([*argv, "--max-tokens", "500"]) == 0 and server.count == count, "the most tokens may change"
    assert ends([*argv, "--reasoning-effort", "high"]) == 2
    assert 'parameters = {"reasoning_effort": "low"' in capsys.readouterr().err


def test_a_cut_answer_is_told_as_such(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(faults=("truncated",), in_a_row=10**6)
    assert ends(options(records(1), server, tmp_path / "l.sqlite")) == 1
    assert "describe: truncated" in capsys.readouterr().out
    with Ledger(tmp_path / "l.sqlite") as found:
        assert {drop.reason for drop in found.drops()} == {
            "the answer was cut off at the most tokens allowed; raise --max-tokens"
        }


def test_a_refused_run_leaves_no_ledger_behind(serve: Serve, records: Records, tmp_path: Path) -> None:
    path, ledger = records(1), tmp_path / "deep" / "l.sqlite"
    (path.parent / "slice.png").write_bytes(b"")
    assert ends(options(path, serve(), ledger)) == 2
    assert not ledger.parent.exists() or list(ledger.parent.iterdir()) == []


def test_the_key_is_in_no_file_and_no_message(
    records: Records, serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ends(options(records(2), serve(faults=("401",)), tmp_path / "l.sqlite")) == 1
    assert ends(options(records(2), serve(), tmp_path / "l.sqlite")) == 0
    told = "".join(capfd.readouterr())
    assert "[OPENAI_API_KEY]" in told and SECRET not in told
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--model", "other"], 'was begun with model = "m", this run has "other"'),
        (["--seed", "3"], "was begun with seed = 0, this run has 3"),
        (["--again", "1"], "again = 2"),
        (["--temperature", "1"], "parameters = {}"),
        (["--caption-schema", "none"], 'caption_schema = "strict"'),
        (["--base-url", "https://api.openai.com/v1/"], 'base_url = "another", this run has "OpenAI\'s"'),
    ],
)
def test_a_ledger_of_other_settings_is_told(
    records: Records, serve: Serve, tmp_path: Path, changes: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, server, ledger = records(1), serve(), tmp_path / "l.sqlite"
    run.main(options(path, server, ledger))
    count = server.count
    assert ends([*options(path, server, ledger), *changes]) == 2
    assert told in capsys.readouterr().err and server.count == count


def test_other_prompts_do_not_fit_the_ledger(
    records: Records, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, server, ledger = records(1), serve(), tmp_path / "l.sqlite"
    run.main(options(path, server, ledger))
    monkeypatch.setattr("data_gen.options.FOLDER", tmp_path)  # a folder without prompts
    assert ends(options(path, server, ledger)) == 2
    assert "was begun with prompts = " in capsys.readouterr().err


def test_other_records_do_not_fit_the_ledger(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, ledger = serve(), tmp_path / "l.sqlite"
    run.main(options(records(1), server, ledger))
    assert ends(options(records(2), server, ledger)) == 2
    assert "records = " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--concurrency", "1000000000"], "at most 10,000"),
        (["--limit", "99999999999999999999"], "--limit is 99999999999999999999"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--reasoning-effort", " "], "--reasoning-effort ' '"),
        (["--model", ""], "--model ''"),
        (["--model", "\udcff"], "'\\udcff': is not UTF-8"),
        (["--captioner", ""], "--captioner ''"),
        (["--max-cost", "-1"], "--max-cost is -1"),
        (["--rpm", "nan"], "--rpm is nan"),
        (["--root", "nowhere"], "does not exist"),
        (["--captions", "gone.jsonl"], "gone.jsonl"),
        (["--captioner", "v", "--captions", "x"], "leave one out"),
        (["--captioner", "local:nowhere"], "nowhere"),
        (["--base-url", "http://["], "--base-url 'http://['"),
        (["--base-url", ""], "--base-url ''"),
        (["--caption-url", "localhost:8000"], "--caption-url 'localhost:8000'"),
    ],
)
def test_bad_options_are_told(
    records: Records, serve: Serve, tmp_path: Path, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(options(records(1), serve(), tmp_path / "l.sqlite", *more)) == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err


def test_without_a_key_or_a_price_nothing_begins(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", str(records(1)), "--ledger", str(tmp_path / "l.sqlite"), "--model", "gpt-4o"]
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ends(argv) == 2 and "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert ends([*argv[:-1], "nobody-knows"]) == 2 and "no price is known" in capsys.readouterr().err
    assert ends([*argv[:-2], "--author", "offline", "--batch"]) == 2
    assert not (tmp_path / "l.sqlite").exists()


def test_captions_that_are_wrong_are_all_told(
    records: Records, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "c.jsonl"
    captions.write_text('{"record": "a", "caption": "x"}\n{\n{"record": "a", "caption": "y"}\n{"record": "b"}\n')
    assert ends(options(records(1), serve(), tmp_path / "l.sqlite", "--captions", str(captions))) == 2
    err = capsys.readouterr().err
    assert "c.jsonl:2" in err and "c.jsonl:3" in err and "'caption' is missing" in err


def test_a_manifest_without_targets_is_told(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"id": "r", "image": "i.png", "modality": "ct", "source": "s", "case": "c", "targets": []}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    assert ends(options(tmp_path / "r.jsonl", serve(), tmp_path / "l.sqlite")) == 2
    assert "no record has a target" in capsys.readouterr().err


def program(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "data_gen", "run", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENAI_API_KEY": SECRET},
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_cleanly(records: Records, serve: Serve, tmp_path: Path, number: int, code: int) -> None:
    path, server, ledger = records(40), serve(delay=0.3), tmp_path / "l.sqlite"
    argv = options(path, server, ledger, "--concurrency", "4")
    process = program(argv)
    while server.count < 9:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    # Meanwhile another run is refused.
    assert ends(argv) == 2
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and "of 40, pairs" in out
    with Ledger(ledger) as found:
        assert sum(each.answers for each in found.answers.counts()) == server.count >= 9, "what was under way was kept"
        assert found.count_open("single")[0] > 0


def test_a_second_signal_ends_a_run_whose_server_is_silent(records: Records, serve: Serve, tmp_path: Path) -> None:
    server, ledger = serve(delay=100), tmp_path / "l.sqlite"
    process = program(options(records(5), server, ledger, "--concurrency", "4"))
    while server.count < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # two signals at the same moment may arrive as one
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    with Ledger(ledger) as found:
        assert found._store.read("SELECT outcome FROM runs") == [("interrupted; run again to go on",)]
