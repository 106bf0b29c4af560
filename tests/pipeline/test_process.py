"""The processes of one run wait for each other with a line."""

import threading
from types import SimpleNamespace

import accelerate
import pytest

from geomcache import waits
from geomcache.pipeline.process import Process
from tests.support.logs import logged_lines


@pytest.mark.parametrize(("is_main", "text"), [(False, "main process"), (True, "other processes")])
def test_a_process_that_does_not_come_is_waited_for_with_a_line(
    monkeypatch: pytest.MonkeyPatch, is_main: bool, text: str
) -> None:
    arrives, order = threading.Event(), list[str]()

    def wait_for_everyone() -> None:
        threading.Timer(1.0, arrives.set).start()
        assert arrives.wait(30)
        order.append("met")

    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.2)
    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(wait_for_everyone=wait_for_everyone))
    with logged_lines() as lines, Process(is_main=is_main, count=2).main_first():
        order.append("block")
    assert order == (["block", "met"] if is_main else ["met", "block"])
    assert text in lines[0]


def test_one_process_waits_for_nobody() -> None:
    with Process().main_first():
        pass
