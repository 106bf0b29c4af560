"""Servers on loopback that stand for what is elsewhere: S3 by moto, and a way to it that can be cut."""

import contextlib
import queue
import random
import socket
import threading
import time
from collections.abc import Iterator
from importlib import import_module

import httpx
import pytest


class Wire:
    """A way to a server: a port that passes everything on until so many bytes have come back, then breaks for good.

    What a broken cable looks like to a client: connections end in the middle, and new ones end at once.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._left: int | None = None
        self._once = False
        self._guard = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        """Connections that were broken."""
        self.latency_s = 0.0
        """How much later everything arrives at the server."""
        self._mean_nbytes: int | None = None
        self._random = random.Random()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, nbytes: int, *, once: bool = False) -> None:
        """Break once the server has sent so many bytes more: for good, or that one connection alone."""
        with self._guard:
            self._left, self._once = nbytes, once

    def cut_at_random(self, mean_nbytes: int, seed: int) -> None:
        """Break each new connection after a random number of bytes, in both directions together."""
        with self._guard:
            self._mean_nbytes, self._random = mean_nbytes, random.Random(seed)

    def mend(self) -> None:
        """Pass everything on again."""
        with self._guard:
            self._left = self._mean_nbytes = None

    def close(self) -> None:
        self._listener.close()
        with self._guard:
            for each in self._sockets:
                each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._guard:
            broken = self._left is not None and self._left <= 0
            self.cuts += broken
        if broken:
            client.close()
            return
        server = socket.create_connection(("127.0.0.1", self._upstream))
        with self._guard:
            self._sockets |= {client, server}
            budget = None if self._mean_nbytes is None else [int(self._random.expovariate(1 / self._mean_nbytes))]
        forth = threading.Thread(target=self._pass_on, args=(client, server, False, budget), daemon=True)
        forth.start()
        self._pass_on(server, client, True, budget)
        forth.join()
        for each in (client, server):
            each.close()
        with self._guard:
            self._sockets -= {client, server}

    def _pass_on(self, source: socket.socket, target: socket.socket, counted: bool, budget: list[int] | None) -> None:
        """Pass on what a source sends; `budget` is how many bytes are left of a connection that breaks at random."""
        send = target.sendall if counted or not self.latency_s else _Later(target, self.latency_s).send
        with contextlib.suppress(OSError):
            while block := source.recv(4096 if self._left is not None else 65536):
                with self._guard:
                    if budget is not None:
                        block, budget[0] = block[: max(0, budget[0])], budget[0] - len(block)
                        if budget[0] <= 0:
                            self.cuts += 1
                            break
                    if self._left is not None:
                        if counted:
                            block, self._left = block[: max(0, self._left)], self._left - len(block)
                        if self._left <= 0:
                            self.cuts += 1
                            if self._once:
                                self._left = None
                            with contextlib.suppress(OSError):
                                target.sendall(block)
                            break
                send(block)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Later:
    """Sends everything so many seconds later, as a long way does: it takes no bandwidth away."""

    def __init__(self, target: socket.socket, seconds: float) -> None:
        self._target, self._seconds = target, seconds
        self._queue: queue.Queue[tuple[float, bytes]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, block: bytes) -> None:
        self._queue.put((time.monotonic() + self._seconds, block))

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, block = self._queue.get()
                time.sleep(max(0.0, due - time.monotonic()))
                self._target.sendall(block)


@pytest.fixture
def s3_wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """An S3 server with the bucket ``bucket``, which s3fs finds by its environment, behind a wire."""
    import fsspec.config
    from moto.server import ThreadedMotoServer

    s3fs = import_module("s3fs").S3FileSystem  # neither has types
    new_session = import_module("botocore.session").get_session

    # moto looks whether an object exists, and then writes it: two requests at once could both find none. S3 does not.
    responses, writes = import_module("moto.s3.responses").S3Response, threading.Lock()
    put_object = responses.put_object

    def put_one(self: object) -> object:
        with writes:
            return put_object(self)

    monkeypatch.setattr(responses, "put_object", put_one)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    httpx.post(f"http://127.0.0.1:{server.get_host_and_port()[1]}/moto-api/reset")  # what other tests left
    wire = Wire(server.get_host_and_port()[1])
    url = f"http://127.0.0.1:{wire.port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "made-up-id",
        "AWS_SECRET_ACCESS_KEY": "made-up-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_CONFIG_FILE": "nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    # one attempt each of botocore and s3fs, so that a connection that was cut for good is told at once
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 0}}})
    monkeypatch.setattr(s3fs, "retries", 1)
    s3fs.clear_instance_cache()
    client = new_session().create_client("s3", endpoint_url=f"http://127.0.0.1:{wire.port}")
    client.create_bucket(Bucket="bucket")
    client.close()
    yield wire
    s3fs.clear_instance_cache()
    wire.close()
    server.stop()


@pytest.fixture
def patient_s3(s3_wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Wire:
    """The same server, whose driver tries again as it does by default."""
    import fsspec.config

    s3fs = import_module("s3fs").S3FileSystem
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    monkeypatch.setattr(s3fs, "retries", 5)
    s3fs.clear_instance_cache()
    return s3_wire
