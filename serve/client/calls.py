"""The calls that a client makes to a server: those of tritonclient over gRPC, and the same over HTTP.

Whoever the server is, its answers are bounded in size and read once, here: a call returns arrays, names or JSON objects, or
raises an error. What the objects hold is checked where they become records.
"""

from __future__ import annotations

import importlib
import math
import ssl
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import quote as escaped

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError, quote
from darktrt.records import parse_json
from darktrt.serve.model_info import DTYPES

if TYPE_CHECKING:
    import aiohttp

    from darktrt.serve.client.transport import Endpoint

MemoryKind = Literal["system", "cuda"]
JsonObject = Mapping[str, Any]

LARGEST_ANSWER = 256 << 20
"""Bytes. The outputs of a detector for an image are some kilobytes."""

_CHANNEL = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", LARGEST_ANSWER),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
]
"""By default gRPC's pause between two tries to connect grows to two minutes, and it uses a proxy even for this machine."""


class Calls(Protocol):
    """One try of each call; errors are those of the libraries, or of :class:`DarktrtError` where the answer is damaged."""

    async def close(self) -> None: ...
    async def index(self) -> list[JsonObject]: ...
    async def config(self, model: str, version: str) -> JsonObject: ...
    async def statistics(self, model: str, version: str) -> list[JsonObject]: ...
    async def regions(self, kind: MemoryKind) -> set[str]: ...
    async def register_system(self, name: str, size: int) -> None: ...
    async def register_cuda(self, name: str, handle: bytes, device: int, size: int) -> None: ...
    async def unregister(self, kind: MemoryKind, name: str) -> None: ...
    async def infer(
        self, model: str, version: str, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> dict[str, NDArray[Any]]: ...


def connect(endpoint: Endpoint) -> tuple[Any, Calls]:
    """tritonclient's module of the protocol, for inputs and outputs, and the calls.

    Raises:
        DarktrtError: tritonclient is not installed, or a certificate cannot be used.
    """
    try:
        library = importlib.import_module(f"tritonclient.{endpoint.protocol}")
        importlib.import_module(f"tritonclient.{endpoint.protocol}.aio")
    except ImportError as error:
        raise DarktrtError(f"talking to Triton needs tritonclient ({error}): pip install 'darktrt[serve]'") from error
    return library, GrpcCalls(endpoint) if endpoint.protocol == "grpc" else HttpCalls(endpoint)


# --- gRPC ---


class GrpcCalls:
    """Calls over gRPC, whose types of messages hold whatever the server sends."""

    def __init__(self, endpoint: Endpoint) -> None:
        from tritonclient.grpc.aio import InferenceServerClient

        self._endpoint = endpoint
        files = (endpoint.root_certificates, endpoint.key, endpoint.certificate)
        self._client = InferenceServerClient(endpoint.address, False, endpoint.tls, *files, channel_args=_CHANNEL)

    async def close(self) -> None:
        await self._client.close()

    async def index(self) -> list[JsonObject]:
        return list((await self._client.get_model_repository_index(as_json=True)).get("models", []))

    async def config(self, model: str, version: str) -> JsonObject:
        return dict((await self._client.get_model_config(model, version, as_json=True)).get("config", {}))

    async def statistics(self, model: str, version: str) -> list[JsonObject]:
        return list((await self._client.get_inference_statistics(model, version, as_json=True)).get("model_stats", []))

    async def regions(self, kind: MemoryKind) -> set[str]:
        return set((await getattr(self._client, f"get_{kind}_shared_memory_status")(as_json=True)).get("regions", {}))

    async def register_system(self, name: str, size: int) -> None:
        await self._client.register_system_shared_memory(name, f"/{name}", size)

    async def register_cuda(self, name: str, handle: bytes, device: int, size: int) -> None:
        await self._client.register_cuda_shared_memory(name, handle, device, size)

    async def unregister(self, kind: MemoryKind, name: str) -> None:
        await getattr(self._client, f"unregister_{kind}_shared_memory")(name)

    async def infer(self, model: str, version: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
        result = await self._client.infer(model, inputs, model_version=version, outputs=outputs)
        answer = result.get_response()
        contents = [*answer.raw_output_contents, *[b""] * len(answer.outputs)]  # of outputs in shared memory
        return {
            output.name: _array(self._endpoint, output.name, output.datatype, list(output.shape), content)
            for output, content in zip(answer.outputs, contents, strict=False)
            if content or 0 in output.shape
        }


# --- HTTP ---


class HttpCalls:
    """Calls over HTTP; redirects are not followed."""

    def __init__(self, endpoint: Endpoint) -> None:
        import aiohttp

        self._endpoint = endpoint
        self._url = f"http{'s' if endpoint.tls else ''}://{endpoint.address}/v2/"
        context = _ssl_context(endpoint) if endpoint.tls else True
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=100),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def index(self) -> list[JsonObject]:
        return _objects(self._endpoint, _json(self._endpoint, await self._content_of("repository/index", {})))

    async def config(self, model: str, version: str) -> JsonObject:
        return read_object(self._endpoint, await self._content_of(f"{_model_path(model, version)}/config"))

    async def statistics(self, model: str, version: str) -> list[JsonObject]:
        counts = read_object(self._endpoint, await self._content_of(f"{_model_path(model, version)}/stats"))
        return _objects(self._endpoint, counts.get("model_stats"))

    async def regions(self, kind: MemoryKind) -> set[str]:
        status = _json(self._endpoint, await self._content_of(f"{kind}sharedmemory/status"))
        return {str(region.get("name")) for region in _objects(self._endpoint, status)}

    async def register_system(self, name: str, size: int) -> None:
        await self._change(f"systemsharedmemory/region/{name}/register", {"key": f"/{name}", "offset": 0, "byte_size": size})

    async def register_cuda(self, name: str, handle: bytes, device: int, size: int) -> None:
        values = {"raw_handle": {"b64": handle.decode()}, "device_id": device, "byte_size": size}
        await self._change(f"cudasharedmemory/region/{name}/register", values)

    async def unregister(self, kind: MemoryKind, name: str) -> None:
        await self._change(f"{kind}sharedmemory/region/{name}/unregister", {})

    async def infer(self, model: str, version: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
        from tritonclient.http.aio import InferenceServerClient

        body, length = InferenceServerClient.generate_request_body(inputs, outputs=outputs)
        headers = {} if length is None else {_HEAD_LENGTH: str(length)}
        answer, content = await self._exchange("POST", f"{_model_path(model, version)}/infer", headers, data=body)
        return read_inference(self._endpoint, content, answer.headers.get(_HEAD_LENGTH, ""))

    async def _content_of(self, path: str, body: JsonObject | None = None) -> bytes:
        _, content = await self._exchange("GET" if body is None else "POST", path, {}, json=body)
        return content

    async def _change(self, path: str, body: JsonObject) -> None:
        await self._exchange("POST", path, {}, json=body)

    async def _exchange(
        self, method: str, path: str, headers: dict[str, str], **body: Any
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """The answer to a request, with its content; one that reports an error raises tritonclient's exception."""
        from tritonclient.utils import InferenceServerException

        async with self._session.request(method, self._url + path, headers=headers, allow_redirects=False, **body) as answer:
            content = await self._content(answer)
        if answer.status != 200:
            raise InferenceServerException(_reason(content) or f"{answer.status} {answer.reason}", str(answer.status))
        return answer, content

    async def _content(self, answer: aiohttp.ClientResponse) -> bytes:
        blocks, size = [], 0
        async for block in answer.content.iter_any():
            blocks.append(block)
            size += len(block)
            if size > LARGEST_ANSWER:
                raise damaged(self._endpoint, f"it has more than {LARGEST_ANSWER:,} bytes")
        return b"".join(blocks)


# --- answers ---

_MOST_SIZES = 8
"""Of a tensor."""

_HEAD_LENGTH = "Inference-Header-Content-Length"
_ADVICE = "is this a Triton server?"


def read_inference(endpoint: object, content: bytes, head_length: str) -> dict[str, NDArray[Any]]:
    """The outputs of an inference over HTTP: a head in JSON, then the bytes of all tensors that are not in shared memory.

    Args:
        head_length: the number of bytes of the head, as the server states it.

    Raises:
        DarktrtError: it is none.
    """
    length = int(head_length) if head_length.isascii() and head_length.isdigit() else len(content)
    arrays, offset, tensors = {}, length, memoryview(content)
    for output in _objects(endpoint, read_object(endpoint, content[:length]).get("outputs")):
        parameters = output.get("parameters", {})
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:  # in shared memory
            continue
        if not isinstance(size, int) or not 0 <= size <= len(content) - offset:
            raise damaged(endpoint, f"an output has {quote(repr(size), 40)} bytes, and {len(content) - offset} are left")
        name, kind, shape = (output.get(key) for key in ("name", "datatype", "shape"))
        arrays[str(name)] = _array(endpoint, str(name), str(kind), shape, tensors[offset : offset + size])
        offset += size
    return arrays


def read_object(endpoint: object, content: bytes) -> JsonObject:
    """An answer that is a JSON object.

    Raises:
        DarktrtError: it is none.
    """
    return _object(endpoint, _json(endpoint, content))


def _json(endpoint: object, content: bytes) -> Any:
    return parse_json(content.decode(errors="replace"), f"{endpoint}: the answer", _ADVICE)


def _object(endpoint: object, value: Any) -> JsonObject:
    if not isinstance(value, dict):
        raise damaged(endpoint, f"{quote(repr(value), 40)} is no object")
    return value


def _objects(endpoint: object, value: Any) -> list[JsonObject]:
    if not isinstance(value, list):
        raise damaged(endpoint, f"{quote(repr(value), 40)} is no list")
    return [_object(endpoint, one) for one in value]


def damaged(where: object, problem: str) -> DarktrtError:
    """The error for an answer that no Triton server sends."""
    return DarktrtError(f"{where}: the answer is damaged ({problem}); {_ADVICE}")


def _model_path(model: str, version: str) -> str:
    path = f"models/{escaped(model, safe='')}"
    return f"{path}/versions/{escaped(version, safe='')}" if version else path


def _reason(content: bytes) -> str:
    """Triton's message in an answer that reports an error, or the start of another one."""
    text = content[:4096].decode(errors="replace")
    try:
        values = parse_json(text, "", "")
    except DarktrtError:
        return text
    return str(values.get("error", text)) if isinstance(values, dict) else text


def _array(endpoint: object, name: str, kind: str, shape: Any, content: bytes | memoryview) -> NDArray[Any]:
    """A tensor of an answer, a view of its bytes.

    Raises:
        DarktrtError: type, shape and number of bytes do not fit together.
    """
    dtype = DTYPES.get(f"TYPE_{kind}", "object")
    if dtype == "object":
        raise damaged(endpoint, f"output '{quote(name)}' is {quote(kind)}, which was not asked for")
    if not _is_shape(shape) or math.prod(shape) * np.dtype(dtype).itemsize != len(content):
        text = quote(repr(shape), 60)
        raise damaged(endpoint, f"output '{quote(name)}' has the shape {text} of {quote(kind)}, and {len(content)} bytes")
    array: NDArray[Any] = np.frombuffer(content, dtype).reshape(shape)
    return array


def _is_shape(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MOST_SIZES
        and all(isinstance(one, int) and one >= 0 for one in values)
        and math.prod(one or 1 for one in values) <= LARGEST_ANSWER
    )


def _ssl_context(endpoint: Endpoint) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=endpoint.root_certificates)
        if endpoint.certificate:
            context.load_cert_chain(endpoint.certificate, endpoint.key)
    except OSError as error:  # ssl.SSLError is one
        raise DarktrtError(f"{endpoint}: its certificates cannot be used ({error}); are they PEM files?") from error
    return context
