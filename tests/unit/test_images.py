"""Reading images, and the resize contract against a scalar transcription of darknet's formula."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darktrt.errors import DarktrtError
from darktrt.metadata import ResizePolicy
from darktrt.vision import images
from darktrt.vision.images import decode_image, image_size, letterbox_size, preprocess, read_image, resize

F = np.float32


@pytest.fixture(params=["compiled", "numpy"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of setup.py, or NumPy without it."""
    if request.param == "numpy":
        monkeypatch.setattr(images, "compiled_fit", lambda: None)
    elif images.compiled_fit() is None:
        pytest.skip("needs the compiled resize: pip install -e . with a C++ compiler")


by_both = pytest.mark.usefixtures("arithmetic")


def made_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scalar_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """resize_image of darknet's image.c, value by value in float32; the last row like the last column (not its bug)."""
    rows, columns, channels = image.shape
    pixels = [[[F(float(v) / 255.0) for v in pixel] for pixel in row] for row in image.tolist()]
    part = np.zeros((rows, width, channels), F)
    for r in range(rows):
        for c in range(width):
            for k in range(channels):
                if c == width - 1 or columns == 1:
                    part[r, c, k] = pixels[r][columns - 1][k]
                else:
                    sx = F(c) * (F(columns - 1) / F(width - 1))
                    ix = int(sx)
                    dx = sx - F(ix)
                    part[r, c, k] = (F(1) - dx) * pixels[r][ix][k] + dx * pixels[r][ix + 1][k]
    out = np.zeros((height, width, channels), F)
    for r in range(height):
        if r == height - 1 or rows == 1:
            out[r] = part[rows - 1]
            continue
        sy = F(r) * (F(rows - 1) / F(height - 1))
        iy = int(sy)
        dy = sy - F(iy)
        for c in range(width):
            for k in range(channels):
                out[r, c, k] = (F(1) - dy) * part[iy, c, k] + dy * part[iy + 1, c, k]
    return out


@by_both
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((7, 5), (4, 9)),
        ((5, 7), (9, 4)),
        ((31, 29), (13, 17)),
        ((11, 10), (11, 10)),
        ((1, 6), (3, 4)),
        ((6, 1), (4, 3)),
        ((1, 1), (3, 2)),
        ((5, 6), (1, 1)),
        ((5, 6), (1, 4)),
        ((5, 6), (4, 1)),
        ((2, 2), (25, 31)),
    ],
)
def test_resize_is_darknets_to_the_bit(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = made_image(*source)
    resized = resize(image, target[1], target[0])
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized, scalar_resize(image, target[1], target[0]))


@by_both
@pytest.mark.parametrize("rows", [444, 479, 240, 416, 500])
def test_the_last_row_is_the_images_last_row(rows: int) -> None:
    """444, 479 and 240 are heights at which darknet's own last row comes out nearly black at 416."""
    image = made_image(rows, 3)
    np.testing.assert_array_equal(resize(image, 3, 416)[-1], image[-1].astype(F) / F(255))
    np.testing.assert_array_equal(resize(image, 3, 416), scalar_resize(image, 3, 416))


@by_both
def test_resize_gives_the_same_bits_everywhere() -> None:
    """A digest over sizes up and down: a NumPy or Python that computes one bit otherwise fails here."""
    pattern = (np.arange(97 * 131 * 3, dtype=np.int64) * 2654435761 >> 7 & 255).astype(np.uint8).reshape(97, 131, 3)
    digest = hashlib.sha256()
    for width, height in ((416, 416), (64, 48), (131, 97), (33, 200)):
        digest.update(resize(pattern, width, height).astype("<f4").tobytes())
    assert digest.hexdigest() == "54528f4fde35eb88f7baee2046abcaf5d2bfef7fe70b1601e1f62424d47b43c0"


@by_both
def test_float_input_is_channels_first_and_not_rounded() -> None:
    image = made_image(9, 14)
    array, _ = preprocess(image, 6, 5, 3, "stretch", "float")
    assert array.shape == (3, 5, 6)
    assert array.dtype == np.float32
    assert array.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(array, scalar_resize(image, 6, 5).transpose(2, 0, 1))


@by_both
def test_uint8_input_is_rounded_with_halves_to_even() -> None:
    image = made_image(9, 14)
    array, _ = preprocess(image, 6, 5, 3, "stretch", "uint8")
    assert array.shape == (5, 6, 3)
    assert array.dtype == np.uint8
    expected = [round(float(v * F(255))) for v in scalar_resize(image, 6, 5).ravel()]
    np.testing.assert_array_equal(array.ravel(), expected)


@by_both
@pytest.mark.parametrize(("pair", "between"), [((0, 1), 0), ((1, 2), 2), ((2, 3), 2), ((3, 4), 4)])
def test_a_half_goes_to_the_even_neighbour(pair: tuple[int, int], between: int) -> None:
    image = np.array(pair, np.uint8).reshape(1, 2, 1).repeat(3, axis=2)
    array, _ = preprocess(image, 3, 1, 3, "stretch", "uint8")
    assert array[0, :, 0].tolist() == [pair[0], between, pair[1]]


@by_both
def test_an_image_of_the_networks_size_passes_unchanged() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)[:, :, None].repeat(3, axis=2)
    as_uint8, _ = preprocess(image, 16, 16, 3, "stretch", "uint8")
    as_float, _ = preprocess(image, 16, 16, 3, "letterbox", "float")
    np.testing.assert_array_equal(as_uint8, image)
    np.testing.assert_array_equal(as_float[0].ravel(), [F(v / 255.0) for v in range(256)])


@by_both
def test_the_input_image_is_not_changed() -> None:
    image = made_image(8, 8)
    before = image.copy()
    for policy in ("stretch", "letterbox"):
        preprocess(image, 8, 8, 3, policy, "float")
    np.testing.assert_array_equal(image, before)


@by_both
@pytest.mark.parametrize(
    ("source", "network", "inner"),
    [
        ((10, 20), (16, 16), (16, 8)),
        ((20, 10), (16, 16), (8, 16)),
        ((12, 23), (17, 13), (17, 8)),  # 23 wide, 12 high: 17 * 12 / 23 = 8.87
        ((23, 10), (17, 13), (5, 13)),  # 13 * 10 / 23 = 5.65
        ((9, 9), (32, 12), (12, 12)),
        ((1, 1000), (32, 32), (32, 1)),  # cut to 0 rows: one is kept
        ((1000, 1), (32, 32), (1, 32)),
    ],
)
def test_letterbox(source: tuple[int, int], network: tuple[int, int], inner: tuple[int, int]) -> None:
    """Sizes: source is height, width; network and inner are width, height."""
    width, height = network
    image = made_image(*source)
    assert letterbox_size(source[1], source[0], width, height) == inner
    array, placement = preprocess(image, width, height, 3, "letterbox", "float")
    x, y = (width - inner[0]) // 2, (height - inner[1]) // 2
    expected = np.full((height, width, 3), F(0.5))
    expected[y : y + inner[1], x : x + inner[0]] = scalar_resize(image, *inner)
    np.testing.assert_array_equal(array, expected.transpose(2, 0, 1))
    assert (placement.offset_x, placement.offset_y) == ((width - inner[0]) / 2, (height - inner[1]) / 2)


@by_both
def test_letterbox_fill_in_uint8_is_128() -> None:
    array, _ = preprocess(np.zeros((4, 16, 3), np.uint8), 16, 16, 3, "letterbox", "uint8")
    assert set(array[:6].ravel()) == {128}
    assert set(array[6:10].ravel()) == {0}


@pytest.mark.parametrize("network", [(416, 416), (320, 512), (512, 320)])
@pytest.mark.parametrize("policy", ["stretch", "letterbox"])
def test_boxes_are_mapped_to_the_image(network: tuple[int, int], policy: ResizePolicy) -> None:
    """correct_yolo_boxes of darknet: relative centre and size, minus the border, over the ratio, times the image."""
    rows, columns = 437, 613
    width, height = network
    _, placement = preprocess(np.zeros((rows, columns, 3), np.uint8), width, height, 3, policy, "uint8")
    inner = letterbox_size(columns, rows, width, height) if policy == "letterbox" else network
    boxes = np.sort(np.random.default_rng(1).uniform(0, 300, (50, 2, 2)), axis=1).reshape(50, 4).astype(F)
    expected = []
    for x1, y1, x2, y2 in boxes.astype(float):
        x = ((x1 + x2) / 2 / width - (width - inner[0]) / 2 / width) / (inner[0] / width) * columns
        y = ((y1 + y2) / 2 / height - (height - inner[1]) / 2 / height) / (inner[1] / height) * rows
        w, h = (x2 - x1) / inner[0] * columns, (y2 - y1) / inner[1] * rows
        expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    placed = placement.to_image(boxes)
    assert placed.dtype == np.float32
    np.testing.assert_allclose(placed, expected, rtol=1e-5, atol=1e-3)


@by_both
@pytest.mark.parametrize("policy", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(300, 500), (500, 300)])
def test_the_image_is_at_its_placement(size: tuple[int, int], policy: ResizePolicy) -> None:
    image = np.zeros((*size, 3), np.uint8)
    image[100:200, 50:250] = 255
    array, placement = preprocess(image, 208, 160, 3, policy, "float")
    rows, columns = np.nonzero(array[0] > 0.75)
    seen = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], F)
    np.testing.assert_allclose(placement.to_image(seen), [[50, 100, 250, 200]], atol=4)


@by_both
def test_one_channel_is_stb_images_luma() -> None:
    image = made_image(6, 7)
    array, _ = preprocess(image, 7, 6, 1, "stretch", "uint8")
    assert array.shape == (6, 7, 1)
    expected = [[(77 * r + 150 * g + 29 * b) >> 8 for r, g, b in row] for row in image.tolist()]
    np.testing.assert_array_equal(array[:, :, 0], expected)
    assert preprocess(image, 7, 6, 1, "letterbox", "float")[0].shape == (1, 6, 7)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(DarktrtError, match=r"must be \(H, W, 3\) uint8 RGB, not \("):
        preprocess(image, 8, 8, 3, "stretch", "uint8")


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(DarktrtError, match="has 4 input channels"):
        preprocess(made_image(4, 4), 8, 8, 4, "stretch", "uint8")


# Reading


def test_reads_rgb_as_it_was_written(tmp_path: Path) -> None:
    image = made_image(5, 8)
    Image.fromarray(image).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read, image)
    assert read.dtype == np.uint8
    assert read.flags.writeable


def test_transparency_is_dropped(tmp_path: Path) -> None:
    image = np.dstack([made_image(5, 8), made_image(5, 8, seed=1)[:, :, 0]])
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image[:, :, :3])


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_is_repeated(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(made_image(6, 9)[:, :, 0]).convert(mode)
    gray.save(tmp_path / "a.png")
    expected = np.asarray(gray.convert("L"))[:, :, None].repeat(3, axis=2)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_cut_to_the_upper_eight(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 255, 256, 30000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name)[:, :, 1], values >> 8)


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_palettes_are_looked_up(tmp_path: Path, name: str) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 8, 7]]], np.uint8)
    Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / name, transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / name), colours)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = read_image(tmp_path / "a.jpg")[4, 4]
    assert red > 240
    assert max(green, blue) < 15


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    image = made_image(5, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    turned = TURNED[orientation](image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), turned)
    assert image_size(tmp_path / "a.png") == (turned.shape[1], turned.shape[0])


def test_refused_files_have_no_image_size(tmp_path: Path) -> None:
    for content in (b"", b"no image", bomb()):
        (tmp_path / "a.png").write_bytes(content)
        assert image_size(tmp_path / "a.png") is None
    assert image_size(tmp_path / "none.png") is None


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(made_image(40, 50)).save(buffer, form)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is not an image in a format read here"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
        (encoded("JPEG")[:900], "cannot be decoded"),
        (encoded("PNG")[:900], "cannot be decoded"),
        (encoded("BMP")[:900], "cannot be decoded"),
        (encoded("WEBP")[:900], "cannot be decoded|is not an image"),
        (bomb(), "too many pixels"),
    ],
    ids=["empty", "html", "lfs", "eps", "jpeg", "png", "bmp", "webp", "bomb"],
)
def test_files_that_are_no_whole_image_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jpg"
    file.write_bytes(content)
    for read in (lambda: read_image(file), lambda: decode_image(content, str(file), 1_000_000)):
        with pytest.raises(DarktrtError, match=message) as caught:
            read()
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_image_in_memory_is_that_of_the_file(tmp_path: Path) -> None:
    content = encoded("JPEG")
    (tmp_path / "a.jpg").write_bytes(content)
    expected = read_image(tmp_path / "a.jpg")
    np.testing.assert_array_equal(decode_image(content, "a.jpg", expected[:, :, 0].size), expected)
    with pytest.raises(DarktrtError, match=r"upload 3: has \d+x\d+ pixels, more than 9; scale it down first"):
        decode_image(content, "upload 3", 9)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
@pytest.mark.parametrize("band", [1, 60, 7 * 20, 7 * 20 + 1, 10**9])
def test_a_large_image_is_converted_in_bands(tmp_path: Path, mode: str, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bands keep the memory of a hundred megapixels at one copy; the pixels are those of one band."""
    levels = np.random.default_rng(0).integers(0, 256, (23, 20, 3), dtype=np.uint8)
    deep = Image.fromarray(levels[:, :, 0].astype(np.uint16) * 257 - 255)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "LA") else "a.png")
    (deep if mode == "I;16" else Image.fromarray(levels).convert(mode)).save(path)
    whole = read_image(path)
    monkeypatch.setattr(images, "_BAND", band)
    assert np.array_equal(read_image(path), whole) and whole.shape == (23, 20, 3)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DarktrtError, match=r"a\.tif: .*floats"):
        read_image(tmp_path / "a.tif")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"none\.jpg: cannot read: No such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(DarktrtError, match="is a folder; name a file"):
        read_image(tmp_path)
    with pytest.raises(DarktrtError, match="File name too long"):
        read_image("x" * 5000)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damaged_bytes_decode_or_raise_one_sentence(tmp_path: Path, form: str) -> None:
    rng = random.Random(form)
    whole = encoded(form)
    file = tmp_path / "damaged"
    for _ in range(60):
        content = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 8)):
            if content:
                content[rng.randrange(min(len(content), 400))] = rng.randrange(256)
        file.write_bytes(content)
        with suppress(DarktrtError):  # anything else is a bug
            assert read_image(file).ndim == 3
