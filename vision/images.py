"""Preprocessing: reading an image, darknet's resize and letterbox, and the mapping of boxes back to the image.

Every stage that feeds a network (PyTorch reference, calibrator, evaluator, client) goes through :func:`preprocess`. All
arithmetic is float32, with one rounding for each operation and no BLAS, so that every Python and NumPy computes the same bits.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from darktrt.errors import DarktrtError
from darktrt.files import open_input
from darktrt.metadata import InputForm, ResizePolicy
from darktrt.vision import native

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read. Other decoders are off: one of them would run Ghostscript on untrusted files."""

MOST_FILE_BYTES = 1 << 30
"""The largest image file that is read."""

LETTERBOX_FILL = np.float32(0.5)

ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
"""EXIF's orientation tag, and its values for images that are displayed turned by 90 degrees."""

_Read = TypeVar("_Read")

Admit = Callable[[int, int], None]
"""Takes the width and height of an image before it is decoded; what it raises ends the reading."""


@dataclass(frozen=True)
class Placement:
    """The placement of an image in the network's input: image = (network - offset) * scale, in pixels, for x and y."""

    image_width: int
    image_height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    @property
    def inner_size(self) -> tuple[int, int]:
        """Width and height of the image inside the network input."""
        return round(self.image_width / self.scale_x), round(self.image_height / self.scale_y)

    def to_image(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes ``(n, 4)`` x1 y1 x2 y2 in pixels of the network input, mapped to pixels of the image (not clipped to it)."""
        offset = np.array([self.offset_x, self.offset_y] * 2)
        scale = np.array([self.scale_x, self.scale_y] * 2)
        with np.errstate(all="ignore"):  # boxes that are not finite stay so, and make no detections
            mapped: NDArray[np.float32] = ((boxes - offset) * scale).astype(np.float32)
        return mapped


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decode an image file to ``(H, W, 3)`` uint8 RGB, turned upright as its EXIF orientation asks.

    Gray is repeated; transparency is dropped and 16 bits are cut to their upper 8, both as darknet's stb_image does;
    of an animation the first image is read.

    Raises:
        DarktrtError: the file is missing, empty, truncated, no image, or of more pixels than Pillow's safety limit.
    """
    file = Path(path)
    return load_image(file, str(file))


def image_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Width and height of the image that :func:`read_image` reads, from its header; None for a file that it refuses."""
    with suppress(DarktrtError), open_input(path, MOST_FILE_BYTES) as file:
        return _opened(file, os.fspath(path), _upright_size)
    return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION) in _QUARTER_TURNS else (width, height)


def decode_image(data: bytes, name: str, most_pixels: int) -> NDArray[np.uint8]:
    """Decode an untrusted image in memory, as :func:`read_image`; ``name`` names it in errors.

    Raises:
        DarktrtError: as :func:`read_image`, or its header has more than ``most_pixels``, before it is decoded.
    """
    return load_image(data, name, partial(check_pixels, most_pixels=most_pixels))


def load_image(source: Path | bytes, name: str, admit: Admit | None = None) -> NDArray[np.uint8]:
    """Decode an image as :func:`read_image`, from its file or its bytes.

    Args:
        source: the file, or its bytes.
        name: names the image in errors.
        admit: is called with width and height, as the header states them, before the pixels are decoded.

    Raises:
        DarktrtError: as :func:`read_image`, or from ``admit``, with the name in front.
    """
    if isinstance(source, bytes):
        return _opened(BytesIO(source), name, partial(_pixels, admit=admit))
    with open_input(source, MOST_FILE_BYTES) as file:
        return _opened(file, name, partial(_pixels, admit=admit))


def _opened(file: IO[bytes], name: str, read: Callable[[Image.Image], _Read]) -> _Read:
    """What ``read`` reads of an image.

    Raises:
        DarktrtError: it is no image or a damaged one, or from ``read``, with the name in front.
    """
    try:
        with open_image(file) as image:
            return read(image)
    except DarktrtError as error:
        raise DarktrtError(f"{name}: {error}") from error
    except Exception as error:  # on damaged files Pillow's decoders raise anything from SyntaxError to struct.error
        raise DarktrtError(f"{name}: {_reason(error, empty=not file.seek(0, os.SEEK_END))}") from error


def check_pixels(width: int, height: int, most_pixels: int) -> None:
    """Refuse an image of more than ``most_pixels``.

    Raises:
        DarktrtError: it has more; without the image's name.
    """
    if width * height > most_pixels:
        raise DarktrtError(f"has {width}x{height} pixels, more than {most_pixels:,}; scale it down first")


@contextmanager
def open_image(source: str | os.PathLike[str] | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image in one of :data:`FORMATS` and read its header, without Pillow's warnings."""
    with QUIET, Image.open(source, formats=FORMATS) as image:
        yield image


class _Quiet:
    """Silences warnings of Pillow while any thread is inside: of odd metadata, and of half the size that is refused, for a
    panorama is no attack. ``warnings.catch_warnings`` alone would restore the filters of one thread in another. Around the
    reading of many images it saves changing the filters for each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module="PIL")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


QUIET = _Quiet()


def _pixels(image: Image.Image, admit: Admit | None) -> NDArray[np.uint8]:
    if admit:
        admit(*image.size)
    ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image)


def _reason(error: Exception, empty: bool) -> str:
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {os.strerror(error.errno).lower()}"
    if empty:
        return "is empty; copy or download it again"
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image in a format read here ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"has too many pixels to be safe ({error}); scale it down first"
    return f"cannot be decoded ({error or type(error).__name__}); is it damaged or truncated?"


_BAND = 1 << 24
"""Pixels that are converted at a time: the copies that this takes are small beside a large image."""


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise ValueError("its pixels are floats; save it with 8 bits a channel")
    width, height = image.size
    if width * height <= _BAND:
        return _band(image)
    image.load()
    rows = max(1, _BAND // width)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = _band(image.crop((0, top, width, bottom)))
    return pixels


def _band(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit gray: convert() would clip at 255, not scale
        gray = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, np.newaxis], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def preprocess(
    image: NDArray[np.uint8], width: int, height: int, channels: int, policy: ResizePolicy, input_form: InputForm
) -> tuple[NDArray[Any], Placement]:
    """Fit an RGB image ``(H, W, 3)`` uint8 into a network input of ``width`` x ``height``, ready to be stacked into a batch.

    Returns:
        The array, ``(height, width, channels)`` uint8 for ``uint8`` (resized pixels rounded, halves to even) or
        ``(channels, height, width)`` float32 0..1 for ``float`` (not rounded, as darknet feeds it), and its placement.

    Raises:
        DarktrtError: the image is not such an array, or ``channels`` is neither 1 nor 3.
    """
    check_rgb(image)
    if channels not in (1, 3):
        raise DarktrtError(f"the network has {channels} input channels; images have 1 (gray) or 3 (RGB)")
    placement = placement_of(image.shape[1], image.shape[0], width, height, policy)
    fit = compiled_fit() or numpy_fit
    return fit(image, width, height, channels, policy, input_form), placement


@cache
def compiled_fit() -> native.FitFunction | None:
    """The function of the compiled library; None where there is none, or none that is exact."""
    fit = native.load_fit()
    return fit if fit and _is_exact(fit) else None


def _is_exact(fit: native.FitFunction) -> bool:
    """Whether it computes the bits that NumPy does: not so if it was compiled with fast math or for another version."""
    image = (np.arange(13 * 17 * 3) * 97 % 256).astype(np.uint8).reshape(13, 17, 3)
    inputs: list[tuple[int, int, int, ResizePolicy, InputForm]] = [
        (7, 19, 3, "stretch", "float"),
        (19, 7, 1, "letterbox", "float"),
        (23, 32, 3, "letterbox", "uint8"),
    ]
    with suppress(DarktrtError):
        return all(np.array_equal(fit(image, *one), numpy_fit(image, *one)) for one in inputs)
    return False


def numpy_fit(
    image: NDArray[np.uint8], width: int, height: int, channels: int, policy: ResizePolicy, input_form: InputForm
) -> NDArray[Any]:
    """The array of :func:`preprocess`, by NumPy: the reference of the compiled library."""
    pixels = _boxed(image if channels == 3 else _gray(image), width, height, policy)
    if input_form == "uint8":
        levels: NDArray[np.uint8] = np.rint(pixels * np.float32(255)).astype(np.uint8)
        return levels
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def check_rgb(image: NDArray[Any]) -> None:
    """See that an array is an image.

    Raises:
        DarktrtError: it is not ``(H, W, 3)`` uint8.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DarktrtError(f"an image must be (H, W, 3) uint8 RGB, not {image.shape} {image.dtype}")


def _gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """stb_image's luma, by which darknet reads an image for a network of one channel: ``(H, W, 1)``."""
    red, green, blue = np.moveaxis(image.astype(np.uint16), 2, 0)
    luma: NDArray[np.uint8] = ((77 * red + 150 * green + 29 * blue) >> 8).astype(np.uint8)
    return luma[:, :, np.newaxis]


def placement_of(image_width: int, image_height: int, width: int, height: int, policy: ResizePolicy) -> Placement:
    """Where an image lies in a network input of ``width`` x ``height``."""
    inner_width, inner_height = (width, height)
    if policy == "letterbox":
        inner_width, inner_height = letterbox_size(image_width, image_height, width, height)
    # Pixels go to the rounded-down offset, boxes come back by the exact half, half a network pixel off where the rest is
    # odd: darknet's correct_yolo_boxes does so, published letterbox figures include it, so it stays.
    offset_x, offset_y = (width - inner_width) / 2, (height - inner_height) / 2
    return Placement(image_width, image_height, image_width / inner_width, image_height / inner_height, offset_x, offset_y)


def _boxed(image: NDArray[np.uint8], width: int, height: int, policy: ResizePolicy) -> NDArray[np.float32]:
    """The image in a network input of ``width`` x ``height``: float32 ``(height, width, C)`` in 0..1."""
    inner_width, inner_height = placement_of(image.shape[1], image.shape[0], width, height, policy).inner_size
    resized = _resize(image, inner_width, inner_height)
    if (inner_width, inner_height) == (width, height):
        return resized
    canvas = np.full((height, width, image.shape[2]), LETTERBOX_FILL)
    x, y = (width - inner_width) // 2, (height - inner_height) // 2
    canvas[y : y + inner_height, x : x + inner_width] = resized
    return canvas


def letterbox_size(image_width: int, image_height: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of the image inside the network input, as darknet's letterbox_image computes them.

    The smaller one is rounded down; where darknet computes 0 (and divides by it), it is 1 here.
    """
    if np.float32(width) / np.float32(image_width) < np.float32(height) / np.float32(image_height):
        return width, max(1, image_height * width // image_width)
    return max(1, image_width * height // image_height), height


def resize(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float32]:
    """darknet's resize_image: uint8 ``(H, W, C)`` to float32 ``(height, width, C)`` in 0..1.

    Bilinear between aligned corners, no antialiasing, no rounding to 8 bits; across the columns first, then down the rows.
    One difference: darknet uses only the first tap of the last row, which becomes nearly black where float32
    (H-1)/(height-1)*(height-1) falls just short of H-1. Here the last row is the image's last, as its last column is.
    """
    compiled = compiled_fit()
    if compiled and image.dtype == np.uint8 and image.shape[2] == 3:
        resized: NDArray[np.float32] = compiled(image, width, height, 3, "stretch", "float").transpose(1, 2, 0)
        return resized
    return _resize(image, width, height)


def _resize(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.float32]:
    top, bottom, down = _taps(image.shape[0], height)
    left, right, across = _taps(image.shape[1], width)
    # rows of a large image that no tap reads are left out
    used, index = np.unique(np.concatenate([top, bottom]), return_inverse=True)
    source = image[used]
    part = _mix(_unit(source.take(left, axis=1)), _unit(source.take(right, axis=1)), across[:, np.newaxis])
    return _mix(part[index[:height]], part[index[height:]], down[:, np.newaxis, np.newaxis])


def _taps(size: int, new_size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each new pixel: the two old ones it lies between, and how far from the first to the second."""
    scale = np.float32(size - 1) / np.float32(max(new_size - 1, 1))
    position = np.arange(new_size, dtype=np.float32) * scale
    first = position.astype(np.intp)
    fraction = position - first.astype(np.float32)
    first[-1], fraction[-1] = size - 1, 0
    return first, np.minimum(first + 1, size - 1), fraction


def _unit(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """0..255 to 0..1; equals darknet's (float)(pixel / 255.) for all 256 values."""
    unit = pixels.astype(np.float32)
    unit /= np.float32(255)
    return unit


def _mix(first: NDArray[np.float32], second: NDArray[np.float32], fraction: NDArray[np.float32]) -> NDArray[np.float32]:
    """(1 - fraction) * first + fraction * second; in place, for both are copies, and allocation costs more than the sums."""
    first *= np.float32(1) - fraction
    second *= fraction
    first += second
    return first
