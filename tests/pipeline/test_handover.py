"""Objects with tensors through a socket, against what was sent."""

import multiprocessing
import resource
import socket
from collections.abc import Iterator

import pytest
import torch

from geomcache.pipeline.handover import MOST_TENSORS, open_channel, receive, send


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = open_channel()
    with near, far:
        yield near, far


def test_objects_arrive_as_they_were_sent_one_by_one(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    tensors = [torch.rand(2, 3, 5, 7), torch.arange(12).reshape(3, 4).T, torch.rand(1, 1).half()]
    for value in ((4, 8), {"some": tensors}, ValueError("text")):
        send(near, value)
    assert receive(far) == (4, 8)
    for received, sent in zip(receive(far)["some"], tensors, strict=True):
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent)
    error = receive(far)
    assert isinstance(error, ValueError)
    assert str(error) == "text"


def test_received_tensors_outlive_the_sender_and_can_be_written(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    process = multiprocessing.get_context("fork").Process(target=send, args=(near, torch.arange(5.0)))
    process.start()
    process.join()
    received = receive(far)
    received += 1
    assert received.tolist() == [1, 2, 3, 4, 5]


def test_a_closed_end_and_silence_are_errors(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    near.settimeout(0.01)
    with pytest.raises(TimeoutError):
        receive(near)
    far.close()
    with pytest.raises(EOFError):
        receive(near)
    with pytest.raises(ConnectionError):
        send(near, 1)


def test_too_few_descriptors_are_an_error_and_none_leaks(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    send(near, [torch.rand(1) for _ in range(MOST_TENSORS)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (near.fileno() + 20, hard))
    try:
        with pytest.raises(OSError, match="too many open files"):
            receive(far)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    send(near, [torch.rand(1) for _ in range(MOST_TENSORS)])
    assert len(receive(far)) == MOST_TENSORS
