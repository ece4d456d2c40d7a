"""Running a plan: buffers, batches, CUDA graphs, and what is refused, with stand-ins for TensorRT and the driver."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from fake_tensorrt import DataType, FakeDriver
from helpers import Made
from PIL import Image

from cli import main
from darktrt import DarktrtError, DetectorInfo, sha256_of
from engine import bench, runtime
from engine.bench import bench_files, measure, to_markdown
from engine.manifest import Manifest, manifest_path
from engine.runtime import PlanRunner
from engine.target import Target

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
            self.buffers[address.value][: size.value] = ctypes.string_at(source.value, size.value)

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

    def cuEventElapsedTime(self, milliseconds: Any, *_: Any) -> int:  # noqa: N802
        assert self.synchronized
        milliseconds._obj.value = 0.5
        return 0

    def cuEventDestroy_v2(self, _: Any) -> int:  # noqa: N802
        self.events -= 1
        return 0


class Engine:
    """Mean of every picture, as the only output ``boxes``; a batch of 1 to 3."""

    tensors: ClassVar[dict[str, Any]] = {"images": ("in", (-1, 3, 64, 96), "FLOAT"), "boxes": ("out", (-1, 1), "FLOAT")}

    def __init__(self, driver: Streams) -> None:
        self.driver = driver
        self.addresses: dict[str, int] = {}
        self.batch = 0
        self.works = True

    num_io_tensors = property(lambda self: len(self.tensors))

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[1 - i]

    def get_tensor_mode(self, name: str) -> str:
        return self.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.batch or side if side < 0 else side for side in self.tensors[name][1])

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[self.tensors[name][2]]

    def get_tensor_profile_shape(self, name: str, _: int) -> list[tuple[int, ...]]:
        return [(batch, 3, 64, 96) for batch in (1, 2, 3)]

    def create_execution_context(self) -> Any:
        context = Engine(self.driver)
        context.addresses, context.engine = self.addresses, self  # type: ignore[attr-defined]
        return context

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch = shape[0]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        batch = self.batch

        def work() -> None:
            images = np.frombuffer(bytes(self.driver.buffers[self.addresses["images"]]), np.float32)
            means = images.reshape(3, -1).mean(1)[:batch].astype(np.float32)
            self.driver.buffers[self.addresses["boxes"]][: 4 * batch] = means.tobytes()

        self.driver.enqueue(work)
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
    trt = SimpleNamespace(
        TensorIOMode=Mode,
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda *_: None}),
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda plan: made if plan == b"plan" else None),
    )
    target = Target("trt", (10, 3, 0))
    monkeypatch.setattr(Target, "load", lambda _: trt)
    monkeypatch.setattr(runtime, "find_target", lambda _: target)
    monkeypatch.setattr(runtime, "gpu_name", lambda: "NVIDIA H200")
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


def pictures(batch: int, seed: int = 0) -> dict[str, Any]:
    return {"images": np.random.default_rng(seed).random((batch, 3, 64, 96), np.float32)}


@pytest.mark.parametrize("graph", [False, True])
def test_batches_of_any_size_give_their_own_results(
    engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path, graph: bool
) -> None:
    with PlanRunner(write_plan(tmp_path, info), cuda_graph=graph) as runner:
        for seed, batch in enumerate((3, 1, 1, 2, 2, 2, 3)):
            inputs = pictures(batch, seed)
            outputs = runner.run(inputs)
            np.testing.assert_allclose(outputs["boxes"], inputs["images"].mean((1, 2, 3))[:, None], rtol=1e-5)
    assert driver.replays == (4 if graph else 0)  # all but the first of each batch


def test_nothing_is_allocated_after_the_start_and_all_is_given_back(
    engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path
) -> None:
    with PlanRunner(write_plan(tmp_path, info), cuda_graph=True) as runner:
        before = len(driver.buffers), len(driver.host)
        for batch in (1, 3, 2):
            runner.run(pictures(batch))
        assert (len(driver.buffers), len(driver.host)) == before == (2, 2)
    assert (driver.buffers, driver.host, driver.streams, driver.retained) == ({}, {}, 0, 0)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "input 'images' is missing; the engine takes float32 .* batch 1 to 3"),
        (pictures(4), r"is float32 \(4, 3, 64, 96\)"),
        ({"images": pictures(1)["images"].astype(np.float16)}, "is float16"),
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
        ({"gpu": "NVIDIA L4"}, "built for NVIDIA L4, here is NVIDIA H200"),
        ({"plugins": ("MishPlugin:1",)}, "needs the plugins MishPlugin:1; build their library with 'make plugins'"),
        ({"content": b"other"}, "TensorRT cannot load the plan"),
    ],
    ids=["version", "gpu", "plugins", "plan"],
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
    monkeypatch.setattr(runtime, "find_library", lambda _: None)
    with pytest.raises(DarktrtError, match=said):
        PlanRunner(write_plan(tmp_path, info, **changes))
    assert (driver.buffers, driver.host, driver.streams, driver.retained) == ({}, {}, 0, 0)


def test_a_plan_that_was_changed(engine: Engine, info: DetectorInfo, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, info)
    plan.write_bytes(b"changed")
    with pytest.raises(DarktrtError, match="is not the plan that"):
        PlanRunner(plan)


def test_no_gpu(engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "gpu_name", lambda: None)
    with pytest.raises(DarktrtError, match="runs on an NVIDIA GPU, and none is usable here; use the ONNX file"):
        PlanRunner(write_plan(tmp_path, info))


def test_an_engine_that_fails(engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path) -> None:
    engine.works = False
    with PlanRunner(write_plan(tmp_path, info)) as runner, pytest.raises(DarktrtError, match="TensorRT cannot run"):
        runner.run(pictures(1))
    assert driver.buffers == {}


def test_engines_take_turns_and_are_timed(engine: Engine, driver: Streams, info: DetectorInfo, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, info)
    turns: list[int] = []
    timings = measure({"a": plan, "b": plan}, [1, 3], turns=2, progress=lambda: turns.append(1))
    assert [(one.name, one.batch, one.cuda_graph) for one in timings] == [
        (name, batch, graph) for graph in (False, True) for batch in (1, 3) for name in ("a", "b")
    ]
    assert all(one.network.median == one.network.p99 == 0.5 for one in timings)
    assert all(0 < one.end_to_end.median <= one.end_to_end.p99 and one.images_per_second > 0 for one in timings)
    assert len(turns) == 2 * 2 * len(timings)
    assert driver.events == 0
    assert len(to_markdown(timings).splitlines()) == 2 + len(timings)


def test_bench_from_the_command_line(
    engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "gpu_name", lambda: "NVIDIA H200")
    plan = write_plan(tmp_path, info)
    command = ["bench", str(plan), f"other={plan}", "--turns", "1", "--batch", "1", "2", "--json", str(tmp_path / "times.json")]
    main(command)
    printed = capsys.readouterr().out
    assert printed.startswith("NVIDIA H200; TensorRT 10.3.0\n\n| engine | batch |")
    report = json.loads((tmp_path / "times.json").read_text())
    assert [one["name"] for one in report["timings"]] == ["net", "other"] * 4
    assert all(f"| {one['name']} | {one['batch']} |" in printed for one in report["timings"])


@pytest.mark.parametrize(
    ("plans", "batches", "turns", "said"),
    [
        (["{plan}", "{plan}"], [1], 1, "two engines are called 'net'; give them names: a="),
        (["{plan}"], [0], 1, "--turns and --batch must be 1 or more"),
        (["{plan}"], [1], 0, "--turns and --batch must be 1 or more"),
        (["none.plan"], [1], 1, "none.json: cannot read the manifest"),
        (["{plan}"], [4], 1, "input 'images' is float32 .* batch 1 to 3"),
    ],
)
def test_bench_that_cannot_be(
    engine: Engine, info: DetectorInfo, tmp_path: Path, plans: list[str], batches: list[int], turns: int, said: str
) -> None:
    plan = write_plan(tmp_path, info)
    with pytest.raises(DarktrtError, match=said):
        bench_files([one.format(plan=plan) for one in plans], batches, turns)


def test_detect_with_an_engine(
    engine: Engine, info: DetectorInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine of these tests gives no scores, which the detector tells: it was run."""
    plan = write_plan(tmp_path, info)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    assert main(["detect", str(tmp_path / "a.png"), "--engine", str(plan)]) == 2
    assert "gives no output 'scores', only boxes" in capsys.readouterr().err
