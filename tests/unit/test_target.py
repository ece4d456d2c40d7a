"""The facts of TensorRT's flavours at the versions where they change, and how an installed one is found."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from darktrt.engine import target as target_module
from darktrt.engine.target import (
    Target,
    check_target_text,
    find_target,
    flavour_of,
    installed_version,
    is_installed,
    version_of,
)
from darktrt.errors import DarktrtError

EARLY, LAST_9, FIRST_10, LAST_10, FIRST_11 = (8, 6, 1), (9, 3, 0), (10,), (10, 99, 9), (11,)


def full(*version: int) -> Target:
    return Target("trt", version)


def test_typing_and_batches_by_version() -> None:
    """Weak typing ends with 11, the implicit batch dimension with 10."""
    flags = {EARLY: "EXPLICIT_BATCH", LAST_9: "EXPLICIT_BATCH", FIRST_10: None, LAST_10: None, FIRST_11: "STRONGLY_TYPED"}
    for version, flag in flags.items():
        assert full(*version).network_flag == flag
        assert full(*version).weakly_typed == (version < FIRST_11)
    for version in (FIRST_10, LAST_10, FIRST_11):
        strong = full(*version).typed_strongly()
        assert (strong.weakly_typed, strong.network_flag, str(strong)) == (False, "STRONGLY_TYPED", str(full(*version)))
    assert Target("rtx", (1, 0)).typed_strongly().network_flag == "STRONGLY_TYPED"
    for version in (EARLY, LAST_9):
        with pytest.raises(DarktrtError, match="cannot take types from the ONNX file") as caught:
            full(*version).typed_strongly()
        assert caught.value.argument == "strongly_typed"


def test_what_came_with_version_10() -> None:
    """A way to stop a build, and a parser that names nodes; TensorRT for RTX has both at any version."""
    for target, has in ((full(*LAST_9), False), (full(*FIRST_10), True), (full(*FIRST_11), True), (Target("rtx", (1,)), True)):
        assert target.has_progress_monitor == target.names_parser_nodes == has


def test_custom_nodes_by_version() -> None:
    """Bodies run from 10.7 on; from 9.0 to 10.6 they are dropped, for the parser would prefer them to plugins."""
    for version, runs, bodies in (
        ((8, 9, 9), False, "keep"),
        ((9,), False, "drop"),
        ((10, 6, 9), False, "drop"),
        ((10, 7), True, "keep"),
        (FIRST_11, True, "keep"),
    ):
        target = full(*version)
        assert (target.runs_bodies, target.bodies, target.has_plugins) == (runs, bodies, True)
    for version in (FIRST_10, FIRST_11):
        without = full(*version).without_plugins()
        assert (without.has_plugins, without.bodies, without.weakly_typed) == (False, "inline", version < FIRST_11)
    for version in (EARLY, LAST_9):
        with pytest.raises(DarktrtError, match="lacks some standard ops of the custom nodes' bodies") as caught:
            full(*version).without_plugins()
        assert caught.value.argument == "plugins"
    rtx = Target("rtx", (1, 7)).without_plugins()
    assert (rtx.has_plugins, rtx.runs_bodies, rtx.bodies) == (False, True, "inline")


def test_what_the_flavours_differ_in() -> None:
    rtx, trt = Target("rtx", (12, 0)), full(8, 6, 0)  # whatever the version
    assert (rtx.logs_layers, rtx.has_timing_cache, rtx.has_compatibility, rtx.builds_without_gpu) == (True, False, False, True)
    assert (trt.logs_layers, trt.has_timing_cache, trt.has_compatibility, trt.builds_without_gpu) == (False, True, True, False)
    assert not rtx.weakly_typed


@pytest.mark.parametrize(
    ("version", "header"),
    [((8, 6, 1), "8601"), ((9, 3), "9300"), ((9, 99, 7), "18907"), ((10,), "100000"), ((10, 3, 0, 26), "100300")],
)
def test_the_version_in_calibration_caches(version: tuple[int, ...], header: str) -> None:
    assert full(*version).cache_version == header


def test_plans_of_an_older_version_of_the_same_major_one() -> None:
    """Of version-compatible plans."""
    here = full(10, 3, 0)
    runs = {
        text: here.runs_plans_of(f"TensorRT {text}") for text in ("10.0.1", "10.3.0", "10.3.1", "10.10.0", "9.9.9", "11.0.0")
    }
    assert [text for text in runs if runs[text]] == ["10.0.1", "10.3.0"]
    assert not here.runs_plans_of("TensorRT for RTX 10.0.1")
    assert Target("rtx", (1, 7)).runs_plans_of("TensorRT for RTX 1.7")


def test_gpus_that_tensorrt_for_rtx_leaves_out() -> None:
    rtx = Target("rtx", (1, 7))
    assert {at: rtx.runs_on(at) for at in (75, 89, 90, 100, 119, 120)} == {
        75: True, 89: True, 90: False, 100: False, 119: False, 120: True,
    }  # fmt: skip
    assert all(full(10, 3).runs_on(at) for at in (75, 90, 119))


def test_a_target_as_text() -> None:
    for target in (full(8, 6, 0), full(10, 3), Target("rtx", (1, 7, 1)), full(10, 3, 0, 26)):
        check_target_text(str(target))
        assert flavour_of(str(target)) == target.flavour and version_of(str(target)) == target.version_text
    for text in (
        "TensorRT",
        "TensorRT 8.6.0.1.2",
        "tensorrt 8.6.0",
        "TensorRT 8.6.0 ",
        "TensorRT for RTX",
        "TensorRT \u0668.6",
    ):
        with pytest.raises(ValueError, match=r"the target is '.*', not such as 'TensorRT 8\.6\.0'"):
            check_target_text(text)


# --- the installed one ---


def install(monkeypatch: pytest.MonkeyPatch, spec: Any, version: str | None, loaded: str = "10.3.0") -> None:
    """A module ``tensorrt``, found as ``spec``, of a package of this version; None for a module that no package owns."""

    def version_of_package(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "tensorrt" else None)
    monkeypatch.setattr(importlib.metadata, "version", version_of_package)
    monkeypatch.setattr(target_module.importlib, "import_module", lambda _: SimpleNamespace(__version__=loaded))


REAL = importlib.machinery.ModuleSpec("tensorrt", None, origin="tensorrt/__init__.py")


def test_type_stubs_are_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, importlib.machinery.ModuleSpec("tensorrt", None), "10.3.0")
    assert not is_installed("trt") and installed_version("trt") is None
    install(monkeypatch, REAL, "10.3.0")
    assert is_installed("trt") and not is_installed("rtx")


def test_a_module_of_no_package_tells_its_version_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in NVIDIA's containers."""
    install(monkeypatch, REAL, None, loaded="8.6.0")
    assert installed_version("trt") == "8.6.0"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("10.3.0", (10, 3, 0)),
        ("10.3", (10, 3)),
        ("10.14.1.48", (10, 14, 1)),
        ("8.6.0.post1", (8, 6, 0)),
        ("10.3.0rc1", (10, 3)),
    ],
)
def test_three_numbers_of_the_version_count(monkeypatch: pytest.MonkeyPatch, text: str, version: tuple[int, ...]) -> None:
    install(monkeypatch, REAL, text, loaded=text)
    assert find_target("trt") == Target("trt", version)


def test_full_tensorrt_without_a_gpu_yields_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, installed, expected in (
        ("NVIDIA L4", {"trt", "rtx"}, "trt"),
        ("NVIDIA L4", {"trt"}, "trt"),
        (None, {"trt", "rtx"}, "rtx"),
        (None, {"rtx"}, "rtx"),
    ):
        monkeypatch.setattr(
            target_module, "installed_version", lambda flavour, has=installed: "1.0" if flavour in has else None
        )
        monkeypatch.setattr(target_module, "gpu_name", lambda name=gpu: name)
        monkeypatch.setattr(target_module, "_load", lambda _: SimpleNamespace(__version__="10.3.0"))
        assert find_target().flavour == expected
