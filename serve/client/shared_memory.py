"""Memory that a client shares with a server on its machine, so that images do not pass through a socket.

The server knows a region by the name of a file in ``/dev/shm``, which the owner of the region keeps locked. The kernel releases
the lock however the owner ends: a region whose file nobody locks is abandoned, and :func:`free_abandoned` frees it. No other
region is ever touched.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import Driver
from darktrt.errors import DarktrtError
from darktrt.serve.client.calls import MemoryKind
from darktrt.serve.client.transport import MemorySlice, RegionLostError, Transport

FOLDER = Path("/dev/shm")
PREFIX = "darktrt-"
_KINDS: tuple[MemoryKind, ...] = ("system", "cuda")
_ALIGNMENT = 64
_CUDA_GRANULE = 2 << 20
"""Bytes of the driver's blocks; a smaller allocation would share its block, and with it other memory of this process."""
_CUDA_HANDLE = 64
"""Bytes of a CUipcMemHandle."""


class Memory(Protocol):
    """A region: bytes that client and server see."""

    name: str

    def write(self, offset: int, array: NDArray[Any]) -> None: ...

    def read(self, offset: int, array: NDArray[Any]) -> None:
        """Fill a contiguous array.

        Raises:
            RegionLostError: the region has fewer bytes than it had.
        """

    async def register(self, transport: Transport) -> None: ...

    async def unregister(self, transport: Transport) -> None: ...

    def close(self) -> None:
        """Release the memory on the client's side; may be called twice."""


class _OwnedFile:
    """A new file in ``/dev/shm``, locked while it is open, and before it has its name."""

    def __init__(self, endpoint: object, size: int) -> None:
        self.name = f"{prefix_of(endpoint)}{token_hex(8)}"
        self.path, unnamed = FOLDER / self.name, FOLDER / f".{self.name}"
        try:
            self.descriptor = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if size:
                    os.posix_fallocate(self.descriptor, 0, size)  # without room an error here, no signal at the first write
                unnamed.rename(self.path)
            except BaseException:
                os.close(self.descriptor)
                unnamed.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise DarktrtError(f"{FOLDER}: cannot make {size} bytes of shared memory: {error.strerror}") from error

    def close(self) -> None:
        if self.descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1


class SystemMemory:
    """A region in the machine's memory.

    It is read and written as a file and not mapped, so that a change of its size is an error and no signal.

    Raises:
        DarktrtError: there is not enough of it.
    """

    def __init__(self, endpoint: object, size: int) -> None:
        self._file = _OwnedFile(endpoint, size)
        self.name, self.size = self._file.name, size

    def write(self, offset: int, array: NDArray[Any]) -> None:
        self._restore()
        rest = _bytes(np.ascontiguousarray(array))
        while rest:
            done = os.pwrite(self._file.descriptor, rest, offset)
            rest, offset = rest[done:], offset + done

    def read(self, offset: int, array: NDArray[Any]) -> None:
        rest = _bytes(array)
        while rest:
            done = os.preadv(self._file.descriptor, [rest], offset)
            if done == 0:
                raise RegionLostError(f"{self._file.path}: became smaller than {self.size} bytes while it was in use")
            rest, offset = rest[done:], offset + done

    def _restore(self) -> None:
        """Give the file its size again, which another program of this user may have changed: without the bytes that it has
        mapped, the server would be ended by a signal."""
        if os.fstat(self._file.descriptor).st_size < self.size:
            os.posix_fallocate(self._file.descriptor, 0, self.size)

    async def register(self, transport: Transport) -> None:
        await _register(transport, "system", self.name, lambda: transport.register_system(self.name, self.size))

    async def unregister(self, transport: Transport) -> None:
        await transport.unregister("system", self.name)

    def close(self) -> None:
        self._file.close()


def _bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


class CudaMemory:
    """A region in the memory of GPU 0; its file is empty and only shows that the owner lives.

    Raises:
        DarktrtError: there is no driver, no GPU, or not enough memory.
    """

    def __init__(self, endpoint: object, size: int) -> None:
        self.size = -(-size // _CUDA_GRANULE) * _CUDA_GRANULE
        self._file = _OwnedFile(endpoint, 0)
        try:
            self._driver = Driver()
            self._address = self._driver.allocate(self.size)
        except DarktrtError:
            self._file.close()
            raise
        self.name = self._file.name

    def write(self, offset: int, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array)
        with self._driver.current():
            self._driver.call("cuMemcpyHtoD_v2", self._at(offset), ctypes.c_void_p(data.ctypes.data), _size(data))
            self._driver.call("cuCtxSynchronize")  # the copy may return before its last bytes arrive for other processes

    def read(self, offset: int, array: NDArray[Any]) -> None:
        with self._driver.current():
            self._driver.call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), self._at(offset), _size(array))

    def _at(self, offset: int) -> ctypes.c_uint64:
        return ctypes.c_uint64(self._address + offset)

    def handle(self) -> bytes:
        """CUDA's handle for other processes, in base64."""
        handle = ctypes.create_string_buffer(_CUDA_HANDLE)
        with self._driver.current():
            self._driver.call("cuIpcGetMemHandle", handle, self._at(0))
        return base64.b64encode(handle.raw)

    async def register(self, transport: Transport) -> None:
        handle = self.handle()
        await _register(transport, "cuda", self.name, lambda: transport.register_cuda(self.name, handle, 0, self.size))

    async def unregister(self, transport: Transport) -> None:
        await transport.unregister("cuda", self.name)

    def close(self) -> None:
        if self._address:
            self._driver.free(self._address)
            self._driver.close()
            self._address = 0
        self._file.close()


def _size(array: NDArray[Any]) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)


async def _register(transport: Transport, kind: MemoryKind, name: str, register: Any) -> None:
    """Register a region, which the server may know already where the answer to an earlier try was lost."""
    try:
        await register()
    except DarktrtError as error:
        if name in await transport.regions(kind):
            return
        raise DarktrtError(
            f"{error}; shared memory needs client and server on one machine, and containers one /dev/shm"
        ) from error


def make_memory(kind: MemoryKind, endpoint: object, size: int) -> Memory:
    """A new region of at least ``size`` bytes."""
    return SystemMemory(endpoint, size) if kind == "system" else CudaMemory(endpoint, size)


def layout(region: str, sizes: Mapping[str, int]) -> tuple[dict[str, MemorySlice], int]:
    """The slices of a region for tensors of these sizes in bytes, one behind the other, and the bytes of all."""
    slices, offset = {}, 0
    for name, size in sizes.items():
        slices[name] = MemorySlice(region, offset, size)
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return slices, offset


# --- abandoned regions ---


def prefix_of(endpoint: object) -> str:
    """The first part of the names of all regions for one server."""
    return f"{PREFIX}{zlib.crc32(str(endpoint).encode()):08x}-"


async def free_abandoned(transport: Transport) -> list[str]:
    """Free the regions of clients that ended without freeing them; return their names.

    Candidates are the regions that the server knows and those whose names show that they are for this server.
    """
    known = {kind: await transport.regions(kind) for kind in _KINDS}
    names = {path.name for path in FOLDER.glob(f"{prefix_of(transport.endpoint)}*")}
    names |= {name for regions in known.values() for name in regions if name.startswith(PREFIX)}
    return [name for name in sorted(names) if await _free_if_abandoned(transport, name, known)]


async def _free_if_abandoned(transport: Transport, name: str, known: Mapping[MemoryKind, set[str]]) -> bool:
    try:
        descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # not on this machine, or another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for kind, regions in known.items():
            if name in regions:
                await transport.unregister(kind, name)
        with suppress(FileNotFoundError):  # another client was as quick
            (FOLDER / name).unlink()
        return True
    except BlockingIOError:  # its owner lives
        return False
    finally:
        os.close(descriptor)
