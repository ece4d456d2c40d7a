"""Stand-ins that record: as much of the module tensorrt as a build uses, and of NVIDIA's driver as memory needs."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import onnx

from darktrt.plugins.ops import OPS

LIBRARY_VERSIONS = {"8.6.0": 8600, "8.6.1": 8601, "10.3.0": 100300, "10.14.1": 101401, "11.0.0": 110000}
"""What ``getInferLibVersion()`` of these answers; it stands in the headers of their calibration caches."""

FLAGS = {"FP16": 0, "INT8": 1, "TF32": 7, "OBEY_PRECISION_CONSTRAINTS": 10, "VERSION_COMPATIBLE": 14}
DATA_TYPES = {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "BOOL": 4, "UINT8": 5, "INT64": 8}
TACTIC_SOURCES = {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2, "EDGE_MASK_CONVOLUTIONS": 3, "JIT_CONVOLUTIONS": 4}
LAYER_TYPES = {
    **dict.fromkeys(("Conv", "ConvTranspose"), "CONVOLUTION"),
    **dict.fromkeys(("LeakyRelu", "Softplus", "Tanh", "Sigmoid", "Relu"), "ACTIVATION"),
    **dict.fromkeys(("Cast",), "CAST"),
    **dict.fromkeys(("Split", "Slice"), "SLICE"),
    **dict.fromkeys(("Transpose", "Reshape"), "SHUFFLE"),
    **dict.fromkeys(OPS, "PLUGIN_V2"),
    "Concat": "CONCATENATION",
    "Constant": "CONSTANT",
    "DequantizeLinear": "DEQUANTIZE",
    "MaxPool": "POOLING",
    "QuantizeLinear": "QUANTIZE",
    "Resize": "RESIZE",
}
"""By the operator of the ONNX node; others are ELEMENTWISE."""

DataType: Any = IntEnum("DataType", DATA_TYPES)
TacticSource: Any = IntEnum("TacticSource", TACTIC_SOURCES)
LayerType: Any = IntEnum("LayerType", sorted({*LAYER_TYPES.values(), "ELEMENTWISE"}))


class Tensor(SimpleNamespace):
    """``name``, ``shape`` and ``dtype``."""


class Layer:
    """With what was asked of it: ``precision`` and, by output, ``output_types``."""

    def __init__(self, name: str, kind: str, inputs: list[Tensor | None], outputs: list[Tensor]) -> None:
        self.name = name
        self.type = LayerType[kind]
        self.precision: Any = None
        self.output_types: dict[int, Any] = {}
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)
        self.get_input, self.get_output = inputs.__getitem__, outputs.__getitem__
        self.set_output_type = self.output_types.__setitem__


class Network:
    """A layer a node of an ONNX file."""

    def __init__(self, flags: int = 0) -> None:
        self.flags = flags
        self.inputs: list[Tensor] = []
        self.layers: list[Layer] = []
        self.get_input, self.get_layer = self.inputs.__getitem__, self.layers.__getitem__

    num_inputs = property(lambda self: len(self.inputs))
    num_layers = property(lambda self: len(self.layers))

    def add(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        known = {value.name: tensor_of(value) for value in (*graph.input, *graph.value_info, *graph.output)}
        self.inputs += [known[value.name] for value in graph.input]
        constants = {constant.name for constant in graph.initializer}

        def tensor(name: str) -> Tensor:
            return known.setdefault(name, Tensor(name=name, shape=(), dtype=DataType.FLOAT))

        for node in graph.node:
            read = [tensor(name) if name else None for name in node.input if name not in constants]
            kind = LAYER_TYPES.get(node.op_type, "ELEMENTWISE")
            self.layers.append(Layer(node.name, kind, read, [tensor(name) for name in node.output if name]))

    def by_output(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.get_output(0).name == name)


def tensor_of(value: onnx.ValueInfoProto) -> Tensor:
    names = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}
    kind = value.type.tensor_type
    shape = tuple(side.dim_value or -1 for side in kind.shape.dim)
    return Tensor(name=value.name, shape=shape, dtype=DataType[names[kind.elem_type]])


class Config:
    """A builder's config, with what was set."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cleared: list[str] = []
        self.pools: dict[str, int] = {}
        self.profiles: list[dict[str, Any]] = []
        self.calibration_profile: dict[str, Any] = {}
        self.sources = 0b11111
        self.int8_calibrator: Any = None
        self.timing_cache: bytes | None = None

    def set_flag(self, flag: Any) -> None:
        self.asked.append(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.cleared.append(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.pools[pool.name] = size

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile.shapes)

    def set_calibration_profile(self, profile: Any) -> None:
        self.calibration_profile = profile.shapes

    def get_tactic_sources(self) -> int:
        return self.sources

    def set_tactic_sources(self, mask: int) -> bool:
        self.sources = mask
        return True

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content.startswith(b"broken") else bytes(content)

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if cache.startswith(b"other GPU") and not ignore_mismatch:
            return False
        self.timing_cache = cache
        return True

    def get_timing_cache(self) -> Any:
        found = self.timing_cache
        return None if found is None else SimpleNamespace(serialize=lambda: memoryview(found + b"+measured"))


class StrongConfig(Config):
    """Of TensorRT 11, which has no calibrators any more."""

    set_calibration_profile = property()  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "int8_calibrator" and value is not None:
            raise AttributeError(name)
        super().__setattr__(name, value)


class FakeTensorRT(SimpleNamespace):
    """The module. ``network`` and ``config`` are those of the last build, ``parsed`` the models of all builds, ``fed`` the
    addresses of the batches that they took.

    Convolutions whose names are in ``faster_in_half`` are not computed in INT8, unless they are pinned to it, nor are those
    pinned to another precision; those in ``disobeys`` never are.
    """

    def __init__(self, version: str, plugins: tuple[str, ...] = (), refuses: str = "") -> None:
        self.__version__ = version
        self.library_version = LIBRARY_VERSIONS[version]
        self.takes_caches = True
        self.plugins = plugins
        self.refuses = refuses
        self.faster_in_half: set[str] = set()
        self.disobeys: set[str] = set()
        self.config = Config()
        self.fed: list[list[int]] = []
        self.parsed: list[onnx.ModelProto] = []
        self.events: list[str] = []
        major = int(version.partition(".")[0])
        flags = {**({"EXPLICIT_BATCH": 0} if major < 11 else {}), **({"STRONGLY_TYPED": 1} if major > 9 else {})}
        self.NetworkDefinitionCreationFlag: Any = IntEnum("NetworkDefinitionCreationFlag", flags)
        removed = () if major < 11 else ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS")
        self.BuilderFlag: Any = IntEnum("BuilderFlag", {name: flag for name, flag in FLAGS.items() if name not in removed})
        self.ProfilingVerbosity = IntEnum("ProfilingVerbosity", ("LAYER_NAMES_ONLY", "DETAILED", "NONE"))
        self.HardwareCompatibilityLevel = IntEnum("HardwareCompatibilityLevel", ("NONE", "AMPERE_PLUS"))
        self.MemoryPoolType = IntEnum("MemoryPoolType", ("WORKSPACE", "DLA_MANAGED_SRAM"))
        self.DataType, self.TacticSource = DataType, TacticSource
        self.ILogger = Base
        self.LayerInformationFormat = SimpleNamespace(JSON="JSON")
        self.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=self.load)
        self.Builder, self.OnnxParser = self._builder, self._parser
        if major < 11:
            self.IInt8EntropyCalibrator2 = Base
        if major > 9:
            self.IProgressMonitor = Base
        find = "get_creator" if major > 9 else "get_plugin_creator"
        self.get_plugin_registry = lambda: SimpleNamespace(
            **{find: lambda name, version, namespace: name if name in plugins and (version, namespace) == ("1", "") else None}
        )

    def _builder(self, _: Any) -> Any:
        def create_network(flags: int) -> Network:
            self.network = Network(flags)
            return self.network

        def create_config() -> Config:
            self.config = Config() if int(self.__version__.partition(".")[0]) < 11 else StrongConfig()
            return self.config

        def create_profile() -> Any:
            shapes: dict[str, Any] = {}
            return SimpleNamespace(shapes=shapes, set_shape=lambda name, *three: shapes.update({name: list(three)}))

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=create_config,
            create_optimization_profile=create_profile,
            build_serialized_network=self.build,
        )

    def _parser(self, network: Network, _: Any) -> Any:
        def parse(model: bytes) -> bool:
            if not self.refuses:
                self.parsed.append(onnx.load_from_string(model))
                network.add(self.parsed[-1])
            return not self.refuses

        error = SimpleNamespace(node=lambda: 7, desc=lambda: self.refuses)
        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda _: error)

    def build(self, network: Network, config: Config) -> bytes | None:
        """A plan; as TensorRT does, calibrate with what the calibrator has, and take its exceptions for the end of the data."""
        if config.int8_calibrator is not None and not self._calibrate(network, config.int8_calibrator):
            return None
        return b"plan"

    def load(self, plan: Any) -> Any:
        """An engine with an inspector."""
        assert bytes(plan) == b"plan"
        inspector = SimpleNamespace(get_engine_information=lambda _: self._layers())
        return SimpleNamespace(create_engine_inspector=lambda: inspector)

    def _layers(self) -> str:
        """The JSON of TensorRT 8.6.0, which has a raw control character between the names of fused nodes."""
        layers = []
        for one in self.network.layers:
            if one.type.name == "CONVOLUTION":
                pinned = one.precision.name if one.precision is not None else ""
                half = pinned == "HALF" or (not pinned and one.name in self.faster_in_half) or one.name in self.disobeys
                kind = "Half" if half else "Int8"
                inputs = [{"Name": "x", "Format/Datatype": "Channel major FP16 format" if half else "Row major Int8 format"}]
                nodes = f"[ONNX Layer: {one.name}]\x1e[ONNX Layer: {one.name}_activation]"
                layers.append({"Name": one.name, "LayerType": "CaskConvolution", "Inputs": inputs, "Outputs": []})
                layers[-1] |= {"ParameterType": "Convolution", "Weights": {"Type": kind, "Count": 9}, "Metadata": nodes}
        return json.dumps({"Layers": layers, "Bindings": []}, ensure_ascii=False).replace("\\u001e", "\x1e")

    def _calibrate(self, network: Network, calibrator: Any) -> bool:
        names = [tensor.name for tensor in network.inputs]
        cache = self._call("read", calibrator.read_calibration_cache)
        if cache is not None and bytes(cache).startswith(b"TRT-") and self.takes_caches:
            return True
        self._call("size", calibrator.get_batch_size)
        while addresses := self._call("get", lambda: calibrator.get_batch(names)):
            self.fed.append(addresses)
        text = b"TRT-%d-EntropyCalibration2\nimages: 3c010a14\ny: 3d5c11b5\n" % self.library_version
        if self.fed:
            self._call("write", lambda: calibrator.write_calibration_cache(memoryview(text)))
        return bool(self.fed)

    def _call(self, event: str, callback: Callable[[], Any]) -> Any:
        self.events.append(event)
        try:
            return callback()
        except BaseException:
            self.events.append("swallowed")
            return None


class Base:
    """Of whatever Python code derives from."""

    ERROR = 1

    def __init__(self, *_: object) -> None:
        pass


class FakeDriver:
    """``libcuda``: GPU memory by address, and the stack of contexts."""

    def __init__(self, current: int = 0, memory: int = 1 << 20) -> None:
        self.contexts = [current] if current else []
        self.memory = memory
        self.buffers: dict[int, bytearray] = {}
        self.retained = 0
        self.uploads: list[bytes] = []
        self.unsynchronized = 0
        self.next_address = 0x1000

    def cuInit(self, _: Any) -> int:  # noqa: N802
        return 0

    def cuGetErrorName(self, status: Any, text: Any) -> int:  # noqa: N802
        text._obj.value = {2: b"CUDA_ERROR_OUT_OF_MEMORY"}[status.value]
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        context._obj.value = self.contexts[-1] if self.contexts else None
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        assert device.value == 0
        context._obj.value = 77
        self.retained += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802
        assert device.value == 0
        self.retained -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, _: Any) -> int:  # noqa: N802
        self.contexts.pop()
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        if sum(map(len, self.buffers.values())) + size.value > self.memory:
            return 2
        self.next_address += 0x1000
        address._obj.value = self.next_address
        self.buffers[self.next_address] = bytearray(size.value)
        self.next_address += size.value // 0x1000 * 0x1000  # no two buffers overlap
        return 0

    def region(self, address: int, size: int) -> memoryview:
        """Bytes of one buffer, from an address inside it."""
        begin = max(base for base in self.buffers if base <= address)
        offset = address - begin
        assert offset + size <= len(self.buffers[begin]), "beyond the end of a buffer"
        return memoryview(self.buffers[begin])[offset : offset + size]

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        del self.buffers[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, address: Any, source: Any, size: Any) -> int:  # noqa: N802
        assert self.contexts and size.value == len(self.buffers[address.value])
        self.buffers[address.value][:] = ctypes.string_at(source.value, size.value)
        self.uploads.append(bytes(self.buffers[address.value]))
        self.unsynchronized += 1
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, address: Any, size: Any) -> int:  # noqa: N802
        assert self.contexts and size.value == len(self.buffers[address.value])
        ctypes.memmove(target.value, bytes(self.buffers[address.value]), size.value)
        return 0

    def cuCtxSynchronize(self) -> int:  # noqa: N802
        self.unsynchronized = 0
        return 0
