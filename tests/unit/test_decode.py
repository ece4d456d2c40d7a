"""Decoding ahead: the pixels of read_image, in order, within bounds, and what happens when something fails or stops."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darktrt.cuda import Frame
from darktrt.errors import DarktrtError
from darktrt.vision import decode
from darktrt.vision.decode import Decoder, read_ahead
from darktrt.vision.images import check_pixels, decode_image, load_image, read_image

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, width: int = 8, height: int = 6, seed: int = 0, **options: object) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder(3) as decoder:
        yield decoder


def numbered(folder: Path, count: int) -> list[Path]:
    return [write(folder / f"{i:03}.png", seed=i) for i in range(count)]


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return write(path, exif=exif)


def equal(frames: list[Frame], paths: list[Path]) -> None:
    assert len(frames) == len(paths)
    for frame, path in zip(frames, paths, strict=True):
        assert isinstance(frame, np.ndarray)
        np.testing.assert_array_equal(frame, read_image(path))


def every_format(folder: Path) -> list[Path]:
    Image.new("CMYK", (5, 4), (10, 20, 30, 40)).save(folder / "cmyk.jpg")
    Image.new("L", (5, 4), 77).save(folder / "gray.jpg")
    Image.new("RGBA", (5, 4), (10, 20, 30, 40)).save(folder / "alpha.png")
    Image.fromarray(np.full((4, 5), 40000, np.uint16)).save(folder / "deep.png")
    others = [write(folder / f"a.{suffix}") for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm")]
    return [*sorted(folder.iterdir()), turned(folder / "turned.jpg"), write(folder / "wide.jpg", 700, 3), *others]


def test_the_pixels_are_those_of_read_image(decoder: Decoder, tmp_path: Path) -> None:
    paths = every_format(tmp_path)
    equal(decoder.read(paths), paths)
    equal([decoder.submit(path.read_bytes(), path.name).result() for path in paths], paths)
    ((frame, *_),) = read_ahead([paths], decoder)
    assert isinstance(frame, np.ndarray) and frame.flags.writeable


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_come_in_order(tmp_path: Path, threads: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = numbered(tmp_path, 20)

    def slow_at_first(source: Path, *rest: object) -> Frame:
        time.sleep(0.02 if int(source.stem) % 5 == 0 else 0)
        return load_image(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(decode, "load_image", slow_at_first)
    batches = [paths[i : i + size] for i in range(0, len(paths), size)]
    with Decoder(threads) as decoder:
        done = list(read_ahead(batches, decoder, most_images=6))
    assert [len(frames) for frames in done] == [len(batch) for batch in batches]
    equal([frame for frames in done for frame in frames], paths)


def test_nothing_to_read_is_no_batch(decoder: Decoder) -> None:
    assert list(read_ahead([], decoder)) == []
    assert list(read_ahead([[]], decoder)) == [[]]
    assert decoder.read([]) == []


class Watched:
    """Counts the images that are begun, and their bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.bytes = 0
        self._lock = threading.Lock()
        monkeypatch.setattr(decode, "load_image", self)

    def __call__(self, *arguments: object) -> Frame:
        image = load_image(*arguments)  # type: ignore[arg-type]  # raises if there is no memory for it
        with self._lock:
            self.begun += 1
            self.bytes += image.nbytes
        return image


def test_no_more_images_are_read_ahead(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = numbered(tmp_path, 30)
    watched, given = Watched(monkeypatch), 0
    for frames in read_ahead([paths[i : i + 2] for i in range(0, 30, 2)], decoder, most_images=6):
        given += len(frames)
        time.sleep(0.01)
        assert watched.begun <= given + 6
    assert watched.begun == 30


def test_no_more_bytes_are_read_ahead(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = numbered(tmp_path, 30)
    one = read_image(paths[0]).nbytes
    watched, given = Watched(monkeypatch), 0
    for frames in read_ahead([paths[i : i + 2] for i in range(0, 30, 2)], decoder, most_bytes=5 * one):
        given += len(frames)
        time.sleep(0.01)
        assert watched.bytes <= (given + 5) * one
    assert watched.begun == 30


@pytest.mark.parametrize(
    ("batch", "limits", "begun"),
    [(2, {"most_images": 6}, 6), (2, {"most_images": 7}, 6), (1, {"most_images": 10, "most_bytes": 2 * 3 * 48}, 3)],
)
def test_reading_goes_as_far_ahead_as_it_may(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, limits: dict[str, int], begun: int
) -> None:
    """While the first batch is used: less would leave threads idle."""
    paths, watched = numbered(tmp_path, 30), Watched(monkeypatch)
    frames = read_ahead([paths[i : i + batch] for i in range(0, 30, batch)], decoder, **limits)
    next(frames)
    end = time.monotonic() + 10
    while watched.begun < begun:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.05)
    assert watched.begun == begun
    frames.close()


@pytest.mark.parametrize("most_bytes", [0, 500, 10_000])
def test_a_batch_of_more_bytes_is_read_in_its_turn(decoder: Decoder, tmp_path: Path, most_bytes: int) -> None:
    paths = [write(tmp_path / f"{i}.png", 40, 5 + 90 * (i % 3 == 0), i) for i in range(17)]
    done = list(read_ahead([paths[i : i + 4] for i in range(0, 17, 4)], decoder, most_bytes=most_bytes))
    equal([frame for frames in done for frame in frames], paths)


@pytest.mark.parametrize(
    ("most", "sizes"), [(10**9, [8, 4]), (3 * 48 * 3, [3, 3, 2, 3, 1]), (3 * 48 * 3 - 1, [2, 2, 2, 2, 2, 2]), (0, 12 * [1])]
)
@pytest.mark.parametrize("most_bytes", [0, 500, 10**9])
def test_a_batch_of_large_images_comes_in_parts(
    decoder: Decoder, tmp_path: Path, most: int, sizes: list[int], most_bytes: int
) -> None:
    """So a batch never takes more memory than that, whatever images a folder has; the images come in order, each once."""
    paths = numbered(tmp_path, 12)
    batches = read_ahead([paths[:8], paths[8:]], decoder, most_bytes=most_bytes, most_batch_bytes=most)
    done = list(batches)
    assert [len(frames) for frames in done] == sizes
    equal([frame for frames in done for frame in frames], paths)


def test_large_images_are_decoded_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a batch that is too large for memory as a whole do not exist at the same time."""
    paths = numbered(tmp_path, 8)
    alive = most = 0
    lock = threading.Lock()

    def counted(*arguments: object) -> Frame:
        nonlocal alive, most
        image = load_image(*arguments)  # type: ignore[arg-type]
        with lock:
            alive += 1
            most = max(most, alive)
        return image

    monkeypatch.setattr(decode, "load_image", counted)
    with Decoder(8) as decoder:
        for frames in read_ahead([paths], decoder, most_bytes=3 * 48, most_batch_bytes=2 * 3 * 48):
            time.sleep(0.02)
            with lock:
                alive -= len(frames)
    assert most <= 4  # two of a part and one ahead, while the part before is still used


def test_an_unreadable_image_of_a_part_is_named(decoder: Decoder, tmp_path: Path) -> None:
    paths = numbered(tmp_path, 4)
    paths[2].write_bytes(b"no image")
    frames = read_ahead([paths], decoder, most_batch_bytes=1)
    assert [len(next(frames)), len(next(frames))] == [1, 1]
    with pytest.raises(DarktrtError, match=r"2\.png: is not an image"):
        next(frames)


def test_images_that_wait_for_memory_hold_up_no_thread(tmp_path: Path) -> None:
    paths = numbered(tmp_path, 20)
    with Decoder(2) as decoder:
        for frames in read_ahead([[path] for path in paths], decoder, most_bytes=1):
            equal(decoder.read(paths[:3]), paths[:3])
            assert len(frames) == 1


def test_an_error_comes_when_its_turn_comes(decoder: Decoder, tmp_path: Path) -> None:
    paths = numbered(tmp_path, 12)
    paths[7].write_bytes(paths[7].read_bytes()[:60])
    paths[9] = tmp_path / "none.png"
    with pytest.raises(DarktrtError) as expected:
        read_image(paths[7])
    given: list[list[Frame]] = []
    with pytest.raises(DarktrtError) as caught:
        given.extend(read_ahead([paths[i : i + 2] for i in range(0, 12, 2)], decoder))
    assert str(caught.value) == str(expected.value)
    assert len(given) == 3
    with pytest.raises(DarktrtError, match=r"none\.png: cannot read: No such file"):
        decoder.read(paths[8:])


def test_bytes_are_named_and_bounded_as_by_decode_image(decoder: Decoder, tmp_path: Path) -> None:
    data = [write(tmp_path / "a.png").read_bytes(), b"no image", b""]
    for wrong, limit in ((0, 47), (1, 48), (2, 48)):
        with pytest.raises(DarktrtError) as expected:
            decode_image(data[wrong], f"upload {wrong}", limit)
        with pytest.raises(DarktrtError) as caught:
            decoder.submit(data[wrong], f"upload {wrong}", partial(check_pixels, most_pixels=limit)).result()
        assert str(caught.value) == str(expected.value)
    assert decoder.submit(data[0], "a", partial(check_pixels, most_pixels=48)).result().shape == (6, 8, 3)


def test_a_closed_generator_reads_no_more(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = numbered(tmp_path, 60)
    watched = Watched(monkeypatch)
    frames = read_ahead([[path] for path in paths], decoder, most_images=30)
    next(frames)
    frames.close()
    decoder.read(paths[:1])
    begun = watched.begun
    time.sleep(0.05)
    assert watched.begun == begun
    equal(decoder.read(paths[:5]), paths[:5])


def test_a_closed_decoder_has_no_threads(tmp_path: Path) -> None:
    paths, before = numbered(tmp_path, 40), threading.active_count()
    with Decoder(4) as decoder:
        frames = read_ahead([[path] for path in paths], decoder)
        next(frames)
        waiting = decoder.submit(paths[0], "one")
    assert threading.active_count() == before
    assert waiting.done()
    with pytest.raises((CancelledError, RuntimeError)):
        list(frames)
    decoder.close()


INTERRUPTED = """
import sys
from itertools import repeat
from pathlib import Path
from darktrt.vision.decode import Decoder, read_ahead
with Decoder(4) as decoder:
    for i, frames in enumerate(read_ahead(repeat([Path(sys.argv[1])] * 8), decoder)):
        if i == 3:
            print("running", flush=True)
"""


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", 500, 400)
    command = [sys.executable, "-c", INTERRUPTED, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout and process.stdout.readline() == b"running\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert errors.strip().endswith(b"KeyboardInterrupt")


def test_warnings_of_others_are_as_before(decoder: Decoder, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.png", 200, 100, i) for i in range(30)]
    before = list(warnings.filters)
    futures = [decoder.submit(path, "") for path in paths]
    with pytest.warns(UserWarning, match="of the program"):
        warnings.warn("of the program", stacklevel=1)
    for future in futures:
        future.result()
    assert warnings.filters == before


def test_odd_metadata_warns_nobody(decoder: Decoder, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0")
    (tmp_path / "odd.jpg").write_bytes(buffer.getvalue())
    decoder.read([tmp_path / "odd.jpg"])
    assert not recwarn.list


def test_threads_are_at_least_one() -> None:
    with pytest.raises(DarktrtError, match="0 threads") as caught:
        Decoder(0)
    assert caught.value.argument == "threads"
