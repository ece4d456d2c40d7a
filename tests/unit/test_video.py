"""Frames of video files: the bits of a plain loop, ahead of use, and by the GPU where it makes the same colours."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from fake_gpu import FakeGpu, FakeVideoCodec, install_gpu, install_video_codec, lighter

from darktrt.cuda import DeviceImage, Frame
from darktrt.errors import DarktrtError
from darktrt.vision import video
from darktrt.vision.gpu_video import _Memory
from darktrt.vision.prefetch import prefetch
from darktrt.vision.video import open_video, video_writer

SIZES = [(64, 48), (66, 50), (322, 242)]
"""Of some, the rows of FFmpeg's frames are longer than the frame is wide."""


def save(path: Path, frames: int = 9, size: tuple[int, int] = (64, 48)) -> Path:
    width, height = size
    with video_writer(path, Fraction(25)) as write:
        for i in range(frames):
            image = np.zeros((height, width, 3), np.uint8)
            image[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
            image[..., 1] = np.linspace(255, 0, height).astype(np.uint8)[:, np.newaxis]
            image[5 : 5 + 4 * i, 5:20, 2] = 200
            write(image)
    return path


def tagged(path: Path, form: str = "yuv420p", colours: int = 1, levels: int = 1, degrees: int = 0) -> Path:
    """A video that states this matrix, range and rotation."""
    size = (64, 48)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, form
        if degrees:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write a rotation")
            stream.set_display_rotation(degrees)
        stream.codec_context.colorspace, stream.codec_context.color_range = colours, levels
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 40 * i + 10, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=form)))
        container.mux(stream.encode())
    return path


def plain(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def read(path: Path, device: video.Device = "cpu") -> list[Frame]:
    with open_video(path, device) as (_, frames):
        return list(frames)


def same(frames: list[Any], expected: list[np.ndarray]) -> None:
    assert len(frames) == len(expected)
    for frame, pixels in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame.to_host() if isinstance(frame, DeviceImage) else frame, pixels)


def test_a_written_video_has_the_colours_of_its_frames(tmp_path: Path) -> None:
    """It states the matrix by which they were made, for players take another one for large videos."""
    colours = [(200, 30, 60), (20, 180, 40), (10, 60, 220)]
    with video_writer(tmp_path / "a.mp4", Fraction(25)) as write:
        for colour in colours:
            write(np.full((720, 1280, 3), colour, np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.colorspace, stream.pix_fmt, stream.width, stream.height) == (6, "yuv420p", 1280, 720)
    for frame, colour in zip(plain(tmp_path / "a.mp4"), colours, strict=True):
        assert np.abs(frame.reshape(-1, 3).mean(axis=0) - colour).max() < 4


# On the CPU


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_frames_have_the_bits_of_a_plain_loop(
    tmp_path: Path, size: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video.os, "sched_getaffinity", lambda _: range(threads))
    path = save(tmp_path / "a.mp4", 30, size)
    frames = read(path)
    same(frames, plain(path))
    assert all(isinstance(frame, np.ndarray) and frame.flags.c_contiguous for frame in frames)


@pytest.mark.parametrize("form", ["yuv420p", "yuvj420p", "yuv444p"])
@pytest.mark.parametrize("colours", [1, 2, 6])
def test_every_colour_is_converted_as_in_a_plain_loop(tmp_path: Path, form: str, colours: int) -> None:
    path = tagged(tmp_path / "a.mp4", form, colours, 2 if form == "yuvj420p" else 1)
    same(read(path), plain(path))


@pytest.mark.parametrize(("most_bytes", "ahead"), [(2 * 3 * 64 * 48, 2), (1, 1)])
def test_no_more_frames_are_decoded_ahead_than_there_is_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int, ahead: int
) -> None:
    """But for one."""
    path, begun = save(tmp_path / "a.mp4", 30), []
    convert = video._Converter.__call__

    def counted(converter: video._Converter, frame: av.VideoFrame) -> np.ndarray:
        begun.append(frame.pts)
        return convert(converter, frame)

    monkeypatch.setattr(video._Converter, "__call__", counted)
    monkeypatch.setattr(video, "MOST_BYTES", most_bytes)
    with open_video(path) as (_, frames):
        for given, _ in enumerate(frames, 1):
            time.sleep(0.01)
            assert len(begun) <= given + ahead
    assert len(begun) == 30


def test_leaving_a_video_early_ends_its_threads(tmp_path: Path) -> None:
    path, before = save(tmp_path / "a.mp4", 200), threading.active_count()
    with open_video(path) as (_, frames):
        next(frames)
    assert threading.active_count() == before
    with pytest.raises(KeyboardInterrupt), open_video(path) as (_, frames):
        next(frames)
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_an_error_comes_after_the_frames_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, convert, calls = save(tmp_path / "a.mp4", 20), video._Converter.__call__, count()

    def failing(converter: video._Converter, frame: av.VideoFrame) -> np.ndarray:
        if next(calls) == 6:
            raise av.error.InvalidDataError(1, "damaged")
        return convert(converter, frame)

    monkeypatch.setattr(video.os, "sched_getaffinity", lambda _: range(1))
    monkeypatch.setattr(video._Converter, "__call__", failing)
    got: list[Frame] = []
    with (
        pytest.raises(DarktrtError, match=r"a\.mp4: cannot be read as a video \(damaged\)"),
        open_video(path) as (_, frames),
    ):
        got.extend(frames)
    same(got, plain(path)[:6])


# Taking ahead


def test_items_are_taken_ahead_but_not_too_far() -> None:
    begun = count()
    items = prefetch((next(begun) for _ in range(50)), 4)
    for item in items:
        time.sleep(0.001)
        assert item < 50
    far = iter(range(1000))
    with_room = prefetch(far, 4)
    assert next(with_room) == 0
    time.sleep(0.05)
    with_room.close()
    assert next(far) <= 6


def test_closing_waits_for_the_item_under_way() -> None:
    """The file that the thread reads is closed next."""
    done = []

    def items() -> Iterator[int]:
        yield 1
        time.sleep(0.2)
        done.append(2)
        yield 2

    taken = prefetch(items(), 8)
    next(taken)
    taken.close()
    assert done == [2]


@pytest.mark.parametrize("runs", [False, True])
def test_ctrl_c_while_the_thread_starts_ends_it(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that it would read is closed next."""
    begun, closed, start = threading.Event(), threading.Event(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if runs:
            start(thread)
            assert begun.wait(10)
        raise KeyboardInterrupt

    def items() -> Iterator[int]:
        for item in count():
            begun.set()
            time.sleep(0.1)
            assert not closed.is_set()
            yield item

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    frames, before = items(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        next(prefetch(frames, 8))
    closed.set()
    assert threading.active_count() == before
    frames.close()  # which is refused while it runs


def test_an_error_of_the_items_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    got = []
    with pytest.raises(ValueError, match="third"):
        got.extend(prefetch(items(), 8))
    assert got == [1, 2]


# On the GPU


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return install_gpu(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path / "a.mp4")


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, path: Path) -> FakeVideoCodec:
    return install_video_codec(monkeypatch, gpu, {str(path): [lighter(frame) for frame in plain(path)]})


@pytest.mark.parametrize("device", ["gpu", "auto"])
def test_frames_are_copies_on_the_gpu(codec: FakeVideoCodec, path: Path, device: video.Device) -> None:
    frames = read(path, device)
    assert all(isinstance(frame, DeviceImage) for frame in frames)
    same(frames, codec.videos[str(path)])


def test_their_memory_is_used_again_and_given_back(codec: FakeVideoCodec, path: Path, gpu: FakeGpu) -> None:
    codec.videos[str(path)] *= 20
    addresses = set()
    with open_video(path, "gpu") as (_, frames):
        for frame in frames:
            assert isinstance(frame, DeviceImage)
            addresses.add(frame.address)
        assert len(addresses) <= 2 * video.MOST_CONVERTERS + 5
    np.testing.assert_array_equal(frame.to_host(), codec.videos[str(path)][-1])
    del frame
    assert not addresses & set(gpu.buffers) and not gpu.pending and not gpu.retained


def test_memory_that_cannot_be_allocated_leaves_nothing(gpu: FakeGpu) -> None:
    memory = _Memory()
    gpu.memory = 0
    with pytest.raises(DarktrtError, match="cuMemAlloc_v2 fails"):
        memory._take(12)
    memory.close()
    assert not gpu.pending and not gpu.retained


@pytest.mark.parametrize(
    ("form", "colours", "levels"), [("yuv420p", 2, 1), ("yuvj420p", 1, 2), ("yuv444p", 1, 1), ("yuv420p", 9, 1)]
)
def test_other_colours_are_ffmpegs(codec: FakeVideoCodec, tmp_path: Path, form: str, colours: int, levels: int) -> None:
    path = tagged(tmp_path / "b.mp4", form, colours, levels)
    same(read(path, "gpu"), plain(path))
    assert not codec.decoded


@pytest.mark.parametrize("colours", [1, 5, 6])
def test_stated_colours_are_the_gpus(codec: FakeVideoCodec, tmp_path: Path, colours: int) -> None:
    path = tagged(tmp_path / "b.mp4", colours=colours)
    codec.videos[str(path)] = [lighter(frame) for frame in plain(path)]
    same(read(path, "gpu"), codec.videos[str(path)])


def test_turned_videos_are_ffmpegs(codec: FakeVideoCodec, tmp_path: Path) -> None:
    path = tagged(tmp_path / "b.mp4", degrees=-90)
    frames = read(path, "gpu")
    same(frames, [np.rot90(frame, -1) for frame in plain(path)])
    assert frames[0].shape == (64, 48, 3) and not codec.decoded


def test_a_first_frame_of_other_colours_is_noticed(codec: FakeVideoCodec, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    codec.videos[str(path)] = [np.roll(frame, 1, axis=2) for frame in plain(path)]
    same(read(path, "gpu"), plain(path))
    assert "PyNvVideoCodec stops after 0 frames (its first frame differs from FFmpeg's by" in caplog.text


@pytest.mark.parametrize("fault", ["fails", "ends", "grows"])
def test_what_the_gpu_leaves_ffmpeg_decodes(
    codec: FakeVideoCodec, path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = plain(path)
    if fault == "fails":
        codec.fails_at, done, words = 6, 6, "stops after 6 frames (NVDEC failed)"
    elif fault == "ends":
        codec.ends_at, done, words = 5, 5, ""
    else:
        codec.videos[str(path)][4:] = [np.zeros((50, 66, 3), np.uint8)] * 5
        done, words = 4, "stops after 4 frames (frame 4 has 66x50 pixels)"
    frames = read(path, "gpu")
    assert [isinstance(frame, DeviceImage) for frame in frames] == [i < done for i in range(9)]
    same(frames, [*map(lighter, expected[:done]), *expected[done:]])
    assert words in caplog.text


def test_no_frame_is_lost_of_a_file_without_a_count(codec: FakeVideoCodec, tmp_path: Path) -> None:
    path = tagged(tmp_path / "b.mkv")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    expected = plain(path)
    codec.videos[str(path)] = [lighter(frame) for frame in expected]
    codec.fails_at = 2
    same(read(path, "gpu"), [*map(lighter, expected[:2]), *expected[2:]])
    codec.fails_at = -1
    same(read(path, "gpu"), codec.videos[str(path)])


def test_a_damaged_file_has_ffmpegs_words(codec: FakeVideoCodec, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DarktrtError) as expected:
        read(path)
    with pytest.raises(DarktrtError) as caught:
        read(path, "gpu")
    assert str(caught.value) == str(expected.value)


def test_without_the_library_it_says_what_to_install(gpu: FakeGpu, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", None)
    with pytest.raises(DarktrtError, match=r"PyNvVideoCodec: pip install 'darktrt\[gpu\]'"):
        read(path, "gpu")
    same(read(path, "auto"), plain(path))


def test_without_a_gpu_ffmpeg_decodes(codec: FakeVideoCodec, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darktrt.vision.gpu_video.first_gpu", lambda: None)
    with pytest.raises(DarktrtError, match="there is no GPU"):
        read(path, "gpu")
    same(read(path, "auto"), plain(path))
    assert not codec.decoded
