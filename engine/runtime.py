"""Running a model: the ONNX file by ONNX Runtime on the CPU, an engine by TensorRT on the GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from darktrt.calib.trt_calibrator import DTYPES
from darktrt.cuda import Driver, Stream, dotted_capability, first_gpu
from darktrt.engine.manifest import Manifest, read_plan_manifest
from darktrt.engine.target import Target, find_target, flavour_of
from darktrt.engine.trt_types import shape_of
from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo
from darktrt.plugins.library import find_library, load_plugins
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    from darktrt.engine.trt_types import Context, Engine, TensorRT

Tensors = dict[str, npt.NDArray]  # type: ignore[type-arg]


class OnnxRunner:
    """An ONNX Runtime session, to be used as a context.

    ``info`` is the model's metadata; :meth:`run` takes all inputs by name and gives all outputs by name.

    Args:
        threads: how many compute (default: one a core).
        gpu: the GPU to run on, by onnxruntime-gpu (default: the CPU).

    Raises:
        DarktrtError: the file cannot be read, is no ONNX, or was not made by darktrt; there is no such GPU.
    """

    def __init__(self, path: str | Path, threads: int = 0, gpu: int | None = None) -> None:
        import onnxruntime

        self.path = str(path)
        if not Path(path).is_file():
            raise DarktrtError(f"{path}: cannot read: no such file; make it with 'darktrt surgery'")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        options.intra_op_num_threads = threads
        device: list[Any] = ["CPUExecutionProvider"] if gpu is None else [("CUDAExecutionProvider", {"device_id": gpu})]
        if gpu is not None and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise DarktrtError(f"{path}: this ONNX Runtime knows no GPU; install onnxruntime-gpu, or run the model on the CPU")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=device)
        except Exception as error:  # its exceptions share no base class
            first = str(error).splitlines()[0]
            raise DarktrtError(f"{path}: ONNX Runtime cannot load it ({first}); is it an ONNX file?") from error
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map
        except UnicodeDecodeError as error:
            raise DarktrtError(f"{path}: its metadata is damaged; make it with 'darktrt surgery'") from error
        if METADATA_KEY not in metadata:
            raise DarktrtError(f"{path}: has no darktrt metadata; make it with 'darktrt convert' and 'darktrt surgery'")
        self.info = DetectorInfo.from_json(metadata[METADATA_KEY], str(path))
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, npt.NDArray]) -> Tensors:  # type: ignore[type-arg]
        """All outputs by name.

        Raises:
            DarktrtError: ONNX Runtime refuses the inputs, or fails inside a damaged model.
        """
        try:
            outputs = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # its exceptions share no base class
            raise DarktrtError(f"{self.path}: ONNX Runtime fails: {str(error).splitlines()[0]}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def buffer(self, batch: int) -> npt.NDArray[Any]:
        """An array of the shape and type of so many ``images``, to write them into."""
        return np.empty((batch, *self.info.input_shape), self.info.input_dtype)

    def __enter__(self) -> OnnxRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._session


@dataclass(frozen=True)
class _Binding:
    """An input or output of an engine, with memory for its largest shape."""

    name: str
    shape: tuple[int, ...]
    """As the engine has it: -1 where it follows the batch."""
    dtype: np.dtype[Any]
    device: int
    host: npt.NDArray[Any]
    """Pinned, flat."""

    def view(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return self.host[: int(np.prod(shape))].reshape(shape)


class PlanRunner:
    """An engine on the GPU, to be used as a context; the same :meth:`run` and ``info`` as :class:`OnnxRunner`.

    Memory on both sides is taken once, for the largest batch. With ``cuda_graph`` the copies and kernels of a run are recorded
    the first time that a batch size comes, and replayed when it comes again: that spares launches, which cost small networks
    most of their time.

    Raises:
        DarktrtError: the manifest does not fit the plan, this machine's TensorRT or its GPU; a plugin is missing.
    """

    def __init__(self, path: str | Path, plugins: str | Path | None = None, cuda_graph: bool = False, device: int = 0) -> None:
        self.path = str(path)
        self.manifest = read_plan_manifest(path)
        self.info = self.manifest.info
        target = find_target(flavour_of(self.manifest.target))
        check_runs(self.path, self.manifest, target, first_gpu())
        if self.manifest.plugins:
            _load_library(self.path, self.manifest, target, plugins)
        self._trt = target.load()
        self._graph = cuda_graph
        self._recorded: set[int] = set()
        with ExitStack() as stack:
            self._driver = Driver(device)
            stack.callback(self._driver.close)
            with self._driver.current():
                self._engine, self._context = _deserialize(self._trt, self.manifest, Path(path))
            self.stream = Stream(self._driver)
            stack.callback(self.stream.close)
            self._inputs, self._outputs = self._bind(stack)
            self._stack = stack.pop_all()

    def _bind(self, stack: ExitStack) -> tuple[list[_Binding], list[_Binding]]:
        """Memory for all inputs and outputs; the shapes of outputs follow from those of the inputs, which come first."""
        engine, context = self._engine, self._context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        for name in inputs:
            if -1 in shape_of(engine.get_tensor_shape(name)):
                context.set_input_shape(name, shape_of(engine.get_tensor_profile_shape(name, 0)[2]))
        return (
            [self._binding(name, stack) for name in inputs],
            [self._binding(name, stack) for name in names if name not in inputs],
        )

    def _binding(self, name: str, stack: ExitStack) -> _Binding:
        """Memory on both sides for the shape that the context has now, the largest one."""
        dtype = np.dtype(DTYPES[self._engine.get_tensor_dtype(name).name])
        count = int(np.prod(shape_of(self._context.get_tensor_shape(name))))
        device = self._driver.allocate(max(count * dtype.itemsize, 1))
        stack.callback(self._driver.free, device)
        self._context.set_tensor_address(name, device)
        shape = shape_of(self._engine.get_tensor_shape(name))
        return _Binding(name, shape, dtype, device, self.stream.pinned((count,), dtype))

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape, -1 where it follows the batch, and type of every input by name."""
        return {one.name: (one.shape, one.dtype) for one in self._inputs}

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """All outputs by name: views of memory that the next run writes into, and that ends with the runner; copy what is kept.

        Raises:
            DarktrtError: an input is missing or of another type or shape than the engine takes; the GPU fails.
        """
        batch = self.prepare(inputs)
        if self._graph and batch in self._recorded:
            self.stream.replay(batch)
        else:
            self._enqueue(batch)  # also what a recording needs to come after
        self.stream.synchronize()
        outputs = {one.name: one.view(_sized(one.shape, batch)) for one in self._outputs}
        if self._graph and batch not in self._recorded:
            with self.stream.recording(batch):
                self._enqueue(batch)
            self._recorded.add(batch)
        return outputs

    def buffer(self, batch: int) -> npt.NDArray[Any]:
        """Where copies of so many ``images`` to the GPU begin: what is written there, and given to :meth:`run`, is copied no
        more."""
        images = next(one for one in self._inputs if one.name == "images")
        return images.view(_sized(images.shape, batch))

    def prepare(self, inputs: Mapping[str, npt.NDArray[Any]]) -> int:
        """Put the inputs where copies to the GPU begin, and set their shapes; return the batch."""
        batch = len(inputs["images"]) if "images" in inputs else 0
        for one in self._inputs:
            wanted, array = _sized(one.shape, batch), inputs.get(one.name)
            if array is None or array.shape != wanted or array.dtype != one.dtype or batch > self.info.batch[2]:
                given = "missing" if array is None else f"{array.dtype} {array.shape}"
                low, _, high = self.info.batch
                raise DarktrtError(
                    f"{self.path}: input '{one.name}' is {given}; the engine takes {one.dtype} {one.shape}, "
                    f"batch {low if low == high else f'{low} to {high}'}"
                )
            if -1 in one.shape:
                self._context.set_input_shape(one.name, wanted)
            if not _same_memory(array, place := one.view(wanted)):
                place[...] = array
        return batch

    def _enqueue(self, batch: int) -> None:
        for one in self._inputs:
            self.stream.upload(one.device, one.view(_sized(one.shape, batch)))
        self.execute()
        for one in self._outputs:
            self.stream.download(one.view(_sized(one.shape, batch)), one.device)

    def execute(self) -> None:
        """Enqueue the network alone, on what was uploaded last."""
        with self._driver.current():
            if not self._context.execute_async_v3(self.stream.handle):
                raise DarktrtError(f"{self.path}: TensorRT cannot run the engine; see its messages above")

    def time_network(self, calls: int, cuda_graph: bool) -> list[float]:
        """Milliseconds on the GPU of each of so many executions of the network alone, on the inputs of the last run."""
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
        """Milliseconds of each layer of the engine, the mean over so many executions on the inputs of the last run.

        The layers are measured one after the other, so that together they take longer than the engine does. Ends the runner's
        use of CUDA graphs, which a profiler rules out.
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
    """Adds up what TensorRT reports, by layer."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0) + ms

    return Profiler()


def polygraphy_runner(path: str | Path, plugins: str | Path | None = None, name: str | None = None) -> Any:
    """An engine as a runner of Polygraphy, for its Comparator and whatever else takes one.

    Activating it raises what :class:`PlanRunner` does.
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
            for one, (shape, dtype) in self._plan.inputs.items():
                metadata.add(one, dtype, shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, npt.NDArray[Any]]) -> Tensors:
            started = time.perf_counter()
            outputs = self._plan.run(feed_dict)
            self.inference_time = time.perf_counter() - started
            return {name: values.copy() for name, values in outputs.items()}  # the next run writes into the same memory

    return Runner(name or str(path))


def _sized(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    return tuple(batch if side < 0 else side for side in shape)


def _same_memory(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Of two arrays of the same shape and type."""
    return bool(one.ctypes.data == other.ctypes.data and one.strides == other.strides)


def _deserialize(trt: TensorRT, manifest: Manifest, path: Path) -> tuple[Engine, Context]:
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    if manifest.version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan brings the runtime of its own version along
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context() if engine else None
    if context is None:
        raise DarktrtError(f"{path}: TensorRT cannot load the plan; see its message above")
    return engine, context


def check_runs(path: str, manifest: Manifest, target: Target, gpu: tuple[str, int] | None) -> None:
    """See that a plan can be loaded here; that it was built on another GPU of the same kind is only warned of.

    Args:
        gpu: name and compute capability, times ten.

    Raises:
        DarktrtError: it was built by another TensorRT or for another GPU, or there is none.
    """
    if gpu is None:
        raise DarktrtError(f"{path}: an engine runs on an NVIDIA GPU, and none is usable here; use the ONNX file with --model")
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


def _load_library(path: str, manifest: Manifest, target: Target, plugins: str | Path | None) -> None:
    file = find_library(plugins, target.version_text)
    if file is None:
        raise DarktrtError(
            f"{path}: needs the plugins {', '.join(manifest.plugins)}; compile their library with 'darktrt plugins', "
            "or name one by DARKTRT_PLUGINS",
            "plugins",
        )
    library = load_plugins(target.load(), file)
    if missing := [plugin for plugin in manifest.plugins if plugin not in library.plugins]:
        raise DarktrtError(f"{path}: needs {missing[0]}, which {file} lacks; compile it with 'darktrt plugins'", "plugins")
