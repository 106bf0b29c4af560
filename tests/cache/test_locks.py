"""Locks between processes: claims, the journal's lock, and who has a cache open."""

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from geomcache.cache import locks
from geomcache.errors import CacheLockedError
from tests.support.stores import output_of, run_python

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
with LockFile(Path(sys.argv[1])).exclusive():
    print(Path(sys.argv[2]).read_text())
"""
    with mine.exclusive():
        other = run_python(script, path, tmp_path / "note")
        with pytest.raises(subprocess.TimeoutExpired):
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
    for byte in (0, 10**6, 1 << 40, (1 << 40) + 1):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except BlockingIOError:
            print("held")
"""
    assert output_of(run_python(script, path)) == 4 * "held\n"
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
    assert "PARENT" in lines[0]
    assert "CHILD" in lines[0]
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
    with pytest.raises(CacheLockedError, match=f"{tmp_path}/lock: .*POSIX locks.*{os.strerror(code)}"):
        locks.LockFile(tmp_path / "lock")


OPENER = """
import sys
from pathlib import Path
from geomcache.cache.locks import LockFile
print("start", flush=True)
lock = LockFile(Path(sys.argv[1]))
print("open", lock.claim(0), Path(sys.argv[1]).stat().st_size, flush=True)  # to read it would drop the locks
sys.stdin.read()
"""


def test_everything_is_not_claimed_while_anybody_has_the_file_open(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other = run_python(OPENER, path)
    assert other.stdout is not None
    path.touch()
    assert [other.stdout.readline() for _ in range(2)] == ["start\n", "open True 0\n"]
    mine = locks.LockFile(path)
    assert not mine.claim_everything()
    mine.close()
    output_of(other)
    mine = locks.LockFile(path)
    assert mine.claim_everything()
    with pytest.raises(CacheLockedError, match=str(path)):  # a second user in the process would drop the locks
        locks.LockFile(path)
    mine.close()
    locks.LockFile(path).close()


def test_a_file_that_is_replaced_while_it_is_waited_for_is_opened_anew(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / "lock").write_text("")
    (tmp_path / "new" / "lock").write_text("new")
    mine = locks.LockFile(tmp_path / "old" / "lock")
    assert mine.claim_everything()
    other = run_python(OPENER, tmp_path / "old" / "lock")
    assert other.stdout is not None
    assert other.stdout.readline() == "start\n"
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(timeout=0.5)
    (tmp_path / "old").rename(tmp_path / "gone")
    (tmp_path / "new").rename(tmp_path / "old")
    mine.close()
    assert output_of(other) == "open True 3\n"


def test_a_folder_that_is_removed_while_its_lock_is_waited_for_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    mine = locks.LockFile(tmp_path / "folder" / "lock")
    assert mine.claim_everything()
    other = run_python(OPENER, tmp_path / "folder" / "lock")
    assert other.stdout is not None
    assert other.stdout.readline() == "start\n"
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(timeout=0.5)
    (tmp_path / "folder" / "lock").unlink()
    (tmp_path / "folder").rmdir()
    mine.close()
    _, errors = other.communicate(timeout=60)
    assert "FileNotFoundError" in errors
    assert not (tmp_path / "folder").exists()


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="lock"):
        locks.LockFile(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()
