"""Checks of a model repository before a server does them, each told in one sentence."""

from __future__ import annotations

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
from darktrt.metadata import DetectorInfo
from darktrt.plugins.library import read_library
from darktrt.serve.backend import ONNX_NAME, PLAN_NAME, PLUGINS_NAME, Row, Settings, make_runner, run_rows
from darktrt.serve.config import (
    CONFIG_NAME,
    FILES,
    LABELS_NAME,
    ConfigOptions,
    TensorSpec,
    input_specs,
    max_batch_size,
    options_of,
    output_specs,
)
from darktrt.serve.containers import container_for
from darktrt.serve.repository import config_info, models_of, read_config, served_versions
from darktrt.serve.server import program_on_path
from darktrt.vision.images import preprocess, read_image

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from darktrt.engine.manifest import Manifest

SCORE_THRESHOLD, IOU_THRESHOLD = 0.1, 0.45
"""Of the first inference, where they are not fixed in the model."""


@dataclass(frozen=True)
class Finding:
    """What was found of one model."""

    model: str
    text: str
    bad: bool = False
    """A server would not start the model, or it would answer wrongly."""

    def __str__(self) -> str:
        return f"{'--' if self.bad else 'ok'}  {self.model}: {self.text}"


@dataclass(frozen=True)
class _Version:
    """Of a model, with what its config says."""

    model: Path
    number: int
    config: ModelConfig
    options: ConfigOptions
    info: DetectorInfo
    """Of the config, as the options are."""

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
        """Of the plan, where it is one."""
        return read_plan_manifest(self.plan) if self.plan else None


def examine_repository(
    repository: str | Path, reference: str | Path | None = None, image: str | Path | None = None
) -> list[Finding]:
    """Everything that can be said of a repository here.

    Args:
        reference: an ONNX file to hold the first inference of the models of its network against.
        image: what to detect in (default: noise).

    Raises:
        DarktrtError: there are no models, or the reference or the image cannot be read.
    """
    expected = OnnxRunner(reference) if reference else None
    pixels = read_image(image) if image else None
    return [finding for model in models_of(repository) for finding in _model(model, expected, pixels)]


def _model(model: Path, reference: OnnxRunner | None, image: NDArray[np.uint8] | None) -> Iterator[Finding]:
    try:
        config = read_config(model / CONFIG_NAME)
        info, options = config_info(config, model / CONFIG_NAME), options_of(config)
        numbers = served_versions(model, config)
        if not numbers:
            raise DarktrtError("has no version that Triton would serve; write one with 'darktrt serve repository'")
    except DarktrtError as error:
        yield Finding(model.name, str(error), bad=True)
        return
    for number in numbers:
        one = _Version(model, number, config, options, info)
        checks: list[Callable[[_Version], str]] = [_check_files, _check_config, _check_labels, _check_tensorrt, _check_plugins]
        for check in (*checks, _check_python, lambda one: _check_inference(one, reference, image)):
            yield from _told(one, check)


def _told(one: _Version, check: Callable[[_Version], str]) -> Iterator[Finding]:
    """What a check says, if anything."""
    try:
        text = check(one)
    except DarktrtError as error:
        yield Finding(one.name, str(error), bad=True)
    else:
        if text:
            yield Finding(one.name, text)


def _check_files(one: _Version) -> str:
    wants = [FILES[one.options.kind], *(["darktrt.zip"] if one.options.kind == "python" else [])]
    if missing := [name for name in wants if not (one.folder / name).is_file()]:
        raise DarktrtError(f"{one.folder / missing[0]} is missing; write the model again with 'darktrt serve repository'")
    if not one.plan and not (one.folder / ONNX_NAME).is_file():
        raise DarktrtError(f"{one.folder} has neither {PLAN_NAME} nor {ONNX_NAME}; write the model again")
    return ""


def _check_config(one: _Version) -> str:
    """The config against the model that lies there."""
    options, config, model = one.options, one.config, _model_info(one)
    if replace(model, layers=()) != one.info:
        raise DarktrtError(f"{CONFIG_NAME} describes another network than the model's file; write the model again")
    for ours, theirs, what in (
        (input_specs(model, options), config.input, "inputs"),
        (output_specs(model, options), config.output, "outputs"),
    ):
        if [_text(spec) for spec in ours] != (have := [_config_text(tensor) for tensor in theirs]):
            raise DarktrtError(f"{CONFIG_NAME} has the {what} {'; '.join(have)}, the model {'; '.join(map(_text, ours))}")
    if config.max_batch_size != (largest := max_batch_size(model, options)):
        raise DarktrtError(f"{CONFIG_NAME} has max_batch_size {config.max_batch_size}, but the model needs {largest}")
    return f"{model.name}, kind {options.kind}, input {options.input}, max_batch_size {config.max_batch_size}"


def _model_info(one: _Version) -> DetectorInfo:
    manifest = one.manifest()
    if manifest:
        return manifest.info
    from darktrt.onnx_file import load_model

    return load_model(one.folder / ONNX_NAME)[1]


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
    """That a container of Triton's has the plan's TensorRT, for Triton's own backend."""
    manifest = one.manifest()
    if manifest is None or one.options.kind != "tensorrt_plan":
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
        raise DarktrtError(f"needs {', '.join(manifest.plugins)}, but {path} is missing; write the model again with --plugins")
    library = read_library(path)
    if missing := [plugin for plugin in manifest.plugins if plugin not in library.plugins]:
        raise DarktrtError(f"needs {missing[0]}, which {path} lacks; compile the library with 'darktrt plugins'")
    major = manifest.target.split()[-1].partition(".")[0]
    if library.tensorrt.partition(".")[0] != major:
        raise DarktrtError(f"{path} is for TensorRT {library.tensorrt}, the plan is of {manifest.target}; build it again")
    return f"plugins {', '.join(manifest.plugins)} are there"


def _check_python(one: _Version) -> str:
    """That the server's Python has what the Python kind imports; that of the pip package gets it as it is installed."""
    if one.options.kind != "python" or program_on_path() is None:
        return ""
    needs = ["numpy", "tensorrt" if one.plan else "onnxruntime"]
    needs += ["PIL"] if one.options.input == "jpeg" else []
    python = shutil.which("python3") or "python3"
    for module in needs:
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise DarktrtError(f"{python}, which the server's Python backend is to use, cannot import {module} ({last})")
    return f"{python} has {', '.join(needs)}"


def _check_inference(one: _Version, reference: OnnxRunner | None, image: NDArray[np.uint8] | None) -> str:
    """A first inference as the backend does it, against the reference of the same network."""
    compared = reference if reference and reference.info.sources == one.info.sources else None
    fixed = [info.fixed_thresholds for info in (one.info, *([compared.info] if compared else [])) if info.fixed_thresholds]
    score = max([SCORE_THRESHOLD, *(pair[0] for pair in fixed)])
    overlaps = {pair[1] for pair in fixed} or {IOU_THRESHOLD}
    found = _detections(one, _row(one.info, image, score, max(overlaps)))
    if compared is None:
        return f"a first inference finds {len(found)} objects"
    if len(overlaps) > 1:
        return f"a first inference finds {len(found)} objects; the reference is no judge, its IoU threshold is another"
    result = run_rows(compared, [_row(compared.info, image, score, max(overlaps))])[0]
    expected = _as_rows(result.outputs, result.place)
    found, expected = (rows[rows[:, 4] >= score] for rows in (found, expected))  # the lower of two fixed ones finds more
    manifest = one.manifest()
    stated = manifest.precision if manifest else "int8" if one.info.int8_convolutions else "fp32"
    matches = match(found, expected, score)
    text = f"{len(found)} objects against {matches.expected} in ONNX Runtime, scores at most {matches.score:.4f} apart"
    if not matches.within(tolerance_of(["fp32", stated])):
        raise DarktrtError(f"a first inference differs from ONNX Runtime: {text}")
    return f"a first inference agrees with ONNX Runtime: {text}"


def _row(info: DetectorInfo, pixels: NDArray[np.uint8] | None, score: float, iou: float) -> Row:
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (info.height, info.width, 3), np.uint8)
    image, placement = preprocess(pixels, info.width, info.height, info.channels, info.resize, info.input)
    return Row(image, score, iou, placement.inner_size)


def _detections(one: _Version, row: Row) -> NDArray[np.float32]:
    settings = Settings(one.info, False, SCORE_THRESHOLD, IOU_THRESHOLD, False)
    with make_runner(one.folder, settings, 0, None) as runner:
        result = run_rows(runner, [row])[0]
        return _as_rows(result.outputs, result.place)


def _as_rows(outputs: dict[str, NDArray[Any]], place: int) -> NDArray[np.float32]:
    """``(n, 6)``: box, score, class."""
    count = int(outputs["num_detections"][place].item())
    boxes, scores, classes = (outputs[name][place][:count] for name in ("boxes", "scores", "classes"))
    return np.concatenate([boxes, scores[:, np.newaxis], classes[:, np.newaxis]], 1).astype(np.float32)
