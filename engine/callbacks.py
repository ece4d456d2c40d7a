"""What TensorRT calls while it builds: a logger and a progress monitor; and how Ctrl-C stops a build."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any

from darktrt.engine.layer_list import is_layer_list
from darktrt.progress import progress

if TYPE_CHECKING:
    from darktrt.progress import Progress


def build_logger(trt: Any) -> Any:
    """A logger that keeps the last error, for a message, and the layer list; it drops everything else.

    TensorRT's warnings are no use to whoever runs darktrt.
    """

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
def deferred_interrupt(interrupted: Event) -> Iterator[None]:
    """Make Ctrl-C and SIGTERM set ``interrupted`` during the block, and raise KeyboardInterrupt after it.

    TensorRT's callbacks would swallow an exception. A TensorRT without a progress monitor cannot be stopped: there the
    interrupt comes when the build has ended.
    """
    if current_thread() is not main_thread():
        yield
        return
    signals = signal.SIGINT, signal.SIGTERM
    previous = [signal.signal(number, lambda *_: interrupted.set()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
        if interrupted.is_set():  # instead of TensorRT's message about a build that was stopped
            raise KeyboardInterrupt


@contextmanager
def progress_monitor(trt: Any, *stops: Event) -> Iterator[Any]:
    """A progress monitor that shows every phase of the build, and stops the build once one of ``stops`` is set.

    TensorRT's callbacks must not raise: the monitor keeps an exception and stops the build, and leaving the context raises it.
    """
    phases = _Phases()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.keep_error(phases.start, phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.keep_error(phases.step, phase_name)
            return phases.error is None and not any(stop.is_set() for stop in stops)

        def phase_finish(self, phase_name: str) -> None:
            phases.keep_error(phases.finish, phase_name)

    try:
        yield Monitor()
    finally:
        for name in list(phases.shown):
            phases.finish(name)
        if phases.error:
            raise phases.error


class _Phases:
    """The progress of the phases under way, by name, and the first error in showing it."""

    def __init__(self) -> None:
        self.shown: dict[str, tuple[ExitStack, Progress]] = {}
        self.error: Exception | None = None

    def start(self, name: str, steps: int) -> None:
        stack = ExitStack()
        self.shown[name] = stack, stack.enter_context(progress(steps, "steps", name))

    def step(self, name: str) -> None:
        self.shown[name][1].update()

    def finish(self, name: str) -> None:
        self.shown.pop(name)[0].close()

    def keep_error(self, act: Callable[..., None], *arguments: Any) -> None:
        """Call ``act``; keep what it raises."""
        try:
            act(*arguments)
        except Exception as error:
            self.error = self.error or error


@contextmanager
def build_clock(description: str) -> Iterator[None]:
    """Show the time so far, all that can be shown of a build by a TensorRT without a progress monitor."""
    done = Event()

    def show() -> None:
        with progress(None, "seconds", description) as clock:
            while not done.wait(1):
                clock.update()

    thread = Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
