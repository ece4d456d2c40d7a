"""NVIDIA's perf_analyzer as the side that asks, where it is installed: it takes less of the processor than Python does."""

from __future__ import annotations

import base64
import csv
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.serve.client.model_info import ModelInfo
from darktrt.serve.load.worker import Ask, Asked, Latency, Task
from darktrt.vision.detector import Arrays

NAME = "perf_analyzer"
_WINDOWS = 3
"""Measurements of a level, of which perf_analyzer tells the mean."""
_AGREEMENT = 1000
"""Percent by which they may differ; it tells nothing at all where they differ more."""
_OUTPUT_BYTES = 1 << 20
"""Shared memory of an output where the model does not tell its size."""


def find() -> str | None:
    """The program, if it is installed and starts here; the pip package has one for glibc 2.38 and later alone."""
    path = shutil.which(NAME)
    if path is None or subprocess.run([path, "--version"], capture_output=True, check=False).returncode:
        return None
    return path


@contextmanager
def asking(program: str, task: Task, seconds: float) -> Iterator[Ask]:
    """A function that lets the program make load; each call takes about ``seconds``.

    Raises:
        DarktrtError: of the function, the program fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        data.write_text(json.dumps({"data": [_rows(task.model, request, task.batch) for request in task.requests]}))
        command = [
            program,
            *_arguments(task),
            "--input-data",
            str(data),
            "--measurement-interval",
            f"{1e3 * seconds / _WINDOWS:.0f}",
        ]

        def ask(concurrency: int) -> Asked:
            table = Path(folder) / f"{concurrency}.csv"
            done = subprocess.run(
                [*command, "--concurrency-range", str(concurrency), "-f", str(table)],
                capture_output=True,
                text=True,
                check=False,
            )
            if not table.is_file():
                said = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line or "ailed" in line]
                raise DarktrtError(f"{NAME} fails: {said[-1].strip() if said else f'exit status {done.returncode}'}")
            return _asked(table, task)

        yield ask


def _arguments(task: Task) -> list[str]:
    model, endpoint = task.model, task.endpoint
    arguments = ["-m", model.name, "-u", endpoint.address, "-i", endpoint.protocol, "--percentile", "95", "--async"]
    arguments += ["--max-trials", str(_WINDOWS), "--stability-percentage", str(_AGREEMENT)]
    if model.version:
        arguments += ["-x", model.version]
    if model.max_batch:
        arguments += ["-b", str(task.batch)]
    else:
        shapes = {name: array.shape for name, array in task.requests[0].items() if name in model.inputs}
        arguments += [f"--shape={name}:{','.join(map(str, shape))}" for name, shape in shapes.items()]
    if task.shared_memory != "none":
        largest = max((model.size(one, task.batch) or _OUTPUT_BYTES) for one in model.outputs.values())
        arguments += ["--shared-memory", task.shared_memory, "--output-shared-memory-size", str(largest)]
    if endpoint.tls:
        arguments += _tls(task)
    return arguments


def _tls(task: Task) -> list[str]:
    endpoint = task.endpoint
    if endpoint.protocol == "grpc":
        names = ("--ssl-grpc-root-certifications-file", "--ssl-grpc-certificate-chain-file", "--ssl-grpc-private-key-file")
        arguments = ["--ssl-grpc-use-ssl"]
    else:
        names = ("--ssl-https-ca-certificates-file", "--ssl-https-client-certificate-file", "--ssl-https-private-key-file")
        arguments = []
    files = zip(names, (endpoint.root_certificates, endpoint.certificate, endpoint.key), strict=True)
    return arguments + [f"{name}={file}" for name, file in files if file]


def _rows(model: ModelInfo, request: Arrays, batch: int) -> dict[str, Any]:
    """One image's inputs in perf_analyzer's JSON; it puts batches together itself where Triton knows of batches."""
    one = {name: array[0] if model.max_batch and array.ndim > 1 else array for name, array in request.items()}
    return {name: {"b64": base64.b64encode(_wire(array)).decode()} for name, array in one.items()}


def _wire(array: NDArray[Any]) -> bytes:
    """As Triton takes it: texts behind their length."""
    if array.dtype != object:
        return np.ascontiguousarray(array).tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in array.ravel())


def _asked(table: Path, task: Task) -> Asked:
    with table.open(newline="") as file:
        row = next(csv.DictReader(file))
    latency = Latency(*(round(float(row[f"{name} latency"]) / 1e3, 3) for name in ("p50", "p90", "p95", "p99")))
    rate = float(row["Inferences/Second"]) * (1 if task.model.max_batch else task.batch)
    return Asked(round(rate, 2), latency)
