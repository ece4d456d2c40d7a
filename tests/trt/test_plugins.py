"""The plugin library in a real TensorRT: loading it, and every plugin in every type and format that it offers there.

Needs onnx, onnx-graphsurgeon and numpy beside TensorRT, neither torch nor ONNX Runtime, and the library, which DARKTRT_PLUGINS
names or ``darktrt plugins`` has compiled:

    PYTHONPATH=. python -m pytest --confcutdir=tests/trt tests/trt/test_plugins.py

DARKTRT_TACTIC_SOURCES is given to every build, as ``--tactic-sources`` is. DARKTRT_TEST_MODEL names an ONNX file of ``darktrt
surgery`` for the test of a whole network; beside it lies what ONNX Runtime makes of it, as ``tests/trt/expect.py`` writes it.

The references are NumPy: Mish in float64, and for the heads the op's own body, run by onnx's reference evaluator.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from darktrt.calib.trt_calibrator import DTYPES
from darktrt.cuda import DeviceMemory, Driver, Stream
from darktrt.engine.build import build_file
from darktrt.engine.options import BuildOptions
from darktrt.engine.target import Target, find_target, gpu_name, installed_version
from darktrt.engine.trt_builder import configure
from darktrt.plugins.library import find_library, load_plugins, read_library
from darktrt.plugins.ops import (
    DOMAIN,
    OPSET_VERSION,
    Mish,
    MishAdd,
    MishConcat,
    PlaceBoxes,
    PluginOp,
    Preprocess,
    YoloDecode,
    YoloDetect,
    YoloHeads,
)

LIBRARY = find_library()
MODEL = os.environ.get("DARKTRT_TEST_MODEL")

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(installed_version("trt") is None, reason="TensorRT is not installed"),
    pytest.mark.skipif(LIBRARY is None, reason="there is no plugin library (darktrt plugins)"),
]

Array = NDArray[Any]
Arrays = dict[str, Array]

ROOT = Path(__file__).resolve().parent.parent.parent
BODY_OPSET = 17
ONNX_TYPES = {"FLOAT": TensorProto.FLOAT, "HALF": TensorProto.FLOAT16, "INT32": TensorProto.INT32}
INT32_OUTPUTS = ("num_detections", "detected_classes")
LAYOUTS = {  # vector width, whether channels are last
    "LINEAR": (1, False),
    "CHW4": (4, False),
    "HWC8": (8, True),
    "CHW16": (16, False),
    "CHW32": (32, False),
    "HWC16": (16, True),
}


# --- loading, which needs no GPU ---

NAMES = (  # TensorRT 10 has both lists, the old one without plugins of the new interface; 11 has the new one
    "r = trt.get_plugin_registry(); list_ = 'all_creators' if hasattr(r, 'all_creators') else 'plugin_creator_list'; "
    "print(*(creator.name for creator in getattr(r, list_)))"
)
LOADERS = {
    "dlopen": "import ctypes, tensorrt as trt; ctypes.CDLL(path)",
    "dlopen twice": "import ctypes, tensorrt as trt; ctypes.CDLL(path); ctypes.CDLL(path)",
    "registry": "import tensorrt as trt; assert trt.get_plugin_registry().load_library(path)",
    "dlopen, registry": "import ctypes, tensorrt as trt; ctypes.CDLL(path); "
    "assert trt.get_plugin_registry().load_library(path)",
    "before TensorRT": "import ctypes; ctypes.CDLL(path); import tensorrt as trt; load_plugins(trt, path)",
    "LD_PRELOAD": "import tensorrt as trt",
    "LD_PRELOAD, registry": "import tensorrt as trt; assert trt.get_plugin_registry().load_library(path)",
    "load_plugins": "import tensorrt as trt; load_plugins(trt, path); load_plugins(trt, path)",
}


def in_new_process(code: str, **environment: str) -> str:
    changed = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=changed, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("loader", LOADERS)
def test_every_way_of_loading_registers_the_plugins(loader: str) -> None:
    library = read_library(str(LIBRARY))
    code = (
        f"from darktrt.plugins.library import load_plugins; path = {str(library.path.resolve())!r}; {LOADERS[loader]}; {NAMES}"
    )
    preload = {"LD_PRELOAD": str(library.path.resolve())} if loader.startswith("LD_PRELOAD") else {}
    assert {plugin.partition(":")[0] for plugin in library.plugins} <= set(in_new_process(code, **preload).split())


def field(trt: Any, name: str, value: Any) -> Any:
    """A plugin field as TensorRT's parser makes it of an attribute."""
    if isinstance(value, str):
        return trt.PluginField(name, np.frombuffer(value.encode() + b"\0", np.int8), trt.PluginFieldType.CHAR)
    values = np.atleast_1d(np.array(value))
    if values.dtype.kind == "i":
        return trt.PluginField(name, values.astype(np.int32), trt.PluginFieldType.INT32)
    return trt.PluginField(name, values.astype(np.float32), trt.PluginFieldType.FLOAT32)


def created(trt: Any, op_type: str, attributes: Mapping[str, Any]) -> Any:
    """What the creator makes of fields: a plugin, or None."""
    registry = trt.get_plugin_registry()
    fields = trt.PluginFieldCollection([field(trt, name, value) for name, value in attributes.items()])
    if hasattr(registry, "get_creator"):
        return registry.get_creator(op_type, "1", "").create_plugin("node", fields, trt.TensorRTPhase.BUILD)
    return registry.get_plugin_creator(op_type, "1", "").create_plugin("node", fields)


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "missing": {"beta": None},
    "an unknown kind": {"kind": "soft"},
    "another type": {"classes": 5.0},
    "two for one": {"classes": (5, 5)},
    "too few anchors": {"anchors": (1.0, 2.0, 3.0)},
    "a negative anchor": {"anchors": (10.0, 14.0, 23.0, -27.0, 37.0, 58.0, 81.0, 82.0)},
    "too many anchors": {"anchors": (1.0,) * 68, "anchors_per_head": (1, 33)},
    "no head": {"anchors": (), "anchors_per_head": (), "scale_x_y": (), "new_coords": (), "head_kinds": ()},
    "neither 0 nor 1": {"new_coords": (0, 2)},
    "no kind of head": {"head_kinds": (0, 3)},
    "a region of new_coords": {"head_kinds": (0, 1), "new_coords": (0, 1)},
    "more detections than candidates": {"max_detections": 101},
    "NaN": {"beta": float("nan")},
}


@pytest.mark.parametrize("problem", BAD_FIELDS)
def test_fields_that_make_no_sense_outputs_no_plugin(problem: str) -> None:
    trt = find_target("trt").load()
    load_plugins(trt, str(LIBRARY))
    good = detect("diounms").attributes()
    assert created(trt, "YoloDetectPlugin", good) is not None
    wrong = {name: value for name, value in {**good, **BAD_FIELDS[problem]}.items() if value is not None}
    assert created(trt, "YoloDetectPlugin", wrong) is None


def test_plans_of_another_layout_outputs_no_plugin() -> None:
    """Fields serialized by name come back; anything else, cut anywhere, does not."""
    trt = find_target("trt").load()
    registry = trt.get_plugin_registry()
    if hasattr(registry, "get_creator"):
        pytest.skip("TensorRT serializes the fields itself")
    load_plugins(trt, str(LIBRARY))
    creator = registry.get_plugin_creator("YoloDetectPlugin", "1", "")
    content = bytes(created(trt, "YoloDetectPlugin", detect("greedynms").attributes()).serialize())
    assert bytes(creator.deserialize_plugin("node", content).clone().serialize()) == content
    for bad in (content[:size] for size in range(len(content))):
        assert creator.deserialize_plugin("node", bad) is None
    assert creator.deserialize_plugin("node", content.replace(b"fields 1", b"fields 2")) is None


# --- building and running networks of one node ---


class Lab:
    """TensorRT with the library, one builder, and the GPU."""

    def __init__(self) -> None:
        self.target: Target = find_target("trt")
        self.trt = self.target.load()
        load_plugins(self.trt, str(LIBRARY))
        self.logger = self.trt.Logger(self.trt.Logger.ERROR)
        self.runtime = self.trt.Runtime(self.logger)
        self.driver = Driver()

    def load(self, plan: bytes) -> Any:
        engine = self.runtime.deserialize_cuda_engine(plan)
        assert engine is not None
        return engine


class Workshop(Lab):
    def __init__(self, options: BuildOptions) -> None:
        super().__init__()
        self.options = options
        self.builder = self.trt.Builder(self.logger)

    def build(
        self,
        op: PluginOp,
        shapes: Mapping[str, tuple[int, ...]],
        types: Mapping[str, str] | None = None,
        layout: str = "LINEAR",
        scales: Mapping[str, float] | None = None,
        batch: tuple[int, int, int] | None = None,
        ranges: Mapping[str, tuple[tuple[int, ...], ...]] | None = None,
    ) -> bytes:
        """A plan of one node, whose inputs and outputs named in ``types`` have that type and the layout, without reformats.

        With ``batch`` the first dimension, unless it is the only one, is dynamic in that range; ``ranges`` are the smallest,
        usual and largest shape of inputs of which every dimension that differs is dynamic.
        """
        trt, types, ranges = self.trt, types or {}, ranges or {}
        network = self.builder.create_network(self.network_flags())
        parser = trt.OnnxParser(network, self.logger)
        open_ = {name: ("N", *shape[1:]) if batch and len(shape) > 1 else shape for name, shape in shapes.items()}
        for name, three in ranges.items():
            open_[name] = tuple(
                f"{name}{i}" if len(set(sizes)) > 1 else sizes[0] for i, sizes in enumerate(zip(*three, strict=True))
            )
        model = one_node(op, open_, types)
        assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
        config = self.builder.create_builder_config()
        configure(trt, config, self.options, self.target)
        config.set_flag(trt.BuilderFlag.DIRECT_IO)
        for flag, kind in (("FP16", "HALF"), ("INT8", "INT8")):
            if self.target.weakly_typed and (kind in types.values() or (flag == "INT8" and scales)):
                config.set_flag(getattr(trt.BuilderFlag, flag))
        profile = self.builder.create_optimization_profile()
        for tensor in tensors_of(network):
            if tensor.name in types:
                if self.target.weakly_typed:
                    tensor.dtype = trt.DataType.__members__[types[tensor.name]]
                tensor.allowed_formats = 1 << int(trt.TensorFormat.__members__[layout])
            if scales and tensor.name in scales:
                tensor.set_dynamic_range(-127 * scales[tensor.name], 127 * scales[tensor.name])
            if batch and tensor.is_network_input and tensor.shape[0] == -1:
                profile.set_shape(tensor.name, *((n, *tuple(tensor.shape)[1:]) for n in batch))
        for name, three in ranges.items():
            profile.set_shape(name, *three)
        if batch or ranges:
            config.add_optimization_profile(profile)
        plan = self.builder.build_serialized_network(network, config)
        assert plan is not None
        return bytes(plan)

    def network_flags(self) -> int:
        flag = self.target.network_flag
        return 1 << int(getattr(self.trt.NetworkDefinitionCreationFlag, flag)) if flag else 0


class Session:
    """A context of an engine with memory and a stream of its own; four-dimensional tensors of ``packed`` lie as ``layout``."""

    def __init__(self, lab: Lab, engine: Any, layout: str = "LINEAR", packed: frozenset[str] = frozenset()) -> None:
        self.trt, self.engine, self.context = lab.trt, engine, engine.create_execution_context()
        self.layout, self.packed = layout, packed
        self.memory, self.stream = DeviceMemory(), Stream(lab.driver)
        self.names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    def is_input(self, name: str) -> bool:
        return bool(self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT)

    def prepare(self, inputs: Arrays) -> None:
        for name in filter(self.is_input, self.names):
            array = inputs[name].astype(self._dtype(name))
            if -1 in tuple(self.engine.get_tensor_shape(name)):
                self.context.set_input_shape(name, array.shape)
            array = packed(array, self.layout) if name in self.packed else array
            self.context.set_tensor_address(name, self.memory.upload(name, array))
        self.outputs = {}
        for name in self.names:
            if not self.is_input(name):
                array = np.zeros(tuple(self.context.get_tensor_shape(name)), self._dtype(name))
                self.outputs[name] = packed(array, self.layout) if name in self.packed else array
                self.context.set_tensor_address(name, self.memory.reserve(name, self.outputs[name].nbytes))

    def enqueue(self) -> None:
        assert self.context.execute_async_v3(self.stream.handle)

    def results(self) -> Arrays:
        self.stream.synchronize()
        found = {}
        for name, array in self.outputs.items():
            self.memory.download(name, array)
            shape = tuple(self.engine.get_tensor_shape(name))
            found[name] = unpacked(array, self.layout, shape[1]) if name in self.packed else array
        return found

    def run(self, inputs: Arrays) -> Arrays:
        self.prepare(inputs)
        self.enqueue()
        return self.results()

    def _dtype(self, name: str) -> Any:
        return np.dtype(DTYPES[self.engine.get_tensor_dtype(name).name])

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stream.synchronize()
        del self.context
        self.memory.free()
        self.stream.close()


def tensors_of(network: Any) -> list[Any]:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    return inputs + [network.get_output(i) for i in range(network.num_outputs)]


def one_node(
    op: PluginOp,
    shapes: Mapping[str, tuple[int | str, ...]],
    types: Mapping[str, str] | None = None,
    body: bool = False,
) -> onnx.ModelProto:
    def value(name: str) -> onnx.ValueInfoProto:
        usual = "INT32" if name in INT32_OUTPUTS else "FLOAT"
        kind = ONNX_TYPES.get((types or {}).get(name, usual), TensorProto.FLOAT)
        return helper.make_tensor_value_info(name, kind, shapes.get(name))

    outputs = [value(name) for name in op.output_names]
    node = helper.make_node(op.op_type, op.input_names, op.output_names, "node", domain=DOMAIN, **op.attributes())
    graph = helper.make_graph([node], "one", [value(name) for name in op.input_names], outputs)
    opsets = [helper.make_opsetid("", BODY_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    functions = [op.body(BODY_OPSET)] if body else []
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=8)


def packed(array: Array, layout: str) -> Array:
    """``(N, C, H, W)`` as TensorRT lays it out, with 77 in the padding channels, which nobody may read."""
    slots, last = LAYOUTS[layout]
    batch, channels, rows, columns = array.shape
    blocks = -(-channels // slots)
    full = np.full((batch, blocks * slots, rows, columns), 77, array.dtype)
    full[:, :channels] = array
    if last:
        return np.ascontiguousarray(full.transpose(0, 2, 3, 1))
    return np.ascontiguousarray(full.reshape(batch, blocks, slots, rows, columns).transpose(0, 1, 3, 4, 2))


def unpacked(array: Array, layout: str, channels: int) -> Array:
    slots, last = LAYOUTS[layout]
    if last:
        return array.transpose(0, 3, 1, 2)[:, :channels]
    batch, blocks, rows, columns, _ = array.shape
    return array.transpose(0, 1, 4, 2, 3).reshape(batch, blocks * slots, rows, columns)[:, :channels]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_go_round(layout: str) -> None:
    array = np.arange(2 * 37 * 3 * 5, dtype=np.float32).reshape(2, 37, 3, 5)
    assert np.array_equal(unpacked(packed(array, layout), layout, 37), array)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    if gpu_name() is None:
        pytest.skip("no NVIDIA GPU is usable here")
    times = tmp_path_factory.mktemp("times") / "timing.cache"
    return Workshop(
        BuildOptions(tactic_sources=os.environ.get("DARKTRT_TACTIC_SOURCES"), optimization_level=0, timing_cache=times)
    )


# --- Mish and its relatives ---


def mish(x: Array) -> Array:
    """In float64; tanh(softplus(x)) without cancellation."""
    x = x.astype(np.float64)
    n = np.exp(np.minimum(x, 30.0))
    n = n * (n + 2)
    return np.where(x > 30, x, x * n / (n + 2))


MISHES: dict[str, tuple[PluginOp, Callable[..., Array]]] = {
    "Mish": (Mish(), mish),
    "MishAdd": (MishAdd(), lambda x, residual: mish(x) + residual),
    "MishConcat": (MishConcat(), lambda x, second: np.concatenate([mish(x), mish(second)], 1)),
}
KINDS = [  # types of inputs and output, layouts
    ("FLOAT", "FLOAT", ("LINEAR",)),  # TensorRT 8.6.0 refuses CHW32 of FP32 at the edge of a network
    ("HALF", "HALF", ("LINEAR", "HWC8", "CHW32", "HWC16")),  # and CHW16, which is for DLA
    ("INT8", "INT8", ("LINEAR", "CHW4", "CHW32", "HWC16")),
    ("HALF", "INT8", ("LINEAR", "CHW32", "HWC16")),
]
IN_SCALE, OUT_SCALE = 0.05, 0.04


def stored(shape: tuple[int, ...], kind: str, seed: int) -> Array:
    """Numbers of this type: around zero, and some far from it."""
    random = np.random.default_rng(seed)
    if kind == "INT8":
        return random.integers(-128, 128, shape, np.int8)
    values = random.normal(0, 3, shape)
    values.flat[:6] = 0, -40, 40, 1e-4, -1e-4, 21
    return values.astype(DTYPES[kind])


def assert_computed(found: Array, expected: Array, kind: str) -> None:
    """FP32 and FP16 but for rounding; INT8 the nearest level, either of both at a tie."""
    if kind == "INT8":
        levels = np.clip(expected / OUT_SCALE, -128, 127)
        assert np.abs(found - levels).max() <= 0.501
    else:
        tolerance = {"FLOAT": 1e-6, "HALF": 1e-3}[kind]
        np.testing.assert_allclose(found.astype(np.float64), expected, rtol=tolerance, atol=5e-6)


@pytest.mark.parametrize(
    ("taken", "given", "layout"), [(taken, given, layout) for taken, given, layouts in KINDS for layout in layouts]
)
@pytest.mark.parametrize("name", MISHES)
def test_mish_in_every_type_and_format(lab: Workshop, name: str, taken: str, given: str, layout: str) -> None:
    """With channels that are no multiple of the vector width, except where a concat needs it; no reformat can come between."""
    if given == "INT8" and not lab.target.weakly_typed:
        pytest.skip(f"{lab.target} has no scales of tensors")
    if given == "INT8" and layout == "HWC16" and lab.target.version < (10,):
        pytest.skip(f"{lab.target} has no HWC16 of INT8")
    op, reference = MISHES[name]
    channels = dict.fromkeys(op.input_names, 37) if name != "MishConcat" else {"x": 32, "second": 64}
    shapes = {input_: (2, channels[input_], 5, 6) for input_ in op.input_names}
    arrays = {input_: stored(shape, taken, i) for i, (input_, shape) in enumerate(shapes.items())}
    types = {**dict.fromkeys(op.input_names, taken), "y": given}
    # TensorRT chooses CHW32 only beside INT8, and INT8 only where there are scales
    quantized = {name for name, kind in types.items() if kind == "INT8" or layout == "CHW32"}
    scales = {name: OUT_SCALE if name == "y" else IN_SCALE for name in quantized}
    engine = lab.load(lab.build(op, shapes, types, layout, scales))
    with Session(lab, engine, layout, frozenset(types)) as session:
        found = session.run(arrays)["y"]
    values = [array.astype(np.float64) * (IN_SCALE if taken == "INT8" else 1) for array in arrays.values()]
    assert_computed(found, reference(*values), given)


def test_mish_of_any_rank(lab: Workshop) -> None:
    for shape in ((7,), (3, 5), (2, 3, 5), (2, 3, 4, 5, 6)):
        array = stored(shape, "FLOAT", 0) if len(shape) > 1 else np.linspace(-9, 9, 7, dtype=np.float32)
        with Session(lab, lab.load(lab.build(Mish(), {"x": shape}))) as session:
            assert_computed(session.run({"x": array})["y"], mish(array), "FLOAT")


# --- heads ---

CLASSES, SIZE = 7, (96, 64)
HEAD_GRIDS = ((2, 3), (4, 6))
HEADS: dict[str, Any] = {
    "anchors": (10.0, 14.0, 23.0, 27.0, 37.0, 58.0, 81.0, 82.0),
    "anchors_per_head": (3, 1),
    "scale_x_y": (1.05, 1.2),
    "new_coords": (0, 0),
    "head_kinds": (0, 0),
    "classes": CLASSES,
    "input_size": SIZE,
}


def detect(kind: Any, letterbox: int = 0, head_kinds: tuple[int, ...] = (0, 0)) -> YoloDetect:
    options = {"beta": 0.7, "max_candidates": 100, "max_detections": 30, "letterbox": letterbox, "head_kinds": head_kinds}
    return YoloDetect(**{**HEADS, **options}, kind=kind)


def head_inputs(op: PluginOp, batch: int, seed: int, kind: str = "FLOAT") -> Arrays:
    """All inputs of an op on heads: logits of this type, here and there not finite, thresholds, sizes of images."""
    random = np.random.default_rng(seed)
    inputs: Arrays = {}
    assert isinstance(op, YoloHeads)
    for i, (anchors, head_kind) in enumerate(zip(op.anchors_per_head, op.head_kinds, strict=True)):
        channels = anchors * ((9 if head_kind == 2 else 5) + CLASSES)
        logits = random.normal(-0.5, 1.5, (batch, channels, *HEAD_GRIDS[i]))
        inputs[f"head{i}_raw"] = logits.astype(DTYPES[kind])
    if isinstance(op, YoloDetect):
        inputs["head0_raw"].flat[:9:4] = np.nan, np.inf, -np.inf
        inputs |= {"score_threshold": np.array([0.1], np.float32), "iou_threshold": np.array([0.4], np.float32)}
        inputs |= {"image_size": np.tile(np.array([[96, 48]], np.float32), (batch, 1))} if op.letterbox else {}
    return inputs


def by_reference(op: PluginOp, inputs: Arrays) -> Arrays:
    model = one_node(op, {}, body=True)
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(model).run(None, {name: array.astype(np.float32) for name, array in inputs.items()})
    return dict(zip(op.output_names, found, strict=True))


def head_engine(lab: Workshop, op: PluginOp, kind: str = "FLOAT", batch: tuple[int, int, int] | int = 2) -> bytes:
    static = batch if isinstance(batch, int) else 1
    shapes = {name: array.shape for name, array in head_inputs(op, static, 0).items()}
    types = {name: kind for name in shapes if name.startswith("head")}
    return lab.build(op, shapes, types, batch=None if isinstance(batch, int) else batch)


def assert_detections(found: Arrays, expected: Arrays) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["FLOAT", "HALF"])
@pytest.mark.parametrize(
    "op",
    [
        YoloDecode(**HEADS),
        YoloDecode(**{**HEADS, "new_coords": (1, 0)}),
        YoloDecode(**{**HEADS, "head_kinds": (1, 0)}),
        YoloDecode(**{**HEADS, "head_kinds": (2, 2)}),
        detect("plain"),
        detect("greedynms"),
        detect("diounms", 1),
        detect("plain", head_kinds=(1, 1)),
        detect("plain", head_kinds=(0, 1)),
        detect("greedynms", head_kinds=(2, 0)),
    ],
    ids="decode new_coords decode-region decode-Gaussian plain greedynms letterbox region yolo-region Gaussian-yolo".split(),
)
def test_heads(lab: Workshop, op: PluginOp, kind: str) -> None:
    inputs = head_inputs(op, 2, 1, kind)
    with Session(lab, lab.load(head_engine(lab, op, kind))) as session:
        found = session.run(inputs)
    expected = by_reference(op, inputs)
    assert_detections(found, expected)
    if isinstance(op, YoloDetect):
        assert found["num_detections"].min() > 5


def test_nothing_above_the_threshold(lab: Workshop) -> None:
    op = detect("greedynms")
    inputs = head_inputs(op, 2, 1) | {"score_threshold": np.array([1], np.float32)}
    with Session(lab, lab.load(head_engine(lab, op))) as session:
        assert not any(array.any() for array in session.run(inputs).values())


def test_heads_that_do_not_fit_are_refused(lab: Workshop) -> None:
    shapes = {"head0_raw": (1, 36, 2, 3), "head1_raw": (1, 13, 4, 6)}
    network = lab.builder.create_network(lab.network_flags())
    parser = lab.trt.OnnxParser(network, lab.logger)
    parsed = parser.parse(one_node(YoloDecode(**HEADS), shapes).SerializeToString())
    config = lab.builder.create_builder_config()
    configure(lab.trt, config, lab.options, lab.target)
    assert not parsed or lab.builder.build_serialized_network(network, config) is None


# --- images ---


def images_of(width: int, height: int, count: int = 2) -> Array:
    return np.random.default_rng(width).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kinds", ["FLOAT FLOAT", "HALF FLOAT", "FLOAT HALF", "HALF HALF"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("letterbox", [0, 1])
def test_preprocess(lab: Workshop, kinds: str, channels: int, letterbox: int) -> None:
    """Images of any size in one engine, to the bits of the body."""
    given, made = kinds.split()
    if made == "HALF" and not lab.target.weakly_typed:
        pytest.skip("the type of an output is the plugin's own, which is FP32")
    op = Preprocess((96, 64), channels, letterbox)
    three = (1, 1, 1, 3), (2, 300, 400, 3), (4, 1080, 1920, 3)
    plan = lab.build(op, {"images": three[1]}, {"images": given, "pixels": made}, ranges={"images": three})
    with Session(lab, lab.load(plan)) as session:
        for size in ((1, 1), (53, 37), (1, 9), (61, 256), (640, 480), (1920, 1080)):
            inputs = {"images": images_of(*size)}
            outputs = session.run(inputs)
            for name, array in by_reference(op, inputs).items():
                found = outputs[name]
                assert found.dtype == (DTYPES[made] if name == "pixels" else np.float32)
                np.testing.assert_array_equal(found, array.astype(found.dtype), err_msg=name)


def test_placed_boxes(lab: Workshop) -> None:
    op = PlaceBoxes()
    placement = by_reference(Preprocess((96, 64), 3, 1), {"images": images_of(640, 480)})["placement"]
    inputs = {"boxes": np.random.default_rng(0).uniform(-20, 120, (2, 30, 4)).astype(np.float32), "placement": placement}
    with Session(lab, lab.load(lab.build(op, {name: array.shape for name, array in inputs.items()}))) as session:
        np.testing.assert_array_equal(session.run(inputs)["placed"], by_reference(op, inputs)["placed"])


# --- batches, contexts, processes ---


@pytest.mark.parametrize("op", [detect("diounms"), YoloDecode(**HEADS)], ids=["detect", "decode"])
def test_a_dynamic_batch(lab: Workshop, op: PluginOp) -> None:
    with Session(lab, lab.load(head_engine(lab, op, batch=(1, 4, 8)))) as session:
        for batch in (1, 8, 3):
            inputs = head_inputs(op, batch, batch)
            assert_detections(session.run(inputs), by_reference(op, inputs))


@pytest.mark.parametrize("name", MISHES)
def test_mish_of_a_dynamic_batch(lab: Workshop, name: str) -> None:
    op, reference = MISHES[name]
    shapes = dict.fromkeys(op.input_names, (1, 16, 5, 7))
    with Session(lab, lab.load(lab.build(op, shapes, batch=(1, 4, 8)))) as session:
        for batch in (1, 8, 3):
            arrays = {input_: stored((batch, 16, 5, 7), "FLOAT", i + batch) for i, input_ in enumerate(op.input_names)}
            assert_computed(session.run(arrays)["y"], reference(*arrays.values()), "FLOAT")


def test_two_contexts_on_two_streams_at_once(lab: Workshop) -> None:
    op = detect("diounms")
    engine = lab.load(head_engine(lab, op, batch=4))
    first, second = head_inputs(op, 4, 1), head_inputs(op, 4, 2)
    with Session(lab, engine) as one, Session(lab, engine) as two:
        one.prepare(first)
        two.prepare(second)
        for _ in range(200):
            one.enqueue()
            two.enqueue()
        assert_detections(one.results(), by_reference(op, first))
        assert_detections(two.results(), by_reference(op, second))


def test_a_recorded_graph_replays(lab: Workshop) -> None:
    op = detect("diounms")
    inputs = head_inputs(op, 2, 3)
    with Session(lab, lab.load(head_engine(lab, op))) as session:
        expected = session.run(inputs)
        with session.stream.recording():
            session.enqueue()
        session.prepare(inputs)
        session.stream.replay()
        assert all(np.array_equal(array, expected[name]) for name, array in session.results().items())


IN_NEW_PROCESS = """
import sys
sys.path[:0] = [{tests!r}]
import numpy as np
from test_plugins import Lab, Session
lab = Lab()
files = {files!r}
with Session(lab, lab.load(open(files["plan"], "rb").read())) as session:
    np.savez(files["outputs.npz"], **session.run(dict(np.load(files["inputs.npz"]))))
"""


def test_a_plan_runs_in_a_new_process(lab: Workshop, tmp_path: Path) -> None:
    op = detect("diounms", 1)
    inputs = head_inputs(op, 2, 5)
    plan = head_engine(lab, op)
    files = {name: str(tmp_path / name) for name in ("plan", "inputs.npz", "outputs.npz")}
    Path(files["plan"]).write_bytes(plan)
    np.savez(files["inputs.npz"], **inputs)
    code = IN_NEW_PROCESS.format(tests=str(Path(__file__).parent), files=files)
    in_new_process(code, DARKTRT_PLUGINS=str(LIBRARY))
    with Session(lab, lab.load(plan)) as session:
        expected = session.run(inputs)
    outputs = np.load(files["outputs.npz"])
    assert all(np.array_equal(outputs[name], array) for name, array in expected.items())


# --- a whole network ---

SCORE_TOLERANCE = {"fp32": 0.01, "fp16": 0.03}
"""TF32 in convolutions, half precision throughout."""


def overlap(box: Array, boxes: Array) -> Array:
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    inner = np.maximum(high - low, 0).prod(1)
    return inner / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - inner)


def unmatched(some: Arrays, others: Arrays, image: int, above: float, tolerance: float) -> Iterator[str]:
    """Detections with a score ``above`` that have no like among others: the same class, nearly the score and the box."""
    count, counts = int(some["num_detections"][image, 0]), int(others["num_detections"][image, 0])
    for i in range(count):
        score, class_ = some["scores"][image, i], some["classes"][image, i]
        same = (others["classes"][image, :counts] == class_) & (abs(others["scores"][image, :counts] - score) < tolerance)
        boxes = others["boxes"][image, :counts][same]
        if score > above and not (overlap(some["boxes"][image, i], boxes) > 0.9).any():
            yield f"image {image}: class {class_}, score {score:.3f}"


@pytest.mark.skipif(MODEL is None, reason="DARKTRT_TEST_MODEL names no ONNX file")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_whole_network(lab: Workshop, tmp_path: Path, precision: Any) -> None:
    """The detections of ONNX Runtime, in both directions."""
    file = Path(str(MODEL))
    expected = dict(np.load(file.with_suffix(".npz")))
    manifest = build_file(file, tmp_path / "a.plan", replace(lab.options, precision=precision, target="trt", plugins=LIBRARY))
    assert "YoloDetectPlugin:1" in manifest.plugins
    assert manifest.plugin_library["sha256"] == read_library(str(LIBRARY)).sha256
    with Session(lab, lab.load((tmp_path / "a.plan").read_bytes())) as session:
        found = session.run(expected)
    tolerance, threshold = SCORE_TOLERANCE[precision], float(expected["score_threshold"][0])
    for image in range(len(expected["images"])):
        assert not [*unmatched(expected, found, image, threshold + tolerance, tolerance)]
        assert not [*unmatched(found, expected, image, threshold + tolerance, tolerance)]
    assert expected["num_detections"].min() > 0
