"""Makes ``helpers`` importable from every test folder, and the networks that many tests share."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

# Before NumPy and torch are imported, and for the commands that tests start. The networks are small; threads that wait for each
# other in a loop, beside the other processes of pytest, take four times as long.
os.environ["OMP_NUM_THREADS"] = "1"
# Otherwise each of those commands, and each worker of a cluster, compiles all of darktrt anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
from helpers import MADE_CFG, Made, labelled_images, make, report_on_everything

from darktrt.progress import LOGGER, set_progress
from darktrt.vision import detector
from darktrt.vision.images import compiled_fit


def pytest_configure() -> None:
    """Keep the tests as pytest has rewritten them, too."""
    sys.dont_write_bytecode = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Libraries and tests stay to the end, so no garbage collection looks at them: there are 700,000 objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file goes to one process, and ``serve`` whole: its files ask one server, and wait more than they compute."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:  # xdist prescribes the name
            return "tests/serve" if nodeid.startswith("tests/serve/") else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heeded() -> None:
    """A shell that starts the tests in the background lets them ignore it, and so would the commands that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _messages_go_nowhere() -> None:
    """As in a new program that sets nothing, whatever command another test or fixture ran in this process."""
    LOGGER.handlers.clear()
    set_progress(None)
    detector._warned_at_limit.clear()


@pytest.fixture(scope="session", autouse=True)
def _compiled_resize() -> None:
    """Loaded before a test puts another library in place of every one."""
    compiled_fit()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The made network as files: cfg, weights, and plain ONNX of batch 1..3."""
    return make(tmp_path_factory.mktemp("made"), MADE_CFG, batch=(1, 3, 3))


@pytest.fixture(scope="session")
def labelled(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net.onnx``, the made network for NMS; ``photos``, five images with darknet's label files that are what it finds; and
    ``my.calib``, calibrated on ``others``."""
    return labelled_images(made, tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="session")
def report(labelled: Path, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report with every part that it can have: PyTorch, ONNX, simulated FP16 and INT8, and an engine from
    elsewhere with its latency."""
    return report_on_everything(made, labelled, tmp_path_factory.mktemp("report"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
