"""Check that one machine's POSIX lock keeps another machine out, as two tasks of a Slurm job: see check_locks.sh.

The first task locks a byte of a file in the folder and creates a file to say so; the second tries to lock the same byte
and creates a file when it is done. On a file system whose locks hold only on one machine (Lustre with localflock, NFS
with nolock) the second task gets the lock: jobs there would write the same shards, each unaware of the others.
"""

import argparse
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

WAIT_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    task, job = int(os.environ["SLURM_PROCID"]), os.environ["SLURM_JOB_ID"]
    lock, locked, tried = (folder / f".geomcache-locks-{job}.{name}" for name in ("lock", "locked", "tried"))
    if task == 0:
        return hold(lock, locked, tried)
    if task == 1:
        return attempt(lock, locked, tried)
    return 0


def hold(lock: Path, locked: Path, tried: Path) -> int:
    """Hold the lock until the other task has tried: the first task."""
    with lock.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            locked.touch()
            wait_for(tried)
        except OSError as error:
            print(f"{lock.parent}: expected POSIX locks, found none ({error.strerror})", file=sys.stderr)
            return 1
        finally:
            for path in (lock, locked, tried):
                path.unlink(missing_ok=True)
    return 0


def attempt(lock: Path, locked: Path, tried: Path) -> int:
    """Try the lock that the first task holds: the second task."""
    wait_for(locked)
    place = f"{lock.parent} on {socket.gethostname()}"
    with lock.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except (BlockingIOError, PermissionError):
            print(f"{place}: locks hold between machines: jobs may share a cache here")
            return 0
        finally:
            tried.touch()
    print(
        f"{place}: expected the other machine's lock to keep this one out, it did not: mount the file system with"
        " global locks (Lustre: -o flock), or extract on one machine",
        file=sys.stderr,
    )
    return 1


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise SystemExit(
                f"check_locks.py: expected {path} within {WAIT_S:g} s, found none: did the other task start?"
            )
        list(path.parent.iterdir())  # makes a network file system refresh the folder
        time.sleep(0.2)


if __name__ == "__main__":
    raise SystemExit(main())
