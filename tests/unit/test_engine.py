"""Targets by version, lowering, real builds by TensorRT for RTX, the manifest, and running ONNX files."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from fake_tensorrt import Config, FakeDriver, FakeTensorRT, Network
from helpers import MADE_CFG, Made, batch_of_images, files_in, made_image, make, run, thresholds
from onnx import parser
from PIL import Image

from darktrt import progress as progress_module
from darktrt.calib.graph import tensors_to_calibrate
from darktrt.calib.table import CalibrationTable
from darktrt.calib.trt_calibrator import BatchSource
from darktrt.cli import main
from darktrt.engine import build as build_module
from darktrt.engine import int8_rebuild, timing_cache
from darktrt.engine import target as target_module
from darktrt.engine.build import build_file
from darktrt.engine.lower import lower
from darktrt.engine.manifest import Manifest, manifest_path, read_manifest, read_plan_manifest
from darktrt.engine.options import BuildOptions, Precision
from darktrt.engine.runtime import OnnxRunner
from darktrt.engine.target import Target, find_target, gpu_name, installed_version
from darktrt.engine.trt_builder import Built, build
from darktrt.engine.weak_typing import Calibrated, GpuCalibration, NetworkMap, set_precision
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import METADATA_KEY, DetectorInfo, Thresholds
from darktrt.onnx_file import load_model
from darktrt.plugins.ops import DOMAIN, OPS
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
rtx = pytest.mark.skipif(NO_RTX, reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, where timing caches go."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return folder


# --- targets ---

FACTS = [  # version, weakly typed, bodies
    ((8, 6, 1), True, "keep"),
    ((9, 0, 1), True, "drop"),
    ((9, 3, 0), True, "drop"),
    ((10, 0, 1), True, "drop"),
    ((10, 6, 0), True, "drop"),
    ((10, 7, 0), True, "keep"),
    ((10, 14, 1), True, "keep"),
    ((10, 15, 0), True, "keep"),
    ((11, 0, 0), False, "keep"),
]


@pytest.mark.parametrize(("version", "weakly_typed", "bodies"), FACTS)
def test_facts_of_full_tensorrt(version: tuple[int, ...], weakly_typed: bool, bodies: str) -> None:
    target = Target("trt", version)
    assert (target.weakly_typed, target.bodies) == (weakly_typed, bodies)
    assert target.has_plugins
    assert not target.builds_without_gpu
    assert str(target) == f"TensorRT {'.'.join(map(str, version))}"


@pytest.mark.parametrize(
    ("version", "facts"),  # network flag, version in caches, progress monitor, parser that names nodes, bodies run
    [
        ((8, 6, 0), ("EXPLICIT_BATCH", "8600", False, False, False)),
        ((8, 6, 1), ("EXPLICIT_BATCH", "8601", False, False, False)),
        ((10, 0, 1), (None, "100001", True, True, False)),
        ((10, 3), (None, "100300", True, True, False)),
        ((10, 14, 1), (None, "101401", True, True, True)),
        ((11, 0, 0), ("STRONGLY_TYPED", "110000", True, True, True)),
    ],
)
def test_more_facts_of_full_tensorrt(version: tuple[int, ...], facts: tuple[object, ...]) -> None:
    t = Target("trt", version)
    assert (t.network_flag, t.cache_version, t.has_progress_monitor, t.names_parser_nodes, t.runs_bodies) == facts


@pytest.mark.parametrize("version", [(1, 0, 0), (1, 7, 1), (2, 0, 0)])
def test_facts_of_tensorrt_for_rtx(version: tuple[int, ...]) -> None:
    target = Target("rtx", version)
    assert (target.weakly_typed, target.has_plugins, target.bodies) == (False, False, "inline")
    assert (target.network_flag, target.has_progress_monitor, target.names_parser_nodes) == ("STRONGLY_TYPED", True, True)
    assert target.builds_without_gpu
    assert str(target).startswith("TensorRT for RTX ")


def machine(monkeypatch: pytest.MonkeyPatch, gpu: str | None = None, **versions: str) -> None:
    """Pretend that these flavours are installed, and this GPU."""
    monkeypatch.setattr(target_module, "installed_version", versions.get)
    monkeypatch.setattr(target_module, "gpu_name", lambda: gpu)
    monkeypatch.setattr(target_module, "_load", lambda flavour: SimpleNamespace(__version__=versions[flavour]))


def test_auto_accepts_full_tensorrt_where_a_gpu_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "NVIDIA L4", trt="10.3.0", rtx="1.7.1.116")
    assert find_target() == Target("trt", (10, 3, 0))
    machine(monkeypatch, None, trt="10.3.0", rtx="1.7.1.116")
    assert find_target() == Target("rtx", (1, 7, 1))
    machine(monkeypatch, "NVIDIA L4", rtx="1.7.1.116")
    assert find_target() == Target("rtx", (1, 7, 1))
    machine(monkeypatch, "NVIDIA L4", trt="10.3.0.post1")
    assert find_target() == Target("trt", (10, 3, 0))


def test_a_choice_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, None, trt="8.6.1", rtx="1.7.1")
    assert find_target("trt") == Target("trt", (8, 6, 1))
    machine(monkeypatch, "NVIDIA L4", trt="8.6.1", rtx="1.7.1")
    assert find_target("rtx") == Target("rtx", (1, 7, 1))


def test_what_is_missing_is_reported_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, None, trt="10.3.0")
    with pytest.raises(
        DarktrtError, match=r"builds only on an NVIDIA GPU and none is usable here; pip install 'darktrt\[rtx\]'"
    ):
        find_target()
    machine(monkeypatch, "NVIDIA L4")
    with pytest.raises(DarktrtError, match=r"no TensorRT is installed; pip install 'darktrt\[rtx\]'.*'darktrt\[trt\]'"):
        find_target()
    with pytest.raises(DarktrtError, match=r"TensorRT for RTX is not installed; pip install 'darktrt\[rtx\]'"):
        find_target("rtx")
    with pytest.raises(DarktrtError, match=r"TensorRT is not installed; pip install 'darktrt\[trt\]'"):
        find_target("trt")


def test_a_library_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(target_module.importlib, "import_module", fails)
    with pytest.raises(DarktrtError, match=r"TensorRT is installed but does not load \(libnvinfer.*\); pip install"):
        Target("trt", (10, 3)).load()


def test_the_installed_version_is_read_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("tensorrt", None, origin="tensorrt/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "tensorrt" else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"tensorrt": "10.3.0"}[name])
    assert installed_version("trt") == "10.3.0"
    assert installed_version("rtx") is None


@pytest.mark.parametrize(("status", "name"), [(0, "NVIDIA L4"), (3, None)])
def test_the_gpus_name_comes_from_the_driver(monkeypatch: pytest.MonkeyPatch, status: int, name: str | None) -> None:
    def get_name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"NVIDIA L4"
        return 0

    asked = {"cuDeviceGet": lambda *_: 0, "cuDeviceGetAttribute": lambda *_: 0, "cuDeviceGetName": get_name}
    driver = SimpleNamespace(cuInit=lambda _: status, **asked)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert gpu_name() == name


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu_name() is None


# --- lowering ---


def custom_nodes(model: onnx.ModelProto) -> int:
    return sum(node.domain == DOMAIN for node in model.graph.node)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("version", "weakly_typed", "bodies"), FACTS)
def test_full_tensorrt_keeps_the_nodes(
    made: Made, version: tuple[int, ...], weakly_typed: bool, bodies: str, precision: Any
) -> None:
    model = lower(made.transformed(), made.info, Target("trt", version), precision)
    assert custom_nodes(model) == 7
    assert len(model.functions) == (0 if bodies == "drop" else 2)
    halves = sum(i.data_type == onnx.TensorProto.FLOAT16 for i in model.graph.initializer)
    assert bool(halves) == (precision == "fp16" and not weakly_typed)
    assert METADATA_KEY in {p.key for p in model.metadata_props}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rtx_gets_standard_ops_only(made: Made, precision: Any) -> None:
    model = lower(made.transformed(), made.info, Target("rtx", (1, 7)), precision)
    onnx.checker.check_model(model, full_check=True)
    assert (custom_nodes(model), len(model.functions)) == (0, 0)
    assert METADATA_KEY in {p.key for p in model.metadata_props}
    names = [node.name for node in model.graph.node if node.name]
    assert len(set(names)) == len(names)


def lowered(
    made: Made, monkeypatch: pytest.MonkeyPatch, version: str, precision: Any, plugins: Any = tuple(OPS), **options: Any
) -> onnx.ModelProto:
    """A made model for a full TensorRT whose library has registered these ops."""
    full(monkeypatch, version, plugins=plugins)
    model = made.transformed(**options)
    info = DetectorInfo.from_json({p.key: p.value for p in model.metadata_props}[METADATA_KEY], "model")
    lowered = lower(model, info, Target("trt", tuple(map(int, version.split(".")))), precision)
    if lowered.functions:
        onnx.checker.check_model(lowered, full_check=True)
    return lowered


def ops_of(model: onnx.ModelProto) -> dict[str, int]:
    found = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN or node.op_type == "Softplus")
    return dict(sorted(found.items()))


FORMS = {
    "plugin": {"MishPlugin": 6, "YoloDetectPlugin": 1},
    "fused": {"MishAddPlugin": 1, "MishPlugin": 5, "YoloDetectPlugin": 1},
    "native": {"Softplus": 6, "YoloDetectPlugin": 1},
}


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "10.14.1", "11.0.0"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_mish_becomes_what_the_target_likes(
    made: Made, monkeypatch: pytest.MonkeyPatch, version: str, precision: str, form: str
) -> None:
    """With the same numbers, in FP32, and no body where the parser would prefer one."""
    monkeypatch.setattr(Target, "mish_form", lambda _, asked: {precision: form}[asked])
    model = lowered(made, monkeypatch, version, precision)
    assert ops_of(model) == FORMS[form]
    assert bool(model.functions) == (version != "10.3.0")
    assert METADATA_KEY in {p.key for p in model.metadata_props}
    if precision == "fp32" and model.functions:
        given = {"images": batch_of_images(made.info, 2), **thresholds(0.01)}
        expected = run(made.transformed(mish="plugin"), given)
        for name, array in run(model, given).items():
            np.testing.assert_array_equal(array, expected[name])


def test_every_precision_has_a_form_of_mish() -> None:
    assert {Target("trt", (10, 3)).mish_form(precision) for precision in get_args(Precision)} <= {"plugin", "fused", "native"}


@pytest.mark.parametrize("plugins", [(), ("MishPlugin", "YoloDetectPlugin"), ("YoloDetectPlugin",)])
def test_without_its_plugins_mish_becomes_standard_ops(
    made: Made, monkeypatch: pytest.MonkeyPatch, plugins: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Target, "mish_form", lambda *_: "fused")
    assert ops_of(lowered(made, monkeypatch, "8.6.1", "fp32", plugins)) == FORMS["native"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("likes", FORMS)
def test_a_stated_form_of_mish_stays(made: Made, monkeypatch: pytest.MonkeyPatch, form: str, likes: str) -> None:
    """Whatever the target likes, and whether or not it has the plugins."""
    monkeypatch.setattr(Target, "mish_form", lambda *_: likes)
    for plugins in (tuple(OPS), ()):
        assert ops_of(lowered(made, monkeypatch, "8.6.1", "fp16", plugins, mish=form)) == FORMS[form]


def test_a_network_without_mish_asks_for_no_plugin_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaky = make(tmp_path, MADE_CFG.replace("activation=mish", "activation=leaky"))
    model = lowered(leaky, monkeypatch, "8.6.1", "fp32", ())
    assert ops_of(model) == {"YoloDetectPlugin": 1}


def test_lowering_for_rtx_changes_no_number(made: Made) -> None:
    given = {"images": batch_of_images(made.info, 2), **thresholds(0.01)}
    expected = run(made.transformed(), given)
    for name, array in run(lower(made.transformed(), made.info, Target("rtx", (1, 7)), "fp32"), given).items():
        np.testing.assert_array_equal(array, expected[name])


# --- building ---


@pytest.fixture(scope="module")
def static(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("static"), made.cfg.read_text())


@rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", ["static", "dynamic"])
def test_rtx_builds_a_mish_network_with_nms(made: Made, static: Made, tmp_path: Path, precision: Any, batch: str) -> None:
    source, plan = tmp_path / "portable.onnx", tmp_path / "model.plan"
    insert_plugins((static if batch == "static" else made).plain, source, SurgeryOptions())
    manifest = build_file(source, plan, BuildOptions(precision, "rtx"))
    assert files_in(tmp_path) == ["model.json", "model.plan", "portable.onnx"]
    assert plan.stat().st_size > 10_000
    assert manifest.target.startswith("TensorRT for RTX 1.")
    assert (manifest.precision, manifest.gpu, manifest.plugins) == (precision, None, ())
    assert manifest.plan_sha256 == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert manifest.onnx_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest.info.batch == ((1, 1, 1) if batch == "static" else (1, 3, 3))
    assert read_plan_manifest(plan) == manifest


@rtx
def test_half_halves_the_plan(made: Made, tmp_path: Path) -> None:
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions(head="raw"))
    sizes = []
    for precision in ("fp32", "fp16"):
        build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions(precision, "rtx"))  # type: ignore[arg-type]
        sizes.append((tmp_path / "a.plan").stat().st_size)
    assert sizes[1] < sizes[0]


@rtx
def test_a_plain_model_builds_too(made: Made, tmp_path: Path) -> None:
    assert build_file(made.plain, tmp_path / "a.plan", BuildOptions("fp16", "rtx")).info.head == "decoded"


@rtx
def test_a_network_that_the_parser_refuses_is_reported_in_its_words(made: Made) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "odd": 1]> g (float[1,3,8,8] images) => (float[1,3,8,8] y)
        { y = odd.Odd (images) }"""
    model = parser.parse_model(text)
    model.graph.node[0].name = "odd_one"
    with pytest.raises(DarktrtError, match=r"TensorRT for RTX 1.* cannot parse the network: node 'odd_one' \(Odd\): "):
        build(model.SerializeToString(), made.info, find_target("rtx"), BuildOptions("fp32"))


@rtx
def test_a_network_that_the_builder_refuses_is_reported_in_its_words(made: Made) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1,9,4] images, float[1,2,9] s) => (int64[n,3] y)
        { y = NonMaxSuppression (images, s) }"""
    with pytest.raises(DarktrtError, match=r"TensorRT for RTX 1.* cannot (build the engine|parse the network): \S"):
        build(parser.parse_model(text).SerializeToString(), made.info, find_target("rtx"), BuildOptions("fp32"))


FAILURES: dict[str, Callable[[], Exception]] = {
    "refused": lambda: DarktrtError("no"),
    "interrupted": KeyboardInterrupt,  # type: ignore[dict-item]
    "full": lambda: OSError(28, "No space left on device"),
    "bug": lambda: RuntimeError("no"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_build_leaves_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    (tmp_path / "old.plan").write_bytes(b"old")
    (tmp_path / "old.json").write_text("old")

    def fails(*_: object) -> bytes:
        assert len(files_in(tmp_path)) in (5, 6)
        raise FAILURES[name]()

    monkeypatch.setattr(int8_rebuild, "build", fails)
    machine(monkeypatch, None, rtx="1.7.1")
    for plan in ("new.plan", "old.plan"):
        with pytest.raises((DarktrtError, KeyboardInterrupt, RuntimeError)):
            build_file(tmp_path / "a.onnx", tmp_path / plan, BuildOptions("fp32", "rtx"))
        assert files_in(tmp_path) == ["a.onnx", "old.json", "old.plan"]
    assert (tmp_path / "old.plan").read_bytes() == b"old"


def test_no_plan_without_its_manifest(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    (tmp_path / "model.json").mkdir()
    monkeypatch.setattr(int8_rebuild, "build", lambda *_: Built(memoryview(b"plan")))
    machine(monkeypatch, None, rtx="1.7.1")
    with pytest.raises(DarktrtError, match=r"model\.json: is a folder"):
        build_file(tmp_path / "a.onnx", tmp_path / "model.plan", BuildOptions("fp32", "rtx"))
    with pytest.raises(DarktrtError, match=r"model\.json: \.json is the manifest's name"):
        build_file(tmp_path / "a.onnx", tmp_path / "model.json", BuildOptions("fp32", "rtx"))
    with pytest.raises(DarktrtError, match=r"a\.onnx: is given twice"):
        build_file(tmp_path / "a.onnx", tmp_path / "a.onnx", BuildOptions("fp32", "rtx"))
    assert files_in(tmp_path) == ["a.onnx", "model.json"]


# --- full TensorRT, with a stand-in that records ---


def full(monkeypatch: pytest.MonkeyPatch, version: str, **options: Any) -> FakeTensorRT:
    """Pretend that this TensorRT is installed, with a GPU."""
    trt = FakeTensorRT(version, **options)
    machine(monkeypatch, "NVIDIA L4", trt=version)
    monkeypatch.setattr(target_module, "_load", lambda _: trt)
    monkeypatch.setattr(timing_cache, "gpu_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(build_module, "first_gpu", lambda: ("NVIDIA L4", 89))
    monkeypatch.setattr(build_module, "find_library", lambda *_: None)  # plugins are there, or not, as ``options`` has it
    return trt


PLUGINS = tuple(OPS)
OBEY = "OBEY_PRECISION_CONSTRAINTS"


@pytest.mark.parametrize(
    ("version", "flags", "network"),
    [("8.6.1", ["FP16", OBEY], 1 << 0), ("10.3.0", ["FP16", OBEY], 0), ("11.0.0", [], 1 << 1)],
)
def test_full_tensorrt_is_asked_in_its_own_way(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, flags: list[str], network: int
) -> None:
    """Flags by version, a profile for the dynamic inputs, plugins and GPU in the manifest."""
    trt = full(monkeypatch, version, plugins=PLUGINS)
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp16", "auto"))
    assert trt.config.asked == flags
    assert trt.network.flags == network
    assert trt.config.profiles == [{"images": [(1, 64, 96, 3), (3, 64, 96, 3), (3, 64, 96, 3)]}]
    assert hasattr(trt.config, "progress_monitor") == (version != "8.6.1")
    assert trt.config.profiling_verbosity.name == "DETAILED"
    assert manifest.plugins == ("MishAddPlugin:1", "MishPlugin:1", "YoloDetectPlugin:1")
    assert manifest.gpu == "NVIDIA L4"
    assert manifest.target == f"TensorRT {version}"
    assert (tmp_path / "a.plan").read_bytes() == b"plan"


@pytest.mark.parametrize(("version", "needed"), [("8.6.1", True), ("10.3.0", True), ("10.14.1", False)])
def test_a_missing_plugin_library_is_reported(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, needed: bool
) -> None:
    full(monkeypatch, version, plugins=("MishPlugin",))
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    if not needed:
        assert build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp16", "trt")).precision == "fp16"
        return
    with pytest.raises(DarktrtError) as caught:
        build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp16", "trt"))
    assert str(caught.value) == (
        f"TensorRT {version} needs YoloDetectPlugin from darktrt's plugin library, which is missing; compile it with "
        "'darktrt plugins', or do without: a model that ends at the raw heads, with Mish as standard ops, or TensorRT for RTX"
    )
    assert files_in(tmp_path) == ["a.onnx"]


def test_decoding_stays_fp32(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer behind the raw heads, and none before them, in a plain model as in one with plugins."""
    for model, plugins in ((made.model(), ()), (made.transformed(mish="native"), PLUGINS)):
        trt = full(monkeypatch, "8.6.1", plugins=plugins)
        build(model.SerializeToString(), made.info, Target("trt", (8, 6, 1)), BuildOptions("fp16"))
        heads = [head.tensor for head in made.info.heads]
        reached = set(heads)
        for node in model.graph.node:
            if reached.intersection(node.input):
                reached.update(node.output)
        pinned = [layer for layer in trt.network.layers if layer.precision is not None]
        assert {layer.precision.name for layer in pinned} == {"FLOAT"}
        floats = [layer for layer in trt.network.layers if layer.get_output(0).name in reached - set(heads)]
        assert [layer.name for layer in pinned] == [layer.name for layer in floats if layer.type.name != "CAST"]
        for layer in pinned:
            kinds = [layer.get_output(i).dtype.name for i in range(layer.num_outputs)]
            assert sorted(layer.output_types) == [i for i, kind in enumerate(kinds) if kind == "FLOAT"]
            assert {kind.name for kind in layer.output_types.values()} == {"FLOAT"}


def test_a_head_that_later_layers_read_divides_nothing(made: Made) -> None:
    """Decoding is what lies behind the heads and not before another one; constants need no scale."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1,8,8,8] images) => (float[1,8,8,8] z, float[1,8,8,8] w)
        <float[8,8,1,1] k> {
            a = Conv (images, k)
            head0 = Conv (a, k)
            two = Constant <value_float = 2.0> ()
            b = Mul (head0, two)
            head1 = Conv (b, k)
            y = Sigmoid (head0)
            z = Add (y, head1)
            w = Tanh (a)
        }"""
    network = Network()
    network.add(parser.parse_model(text))
    head = made.info.heads[0]
    info = replace(made.info, heads=(replace(head, tensor="head0"), replace(head, tensor="head1")))
    found = NetworkMap(network, info)
    assert [layer.get_output(0).name for layer in found.behind_heads()] == ["y", "z"]
    assert found.activations() == ["images", "a", "head0", "b", "head1"]
    assert [layer.get_output(0).name for layer in found.fp_layers(["head0"])] == ["head0", "b"]
    with pytest.raises(DarktrtError, match="TensorRT's network has no tensor 'other', a head"):
        NetworkMap(network, replace(made.info, heads=(replace(head, tensor="other"),)))


def test_layers_without_a_float_output_are_not_pinned(made: Made) -> None:
    """Behind the heads there are shapes, indices and casts too; TensorRT refuses a precision for some of them."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1,8,8,8] images)
        => (float[1,8,8,8] y, int64[1,1,8,8] best, int64[4] sides, float16[1,8,8,8] half) <float[8,8,1,1] k> {
            head0 = Conv (images, k)
            y = Sigmoid (head0)
            best = ArgMax <axis = 1> (head0)
            sides = Shape (head0)
            half = Cast <to = 10> (head0)
        }"""
    trt, network, config = FakeTensorRT("8.6.1"), Network(), Config()
    network.add(parser.parse_model(text))
    info = replace(made.info, heads=(replace(made.info.heads[0], tensor="head0"),))
    set_precision(trt, config, NetworkMap(network, info), int8=False)
    assert [one.get_output(0).name for one in network.layers if one.precision is not None] == ["y"]
    assert [one.get_output(0).name for one in network.layers if one.output_types] == ["y"]
    assert config.asked == ["FP16", OBEY]


def test_the_manifest_has_the_seconds_of_the_build(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, "8.6.1")
    clock = iter([1000.0, 1003.26])
    monkeypatch.setattr(build_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    manifest = build_file(made.plain, tmp_path / "a.plan", BuildOptions("fp32", "trt"))
    assert manifest.build_seconds == 3.3 == read_plan_manifest(tmp_path / "a.plan").build_seconds


def raw(made: Made, folder: Path, **options: Any) -> tuple[Path, dict[str, np.float32]]:
    """A model without custom nodes, and a table for it."""
    file = folder / "raw.onnx"
    insert_plugins(made.plain, file, SurgeryOptions(head="raw", mish="native", **options))
    model, info = load_model(file)
    return file, {name: np.float32(0.01 + i) for i, name in enumerate(tensors_to_calibrate(model, info))}


@pytest.mark.parametrize("form", ["float", "uint8"])
@pytest.mark.parametrize(("version", "header"), [("8.6.0", "8600"), ("8.6.1", "8601"), ("10.3.0", "100300")])
def test_int8_serves_the_table_under_its_own_version(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
    header: str,
    form: str,
) -> None:
    trt = full(monkeypatch, version)
    source, scales = raw(made, tmp_path, input=form)
    manifest = build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales))
    assert trt.config.asked == ["FP16", "INT8", OBEY]
    assert trt.events == ["read"]
    text = bytes(trt.config.int8_calibrator.read_calibration_cache()).decode()
    assert text == CalibrationTable(scales, header).text()
    shape = (64, 96, 3) if form == "uint8" else (3, 64, 96)
    assert trt.config.calibration_profile == {"images": [(3, *shape)] * 3}
    assert manifest.precision == "int8"
    assert caplog.messages == []


def pinned_names(trt: FakeTensorRT) -> list[str]:
    return [layer.name for layer in trt.network.layers if layer.precision is not None and layer.precision.name == "HALF"]


def test_floating_point_layers_are_pinned_with_their_activations(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = full(monkeypatch, "8.6.1")
    source, scales = raw(made, tmp_path)
    convolutions = [node for node in load_model(source)[0].graph.node if node.op_type == "Conv"]
    build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales))
    pinned = [
        layer.name for layer in trt.network.layers if layer.name in pinned_names(trt) and layer.type.name == "CONVOLUTION"
    ]
    heads = {head.tensor for head in made.info.heads}
    assert pinned == [node.name for i, node in enumerate(convolutions) if i == 0 or node.output[0] in heads]
    first = convolutions[0].output[0]
    mish = [layer for layer in trt.network.layers if layer.name in pinned_names(trt) and layer.type.name != "CONVOLUTION"]
    assert [layer.type.name for layer in mish] == ["ACTIVATION", "ACTIVATION", "ELEMENTWISE"]
    assert mish[0].get_input(0).name == mish[2].get_input(0).name == first
    assert not any(layer.output_types for layer in trt.network.layers)

    one = convolutions[2].name
    build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales, (one,)))
    assert [name for name in pinned_names(trt) if name in {node.name for node in convolutions}] == [one]
    build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales, ()))
    assert pinned_names(trt) == []
    with pytest.raises(DarktrtError, match="'nobody' is no convolution of this network"):
        build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales, ("nobody",)))


def test_tensors_inside_fused_nodes_are_not_missed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A Mish is fused into its add; its own output then has a scale and no tensor."""
    full(monkeypatch, "8.6.1", plugins=PLUGINS)
    monkeypatch.setattr(Target, "mish_form", lambda *_: "fused")
    file = tmp_path / "auto.onnx"
    insert_plugins(made.plain, file, SurgeryOptions(head="raw"))
    scales = {name: np.float32(0.1) for name in tensors_to_calibrate(*load_model(file))}
    assert "MishAddPlugin:1" in build_file(file, tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales)).plugins
    assert not any("not in the network" in message for message in caplog.messages)


def test_where_table_and_network_differ_is_reported(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full(monkeypatch, "10.3.0")
    source, scales = raw(made, tmp_path)
    heads = [head.tensor for head in made.info.heads]
    for head in heads:
        del scales[head]
    scales |= {f"other_{i}": np.float32(1) for i in range(5)}
    build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales))
    assert caplog.messages == [
        "2 tensors of the network have no scale in the calibration, so the layers at them are not INT8: " + ", ".join(heads),
        "5 tensors of the calibration are not in the network: other_0, other_1, other_2, ...",
    ]
    first = next(node.input[0] for node in load_model(source)[0].graph.node if node.op_type == "Conv")
    del scales[first]
    with pytest.raises(DarktrtError, match=f"has no scale for 1 tensors of this network, '{first}' among them"):
        build_file(source, tmp_path / "b.plan", BuildOptions("int8", "trt"), Calibration(scales, ()))
    assert "b.plan" not in files_in(tmp_path)


def test_int8_of_a_model_with_qdq_nodes_needs_no_calibrator(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = full(monkeypatch, "8.6.1")
    _, scales = raw(made, tmp_path)
    insert_plugins(made.plain, tmp_path / "q.onnx", SurgeryOptions(head="raw", mish="native", calibration=Calibration(scales)))
    build_file(tmp_path / "q.onnx", tmp_path / "a.plan", BuildOptions("int8", "trt"))
    assert trt.config.asked == ["FP16", "INT8", OBEY]
    assert trt.config.int8_calibrator is None
    assert pinned_names(trt) == []
    with pytest.raises(DarktrtError, match="has Q/DQ nodes already"):
        build_file(tmp_path / "q.onnx", tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales))


def test_int8_without_a_table_is_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, "8.6.1")
    source, _ = raw(made, tmp_path)
    with pytest.raises(DarktrtError, match="INT8 needs a calibration"):
        build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"))


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0"])
def test_a_refused_table_leaves_no_plan(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    trt = full(monkeypatch, version)
    trt.takes_caches = False
    source, scales = raw(made, tmp_path)
    with pytest.raises(DarktrtError, match="this TensorRT does not accept the calibration cache"):
        build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"), Calibration(scales))
    assert files_in(tmp_path) == ["raw.onnx"]


def test_a_build_can_be_fed_batches(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "10.3.0")
    source, _ = raw(made, tmp_path, input="float")
    model, info = load_model(source)
    asked = []

    class Fed:
        batch = 2

        def begin(self, inputs: Any) -> None:
            assert inputs["images"].shape == (2, 3, 64, 96)

        def next_batch(self, names: Any) -> list[int] | None:
            asked.append(names)
            return [4096] if len(asked) < 3 else None

        def read_cache(self) -> None:
            return None

        def write_cache(self, cache: bytes) -> None:
            assert cache.startswith(b"TRT-100300-")

    build(model.SerializeToString(), info, find_target("trt"), BuildOptions("int8"), Calibrated(Fed()))
    assert asked == [["images"]] * 3
    assert trt.fed == [[4096]] * 2
    assert trt.config.calibration_profile == {"images": [(2, 3, 64, 96)] * 3}


def test_a_failed_calibration_stops_the_build_where_it_can(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "10.3.0")
    source, _ = raw(made, tmp_path)
    model, info = load_model(source)
    went_on = []

    def build_on(network: Any, config: Any) -> bytes:
        config.progress_monitor.phase_start("Tactics", None, 2)
        for step in range(2):
            if step == 1:
                FakeTensorRT.build(trt, network, config)
            went_on.append(config.progress_monitor.step_complete("Tactics", step))
        return b"plan"

    monkeypatch.setattr(trt, "build", build_on)
    with BatchSource([], 1) as nothing, pytest.raises(DarktrtError, match="there is no batch of images"):
        build(model.SerializeToString(), info, find_target("trt"), BuildOptions("int8"), Calibrated(nothing))
    assert went_on == [True, False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_build_is_an_interrupt_not_an_error(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Whatever TensorRT makes of being stopped; the handlers are put back."""
    trt = full(monkeypatch, "10.3.0")
    source, _ = raw(made, tmp_path)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    for plan in (None, b"plan"):
        monkeypatch.setattr(trt, "build", lambda *_, plan=plan: signal.raise_signal(number) or plan)
        with pytest.raises(KeyboardInterrupt):
            build_file(source, tmp_path / "a.plan", BuildOptions("fp16", "trt"))
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert files_in(tmp_path) == ["raw.onnx"]


def test_an_old_parser_is_reported_too(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, "8.6.1", refuses="no importer for Odd")
    with pytest.raises(DarktrtError, match=r"^TensorRT 8\.6\.1 cannot parse the network: node number 7: no importer for Odd$"):
        build(b"", made.info, find_target("trt"), BuildOptions("fp32"))


# --- how TensorRT goes about it ---


def build_with(made: Made, folder: Path, **options: Any) -> None:
    if not (folder / "raw.onnx").exists():
        raw(made, folder)
    build_file(folder / "raw.onnx", folder / "a.plan", BuildOptions("fp32", "trt", **options))


@pytest.mark.parametrize(
    ("options", "argument", "said"),
    [
        ({"precision": "int4"}, "precision", "'int4' is not one of fp32, fp16, int8"),
        ({"target": "gpu"}, "target", "'gpu' is not one of auto, rtx, trt"),
        ({"optimization_level": 6}, "optimization_level", "the optimization level is 6, not 0 to 5"),
        ({"workspace": 0}, "workspace", "a workspace of 0 MiB; it must be at least 1 MiB"),
        ({"batch": (4, 2, 8)}, "batch", "4,2,8: write smallest, usual and largest batch"),
        ({"batch": (0, 1, 1)}, "batch", "each not below the one before, such as 1,4,16"),
    ],
)
def test_impossible_options_are_refused(options: Any, argument: str, said: str) -> None:
    with pytest.raises(DarktrtError, match=said) as caught:
        BuildOptions(**options)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("-CUDNN", 0b11011),
        ("-CUDNN,-CUBLAS,-CUBLAS_LT", 0b11000),
        ("-cudnn,+CUDNN", 0b11111),
        ("+CUBLAS", 0b11111),
        ("-CUDNN,-CUDNN", 0b11011),
    ],
)
def test_tactic_sources_are_added_and_left_out(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mask: int
) -> None:
    trt = full(monkeypatch, "8.6.0")
    build_with(made, tmp_path, tactic_sources=text)
    assert trt.config.sources == mask


@pytest.mark.parametrize("text", ["CUDNN", "-CUFFT", "-CUDNN CUBLAS", "-", "-CUDNN,"])
def test_other_tactic_sources_are_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    full(monkeypatch, "8.6.0")
    with pytest.raises(
        DarktrtError, match=r"is not \+ or - and one of TensorRT 8\.6\.0's libraries: CUBLAS, CUBLAS_LT, CUDNN, "
    ):
        build_with(made, tmp_path, tactic_sources=text)


def test_the_optimization_level_is_passed_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "8.6.0")
    build_with(made, tmp_path)
    assert not hasattr(trt.config, "builder_optimization_level")
    build_with(made, tmp_path, optimization_level=0)
    assert trt.config.builder_optimization_level == 0


def test_the_timing_cache_is_read_and_written(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, "8.6.0")
    cache = tmp_path / "timing.cache"
    build_with(made, tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"+measured"
    build_with(made, tmp_path, timing_cache=str(cache))
    assert cache.read_bytes() == b"+measured+measured"
    for content in (b"broken", b"other GPU"):
        cache.write_bytes(content)
        with pytest.raises(DarktrtError, match=r"timing\.cache: is no timing cache of TensorRT 8\.6\.0 on this GPU; delete it"):
            build_with(made, tmp_path, timing_cache=cache)
        assert cache.read_bytes() == content
    for taken in ("a.plan", "raw.onnx", "a.json"):
        with pytest.raises(DarktrtError, match="is given twice"):
            build_with(made, tmp_path, timing_cache=tmp_path / taken)


def test_by_default_each_tensorrt_and_gpu_has_a_timing_cache(
    made: Made, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that does not fit is ignored under a warning, and one that cannot be written loses no engine."""
    full(monkeypatch, "8.6.0")
    build_with(made, tmp_path)
    fp_layers = home / ".cache" / "darktrt" / "timing" / "TensorRT-8.6.0-NVIDIA-L4.cache"
    assert fp_layers.read_bytes() == b"+measured"
    fp_layers.write_bytes(b"broken")
    build_with(made, tmp_path)
    assert "timing cache of TensorRT 8.6.0 on this GPU; all times are measured anew" in caplog.text
    assert fp_layers.read_bytes() == b"+measured"
    build_with(made, tmp_path, timing_cache="none")
    assert fp_layers.read_bytes() == b"+measured"
    fp_layers.unlink()
    fp_layers.mkdir()
    build_with(made, tmp_path)
    assert "cannot be kept" in caplog.text
    assert (tmp_path / "a.plan").exists()


def test_options_become_the_builders(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "8.6.0")
    build_with(made, tmp_path)
    config = trt.config
    assert (config.pools, config.cleared, hasattr(config, "hardware_compatibility_level")) == ({}, [], False)
    build_with(made, tmp_path, workspace=64, tf32=False, hardware_compatible=True, version_compatible=True)
    config = trt.config
    assert (config.pools, config.cleared, config.asked) == ({"WORKSPACE": 64 << 20}, ["TF32"], ["VERSION_COMPATIBLE"])
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    manifest = read_plan_manifest(tmp_path / "a.plan")
    assert (manifest.tf32, manifest.hardware_compatible, manifest.version_compatible) == (False, True, True)
    assert (manifest.gpu, manifest.compute_capability) == ("NVIDIA L4", 89)


def test_another_range_of_batches(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "8.6.0")
    build_with(made, tmp_path, batch=(2, 4, 16))
    assert trt.config.profiles == [{"images": [(n, 64, 96, 3) for n in (2, 4, 16)]}]
    assert read_plan_manifest(tmp_path / "a.plan").info.batch == (2, 4, 16)
    build_with(made, tmp_path, batch=(4, 4, 4))  # still a profile, for the model's batch is open
    assert trt.config.profiles == [{"images": [(4, 64, 96, 3)] * 3}]


def test_a_static_batch_stays(static: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, "8.6.0")
    insert_plugins(static.plain, tmp_path / "raw.onnx", SurgeryOptions(head="raw"))
    size = static.info.batch[0]
    with pytest.raises(DarktrtError, match=rf"the model accepts only batches of {size}; convert it again with"):
        build_with(static, tmp_path, batch=(1, 4, 16))
    build_with(static, tmp_path, batch=static.info.batch)


def test_strongly_typed_where_it_can_be(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 by Q/DQ nodes and FP16 by types, without a flag or a calibrator."""
    trt = full(monkeypatch, "10.3.0")
    source, scales = raw(made, tmp_path)
    build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt", strongly_typed=True), Calibration(scales))
    assert (trt.network.flags, trt.config.asked, trt.config.int8_calibrator) == (1 << 1, [], None)
    assert "QUANTIZE" in {layer.type.name for layer in trt.network.layers}
    full(monkeypatch, "8.6.1")
    with pytest.raises(DarktrtError, match=r"TensorRT 8\.6\.1 cannot take types from the ONNX file; leave strong typing out"):
        build_with(made, tmp_path, strongly_typed=True)


def test_standard_ops_in_place_of_plugins(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "10.3.0", plugins=PLUGINS)
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    for plugins, taken in ((None, 3), ("none", 0)):
        manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp16", "trt", plugins))
        assert len(manifest.plugins) == taken
        assert ("PLUGIN_V2" in {layer.type.name for layer in trt.network.layers}) == bool(taken)
    full(monkeypatch, "8.6.0", plugins=PLUGINS)
    with pytest.raises(DarktrtError, match=r"TensorRT 8\.6\.0 lacks some standard ops of the custom nodes' bodies"):
        build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp16", "trt", "none"))


def fed(source: Path, count: int = 4) -> GpuCalibration:
    """Images of noise for TensorRT's own calibration."""
    info = load_model(source)[1]
    noise = np.random.default_rng(0).integers(0, 256, (count, 1, info.height, info.width, 3), np.uint8)
    return GpuCalibration(BatchSource(({"images": one} for one in noise), 1))


def test_tensorrt_finds_the_scales_itself(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is written beside the plan, and is a calibration for the next build."""
    trt = full(monkeypatch, "8.6.0")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver(current=5))
    source, _ = raw(made, tmp_path)
    calibration = fed(source)
    manifest = build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt"), calibration)
    assert calibration.images.count == len(trt.fed) == 4
    assert trt.config.asked == ["FP16", "INT8", OBEY]
    assert CalibrationTable.load(tmp_path / "a.cache").scales.keys() == {"images", "y"}
    assert manifest.calibration_sha256 == sha256_of(tmp_path / "a.cache")
    assert "left in FP16" in manifest.other_convolutions.values()
    trt.faster_in_half = set(manifest.int8_convolutions)
    forced = build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt", force_int8=True), fed(source))
    assert forced.int8_convolutions == manifest.int8_convolutions != ()
    with pytest.raises(DarktrtError, match=r"a\.cache: is given twice"):
        build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt", timing_cache=tmp_path / "a.cache"), fed(source))


def test_calibrating_on_the_gpu_from_the_command_line(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = full(monkeypatch, "8.6.0", plugins=PLUGINS)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver(current=5))
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions(thresholds=Thresholds(0.25, 0.45)))
    for i in range(3):
        Image.fromarray(made_image(64, 96, seed=i)).save(tmp_path / f"{i}.png")
    command = ["engine", f"{tmp_path}/a.onnx", "-o", f"{tmp_path}/a.plan", "--target", "trt", "--precision", "int8"]
    assert main([*command, "--calibrate-on", "gpu", "--data", f"{tmp_path}/*.png"]) == 0
    assert len(trt.fed) == 3
    assert f"{tmp_path}/a.cache: the scales that TensorRT found" in capsys.readouterr().out
    assert main([*command, "--calibrate-on", "gpu"]) == 2
    assert "--data DATA and --precision int8 go together" in capsys.readouterr().err


@pytest.mark.parametrize(("version", "strong"), [("11.0.0", False), ("10.3.0", True)])
def test_where_there_is_no_calibrator_it_is_reported(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, strong: bool
) -> None:
    full(monkeypatch, version)
    source, _ = raw(made, tmp_path)
    with pytest.raises(
        DarktrtError, match=r"TensorRT .* (has no calibrator|cannot calibrate where .*); calibrate with 'darktrt calib run'"
    ):
        build_file(source, tmp_path / "a.plan", BuildOptions("int8", "trt", strongly_typed=strong), fed(source))
    assert files_in(tmp_path) == ["raw.onnx"]


def test_a_build_without_a_progress_monitor_shows_the_time(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = full(monkeypatch, "8.6.0")
    monkeypatch.setattr(trt, "build", lambda *_: time.sleep(1.2) or b"plan")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress_module, "_shown", "bar")
    build_with(made, tmp_path)
    assert "TensorRT 8.6.0 measures kernels, 00:01" in capsys.readouterr().err


@rtx
def test_rtx_accepts_what_it_has_of_these_options(made: Made, tmp_path: Path) -> None:
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions(head="raw"))
    build_file(
        tmp_path / "a.onnx",
        tmp_path / "a.plan",
        BuildOptions("fp16", "rtx", None, "-EDGE_MASK_CONVOLUTIONS", 1, workspace=512, tf32=False),
    )
    for options, said in (
        (BuildOptions(tactic_sources="-CUDNN"), r"one of TensorRT for RTX 1.*'s libraries: EDGE_MASK_CONVOLUTIONS, "),
        (
            BuildOptions(timing_cache=tmp_path / "timing.cache"),
            "TensorRT for RTX 1.* measures nothing while it builds; leave the timing cache out",
        ),
        (BuildOptions(hardware_compatible=True), "TensorRT for RTX .* always builds for many GPUs .*; leave the option out"),
    ):
        with pytest.raises(DarktrtError, match=said):
            build_file(tmp_path / "a.onnx", tmp_path / "b.plan", replace(options, precision="fp16", target="rtx"))
    assert files_in(tmp_path) == ["a.json", "a.onnx", "a.plan"]


# --- manifests ---


@pytest.fixture
def planned(made: Made, tmp_path: Path) -> Path:
    """A plan of a few bytes with its manifest."""
    plan = tmp_path / "fp16.plan"
    plan.write_bytes(b"a plan")
    digest = hashlib.sha256(b"a plan").hexdigest()
    manifest = Manifest(digest, "0" * 64, "TensorRT 10.3.0", "NVIDIA L4", "fp16", ("MishPlugin:1",), 12.5, made.info)
    manifest_path(plan).write_text(manifest.to_json())
    return plan


def test_a_manifest_goes_round(planned: Path, made: Made) -> None:
    manifest = read_plan_manifest(planned)
    assert manifest.info == made.info
    assert manifest.plugins == ("MishPlugin:1",)
    assert read_manifest(planned.with_suffix(".json")) == manifest
    assert manifest.to_json() == planned.with_suffix(".json").read_text()
    assert json.loads(manifest.to_json())["format"] == 1


def test_a_changed_plan_is_noticed(planned: Path) -> None:
    planned.write_bytes(b"another plan")
    with pytest.raises(DarktrtError, match=r"fp16\.plan: is not the plan that .*fp16\.json describes; build the engine again"):
        read_plan_manifest(planned)


def test_missing_files_are_named(planned: Path) -> None:
    planned.unlink()
    with pytest.raises(DarktrtError, match=r"fp16\.plan: cannot read: No such file"):
        read_plan_manifest(planned)
    planned.with_suffix(".json").unlink()
    with pytest.raises(
        DarktrtError, match=r"fp16\.json: cannot read: No such file.*; keep the manifest of a plan beside it, or build"
    ):
        read_plan_manifest(planned)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{", "", "is damaged or no JSON"),
        ("}\n", "", "is damaged or no JSON"),
        ('"format": 1', '"format": 2', "is of another kind or version (its format is 2, not 1)"),
        ('"gpu"', '"cpu"', "is damaged"),
        ('"precision": "fp16"', '"precision": 16', "is damaged ('precision' is 16)"),
        ('"build_seconds": 12.5', '"build_seconds": "x"', "is damaged ('build_seconds' is 'x')"),
        ('"info": {', '"info": [], "inf": {', "is damaged"),
        ('"width": 96', '"width": null', "is damaged ('width' is None)"),
        ('"target": "TensorRT 10.3.0"', '"target": "TensorRT x.y"', "is damaged (the target is 'TensorRT x.y', not such as"),
        ('"target": "TensorRT 10.3.0"', '"target": "Tensor 10.3.0"', "is damaged (the target is 'Tensor 10.3.0'"),
        ('"build_seconds": 12.5', '"build_seconds": 1e999', "1e999 is no finite number"),
        ('"MishPlugin:1"', "1", "is damaged ('plugins' is 1)"),
        ('"engine_layers": []', '"engine_layers": [{}]', "is damaged ('name' is missing)"),
        ('"engine_layers": []', '"engine_layers": {}', "is damaged ('engine_layers' is {})"),
        ('"other_convolutions": {}', '"other_convolutions": {"a": [1]}', "is damaged ('other_convolutions' is [1])"),
        ('"engine_layers": []', '"engine_layers": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_manifests_are_named(planned: Path, old: str, new: str, said: str) -> None:
    file = planned.with_suffix(".json")
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(DarktrtError) as caught:
        read_manifest(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b"\xff\xfe\x00", b"a plan"])
def test_what_is_no_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(
        DarktrtError, match=r"a\.json: is (damaged or no JSON|of another kind|no UTF-8 text).*; keep the manifest"
    ):
        read_manifest(tmp_path / "a.json")


# --- ONNX Runtime ---


def test_a_runner_outputs_all_outputs_by_name(made: Made, tmp_path: Path) -> None:
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    given = {"images": batch_of_images(made.info, 2), **thresholds(0.01)}
    with OnnxRunner(tmp_path / "a.onnx") as runner:
        outputs = runner.run(given)
        assert runner.info.head == "nms"
    assert list(outputs) == ["num_detections", "boxes", "scores", "classes"]
    for name, array in run(made.transformed(), given).items():
        np.testing.assert_array_equal(outputs[name], array)


def test_a_gpu_needs_its_own_onnx_runtime(made: Made) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime knows GPUs")
    with pytest.raises(DarktrtError, match="this ONNX Runtime knows no GPU; install onnxruntime-gpu"):
        OnnxRunner(made.plain, gpu=0)


def test_a_runner_names_what_it_cannot_load(made: Made, tmp_path: Path) -> None:
    whole = made.plain.read_bytes()
    foreign = made.model()
    del foreign.metadata_props[:]
    damaged = made.model()
    damaged.metadata_props[0].value = "{"
    contents = {
        "is empty; make it with": [b""],
        "is no ONNX file, or a damaged one": [b"hello", whole[:2000], b"\x89PNG\r\n\x1a\n" * 9],
        "has no darktrt metadata": [foreign.SerializeToString()],
        "the darktrt metadata is damaged": [damaged.SerializeToString()],
    }
    for said, files in contents.items():
        for content in files:
            (tmp_path / "a.onnx").write_bytes(content)
            with pytest.raises(DarktrtError, match=r"a\.onnx: ") as caught:
                OnnxRunner(tmp_path / "a.onnx")
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(DarktrtError, match=r"none\.onnx: cannot read: No such file"):
        OnnxRunner(tmp_path / "none.onnx")
