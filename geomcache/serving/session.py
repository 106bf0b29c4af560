"""Who is connected, and which observation is predicted from next. No gRPC and no policy in here.

One robot acts at a time. A session is a connection's: it begins with a hello, and ends with the next one. A robot that
comes back over a new connection says hello again, and its first observation starts afresh.

Of the observations that arrive while a chunk is predicted, the newest one waits; those before it are left out, as
LeRobot's server does. Left out are also old ones, repeated ones, and those that are like the last one that a chunk was
predicted from, unless the robot has no action left (`must_go`).
"""

import threading
import time
from collections.abc import Callable

import numpy as np

from geomcache.errors import SessionError
from geomcache.serving.messages import Hello, Observation

QUIET_S = 5.0
"""A robot that has asked for nothing for so long has gone: another may connect."""
SIMILAR = 1.0
"""Distance of two states below which observations are alike: `observations_similar` of LeRobot's async_inference."""


class Session:
    """The connection of one robot. Threads share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without a robot; `clock` gives seconds."""
        self._clock = clock
        self._changed = threading.Condition()
        self._peer: str | None = None
        self._hello: Hello | None = None
        self._last_seen = 0.0
        self._waiting: Observation | None = None
        self._predicted: Observation | None = None

    def begin(self, peer: str) -> str | None:
        """Begin the session of a connection; what an earlier one left is dropped.

        Returns:
            The connection whose session ended by this, if another one's did.

        Raises:
            SessionError: another robot is connected.
        """
        with self._changed:
            silent = self._clock() - self._last_seen
            if self._peer not in (None, peer) and silent < QUIET_S:
                raise SessionError(
                    f"session: expected one robot at a time, {self._peer} is connected and asked {silent:.1f} s ago:"
                    f" stop that client, or wait until it has been silent for {QUIET_S:g} s"
                )
            before, self._peer = self._peer, peer
            self._hello = self._waiting = self._predicted = None
            self._last_seen = self._clock()
            self._changed.notify_all()
            return before if before != peer else None

    def introduce(self, peer: str, hello: Hello) -> None:
        """Keep what the robot has said that it has.

        Raises:
            SessionError: the session is another connection's.
        """
        with self._changed:
            self._check(peer)
            self._hello = hello
            self._waiting = self._predicted = None

    def hello(self, peer: str) -> Hello:
        """Return what the robot of this connection has said.

        Raises:
            SessionError: it has said nothing yet, or the session is another connection's.
        """
        with self._changed:
            self._check(peer)
            if self._hello is None:
                raise SessionError(
                    "session: expected the robot's features first (SendPolicyInstructions): start the client again"
                )
            return self._hello

    def offer(self, peer: str, observation: Observation) -> bool:
        """Let an observation wait, unless it is left out.

        Returns:
            Whether it waits.

        Raises:
            SessionError: the session is another connection's.
        """
        with self._changed:
            self._check(peer)
            if not self._is_news(observation):
                return False
            self._waiting = observation
            self._changed.notify_all()
            return True

    def take(self, peer: str, timeout: float) -> Observation | None:
        """Return the observation that waits, and let none wait; None if none came in time.

        Raises:
            SessionError: the session is another connection's, or has become one's meanwhile.
        """
        with self._changed:
            self._check(peer)
            self._changed.wait_for(lambda: self._waiting is not None or self._peer != peer, timeout)
            self._check(peer)
            observation, self._waiting = self._waiting, None
            return observation

    def predicted(self, peer: str, observation: Observation) -> None:
        """Note that a chunk was predicted from an observation.

        Raises:
            SessionError: the session has become another connection's meanwhile.
        """
        with self._changed:
            self._check(peer)
            self._predicted = observation

    def _check(self, peer: str) -> None:
        if self._peer != peer:
            other = "no robot is connected" if self._peer is None else f"{self._peer} is connected"
            raise SessionError(f"session: expected a hello of {peer} first, {other}: start the client again")
        self._last_seen = self._clock()

    def _is_news(self, observation: Observation) -> bool:
        if self._waiting is not None and observation.timestep < self._waiting.timestep:
            return False
        last = self._predicted
        if last is None or observation.must_go:
            return True
        return observation.timestep > last.timestep and not _are_alike(observation, last)


def _are_alike(one: Observation, other: Observation) -> bool:
    return bool(np.linalg.norm(one.state - other.state) < SIMILAR)
