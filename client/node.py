"""The resident node: one process that stays, with the ClientApp loaded, in place of a `flower-supernode`.

It speaks Flower's Fleet protocol through Flower's own client, whose parts are internal to Flower and named here and
nowhere else; a test holds them to what they were in the version that is asked for. Of a run it learns its number and,
where the node's owner allows certain bundles only, the hash of its bundle. It never asks for the bundle: the code that
answers is the one that is installed. The time that Flower measures on nodes is always given as 0.
"""

import fcntl
import logging
import os
import signal
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.version import package_version
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.app import app, close_services, service_for
from client.loop import Forgotten, Loop, NotAdmitted, Occupied, Pace, Rejected, RunOver, Unreachable
from client.settings import NodeSettings, load_settings
from client.status_file import StatusFile, read_status, status_path
from common import wire
from common.errors import Refused, UmbelError
from common.files import storing

SUPPORTED_FLOWER = "1.41."
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_WAIT_FOR_OBJECT = 0.05
_KEPT_RUNS = 64
_SIGNATURE_SECONDS = 5.0
_TOLERATED_CLOCK = 30.0  # seconds, well inside Flower's own window
_RETRYABLE = frozenset({404, 408, 425, 429})  # beside all of 5xx: a proxy that has nobody behind it
_logger = logging.getLogger("umbel.node")


@dataclass(frozen=True, kw_only=True, eq=False)
class Received:
    """A message on its way: Flower sends the content in pieces.

    Attributes:
        message: Without content.
        tree: The names of the pieces.
    """

    message: Message
    tree: ObjectTree

    @property
    def expires(self) -> float:
        """Unix time after which Flower drops a reply."""
        return float(self.message.metadata.created_at + self.message.metadata.ttl)

    @property
    def action(self) -> str:
        """Which function of the ClientApp is meant."""
        return str(self.message.metadata.message_type)


class Signature:
    """Signs requests as Flower's `NodeAuthHttpInterceptor` does, whose import brings in a web server.

    What is signed is the time and nothing else, and a server takes it for five minutes. So one signature, which costs
    a millisecond on a fast machine, serves all requests of a few seconds.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        """Sign with `key`."""
        self._key = key
        self._public_key = b64encode(public_key_to_bytes(key.public_key())).decode("ascii")
        self._headers: dict[str, str] = {}
        self._signed_at = -_SIGNATURE_SECONDS

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the signed time, as Flower has it."""
        now = time.monotonic()
        if now - self._signed_at >= _SIGNATURE_SECONDS:
            timestamp = datetime.now(UTC).isoformat()
            signature = b64encode(sign_message(self._key, timestamp.encode("ascii"))).decode("ascii")
            self._headers = {
                FLEET_HTTP_PUBLIC_KEY_HEADER: self._public_key,
                TIMESTAMP_HEADER: timestamp,
                FLEET_HTTP_SIGNATURE_HEADER: signature,
            }
            self._signed_at = now
        context.request.headers.update(self._headers)
        return call_next(context)


class FlowerLink:
    """A node's connection to a SuperLink; a `client.loop.Link`."""

    def __init__(
        self,
        settings: NodeSettings,
        answer: Callable[[Message, Context], Message],
        *,
        node_config: dict[str, Any],
        heartbeat: float,
        known_node: int | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            settings: The node's.
            answer: The ClientApp.
            node_config: What it is told about the node.
            heartbeat: Seconds between two signs of life, as the SuperLink is told.
            known_node: The node's number when it last was here.

        Raises:
            UmbelError: If the settings do not say how to connect, or a key or certificate cannot be used.
        """
        check_flower_version()
        self._address, self._certificates = _address_of(settings)
        self._key = None if settings.auth_key is None else _auth_key(Path(settings.auth_key))
        if self._certificates is not None and self._key is None:
            raise UmbelError("Expected auth_key, the node's key for Flower, got none. Name it in the settings.")
        self._allowed = frozenset(settings.bundle_hashes)
        self._answer, self._node_config, self._heartbeat = answer, node_config, heartbeat
        self._known_node = known_node
        self._client: FleetHttpClient | None = None
        self._node = Node()
        self._bundles: dict[int, str] = {}
        self._contexts: dict[int, Context] = {}

    def connect(self) -> int:
        """Be admitted; the number that the SuperLink has for the node."""
        if self._client is not None:
            self._client.close()
        key = self._key or ec.generate_private_key(ec.SECP384R1())
        self._client = FleetHttpClient.from_server_address(
            self._address,
            self._certificates is None,
            self._certificates,
            interceptors=[Signature(key)],
        )
        public_key = public_key_to_bytes(key.public_key())
        if self._key is None:
            with _failures():
                self._client.RegisterNode(RegisterNodeFleetRequest(public_key=public_key))
        elif self._is_back():
            return int(self._node.node_id)
        try:
            with _failures():
                response = self._client.ActivateNode(
                    ActivateNodeRequest(public_key=public_key, heartbeat_interval=self._heartbeat)
                )
        except Forgotten as error:
            raise NotAdmitted(_explain_refusal(error.__cause__)) from error
        except (Rejected, RunOver) as error:
            raise Occupied from error
        self._known_node = response.node_id
        self._node = Node(node_id=response.node_id)
        return int(response.node_id)

    def _is_back(self) -> bool:
        """Whether the SuperLink still knows the node that was here: it activates none that it thinks is there."""
        if self._known_node is None:
            return False
        self._node = Node(node_id=self._known_node)
        try:
            self.heartbeat()
        except (Forgotten, Rejected, RunOver):
            self._known_node = None
            return False
        return True

    def heartbeat(self) -> None:
        """Say that the node is there."""
        with _failures():
            response = self._connected.SendNodeHeartbeat(
                SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._heartbeat)
            )
        if not response.success:
            raise Forgotten

    def pull(self) -> Received | None:
        """The next message, without its content."""
        with _failures():
            response = self._connected.PullMessages(PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        return Received(message=message_from_proto(response.messages_list[0]), tree=response.message_object_trees[0])

    def fetch(self, work: Received) -> Message:
        """The whole message."""
        run_id, message_id = work.message.metadata.run_id, work.message.metadata.message_id
        if self._allowed and run_id not in self._bundles:
            with _failures():
                run = self._connected.GetRun(GetRunRequest(node=self._node, run_id=run_id)).run
            self._bundles[run_id] = run.fab_hash
            _keep_newest(self._bundles)
        names = dict.fromkeys(piece.object_id for piece in iterate_object_tree(work.tree))
        pieces = {name: self._piece(run_id, name, work.expires) for name in names}
        with _failures():
            self._connected.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=message_id)
            )
        try:
            message = inflate_object_from_contents(message_id, pieces)
        except Exception as error:  # whatever Flower makes of bytes that are none of its objects
            raise Rejected("a message that cannot be read") from error
        if not isinstance(message, Message):
            raise Rejected("a message that is none")
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def _piece(self, run_id: int, name: str, expires: float) -> bytes:
        while True:
            with _failures():
                request = PullObjectRequest(node=self._node, run_id=run_id, object_id=name)
                response = self._connected.PullObject(request)
            if not response.object_found:
                raise Rejected("a message whose content is gone")
            if response.object_available:
                return bytes(response.object_content)
            if time.time() > expires:
                raise Rejected("a message whose content never came")
            time.sleep(_WAIT_FOR_OBJECT)

    def compute(self, request: Message) -> Message:
        """The ClientApp's reply, or that the run's bundle is not allowed here."""
        run_id = request.metadata.run_id
        if self._allowed and self._bundles.get(run_id) not in self._allowed:
            return wire.refusal("policy_bundle", request)
        if run_id not in self._contexts:
            self._contexts[run_id] = Context(
                run_id=run_id,
                node_id=int(self._node.node_id),
                node_config=self._node_config,
                state=RecordDict(),
                run_config={},
            )
            _keep_newest(self._contexts)
        try:
            return self._answer(request, self._contexts[run_id])
        except Exception:  # its text could hold data
            return wire.refusal("error", request)

    def push(self, work: Received, reply: Message) -> None:
        """Send the reply."""
        del work
        run_id = reply.metadata.run_id
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            bare = remove_content_from_message(reply)
            with _failures():
                response = self._connected.PushMessages(
                    PushMessagesRequest(
                        node=self._node,
                        messages_list=[message_to_proto(bare)],
                        message_object_trees=[tree],
                        clientapp_runtime_list=[0.0],
                    )
                )
            for name in [name for name in objects if name in response.objects_to_push]:
                with _failures():
                    pushed = self._connected.PushObject(
                        PushObjectRequest(
                            node=self._node,
                            run_id=run_id,
                            object_id=name,
                            object_content=objects[name].deflate(),
                            session_id=response.session_id,
                        )
                    )
                if not pushed.stored:
                    raise Unreachable("the SuperLink lost what was being sent")

    def code_of(self, reply: Message) -> str | None:
        """The refusal that a reply is, if it is one."""
        try:
            answer = wire.read_answer(reply)
        except Refused:
            return None
        return answer.code if isinstance(answer, wire.Refusal) else None

    def disconnect(self) -> None:
        """Tell the SuperLink that the node goes."""
        if self._client is None:
            return
        with suppress(Exception):  # it finds out by itself
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()
        self._client = None

    @property
    def _connected(self) -> FleetHttpClient:
        if self._client is None:
            raise Unreachable("not connected")
        return self._client


def run_node(
    settings_path: Path, *, once: bool = False, poll: float | None = None, superlink: str | None = None
) -> None:
    """Be the resident node until SIGTERM or SIGINT.

    Args:
        settings_path: The node's TOML file.
        once: Answer what is waiting, then end.
        poll: Seconds between two questions for work, in place of the settings'.
        superlink: Where the server is, `host:port`, in place of the settings'.

    Raises:
        UmbelError: If the settings cannot be used; `NotAdmitted` if the SuperLink refuses the node's key.
        StorageError: If the store cannot be opened.
    """
    path = str(settings_path.resolve())
    settings = load_settings(path)
    if superlink is not None:
        settings = settings.model_copy(update={"superlink": superlink})
    index, count = settings.partition, settings.partitions
    store = settings.store.format(partition=index)
    pace = paced(settings.poll_seconds if poll is None else poll)
    link = FlowerLink(
        settings,
        app,
        node_config={"node-config": path, "partition-id": index, "num-partitions": count},
        heartbeat=pace.heartbeat,
        known_node=_known_node(store, settings),
    )
    with _alone(status_path(store)):
        try:
            service = service_for(
                path, index, count
            )  # what is wrong with data or store is said before anything is sent
            status = StatusFile(status_path(store))
            address = {"superlink": settings.superlink}
            loop = Loop(link, pace, status, lambda: service.status() | address)
            _logger.info("starting", extra={"node": service.status()["name"], "address": settings.superlink})
            with _until_signalled(loop, pace.drain):
                loop.run(once=once)
        except NotAdmitted:
            status.note("refused", service.status, force=True)
            raise
        finally:
            close_services()


def paced(poll: float) -> Pace:
    """How a node waits that asks for work every `poll` seconds: nodes that ask seldom give signs of life seldom."""
    return Pace(poll=poll, heartbeat=min(1800.0, max(30.0, 2 * poll)))


def check_flower_version() -> None:
    """Refuse a Flower whose internals may be others.

    Raises:
        UmbelError: Naming the version that is there and the one that is wanted.
    """
    if not str(package_version).startswith(SUPPORTED_FLOWER):
        raise UmbelError(
            f"Expected flwr {SUPPORTED_FLOWER}*, whose internals the resident node uses, got {package_version}. "
            "Install umbel's own requirements, or run flower-supernode instead."
        )


@contextmanager
def _alone(beside: Path | None) -> Iterator[None]:
    """Be the only resident node of a store: the SuperLink could not tell two apart.

    Raises:
        UmbelError: If there is another one.
        StorageError: If the folder of the store cannot be written to.
    """
    if beside is None:
        yield
        return
    path = beside.with_name("node.lock")
    with storing(path):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UmbelError(
            f"Expected no other umbel node with this store, got one that holds {path}. Stop it."
        ) from error
    finally:
        os.close(descriptor)


@contextmanager
def _until_signalled(loop: Loop[Received], drain: float) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the loop after its message, and the process if that takes too long."""

    def end(*_: object) -> None:
        loop.stop()
        # a charge is one transaction, so nothing is torn by leaving in the middle
        limit = threading.Timer(2 * drain, os._exit, (0,))
        limit.daemon = True
        limit.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _failures() -> Iterator[None]:
    """What can go wrong with a request, in the words of the loop."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status == httpx.codes.UNAUTHORIZED:
            raise Forgotten from error
        if status == httpx.codes.FORBIDDEN:
            raise RunOver from error
        if status in _RETRYABLE or status >= 500:
            raise Unreachable(f"the server answers with HTTP status {status}") from error
        raise Rejected(f"HTTP status {status}") from error
    except httpx.HTTPError as error:
        raise Unreachable(_reason(error)) from error
    except (OSError, ValueError) as error:  # a reply that is no protobuf is somebody else's
        raise Unreachable(type(error).__name__) from error


def _reason(error: httpx.HTTPError) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            detail = getattr(cause, "verify_message", "") or getattr(cause, "reason", "TLS")
            return f"its certificate was not accepted ({detail}); see root_certificates, and the clock"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__} ({error})"


def _explain_refusal(cause: BaseException | None) -> str:
    """Why a SuperLink does not accept a signed request; the signature is over the time, which is what goes wrong."""
    offset = None
    if isinstance(cause, httpx.HTTPStatusError) and (date := cause.response.headers.get("date")):
        with suppress(ValueError, TypeError):
            offset = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    if offset is not None and abs(offset) > _TOLERATED_CLOCK:
        where = "ahead of" if offset > 0 else "behind"
        hint = f"This machine's clock is {abs(offset):.0f} s {where} the server's: set the clocks."
    else:
        hint = "Register this node's key with the SuperLink, and compare the clocks of both machines."
    return f"Expected the server to accept this node's signature, got a refusal. {hint}"


def _address_of(settings: NodeSettings) -> tuple[str, bytes | None]:
    """Address of the SuperLink and certificates; without the latter only on this machine."""
    if settings.superlink is None:
        raise UmbelError('Expected superlink = "host:port" in the settings, got none. Add it.')
    host, _, port = settings.superlink.rpartition(":")
    if not host or not port.isdecimal():
        raise UmbelError(f'Expected superlink = "host:port", got superlink={settings.superlink!r}. Correct it.')
    if settings.root_certificates is None:
        if host not in _LOOPBACK:
            raise UmbelError(
                f"Expected root_certificates for superlink={settings.superlink!r}, got none. "
                "Name the CA's certificate: without TLS a node connects to its own machine only."
            )
        return settings.superlink, None
    try:
        return settings.superlink, Path(settings.root_certificates).read_bytes()
    except OSError as error:
        raise UmbelError(f"Expected root_certificates={settings.root_certificates}, got {error.strerror}.") from error


def _auth_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        if path.stat().st_mode & 0o077:
            raise UmbelError(f"Expected a key only its owner can read, got auth_key={path}. Run chmod 600 {path}.")
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UmbelError(f"Expected a readable key, got auth_key={path} ({error.strerror}).") from error
    except (ValueError, TypeError) as error:
        raise UmbelError(f"Expected an OpenSSH key without passphrase, got auth_key={path}.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UmbelError(f"Expected a key on a NIST curve, got auth_key={path}. Make it with umbel provision.")
    return key


def _known_node(store: str, settings: NodeSettings) -> int | None:
    before = read_status(store) or {}
    number = before.get("node_id")
    return number if before.get("superlink") == settings.superlink and isinstance(number, int) else None


def _keep_newest(table: dict[int, Any]) -> None:
    while len(table) > _KEPT_RUNS:
        del table[next(iter(table))]
