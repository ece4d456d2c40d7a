"""NVIDIA's driver through ctypes: memory, streams, events and graphs, as far as calibrating, running and timing need them.

The driver and not the CUDA runtime: every machine with a GPU has ``libcuda.so.1``, and there is nothing to install for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError

_THREAD_LOCAL_CAPTURE = 1
_NO_TIMING = 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute


class Driver:
    """The driver in the context that is current, or, where none is, in the primary context of a GPU, as TensorRT does it.

    Raises:
        DarktrtError: there is no driver or no GPU. Every method raises it with CUDA's own words where a call fails.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            self._library: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DarktrtError(f"the GPU needs NVIDIA's driver ({error})") from error
        self._context = ctypes.c_void_p()
        self._device, self._retained = ctypes.c_int(device), False
        self.call("cuInit", ctypes.c_uint(0))
        self.call("cuCtxGetCurrent", ctypes.byref(self._context))
        if not self._context:
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
            self._retained = True

    @property
    def context(self) -> int:
        """CUDA's handle of the context, for other libraries."""
        return int(self._context.value or 0)

    def close(self) -> None:
        """Let go of the context; may be called twice."""
        if self._retained:
            self._retained = False
            self.call("cuDevicePrimaryCtxRelease_v2", self._device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context, current in this thread."""
        self.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def call(self, function: str, *arguments: Any) -> None:
        """A function of the driver, its arguments as ctypes objects."""
        status = getattr(self._library, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
            raise DarktrtError(f"CUDA: {function} fails: {(text.value or b'unknown error').decode()} ({status})")

    def allocate(self, size: int) -> int:
        """Address of new device memory of this many bytes."""
        address = ctypes.c_uint64()
        with self.current():
            self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        with self.current():
            self.call("cuMemFree_v2", ctypes.c_uint64(address))


def first_gpu() -> tuple[str, int] | None:
    """Name of the first GPU and its compute capability times ten, found without a context; None where no driver finds one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    return None if failed else (name.value.decode(), 10 * major.value + minor.value)


def dotted_capability(times_ten: int) -> str:
    """A compute capability as NVIDIA writes it: 8.9 of 89."""
    return f"{times_ten // 10}.{times_ten % 10}"


class DeviceMemory:
    """Named buffers on the GPU, which go to and from the host in steps that wait for all work on it.

    They live in the context that is current at the first use, inside TensorRT's callbacks TensorRT's own. :meth:`free` may be
    called twice.
    """

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._buffers: dict[str, tuple[int, int]] = {}

    def upload(self, name: str, array: NDArray[Any]) -> int:
        """Copy an array into the buffer of this name and size; return its address.

        Raises:
            DarktrtError: there is no driver, or the GPU has too little memory.
        """
        data = np.ascontiguousarray(array)
        address = self.reserve(name, data.nbytes)
        driver = self._open()
        with driver.current():
            driver.call(
                "cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
            )
            driver.call("cuCtxSynchronize")  # TensorRT works on streams that do not wait for this copy
        return address

    def download(self, name: str, array: NDArray[Any]) -> None:
        """Copy the buffer of this name into a contiguous array of its size, after all work on the GPU.

        Raises:
            DarktrtError: work on the GPU failed.
        """
        address, size = self._buffers[name]
        if not array.flags.c_contiguous or array.nbytes != size:
            raise ValueError(f"'{name}' has {size} bytes; {array.nbytes} do not fit")
        driver = self._open()
        with driver.current():
            driver.call("cuCtxSynchronize")
            driver.call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(size))

    def reserve(self, name: str, size: int) -> int:
        """Address of the buffer of this name and of this many bytes, allocated if there is none."""
        if self._buffers.get(name, (0, -1))[1] != size:
            driver = self._open()
            self._free(name)
            self._buffers[name] = (driver.allocate(size), size)
        return self._buffers[name][0]

    def free(self) -> None:
        """Give all memory back."""
        for name in list(self._buffers):
            self._free(name)
        if self._driver:
            self._driver.close()
            self._driver = None

    def _free(self, name: str) -> None:
        if name in self._buffers:
            self._open().free(self._buffers.pop(name)[0])

    def _open(self) -> Driver:
        self._driver = self._driver or Driver()
        return self._driver


@dataclass(frozen=True)
class DeviceImage:
    """An RGB image ``(height, width, 3)`` uint8 in the memory of the GPU, complete: no work that writes it is under way."""

    address: int
    width: int
    height: int
    owner: object = field(repr=False, compare=False)
    """Keeps the memory alive."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """As that of an array."""
        return self.height, self.width, 3

    def to_host(self) -> NDArray[np.uint8]:
        """The pixels as an array.

        Raises:
            DarktrtError: work on the GPU failed.
        """
        pixels = np.empty(self.shape, np.uint8)
        driver = Driver()
        try:
            with driver.current():
                target, size = ctypes.c_void_p(pixels.ctypes.data), ctypes.c_size_t(pixels.nbytes)
                driver.call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(self.address), size)
        finally:
            driver.close()
        return pixels


Frame: TypeAlias = NDArray[np.uint8] | DeviceImage
"""An RGB image ``(height, width, 3)`` uint8 on the host or on the GPU."""


def host_pixels(frame: Frame) -> NDArray[np.uint8]:
    """The frame as an array ``(H, W, 3)``."""
    return frame.to_host() if isinstance(frame, DeviceImage) else frame


class Buffer:
    """Memory of one size on the GPU and on the host, where it is pinned, so that copies reach it without a detour."""

    def __init__(self, driver: Driver, size: int = 0) -> None:
        self._driver = driver
        self._host = ctypes.c_void_p()
        self.address = 0
        self.size = 0
        if size:
            self.reserve(size)

    def reserve(self, size: int) -> bool:
        """Make it hold this many bytes; True if it was too small, so that it has other addresses and no content now.

        Raises:
            DarktrtError: the GPU or the host has too little memory.
        """
        if size <= self.size:
            return False
        self.close()
        self.address = self._driver.allocate(size)
        with self._driver.current():
            self._driver.call("cuMemHostAlloc", ctypes.byref(self._host), ctypes.c_size_t(size), ctypes.c_uint(0))
        self.size = size
        return True

    def array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The memory on the host as an array; it lives until the buffer grows or is closed."""
        size = int(np.prod(shape)) * dtype.itemsize
        memory: Any = (ctypes.c_char * size).from_address(int(self._host.value or 0))
        return np.frombuffer(memory, dtype).reshape(shape)

    def close(self) -> None:
        """Give the memory back; may be called twice."""
        if self.address:
            self._driver.free(self.address)
        if self._host:
            with self._driver.current():
                self._driver.call("cuMemFreeHost", self._host)
        self.address, self.size, self._host = 0, 0, ctypes.c_void_p()


class Event:
    """A mark in the work of a stream, which the host and other streams can wait for."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.handle = ctypes.c_void_p()
        with driver.current():
            driver.call("cuEventCreate", ctypes.byref(self.handle), ctypes.c_uint(_NO_TIMING))

    def synchronize(self) -> None:
        """Wait until the work before the mark is done; at once if the event was never recorded."""
        with self._driver.current():
            self._driver.call("cuEventSynchronize", self.handle)

    def close(self) -> None:
        """May be called twice."""
        if self.handle:
            with self._driver.current():
                self._driver.call("cuEventDestroy_v2", self.handle)
        self.handle = ctypes.c_void_p()


class Stream:
    """Work in order on the GPU: copies from and to pinned host memory, and graphs that replay what was enqueued once."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._handle = ctypes.c_void_p()
        self._graphs: dict[Hashable, ctypes.c_void_p] = {}
        with driver.current():
            driver.call("cuStreamCreate", ctypes.byref(self._handle), ctypes.c_uint(1))  # does not wait for the default stream

    @property
    def handle(self) -> int:
        """CUDA's, for TensorRT."""
        return int(self._handle.value or 0)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a pinned, contiguous array to the GPU."""
        pointer, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), pointer, size, self._handle)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Enqueue a copy from the GPU into a pinned, contiguous array."""
        pointer, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", pointer, ctypes.c_uint64(address), size, self._handle)

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of this many bytes inside the GPU."""
        addresses = ctypes.c_uint64(target), ctypes.c_uint64(source)
        self._call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(size), self._handle)

    def record(self, event: Event) -> None:
        """Set the event's mark behind the work enqueued so far."""
        self._call("cuEventRecord", event.handle, self._handle)

    def wait(self, event: Event) -> None:
        """Let the work enqueued from now on wait for the event's mark."""
        self._call("cuStreamWaitEvent", self._handle, event.handle, ctypes.c_uint(0))

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self._handle)

    @contextmanager
    def recording(self, key: Hashable = 0) -> Iterator[None]:
        """Keep what is enqueued, in place of running it, for :meth:`replay`; it takes the place of what ``key`` had before.

        Other threads may go on using the GPU meanwhile.
        """
        self._call("cuStreamBeginCapture_v2", self._handle, ctypes.c_int(_THREAD_LOCAL_CAPTURE))
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            yield
        finally:
            self._call("cuStreamEndCapture", self._handle, ctypes.byref(graph))
        self.forget(key)
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        self._graphs[key] = ready
        self._call("cuGraphDestroy", graph)

    def replay(self, key: Hashable = 0) -> None:
        self._call("cuGraphLaunch", self._graphs[key], self._handle)

    def forget(self, key: Hashable) -> None:
        """Give the graph of ``key`` back, if there is one."""
        if key in self._graphs:
            self._call("cuGraphExecDestroy", self._graphs.pop(key))

    def event(self) -> ctypes.c_void_p:
        """A mark behind the work enqueued so far; :meth:`elapsed` destroys it."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        self._call("cuEventRecord", event, self._handle)
        return event

    def elapsed(self, begin: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """Milliseconds on the GPU between two marks, once the work before them is done."""
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), begin, end)
        for event in (begin, end):
            self._call("cuEventDestroy_v2", event)
        return milliseconds.value

    def close(self) -> None:
        """Give everything back; may be called twice."""
        if not self._handle:
            return
        for key in list(self._graphs):
            self.forget(key)
        self._call("cuStreamDestroy_v2", self._handle)
        self._handle = ctypes.c_void_p()

    def _call(self, function: str, *arguments: Any) -> None:
        with self._driver.current():
            self._driver.call(function, *arguments)
