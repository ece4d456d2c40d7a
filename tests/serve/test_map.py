"""``check map --triton``: a model on a server has the AP of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from darktrt.check.detections import load_detections
from darktrt.cli import main
from darktrt.serve.server import Server


def test_a_model_on_a_server_is_judged_as_its_file(
    triton: Server, models: Any, labelled: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["--model", f"file={models.made}", "--triton", f"remote={triton.grpc}/made@fp16"]
    command = ["check", "map", str(labelled / "photos"), *variants]
    assert main(command) == 0
    rows = {line.split()[0]: line.split()[1:-1] for line in capsys.readouterr().out.splitlines()[2:]}
    assert float(rows["file"][1]) > 0.5 and rows["remote"] == ["fp16", *rows["file"][1:]]
    assert main([*command, "--save-detections", "found.json"]) == 0
    remote = load_detections("found.json")[1]
    assert (remote.about["runs in"], remote.about["on"], remote.precision) == ("Triton", triton.grpc, "fp16")


@pytest.mark.parametrize(
    "address", ["localhost:8001", "localhost:8001/", "/made", "grpcs://localhost:8001", "localhost:8001/made@fp8"]
)
def test_a_server_without_a_model_is_no_variant(address: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "map", ".", "--triton", address]) == 2
    assert f"--triton {address}: name SERVER/MODEL" in capsys.readouterr().err
