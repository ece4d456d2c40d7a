"""Models made here, and a real tritonserver for them."""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Made, conv, head, net
from numpy.typing import NDArray
from PIL import Image

from darktrt.errors import DarktrtError
from darktrt.serve.install import installed_program
from darktrt.serve.program import Program, program_on_path
from darktrt.serve.server import Server, StartOptions, running_on_free_ports
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

LETTERBOX_CFG = (
    net(96, 64, letter_box=1)
    + conv(8, stride=2)
    + conv(16, stride=2)
    + conv(16, stride=2)
    + head(nms_kind="diounms", beta_nms=0.6)
)
"""Boxes depend on the image's shape twice: by its place in the input, and by the distance term of NMS."""


@dataclass(frozen=True)
class Models:
    """Model files, and the repository that serves them."""

    repository: Path
    plain: Path
    """What ``made`` was made of."""
    made: Path
    """The models ``made``, for tensors, and ``files``, for image files; uint8, batch 1..3, not square."""
    letterbox: Path
    """The model of that name; float input, static batch 2."""


def portable_model(made: Made, **options: object) -> Path:
    """With few candidates, because NMS of the 1,000 of the default takes ten times as long as these networks."""
    target = made.plain.with_name(f"{made.plain.stem}-portable.onnx")
    insert_plugins(made.plain, target, SurgeryOptions(max_candidates=300, **options))  # type: ignore[arg-type]
    return target


@contextmanager
def server_of(repository: Path, options: StartOptions | None = None) -> Iterator[Server]:
    """A server on free ports; by default its clients may register shared memory."""
    with running_on_free_ports(repository, options or StartOptions(shared_memory=True), a_program()) as server:
        yield server


def a_program() -> Program:
    """The server that is tested; the test is skipped where there is none to be had, but not in CI."""
    try:
        return program_on_path() or installed_program()
    except DarktrtError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs a tritonserver: {error}")


def ask(server: Server, model: str, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """All outputs, over gRPC."""
    grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient: pip install 'darktrt[serve]'")
    tensors = []
    for name, array in inputs.items():
        tensors.append(grpc.InferInput(name, list(array.shape), {"u": "UINT8", "f": "FP32", "O": "BYTES"}[array.dtype.kind]))
        tensors[-1].set_data_from_numpy(array)
    with grpc.InferenceServerClient(server.grpc) as client:
        answer = client.infer(model, tensors, client_timeout=60)
        return {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and body of a request over HTTP."""
    request = urllib.request.Request(
        f"http://{server.http}/v2/{path}", body, {name.replace("_", "-"): v for name, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def encoded(image: NDArray[np.uint8], form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()
