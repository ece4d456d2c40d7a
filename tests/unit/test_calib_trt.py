"""TensorRT's calibrator, with stand-ins for TensorRT and the driver: its tables and batches, and how failures surface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import DataType, FakeDriver, FakeTensorRT, Network, Tensor
from helpers import Made, made_image
from PIL import Image

from darktrt.calib.table import CalibrationTable
from darktrt.calib.trt_calibrator import BatchSource, Source, TableSource, calibrator, image_source, network_inputs
from darktrt.cuda import DeviceMemory
from darktrt.errors import DarktrtError

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """In the place of libcuda; TensorRT's context is current."""
    result = FakeDriver(current=5)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": result}[name])
    return result


def network(**inputs: tuple[tuple[int, ...], str]) -> Network:
    made = Network()
    made.inputs += [Tensor(name=name, shape=shape, dtype=DataType[kind]) for name, (shape, kind) in inputs.items()]
    return made


NETWORK = network(images=((-1, 3, 4, 5), "FLOAT"), score_threshold=((1,), "FLOAT"))


def batch(seed: int = 0, size: int = 2) -> Arrays:
    values = np.random.default_rng(seed).random((size, 3, 4, 5), np.float32)
    return {"score_threshold": np.array([0.1], np.float32), "images": values}


def build(source: Source, trt: FakeTensorRT, model: Network = NETWORK, failed: Event | None = None) -> bytes | None:
    """As a user's code would; the stand-in swallows what callbacks raise, as TensorRT does."""
    config = trt.config
    with calibrator(trt, source, model, failed) as config.int8_calibrator:
        return trt.build(model, config)


# --- serving ---

TABLE = CalibrationTable({"images": np.float32(1 / 127), "y": np.float32(0.25)}, "8600")


def test_a_table_is_read_and_no_batch_is_asked_for() -> None:
    trt = FakeTensorRT("8.6.0")
    assert build(TableSource(TABLE), trt) == b"plan"
    assert trt.events == ["read"]


def test_the_text_of_the_table_stays_where_it_is() -> None:
    """TensorRT keeps a pointer into it."""
    source = TableSource(TABLE, batch=4)
    assert source.read_cache() == TABLE.text().encode()
    assert source.read_cache() is source.read_cache()
    assert source.batch == 4


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
def test_a_table_that_tensorrt_refuses_fails_the_build(version: str) -> None:
    trt = FakeTensorRT(version)
    trt.takes_caches = False
    with pytest.raises(DarktrtError, match=r"does not accept the calibration cache \('TRT-8600-EntropyCalibration2'\)"):
        build(TableSource(TABLE), trt)


# --- feeding ---


@pytest.mark.parametrize("context", [0, 5])
def test_every_batch_reaches_the_gpu(driver: FakeDriver, context: int, tmp_path: Path) -> None:
    driver.contexts = [context] if context else []
    given = [batch(seed) for seed in range(3)]
    trt = FakeTensorRT("8.6.0")
    with BatchSource((one for one in given), batch=2) as source:
        assert build(source, trt) == b"plan"
        assert sum(map(len, driver.buffers.values())) == 2 * 60 * 4 + 4
        assert driver.retained == (0 if context else 1)
    assert trt.events == ["read", "size", *["get"] * 4, "write"]
    assert driver.uploads == [one[name].tobytes() for one in given for name in ("images", "score_threshold")]
    assert len(set(map(tuple, trt.fed))) == 1
    assert driver.unsynchronized == 0
    assert source.count == 3
    assert source.cache == b"TRT-8600-EntropyCalibration2\nimages: 3c010a14\ny: 3d5c11b5\n"
    source.table().save(tmp_path / "a.cache")
    assert (tmp_path / "a.cache").read_bytes() == source.cache
    assert (driver.buffers, driver.retained) == ({}, 0)
    assert driver.contexts == ([context] if context else [])


def test_arrays_that_lie_otherwise_in_memory_are_copied_right(driver: FakeDriver) -> None:
    whole = np.arange(240, dtype=np.float32).reshape(2, 4, 5, 6)[..., ::2].transpose(0, 3, 1, 2)
    with BatchSource([{"images": whole}], batch=2) as source:
        build(source, FakeTensorRT("10.3.0"), network(images=((2, 3, 4, 5), "FLOAT")))
    assert driver.uploads == [whole.tobytes()]


def test_bytes_can_be_fed(driver: FakeDriver) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    with BatchSource([{"images": pixels}], batch=1) as source:
        build(source, FakeTensorRT("8.6.1"), network(images=((1, 2, 4, 3), "UINT8")))
    assert driver.uploads == [pixels.tobytes()]


def fails_after(count: int, error: Callable[[], BaseException]) -> Iterator[Arrays]:
    yield from (batch(seed) for seed in range(count))
    raise error()


def changed(**arrays: Any) -> list[Arrays]:
    """Two good batches, and a third with these arrays."""
    return [batch(0), batch(1), {name: value for name, value in {**batch(2), **arrays}.items() if value is not None}]


NAN = np.full((2, 3, 4, 5), np.nan, np.float32)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no batch": (list, "there is no batch of images to calibrate on"),
    "short last batch": (
        lambda: [batch(0), batch(1), batch(2, size=1)],
        "calibration batch 3: 'images' is (1, 3, 4, 5) float32, not (2, 3, 4, 5) float32; the images must fill their "
        "batches of 2",
    ),
    "long batch": (lambda: changed(images=batch(0, 3)["images"]), "'images' is (3, 3, 4, 5) float32, not (2, 3, 4, 5) float32"),
    "other layout": (lambda: changed(images=np.zeros((2, 4, 5, 3), np.float32)), "'images' is (2, 4, 5, 3) float32, not"),
    "other type": (lambda: changed(images=batch()["images"].astype(np.float64)), "'images' is (2, 3, 4, 5) float64, not"),
    "bytes": (lambda: changed(images=np.zeros((2, 3, 4, 5), np.uint8)), "'images' is (2, 3, 4, 5) uint8, not"),
    "no dimension": (lambda: changed(score_threshold=np.float32(0.5)), "'score_threshold' is () float32, not (1,) float32"),
    "input missing": (
        lambda: changed(score_threshold=None),
        "calibration batch 3 lacks 'score_threshold'; the inputs of the network are images, score_threshold",
    ),
    "input unknown": (
        lambda: changed(image_size=NAN),
        "calibration batch 3 has 'image_size'; the inputs of the network are ",
    ),
    "NaN": (lambda: changed(images=NAN), "calibration batch 3: 'images' has values that are NaN or infinite"),
    "unreadable image": (lambda: fails_after(2, lambda: DarktrtError("a.jpg: is empty")), "a.jpg: is empty"),
    "first image": (lambda: fails_after(0, lambda: DarktrtError("a.jpg: is empty")), "a.jpg: is empty"),
    "bug": (
        lambda: fails_after(2, lambda: ZeroDivisionError("by 0")),
        "calibration batch 3 cannot be read: ZeroDivisionError('by 0')",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_failure_in_a_callback_fails_the_build(driver: FakeDriver, name: str) -> None:
    make, said = BAD[name]
    failed, trt = Event(), FakeTensorRT("8.6.0")
    with pytest.raises(DarktrtError) as caught, BatchSource(make(), batch=2) as source:
        build(source, trt, failed=failed)
    assert said in str(caught.value)
    assert failed.is_set()
    assert "swallowed" not in trt.events
    assert len(trt.fed) == (0 if name in ("no batch", "first image") else 2)
    assert (driver.buffers, driver.contexts) == ({}, [5])


def test_after_a_failure_nothing_more_is_read(driver: FakeDriver) -> None:
    """A generator is not asked again after a bad batch: TensorRT would calibrate on the rest."""
    answers, trt = [], FakeTensorRT("8.6.0")
    with pytest.raises(DarktrtError, match="batch 2"), BatchSource([batch(), {}, batch(), batch()], batch=2) as source:
        with calibrator(trt, source, NETWORK) as adapter:
            answers += [adapter.get_batch(["images", "score_threshold"]) for _ in range(4)]
            answers.append(adapter.read_calibration_cache())
            adapter.write_calibration_cache(b"half a truth")
    assert [answer is None for answer in answers] == [False, True, True, True, True]
    assert source.cache == b""


def test_ctrl_c_in_a_callback_comes_out(driver: FakeDriver) -> None:
    with pytest.raises(KeyboardInterrupt), BatchSource(fails_after(1, KeyboardInterrupt), batch=2) as source:
        build(source, FakeTensorRT("8.6.0"))
    assert driver.buffers == {}


def test_the_first_failure_is_the_one_that_is_raised(driver: FakeDriver) -> None:
    """Not "TensorRT cannot build the engine", which is what follows from it."""
    with pytest.raises(DarktrtError, match="there is no batch"), BatchSource([], batch=2) as source:
        if build(source, FakeTensorRT("8.6.0")) is None:
            raise DarktrtError("TensorRT cannot build the engine")


def test_without_calibration_there_is_no_table(driver: FakeDriver) -> None:
    with BatchSource([batch()], batch=2) as source, pytest.raises(DarktrtError, match="has written no calibration cache"):
        source.table()


def test_an_open_dimension_is_the_batch() -> None:
    result = network_inputs(network(images=((-1, 4, 5, 3), "UINT8"), iou_threshold=((1,), "FLOAT"), n=((2,), "INT64")), 7)
    assert {name: (one.shape, one.dtype.name) for name, one in result.items()} == {
        "images": ((7, 4, 5, 3), "uint8"),
        "iou_threshold": ((1,), "float32"),
        "n": ((2,), "int64"),
    }


# --- GPU memory ---


def test_memory_goes_there_and_back(driver: FakeDriver) -> None:
    memory, values = DeviceMemory(), np.arange(6, dtype=np.float32)
    address = memory.upload("a", values)
    assert memory.reserve("a", 24) == address
    result = np.empty((2, 3), np.float32)
    memory.download("a", result)
    np.testing.assert_array_equal(result.ravel(), values)
    with pytest.raises(ValueError, match="has 24 bytes; 28 do not fit"):
        memory.download("a", np.empty(7, np.float32))
    memory.upload("a", np.zeros(3, np.float64))
    memory.upload("a", np.zeros(4, np.float64))  # of another size: replaces the old one
    assert list(map(len, driver.buffers.values())) == [32]
    memory.free()
    memory.free()
    assert (driver.buffers, driver.retained, driver.contexts) == ({}, 0, [5])


def test_a_full_gpu_is_reported_and_nothing_leaks(driver: FakeDriver) -> None:
    driver.memory, driver.contexts = 100, []
    with pytest.raises(DarktrtError, match=r"CUDA: cuMemAlloc_v2 fails: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        with BatchSource([batch()], batch=2) as source:
            build(source, FakeTensorRT("8.6.0"))
    assert (driver.buffers, driver.retained, driver.contexts) == ({}, 0, [])


def test_a_machine_without_a_driver_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DarktrtError, match=r"needs NVIDIA's driver \(libcuda"), BatchSource([batch()], batch=2) as source:
        build(source, FakeTensorRT("8.6.0"))


# --- batches of image files ---


def test_batches_of_images_are_all_inputs_of_the_model(made: Made, folder: Path) -> None:
    """One image at a time where the batch is open; a static one is filled up; thresholds only where they are inputs."""
    images = [folder / f"{i}.png" for i in range(4)]
    for i, path in enumerate(images):
        Image.fromarray(made_image(64, 96, seed=i)).save(path)
    info = replace(made.info, head="nms", input="uint8", batch=(1, 8, 8))
    fed = list(image_source(images, info)._batches)
    assert [one["images"].shape for one in fed] == [(1, 64, 96, 3)] * 4
    assert set(fed[0]) == {"images", "score_threshold", "iou_threshold"}
    static = image_source(images, replace(info, batch=(3, 3, 3), fixed_thresholds=(0.25, 0.45)))
    (first, second) = static._batches
    assert static.batch == 3
    assert set(first) == {"images"}
    assert np.array_equal(second["images"], np.concatenate([fed[i]["images"] for i in (3, 0, 1)]))
    letterboxed = replace(info, resize="letterbox", nms=replace(info.nms, kind="diounms"))
    assert next(image_source(images, letterboxed)._batches)["image_size"].tolist() == [[96, 64]]
