"""Regions of shared memory: whose they are, and what becomes of them; the GPU's with a driver that stands in for CUDA's."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from darktrt.errors import DarktrtError
from darktrt.serve.client import shared_memory
from darktrt.serve.client.shared_memory import (
    FOLDER,
    PREFIX,
    CudaMemory,
    SystemMemory,
    free_abandoned,
    layout,
    make_memory,
    prefix_of,
)
from darktrt.serve.client.transport import MemorySlice, RegionLostError


class Register:
    """Stands for a server that knows regions by name."""

    usual = f"grpc://made-{os.getpid()}:1"

    def __init__(self, endpoint: str = usual) -> None:
        self.endpoint = endpoint
        self.known: dict[str, dict[str, Any]] = {"system": {}, "cuda": {}}

    async def regions(self, kind: str) -> set[str]:
        return set(self.known[kind])

    async def register_system(self, name: str, size: int) -> None:
        self.known["system"][name] = size

    async def register_cuda(self, name: str, handle: bytes, device: int, size: int) -> None:
        self.known["cuda"][name] = handle, device, size

    async def unregister(self, kind: str, name: str) -> None:
        del self.known[kind][name]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert [*FOLDER.glob(f"*{prefix_of(Register.usual)}*")] == []


def test_what_is_written_is_there_for_others() -> None:
    server = Register()
    memory = SystemMemory(server.endpoint, 100)
    try:
        values = np.arange(12, dtype=np.float32).reshape(3, 4)
        memory.write(8, values)
        assert (FOLDER / memory.name).read_bytes()[8:56] == values.tobytes()
        back = np.zeros((3, 4), np.float32)
        memory.read(8, back)
        np.testing.assert_array_equal(back, values)
        asyncio.run(memory.register(server))  # type: ignore[arg-type]
        assert server.known["system"] == {memory.name: 100}
        assert (FOLDER / memory.name).stat().st_mode & 0o777 == 0o600
    finally:
        memory.close()
        memory.close()


def test_memory_that_becomes_smaller_is_an_error_and_no_signal() -> None:
    """A process that maps the file would be ended by SIGBUS; the next write gives the file its size again."""
    memory = SystemMemory(Register.usual, 10_000)
    back = np.zeros(2500, np.float32)
    try:
        memory.write(0, np.ones(2500, np.float32))
        os.truncate(FOLDER / memory.name, 5000)
        with pytest.raises(RegionLostError, match=f"{memory.name}: became smaller than 10000 bytes while it was in use"):
            memory.read(0, back)
        memory.write(0, np.ones(10, np.float32))
        assert (FOLDER / memory.name).stat().st_size == 10_000
        memory.read(0, back)
        assert back.sum() == 1250
    finally:
        memory.close()


def test_arrays_of_any_layout_and_size_are_written() -> None:
    memory = SystemMemory(Register.usual, 1000)
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    try:
        for array in (values.T, values[:, ::2], values[:0], values > 3):
            memory.write(16, array)
            back = np.empty(array.shape, array.dtype)
            memory.read(16, back)
            np.testing.assert_array_equal(back, array)
    finally:
        memory.close()


def test_places_do_not_overlap() -> None:
    places, size = layout("r", {"a": 10, "b": 64, "c": 65})
    assert places == {"a": MemorySlice("r", 0, 10), "b": MemorySlice("r", 64, 64), "c": MemorySlice("r", 128, 65)}
    assert size == 256
    assert layout("r", {"a": 64})[1] == 64


def test_too_little_memory_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DarktrtError, match="cannot make 100 bytes of shared memory: No space left"):
        SystemMemory("grpc://made:1", 100)


HOLDER = """
import sys, time
from darktrt.serve.client.shared_memory import SystemMemory
memories = [SystemMemory(sys.argv[1], 4096) for _ in range(2)]
print(*(memory.name for memory in memories), flush=True)
time.sleep(600)
"""


@contextmanager
def holder(endpoint: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process that holds two regions, and their names."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, endpoint], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    names = process.stdout.readline().split()
    try:
        yield process, names
    finally:
        process.kill()
        process.wait()
        for name in names:
            (FOLDER / name).unlink(missing_ok=True)


def sweep(server: Register) -> list[str]:
    return asyncio.run(free_abandoned(server))  # type: ignore[arg-type]


def test_only_what_the_dead_left_is_freed() -> None:
    server = Register()
    with holder(server.endpoint) as (dead, left), holder(server.endpoint) as (_, held):
        for name in (*left, *held, "theirs", f"{PREFIX}elsewhere"):
            server.known["system"][name] = 4096
        assert sweep(server) == []
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert sweep(server) == sorted(left)
        assert set(server.known["system"]) == {*held, "theirs", f"{PREFIX}elsewhere"}
        assert [(FOLDER / name).exists() for name in (*left, *held)] == [False, False, True, True]


def test_what_was_made_for_another_server_is_left_to_its_clients() -> None:
    server, other = Register(), Register("grpc://other:1")
    with holder(other.endpoint) as (dead, left):
        dead.kill()
        dead.wait()
        assert sweep(server) == []
        assert all((FOLDER / name).exists() for name in left)
        server.known["system"][left[0]] = 4096  # known after all, by another of its names
        assert sweep(server) == [left[0]]
        assert sweep(other) == [left[1]]


class FakeDriver:
    """Host memory for the GPU's."""

    made: list[FakeDriver]

    def __init__(self) -> None:
        self.buffers: dict[int, Any] = {}
        self.closed = False
        FakeDriver.made.append(self)

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size)
        self.buffers[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address: int) -> None:
        del self.buffers[address]

    def close(self) -> None:
        self.closed = True

    def call(self, function: str, *arguments: Any) -> None:
        getattr(self, function)(*arguments)

    def cuCtxSynchronize(self) -> None:  # noqa: N802
        pass

    def cuMemcpyHtoD_v2(self, address: Any, source: Any, size: Any) -> None:  # noqa: N802
        ctypes.memmove(address.value, source, size.value)

    def cuMemcpyDtoH_v2(self, target: Any, address: Any, size: Any) -> None:  # noqa: N802
        ctypes.memmove(target, address.value, size.value)

    def cuIpcGetMemHandle(self, handle: Any, address: Any) -> None:  # noqa: N802
        ctypes.memmove(handle, address.value.to_bytes(64, "little"), 64)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> type[FakeDriver]:
    FakeDriver.made = []
    monkeypatch.setattr(shared_memory, "Driver", FakeDriver)
    return FakeDriver


def test_memory_of_the_gpu(driver: type[FakeDriver]) -> None:
    server = Register()
    memory = make_memory("cuda", server.endpoint, 3 << 20)
    assert isinstance(memory, CudaMemory)
    (made,) = driver.made
    ((address, buffer),) = made.buffers.items()
    values = np.arange(6, dtype=np.int32).reshape(2, 3)
    memory.write(64, values.T.copy().T)  # not contiguous
    assert buffer.raw[64:88] == values.tobytes()
    back = np.zeros((2, 3), np.int32)
    memory.read(64, back)
    np.testing.assert_array_equal(back, values)
    asyncio.run(memory.register(server))  # type: ignore[arg-type]
    assert server.known["cuda"] == {memory.name: (base64.b64encode(address.to_bytes(64, "little")), 0, 4 << 20)}
    assert sweep(server) == [], "its owner lives"
    asyncio.run(memory.unregister(server))  # type: ignore[arg-type]
    memory.close()
    memory.close()
    assert (made.buffers, made.closed) == ({}, True)


def test_memory_of_the_gpu_that_a_dead_client_left(driver: type[FakeDriver]) -> None:
    server = Register()
    with holder(server.endpoint) as (dead, (first, second)):
        server.known["cuda"][first] = server.known["cuda"]["theirs"] = ()
        dead.kill()
        dead.wait()
        assert sweep(server) == sorted([first, second])
    assert server.known["cuda"] == {"theirs": ()}
