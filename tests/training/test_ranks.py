"""What launchers leave in the environment: ranks, or a sentence at once."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from medisee.foundation.errors import InputError
from medisee.training import ranks
from medisee.training.ranks import join_ranks, world_from_environment

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 0, 1)),
        ({"RANK": "0"}, (0, 0, 1)),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, (0, 0, 1)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, (5, 1, 8)),
    ],
)
def test_ranks(values: dict[str, str], expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, **values)
    assert world_from_environment() == expected


@pytest.mark.parametrize(
    "values",
    [
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "0", "RANK": "0"},
        {"LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "one", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1.5"},
    ],
)
def test_what_no_launcher_sets_is_told_at_once(values: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, **values)
    with pytest.raises(InputError) as caught:
        join_ranks()
    message = str(caught.value)
    assert all(f"{name}={value}" in message for name, value in values.items())
    assert f"unset {' '.join(name for name in NAMES if name in values)}." in message


def test_a_missing_deepspeed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    monkeypatch.setattr(ranks, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="need deepspeed; run pip install"):
        join_ranks()


def test_ranks_that_do_not_meet_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ranks, "find_spec", lambda name: True)
    monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=1))
    both = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for changes in ({"MASTER_PORT": port}, {"MASTER_PORT": "many"}, {}):
            environment(monkeypatch, **both, **changes)
            with pytest.raises(InputError, match=r"rank 0 of 2 cannot reach the others .*set another MASTER_PORT"):
                join_ranks()
    environment(monkeypatch, **both, MASTER_PORT=port)
    with pytest.raises(InputError, match="start as many ranks as WORLD_SIZE says"):
        join_ranks()
    assert f"waiting for 2 ranks at 127.0.0.1:{port}" in capsys.readouterr().out
