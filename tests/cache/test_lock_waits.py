"""The locks of a cache, while the process that holds them is stopped."""

import os
import signal
import threading
from pathlib import Path

import pytest

from geomcache import waits
from geomcache.cache import locks
from tests.support.logs import logged_lines
from tests.support.stores import run_python

JOURNAL = """
import sys
from pathlib import Path
from geomcache.cache.locks import LockFile
with LockFile(Path(sys.argv[1])).exclusive():
    print("locked", flush=True)
    sys.stdin.read()
"""
REPLACES = """
import sys
from pathlib import Path
from geomcache.cache.locks import LockFile
lock = LockFile(Path(sys.argv[1]))
assert lock.claim_everything()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("program", [JOURNAL, REPLACES], ids=["in a commit", "in a replacement"])
def test_a_stopped_process_that_holds_a_lock_is_waited_for_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.2)
    other = run_python(program, path)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    os.kill(other.pid, signal.SIGSTOP)
    threading.Timer(1.0, other.kill).start()
    with logged_lines() as lines:
        mine = locks.LockFile(path)
        with mine.exclusive():
            assert other.wait(20) == -signal.SIGKILL
        count = len(lines)
        assert count > 1
        assert all(line.startswith(f"{path}: ") for line in lines)
        with mine.exclusive():  # a free lock is taken without a line
            pass
        assert len(lines) == count
    mine.close()
    other.communicate()
