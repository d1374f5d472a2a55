"""The door for devices: a TLS reverse proxy in front of SuperLink that knows the Fleet API and nothing else.

SuperLink answers its Control and Runtime APIs on the same port, to whoever reaches it; this keeps devices from
reaching it. A request is passed on if its target is, byte for byte, `/v1/fleet/` and a plain name; every other one
is answered 404 here, with nothing in the answer, so that no way of writing a path is left to disagree about. What is
passed on is a new request that is made from the name, never from the client's target.

Nothing about requests is logged or stored: who calls when stays between the device and this process.

    python -m server.fleet_proxy --listen 0.0.0.0:9443 --superlink superlink:8443 --ca ca.crt --cert c.pem --key k.pem
"""

import argparse
import asyncio
import contextlib
import logging
import math
import re
import resource
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import UmbelError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_LOG = logging.getLogger("umbel.proxy")
_PASSED = re.compile(rb"/v1/fleet/[a-z]+(?:-[a-z]+)*")
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_SENT_ON = _HOP_BY_HOP | {b"host", b"expect", b"content-length"}
_NOT_SENT_BACK = _HOP_BY_HOP | {b"server", b"date"}
_LONGEST_HEADERS = 16 * 1024
_KEPT_SECONDS = 3.0
"""SuperLink closes an idle connection after 5; a request into that would be lost."""
_NO_BODY: Headers = [(b"content-length", b"0")]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client can take of this process and of SuperLink.

    Attributes:
        body: Most bytes of a request; the Fleet API cuts arrays into pieces of 5 MiB.
        connections: Most clients connected at once.
        upstream: Most requests at SuperLink at once; the others wait here.
        client_seconds: For a client to begin a request, on a new connection or one that was kept, and to send the next
            piece of a body.
        answer_seconds: For SuperLink to send the next piece of an answer.
        connect_seconds: To connect to SuperLink.
    """

    body: int = 16 * 2**20
    connections: int = 4096
    upstream: int = 64
    client_seconds: float = 30.0
    answer_seconds: float = 60.0
    connect_seconds: float = 5.0


class _BodyRefusedError(Exception):
    """The client's body is too large, too slow, or ended before its time; `status` says which."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class FleetProxy:
    """The ASGI application.

    Args:
        upstream: An HTTP client that verifies SuperLink's certificate.
        superlink: Its address, `https://host:port`.
        limits: On a request.
    """

    def __init__(self, upstream: httpx.AsyncClient, superlink: str, limits: Limits) -> None:
        self._upstream = upstream
        self._superlink = superlink
        self._limits = limits
        self._is_up: bool | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":  # a web socket is closed by not being accepted
            return
        target: bytes = scope.get("raw_path") or b""
        is_fleet = scope["method"] == "POST" and not scope["query_string"] and _PASSED.fullmatch(target)
        if not is_fleet:
            await _answer(send, 404)
            return
        length = _length(scope["headers"])
        if length is not None and length > self._limits.body:
            await _answer(send, 413)
            return
        await self._pass_on(target.decode("ascii"), scope["headers"], length, receive, send)

    async def _pass_on(self, path: str, headers: Headers, length: int | None, receive: Receive, send: Send) -> None:
        named = _named_in_connection(headers)
        kept = [(name, value) for name, value in headers if name not in _NOT_SENT_ON | named]
        if length is not None:
            kept.append((b"content-length", str(length).encode()))
        # made by hand: the client's own defaults, such as an encoding it would accept, are not the device's
        request = httpx.Request("POST", self._superlink + path, headers=kept, content=self._body(receive))
        request.extensions["timeout"] = {
            "connect": self._limits.connect_seconds,
            "read": self._limits.answer_seconds,
            "write": self._limits.answer_seconds,
            "pool": self._limits.answer_seconds,
        }
        try:
            response = await self._upstream.send(request, stream=True)
        except _BodyRefusedError as refused:
            await _answer(send, refused.status)
            return
        except httpx.TimeoutException as error:
            self._noticed(type(error).__name__)
            await _answer(send, 504)
            return
        except httpx.TransportError as error:
            self._noticed(type(error).__name__)
            await _answer(send, 502)
            return
        self._noticed(None)
        # where SuperLink breaks off, so does this: an answer that is not complete closes the client's connection
        async with contextlib.aclosing(response):
            with contextlib.suppress(httpx.TransportError):
                await _send_back(response, send)

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        """The client's body, piece by piece."""
        seen = 0
        more = True
        while more:
            try:
                event = await asyncio.wait_for(receive(), self._limits.client_seconds)
            except TimeoutError:
                raise _BodyRefusedError(408) from None
            if event["type"] == "http.disconnect":
                raise _BodyRefusedError(400)
            piece: bytes = event.get("body", b"")
            seen += len(piece)
            if seen > self._limits.body:
                raise _BodyRefusedError(413)
            more = event.get("more_body", False)
            if piece:
                yield piece

    def _noticed(self, trouble: str | None) -> None:
        """Say once that SuperLink went away, and once that it is back."""
        is_up = trouble is None
        if is_up != self._is_up and not (is_up and self._is_up is None):
            _LOG.warning("SuperLink answers again" if is_up else f"no answer from SuperLink: {trouble}")
        self._is_up = is_up


async def _send_back(response: httpx.Response, send: Send) -> None:
    named = _named_in_connection(response.headers.raw)
    headers = [(n, v) for n, v in response.headers.raw if n.lower() not in _NOT_SENT_BACK | named]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    async for piece in response.aiter_raw():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _answer(send: Send, status: int) -> None:
    headers = _NO_BODY
    if status in (400, 408, 413):
        headers = [*headers, (b"connection", b"close")]  # its body was not read to the end
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The length that counts; h11 has already refused one that is no number."""
    named = dict(headers)
    return None if b"transfer-encoding" in named or b"content-length" not in named else int(named[b"content-length"])


def _named_in_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Headers that are for this hop because `Connection` says so."""
    listed = [value for name, value in headers if name.lower() == b"connection"]
    return frozenset(word.strip().lower() for value in listed for word in value.split(b","))


async def health(scope: Scope, receive: Receive, send: Send, *, is_well: Callable[[], Awaitable[bool]]) -> None:
    """`/healthz`: 200 if SuperLink answers, else 503; the ASGI application of the port for the operator."""
    del receive
    if scope["type"] == "http":
        known = scope.get("raw_path") == b"/healthz" and scope["method"] == "GET"
        await _answer(send, 404 if not known else 200 if await is_well() else 503)


class PatientOnlyWithWork(H11Protocol):
    """HTTP/1.1 that closes a connection on which no request is begun in time; uvicorn waits for ever for the first."""

    head_seconds = 30.0

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._last_seen: object = self
        self._look()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._last_seen is self.cycle:
            self.transport.abort()  # closing would wait for the client once more, to end TLS with it
            return
        self._last_seen = self.cycle if is_idle else self
        self.loop.call_later(self.head_seconds, self._look)


def verifying_context(ca: Path) -> ssl.SSLContext:
    """TLS to SuperLink: nothing but our own CA is trusted, and the name has to be in the certificate."""
    context = ssl.create_default_context(cafile=str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def upstream_client(ca: Path, limits: Limits) -> httpx.AsyncClient:
    """The client for SuperLink; proxies of the environment are not for it."""
    pool = httpx.Limits(
        max_connections=limits.upstream, max_keepalive_connections=limits.upstream, keepalive_expiry=_KEPT_SECONDS
    )
    return httpx.AsyncClient(verify=verifying_context(ca), trust_env=False, limits=pool, follow_redirects=False)


async def serve(
    *,
    listen: tuple[str, int],
    superlink: str,
    ca: Path,
    cert: Path,
    key: Path,
    health_port: int | None = None,
    limits: Limits,
) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are finished first.

    Args:
        listen: Host and port for devices.
        superlink: `host:port` of SuperLink, as its certificate names it.
        ca: The CA that signed SuperLink's certificate.
        cert: Certificate for devices.
        key: Its private key.
        health_port: Port on loopback for `/healthz`, if any.
        limits: On clients.
    """
    address = f"https://{superlink}"
    async with upstream_client(ca, limits) as upstream:
        proxy = FleetProxy(upstream, address, limits)

        async def is_well() -> bool:
            try:
                return (await upstream.get(f"{address}/health", timeout=5)).is_success
            except httpx.HTTPError:
                return False

        async def health_app(scope: Scope, receive: Receive, send: Send) -> None:
            await health(scope, receive, send, is_well=is_well)

        protocol = type("Protocol", (PatientOnlyWithWork,), {"head_seconds": limits.client_seconds})
        door = uvicorn.Server(
            uvicorn.Config(
                proxy,
                host=listen[0],
                port=listen[1],
                http=protocol,
                limit_concurrency=limits.connections,
                timeout_keep_alive=math.ceil(limits.client_seconds),
                ssl_certfile=cert,
                ssl_keyfile=key,
                ssl_ciphers="ECDHE+AESGCM:ECDHE+CHACHA20",
                **_QUIET,
            )
        )
        servers = [door]
        if health_port is not None:
            servers.append(uvicorn.Server(uvicorn.Config(health_app, host="127.0.0.1", port=health_port, **_QUIET)))
        await _run_together(servers)


_QUIET: dict[str, Any] = {
    "access_log": False,
    "log_config": None,
    "server_header": False,
    "date_header": True,  # by which devices compare their clocks
    "proxy_headers": False,
    "lifespan": "off",
    "ws": "none",
    "h11_max_incomplete_event_size": _LONGEST_HEADERS,
    "timeout_graceful_shutdown": 3,  # a device that keeps a connection does not see that it is to be closed
}


async def _run_together(servers: Sequence[uvicorn.Server]) -> None:
    """Run servers in one loop; a signal, or the end of one of them, ends all."""

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    async def run(server: uvicorn.Server) -> None:
        try:
            # without uvicorn's own handlers of signals, of which only the last server's would be heard
            await server._serve()
        finally:
            stop()

    await asyncio.gather(*(run(server) for server in servers))


def address_of(text: str) -> tuple[str, int]:
    """`host:port` as a pair.

    Raises:
        UmbelError: If it is something else.
    """
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 2**16):
        raise UmbelError(f"Expected host:port, got {text!r}. Write it as in 0.0.0.0:9443.")
    return host.strip("[]"), int(port)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="python -m server.fleet_proxy", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="where devices connect")
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="as its certificate names it")
    parser.add_argument("--ca", required=True, type=Path, help="CA of SuperLink's certificate")
    parser.add_argument("--cert", required=True, type=Path, help="certificate for devices")
    parser.add_argument("--key", required=True, type=Path, help="its private key")
    parser.add_argument("--health-port", type=int, help="serve /healthz on this port of 127.0.0.1")
    parser.add_argument("--max-body", type=int, default=defaults.body, metavar="BYTES", help="of a request")
    parser.add_argument("--client-seconds", type=float, default=defaults.client_seconds, metavar="S")
    parser.add_argument("--max-connections", type=int, default=defaults.connections, metavar="N")
    parser.add_argument("--max-upstream", type=int, default=defaults.upstream, metavar="N")
    return parser.parse_args(arguments)


def _allow_files(count: int) -> None:
    """As many open files as the connections need, where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = _arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of every request that is none
    limits = Limits(
        body=given.max_body,
        connections=given.max_connections,
        upstream=given.max_upstream,
        client_seconds=given.client_seconds,
    )
    _allow_files(limits.connections + limits.upstream + 64)
    try:
        for path in (given.ca, given.cert, given.key):
            if not path.is_file():
                raise UmbelError(f"Expected a file, got {path}. Make it with `umbel provision`.")
        asyncio.run(
            serve(
                listen=address_of(given.listen),
                superlink="{}:{}".format(*address_of(given.superlink)),
                ca=given.ca,
                cert=given.cert,
                key=given.key,
                health_port=given.health_port,
                limits=limits,
            )
        )
    except UmbelError as error:
        _LOG.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
