"""TLS: gRPC to a server that asks for a client's certificate, and HTTP by a proxy, for Triton's own HTTP has none."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_client import assert_same, direct, photos
from triton_models import Models, a_program

from darktrt.cli import main
from darktrt.errors import DarktrtError
from darktrt.serve.client.client import Client
from darktrt.serve.client.transport import Endpoint
from darktrt.serve.server import Server, StartOptions, running_on_free_ports

SCORE = 0.08


@dataclass(frozen=True)
class Certificates:
    folder: Path

    def __getattr__(self, name: str) -> str:
        """``authority``, ``server`` and ``client``, with ``_key`` behind it for the key."""
        return str(self.folder / f"{name.replace('_', '.')}.pem")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make certificates")
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    own = [*new, "-keyout", made.authority_key, "-out", made.authority, "-subj", "/CN=made authority"]
    subprocess.run(own, check=True, capture_output=True)
    for name in ("server", "client"):
        signed = ["-CA", made.authority, "-CAkey", made.authority_key, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        files = ["-keyout", f"{made.folder}/{name}.key.pem", "-out", f"{made.folder}/{name}.pem"]
        command = [*new, *files, "-subj", "/CN=localhost"]
        subprocess.run([*command, *signed, "-addext", "basicConstraints=critical,CA:FALSE"], check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def secured(alone: Path, certificates: Certificates) -> Iterator[Server]:
    names = {"server-cert": certificates.server, "server-key": certificates.server_key, "root-cert": certificates.authority}
    arguments = [
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        *(f"--grpc-{name}={file}" for name, file in names.items()),
    ]
    with running_on_free_ports(alone, StartOptions(arguments=tuple(arguments)), a_program()) as server:
        yield server


def test_grpc_with_certificates_on_both_sides(
    secured: Server, models: Models, certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = Endpoint.parse(f"grpcs://{secured.grpc}", certificates.authority, certificates.client, certificates.client_key)
    with Client(endpoint, "made", score_threshold=SCORE) as client:
        assert_same(client.detect_all(photos()), direct(models.made, photos(), SCORE))
    files = [
        "--root-certificates",
        certificates.authority,
        "--certificate",
        certificates.client,
        "--key",
        certificates.client_key,
    ]
    assert main(["client", "ping", "--server", f"grpcs://{secured.grpc}", "--model", "made", *files]) == 0
    assert "answered noise in" in capsys.readouterr().out


def test_who_does_not_trust_or_is_not_known_is_reported(secured: Server, certificates: Certificates) -> None:
    without = [
        Endpoint.parse(f"grpcs://{secured.grpc}"),
        Endpoint.parse(f"grpcs://{secured.grpc}", certificates.authority),
        Endpoint.parse(secured.grpc),
    ]
    for endpoint in without:
        with pytest.raises(DarktrtError, match="cannot be reached"):
            Client(endpoint, "made", timeout=20)


@pytest.fixture
def proxy(triton: Server, certificates: Certificates) -> Iterator[str]:
    """An address with TLS that passes the requests on to the server's HTTP."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.server_key)
    context.load_verify_locations(certificates.authority)
    context.verify_mode = ssl.CERT_REQUIRED
    host, port = triton.http.split(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer), return_exceptions=True)

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context), loop).result()
    yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(loop.stop)


def test_https_with_certificates_on_both_sides(proxy: str, models: Models, certificates: Certificates) -> None:
    endpoint = Endpoint.parse(proxy, certificates.authority, certificates.client, certificates.client_key)
    with Client(endpoint, "made", score_threshold=SCORE) as client:
        assert_same(client.detect_all(photos()), direct(models.made, photos(), SCORE))
    with pytest.raises(DarktrtError, match=r"cannot be reached.*certificate verify failed"):
        Client(proxy, "made")
