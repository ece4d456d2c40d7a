"""The network in PyTorch with the interface of its ONNX file: the reference that later stages are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from darktrt.convert.export import class_names, detector_info, tensor_makers
from darktrt.convert.model import load_darknet
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import DetectorInfo


class TorchReference:
    """A darknet network in PyTorch with the inputs and outputs of its ``plain.onnx``; ``info`` is that file's metadata.

    Args:
        cfg: the darknet cfg.
        weights: the darknet weights.
        size: (width, height) of the network input; the cfg's own by default.
        layers: also output the tensor of every cfg section.
        device: ``cpu`` or ``cuda``; TF32, which rounds to 11 bits, stays off.
        names: a file of class names, one on each line.
        models: the models that it is compared with; without ``names`` the first that has as many classes has its names. The
            default names are those of :func:`darktrt.convert.export.class_names`.

    Raises:
        DarktrtError: a file cannot be read, they do not belong together, or PyTorch cannot use the device.
    """

    def __init__(
        self,
        cfg: str | Path,
        weights: str | Path,
        size: tuple[int, int] | None = None,
        layers: bool = False,
        device: str = "cpu",
        names: str | Path | None = None,
        models: Sequence[DetectorInfo] = (),
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise DarktrtError("this PyTorch cannot use a GPU; run on the CPU, or install a PyTorch with CUDA", "device")
        self._model = load_darknet(cfg, weights, size).to(device)
        self._device = device
        network = self._model.network
        sources = {"cfg": sha256_of(cfg), "weights": sha256_of(weights)}
        own = class_names(network, names)
        known = [] if names else [model.class_names for model in models if len(model.class_names) == len(own)]
        self.info = detector_info(network, (1, 1, 1), (*known, own)[0], sources)
        heads = {head.tensor for head in self.info.heads}
        self._tensors = {index: name for name, index in tensor_makers(network).items() if layers or name in heads}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``boxes (N, A, 4)``, ``scores (N, A, C)``, the raw heads and layers by their tensors' names; all float32.

        Args:
            inputs: ``images (N, C, H, W)`` float32, RGB 0..1.
        """
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            images = torch.from_numpy(inputs["images"]).to(self._device)
            outputs = self._model.run(images, keep={*self._tensors, *self._model.heads})
            boxes, scores = self._model.join(outputs)
        inner = {name: outputs[index] for index, name in self._tensors.items()}
        return {name: tensor.cpu().numpy() for name, tensor in {**inner, "boxes": boxes, "scores": scores}.items()}
