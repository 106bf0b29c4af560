"""LeRobot's service for asynchronous inference, with our policy behind it.

    Ready                    a robot says hello, and has the session
    SendPolicyInstructions   what it has is compared with what the policy needs
    SendObservations         an observation, in pieces of 2 MB; the newest waits
    GetActions               a chunk predicted from the one that waits; empty if none came in 2 s

What a client sent wrong is answered with an error of gRPC, and the server continues. Its text is in the client's log.
"""

import logging
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from lerobot.transport import services_pb2, services_pb2_grpc

from geomcache.errors import GeomcacheError, RequestError, SessionError, UserInputError
from geomcache.serving import pickled
from geomcache.serving.actor import Actor
from geomcache.serving.messages import read_hello, read_observation
from geomcache.serving.options import ServeOptions
from geomcache.serving.session import Session

WAIT_S = 2.0
"""How long GetActions waits for an observation; as LeRobot's server."""
REFUSAL_S = 0.5
"""How long a refused GetActions takes: LeRobot's client asks again at once, for ever."""
TRANSFER_S = 10.0
"""How long one observation may take to arrive."""
LARGEST_HELLO = 1024 * 1024
LARGEST_PIECE = 4 * 1024 * 1024  # LeRobot's pieces are 2 MB
REQUESTS_AT_ONCE = 8  # a robot has two

logger = logging.getLogger(__name__)


class Servicer(services_pb2_grpc.AsyncInferenceServicer):  # type: ignore[misc]  # LeRobot is not typed
    """The four calls of the service. gRPC calls them from its threads."""

    def __init__(self, actor: Actor, *, fps: float) -> None:
        """Serve `actor`; `fps` steps of the robot are a second."""
        self._actor = actor
        self._fps = fps
        self._session = Session()
        self._last_refusal = ""

    def Ready(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002, N802 - LeRobot's name
        """Begin a robot's session."""
        with self._answered(context):
            peer = context.peer()
            ended = self._session.begin(peer)
            self._actor.reset()
            if ended is not None:
                logger.info("session of %s ended: it had gone silent", ended)
            logger.info("robot %s: connected", peer)
        return services_pb2.Empty()

    def SendPolicyInstructions(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Compare the robot with what the policy needs."""
        with self._answered(context):
            if len(request.data) > LARGEST_HELLO:
                raise RequestError(
                    f"message: expected at most {LARGEST_HELLO} bytes at a hello, got {len(request.data)}"
                )
            hello = read_hello(pickled.read(request.data), self._actor.wanted)
            self._session.introduce(context.peer(), hello)
            logger.info(
                "robot %s: %d numbers of state, %s, %d actions a chunk; it asks for device %s, this server decides",
                context.peer(),
                len(hello.joints),
                ", ".join(f"{key} {height}x{width}" for key, (height, width) in hello.cameras.items()),
                hello.actions_per_chunk,
                hello.device,
            )
        return services_pb2.Empty()

    def SendObservations(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Take an observation."""
        with self._answered(context):
            hello = self._session.hello(context.peer())
            with _time_limit(context):
                data = join_pieces(request_iterator, hello.largest_message)
            observation = read_observation(pickled.read(data), hello)
            self._session.offer(context.peer(), observation)
        return services_pb2.Empty()

    def GetActions(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002, N802
        """Predict a chunk of actions from the observation that waits."""
        peer = context.peer()
        with self._answered(context, refusal_s=REFUSAL_S):
            began = time.perf_counter()
            hello = self._session.hello(peer)
            observation = self._session.take(peer, WAIT_S)
            if observation is None:
                return services_pb2.Empty()
            taken = time.perf_counter()
            chunk = self._actor.predict(observation, hello)
            self._session.predicted(peer, observation)
            answer = services_pb2.Actions(data=packed(observation, chunk.actions, self._fps))
            logger.info(
                "chunk %d: step %d, %d actions in %.1f ms (%s), observation %.1f ms old, waited %.1f ms, encoder calls"
                " %d",
                self._actor.chunks,
                observation.timestep,
                len(chunk.actions),
                (time.perf_counter() - taken) * 1e3,
                chunk.parts(),
                (time.time() - observation.timestamp) * 1e3,
                (taken - began) * 1e3,
                self._actor.encoder_calls,
            )
            return answer

    @contextmanager
    def _answered(self, context: grpc.ServicerContext, refusal_s: float = 0.0) -> Iterator[None]:
        """Answer our errors with one of gRPC that has the message; log each that is not a repetition."""
        try:
            yield
        except GeomcacheError as error:
            code = grpc.StatusCode.INTERNAL
            if isinstance(error, RequestError):
                code = grpc.StatusCode.INVALID_ARGUMENT
            elif isinstance(error, SessionError):
                code = grpc.StatusCode.FAILED_PRECONDITION
            # A client's own words may be in it.
            text = "".join(character if character.isprintable() else "?" for character in str(error))
            line = f"robot {context.peer()}: refused: {text}"
            if line != self._last_refusal:  # a client that is refused tries again, 30 times a second
                logger.warning("%s", line)
            self._last_refusal = line
            time.sleep(refusal_s)
            context.abort(code, text)


def packed(observation: Any, actions: Any, fps: float) -> bytes:
    """Return actions as LeRobot's client reads them: the pickle of a list of its `TimedAction`."""
    from lerobot.async_inference.helpers import TimedAction

    timed = [
        TimedAction(timestamp=observation.timestamp + i / fps, timestep=observation.timestep + i, action=action.clone())
        for i, action in enumerate(actions)
    ]
    return pickle.dumps(timed)


def join_pieces(pieces: Iterator[Any], largest: int) -> bytes:
    """Return the bytes that a client sent in pieces.

    Raises:
        RequestError: they are more than `largest`, or end without a last piece.
    """
    data = bytearray()
    for piece in pieces:
        if piece.transfer_state == services_pb2.TRANSFER_BEGIN:
            data.clear()
        if len(data) + len(piece.data) > largest:
            raise RequestError(f"message: expected at most {largest} bytes, as the robot's cameras make, got more")
        data += piece.data
        if piece.transfer_state == services_pb2.TRANSFER_END:
            return bytes(data)
    raise RequestError(f"message: expected a last piece, the transfer ended after {len(data)} bytes")


def serve(options: ServeOptions) -> NoReturn:
    """Serve a policy until the process is stopped. Lines for the user are logged.

    Args:
        options: what to serve, and to whom.

    Raises:
        UserInputError: the address is taken, a certificate cannot be used, or LeRobot refuses an option.
        ModelError: the checkpoint, or the DA3 that it was trained with, is not available or does not fit.
    """
    credentials = _credentials(options)  # before the policy is loaded, which takes longer
    actor = Actor.load(options.policy, options.lerobot_args or ())
    seconds = actor.warm()
    server, port = start(actor, options, credentials)
    logger.info(
        "serving %s on %s:%d%s, warm after %.1f s; robots connect with policy_type=%s,"
        " pretrained_name_or_path=%s and server_address=HOST:%d",
        options.policy,
        options.host,
        port,
        " over mutual TLS" if options.encrypted else "",
        seconds,
        actor.wanted.policy_type,
        options.policy,
        port,
    )
    try:
        server.wait_for_termination()
    finally:
        server.stop(grace=1).wait()
    raise AssertionError("the server ended by itself")


def start(actor: Actor, options: ServeOptions, credentials: Any = None) -> tuple[grpc.Server, int]:
    """Start to serve, and return the server and its port.

    Raises:
        UserInputError: the address cannot be listened on.
    """
    server = grpc.server(
        ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="serve"),
        maximum_concurrent_rpcs=REQUESTS_AT_ONCE,
        options=[
            ("grpc.max_receive_message_length", LARGEST_PIECE),
            ("grpc.so_reuseport", 0),  # two servers on one port would share its robots
            ("grpc.keepalive_time_ms", 10_000),  # a robot whose network is gone
            ("grpc.keepalive_timeout_ms", 5_000),
        ],
    )
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(Servicer(actor, fps=options.fps), server)
    try:
        if credentials is None:
            port = server.add_insecure_port(options.address)
        else:
            port = server.add_secure_port(options.address, credentials)
    except RuntimeError as error:
        certificate = ", and a certificate and key in PEM that belong together" if options.encrypted else ""
        raise UserInputError(
            f"--port: expected a free port of {options.host}{certificate}, cannot listen on {options.address}: choose"
            " another with --port, or stop the server that has it"
        ) from error
    server.start()
    return server, port


def _credentials(options: ServeOptions) -> grpc.ServerCredentials | None:
    """Read certificate, key and authority.

    Raises:
        OSError: a file cannot be read.
    """
    if options.tls_cert is None or options.tls_key is None or options.tls_client_ca is None:
        return None
    return grpc.ssl_server_credentials(
        [(options.tls_key.read_bytes(), options.tls_cert.read_bytes())],
        root_certificates=options.tls_client_ca.read_bytes(),
        require_client_auth=True,
    )


@contextmanager
def _time_limit(context: grpc.ServicerContext) -> Iterator[None]:
    """End a transfer that takes too long: it holds one of few threads."""
    timer = threading.Timer(TRANSFER_S, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
