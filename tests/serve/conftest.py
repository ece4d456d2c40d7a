"""A real tritonserver with models made here, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import MADE_CFG, make
from triton_models import LETTERBOX_CFG, Models, portable_model, server_of

from darktrt.onnx_file import load_model
from darktrt.serve.config import PythonBackend
from darktrt.serve.repository import publish
from darktrt.serve.server import Server


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    plain = make(folder, MADE_CFG, batch=(1, 3, 3))
    made = portable_model(plain)
    letterbox = portable_model(make(folder, LETTERBOX_CFG, batch=(2, 2, 2), name="letterbox"), input="float")
    repository = folder / "repository"
    publish(made, repository, PythonBackend(warmup=False), "made")
    publish(made, repository, PythonBackend(input="jpeg", warmup=False), "files")
    publish(letterbox, repository, PythonBackend(warmup=False), "letterbox")
    assert load_model(letterbox)[1].takes_image_size
    return Models(repository, plain.plain, made, letterbox)


@pytest.fixture(scope="session")
def triton(models: Models) -> Iterator[Server]:
    with server_of(models.repository) as server:
        yield server


@pytest.fixture(scope="session")
def alone(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the model ``made`` alone, for servers that are started often."""
    return publish(models.made, tmp_path_factory.mktemp("alone") / "models", PythonBackend(warmup=False), "made").parent
