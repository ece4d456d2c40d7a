"""Finding, reading and loading the plugin library, and every way in which that fails; with libraries of a few lines of C."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_tensorrt import FakeTensorRT
from helpers import Made

from darktrt.engine import build as build_module
from darktrt.engine import doctor, timing_cache
from darktrt.engine import target as target_module
from darktrt.engine.build import build_file
from darktrt.engine.describe import describe_plan
from darktrt.engine.options import BuildOptions
from darktrt.engine.target import Target
from darktrt.errors import DarktrtError
from darktrt.plugins import library as library_module
from darktrt.plugins.library import (
    FILE_NAME,
    VARIABLE,
    PluginLibrary,
    find_library,
    installed_tensorrt,
    load_plugins,
    read_library,
)
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

NAMES = ("MishPlugin", "MishAddPlugin", "MishConcatPlugin", "YoloDecodePlugin", "YoloDetectPlugin")
PLUGINS = " ".join(f"{name}:1" for name in NAMES)
INFO = '{"darktrt": "0.1.0", "tensorrt": "%s", "sms": "%s", "plugins": "' + PLUGINS + '"}'

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def compiled(path: Path, tensorrt: str = "8.6.0", sms: str = "80 90", more: str = "") -> Path:
    """A library that says of itself what a plugin library says; ``more`` is C."""
    text = (INFO % (tensorrt, sms)).replace('"', '\\"')
    source = f'const char info[] = "darktrt-plugins={text}";\n{more}\n'
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(path)], input=source, text=True, check=True)
    return path


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(library_module, "_gpu_sm", lambda: 90)
    return compiled(tmp_path / "libdarktrt_plugins.so")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cached libraries, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = tmp_path / "cache" / "darktrt" / "plugins"
    folder.mkdir(parents=True)
    return folder


def cached(cache: Path, version: str) -> Path:
    """A library in the cache."""
    (cache / version).mkdir()
    return compiled(cache / version / FILE_NAME, version)


class Registry(SimpleNamespace):
    """A TensorRT's: ``found`` are the names of its creators; ``on_load`` come with load_library."""

    def __init__(self, found: tuple[str, ...] = NAMES, on_load: tuple[str, ...] = (), new: bool = False) -> None:
        super().__init__(found=found, loaded=[])
        self.on_load = on_load
        setattr(self, "get_creator" if new else "get_plugin_creator", self._find)

    def _find(self, name: str, version: str, namespace: str) -> object:
        return name if name in self.found and (version, namespace) == ("1", "") else None

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        self.found = self.on_load
        return object()


def tensorrt(version: str = "8.6.0", registry: Registry | None = None) -> Any:
    own = registry or Registry(new=not version.startswith("8."))
    return SimpleNamespace(__version__=version, get_plugin_registry=lambda: own)


def test_a_library_is_read_without_loading_it(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:-1])  # no loader takes half a file
    found = read_library(library)
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert found == PluginLibrary(library, digest, "0.1.0", "8.6.0", (80, 90), tuple(PLUGINS.split()))
    assert str(found) == f"{library} (for TensorRT 8.6.0, compute capability 8.0 9.0)"


@pytest.mark.parametrize(
    ("sms", "sm", "runs"),
    [
        ((75, 86), 75, True),
        ((80,), 86, True),  # the same major version
        ((86,), 80, False),
        ((75, 86), 80, False),
        ((75, 80), 90, True),  # the driver translates the highest
        ((90, 120), 100, False),
    ],
)
def test_which_gpus_it_runs_on(sms: tuple[int, ...], sm: int, runs: bool) -> None:
    assert PluginLibrary(Path("a.so"), "", "", "8.6.0", sms, ()).runs_on(sm) == runs


def test_which_library_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named, else that of the variable, else one in the cache for the major version of TensorRT."""
    monkeypatch.setattr(library_module, "installed_tensorrt", lambda: None)
    assert find_library() is None
    assert find_library(tensorrt="8.6.1") is None
    old, new = (cached(cache, version) for version in ("8.6.0", "10.16.1"))
    (cache / "10.3.0").mkdir()
    (cache / "10.3.0" / FILE_NAME).write_bytes(b"damaged")
    assert find_library() is None
    assert find_library(tensorrt="8.6.1.6") == old
    assert find_library(tensorrt="10.7.0") == new
    assert find_library(tensorrt="11.0.0") is None
    monkeypatch.setattr(library_module, "installed_tensorrt", lambda: "10.7.0")
    assert find_library() == new
    exact = cached(cache, "10.7.0")
    os.utime(exact, (0, 0))
    assert find_library() == exact
    monkeypatch.setenv(VARIABLE, "of_variable.so")
    assert find_library() == Path("of_variable.so")
    assert find_library("named.so") == Path("named.so")


def test_the_installed_tensorrt_is_read_from_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "tensorrt-cu12":
            raise importlib.metadata.PackageNotFoundError(name)
        return "10.3.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed_tensorrt() == "10.3.0"
    monkeypatch.setattr(library_module, "_DISTRIBUTIONS", ())
    assert installed_tensorrt() is None


@pytest.mark.parametrize("version", ["8.6.1", "8.6.0.post1"])
def test_loading_registers(library: Path, version: str) -> None:
    trt = tensorrt(version)
    assert load_plugins(trt, library) == load_plugins(trt, library) == read_library(library)
    assert not trt.get_plugin_registry().loaded


def test_newer_registries_find_by_another_name(library: Path, tmp_path: Path) -> None:
    assert load_plugins(tensorrt("10.3.0"), compiled(tmp_path / "new.so", "10.16.0")).tensorrt == "10.16.0"


def test_a_library_in_memory_before_tensorrt_is_loaded_by_the_registry(library: Path) -> None:
    registry = Registry(found=(), on_load=NAMES)
    load_plugins(tensorrt(registry=registry), library)
    assert registry.loaded == [str(library)]


FAILURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "there is no plugin library; compile it with 'darktrt plugins'"),
    "something else": (
        lambda p: p.write_bytes(b"\x7fELF"),
        "is no plugin library of darktrt; compile one with 'darktrt plugins'",
    ),
    "empty": (lambda p: p.write_bytes(b""), "cannot read the plugin library: cannot mmap an empty file"),
    "another version": (
        lambda p: compiled(p, "10.16.0"),
        r"is for TensorRT 10.16.0, here is TensorRT 8.6.0; compile it again with 'darktrt plugins --tensorrt 8.6.0'",
    ),
    "another GPU": (
        lambda p: compiled(p, sms="75 120"),
        r"has kernels for compute capability 7.5 12.0, this GPU has 9.0; compile it again with 'darktrt plugins --sm 90'",
    ),
    "no library": (
        lambda p: p.write_bytes(p.read_bytes().replace(b"\x7fELF", b"\x7fDLL")),
        r"does not load \(.*invalid ELF header\); compile it on this machine with 'darktrt plugins'",
    ),
    "missing symbol": (
        lambda p: compiled(p, more="void nowhere(void); void (*use)(void) = nowhere;"),
        r"does not load \(.*undefined symbol: nowhere\)",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_explained(library: Path, failure: str) -> None:
    """Each in one sentence that begins with the file."""
    spoil, said = FAILURES[failure]
    spoil(library)
    with pytest.raises(DarktrtError, match=said) as caught:
        load_plugins(tensorrt(), library)
    assert str(caught.value).startswith(f"{library}: ")


def test_plugins_that_are_not_registered_are_named(library: Path) -> None:
    registry = Registry(found=NAMES[:1], on_load=NAMES[:3])
    with pytest.raises(
        DarktrtError, match=r"loads, but TensorRT 8\.6\.0 does not register YoloDecodePlugin:1, YoloDetectPlugin:1$"
    ):
        load_plugins(tensorrt(registry=registry), library)


def test_without_a_gpu_any_architecture_loads(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "_gpu_sm", lambda: None)
    load_plugins(tensorrt(), compiled(library, sms="120"))


# --- its use ---


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """A TensorRT 8.6.0 that has the plugins, as if a library had brought them."""
    trt = FakeTensorRT("8.6.0", plugins=NAMES)
    monkeypatch.setattr(target_module, "_load", lambda _: trt)
    monkeypatch.setattr(build_module, "find_target", lambda _: Target("trt", (8, 6, 0)))
    monkeypatch.setattr(timing_cache, "gpu_name", lambda: "NVIDIA L4")
    return trt


def test_the_manifest_shows_of_the_library(made: Made, library: Path, tmp_path: Path, full: FakeTensorRT) -> None:
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp32", "trt", library))
    assert manifest.plugin_library == {"sha256": read_library(library).sha256, "tensorrt": "8.6.0"}
    assert "YoloDetectPlugin:1" in manifest.plugins
    assert f"from library  sha256 {manifest.plugin_library['sha256']}" in describe_plan(tmp_path / "a.plan")


def test_a_network_without_custom_nodes_loads_none(
    made: Made, tmp_path: Path, full: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "nowhere.so")
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions("raw", mish="native"))
    manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp32", "trt"))
    assert (manifest.plugins, manifest.plugin_library) == ((), {})
    insert_plugins(made.plain, tmp_path / "b.onnx", SurgeryOptions())
    with pytest.raises(DarktrtError, match=r"nowhere\.so: there is no plugin library"):
        build_file(tmp_path / "b.onnx", tmp_path / "b.plan", BuildOptions("fp32", "trt"))


def test_a_target_without_plugins_accepts_no_library(
    made: Made, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "find_target", lambda _: Target("rtx", (1, 7, 1)))
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions())
    with pytest.raises(DarktrtError, match=r"TensorRT for RTX 1\.7\.1 has no plugins .* leave the plugin library out"):
        build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp32", "rtx", library))


def test_doctor_shows_it(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(library))
    shown = {finding.name: finding.found for finding in doctor.examine_machine()}
    assert shown["plugin library"] == f"{library} (for TensorRT 8.6.0, compute capability 8.0 9.0)"
    library.unlink()
    shown = {finding.name: finding.found for finding in doctor.examine_machine()}
    assert shown["plugin library"] == f"not usable: {library}: there is no plugin library; compile it with 'darktrt plugins'"
