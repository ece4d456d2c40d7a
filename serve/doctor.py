"""Checks of a model repository before a server loads it; each reports one sentence."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from darktrt.check.tolerance import match, tolerance_of
from darktrt.cuda import first_gpu
from darktrt.engine.manifest import read_plan_manifest
from darktrt.engine.runtime import OnnxRunner, check_runs
from darktrt.engine.target import Target
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.plugins.library import read_library
from darktrt.serve.backend import ONNX_NAME, PLAN_NAME, PLUGINS_NAME, make_runner
from darktrt.serve.config import (
    CONFIG_NAME,
    LABELS_NAME,
    BackendOptions,
    PythonBackend,
    TensorRTBackend,
    TensorSpec,
    input_specs,
    max_batch_size,
    options_of,
    output_specs,
)
from darktrt.serve.containers import container_for
from darktrt.serve.program import program_on_path
from darktrt.serve.repository import (
    MODULES_NAME,
    loaded_versions,
    model_info,
    models_of,
    no_models,
    read_config,
    unfinished_models,
)
from darktrt.serve.rows import RowRunner, Runner
from darktrt.vision.images import read_image

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from darktrt.engine.manifest import Manifest

SHARED_MEMORY = Path("/dev/shm")
_POOL_BYTES = 1 << 20
"""Of an instance without requests; Triton's default."""

_ENCODED_BYTES = 1 << 20

THRESHOLDS = Thresholds(0.1)
"""Of the first inference, where they are not fixed in the model."""


@dataclass(frozen=True)
class Finding:
    """What one check reports of one model."""

    model: str
    text: str
    bad: bool = False
    """Whether a server would not load the model, or the model would answer wrongly."""

    def __str__(self) -> str:
        return f"{'--' if self.bad else 'ok'}  {self.model}: {self.text}"


@dataclass(frozen=True)
class _Version:
    """A version of a model, with the model's config and what it was made from."""

    model: Path
    number: int
    config: ModelConfig
    options: BackendOptions
    info: DetectorInfo

    @property
    def folder(self) -> Path:
        return self.model / str(self.number)

    @property
    def name(self) -> str:
        return f"{self.model.name}/{self.number}"

    @property
    def plan(self) -> Path | None:
        path = self.folder / PLAN_NAME
        return path if path.is_file() else None

    def manifest(self) -> Manifest | None:
        """Of the plan, if there is one."""
        return read_plan_manifest(self.plan) if self.plan else None


def diagnose_repository(
    repository: str | Path, reference: str | Path | None = None, image: str | Path | None = None
) -> list[Finding]:
    """Check every model of a repository.

    Args:
        reference: an ONNX file; the first inference of models of the same network is compared with its.
        image: the image of the first inference (default: noise).

    Raises:
        DarktrtError: there are no models, or the reference or the image cannot be read.
    """
    models = models_of(repository)
    expected = OnnxRunner(reference) if reference else None
    pixels = read_image(image) if image else None
    findings = list(_strays(Path(repository)))
    served: list[_Version] = []
    for model in models:
        try:
            versions = _versions(model)
        except DarktrtError as error:
            findings.append(Finding(model.name, str(error), bad=True))
            continue
        findings += _model(versions, expected, pixels)
        served += versions
    return [*findings, *_shared_memory(served)]


def _strays(repository: Path) -> Iterator[Finding]:
    """What lies in the repository, or beside it, and is no model."""
    for path in no_models(repository):
        left = (
            "may be left of a run that was killed" if path.name.startswith(".") else f"has neither {CONFIG_NAME} nor a version"
        )
        yield Finding(path.name, f"is a folder that Triton takes for a model, and {left}; remove {path}", bad=True)
    for path in unfinished_models(repository):
        yield Finding(path.name, f"was left of a run that was killed, and no server reads it; remove {path}")


def _model(versions: list[_Version], reference: OnnxRunner | None, image: NDArray[np.uint8] | None) -> Iterator[Finding]:
    for version in versions:
        checks: list[Callable[[_Version], str]] = [_check_files, _check_config, _check_labels, _check_tensorrt, _check_plugins]
        for check in (*checks, _check_python, lambda one: _check_inference(one, reference, image)):
            yield from _report(version, check)


def _versions(model: Path) -> list[_Version]:
    """The versions that Triton would load."""
    config = read_config(model / CONFIG_NAME)
    described, numbers = model_info(config, model / CONFIG_NAME), loaded_versions(model, config)
    options = options_of(described)
    if not numbers:
        raise DarktrtError("has no version that Triton would load; write one with 'darktrt serve repository'")
    return [_Version(model, number, config, options, described.info) for number in numbers]


def _shared_memory(versions: list[_Version]) -> Iterator[Finding]:
    """Whether there is room for the requests of all models of the Python backend, which holds them in shared memory."""
    needed = sum(map(_backend_bytes, versions))
    if not needed:
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    sizes = f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free, and a full batch in each instance takes {needed / 1e6:,.0f} MB"
    advice = "; make it larger, or write the models with fewer instances or a smaller max_batch" if free < needed else ""
    yield Finding("shared memory", sizes + advice, bad=free < needed)


def _backend_bytes(one: _Version) -> int:
    """What a model's instances of the Python backend need of shared memory; encoded images have a megabyte each."""
    if not isinstance(one.options, PythonBackend):
        return 0
    specs = [*input_specs(one.info, one.options), *output_specs(one.info, one.options)]
    image = sum(_image_bytes(spec, one.info) for spec in specs)
    instances = sum(group.count * max(1, len(group.gpus)) for group in one.config.instance_group)
    return int(instances * (_POOL_BYTES + one.config.max_batch_size * image))


def _image_bytes(spec: TensorSpec, info: DetectorInfo) -> int:
    """Of a tensor's part for one image of the usual size."""
    if spec.type == "STRING":
        return _ENCODED_BYTES
    dims = [*reversed(info.usual_image), 3] if spec.name == "images" and info.input == "image" else spec.dims
    rows = [info.max_detections if size < 0 else size for size in dims]
    return math.prod(rows) * (1 if spec.type == "UINT8" else 4)


def _report(version: _Version, check: Callable[[_Version], str]) -> Iterator[Finding]:
    """The finding of a check, if it has one."""
    try:
        text = check(version)
    except DarktrtError as error:
        yield Finding(version.name, str(error), bad=True)
    else:
        if text:
            yield Finding(version.name, text)


def _check_files(one: _Version) -> str:
    needed = [one.options.file, *([MODULES_NAME] if isinstance(one.options, PythonBackend) else [])]
    if missing := [name for name in needed if not (one.folder / name).is_file()]:
        raise DarktrtError(f"{one.folder / missing[0]} is missing; write the model again with 'darktrt serve repository'")
    if not one.plan and not (one.folder / ONNX_NAME).is_file():
        raise DarktrtError(f"{one.folder} has neither {PLAN_NAME} nor {ONNX_NAME}; write the model again")
    return ""


def _check_config(one: _Version) -> str:
    """See that the config describes the model's file."""
    options, config, model = one.options, one.config, _model_info(one)
    if replace(model, layers=()) != one.info:
        raise DarktrtError(f"{CONFIG_NAME} describes another network than the model's file; write the model again")
    for ours, theirs, what in (
        (input_specs(model, options), config.input, "inputs"),
        (output_specs(model, options), config.output, "outputs"),
    ):
        have = [_config_text(tensor) for tensor in theirs]
        if [_text(spec) for spec in ours] != have:
            raise DarktrtError(f"{CONFIG_NAME} has the {what} {'; '.join(have)}, the model {'; '.join(map(_text, ours))}")
    if config.max_batch_size != (largest := max_batch_size(model, options)):
        raise DarktrtError(f"{CONFIG_NAME} has max_batch_size {config.max_batch_size}, but the model needs {largest}")
    form = options.input if isinstance(options, PythonBackend) else "tensor"
    return f"{model.name}, kind {options.kind}, input {form}, max_batch_size {config.max_batch_size}"


def _model_info(one: _Version) -> DetectorInfo:
    manifest = one.manifest()
    if manifest:
        return manifest.info
    from darktrt.onnx_file import load_info

    return load_info(one.folder / ONNX_NAME)


def _text(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.type} {list(spec.dims)}{' optional' if spec.optional else ''}"


def _config_text(tensor: Any) -> str:
    from tritonclient.grpc.model_config_pb2 import DataType

    kind = DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return f"{tensor.name} {kind} {list(tensor.dims)}{' optional' if getattr(tensor, 'optional', False) else ''}"


def _check_labels(one: _Version) -> str:
    path = one.model / LABELS_NAME
    lines = tuple(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    if lines != one.info.class_names:
        raise DarktrtError(f"{path} has {len(lines)} labels, not the {len(one.info.class_names)} names of the model")
    return ""


def _check_tensorrt(one: _Version) -> str:
    """See that one of Triton's containers has the TensorRT of the plan, for Triton's TensorRT backend."""
    manifest = one.manifest()
    if manifest is None or not isinstance(one.options, TensorRTBackend):
        return ""
    container = container_for(manifest)
    if not container.loads:
        raise DarktrtError(container.advice(manifest.target))
    gpu = first_gpu()
    if gpu:
        check_runs(PLAN_NAME, manifest, Target("trt", container.tensorrt), gpu)
    return f"the TensorRT of {container.tag} loads plans of {manifest.target}"


def _check_plugins(one: _Version) -> str:
    manifest = one.manifest()
    if manifest is None or not manifest.plugins:
        return ""
    path = one.folder / PLUGINS_NAME
    if not path.is_file():
        raise DarktrtError(f"needs {', '.join(manifest.plugins)}, but {path} is missing; write the model again with it")
    library = read_library(path)
    if missing := [plugin for plugin in manifest.plugins if plugin not in library.plugins]:
        raise DarktrtError(f"needs {missing[0]}, which {path} lacks; compile the library with 'darktrt plugins'")
    major = manifest.target.split()[-1].partition(".")[0]
    if library.tensorrt.partition(".")[0] != major:
        raise DarktrtError(f"{path} is for TensorRT {library.tensorrt}, the plan is of {manifest.target}; build it again")
    return f"plugins {', '.join(manifest.plugins)} are there"


def _check_python(one: _Version) -> str:
    """See that the server's Python has what darktrt's backend imports; for the pip package it is installed."""
    if not isinstance(one.options, PythonBackend) or program_on_path() is None:
        return ""
    needs = ["numpy", "tensorrt" if one.plan else "onnxruntime"]
    needs += ["PIL"] if one.options.input == "jpeg" else []
    python = shutil.which("python3") or "python3"
    for module in needs:
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise DarktrtError(f"{python}, which the server's Python backend uses, cannot import {module} ({last})")
    return f"{python} has {', '.join(needs)}"


def _check_inference(one: _Version, reference: OnnxRunner | None, image: NDArray[np.uint8] | None) -> str:
    """Run a first inference as the backend does, and compare it with a reference of the same network."""
    compared = reference if reference and reference.info.sources == one.info.sources else None
    fixed = [info.fixed_thresholds for info in (one.info, *([compared.info] if compared else [])) if info.fixed_thresholds]
    score = max([THRESHOLDS.score, *(pair[0] for pair in fixed)])
    overlaps = {pair[1] for pair in fixed} or {THRESHOLDS.iou}
    thresholds = Thresholds(score, max(overlaps))
    with make_runner(one.folder) as runner:
        rows = _first_inference(runner, image, thresholds)
    text = f"a first inference detects {len(rows)} objects"
    if compared is None:
        return text
    if len(overlaps) > 1:
        return f"{text}; the reference has another IoU threshold and is not compared"
    if (one.info.input == "uint8") != (compared.info.input == "uint8"):  # only this form rounds the pixels
        return f"{text}; the reference has another input form and is not compared"
    return _compare(one, rows, _first_inference(compared, image, thresholds), score)


def _compare(one: _Version, rows: NDArray[np.float32], expected: NDArray[np.float32], score: float) -> str:
    rows, expected = (each[each[:, 4] >= score] for each in (rows, expected))  # a lower fixed threshold lets more in
    manifest = one.manifest()
    precision = manifest.precision if manifest else "int8" if one.info.int8_convolutions else "fp32"
    matches = match(rows, expected, score)
    text = f"{len(rows)} objects against {matches.expected} in ONNX Runtime, scores at most {matches.score:.4f} apart"
    if not matches.within(tolerance_of(["fp32", precision])):
        raise DarktrtError(f"a first inference differs from ONNX Runtime: {text}")
    return f"a first inference agrees with ONNX Runtime: {text}"


def _first_inference(runner: Runner, pixels: NDArray[np.uint8] | None, thresholds: Thresholds) -> NDArray[np.float32]:
    """``(n, 6)``: box, score and class of the detections in one image, or in noise, in its pixels."""
    info = runner.info
    if pixels is None:
        width, height = info.usual_image
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    rows = RowRunner(runner)
    (result,) = rows.run([rows.fitted(pixels, thresholds)])
    if isinstance(result, DarktrtError):
        raise result
    return result.placed(info).to_rows()
