"""The reader of pickles: LeRobot's messages as the unpickler reads them, everything else refused, nothing run."""

import io
import pickle
import random
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation

from geomcache.errors import RequestError
from geomcache.serving.pickled import MAX_OPERATIONS, Record, read
from tests.support.hostile import hostile_messages, mutated
from tests.support.mockrobot import scripted


def observation(side: int = 8, **more: Any) -> TimedObservation:
    values = {**scripted(3, side), "task": "pick up the cube", **more}
    return TimedObservation(timestamp=1.5, timestep=7, observation=values, must_go=True)


def policy_config() -> RemotePolicyConfig:
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x.pos", "y.pos"]},
        "observation.images.front": {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channels"]},
    }
    return RemotePolicyConfig("pi05_geometry", "a/b", features, 10)


@pytest.mark.parametrize("protocol", [4, 5])
def test_an_observation_is_read_as_it_was_sent(protocol: int) -> None:
    sent = observation(number=np.float32(0.1), whole=np.int64(-3), high=2**40, low=-1)
    record = read(pickle.dumps(sent, protocol=protocol))
    assert record.name == "TimedObservation"
    assert {name: record.fields[name] for name in ("timestamp", "timestep", "must_go")} == {
        "timestamp": 1.5,
        "timestep": 7,
        "must_go": True,
    }
    values = record.fields["observation"]
    assert values.keys() == sent.observation.keys()
    for name, value in sent.observation.items():
        if isinstance(value, np.ndarray):
            assert values[name].dtype == value.dtype
            np.testing.assert_array_equal(values[name], value)
        else:
            assert values[name] == value, name


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8", "i8", "f2"])
def test_arrays_of_every_layout(protocol: int, dtype: str) -> None:
    straight = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    for array in (straight, np.asfortranarray(straight), straight[:, ::2], straight.T, straight[0, 0, 0:1]):
        values = read(pickle.dumps(observation(array=array), protocol=protocol)).fields["observation"]
        np.testing.assert_array_equal(values["array"], array)


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_hello_is_read_as_it_was_sent(protocol: int) -> None:
    record = read(pickle.dumps(policy_config(), protocol=protocol))
    assert (record.name, record.fields) == ("RemotePolicyConfig", vars(policy_config()))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3),
        np.array([object()], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.zeros(3, dtype=">f4"),
        np.array(["text"]),
        {1, 2},
        1j,
        Path("/etc/passwd"),
        print,
        observation,
        np.zeros((1, 1, 1, 1, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_robot_sends_is_refused(value: Any) -> None:
    with pytest.raises(RequestError):
        read(pickle.dumps(observation(value=value)))


@pytest.mark.parametrize("value", [1, [1], {"a": 1}, "text", None, (policy_config(),)])
def test_a_message_is_one_of_lerobots_two(value: Any) -> None:
    with pytest.raises(RequestError, match="TimedObservation"):
        read(pickle.dumps(value))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_older_protocols_are_refused(protocol: int) -> None:
    with pytest.raises(RequestError):
        read(pickle.dumps(observation(), protocol=protocol))


def test_every_message_that_is_cut_off_is_refused() -> None:
    whole = pickle.dumps(observation(side=2))
    for length in range(len(whole)):
        with pytest.raises(RequestError):
            read(whole[:length])


def test_a_message_of_too_many_operations_is_refused() -> None:
    lists = [[] for _ in range(MAX_OPERATIONS)]  # type: list[list[None]]
    with pytest.raises(RequestError, match=str(MAX_OPERATIONS)):
        read(pickle.dumps(observation(lists=lists)))


class Watch:
    """Counts what an unpickler would have done: Python tells every import, open, system call and exec of code."""

    EVENTS = ("import", "open", "exec", "compile", "os.system", "os.exec", "subprocess.Popen", "pickle.find_class")

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # there for the rest of the process

    def _hook(self, event: str, _arguments: Any) -> None:
        if self.on and event in self.EVENTS:
            self.seen.append(event)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile messages would write."""
    file = tmp_path / "executed"
    yield file
    assert not file.exists()


def test_hostile_messages_are_refused_and_not_run(planted: Path, watch: Watch) -> None:
    hostile = hostile_messages(planted)
    assert len(hostile) > 15
    for name, message in hostile.items():
        watch.on = True
        try:
            with pytest.raises(RequestError):
                read(message)
        finally:
            watch.on = False
        assert watch.seen == [], name


def test_the_hostile_messages_would_run(watch: Watch, tmp_path: Path) -> None:
    """The test above can fail: pickle itself executes what it is sent, and the watch sees it."""
    message = hostile_messages(tmp_path / "other")["os.system"]
    watch.on = True
    try:
        pickle.loads(message)
    finally:
        watch.on = False
    assert "os.system" in watch.seen
    assert (tmp_path / "other").exists()
    watch.seen.clear()


def test_mutated_messages_run_nothing_and_take_no_memory(planted: Path, watch: Watch) -> None:
    seeds = [pickle.dumps(observation(side=4)), pickle.dumps(policy_config()), pickle.dumps(observation(), protocol=5)]
    seeds = [*seeds * 10, *hostile_messages(planted).values()]
    choice = random.Random(0)
    read_as_records = 0
    tracemalloc.start()
    try:
        for number in range(2_000):
            message = mutated(seeds[number % len(seeds)], choice)
            watch.on = True
            try:
                read_as_records += isinstance(read(message), Record)
            except RequestError:
                pass
            finally:
                watch.on = False
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert watch.seen == []
    assert read_as_records > 20  # some mutations hit only pixels
    assert peak < 8 * 2**20


def test_nested_doubling_is_not_expanded() -> None:
    """A hundred bytes that stand for 2^50 values: they are refused without being walked or printed."""
    stream = io.BytesIO()
    stream.write(pickle.PROTO + b"\x04" + pickle.NONE)
    for _ in range(50):
        stream.write(pickle.MEMOIZE + pickle.BINGET + bytes([_]) + pickle.TUPLE2)
    doubled = stream.getvalue()[2:]
    name = b"".join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text for text in (b"numpy", b"dtype"))
    for message in (
        stream.getvalue() + pickle.STOP,
        pickle.PROTO + b"\x04" + name + pickle.STACK_GLOBAL + doubled + pickle.REDUCE + pickle.STOP,
        pickle.PROTO + b"\x04" + name + pickle.STACK_GLOBAL + doubled + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP,
    ):
        with pytest.raises(RequestError):
            read(message)
