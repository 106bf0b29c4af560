"""Sessions: one robot at a time, and which observation a chunk is predicted from."""

import threading
from typing import Any

import numpy as np
import pytest
from lerobot.async_inference.helpers import TimedObservation, observations_similar

from geomcache.errors import SessionError
from geomcache.serving.messages import Hello, Observation
from geomcache.serving.session import QUIET_S, Session

HELLO = Hello(joints=("x", "y"), cameras={}, actions_per_chunk=4, device="cpu")


def observation(timestep: int, *state: float, must_go: bool = False) -> Observation:
    values = np.array(state or (10.0 * timestep, 0.0), dtype=np.float32)
    return Observation(
        timestamp=0.0, timestep=timestep, must_go=must_go, state=values, values=dict(zip("xy", values, strict=True))
    )


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def connected(clock: Any = None) -> Session:
    session = Session(clock or Clock())
    session.begin("A")
    session.introduce("A", HELLO)
    return session


def test_a_hello_comes_first() -> None:
    session = Session(Clock())
    for request in (
        lambda: session.introduce("A", HELLO),
        lambda: session.hello("A"),
        lambda: session.offer("A", observation(0)),
        lambda: session.take("A", 0),
    ):
        with pytest.raises(SessionError, match="hello of A"):
            request()
    session.begin("A")
    with pytest.raises(SessionError, match="SendPolicyInstructions"):
        session.hello("A")
    session.introduce("A", HELLO)
    assert session.hello("A") is HELLO


def test_the_newest_observation_waits_and_is_taken_once() -> None:
    session = connected()
    assert [session.offer("A", observation(step)) for step in (0, 4, 9)] == [True] * 3
    taken = session.take("A", 0)
    assert taken is not None
    assert taken.timestep == 9
    assert session.take("A", 0) is None


def test_old_repeated_and_similar_observations_are_left_out() -> None:
    session = connected()
    assert session.offer("A", observation(5))
    assert not session.offer("A", observation(4))  # older than the one that waits
    taken = session.take("A", 0)
    assert taken is not None
    session.predicted("A", taken)
    assert not session.offer("A", observation(5))  # a chunk was predicted from it
    assert not session.offer("A", observation(3))
    assert not session.offer("A", observation(6, 50.5, 0.0))  # the robot has hardly moved
    assert session.offer("A", observation(6, 51.5, 0.0))
    assert session.offer("A", observation(6, 50.0, 0.0, must_go=True))  # the robot has no action left


@pytest.mark.parametrize("state", [(0.99, 0.0), (1.01, 0.0), (0.7, 0.7), (0.8, 0.8)])
def test_alike_is_what_lerobot_finds_alike(state: tuple[float, float]) -> None:
    features = {"observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}}
    theirs = [
        TimedObservation(timestamp=0.0, timestep=0, observation=dict(zip("xy", values, strict=True)))
        for values in ((0.0, 0.0), state)
    ]
    session = connected()
    session.predicted("A", observation(1, 0.0, 0.0))
    assert session.offer("A", observation(2, *state)) is not observations_similar(*theirs, lerobot_features=features)


def test_an_observation_whose_chunk_failed_does_not_count() -> None:
    session = connected()
    session.offer("A", observation(5))
    assert session.take("A", 0) is not None  # and predicting from it fails
    assert session.offer("A", observation(5))


def test_a_second_robot_is_refused_until_the_first_is_silent() -> None:
    clock = Clock()
    session = connected(clock)
    clock.now = QUIET_S - 0.1
    with pytest.raises(SessionError, match="A is connected"):
        session.begin("B")
    session.offer("A", observation(0))  # the first one lives
    clock.now += QUIET_S - 0.1
    with pytest.raises(SessionError, match="A is connected"):
        session.begin("B")
    clock.now += 0.2
    assert session.begin("B") == "A"
    with pytest.raises(SessionError, match="B is connected"):
        session.offer("A", observation(1))
    session.introduce("B", HELLO)
    assert session.take("B", 0) is None  # nothing of the first robot's is left


def test_a_robot_that_says_hello_again_starts_afresh() -> None:
    session = connected()
    session.offer("A", observation(8))
    taken = session.take("A", 0)
    assert taken is not None
    session.predicted("A", taken)
    assert session.begin("A") is None
    session.introduce("A", HELLO)
    assert session.offer("A", observation(0))


def test_a_robot_that_waits_when_its_session_ends_is_told() -> None:
    clock = Clock()
    session = connected(clock)
    waiting = threading.Event()
    told: list[str] = []

    def wait() -> None:
        waiting.set()
        try:
            session.take("A", 30)
        except SessionError as error:
            told.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(10)
    while not told:  # it may not wait yet
        clock.now += QUIET_S + 1
        session.begin("B")
        thread.join(0.1)
        session.begin("B")
    thread.join(10)
    assert "B is connected" in told[0]


def test_a_chunk_of_an_ended_session_is_not_given_out() -> None:
    clock = Clock()
    session = connected(clock)
    session.offer("A", observation(0))
    taken = session.take("A", 0)
    assert taken is not None
    clock.now += QUIET_S + 1
    session.begin("B")
    with pytest.raises(SessionError):
        session.predicted("A", taken)
