"""The resident node against Flower: what it uses of Flower's internals is what it was, and what it says is little."""

import fcntl
import inspect
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.supernode.fleet_http_client import FleetHttpClient

import client.node
from client.loop import Forgotten, NotAdmitted, Occupied, Rejected, RunOver, Unreachable
from client.node import FlowerLink, Received, Signature, check_flower_version, paced, run_node
from client.settings import NodeSettings
from common import wire
from common.config import DataConfig, SyntheticConfig, to_toml
from common.errors import UmbelError

NODE, RUN = 11, 5
BUNDLE = "ab" * 32
Handler = Callable[[Any], Any]


class SuperLink:
    """What a SuperLink answers to a node: one message, whose reply it takes."""

    def __init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
        message = wire.request(b"the broadcast", bytes(64), node_id=NODE, action="train.contribute", ttl=60)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.message = message
        self.objects = {name: thing.deflate() for name, thing in get_all_nested_objects(message).items()}
        self.calls: list[str] = []
        self.paths: list[str] = []
        self.pushed: dict[str, bytes] = {}
        self.replies: list[Any] = []
        self.runtimes: list[float] = []
        self.fails: dict[str, httpx.Response | Exception] = {}
        self.waiting = True
        self.known = True

    def handle(self, request: httpx.Request) -> httpx.Response:
        """One request."""
        name = "".join(part.capitalize() for part in request.url.path.rsplit("/", 1)[1].split("-"))
        self.calls.append(name)
        self.paths.append(request.url.path)
        if (failure := self.fails.pop(name, None)) is not None:
            if isinstance(failure, Exception):
                raise failure
            return failure
        answer = getattr(self, name)(request.content)
        return httpx.Response(200, content=answer.SerializeToString(), request=request)

    def ActivateNode(self, _: bytes) -> Any:
        return fleet_pb2.ActivateNodeResponse(node_id=NODE)

    def SendNodeHeartbeat(self, _: bytes) -> Any:
        return heartbeat_pb2.SendNodeHeartbeatResponse(success=self.known)

    def PullMessages(self, _: bytes) -> Any:
        if not self.waiting:
            return fleet_pb2.PullMessagesResponse()
        bare = message_to_proto(remove_content_from_message(self.message))
        return fleet_pb2.PullMessagesResponse(
            messages_list=[bare], message_object_trees=[get_object_tree(self.message)]
        )

    def PullObject(self, content: bytes) -> Any:
        asked = message_pb2.PullObjectRequest.FromString(content)
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=self.objects[asked.object_id]
        )

    def GetRun(self, _: bytes) -> Any:
        response = run_pb2.GetRunResponse()
        response.run.fab_hash = BUNDLE
        return response

    def ConfirmMessageReceived(self, _: bytes) -> Any:
        return message_pb2.ConfirmMessageReceivedResponse()

    def PushMessages(self, content: bytes) -> Any:
        pushed = fleet_pb2.PushMessagesRequest.FromString(content)
        self.replies.append(pushed.messages_list[0])
        self.runtimes += pushed.clientapp_runtime_list
        names: list[str] = []

        def walk(tree: Any) -> None:
            names.append(tree.object_id)
            for child in tree.children:
                walk(child)

        walk(pushed.message_object_trees[0])
        return fleet_pb2.PushMessagesResponse(objects_to_push=names, session_id="s")

    def PushObject(self, content: bytes) -> Any:
        pushed = message_pb2.PushObjectRequest.FromString(content)
        self.pushed[pushed.object_id] = pushed.object_content
        return message_pb2.PushObjectResponse(stored=True)

    def DeactivateNode(self, _: bytes) -> Any:
        return fleet_pb2.DeactivateNodeResponse()


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> Iterator[SuperLink]:
    """A SuperLink that the next `FlowerLink` finds at its address."""
    made = SuperLink()
    real = httpx.Client
    opened: list[httpx.Client] = []

    def client_of(**options: Any) -> httpx.Client:
        opened.append(real(transport=httpx.MockTransport(made.handle), timeout=options["timeout"]))
        return opened[-1]

    monkeypatch.setattr(httpx, "Client", client_of)
    yield made
    for one in opened:
        one.close()


def settings_of(folder: Path, **changes: Any) -> NodeSettings:
    """Settings with a key, without TLS."""
    key = ec.generate_private_key(ec.SECP384R1())
    path = folder / "auth.key"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    known = {"store": str(folder / "node.sqlite"), "public_key": "0" * 64, "mu_max": "1", "data": DataConfig()}
    return NodeSettings(**(known | {"superlink": "localhost:9", "auth_key": str(path)} | changes))


def link_of(folder: Path, answer: Any = None, *, known_node: int | None = None, **changes: Any) -> FlowerLink:
    """A link whose app answers every message with "sealed"."""

    def app(message: Message, context: Context) -> Message:
        assert (context.run_id, context.node_id) == (RUN, NODE)
        return wire.answer(b"sealed", message)

    settings = settings_of(folder, **changes)
    return FlowerLink(settings, answer or app, node_config={}, heartbeat=30.0, known_node=known_node)


def served(link: FlowerLink) -> Message:
    """The reply to the message that waits, pushed."""
    link.connect()
    work = link.pull()
    assert work is not None
    reply = link.compute(link.fetch(work))
    link.push(work, reply)
    return reply


def test_a_message_is_fetched_computed_and_answered(tmp_path: Path, superlink: SuperLink) -> None:
    """What the SuperLink gets is the app's reply; it gets no time, and the node asks for no bundle."""
    seen: list[tuple[bytes, bytes]] = []

    def app(message: Message, _: Context) -> Message:
        seen.append(wire.read_request(message))
        return wire.answer(b"sealed", message)

    reply = served(link_of(tmp_path, app))
    assert seen == [(b"the broadcast", bytes(64))]
    assert superlink.runtimes == [0.0]
    assert superlink.replies[0].metadata.reply_to_message_id == superlink.message.metadata.message_id
    arrived = inflate_object_from_contents(reply.metadata.message_id, dict(superlink.pushed))
    assert isinstance(arrived, Message)
    assert wire.read_answer(arrived) == b"sealed"
    assert not {"GetFab", "GetRun", "RegisterNode"} & set(superlink.calls)
    assert all(path.startswith("/v1/fleet/") for path in superlink.paths)  # all that the proxy lets through


def test_a_bundle_that_is_not_allowed_is_refused_before_anything_is_computed(
    tmp_path: Path, superlink: SuperLink
) -> None:
    """The owner's list names hashes; a run of any other bundle gets a code."""
    called: list[int] = []

    def app(message: Message, _: Context) -> Message:
        called.append(1)
        return wire.answer(b"sealed", message)

    refused = served(link_of(tmp_path, app, bundle_hashes=("cd" * 32,)))
    assert wire.read_answer(refused) == wire.Refusal(code="policy_bundle")
    assert called == []
    allowed = served(link_of(tmp_path, app, bundle_hashes=("cd" * 32, BUNDLE)))
    assert wire.read_answer(allowed) == b"sealed"
    assert "GetFab" not in superlink.calls


def test_an_app_that_raises_is_a_code(tmp_path: Path, superlink: SuperLink) -> None:
    """Not even the type of an exception leaves the node."""

    def app(*_: Any) -> Message:
        raise ValueError("ada's income is 7")

    reply = served(link_of(tmp_path, app))
    assert wire.read_answer(reply) == wire.Refusal(code="error")
    assert not any(b"income" in data or b"ValueError" in data for data in superlink.pushed.values())


def response(status: int, **options: Any) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("POST", "http://localhost:9"), **options)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (response(401), Forgotten),
        (response(403), RunOver),
        (response(413), Rejected),
        (response(404), Unreachable),
        (response(429), Unreachable),
        (response(500), Unreachable),
        (response(502), Unreachable),
        (response(503), Unreachable),
        (response(200, content=b"<html>"), Unreachable),
        (httpx.ConnectError("[Errno -2] Name or service not known"), Unreachable),
        (httpx.ReadTimeout("slow"), Unreachable),
        (httpx.RemoteProtocolError("gone"), Unreachable),
    ],
)
def test_each_failure_is_one_of_the_loops(
    tmp_path: Path, superlink: SuperLink, failure: Any, expected: type[Exception]
) -> None:
    """A proxy that starts, a name that does not resolve and a run that ended are told apart."""
    link = link_of(tmp_path)
    link.connect()
    superlink.fails["PullMessages"] = failure
    with pytest.raises(expected):
        link.pull()


def test_a_certificate_that_is_not_accepted_is_named(tmp_path: Path, superlink: SuperLink) -> None:
    """It may be renewed, so the node goes on trying; its log says what is wrong."""
    error = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]")
    error.__cause__ = ssl.SSLCertVerificationError(1, "self-signed certificate")
    superlink.fails["ActivateNode"] = error
    with pytest.raises(Unreachable, match="certificate was not accepted"):
        link_of(tmp_path).connect()


def test_a_refused_signature_names_the_clocks(tmp_path: Path, superlink: SuperLink) -> None:
    """Flower signs the time and nothing else, and its answer has the server's."""
    behind = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    superlink.fails["ActivateNode"] = response(401, headers={"date": behind})
    with pytest.raises(NotAdmitted, match=r"clock is 3[56]\d\d s behind the server's") as refused:
        link_of(tmp_path).connect()
    assert refused.value.exit_code == 6
    superlink.fails["ActivateNode"] = response(401)
    with pytest.raises(NotAdmitted, match="Register this node's key"):
        link_of(tmp_path).connect()


def test_a_node_that_was_killed_is_back_at_once(tmp_path: Path, superlink: SuperLink) -> None:
    """A SuperLink activates no node that it thinks is there, for a minute; a sign of life will do."""
    superlink.fails["ActivateNode"] = response(412)
    with pytest.raises(Occupied):
        link_of(tmp_path).connect()
    assert link_of(tmp_path, known_node=NODE).connect() == NODE
    assert superlink.calls[-1] == "SendNodeHeartbeat"
    superlink.known = False
    assert link_of(tmp_path, known_node=99).connect() == NODE
    assert superlink.calls[-1] == "ActivateNode"


def test_messages_that_are_none_are_given_up(tmp_path: Path, superlink: SuperLink) -> None:
    """Bytes that Flower cannot read, and content that is gone."""
    link = link_of(tmp_path)
    link.connect()
    work = link.pull()
    assert work is not None
    name = superlink.message.metadata.message_id
    superlink.objects[name] = b"garbage"
    with pytest.raises(Rejected):
        link.fetch(work)
    superlink.PullObject = lambda _: message_pb2.PullObjectResponse(object_found=False)  # type: ignore[method-assign]
    with pytest.raises(Rejected):
        link.fetch(work)
    record = RecordDict()
    superlink.objects[record.object_id] = record.deflate()
    superlink.PullObject = SuperLink.PullObject.__get__(superlink)  # type: ignore[method-assign]
    none = Received(message=work.message, tree=message_pb2.ObjectTree(object_id=record.object_id))
    none.message.metadata.__dict__["_message_id"] = record.object_id
    with pytest.raises(Rejected, match="none"):
        link.fetch(none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"superlink": None}, "Expected superlink"),
        ({"superlink": "nowhere"}, "Expected superlink"),
        ({"superlink": "fed.example.org:9443"}, "Expected root_certificates"),
        ({"root_certificates": "/missing/ca.crt"}, "root_certificates"),
        ({"auth_key": "/missing/auth.key"}, "auth_key"),
    ],
)
def test_settings_that_do_not_say_how_to_connect_are_bad_input(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Before anything is sent; without TLS a node talks to its own machine only."""
    with pytest.raises(UmbelError, match=message) as refused:
        link_of(tmp_path, **changes)
    assert refused.value.exit_code == 2


def test_a_key_that_others_can_read_or_of_another_kind_is_bad_input(tmp_path: Path) -> None:
    """Flower takes keys on the NIST curves."""
    settings = settings_of(tmp_path)
    path = Path(str(settings.auth_key))
    path.chmod(0o644)
    with pytest.raises(UmbelError, match="chmod 600"):
        FlowerLink(settings, None, node_config={}, heartbeat=30.0)  # type: ignore[arg-type]
    other = ed25519.Ed25519PrivateKey.generate()
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(UmbelError, match="NIST"):
        FlowerLink(settings, None, node_config={}, heartbeat=30.0)  # type: ignore[arg-type]


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its internals may be others: the stock node is the way then."""
    check_flower_version()
    monkeypatch.setattr(client.node, "package_version", "1.42.0")
    with pytest.raises(UmbelError, match=r"Expected flwr 1\.41.*flower-supernode"):
        check_flower_version()


def test_flowers_own_check_accepts_the_signature() -> None:
    """The contract with the server's side: the same headers, the same thing signed."""
    key = ec.generate_private_key(ec.SECP384R1())
    request = httpx.Request("POST", "http://localhost:9/v1/fleet/activate-node")
    context = ProtobufRequestContext(rpc_method="", message=fleet_pb2.ActivateNodeRequest(), request=request)
    Signature(key).intercept(context, lambda _: response(200))
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    activate = fleet_pb2.ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()))
    asked = SimpleNamespace(headers=request.headers, state=SimpleNamespace(protobuf_request=activate))
    authenticate_node(asked)  # type: ignore[arg-type]
    request.headers["X-Wrong"] = "1"
    activate.public_key = b"another"
    with pytest.raises(Exception, match="401"):
        authenticate_node(asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "request_fields"),
    [
        ("RegisterNode", (fleet_pb2.RegisterNodeFleetRequest, {"public_key"})),
        ("ActivateNode", (fleet_pb2.ActivateNodeRequest, {"public_key", "heartbeat_interval"})),
        ("DeactivateNode", (fleet_pb2.DeactivateNodeRequest, {"node_id"})),
        ("SendNodeHeartbeat", (heartbeat_pb2.SendNodeHeartbeatRequest, {"node", "heartbeat_interval"})),
        ("PullMessages", (fleet_pb2.PullMessagesRequest, {"node"})),
        ("GetRun", (run_pb2.GetRunRequest, {"node", "run_id"})),
        ("PullObject", (message_pb2.PullObjectRequest, {"node", "run_id", "object_id"})),
        ("ConfirmMessageReceived", (message_pb2.ConfirmMessageReceivedRequest, {"node", "run_id"})),
        ("PushObject", (message_pb2.PushObjectRequest, {"object_content", "session_id"})),
        ("PushMessages", (fleet_pb2.PushMessagesRequest, {"messages_list", "clientapp_runtime_list"})),
    ],
)
def test_the_internals_of_flower_are_what_they_were(method: str, request_fields: tuple[Any, set[str]]) -> None:
    """Each call of the client takes its request, and its request has the fields that are filled in."""
    kind, fields = request_fields
    assert list(inspect.signature(getattr(FleetHttpClient, method)).parameters) == ["self", "request"]
    assert fields <= set(kind.DESCRIPTOR.fields_by_name)


def test_the_rest_of_flowers_internals_are_what_they_were() -> None:
    """Signatures and status codes that `client.node` counts on."""
    made = inspect.signature(FleetHttpClient.from_server_address).parameters
    assert list(made)[:4] == ["server_address", "insecure", "root_certificates", "interceptors"]
    assert list(inspect.signature(inflate_object_from_contents).parameters)[:2] == ["object_id", "object_contents"]
    assert list(inspect.signature(remove_content_from_message).parameters) == ["message"]
    assert list(inspect.signature(message_from_proto).parameters) == ["message_proto"]
    codes = {
        ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED: 403,
        ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED: 412,
        ApiErrorCode.FLEET_GET_RUN_FAILED: 403,
    }
    assert {code: API_ERROR_MAP[code].http_status_code for code in codes} == codes


def test_nodes_that_ask_seldom_give_signs_of_life_seldom() -> None:
    """Within what Flower allows: 10 to 1800 seconds."""
    assert [paced(poll).heartbeat for poll in (0.1, 1, 60, 3600)] == [30, 30, 120, 1800]


def test_a_store_that_is_broken_is_said_before_anything_is_sent(tmp_path: Path, superlink: SuperLink) -> None:
    """Exit code 2 and no call, where settings or data are wrong."""
    path = tmp_path / "node.toml"
    path.write_text('store = "node.sqlite"\n')
    with pytest.raises(UmbelError, match="Expected valid settings"):
        run_node(path)
    assert superlink.calls == []


def test_two_resident_nodes_of_one_store_are_one_too_many(tmp_path: Path, superlink: SuperLink) -> None:
    """A node that comes back uses the number it had, so a second one would look like the first."""
    settings = settings_of(tmp_path, data=DataConfig(synthetic=SyntheticConfig(users=2, dimension=3)))
    path = tmp_path / "node.toml"
    path.write_text(to_toml(settings.model_dump(exclude_none=True, by_alias=True)))
    superlink.waiting = False
    with (tmp_path / "node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UmbelError, match="no other umbel node"):
            run_node(path, once=True)
    assert superlink.calls == []
    run_node(path, once=True)
    assert superlink.calls == ["ActivateNode", "PullMessages", "DeactivateNode"]
    run_node(path, once=True)
    assert superlink.calls[3] == "SendNodeHeartbeat"


def test_a_node_loads_no_library_that_it_does_not_need() -> None:
    """No torch, ray, scipy, opacus, pandas, matplotlib or accountant, nor a web server."""
    unwanted = (
        *("torch", "ray", "scipy", "opacus", "pandas", "matplotlib", "dp_accounting", "mpmath", "jinja2"),
        *("fastapi", "starlette", "sqlalchemy", "uvicorn", "pyarrow", "server", "umbel"),
    )
    code = f"import sys, client.node; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_the_internals_are_named_in_one_place() -> None:
    """Nobody else of the client's world imports from Flower, but for the app."""
    folder = Path(client.node.__file__).parent
    importing = {file.name for file in folder.glob("*.py") if re.search(r"^(from|import) flwr", file.read_text(), re.M)}
    assert importing == {"app.py", "node.py"}
