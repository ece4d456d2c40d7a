"""ONNX Runtime's sessions: how many threads they have."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest
from helpers import Made

from darktrt.onnx_session import OnnxSession


@pytest.mark.parametrize(
    ("variable", "asked", "threads"),
    [("3", 0, 3), ("3", 2, 2), ("2,4", 0, 2), ("", 0, 0), ("all", 0, 0), (None, 0, 0), (None, 2, 2)],
)
def test_threads_are_those_asked_for_or_those_of_the_environment(
    made: Made, monkeypatch: pytest.MonkeyPatch, variable: str | None, asked: int, threads: int
) -> None:
    start, found = onnxruntime.InferenceSession, []

    def watched(model: Any, options: Any, **more: Any) -> Any:
        found.append(options.intra_op_num_threads)
        return start(model, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    OnnxSession(str(made.plain), "made", asked)
    assert found == [threads]
