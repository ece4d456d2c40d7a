"""JPEGs on the GPU: which files nvImageCodec gets, what becomes of the others, and how long memory lives."""

from __future__ import annotations

import gc
import io
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu, FakeImageCodec, install_gpu, install_image_codec, lighter
from helpers import ROOT
from PIL import Image

from darktrt.cuda import DeviceImage, Frame, host_pixels
from darktrt.errors import DarktrtError
from darktrt.vision.decode import Decoder, read_ahead
from darktrt.vision.gpu_jpeg import POOL_BYTES, GpuJpegDecoder, read_header
from darktrt.vision.images import check_pixels, decode_image


def image(mode: str = "RGB", size: tuple[int, int] = (24, 16), seed: int = 0) -> Image.Image:
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(source: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, form, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image(), exif=exif)


def with_xmp(orientation: int, exif: Image.Exif | None = None) -> bytes:
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"/>'.encode()
    return encoded(image(), xmp=xmp, **({"exif": exif} if exif else {}))


def with_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header states another size."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


PLAIN = encoded(image())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return install_gpu(monkeypatch)


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> FakeImageCodec:
    return install_image_codec(monkeypatch, gpu)


@pytest.fixture
def decoder(codec: FakeImageCodec) -> Iterator[Decoder]:
    with Decoder(3, device="gpu") as decoder:
        yield decoder


def decoded(decoder: Decoder, files: list[bytes]) -> list[Frame]:
    return [future.result() for future in [decoder.submit(file, "upload") for file in files]]


def one(decoder: Decoder, data: bytes, limit: int = 10**9) -> Frame:
    return decoder.submit(data, "upload", partial(check_pixels, most_pixels=limit)).result()


ON_GPU = {
    "plain": PLAIN,
    "gray": encoded(image("L")),
    "progressive": encoded(image(), progressive=True),
    "4:4:4": encoded(image(), subsampling=0),
    "restarts": encoded(image(), restart_marker_blocks=1),
    "one pixel": encoded(image(size=(1, 1))),
    **{f"orientation {number}": oriented(number) for number in range(1, 9)},
}


@pytest.mark.parametrize("name", ON_GPU)
def test_jpegs_are_decoded_on_the_gpu(decoder: Decoder, name: str) -> None:
    frame, expected = one(decoder, ON_GPU[name]), decode_image(ON_GPU[name], name, 10**9)
    assert isinstance(frame, DeviceImage)
    progressive = name == "progressive"
    assert (frame.width, frame.height, progressive) == read_header(ON_GPU[name]) == (*expected.shape[1::-1], progressive)
    np.testing.assert_array_equal(frame.to_host(), lighter(expected, 2 if progressive else 1))


OTHERS = {
    "png": encoded(image(), "PNG"),
    "webp": encoded(image(), "WEBP"),
    "cmyk": encoded(image("CMYK")),
    "coded as rgb": encoded(image(), keep_rgb=True),
    "bytes behind the end": PLAIN + b"trailer",
    "orientation in XMP": with_xmp(6),
    "odd orientation": oriented(9),
    "two images": encoded(image(), "MPO", save_all=True, append_images=[image(seed=1)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_pillows(decoder: Decoder, codec: FakeImageCodec, name: str) -> None:
    frame = one(decoder, OTHERS[name])
    assert isinstance(frame, np.ndarray) and not codec.calls
    np.testing.assert_array_equal(frame, decode_image(OTHERS[name], name, 10**9))


DAMAGED = {
    "empty": b"",
    "no image": b"no image",
    "truncated": PLAIN[: len(PLAIN) // 2],
    "truncated, with an end": PLAIN[:150] + b"\xff\xd9",
    "too large": with_size(PLAIN, 40_000, 40_000),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_in_pillows_words(decoder: Decoder, codec: FakeImageCodec, name: str) -> None:
    with pytest.raises(DarktrtError) as expected:
        decode_image(DAMAGED[name], "upload", 10**9)
    with pytest.raises(DarktrtError) as caught:
        one(decoder, DAMAGED[name])
    assert str(caught.value) == str(expected.value)
    assert not codec.calls


def test_the_limit_of_pixels_holds_before_decoding(decoder: Decoder, codec: FakeImageCodec) -> None:
    with pytest.raises(DarktrtError, match=r"upload: has 24x16 pixels, more than 383; scale it down first"):
        one(decoder, PLAIN, 383)
    assert not codec.calls
    assert isinstance(one(decoder, PLAIN, 384), DeviceImage)


@pytest.mark.parametrize("fault", ["refused", "shape"])
def test_what_the_gpu_cannot_decode_is_pillows(decoder: Decoder, codec: FakeImageCodec, fault: str) -> None:
    if fault == "refused":
        codec.refuses = lambda data: data == PLAIN
    else:
        codec.shape = lambda shape: (shape[1], shape[0], 3) if shape[0] == 16 else shape
    other = encoded(image(size=(8, 8)))
    first, second = decoded(decoder, [PLAIN, other])
    np.testing.assert_array_equal(first, decode_image(PLAIN, "a", 10**9))  # type: ignore[arg-type]
    assert isinstance(second, DeviceImage)


def test_a_size_that_nvimagecodec_reads_otherwise_is_not_decoded(decoder: Decoder, codec: FakeImageCodec) -> None:
    class Other(codec.CodeStream):  # type: ignore[name-defined,misc]
        width = 30_000

    codec.CodeStream = Other
    with Decoder(1, device="gpu") as misled:
        assert isinstance(one(misled, PLAIN), np.ndarray)
    assert not codec.calls


def levels(frames: list[Frame], data: list[bytes]) -> list[int]:
    """How much lighter than Pillow's each image is, at its darkest place."""
    expected = [decode_image(file, "", 10**9) for file in data]
    darkest = [int(pixels.argmin()) for pixels in expected]
    return [int(host_pixels(f).flat[i]) - int(e.flat[i]) for f, e, i in zip(frames, expected, darkest, strict=True)]


SEVERAL = [encoded(image(seed=seed), progressive=seed % 4 == 3) for seed in range(12)]
REFUSED = SEVERAL[1::4]
BY_FILE = [1, 2, 1, 2] * 3


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_file_alone_says_which_decoder_gets_it(decoder: Decoder, codec: FakeImageCodec, size: int) -> None:
    codec.hardware_refuses = REFUSED.__contains__
    batches = [SEVERAL[i : i + size] for i in range(0, 12, size)]
    frames = [frame for files in batches for frame in decoded(decoder, files)]
    assert levels(frames, SEVERAL) == BY_FILE


def test_a_file_that_fails_a_batch_of_the_hardware_fails_alone(decoder: Decoder, codec: FakeImageCodec) -> None:
    codec.spoils = REFUSED.__contains__
    assert levels(decoded(decoder, SEVERAL), SEVERAL) == BY_FILE


def test_one_of_two_files_that_fails_does_not_cost_the_other(codec: FakeImageCodec, gpu: FakeGpu) -> None:
    """And one that fails by itself is not tried again by the hardware."""
    codec.spoils = REFUSED.__contains__
    good, bad = SEVERAL[0], SEVERAL[1]
    gpu_decoder = GpuJpegDecoder()
    for files, calls in (([good, bad], [2, 1, 1, 1]), ([bad], [1, 1])):
        codec.calls.clear()
        frames = gpu_decoder.decode([(file, read_header(file)) for file in files])  # type: ignore[misc]
        assert levels(frames, files) == [BY_FILE[SEVERAL.index(file)] for file in files]  # type: ignore[arg-type]
        assert codec.calls == calls
        del frames
    gpu_decoder.close()


@pytest.mark.parametrize(("missing", "expected"), [("HARDWARE", [2] * 12), ("HYBRID", [1, 0, 1, 0] * 3)])
def test_one_of_the_decoders_is_enough(codec: FakeImageCodec, missing: str, expected: list[int]) -> None:
    codec.missing, codec.hardware_refuses = {getattr(codec, missing)}, REFUSED.__contains__
    with Decoder(2, device="gpu") as decoder:
        assert levels(decoded(decoder, SEVERAL), SEVERAL) == expected
    assert codec.closed == 1


def test_with_neither_decoder_it_says_so(codec: FakeImageCodec, gpu: FakeGpu) -> None:
    codec.missing = {codec.HARDWARE, codec.HYBRID}
    with pytest.raises(DarktrtError, match=r"cannot start \(Could not create decoder\. Code: 7\); is its nvJPEG installed\?"):
        Decoder(device="gpu")
    assert not gpu.pending and not gpu.retained


def test_files_in_order_with_errors_in_their_turn(decoder: Decoder, tmp_path: Path) -> None:
    files = [PLAIN if i % 3 else OTHERS["png"] for i in range(40)]
    paths = [tmp_path / f"{i}.jpg" for i in range(40)]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    paths[33] = tmp_path / "none.jpg"
    batches, done = [paths[i : i + 4] for i in range(0, 40, 4)], []
    with pytest.raises(DarktrtError, match=r"none\.jpg: cannot read: No such file or directory"):
        done.extend(read_ahead(batches, decoder, most_images=12, most_bytes=5000))
    kinds = [isinstance(frame, DeviceImage) for frames in done for frame in frames]
    assert kinds == [i % 3 != 0 for i in range(32)]


def test_many_are_decoded_in_one_call(decoder: Decoder, codec: FakeImageCodec) -> None:
    frames = decoded(decoder, [PLAIN] * 200)
    assert all(isinstance(frame, DeviceImage) for frame in frames)
    assert sum(codec.calls) == 200 and max(codec.calls) <= 64


def test_what_was_loaded_while_a_call_ran_is_decoded_in_the_next_one(
    decoder: Decoder, codec: FakeImageCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 64 images, for one by one would be slower."""
    sizes: list[int] = []
    goes_on, decode = threading.Event(), GpuJpegDecoder.decode

    def slow(self: GpuJpegDecoder, files: list[Any]) -> list[DeviceImage | None]:
        sizes.append(len(files))
        assert len(sizes) > 1 or goes_on.wait(20)
        return decode(self, files)

    monkeypatch.setattr(GpuJpegDecoder, "decode", slow)
    futures = [decoder.submit(PLAIN, str(i)) for i in range(100)]
    end = time.monotonic() + 20
    while not sizes or decoder._jpegs._loaded.qsize() < 100 - sizes[0]:  # type: ignore[union-attr]
        assert time.monotonic() < end
        time.sleep(0.01)
    goes_on.set()
    assert all(isinstance(future.result(), DeviceImage) for future in futures)
    rest = 100 - sizes[0]
    assert sizes[1:] == [one for one in (min(rest, 64), rest - 64) if one > 0]


UNCLOSED = """
import pytest
from fake_gpu import install_gpu, install_image_codec
from darktrt.vision.decode import Decoder
patch = pytest.MonkeyPatch()
install_image_codec(patch, install_gpu(patch))
decoder = Decoder(1, device="gpu")
"""


def test_a_program_ends_though_it_did_not_close_its_decoder() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/unit")])}
    done = subprocess.run([sys.executable, "-c", UNCLOSED], env=environment, check=False, timeout=60)
    assert done.returncode == 0


def test_chroma_is_interpolated_and_freed_memory_kept(decoder: Decoder, codec: FakeImageCodec, gpu: FakeGpu) -> None:
    assert codec.options == ":fancy_upsampling=1"
    assert gpu.release_threshold == POOL_BYTES


def test_images_outlive_their_decoder(codec: FakeImageCodec, gpu: FakeGpu) -> None:
    with Decoder(2, device="gpu") as decoder:
        frames = decoded(decoder, [PLAIN, PLAIN])
    assert codec.closed == 2
    first = frames.pop()
    assert isinstance(first, DeviceImage)
    np.testing.assert_array_equal(first.to_host(), lighter(decode_image(PLAIN, "a", 10**9)))
    assert gpu.pending
    del first, frames, decoder
    gc.collect()
    assert not gpu.buffers and not gpu.pending and not gpu.retained and not gpu.faults


def test_a_failure_of_the_gpu_is_raised_where_images_are_awaited(decoder: Decoder, gpu: FakeGpu) -> None:
    gpu.broken = True
    with pytest.raises(DarktrtError, match="cuStreamSynchronize fails: CUDA_ERROR_UNKNOWN"):
        one(decoder, PLAIN)
    assert isinstance(one(decoder, OTHERS["png"]), np.ndarray)


def test_without_nvimagecodec_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(DarktrtError, match=r"nvImageCodec: pip install 'darktrt\[gpu\]'"):
        Decoder(device="gpu")
    with Decoder(1, device="auto") as decoder:
        assert isinstance(one(decoder, PLAIN), np.ndarray)


def test_without_a_gpu_pillow_decodes(codec: FakeImageCodec, monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    def missing(*_: object) -> int:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(DarktrtError, match="needs NVIDIA's driver"):
        Decoder(device="gpu")
    with Decoder(1, device="auto") as decoder:
        assert isinstance(one(decoder, PLAIN), np.ndarray)
