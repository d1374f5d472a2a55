"""The proxy as a process, before a SuperLink that is none and remembers what reaches it."""

import contextlib
import gc
import http.client
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server.certificates import certificate_pem, make_authority, make_server_certificate, new_key, to_pem

PULL = "/v1/fleet/pull-messages"
LIMIT = 100_000
BEGUN = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nContent-Length: 100001\r\n\r\n"

# The SuperLink of these tests ends without waiting for the proxy to close its connections.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class SuperLink:
    """Answers every request with what it saw, and keeps it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event.get("body", b"")
            more = event.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append({"path": scope["path"], "headers": headers, "length": len(body)})
        answer = json.dumps(self.seen[-1]).encode()
        sent = [(b"content-type", b"application/json"), (b"keep-alive", b"timeout=9"), (b"x-of-app", b"yes")]
        status = 403 if scope["path"].endswith("activate-node") else 200
        await send({"type": "http.response.start", "status": status, "headers": sent})
        for piece in (answer[:10], answer[10:]):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def write_certificates(folder: Path) -> None:
    """An authority, a server's certificate, and one of another authority."""
    now = datetime.now(UTC)
    for name in ("ours", "theirs"):
        authority_key, key = new_key(), new_key()
        authority = make_authority(authority_key, name=name, now=now)
        certificate = make_server_certificate(
            key.public_key(),
            hosts=["localhost", "127.0.0.1"],
            authority=authority,
            authority_key=authority_key,
            now=now,
        )
        (folder / f"{name}-ca.crt").write_bytes(certificate_pem(authority))
        (folder / f"{name}.crt").write_bytes(certificate_pem(certificate))
        (folder / f"{name}.key").write_bytes(to_pem(key))


@contextlib.contextmanager
def superlink(folder: Path, owner: str = "ours", port: int = 0) -> Iterator[tuple[SuperLink, int]]:
    app = SuperLink()
    config = uvicorn.Config(
        app,
        ssl_certfile=folder / f"{owner}.crt",
        ssl_keyfile=folder / f"{owner}.key",
        log_config=None,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield app, listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
            with warnings.catch_warnings():  # connections that it leaves open when it is told to hurry
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()


@contextlib.contextmanager
def proxy(folder: Path, upstream: int, *options: str) -> Iterator[int]:
    """A proxy that runs; what it logs is in `proxy.log`."""
    port = free_port()
    files = ["--ca", folder / "ours-ca.crt", "--cert", folder / "ours.crt", "--key", folder / "ours.key"]
    command = [sys.executable, "-m", "server.fleet_proxy", "--listen", f"127.0.0.1:{port}"]
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--superlink", f"localhost:{upstream}", *map(str, files), *options], stdout=log, stderr=log
        )
        try:
            for _ in range(500):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None, (folder / "proxy.log").read_text()
                time.sleep(0.02)
            yield port
        finally:
            process.terminate()
            assert process.wait(20) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("proxy")
    write_certificates(made)
    return made


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[tuple[SuperLink, int]]:
    options = ("--max-body", str(LIMIT))
    with superlink(folder) as (app, upstream), proxy(folder, upstream, *options) as port:
        yield app, port


@pytest.fixture
def link(running: tuple[SuperLink, int]) -> SuperLink:
    running[0].seen.clear()
    return running[0]


@pytest.fixture
def connection(running: tuple[SuperLink, int], folder: Path) -> Iterator[http.client.HTTPSConnection]:
    made = connect(folder, running[1])
    yield made
    made.close()


def connect(folder: Path, port: int) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=str(folder / "ours-ca.crt"))
    return http.client.HTTPSConnection("localhost", port, context=context, timeout=20)


def raw(folder: Path, port: int, request: bytes) -> bytes:
    """All that comes back until the connection is closed or silent."""
    context = ssl.create_default_context(cafile=str(folder / "ours-ca.crt"))
    plain = socket.create_connection(("127.0.0.1", port), 20)
    with context.wrap_socket(plain, server_hostname="localhost") as tls:
        tls.sendall(request)
        tls.settimeout(3)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := tls.recv(65536):
                answer += piece
                if answer.endswith(b"content-length: 0\r\n\r\n"):
                    break
        return answer


def test_what_is_for_the_fleet_passes(link: SuperLink, connection: http.client.HTTPSConnection) -> None:
    """Path, body, status and the answer's body are the same behind the proxy, on one connection after another."""
    for length in (0, 1, 70_000):
        connection.request("POST", PULL, b"x" * length, {"X-Of-Node": "signature"})
        answer = connection.getresponse()
        seen = json.loads(answer.read())
        assert (answer.status, seen["path"], seen["length"]) == (200, PULL, length)
        assert (seen["headers"]["x-of-node"], answer.getheader("x-of-app")) == ("signature", "yes")
    connection.request("POST", "/v1/fleet/activate-node", b"")
    refused = connection.getresponse()
    assert (refused.status, json.loads(refused.read())["path"]) == (403, "/v1/fleet/activate-node")


def test_a_body_without_a_length_passes(link: SuperLink, connection: http.client.HTTPSConnection) -> None:
    """Pieces go through as they come."""
    connection.request("POST", PULL, iter([b"ab", b"c" * 5000]), encode_chunked=True)
    assert json.loads(connection.getresponse().read())["length"] == 5002


def test_headers_of_one_hop_end_here(link: SuperLink, connection: http.client.HTTPSConnection) -> None:
    """Neither side hears what the other said to the proxy, or who the client is."""
    sent = {"Connection": "keep-alive, X-Private", "X-Private": "1", "TE": "trailers", "Proxy-Authorization": "x"}
    connection.request("POST", PULL, b"", sent)
    answer = connection.getresponse()
    seen = json.loads(answer.read())["headers"]
    assert {**seen, "host": ""} == {"host": "", "accept-encoding": "identity", "content-length": "0"}
    assert answer.getheader("keep-alive") is None
    assert answer.getheader("server") is None


TRICKS = [
    "/",
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/runtime/get-nodes",
    "/docs",
    "/openapi.json",
    "/health",
    "/healthz",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/%2E%2E%2Fcontrol%2Flist-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/..;/control/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages;x=1",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages?to=/v1/control/list-runs",
    "/v1/fleet//pull-messages",
    "//v1/fleet/pull-messages",
    "//v1/control/list-runs",
    "/./v1/fleet/pull-messages",
    "/v1//control/list-runs",
    "/V1/FLEET/PULL-MESSAGES",
    "/v1/Fleet/pull-messages",
    "/v1/fleet/pull%2dmessages",
    "/v1/fleet\\..\\control\\list-runs",
    "/v1/fleet/-",
    "/v1/fleet/pull-messages#/v1/control/list-runs",
    "https://localhost/v1/control/list-runs",
    "https://localhost/v1/fleet/pull-messages",
    "http://169.254.169.254/latest",
    "localhost:1",
    "*",
]


@pytest.mark.parametrize("target", TRICKS)
def test_everything_else_is_not_found(
    target: str, link: SuperLink, running: tuple[SuperLink, int], folder: Path
) -> None:
    """Nothing reaches SuperLink, and the answer does not tell what there is."""
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    answer = raw(folder, running[1], head.encode())
    date, rest = re.subn(rb"date: [^\r]+\r\n", b"", answer)[::-1]
    assert (date, rest) == (1, b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")  # devices compare clocks
    assert link.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE"])
def test_only_posts_pass(method: str, link: SuperLink, running: tuple[SuperLink, int], folder: Path) -> None:
    """The Fleet API has nothing else."""
    answer = raw(folder, running[1], f"{method} {PULL} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert link.seen == []


def test_one_request_cannot_hold_another(link: SuperLink, running: tuple[SuperLink, int], folder: Path) -> None:
    """With two lengths that contradict each other no second request comes out behind the proxy."""
    inner = b"POST /v1/control/list-runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    for lengths in (
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % (5 + len(inner)),
        b"Content-Length: 5\r\nContent-Length: %d\r\n" % (5 + len(inner)),
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length: +5\r\n",
    ):
        raw(
            folder,
            running[1],
            b"POST " + PULL.encode() + b" HTTP/1.1\r\nHost: a\r\n" + lengths + b"\r\n0\r\n\r\n" + inner,
        )
    assert {seen["path"] for seen in link.seen} <= {PULL}


def test_a_body_has_a_limit(link: SuperLink, running: tuple[SuperLink, int], folder: Path) -> None:
    """A length over the limit is refused at once; without a length, as soon as it is seen."""
    for body in (b"x" * (LIMIT + 1), iter([b"x" * 60_000, b"x" * 60_000])):
        device, status = connect(folder, running[1]), 0
        # whoever still writes when the connection is closed may not get to read the answer
        with contextlib.suppress(OSError, http.client.HTTPException):
            with contextlib.suppress(OSError):
                device.request("POST", PULL, body, encode_chunked=not isinstance(body, bytes))
            status = device.getresponse().status
        assert status in (413, 0)
        device.close()
    assert raw(folder, running[1], BEGUN).startswith(b"HTTP/1.1 413 ")
    device = connect(folder, running[1])
    device.request("POST", PULL, b"x" * LIMIT)
    assert device.getresponse().status == 200
    device.close()
    assert [seen["length"] for seen in link.seen] == [LIMIT]


def test_another_superlink_is_not_spoken_to(folder: Path) -> None:
    """A certificate of another authority ends it before anything is sent on; the log says so, and names nobody."""
    with superlink(folder, "theirs") as (app, upstream), proxy(folder, upstream) as port:
        device = connect(folder, port)
        device.request("POST", PULL, b"secret", {"X-Of-Node": "secret"})
        assert (device.getresponse().status, app.seen) == (502, [])
        device.close()
    said = (folder / "proxy.log").read_text()
    assert said.count("no answer from SuperLink") == 1
    assert "secret" not in said


def test_a_superlink_that_comes_back_is_found(folder: Path) -> None:
    """While it is away the answer is 502, which nodes try again, and /healthz on loopback says 503."""
    upstream, health = free_port(), free_port()
    with proxy(folder, upstream, "--health-port", str(health)) as port:
        device = connect(folder, port)

        def asked() -> tuple[int, int]:
            device.request("POST", PULL, b"")
            answer = device.getresponse()
            answer.read()
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", health, timeout=20)) as operator:
                operator.request("GET", "/healthz")
                return answer.status, operator.getresponse().status

        assert asked() == (502, 503)
        with superlink(folder, port=upstream):
            assert asked() == (200, 200)
        device.close()


def test_clients_that_wait_are_sent_away(folder: Path) -> None:
    """A connection without a request, or with half of one, is closed, half a body answered 408; too many get 503."""
    limits = ("--client-seconds", "0.5", "--max-connections", "3")
    with superlink(folder) as (_, upstream), proxy(folder, upstream, *limits) as port, contextlib.ExitStack() as stack:
        context = ssl.create_default_context(cafile=str(folder / "ours-ca.crt"))
        idle = []
        for _ in range(3):
            plain = socket.create_connection(("127.0.0.1", port), 20)
            idle.append(stack.enter_context(context.wrap_socket(plain, server_hostname="localhost")))
        idle[1].sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: ")
        assert asked(folder, port) == 503
        assert [one.recv(100) for one in idle] == [b"", b"", b""]
        assert asked(folder, port) == 200
        assert raw(folder, port, BEGUN.replace(b"100001", b"9") + b"half").startswith(b"HTTP/1.1 408 ")


def asked(folder: Path, port: int) -> int:
    """The status of a request on a connection of its own."""
    with contextlib.closing(connect(folder, port)) as device:
        device.request("POST", PULL, b"")
        return device.getresponse().status


def test_nothing_is_written_about_requests(folder: Path) -> None:
    """Whoever calls, in whatever way, leaves no line."""
    with superlink(folder) as (_, upstream), proxy(folder, upstream) as port:
        raw(folder, port, b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        raw(folder, port, b"GET /docs HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
        raw(folder, port, b"\x00\x01 nonsense\r\n\r\n")
    assert (folder / "proxy.log").read_text() == ""


def test_files_that_are_missing_are_named(folder: Path) -> None:
    """Exit code 2 and one line, before anything listens."""
    command = [sys.executable, "-m", "server.fleet_proxy", "--listen", "127.0.0.1:1", "--superlink", "localhost:2"]
    files = ["--ca", str(folder / "none.crt"), "--cert", str(folder / "ours.crt"), "--key", str(folder / "ours.key")]
    ended = subprocess.run([*command, *files], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, "none.crt" in ended.stderr) == (2, True)
