"""Who writes to an address: one driver at a time, which a lease names.

`lease/N.json` is created by the N-th driver, only if there is none: of two that try at once, one wins. Its holder
writes it again every 15 s. Another driver that finds a lease waits for 60 s: if it changes meanwhile, its holder is at
work, and the other one says so and ends; if not, its holder is gone, and the other one creates lease N + 1. Clocks of
two machines are never compared. A holder that could not write its lease for 40 s stops, before another takes over.

A lease alone does not keep out a driver that was stopped for long, and continues. But it creates objects as everybody
does, only if there are none: the journal's next line is the one of the driver that writes it first.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from typing import Any

from geomcache.errors import CacheLockedError, ConnectionFailedError, RemoteError
from geomcache.sharing.conditional import ConditionalRemote
from geomcache.waits import waiting

RENEW_S, FRESH_S, LEASE_S = 15.0, 40.0, 60.0
POLL_S = 5.0  # how often a lease is looked at that may be abandoned

FOLDER = "lease"
_NAME = re.compile(rf"{FOLDER}/([1-9][0-9]*)\.json")


def newest(names: set[str]) -> int:
    """Return the number of the last lease among the names of objects; 0 if there is none."""
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=0)


class Lease:
    """The right to write to an address, held by this process until `release` or `finish`.

    Raises:
        CacheLockedError: another driver has it.
        RemoteError: the store does not keep conditional writes, or refuses.
        ConnectionFailedError: the connection fails again and again.
    """

    def __init__(self, remote: ConditionalRemote) -> None:
        self._remote, self._lost, self._has_ended = remote, "", False
        self._content: dict[str, Any] = {
            "token": secrets.token_hex(16),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "renewal": 0,
            "released": False,
        }
        self._number = self._take()
        self._name = f"{FOLDER}/{self._number}.json"
        self._check_store()
        self._renewed = _clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="geomcache-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Require that this process still holds the lease.

        Raises:
            CacheLockedError: another driver has taken over.
            ConnectionFailedError: it could not be renewed in time.
        """
        if self._lost:
            raise CacheLockedError(self._lost)
        if (age := _clock() - self._renewed) > FRESH_S:
            raise ConnectionFailedError(
                f"{self._remote.address}/{self._name}: expected to renew it every {RENEW_S:g} s, could not for"
                f" {age:.0f} s: another driver may have taken over; run the same command again to resume"
            )

    def release(self, *, sealed: bool) -> None:
        """Say that this driver has ended, so that the next one need not wait; of a sealed cache no lease stays."""
        if self._has_ended:
            return
        with contextlib.suppress(RemoteError):  # what ended the driver is raised; the lease runs out by itself
            if sealed and not self._lost:
                self.finish()
                return
            self._stop()
            if not self._lost:
                self._content["released"] = True
                self._write()

    def finish(self) -> None:
        """Remove the leases: the cache is sealed."""
        self._stop()
        self._remote.remove(self._remote.names(FOLDER))

    def _take(self) -> int:
        last = newest(self._remote.names(FOLDER))
        if last:
            self._wait_for_the_end(last)
        content = self._encode()
        if not self._remote.create(f"{FOLDER}/{last + 1}.json", content):
            raise self._taken(self._read(last + 1))
        return last + 1

    def _wait_for_the_end(self, number: int) -> None:
        """Return when a lease has been released, or did not change for so long that its holder is gone."""
        first = self._read(number)
        if first is None or first.get("released"):
            return
        end = time.monotonic() + LEASE_S
        with waiting(f"{self._remote.address}: waiting to see whether {_describe(first)} is still at work on it"):
            while time.monotonic() < end:
                time.sleep(min(POLL_S, LEASE_S / 4))
                now = self._read(number)
                if now is None or now.get("released"):
                    return
                if now != first:
                    raise self._taken(now)

    def _check_store(self) -> None:
        """Require that the store refuses to create what exists: some that speak S3 ignore the condition."""
        other = self._encode() + b"\n"
        if self._remote.create(self._name, other):
            raise RemoteError(
                f"{self._remote.address}: expected a store with conditional writes (If-None-Match), found one that"
                " replaced an object which exists: two drivers could mix their work; extract to a path, then"
                " `geomcache push`"
            )

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_S):
            if _clock() - self._renewed > FRESH_S:  # this process was stopped, or the store did not answer
                return
            with contextlib.suppress(RemoteError):  # `check` raises when it has not been renewed for too long
                last = newest(self._remote.names(FOLDER))
                if last != self._number:
                    self._lost = str(self._taken(self._read(last) if last else None))
                    return
                self._content["renewal"] += 1
                began = _clock()
                self._write()
                self._renewed = began

    def _write(self) -> None:
        self._remote.replace(self._name, self._encode())

    def _encode(self) -> bytes:
        return json.dumps(self._content).encode()

    def _read(self, number: int) -> dict[str, Any] | None:
        content = self._remote.read(f"{FOLDER}/{number}.json")
        if content is None:
            return None
        try:
            lease = json.loads(content)
        except ValueError:
            lease = None
        if not isinstance(lease, dict):
            raise RemoteError(
                f"{self._remote.address}/{FOLDER}/{number}.json: expected the lease of a driver, found another object:"
                " choose another address"
            )
        return lease

    def _taken(self, holder: dict[str, Any] | None) -> CacheLockedError:
        who = "another driver" if holder is None else _describe(holder)
        return CacheLockedError(
            f"{self._remote.address}: expected no other driver, found {who}: wait until it has ended, or stop it; one"
            " driver writes to an address at a time"
        )

    def _stop(self) -> None:
        self._has_ended = True
        self._ended.set()
        with waiting(f"{self._remote.address}: waiting for the last renewal of the lease"):
            self._thread.join()


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}, which began at {holder.get('began')}"


def _clock() -> float:
    """Return seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
