"""The contents of an ONNX file or an engine, as text for people."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import onnx

from darktrt.engine.layer_list import summary
from darktrt.engine.manifest import Manifest, manifest_path, read_plan_manifest
from darktrt.metadata import DetectorInfo, ImageSizes, head_traits
from darktrt.onnx_file import is_inlined, load_model
from darktrt.plugins.ops import DOMAIN


def describe_onnx(path: str | Path) -> str:
    """Describe inputs and outputs, operators, custom nodes and the metadata of the network.

    Raises:
        DarktrtError: the file is no ONNX of darktrt.
    """
    model, info = load_model(path)
    graph = model.graph
    operators = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.node)
    custom = Counter(node.op_type for node in graph.node if node.domain == DOMAIN)
    opsets = ", ".join(f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in model.opset_import)
    weights = sum(_size(tensor) for tensor in graph.initializer)
    bodies = ", ".join(function.name for function in model.functions)
    lines = [
        f"ONNX          {path} (opset {opsets}; {Path(path).stat().st_size / 2**20:.1f} MiB)",
        *(f"input         {_tensor(value)}" for value in graph.input),
        *(f"output        {_tensor(value)}" for value in graph.output),
        f"nodes         {len(graph.node)}: {', '.join(f'{count} {name}' for name, count in operators.most_common())}",
        f"plugin nodes  {', '.join(f'{count} {name}' for name, count in custom.items()) or 'none'}"
        + (", inlined in the file" if is_inlined(path) else ""),
        f"bodies        {bodies or 'none'}",
        f"constants     {weights:,} numbers",
        f"INT8          {info.int8_convolutions or 'no'} convolutions",
        *_info_lines(info),
    ]
    return "\n".join(lines)


def describe_plan(path: str | Path) -> str:
    """Describe a plan by the manifest beside it.

    Raises:
        DarktrtError: the manifest is missing, damaged or of another plan.
    """
    manifest = read_plan_manifest(path)
    size = Path(path).stat().st_size / 2**20
    return f"engine        {path} ({size:.1f} MiB)\n{describe_manifest(manifest_path(path), manifest)}"


def describe_manifest(path: str | Path, manifest: Manifest) -> str:
    """Describe a manifest."""
    lines = [
        f"manifest      {path}",
        f"built by      {manifest.target}, {manifest.precision.upper()}, in {manifest.build_seconds:g} s, "
        + (f"on {manifest.gpu}" if manifest.gpu else "without a GPU"),
        f"plugins       {', '.join(manifest.plugins) or 'none needed'}",
        *(f"from library  {name} {value}" for name, value in sorted(manifest.plugin_library.items())),
        f"plan          sha256 {manifest.plan_sha256}",
        f"from ONNX     sha256 {manifest.onnx_sha256}",
        f"INT8          {_int8(manifest)}",
        *([f"few in INT8   {manifest.int8_warning}"] if manifest.int8_warning else []),
        *(["forced        INT8, also where TensorRT would have found FP16 faster"] if manifest.force_int8 else []),
        *([f"INT8 costs    {manifest.int8_cost}"] if manifest.int8_cost else []),
        *_info_lines(manifest.info),
    ]
    return "\n".join(lines)


def _int8(manifest: Manifest) -> str:
    if manifest.precision != "int8":
        return "no convolutions"
    return summary(manifest.int8_convolutions, manifest.other_convolutions)


def _info_lines(info: DetectorInfo) -> list[str]:
    low, _, high = info.batch
    batch = f"batch {low}" if low == high else f"batch {low} to {high}"
    fitted = f"{info.width} x {info.height}, {info.channels} channels, {info.input}, {info.resize}, {batch}"
    form = f", --mish {info.mish}" if info.mish_count and info.head != "decoded" else ""
    nms = f"{info.nms.kind} NMS" + (f", beta {info.nms.beta:g}" if info.nms.kind == "diounms" else "")
    heads = [
        f"head          {head.tensor}, cfg line {head.line}: {head.columns} x {head.rows} cells, anchors "
        + " ".join(f"{w:g}x{h:g}" for w, h in head.anchors)
        + f", {head.classes} classes, {head_traits(head.kind, head.new_coords)}scale_x_y {head.scale_x_y:g}"
        for head in info.heads
    ]
    fixed = ", thresholds fixed at {:g} and {:g}".format(*info.fixed_thresholds) if info.fixed_thresholds else ""
    return [
        f"network       {info.name}: {len(info.layers)} cfg layers, {info.parameters:,} parameters, {info.gflops:.3f} GFLOPs",
        f"images        {_sizes(info.image_sizes)}{fitted}",
        f"Mish          {info.mish_count}{form}",
        *heads,
        f"ends at       {info.head}"
        + (f": {nms}, at most {info.max_detections} detections{fixed}" if info.head == "nms" else ""),
        f"classes       {', '.join(info.class_names[:6])}{', ...' if len(info.class_names) > 6 else ''}",
        *(f"{name:<13} sha256 {value}" if len(value) == 64 else f"{name:<13} {value}" for name, value in info.sources.items()),
    ]


def _sizes(sizes: ImageSizes | None) -> str:
    if sizes is None:
        return ""
    least, usual, most = (f"{width} x {height}" for width, height in sizes)
    return f"{least} to {most}, usually {usual}, fitted into "


def _size(tensor: onnx.TensorProto) -> int:
    return prod(tensor.dims)


def _tensor(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim)
    return f"{value.name} {onnx.TensorProto.DataType.Name(kind.elem_type).lower()} ({shape})"
