"""Waits: a line while they last, and none afterwards; the Hub's client has limits."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import huggingface_hub
import pytest

from geomcache import waits
from geomcache.waits import activity, hub_call, waiting
from tests.support.logs import logged_lines


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.1)


def wait_for(lines: list[str], count: int) -> None:
    for _ in range(200):
        if len(lines) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(lines)


def test_a_wait_has_lines_while_it_lasts() -> None:
    with logged_lines() as lines:
        with waiting("waiting for a made-up thing"):
            wait_for(lines, 2)
        count = len(lines)
        time.sleep(0.3)
        assert len(lines) == count
    assert all(line.startswith("waiting for a made-up thing (") for line in lines)


def test_a_short_wait_has_no_line_and_a_failed_one_ends() -> None:
    with logged_lines() as lines:
        with waiting("nothing"):
            pass
        with pytest.raises(ZeroDivisionError), waiting("nothing"):
            _ = 1 / 0
        time.sleep(0.3)
    assert lines == []


def test_waits_of_a_group_share_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "LINE_EVERY_S", 1000.0)
    assert waits._is_due("of this test")
    assert not waits._is_due("of this test")
    assert waits._is_due("another of this test")
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.0)
    assert waits._is_due("of this test")
    with logged_lines() as lines, waiting("transfer", group="a third of this test"):
        monkeypatch.setattr(waits, "LINE_EVERY_S", 0.1)
        wait_for(lines, 1)


def test_the_state_of_a_process_is_read() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for _ in range(200):
            if activity(busy.pid).cpu_s > 0.05:
                break
            time.sleep(0.05)
        assert activity(busy.pid).cpu_s > 0.05
        os.kill(busy.pid, signal.SIGSTOP)
        for _ in range(200):
            if activity(busy.pid).state == "T":
                break
            time.sleep(0.05)
        assert activity(busy.pid).state == "T"
    finally:
        busy.kill()
        busy.wait()
    assert activity(busy.pid) == ("", 0.0)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield address
    huggingface_hub.close_session()


def test_a_hub_that_does_not_answer_is_waited_for_with_a_line_and_then_an_error(
    silent_hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "HUB_ANSWER_S", 1.0)
    with logged_lines() as lines, pytest.raises(httpx.ReadTimeout), hub_call("made-up: waiting for the Hub"):
        huggingface_hub.HfApi(endpoint=silent_hub).repo_info("me/data", repo_type="dataset")
    assert lines[0].startswith("made-up: waiting for the Hub (")


def test_limits_that_a_request_has_are_kept() -> None:
    request = httpx.Request("GET", "http://hub", extensions={"timeout": {"connect": None, "read": 3.0}})
    waits._limit(request)
    waits._limit(request)
    assert request.extensions["timeout"] == {"connect": 10.0, "read": 3.0, "write": 90.0, "pool": None}


def test_limits_are_set_once() -> None:
    for _ in range(3):
        waits.limit_hub_requests()
    assert huggingface_hub.get_session().event_hooks["request"].count(waits._limit) == 1
