"""Running a model: an ONNX file in ONNX Runtime on the CPU, an engine in TensorRT on the GPU."""

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
    """An ONNX Runtime session, to be used as a context; ``info`` is the model's metadata.

    Args:
        threads: the number of threads; by default one for each core.
        gpu: the number of the GPU to run on, with onnxruntime-gpu; by default the CPU.

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
        """Run the model on all its inputs, by name, and return all outputs by name.

        Raises:
            DarktrtError: ONNX Runtime refuses the inputs, or fails inside a damaged model.
        """
        try:
            outputs = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # its exceptions share no base class
            raise DarktrtError(f"{self.path}: ONNX Runtime fails: {str(error).splitlines()[0]}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def buffer(self, batch: int) -> npt.NDArray[Any]:
        """An array of the shape and type of the input ``images`` for ``batch`` images, to write them into."""
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
    """As the engine states it: -1 for a dynamic batch."""
    dtype: np.dtype[Any]
    device: int
    host: npt.NDArray[Any]
    """Pinned, flat."""

    def view(self, batch: int) -> npt.NDArray[Any]:
        """The host memory as an array of the shape for a batch."""
        shape = self.sized(batch)
        return self.host[: int(np.prod(shape))].reshape(shape)

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape for a batch."""
        return tuple(batch if size < 0 else size for size in self.shape)


class PlanRunner:
    """An engine on the GPU, to be used as a context; the same :meth:`run` and ``info`` as :class:`OnnxRunner`.

    Memory on both sides is allocated once, for the largest batch.

    Args:
        path: the plan; its manifest must be beside it.
        plugins: the plugin library, as :func:`darktrt.plugins.library.find_library` has it.
        cuda_graph: record the copies and kernels of the first run of each batch size, and replay them from the second run on.
            That saves kernel launches, which cost small networks most of their time.
        device: the number of the GPU.

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
        """Allocate all inputs and outputs; the shapes of outputs follow from those of the inputs, which come first."""
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
        """Allocate memory on both sides for the present shape of a tensor, its largest one."""
        dtype = np.dtype(DTYPES[self._engine.get_tensor_dtype(name).name])
        count = int(np.prod(shape_of(self._context.get_tensor_shape(name))))
        device = self._driver.allocate(max(count * dtype.itemsize, 1))
        stack.callback(self._driver.free, device)
        self._context.set_tensor_address(name, device)
        shape = shape_of(self._engine.get_tensor_shape(name))
        return _Binding(name, shape, dtype, device, self.stream.pinned((count,), dtype))

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape, -1 for a dynamic batch, and type of every input by name."""
        return {binding.name: (binding.shape, binding.dtype) for binding in self._inputs}

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """Run the engine on all its inputs, by name, and return all outputs by name.

        The outputs are views of memory that the next run overwrites and that the runner frees at its end: copy what is to last.

        Raises:
            DarktrtError: an input is missing or of another type or shape than the engine's; the GPU fails.
        """
        batch = self.prepare(inputs)
        if self._graph and batch in self._recorded:
            self.stream.replay(batch)
        else:
            self._enqueue(batch)  # a recording needs an ordinary run before it
        self.stream.synchronize()
        outputs = {binding.name: binding.view(batch) for binding in self._outputs}
        if self._graph and batch not in self._recorded:
            with self.stream.recording(batch):
                self._enqueue(batch)
            self._recorded.add(batch)
        return outputs

    def buffer(self, batch: int) -> npt.NDArray[Any]:
        """The pinned memory of the input ``images`` for ``batch`` images; :meth:`run` does not copy an array that is in it."""
        return next(binding for binding in self._inputs if binding.name == "images").view(batch)

    def prepare(self, inputs: Mapping[str, npt.NDArray[Any]]) -> int:
        """Copy the inputs into pinned memory, and set their shapes; return the batch.

        Raises:
            DarktrtError: an input is missing or of another type or shape than the engine's.
        """
        batch = len(inputs["images"]) if "images" in inputs else 0
        for binding in self._inputs:
            array = self._checked(binding, inputs.get(binding.name), batch)
            if -1 in binding.shape:
                self._context.set_input_shape(binding.name, binding.sized(batch))
            pinned = binding.view(batch)
            if not _same_memory(array, pinned):
                pinned[...] = array
        return batch

    def _checked(self, binding: _Binding, array: npt.NDArray[Any] | None, batch: int) -> npt.NDArray[Any]:
        low, _, high = self.info.batch
        if array is None or array.shape != binding.sized(batch) or array.dtype != binding.dtype or batch > high:
            actual = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise DarktrtError(
                f"{self.path}: input '{binding.name}' is {actual}; the engine accepts {binding.dtype} {binding.shape}, "
                f"batch {low if low == high else f'{low} to {high}'}"
            )
        return array

    def _enqueue(self, batch: int) -> None:
        for binding in self._inputs:
            self.stream.upload(binding.device, binding.view(batch))
        self.execute()
        for binding in self._outputs:
            self.stream.download(binding.view(batch), binding.device)

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
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
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
