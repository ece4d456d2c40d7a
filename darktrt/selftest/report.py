"""What the selftest found: all of it as JSON, and as Markdown that fits into an issue."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from darktrt.engine.bench import Timing
from darktrt.errors import quote
from darktrt.selftest.outcome import Errors

Result = Literal["passed", "built", "failed", "not tried"]

_WORDS = 1500
"""The most characters of the words of one failure in the Markdown; GitHub accepts 65,536 in an issue."""


@dataclass(frozen=True)
class Row:
    """One route, and what came of it."""

    runs_in: str
    name: str
    result: Result
    """``built``: an engine that this machine cannot run."""
    seconds: float = 0.0
    words: str = ""
    """Why it failed, in the words of whatever failed; or why the engine was not run."""
    stage: str = ""
    """The stage that failed: load, build, run, compare or time; end, where its process failed behind all of them."""
    log: str = ""
    """The end of what TensorRT wrote by itself, of a route that failed."""
    build_seconds: float | None = None
    mebibytes: float | None = None
    int8: tuple[int, int] | None = None
    """Convolutions in INT8, and all."""
    errors: Errors | None = None
    timings: tuple[Timing, ...] = ()


@dataclass(frozen=True)
class SelftestReport:
    """The outcome of :func:`darktrt.run_selftest`."""

    facts: dict[str, str]
    """The machine: versions, GPU, driver."""
    rows: tuple[Row, ...]
    impossible: dict[str, str] = field(default_factory=dict)
    """Routes that this machine lacks, and why."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every route was tried, and none failed."""
        return not any(row.result in ("failed", "not tried") for row in self.rows)

    def to_json(self) -> str:
        """Everything."""
        return json.dumps({**asdict(self), "passed": self.passed}, indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Facts, a table with a row a route, and the words of what failed."""
        counts = Counter(row.result for row in self.rows)
        summary = ", ".join(
            f"{counts[result]} {result}" for result in ("passed", "built", "failed", "not tried") if counts[result]
        )
        parts = [f"### darktrt selftest: {summary or 'nothing to compare'}", self._facts(), _table(self.rows)]
        parts += [_failure(row) for row in self.rows if row.result == "failed"]
        parts.append(self._remarks())
        return "\n\n".join(part for part in parts if part) + "\n"

    def _facts(self) -> str:
        return "; ".join(f"{name} {_cell(value)}" for name, value in self.facts.items()) + f"; {self.seconds:.0f} s in all"

    def _remarks(self) -> str:
        """A line for each reason why something was not run or does not exist."""
        left = [(row.words, f"{row.runs_in}: {row.name}") for row in self.rows if row.result == "not tried"]
        left += [(reason, name) for name, reason in self.impossible.items()]
        names = {reason: "; ".join(name for other, name in left if other == reason) for reason, _ in left}
        built = Counter((row.runs_in, row.words) for row in self.rows if row.result == "built")
        lines = [
            f"- {_cell(runs_in)}: {count} engines built and not run: {_cell(why)}" for (runs_in, why), count in built.items()
        ]
        return "\n".join([*lines, *(f"- {_cell(named, 400)}: {_cell(reason, 400)}" for reason, named in names.items())])


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| runs in | route | result | build, s | MiB | INT8 | worst error | detections | score | ms, batch 1 | images/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)])


def _cells(row: Row) -> list[str]:
    result = f"**failed** ({row.stage})" if row.result == "failed" else row.result
    int8 = f"{row.int8[0]} of {row.int8[1]}" if row.int8 else ""
    texts = [
        _cell(row.runs_in),
        _cell(row.name),
        result,
        _number(row.build_seconds, ".1f"),
        _number(row.mebibytes, ".2f"),
        int8,
    ]
    return [*texts, *_error_cells(row.errors), *_time_cells(row.timings)]


def _error_cells(errors: Errors | None) -> list[str]:
    if errors is None:
        return ["", "", ""]
    extra = f", {errors.extra} extra" if errors.extra else ""
    detections = f"{errors.matched} of {errors.expected}{extra}"
    return [_number(errors.worst, ".1e"), detections, _number(errors.score, ".1e")]


def _time_cells(timings: Sequence[Timing]) -> list[str]:
    """The median time of the network with a batch of one, and the most images a second from host memory to host memory."""
    if not timings:
        return ["", ""]
    first = min(timing.network.median for timing in timings if timing.batch == 1)
    return [f"{first:.3f}", f"{max(timing.images_per_second for timing in timings):.0f}"]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _failure(row: Row) -> str:
    words = row.words[:_WORDS]
    log = row.log[len(words) - _WORDS :] if len(words) < _WORDS else ""
    lines = [quote(line, _WORDS).replace("```", "'''") for line in [*words.splitlines(), *log.splitlines()]]
    text = "\n".join(["```text", *lines, "```"])
    return f"**{_cell(row.runs_in)}: {_cell(row.name)}** failed ({row.stage}) after {row.seconds:.0f} s:\n\n{text}"


def _cell(text: str, most: int = 120) -> str:
    """A text that neither ends a cell of a table nor is taken for HTML."""
    return quote(text, most).replace("|", "\\|").replace("<", "&lt;")
