"""Videos decoded on the GPU (NVDEC) by PyNvVideoCodec."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import DeviceImage, Driver, Stream, first_gpu
from darktrt.errors import DarktrtError
from darktrt.vision.prefetch import prefetch

if TYPE_CHECKING:
    import av

FORMATS = ("yuv420p",)
MATRICES = (1, 5, 6)
"""FFmpeg's numbers of BT.709 and of both of BT.601. For a video that states none FFmpeg takes BT.601, the GPU BT.709."""
RANGES = (0, 1)
"""FFmpeg's numbers of an unstated and of the limited range of levels."""

MOST_DIFFERENCE = 2.0
"""Mean difference of the first frame's levels from FFmpeg's: what rounding makes, and a wrong matrix of colours exceeds."""


class GpuVideoError(Exception):
    """PyNvVideoCodec cannot go on; FFmpeg can."""


def import_codec(required: bool) -> Any:
    """The module PyNvVideoCodec; None, unless it is required, where it or a GPU is missing.

    Raises:
        DarktrtError: it is required and missing.
    """
    try:
        import PyNvVideoCodec
    except (ImportError, RuntimeError) as error:  # it raises the second where NVIDIA's driver is missing or too old
        reason = str(error).strip().partition("\n")[0]
    else:
        if first_gpu():
            return PyNvVideoCodec
        reason = "there is no GPU"
    if required:
        raise DarktrtError(f"decoding videos on the GPU needs PyNvVideoCodec: pip install 'darktrt[gpu]' ({reason})")
    return None


def has_same_colours(frame: av.VideoFrame) -> bool:
    """Whether the GPU makes the colours of a video, from its first frame, that FFmpeg makes, and the frame is upright."""
    tags = frame.colorspace in MATRICES and frame.color_range in RANGES
    return tags and frame.format.name in FORMATS and not round(frame.rotation / 90) % 4


def gpu_frames(path: Path, codec: Any, first: NDArray[np.uint8], most: int) -> Generator[DeviceImage, None, None]:
    """Yield a video's frames in order, decoded up to ``most`` ahead in a thread.

    Args:
        path: the file.
        codec: the module PyNvVideoCodec.
        first: FFmpeg's first frame, to compare with.
        most: how many frames are decoded ahead.

    Raises:
        GpuVideoError: PyNvVideoCodec cannot decode the video, or its first frame differs from FFmpeg's.
    """
    memory = _Memory()
    try:
        with closing(prefetch(_decoded(path, codec, memory), most)) as frames:
            for number, frame in enumerate(frames):
                if frame.shape != first.shape:
                    raise GpuVideoError(f"frame {number} has {frame.width}x{frame.height} pixels")
                if number == 0:
                    _check_first(frame.to_host(), first)
                yield frame
    finally:
        memory.close()


def _check_first(pixels: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    difference = np.abs(pixels.astype(np.int16) - expected).mean()
    if difference > MOST_DIFFERENCE:
        raise GpuVideoError(f"its first frame differs from FFmpeg's by {difference:.1f} levels")


def _decoded(path: Path, codec: Any, memory: _Memory) -> Iterator[DeviceImage]:
    """Copies of the frames, for PyNvVideoCodec may overwrite its own at the next packet."""
    try:
        demuxer = codec.CreateDemuxer(filename=str(path.resolve()))  # absolute, for a colon could be a protocol
        decoder = codec.CreateDecoder(
            codec=demuxer.GetNvCodecId(),
            cudacontext=memory.driver.context,
            cudastream=memory.stream.handle,
            usedevicememory=True,
            outputColorType=codec.OutputColorType.RGB,
        )
        for packet in demuxer:
            if frames := decoder.Decode(packet):
                decoder.SyncOnCUStream()
                yield from memory.copies(frames)
    except Exception as error:  # PyNvVideoCodec's have no common base
        raise GpuVideoError(str(error).strip().partition("\n")[0]) from error


class _Memory:
    """Memory for frames on the GPU. That of frames that are no longer used is used again."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.stream = Stream(self.driver)
        self._lock = threading.RLock()  # the garbage collector may run finalizers in the thread that holds it
        self._free: dict[int, list[int]] = {}
        self._used = 0
        self._closed = False

    def copies(self, frames: list[Any]) -> list[DeviceImage]:
        """Copies of PyNvVideoCodec's frames ``(H, W, 3)``, complete."""
        images = []
        for frame in frames:
            height, width, channels = frame.shape
            if channels != 3 or tuple(frame.strides) != (3 * width, 3, 1):
                raise GpuVideoError(f"frames have the shape {tuple(frame.shape)} and the strides {tuple(frame.strides)}")
            lease = self._take(3 * width * height)
            self.stream.copy(lease.address, frame.GetPtrToPlane(0), lease.size)
            images.append(DeviceImage(lease.address, width, height, lease))
        self.stream.synchronize()
        return images

    def close(self) -> None:
        """Give back what is not in use; the rest follows when it is no longer used."""
        with self._lock:
            self._closed = True
        self._give_all_back()

    def _take(self, size: int) -> _Lease:
        with self._lock:
            free = self._free.get(size)
            address = free.pop() if free else self.driver.allocate(size)
            self._used += 1
        return _Lease(address, size, self)

    def put_back(self, address: int, size: int) -> None:
        with self._lock:
            self._free.setdefault(size, []).append(address)
            self._used -= 1
        self._give_all_back()

    def _give_all_back(self) -> None:
        with self._lock:
            if not self._closed:
                return
            free, self._free = self._free, {}
            last = not self._used
        for address in (address for addresses in free.values() for address in addresses):
            self.driver.free(address)
        if last:
            self.stream.close()
            self.driver.close()


class _Lease:
    """Puts memory back when the frame in it is no longer used."""

    def __init__(self, address: int, size: int, memory: _Memory) -> None:
        self.address, self.size, self._memory = address, size, memory

    def __del__(self) -> None:
        with suppress(DarktrtError):  # the process may be ending
            self._memory.put_back(self.address, self.size)
