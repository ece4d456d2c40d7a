"""One Triton server over gRPC or HTTP: requests with a time limit, repeated while the server is away, and errors for users."""

from __future__ import annotations

import asyncio
import importlib
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from numpy.typing import NDArray

from darktrt.errors import DarktrtError

Protocol = Literal["grpc", "http"]
MemoryKind = Literal["system", "cuda"]

PORTS: dict[Protocol, int] = {"grpc": 8001, "http": 8000}
_SCHEMES: dict[str, tuple[Protocol, bool]] = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}
"""What a URL may begin with: the protocol, and whether TLS is on."""

_LARGEST_MESSAGE = 2**31 - 1
_CHANNEL = [
    ("grpc.max_send_message_length", _LARGEST_MESSAGE),
    ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
]
"""gRPC's own pause between two tries to connect grows to two minutes, and it asks a proxy even for servers of this machine."""

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two tries: doubled each time, and a random part of it, so that clients do not come back all at once."""

_Value = TypeVar("_Value")


class UnreachableError(DarktrtError):
    """The server is not there at the moment; the same request may do later."""


class RegionLostError(DarktrtError):
    """The server does not know a region of shared memory: it has been started anew since that was registered."""


class TimedOutError(DarktrtError):
    """There was no answer in time; the server may still be at work on the request."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and how to talk to it."""

    protocol: Protocol
    address: str
    """``host:port``."""
    tls: bool = False
    root_certificates: Path | None = None
    """PEM file of the authorities to trust instead of the system's."""
    certificate: Path | None = None
    """PEM file to show to a server that asks who the client is; with its ``key``."""
    key: Path | None = None

    def __post_init__(self) -> None:
        files = [file for file in (self.root_certificates, self.certificate, self.key) if file]
        if files and not self.tls:
            raise DarktrtError(f"{self}: certificates need TLS; begin the URL with grpcs:// or https://")
        if (self.certificate is None) != (self.key is None):
            raise DarktrtError("a client's certificate and its key go together; give both")
        for file in files:
            if not file.is_file():
                raise DarktrtError(f"{file}: cannot read: no such file")

    def __str__(self) -> str:
        return f"{self.protocol}{'s' if self.tls else ''}://{self.address}"

    @property
    def host(self) -> str:
        return urlsplit(f"//{self.address}").hostname or ""

    @staticmethod
    def parse(
        url: str, root_certificates: str | None = None, certificate: str | None = None, key: str | None = None
    ) -> Endpoint:
        """``HOST[:PORT]``, which is gRPC, or the same behind ``grpc://``, ``grpcs://``, ``http://`` or ``https://``.

        Raises:
            DarktrtError: it is something else, or a certificate file is missing.
        """
        scheme, found, rest = url.partition("://")
        protocol, tls = _SCHEMES.get(scheme.lower() if found else "grpc", (None, False))
        parts = urlsplit(f"//{rest if found else url}")
        try:
            port = parts.port
        except ValueError:
            protocol = None
        if protocol is None or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
            raise DarktrtError(f"'{url}': is no server; write HOST:PORT for gRPC, or {', '.join(_SCHEMES)}://HOST:PORT")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        files = (Path(file) if file else None for file in (root_certificates, certificate, key))
        return Endpoint(protocol, f"{host}:{port or PORTS[protocol]}", tls, *files)


@dataclass(frozen=True)
class Place:
    """A stretch of a region of shared memory that the server knows."""

    region: str
    offset: int
    size: int


class Transport:
    """Calls to one server, from the event loop that is running when it is made; to be closed.

    Args:
        timeout: seconds that one try may take; None for no limit.
        retry_seconds: how long a call is repeated while the server cannot be reached; 0 for a single try.

    Raises:
        DarktrtError: tritonclient is not installed, or a certificate cannot be used.
    """

    def __init__(self, endpoint: Endpoint, timeout: float | None = 60.0, retry_seconds: float = 30.0) -> None:
        self.endpoint = endpoint
        self.timeout = timeout
        self.retry_seconds = retry_seconds
        self.retries = 0
        """How many calls had to be repeated so far."""
        self._library, self._client = _connect(endpoint)

    async def close(self) -> None:
        await self._client.close()

    # --- what the server says of itself ---

    async def models(self) -> list[str]:
        """Names of the models that are ready."""
        index = await self._json("get_model_repository_index")
        entries = index if isinstance(index, list) else index.get("models", [])
        return sorted({str(entry["name"]) for entry in entries if entry.get("state", "READY") == "READY"})

    async def config(self, model: str, version: str) -> dict[str, Any]:
        """The model's configuration as the server completed it, in the words of ``model_config.proto``."""
        config = await self._json("get_model_config", model, version)
        inner: dict[str, Any] = config.get("config", config)
        return inner

    async def statistics(self, model: str, version: str) -> list[dict[str, Any]]:
        """What the server counted since it loaded the model, one record a version."""
        found = await self._json("get_inference_statistics", model, version)
        return list(found.get("model_stats", []))

    # --- shared memory ---

    async def regions(self, kind: MemoryKind) -> set[str]:
        """Names of all regions of this kind that are registered, by whomever."""
        found = await self._json(f"get_{kind}_shared_memory_status")
        if isinstance(found, list):
            return {str(one["name"]) for one in found}
        return set(found.get("regions", {}))

    async def register_system(self, name: str, size: int) -> None:
        """Let the server map ``/dev/shm/NAME``, under that name."""
        await self._call(lambda: self._client.register_system_shared_memory(name, f"/{name}", size))

    async def register_cuda(self, name: str, handle: bytes, device: int, size: int) -> None:
        """Let the server open memory of a GPU; ``handle`` is CUDA's for other processes, in base64."""
        raw = handle if self.endpoint.protocol == "grpc" else handle.decode()
        await self._call(lambda: self._client.register_cuda_shared_memory(name, raw, device, size))

    async def unregister(self, kind: MemoryKind, name: str) -> None:
        """Let the server forget one region; without a name Triton would forget those of every client."""
        if not name:
            raise ValueError("a region has a name")
        await self._call(lambda: getattr(self._client, f"unregister_{kind}_shared_memory")(name))

    # --- inference ---

    def input(self, name: str, array: NDArray[Any], place: Place | None = None) -> Any:
        """An input of a request: the array itself, or the place where the server finds one of this shape and type."""
        from tritonclient.utils import np_to_triton_dtype

        tensor = self._library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        if place:
            tensor.set_shared_memory(place.region, place.size, place.offset)
        else:
            tensor.set_data_from_numpy(array)
        return tensor

    def output(self, name: str, place: Place | None = None) -> Any:
        """An output that a request asks for, in the answer or in a place of shared memory."""
        tensor = self._library.InferRequestedOutput(name)
        if place:
            tensor.set_shared_memory(place.region, place.size, place.offset)
        return tensor

    async def infer(self, model: str, version: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Run the model once; tritonclient's ``InferResult``.

        Raises:
            TimedOutError: it takes too long.
            RegionLostError: a place is in a region that the server does not know.
            DarktrtError: the server refuses the request, or stays away too long.
        """
        return await self._call(lambda: self._client.infer(model, inputs, model_version=version, outputs=outputs))

    # --- how calls are made ---

    async def _json(self, function: str, *arguments: str) -> Any:
        options = {"as_json": True} if self.endpoint.protocol == "grpc" else {}
        return await self._call(lambda: getattr(self._client, function)(*arguments, **options))

    async def _call(self, call: Callable[[], Awaitable[_Value]]) -> _Value:
        deadline = time.monotonic() + self.retry_seconds
        for pause in _pauses():
            try:
                return await asyncio.wait_for(call(), self.timeout)
            except asyncio.TimeoutError as error:
                raise TimedOutError(f"{self.endpoint}: gave no answer within {self.timeout:g} s") from error
            except Exception as error:
                failure = self._failure(error)
                if failure is None:
                    raise
                if not isinstance(failure, UnreachableError) or time.monotonic() + pause > deadline:
                    raise failure from error
            self.retries += 1
            await asyncio.sleep(pause)
        raise AssertionError("there is always another pause")

    def _failure(self, error: Exception) -> DarktrtError | None:
        """What an exception of the libraries means; None for one that is none of theirs."""
        from tritonclient.utils import InferenceServerException

        if self.endpoint.protocol == "http" and _is_aiohttp(error):
            return self._unreachable(str(error) or type(error).__name__)
        if not isinstance(error, InferenceServerException):
            return None
        text = " ".join(str(error.message()).split())
        if error.status() in ("StatusCode.UNAVAILABLE", "502", "503", "504") or "Stub process" in text:
            return self._unreachable(text)
        kind = RegionLostError if "shared memory region" in text and "nable to find" in text else DarktrtError
        return kind(f"{self.endpoint}: {text}")

    def _unreachable(self, reason: str) -> UnreachableError:
        return UnreachableError(f"{self.endpoint}: cannot be reached ({reason}); is the server running there?")


def _is_aiohttp(error: Exception) -> bool:
    import aiohttp

    return isinstance(error, aiohttp.ClientError)


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1)
        pause = min(2 * pause, LONGEST_PAUSE)


def _connect(endpoint: Endpoint) -> tuple[Any, Any]:
    """tritonclient's module of the protocol, and its client."""
    try:
        library = importlib.import_module(f"tritonclient.{endpoint.protocol}")
        calls = importlib.import_module(f"tritonclient.{endpoint.protocol}.aio")
    except ImportError as error:
        raise DarktrtError(f"talking to Triton needs tritonclient ({error}): pip install 'darktrt[serve]'") from error
    if endpoint.protocol == "grpc":
        files = (endpoint.root_certificates, endpoint.key, endpoint.certificate)
        return library, calls.InferenceServerClient(endpoint.address, False, endpoint.tls, *files, channel_args=_CHANNEL)
    context = _ssl_context(endpoint) if endpoint.tls else None
    return library, calls.InferenceServerClient(endpoint.address, conn_timeout=None, ssl=endpoint.tls, ssl_context=context)


def _ssl_context(endpoint: Endpoint) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=endpoint.root_certificates)
        if endpoint.certificate:
            context.load_cert_chain(endpoint.certificate, endpoint.key)
    except OSError as error:  # ssl.SSLError is one
        raise DarktrtError(f"{endpoint}: its certificates cannot be used ({error}); are they PEM files?") from error
    return context
