"""One build with TensorRT's Python API: a lowered ONNX file in, an engine out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from darktrt.calib.trt_calibrator import TableSource, calibrator
from darktrt.engine.callbacks import build_clock, build_logger, deferred_interrupt, progress_monitor
from darktrt.engine.layer_list import inspected
from darktrt.engine.options import BuildOptions
from darktrt.engine.target import Target
from darktrt.engine.timing_cache import load_timing_cache, save_timing_cache
from darktrt.engine.trt_types import shape_of
from darktrt.engine.weak_typing import Calibrated, NetworkMap, set_precision
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, ImageSizes
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    from darktrt.engine.trt_types import Builder, Config, Parser, TensorRT, TrtNetwork


class Built(NamedTuple):
    """The results of a build."""

    plan: memoryview
    layers: str = ""
    """The engine's list of layers, which :mod:`darktrt.engine.layer_list` reads."""
    times: bytes = b""
    """The timing cache after the build: the times measured in it, and those known before."""


def build(
    model: bytes,
    info: DetectorInfo,
    target: Target,
    options: BuildOptions,
    calibrated: Calibrated | None = None,
    earlier: Built | None = None,
) -> Built:
    """Parse a lowered ONNX file with ``target`` and build its engine.

    Args:
        model: the file's bytes.
        calibrated: INT8 by a calibrator, for a weakly typed target.
        earlier: a build of this network with other biases. Its measured times serve again, and its warnings do not come twice.

    Raises:
        DarktrtError: the parser or the builder refuses the network, in its own words; or calibration failed.
    """
    trt = target.load()
    logger, interrupted, failed = build_logger(trt), Event(), Event()
    with deferred_interrupt(interrupted), ExitStack() as stack:
        builder = _builder(trt, logger, target)
        network = _parse(trt, builder, logger, model, target)
        config = builder.create_builder_config()
        configure(trt, config, options, target, earlier.times if earlier else b"")
        if options.precision != "fp32" and target.weakly_typed:
            layers = NetworkMap(network, info)
            if calibrated and not earlier:
                _report_coverage(calibrated, layers)
            set_precision(trt, config, layers, options.precision == "int8", calibrated)
        if calibrated:
            feeding = calibrator(trt, calibrated.source, network, failed, (info.width, info.height))
            config.int8_calibrator = stack.enter_context(feeding)
        _add_profiles(builder, config, network, info, calibrated)
        stack.enter_context(_shown(trt, config, target, interrupted, failed))
        if (plan := builder.build_serialized_network(network, config)) is None:
            raise _refusal(logger.last_error, target, options)
        times = save_timing_cache(config, options.timing_cache, target)
        layer_list = logger.layers if target.logs_layers else inspected(trt, logger, plan)
    return Built(memoryview(plan), layer_list, times)


@contextmanager
def _shown(trt: TensorRT, config: Config, target: Target, *stops: Event) -> Iterator[None]:
    """Show the progress of a build; where TensorRT allows it, stop the build once one of ``stops`` is set."""
    if not target.has_progress_monitor:
        with build_clock(f"{target} measures kernels"):
            yield
        return
    with progress_monitor(trt, *stops) as config.progress_monitor:
        yield


def _builder(trt: TensorRT, logger: Any, target: Target) -> Builder:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # what the binding makes of a null pointer, which TensorRT returns without a GPU
        raise DarktrtError(f"{target} cannot start here: {logger.last_error or 'it needs an NVIDIA GPU'}") from error


def _parse(trt: TensorRT, builder: Builder, logger: Any, model: bytes, target: Target) -> TrtNetwork:
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(getattr(flags, target.network_flag)) if target.network_flag else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise DarktrtError(f"{target} cannot parse the network: {_parser_error(parser, target)}")
    return network


def _parser_error(parser: Parser, target: Target) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if target.names_parser_nodes:
        lines = [f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}" for error in errors]
    else:
        lines = [f"node number {error.node()}: {error.desc()}" for error in errors]
    return "; ".join(lines) or "it reported no reason"


def _refusal(reason: str, target: Target, options: BuildOptions) -> DarktrtError:
    """The error of a build that failed."""
    message = f"{target} cannot build the engine: {reason or 'it reported no reason'}"
    if not options.force_int8:
        return DarktrtError(message)
    return DarktrtError(
        f"{message}; INT8 is forced, and where it has no INT8 kernel for a convolution, leave that one in floating point "
        "(fp_layers), or do not force INT8",
        "force_int8",
    )


def configure(trt: TensorRT, config: Config, options: BuildOptions, target: Target, times: bytes = b"") -> None:
    """Set everything that does not depend on the network.

    Args:
        times: the timing cache of an earlier build, in place of the file's.

    Raises:
        DarktrtError: ``target`` does not have an option, or the timing cache does not fit.
    """
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.tactic_sources:
        _set_tactic_sources(trt, config, options.tactic_sources, target)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    _set_compatibility(trt, config, options, target)
    load_timing_cache(config, options.timing_cache, target, times)


def _set_compatibility(trt: TensorRT, config: Config, options: BuildOptions, target: Target) -> None:
    for argument in ("hardware_compatible", "version_compatible"):
        if getattr(options, argument) and not target.has_compatibility:
            raise DarktrtError(f"{target} always builds for many GPUs and for its own version; leave the option out", argument)
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
                f"tactic source '{entry}' is not + or - and one of {target}'s libraries: {', '.join(sources)}; "
                "write, for example, -CUDNN,-CUBLAS",
                "tactic_sources",
            )
        bit = 1 << int(sources[name])
        mask = mask | bit if sign == "+" else mask & ~bit
    if not config.set_tactic_sources(mask):
        raise DarktrtError(f"{target} refuses the tactic sources '{text}'", "tactic_sources")


def _report_coverage(calibrated: Calibrated, network: NetworkMap) -> None:
    """Warn where a calibration and the network name different tensors."""
    if not isinstance(calibrated.source, TableSource):
        return
    differences = calibrated.source.table.compare(network.activations())
    for names, meaning in (
        (differences.missing, "tensors of the network have no scale in the calibration, so the layers at them are not INT8"),
        (differences.unused, "tensors of the calibration are not in the network"),
    ):
        if names:
            more = ", ..." if len(names) > 3 else ""
            LOGGER.warning(f"{len(names)} {meaning}: {', '.join(names[:3])}{more}")


def _add_profiles(
    builder: Builder, config: Config, network: TrtNetwork, info: DetectorInfo, calibrated: Calibrated | None
) -> None:
    """Set the ranges of a dynamic batch and of image sizes, and what to calibrate with; a static network needs no profile."""
    if not any(-1 in shape_of(network.get_input(i).shape) for i in range(network.num_inputs)):
        return
    fitted = info.width, info.height
    config.add_optimization_profile(_profile(builder, network, info.batch, info.image_sizes or (fitted,) * 3))
    if calibrated:
        config.set_calibration_profile(_profile(builder, network, (calibrated.source.batch,) * 3, (fitted,) * 3))


def _profile(builder: Builder, network: TrtNetwork, batches: tuple[int, int, int], sizes: ImageSizes) -> Any:
    profile: Any = builder.create_optimization_profile()  # it accepts tuples, which its type does not say
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = shape_of(tensor.shape)
        if -1 in shape:
            profile.set_shape(tensor.name, *(_sized(shape, n, size) for n, size in zip(batches, sizes, strict=True)))
    return profile


def _sized(shape: tuple[int, ...], batch: int, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of an input with a batch and, for images, a width and height in place of open dimensions."""
    width, height = size
    open_dimensions = (batch, height, width)
    return tuple(open_dimensions[i] if n == -1 else n for i, n in enumerate(shape))
