"""A Triton server's counts of a model: requests, failures, and the time of their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from darktrt.errors import quote
from darktrt.serve.model_info import integer

PARTS = ("queue", "compute_input", "compute_infer", "compute_output")
"""Of a request's time in the server, by Triton's names: waiting, copying inputs, running the model, copying outputs."""


@dataclass(frozen=True)
class Spent:
    """How often something happened, and the nanoseconds of all times together."""

    count: int = 0
    ns: int = 0

    @property
    def mean_ms(self) -> float:
        return self.ns / self.count / 1e6 if self.count else 0.0

    def __sub__(self, earlier: Spent) -> Spent:
        return Spent(self.count - earlier.count, self.ns - earlier.ns)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.count + other.count, self.ns + other.ns)


@dataclass(frozen=True)
class ModelStatistics:
    """The counts of one version of a model, since it was loaded or between two moments."""

    version: str
    inferences: int
    """Images, more than requests where those are batches; requests of a model with ``max_batch_size: 0``."""
    executions: int
    """Runs of the network, fewer than requests where the server batches."""
    success: Spent
    fail: Spent
    queue: Spent
    compute_input: Spent
    compute_infer: Spent
    compute_output: Spent
    server: str = ""

    @property
    def mean_batch(self) -> float:
        return self.inferences / self.executions if self.executions else 0.0

    @staticmethod
    def of(record: Mapping[str, Any], server: str = "") -> ModelStatistics:
        """From the server's record; gRPC's has numbers as text and omits zeros.

        Raises:
            ValueError: it is none.
        """
        inner = record.get("inference_stats", {})
        times = {name: _spent(inner, name) for name in ("success", "fail", *PARTS)}
        inferences, executions = (integer(record.get(f"{name}_count", 0)) for name in ("inference", "execution"))
        return ModelStatistics(str(record.get("version", "")), inferences, executions, **times, server=server)

    def __sub__(self, earlier: ModelStatistics) -> ModelStatistics:
        changes = {name: getattr(self, name) - getattr(earlier, name) for name in _COUNTS}
        return replace(self, **changes)

    def __add__(self, other: ModelStatistics) -> ModelStatistics:
        """Those of two servers together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return replace(self, server="", **sums)


_COUNTS = [field.name for field in fields(ModelStatistics) if field.name not in ("version", "server")]


def _spent(inner: Any, name: str) -> Spent:
    values = inner.get(name, {}) if isinstance(inner, Mapping) else None
    if not isinstance(values, Mapping):
        raise ValueError(f"'{name}' is {quote(repr(values), 40)}")
    return Spent(integer(values.get("count", 0)), integer(values.get("ns", 0)))


def to_table(statistics: Sequence[ModelStatistics], batches: bool = True) -> str:
    """Text for people: a heading and a line a version, of each server where there are several; times are means over requests,
    in milliseconds.

    Args:
        batches: whether Triton knows the model's batch; it counts no images otherwise.
    """
    servers = [one.server for one in statistics]
    width = max(map(len, ["server", *servers])) if len(set(servers)) > 1 else 0
    first = f"{'server':<{width}}  " if width else ""
    lines = [f"{first}version  requests  failed    images  batch  total ms  " + "  ".join(f"{name:>14}" for name in PARTS)]
    for one in statistics:
        first = f"{one.server:<{width}}  " if width else ""
        parts = "  ".join(f"{getattr(one, name).mean_ms:14.3f}" for name in PARTS)
        images = f"{one.inferences:8}  {one.mean_batch:5.2f}" if batches else f"{'-':>8}  {'-':>5}"
        lines.append(
            f"{first}{one.version:<7}  {one.success.count:8}  {one.fail.count:6}  {images}  {one.success.mean_ms:8.3f}  {parts}"
        )
    return "\n".join(lines)
