"""Calls to a server that is away: its address, the calls that are repeated, and the errors of users."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from darktrt.errors import DarktrtError
from darktrt.serve.client.servers import Servers
from darktrt.serve.client.transport import Endpoint, ModelAwayError, RegionLostError, TimedOutError, Transport, UnreachableError
from darktrt.vision.detector import Arrays

pytest.importorskip("tritonclient.grpc", reason="needs tritonclient: pip install 'darktrt[serve]'")


@pytest.mark.parametrize(
    ("url", "protocol", "address", "tls", "text"),
    [
        ("gpu-box", "grpc", "gpu-box:8001", False, "grpc://gpu-box:8001"),
        ("gpu-box:9", "grpc", "gpu-box:9", False, "grpc://gpu-box:9"),
        ("http://gpu-box", "http", "gpu-box:8000", False, "http://gpu-box:8000"),
        ("HTTPS://gpu-box:443/", "http", "gpu-box:443", True, "https://gpu-box:443"),
        ("grpcs://10.0.0.7", "grpc", "10.0.0.7:8001", True, "grpcs://10.0.0.7:8001"),
        ("[::1]:8001", "grpc", "[::1]:8001", False, "grpc://[::1]:8001"),
    ],
)
def test_urls(url: str, protocol: str, address: str, tls: bool, text: str) -> None:
    endpoint = Endpoint.parse(url)
    assert (endpoint.protocol, endpoint.address, endpoint.tls) == (protocol, address, tls)
    assert str(endpoint) == text
    assert endpoint.host == address.rpartition(":")[0].strip("[]")


@pytest.mark.parametrize(
    "url", ["", "ftp://a", "a:b", "a:99999", "http://", "http://a/v2", "http://a?b", "grpc://me@a", ":8001"]
)
def test_what_is_no_server(url: str) -> None:
    with pytest.raises(DarktrtError, match="is no server; write HOST:PORT"):
        Endpoint.parse(url)


def test_certificates_need_tls_and_exist(tmp_path: Path) -> None:
    file = tmp_path / "a.pem"
    file.write_text("no certificate")
    with pytest.raises(DarktrtError, match="need TLS; begin the URL with grpcs://"):
        Endpoint.parse("a", str(file))
    with pytest.raises(DarktrtError, match="go together"):
        Endpoint.parse("grpcs://a", None, str(file))
    with pytest.raises(DarktrtError, match=r"none\.pem: cannot read: no such file"):
        Endpoint.parse("grpcs://a", str(tmp_path / "none.pem"))

    async def connect() -> None:
        Transport(Endpoint.parse("https://a", str(file)))

    with pytest.raises(DarktrtError, match="certificates cannot be used"):
        asyncio.run(connect())


class Moody:
    """Stands for tritonclient's client: does in turn what the test lists."""

    def __init__(self, *moods: Any) -> None:
        self.moods = list(moods)
        self.calls = 0

    async def infer(self, *_: Any, **__: Any) -> Any:
        self.calls += 1
        mood = self.moods.pop(0)
        if isinstance(mood, Exception):
            raise mood
        if isinstance(mood, float):
            await asyncio.sleep(mood)
        return mood

    async def close(self) -> None:
        pass


def refusal(text: str, status: str) -> Exception:
    from tritonclient.utils import InferenceServerException

    return InferenceServerException(text, status=status)


def dropped() -> Exception:
    import aiohttp

    return aiohttp.ServerDisconnectedError()


class Plain:
    """Stands for a slot."""

    async def run(self, transport: Transport, inputs: Arrays) -> Arrays:
        return await transport.infer("m", "", [], [])

    async def close(self, transport: Transport) -> None:
        pass


def infer(client: Moody, url: str = "a", timeout: float | None = 60.0, retry_seconds: float = 30.0) -> tuple[Any, int]:
    """The answer, and how often it was repeated."""

    async def call() -> tuple[Any, int]:
        servers = Servers([Endpoint.parse(url)], timeout, retry_seconds)
        (server,) = servers.all
        await server.transport.close()
        server.transport._client = client
        server.slots, server.free = [Plain()], [Plain()]  # type: ignore[list-item]
        servers._model, server.check = None, AsyncMock()  # type: ignore[assignment,method-assign]
        try:
            return await servers.run({}), servers.retries
        finally:
            await servers.close()

    return asyncio.run(call())


@pytest.mark.parametrize("length", [500, 501])
def test_a_reason_is_a_line_of_at_most_500_characters(length: int) -> None:
    text = "a\n b " + "x" * (length - 4)
    with pytest.raises(DarktrtError) as caught:
        infer(Moody(refusal(text, "StatusCode.INTERNAL")))
    expected = "a b " + ("x" * 496 if length == 500 else "x" * 493 + "...")
    assert str(caught.value).partition(": ")[2] == expected


@pytest.mark.parametrize(
    ("url", "failure"),
    [
        ("a", lambda: refusal("Socket closed", "StatusCode.UNAVAILABLE")),
        ("a", lambda: refusal("Stub process is not healthy", "StatusCode.INTERNAL")),
        ("http://a", dropped),
        ("http://a", lambda: refusal("not ready", "503")),
        ("a", lambda: refusal("Request for unknown model: 'm' has no available versions", "StatusCode.NOT_FOUND")),
        ("http://a", lambda: refusal("Request for unknown model: 'm' is not found", "404")),
        ("a", lambda: refusal("Model 'm' version 1 is not at ready state", "StatusCode.INTERNAL")),
        ("http://a", lambda: refusal("Server is stopping, scheduler for model has stopped", "400")),
    ],
)
def test_a_server_that_is_away_is_asked_again(url: str, failure: Callable[[], Exception]) -> None:
    client = Moody(failure(), failure(), failure(), "answer")
    assert infer(client, url, retry_seconds=10) == ("answer", 3)
    client = Moody(failure(), "answer")
    with pytest.raises(UnreachableError, match=r"a:800.: (cannot be reached \(.*\); is the server running there\?$|\w)"):
        infer(client, url, retry_seconds=0)
    assert client.calls == 1


def test_a_model_that_the_server_does_not_have_is_named() -> None:
    text = "Request for unknown model: 'm' is not found"
    with pytest.raises(ModelAwayError, match=f"^grpc://a:8001: {text}$"):
        infer(Moody(refusal(text, "StatusCode.NOT_FOUND")), retry_seconds=0)


def test_pauses_grow_and_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which nothing but pauses takes time."""
    pauses: list[float] = []

    async def pause(_: Servers, seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(Servers, "_pause", pause)
    monkeypatch.setattr("darktrt.serve.client.servers.time", SimpleNamespace(monotonic=lambda: sum(pauses)))
    client = Moody(*(refusal("gone", "StatusCode.UNAVAILABLE") for _ in range(99)))
    with pytest.raises(UnreachableError):
        infer(client, retry_seconds=1.5)
    assert pauses == sorted(set(pauses)) and sum(pauses) <= 1.5
    assert 4 <= client.calls == len(pauses) + 1 <= 8


def test_a_refusal_is_final_and_one_line() -> None:
    client = Moody(refusal("[request id: 7]\n  inference refused", "StatusCode.INVALID_ARGUMENT"))
    with pytest.raises(DarktrtError, match=r"grpc://a:8001: \[request id: 7\] inference refused") as caught:
        infer(client)
    assert type(caught.value) is DarktrtError
    assert client.calls == 1


def test_what_a_server_says_is_a_line_that_can_be_shown() -> None:
    with pytest.raises(DarktrtError) as caught:
        infer(Moody(refusal("\x1b[2J" + "x" * 10_000, "StatusCode.INTERNAL")))
    assert str(caught.value).startswith("grpc://a:8001: \\x1b[2Jxxx")
    assert len(str(caught.value)) < 600


def test_a_lost_region_has_an_error_of_its_own() -> None:
    text = "Unable to find system shared memory region: 'darktrt-x'"
    with pytest.raises(RegionLostError):
        infer(Moody(refusal(text, "StatusCode.NOT_FOUND")))


def test_no_answer_in_time() -> None:
    client = Moody(5.0)
    with pytest.raises(TimedOutError, match=r"no answer within 0\.05 s"):
        infer(client, timeout=0.05)
    assert client.calls == 1


def test_a_mistake_of_ours_is_no_message() -> None:
    with pytest.raises(ZeroDivisionError):
        infer(Moody(ZeroDivisionError()))
