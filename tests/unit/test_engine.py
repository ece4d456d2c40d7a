"""Targets by version, lowering, real builds by TensorRT for RTX, the manifest, and running ONNX files."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Made, batch_of_images, files_in, make, run, thresholds
from onnx import parser

from darktrt import METADATA_KEY, DarktrtError
from engine import build as build_module
from engine import target as target_module
from engine.build import build, build_file
from engine.lower import lower
from engine.manifest import Manifest, manifest_path, read_manifest, read_plan_manifest
from engine.runtime import OnnxRunner
from engine.target import Target, find_target, gpu_name, installed_version
from plugins.ops import DOMAIN
from surgery.rewrite import SurgeryOptions, operate_file

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
rtx = pytest.mark.skipif(NO_RTX, reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")

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


@pytest.mark.parametrize("version", [(1, 0, 0), (1, 7, 1), (2, 0, 0)])
def test_facts_of_tensorrt_for_rtx(version: tuple[int, ...]) -> None:
    target = Target("rtx", version)
    assert (target.weakly_typed, target.has_plugins, target.bodies) == (False, False, "inline")
    assert target.builds_without_gpu
    assert str(target).startswith("TensorRT for RTX ")


def machine(monkeypatch: pytest.MonkeyPatch, gpu: str | None = None, **versions: str) -> None:
    """Pretend that these flavours are installed, and this GPU."""
    monkeypatch.setattr(target_module, "installed_version", versions.get)
    monkeypatch.setattr(target_module, "gpu_name", lambda: gpu)
    monkeypatch.setattr(target_module, "_load", lambda flavour: SimpleNamespace(__version__=versions[flavour]))


def test_auto_takes_full_tensorrt_where_a_gpu_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "NVIDIA L4", trt="10.3.0", rtx="1.7.1.116")
    assert find_target() == Target("trt", (10, 3, 0))
    machine(monkeypatch, None, trt="10.3.0", rtx="1.7.1.116")
    assert find_target() == Target("rtx", (1, 7, 1))
    machine(monkeypatch, "NVIDIA L4", rtx="1.7.1.116")
    assert find_target() == Target("rtx", (1, 7, 1))
    machine(monkeypatch, "NVIDIA L4", trt="10.3.0.post1")
    assert find_target() == Target("trt", (10, 3, 0))


def test_a_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, None, trt="8.6.1", rtx="1.7.1")
    assert find_target("trt") == Target("trt", (8, 6, 1))
    machine(monkeypatch, "NVIDIA L4", trt="8.6.1", rtx="1.7.1")
    assert find_target("rtx") == Target("rtx", (1, 7, 1))


def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, None, trt="10.3.0")
    with pytest.raises(
        DarktrtError, match=r"builds on an NVIDIA GPU alone and none is usable here; pip install 'darktrt\[rtx\]'"
    ):
        find_target()
    machine(monkeypatch, "NVIDIA L4")
    with pytest.raises(DarktrtError, match=r"no TensorRT is installed; pip install 'darktrt\[rtx\]'.*'darktrt\[trt\]'"):
        find_target()
    with pytest.raises(DarktrtError, match=r"TensorRT for RTX is not installed; pip install 'darktrt\[rtx\]'"):
        find_target("rtx")
    with pytest.raises(DarktrtError, match=r"TensorRT is not installed; pip install 'darktrt\[trt\]'"):
        find_target("trt")


def test_a_library_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(target_module.importlib, "import_module", fails)
    with pytest.raises(DarktrtError, match=r"TensorRT is installed but does not load \(libnvinfer.*\); pip install"):
        Target("trt", (10, 3)).load()


def test_the_installed_version_is_read_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("tensorrt", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "tensorrt" else None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"tensorrt": "10.3.0"}[name])
    assert installed_version("trt") == "10.3.0"
    assert installed_version("rtx") is None


@pytest.mark.parametrize(("status", "name"), [(0, "NVIDIA L4"), (3, None)])
def test_the_gpus_name_comes_from_the_driver(monkeypatch: pytest.MonkeyPatch, status: int, name: str | None) -> None:
    def get_name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"NVIDIA L4"
        return 0

    driver = SimpleNamespace(cuInit=lambda _: status, cuDeviceGet=lambda *_: 0, cuDeviceGetName=get_name)
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
    model = lower(made.operated(), made.info, Target("trt", version), precision)
    assert custom_nodes(model) == 8
    assert len(model.functions) == (0 if bodies == "drop" else 3)
    halves = sum(i.data_type == onnx.TensorProto.FLOAT16 for i in model.graph.initializer)
    assert bool(halves) == (precision == "fp16" and not weakly_typed)
    assert METADATA_KEY in {p.key for p in model.metadata_props}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rtx_gets_standard_ops_alone(made: Made, precision: Any) -> None:
    model = lower(made.operated(), made.info, Target("rtx", (1, 7)), precision)
    onnx.checker.check_model(model, full_check=True)
    assert (custom_nodes(model), len(model.functions)) == (0, 0)
    assert METADATA_KEY in {p.key for p in model.metadata_props}
    names = [node.name for node in model.graph.node if node.name]
    assert len(set(names)) == len(names)


def test_lowering_for_rtx_changes_no_number(made: Made) -> None:
    given = {"images": batch_of_images(made.info, 2), **thresholds(0.01)}
    expected = run(made.operated(), given)
    for name, array in run(lower(made.operated(), made.info, Target("rtx", (1, 7)), "fp32"), given).items():
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
    operate_file((static if batch == "static" else made).plain, source, SurgeryOptions())
    manifest = build_file(source, plan, precision, "rtx")
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
    operate_file(made.plain, tmp_path / "a.onnx", SurgeryOptions(head="raw"))
    sizes = []
    for precision in ("fp32", "fp16"):
        build_file(tmp_path / "a.onnx", tmp_path / "a.plan", precision, "rtx")  # type: ignore[arg-type]
        sizes.append((tmp_path / "a.plan").stat().st_size)
    assert sizes[1] < sizes[0]


@rtx
def test_a_plain_model_builds_too(made: Made, tmp_path: Path) -> None:
    assert build_file(made.plain, tmp_path / "a.plan", "fp16", "rtx").info.head == "decoded"


@rtx
def test_a_network_that_the_parser_refuses_is_told_in_its_words(made: Made) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "odd": 1]> g (float[1,3,8,8] images) => (float[1,3,8,8] y)
        { y = odd.Odd (images) }"""
    model = parser.parse_model(text)
    model.graph.node[0].name = "odd_one"
    with pytest.raises(DarktrtError, match=r"TensorRT for RTX 1.* cannot parse the network: node 'odd_one' \(Odd\): "):
        build(model.SerializeToString(), made.info, find_target("rtx"), "fp32")


@rtx
def test_a_network_that_the_builder_refuses_is_told_in_its_words(made: Made) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1,9,4] images, float[1,2,9] s) => (int64[n,3] y)
        { y = NonMaxSuppression (images, s) }"""
    with pytest.raises(DarktrtError, match=r"TensorRT for RTX 1.* cannot (build the engine|parse the network): \S"):
        build(parser.parse_model(text).SerializeToString(), made.info, find_target("rtx"), "fp32")


FAILURES: dict[str, Callable[[], Exception]] = {
    "refused": lambda: DarktrtError("no"),
    "interrupted": KeyboardInterrupt,  # type: ignore[dict-item]
    "full": lambda: OSError(28, "No space left on device"),
    "bug": lambda: RuntimeError("no"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_build_leaves_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    operate_file(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    (tmp_path / "old.plan").write_bytes(b"old")
    (tmp_path / "old.json").write_text("old")

    def fails(*_: object) -> bytes:
        assert len(files_in(tmp_path)) in (5, 6)
        raise FAILURES[name]()

    monkeypatch.setattr(build_module, "build", fails)
    machine(monkeypatch, None, rtx="1.7.1")
    for plan in ("new.plan", "old.plan"):
        with pytest.raises((DarktrtError, KeyboardInterrupt, RuntimeError)):
            build_file(tmp_path / "a.onnx", tmp_path / plan, "fp32", "rtx")
        assert files_in(tmp_path) == ["a.onnx", "old.json", "old.plan"]
    assert (tmp_path / "old.plan").read_bytes() == b"old"


def test_no_plan_without_its_manifest(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operate_file(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    (tmp_path / "model.json").mkdir()
    monkeypatch.setattr(build_module, "build", lambda *_: memoryview(b"plan"))
    machine(monkeypatch, None, rtx="1.7.1")
    with pytest.raises(DarktrtError, match=r"model\.json: is a folder"):
        build_file(tmp_path / "a.onnx", tmp_path / "model.plan", "fp32", "rtx")
    with pytest.raises(DarktrtError, match=r"model\.json: \.json is the manifest's name"):
        build_file(tmp_path / "a.onnx", tmp_path / "model.json", "fp32", "rtx")
    with pytest.raises(DarktrtError, match=r"a\.onnx: is given twice"):
        build_file(tmp_path / "a.onnx", tmp_path / "a.onnx", "fp32", "rtx")
    assert files_in(tmp_path) == ["a.onnx", "model.json"]


@pytest.mark.parametrize(
    ("version", "fp16", "strongly"), [("8.6.1", True, False), ("10.3.0", True, False), ("11.0.0", False, True)]
)
def test_full_tensorrt_is_asked_in_its_own_way(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, fp16: bool, strongly: bool
) -> None:
    """With a stand-in that records: flags by version, a profile for the dynamic inputs, plugins and GPU in the manifest."""
    calls: dict[str, Any] = {"flags": [], "shapes": {}}
    machine(monkeypatch, "NVIDIA L4", trt=version)
    monkeypatch.setattr(target_module, "_load", lambda _: stand_in(version, calls))
    monkeypatch.setattr(build_module, "gpu_name", lambda: "NVIDIA L4")
    operate_file(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", "fp16", "auto")
    assert calls["flags"] == (["FP16"] if fp16 else [])
    assert calls["network"] == (1 << 3 if strongly else 0)
    assert calls["shapes"] == {"images": [(1, 64, 96, 3), (3, 64, 96, 3), (3, 64, 96, 3)]}
    assert manifest.plugins == ("MishPlugin:1", "YoloDecodePlugin:1", "YoloNmsPlugin:1")
    assert manifest.gpu == "NVIDIA L4"
    assert manifest.target == f"TensorRT {version}"
    assert (tmp_path / "a.plan").read_bytes() == b"plan"


def stand_in(version: str, calls: dict[str, Any]) -> Any:
    """As much of the module tensorrt as a build uses."""

    class Base:
        ERROR = 1

        def __init__(self, *_: object) -> None:
            pass

    def tensor(value: onnx.ValueInfoProto) -> Any:
        dimensions = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
        return SimpleNamespace(name=value.name, shape=dimensions)

    class Parser(Base):
        def parse(self, model: bytes) -> bool:
            calls["inputs"] = [tensor(value) for value in onnx.load_from_string(model).graph.input]
            return True

    class Builder(Base):
        def create_network(self, flags: int) -> Any:
            calls["network"] = flags

            class Network:
                num_inputs = property(lambda _: len(calls["inputs"]))

                def get_input(self, i: int) -> Any:
                    return calls["inputs"][i]

            return Network()

        def create_builder_config(self) -> Any:
            return SimpleNamespace(set_flag=calls["flags"].append, add_optimization_profile=lambda _: None)

        def create_optimization_profile(self) -> Any:
            return SimpleNamespace(set_shape=lambda name, *shapes: calls["shapes"].update({name: list(shapes)}))

        def build_serialized_network(self, *_: object) -> bytes:
            return b"plan"

    return SimpleNamespace(
        __version__=version,
        ILogger=Base,
        IProgressMonitor=Base,
        Builder=Builder,
        OnnxParser=Parser,
        BuilderFlag=SimpleNamespace(FP16="FP16"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=3),
    )


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
    with pytest.raises(DarktrtError, match=r"fp16\.json: cannot read the manifest: No such file.*; keep it beside its plan"):
        read_plan_manifest(planned)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{", "", "is no manifest"),
        ("}\n", "", "is no manifest"),
        ('"format": 1', '"format": 2', "is no manifest of this version of darktrt"),
        ('"gpu"', '"cpu"', "the manifest is damaged"),
        ('"precision": "fp16"', '"precision": 16', "the manifest is damaged ('precision' is 16)"),
        ('"build_seconds": 12.5', '"build_seconds": "x"', "the manifest is damaged ('build_seconds' is 'x')"),
        ('"info": {', '"info": [], "inf": {', "the manifest is damaged"),
        ('"width": 96', '"width": null', "the manifest is damaged ('width' is None)"),
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
    with pytest.raises(DarktrtError, match=r"a\.json: is no manifest"):
        read_manifest(tmp_path / "a.json")


# --- ONNX Runtime ---


def test_a_runner_gives_all_outputs_by_name(made: Made, tmp_path: Path) -> None:
    operate_file(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    given = {"images": batch_of_images(made.info, 2), **thresholds(0.01)}
    with OnnxRunner(tmp_path / "a.onnx") as runner:
        outputs = runner.run(given)
        assert runner.info.head == "nms"
    assert list(outputs) == ["num_detections", "boxes", "scores", "classes"]
    for name, array in run(made.operated(), given).items():
        np.testing.assert_array_equal(outputs[name], array)


def test_a_runner_names_what_it_cannot_load(made: Made, tmp_path: Path) -> None:
    whole = made.plain.read_bytes()
    foreign = made.model()
    del foreign.metadata_props[:]
    damaged = made.model()
    damaged.metadata_props[0].value = "{"
    contents = {
        "is it an ONNX file": [b"", b"hello", whole[:2000], b"\x89PNG\r\n\x1a\n" * 9],
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
    with pytest.raises(DarktrtError, match=r"none\.onnx: cannot read: no such file"):
        OnnxRunner(tmp_path / "none.onnx")
