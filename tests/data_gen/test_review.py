"""The review page's server and what its requests mean: decisions, undo, edits under the rules, and who may ask."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_gen.core.items import Decision
from data_gen.ledger.ledger import Ledger
from data_gen.publishing.review_api import MOST_BYTES, PAGE, ReviewServer
from data_gen.publishing.review_session import ReviewSession
from data_gen.review import main
from medisee.foundation.errors import InputError, exit_code

LedgerMaker = Callable[..., Path]
SHORT = "case0_0/liver#first-attribute-short"
GOOD_QUESTION = "Which organ of the belly makes bile?"
GOOD_ANSWER = "It is the liver, because the liver makes bile for the digestion of fat."


@dataclass(frozen=True)
class Site:
    """A running server, and requests to it as the page sends them."""

    server: ReviewServer
    ledger: Ledger

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        own = {"X-Review-Token": self.server.token, "Content-Type": "application/json"}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, {**own, **given})
            reply = connection.getresponse()
            try:
                return reply.status, reply.read()
            except ConnectionResetError:  # the server closes with a refused body unread
                return reply.status, b""
        finally:
            connection.close()

    def get(self, path: str) -> dict[str, Any]:
        status, body = self.send("GET", path)
        assert status == 200, body
        return json.loads(body)

    def decide(self, pair: str, verdict: str, **more: str) -> tuple[int, dict[str, Any]]:
        status, body = self.send("POST", "/api/decide", {"pair": pair, "verdict": verdict, **more})
        return status, json.loads(body)

    def undo(self) -> tuple[int, dict[str, Any]]:
        status, body = self.send("POST", "/api/undo", {})
        return status, json.loads(body)


@contextmanager
def site_of(path: Path, reviewer: str = "anna", **more: Any) -> Iterator[Site]:
    with Ledger(path) as ledger:
        server = ReviewServer(ReviewSession(ledger, reviewer, **more), 0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield Site(server, ledger)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def site(make_ledger: LedgerMaker) -> Iterator[Site]:
    with site_of(make_ledger()) as running:
        yield running


def number_of(site: Site, pair: str) -> int:
    count = site.get("/api/state")["items"]
    return next(n for n in range(count) if pair in [p["id"] for p in site.get(f"/api/items/{n}")["pairs"]])


def test_state_and_items(site: Site) -> None:
    state = site.get("/api/state")
    assert {key: state[key] for key in ("reviewer", "items", "pairs", "done")} == {
        "reviewer": "anna",
        "items": 10,
        "pairs": 40,
        "done": 0,
    }
    assert state["open"] == list(range(10))
    item = site.get(f"/api/items/{number_of(site, SHORT)}")
    assert (item["category"], item["others"], item["width"], item["height"]) == ("liver", ["spleen"], 48, 32)
    assert len(item["pairs"]) == 4 and all(pair["mine"] is None for pair in item["pairs"])


def test_a_decision_is_in_the_ledger_when_the_page_hears_of_it(site: Site) -> None:
    status, told = site.decide(SHORT, "accept")
    assert (status, told["done"], told["mine"]["verdict"]) == (200, 1, "accept")
    assert site.ledger.decisions() == [Decision(SHORT, "anna", "accept")]
    site.decide(SHORT, "reject", reason="  medically   wrong ")
    assert site.ledger.decisions() == [Decision(SHORT, "anna", "reject", "medically wrong")]
    assert site.get("/api/state")["done"] == 1


def test_a_new_session_goes_on_where_the_last_one_ended(make_ledger: LedgerMaker) -> None:
    path = make_ledger()
    with site_of(path) as first:
        number = number_of(first, SHORT)
        for pair in first.get(f"/api/items/{number}")["pairs"]:
            first.decide(pair["id"], "accept")
    with site_of(path) as second:
        state = second.get("/api/state")
        assert state["done"] == 4 and number not in state["open"] and len(state["open"]) == 9
    with site_of(path, "ben") as other:
        assert other.get("/api/state")["done"] == 0


def test_undo_takes_back_one_at_a_time(site: Site) -> None:
    site.decide(SHORT, "accept")
    site.decide(SHORT, "reject", reason="slip")
    status, told = site.undo()
    assert (status, told["verdict"], told["done"], told["item"]) == (200, "reject", 1, number_of(site, SHORT))
    assert site.ledger.decisions() == [Decision(SHORT, "anna", "accept")]
    assert site.undo()[1]["done"] == 0
    assert site.ledger.decisions() == []
    assert site.undo() == (422, {"error": "there is nothing to undo"})


def test_undo_leaves_other_reviewers_alone(site: Site) -> None:
    site.ledger.decide(Decision(SHORT, "ben", "accept"))
    assert site.undo()[0] == 422
    assert len(site.ledger.decisions()) == 1


def test_edits_must_keep_the_rules(site: Site) -> None:
    status, told = site.decide(SHORT, "edit", question="Where is the liver in this image?", answer=GOOD_ANSWER)
    assert status == 422 and "names_target" in [breach["rule"] for breach in told["breaches"]]
    assert site.ledger.decisions() == []
    status, told = site.decide(SHORT, "edit", question=f" {GOOD_QUESTION}\n", answer=GOOD_ANSWER)
    assert (status, told["mine"]["question"]) == (200, GOOD_QUESTION)
    (decision,) = site.ledger.decisions()
    assert (decision.verdict, decision.question, decision.answer) == ("edit", GOOD_QUESTION, GOOD_ANSWER)


def test_the_early_turns_of_a_conversation_have_their_own_rules(make_ledger: LedgerMaker) -> None:
    with site_of(make_ledger(style="multi-turn")) as site:
        turn, last = "case0_0/liver#first-attribute-short-t1", "case0_0/liver#first-attribute-short-t3"
        words = {"question": "What do we see?", "answer": "A slice of the upper belly."}
        assert site.decide(turn, "edit", **words)[0] == 200
        assert site.decide(last, "edit", **words)[0] == 422
        item = site.get(f"/api/items/{number_of(site, turn)}")
        assert [pair["turn"] for pair in item["pairs"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"pair": SHORT, "verdict": "maybe"}, 400, "verdict"),
        ({"pair": SHORT, "verdict": "accept", "reviewer": "ben"}, 400, "reviewer"),
        ({"pair": 3, "verdict": "accept"}, 400, "pair"),
        ({"pair": SHORT, "verdict": "reject", "reason": "x" * 501}, 400, "reason"),
        ({"pair": SHORT, "verdict": "reject", "reason": " "}, 422, "needs a reason"),
        ({"pair": "nobody's", "verdict": "accept"}, 404, "not among those to review"),
        ([], 400, "DecisionBody"),
        (
            {"pair": SHORT, "verdict": "edit", "question": GOOD_QUESTION, "answer": "I'm sorry, I can't help."},
            422,
            "refused",
        ),
        (b'{"verdict": "accept", "verdict": "reject"}', 400, "twice"),
        (b'{"pair": "\\ud800"}', 400, "\\\\ud800"),
        (b"[" * 60_000, 400, "nested too deeply"),
        (b'{"pair": NaN}', 400, "NaN"),
        (b"{", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
    ],
)
def test_wrong_decisions_are_refused(site: Site, body: Any, status: int, told: str) -> None:
    found, reply = site.send("POST", "/api/decide", body)
    assert found == status
    assert told in reply.decode()
    assert site.ledger.decisions() == []


def test_an_edit_that_changes_nothing_is_refused(site: Site) -> None:
    pair = next(one for one in site.ledger.pairs() if one.id == SHORT)
    status, told = site.decide(SHORT, "edit", question=pair.question, answer=pair.answer)
    assert (status, told["error"]) == (422, "nothing was changed: accept it instead")


def test_pictures_fit_over_each_other(site: Site) -> None:
    number = number_of(site, SHORT)
    image, mask = (
        Image.open(io.BytesIO(site.send("GET", f"/api/items/{number}/{kind}")[1])) for kind in ("image", "mask")
    )
    assert image.size == (48, 32)
    assert mask.size[0] >= 640 and mask.size[0] * 32 == mask.size[1] * 48
    alpha = np.asarray(mask)[..., 3]
    scale = mask.size[0] // 48
    assert alpha[5 * scale, 10 * scale] > 0 and alpha[1 * scale, 40 * scale] == 0
    assert alpha.max() == 255


def test_a_missing_picture_is_told(site: Site, tmp_path: Path) -> None:
    (tmp_path / "pictures/slices/case0_0.png").unlink()
    status, body = site.send("GET", f"/api/items/{number_of(site, SHORT)}/image")
    assert status == 409 and "case0_0.png" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/items/10",
        "/api/items/10/image",
        "/api/items/-1",
        "/api/items/0/../../secret",
        "/api/items/0/image/../../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/api/items/0/other",
        "/api/items/99999999999999",
        "/favicon.ico",
    ],
)
def test_there_is_nothing_else(site: Site, path: str) -> None:
    assert site.send("GET", path)[0] == 404


@pytest.mark.parametrize("token", ["", "wrong", "é" * 8])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/state"), ("GET", "/api/items/0/image"), ("POST", "/api/undo")]
)
def test_nothing_without_the_token(site: Site, token: str, method: str, path: str) -> None:
    status, body = site.send(method, path, {} if method == "POST" else None, X_Review_Token=token)
    assert status == 403 and b"token" in body and b"liver" not in body


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:80"])
def test_a_name_that_is_made_to_point_here_is_refused(site: Site, host: str) -> None:
    assert site.send("GET", "/", Host=host)[0] == 421
    assert site.send("POST", "/api/undo", {}, Host=host)[0] == 421


def test_pages_of_other_sites_may_not_ask(site: Site) -> None:
    own = f"http://127.0.0.1:{site.server.port}"
    assert site.send("GET", "/api/state", Origin=own)[0] == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert site.send("GET", "/api/state", Origin=origin)[0] == 403
    # A form of another site can send text/plain without asking first.
    assert site.send("POST", "/api/undo", {}, Content_Type="text/plain")[0] == 415


def test_large_and_unmeasured_bodies_are_refused(site: Site) -> None:
    assert site.send("POST", "/api/decide", b" " * (MOST_BYTES + 1))[0] == 413
    # h11 itself refuses it, and closes the connection: a body left unread would reset it before the answer is read.
    assert site.send("POST", "/api/decide", b"", Content_Length="-5")[0] == 400
    assert site.send("POST", "/api/decide", b"", Transfer_Encoding="chunked")[0] == 411
    assert site.send("PUT", "/api/decide", b"{}")[0] == 501


def test_the_page_brings_its_own_scripts_and_no_others(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.server.port)
    connection.request("GET", "/")  # the page itself holds nothing, so it needs no token
    reply = connection.getresponse()
    page, policy = reply.read().decode(), reply.headers["Content-Security-Policy"]
    connection.close()
    assert "default-src 'none'" in policy and "unsafe" not in policy
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2 and "{{nonce}}" not in page
    assert reply.headers["X-Frame-Options"] == "DENY" and reply.headers["Cache-Control"] == "no-store"
    assert "http://" not in page and "https://" not in page
    assert site.server.token not in page


def test_the_page_never_reads_texts_as_html() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert not [
        word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(") if word in page
    ]


def test_only_this_machine_can_reach_it(site: Site) -> None:
    assert site.server.socket.getsockname()[0] == "127.0.0.1"
    assert site.server.url.endswith(f":{site.server.port}/#{site.server.token}")


def test_agreement_is_shown_to_those_it_is_about(site: Site) -> None:
    site.ledger.decide(Decision(SHORT, "ben", "reject", "wrong"))
    site.ledger.decide(Decision(SHORT, "carl", "accept"))
    assert site.get("/api/agreement") == {"agreement": []}
    site.decide(SHORT, "accept")
    found = site.get("/api/agreement")["agreement"]
    assert [(one["first"], one["second"], one["raw"]) for one in found] == [("anna", "ben", 0.0), ("anna", "carl", 1.0)]


def test_a_share_is_of_images_and_the_same_for_all(make_ledger: LedgerMaker) -> None:
    path = make_ledger()

    def chosen(share: float, seed: int = 0, reviewer: str = "anna") -> list[str]:
        with Ledger(path) as ledger:
            api = ReviewSession(ledger, reviewer, share=share, seed=seed)
            return [api.item(n)["pairs"][0]["id"] for n in range(api.state()["items"])]

    assert len(chosen(0.25)) == 3
    assert chosen(0.25) == chosen(0.25, reviewer="ben") == chosen(1.0)[:3]
    assert chosen(1.0) != chosen(1.0, seed=1)


def test_undo_of_a_pair_outside_the_share(make_ledger: LedgerMaker) -> None:
    path = make_ledger()
    with site_of(path, share=0.1) as site:
        inside = site.get("/api/items/0")["pairs"][0]["id"]
        other = next(pair.id for pair in site.ledger.pairs() if pair.item not in inside)
        site.ledger.decide(Decision(other, "anna", "accept"))
        assert site.undo() == (200, {"done": 0, "pair": other, "item": None, "verdict": "accept"})


def test_bad_input(make_ledger: LedgerMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str | Path) -> str:
        assert exit_code(main, [str(word) for word in argv]) == 2
        return capsys.readouterr().err

    path = make_ledger()
    told = refused("--ledger", path, "--reviewer", " a\n", "--share", "0", "--port", "70000")
    assert all(word in told for word in ("--reviewer", "--share 0.0", "--port 70000"))
    assert "--share nan" in refused("--ledger", path, "--reviewer", "a", "--share", "nan")
    assert "no such ledger" in refused("--ledger", tmp_path / "none", "--reviewer", "a")
    with Ledger(tmp_path / "empty.sqlite", create=True):
        pass
    assert "holds no items yet" in refused("--ledger", tmp_path / "empty.sqlite", "--reviewer", "a")
    with site_of(path) as site:
        port = str(site.server.port)
        assert f"--port {port}: cannot be used" in refused("--ledger", path, "--reviewer", "a", "--port", port)


def test_words_that_may_still_change_are_not_shown(make_ledger: LedgerMaker) -> None:
    path = make_ledger(cases=2, settled=False)
    with Ledger(path) as ledger:
        with pytest.raises(InputError, match="have not been compared with each other"):
            ReviewSession(ledger, "anna")
        ledger.mark_deduplicated([], [])
        first = ledger.items()[0]
        late = replace(ledger.pairs()[0], id=f"{first.id}#late", question="Which late one is not settled yet?")
        ledger.finish(first.id, "other style", [late], []).result()
        api = ReviewSession(ledger, "anna")
        shown = {pair["id"] for number in range(4) for pair in api.item(number)["pairs"]}
        assert late.id not in shown and len(shown) == api.total == 16


def test_a_ledger_without_pairs_has_nothing_to_review(make_ledger: LedgerMaker) -> None:
    with Ledger(make_ledger(cases=1)) as ledger:
        item = ledger.items()[0]
        ledger.mark_deduplicated([], [])
        empty = ledger.path.with_name("no_pairs.sqlite")
        with Ledger(empty, create=True) as other:
            other.add_items([item], ledger.root(), complete=True)
            with pytest.raises(InputError, match="holds no pair to review"):
                ReviewSession(other, "anna")
