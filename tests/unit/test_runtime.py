"""Running a plan: buffers, batches, CUDA graphs, and what is refused, with stand-ins for TensorRT and the driver."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from fake_tensorrt import Base, DataType, FakeDriver
from helpers import Made
from PIL import Image

from darktrt import __version__
from darktrt.cli import main
from darktrt.cuda import DeviceImage, host_pixels
from darktrt.engine import bench, runtime
from darktrt.engine.bench import bench_files, measure, to_markdown
from darktrt.engine.layer_list import EngineLayer
from darktrt.engine.manifest import Manifest, manifest_path
from darktrt.engine.profile import profile
from darktrt.engine.runtime import PlanRunner, polygraphy_runner
from darktrt.engine.target import Target
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import DetectorInfo
from darktrt.progress import set_progress
from darktrt.vision.images import preprocess

Mode: Any = SimpleNamespace(INPUT="in", OUTPUT="out")


class Streams(FakeDriver):
    """A driver with streams, which run what is enqueued at once, but keep it while a graph is recorded."""

    def __init__(self) -> None:
        super().__init__(memory=1 << 24)
        self.host: dict[int, Any] = {}
        self.recorded: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.streams = self.replays = self.events = 0
        self.synchronized = True

    def enqueue(self, work: Callable[[], object]) -> int:
        assert self.contexts
        self.synchronized = False
        work() if self.recorded is None else self.recorded.append(work)
        return 0

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:  # noqa: N802
        assert flags.value == 1, "a stream that waits for the default stream"
        stream._obj.value = 7
        self.streams += 1
        return 0

    def cuStreamDestroy_v2(self, _: Any) -> int:  # noqa: N802
        self.streams -= 1
        return 0

    def cuStreamSynchronize(self, _: Any) -> int:  # noqa: N802
        assert self.recorded is None
        self.synchronized = True
        return 0

    def cuMemHostAlloc(self, address: Any, size: Any, _: Any) -> int:  # noqa: N802
        memory = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(memory)
        self.host[ctypes.addressof(memory)] = memory
        return 0

    def cuMemFreeHost(self, address: Any) -> int:  # noqa: N802
        del self.host[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, address: Any, source: Any, size: Any, _: Any) -> int:  # noqa: N802
        def copy() -> None:
            self.region(address.value, size.value)[:] = ctypes.string_at(source.value, size.value)

        return self.enqueue(copy)

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, _: Any) -> int:  # noqa: N802
        def copy() -> None:
            self.region(target.value, size.value)[:] = bytes(self.region(source.value, size.value))

        return self.enqueue(copy)

    def cuMemcpyDtoHAsync_v2(self, target: Any, address: Any, size: Any, _: Any) -> int:  # noqa: N802
        return self.enqueue(lambda: ctypes.memmove(target.value, bytes(self.buffers[address.value][: size.value]), size.value))

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:  # noqa: N802
        self.recorded = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802
        assert self.recorded is not None
        graph._obj.value = len(self.graphs) + 1
        self.graphs[graph._obj.value] = self.recorded
        self.recorded = None
        return 0

    def cuGraphInstantiateWithFlags(self, made: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        made._obj.value = graph.value
        return 0

    def cuGraphDestroy(self, _: Any) -> int:  # noqa: N802
        return 0

    def cuGraphExecDestroy(self, graph: Any) -> int:  # noqa: N802
        self.graphs[graph.value] = []
        return 0

    def cuGraphLaunch(self, graph: Any, _: Any) -> int:  # noqa: N802
        self.replays += 1
        for work in self.graphs[graph.value]:
            work()
        return 0

    def cuEventCreate(self, event: Any, _: Any) -> int:  # noqa: N802
        self.events += 1
        event._obj.value = 9
        return 0

    def cuEventRecord(self, event: Any, _: Any) -> int:  # noqa: N802
        return 0

    def cuEventSynchronize(self, _: Any) -> int:  # noqa: N802
        assert self.recorded is None
        self.synchronized = True
        return 0

    def cuStreamWaitEvent(self, *_: Any) -> int:  # noqa: N802
        assert self.recorded is None
        return 0

    def cuEventElapsedTime(self, milliseconds: Any, *_: Any) -> int:  # noqa: N802
        assert self.synchronized
        milliseconds._obj.value = 0.5
        return 0

    def cuEventDestroy_v2(self, _: Any) -> int:  # noqa: N802
        self.events -= 1
        return 0


class Engine:
    """Mean of every image, as the only output ``boxes``; a batch of 1 to 3."""

    tensors: ClassVar[dict[str, Any]] = {"images": ("in", (-1, 3, 64, 96), "FLOAT"), "boxes": ("out", (-1, 1), "FLOAT")}

    def __init__(self, driver: Streams) -> None:
        self.driver = driver
        self.addresses: dict[str, int] = {}
        self.batch = 0
        self.shape: tuple[int, ...] = ()
        self.works = True
        self.host_code_allowed = False
        self.profiler: Any = None

    num_io_tensors = property(lambda self: len(self.tensors))

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[1 - i]

    def get_tensor_mode(self, name: str) -> str:
        return self.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = self.tensors[name][1]
        return tuple(self.shape[i] if size < 0 and self.shape else size for i, size in enumerate(sizes))

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[self.tensors[name][2]]

    def get_tensor_profile_shape(self, name: str, _: int) -> list[tuple[int, ...]]:
        return [(batch, 3, 64, 96) for batch in (1, 2, 3)]

    def create_execution_context(self) -> Any:
        context = Engine(self.driver)
        context.addresses, context.engine = self.addresses, self  # type: ignore[attr-defined]
        return context

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch, self.shape = shape[0], shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        batch, shape, addresses = self.batch, self.shape, dict(self.addresses)

        def work() -> None:
            dtype = {"FLOAT": np.float32, "UINT8": np.uint8}[self.tensors["images"][2]]
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            images = np.frombuffer(bytes(self.driver.region(addresses["images"], size)), dtype)
            means = images.reshape(batch, -1).mean(1).astype(np.float32)
            self.driver.region(addresses["boxes"], 4 * batch)[:] = means.tobytes()

        self.driver.enqueue(work)
        for name, ms in (("conv", 0.25), ("reformat", 0.5), ("conv", 0.25)) if self.profiler else ():
            self.profiler.report_layer_time(name, ms)
        return self.engine.works  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": found}[name])
    return found


@pytest.fixture
def engine(driver: Streams, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine of every plan; TensorRT 10.3 on a GPU."""
    made = Engine(driver)

    def new_runtime(_: object) -> Any:
        def load(plan: bytes) -> Engine | None:
            made.host_code_allowed = getattr(new, "engine_host_code_allowed", False)
            return made if plan == b"plan" else None

        new = SimpleNamespace(deserialize_cuda_engine=load)
        return new

    trt = SimpleNamespace(
        TensorIOMode=Mode,
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda *_: None}),
        IProfiler=Base,
        Runtime=new_runtime,
    )
    target = Target("trt", (10, 3, 0))
    monkeypatch.setattr(Target, "load", lambda _: trt)
    monkeypatch.setattr(runtime, "find_target", lambda _: target)
    monkeypatch.setattr(runtime, "first_gpu", lambda: ("NVIDIA H200", 90))
    return made


@pytest.fixture
def info(made: Made) -> DetectorInfo:
    return replace(made.info, head="decode", input="float")


def write_plan(folder: Path, info: DetectorInfo, content: bytes = b"plan", **changes: Any) -> Path:
    plan = folder / "net.plan"
    plan.write_bytes(content)
    fixed: dict[str, Any] = {"target": "TensorRT 10.3.0", "gpu": "NVIDIA H200", "plugins": (), **changes}
    manifest = Manifest(sha256_of(plan), "0" * 64, precision="fp16", build_seconds=1.0, info=info, **fixed)
    manifest_path(plan).write_text(manifest.to_json())
    return plan


class FitLibrary:
    """``darktrt_fit`` and ``darktrt_upload`` of a plugin library, in NumPy."""

    def __init__(self, driver: Streams) -> None:
        self.driver = driver
        self.launches: list[int] = []
        self.uploads: list[int] = []

    def darktrt_upload(self, count: Any, copies: Any, threads: Any, stream: Any) -> int:
        assert 1 <= threads.value <= min(6, len(os.sched_getaffinity(0))) and stream.value == 7
        self.uploads.append(count.value)
        for copy in copies[: count.value]:
            ctypes.memmove(copy.pinned, copy.source, copy.bytes)
            self.driver.region(copy.target, copy.bytes)[:] = ctypes.string_at(copy.pinned, copy.bytes)
        return 0

    def darktrt_fit(self, fit: Any, count: Any, array: Any, pixel_type: Any, target: Any, kind: Any, stream: Any) -> int:
        assert pixel_type.value == 3 and stream.value == 7
        self.launches.append(count.value)
        form: Any = {0: "float", 3: "uint8"}[kind.value]
        policy: Any = "letterbox" if fit.letterbox else "stretch"
        fitted = []
        for image in array[: count.value]:
            pixels = np.frombuffer(self.driver.region(image.pixels, image.width * image.height * 3), np.uint8)
            rgb = pixels.reshape(image.height, image.width, 3)
            fitted.append(preprocess(rgb, fit.width, fit.height, fit.channels, policy, form)[0].tobytes())
        self.driver.region(target.value, len(b"".join(fitted)))[:] = b"".join(fitted)
        return 0


@pytest.fixture
def fit_library(driver: Streams, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FitLibrary:
    """A plugin library, in use for every plan."""
    library, path = FitLibrary(driver), tmp_path / "libdarktrt_plugins.so"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver, str(path.resolve()): library}[name])
    monkeypatch.setattr(runtime, "find_library", lambda *_: path)
    monkeypatch.setattr(runtime, "load_plugins", lambda *_: SimpleNamespace(plugins=("YoloDetectPlugin:1",)))
    return library


def frame(width: int, height: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def images(batch: int, seed: int = 0) -> dict[str, Any]:
    return {"images": np.random.default_rng(seed).random((batch, 3, 64, 96), np.float32)}


@pytest.mark.parametrize("graph", [False, True])
def test_batches_of_any_size_outputs_their_own_results(
    engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path, graph: bool
) -> None:
    with PlanRunner(write_plan(tmp_path, info), cuda_graph=graph) as runner:
        for seed, batch in enumerate((3, 1, 1, 2, 2, 2, 3, 3)):
            inputs = images(batch, seed)
            outputs = runner.run(inputs)
            np.testing.assert_allclose(outputs["boxes"], inputs["images"].mean((1, 2, 3))[:, None], rtol=1e-5)
    assert driver.replays == (2 if graph else 0)  # from the third run of each batch on


def test_nothing_is_allocated_after_the_start_and_all_is_freed(
    engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path
) -> None:
    with PlanRunner(write_plan(tmp_path, info), cuda_graph=True) as runner:
        before = len(driver.buffers), len(driver.host)
        for batch in (1, 3, 2):
            runner.run(images(batch))
        assert (len(driver.buffers), len(driver.host)) == before == (2, 2)
    assert (driver.buffers, driver.host, driver.streams, driver.retained) == ({}, {}, 0, 0)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("policy", ["stretch", "letterbox"])
def test_frames_of_any_size_are_fitted_on_the_gpu(
    fit_library: FitLibrary, driver: Streams, info: DetectorInfo, tmp_path: Path, graph: bool, policy: Any
) -> None:
    """The engine's input is that of preprocess, and batches of other frames come in between."""
    info = replace(info, resize=policy)
    expected: list[Any] = []
    with PlanRunner(write_plan(tmp_path, info), cuda_graph=graph) as runner:
        assert runner.fits_frames
        for seed, sizes in enumerate([[(7, 5)], [(200, 100), (1, 1)], [(640, 480)], [(33, 70)], [(64, 96), (9, 9)]] * 3):
            frames = [frame(*size, seed) for size in sizes]
            fitted = [preprocess(image, 96, 64, 3, policy, "float")[0].mean() for image in frames]
            runner.submit(frames, {})
            expected.append(fitted)
            if len(expected) == runner.depth:
                np.testing.assert_allclose(runner.collect()["boxes"][:, 0], expected.pop(0), rtol=1e-5)
        for fitted in expected:
            np.testing.assert_allclose(runner.collect()["boxes"][:, 0], fitted, rtol=1e-5)
    assert fit_library.launches == [1, 2, 1, 1, 2] * 3  # one for each batch
    assert bool(driver.replays) == graph
    assert (driver.buffers, driver.host, driver.streams, driver.events, driver.retained) == ({}, {}, 0, 0, 0)


def test_frames_on_the_gpu_are_not_uploaded(
    fit_library: FitLibrary, driver: Streams, info: DetectorInfo, tmp_path: Path
) -> None:
    pixels, other = frame(50, 40), frame(10, 20, 1)
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        address = runner._buffer(pixels.size).address
        driver.region(address, pixels.size)[:] = pixels.tobytes()
        image = DeviceImage(address, 50, 40, None)
        np.testing.assert_array_equal(host_pixels(image), pixels)
        runner.submit([image, other], {})
        fitted = [preprocess(one, 96, 64, 3, "stretch", "float")[0].mean() for one in (pixels, other)]
        np.testing.assert_allclose(runner.collect()["boxes"][:, 0], fitted, rtol=1e-5)
        (staged,) = (slot.frames.size for slot in runner._free)
        assert staged == other.size


def test_memory_of_frames_on_the_gpu_lives_until_their_batch_is_done(
    fit_library: FitLibrary, driver: Streams, info: DetectorInfo, tmp_path: Path
) -> None:
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        runner.submit([DeviceImage(runner._buffer(50 * 40 * 3).address, 50, 40, owner)], {})
        del owner
        gc.collect()
        assert alive()
        runner.collect()
        gc.collect()
        assert not alive()


def test_more_batches_than_the_runner_holds(engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path) -> None:
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        for seed in range(runner.depth):
            runner.submit(images(1, seed)["images"], {})
        with pytest.raises(RuntimeError, match="3 batches are under way"):
            runner.submit(images(1)["images"], {})
        for seed in range(runner.depth):
            expected = images(1, seed)["images"].mean((1, 2, 3))
            np.testing.assert_allclose(runner.collect()["boxes"][:, 0], expected, rtol=1e-5)
        assert len(driver.buffers) == 2 * runner.depth


@pytest.fixture
def any_size(engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan for images of 8x8 to 200x100, up to three of one size."""
    monkeypatch.setattr(Engine, "tensors", {"images": ("in", (-1, -1, -1, 3), "UINT8"), "boxes": ("out", (-1, 1), "FLOAT")})
    monkeypatch.setattr(Engine, "get_tensor_profile_shape", lambda *_: [(1, 8, 8, 3), (1, 8, 8, 3), (3, 100, 200, 3)])
    return write_plan(tmp_path, replace(info, head="nms", input="image", image_sizes=((8, 8), (8, 8), (200, 100))))


def test_an_engine_that_takes_images_of_any_size(fit_library: FitLibrary, driver: Streams, any_size: Path) -> None:
    """Its images are uploaded as they are, and its memory and graphs follow their sizes."""
    with PlanRunner(any_size, cuda_graph=True) as runner:
        for seed in range(210):
            width = 8 + seed // 3
            frames = [frame(width, 10, seed), frame(width, 10, seed + 1)]
            runner.submit(frames, {})
            np.testing.assert_allclose(runner.collect()["boxes"][:, 0], [one.mean() for one in frames], rtol=1e-5)
        stacked = np.stack(frames)
        np.testing.assert_allclose(runner.run({"images": stacked})["boxes"][:, 0], stacked.mean((1, 2, 3)), rtol=1e-5)
        assert driver.replays == 70
        for size, said in (((201, 10), r"\(1, 10, 201, 3\); .* images of 8x8 to 200x100"), ((9, 101), r"\(1, 101, 9, 3\)")):
            with pytest.raises(DarktrtError, match=said):
                runner.submit([frame(*size)], {})
        with pytest.raises(DarktrtError, match="the images of a batch must be of one size"):
            runner.submit([frame(10, 10), frame(10, 11)], {})
    assert fit_library.launches == [] and len(fit_library.uploads) == 210


def test_graphs_of_the_sizes_that_came_last_are_kept(fit_library: FitLibrary, driver: Streams, any_size: Path) -> None:
    """64 of them; an older size is recorded anew."""
    with PlanRunner(any_size, cuda_graph=True) as runner:

        def replays(width: int) -> bool:
            before, image = driver.replays, frame(width, 10, width)
            runner.submit([image], {})
            np.testing.assert_allclose(runner.collect()["boxes"][:, 0], [image.mean()], rtol=1e-5)
            return driver.replays > before

        widths = range(100, 29, -1)  # the largest first, so that no memory grows
        for width in widths:
            assert [replays(width) for _ in range(3)] == [False, False, True]
        assert sum(map(bool, driver.graphs.values())) == 64
        assert all(replays(width) for width in widths[-64:])
        assert not replays(widths[-65])


def test_images_of_the_gpu_and_of_the_host_in_one_batch(
    fit_library: FitLibrary, driver: Streams, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes to its own place in the input of an engine that takes images of any size, whatever their order."""
    monkeypatch.setattr(Engine, "tensors", {"images": ("in", (-1, -1, -1, 3), "UINT8"), "boxes": ("out", (-1, 1), "FLOAT")})
    monkeypatch.setattr(Engine, "get_tensor_profile_shape", lambda *_: [(1, 8, 8, 3), (1, 8, 8, 3), (3, 100, 200, 3)])
    info = replace(info, head="nms", input="image", image_sizes=((8, 8), (8, 8), (200, 100)))
    frames = [np.full((10, 20, 3), level, np.uint8) for level in (10, 20, 30)]
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        address = runner._buffer(frames[0].size).address
        for on_gpu in range(3):
            driver.region(address, frames[0].size)[:] = frames[on_gpu].tobytes()
            mixed = [DeviceImage(address, 20, 10, None) if i == on_gpu else image for i, image in enumerate(frames)]
            runner.submit(mixed, {})
            assert runner.collect()["boxes"][:, 0].tolist() == [10, 20, 30]


def test_an_engine_without_the_plugin_library_takes_images_too(
    engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT for RTX has no plugins; one thread copies."""
    monkeypatch.setattr(Engine, "tensors", {"images": ("in", (-1, -1, -1, 3), "UINT8"), "boxes": ("out", (-1, 1), "FLOAT")})
    monkeypatch.setattr(Engine, "get_tensor_profile_shape", lambda *_: [(1, 8, 8, 3), (1, 8, 8, 3), (3, 100, 200, 3)])
    monkeypatch.setattr(runtime, "find_library", lambda *_: None)
    info = replace(info, head="nms", input="image", image_sizes=((8, 8), (8, 8), (200, 100)))
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        frames = [frame(30, 20), frame(30, 20, 1)[:, ::-1]]
        runner.submit(frames, {})
        np.testing.assert_allclose(runner.collect()["boxes"][:, 0], [one.mean() for one in frames], rtol=1e-5)


class Thresholded(Engine):
    """The mean of every image plus the input ``threshold``, of one number whatever the batch."""

    tensors: ClassVar[dict[str, Any]] = {**Engine.tensors, "threshold": ("in", (1,), "FLOAT")}

    def execute_async_v3(self, stream: int) -> bool:
        done = super().execute_async_v3(stream)
        batch, addresses = self.batch, dict(self.addresses)

        def add() -> None:
            boxes = self.driver.region(addresses["boxes"], 4 * batch)
            threshold = np.frombuffer(bytes(self.driver.region(addresses["threshold"], 4)), np.float32)
            boxes[:] = (np.frombuffer(bytes(boxes), np.float32) + threshold).tobytes()

        self.driver.enqueue(add)
        return done


@pytest.fixture
def thresholded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def context(made: Engine) -> Any:
        context: Any = Thresholded(made.driver)
        context.addresses, context.engine = made.addresses, made
        return context

    monkeypatch.setattr(Engine, "create_execution_context", context)
    monkeypatch.setattr(Engine, "tensors", Thresholded.tensors)


@pytest.mark.parametrize("graph", [False, True])
def test_other_inputs_go_with_their_batch(
    thresholded: None, fit_library: FitLibrary, info: DetectorInfo, tmp_path: Path, graph: bool
) -> None:
    """Whether the images are an array or frames, and though the batches overlap."""
    frames = [frame(96, 64), frame(30, 20)]
    fitted = np.array([preprocess(one, 96, 64, 3, "stretch", "float")[0].mean() for one in frames])
    with PlanRunner(write_plan(tmp_path, info), cuda_graph=graph) as runner:
        assert set(runner.inputs) == {"images", "threshold"} and runner.inputs["threshold"][0] == (1,)
        for turn in range(0, 9, 3):
            given = [np.full(1, turn + i, np.float32) for i in range(3)]
            array = images(2, turn)
            runner.submit(frames, {"threshold": given[0]})
            runner.submit(array["images"], {"threshold": given[1]})
            runner.submit(frames[::-1], {"threshold": given[2]})
            for number, means in zip(given, (fitted, array["images"].mean((1, 2, 3)), fitted[::-1]), strict=True):
                np.testing.assert_allclose(runner.collect()["boxes"][:, 0], means + number, rtol=1e-5)
        with pytest.raises(
            DarktrtError, match=r"input 'threshold' is missing; the engine accepts float32 \(1,\), batch 1 to 3"
        ):
            runner.submit(frames, {})
        for wrong, said in ((np.zeros(2, np.float32), r"float32 \(2,\)"), (np.zeros(1), r"float64 \(1,\)")):
            with pytest.raises(DarktrtError, match=rf"input 'threshold' is {said}; the engine accepts float32 \(1,\)"):
                runner.run({**images(2), "threshold": wrong})


def test_an_engine_of_one_batch_says_so(
    engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "tensors", {"images": ("in", (2, 3, 64, 96), "FLOAT"), "boxes": ("out", (2, 1), "FLOAT")})
    monkeypatch.setattr(Engine, "execute_async_v3", lambda *_: True)
    with PlanRunner(write_plan(tmp_path, replace(info, batch=(2, 2, 2)))) as runner:
        assert runner.run(images(2))["boxes"].shape == (2, 1)
        for batch in (1, 3):
            with pytest.raises(DarktrtError, match=rf"is float32 \({batch}, 3, 64, 96\); .* \(2, 3, 64, 96\), batch 2$"):
                runner.run(images(batch))


def test_images_that_are_in_the_pinned_memory_already(
    engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path
) -> None:
    """No graph is recorded where none was asked for."""
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        for batch in (1, 3, 2, 2, 2, 2):
            pinned = runner.buffer(batch)
            assert (pinned.shape, pinned.dtype) == ((batch, 3, 64, 96), np.float32)
            pinned[...] = images(batch, batch)["images"]
            expected = pinned.mean((1, 2, 3))
            np.testing.assert_allclose(runner.run({"images": pinned})["boxes"][:, 0], expected, rtol=1e-5)
    assert driver.replays == 0


def test_batches_under_way_are_collected_first(engine: Engine, info: DetectorInfo, tmp_path: Path) -> None:
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        assert not runner.fits_frames
        runner.submit(images(1)["images"], {})
        with pytest.raises(RuntimeError, match="batches are under way; collect them first"):
            runner.run(images(1))
        runner.collect()
        runner.run(images(1))


def test_the_network_is_timed_without_copies(engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path) -> None:
    """Each call by two marks; with a CUDA graph the calls are replays."""
    runs: list[int] = []
    execute = Engine.execute_async_v3
    with PlanRunner(write_plan(tmp_path, info)) as runner, pytest.MonkeyPatch.context() as patch:
        runner.run(images(2))
        patch.setattr(Engine, "execute_async_v3", lambda self, stream: runs.append(self.batch) or execute(self, stream))
        assert runner.time_network(7, cuda_graph=False) == [0.5] * 7
        assert (runs, driver.replays) == ([2] * 7, 0)
        assert runner.time_network(7, cuda_graph=True) == [0.5] * 7
        assert (runs, driver.replays) == ([2] * 8, 7)


def test_a_profiled_runner_uses_no_graphs(engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path) -> None:
    """A profiler rules them out. The warm-up does not count, and a layer reported twice is the sum."""
    with PlanRunner(write_plan(tmp_path, info), cuda_graph=True) as runner:
        runner.run(images(2))
        assert runner.layer_times(4) == {"conv": 0.5, "reformat": 0.5}
        for _ in range(4):
            runner.run(images(2))
    assert driver.replays == 0


def test_an_engine_that_has_no_room_to_run(
    engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "create_execution_context", lambda _: None)
    with pytest.raises(DarktrtError, match=r"net\.plan: TensorRT cannot load the plan; see its message above"):
        PlanRunner(write_plan(tmp_path, info))
    assert (driver.buffers, driver.host, driver.streams, driver.retained) == ({}, {}, 0, 0)


@pytest.mark.parametrize("function", ["darktrt_fit", "darktrt_upload"])
def test_a_kernel_that_fails(
    function: str, fit_library: FitLibrary, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = {"darktrt_fit": "fitting images on the GPU", "darktrt_upload": "copying images to the GPU"}[function]
    monkeypatch.setattr(fit_library, function, lambda *_: 700)
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        with pytest.raises(DarktrtError, match=rf"^CUDA: {what} fails \(700\)$"):
            runner.submit([frame(9, 9)], {})


@pytest.mark.parametrize("lacking", ["darktrt_fit", "darktrt_upload"])
def test_a_plugin_library_that_is_older_than_its_kernels(
    lacking: str, fit_library: FitLibrary, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves for its plugins, and the host fits the images."""
    monkeypatch.delattr(FitLibrary, lacking)
    with PlanRunner(write_plan(tmp_path, info)) as runner:
        assert not runner.fits_frames
        runner.run(images(1))


@pytest.mark.parametrize("form", ["float", "uint8"])
def test_the_gpu_fits_into_the_form_of_the_input(
    form: Any, fit_library: FitLibrary, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, kind = ((-1, 3, 64, 96), "FLOAT") if form == "float" else ((-1, 64, 96, 3), "UINT8")
    monkeypatch.setattr(Engine, "tensors", {"images": ("in", shape, kind), "boxes": ("out", (-1, 1), "FLOAT")})
    sizes = [(batch, *shape[1:]) for batch in (1, 2, 3)]
    monkeypatch.setattr(Engine, "get_tensor_profile_shape", lambda *_: sizes)
    with PlanRunner(write_plan(tmp_path, replace(info, input=form))) as runner:
        frames = [frame(200, 50), frame(20, 90)]
        runner.submit(frames, {})
        expected = [preprocess(one, 96, 64, 3, "stretch", form)[0].mean() for one in frames]
        np.testing.assert_allclose(runner.collect()["boxes"][:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "input 'images' is missing; the engine accepts float32 .* batch 1 to 3"),
        (images(4), r"is float32 \(4, 3, 64, 96\)"),
        ({"images": images(1)["images"].astype(np.float16)}, "is float16"),
        ({"images": np.zeros((1, 64, 96, 3), np.float32)}, r"is float32 \(1, 64, 96, 3\)"),
    ],
    ids=["missing", "batch", "type", "shape"],
)
def test_inputs_that_do_not_fit(
    engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path, inputs: dict[str, Any], said: str
) -> None:
    with PlanRunner(write_plan(tmp_path, info)) as runner, pytest.raises(DarktrtError, match=said):
        runner.run(inputs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "TensorRT 8.6.0"}, r"built by TensorRT 8.6.0, here is TensorRT 10.3.0, .* build it again"),
        (
            {"gpu": "NVIDIA L4", "compute_capability": 89},
            r"built for NVIDIA L4, compute capability 8\.9, here is NVIDIA H200, 9\.0; build it again",
        ),
        ({"target": "TensorRT 10.4.0", "version_compatible": True}, "built by TensorRT 10.4.0, here is TensorRT 10.3.0"),
        ({"target": "TensorRT 9.3.0", "version_compatible": True}, "built by TensorRT 9.3.0, here is TensorRT 10.3.0"),
        ({"plugins": ("MishPlugin:1",)}, "needs the plugins MishPlugin:1; compile their library with 'darktrt plugins'"),
        ({"content": b"other"}, "TensorRT cannot load the plan"),
    ],
    ids=["version", "gpu", "a newer version", "another major version", "plugins", "plan"],
)
def test_plans_that_do_not_run_here(
    engine: Engine,
    driver: Streams,
    info: DetectorInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(runtime, "find_library", lambda *_: None)
    with pytest.raises(DarktrtError, match=said):
        PlanRunner(write_plan(tmp_path, info, **changes))
    assert (driver.buffers, driver.host, driver.streams, driver.retained) == ({}, {}, 0, 0)


@pytest.mark.parametrize(
    ("changes", "gpu", "warns"),
    [
        ({"compute_capability": 90}, ("NVIDIA H200", 90), False),
        ({"compute_capability": 90}, ("NVIDIA H100 80GB HBM3", 90), True),
        ({"gpu": None}, ("NVIDIA L4", 89), False),
        ({"gpu": "NVIDIA A100", "compute_capability": 80, "hardware_compatible": True}, ("NVIDIA L4", 89), False),
        ({"target": "TensorRT 10.0.1", "version_compatible": True}, ("NVIDIA H200", 90), False),
    ],
    ids=["the same", "of the same kind", "for many", "hardware compatible", "version compatible"],
)
def test_plans_that_run_here_too(
    engine: Engine,
    info: DetectorInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    gpu: tuple[str, int],
    warns: bool,
) -> None:
    monkeypatch.setattr(runtime, "first_gpu", lambda: gpu)
    with PlanRunner(write_plan(tmp_path, info, **changes)) as runner:
        runner.run(images(2))
    assert ("built for NVIDIA H200, here is NVIDIA H100 80GB HBM3: faster if built again" in caplog.text) == warns


@pytest.mark.parametrize(("capability", "runs"), [(75, False), (79, False), (80, True), (120, True)])
def test_a_hardware_compatible_plan_runs_from_ampere_on(
    engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: int, runs: bool
) -> None:
    monkeypatch.setattr(runtime, "first_gpu", lambda: ("NVIDIA X", capability))
    plan = write_plan(tmp_path, info, hardware_compatible=True, compute_capability=90)
    if runs:
        with PlanRunner(plan) as runner:
            runner.run(images(1))
    else:
        with pytest.raises(DarktrtError, match=rf"8\.0 or more, NVIDIA X has 7\.{capability % 10}; build it again here"):
            PlanRunner(plan)


@pytest.mark.parametrize(
    ("plugins", "warned"), [(("YoloDetectPlugin:1",), False), (("FitPlugin:1", "YoloDetectPlugin:1"), True)]
)
def test_a_library_that_lacks_a_plugin(
    fit_library: FitLibrary, info: DetectorInfo, tmp_path: Path, plugins: tuple[str, ...], warned: bool
) -> None:
    plan = write_plan(tmp_path, info, plugins=plugins)
    if not warned:
        with PlanRunner(plan) as runner:
            runner.run(images(1))
        return
    with pytest.raises(
        DarktrtError, match=r"net\.plan: needs FitPlugin:1, which .*libdarktrt_plugins\.so lacks; compile"
    ) as caught:
        PlanRunner(plan)
    assert caught.value.argument == "plugins"


def test_a_tensorrt_without_plugins_loads_no_library(
    fit_library: FitLibrary, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("rtx", (1, 7))
    monkeypatch.setattr(runtime, "find_target", lambda _: target)
    monkeypatch.setattr(runtime, "load_plugins", lambda *_: pytest.fail("a library is loaded"))
    with PlanRunner(write_plan(tmp_path, info, target=str(target))) as runner:
        assert not runner.fits_frames
        runner.run(images(1))


def test_a_hardware_compatible_plan_on_an_old_gpu(
    engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "first_gpu", lambda: ("Tesla T4", 75))
    with pytest.raises(DarktrtError, match=r"runs on compute capability 8\.0 or more, Tesla T4 has 7\.5"):
        PlanRunner(write_plan(tmp_path, info, hardware_compatible=True))


def test_a_version_compatible_plan_may_bring_its_runtime(engine: Engine, info: DetectorInfo, tmp_path: Path) -> None:
    """TensorRT loads no code from plans by default."""
    for compatible in (False, True):
        with PlanRunner(write_plan(tmp_path, info, version_compatible=compatible)):
            assert engine.host_code_allowed == compatible


def test_a_plan_that_was_changed(engine: Engine, info: DetectorInfo, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, info)
    plan.write_bytes(b"changed")
    with pytest.raises(DarktrtError, match="is not the plan that"):
        PlanRunner(plan)


def test_no_gpu(engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "first_gpu", lambda: None)
    with pytest.raises(DarktrtError, match="runs on an NVIDIA GPU, and none is usable here; use the ONNX file"):
        PlanRunner(write_plan(tmp_path, info))


def test_an_engine_that_fails(engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path) -> None:
    engine.works = False
    with PlanRunner(write_plan(tmp_path, info)) as runner, pytest.raises(DarktrtError, match="TensorRT cannot run"):
        runner.run(images(1))
    assert driver.buffers == {}


def test_engines_take_turns_and_are_timed(engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, info)
    turns: list[int] = []
    set_progress(lambda _, done, total: turns.append(done))
    timings = measure({"a": plan, "b": plan}, [1, 3], turns=2)
    set_progress(None)
    assert [(one.name, one.batch, one.cuda_graph) for one in timings] == [
        (name, batch, graph) for graph in (False, True) for batch in (1, 3) for name in ("a", "b")
    ]
    assert all(one.network.median == one.network.p99 == 0.5 for one in timings)
    assert all(0 < one.end_to_end.median <= one.end_to_end.p99 and one.images_per_second > 0 for one in timings)
    assert all(one.tflops == round(info.gflops * one.batch / 0.5, 1) for one in timings)
    assert turns == list(range(1, 2 * 2 * len(timings) + 1))
    assert driver.events == 0
    assert len(to_markdown(timings).splitlines()) == 2 + len(timings)


def test_bench_from_the_command_line(
    engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "gpu_name", lambda: "NVIDIA H200")
    answered = subprocess.CompletedProcess([], 0, "580.1, 345 MHz\n", "")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: answered)
    plan = write_plan(tmp_path, info)
    command = ["bench", str(plan), f"other={plan}", "--turns", "1", "--batch", "1", "2", "--json", str(tmp_path / "times.json")]
    main(command)
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"NVIDIA H200; TensorRT 10.3.0; darktrt {__version__}; before: driver_version 580.1, clocks.sm 345 MHz"
    )
    assert "\n\n| engine | batch |" in printed
    report = json.loads((tmp_path / "times.json").read_text())
    assert report["state"]["after"] == {"driver_version": "580.1", "clocks.sm": "345 MHz"}
    assert [one["name"] for one in report["timings"]] == ["net", "other"] * 4
    assert {one["plan_sha256"] for one in report["timings"]} == {sha256_of(plan)}
    assert all(f"| {one['name']} | {one['batch']} |" in printed for one in report["timings"])


@pytest.mark.parametrize(
    ("plans", "batches", "turns", "said"),
    [
        (["{plan}", "{plan}"], [1], 1, "two engines are called 'net'; give them names: a="),
        (["{plan}"], [0], 1, "0 is below 1"),
        (["{plan}"], [2, 0, 1], 1, "0 is below 1"),
        (["{plan}"], [1], 0, "0 is below 1"),
        (["none.plan"], [1], 1, "none.json: cannot read: No such file"),
        (["{plan}"], [4], 1, "a batch of 4 images; the model accepts 1 to 3"),
    ],
)
def test_bench_that_cannot_be(
    engine: Engine, info: DetectorInfo, tmp_path: Path, plans: list[str], batches: list[int], turns: int, said: str
) -> None:
    plan = write_plan(tmp_path, info)
    with pytest.raises(DarktrtError, match=said):
        bench_files([one.format(plan=plan) for one in plans], batches, turns)


def test_a_bench_of_one_engine(engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is that of its file. Without nvidia-smi there is no state of the GPU to report."""

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "no nvidia-smi")

    monkeypatch.setattr(bench.subprocess, "run", missing)
    monkeypatch.setattr(bench, "gpu_name", lambda: "NVIDIA L4")
    plan = write_plan(tmp_path, info)
    report = bench_files([str(plan)], [1, 2], 1)
    assert (report.gpu, report.tensorrt, report.state) == ("NVIDIA L4", ("TensorRT 10.3.0",), {})
    assert {(one.name, one.plan_sha256) for one in report.timings} == {("net", sha256_of(plan))}
    assert [(one.batch, one.cuda_graph) for one in report.timings] == [(1, False), (2, False), (1, True), (2, True)]


# --- layer by layer ---


def test_layers_are_timed_at_the_usual_batch(
    engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the mean of 50 executions after a run and a warm-up."""
    runs: list[int] = []
    execute = Engine.execute_async_v3
    monkeypatch.setattr(Engine, "execute_async_v3", lambda self, stream: runs.append(self.batch) or execute(self, stream))
    plan = write_plan(tmp_path, replace(info, batch=(1, 2, 3)), engine_layers=(EngineLayer("conv", "conv", "FP16", "", ()),))
    report = profile(plan)
    assert (report.batch, runs) == (2, [2] * 52)
    assert [(row.layer.name, row.milliseconds) for row in report.rows] == [("conv", 0.5), ("reformat", 0.5)]
    assert profile(plan, batch=3).batch == 3


def test_each_layers_time_is_found(
    engine: Engine, info: DetectorInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean over executions, summed where TensorRT reports a layer in parts; in the table, as JSON and as an image."""
    layers = (
        EngineLayer("conv", "CaskConvolution", "FP16", "NHWC", ("/layers.0/Conv", "/layers.0/LeakyRelu"), "sm80_fprop"),
        EngineLayer("a name of more than the fifty-six characters that a table has for it", "Reformat", "INT8", "", ()),
    )
    plan = write_plan(tmp_path, info, engine_layers=layers)
    report = profile(plan, batch=2)
    assert [(row.layer.name[:8], row.milliseconds) for row in report.rows] == [
        ("conv", 0.5),
        ("a name o", 0.0),
        ("reformat", 0.5),
    ]
    assert report.rows[0].lines == (info.layers[0].line,)
    assert report.total == 1.0
    options = ["--profile", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main(["layers", str(plan), *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("NVIDIA H200, batch 3: 1.000 ms")
    assert printed[2].split() == ["conv", "CaskConvolution", "FP16", str(info.layers[0].line), "0.5000", "NHWC"]
    assert "…" in printed[3]
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["layers"][0]["nodes"] == ["/layers.0/Conv", "/layers.0/LeakyRelu"]
    assert written["layers"][0]["cfg_lines"] == [info.layers[0].line]
    assert Image.open(tmp_path / "a.png").width > 600


def test_without_a_gpu_layers_are_reported_too(
    info: DetectorInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(tmp_path, info, engine_layers=(EngineLayer("conv", "gemm", "INT8", "NHWC", ("/layers.1/Conv",)),))
    assert main(["layers", str(plan)]) == 0
    assert f"INT8  {info.layers[1].line}" in capsys.readouterr().out
    assert main(["layers", str(plan), "--plot", "a.png"]) == 2
    assert "--plot draws times; give --profile too" in capsys.readouterr().err
    plan = write_plan(tmp_path, info)
    assert main(["layers", str(plan)]) == 2
    assert "its manifest lists no layers; build it again with this version of darktrt" in capsys.readouterr().err


# --- Polygraphy ---


def test_polygraphys_comparator_runs_an_engine(engine: Engine, info: DetectorInfo, tmp_path: Path) -> None:
    from polygraphy.comparator import Comparator

    inputs = [images(2, seed) for seed in range(3)]
    plan = write_plan(tmp_path, info)
    found = Comparator.run([polygraphy_runner(plan, name="engine")], data_loader=inputs)
    assert list(found.keys()) == ["engine"]
    for one, given in zip(found["engine"], inputs, strict=True):
        assert np.allclose(one["boxes"][:, 0], given["images"].mean((1, 2, 3)))
        assert 0 < one.runtime < 60
    assert list(Comparator.run([polygraphy_runner(plan)], data_loader=inputs[:1]).keys()) == [str(plan)]


def test_detect_with_an_engine(
    engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine of these tests has no output scores, which the detector reports: it was run."""
    plan = write_plan(tmp_path, info)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    assert main(["detect", str(tmp_path / "a.png"), "--engine", str(plan)]) == 2
    assert "has no output 'scores', only boxes" in capsys.readouterr().err
