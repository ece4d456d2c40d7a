"""A network from its image to its raw heads, run on one image at a time: what every pass of a calibration runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.graph import PIXELS, cut_behind_heads
from darktrt.calib.importance import Weights, weights_of
from darktrt.errors import DarktrtError, quote
from darktrt.files import read_bytes
from darktrt.metadata import DetectorInfo
from darktrt.onnx_cost import cost_of, limit_batch, tensor_bytes
from darktrt.onnx_session import OnnxSession
from darktrt.vision.detector import fit
from darktrt.vision.images import MOST_FILE_BYTES, load_image

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Trunk:
    """The network from its image to its raw heads, with ``tensors`` and the raw heads as outputs."""

    path: str
    """Of the model's file, for errors."""
    model: bytes
    info: DetectorInfo
    """For a model that takes images of any size, that of the form ``float``, for it begins at its pixels here."""
    input: str
    tensors: tuple[str, ...]
    least: int
    """The smallest batch that the model takes."""
    bytes_each: int
    """The memory that one run takes."""

    def open(self) -> OpenTrunk:
        """Load it into ONNX Runtime."""
        return OpenTrunk(self)


def trunk_of(path: str | Path, model: onnx.ModelProto, info: DetectorInfo, tensors: Sequence[str]) -> Trunk:
    """The trunk of a network, whose model is cut in place.

    Raises:
        DarktrtError: it has no such tensors, or takes no images.
    """
    own = replace(info, input="float", image_sizes=None) if info.input == "image" else info
    least = limit_batch(model, info, str(path)).batch[0]
    names = dict.fromkeys([*tensors, *(head.tensor for head in info.heads)])
    input_ = {"float": "images", "uint8": "images", "image": PIXELS}[info.input]
    outputs = [name for name in names if not (info.input != "uint8" and name == input_)]
    needed = least * (cost_of(model, info).tensors + 2 * tensor_bytes(model, info, names))  # a copy while it is counted
    cut_behind_heads(model, info, outputs)
    fit(np.zeros((1, 1, 3), np.uint8), own)  # a network that takes no images is refused at once
    return Trunk(str(path), model.SerializeToString(), own, input_, tuple(tensors), least, needed)


class OpenTrunk:
    """A trunk in ONNX Runtime, on the CPU and in the thread that calls it; several threads may call it at once.

    A value must not depend on what runs beside it. With several threads of its own ONNX Runtime splits a tensor among them, and
    Softplus, for one, rounds the ends of a part otherwise than its middle; so does a batch shift the other images. Therefore a
    run has one thread and one image.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self._session = OnnxSession(trunk.model, trunk.path, threads=1)

    def run(self, image: NDArray[Any]) -> tuple[Arrays, Weights]:
        """The values of the tensors for an image, each ``(1, C, H, W)``, and the weights of the image's positions.

        A model with a larger smallest batch gets the image several times.
        """
        trunk = self.trunk
        filled = np.stack([image] * trunk.least)
        values = self._session.run({trunk.input: filled})
        self._check(values)
        cut = {name: value[:1] for name, value in {trunk.input: filled, **values}.items()}
        return {name: cut[name] for name in trunk.tensors}, weights_of(cut, trunk.info.heads)

    def _check(self, values: Arrays) -> None:
        trunk = self.trunk
        channels = {head.tensor: head.channels for head in trunk.info.heads}
        for name, value in values.items():
            maps = value.dtype.kind == "f" and value.ndim == 4 and len(value) == trunk.least and value.size
            if not maps or value.shape[1] != channels.get(name, value.shape[1]):
                raise DarktrtError(
                    f"{trunk.path}: tensor '{quote(name)}' is {value.dtype} {value.shape}, and does not fit the metadata of a "
                    "network that darktrt converts; convert it again"
                )


def read_input(path: Path, info: DetectorInfo) -> tuple[str, NDArray[Any]]:
    """SHA-256 of an image file, and the network's input made of it.

    Raises:
        DarktrtError: it cannot be read, or the network takes no images of its size.
    """
    content = read_bytes(path, MOST_FILE_BYTES)
    return hashlib.sha256(content).hexdigest(), fit(load_image(content, str(path)), info)[0]


def as_text(value: object) -> str:
    """A path, or a sentence with one, with the bytes that are no UTF-8 as escapes."""
    return os.fsencode(str(value)).decode("utf-8", "backslashreplace")
