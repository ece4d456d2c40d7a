"""An ONNX file in, a plan and its manifest out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from darktrt.calib.table import CalibrationTable
from darktrt.calib.trt_calibrator import TableSource
from darktrt.cuda import first_gpu
from darktrt.engine.int8_rebuild import Corrected, Lowered, build_corrected
from darktrt.engine.layer_list import asked_for, engine_layers
from darktrt.engine.lower import fp_tensors, lower
from darktrt.engine.manifest import Int8Cost, Manifest, manifest_path
from darktrt.engine.options import NONE, BuildOptions
from darktrt.engine.target import Target, find_target
from darktrt.engine.weak_typing import Calibrated, GpuCalibration
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_outputs, sha256_of
from darktrt.metadata import DetectorInfo, ImageSizes
from darktrt.onnx_file import load_model
from darktrt.plugins.library import PluginLibrary, find_library, load_plugins
from darktrt.plugins.ops import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION
from darktrt.progress import LOGGER
from darktrt.surgery.qdq import Calibration

if TYPE_CHECKING:
    from darktrt.calib.bias_correction import ChannelMeans


def check_files(output: str | Path, options: BuildOptions, *inputs: str | Path | None, calibrates: bool = False) -> None:
    """Check, before any work, that a build can write its files, and that no file is an input or another output too.

    Args:
        calibrates: the build writes a calibration cache too.

    Raises:
        DarktrtError: an output is an input or another output, or cannot be written.
    """
    if manifest_path(output) == Path(output):
        raise DarktrtError(f"{output}: .json is the manifest's name; call the engine something like model.plan", "output")
    timing_cache = None if options.timing_cache == NONE else options.timing_cache
    check_outputs([*_outputs(output, calibrates), timing_cache], inputs)


def build_file(
    source: str | Path,
    output: str | Path,
    options: BuildOptions,
    calibration: Calibration | GpuCalibration | None = None,
    cost: Int8Cost | None = None,
) -> Manifest:
    """Build the engine of an ONNX file and write it with its manifest; the whole of ``darktrt engine``.

    A weakly typed TensorRT with a calibration that has channel means builds twice, unless INT8 is forced: see
    :func:`darktrt.engine.int8_rebuild.build_corrected`.

    Args:
        source: an ONNX file of darktrt.
        output: the plan; its manifest is written beside it, as ``.json``.
        calibration: the scales of INT8. Scales that TensorRT finds itself, from a :class:`GpuCalibration`, are written beside
            the plan, as ``.cache``.
        cost: the measured cost of this INT8, for the manifest.

    Raises:
        DarktrtError: ``source`` is no ONNX file of darktrt, no TensorRT is installed, TensorRT refuses the network, ``output``
            cannot be written, or the plugin library does not fit.
    """
    check_files(output, options, source, calibrates=isinstance(calibration, GpuCalibration))
    started = time.monotonic()
    target, lowered, draft = _prepare(source, options, calibration)
    draft = replace(draft, int8_cost=cost)
    with _output_files(output, calibration) as files:
        built = build_corrected(lowered, draft.info, target, options)
        files[Path(output)].write_bytes(built.engine.plan)
        if isinstance(calibration, GpuCalibration):
            files[cache_path(output)].write_bytes(calibration.images.cache)
        manifest = _finished(draft, built, target, calibration, round(time.monotonic() - started, 1))
        files[manifest_path(output)].write_text(manifest.to_json())
    if warning := manifest.int8_warning:
        LOGGER.warning(f"{output}: {warning}")
    return manifest


@contextmanager
def _output_files(output: str | Path, calibration: Calibration | GpuCalibration | None) -> Iterator[dict[Path, Path]]:
    """Temporary files by output, all renamed together at the end: no plan without its manifest."""
    with ExitStack() as stack:
        paths = _outputs(output, isinstance(calibration, GpuCalibration))
        yield {path: stack.enter_context(atomic_output(path)) for path in paths}


def _prepare(
    source: str | Path, options: BuildOptions, calibration: Calibration | GpuCalibration | None
) -> tuple[Target, Lowered, Manifest]:
    """The target, the model lowered for it, and the part of the manifest that is known before the build."""
    model, info = load_model(source)
    info = replace(info, batch=_batch(info, options), image_sizes=_image_sizes(info, options))
    target = build_target(options)
    library = plugin_library(model, target, None if options.plugins == NONE else options.plugins)
    lowered, plugins = _lowered(model, info, target, options, calibration)
    library_facts = {"sha256": library.sha256, "tensorrt": library.tensorrt} if library and plugins else {}
    draft = _draft(info, target, options, sha256_of(source))
    return target, lowered, replace(draft, plugins=plugins, plugin_library=library_facts)


def build_target(options: BuildOptions) -> Target:
    """The TensorRT that builds with these options.

    Raises:
        DarktrtError: it is not installed, or cannot do what they ask for.
    """
    target = find_target(options.target)
    if options.strongly_typed:
        target = target.typed_strongly()
    if options.force_int8 and not target.weakly_typed:
        raise DarktrtError(
            f"{target} computes in INT8 all that Q/DQ nodes in the ONNX file state, so there is nothing to force; leave the "
            "option out",
            "force_int8",
        )
    return target.without_plugins() if options.plugins == NONE else target


def _draft(info: DetectorInfo, target: Target, options: BuildOptions, onnx_sha256: str) -> Manifest:
    """A manifest with what the options, the target and the GPU determine."""
    gpu = None if target.builds_without_gpu else first_gpu()
    return Manifest(
        plan_sha256="",
        onnx_sha256=onnx_sha256,
        target=str(target),
        gpu=gpu and gpu[0],
        precision=options.precision,
        plugins=(),
        build_seconds=0,
        info=info,
        compute_capability=gpu[1] if gpu else 0,
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        tf32=options.tf32,
        force_int8=options.force_int8,
    )


def _finished(
    draft: Manifest, built: Corrected, target: Target, calibration: Calibration | GpuCalibration | None, seconds: float
) -> Manifest:
    return replace(
        draft,
        plan_sha256=hashlib.sha256(built.engine.plan).hexdigest(),
        build_seconds=seconds,
        int8_convolutions=tuple(c.node for c in built.convolutions if c.int8),
        other_convolutions={c.node: c.reason for c in built.convolutions if not c.int8},
        corrected_biases=built.names,
        calibration_sha256=_calibration_sha256(calibration),
        engine_layers=engine_layers(built.engine.layers, target),
    )


def _calibration_sha256(calibration: Calibration | GpuCalibration | None) -> str:
    if isinstance(calibration, GpuCalibration):
        return hashlib.sha256(calibration.images.cache).hexdigest()
    return calibration.sha256 if calibration else ""


def cache_path(plan: str | Path) -> Path:
    """The calibration cache that TensorRT makes as it builds ``plan``: the same name, ending in ``.cache``."""
    return Path(plan).with_suffix(".cache")


def _outputs(plan: str | Path, calibrates: bool) -> list[Path]:
    return [Path(plan), manifest_path(plan), *([cache_path(plan)] if calibrates else [])]


def _batch(info: DetectorInfo, options: BuildOptions) -> tuple[int, int, int]:
    """Smallest, usual and largest batch of the engine.

    Raises:
        DarktrtError: the options ask for another batch than the model's static one.
    """
    if options.batch is None or options.batch == info.batch:
        return info.batch
    if info.batch[0] == info.batch[2]:
        raise DarktrtError(
            f"the model accepts only batches of {info.batch[0]}; convert it again with a dynamic batch, such as 1..8", "batch"
        )
    return options.batch


def _image_sizes(info: DetectorInfo, options: BuildOptions) -> ImageSizes | None:
    """The image sizes of the engine.

    Raises:
        DarktrtError: the options ask for sizes, and the model takes images of one size.
    """
    if options.image_sizes and info.input != "image":
        raise DarktrtError(
            f"the model accepts only images fitted to {info.width}x{info.height}; run surgery again with input image",
            "image_sizes",
        )
    return options.image_sizes or info.image_sizes


def plugin_library(model: onnx.ModelProto, target: Target, path: str | Path | None = None) -> PluginLibrary | None:
    """Load the plugin library ``path``, or where the model has custom nodes the library that is found.

    Raises:
        DarktrtError: the library does not fit, or the target has no plugins.
    """
    if path and not target.has_plugins:
        raise DarktrtError(
            f"{target} has no plugins and runs the bodies of custom nodes; leave the plugin library out", "plugins"
        )
    useful = target.has_plugins and any(node.domain == DOMAIN for node in model.graph.node)
    if not (path or useful):
        return None
    library = find_library(path, target.version_text)
    return load_plugins(target.load(), library) if library else None


def _lowered(
    model: onnx.ModelProto,
    info: DetectorInfo,
    target: Target,
    options: BuildOptions,
    calibration: Calibration | GpuCalibration | None,
) -> tuple[Lowered, tuple[str, ...]]:
    """The model lowered for the target, and the plugins that the engine needs, as name:version."""
    before = _tensors(model)
    channel_means = _channel_means(model, calibration)
    lowered = lower(model, info, target, options.precision, calibration)
    calibrated = None
    if isinstance(calibration, GpuCalibration):
        calibrated = Calibrated(calibration.images, fp_tensors(lowered, info, calibration))
    elif calibration and options.precision == "int8":
        inside = before - _tensors(lowered)  # of fused nodes: they have a scale, and no tensor any more
        scales = {name: scale for name, scale in calibration.scales.items() if name not in inside}
        calibrated = by_cache(lowered, info, target, replace(calibration, scales=scales))
    asked = asked_for(lowered, calibrated.fp_layers if calibrated else None) if options.precision == "int8" else {}
    channel_means = {name: means for name, means in channel_means.items() if asked.get(name)}
    return Lowered(lowered.SerializeToString(), calibrated, asked, channel_means), _plugins(lowered, target)


def _channel_means(model: onnx.ModelProto, calibration: Calibration | GpuCalibration | None) -> dict[str, ChannelMeans]:
    """The effect of quantizing the inputs of convolutions, by the names of their nodes."""
    known = calibration.channel_means if isinstance(calibration, Calibration) else {}
    nodes = (node for node in model.graph.node if node.op_type == "Conv" and node.input[0] in known)
    return {node.name: known[node.input[0]] for node in nodes}


def _tensors(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


def by_cache(model: onnx.ModelProto, info: DetectorInfo, target: Target, calibration: Calibration) -> Calibrated | None:
    """INT8 by a calibrator that returns the scales as a calibration cache of ``target``; None where Q/DQ nodes state INT8.

    Raises:
        DarktrtError: the input of a convolution has no scale, or ``calibration.fp_layers`` names no convolution.
    """
    if not target.weakly_typed or info.int8_convolutions:
        return None
    table = CalibrationTable(dict(calibration.scales), target.cache_version)
    return Calibrated(TableSource(table, info.batch[1]), fp_tensors(model, info, calibration))


def _plugins(model: onnx.ModelProto, target: Target) -> tuple[str, ...]:
    """The custom ops that the engine needs from a plugin library, as name:version; the target runs the bodies of the others.

    Raises:
        DarktrtError: the target does not run bodies, and the library is missing or lacks a plugin.
    """
    names = sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN})
    needed = [name for name in names if target.has_plugins and target.has_plugin(name, PLUGIN_VERSION, PLUGIN_NAMESPACE)]
    missing = [name for name in names if name not in needed]
    if missing and not target.runs_bodies:
        raise DarktrtError(
            f"{target} needs {', '.join(missing)} from darktrt's plugin library, which is missing; compile it with "
            "'darktrt plugins', or do without: a model that ends at the raw heads, with Mish as standard ops, or TensorRT for "
            "RTX",
            "plugins",
        )
    return tuple(f"{name}:{PLUGIN_VERSION}" for name in needed)
