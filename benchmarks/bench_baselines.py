"""Times of a network without TensorRT: PyTorch eager and torch.compile, and ONNX Runtime's CUDA provider, as a Markdown table.

Needs darktrt, torch and torchvision for CUDA, and onnxruntime-gpu for ``--onnx``; run it from the repository's root:

    python3 benchmarks/bench_baselines.py yolov4.cfg yolov4.weights --size 608 --onnx portable.onnx --batch 1 8

In PyTorch weights and activations are FP16, channels last; heads are decoded in FP32, and NMS is torchvision's, image by image.
All baselines take turns, so that clocks and neighbours are the same for them. ``darktrt bench`` times engines in the same way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from darktrt.convert.cfg import Yolo
from darktrt.convert.model import load_darknet
from darktrt.convert.shapes import parse_size
from darktrt.engine.bench import Spread, random_inputs
from darktrt.engine.runtime import OnnxRunner
from darktrt.metadata import Thresholds

CALLS = 20
"""In one turn of one baseline."""
THRESHOLDS = Thresholds()

Work = Callable[[], object]


class Pixels(nn.Module):
    """A network for bytes ``(N, H, W, 3)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        # bytes (N, H, W, 3), seen as (N, 3, H, W), are channels last already
        return self.model(images.permute(0, 3, 1, 2).half() / 255)


def half_network(cfg: str, weights: str, size: tuple[int, int]) -> nn.Module:
    """The network in FP16 on the GPU, its heads' decoding in FP32."""
    model = load_darknet(cfg, weights, size).cuda()
    for layer, module in zip(model.network.layers, model.layers, strict=True):
        if isinstance(layer, Yolo):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        else:
            module.half()
    pixels: Any = Pixels(model)
    return pixels.to(memory_format=torch.channels_last)


def best(boxes: Tensor, scores: Tensor) -> Tensor:
    """A row a detection of one image: x1 y1 x2 y2 in pixels, score, class."""
    anchors, classes = (scores > THRESHOLDS.score).nonzero(as_tuple=True)
    boxes, scores = boxes[anchors], scores[anchors, classes]
    kept = batched_nms(boxes, scores, classes, THRESHOLDS.iou)
    return torch.cat([boxes[kept], scores[kept, None], classes[kept, None].float()], 1)


def detect(network: Any, images: Tensor) -> list[Tensor]:
    """Images in pinned memory to detections in host memory."""
    with torch.inference_mode():
        outputs = network(images.cuda(non_blocking=True))
        return [best(*of_image).cpu() for of_image in zip(*outputs, strict=True)]


def torch_works(cfg: str, weights: str, size: tuple[int, int], batch: int) -> dict[str, Work]:
    """PyTorch eager, compiled, and compiled in the mode that replays CUDA graphs."""
    torch.backends.cudnn.benchmark = True
    network = half_network(cfg, weights, size)
    networks: dict[str, Any] = {"PyTorch eager FP16": network}
    networks["torch.compile FP16"] = torch.compile(network, dynamic=False)
    networks["torch.compile FP16, CUDA graph"] = torch.compile(network, mode="reduce-overhead", dynamic=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, size[1], size[0], 3), dtype=torch.uint8, generator=generator).pin_memory()
    return {name: lambda module=module: detect(module, images) for name, module in networks.items()}


def times_ms(works: dict[str, Work], turns: int) -> dict[str, list[float]]:
    """Milliseconds of every call, end to end, after a warm-up turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            for _ in range(CALLS):
                started = time.perf_counter()
                work()
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a network in PyTorch and ONNX Runtime.")
    parser.add_argument("cfg")
    parser.add_argument("weights")
    parser.add_argument("--size", default="416", help="network input, 416 or WIDTHxHEIGHT")
    parser.add_argument("--onnx", help="what 'darktrt surgery' wrote")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=20, help=f"of {CALLS} calls of each baseline")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}\n")
    print("| baseline | batch | end to end, ms (median) | p90 | p99 | images/s |\n|---|---|---|---|---|---|")
    for batch in args.batch:
        works = torch_works(args.cfg, args.weights, parse_size(args.size), batch)
        if args.onnx:
            runner = OnnxRunner(args.onnx, gpu=0)
            inputs = random_inputs(runner.info, batch)
            works["ONNX Runtime CUDA"] = lambda runner=runner, inputs=inputs: runner.run(inputs)
        for name, times in times_ms(works, args.turns).items():
            spread = Spread.of(times)
            numbers = f"{spread.median:.3f} | {spread.p90:.3f} | {spread.p99:.3f} | {1e3 * batch / spread.median:.0f}"
            print(f"| {name} | {batch} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
