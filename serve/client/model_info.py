"""What a server says of one of its models: tensors, the largest batch, and the detector metadata in its configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo

_DTYPES = {
    "TYPE_BOOL": "bool",
    "TYPE_UINT8": "uint8",
    "TYPE_INT32": "int32",
    "TYPE_INT64": "int64",
    "TYPE_FP16": "float16",
    "TYPE_FP32": "float32",
    "TYPE_STRING": "object",
}
"""NumPy's names of the types that detectors have; Triton says BYTES for strings, and NumPy has objects for them."""

ENCODED = "image"
"""The input of a model that takes encoded images."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output as the configuration has it; ``dims`` are without the batch where Triton knows of one."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.to_dict()['type']} {list(self.dims)}"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "type": "bytes" if self.dtype == object else str(self.dtype), "dims": list(self.dims)}


@dataclass(frozen=True)
class ModelInfo:
    """One model of a server."""

    name: str
    version: str
    """Empty for whichever the server takes."""
    backend: str
    info: DetectorInfo
    max_batch: int
    """0 where the model has no batch that Triton knows of."""
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]

    @property
    def takes_files(self) -> bool:
        """Whether images go to it as files, and boxes come back in their pixels."""
        return ENCODED in self.inputs

    def shape(self, tensor: TensorInfo, batch: int) -> tuple[int, ...]:
        """Of one of its tensors in a request of ``batch`` images; negative where it depends on the content."""
        if self.max_batch:
            return batch, *tensor.dims
        return (batch if tensor.dims[0] < 0 else tensor.dims[0]), *tensor.dims[1:]

    def size(self, tensor: TensorInfo, batch: int) -> int | None:
        """Bytes of it, or None where they depend on the content."""
        shape = self.shape(tensor, batch)
        return None if tensor.dtype == object or min(shape) < 0 else math.prod(shape) * tensor.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record."""
        tensors = {kind: [one.to_dict() for one in getattr(self, kind).values()] for kind in ("inputs", "outputs")}
        plain = {name: getattr(self, name) for name in ("name", "version", "backend", "max_batch")}
        return {**plain, **tensors, "detector": json.loads(self.info.to_json())}

    def to_text(self) -> str:
        """Text for people."""
        info = self.info
        of_each = f"up to {self.max_batch} images a request" if self.max_batch else "one shape of request"
        lines = [
            f"{self.name}: {info.name}, {info.width}x{info.height}, {len(info.class_names)} classes, {info.resize}; {of_each}; "
            f"backend {self.backend}",
            *(f"  input   {one}" for one in self.inputs.values()),
            *(f"  output  {one}" for one in self.outputs.values()),
            f"  classes {', '.join(info.class_names)}",
        ]
        return "\n".join(lines)

    @staticmethod
    def of(config: Mapping[str, Any], version: str, where: str) -> ModelInfo:
        """From a configuration as :meth:`darktrt.serve.client.transport.Transport.config` gives it.

        Raises:
            DarktrtError: the model was not made by darktrt.
        """
        name = str(config.get("name", ""))
        parameter = config.get("parameters", {}).get(METADATA_KEY)
        if parameter is None:
            raise DarktrtError(f"{where}: model '{name}' has no darktrt metadata; make it with 'darktrt serve repository'")
        info = DetectorInfo.from_json(parameter["string_value"], f"{where}: model '{name}'")
        return ModelInfo(
            name,
            version,
            config.get("backend") or config.get("platform", ""),
            info,
            int(config.get("max_batch_size", 0)),
            _tensors(config.get("input", []), where),
            _tensors(config.get("output", []), where),
        )


def _tensors(entries: list[Mapping[str, Any]], where: str) -> dict[str, TensorInfo]:
    found = {}
    for entry in entries:
        kind, name = str(entry["data_type"]), str(entry["name"])
        if kind not in _DTYPES:
            raise DarktrtError(f"{where}: '{name}' is {kind}, which no detector of darktrt has; is this another model?")
        found[name] = TensorInfo(name, np.dtype(_DTYPES[kind]), tuple(int(size) for size in entry["dims"]))
    return found
