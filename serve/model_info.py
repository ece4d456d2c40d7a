"""What Triton's configuration of a model says: tensors, the largest batch, the detector metadata and defaults of requests.

The backend inside the server, the client and the checks of a repository all read the configuration here. The module needs
nothing but numpy, because it runs on the server's Python.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from darktrt.errors import DarktrtError, quote
from darktrt.metadata import METADATA_KEY, DetectorInfo, Thresholds

InputKind = Literal["tensor", "jpeg"]

ENCODED_INPUT = "image"
"""The input of a model of encoded images."""

SCORE_THRESHOLD_KEY, IOU_THRESHOLD_KEY, CUDA_GRAPH_KEY = "score_threshold", "iou_threshold", "cuda_graph"
"""Parameters of a model of the Python backend, beside the metadata."""

DTYPES = {
    "TYPE_BOOL": "bool",
    "TYPE_UINT8": "uint8",
    "TYPE_INT32": "int32",
    "TYPE_INT64": "int64",
    "TYPE_FP16": "float16",
    "TYPE_FP32": "float32",
    "TYPE_STRING": "object",
}
"""NumPy's names of the types that detectors have; NumPy holds Triton's byte strings as objects."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the configuration; ``dims`` exclude the batch where Triton batches."""

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
    """Empty where the server chooses."""
    backend: str
    info: DetectorInfo
    max_batch: int
    """Triton's ``max_batch_size``; 0 where Triton does not batch."""
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    thresholds: Thresholds = field(default_factory=Thresholds)
    """Of requests without thresholds."""
    cuda_graph: bool = False
    """Of the Python backend."""

    @property
    def encoded(self) -> bool:
        """Whether the model accepts encoded images and outputs boxes in their pixels."""
        return ENCODED_INPUT in self.inputs

    def shape(self, tensor: TensorInfo, batch: int) -> tuple[int, ...]:
        """Of one of its tensors in a request of ``batch`` images; negative where it depends on the content."""
        if self.max_batch:
            return batch, *tensor.dims
        return (batch if tensor.dims[0] < 0 else tensor.dims[0]), *tensor.dims[1:]

    def size(self, tensor: TensorInfo, batch: int) -> int | None:
        """Bytes of a tensor in a request of ``batch`` images, or None where they depend on the content."""
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
        batches = f"up to {self.max_batch} images a request" if self.max_batch else "one shape of request"
        lines = [
            f"{self.name}: {info.name}, {info.width}x{info.height}, {len(info.class_names)} classes, {info.resize}; {batches}; "
            f"backend {self.backend}",
            *(f"  input   {one}" for one in self.inputs.values()),
            *(f"  output  {one}" for one in self.outputs.values()),
            f"  classes {', '.join(info.class_names)}",
        ]
        return "\n".join(lines)

    @staticmethod
    def from_config(config: Mapping[str, Any], where: str, version: str = "") -> ModelInfo:
        """Read a model's configuration.

        Args:
            config: decoded JSON with the field names of ``model_config.proto``.
            where: the file or server of the configuration, for errors.

        Raises:
            DarktrtError: the model was not made by darktrt, or the configuration is damaged.
        """
        name, parameters = str(config.get("name", "")), config.get("parameters")
        texts = _texts(parameters) if isinstance(parameters, Mapping) else {}
        if METADATA_KEY not in texts:
            raise DarktrtError(
                f"{where}: model '{quote(name)}' has no darktrt metadata; make it with 'darktrt serve repository'"
            )
        where = f"{where}: model '{quote(name)}'"
        info = DetectorInfo.from_json(texts[METADATA_KEY], where)
        try:
            model = ModelInfo(
                name,
                version,
                str(config.get("backend") or config.get("platform", "")),
                info,
                integer(config.get("max_batch_size", 0)),
                _tensors(config.get("input", []), where),
                _tensors(config.get("output", []), where),
                _thresholds(texts),
                texts.get(CUDA_GRAPH_KEY) == "true",
            )
            if model.max_batch < 0 or not model.inputs.keys() & {"images", ENCODED_INPUT}:
                raise ValueError(f"max_batch_size is {model.max_batch}, the inputs are {quote(', '.join(model.inputs))}")
            return model
        except ValueError as error:
            raise DarktrtError(f"{where}: its configuration is damaged ({error}); was it made by darktrt?") from error


def _texts(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The parameters that are texts."""
    values = {name: value.get("string_value") for name, value in parameters.items() if isinstance(value, Mapping)}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def _thresholds(parameters: Mapping[str, str]) -> Thresholds:
    keys = {"score": SCORE_THRESHOLD_KEY, "iou": IOU_THRESHOLD_KEY}
    return Thresholds(**{field: float(parameters[key]) for field, key in keys.items() if key in parameters})


def _tensors(entries: Any, where: str) -> dict[str, TensorInfo]:
    if not isinstance(entries, list):
        raise ValueError(f"the tensors are {quote(repr(entries), 40)}")
    tensors = [_tensor(entry, where) for entry in entries]
    return {tensor.name: tensor for tensor in tensors}


def _tensor(entry: Any, where: str) -> TensorInfo:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("dims"), list) or not entry["dims"]:
        raise ValueError(f"a tensor is {quote(repr(entry), 40)}")
    kind, name = str(entry.get("data_type", "")), str(entry.get("name", ""))
    if kind not in DTYPES:
        raise DarktrtError(
            f"{where}: '{quote(name)}' is {quote(kind)}, which no detector of darktrt has; is this another model?"
        )
    return TensorInfo(name, np.dtype(DTYPES[kind]), tuple(integer(size) for size in entry["dims"]))


def integer(value: Any) -> int:
    """A whole number of a server's JSON, which gRPC writes as text.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) and len(value) < 20:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{quote(repr(value), 40)} is no whole number")
    return value
