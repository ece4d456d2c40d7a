"""Collecting: which tensors, the same counts as by hand, shards, resuming and everything that can be wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MADE_CFG, RESIDUAL_CFG, Array, Made, conv, head, made_image, make, net, run, with_outputs
from onnx import numpy_helper
from PIL import Image
from test_calib_histogram import same_sets

from darktrt.calib import collect as module
from darktrt.calib.channel_means import Range, measure_channel_means
from darktrt.calib.collect import collect
from darktrt.calib.file import read_calibration
from darktrt.calib.graph import tensors_to_calibrate
from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.calib.importance import weights_of
from darktrt.calib.options import CalibrationOptions
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.onnx_file import load_model
from darktrt.parallel import Threads
from darktrt.pipeline import calibrate
from darktrt.progress import set_progress
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins, save_model, transform
from darktrt.vision.images import preprocess, read_image


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven images of different sizes."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(made_image(50 + 9 * i, 120 - 5 * i, i)).save(path)
    return paths


@pytest.fixture(scope="module")
def portable(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made network after the default surgery: bytes in, plugin nodes, NMS."""
    path = tmp_path_factory.mktemp("portable") / "portable.onnx"
    model, report = transform(made.model(), made.info, SurgeryOptions())
    save_model(model, report.info, path)
    return path


@pytest.fixture(scope="module")
def whole(portable: Path, images: list[Path]) -> HistogramSet:
    """One run over all images."""
    return collect(portable, images)


def counted_by_hand(model_path: Path, images: list[Path], tensor: str) -> Histogram:
    """The whole model, heads and all, run on one image after the other."""
    model, info = load_model(model_path)
    histogram = Histogram()
    for path in images:
        array, _ = preprocess(read_image(path), info.width, info.height, info.channels, info.resize, info.input)
        inputs: dict[str, Array] = {"images": array[np.newaxis]}
        if info.head == "nms":
            inputs |= {"score_threshold": np.array([0.3], np.float32), "iou_threshold": np.array([0.5], np.float32)}
        outputs = dict.fromkeys([tensor, *(head.tensor for head in info.heads)])
        outputs.pop("images", None)
        result = run(with_outputs(model, outputs), inputs) | inputs
        histogram.add(result[tensor], weights_of(result, info.heads))
    return histogram


# --- counting ---


def test_fused_mish_hides_tensors_and_changes_no_other(tmp_path: Path, images: list[Path]) -> None:
    """Histograms of what is left are those of a node each; a form left to the build has every tensor of all forms."""
    made = make(tmp_path, RESIDUAL_CFG)
    result = {}
    for form in ("plugin", "fused", "auto"):
        insert_plugins(made.plain, tmp_path / f"{form}.onnx", SurgeryOptions(mish=form))  # type: ignore[arg-type]
        result[form] = collect(tmp_path / f"{form}.onnx", images).histograms
    assert list(result["auto"]) == list(result["plugin"])
    hidden = set(result["plugin"]) - set(result["fused"])
    assert hidden == {"layer1", "layer5", "layer8", "layer10"}
    for name, histogram in result["fused"].items():
        np.testing.assert_array_equal(histogram.counts, result["plugin"][name].counts)


@pytest.mark.parametrize("kind", ["plain", "portable"])
def test_counts_are_those_of_running_the_whole_model(made: Made, portable: Path, images: list[Path], kind: str) -> None:
    path = made.plain if kind == "plain" else portable
    result = collect(path, images[:2])
    model, info = load_model(path)
    tensors = tensors_to_calibrate(model, info)
    assert list(result.histograms) == tensors
    for name in (tensors[0], tensors[1], tensors[len(tensors) // 2], info.heads[-1].tensor):
        expected = counted_by_hand(path, images[:2], name)
        actual = result.histograms[name]
        assert actual.count == expected.count
        assert actual.amax == pytest.approx(expected.amax, rel=1e-5)
        # sums are rounded differently where the optimizer fused other nodes, so a few values change bins
        for found_counts, expected_counts in ((actual.counts, expected.counts), (actual.weighted, expected.weighted)):
            difference = np.abs(np.cumsum(found_counts) - np.cumsum(expected_counts)).max()
            assert difference <= 0.002 * expected_counts.sum(), name


def test_image_tensor_is_the_preprocessed_image(portable: Path, made: Made, images: list[Path]) -> None:
    for path in (portable, made.plain):
        name = tensors_to_calibrate(*load_model(path))[0]
        result = collect(path, images[:3], tensors=[name])
        assert list(result.histograms) == [name]
        expected = counted_by_hand(path, images[:3], name)
        assert np.array_equal(result.histograms[name].counts, expected.counts)
        assert (result.histograms[name].minimum, result.histograms[name].maximum) == (expected.minimum, expected.maximum)
        assert list(result.images.values()) == [str(p) for p in images[:3]]


def test_a_model_for_several_images_counts_as_one_for_a_single_image(tmp_path: Path, made: Made, images: list[Path]) -> None:
    static = make(tmp_path, MADE_CFG, batch=(4, 4, 4))
    several, single = (collect(path, images) for path in (static.plain, made.plain))
    for name, histogram in single.histograms.items():
        assert several.histograms[name].count == histogram.count
        assert several.histograms[name].amax == pytest.approx(histogram.amax, rel=1e-5)


def test_shards_merge_to_the_whole_run_bit_for_bit(portable: Path, images: list[Path], whole: HistogramSet) -> None:
    last, first = (collect(portable, part) for part in (images[3:], images[:3]))
    last.merge([first])
    assert same_sets(last, whole)


def test_resumed_run_equals_one_without_a_break(portable: Path, images: list[Path], whole: HistogramSet) -> None:
    result = collect(portable, images, resume=collect(portable, images[:4]))
    assert same_sets(result, whole)
    assert same_sets(collect(portable, images, resume=result), whole)
    assert result.files == whole.files == {digest: Path(path) for digest, path in whole.images.items()}


def test_an_image_counts_once(tmp_path: Path, portable: Path, images: list[Path], whole: HistogramSet) -> None:
    copy = tmp_path / "copy.png"
    shutil.copy(images[0], copy)
    assert same_sets(collect(portable, [*images, copy, images[2]]), whole)


# --- what can happen on the way ---


class Saved:
    """What a run saves: the paths of the images that were counted by then."""

    def __init__(self) -> None:
        self.images: list[set[str]] = []

    def __call__(self, histograms: HistogramSet) -> None:
        self.images.append(set(histograms.images.values()))


def test_what_fails_on_the_way_leaves_what_was_saved_last(
    portable: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    monkeypatch.setattr(module, "_MOST_SAVING", 1e9)
    saved, merge, merges = Saved(), HistogramSet.merge, iter(range(5))

    def merge_or_die(self: HistogramSet, others: Any) -> None:
        if next(merges, None) is None:
            raise MemoryError
        merge(self, others)

    monkeypatch.setattr(HistogramSet, "merge", merge_or_die)
    with pytest.raises(MemoryError):
        collect(portable, images, save=saved, workers=Threads(1, 1))
    assert saved.images == [{str(path) for path in images[:count]} for count in (2, 4)]


def test_an_image_that_changes_while_it_is_counted_is_noticed(
    tmp_path: Path, portable: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [Path(shutil.copy(path, tmp_path)) for path in images[:3]]
    read = module.read_input
    monkeypatch.setattr(module, "read_input", lambda path, info: read(images[5] if path == paths[1] else path, info))
    with pytest.raises(DarktrtError, match=r"1\.png: is another file than it was at first; calibrate on files that do not"):
        collect(portable, paths)


@pytest.fixture
def corrupt(tmp_path: Path, images: list[Path]) -> Iterator[Path]:
    path = tmp_path / "corrupt.jpg"
    Image.open(images[0]).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    yield path


def test_unreadable_image_stops_the_run_and_is_named(tmp_path: Path, portable: Path, images: list[Path], corrupt: Path) -> None:
    for bad, message in (
        (corrupt, r"corrupt\.jpg: cannot be decoded"),
        (tmp_path / "none.jpg", r"none\.jpg: cannot read: No such"),
    ):
        saved = Saved()
        with pytest.raises(DarktrtError, match=f"{message}.* \\(skip such images, or mend this one and resume\\)") as raised:
            collect(portable, [*images[:2], bad, *images[2:]], save=saved, workers=Threads(1, 2))
        assert raised.value.argument == "skip_bad"
        assert {str(path) for path in images[:2]} <= saved.images[-1]


def test_unreadable_images_are_skipped_and_listed(
    tmp_path: Path, portable: Path, images: list[Path], corrupt: Path, whole: HistogramSet
) -> None:
    result = collect(portable, [corrupt, *images, tmp_path / "none.jpg"], skip_bad=True)
    assert same_sets(result, whole)
    assert {path: sentence.split(":")[0] for path, sentence in result.skipped.items()} == {
        str(path): str(path) for path in (corrupt, tmp_path / "none.jpg")
    }
    shutil.copy(images[0], tmp_path / "none.jpg")
    collect(portable, [tmp_path / "none.jpg"], resume=result)
    assert list(result.skipped) == [str(corrupt)]
    with pytest.raises(DarktrtError, match=r"none of the 1 images can be read; first: .*corrupt\.jpg"):
        collect(portable, [corrupt], skip_bad=True)
    with pytest.raises(DarktrtError, match="there are no images; name a folder"):
        collect(portable, [])


def test_progress_ends_at_its_total_whatever_is_left_out(
    tmp_path: Path, portable: Path, images: list[Path], corrupt: Path
) -> None:
    copy = tmp_path / "copy.png"
    shutil.copy(images[0], copy)
    steps: list[tuple[int, int | None]] = []
    set_progress(lambda _, done, total: steps.append((done, total)))
    try:
        collect(portable, [corrupt, images[0], copy, *images[1:3]], skip_bad=True, workers=Threads(1, 1))
    finally:
        set_progress(None)
    assert [done for done, _ in steps] == [0, 1, 2, 3]
    assert steps[-1] == (3, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activation_that_is_no_number_names_tensor_and_image(
    tmp_path: Path, portable: Path, images: list[Path], value: float
) -> None:
    model, info = load_model(portable)
    bias = next(i for i in model.graph.initializer if i.name.endswith("2.bias") or i.name.endswith("1.bias"))
    damaged = numpy_helper.to_array(bias).copy()
    damaged[0] = value
    bias.CopyFrom(numpy_helper.from_array(damaged, bias.name))
    save_model(model, info, tmp_path / "nan.onnx")
    saved = Saved()
    with pytest.raises(DarktrtError, match=r"tensor '.*' is NaN or infinite for .*0\.png; are the weights damaged"):
        collect(tmp_path / "nan.onnx", images, save=saved, workers=Threads(1))
    assert not saved.images


def test_wrong_models(tmp_path: Path, made: Made, portable: Path, images: list[Path], whole: HistogramSet) -> None:
    with pytest.raises(DarktrtError, match="is not the model of the calibration to resume"):
        collect(made.plain, images, resume=whole)
    with pytest.raises(DarktrtError, match="is of other tensors"):
        collect(portable, images, tensors=["layer0"], resume=whole)
    with pytest.raises(DarktrtError, match="'boxes' is no tensor between the image and the heads"):
        collect(portable, images, tensors=["layer0", "boxes"])
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(DarktrtError, match="is no ONNX file"):
        collect(tmp_path / "text.onnx", images)
    with pytest.raises(DarktrtError, match="No such file"):
        collect(tmp_path / "none.onnx", images)
    foreign, _ = load_model(made.plain)
    del foreign.metadata_props[:]
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    with pytest.raises(DarktrtError, match="has no darktrt metadata"):
        collect(tmp_path / "foreign.onnx", images)


# --- saving on the way, and the pass over a user's images ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of a convolution and a head, for many images."""
    return make(tmp_path_factory.mktemp("small"), net(16, 16) + conv(4, stride=8) + head()).plain


def many(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i:02}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((8, 8, 3), 3 * i, np.uint8)).save(path)
    return paths


def test_counts_are_saved_every_32_images_and_at_the_end(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))  # saving takes no time
    saved = Saved()
    collect(small, many(tmp_path / "in", 68), save=saved)  # groups of four, which may come in any order
    assert [len(images) for images in saved.images] == [32, 64, 68]


def test_saving_takes_no_more_than_a_twentieth_of_the_time(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a million images takes long to write."""
    saved = Saved()
    # the first one is asked for at 9 and takes from 10 to 12, so the next one is due at 52
    times = iter([9.0, 10.0, 12.0, 51.9, 52.0, 52.1, 52.2])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    saves = module._Saves(HistogramSet("model", images={"digest": "a.jpg"}), saved)
    counts = []
    for _ in range(3):
        saves.after(32)
        counts.append(len(saved.images))
    assert counts == [1, 1, 2]


@pytest.mark.parametrize(("count", "few"), [(15, True), (16, False)])
def test_a_warning_of_few_images(tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture, count: int, few: bool) -> None:
    many(tmp_path / "in", count)
    calibrate(small, [tmp_path / "in"], tmp_path / "a.calib", COUNTS)
    assert (f"{count} images are few to calibrate on" in caplog.text) is few


COUNTS = CalibrationOptions(bias_images=0, fp_layer_images=0)


def test_a_run_adds_to_an_earlier_one_only_where_it_resumes(tmp_path: Path, small: Path) -> None:
    paths = many(tmp_path / "in", 4)
    for images, resume, counted in (
        (paths[:2], True, paths[:2]),
        (paths[2:], True, paths),
        (paths[1:3], False, paths[1:3]),
        (paths[3:], False, paths[3:]),
    ):
        calibrate(small, images, tmp_path / "a.calib", replace(COUNTS, resume=resume))
        result = read_calibration(tmp_path / "a.calib").histograms
        assert list(result.images.values()) == list(map(str, counted))
        assert same_sets(result, collect(small, counted))


def test_a_random_sample_depends_on_the_seed(tmp_path: Path, small: Path) -> None:
    many(tmp_path / "in", 12)
    samples = []
    for seed in (0, 0, 1):
        calibrate(small, [tmp_path / "in"], tmp_path / "a.calib", replace(COUNTS, limit=5, seed=seed))
        samples.append(list(read_calibration(tmp_path / "a.calib").histograms.images))
    assert samples[0] == samples[1] != samples[2]
    assert [len(sample) for sample in samples] == [5, 5, 5]


def test_an_output_that_is_one_of_the_inputs_is_refused(tmp_path: Path, small: Path) -> None:
    paths = many(tmp_path / "in", 2)
    before = paths[1].read_bytes()
    model = shutil.copy(small, tmp_path / "b.calib.partial")
    for network, output, named in ((small, paths[1], r"01\.png"), (model, tmp_path / "b.calib", r"b\.calib\.partial")):
        with pytest.raises(DarktrtError, match=f"{named}: is given twice and would be overwritten"):
            calibrate(network, [tmp_path / "in"], output, COUNTS)
    assert paths[1].read_bytes() == before


# --- channel means ---


def test_channel_means_are_those_of_running_the_whole_model(made: Made, portable: Path, images: list[Path]) -> None:
    """For every tensor that a convolution reads, over all images that can be read."""
    model, _ = load_model(made.plain)
    names = {node.input[0] for node in model.graph.node if node.op_type == "Conv"} - {"images"}
    ranges = {name: Range(np.float32(0.02), 6) for name in names}
    broken = images[0].parent / "broken.png"
    broken.write_bytes(b"no image")
    measured = measure_channel_means(portable, [images[0], broken, images[1]], ranges)
    assert measured.images == {sha256_of(path) for path in images[:2]}
    result = measured.channel_means(ranges)
    assert set(result) == names
    broken.unlink()
    stacked = np.stack(
        [preprocess(read_image(p), made.info.width, made.info.height, 3, "stretch", "float")[0] for p in images[:2]]
    )
    name = sorted(names)[0]
    values = run(with_outputs(model, [name]), {"images": np.rint(stacked * 255).astype(np.float32) / 255})[name]
    np.testing.assert_allclose(result[name].mean, values.mean((0, 2, 3)), atol=1e-5)
    steps = np.clip(np.rint(values / np.float32(0.02)), -128, 127) * np.float32(0.02)
    np.testing.assert_allclose(result[name].quantized, steps.mean((0, 2, 3)), atol=1e-4)
    assert not measure_channel_means(portable, [broken], ranges).channel_means(ranges)
