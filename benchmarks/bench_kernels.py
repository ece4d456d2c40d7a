"""Times of the CUDA kernels on the GPU at hand, beside a device copy and beside torchvision, as Markdown tables and JSON.

Needs numpy, torch for CUDA, torchvision, and the kernels built before:

    make -C plugins/csrc kernels OUT=build/kernels
    PYTHONPATH=tests:tests/cuda python3 benchmarks/bench_kernels.py build/kernels kernels.json

What is compared runs in turns, so that clocks and neighbours are the same for both; every figure is a median.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device import CudaLibrary
from kernels import TYPES, YOLOV4_608, CImage, Fit, Format, Nms, Shape, scene
from torchvision.ops import batched_nms

Work = Callable[[], object]
BATCH = 8
BYTES = 512 << 20
"""Of x at the large sizes: ten times the L2 cache of an H200."""
LAYERS = ((32, 608), (64, 304), (128, 152), (256, 76), (512, 38), (1024, 19))
"""Channels and side of yolov4's layers at 608."""
SCALES = (0.05, 0.07, 0.04)
NAMES = {np.float32: "FP32", np.float16: "FP16", np.int8: "INT8"}
PHOTOS = ((640, 480), (1920, 1080), (3840, 2160))
"""Width, height."""
KINDS = ("mish", "mish_add", "mish_concat")
PAIRS = ((np.float32, np.float32), (np.float16, np.float16), (np.int8, np.int8), (np.float16, np.int8))


def times_us(works: list[Work], rounds: int, launches: int, stream: torch.cuda.Stream) -> list[float]:
    """The median time of one run of each, all run in turns as CUDA graphs of ``launches`` runs."""
    graphs = []
    for work in works:
        work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(launches):
                work()
        graphs.append(graph)
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in works] for _ in range(rounds)]
    with torch.cuda.stream(stream):
        for pairs in events:
            for graph, (begin, end) in zip(graphs, pairs, strict=True):
                begin.record()
                graph.replay()
                end.record()
    stream.synchronize()
    return [
        statistics.median(pairs[i][0].elapsed_time(pairs[i][1]) for pairs in events) * 1000 / launches
        for i in range(len(works))
    ]


def elementwise(library: CudaLibrary, kind: str, types: tuple[Any, Any], count: int, rows: int) -> tuple[Work, Work, int]:
    """A kernel on ``count`` elements of x in ``rows`` rows, a copy that moves as many bytes, and those bytes."""
    formats = [
        Format(TYPES.index(dtype), 1, 0, scale) for dtype, scale in zip((types[0], types[0], types[1]), SCALES, strict=True)
    ]
    sizes = [np.dtype(dtype).itemsize for dtype in types]
    dtype = getattr(torch, np.dtype(types[0]).name)
    if dtype == torch.int8:
        inputs = [torch.randint(-128, 128, (count,), dtype=dtype, device="cuda") for _ in range(2)]
    else:
        inputs = [torch.randn(count, dtype=dtype, device="cuda") for _ in range(2)]
    joined = 1 if kind == "mish" else 2
    written = count * (2 if kind == "mish_concat" else 1)
    y = torch.empty(written * sizes[1], dtype=torch.uint8, device="cuda")
    moved = joined * count * sizes[0] + y.numel()
    source, target = (torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    shape = Shape(rows, 32, count // rows // 32)
    address = library.address
    arguments: list[Any] = [shape, address(inputs[0]), formats[0]]
    if kind != "mish":
        arguments += [address(inputs[1]), formats[1]]
    if kind == "mish_concat":
        arguments.append(32)
    arguments += [address(y), formats[2]]
    torch.cuda.synchronize()

    def kernel() -> object:
        library.checked(kind, *arguments)
        return inputs, y  # which live as long as this function

    def copy() -> object:
        with torch.cuda.stream(library.stream):
            return target.copy_(source)

    return kernel, copy, moved


def bandwidths(library: CudaLibrary) -> Iterator[dict[str, Any]]:
    """At sizes past the L2 cache, then at those of layers."""
    large = [
        measured(library, kind, types, BYTES // np.dtype(types[0]).itemsize, "", 30, 1) for kind in KINDS for types in PAIRS
    ]
    yield from beside_the_best_copy(large)
    for kind in KINDS:
        for types in PAIRS[1:3]:
            for channels, side in LAYERS:
                name = f"{BATCH} x {channels} x {side} x {side}"
                yield measured(library, kind, types, BATCH * channels * side * side, name, 20, 10)


def beside_the_best_copy(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With shares of the fastest copy among the rows: copies between some addresses take half as long again as others."""
    best = max(row["copy_gb_per_s"] for row in rows)
    return [{**row, "copy_gb_per_s": best, "share": row["gb_per_s"] / best} for row in rows]


def measured(
    library: CudaLibrary, kind: str, types: tuple[Any, Any], count: int, layer: str, rounds: int, launches: int
) -> dict[str, Any]:
    kernel, copy, moved = elementwise(library, kind, types, count, BATCH)
    times = times_us([kernel, copy], rounds, launches, library.stream)
    rates = [moved / spent / 1000 for spent in times]
    types_name = " to ".join(dict.fromkeys(NAMES[dtype] for dtype in types))
    return {
        "kernel": kind,
        "types": types_name,
        "layer": layer,
        "bytes": moved,
        "us": times[0],
        "gb_per_s": rates[0],
        "copy_gb_per_s": rates[1],
        "share": rates[0] / rates[1],
    }


# --- detection ---


def torch_decode(heads: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    boxes, scores = [], []
    for head, raw in zip(YOLOV4_608.heads, heads, strict=True):
        rows, columns, scale = head.rows, head.columns, head.scale_x_y
        value = raw.view(raw.shape[0], len(head.anchors), -1, rows, columns).float()
        y, x = torch.meshgrid(torch.arange(rows, device="cuda"), torch.arange(columns, device="cuda"), indexing="ij")
        centre = (value[:, :, :2].sigmoid() * scale - (scale - 1) / 2 + torch.stack([x, y])) * (YOLOV4_608.width / columns)
        reach = value[:, :, 2:4].exp() * torch.tensor(head.anchors, device="cuda").view(1, -1, 2, 1, 1) / 2
        boxes.append(torch.cat([centre - reach, centre + reach], 2).permute(0, 1, 3, 4, 2).flatten(1, 3))
        probability = value[:, :, 5:].sigmoid() * value[:, :, 4:5].sigmoid()
        scores.append(probability.permute(0, 1, 3, 4, 2).flatten(1, 3))
    return torch.cat(boxes, 1), torch.cat(scores, 1)


def torch_detect(heads: list[torch.Tensor], nms: Nms, score_threshold: float, iou_threshold: float) -> list[torch.Tensor]:
    """With torchvision's batched NMS for each image."""
    found = []
    for boxes, scores in zip(*torch_decode(heads), strict=True):
        anchor, kind = (scores > score_threshold).nonzero(as_tuple=True)
        score = scores[anchor, kind]
        if score.numel() > nms.max_candidates:
            score, best = score.topk(nms.max_candidates)
            anchor, kind = anchor[best], kind[best]
        kept = batched_nms(boxes[anchor], score, kind, iou_threshold)[: nms.max_detections]
        found.append(torch.cat([boxes[anchor[kept]], score[kept, None], kind[kept, None]], 1))
    return found


def eager_us(works: list[Work], rounds: int) -> list[float]:
    """The median wall time of one run of each till the GPU is done, run in turns."""
    spent: list[list[float]] = [[] for _ in works]
    for i in range(rounds + 2):
        for work, own in zip(works, spent, strict=True):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            torch.cuda.synchronize()
            if i >= 2:
                own.append((time.perf_counter() - begin) * 1e6)
    return [statistics.median(own) for own in spent]


def detections(library: CudaLibrary) -> Iterator[dict[str, Any]]:
    nms, iou_threshold = Nms("plain"), 0.45
    yolo_struct, nms_struct = YOLOV4_608.struct(BATCH), nms.struct()
    for dtype in (np.float32, np.float16):
        arrays = scene(YOLOV4_608, BATCH, 0, dtype=dtype)
        heads = [torch.from_numpy(array).cuda() for array in arrays]
        for score_threshold in (0.25, 0.001):
            numbers = [torch.tensor([value], device="cuda") for value in (score_threshold, iou_threshold)]
            k = nms.max_detections
            outputs = [torch.zeros(BATCH * size, dtype=torch.int32, device="cuda") for size in (1, 4 * k, k, k)]
            (work,) = library.workspace(yolo_struct, nms_struct)
            arguments = [
                ctypes.byref(yolo_struct),
                ctypes.byref(nms_struct),
                TYPES.index(dtype),
                library.addresses(heads),
                *(library.address(memory) for memory in (*numbers, None, *outputs)),
                work,
            ]

            def ours(arguments: list[Any] = arguments) -> None:
                library.checked("detect", *arguments)

            def theirs(heads: list[torch.Tensor] = heads, score_threshold: float = score_threshold) -> object:
                return torch_detect(heads, nms, score_threshold, iou_threshold)

            torch.cuda.synchronize()
            (graph,) = times_us([ours], 50, 10, library.stream)
            mine, other = eager_us([ours, theirs], 15)
            scores = torch_decode(heads)[1]
            yield {
                "heads": NAMES[dtype],
                "score_threshold": score_threshold,
                "candidates": int((scores > score_threshold).sum()) // BATCH,
                "detections": [outputs[0].tolist(), [len(found) for found in torch_detect(heads, nms, score_threshold, 0.45)]],
                "graph_us": graph,
                "eager_us": mine,
                "torchvision_us": other,
                "times_faster": other / mine,
            }


# --- images ---


def fits(library: CudaLibrary) -> Iterator[dict[str, Any]]:
    """Images of bytes fitted into 608 x 608: the kernel, a copy that moves as many bytes, and torch's interpolation."""
    fit, stream = Fit(608, 608), library.stream
    for (width, height), batch, dtype in itertools.product(PHOTOS, (1, BATCH), (np.float32, np.float16)):
        images = [torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, device="cuda") for _ in range(batch)]
        listed = (CImage * batch)(*((image.data_ptr(), width, height) for image in images))
        y = torch.empty((batch, 3, 608, 608), dtype=getattr(torch, np.dtype(dtype).name), device="cuda")
        moved = images[0].numel() * batch + y.numel() * y.element_size()
        source, target = (torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
        arguments = [fit.struct(), batch, listed, TYPES.index(np.uint8), library.address(y), TYPES.index(dtype)]

        def ours(arguments: list[Any] = arguments) -> None:
            library.checked("fit", *arguments)

        def copy(source: torch.Tensor = source, target: torch.Tensor = target) -> object:
            with torch.cuda.stream(stream):
                return target.copy_(source)

        def theirs(images: list[torch.Tensor] = images, y: torch.Tensor = y) -> None:
            with torch.cuda.stream(stream):
                for image, to in zip(images, y, strict=True):
                    floats = image.permute(2, 0, 1)[None].float() / 255
                    to.copy_(torch.nn.functional.interpolate(floats, (608, 608), mode="bilinear", align_corners=True)[0])

        torch.cuda.synchronize()
        times = times_us([ours, copy, theirs], 30, 10, stream)
        names = {"images": f"{batch} x {width}x{height}", "types": f"UINT8 to {NAMES[dtype]}", "bytes": moved}
        yield {**names, "us": times[0], "copy_us": times[1], "torch_us": times[2], "gb_per_s": moved / times[0] / 1000}


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown; ``columns`` gives the heading and how to print a value by name."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(form.format(**row) for form in columns.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main(folder: Path, to: Path) -> None:
    library = CudaLibrary(folder / "libdarktrt_kernels.so")
    speeds, found, fitted = list(bandwidths(library)), list(detections(library)), list(fits(library))
    print(torch.cuda.get_device_name(), "\n")
    kernel = {"kernel": "`{kernel}`", "types": "{types}"}
    rates = {"µs": "{us:.1f}", "GB/s": "{gb_per_s:.0f}", "copy GB/s": "{copy_gb_per_s:.0f}", "share": "{share:.1%}"}
    large, layers = [row for row in speeds if not row["layer"]], [row for row in speeds if row["layer"]]
    print(table(large, {**kernel, "bytes moved": "{bytes:,}", **rates}), "\n")
    print(table(layers, {**kernel, "x": "{layer}", **rates}), "\n")
    columns = {
        "heads": "{heads}",
        "score threshold": "{score_threshold}",
        "candidates an image": "{candidates}",
        "µs in a CUDA graph": "{graph_us:.1f}",
        "µs eager": "{eager_us:.0f}",
        "µs torchvision": "{torchvision_us:.0f}",
        "times faster (eager)": "{times_faster:.1f}",
    }
    print(table(found, columns), "\n")
    times = {"µs": "{us:.1f}", "GB/s": "{gb_per_s:.0f}", "µs copy": "{copy_us:.1f}", "µs torch": "{torch_us:.1f}"}
    print(table(fitted, {"images": "{images}", "types": "{types}", "bytes moved": "{bytes:,}", **times}))
    rows = {"elementwise": speeds, "detection": found, "images": fitted}
    to.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
