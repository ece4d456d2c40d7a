"""Several partly quantized variants of a network as one graph, which computes once what they have in common.

Along their first axis its tensors hold rows: row 0 is the network in floating point on one image, and every variant has a row
from the first of its quantized convolutions on. So a variant costs what lies behind that convolution, and all of them cost one
session.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from darktrt.metadata import DetectorInfo
from darktrt.surgery.precision import backbone
from darktrt.surgery.qdq import Calibration, quantize

_Rows = tuple[int, ...]
"""Whose rows a tensor holds, in order: 0 for the network in floating point, i + 1 for variant i. Once every variant has a row,
nothing reads that of the network in floating point, and it is left out."""


def insert_variants(graph: gs.Graph, info: DetectorInfo, calibration: Calibration, groups: Sequence[Collection[str]]) -> None:
    """Make the graph compute a variant for each group, in which only the convolutions of that group are quantized, in place.

    It takes one image, and its outputs have a row for each group. No node of it may mix images.

    Raises:
        DarktrtError: as :func:`darktrt.surgery.qdq.quantize`.
    """
    convolutions = [node for node in backbone(graph, info) if node.op == "Conv"]
    plain = {node.name: list(node.inputs) for node in convolutions}
    wanted = {name for group in groups for name in group}
    quantize(graph, info, replace(calibration, fp_layers=tuple(name for name in plain if name not in wanted)))
    graph.toposort()
    variants = _Variants(graph, tuple(range(1, len(groups) + 1)))
    for node in list(graph.nodes):
        quantized = tuple(i for i, group in enumerate(groups, 1) if node.name in group)
        if quantized:
            variants.split(node, plain[node.name], quantized)
        else:
            variants.widen(node)
    _declare_one_image(graph)
    graph.outputs = [variants.with_rows(output, variants.every) for output in graph.outputs]
    graph.cleanup().toposort()


def _declare_one_image(graph: gs.Graph) -> None:
    """Take the number of images from the input, and the shapes that follow from it from all other tensors."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable):
            tensor.shape = [1, *tensor.shape[1:]] if tensor is graph.inputs[0] else None


@dataclass(frozen=True)
class _Variants:
    """The graph, while it gets its variants from its first node to its last."""

    graph: gs.Graph
    every: _Rows
    """The rows of all variants."""
    rows: dict[str, _Rows] = field(default_factory=dict)
    """By tensor; constants and what is made of them have none."""

    def __post_init__(self) -> None:
        self.rows[self.graph.inputs[0].name] = (0,)

    def widen(self, node: gs.Node) -> None:
        """Let a node compute all rows that any of its inputs has."""
        held = [self.rows[tensor.name] for tensor in node.inputs if tensor.name in self.rows]
        if held:
            rows = self._joined(held)
            node.inputs = [self.with_rows(x, rows) if x.name in self.rows else x for x in node.inputs]
            self.rows.update({tensor.name: rows for tensor in node.outputs})

    def split(self, node: gs.Node, plain: Sequence[gs.Tensor], quantized: _Rows) -> None:
        """Let a convolution compute the rows ``quantized`` by INT8, and the others by its inputs before that, ``plain``."""
        x, (scale, zero) = plain[0], node.inputs[0].inputs[0].inputs[1:]  # of the QuantizeLinear before it
        (output,) = node.outputs
        rows = self._joined([self.rows[x.name], quantized])
        floating = tuple(row for row in rows if row not in quantized)
        levels = self._add("QuantizeLinear", f"{node.name}_levels", {}, [self.with_rows(x, quantized), scale, zero], np.int8)
        restored = self._add("DequantizeLinear", f"{node.name}_restored", {}, [levels, scale, zero])
        parts = [self._add("Conv", f"{node.name}_int8", node.attrs, [restored, *node.inputs[1:]])]
        if floating:
            parts.insert(0, self._add("Conv", f"{node.name}_plain", node.attrs, [self.with_rows(x, floating), *plain[1:]]))
        joined = self._add("Concat", f"{node.name}_joined", {"axis": 0}, parts)
        node.outputs.clear()
        order = self._indices(np.argsort([*floating, *quantized]))  # of rows as numbers, all different
        self.graph.nodes.append(gs.Node("Gather", f"{node.name}_rows", {"axis": 0}, [joined, order], [output]))
        self.rows[output.name] = rows

    def with_rows(self, tensor: gs.Tensor, rows: _Rows) -> gs.Tensor:
        """The tensor with these rows; a variant without one there does not differ there from the network in floating point."""
        held = self.rows[tensor.name]
        if held == rows:
            return tensor
        wanted = self._indices([held.index(row if row in held else 0) for row in rows])
        return self._add("Gather", f"{tensor.name}_rows", {"axis": 0}, [tensor, wanted], tensor.dtype)

    def _joined(self, held: Iterable[_Rows]) -> _Rows:
        rows = tuple(sorted({row for one in held for row in one}))
        return self.every if set(self.every) <= set(rows) else tuple(sorted({0, *rows}))

    def _add(
        self, op: str, name: str, attributes: dict[str, object], inputs: list[gs.Tensor], dtype: type = np.float32
    ) -> gs.Variable:
        output = gs.Variable(f"{name}_{len(self.graph.nodes)}", dtype)
        self.graph.nodes.append(gs.Node(op, output.name, dict(attributes), inputs, [output]))
        return output

    def _indices(self, values: Iterable[int]) -> gs.Constant:
        return gs.Constant(f"variants_{len(self.graph.nodes)}", np.array([*values], np.int64))
