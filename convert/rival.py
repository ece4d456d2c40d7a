"""The network in PyTorch on the GPU, as ``darktrt bench`` times it beside engines: FP16, eager or compiled, to detections."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darktrt.convert.cfg import Yolo
from darktrt.convert.model import load_darknet
from darktrt.errors import DarktrtError

SCORE_THRESHOLD, IOU_THRESHOLD = 0.25, 0.45


class TorchRival:
    """uint8 images ``(N, H, W, 3)`` to detections, in the way that a user of PyTorch would make it fast.

    Weights and activations are FP16, channels last; heads are decoded in FP32. NMS is torchvision's, image by image.

    Args:
        compiled: by ``torch.compile``.
        cuda_graph: compiled in the mode that replays CUDA graphs.

    Raises:
        DarktrtError: either file cannot be read, there is no GPU that PyTorch can use, or no torchvision.
    """

    def __init__(
        self, cfg: str | Path, weights: str | Path, size: tuple[int, int], compiled: bool = False, cuda_graph: bool = False
    ) -> None:
        if not torch.cuda.is_available():
            raise DarktrtError("this PyTorch cannot use a GPU; name a Python whose can by --python")
        try:
            from torchvision.ops import batched_nms
        except ImportError as error:
            raise DarktrtError(f"NMS of PyTorch needs torchvision ({error}); name a Python that has it by --python") from error
        torch.backends.cudnn.benchmark = True
        self._nms = batched_nms
        self._size = size
        model = load_darknet(cfg, weights, size).cuda()
        for layer, module in zip(model.network.layers, model.layers, strict=True):
            if isinstance(layer, Yolo):
                module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
            else:
                module.half()
        whole: Any = _Pixels(model)
        self._network = whole.to(memory_format=torch.channels_last)
        if compiled:
            self._network = torch.compile(self._network, mode="reduce-overhead" if cuda_graph else None, dynamic=False)

    def network(self, batch: int, calls: int) -> list[float]:
        """Milliseconds on the GPU of each of so many calls, on images that are there already."""
        images = self._images(batch).cuda()
        event: Any = torch.cuda.Event
        marks = []
        for _ in range(calls):
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            self._detect(images)
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in marks]

    def end_to_end(self, batch: int, calls: int) -> list[float]:
        """Milliseconds by the host's clock of each call, from images in host memory to detections there."""
        pinned = self._images(batch).pin_memory()
        found = []
        for _ in range(calls):
            started = time.perf_counter()
            _ = [rows.cpu() for rows in self._detect(pinned.cuda(non_blocking=True))]
            found.append(1e3 * (time.perf_counter() - started))
        return found

    def _images(self, batch: int) -> Tensor:
        width, height = self._size
        return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def _detect(self, images: Tensor) -> list[Tensor]:
        """A row a detection for every image: x1 y1 x2 y2 in pixels, score, class."""
        with torch.inference_mode():
            return [self._best(*one) for one in zip(*self._network(images), strict=True)]

    def _best(self, boxes: Tensor, scores: Tensor) -> Tensor:
        anchors, classes = (scores > SCORE_THRESHOLD).nonzero(as_tuple=True)
        found, passed = boxes[anchors], scores[anchors, classes]
        kept = self._nms(found, passed, classes, IOU_THRESHOLD)
        return torch.cat([found[kept], passed[kept, None], classes[kept, None].float()], 1)


class _Pixels(nn.Module):
    """A network that takes bytes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        # a copy in channels last is what bytes (N, H, W, 3) are, seen as (N, 3, H, W)
        return self.model(images.permute(0, 3, 1, 2).half() / 255)
