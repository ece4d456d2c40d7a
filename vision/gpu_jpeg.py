"""JPEGs decoded on the GPU by nvImageCodec."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image

from darktrt.cuda import DeviceImage, Driver, Stream
from darktrt.errors import DarktrtError
from darktrt.vision.images import ORIENTATION, open_image

POOL_BYTES = 2**29
"""How much freed memory the GPU keeps for the next images; by default the driver takes it back at every wait."""

_RELEASE_THRESHOLD = 4  # of CUmemPool_attribute
_OPTIONS = ":fancy_upsampling=1"
"""Chroma is interpolated, as libjpeg and so Pillow do it; the default differs between versions of nvImageCodec."""
_RGB_COMPONENTS = [ord(name) for name in "RGB"]


class JpegHeader(NamedTuple):
    """What the header of a JPEG says."""

    width: int
    """Upright, as the height."""
    height: int
    progressive: bool = False


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG that the GPU may decode; None for any other file.

    That are JPEGs of gray or YCbCr, of at most Pillow's safety limit of pixels, whose last bytes are the marker of the end:
    of truncated files nvImageCodec may decode the part that is there.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    try:
        with open_image(BytesIO(data)) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
            if image.format != "JPEG" or not _is_gray_or_ycc(image) or orientation != _exif_orientation(image):
                return None
            width, height = image.size if orientation < 5 else image.size[::-1]
            return JpegHeader(width, height, "progressive" in image.info)
    except Exception:  # the file is Pillow's then, which raises this again, with words
        return None


def _is_gray_or_ycc(image: Any) -> bool:
    """By libjpeg's rules; nvImageCodec takes three components for YCbCr."""
    if image.mode != "RGB":
        return bool(image.mode == "L")
    return image.info.get("adobe_transform", 1) == 1 and [layer[0] for layer in image.layer] != _RGB_COMPONENTS


def _exif_orientation(image: Image.Image) -> int:
    """The orientation that nvImageCodec applies. Pillow also knows one in XMP, and leaves odd values alone."""
    if "exif" not in image.info:
        return 1
    exif = Image.Exif()
    exif.load(image.info["exif"])
    orientation = exif.get(ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


class GpuJpegDecoder:
    """nvImageCodec on the GPU whose context is current, or on the first.

    The JPEG decoder in hardware, which not every GPU has, and the hybrid one of CPU and GPU round differently. A decoder of
    nvImageCodec with both backends shares a batch between them by its size and that of the first batch. So each has one, and
    the file alone decides which of them decodes it: it has the same pixels in any company.

    Each call is complete when it returns: the images are allocated and written in order of a stream, and the call waits for
    that stream. So work on any stream may read them.

    Raises:
        DarktrtError: nvImageCodec, the driver or a GPU is missing.
    """

    def __init__(self) -> None:
        codec = _import_nvimgcodec()
        self._shared = _Shared()
        with self._shared.driver.current():
            self._code_stream = codec.CodeStream
            self._params = codec.DecodeParams(apply_exif_orientation=True, color_spec=codec.ColorSpec.SRGB)
            try:
                self._hardware = _decoder(codec, codec.BackendKind.HW_GPU_ONLY)
                self._hybrid = _decoder(codec, codec.BackendKind.HYBRID_CPU_GPU, required=self._hardware is None)
            except RuntimeError as error:
                self._shared.close()
                raise DarktrtError(f"nvImageCodec cannot start ({error}); is its nvJPEG installed?") from error

    def close(self) -> None:
        """Give back what is not needed by images that are still in use."""
        with self._shared.driver.current():
            for decoder in (self._hardware, self._hybrid):
                if decoder is not None:
                    decoder.__exit__(None, None, None)
        self._shared.close()

    def decode(self, files: Sequence[tuple[bytes, JpegHeader]]) -> list[DeviceImage | None]:
        """Decode JPEGs, each with its header from :func:`read_header`; None for those that nvImageCodec cannot.

        Raises:
            DarktrtError: the GPU fails.
        """
        images: list[Any] = [None] * len(files)
        with self._shared.driver.current():
            streams = {i: stream for i, file in enumerate(files) if (stream := self._parsed(*file)) is not None}
            baseline = [i for i in streams if not files[i][1].progressive]  # hardware knows no other, and would log a warning
            self._fill(images, self._hardware, streams, baseline)
            self._fill(images, self._hybrid, streams, [i for i in streams if images[i] is None])
        self._shared.stream.synchronize()
        return [self._device_image(image, header) for image, (_, header) in zip(images, files, strict=True)]

    def _fill(self, images: list[Any], decoder: Any, streams: Mapping[int, Any], numbers: Sequence[int]) -> None:
        """Decode the streams of these numbers; None is put for those that the decoder cannot."""
        if decoder is None or not numbers:
            return
        decoded = self._run(decoder, [streams[i] for i in numbers])
        if len(decoded) > 1 and all(image is None for image in decoded):  # one bad file fails a batch of the hardware
            decoded = [image for i in numbers for image in self._run(decoder, [streams[i]])]
        for i, image in zip(numbers, decoded, strict=True):
            images[i] = image

    def _run(self, decoder: Any, streams: Sequence[Any]) -> list[Any]:
        decoded: list[Any] = decoder.decode(streams, params=self._params, cuda_stream=self._shared.stream.handle)
        return decoded

    def _parsed(self, data: bytes, header: JpegHeader) -> Any:
        """The file as nvImageCodec reads it; None where it finds another size than Pillow, so that it allocates no other."""
        try:
            stream = self._code_stream(data)
            size = stream.width, stream.height
        except RuntimeError:
            return None
        return stream if size in ((header.width, header.height), (header.height, header.width)) else None

    def _device_image(self, image: Any, header: JpegHeader) -> DeviceImage | None:
        if image is None:
            return None
        memory, width, height = image.__cuda_array_interface__, header.width, header.height
        if memory["shape"] != (height, width, 3) or memory["typestr"] != "|u1":
            return None
        if memory.get("strides") not in (None, (3 * width, 3, 1)):
            return None
        return DeviceImage(memory["data"][0], width, height, self._shared.lend(image))


def _decoder(codec: Any, kind: Any, required: bool = False) -> Any:
    """nvImageCodec's decoder with one backend; None if this GPU has none of the kind and it is not required."""
    try:
        return codec.Decoder(backends=[codec.Backend(kind)], options=_OPTIONS)
    except RuntimeError:
        if required:
            raise
        return None


def _import_nvimgcodec() -> Any:
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise DarktrtError(f"decoding on the GPU needs nvImageCodec: pip install 'darktrt[gpu]' ({error})") from error
    return nvimgcodec


class _Shared:
    """The stream in whose order images are allocated and freed; it lives as long as the decoder and every image."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.stream = Stream(self.driver)
        self._users = 1
        self._lock = threading.RLock()  # the garbage collector may run finalizers in the thread that holds it
        self._keep_freed_memory()

    def _keep_freed_memory(self) -> None:
        pool, device, threshold = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_uint64()
        with self.driver.current():
            self.driver.call("cuCtxGetDevice", ctypes.byref(device))
            self.driver.call("cuDeviceGetDefaultMemPool", ctypes.byref(pool), device)
            self.driver.call("cuMemPoolGetAttribute", pool, ctypes.c_int(_RELEASE_THRESHOLD), ctypes.byref(threshold))
            threshold.value = max(threshold.value, POOL_BYTES)
            self.driver.call("cuMemPoolSetAttribute", pool, ctypes.c_int(_RELEASE_THRESHOLD), ctypes.byref(threshold))

    def lend(self, image: object) -> _Lease:
        """A keeper of the image."""
        with self._lock:
            self._users += 1
        return _Lease(image, self)

    def close(self) -> None:
        """One user less; the last closes the stream."""
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            self.stream.close()
            self.driver.close()


class _Lease:
    """Keeps an image of nvImageCodec."""

    def __init__(self, image: object, shared: _Shared) -> None:
        self._image: object = image
        self._shared = shared

    def __del__(self) -> None:
        self._image = None  # is freed on the stream, so before it
        with suppress(DarktrtError):  # the process may be ending
            self._shared.close()
