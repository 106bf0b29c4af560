"""Objects with tensors, handed from one process to another through a socket.

The bytes of the tensors go in anonymous files in memory, whose descriptors the message carries. Unlike the queues of
`torch.utils.data.DataLoader`, this needs no /dev/shm (64 MB in a container), a message arrives whole or not at all,
the end of the sender is the end of the stream, and every wait can have a limit.
"""

import io
import mmap
import os
import pickle
import socket
from typing import Any

import torch

MOST_TENSORS = 64  # of one object
MOST_BYTES = 1 << 20  # of a message without its tensors; the kernel's own limit is lower


def open_channel() -> tuple[socket.socket, socket.socket]:
    """Return two connected ends that keep messages apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, value: object) -> None:
    """Send an object with at most 64 tensors, which are on the CPU.

    Raises:
        OSError: there is no memory for the tensors, or nobody is at the other end.
    """
    message, buffers, descriptors = io.BytesIO(), list[pickle.PickleBuffer](), list[int]()
    _Pickler(message, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append).dump(value)
    try:
        for buffer in buffers:
            descriptors.append(os.memfd_create("geomcache"))
            with open(descriptors[-1], "wb", closefd=False) as file:
                file.write(buffer.raw())
        socket.send_fds(channel, [message.getvalue()], descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def receive(channel: socket.socket) -> Any:
    """Return the next object; its tensors stay in the memory that the sender filled.

    Raises:
        EOFError: the other end is closed.
        TimeoutError: nothing came within the channel's timeout.
        OSError: this process cannot open as many files.
    """
    message, descriptors, flags, _ = socket.recv_fds(channel, MOST_BYTES, MOST_TENSORS)
    try:
        if flags & socket.MSG_CTRUNC:
            raise OSError("too many open files: raise the limit with `ulimit -n`")
        if not message:
            raise EOFError
        return pickle.loads(message, buffers=[mmap.mmap(descriptor, 0) for descriptor in descriptors])  # noqa: S301 - of our own process
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose bytes protocol 5 keeps out of the message."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.contiguous().numpy(),)
        return NotImplemented
