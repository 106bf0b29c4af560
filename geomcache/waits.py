"""Say what is waited for, and let no request to the Hub wait for ever.

Whatever can last (a lock, another process, a disk, a network) is waited for inside `waiting`. docs/RELIABILITY.md lists
every wait, how it ends, and its test.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import httpx

LINE_EVERY_S = 30.0
HUB_CONNECT_S, HUB_ANSWER_S = 10.0, 90.0  # the Hub itself gives a commit 60 s

logger = logging.getLogger(__name__)

_logged: dict[str, float] = {}  # when a group had its last line
_logged_guard = threading.Lock()


@contextlib.contextmanager
def waiting(what: str | Callable[[], str], *, group: str | None = None) -> Iterator[None]:
    """Log every 30 s, from a thread, that the block is still waiting.

    Args:
        what: the line, which names what is waited for and the way out; or a function that returns it.
        group: waits of one group, such as parallel transfers, have one line in that time together.
    """
    ended, began = threading.Event(), time.monotonic()

    def log() -> None:
        while not ended.wait(LINE_EVERY_S):
            if group is None or _is_due(group):
                text = what if isinstance(what, str) else what()
                logger.warning("%s (%.0f s so far)", text, time.monotonic() - began)

    threading.Thread(target=log, name="geomcache-waiting", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _is_due(group: str) -> bool:
    with _logged_guard:
        now = time.monotonic()
        if now - _logged.get(group, 0.0) < LINE_EVERY_S / 2:
            return False
        _logged[group] = now
        return True


@contextlib.contextmanager
def hub_call(what: str) -> Iterator[None]:
    """Call the Hugging Face Hub: with a line every 30 s, and an error of httpx where it stops answering.

    Args:
        what: the line, such as ``dataset owner/name: waiting for the Hub``.
    """
    limit_hub_requests()
    with waiting(what, group="hub"):
        yield


def limit_hub_requests() -> None:
    """Give requests of huggingface_hub that have no time limit one: by default they wait for ever."""
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    if _limit not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _limit]}


def _limit(request: "httpx.Request") -> None:
    """Set the time limits that a request was made without, before it is sent."""
    limits = {"connect": HUB_CONNECT_S, "read": HUB_ANSWER_S, "write": HUB_ANSWER_S, "pool": None}
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = limits | {name: value for name, value in given.items() if value is not None}


class Activity(NamedTuple):
    """What a process does."""

    state: str
    """A letter, as in proc(5): R runs, S sleeps, D waits for a disk, T is stopped, Z has ended; empty if it is gone."""
    cpu_s: float
    """Processor time that it has used so far, user and system, seconds."""


def activity(pid: int | None) -> Activity:
    """Return what a process does now."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it is gone
        return Activity("", 0.0)
    return Activity(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
