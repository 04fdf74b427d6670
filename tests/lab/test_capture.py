"""The capture on a real veth: what two sockets really said, in the clear and over TLS."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from undermesh.lab import netns
from undermesh.lab.capture import Capture

pytestmark = pytest.mark.root

TOKEN = b"undermesh-demo-token"
SERVER = {4: "10.0.0.2", 6: "fd00::2"}


@pytest.fixture
def capture(wire: tuple[str, str]) -> Iterator[Capture]:
    capturing = Capture(wire[0], "u0", TOKEN)
    yield capturing
    capturing.close()


def connect(wire: tuple[str, str], family: int, port: int) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection from the first netns to the second."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    listener = netns.call(wire[1], lambda: socket.create_server((SERVER[family], port), family=kind))
    client = netns.call(wire[0], lambda: socket.create_connection((SERVER[family], port), timeout=5))
    server, _ = listener.accept()
    listener.close()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server


def say(sender: socket.socket, receiver: socket.socket, pieces: list[bytes]) -> None:
    """Each piece in a segment of its own: it is read before the next one is sent."""
    for piece in pieces:
        sender.sendall(piece)
        assert receiver.recv(1 << 16) == piece


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        pytest.param([TOKEN], True, id="whole"),
        pytest.param([TOKEN[:7], TOKEN[7:]], True, id="in two segments"),
        pytest.param([TOKEN[i : i + 1] for i in range(len(TOKEN))], True, id="byte by byte"),
        pytest.param([TOKEN[7:], TOKEN[:7]], False, id="its halves the wrong way round"),
    ],
)
@pytest.mark.parametrize("direction", ["to the server", "to the client"])
def test_a_token_on_the_wire_is_found(
    wire: tuple[str, str], capture: Capture, family: int, pieces: list[bytes], found: bool, direction: str
) -> None:
    client, server = connect(wire, family, 8080)
    say(*((client, server) if direction == "to the server" else (server, client)), pieces)
    seen = capture.observe()
    assert bool(seen.token) is found
    assert all(SERVER[family] in (flow.source, flow.destination) for flow in seen.token)
    assert seen.lost == 0
    client.close()
    server.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_real_tls_connection_counts_and_hides_the_token(
    wire: tuple[str, str], capture: Capture, tmp_path: Path, family: int
) -> None:
    client, server = connect(wire, family, 15008)
    payload = TOKEN * 20_000
    received = talk_tls(client, server, certificate(tmp_path), payload)
    seen = capture.observe()
    assert received == payload
    assert len(payload) <= seen.tls_bytes() < len(payload) * 1.1
    assert not seen.token
    assert seen.lost == 0


def test_an_overrun_is_reported_as_loss(wire: tuple[str, str], capture: Capture) -> None:
    # The reader is kept out, and the kernel's buffer made tiny: packets must be lost, and must be reported.
    with capture._lock:
        capture._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client, server = connect(wire, 4, 8080)
        say(client, server, [b"x" * 1000] * 50)
    assert capture.observe().lost > 0


def talk_tls(client: socket.socket, server: socket.socket, files: tuple[Path, Path], payload: bytes) -> bytes:
    """TLS 1.3 over both ends; the client sends `payload`, what the server got comes back."""
    got = bytearray()

    def serve() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(*files)
        with context.wrap_socket(server, server_side=True) as secure:
            while len(got) < len(payload):
                got.extend(secure.recv(1 << 16))
            secure.sendall(b"done")

    thread = run_thread(serve)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files[0])
    with context.wrap_socket(client, server_hostname="server") as secure:
        secure.sendall(payload)
        assert secure.recv(4) == b"done"
    thread.join(5)
    return bytes(got)


def run_thread(body: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=body)
    thread.start()
    return thread


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for the name "server" and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(minutes=5))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("server")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = directory / "cert.pem", directory / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files
