"""Asking services whether they answer."""

import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from flwr.supercore.grpc_health import run_health_server_grpc_no_tls
from prometheus_client import CollectorRegistry, start_http_server

from server import certificates
from server.health import accepts_tls, is_serving, main


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_flowers_health_server_is_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own health server says it serves, whatever proxy the environment names, until it ends."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    address = f"127.0.0.1:{closed_port()}"
    assert not is_serving(address)
    server = run_health_server_grpc_no_tls(address)
    assert is_serving(address)
    assert main([f"grpc://{address}"]) == 0
    server.stop(None).wait()
    assert main([f"grpc://{address}"]) == 1


def test_whoever_accepts_and_says_nothing_is_not_serving() -> None:
    """A process that hangs is seen within the time limit."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not is_serving("{}:{}".format(*listener.getsockname()), timeout=0.3)


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[int]:
    """A TLS server for localhost; its CA is in ca.crt."""
    authority_key, key, now = certificates.new_key(), certificates.new_key(), datetime.now(UTC)
    authority = certificates.make_authority(authority_key, name="test", now=now)
    certificate = certificates.make_server_certificate(
        key.public_key(), hosts=["localhost"], authority=authority, authority_key=authority_key, now=now
    )
    (tmp_path / "ca.crt").write_bytes(certificates.certificate_pem(authority))
    (tmp_path / "tls.crt").write_bytes(certificates.certificate_pem(certificate))
    (tmp_path / "tls.key").write_bytes(certificates.to_pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(connection, server_side=True):
                    pass
            except OSError:
                continue

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_tls_is_trusted_by_its_authority_and_name_only(tls_server: int, tmp_path: Path) -> None:
    """The right CA and name are well; another CA, another name and a closed port are not."""
    ca = str(tmp_path / "ca.crt")
    assert main([f"tls://localhost:{tls_server}", "--ca", ca]) == 0
    assert not accepts_tls("127.0.0.1", tls_server, ca)
    other = certificates.make_authority(certificates.new_key(), name="other", now=datetime.now(UTC))
    (tmp_path / "other.crt").write_bytes(certificates.certificate_pem(other))
    assert main([f"tls://localhost:{tls_server}", "--ca", str(tmp_path / "other.crt")]) == 1
    assert main([f"tls://localhost:{closed_port()}", "--ca", ca]) == 1


def test_a_page_is_there_or_not() -> None:
    """Only a page that is answered with 200 is well."""
    server, thread = start_http_server(0, addr="127.0.0.1", registry=CollectorRegistry())
    port = server.server_port
    assert main([f"http://127.0.0.1:{port}/metrics"]) == 0
    server.shutdown()
    server.server_close()
    thread.join()
    assert main([f"http://127.0.0.1:{port}/metrics"]) == 1


@pytest.mark.parametrize("words", [["127.0.0.1:9090"], ["ftp://localhost:1"], ["grpc://localhost"], ["grpc://a:b"]])
def test_an_address_names_its_kind(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is no address of a service is an error of its own, not a service that is down."""
    assert main(words) == 2
    assert "Expected grpc://HOST:PORT" in capsys.readouterr().err


def test_tls_needs_an_authority() -> None:
    """Without --ca nothing is trusted, and that is said."""
    assert main(["tls://localhost:1"]) == 2
