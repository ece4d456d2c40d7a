"""What a cfg or a weights file contains, as text for people; needs no torch."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

from darktrt.convert.cfg import Activation, ChannelPool, Convolutional, Layer, Pool, Route, Shortcut, Yolo, read_cfg
from darktrt.convert.shapes import gflops
from darktrt.convert.weights import WeightReader, parameter_count
from darktrt.convert.zoo import MODELS
from darktrt.files import open_input, sha256_of
from darktrt.metadata import head_traits


def describe_cfg(path: str | Path) -> str:
    """Input, costs, heads and every layer with its line and output shape.

    Raises:
        DarktrtError: the file is no detector cfg, or its layers do not fit together.
    """
    network = read_cfg(path)
    shapes = network.shapes
    mish = sum(getattr(layer, "activation", None) == "mish" for layer in network.layers)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(layer.kind for layer in network.layers).most_common())
    lines = [
        f"darknet cfg   {path}",
        f"input         {network.width} x {network.height}, {network.channels} channels, "
        + ("letterboxed" if network.letter_box else "stretched"),
        f"layers        {len(network.layers)}: {kinds}",
        f"Mish          {mish}",
        f"parameters    {parameter_count(network):,}",
        f"GFLOPs        {gflops(network):.3f}",
    ]
    for i, (layer, shape) in enumerate(zip(network.layers, shapes, strict=True)):
        if isinstance(layer, Yolo):
            anchors = " ".join(f"{w:g}x{h:g}" for w, h in network.anchors(layer))
            nms = f"{layer.nms_kind} NMS" + (f", beta {layer.beta_nms:g}" if layer.nms_kind == "diounms" else "")
            traits = head_traits(layer.head_kind, layer.new_coords)
            lines.append(
                f"head          layer {i}, line {layer.line}: {shape.width} x {shape.height} cells, anchors {anchors}, "
                f"{layer.classes} classes, {traits}scale_x_y {layer.scale_x_y:g}, {nms}"
            )
    lines += ["", f"{'layer':>5}  {'line':>5}  {'kind':<16} {'what':<34} output"]
    for layer, shape in zip(network.layers, shapes, strict=True):
        lines.append(f"{layer.index:>5}  {layer.line:>5}  {layer.kind:<16} {_what(layer):<34} {shape}")
    return "\n".join(lines)


def describe_zoo() -> str:
    """A table of the networks that :func:`darktrt.fetch` knows, with the AP of their portable files where it was measured."""
    rows = [("network", "input", "classes", "MB", "AP", "reported", "licence", "SHA-256 of the weights")]
    for name, model in MODELS.items():
        width, height = model.input_size
        ap = f"{model.ap:.4f}".removeprefix("0") if model.ap is not None else "-"
        size, reported = f"{model.weights_bytes / 1e6:.2f}", model.reported or "-"
        rows.append((name, f"{width}x{height}", str(model.classes), size, ap, reported, model.licence, model.weights.sha256))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _what(layer: Layer) -> str:
    if isinstance(layer, Convolutional):
        stride = f"{layer.stride_x}" if layer.stride_x == layer.stride_y else f"{layer.stride_x}x{layer.stride_y}"
        groups = f" groups {layer.groups}" if layer.groups > 1 else ""
        shares = f" weights of {layer.shares}" if layer.shares is not None else ""
        binary = " binary" if layer.binary_weights else ""
        return f"{layer.size}x{layer.size}/{stride}{groups} {layer.activation}{binary}{_blur(layer)}{shares}"
    if isinstance(layer, Activation):
        return layer.activation
    if isinstance(layer, Pool):
        return _blur(layer).lstrip()
    if isinstance(layer, ChannelPool):
        return f"to {layer.out_channels} channels"
    if isinstance(layer, Route):
        group = f" group {layer.group_id} of {layer.groups}" if layer.groups > 1 else ""
        return f"of {', '.join(map(str, layer.sources))}{group}"
    if isinstance(layer, Shortcut):
        return f"{' + '.join(map(str, layer.sources))} {layer.activation}"
    return ""


def _blur(layer: Convolutional | Pool) -> str:
    return f" blurred {layer.blur}x{layer.blur}" if layer.blur else ""


def describe_weights(path: str | Path) -> str:
    """Version, training progress and size; the network's name where it is one of the zoo.

    Raises:
        DarktrtError: the file is no weights file.
    """
    count = WeightReader(path).left
    with open_input(path) as file:
        header = file.read(20)
    major, minor, revision = struct.unpack_from("<3i", header)
    seen = struct.unpack_from("<Q" if major * 10 + minor >= 2 else "<I", header, 12)[0]
    digest = sha256_of(path)
    known = [name for name, model in MODELS.items() if model.weights.sha256 == digest]
    return "\n".join(
        [
            f"darknet weights  {path}",
            f"version          {major}.{minor}.{revision}",
            f"images seen      {seen:,} in training",
            f"parameters       {count:,} ({4 * count / 2**20:.1f} MiB)",
            f"SHA-256          {digest}" + (f" (the official {known[0]})" if known else ""),
        ]
    )
