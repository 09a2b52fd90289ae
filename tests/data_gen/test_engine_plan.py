"""Plans: what is planned is what a run asks, and prices are found or asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_server import FakeServer

from data_gen import plan, run
from data_gen.core.prices import FREE, Price, find_price, load_prices, size_of
from data_gen.ledger.ledger import Ledger
from data_gen.plan import count_items
from medisee.foundation.errors import InputError, exit_code
from medisee.records.manifest import Manifest

Records = Callable[[int], Path]


def rows(text: str) -> dict[str, list[float]]:
    """Returns the numbers of the plan's table by stage."""
    found = (line.split() for line in text.splitlines()[2:])
    return {stage: [float(value.replace(",", "")) for value in values] for stage, *values in found}


def test_a_run_asks_what_was_planned(
    records: Records, serve: Callable[..., FakeServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fake server removes and slips nothing here, so each stage is asked once for each pass."""
    path, server = records(4), serve()
    plan.main(["--records", str(path), "--model", "gpt-4o", "--limit", "3"])
    planned = rows(capsys.readouterr().out)
    common = ["--records", str(path), "--model", "gpt-4o", "--base-url", server.url, "--limit", "3"]
    run.main([*common, "--ledger", str(tmp_path / "l.sqlite")])
    with Ledger(tmp_path / "l.sqlite") as ledger:
        counts = {count.stage: count for count in ledger.answers.counts()}
    assert planned["describe"][0] == counts["describe"].requests == 12
    assert planned["revise"][0] == counts["revise"].requests == 12
    assert planned["transform"][0] == 12
    asked = [body for body in server.bodies if "you write descriptions" in str(body).lower()]
    measured = sum(size_of(body).tokens(FREE) for body in asked) / len(asked)
    assert planned["describe"][1] / 12 == pytest.approx(measured, rel=0.1), "the real prompts are measured"
    for stage, (_, tokens_in, tokens_out, usd, batch, most) in planned.items():
        assert usd == pytest.approx((tokens_in * 2.5 + tokens_out * 10) / 1e6, abs=0.01), stage
        assert batch == pytest.approx(usd / 2, abs=0.01) and most > 2 * usd


def test_the_plan_grows_with_the_images(records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    path = records(230)  # more than are measured
    plan.main(["--records", str(path), "--model", "gpt-4o-mini", "--captioner", "gpt-4o", "--variants", "1"])
    text = capsys.readouterr().out
    assert "230 images, at most 1,840 question-answer pairs" in text and "captions by gpt-4o" in text
    planned = rows(text)
    assert planned["caption"][4] == planned["caption"][3] > 0, "captions are asked live in batches, too"
    assert planned["describe"][4] < planned["describe"][3]
    assert [planned[stage][0] for stage in ("caption", "describe", "revise", "transform", "all")] == [
        230,
        460,
        460,
        460,
        1610,
    ]


def test_conversations_and_the_offline_author_can_be_planned(
    records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    path = records(3)
    plan.main(["--records", str(path), "--model", "gpt-4o", "--style", "multi-turn"])
    assert set(rows(capsys.readouterr().out)) == {"converse", "all"}
    plan.main(["--records", str(path), "--author", "offline"])
    assert rows(capsys.readouterr().out)["all"][3:] == [0, 0, 0]


def test_images_count_for_captions(records: Records) -> None:
    assert count_items(Manifest(records(5)), None) == 5 and count_items(Manifest(records(5)), 2) == 2
    body = {"messages": [{"content": [{"type": "text", "text": "x" * 380}, {"type": "image_url", "image_url": {}}]}]}
    price = Price(input=1, cached=1, output=1, batch_input=1, batch_output=1, image_tokens=700)
    assert size_of(body).tokens(price) == pytest.approx(100 + 700 + 4)


def test_prices_of_dated_versions_are_those_of_the_model() -> None:
    prices = load_prices()
    assert find_price(prices, "gpt-4o-2024-11-20") == prices["gpt-4o"]
    assert prices["gpt-4o"].of(1e6, 0, 0) == 2.5 and prices["gpt-4o"].of(1e6, 1e6, 1e6) == 11.25
    assert prices["gpt-4o"].of(1e6, 0, 1e6, batch=True) == 6.25


def test_prices_can_be_brought(tmp_path: Path) -> None:
    extra = tmp_path / "prices.yaml"
    extra.write_text("mine: {input: 1, cached: 1, output: 2, batch_input: 1, batch_output: 1}\n")
    assert find_price(load_prices(extra), "mine").output == 2 and "gpt-4o" in load_prices(extra)
    for content, told in (
        ("mine: {input: 1}", "cached"),
        ("mine: {input: -1, cached: 1, output: 2, batch_input: 1, batch_output: 1}", "mine.input"),
        ("[", "not a readable"),
        ("- a", "prices.yaml"),
    ):
        extra.write_text(content)
        with pytest.raises(InputError, match=re.escape(told)):
            load_prices(extra)
    with pytest.raises(InputError, match="not a readable"):
        load_prices(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "gpt-4"], "no price is known for it; Did you mean 'gpt-4o'?"),
        ([], "--model NAME or --author offline"),
        (["--model", "gpt-4o", "--author", "offline"], "--model NAME or --author offline"),
        (["--model", "gpt-4o", "--variants", "9"], "--variants is 9; expected 1 to 4"),
        (["--model", "gpt-4o", "--limit", "0"], "--limit is 0"),
        (["--author", "offline", "--captioner", "x"], "leave out --captioner"),
        (["--model", "gpt-4o", "--captions", "gone.jsonl"], "gone.jsonl"),
        (["--model", "gpt-4o", "--names", "gone.yaml"], "gone.yaml"),
    ],
)
def test_bad_options_are_told(
    options: list[str], told: str, records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(plan.main, ["--records", str(records(1)), *options]) == 2
    told_lines = capsys.readouterr().err
    assert told in told_lines and "Traceback" not in told_lines


def test_a_bad_manifest_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(plan.main, ["--records", str(tmp_path / "gone.jsonl"), "--author", "offline"]) == 2
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    assert exit_code(plan.main, ["--records", str(tmp_path / "bad.jsonl"), "--author", "offline"]) == 2
    assert "bad.jsonl:1" in capsys.readouterr().err
