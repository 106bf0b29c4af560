"""The server, over loopback: LeRobot's own client and server as references, clients that misbehave, hostile bytes."""

import contextlib
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation, map_robot_keys_to_lerobot_features
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks

from geomcache.errors import ModelNotFoundError, RequestError, UserInputError
from geomcache.policy.modeling_pi05_geometry import PI05GeometryPytorch
from geomcache.serving import server as serving
from geomcache.serving.actor import Actor, Chunk
from geomcache.serving.messages import largest_message
from geomcache.serving.options import ServeOptions
from tests.support.acting import CHUNK, KEYS, SIDE, make_acting_checkpoint
from tests.support.hostile import hostile_messages, mutated
from tests.support.lerobot_client import Robot, acting, lerobot_async
from tests.support.mockrobot import ACTIONS, JOINTS, MockRobot, MockRobotConfig, scripted

__all__ = ["lerobot_async"]

Clients = tuple[ModuleType, ModuleType]


def fixed_noise(_network: Any, shape: Any, device: Any) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, random_da3_folder: Path) -> Path:
    return make_acting_checkpoint(tmp_path_factory.mktemp("serve"), random_da3_folder)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Actor:
    actor = Actor.load(str(checkpoint))
    actor.warm()
    return actor


@pytest.fixture
def actor(loaded: Actor, monkeypatch: pytest.MonkeyPatch) -> Actor:
    """A warm policy with the same noise for each chunk."""
    monkeypatch.setattr(PI05GeometryPytorch, "sample_noise", fixed_noise)
    loaded.chunks = 0
    return loaded


def options(**chosen: Any) -> ServeOptions:
    given: dict[str, Any] = {"policy": "unused", "port": 0}
    return ServeOptions(**(given | chosen))


@contextlib.contextmanager
def served(actor: Actor, credentials: Any = None, **chosen: Any) -> Iterator[int]:
    server, port = serving.start(actor, options(**chosen), credentials)
    try:
        yield port
    finally:
        server.stop(grace=None).wait()


@pytest.fixture
def port(actor: Actor) -> Iterator[int]:
    with served(actor) as number:
        yield number


class Client:
    """The service's four calls, as bytes."""

    def __init__(self, port: int, actor: Actor) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        self.stub = services_pb2_grpc.AsyncInferenceStub(self.channel)
        self.policy = actor.wanted.policy

    def hello(self, **changes: Any) -> "Client":
        self.stub.Ready(services_pb2.Empty())
        robot = MockRobot(MockRobotConfig(side=SIDE))
        fields = {
            "policy_type": "pi05_geometry",
            "pretrained_name_or_path": self.policy,
            "lerobot_features": map_robot_keys_to_lerobot_features(robot),
            "actions_per_chunk": CHUNK,
        }
        self.instruct(pickle.dumps(RemotePolicyConfig(**(fields | changes))))
        return self

    def instruct(self, data: bytes) -> None:
        self.stub.SendPolicyInstructions(services_pb2.PolicySetup(data=data))

    def observe(self, data: bytes) -> None:
        self.stub.SendObservations(send_bytes_in_chunks(data, services_pb2.Observation))

    def see(self, number: int, timestep: int, **more: Any) -> TimedObservation:
        values = {**scripted(number, SIDE), "task": "fold"}
        seen = TimedObservation(timestamp=time.time(), timestep=timestep, observation=values, **more)
        self.observe(pickle.dumps(seen))
        return seen

    def actions(self) -> list[Any]:
        data = self.stub.GetActions(services_pb2.Empty()).data
        return pickle.loads(data) if data else []

    def close(self) -> None:
        self.channel.close()


@pytest.fixture
def client(port: int, actor: Actor) -> Iterator[Client]:
    made = Client(port, actor)
    yield made
    made.close()


@contextlib.contextmanager
def refused(code: grpc.StatusCode, *named: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as error:
        yield
    assert error.value.code() is code
    for value in named:
        assert value in error.value.details()


WRONG, EARLY = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


# ---- actions ----


def lerobots_chunk(lerobot_async: Clients, actor: Actor, seen: TimedObservation) -> torch.Tensor:
    """What LeRobot's own policy server computes in this process for an observation, with the same policy."""
    _, policy_server = lerobot_async
    from lerobot.async_inference.configs import PolicyServerConfig

    reference = policy_server.PolicyServer(PolicyServerConfig(fps=30))
    reference.policy = actor.policy
    reference.preprocessor, reference.postprocessor = actor._preprocessor, actor._postprocessor
    reference.lerobot_features = map_robot_keys_to_lerobot_features(MockRobot(MockRobotConfig(side=SIDE)))
    reference.actions_per_chunk = CHUNK
    timed = reference._predict_action_chunk(seen)
    assert [action.timestep for action in timed] == list(range(seen.timestep, seen.timestep + CHUNK))
    return torch.stack([action.action for action in timed])


def test_a_chunk_is_the_one_that_lerobots_server_computes(lerobot_async: Clients, client: Client, actor: Actor) -> None:
    client.hello()
    for number, timestep in ((0, 0), (5, 7)):
        seen = client.see(number, timestep)
        answer = client.actions()
        assert [action.timestep for action in answer] == list(range(timestep, timestep + CHUNK))
        assert answer[3].timestamp == pytest.approx(seen.timestamp + 3 / 30)
        expected = lerobots_chunk(lerobot_async, actor, seen)
        assert torch.equal(torch.stack([action.action for action in answer]), expected)
        assert expected.std() > 0.01


def test_lerobots_client_acts_and_the_encoder_runs_once_a_chunk(
    lerobot_async: Clients, port: int, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    robot_client, _ = lerobot_async
    chunks: list[tuple[Any, torch.Tensor]] = []
    predict = Actor.predict

    def watched(self: Actor, observation: Any, hello: Any) -> Chunk:
        chunk = predict(self, observation, hello)
        chunks.append((observation, chunk.actions))
        return chunk

    monkeypatch.setattr(Actor, "predict", watched)
    encoder = actor.policy.online.encoder
    calls_before = encoder.calls
    with acting(Robot(robot_client, port, actor.wanted.policy)) as robot:
        wait_for(lambda: len(robot.actions) >= 40)
    told = robot.actions
    assert actor.chunks == len(chunks) == encoder.calls - calls_before
    assert len(chunks) >= 40 / CHUNK
    # Each action that the robot was told is one of a chunk, at its place in time.
    predicted: dict[int, list[torch.Tensor]] = {}
    for observation, actions in chunks:
        for i, action in enumerate(actions):
            predicted.setdefault(observation.timestep + i, []).append(action)
    for timestep, action in enumerate(told):
        values = torch.tensor([action[name] for name in ACTIONS])
        assert any(torch.equal(values, candidate) for candidate in predicted[timestep]), timestep
    # And each chunk is what LeRobot's server computes of the same observation.
    monkeypatch.setattr(Actor, "predict", predict)
    for observation, actions in chunks[:3]:
        seen = TimedObservation(
            timestamp=observation.timestamp, timestep=observation.timestep, observation=dict(observation.values)
        )
        assert torch.equal(actions, lerobots_chunk(lerobot_async, actor, seen))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_actions_per_chunk_is_the_clients(client: Client) -> None:
    client.hello(actions_per_chunk=3)
    client.see(0, 0)
    assert len(client.actions()) == 3


def test_each_chunk_is_logged_with_its_parts(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="geomcache")
    client.hello()
    client.see(0, 4)
    client.actions()
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("chunk")]
    for part in ("chunk 1: step 4, 10 actions", "prepare", "DA3", "prefix", "denoising", "finish", "encoder calls"):
        assert part in line


# ---- clients that vanish, come back, repeat themselves, or are two ----


def test_an_observation_that_never_comes_is_an_empty_answer(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "WAIT_S", 0.05)
    client.hello()
    assert client.actions() == []


def test_repeated_and_old_observations_make_no_chunk(
    client: Client, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "WAIT_S", 0.05)
    client.hello()
    client.see(2, 5)
    assert len(client.actions()) == CHUNK
    for number, timestep in ((2, 5), (9, 5), (9, 4), (2, 6)):  # repeated twice, old, the robot has not moved
        client.see(number, timestep)
        assert client.actions() == []
    client.see(2, 5, must_go=True)
    assert len(client.actions()) == CHUNK
    assert actor.chunks == 2


def test_the_newest_of_several_observations_is_used(client: Client) -> None:
    client.hello()
    for number, timestep in ((0, 0), (1, 3), (2, 6)):
        client.see(number, timestep)
    assert client.actions()[0].timestep == 6


def test_a_second_client_is_refused_while_the_first_acts(port: int, client: Client, actor: Actor) -> None:
    client.hello()
    second = Client(port, actor)
    with refused(EARLY, "one robot at a time"):
        second.hello()
    with refused(EARLY, "hello"):
        second.see(0, 0)
    client.see(0, 0)
    assert len(client.actions()) == CHUNK
    second.close()


def test_a_client_that_vanished_is_replaced(
    port: int, client: Client, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geomcache.serving.session.QUIET_S", 0.2)
    client.hello()
    client.see(3, 8)
    time.sleep(0.3)
    second = Client(port, actor).hello()
    second.see(0, 0)
    assert second.actions()[0].timestep == 0
    with refused(EARLY, "hello"):  # the first one comes back: it is told, and says hello again
        client.actions()
    time.sleep(0.3)
    client.hello()
    client.see(0, 0)
    assert len(client.actions()) == CHUNK
    second.close()


def test_a_client_that_breaks_off_in_the_middle_of_an_observation(client: Client, actor: Actor) -> None:
    client.hello()
    data = pickle.dumps(TimedObservation(timestamp=0.0, timestep=0, observation=scripted(0, SIDE)))

    def half() -> Iterator[Any]:
        yield services_pb2.Observation(transfer_state=services_pb2.TRANSFER_BEGIN, data=data[: len(data) // 2])

    with refused(WRONG, "last piece"):
        client.stub.SendObservations(half())
    client.see(0, 0)
    assert len(client.actions()) == CHUNK


def test_a_transfer_that_stalls_is_ended(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TRANSFER_S", 0.2)
    client.hello()
    stalled = threading.Event()

    def pieces() -> Iterator[Any]:
        yield services_pb2.Observation(transfer_state=services_pb2.TRANSFER_BEGIN, data=b"x")
        stalled.wait(30)

    with pytest.raises(grpc.RpcError):
        client.stub.SendObservations(pieces())
    stalled.set()
    client.see(0, 0)
    assert len(client.actions()) == CHUNK


# ---- what is wrong is answered, and the server continues ----


def test_a_robot_that_does_not_fit_is_told_at_its_hello(client: Client) -> None:
    features = map_robot_keys_to_lerobot_features(MockRobot(MockRobotConfig(side=32)))
    with refused(WRONG, KEYS[0], "64x64", "32x32"):
        client.hello(lerobot_features=features)
    with refused(EARLY, "SendPolicyInstructions"):
        client.see(0, 0)
    client.hello()
    client.see(0, 0)
    assert len(client.actions()) == CHUNK


def test_lerobots_client_says_why_it_was_refused(
    lerobot_async: Clients, port: int, actor: Actor, caplog: pytest.LogCaptureFixture
) -> None:
    robot_client, _ = lerobot_async
    robot = Robot(robot_client, port, "another/policy")
    robot.client.logger.setLevel("INFO")
    assert robot.client.start() is False
    robot.client.logger.setLevel("CRITICAL")
    robot.stop()
    assert "another/policy" in caplog.text
    assert actor.wanted.policy in caplog.text


def test_a_prediction_that_fails_is_answered_and_the_next_one_is_made(
    client: Client, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.hello()
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise ModelNotFoundError("DA3: expected weights, found none")

        patch.setattr(Actor, "predict", fail)
        client.see(0, 0)
        with refused(grpc.StatusCode.INTERNAL, "expected weights"):
            client.actions()
    client.see(0, 0)
    assert len(client.actions()) == CHUNK


def test_a_message_that_is_too_large_is_refused_before_it_is_kept(client: Client, actor: Actor) -> None:
    client.hello()
    with refused(WRONG, "at most"):
        client.observe(b"x" * (largest_message(actor.wanted.cameras, len(JOINTS)) + 1))
    with refused(WRONG, "at most"):
        client.instruct(b"x" * (serving.LARGEST_HELLO + 1))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):  # by gRPC itself
        client.instruct(b"x" * (serving.LARGEST_PIECE + 1))


def test_pieces_are_joined_as_lerobot_cuts_them() -> None:
    data = random.Random(0).randbytes(5 * 2**20)
    pieces = list(send_bytes_in_chunks(data, services_pb2.Observation))
    assert len(pieces) == 3
    assert serving.join_pieces(iter(pieces), len(data)) == data
    assert serving.join_pieces(iter([pieces[0], *pieces]), len(data)) == data  # a transfer that begins again
    with pytest.raises(RequestError, match="last piece"):
        serving.join_pieces(iter(pieces[:2]), len(data))


@pytest.mark.slow
def test_ten_thousand_hostile_messages(port: int, client: Client, actor: Actor, tmp_path: Path) -> None:
    """Over the wire: each is answered with an error or taken for what it is; nothing runs, memory stays, robots act."""
    planted = tmp_path / "executed"
    client.hello()
    choice = random.Random(1)
    answers: dict[str, int] = {}
    seeds = [
        pickle.dumps(
            TimedObservation(timestamp=0.0, timestep=number, observation=scripted(number, SIDE)), protocol=protocol
        )
        for number in range(4)
        for protocol in (4, 5)
    ]
    seeds += hostile_messages(planted).values()
    for number in range(500):  # what is allocated once
        send(client, mutated(seeds[number % len(seeds)], choice))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(10_000):
        answer = send(client, mutated(seeds[number % len(seeds)], choice), hello=number % 7 == 0)
        answers[answer] = answers.get(answer, 0) + 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"answers {answers}, largest resident memory grew by {grown:.0f} MB")
    assert not planted.exists()
    assert set(answers) <= {"OK", WRONG.name, EARLY.name}
    assert answers[WRONG.name] > 5_000
    assert grown < 64
    client.hello()
    client.see(0, 0)
    assert len(client.actions()) == CHUNK


def send(client: Client, message: bytes, *, hello: bool = False) -> str:
    try:
        if hello:
            client.instruct(message)
        else:
            client.observe(message or b"\0")
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


# ---- who may connect ----


def test_beyond_this_machine_clients_prove_who_they_are() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu-machine"):
        with pytest.raises(UserInputError, match=r"--host: expected 127\.0\.0\.1 without TLS"):
            options(host=host)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.1.1"):
        assert not options(host=host).encrypted
    with pytest.raises(UserInputError, match=r"--tls-key, --tls-client-ca: expected with --tls-cert"):
        options(tls_cert=Path("cert.pem"))
    everything = {name: Path("x") for name in ("tls_cert", "tls_key", "tls_client_ca")}
    assert options(host="0.0.0.0", **everything).encrypted


@pytest.mark.parametrize(("name", "value"), [("port", 70000), ("port", -1), ("fps", 0.0)])
def test_options_out_of_range(name: str, value: float) -> None:
    with pytest.raises(UserInputError, match=f"--{name}: "):
        options(**{name: value})


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server and a client that it signed, and a stranger that signed itself."""
    folder = tmp_path_factory.mktemp("certificates")
    key = ("-newkey", "rsa:2048", "-nodes")
    openssl(folder, "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority")
    openssl(folder, "req", "-x509", *key, "-keyout", "stranger.key", "-out", "stranger.crt", "-subj", "/CN=stranger")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "robot"):
        openssl(folder, "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.crt")
    return folder


def test_mutual_tls_lets_in_whom_the_authority_knows(
    lerobot_async: Clients, actor: Actor, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LeRobot's client, its channel made as docs/robot.md shows."""
    robot_client, _ = lerobot_async
    chosen = options(
        host="127.0.0.1",
        tls_cert=certificates / "server.crt",
        tls_key=certificates / "server.key",
        tls_client_ca=certificates / "ca.crt",
    )
    credentials = serving._credentials(chosen)

    def channel(name: str | None) -> Callable[..., grpc.Channel]:
        files = (
            {}
            if name is None
            else {
                "private_key": (certificates / f"{name}.key").read_bytes(),
                "certificate_chain": (certificates / f"{name}.crt").read_bytes(),
            }
        )
        identity = grpc.ssl_channel_credentials((certificates / "ca.crt").read_bytes(), **files)
        return lambda address, channel_options: grpc.secure_channel(address, identity, channel_options)

    with served(actor, credentials) as port:
        for stranger in ("stranger", None):
            with monkeypatch.context() as patch:
                patch.setattr(
                    robot_client, "grpc", SimpleNamespace(**vars(grpc) | {"insecure_channel": channel(stranger)})
                )
                robot = Robot(robot_client, port, actor.wanted.policy)
            assert robot.client.start() is False
            robot.stop()
        assert Robot(robot_client, port, actor.wanted.policy).client.start() is False  # without TLS
        with monkeypatch.context() as patch:
            patch.setattr(robot_client, "grpc", SimpleNamespace(**vars(grpc) | {"insecure_channel": channel("robot")}))
            robot = Robot(robot_client, port, actor.wanted.policy)
        with acting(robot):
            wait_for(lambda: len(robot.actions) >= CHUNK)


def test_a_certificate_that_is_none_is_named(actor: Actor, tmp_path: Path) -> None:
    for name in ("cert", "key", "ca"):
        (tmp_path / name).write_text("no certificate")
    files = {"tls_cert": tmp_path / "cert", "tls_key": tmp_path / "key", "tls_client_ca": tmp_path / "ca"}
    chosen = options(**files)
    with pytest.raises(UserInputError, match="a certificate and key in PEM"):
        serving.start(actor, chosen, serving._credentials(chosen))


def test_a_port_that_is_taken_is_named(port: int, actor: Actor) -> None:
    with pytest.raises(UserInputError, match=f"cannot listen on 127.0.0.1:{port}"):
        serving.start(actor, options(port=port))


# ---- the command ----


@pytest.fixture
def command(checkpoint: Path) -> Iterator[Callable[[int], tuple[subprocess.Popen[str], int]]]:
    """Start `geomcache serve` and wait until it serves; returns the process and its port."""
    started: list[tuple[subprocess.Popen[str], threading.Thread]] = []

    def start(port: int) -> tuple[subprocess.Popen[str], int]:
        arguments = ["-m", "geomcache", "serve", "--policy", str(checkpoint), "--port", str(port)]
        arguments += ["--policy.num_inference_steps=2"]
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving "):
                rest = threading.Thread(target=process.stdout.read)  # what it prints later must not fill the pipe
                rest.start()
                started.append((process, rest))
                return process, int(line.split(" on 127.0.0.1:")[1].split(",")[0])
        raise AssertionError("".join(lines))

    yield start
    for process, rest in started:
        process.kill()
        process.wait()
        rest.join()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again(lerobot_async: Clients, command: Any, checkpoint: Path) -> None:
    """The robot stands still when its actions are used up; it acts again after a new hello, as if nothing had been."""
    robot_client, _ = lerobot_async
    process, port = command(0)
    robot = Robot(robot_client, port, str(checkpoint), fps=50)
    assert robot.client.start()
    robot.run()
    wait_for(lambda: len(robot.actions) > 2 * CHUNK)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: robot.client.action_queue.empty())
    time.sleep(0.5)
    stood = len(robot.actions)
    time.sleep(0.5)
    assert len(robot.actions) == stood
    command(port)
    time.sleep(1)
    assert len(robot.actions) == stood  # the new server does not know this robot: it moves after a hello, not before
    wait_for(robot.client.start)
    wait_for(lambda: len(robot.actions) > stood + 2 * CHUNK)
    robot.stop()
    assert np.isfinite([list(action.values()) for action in robot.actions]).all()


@pytest.mark.slow
def test_the_command_stops_at_a_signal(command: Any) -> None:
    process, _ = command(0)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGINT
