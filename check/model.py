"""Networks that workers open where they are, to detect in images with the thresholds for AP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from darktrt.engine.manifest import manifest_path
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.onnx_session import OnnxSession
from darktrt.parallel import Threads, Worker, Workers, in_groups
from darktrt.progress import progress
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import NetworkDetector, Run
from darktrt.vision.images import read_image

if TYPE_CHECKING:
    import onnx

THRESHOLDS = Thresholds(0.001, 0.45)
"""darknet's own for mAP: nearly every detection counts, and NMS is that of production."""

_GPU_BATCHES = 32
"""At least so many batches are in a group for an engine, which has several under way at once."""


class Model(Protocol):
    """A network that can be pickled, and opened by another process."""

    @property
    def info(self) -> DetectorInfo: ...

    @property
    def bytes_each(self) -> int:
        """The memory that a batch takes."""

    @property
    def files(self) -> Sequence[Path]:
        """What :meth:`make_worker` reads."""

    @property
    def gpu(self) -> bool: ...

    @property
    def batch(self) -> int:
        """How many images run at once. Groups have a multiple of it, so that batches are the same for all sizes of groups."""

    def make_worker(self) -> Worker[Path, list[Detections]]:
        """A function from image files to their detections, in pixels of the image.

        Raises:
            DarktrtError: the network does not run here.
        """


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """A model for ONNX Runtime on the CPU.

    In evaluation it runs on one image at a time, in one thread: ONNX Runtime's Softplus has other last bits for other numbers
    of threads, so results would depend on the machine's cores. Several images run side by side instead.
    """

    info: DetectorInfo
    name: str
    content: bytes
    bytes_each: int
    files: Sequence[Path] = ()
    gpu: bool = False

    @staticmethod
    def of(model: onnx.ModelProto, info: DetectorInfo) -> OnnxModel:
        """The model as it is now; ``info`` describes it."""
        from darktrt.onnx_cost import cost_of

        bytes_each = 2 * info.batch[0] * cost_of(model, info).tensors
        return OnnxModel(info, model.graph.name, model.SerializeToString(), bytes_each)

    @property
    def batch(self) -> int:
        """The smallest that the model accepts."""
        return self.info.batch[0]

    def open(self, threads: int = 0) -> Run:
        """The model as a function of its named inputs.

        Args:
            threads: by default one for each core.

        Raises:
            DarktrtError: ONNX Runtime refuses the model; the function raises it where the inputs do not fit.
        """
        return OnnxSession(self.content, self.name, threads, dequantize_weights=True).run

    def make_worker(self) -> Worker[Path, list[Detections]]:
        """As :meth:`Model.make_worker`."""
        detector = NetworkDetector(self.open(threads=1), self.info, THRESHOLDS.score, THRESHOLDS.iou)
        return partial(_detect_by_cpu, detector, self.batch)


def _detect_by_cpu(detector: NetworkDetector, batch: int, paths: Sequence[Path]) -> list[Detections]:
    parts = in_groups(paths, batch)
    return [detections for part in parts for detections in detector.detect([read_image(path) for path in part])]


@dataclass(frozen=True, eq=False)
class EngineModel:
    """An engine (plan); its manifest describes it, so that it can be sent from a machine without a GPU."""

    info: DetectorInfo
    path: Path
    plugins: str | Path | None = None
    """The plugin library, on the machine that the engine runs on."""
    bytes_each: int = 1 << 30
    gpu: bool = True

    @property
    def files(self) -> Sequence[Path]:
        """The plan and its manifest."""
        return self.path, manifest_path(self.path)

    @property
    def batch(self) -> int:
        """The largest that the engine accepts."""
        return self.info.batch[2]

    def make_worker(self) -> Worker[Path, list[Detections]]:
        """As :meth:`Model.make_worker`; the engine lives as long as the process."""
        from darktrt.engine.runtime import PlanRunner

        runner = PlanRunner(self.path, self.plugins).__enter__()
        detector = NetworkDetector(runner, runner.info, THRESHOLDS.score, THRESHOLDS.iou)
        return partial(_detect_by_gpu, detector, threading.Lock())


def _detect_by_gpu(detector: NetworkDetector, lock: threading.Lock, paths: Sequence[Path]) -> list[Detections]:
    batches = in_groups(paths, detector.info.batch[2])
    with lock, closing(detector.detect_batches(batches)) as results:
        return [detections for batch in results for detections in batch]


def detect_by_workers(model: Model, paths: Sequence[Path], label: str = "", workers: Workers | None = None) -> list[Detections]:
    """The detections in image files, in their order: the same whatever workers there are.

    Args:
        label: describes the progress.
        workers: by default threads of this process.

    Raises:
        DarktrtError: an image cannot be read, or the network cannot detect.
    """
    workers = workers or Threads()
    groups = list(in_groups(paths, _group_size(model, workers)))
    found: dict[int, list[Detections]] = {}
    results = workers.results(model.make_worker, groups, bytes_each=model.bytes_each, gpu=model.gpu, files=model.files)
    with progress(len(paths), "images", label) as bar, closing(results):
        for done in results:
            found[id(done.group)] = done.result
            bar.update(len(done.group), done.node)
    return [detections for group in groups for detections in found[id(group)]]


def _group_size(model: Model, workers: Workers) -> int:
    """A multiple of the model's batch."""
    least = model.batch * (_GPU_BATCHES if model.gpu else 1)
    return -(-max(workers.group_size, least) // model.batch) * model.batch


def detect_by_models(
    models: Sequence[Callable[[], OnnxModel]], paths: Sequence[Path], workers: Workers | None = None
) -> Iterator[tuple[int, list[Detections]]]:
    """The detections of several models in the same images: the number of each model and its detections, as they are done.

    Args:
        models: are made where they run, one after the other; they take as much memory as the first.

    Raises:
        DarktrtError: an image cannot be read, or a network cannot detect.
    """
    workers, first = workers or Threads(), models[0]()
    parts = list(in_groups(paths, _group_size(first, workers)))
    groups = [[(model, path) for path in part] for model in range(len(models)) for part in parts]
    found: dict[int, dict[int, list[Detections]]] = {model: {} for model in range(len(models))}
    results = workers.results(partial(_OneModel, models), groups, bytes_each=first.bytes_each)
    with progress(len(models) * len(paths), "images") as bar, closing(results):
        for done in results:
            model, group = done.group[0][0], id(done.group)
            found[model][group] = done.result
            bar.update(len(done.group), done.node)
            if len(found[model]) == len(parts):
                own = groups[model * len(parts) : (model + 1) * len(parts)]
                by_group = found.pop(model)
                yield model, [detections for one in own for detections in by_group[id(one)]]


class _OneModel:
    """A worker for the models of :func:`detect_by_models`; it keeps the last two open, for threads change over in turn."""

    def __init__(self, models: Sequence[Callable[[], OnnxModel]]) -> None:
        self._open = lru_cache(2)(lambda model: models[model]().make_worker())
        self._opening = threading.Lock()

    def __call__(self, group: Sequence[tuple[int, Path]]) -> list[Detections]:
        with self._opening:
            worker = self._open(group[0][0])
        return worker([path for _, path in group])
