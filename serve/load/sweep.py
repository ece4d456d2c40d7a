"""Which batching delay and how many instances serve best within a latency: a server of its own for every combination."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output
from darktrt.serve.config import CONFIG_NAME
from darktrt.serve.load.measure import Level, LoadOptions, LoadReport, measure_load
from darktrt.serve.repository import models_of, read_config
from darktrt.serve.server import Program, Server, StartOptions, running

DELAYS = (0, 500, 2000)
INSTANCES = (1, 2, 4)


@dataclass(frozen=True)
class Setting:
    """What the sweep varies."""

    delay: int
    """Microseconds that a request may wait for others to be batched with."""
    instances: int

    def __post_init__(self) -> None:
        if self.delay < 0 or self.instances < 1:
            raise DarktrtError("a sweep needs delays of 0 or more microseconds and 1 instance or more")


@dataclass(frozen=True)
class SweepReport:
    """The load of every setting, and the best level of any: the highest throughput whose p99 keeps to the budget."""

    model: str
    latency_budget_ms: float
    reports: tuple[tuple[Setting, LoadReport], ...]

    @property
    def best(self) -> tuple[Setting, Level] | None:
        """None where no level keeps to the budget."""
        levels = [(setting, level) for setting, report in self.reports for level in report.levels]
        kept = [one for one in levels if one[1].latency.p99 <= self.latency_budget_ms and not one[1].failures]
        return max(kept, key=lambda one: one[1].infer_per_second, default=None)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "best": self.best and [asdict(one) for one in self.best]}, indent=2) + "\n"

    def to_markdown(self) -> str:
        """A row a setting, with its best level within the budget, and a sentence."""
        rows = [
            f"{self.model}: the most that keeps its p99 within {self.latency_budget_ms:g} ms",
            "",
            "| delay µs | instances | infer/s | at concurrency | p50 ms | p99 ms | batch in the server |",
            "|---|---|---|---|---|---|---|",
        ]
        for setting, report in self.reports:
            best = SweepReport(self.model, self.latency_budget_ms, ((setting, report),)).best
            level = best[1] if best else None
            shown = (
                f"{level.infer_per_second:.1f} | {level.concurrency} | {level.latency.p50:.2f} | {level.latency.p99:.2f} | "
                f"{level.mean_batch:.2f}"
                if level
                else "- | - | - | - | -"
            )
            rows.append(f"| {setting.delay} | {setting.instances} | {shown} |")
        if self.best:
            rows += ["", f"best: a delay of {self.best[0].delay} us and {self.best[0].instances} instances"]
        return "\n".join(rows) + "\n"


def sweep(
    repository: str | Path,
    model: str | None,
    settings: Sequence[Setting],
    latency_budget_ms: float,
    options: LoadOptions,
    start: StartOptions | None = None,
) -> SweepReport:
    """Measure a model of a repository with every setting, and write the best into its config.pbtxt.

    Raises:
        DarktrtError: there is no such model, a server does not start, or no setting keeps to the budget, in which case the
            config stays as it is.
    """
    folder = find_model(repository, model)
    for setting in settings:
        config_text(folder, setting)  # says before minutes are spent that a setting makes no sense
    reports = []
    for setting in settings:
        print(f"{folder.name}: delay {setting.delay} us, {setting.instances} instances", file=sys.stderr)
        with tempfile.TemporaryDirectory() as place:
            _copy(folder, Path(place) / folder.name, setting)
            with own_server(place, start) as server:
                reports.append(
                    (
                        setting,
                        measure_load(
                            server.grpc, folder.name, "", replace(options, metrics=f"http://{server.metrics}/metrics")
                        ),
                    )
                )
    report = SweepReport(folder.name, latency_budget_ms, tuple(reports))
    if report.best is None:
        fastest = min(level.latency.p99 for _, one in reports for level in one.levels)
        raise DarktrtError(f"{folder.name}: no setting has a p99 within {latency_budget_ms:g} ms; the lowest is {fastest:g} ms")
    with atomic_output(folder / CONFIG_NAME) as temporary:
        temporary.write_text(config_text(folder, report.best[0]), encoding="utf-8")
    return report


def load_repository(repository: str | Path, names: Sequence[str], options: LoadOptions) -> list[LoadReport]:
    """Measure models of a repository, all where none is named, on a server that is started for it.

    Raises:
        DarktrtError: as :func:`darktrt.serve.server.running` and :func:`darktrt.serve.load.measure.measure_load`.
    """
    found = [find_model(repository, name).name for name in names] or [folder.name for folder in models_of(repository)]
    with own_server(repository) as server:
        options = replace(options, metrics=f"http://{server.metrics}/metrics")
        return [measure_load(server.grpc, name, "", options) for name in found]


def find_model(repository: str | Path, name: str | None) -> Path:
    """The folder of the model of this name, or of the only one.

    Raises:
        DarktrtError: there is none, or several and no name.
    """
    folders = {folder.name: folder for folder in models_of(repository)}
    if name is None and len(folders) == 1:
        return next(iter(folders.values()))
    if name not in folders:
        asked = f"has no model '{name}'" if name else "has several models"
        raise DarktrtError(f"{repository}: {asked}; name one with --model: {', '.join(folders)}")
    return folders[name]


def _copy(folder: Path, target: Path, setting: Setting) -> None:
    """A model with another config; the rest of it are links."""
    target.mkdir()
    for entry in folder.iterdir():
        if entry.name != CONFIG_NAME:
            os.symlink(entry.resolve(), target / entry.name)
    (target / CONFIG_NAME).write_text(config_text(folder, setting), encoding="utf-8")


def config_text(folder: Path, setting: Setting) -> str:
    """The model's config with this setting.

    Raises:
        DarktrtError: it cannot be read, or the model has no batches to wait for.
    """
    from google.protobuf import text_format

    config = read_config(folder / CONFIG_NAME)
    if setting.delay and config.max_batch_size < 2:
        raise DarktrtError(f"{folder}: has no batches to wait for; a delay other than 0 makes no sense")
    if config.max_batch_size > 1:
        config.dynamic_batching.max_queue_delay_microseconds = setting.delay
    for group in config.instance_group:
        group.count = setting.instances
    return str(text_format.MessageToString(config))


@contextmanager
def own_server(repository: str | Path, options: StartOptions | None = None, program: Program | None = None) -> Iterator[Server]:
    """As :func:`darktrt.serve.server.running`, on ports that are free."""
    http, grpc, metrics = _free_ports(3)
    options = replace(options or StartOptions(), http_port=http, grpc_port=grpc, metrics_port=metrics)
    with running(repository, options, program) as server:
        yield server


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def delays_of(repository: str | Path, model: str | None) -> tuple[int, ...]:
    """Those to try where none are asked for: only 0 for a model that Triton does not batch.

    Raises:
        DarktrtError: there is no such model.
    """
    return DELAYS if read_config(find_model(repository, model) / CONFIG_NAME).max_batch_size > 1 else (0,)


def settings_of(delays: Sequence[int], instances: Sequence[int]) -> list[Setting]:
    """Every combination."""
    return [Setting(*pair) for pair in product(delays, instances)]
