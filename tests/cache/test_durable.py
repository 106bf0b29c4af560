"""File operations that last, and locks between processes."""

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache import durable, locks
from geomcache.errors import CacheLockedError, OutOfSpaceError
from tests.support.stores import Faults, output_of, run_python

HOLDER = """
import sys
from pathlib import Path
from geomcache.cache.locks import LockFile
lock = LockFile(Path(sys.argv[1]))
print(lock.claim(3), lock.claim(4), flush=True)
for line in sys.stdin:
    if line == "release 3\\n":
        lock.release(3)
        print("released", flush=True)
"""


def test_a_file_holds_its_parts_and_gives_their_size_and_hash(tmp_path: Path) -> None:
    parts = [b"abc", np.arange(6, dtype=np.uint8).reshape(2, 3)]
    nbytes, digest = durable.write_file(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"abc\0\1\2\3\4\5"
    assert (nbytes, digest) == (9, hashlib.sha256(b"abc\0\1\2\3\4\5").digest())


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "write", lambda descriptor, data: os.write(descriptor, data[:3]))
    durable.write_file(tmp_path / "file", [bytes(range(100)), b"end"])
    assert (tmp_path / "file").read_bytes() == bytes(range(100)) + b"end"
    monkeypatch.setattr(durable, "write", lambda descriptor, data: 0)
    with pytest.raises(OSError, match="a write of nothing.*file"):
        durable.write_file(tmp_path / "file", [b"abc"])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    faults = Faults(monkeypatch)
    faults.start(1, OSError(code, os.strerror(code)))
    with pytest.raises(OutOfSpaceError, match=r"file: expected room for it, found none \(.*\): free some"):
        durable.write_file(tmp_path / "file", [b"abc"])


def test_other_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    for at in range(3):  # open, write, fsync
        faults.start(at, OSError(errno.EIO, os.strerror(errno.EIO)))
        with pytest.raises(OSError, match="Input/output error") as caught:
            durable.write_file(tmp_path / "file", [b"abc"])
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == str(tmp_path / "file")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults, path = Faults(monkeypatch), tmp_path / "file"
    path.write_bytes(b"old")
    faults.start()
    durable.replace_file(path, b"new")
    for at in range(faults.count):
        path.write_bytes(b"old")
        faults.start(at, OSError(errno.EIO, "played"))
        with pytest.raises(OSError, match="played"):
            durable.replace_file(path, b"new")
        assert path.read_bytes() in (b"old", b"new")


def test_a_claim_keeps_other_processes_out_until_its_owner_gives_it_back_or_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other = run_python(HOLDER, path)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "True True\n"
    mine = locks.LockFile(path)
    assert (mine.claim(2), mine.claim(3), mine.claim(4)) == (True, False, False)
    assert not mine.claim_everything()
    other.stdin.write("release 3\n")
    other.stdin.flush()
    assert other.stdout.readline() == "released\n"
    assert (mine.claim(3), mine.claim(4)) == (True, False)
    other.kill()
    other.communicate()
    assert mine.claim(4)
    mine.close()


def test_the_journals_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    mine = locks.LockFile(path)
    script = """
import sys
from pathlib import Path
from geomcache.cache.locks import LockFile
lock = LockFile(Path(sys.argv[1]))
print(Path(sys.argv[2]).read_text())
"""
    with mine.exclusive():
        other = run_python(script, path, tmp_path / "note")
        with pytest.raises(Exception, match="timed out"):
            other.wait(timeout=1.0)
        (tmp_path / "note").write_text("written before the lock was free")
    assert output_of(other) == "written before the lock was free\n"
    mine.close()


def test_two_users_in_one_process_keep_each_other_out(tmp_path: Path) -> None:
    one, two = locks.LockFile(tmp_path / "lock"), locks.LockFile(tmp_path / "lock")
    assert (one.claim(0), two.claim(0), one.claim(0)) == (True, False, False)
    assert one.holds(0)
    assert not two.holds(0)
    assert not two.claim_everything()
    two.close()  # POSIX would drop the locks of both
    script = """
import sys
from pathlib import Path
from geomcache.cache.locks import LockFile
print(LockFile(Path(sys.argv[1])).claim(0))
"""
    assert output_of(run_python(script, tmp_path / "lock")) == "False\n"
    one.close()
    assert output_of(run_python(script, tmp_path / "lock")) == "True\n"


def test_everything_is_claimed_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    mine = locks.LockFile(path)
    assert mine.claim_everything()
    script = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    for byte in (0, 10**6, 1 << 40):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except BlockingIOError:
            print("held")
"""
    assert output_of(run_python(script, path)) == "held\nheld\nheld\n"
    mine.close()
    assert output_of(run_python(script, path)) == ""


def test_a_forked_child_has_none_of_its_parents_locks_and_cannot_drop_them(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from geomcache.cache.locks import LockFile
from geomcache.errors import CacheLockedError
mine = LockFile(Path(sys.argv[1]))
mine.claim(0)
if os.fork() == 0:
    try:
        mine.claim(1)
    except CacheLockedError as error:
        print(str(error).replace(str(os.getppid()), "PARENT").replace(str(os.getpid()), "CHILD"), flush=True)
    print(LockFile(Path(sys.argv[1])).claim(0), flush=True)
    mine.close()
    os._exit(0)
os.wait()
print("ready", flush=True)
sys.stdin.read()
"""
    path = tmp_path / "lock"
    process = run_python(script, path)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert "expected its use in process PARENT, which opened it, found process CHILD" in lines[0]
    assert lines[1:] == ["False\n", "ready\n"]
    mine = locks.LockFile(path)
    assert not mine.claim(0)
    output_of(process)
    assert mine.claim(0)
    mine.close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def lockf(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(CacheLockedError, match="lock: expected a file system with POSIX locks, found none"):
        locks.LockFile(tmp_path / "lock")
