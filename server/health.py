"""Whether a service of the federation answers: Flower's gRPC health service, our proxy's TLS, our metrics page.

    python -m server.health grpc://127.0.0.1:9090
    python -m server.health tls://localhost:9443 --ca ca.crt
    python -m server.health http://127.0.0.1:9464/metrics

Exit code 0 where it answers, 1 where it does not: what a container's health check calls. It sends nothing but the
question, and asks nothing but the address that it was given.
"""

import argparse
import http.client
import socket
import ssl
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from common.errors import UmbelError

_SECONDS = 3.0
_OK = 200
_DIRECT = (("grpc.enable_http_proxy", 0),)  # a health service is on this machine, whatever the environment says


def is_serving(address: str, *, timeout: float = _SECONDS) -> bool:
    """Whether the gRPC health service (grpc.health.v1) at "host:port" says SERVING within `timeout` seconds.

    SuperLink, SuperNode and the executor have one where they are started with `--health-server-address`. It knows
    that the process lives and its event loop turns, no more.
    """
    with grpc.insecure_channel(address, options=_DIRECT) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError:
            return False
    return bool(answer.status == HealthCheckResponse.SERVING)


def accepts_tls(host: str, port: int, ca: str, *, timeout: float = _SECONDS) -> bool:
    """Whether a TLS server answers whose certificate is for `host` and was signed by the CA in the file `ca`."""
    context = ssl.create_default_context(cafile=ca)
    try:
        with socket.create_connection((host, port), timeout) as plain, context.wrap_socket(plain, server_hostname=host):
            return True
    except OSError:
        return False


def answers_http(host: str, port: int, path: str, *, timeout: float = _SECONDS) -> bool:
    """Whether a page is there."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == _OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def answers(address: str, ca: str | None = None) -> bool:
    """Whether the service at an address with its scheme answers.

    Raises:
        UmbelError: If it is no such address, or a TLS address comes without a CA.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.scheme not in ("grpc", "http", "tls"):
        raise UmbelError(f"Expected grpc://HOST:PORT, tls://HOST:PORT or http://HOST:PORT/PATH, got {address!r}.")
    if parts.scheme == "grpc":
        return is_serving(parts.netloc)
    if parts.scheme == "http":
        return answers_http(host, port, parts.path or "/")
    if ca is None:
        raise UmbelError("Expected --ca FILE with tls://, got none. Name the federation's ca.crt.")
    return accepts_tls(host, port, ca)


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m server.health", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", help="grpc://HOST:PORT, tls://HOST:PORT or http://HOST:PORT/PATH")
    parser.add_argument("--ca", help="certificate of the CA, for tls://")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Ask once; returns the exit code."""
    arguments = argument_parser().parse_args(words)
    try:
        return 0 if answers(arguments.address, arguments.ca) else 1
    except (UmbelError, OSError) as error:
        sys.stderr.write(f"server.health: error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
