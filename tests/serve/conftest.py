"""A real tritonserver with models made here, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import MADE_CFG, Made, conv, head, make, net

from darktrt import DarktrtError
from onnx_file import load_model
from serve.config import ConfigOptions
from serve.repository import write_repository
from serve.server import Server, installed_program, program_on_path
from serve.sweep import own_server
from surgery.rewrite import SurgeryOptions, operate_file

LETTERBOX_CFG = (
    net(96, 64, letter_box=1)
    + conv(8, stride=2)
    + conv(16, stride=2)
    + conv(16, stride=2)
    + head(nms_kind="diounms", beta_nms=0.6)
)
"""Boxes depend on the picture's shape twice: by its place in the input, and by the distance term of NMS."""


@dataclass(frozen=True)
class Models:
    """Model files, and the repository that serves them."""

    repository: Path
    made: Path
    """Served as ``made`` for tensors and as ``files`` for picture files; uint8, batch 1..3, not square."""
    letterbox: Path
    """Served under that name; float input, static batch 2."""


def operated(made: Made, **options: object) -> Path:
    target = made.plain.with_name(f"{made.plain.stem}-portable.onnx")
    operate_file(made.plain, target, SurgeryOptions(**options))  # type: ignore[arg-type]
    return target


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("served")
    made = operated(make(folder, MADE_CFG, batch=(1, 3, 3)))
    letterbox = operated(make(folder, LETTERBOX_CFG, batch=(2, 2, 2), name="letterbox"), input="float")
    repository = folder / "repository"
    write_repository(made, repository, ConfigOptions(warmup=False), "made")
    write_repository(made, repository, ConfigOptions(input="jpeg", warmup=False), "files")
    write_repository(letterbox, repository, ConfigOptions(warmup=False), "letterbox")
    assert load_model(letterbox)[1].takes_image_size
    return Models(repository, made, letterbox)


@contextmanager
def server_of(repository: Path) -> Iterator[Server]:
    """A server on free ports; the test is skipped where there is none to be had."""
    try:
        program = program_on_path() or installed_program()
    except DarktrtError as error:
        pytest.skip(f"needs a tritonserver: {error}")
    with own_server(repository, program=program) as server:
        yield server


@pytest.fixture(scope="session")
def triton(models: Models) -> Iterator[Server]:
    with server_of(models.repository) as server:
        yield server
