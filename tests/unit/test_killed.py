"""A command that is killed at any of its file operations leaves no half file, and its next run removes the unfinished ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, Made, made_image
from PIL import Image

from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins


@pytest.mark.parametrize(
    ("command", "step", "least"),
    [
        ("surgery plain.onnx -o out.onnx", 1, 4),
        ("detect in --model portable.onnx -o found", 3, 4),
        ("serve repository portable.onnx -o models", 2, 5),
        ("check map in --model portable.onnx --save-detections out.json", 2, 3),
        ("calib run portable.onnx in -o out.calib --bias-images 1 --fp-layer-images 1", 3, 3),
    ],
)
def test_killed_runs_leave_nothing(command: str, step: int, least: int, made: Made, folder: Path) -> None:
    insert_plugins(made.plain, "portable.onnx", SurgeryOptions())
    Path("plain.onnx").write_bytes(made.plain.read_bytes())
    Path("in").mkdir()
    for i in range(3):
        Image.fromarray(made_image(60, 60, seed=i)).save(f"in/{i}.png")
        Path(f"in/{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # that the first run alone would write
    words = [sys.executable, str(ROOT / "tests" / "killed.py"), "1", str(step), *command.split()]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] >= least
    assert report["half-written"] == []
    assert report["left for ever"] == []
    assert report["left by the killed run"], "no kill met an unfinished file: the test tests nothing"
