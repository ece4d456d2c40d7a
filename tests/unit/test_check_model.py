"""Networks that workers open: what they need of a machine, how images are grouped, and the order of what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Made

from darktrt.check import model as model_module
from darktrt.check.model import EngineModel, OnnxModel
from darktrt.engine import runtime
from darktrt.onnx_cost import cost_of
from darktrt.onnx_file import load_model
from darktrt.parallel import Done, Threads
from darktrt.progress import set_progress
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

detect_by_workers: Any = model_module.detect_by_workers
detect_by_models: Any = model_module.detect_by_models
"""With stand-ins for models."""
PATHS = [Path(f"{i}.png") for i in range(14)]


@dataclass
class Backwards:
    """Workers that finish the last group first, and remember what was asked of them."""

    group_size: int = 4
    sizes: list[int] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)

    def results(self, make_worker: Callable[[], Any], groups: Any, **asked: Any) -> Iterator[Done[Any, Any]]:
        self.sizes, self.asked, worker = [len(group) for group in groups], asked, make_worker()
        yield from (Done(group, worker(group), "far") for group in reversed(groups))


@dataclass
class Echo:
    """A model whose detections in an image are its own number and the image's name."""

    batch: int = 3
    gpu: bool = False
    number: int = 0
    info: Any = None
    bytes_each: int = 77
    files: Sequence[Path] = (Path("a.plan"),)
    opened: list[int] = field(default_factory=list)

    def make_worker(self) -> Callable[[Sequence[Path]], Any]:
        self.opened.append(self.number)
        return lambda paths: [(self.number, path.name) for path in paths]


@pytest.fixture(scope="module")
def portable(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    insert_plugins(made.plain, path, SurgeryOptions())
    return path


def test_what_an_onnx_file_needs(portable: Path) -> None:
    """Twice the tensors of its smallest batch, and nothing else of the machine."""
    graph, info = load_model(portable)
    for batch in ((1, 2, 3), (2, 2, 3)):
        network = OnnxModel.of(graph, replace(info, batch=batch))
        assert network.bytes_each == 2 * batch[0] * cost_of(graph, info).tensors
        assert (network.batch, network.gpu, network.files) == (batch[0], False, ())


def test_what_an_engine_needs(made: Made) -> None:
    """A GPU, its two files and 1 GiB; it runs on its largest batch."""
    engine = EngineModel(replace(made.info, batch=(1, 2, 3)), Path("x/a.plan"))
    assert (engine.batch, engine.gpu, engine.bytes_each, engine.plugins) == (3, True, 2**30, None)
    assert engine.files == (Path("x/a.plan"), Path("x/a.json"))


def test_detections_for_ap_have_darknets_thresholds(portable: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.001 and 0.45, for an ONNX file in one thread as for an engine."""
    seen: list[Any] = []
    real = model_module.NetworkDetector

    def detector(run: Any, info: Any, *thresholds: float) -> Any:
        seen.append(thresholds)
        return real(run, info, *thresholds)

    monkeypatch.setattr(model_module, "NetworkDetector", detector)
    OnnxModel.of(*load_model(portable)).make_worker()

    class Runner:
        def __init__(self, *arguments: Any) -> None:
            seen.append(arguments)
            self.info = replace(made.info, head="nms")

        def __enter__(self) -> Runner:
            return self

    monkeypatch.setattr(runtime, "PlanRunner", Runner)
    EngineModel(made.info, Path("a.plan"), "p.so").make_worker()
    assert seen == [(0.001, 0.45), (Path("a.plan"), "p.so"), (0.001, 0.45)]


def test_an_engine_gets_its_largest_batches() -> None:
    """In order, one group at a time."""
    batches: list[list[Path]] = []
    held: list[bool] = []

    class Lock:
        __enter__ = lambda self: held.append(True)  # noqa: E731
        __exit__ = lambda self, *_: held.append(False)  # noqa: E731

    def detect_batches(parts: Any) -> Iterator[list[str]]:
        for part in parts:
            batches.append(list(part))
            yield [path.name for path in part]

    lock: Any = Lock()
    detector: Any = SimpleNamespace(info=SimpleNamespace(batch=(1, 2, 4)), detect_batches=detect_batches)
    found = model_module._detect_by_gpu(detector, lock, PATHS[:10])
    assert found == [path.name for path in PATHS[:10]]
    assert [len(part) for part in batches] == [4, 4, 2] and held == [True, False]


@pytest.mark.parametrize(
    ("gpu", "batch", "asked", "sizes"),
    [
        (False, 3, 4, [6, 6, 2]),
        (False, 3, 3, [3, 3, 3, 3, 2]),
        (False, 3, 1, [3, 3, 3, 3, 2]),
        (True, 3, 4, [96, 14]),
        (True, 3, 97, [99, 11]),
        (True, 4, 4, [110]),
    ],
)
def test_groups_have_whole_batches(gpu: bool, batch: int, asked: int, sizes: list[int]) -> None:
    """As many images as the workers ask for at least, and for a GPU at least 32 batches, which it has under way at once."""
    paths = (PATHS * 8)[:110] if gpu else PATHS
    workers, model = Backwards(asked), Echo(batch, gpu)
    found = detect_by_workers(model, paths, workers=workers)
    assert workers.sizes == sizes
    assert found == [(0, path.name) for path in paths]
    assert workers.asked == {"bytes_each": 77, "gpu": gpu, "files": (Path("a.plan"),)}


def test_images_are_counted_as_they_are_done() -> None:
    steps: list[tuple[str, int, int | None]] = []
    set_progress(lambda *step: steps.append(step))
    try:
        detect_by_workers(Echo(), PATHS, "mine", Backwards())
        list(detect_by_models([Echo, Echo], PATHS, Backwards()))
    finally:
        set_progress(None)
    assert steps[:3] == [("mine", 2, 14), ("mine", 8, 14), ("mine", 14, 14)]
    assert [step[1:] for step in steps[3:]] == [(done, 28) for done in (2, 8, 14, 16, 22, 28)]


def test_each_of_several_models_comes_when_it_is_done() -> None:
    """With all images in their order; the memory is that of the first."""
    models: list[Any] = [Echo(number=number, bytes_each=10 + number) for number in range(3)]
    workers = Backwards()
    found = list(detect_by_models([lambda one=one: one for one in models], PATHS, workers))
    assert [number for number, _ in found] == [2, 1, 0]
    assert all(each == [(number, path.name) for path in PATHS] for number, each in found)
    assert workers.sizes == [6, 6, 2] * 3 and workers.asked == {"bytes_each": 10}


def test_the_last_two_of_several_models_stay_open() -> None:
    """For threads change over from one to the next in turn."""
    opened: list[int] = []
    models: list[Any] = [Echo(number=number, opened=opened) for number in range(3)]
    worker = model_module._OneModel([lambda one=one: one for one in models])
    for number in (0, 1, 0, 1, 2, 1, 2, 0):
        assert worker([(number, PATHS[5])]) == [(number, "5.png")]
    assert opened == [0, 1, 2, 0]


def test_threads_are_the_usual_workers() -> None:
    assert Threads().group_size == 4
    assert detect_by_workers(Echo(), PATHS) == [(0, path.name) for path in PATHS]
    ((number, found),) = detect_by_models([Echo], PATHS)
    assert (number, found) == (0, [(0, path.name) for path in PATHS])
