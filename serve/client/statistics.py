"""A Triton server's counts of a model: requests, failures, and the time of their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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

    @property
    def mean_batch(self) -> float:
        return self.inferences / self.executions if self.executions else 0.0

    @staticmethod
    def of(record: Mapping[str, Any]) -> ModelStatistics:
        """From the server's record; gRPC's has numbers as text and omits zeros.

        Raises:
            ValueError: it is none.
        """
        inner = record.get("inference_stats", {})
        return ModelStatistics(
            str(record.get("version", "")),
            integer(record.get("inference_count", 0)),
            integer(record.get("execution_count", 0)),
            *(_spent(inner, name) for name in ("success", "fail", *PARTS)),
        )

    def __sub__(self, earlier: ModelStatistics) -> ModelStatistics:
        changes = {one.name: getattr(self, one.name) - getattr(earlier, one.name) for one in fields(self)[1:]}
        return ModelStatistics(self.version, **changes)


def _spent(inner: Any, name: str) -> Spent:
    values = inner.get(name, {}) if isinstance(inner, Mapping) else None
    if not isinstance(values, Mapping):
        raise ValueError(f"'{name}' is {quote(repr(values), 40)}")
    return Spent(integer(values.get("count", 0)), integer(values.get("ns", 0)))


def to_table(statistics: Sequence[ModelStatistics], batches: bool = True) -> str:
    """Text for people: a heading and a line a version; times are means over requests, in milliseconds.

    Args:
        batches: whether Triton knows the model's batch; it counts no images otherwise.
    """
    lines = ["version  requests  failed    images  batch  total ms  " + "  ".join(f"{name:>14}" for name in PARTS)]
    for one in statistics:
        parts = "  ".join(f"{getattr(one, name).mean_ms:14.3f}" for name in PARTS)
        images = f"{one.inferences:8}  {one.mean_batch:5.2f}" if batches else f"{'-':>8}  {'-':>5}"
        lines.append(
            f"{one.version:<7}  {one.success.count:8}  {one.fail.count:6}  {images}  {one.success.mean_ms:8.3f}  {parts}"
        )
    return "\n".join(lines)
