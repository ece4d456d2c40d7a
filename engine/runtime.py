"""Running a model: an ONNX file in ONNX Runtime on the CPU, an engine in TensorRT on the GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from darktrt.calib.trt_calibrator import DTYPES
from darktrt.cuda import Buffer, Driver, Event, Frame, Stream, dotted_capability, first_gpu
from darktrt.engine.frames import FitKernel, Uploader, host_offsets, load_kernels
from darktrt.engine.manifest import Manifest, read_plan_manifest
from darktrt.engine.target import Target, find_target, flavour_of
from darktrt.engine.trt_types import shape_of
from darktrt.errors import DarktrtError
from darktrt.files import check_input, open_input
from darktrt.metadata import METADATA_KEY, DetectorInfo
from darktrt.onnx_session import OnnxSession, Provider, available_providers
from darktrt.plugins.library import find_library, load_plugins
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    from darktrt.engine.trt_types import Context, Engine, TensorRT

Tensors = dict[str, npt.NDArray]  # type: ignore[type-arg]


class OnnxRunner:
    """A model in ONNX Runtime, to be used as a context; ``info`` is the model's metadata.

    Args:
        path: an ONNX file of darktrt.
        threads: the number of threads; by default one for each core.
        gpu: the number of the GPU to run on, with onnxruntime-gpu; by default the CPU.
        trusted: the file is one that ``serve repository`` has checked and written: it is run as it is. Other files are checked
            here, which needs onnx, and their largest batch in ``info`` is what the CPU's memory allows.

    Raises:
        DarktrtError: the file cannot be read, is no ONNX, or was not made by darktrt; there is no such GPU.
    """

    def __init__(self, path: str | Path, threads: int = 0, gpu: int | None = None, trusted: bool = False) -> None:
        self.path = str(path)
        device: list[Provider] = ["CPUExecutionProvider"] if gpu is None else [("CUDAExecutionProvider", {"device_id": gpu})]
        if gpu is not None and "CUDAExecutionProvider" not in available_providers():
            raise DarktrtError(f"{path}: this ONNX Runtime knows no GPU; install onnxruntime-gpu, or run the model on the CPU")
        if trusted:
            check_input(path, advice="make it with 'darktrt surgery'")
            self._session = OnnxSession(self.path, self.path, threads, device)
            self.info = _info_of(self._session)
        else:
            from darktrt.onnx_cost import limit_batch
            from darktrt.onnx_file import load_model

            model, info = load_model(path)
            self.info = info if gpu is not None else limit_batch(model, info, self.path)
            self._session = OnnxSession(model.SerializeToString(), self.path, threads, device)

    def run(self, inputs: Mapping[str, npt.NDArray]) -> Tensors:  # type: ignore[type-arg]
        """Run the model on all its inputs, by name, and return all outputs by name.

        Raises:
            DarktrtError: ONNX Runtime refuses the inputs, or fails inside a damaged model.
        """
        return self._session.run(inputs)

    def buffer(self, batch: int) -> npt.NDArray[Any]:
        """An array of the shape and type of the input ``images`` for ``batch`` images, to write them into."""
        return np.empty((batch, *self.info.input_shape), self.info.input_dtype)

    def __enter__(self) -> OnnxRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._session


def _info_of(session: OnnxSession) -> DetectorInfo:
    if METADATA_KEY not in session.metadata:
        raise DarktrtError(f"{session.name}: has no darktrt metadata; make it with 'darktrt convert' and 'darktrt surgery'")
    return DetectorInfo.from_json(session.metadata[METADATA_KEY], session.name)


@dataclass(frozen=True)
class _Binding:
    """An input or output of an engine, with memory for its largest shape; that of images of any size grows with them."""

    name: str
    shape: tuple[int, ...]
    """As the engine states it: -1 for a dynamic batch, height or width."""
    dtype: np.dtype[Any]
    memory: Buffer

    def view(self, shape: Sequence[int]) -> npt.NDArray[Any]:
        """The host memory as an array of the shape."""
        return self.memory.array(shape, self.dtype)

    def sized(self, images: Sequence[int]) -> tuple[int, ...]:
        """The shape for a batch of images, given as the shape ``(N, ...)`` of the input ``images``."""
        return tuple(actual if size < 0 else size for size, actual in zip(self.shape, images, strict=False))


@dataclass
class _Slot:
    """The memory of one batch under way."""

    inputs: list[_Binding]
    outputs: list[_Binding]
    frames: Buffer
    """Images of any sizes, which the GPU fits into the input."""
    uploaded: Event
    done: Event
    images: tuple[int, ...] = ()
    """The shape of the input ``images``."""
    addresses: list[int] | None = None
    """Of the frames on the GPU that are fitted into the input; None where it is uploaded as it is."""
    sources: Sequence[Frame] = ()
    """The frames of the batch, whose memory on the GPU must live until the batch is done."""

    @property
    def input_images(self) -> _Binding:
        return next(binding for binding in self.inputs if binding.name == "images")


_GraphKey = tuple[int, tuple[int, ...], bool]
"""The slot, the shape of the images, and whether the graph uploads them."""

_MOST_GRAPHS = 64
"""Of one engine, for an engine that accepts images of any size needs one for each size; the oldest goes."""


class PlanRunner:
    """An engine on the GPU, to be used as a context; the same :meth:`run` and ``info`` as :class:`OnnxRunner`.

    Batches can overlap: :meth:`submit` enqueues one and returns, :meth:`collect` waits for the oldest. Each of up to ``depth``
    batches under way has memory of its own on both sides, allocated when it is first needed, for the largest batch.

    Args:
        path: the plan; its manifest must be beside it.
        plugins: the plugin library, as :func:`darktrt.plugins.library.find_library` has it.
        cuda_graph: record the copies and kernels at the second run of each batch size, and replay them from the third on.
            That saves kernel launches, which cost small networks most of their time.
        device: the number of the GPU.

    Raises:
        DarktrtError: the manifest does not fit the plan, this machine's TensorRT or its GPU; a plugin is missing.
    """

    depth = 3

    def __init__(self, path: str | Path, plugins: str | Path | None = None, cuda_graph: bool = False, device: int = 0) -> None:
        self.path = str(path)
        self.manifest = read_plan_manifest(path)
        self.info = self.manifest.info
        target = find_target(flavour_of(self.manifest.target))
        check_runs(self.path, self.manifest, target, first_gpu())
        library = _load_library(self.path, self.manifest, target, plugins)
        self._trt = target.load()
        self._graph = cuda_graph
        self._recorded: dict[_GraphKey, bool] = {}
        self._uploader: Uploader | None = None
        self._free: deque[_Slot] = deque()
        self._busy: deque[_Slot] = deque()
        with ExitStack() as stack:
            self._driver = Driver(device)
            stack.callback(self._driver.close)
            self._kernels = load_kernels(library)
            self._fit = FitKernel(self._kernels, self.info) if self._kernels and self.info.input != "image" else None
            with self._driver.current():
                self._engine, self._context = _deserialize(self._trt, self.manifest, Path(path))
            self.stream = Stream(self._driver)
            stack.callback(self.stream.close)
            self._stack = stack
            self._shapes = self._largest_shapes()
            self._free.append(self._slot())
            self._stack = stack.pop_all()

    @property
    def fits_frames(self) -> bool:
        """Whether :meth:`submit` accepts images of any size: the GPU fits them, or the engine does so itself."""
        return self._fit is not None or self.info.input == "image"

    def _largest_shapes(self) -> dict[str, tuple[int, ...]]:
        """The largest shape of every tensor; those of outputs follow from those of the inputs."""
        engine, context = self._engine, self._context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for name in names:
            if self._is_input(name) and -1 in shape_of(engine.get_tensor_shape(name)):
                context.set_input_shape(name, shape_of(engine.get_tensor_profile_shape(name, 0)[2]))
        return {name: shape_of(context.get_tensor_shape(name)) for name in names}

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _slot(self) -> _Slot:
        bindings = [self._binding(name) for name in self._shapes]
        inputs = [binding for binding in bindings if self._is_input(binding.name)]
        outputs = [binding for binding in bindings if binding not in inputs]
        return _Slot(inputs, outputs, self._buffer(0), self._event(), self._event())

    def _binding(self, name: str) -> _Binding:
        dtype = np.dtype(DTYPES[self._engine.get_tensor_dtype(name).name])
        grows = name == "images" and self.info.input == "image"
        size = 0 if grows else max(int(np.prod(self._shapes[name])) * dtype.itemsize, 1)
        return _Binding(name, shape_of(self._engine.get_tensor_shape(name)), dtype, self._buffer(size))

    def _buffer(self, size: int) -> Buffer:
        buffer = Buffer(self._driver)
        self._stack.callback(buffer.close)
        buffer.reserve(size)
        return buffer

    def _event(self) -> Event:
        event = Event(self._driver)
        self._stack.callback(event.close)
        return event

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape, -1 for what is dynamic, and type of every input by name."""
        return {binding.name: (binding.shape, binding.dtype) for binding in self._next_slot().inputs}

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """Run the engine on all its inputs, by name, and return all outputs by name.

        The outputs are views of memory that later runs overwrite and that the runner frees at its end: copy what is to last.

        Raises:
            DarktrtError: an input is missing or of another type or shape than the engine's; the GPU fails.
        """
        if self._busy:
            raise RuntimeError("batches are under way; collect them first")
        self.submit(inputs.get("images"), inputs)
        return self.collect()

    def submit(self, images: npt.NDArray[Any] | Sequence[Frame] | None, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Enqueue a batch; at most ``depth`` may be under way, and other batches than these must not be run meanwhile.

        Args:
            images: the input ``images``, or where :attr:`fits_frames` a list of images; of one size for an engine that fits
                them itself.
            inputs: the other inputs by name.

        Raises:
            DarktrtError: an input is missing or of another type or shape than the engine's; the GPU fails.
        """
        slot = self._next_slot()
        if isinstance(images, np.ndarray | None):
            self._prepare(slot, {**inputs, **({} if images is None else {"images": images})})
        else:
            slot.sources = tuple(images)
            self._upload_frames(slot, images, inputs)
        self._launch(slot)
        self._busy.append(self._free.popleft())

    def collect(self) -> Tensors:
        """Wait for the oldest batch under way and return its outputs by name, views as those of :meth:`run`.

        Raises:
            DarktrtError: the GPU fails.
        """
        slot = self._busy.popleft()
        self._free.append(slot)
        slot.done.synchronize()
        slot.sources = ()
        return {binding.name: binding.view(binding.sized(slot.images)) for binding in slot.outputs}

    def _next_slot(self) -> _Slot:
        """The slot of the next batch."""
        if not self._free:
            if len(self._busy) >= self.depth:
                raise RuntimeError(f"{self.depth} batches are under way; collect one first")
            self._free.append(self._slot())
        return self._free[0]

    def buffer(self, batch: int) -> npt.NDArray[Any]:
        """The pinned memory of the input ``images`` for ``batch`` images; :meth:`run` does not copy an array that is in it."""
        binding = self._next_slot().input_images
        return binding.view(binding.sized((batch, *self.info.input_shape)))

    def _prepare(self, slot: _Slot, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy the inputs into pinned memory, and set their shapes."""
        images = inputs.get("images")
        slot.images = (0,) if images is None else images.shape
        slot.addresses = None
        for binding in slot.inputs:
            array = self._checked(binding, inputs.get(binding.name), slot.images)
            self._reserve(slot, binding.memory, array.nbytes)
            pinned = binding.view(array.shape)
            if not _same_memory(array, pinned):
                pinned[...] = array

    def _reserve(self, slot: _Slot, memory: Buffer, size: int) -> None:
        """Let memory of a slot grow; graphs that were recorded with its old address go."""
        if memory.reserve(size):
            self._forget_graphs([key for key in self._recorded if key[0] == id(slot)])

    def _upload_frames(self, slot: _Slot, frames: Sequence[Frame], inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy frames to the GPU, into the input itself where the engine fits them."""
        binding = slot.input_images
        whole = self.info.input == "image"
        slot.images = (len(frames), *(frames[0].shape if whole else self.info.input_shape))
        if whole and any(frame.shape != frames[0].shape for frame in frames):
            raise DarktrtError(f"{self.path}: the images of a batch must be of one size")
        self._check_shape(binding, slot.images, binding.dtype)
        for other in slot.inputs:
            if other is not binding:
                other.view(other.sized(slot.images))[...] = self._checked(other, inputs.get(other.name), slot.images)
        memory = binding.memory if whole else slot.frames
        size = int(np.prod(slot.images[1:]))
        *offsets, end = [i * size for i in range(len(frames) + 1)] if whole else host_offsets(frames)
        self._reserve(slot, memory, end)
        slot.addresses = self._uploads.upload(frames, offsets, memory, slot.uploaded)
        self.stream.wait(slot.uploaded)
        if self._fit:
            sizes = [(address, frame.shape[1], frame.shape[0]) for address, frame in zip(slot.addresses, frames, strict=True)]
            with self._driver.current():
                self._fit.enqueue(sizes, binding.memory.address, self.stream)
        else:
            self._gather(slot.addresses, binding.memory.address, size)

    def _gather(self, addresses: Sequence[int], target: int, size: int) -> None:
        """Copy frames that were on the GPU already into the input."""
        for i, address in enumerate(addresses):
            if address != target + i * size:
                self.stream.copy(target + i * size, address, size)

    @property
    def _uploads(self) -> Uploader:
        if self._uploader is None:
            self._uploader = Uploader(self._driver, self._kernels)
            self._stack.callback(self._uploader.close)
        return self._uploader

    def _checked(self, binding: _Binding, array: npt.NDArray[Any] | None, images: tuple[int, ...]) -> npt.NDArray[Any]:
        if array is None:
            raise self._misfit(binding, "missing")
        if array.shape != binding.sized(images):
            raise self._misfit(binding, f"{array.dtype} {array.shape}")
        self._check_shape(binding, array.shape, array.dtype)
        return array

    def _check_shape(self, binding: _Binding, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """See that an array of this shape and type can be bound, and set the shape."""
        limits = zip(shape, self._shapes[binding.name], binding.shape, strict=True)
        if (
            dtype != binding.dtype
            or len(shape) != len(binding.shape)
            or any(size > most or known not in (-1, size) for size, most, known in limits)
            or (-1 in binding.shape and not self._context.set_input_shape(binding.name, shape))
        ):
            raise self._misfit(binding, f"{dtype} {shape}")

    def _misfit(self, binding: _Binding, actual: str) -> DarktrtError:
        low, _, high = self.info.batch
        sizes = self.info.image_sizes
        range_ = f", images of {sizes[0][0]}x{sizes[0][1]} to {sizes[2][0]}x{sizes[2][1]}" if sizes else ""
        return DarktrtError(
            f"{self.path}: input '{binding.name}' is {actual}; the engine accepts {binding.dtype} {binding.shape}, "
            f"batch {low if low == high else f'{low} to {high}'}{range_}"
        )

    def _launch(self, slot: _Slot) -> None:
        """Enqueue the copies of a slot and the network, as a graph from the second time on."""
        key = (id(slot), slot.images, slot.addresses is None)
        if not self._graph:
            self._enqueue(slot)
        elif key not in self._recorded:
            self._forget_graphs(list(self._recorded)[: max(0, len(self._recorded) - _MOST_GRAPHS + 1)])
            self._enqueue(slot)
            self._recorded[key] = False
        elif self._recorded[key]:
            self.stream.replay(key)
        else:  # only what was enqueued last can be recorded: TensorRT prepares for a new shape at its first run
            self._enqueue(slot)
            with self.stream.recording(key):
                self._enqueue(slot)
            self._recorded[key] = True
        self.stream.record(slot.done)

    def _forget_graphs(self, keys: Sequence[_GraphKey]) -> None:
        for key in keys:
            del self._recorded[key]
            self.stream.forget(key)

    def _enqueue(self, slot: _Slot) -> None:
        for binding in slot.inputs:
            if binding.name != "images" or slot.addresses is None:
                self.stream.upload(binding.memory.address, binding.view(binding.sized(slot.images)))
        for binding in (*slot.inputs, *slot.outputs):
            self._context.set_tensor_address(binding.name, binding.memory.address)
        self.execute()
        for binding in slot.outputs:
            self.stream.download(binding.view(binding.sized(slot.images)), binding.memory.address)

    def execute(self) -> None:
        """Enqueue the network without copies, on the inputs that were uploaded last."""
        with self._driver.current():
            if not self._context.execute_async_v3(self.stream.handle):
                raise DarktrtError(f"{self.path}: TensorRT cannot run the engine; see its messages above")

    def time_network(self, calls: int, cuda_graph: bool) -> list[float]:
        """Milliseconds on the GPU of each of ``calls`` executions without copies, on the inputs of the last run."""
        if cuda_graph:
            with self.stream.recording():
                self.execute()
        marks = []
        for _ in range(calls):
            begin = self.stream.event()
            self.stream.replay() if cuda_graph else self.execute()
            marks.append((begin, self.stream.event()))
        self.stream.synchronize()
        return [self.stream.elapsed(*pair) for pair in marks]

    def layer_times(self, calls: int) -> dict[str, float]:
        """Milliseconds of each layer of the engine, the mean over ``calls`` executions on the inputs of the last run.

        The layers are measured one after the other, so that their sum exceeds the time of the engine. The runner uses no CUDA
        graphs any more, which a profiler rules out.
        """
        times: dict[str, float] = {}
        self._graph = False
        profiler = _profiler(self._trt, times)
        self._context.profiler = profiler
        self.execute()  # the warm-up
        self.stream.synchronize()
        times.clear()
        for _ in range(calls):
            self.execute()
            self.stream.synchronize()
        return {name: total / calls for name, total in times.items()}

    def __enter__(self) -> PlanRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._context, self._engine
        self._stack.close()


def _profiler(trt: Any, times: dict[str, float]) -> Any:
    """A profiler that adds up the times TensorRT reports, by layer."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0) + ms

    return Profiler()


def polygraphy_runner(path: str | Path, plugins: str | Path | None = None, name: str | None = None) -> Any:
    """An engine as a runner of Polygraphy, for its Comparator.

    Activating it raises the errors of :class:`PlanRunner`.
    """
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Runner(BaseRunner):  # type: ignore[misc]  # Polygraphy publishes no types
        def activate_impl(self) -> None:
            self._stack = ExitStack()
            self._plan = self._stack.enter_context(PlanRunner(path, plugins))

        def deactivate_impl(self) -> None:
            self._stack.close()

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor, (shape, dtype) in self._plan.inputs.items():
                metadata.add(tensor, dtype, shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[Any]]) -> Tensors:
            started = time.perf_counter()
            outputs = self._plan.run(feed_dict)
            self.inference_time = time.perf_counter() - started
            return {name: values.copy() for name, values in outputs.items()}  # the next run writes into the same memory

    return Runner(name or str(path))


def _same_memory(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two arrays of the same shape and type are the same memory."""
    return bool(a.ctypes.data == b.ctypes.data and a.strides == b.strides)


def _deserialize(trt: TensorRT, manifest: Manifest, path: Path) -> tuple[Engine, Context]:
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    if manifest.version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan contains the runtime of its own version
    with open_input(path) as file:
        engine = runtime.deserialize_cuda_engine(file.read())
    context = engine.create_execution_context() if engine else None
    if context is None:
        raise DarktrtError(f"{path}: TensorRT cannot load the plan; see its message above")
    return engine, context


def check_runs(path: str, manifest: Manifest, target: Target, gpu: tuple[str, int] | None) -> None:
    """Check that a plan can be loaded here; warn if it was built on another GPU of the same compute capability.

    Args:
        gpu: name and compute capability, times ten.

    Raises:
        DarktrtError: it was built by another TensorRT or for another GPU, or there is no GPU.
    """
    if gpu is None:
        raise DarktrtError(f"{path}: an engine runs on an NVIDIA GPU, and none is usable here; use the ONNX file instead")
    again = "build it again here with 'darktrt engine'"
    if not (target.runs_plans_of(manifest.target) if manifest.version_compatible else manifest.target == str(target)):
        raise DarktrtError(f"{path}: built by {manifest.target}, here is {target}, which cannot load it; {again}")
    name, capability = gpu
    if manifest.hardware_compatible:
        if capability < 80:
            raise DarktrtError(
                f"{path}: runs on compute capability 8.0 or more, {name} has {dotted_capability(capability)}; {again}"
            )
    elif manifest.compute_capability not in (0, capability):
        wanted = f"{manifest.gpu}, compute capability {dotted_capability(manifest.compute_capability)}"
        raise DarktrtError(f"{path}: built for {wanted}, here is {name}, {dotted_capability(capability)}; {again}")
    elif manifest.gpu not in (None, name):
        LOGGER.warning(f"{path}: built for {manifest.gpu}, here is {name}: faster if built again")


def _load_library(path: str, manifest: Manifest, target: Target, plugins: str | Path | None) -> Path | None:
    """Load the plugin library, which also fits images on the GPU; None where the engine does without and there is none."""
    file = find_library(plugins, target.version_text)
    if file is None and manifest.plugins:
        raise DarktrtError(
            f"{path}: needs the plugins {', '.join(manifest.plugins)}; compile their library with 'darktrt plugins', "
            "or name one by DARKTRT_PLUGINS",
            "plugins",
        )
    if file is None or not target.has_plugins:
        return None
    library = load_plugins(target.load(), file)
    if missing := [plugin for plugin in manifest.plugins if plugin not in library.plugins]:
        raise DarktrtError(f"{path}: needs {missing[0]}, which {file} lacks; compile it with 'darktrt plugins'", "plugins")
    return file
