"""The client against a server that misbehaves in every way that servers do."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fake_server import FakeServer
from PIL import Image

from data_gen.authors import client
from data_gen.authors.client import (
    Client,
    NotAccepted,
    Parameters,
    Server,
    Unreachable,
    reply_from,
    retry_after,
)
from data_gen.core.calls import Reply, Request
from data_gen.core.pictures import identify
from data_gen.core.prices import FREE, Price
from data_gen.core.prompts import request
from data_gen.ledger.limits import MoneyBudget, RateLimit, StopRun
from medisee.foundation.errors import InputError

Serve = Callable[..., FakeServer]
SECRET = "sk-a-very-secret-key-0123456789"
PRICE = Price(input=1, cached=0.5, output=10, batch_input=0.5, batch_output=5)
FACTS: dict[str, Any] = {
    "item": "r/a",
    "modality": "ct",
    "category": "spleen",
    "box": [0, 0, 1, 1],
    "entities": [],
    "template": "first",
    "variant": 1,
}
ASKED = request("describe", FACTS, model="m", parameters={"max_tokens": 200})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)


def send(
    server: FakeServer | str,
    *requests: Request,
    price: Price = FREE,
    money: MoneyBudget | None = None,
    root: Path = Path(),
    rate: tuple[float | None, float | None] = (None, None),
    **how: Any,
) -> list[Reply | BaseException]:
    """Sends requests at once and returns what came of each."""

    async def work() -> list[Reply | BaseException]:
        there = Server(**{"base_url": server if isinstance(server, str) else server.url, "timeout": 5.0, **how})
        one = Client(there, root=root, price=price, rate=RateLimit(*rate), money=money or MoneyBudget())
        try:
            return await asyncio.gather(*(one.send(each) for each in requests), return_exceptions=True)
        finally:
            await one.close()

    return asyncio.run(work())


def only(found: list[Reply | BaseException]) -> Reply:
    (reply,) = found
    assert isinstance(reply, Reply), reply
    return reply


def failure(found: list[Reply | BaseException]) -> BaseException:
    (error,) = found
    assert isinstance(error, BaseException)
    return error


def test_an_answer_comes_with_its_price(serve: Serve) -> None:
    server, money = serve(), MoneyBudget()
    reply = only(send(server, ASKED, price=PRICE, money=money))
    assert reply.status == "ok" and "attribute_short" in reply.text and reply.sends == 1
    assert (reply.usage_in, reply.usage_cached, reply.usage_out) == (400, 100, 100)
    assert reply.price == pytest.approx((300 * 1 + 100 * 0.5 + 100 * 10) / 1e6)
    assert money.spent == pytest.approx(reply.price)
    assert server.bodies == [ASKED.body], "what is sent is what the key stands for"
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("fault", ["429", "500", "drop", "garbage", "html", "timeout"])
def test_a_request_is_sent_again_after_failures_of_server_and_network(serve: Serve, fault: str) -> None:
    server = serve(faults=(fault,), in_a_row=2)
    reply = only(send(server, ASKED, timeout=1.5))
    assert reply.status == "ok" and reply.sends == server.count == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "status 500"),
        ("drop", "connection"),
        ("garbage", "connection"),
        ("html", "not JSON"),
        ("timeout", "no answer within"),
    ],
)
def test_a_server_that_never_answers_is_unreachable(serve: Serve, fault: str, message: str) -> None:
    server = serve(faults=(fault,), in_a_row=99)
    error = failure(send(server, ASKED, sends=3, timeout=0.3))
    assert isinstance(error, Unreachable) and message in str(error)
    assert server.count == 3


def test_a_server_that_is_not_running_is_unreachable() -> None:
    error = failure(send("http://127.0.0.1:9/v1", ASKED, sends=2))
    assert isinstance(error, Unreachable) and "connection" in str(error)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("refusal", "refused"),
        ("truncated", "truncated"),
        ("filter", "filtered"),
        ("malformed", "ok"),
        ("tool", "malformed"),
        ("words", "ok"),
    ],
)
def test_unusable_answers_are_distinguished(serve: Serve, fault: str, status: str) -> None:
    """Malformed JSON is found by the schema and a refusal in words by the rules, not by the client."""
    server = serve(faults=(fault,))
    reply = only(send(server, ASKED, price=PRICE))
    assert reply.status == status and server.count == 1
    assert bool(reply.why) == (status != "ok")
    assert reply.price > 0, "every answer of the server is paid for, usable or not"


@pytest.mark.parametrize("fault", ["400", "413", "422"])
def test_a_request_is_rejected_only_when_the_server_takes_others(serve: Serve, fault: str) -> None:
    """Alone it may be the settings' or the server's fault, so it is left open."""
    server = serve(faults=(fault,), in_a_row=10**6)
    other = request("describe", {**FACTS, "category": "liver"}, model="m")

    async def work() -> list[Reply | BaseException]:
        one = Client(Server(base_url=server.url), root=Path(), price=FREE, rate=RateLimit(), money=MoneyBudget())
        found = [*await asyncio.gather(one.send(ASKED), one.send(ASKED), return_exceptions=True)]
        server.settings.faults = ()
        found.append(await one.send(other))
        server.settings.faults = (fault,)
        found += await asyncio.gather(one.send(ASKED), one.send(other), return_exceptions=True)
        await one.close()
        return found

    first, second, good, again, late = asyncio.run(work())
    assert isinstance(first, NotAccepted) and isinstance(second, NotAccepted) and f"status {fault}" in str(first)
    assert isinstance(good, Reply) and good.status == "ok"
    assert isinstance(again, Reply) and again.status == "rejected" and f"status {fault}" in again.why
    assert isinstance(late, NotAccepted), "nothing else was answered since the server first refused it"


@pytest.mark.parametrize(
    ("name", "takes_no", "sent"),
    [
        ("max_tokens", ("max_tokens",), "max_completion_tokens"),
        ("max_completion_tokens", ("max_completion_tokens",), "max_tokens"),
        ("temperature", ("temperature",), None),
        ("reasoning_effort", ("reasoning_effort",), None),
    ],
)
def test_a_parameter_that_the_server_does_not_take_is_renamed_or_left_out_and_told_once(
    serve: Serve, capsys: pytest.CaptureFixture[str], name: str, takes_no: tuple[str, ...], sent: str | None
) -> None:
    server = serve(takes_no=takes_no, delay=0.05)
    asked = [
        request("describe", {**FACTS, "category": f"c{n}"}, model="m", parameters={name: 1, "top_p": 1})
        for n in range(5)
    ]
    replies = send(server, *asked, sends=1)
    assert all(isinstance(reply, Reply) and reply.status == "ok" and reply.sends == 1 for reply in replies)
    assert capsys.readouterr().err.count(f"the server takes no {name}: ") == 1
    last = server.bodies[-1]
    assert name not in last and last["top_p"] == 1 and (sent is None or last[sent] == 1)


def test_a_server_that_takes_neither_name_is_not_asked_for_ever(serve: Serve) -> None:
    server = serve(takes_no=("max_tokens", "max_completion_tokens"))
    error = failure(send(server, ASKED))
    assert isinstance(error, NotAccepted) and "max_completion_tokens" in str(error) and server.count == 2


def test_a_message_about_a_value_renames_nothing() -> None:
    parameters = Parameters(Server())
    assert not parameters.learn("max_tokens is too large: 9000. This model supports at most 4096", {"max_tokens": 9000})
    assert not parameters.learn("Unsupported parameter: 'top_p'", {"top_p": 1, "temperature": 1})
    assert parameters.apply({"max_tokens": 9}) == {"max_tokens": 9}


def test_the_most_tokens_can_be_set_and_the_key_of_a_request_stays(serve: Serve) -> None:
    server, money = serve(takes_no=("max_tokens",)), MoneyBudget(0.01)
    assert only(send(server, ASKED, max_tokens=9000)).status == "ok"
    assert server.bodies[-1]["max_completion_tokens"] == 9000 and ASKED.body["max_tokens"] == 200
    error = failure(send(server, ASKED, max_tokens=9000, price=PRICE, money=money))
    assert isinstance(error, StopRun) and "may cost" in str(error), "more tokens may cost more"


@pytest.mark.parametrize(
    ("message", "usage", "expected"),
    [
        ({"content": [{"type": "thinking", "text": "Hm"}, {"type": "text", "text": "{}"}]}, {}, ("ok", "{}", 0)),
        ({"content": "{}", "reasoning_content": "Hm", "refusal": None}, {"prompt_tokens": 7}, ("ok", "{}", 7)),
        ({"content": None}, {}, ("malformed", "", 0)),
        ({"content": "", "refusal": "No."}, {"prompt_tokens": -5}, ("refused", "No.", 0)),
        ({"content": "{}"}, {"prompt_tokens": 10**30}, ("ok", "{}", 2**40)),
    ],
)
def test_completions_of_all_kinds_are_read(
    message: dict[str, Any], usage: dict[str, Any], expected: tuple[str, str, int]
) -> None:
    reply = reply_from({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}, FREE)
    assert (reply.status, reply.text, reply.usage_in) == expected
    cut = reply_from({"choices": [{"message": {"content": "{"}, "finish_reason": "length"}]}, FREE)
    assert cut.status == "truncated" and "raise --max-tokens" in cut.why


@pytest.mark.parametrize(
    ("fault", "message"),
    [("401", "check OPENAI_API_KEY"), ("404", "the model's name"), ("quota", "quota"), ("402", "quota")],
)
def test_hopeless_requests_end_the_run(serve: Serve, fault: str, message: str) -> None:
    server = serve(faults=(fault,))
    error = failure(send(server, ASKED))
    assert isinstance(error, StopRun) and message in str(error) and server.count == 1


def test_a_server_without_strict_schemas_is_named_with_the_remedy(serve: Serve) -> None:
    server = serve(strict=False)
    error = failure(send(server, ASKED))
    assert isinstance(error, StopRun) and "--schema json_object" in str(error)
    assert only(send(server, request("describe", FACTS, model="m", mode="json_object"))).status == "ok"


@pytest.mark.parametrize(("header", "value"), [("Retry-After", "1"), ("retry-after-ms", "700")])
def test_retry_after_holds_back_every_call(serve: Serve, header: str, value: str) -> None:
    server = serve(faults=("429",), in_a_row=1, retry_after={header: value})
    send(server, ASKED)
    assert server.at[1] - server.at[0] > 0.65

    server = serve(faults=("429",), in_a_row=1, retry_after={header: value})
    others = [request("describe", {**FACTS, "category": f"c{n}"}, model="m") for n in range(6)]
    send(server, *others, concurrency=1)
    waits = np.diff(server.at)
    assert (waits > 0.65).sum() >= 6, "each refusal delays the next request, too"


def test_a_pause_of_hours_ends_the_run(serve: Serve) -> None:
    error = failure(send(serve(faults=("429",), retry_after={"Retry-After": "7200"}), ASKED))
    assert isinstance(error, StopRun) and "7200 s" in str(error)


def test_retry_after_is_read_in_all_forms() -> None:
    def seconds(**headers: str) -> float:
        return retry_after(httpx2.Headers({name.replace("_", "-"): value for name, value in headers.items()}))

    assert seconds() == 0
    assert seconds(retry_after="2.5") == 2.5
    assert seconds(retry_after_ms="1500", retry_after="9") == 1.5
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < seconds(retry_after=date) <= 31
    assert seconds(retry_after="soon") == seconds(retry_after="-3") == seconds(retry_after="inf") == 0


def test_concurrency_is_limited(serve: Serve) -> None:
    server = serve(delay=0.1)
    requests = [request("describe", {**FACTS, "category": f"c{n}"}, model="m") for n in range(12)]
    assert all(isinstance(reply, Reply) for reply in send(server, *requests, concurrency=4))
    assert 2 <= server.most_at_once <= 4


def test_the_rate_limit_is_kept(serve: Serve) -> None:
    server = serve()
    requests = [request("describe", {**FACTS, "category": f"c{n}"}, model="m") for n in range(8)]
    send(server, *requests, rate=(300, None))
    assert server.at[-1] - server.at[0] > 0.4, "five at once, then five a second"


def test_the_budget_stops_calls_before_it_is_exceeded(serve: Serve) -> None:
    server, money = serve(), MoneyBudget(0.0034)
    requests = [
        request("describe", {**FACTS, "category": f"c{n}"}, model="m", parameters={"max_tokens": 100}) for n in range(9)
    ]
    found = send(server, *requests, price=PRICE, money=money, concurrency=1)
    assert any(isinstance(each, StopRun) for each in found) and any(isinstance(each, Reply) for each in found)
    assert 0 < money.spent <= 0.0034


def test_a_timeout_may_have_been_charged(serve: Serve) -> None:
    money = MoneyBudget()
    send(serve(faults=("timeout",), in_a_row=9), ASKED, price=PRICE, money=money, sends=2, timeout=0.2)
    assert money.spent > 2 * 200 * 10 / 1e6


def test_images_go_as_data_urls(serve: Serve, tmp_path: Path) -> None:
    pixels = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    asked = request("caption", FACTS, model="m", image=identify(tmp_path, "deep.png"))
    server = serve()
    assert only(send(server, asked, root=tmp_path)).status == "ok"
    url = server.bodies[0]["messages"][1]["content"][1]["image_url"]["url"]
    kind, _, data = url.partition(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64" and shown.size == (7, 5) and shown.mode == "RGB"
    assert "base64" not in str(asked.body), "the ledger keeps the hash only"
    Image.new("L", (7, 5)).save(tmp_path / "deep.png")
    error = failure(send(server, asked, root=tmp_path))
    assert isinstance(error, InputError) and "has changed" in str(error)


def test_a_key_is_required_only_by_openai(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        client.api_key(Server())
    assert only(send(serve(), ASKED)).status == "ok", "another server needs none"


@pytest.mark.parametrize("key", ["sk-a b", "sk-a\nb", "sk-\u00e9", "sk-\x7f"])
def test_a_malformed_key_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY: holds characters") as caught:
        client.api_key(Server(base_url="http://127.0.0.1:1/v1"))
    assert key not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-good\n")
    assert client.api_key(Server()) == "sk-good"


def test_a_long_message_is_cut_without_a_part_of_the_key_and_can_be_stored(serve: Serve) -> None:
    why = str(failure(send(serve(faults=("echo",)), ASKED)))
    assert SECRET[:4] not in why and "xxx" in why
    assert why.encode().decode() == why, "no half of a surrogate pair"


def test_the_key_appears_nowhere(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Some servers repeat the key in their errors; clients log headers on request."""
    caplog.set_level(logging.DEBUG)
    error = failure(send(serve(faults=("401",)), ASKED))
    assert "[OPENAI_API_KEY]" in str(error)
    send(serve(faults=("500", "drop"), in_a_row=99), ASKED, sends=2)
    send(serve(), ASKED)
    shown = str(error) + repr(error) + caplog.text + "".join(capfd.readouterr())
    assert SECRET not in shown
