"""A GPU, nvImageCodec and PyNvVideoCodec in Python. Work on a stream is done when the stream is waited for."""

from __future__ import annotations

import ctypes
import io
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import FakeDriver
from PIL import Image, ImageOps

PRIMARY_CONTEXT = 77


class FakeGpu(FakeDriver):
    """``libcuda`` with streams. Contexts are current in one thread."""

    def __init__(self) -> None:
        self._own = threading.local()
        super().__init__(memory=1 << 28)
        self.pending: dict[int, list[Callable[[], None]]] = {}
        self.release_threshold = 0
        self.faults: list[str] = []
        self.broken = False

    @property
    def contexts(self) -> list[Any]:
        if not hasattr(self._own, "contexts"):
            self._own.contexts = []
        return self._own.contexts  # type: ignore[no-any-return]

    @contexts.setter
    def contexts(self, value: list[Any]) -> None:
        self._own.contexts = value

    def allocate(self, pixels: np.ndarray | None, size: int = 0) -> int:
        """Address of new memory with these contents."""
        self.next_address += 0x1000
        self.buffers[self.next_address] = bytearray(size if pixels is None else pixels.tobytes())
        return self.next_address

    def cuGetErrorName(self, status: Any, text: Any) -> int:  # noqa: N802
        text._obj.value = b"CUDA_ERROR_UNKNOWN" if status.value == 999 else b"CUDA_ERROR_OUT_OF_MEMORY"
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"a GPU of Python"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = 9
        return 0

    def cuCtxGetDevice(self, device: Any) -> int:  # noqa: N802
        assert self.contexts
        return 0

    def cuDeviceGetDefaultMemPool(self, pool: Any, device: Any) -> int:  # noqa: N802
        return 0

    def cuMemPoolGetAttribute(self, pool: Any, attribute: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = self.release_threshold
        return 0

    def cuMemPoolSetAttribute(self, pool: Any, attribute: Any, value: Any) -> int:  # noqa: N802
        assert attribute.value == 4
        self.release_threshold = value._obj.value
        return 0

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:  # noqa: N802
        assert self.contexts and flags.value == 1
        self.next_address += 1
        stream._obj.value = self.next_address
        self.pending[self.next_address] = []
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:  # noqa: N802
        del self.pending[stream.value]
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        assert self.contexts
        if self.broken:
            return 999
        work, self.pending[stream.value] = self.pending[stream.value], []
        for function in work:
            function()
        return 0

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        def copy() -> None:
            self.buffers[target.value][:] = self.buffers[source.value][: size.value]

        self.pending[stream.value].append(copy)
        return 0


class FakeImageCodec(ModuleType):
    """The module nvidia.nvimgcodec. Its pixels are Pillow's, one level lighter from the hardware and two from the other.

    ``missing`` are kinds of decoders that this GPU has not. ``refuses`` names files that neither decodes, ``hardware_refuses``
    those of the hardware, and ``spoils`` those that fail the whole batch there.
    """

    HARDWARE, HYBRID = 1, 3

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__("nvidia.nvimgcodec")
        self.gpu = gpu
        self.calls: list[int] = []
        self.options = ""
        self.missing: set[int] = set()
        self.refuses: Callable[[bytes], bool] = lambda data: False
        self.hardware_refuses: Callable[[bytes], bool] = lambda data: False
        self.spoils: Callable[[bytes], bool] = lambda data: False
        self.shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
        self.closed = 0
        self.BackendKind = SimpleNamespace(HW_GPU_ONLY=self.HARDWARE, HYBRID_CPU_GPU=self.HYBRID)
        self.ColorSpec = SimpleNamespace(SRGB=1)
        self.Backend = lambda kind: kind
        self.DecodeParams = lambda apply_exif_orientation, color_spec: SimpleNamespace(turned=apply_exif_orientation)
        self.CodeStream = FakeCodeStream
        self.Decoder = lambda backends, options: FakeImageDecoder(self, backends, options)


class FakeCodeStream:
    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def width(self) -> int:
        return self._size()[0]

    @property
    def height(self) -> int:
        return self._size()[1]

    def _size(self) -> tuple[int, int]:
        try:
            with Image.open(io.BytesIO(self.data), formats=["JPEG"]) as image:
                return image.size
        except OSError as error:
            raise RuntimeError("Could not parse") from error


class FakeImageDecoder:
    def __init__(self, codec: FakeImageCodec, backends: list[int], options: str) -> None:
        assert codec.gpu.contexts
        (self._kind,) = backends
        if self._kind in codec.missing:
            raise RuntimeError("Could not create decoder. Code: 7")
        self._codec = codec
        codec.options = options

    def __exit__(self, *_: object) -> None:
        self._codec.closed += 1

    def decode(self, streams: list[FakeCodeStream], params: Any, cuda_stream: int) -> list[Any]:
        assert self._codec.gpu.contexts and params.turned
        self._codec.calls.append(len(streams))
        if self._kind == self._codec.HARDWARE and any(self._codec.spoils(stream.data) for stream in streams):
            return [None] * len(streams)
        return [None if self._refuses(stream.data) else self._decoded(stream, cuda_stream) for stream in streams]

    def _refuses(self, data: bytes) -> bool:
        if self._kind == self._codec.HARDWARE:
            assert b"\xff\xc2" not in data, "is progressive"
            return self._codec.refuses(data) or self._codec.hardware_refuses(data)
        return self._codec.refuses(data)

    def _decoded(self, stream: FakeCodeStream, cuda_stream: int) -> FakeImage:
        with Image.open(io.BytesIO(stream.data)) as image:
            pixels = lighter(
                np.asarray(ImageOps.exif_transpose(image).convert("RGB")), 1 if self._kind == self._codec.HARDWARE else 2
            )
        return FakeImage(self._codec.gpu, pixels, cuda_stream, self._codec.shape(pixels.shape))


def lighter(pixels: np.ndarray, levels: int = 1) -> np.ndarray:
    """Some levels more, to tell the GPU's pixels from the CPU's."""
    return (np.minimum(pixels, 255 - levels) + levels).astype(np.uint8)


class FakeImage:
    """Its memory is written and freed in order of a stream."""

    def __init__(self, gpu: FakeGpu, pixels: np.ndarray, stream: int, shape: tuple[int, ...]) -> None:
        self._gpu, self._stream = gpu, stream
        self._address = address = gpu.allocate(None, pixels.nbytes)
        gpu.pending[stream].append(lambda: gpu.buffers[address].__setitem__(slice(None), pixels.tobytes()))
        self.__cuda_array_interface__ = {"shape": shape, "strides": None, "typestr": "|u1", "data": (address, False)}

    def __del__(self) -> None:
        if self._stream not in self._gpu.pending:
            self._gpu.faults.append("freed after its stream")
        del self._gpu.buffers[self._address]


class FakeVideoCodec(ModuleType):
    """The module PyNvVideoCodec. Each packet gives frames in memory that the next overwrites, on a stream of its own."""

    def __init__(self, gpu: FakeGpu, videos: dict[str, list[np.ndarray]]) -> None:
        super().__init__("PyNvVideoCodec")
        self.gpu, self.videos = gpu, videos
        self.fails_at = -1
        self.ends_at: int | None = None
        self.decoded = 0
        self.OutputColorType = SimpleNamespace(RGB=1)

    def CreateDemuxer(self, filename: str) -> FakeDemuxer:  # noqa: N802
        return FakeDemuxer(self.videos[filename][: self.ends_at])

    def CreateDecoder(self, **options: Any) -> FakeVideoDecoder:  # noqa: N802
        assert options["usedevicememory"] and options["outputColorType"] == 1 and options["codec"] == "h264"
        assert options["cudacontext"] == PRIMARY_CONTEXT and options["cudastream"] in self.gpu.pending
        return FakeVideoDecoder(self)


class FakeDemuxer:
    def __init__(self, frames: list[np.ndarray]) -> None:
        self._frames = frames

    def GetNvCodecId(self) -> str:  # noqa: N802
        return "h264"

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """Packets: the decoder has one frame of the first two, and the last one empties it."""
        yield []
        for i in range(0, len(self._frames), 2):
            yield self._frames[i : i + 2]


class FakeVideoDecoder:
    def __init__(self, codec: FakeVideoCodec) -> None:
        self._codec = codec
        self._memory: list[int] = []
        self._work: list[Callable[[], None]] = []

    def Decode(self, packet: list[np.ndarray]) -> list[SimpleNamespace]:  # noqa: N802
        gpu = self._codec.gpu
        for address in self._memory:
            gpu.buffers[address][:] = bytes(len(gpu.buffers[address]))
        if 0 <= self._codec.fails_at <= self._codec.decoded:
            raise ValueError("NVDEC failed\nin some file")
        self._codec.decoded += len(packet)
        return [self._frame(pixels) for pixels in packet]

    def _frame(self, pixels: np.ndarray) -> SimpleNamespace:
        height, width, _ = pixels.shape
        address = self._codec.gpu.allocate(None, pixels.nbytes)
        self._memory.append(address)
        self._work.append(lambda: self._codec.gpu.buffers[address].__setitem__(slice(None), pixels.tobytes()))
        return SimpleNamespace(shape=[height, width, 3], strides=[3 * width, 3, 1], GetPtrToPlane=lambda plane: address)

    def SyncOnCUStream(self) -> None:  # noqa: N802
        work, self._work = self._work, []
        for function in work:
            function()


def install_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """In the place of libcuda."""
    gpu = FakeGpu()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": gpu}[name])
    return gpu


def install_image_codec(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> FakeImageCodec:
    codec = FakeImageCodec(gpu)
    package = ModuleType("nvidia")
    package.nvimgcodec = codec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvidia", package)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", codec)
    return codec


def install_video_codec(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, videos: dict[str, list[np.ndarray]]) -> FakeVideoCodec:
    codec = FakeVideoCodec(gpu, videos)
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", codec)
    return codec
