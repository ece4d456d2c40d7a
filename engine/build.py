"""ONNX to a serialized engine."""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import onnx

from darktrt.calib.table import CalibrationTable
from darktrt.calib.trt_calibrator import TableSource, calibrator
from darktrt.cuda import first_gpu
from darktrt.engine.layer_list import (
    ConvolutionPrecision,
    asked_for,
    convolution_precisions,
    engine_layers,
    inspected,
    is_layer_list,
)
from darktrt.engine.lower import Precision, fp_tensors, lower
from darktrt.engine.manifest import Int8Cost, Manifest, manifest_path
from darktrt.engine.target import Target, find_target, gpu_name
from darktrt.engine.trt_types import sides
from darktrt.engine.weak_typing import Calibrated, GpuCalibration, NetworkMap, set_precision
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_writable, keep_inputs, sha256_of
from darktrt.metadata import DetectorInfo
from darktrt.onnx_file import load_model
from darktrt.plugins.library import PluginLibrary, find_library, load_plugins
from darktrt.plugins.ops import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION
from darktrt.surgery.qdq import Calibration, correct_biases

if TYPE_CHECKING:
    from darktrt.calib.bias_correction import ChannelMeans
    from darktrt.engine.trt_types import Builder, Config, Parser, TensorRT, TrtNetwork


@dataclass(frozen=True)
class BuildOptions:
    """How TensorRT goes about it; the defaults are TensorRT's own, but for the timing cache."""

    tactic_sources: str | None = None
    """Libraries to take kernels from, added to or taken from the default ones as trtexec has it: ``-CUDNN,+CUBLAS``."""
    optimization_level: int | None = None
    """0 to 5: how long to look for fast kernels."""
    timing_cache: str | Path | None = None
    """A file that keeps measured times between builds; it is read, if there is one, and written. ``none`` for no file; by
    default :func:`default_timing_cache`, which unlike a file that was named is set aside where it does not fit."""
    workspace: int | None = None
    """Most MiB of GPU memory that a layer may use for intermediate results; by default all there is."""
    tf32: bool = True
    """Let FP32 convolutions round their inputs to 11 bits, as TensorRT does on GPUs that can."""
    strongly_typed: bool = False
    """Take types from the ONNX file, and INT8 from Q/DQ nodes, where TensorRT (10) could also choose."""
    batch: tuple[int, int, int] | None = None
    """Least, usual and largest batch of a model with a dynamic one, in place of the model's own."""
    hardware_compatible: bool = False
    """An engine for every GPU of compute capability 8.0 or more; slower."""
    version_compatible: bool = False
    """An engine for later versions of the same major version of TensorRT too."""
    verbosity: Literal["detailed", "layer_names_only", "none"] = "detailed"
    """How much the engine tells of its layers; less than ``detailed`` leaves unknown what runs in INT8, and so biases of
    :func:`build_file` as they are where TensorRT chooses that."""


class Built(NamedTuple):
    """What a build gives."""

    plan: memoryview
    layers: str = ""
    """The engine's list of layers, which :mod:`darktrt.engine.layer_list` reads."""
    times: bytes = b""
    """Its timing cache: what was measured, and what was known before."""


def check_files(output: str | Path, options: BuildOptions, *inputs: str | Path | None, calibrates: bool = False) -> None:
    """See, before any work, that a build can write its files, and that none of them is an input or two things at once.

    Args:
        calibrates: it writes a calibration cache too.

    Raises:
        DarktrtError: one is, or cannot be written.
    """
    if manifest_path(output) == Path(output):
        raise DarktrtError(f"{output}: .json is the manifest's name; call the engine something like model.plan")
    timing_cache = None if options.timing_cache == NO_CACHE else options.timing_cache
    outputs = [path for path in (*_outputs(output, calibrates), timing_cache) if path]
    for i, path in enumerate(outputs):
        keep_inputs(path, *inputs, *outputs[:i])
    for path in outputs:
        check_writable(path)


def build_file(
    source: str | Path,
    output: str | Path,
    precision: Precision,
    choice: Literal["auto", "rtx", "trt"],
    calibration: Calibration | GpuCalibration | None = None,
    options: BuildOptions | None = None,
    cost: Int8Cost | None = None,
    plugins: str | Path | None = None,
    table: str | Path | None = None,
) -> Manifest:
    """ONNX file to plan and manifest; the whole of ``darktrt engine``.

    A weakly typed TensorRT that is served a table with shifts builds more than once: see :func:`_build_corrected`.

    Args:
        calibration: of a :class:`GpuCalibration` what TensorRT finds is kept beside the plan, as ``.cache``.
        cost: what is known of this INT8, for the manifest.
        table: the file that ``calibration`` comes from, likewise.
        plugins: the plugin library; by default the one at hand, if the model has custom nodes. ``none`` for standard ops in
            their place.

    Raises:
        DarktrtError: ``source`` is no ONNX of darktrt, no TensorRT is at hand, it refuses the network, ``output`` cannot be
            written, or the plugin library does not fit.
    """
    options = options or BuildOptions()
    made = isinstance(calibration, GpuCalibration)
    check_files(output, options, source, calibrates=made)
    model, info = load_model(source)
    info = replace(info, batch=_batch(info, options))
    target = find_target(choice)
    target = target.typed_strongly() if options.strongly_typed else target
    if str(plugins) == NO_PLUGINS:
        target, plugins = target.without_plugins(), None
    started = time.monotonic()
    library = plugin_library(model, target, plugins)
    ready = _prepare(model, info, target, precision, calibration)
    del model
    draft = replace(_draft(info, target, precision, options, sha256_of(source)), plugins=ready.plugins)
    if library and ready.plugins:
        draft = replace(draft, plugin_library={"sha256": library.sha256, "tensorrt": library.tensorrt})
    with ExitStack() as stack:  # all files get their names together, at the end: no plan without its manifest
        files = {path: stack.enter_context(atomic_output(path)) for path in _outputs(output, made)}
        (plan, layers, _), convolutions, corrected = _build_corrected(ready, info, target, precision, options)
        files[Path(output)].write_bytes(plan)
        if isinstance(calibration, GpuCalibration):
            table = files[cache_path(output)]
            table.write_bytes(calibration.images.cache)
        manifest = replace(
            draft,
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            build_seconds=round(time.monotonic() - started, 1),
            int8_convolutions=tuple(one.node for one in convolutions if one.int8),
            other_convolutions={one.node: one.reason for one in convolutions if not one.int8},
            corrected_biases=corrected,
            int8_cost=cost,
            table_sha256=sha256_of(table) if table else "",
            engine_layers=engine_layers(layers, target),
        )
        files[manifest_path(output)].write_text(manifest.to_json())
    return manifest


def _draft(info: DetectorInfo, target: Target, precision: Precision, options: BuildOptions, onnx_sha256: str) -> Manifest:
    """What a manifest can say before the build."""
    gpu = None if target.builds_without_gpu else first_gpu()
    return Manifest(
        plan_sha256="",
        onnx_sha256=onnx_sha256,
        target=str(target),
        gpu=gpu and gpu[0],
        precision=precision,
        plugins=(),
        build_seconds=0,
        info=info,
        compute_capability=gpu[1] if gpu else 0,
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        tf32=options.tf32,
    )


def cache_path(plan: str | Path) -> Path:
    """Where the calibration cache goes that TensorRT makes as it builds ``plan``: the same name, ending in ``.cache``."""
    return Path(plan).with_suffix(".cache")


def _outputs(plan: str | Path, calibrates: bool) -> list[Path]:
    return [Path(plan), manifest_path(plan), *([cache_path(plan)] if calibrates else [])]


def _batch(info: DetectorInfo, options: BuildOptions) -> tuple[int, int, int]:
    """Least, usual and largest batch of the engine.

    Raises:
        DarktrtError: the options ask for another batch than the model's static one.
    """
    if options.batch is None or options.batch == info.batch:
        return info.batch
    if info.batch[0] == info.batch[2]:
        raise DarktrtError(
            f"--batch: the model takes batches of {info.batch[0]} alone; convert it again with 'darktrt convert --batch 1..8'"
        )
    return options.batch


def plugin_library(model: onnx.ModelProto, target: Target, path: str | Path | None = None) -> PluginLibrary | None:
    """Load the plugin library that is named, or one at hand where the model has custom nodes.

    Raises:
        DarktrtError: it does not fit, or the target takes none.
    """
    if path and not target.has_plugins:
        raise DarktrtError(f"--plugins: {target} has no plugins and runs the bodies of custom nodes; leave it out")
    useful = target.has_plugins and any(node.domain == DOMAIN for node in model.graph.node)
    found = find_library(path) if path or useful else None
    return load_plugins(target.load(), found) if found else None


class _Prepared(NamedTuple):
    """What a build takes, and what its manifest tells of that."""

    model: bytes
    """Lowered for the target."""
    calibrated: Calibrated | None
    plugins: tuple[str, ...]
    asked: dict[str, bool]
    """Of INT8 every convolution, and whether it is to be INT8."""
    channel_means: dict[str, ChannelMeans]
    """Of those that are to be INT8, what quantizing their inputs does, as far as it was measured."""


def _prepare(
    model: onnx.ModelProto,
    info: DetectorInfo,
    target: Target,
    precision: Precision,
    calibration: Calibration | GpuCalibration | None,
) -> _Prepared:
    before = _tensors(model)
    channel_means = _channel_means(model, calibration)
    lowered = lower(model, info, target, precision, calibration)
    calibrated = None
    if isinstance(calibration, GpuCalibration):
        calibrated = Calibrated(calibration.images, fp_tensors(lowered, info, calibration))
    elif precision == "int8" and calibration:
        inside = before - _tensors(lowered)  # of nodes that took others in
        scales = {name: scale for name, scale in calibration.scales.items() if name not in inside}
        calibrated = served_table(lowered, info, target, replace(calibration, scales=scales))
    names = sorted({node.op_type for node in lowered.graph.node if node.domain == DOMAIN})
    taken = _plugins_taken(names, target)
    plugins = tuple(f"{name}:{PLUGIN_VERSION}" for name in taken)
    asked = asked_for(lowered, calibrated.fp_layers if calibrated else None) if precision == "int8" else {}
    channel_means = {name: means for name, means in channel_means.items() if asked.get(name)}
    return _Prepared(lowered.SerializeToString(), calibrated, plugins, asked, channel_means)


def _channel_means(model: onnx.ModelProto, calibration: Calibration | GpuCalibration | None) -> dict[str, ChannelMeans]:
    """What quantizing does to the inputs of convolutions, by the names of their nodes."""
    known = calibration.channel_means if isinstance(calibration, Calibration) else {}
    nodes = (node for node in model.graph.node if node.op_type == "Conv" and node.input[0] in known)
    return {node.name: known[node.input[0]] for node in nodes}


def _tensors(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


def served_table(model: onnx.ModelProto, info: DetectorInfo, target: Target, calibration: Calibration) -> Calibrated | None:
    """INT8 by a calibrator that serves the scales as a cache of this very TensorRT; None where Q/DQ nodes do its work.

    Raises:
        DarktrtError: the input of a convolution has no scale, or ``calibration.fp_layers`` names no convolution.
    """
    if not target.weakly_typed or info.int8_convolutions:
        return None
    table = CalibrationTable(dict(calibration.scales), target.cache_version)
    return Calibrated(TableSource(table, info.batch[1]), fp_tensors(model, info, calibration))


def _plugins_taken(names: list[str], target: Target) -> list[str]:
    """Those of the custom ops that the target takes from a plugin library; it runs the bodies of the others."""
    taken = [name for name in names if target.has_plugins and target.has_plugin(name, PLUGIN_VERSION, PLUGIN_NAMESPACE)]
    missing = [name for name in names if name not in taken]
    if missing and not target.runs_bodies:
        raise DarktrtError(
            f"{target} takes {', '.join(missing)} from darktrt's plugin library, which is missing; build it with "
            "'make plugins', or name it by --plugins; do without: 'darktrt surgery --head raw --mish native', or "
            "'darktrt engine --target rtx'"
        )
    return taken


class _Corrected(NamedTuple):
    """An engine, what its convolutions became, and those whose biases are corrected."""

    engine: Built
    convolutions: tuple[ConvolutionPrecision, ...]
    names: tuple[str, ...]


def _build_corrected(
    ready: _Prepared, info: DetectorInfo, target: Target, precision: Precision, options: BuildOptions
) -> _Corrected:
    """Build; and where TensorRT chooses what runs in INT8, build again with the biases of just those convolutions corrected.

    Q/DQ nodes state what is INT8, and lowering has corrected for it. A weakly typed TensorRT that is served a table tells it by
    its engine alone, and the corrected bias of a convolution in FP16 would be wrong. The second build is told to keep to what
    the first one chose, for TensorRT's choices differ from build to build, and has the times that it measured.
    """
    engine = build(ready.model, info, target, precision, ready.calibrated, options)
    convolutions = convolution_precisions(engine.layers, ready.asked, target)
    if ready.calibrated is None:
        return _Corrected(engine, convolutions, tuple(ready.channel_means))
    names = tuple(one.node for one in convolutions if one.int8 and one.node in ready.channel_means)
    if names:
        model = onnx.load_from_string(ready.model)
        correct_biases(model, {name: ready.channel_means[name] for name in names})
        pinned = _pinned(model, ready.calibrated, convolutions)
        engine = build(model.SerializeToString(), info, target, precision, pinned, options, engine)
        convolutions = convolution_precisions(engine.layers, ready.asked, target)
    _report_biases(ready, convolutions, names, options)
    return _Corrected(engine, convolutions, names)


def _pinned(model: onnx.ModelProto, calibrated: Calibrated, convolutions: Collection[ConvolutionPrecision]) -> Calibrated:
    """With the choice that was made."""
    outputs = {node.name: node.output[0] for node in model.graph.node}
    fp_layers = [outputs[one.node] for one in convolutions if one.int8 is False]
    int8 = tuple(outputs[one.node] for one in convolutions if one.int8)
    return replace(calibrated, fp_layers=tuple(dict.fromkeys([*calibrated.fp_layers, *fp_layers])), int8=int8)


def _report_biases(
    ready: _Prepared, convolutions: Collection[ConvolutionPrecision], corrected: Collection[str], options: BuildOptions
) -> None:
    """Tell on stderr of biases that do not fit, or may not."""
    measured = [one for one in convolutions if one.node in ready.channel_means]
    unknown = [one.node for one in measured if one.int8 is None and one.node not in corrected]
    odd = [one.node for one in measured if bool(one.int8) != (one.node in corrected)]
    if unknown:
        how = "" if options.verbosity == "detailed" else "; build with --verbosity detailed to have them corrected"
        print(
            f"warning: biases of {len(unknown)} convolutions are not corrected, for TensorRT does not tell whether they run in "
            f"INT8{how}",
            file=sys.stderr,
        )
    if odd:
        print(
            f"warning: the second build chose other convolutions for INT8 than the first, and the biases of {len(odd)} do not "
            f"fit: {', '.join(odd)}",
            file=sys.stderr,
        )


def build(
    model: bytes,
    info: DetectorInfo,
    target: Target,
    precision: Precision,
    calibrated: Calibrated | None = None,
    options: BuildOptions | None = None,
    earlier: Built | None = None,
) -> Built:
    """Parse a lowered ONNX file with ``target`` and build its engine.

    Args:
        calibrated: INT8 by a calibrator, for a weakly typed target.
        earlier: of this network with other biases, whose times serve again; what was said of that build is not repeated.

    Raises:
        DarktrtError: the parser or the builder refuses the network, in its own words; or calibration failed.
    """
    trt = target.load()
    options = options or BuildOptions()
    logger, interrupted, failed = _logger(trt), Event(), Event()
    with _deferred_interrupt(interrupted), ExitStack() as stack:
        try:
            builder = trt.Builder(logger)
        except TypeError as error:  # what becomes of the null pointer that it gives without a GPU
            raise DarktrtError(f"{target} cannot start here: {logger.last_error or 'it needs an NVIDIA GPU'}") from error
        network = _parse(trt, builder, logger, model, target)
        config = builder.create_builder_config()
        _configure(trt, config, options, target, earlier.times if earlier else b"")
        if precision != "fp32" and target.weakly_typed:
            parsed = NetworkMap(network, info)
            if calibrated and not earlier:
                _report_coverage(calibrated, parsed)
            stack.enter_context(_weak_precision(trt, config, network, parsed, calibrated, precision == "int8", failed))
        _add_profiles(builder, config, network, info, calibrated)
        if target.has_progress_monitor:
            config.progress_monitor = stack.enter_context(_progress_monitor(trt, interrupted, failed))
        else:
            stack.enter_context(_spinner(target))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise DarktrtError(f"{target} cannot build the engine: {logger.last_error or 'it gave no reason'}")
        times = _save_timing_cache(config, options, target)
        layers = logger.layers if target.logs_layers else inspected(trt, logger, plan)
    return Built(memoryview(plan), layers, times)


@contextmanager
def _weak_precision(
    trt: TensorRT,
    config: Config,
    network: TrtNetwork,
    parsed: NetworkMap,
    calibrated: Calibrated | None,
    int8: bool,
    failed: Event,
) -> Iterator[None]:
    """FP16 or INT8 by flags, layers and calibrator; leaving the context raises what failed in calibration."""
    set_precision(trt, config, parsed, int8, calibrated)
    if calibrated is None:
        yield
        return
    with calibrator(trt, calibrated.source, network, failed) as config.int8_calibrator:
        yield


def _parse(trt: TensorRT, builder: Builder, logger: Any, model: bytes, target: Target) -> TrtNetwork:
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(getattr(flags, target.network_flag)) if target.network_flag else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise DarktrtError(f"{target} cannot parse the network: {_parser_error(parser, target)}")
    return network


def _configure(trt: TensorRT, config: Config, options: BuildOptions, target: Target, times: bytes = b"") -> None:
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, options.verbosity.upper())
    if options.tactic_sources:
        _set_tactic_sources(trt, config, options.tactic_sources, target)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    _set_compatibility(trt, config, options, target)
    _load_timing_cache(config, options, target, times)


def _set_compatibility(trt: TensorRT, config: Config, options: BuildOptions, target: Target) -> None:
    if not target.has_compatibility and (options.hardware_compatible or options.version_compatible):
        raise DarktrtError(
            f"--hardware-compatible, --version-compatible: {target} builds for many GPUs and its own version; leave them out"
        )
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _set_tactic_sources(trt: TensorRT, config: Config, text: str, target: Target) -> None:
    sources = trt.TacticSource.__members__
    mask = config.get_tactic_sources()
    for entry in text.split(","):
        sign, name = entry[:1], entry[1:].upper()
        if sign not in ("+", "-") or name not in sources:
            raise DarktrtError(
                f"--tactic-sources: '{entry}' is not + or - and one of {target}'s libraries: {', '.join(sources)}; "
                "write, for example, --tactic-sources=-CUDNN,-CUBLAS"
            )
        bit = 1 << int(sources[name])
        mask = mask | bit if sign == "+" else mask & ~bit
    if not config.set_tactic_sources(mask):
        raise DarktrtError(f"--tactic-sources: {target} refuses '{text}'")


NO_CACHE = NO_PLUGINS = "none"
"""In place of a timing cache's file, or of a plugin library."""


def default_timing_cache(target: Target) -> Path:
    """The file of the times measured on this machine's GPU: they are worth nothing on another one, or to another TensorRT."""
    name = f"{target} {gpu_name()}".replace(" ", "-").replace("/", "-")
    return Path.home() / ".cache" / "darktrt" / "timing" / f"{name}.cache"


def _load_timing_cache(config: Config, options: BuildOptions, target: Target, times: bytes) -> None:
    """Set one to build with: ``times``, or else the file's."""
    named = options.timing_cache
    if not target.has_timing_cache:
        if named not in (None, NO_CACHE):
            raise DarktrtError(f"--timing-cache: {target} measures nothing while it builds; leave it out")
        return
    if times or named == NO_CACHE:
        _take_timing_cache(config, times)
        return
    path = Path(named or default_timing_cache(target))
    try:
        if _take_timing_cache(config, path.read_bytes() if path.exists() else b""):
            return
        problem = f"is no timing cache of {target} on this GPU"
    except OSError as error:
        problem = f"cannot read: {error.strerror}"
    if named is not None:
        raise DarktrtError(f"{path}: {problem}; delete it or name another file")
    print(f"warning: {path}: {problem}; all is measured anew", file=sys.stderr)
    _take_timing_cache(config, b"")


def _take_timing_cache(config: Config, content: bytes) -> bool:
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, False))


def _save_timing_cache(config: Config, options: BuildOptions, target: Target) -> bytes:
    """Keep what was measured, and give it; a default file that cannot be written is no reason to lose the engine."""
    if not target.has_timing_cache:
        return b""
    times = bytes(config.get_timing_cache().serialize())
    if options.timing_cache != NO_CACHE:
        _write_timing_cache(times, options, target)
    return times


def _write_timing_cache(times: bytes, options: BuildOptions, target: Target) -> None:
    path = Path(options.timing_cache or default_timing_cache(target))
    try:
        if options.timing_cache is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(path) as temporary:
            temporary.write_bytes(times)
    except (OSError, DarktrtError) as error:
        if options.timing_cache is not None:
            raise
        print(f"warning: {path}: the times measured cannot be kept: {error}", file=sys.stderr)


def _report_coverage(calibrated: Calibrated, network: NetworkMap) -> None:
    """Tell on stderr where a served table and the network differ."""
    if not isinstance(calibrated.source, TableSource):
        return
    found = calibrated.source.table.compare(network.activations())
    for names, meaning in (
        (found.missing, "tensors of the network have no scale in the table, so what reads or gives them is not INT8"),
        (found.unused, "tensors of the table are not in the network"),
    ):
        if names:
            more = ", ..." if len(names) > 3 else ""
            print(f"warning: {len(names)} {meaning}: {', '.join(names[:3])}{more}", file=sys.stderr)


def _logger(trt: Any) -> Any:
    """Keeps the last error for the message, and the layer list; prints warnings nobody can act on nowhere."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        last_error = ""
        layers = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last_error = message
            elif is_layer_list(message):
                self.layers = message

    return Logger()


@contextmanager
def _deferred_interrupt(interrupted: Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set ``interrupted`` while TensorRT runs, whose callbacks would swallow them; raise at the end.

    Where TensorRT has no progress monitor nothing can stop its build, and the end is the build's.
    """
    if current_thread() is not main_thread():
        yield
        return
    signals = signal.SIGINT, signal.SIGTERM
    previous = [signal.signal(one, lambda *_: interrupted.set()) for one in signals]
    try:
        yield
    finally:
        for one, handler in zip(signals, previous, strict=True):
            signal.signal(one, handler)
        if interrupted.is_set():  # instead of what TensorRT says of a build that was stopped
            raise KeyboardInterrupt


@contextmanager
def _progress_monitor(trt: Any, *stops: Event) -> Iterator[Any]:
    """A tqdm bar for every phase of the build, on a terminal; the build stops at its next step once one of ``stops`` is set.

    TensorRT's callbacks must not raise: an exception is kept, the step says to stop, and leaving the context raises it.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bars: dict[str, Any] = {}
            self.error: Exception | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._keep(lambda: self.bars.update({phase_name: _phase_bar(phase_name, num_steps)}))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._keep(self.bars[phase_name].update)
            return self.error is None and not any(stop.is_set() for stop in stops)

        def phase_finish(self, phase_name: str) -> None:
            self._keep(lambda: self.bars.pop(phase_name).close())

        def _keep(self, act: Callable[[], object]) -> None:
            try:
                act()
            except Exception as error:
                self.error = error

    monitor = Monitor()
    try:
        yield monitor
    finally:
        for bar in monitor.bars.values():
            bar.close()
        if monitor.error:
            raise monitor.error


@contextmanager
def _spinner(target: Target) -> Iterator[None]:
    """On a terminal the time so far, which is all that can be told of a build by a TensorRT without a progress monitor."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    done = Event()

    def show() -> None:
        with tqdm(desc=f"{target} measures kernels", bar_format="{desc}, {elapsed}", leave=False) as clock:
            while not done.wait(0.5):
                clock.refresh()

    thread = Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _phase_bar(phase: str, steps: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, desc=phase, leave=False, disable=not sys.stderr.isatty())


def _parser_error(parser: Parser, target: Target) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if target.names_parser_nodes:
        lines = [f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}" for error in errors]
    else:
        lines = [f"node number {error.node()}: {error.desc()}" for error in errors]
    return "; ".join(lines) or "it gave no reason"


def _add_profiles(
    builder: Builder, config: Config, network: TrtNetwork, info: DetectorInfo, calibrated: Calibrated | None
) -> None:
    """The range of a dynamic batch, and the batch to calibrate with; a static network needs no profile."""
    if not any(-1 in sides(network.get_input(i).shape) for i in range(network.num_inputs)):
        return
    config.add_optimization_profile(_profile(builder, network, info.batch))
    if calibrated:
        config.set_calibration_profile(_profile(builder, network, (calibrated.source.batch,) * 3))


def _profile(builder: Builder, network: TrtNetwork, batches: tuple[int, int, int]) -> Any:
    profile: Any = builder.create_optimization_profile()  # it takes tuples, of which its type does not tell
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = sides(tensor.shape)
        if -1 in shape:
            profile.set_shape(tensor.name, *((n, *shape[1:]) for n in batches))
    return profile
