"""ONNX to a serialized engine."""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any, Literal

from darktrt import DarktrtError, DetectorInfo, atomic_output, keep_inputs, sha256_of
from engine.lower import Calibration, Precision, lower
from engine.manifest import Manifest, manifest_path
from engine.target import Target, find_target, gpu_name
from plugins.ops import DOMAIN, PLUGIN_VERSION
from surgery.rewrite import load_model


def build_file(
    source: str | Path,
    output: str | Path,
    precision: Precision,
    choice: Literal["auto", "rtx", "trt"],
    calibration: Calibration | None = None,
) -> Manifest:
    """ONNX file to plan and manifest; the whole of ``darktrt engine``.

    Raises:
        DarktrtError: ``source`` is no ONNX of darktrt, no TensorRT is at hand, it refuses the network, or ``output`` cannot be
            written.
    """
    keep_inputs(output, source)
    if manifest_path(output) == Path(output):
        raise DarktrtError(f"{output}: .json is the manifest's name; call the engine something like model.plan")
    model, info = load_model(source)
    target = find_target(choice)
    started = time.monotonic()
    lowered = lower(model, info, target, precision, calibration)
    names = sorted({node.op_type for node in lowered.graph.node if node.domain == DOMAIN})
    serialized = lowered.SerializeToString()
    del model, lowered
    source_hash = sha256_of(source)
    # both files get their names together, at the end: no plan without its manifest
    with atomic_output(output) as plan_file, atomic_output(manifest_path(output)) as manifest_file:
        plan = build(serialized, info, target, precision)
        plan_file.write_bytes(plan)
        manifest = Manifest(
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            onnx_sha256=source_hash,
            target=str(target),
            gpu=None if target.builds_without_gpu else gpu_name(),
            precision=precision,
            plugins=tuple(f"{name}:{PLUGIN_VERSION}" for name in names) if target.has_plugins else (),
            build_seconds=round(time.monotonic() - started, 1),
            info=info,
        )
        manifest_file.write_text(manifest.to_json())
    return manifest


def build(model: bytes, info: DetectorInfo, target: Target, precision: Precision) -> memoryview:
    """Parse a lowered ONNX file with ``target`` and build its engine.

    Raises:
        DarktrtError: the parser or the builder refuses the network; the message is theirs.
    """
    trt = target.load()
    logger, interrupted = _logger(trt), Event()
    monitor = _progress_monitor(trt, interrupted)
    with _deferred_interrupt(interrupted):
        builder = trt.Builder(logger)
        flag = trt.NetworkDefinitionCreationFlag
        network = builder.create_network(0 if target.weakly_typed else 1 << int(flag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model):
            raise DarktrtError(f"{target} cannot parse the network: {_parser_error(parser)}")
        config = builder.create_builder_config()
        config.progress_monitor = monitor
        if precision == "fp16" and target.weakly_typed:
            config.set_flag(trt.BuilderFlag.FP16)
        _add_profile(builder, config, network, info)
        plan = builder.build_serialized_network(network, config)
    monitor.finish()
    if plan is None:
        raise DarktrtError(f"{target} cannot build the engine: {logger.last_error or 'it gave no reason'}")
    return memoryview(plan)


def _logger(trt: Any) -> Any:
    """Keeps the last error for the message; prints warnings nobody can act on nowhere."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        last_error = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last_error = message

    return Logger()


@contextmanager
def _deferred_interrupt(interrupted: Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set ``interrupted`` while TensorRT runs, whose callbacks would swallow them; raise at the end."""
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
    if interrupted.is_set():
        raise KeyboardInterrupt


def _progress_monitor(trt: Any, interrupted: Event) -> Any:
    """A tqdm bar for every phase of the build, on a terminal; the build stops at its next step once ``interrupted`` is set.

    TensorRT's callbacks must not raise: an exception is kept for :meth:`finish`, and the step says to stop.
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
            return self.error is None and not interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._keep(lambda: self.bars.pop(phase_name).close())

        def finish(self) -> None:
            """Close the bars and raise what a callback could not."""
            for bar in self.bars.values():
                bar.close()
            if self.error:
                raise self.error

        def _keep(self, act: Callable[[], object]) -> None:
            try:
                act()
            except Exception as error:
                self.error = error

    return Monitor()


def _phase_bar(phase: str, steps: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, desc=phase, leave=False, disable=not sys.stderr.isatty())


def _parser_error(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}" for error in errors]
    return "; ".join(lines) or "it gave no reason"


def _add_profile(builder: Any, config: Any, network: Any, info: DetectorInfo) -> None:
    """The range of a dynamic batch; a static network needs no profile."""
    low, usual, high = info.batch
    if low == high:
        return
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if -1 in shape:
            profile.set_shape(tensor.name, *((n, *shape[1:]) for n in (low, usual, high)))
    config.add_optimization_profile(profile)
