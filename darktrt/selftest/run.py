"""The selftest: routes one after the other, each in a process of its own, compared with a reference."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import darktrt
from darktrt.engine.target import INSTALL, Flavour, Target, gpu_name, installed_version
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_outputs, scratch_folder
from darktrt.plugins.library import VARIABLE, find_library
from darktrt.progress import LOGGER, progress
from darktrt.records import read_record
from darktrt.selftest.machine import facts
from darktrt.selftest.outcome import OUTCOME, REQUEST, Outcome, Request, write
from darktrt.selftest.report import Row, SelftestReport
from darktrt.selftest.routes import Route, Routes, cpu_routes, engine_routes, loading, surgery

_LEAST_SECONDS = 120.0
"""Of one route, as long as there is time; more is a third of the time that is left."""
_MODULE = "darktrt.selftest"
LOG = "log"
"""The file of what a process writes by itself."""
_LOG_BYTES = 4000
"""Of the end of a log."""
_NAMES: dict[Flavour, str] = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}


def markdown_path(output: str | Path) -> Path:
    """The Markdown beside a report: the same name, ending in ``.md``."""
    return Path(output).with_suffix(".md")


def run_selftest(
    output: str | Path = "selftest.json",
    *,
    plugins: str | Path | None = None,
    tactic_sources: str | None = None,
    minutes: float = 10.0,
) -> SelftestReport:
    """Try every way to build an engine that this machine has, with a small network, and write a report.

    Each route builds an engine, runs it where that is possible, compares its outputs with PyTorch's, and times it. PyTorch and
    ONNX Runtime are compared too, where they are installed. Each route is a process of its own: one that crashes or hangs is a
    line of the report.

    Args:
        output: the JSON file to write; the same as Markdown goes beside it (``.md``).
        plugins: the plugin library of full TensorRT, as for :func:`darktrt.build_engine`.
        tactic_sources: for full TensorRT, as :attr:`darktrt.BuildOptions.tactic_sources`.
        minutes: the limit of all of it; what would begin later is not tried.

    Raises:
        DarktrtError: a file cannot be written, or the plugin library cannot be read.
    """
    if not 0 < minutes < math.inf:
        raise DarktrtError(f"a selftest of {minutes} minutes; write a number above 0", "minutes")
    if Path(output).suffix == ".md":
        raise DarktrtError(f"{output}: .md is the Markdown's name; call the report something like selftest.json", "output")
    check_outputs([output, markdown_path(output)], [plugins])
    started = time.monotonic()
    with scratch_folder() as folder:
        named = plugins or os.environ.get(VARIABLE)  # a path of this folder, which the processes do not work in
        series = _Series(folder, os.path.abspath(named) if named else None, tactic_sources, started + 60 * minutes)
        series.try_all()
    report = SelftestReport(facts(plugins), tuple(series.rows), series.impossible, round(time.monotonic() - started, 1))
    _write(report, output)
    return report


def _write(report: SelftestReport, output: str | Path) -> None:
    with ExitStack() as stack:
        for path, text in ((Path(output), report.to_json()), (markdown_path(output), report.to_markdown())):
            stack.enter_context(atomic_output(path)).write_text(text, encoding="utf-8")


@dataclass
class _Series:
    """All attempts of one selftest."""

    folder: Path
    plugins: str | None
    tactic_sources: str | None
    deadline: float
    """By the monotonic clock."""
    rows: list[Row] = field(default_factory=list)
    impossible: dict[str, str] = field(default_factory=dict)
    versions: dict[Flavour, str] = field(default_factory=dict)
    """Of each TensorRT that loads."""

    def try_all(self) -> None:
        """Try every route; the list of them grows as each TensorRT states its version."""
        with progress(0, "routes", "selftest", least=0) as bar:
            for name, routes in self._groups():
                self.impossible.update(routes.impossible)
                bar.total = (bar.total or 0) + len(routes.possible)
                for route in routes.possible:
                    row = self._row(name, route)
                    with bar.aside():
                        LOGGER.info("%s: %s: %s", row.runs_in, row.name, _short(row))
                    self.rows.append(row)
                    bar.update()

    def _groups(self) -> Iterator[tuple[str, Routes]]:
        """The routes by what they run in."""
        yield "", Routes((surgery(),), {})
        if self.rows[-1].result != "passed":
            return
        yield "", cpu_routes()
        installed = [flavour for flavour in _NAMES if installed_version(flavour)]
        if not installed:
            self.impossible["engines"] = f"no TensorRT is installed; {INSTALL['rtx']}, or {INSTALL['trt']}"
        for flavour in installed:
            yield _NAMES[flavour], Routes((loading(flavour),), {})
            if flavour in self.versions:
                yield self._engines(flavour, self.versions[flavour])

    def _engines(self, flavour: Flavour, version: str) -> tuple[str, Routes]:
        target = Target(flavour, tuple(int(part) for part in version.split(".")))
        if gpu_name() is None and not target.builds_without_gpu:
            return str(target), Routes((), {f"engines of {target}": "it builds beside an NVIDIA GPU, and none is usable here"})
        return str(target), engine_routes(target, find_library(self.plugins, version) is not None)

    def _row(self, name: str, route: Route) -> Row:
        """Try one route."""
        left = self.deadline - time.monotonic()
        row = Row(name or route.runs_in, route.name, "not tried")
        if left <= 0:
            return replace(row, words="the time was over")
        folder = self.folder / str(len(self.rows))
        folder.mkdir()
        write(folder / REQUEST, Request(route, str(self.folder), self.plugins, self.tactic_sources))
        started = time.monotonic()
        problem = run_process(folder, min(left, max(_LEAST_SECONDS, left / 3)))
        row = replace(row, seconds=round(time.monotonic() - started, 1))
        return self._judged(row, route, _outcome(folder), problem, folder)

    def _judged(self, row: Row, route: Route, outcome: Outcome, problem: str, folder: Path) -> Row:
        """The row with what came of the route."""
        facts = ("build_seconds", "mebibytes", "int8", "errors", "timings")
        row = replace(row, **{name: getattr(outcome, name) for name in facts})
        if words := outcome.error or problem:
            missing = [stage for stage in route.stages if stage not in outcome.done]
            return replace(row, result="failed", words=words, stage=missing[0] if missing else "end", log=log_of(folder))
        if outcome.beyond:
            return replace(row, result="failed", words=outcome.beyond, stage="compare")
        if outcome.not_run:
            return replace(row, result="built", words=outcome.not_run)
        if route.flavour and outcome.version:
            self.versions[route.flavour] = outcome.version
        return replace(row, result="passed")


def run_process(folder: Path, seconds: float) -> str:
    """Try the route of a folder in a process of its own, for so many seconds; how it ended, empty if well."""
    command = [sys.executable, "-m", _MODULE, str(folder), str(os.getpid())]
    with open(folder / LOG, "wb") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=folder, env=_environment(), **streams)  # type: ignore[call-overload]
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"it was stopped after {seconds:.0f} s"
        finally:
            process.kill()
            process.wait()
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}" if status else ""


def _environment() -> dict[str, str]:
    """The environment of this process, in which Python finds the same darktrt from any folder."""
    root = Path(darktrt.__file__).resolve().parent.parent
    paths = [str(root), *(os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _outcome(folder: Path) -> Outcome:
    file = folder / OUTCOME
    return read_record(Outcome, file, "start the selftest again") if file.is_file() else Outcome()


def log_of(folder: Path) -> str:
    """The end of what the process of a folder wrote, in whole lines."""
    with open(folder / LOG, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_BYTES))
        text = file.read().decode("utf-8", "replace")
    return (text if size <= _LOG_BYTES else text.partition("\n")[2]).strip()


def _short(row: Row) -> str:
    """The result as a line."""
    lines = row.words.splitlines()
    words = f": {lines[0]}" if lines and row.result != "passed" else ""
    return f"{row.result}{f' ({row.stage})' if row.stage else ''}, {row.seconds:.0f} s{words}"
