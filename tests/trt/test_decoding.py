"""JPEGs and videos decoded on a GPU, by nvImageCodec and PyNvVideoCodec, against Pillow and FFmpeg.

Needs neither TensorRT, torch nor onnx:

    PYTHONPATH=. python -m pytest --confcutdir=tests/trt tests/trt/test_decoding.py -s
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darktrt.cuda import DeviceImage, Frame, first_gpu
from darktrt.vision.decode import Decoder, read_ahead
from darktrt.vision.gpu_video import import_codec
from darktrt.vision.images import decode_image, read_image
from darktrt.vision.video import open_video

PHOTO = Path(__file__).resolve().parents[2] / "docs" / "astronaut.jpg"
MOST_DIFFERENCE = 2.0
"""Mean difference of levels: rounding and the interpolation of chroma, no other matrix of colours and no other orientation."""

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(first_gpu() is None, reason="no NVIDIA GPU is usable here")]


def pixels(frame: Frame) -> np.ndarray:
    assert isinstance(frame, DeviceImage), "was decoded on the CPU"
    return frame.to_host()


def difference(frame: Frame, expected: np.ndarray) -> float:
    found = pixels(frame)
    assert found.shape == expected.shape
    return float(np.abs(found.astype(int) - expected).mean())


# JPEGs


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    pytest.importorskip("nvidia.nvimgcodec", reason="needs nvImageCodec: pip install 'darktrt[gpu]'")
    with Decoder(device="gpu") as decoder:
        yield decoder


def photo(size: tuple[int, int] | None = None, mode: str = "RGB") -> Image.Image:
    with Image.open(PHOTO) as image:
        return image.convert(mode).resize(size or image.size)


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(photo((300, 200)), exif=exif)


FILES = {
    "as it is": PHOTO.read_bytes(),
    "4:4:4": encoded(photo(), subsampling=0),
    "4:2:2": encoded(photo(), subsampling=1),
    "progressive": encoded(photo(), progressive=True),
    "gray": encoded(photo(mode="L")),
    "restart markers": encoded(photo(), restart_marker_rows=1),
    "quality 30": encoded(photo(), quality=30),
    **{f"{w}x{h}": encoded(photo((w, h))) for w, h in [(1, 1), (7, 5), (17, 33), (639, 479), (3840, 2160)]},
    **{f"orientation {number}": oriented(number) for number in range(1, 9)},
}


@pytest.mark.parametrize("name", FILES)
def test_a_jpeg_differs_little_from_pillows(decoder: Decoder, name: str) -> None:
    frame = decoder.submit(FILES[name], name).result()
    expected = decode_image(FILES[name], name, 10**9)
    most = np.abs(pixels(frame).astype(int) - expected).max()
    print(f"\n{name}: mean {difference(frame, expected):.3f}, most {most} levels", end="")
    assert difference(frame, expected) <= MOST_DIFFERENCE


@pytest.mark.parametrize("damage", ["cmyk", "bytes behind the end", "coded as rgb", "png"])
def test_other_files_are_pillows(decoder: Decoder, damage: str) -> None:
    png = io.BytesIO()
    photo().save(png, "PNG")
    data = {
        "cmyk": encoded(photo(mode="CMYK")),
        "bytes behind the end": FILES["as it is"] + b"\0",
        "coded as rgb": encoded(photo(), keep_rgb=True),
        "png": png.getvalue(),
    }[damage]
    frame = decoder.submit(data, damage).result()
    np.testing.assert_array_equal(frame, decode_image(data, damage, 10**9))  # type: ignore[arg-type]


def test_the_same_file_has_the_same_bits_in_any_company(decoder: Decoder, tmp_path: Path) -> None:
    """One at a time, or in batches with others while memory is used again."""
    names = [name for name in FILES if name != "3840x2160"]
    paths = [tmp_path / f"{i}.jpg" for i in range(len(names))]
    for path, name in zip(paths, names, strict=True):
        path.write_bytes(FILES[name])
    alone = [pixels(decoder.read([path])[0]) for path in paths]
    rounds = list(range(len(paths))) * 20
    held: list[tuple[int, Frame]] = []
    batches = [[paths[i] for i in rounds[start : start + 8]] for start in range(0, len(rounds), 8)]
    for start, frames in zip(range(0, len(rounds), 8), read_ahead(batches, decoder), strict=True):
        held = [*held[::3], *zip(rounds[start:], frames, strict=False)]
        for i, frame in held:
            np.testing.assert_array_equal(pixels(frame), alone[i])


def test_images_outlive_their_decoder() -> None:
    pytest.importorskip("nvidia.nvimgcodec", reason="needs nvImageCodec: pip install 'darktrt[gpu]'")
    with Decoder(device="gpu") as decoder:
        frames = decoder.read([PHOTO] * 9)
    for frame in frames:
        assert difference(frame, read_image(PHOTO)) <= MOST_DIFFERENCE


# Videos


def save_video(path: Path, colours: int, size: tuple[int, int] = (640, 360), frames: int = 90) -> Path:
    """Bars of strong colours that move, in a video that states its matrix."""
    av = pytest.importorskip("av", reason="needs PyAV")
    width, height = size
    bars = np.array([[235, 20, 20], [20, 235, 20], [20, 20, 235], [235, 235, 20], [20, 235, 235], [128, 128, 128]], np.uint8)
    image = bars[np.arange(width) * len(bars) // width][np.newaxis].repeat(height, axis=0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "15"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = colours, 1
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(image, 7 * i, axis=1)), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=1 if colours == 1 else 5)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("size", [(640, 360), (642, 362), (1920, 1080)])
@pytest.mark.parametrize("colours", [1, 5, 6])
def test_a_video_differs_little_from_ffmpegs(tmp_path: Path, colours: int, size: tuple[int, int]) -> None:
    if import_codec(required=False) is None:
        pytest.skip("needs PyNvVideoCodec: pip install 'darktrt[gpu]'")
    path = save_video(tmp_path / "a.mp4", colours, size)
    differences, held = [], []
    with open_video(path) as (_, expected), open_video(path, "gpu") as (_, frames):
        for i, (frame, other) in enumerate(zip(frames, expected, strict=True)):
            differences.append(difference(frame, other))
            if i % 10 == 0:
                held.append((frame, other))
    print(f"\nmatrix {colours}, {size}: mean {np.mean(differences):.3f}, worst frame {max(differences):.3f} levels", end="")
    assert len(differences) == 90 and max(differences) <= MOST_DIFFERENCE
    for frame, other in held:
        assert difference(frame, other) <= MOST_DIFFERENCE
