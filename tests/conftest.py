"""Makes ``helpers`` importable from every test folder, and the networks that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import MADE_CFG, Made, make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The made network as files: cfg, weights, and plain ONNX of batch 1..3."""
    return make(tmp_path_factory.mktemp("made"), MADE_CFG, batch=(1, 3, 3))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
