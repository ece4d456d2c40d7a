"""An ONNX file as a runner: where it runs, what is checked of it, and the memory for its images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Made

from darktrt.engine import runtime
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.metadata import Thresholds
from darktrt.onnx_file import load_model
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ONNX Runtime is asked for; it knows a GPU here."""
    sessions: list[dict[str, Any]] = []

    class Session:
        metadata: dict[str, str]

        def __init__(self, model: bytes | str, name: str, threads: int, providers: Any) -> None:
            sessions.append({"model": model, "name": name, "threads": threads, "providers": providers})
            self.name, self.metadata = name, {p.key: p.value for p in onnx.load(name, load_external_data=False).metadata_props}

    monkeypatch.setattr(runtime, "OnnxSession", Session)
    monkeypatch.setattr(runtime, "available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr("darktrt.onnx_cost.limit_batch", lambda _, info, __: replace(info, batch=(1, 2, 2)))
    return sessions


def test_by_default_it_runs_on_all_cores(made: Made, asked: list[dict[str, Any]]) -> None:
    """The batch is what the memory of the CPU allows, which is no matter of a GPU."""
    assert OnnxRunner(made.plain).info.batch == (1, 2, 2)
    assert OnnxRunner(made.plain, threads=3).info.batch == (1, 2, 2)
    assert [(one["threads"], one["providers"]) for one in asked] == [(n, ["CPUExecutionProvider"]) for n in (0, 3)]


@pytest.mark.parametrize("gpu", [0, 1])
@pytest.mark.parametrize("trusted", [False, True])
def test_it_runs_on_the_gpu_of_a_number(made: Made, asked: list[dict[str, Any]], gpu: int, trusted: bool) -> None:
    assert OnnxRunner(made.plain, gpu=gpu, trusted=trusted).info == made.info
    (one,) = asked
    assert one["providers"] == [("CUDAExecutionProvider", {"device_id": gpu})]


def test_a_trusted_file_is_run_as_it_is(made: Made, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path, without a look at the graph; another one is checked, and run from memory."""
    OnnxRunner(made.plain)
    monkeypatch.setattr("darktrt.onnx_file.load_model", lambda *_: pytest.fail("the file is checked"))
    OnnxRunner(made.plain, trusted=True)
    assert [type(one["model"]) for one in asked] == [bytes, str] and asked[1]["model"] == str(made.plain)


def test_a_trusted_file_is_a_file_of_darktrt(made: Made, tmp_path: Path) -> None:
    foreign = made.model()
    del foreign.metadata_props[:]
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    with pytest.raises(DarktrtError, match=r"foreign\.onnx: has no darktrt metadata; make it with 'darktrt convert' and"):
        OnnxRunner(tmp_path / "foreign.onnx", trusted=True)
    with pytest.raises(DarktrtError, match=r"none\.onnx: cannot read: No such file .*; make it with 'darktrt surgery'"):
        OnnxRunner(tmp_path / "none.onnx", trusted=True)


@pytest.mark.parametrize("form", ["uint8", "float"])
def test_the_memory_for_images_has_the_form_of_the_input(made: Made, tmp_path: Path, form: Any) -> None:
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions(input=form))
    _, info = load_model(tmp_path / "a.onnx")
    with OnnxRunner(tmp_path / "a.onnx") as runner:
        images = runner.buffer(2)
        expected = ((2, 64, 96, 3), np.uint8) if form == "uint8" else ((2, 3, 64, 96), np.float32)
        assert (images.shape, images.dtype) == expected
        images[...] = 0
        outputs = runner.run(info.model_inputs(images, [(96, 64)], Thresholds()))
        assert len(outputs["boxes"]) == 2
