"""Calls to one Triton server over gRPC or HTTP, with a time limit, and errors for users."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from numpy.typing import NDArray

from darktrt.errors import DarktrtError, quote
from darktrt.serve.client.calls import JsonObject, MemoryKind, connect

Protocol = Literal["grpc", "http"]

PORTS: dict[Protocol, int] = {"grpc": 8001, "http": 8000}
_SCHEMES: dict[str, tuple[Protocol, bool]] = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}
"""The schemes of a URL: the protocol, and whether TLS is on."""

_AWAY = re.compile(r"Request for unknown model|not at ready state|[Ss]erver (is )?(not ready|exiting|stopping)")
"""What a server says of its models while it stops."""

_LONGEST_REASON = 500
"""Characters of a server's message in an error."""

_Value = TypeVar("_Value")


class UnreachableError(DarktrtError):
    """The server cannot be reached at the moment; the same request may succeed later."""


class BackendEndedError(UnreachableError):
    """The model's process of the Python backend has ended; some versions of Triton start another one."""


class ModelAwayError(UnreachableError):
    """The server has no such model at the moment: a server that stops unloads its models before it closes its ports."""


class RegionLostError(DarktrtError):
    """The server does not know a region of shared memory: it was restarted after the registration."""


class TimedOutError(DarktrtError):
    """The server did not answer in time; it may still be working on the request."""


@dataclass(frozen=True)
class Endpoint:
    """The address of a server, with the protocol and the certificates of the connection."""

    protocol: Protocol
    address: str
    """``host:port``."""
    tls: bool = False
    root_certificates: Path | None = None
    """PEM file of the authorities to trust instead of the system's."""
    certificate: Path | None = None
    """PEM file that authenticates the client to the server; with its ``key``."""
    key: Path | None = None

    def __post_init__(self) -> None:
        files = [file for file in (self.root_certificates, self.certificate, self.key) if file]
        if files and not self.tls:
            raise DarktrtError(f"{self}: certificates need TLS; begin the URL with grpcs:// or https://")
        if (self.certificate is None) != (self.key is None):
            raise DarktrtError("a client's certificate and its key go together", "key" if self.key is None else "certificate")
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
        """Parse ``HOST[:PORT]``, which is gRPC, or a URL ``grpc://``, ``grpcs://``, ``http://`` or ``https://`` of the two.

        Raises:
            DarktrtError: it is something else, or a certificate file is missing.
        """
        scheme, separator, rest = url.partition("://")
        protocol, tls = _SCHEMES.get(scheme.lower() if separator else "grpc", (None, False))
        parts = urlsplit(f"//{rest if separator else url}")
        try:
            port = parts.port
        except ValueError:
            protocol = None
        if protocol is None or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
            raise DarktrtError(
                f"'{url}': is no server; write HOST:PORT for gRPC, or {', '.join(_SCHEMES)}://HOST:PORT", "server"
            )
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        files = (Path(file) if file else None for file in (root_certificates, certificate, key))
        return Endpoint(protocol, f"{host}:{port or PORTS[protocol]}", tls, *files)


@dataclass(frozen=True)
class MemorySlice:
    """The bytes of one tensor in a region of shared memory that the server knows."""

    region: str
    offset: int
    size: int


class Transport:
    """Calls to one server, from the event loop that runs when the transport is made; to be closed.

    Args:
        timeout: time limit of a call in seconds; None for no limit.

    Raises:
        DarktrtError: tritonclient is not installed, or a certificate cannot be used.
    """

    def __init__(self, endpoint: Endpoint, timeout: float | None = 60.0) -> None:
        self.endpoint = endpoint
        self.timeout = timeout
        self._library, self._client = connect(endpoint)

    async def close(self) -> None:
        await self._client.close()

    # --- the server's reports ---

    async def models(self) -> list[str]:
        """Names of the models that are ready."""
        index = await self._call(self._client.index)
        return sorted({str(entry.get("name", "")) for entry in index if entry.get("state", "READY") == "READY"})

    async def config(self, model: str, version: str) -> JsonObject:
        """The model's configuration as the server completed it, with the field names of ``model_config.proto``."""
        return await self._call(lambda: self._client.config(model, version))

    async def statistics(self, model: str, version: str) -> list[JsonObject]:
        """The server's counts since it loaded the model, one record a version."""
        return await self._call(lambda: self._client.statistics(model, version))

    # --- shared memory ---

    async def regions(self, kind: MemoryKind) -> set[str]:
        """Names of all registered regions of this kind, by any client."""
        return await self._call(lambda: self._client.regions(kind))

    async def register_system(self, name: str, size: int) -> None:
        """Let the server map ``/dev/shm/NAME``, under that name."""
        await self._call(lambda: self._client.register_system(name, size))

    async def register_cuda(self, name: str, handle: bytes, device: int, size: int) -> None:
        """Let the server open memory of a GPU; ``handle`` is CUDA's for other processes, in base64."""
        await self._call(lambda: self._client.register_cuda(name, handle, device, size))

    async def unregister(self, kind: MemoryKind, name: str) -> None:
        """Let the server forget one region; without a name Triton would forget the regions of all clients."""
        if not name:
            raise ValueError("a region has a name")
        await self._call(lambda: self._client.unregister(kind, name))

    # --- inference ---

    def input(self, name: str, array: NDArray[Any], memory: MemorySlice | None = None) -> Any:
        """An input of a request: the array itself, or shared memory with an array of this shape and type."""
        from tritonclient.utils import np_to_triton_dtype

        tensor = self._library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        if memory:
            tensor.set_shared_memory(memory.region, memory.size, memory.offset)
        else:
            tensor.set_data_from_numpy(array)
        return tensor

    def output(self, name: str, memory: MemorySlice | None = None) -> Any:
        """An output of a request, in the answer or in shared memory."""
        tensor = self._library.InferRequestedOutput(name)
        if memory:
            tensor.set_shared_memory(memory.region, memory.size, memory.offset)
        return tensor

    async def infer(self, model: str, version: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """Run the model once; the outputs by name, without those in shared memory.

        Raises:
            TimedOutError: the server does not answer in time.
            UnreachableError: the server is away at the moment.
            RegionLostError: the server does not know a region of shared memory of the request.
            DarktrtError: the server refuses the request.
        """
        return await self._call(lambda: self._client.infer(model, version, inputs, outputs))

    # --- how calls are made ---

    async def _call(self, call: Callable[[], Awaitable[_Value]]) -> _Value:
        try:
            return await asyncio.wait_for(call(), self.timeout)
        except asyncio.TimeoutError as error:
            raise TimedOutError(f"{self.endpoint}: no answer within {self.timeout:g} s") from error
        except Exception as error:
            failure = self._failure(error)
            if failure is None:
                raise
            raise failure from error

    def _failure(self, error: Exception) -> DarktrtError | None:
        """The error for an exception of the client libraries; None for other exceptions."""
        from tritonclient.utils import InferenceServerException

        if self.endpoint.protocol == "http" and _is_aiohttp(error):
            return self._unreachable(quote(str(error) or type(error).__name__, _LONGEST_REASON))
        if not isinstance(error, InferenceServerException):
            return None
        text = quote(" ".join(str(error.message()).split()), _LONGEST_REASON)
        if "is restricted, expecting header" in text or "hared memory is disabled" in text:
            return DarktrtError(f"{self.endpoint}: {text}; shared memory needs 'darktrt serve start --shared-memory'")
        if "Stub process" in text:
            return BackendEndedError(str(self._unreachable(text)))
        if error.status() in ("StatusCode.UNAVAILABLE", "502", "503", "504"):
            return self._unreachable(text)
        if _AWAY.search(text):
            return ModelAwayError(f"{self.endpoint}: {text}")
        kind = RegionLostError if "shared memory region" in text and "nable to find" in text else DarktrtError
        return kind(f"{self.endpoint}: {text}")

    def _unreachable(self, reason: str) -> UnreachableError:
        return UnreachableError(f"{self.endpoint}: cannot be reached ({reason}); is the server running there?")


def _is_aiohttp(error: Exception) -> bool:
    import aiohttp

    return isinstance(error, aiohttp.ClientError)
