"""From outputs to detections and from files to files, with a made network that detects red, green and blue rectangles."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from darktrt import progress
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, NmsInfo, Thresholds
from darktrt.vision import detector as detector_module
from darktrt.vision import video
from darktrt.vision.decode import read_ahead
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.files import FileResult, detect_files, write_image
from darktrt.vision.video import open_video, video_length, video_writer

NAMES = ("red", "green", "blue")
SLOTS = 6
RED = (40, 30, 100, 90)


class ColourNetwork:
    """Sees one rectangle a channel: boxes and scores as a network's, twice each, the second a little off and less sure."""

    def __init__(self, info: DetectorInfo) -> None:
        self.info = info
        self.batches: list[int] = []
        self.inputs: dict[str, np.ndarray] = {}

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = inputs["images"]
        self.inputs = inputs
        self.batches.append(len(images))
        if self.info.input == "uint8":
            assert images.dtype == np.uint8
            assert images.shape[1:] == (self.info.height, self.info.width, 3)
            images = images.transpose(0, 3, 1, 2) / np.float32(255)
        assert images.shape[1:] == (3, self.info.height, self.info.width)
        seen = [self.look(image) for image in images]
        boxes, scores = (np.stack(parts) for parts in zip(*seen, strict=True))
        return self.padded(boxes, scores) if self.info.head == "nms" else {"boxes": boxes, "scores": scores}

    def look(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        boxes, scores = np.zeros((SLOTS, 4), np.float32), np.zeros((SLOTS, 3), np.float32)
        for channel in range(3):
            rows, columns = np.nonzero((image[channel] > 0.75) & (image.sum(axis=0) < 1.5))
            if rows.size:
                box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
                boxes[channel * 2], scores[channel * 2, channel] = box, 0.9 - channel / 10
                boxes[channel * 2 + 1], scores[channel * 2 + 1, channel] = box + 1, 0.5
        return boxes, scores

    def padded(self, boxes: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
        best = scores.max(axis=2)
        counts = (best > 0.6).sum(axis=1, keepdims=True).astype(np.int32)
        order = np.argsort(-best, axis=1, kind="stable")
        kept = np.arange(SLOTS) < counts
        return {
            "num_detections": counts,
            "boxes": np.take_along_axis(boxes, order[:, :, None], axis=1) * kept[:, :, None].astype(np.float32),
            "scores": np.take_along_axis(best, order, axis=1) * kept.astype(np.float32),
            "classes": (np.take_along_axis(scores.argmax(axis=2), order, axis=1) * kept).astype(np.int32),
        }


def made_info(**changes: Any) -> DetectorInfo:
    fields: dict[str, Any] = {
        "name": "colours",
        "width": 160,
        "height": 128,
        "channels": 3,
        "batch": (1, 1, 3),
        "resize": "stretch",
        "mish_count": 0,
        "heads": (),
        "nms": NmsInfo(),
        "class_names": NAMES,
        "parameters": 0,
        "gflops": 0.0,
    }
    return DetectorInfo(**{**fields, **changes})


def made_detector(**changes: Any) -> NetworkDetector:
    info = made_info(**changes)
    return NetworkDetector(ColourNetwork(info), info)


def photo(box: tuple[int, int, int, int] = RED, channel: int = 0, size: tuple[int, int] = (200, 320)) -> np.ndarray:
    image = np.full((*size, 3), 40, np.uint8)
    image[box[1] : box[3], box[0] : box[2], channel] = 250
    return image


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def save_video(path: Path, frames: int = 7, rate: Fraction = Fraction(30000, 1001), size: tuple[int, int] = (120, 160)) -> Path:
    with video_writer(path, rate) as write:
        for i in range(frames):
            write(photo((10 + 4 * i, 30, 60 + 4 * i, 90), 2, size))
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    with open_video(path) as (_, frames):
        return list(frames)


def rate_of(path: Path) -> Fraction:
    with open_video(path) as (rate, _):
        return rate


def files_in(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


# NetworkDetector


@pytest.mark.parametrize("head", ["nms", "decode", "decoded"])
@pytest.mark.parametrize("form", ["uint8", "float"])
@pytest.mark.parametrize("policy", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(200, 320), (320, 200)])
def test_boxes_are_in_pixels_of_the_image(head: str, form: str, policy: str, size: tuple[int, int]) -> None:
    detector = made_detector(head=head, input=form, resize=policy)
    found = detector.detect([photo(size=size), photo((100, 20, 180, 150), 1, size)])
    assert [f.names for f in found] == [["red"], ["green"]]
    np.testing.assert_allclose(found[0].boxes, [RED], atol=3)
    np.testing.assert_allclose(found[1].boxes, [[100, 20, 180, 150]], atol=3)
    np.testing.assert_allclose(found[1].scores, [0.8])


def test_several_in_one_image_come_best_first_and_clipped() -> None:
    image = photo((0, 0, 50, 50), 2)
    image[120:200, 200:320, 0] = 250
    found = made_detector().detect([image])[0]
    assert found.names == ["red", "blue"]
    assert found.boxes.min() >= 0
    assert found.boxes[0, 2:].tolist() == [320, 200]


@pytest.mark.parametrize(
    ("batch", "images", "ran"),
    [((1, 1, 1), 3, [1, 1, 1]), ((4, 4, 4), 6, [4, 4]), ((1, 2, 4), 6, [4, 2]), ((2, 2, 4), 5, [4, 2]), ((1, 1, 8), 0, [])],
)
def test_batches_have_sizes_of_the_model(batch: tuple[int, int, int], images: int, ran: list[int]) -> None:
    detector = made_detector(batch=batch, head="nms")
    found = detector.detect([photo((10 + 20 * i, 20, 60 + 20 * i, 90)) for i in range(images)])
    assert detector.run.batches == ran  # type: ignore[attr-defined]
    assert len(found) == images
    for i, one in enumerate(found):
        np.testing.assert_allclose(one.boxes, [[10 + 20 * i, 20, 60 + 20 * i, 90]], atol=3)


@pytest.mark.parametrize(
    ("kind", "policy", "size", "expected"),
    [
        ("diounms", "letterbox", (160, 320), [160, 80]),
        ("plain", "letterbox", (160, 320), None),
        ("diounms", "stretch", (9, 9), None),
    ],
)
def test_nms_has_the_size_of_a_letterboxed_image(kind: Any, policy: Any, size: Any, expected: Any) -> None:
    detector = made_detector(head="nms", resize=policy, nms=NmsInfo(kind), batch=(2, 2, 2))
    detector.detect([photo(size=size)])
    given = detector.run.inputs.get("image_size")  # type: ignore[attr-defined]
    assert (None if given is None else given.tolist()) == (expected and [expected, expected])


def test_thresholds_reach_the_model_that_ends_in_nms() -> None:
    info = made_info(head="nms")
    network = ColourNetwork(info)
    NetworkDetector(network, info, score_threshold=0.001, iou_threshold=0.6).detect([photo()])
    np.testing.assert_array_equal(network.inputs["score_threshold"], np.array([0.001], np.float32))
    np.testing.assert_array_equal(network.inputs["iou_threshold"], np.array([0.6], np.float32))
    assert network.inputs["iou_threshold"].dtype == np.float32


def test_thresholds_and_nms_kind_count_where_numpy_suppresses() -> None:
    info = made_info(nms=NmsInfo("plain"))
    assert len(NetworkDetector(ColourNetwork(info), info, 0.25, 0.45).detect([photo()])[0]) == 1
    assert len(NetworkDetector(ColourNetwork(info), info, 0.25, 0.99).detect([photo()])[0]) == 2
    assert len(NetworkDetector(ColourNetwork(info), info, 0.95, 0.45).detect([photo()])[0]) == 0
    distant = made_info(nms=NmsInfo("diounms", beta=0.0))  # any distance at all then counts 1
    assert len(NetworkDetector(ColourNetwork(distant), distant, 0.25, 0.45).detect([photo()])[0]) == 2
    capped = made_info(max_detections=1)
    assert len(NetworkDetector(ColourNetwork(capped), capped, 0.25, 0.99).detect([photo()])[0]) == 1


def test_results_are_copies_of_the_engines_memory() -> None:
    detector = made_detector(head="nms", input="uint8")
    image = photo(size=(128, 160))
    memory = detector.run({"images": image[np.newaxis]})
    found = NetworkDetector(lambda _: memory, detector.info).detect([image])[0]
    for array in memory.values():
        array.fill(0)
    assert found.scores.tolist() == pytest.approx([0.9])
    assert found.names == ["red"]


@pytest.mark.parametrize("limit", [1, 2, 0])
def test_a_full_image_warns_once_for_a_model(limit: int, caplog: pytest.LogCaptureFixture) -> None:
    """Of one image with two detections; 0 is no limit."""
    two = photo()
    two[100:130, 200:300] = (0, 255, 0)
    name = f"full{limit}"
    for _ in range(2):
        detector = made_detector(name=name, head="nms", max_detections=limit)
        assert [len(one) for one in detector.detect([photo(), two, two])] == [1, 2, 2]
    expected = [
        f"{name}: an image has {limit} detections, as many as the model outputs, so others may be missing; run surgery again "
        "with a larger max_detections"
    ]
    assert caplog.messages == (expected if limit else [])


def test_only_models_that_end_in_nms_have_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    assert len(made_detector(name="endless", head="decode").detect([photo()])[0]) == 1
    made_detector(name="roomy", head="nms", max_detections=2).detect([photo()])
    assert not caplog.messages


def test_raw_heads_are_refused() -> None:
    with pytest.raises(DarktrtError, match=r"colours: ends at its raw heads; .* nms or decode"):
        made_detector(head="raw")


def test_the_thresholds_are_darknets_unless_named() -> None:
    assert made_detector().thresholds == Thresholds(0.25, 0.45)


@pytest.mark.parametrize("thresholds", [(25, 0.45), (-0.1, 0.45), (0.25, 1.5), (float("nan"), 0.5)])
def test_thresholds_outside_0_1_are_refused(thresholds: tuple[float, float]) -> None:
    with pytest.raises(DarktrtError, match="must be between 0 and 1"):
        NetworkDetector(ColourNetwork(made_info()), made_info(), *thresholds)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"scores": np.zeros((1, 5, 3), np.float32)}, "has no output 'boxes', only scores"),
        ({"boxes": np.zeros((2, 5, 4), np.float32), "scores": np.zeros((2, 5, 3), np.float32)}, "2 rows for a batch of 1"),
        ({"boxes": np.zeros((1, 5, 4), np.float32), "scores": np.full((1, 5, 3), np.nan, np.float32)}, "not numbers"),
        ({"boxes": np.zeros((1, 4, 4), np.float32), "scores": np.zeros((1, 5, 3), np.float32)}, r"'boxes' is \(1, 4, 4\)"),
        ({"boxes": np.zeros((1, 5, 5), np.float32), "scores": np.zeros((1, 5, 3), np.float32)}, r"'boxes' is \(1, 5, 5\)"),
        ({"boxes": np.zeros((1, 5, 4), np.float32), "scores": np.zeros((1, 5, 4), np.float32)}, r"not \(1, 5, 3\) of the"),
        ({"boxes": np.zeros((1, 5, 4), np.float32), "scores": np.zeros((1,), np.float32)}, r"'boxes' is"),
        ({"boxes": np.zeros((1, 5, 4), np.float32), "scores": np.zeros((1, 5, 3), np.int64)}, r"'scores' is .* int64, not"),
        ({"boxes": np.zeros((), np.float32), "scores": np.zeros((1, 5, 3), np.float32)}, "'boxes' has 0 rows for a batch of 1"),
    ],
)
def test_outputs_that_do_not_fit_are_named(outputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DarktrtError, match=f"colours.*{message}"):
        NetworkDetector(lambda _: outputs, made_info()).detect([photo()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_detections": np.array([[6]], np.int32)}, r"'num_detections' has \[6\], but there are 5 rows"),
        ({"num_detections": np.array([[-1]], np.int32)}, r"'num_detections' has \[-1\], but there are 5 rows"),
        ({"num_detections": np.array([[1, 1]], np.int32)}, r"'num_detections' is \(1, 2\) int32, not \(1, 1\)"),
        ({"classes": np.array([[0, 3, 0, 0, 0]], np.int32)}, r"'classes' has 3, but there are 3 classes"),
        ({"classes": np.array([[0, -1, 0, 0, 0]], np.int32)}, r"'classes' has -1, but there are 3 classes"),
        ({"classes": np.zeros((1, 5), np.float32)}, r"'classes' is \(1, 5\) float32"),
        ({"scores": np.zeros((1, 4), np.float32)}, r"'boxes' is \(1, 5, 4\)"),
    ],
)
def test_detections_that_no_network_has(change: dict[str, np.ndarray], message: str) -> None:
    """Of a damaged model or a server that lies; a class behind the last detection means nothing."""
    outputs = {
        "boxes": np.zeros((1, 5, 4), np.float32),
        "scores": np.full((1, 5), 0.5, np.float32),
        "classes": np.array([[0, 2, 1, 9, -9]], np.int32),
        "num_detections": np.array([[3]], np.int32),
    }
    info = made_info(head="nms", max_detections=5)
    (found,) = NetworkDetector(lambda _: outputs, info).detect([photo()])
    assert found.class_ids.tolist() == [0, 2, 1]
    with pytest.raises(DarktrtError, match=f"colours.*{message}"):
        NetworkDetector(lambda _: {**outputs, **change}, info).detect([photo()])


def test_a_batch_of_large_files_is_one_batch_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in parts, so that its images are never in memory together; batches and order are the caller's."""
    paths = [save(tmp_path / f"{i}.png", photo(channel=i % 3)) for i in range(8)]
    size = photo().nbytes
    monkeypatch.setattr(detector_module, "read_ahead", partial(read_ahead, most_batch_bytes=2 * size))
    network = ColourNetwork(made_info(batch=(1, 8, 8)))
    detector = NetworkDetector(network, network.info)
    batches = list(detector.detect_batches([paths[:5], [], paths[5:]]))
    assert [len(batch) for batch in batches] == [5, 0, 3]
    assert [one.names for batch in batches for one in batch] == [[NAMES[i % 3]] for i in range(8)]
    parts = [len(frames) for frames, _ in detector.detect_frames([paths[:5], paths[5:]])]
    assert parts == [2, 2, 1, 2, 1]
    found = list(detect_files(detector, [tmp_path]))
    assert [(one.path, one.detections.names) for one in found] == [(path, [NAMES[i % 3]]) for i, path in enumerate(paths)]


# Files


def test_one_image_to_one_image(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", photo(channel=2))
    (result,) = detect_files(made_detector(), [source], tmp_path / "out.jpg")
    assert (result.path, result.frame, result.image) == (source, None, tmp_path / "out.jpg")
    assert result.detections.names == ["blue"]
    drawn = np.asarray(Image.open(tmp_path / "out.jpg")).astype(int)
    difference = np.abs(drawn - photo(channel=2)).max(axis=2)
    assert drawn.shape == (200, 320, 3)
    assert difference[RED[1] : RED[3], RED[0] - 3 : RED[0] + 4].max(axis=1).min() > 50
    assert difference[110:].max() < 20
    assert files_in(tmp_path) == ["a.png", "out.jpg"]


def test_without_an_output_nothing_is_written(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", photo())
    (result,) = detect_files(made_detector(), [str(source)])
    assert result.image is None
    assert files_in(tmp_path) == ["a.png"]


def test_results_are_json_lines(tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", photo())
    (result,) = detect_files(made_detector(), [source], tmp_path / "out.png")
    record = json.loads(json.dumps(result.to_dict()))
    assert record["file"] == str(source)
    assert record["image"] == str(tmp_path / "out.png")
    assert "frame" not in record
    assert record["detections"][0]["class"] == "red"


def test_a_folder_is_searched_to_any_depth_in_order(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.PNG", "sub/deep/c.bmp", "sub/a.png", ".hidden.png", ".git/x.png"):
        save(tmp_path / "in" / name, photo())
    (tmp_path / "in/notes.txt").write_text("no image")
    results = list(detect_files(made_detector(), [tmp_path / "in"], tmp_path / "out"))
    assert [str(r.path.relative_to(tmp_path / "in")) for r in results] == ["a.PNG", "b.jpg", "sub/a.png", "sub/deep/c.bmp"]
    assert files_in(tmp_path / "out") == ["a.PNG", "b.jpg", "sub/a.png", "sub/deep/c.bmp"]


def test_copies_of_an_earlier_run_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", photo())
    monkeypatch.chdir(tmp_path)
    for source, output in ((tmp_path, tmp_path / "out"), (tmp_path, "out"), (".", "out"), (".", tmp_path / "out")):
        assert len(list(detect_files(made_detector(), [source], output))) == 1
    assert files_in(tmp_path) == ["a.png", "out/a.png"]


def test_patterns_are_expanded_and_files_are_read_once(tmp_path: Path) -> None:
    for name in ("s1.png", "s2.png", "t.png", "s[3].png"):
        save(tmp_path / name, photo())
    (tmp_path / "s.txt").write_text("no image")
    results = detect_files(made_detector(), [tmp_path / "s1.png", f"{tmp_path}/s*", tmp_path / "s[3].png"])
    assert [r.path.name for r in results] == ["s1.png", "s2.png", "s[3].png"]


def test_patterns_may_climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / ".cache/in/deep/a.png", photo())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for pattern in ("../.cache/*/*/*.png", "../.cache/**/a.png", f"{tmp_path}/.cache/in/*/*.png"):
        assert len(list(detect_files(made_detector(), [pattern], "out"))) == 1
    assert files_in(tmp_path / "here/out") == ["deep/a.png", "in/deep/a.png"]


def test_equal_names_from_different_folders_are_numbered(tmp_path: Path) -> None:
    sources = [save(tmp_path / folder / name, photo()) for folder in "abc" for name in ("x.png", "X.png")]
    save(tmp_path / "d/x.png", photo())
    results = list(detect_files(made_detector(), [*sources, tmp_path / "d"], tmp_path / "out"))
    targets = [str(r.image) for r in results]
    assert len({t.casefold() for t in targets}) == 7
    assert len(files_in(tmp_path / "out")) == 7


def test_formats_that_are_not_written_become_png(tmp_path: Path) -> None:
    save(tmp_path / "a.gif", photo())
    (tmp_path / "photo").write_bytes((tmp_path / "a.gif").read_bytes())
    results = list(detect_files(made_detector(), [tmp_path / "a.gif", tmp_path / "photo"], tmp_path / "out"))
    assert len(results) == 2
    assert files_in(tmp_path / "out") == ["a.gif.png", "photo.png"]


@pytest.mark.parametrize("suffix", [".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"])
def test_every_image_format_is_written(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"a{suffix}", photo())
    read = np.asarray(Image.open(tmp_path / f"a{suffix}").convert("RGB"))
    assert np.abs(read.astype(int) - photo()).mean() < 8


@pytest.mark.parametrize(
    ("sources", "output", "message"),
    [
        ([], None, "no sources"),
        (["none.jpg"], None, r"none\.jpg: no such file or folder"),
        (["empty"], None, "empty: no images or videos here"),
        (["*.gif"], None, r"\*\.gif: no images or videos here"),
        (["a.png"], "out.xyz", r"out\.xyz: cannot write '\.xyz'; use \.bmp"),
        (["a.png", "b.png"], "out.jpg", r"out\.jpg: is one file, but there are 2 sources"),
        (["a.png"], "out.mp4", r"out\.mp4: the source .*a\.png is an image"),
        (["a.png"], "a.png", r"a\.png: is one of the sources"),
        (["a.png", "b.png"], ".", "is one of the sources"),
        (["."], ".", "is one of the sources"),
        (["a.png"], "missing/out.jpg", r"missing/out\.jpg: cannot write"),
        (["a.png"], "file", "file: cannot make this folder"),
        (["a.png"], "file/out", "cannot make this folder"),
        (["x" * 5000], None, "x: cannot be read: .*too long"),
        (["a.png"], "x" * 5000, "x: cannot make this folder: File name too long"),
        (["a**.x*"], None, r"a\*\*\.x\*: (cannot be read|no images)"),
        (["bad.jpg"], "out", r"bad\.jpg: is not an image"),
        (["bad.mp4"], "out", r"bad\.mp4: cannot be read as a video"),
        (["empty.mp4"], "out.mp4", r"empty\.mp4: cannot be read as a video"),
        (["sound.mp4"], "out.mp4", r"sound\.mp4: has no video stream"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_nothing(
    tmp_path: Path, sources: list[str], output: str | None, message: str
) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / name, photo())
    (tmp_path / "empty").mkdir()
    for name in ("bad.jpg", "bad.mp4", "file"):
        (tmp_path / name).write_text("<html>no such thing</html>")
    (tmp_path / "empty.mp4").touch()
    save_sound(tmp_path / "sound.mp4")
    before = files_in(tmp_path)
    with pytest.raises(DarktrtError, match=message) as caught:
        list(detect_files(made_detector(), [tmp_path / s for s in sources], output and tmp_path / output))
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "out").exists()


def save_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_mistakes_are_reported_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match="no such file"):
        detect_files(made_detector(), [tmp_path / "none.png"])


def test_an_unreadable_image_among_others_is_named(tmp_path: Path) -> None:
    for i in range(5):
        save(tmp_path / "in" / f"{i}.png", photo())
    (tmp_path / "in/4.png").write_bytes((tmp_path / "in/3.png").read_bytes()[:200])
    results: list[FileResult] = []
    with pytest.raises(DarktrtError, match=r"4\.png: cannot be decoded"):
        results.extend(detect_files(made_detector(), [tmp_path / "in"], tmp_path / "out"))
    assert files_in(tmp_path / "out") == ["0.png", "1.png", "2.png"]  # batches of three


def test_images_too_large_for_a_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"a\.webp: cannot be written|a\.webp: cannot write"):
        write_image(tmp_path / "a.webp", np.zeros((1, 20000, 3), np.uint8))
    assert files_in(tmp_path) == []


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "count", "shown"), [(True, 1, False), (True, 2, True), (False, 5, False)])
def test_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, count: int, shown: bool) -> None:
    for i in range(count):
        save(tmp_path / f"{i}.png", photo())
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "_shown", "bar")
    assert len(list(detect_files(made_detector(), [tmp_path]))) == count
    assert (f"{count}/{count}" in stderr.getvalue()) is shown


# Several at once


class SlowNetwork(ColourNetwork):
    """Takes its time, the longer the earlier it is asked, and counts how many ask at once."""

    def __init__(self, info: DetectorInfo) -> None:
        super().__init__(info)
        self.at_once = self.most_at_once = self.asked = 0
        self.lock = threading.Lock()

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self.lock:
            self.at_once += 1
            self.asked += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            wait = 0.08 - 0.01 * (self.asked % 8)
        time.sleep(wait)
        with self.lock:
            self.at_once -= 1
        return super().__call__(inputs)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_several_calls_at_once_keep_their_order(tmp_path: Path, in_flight: int) -> None:
    for i in range(20):
        save(tmp_path / "in" / f"{i:02}.png", photo((10 * i, 30, 10 * i + 60, 90)))
    save_video(tmp_path / "in" / "v.mp4", frames=9)
    network = SlowNetwork(made_info(batch=(1, 1, 1)))
    results = list(detect_files(NetworkDetector(network, network.info), [tmp_path / "in"], tmp_path / "out", in_flight))
    assert network.most_at_once == in_flight
    assert [r.path.name for r in results] == [f"{i:02}.png" for i in range(20)] + ["v.mp4"] * 9  # type: ignore[union-attr]
    np.testing.assert_allclose([r.detections.boxes[0, 0] for r in results[:20]], range(0, 200, 10), atol=3)
    assert [r.frame for r in results[20:]] == list(range(9))
    assert len(files_in(tmp_path / "out")) == 21


def test_stopping_early_does_not_wait_for_running_calls(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / f"{i:02}.png", photo())
    info = made_info(batch=(1, 1, 1))
    network, release = ColourNetwork(info), threading.Event()

    def stuck(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if network.batches:
            release.wait(10)
        return network(inputs)

    results = detect_files(NetworkDetector(stuck, info), [tmp_path], None, 2)
    next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 1
    release.set()


def test_a_failure_of_one_call_is_raised(tmp_path: Path) -> None:
    for i in range(9):
        save(tmp_path / f"{i}.png", photo())
    (tmp_path / "5.png").write_text("no image")
    network = SlowNetwork(made_info(batch=(1, 1, 1)))
    results = detect_files(NetworkDetector(network, network.info), [tmp_path], None, 3)
    assert [next(results).path.name for _ in range(5)] == [f"{i}.png" for i in range(5)]  # type: ignore[union-attr]
    with pytest.raises(DarktrtError, match=r"5\.png: is not an image"):
        next(results)


# Video


def test_a_video_keeps_its_frames_size_and_rate(tmp_path: Path) -> None:
    video = save_video(tmp_path / "a.mp4")
    frames = frames_of(video)
    assert [f.shape for f in frames] == [(120, 160, 3)] * 7
    assert rate_of(video) == Fraction(30000, 1001)
    assert video_length(video) == 7
    for i, frame in enumerate(frames):
        expected = photo((10 + 4 * i, 30, 60 + 4 * i, 90), 2, (120, 160)).astype(int)
        assert np.abs(frame - expected).mean() < 4


def test_video_to_video(tmp_path: Path) -> None:
    source = save_video(tmp_path / "a.mp4")
    results = list(detect_files(made_detector(), [source], tmp_path / "out.mp4"))
    assert [r.frame for r in results] == list(range(7))
    assert results[3].to_dict()["frame"] == 3
    np.testing.assert_allclose(results[5].detections.boxes, [[30, 30, 80, 90]], atol=3)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(30000, 1001)
        assert stream.frames == 7
    plain, drawn = frames_of(source), frames_of(tmp_path / "out.mp4")
    difference = np.abs(drawn[5].astype(int) - plain[5]).max(axis=2)
    assert difference[40:85, 28:33].max(axis=1).min() > 40
    assert difference[95:].mean() < 8
    assert files_in(tmp_path) == ["a.mp4", "out.mp4"]


def test_videos_and_images_in_one_folder(tmp_path: Path) -> None:
    save(tmp_path / "in/a.png", photo())
    save_video(tmp_path / "in/b.mp4", frames=2)
    save_video(tmp_path / "in/b.avi", frames=2)
    save(tmp_path / "in/c.png", photo())
    results = list(detect_files(made_detector(), [tmp_path / "in"], tmp_path / "out"))
    assert [(r.path.name, r.frame) for r in results] == [
        ("a.png", None),
        ("b.avi", 0),
        ("b.avi", 1),
        ("b.mp4", 0),
        ("b.mp4", 1),
        ("c.png", None),
    ]
    assert files_in(tmp_path / "out") == ["a.png", "b.avi.mp4", "b.mp4", "c.png"]


def test_odd_sizes_lose_their_last_line(tmp_path: Path) -> None:
    frames = frames_of(save_video(tmp_path / "a.mp4", frames=2, size=(121, 161)))
    assert frames[0].shape == (120, 160, 3)


def test_frames_are_turned_upright(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a rotation")
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.set_display_rotation(-90)  # to be shown a quarter turn clockwise: a telephone held upright
        container.mux(stream.encode(av.VideoFrame.from_ndarray(photo((0, 0, 80, 60), size=(120, 160)), format="rgb24")))
        container.mux(stream.encode())
    (frame,) = frames_of(tmp_path / "a.mp4")
    assert frame.shape == (160, 120, 3)
    assert frame[10, 110, 0] > 200
    assert frame[10, 10, 0] < 80


def test_without_h264_the_video_is_mpeg4_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(video, "_can_encode", lambda name: name == "mpeg4")
    path = save_video(tmp_path / "a.mp4")
    assert "no H.264 encoder" in caplog.text
    assert len(frames_of(path)) == 7


def test_stopping_early_leaves_no_half_video(tmp_path: Path) -> None:
    source = save_video(tmp_path / "a.mp4")
    results = detect_files(made_detector(), [source], tmp_path / "out.mp4")
    next(results)
    assert len(files_in(tmp_path)) == 2
    results.close()
    assert files_in(tmp_path) == ["a.mp4"]


def test_a_failure_on_the_way_leaves_no_half_video(tmp_path: Path) -> None:
    source = save_video(tmp_path / "a.mp4")
    info = made_info()
    network = ColourNetwork(info)

    def tired(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if network.batches:
            raise KeyboardInterrupt
        return network(inputs)

    with pytest.raises(KeyboardInterrupt):
        list(detect_files(NetworkDetector(tired, info), [source], tmp_path / "out.mp4"))
    assert files_in(tmp_path) == ["a.mp4"]


def test_a_cut_video_is_named(tmp_path: Path) -> None:
    video = save_video(tmp_path / "a.mp4")
    video.write_bytes(video.read_bytes()[:-200])
    with pytest.raises(DarktrtError, match=r"a\.mp4: "):
        list(detect_files(made_detector(), [video], tmp_path / "out.mp4"))
    assert files_in(tmp_path) == ["a.mp4"]


def test_titles_in_another_encoding_do_no_harm(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["title"] = "Caf* in May"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(photo(size=(120, 160)), format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mp4").read_bytes()
    assert b"Caf* in" in content
    (tmp_path / "a.mp4").write_bytes(content.replace(b"Caf* in", b"Caf\xe9 in"))
    assert len(frames_of(tmp_path / "a.mp4")) == 1


def test_names_with_a_colon_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_video(Path("cam:1.mp4"), frames=2)
    assert len(list(detect_files(made_detector(), ["cam:1.mp4"], "out:1.mp4"))) == 2
