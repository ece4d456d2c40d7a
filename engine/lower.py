"""A portable model, made into what one target wants: its bodies kept or dropped, its precision in flags or in the types."""

from __future__ import annotations

from typing import Literal

import onnx
import onnx_graphsurgeon as gs

from darktrt import DetectorInfo
from surgery.bodies import drop_bodies, embed
from surgery.half import halve

from .target import Target

Precision = Literal["fp32", "fp16"]


def lower(model: onnx.ModelProto, info: DetectorInfo, target: Target, precision: Precision) -> onnx.ModelProto:
    """The model for ``target``; a copy where anything changes.

    Raises:
        DarktrtError: the model cannot have this precision.
    """
    if precision == "fp16" and not target.weakly_typed:
        graph = gs.import_onnx(model)
        halve(graph, info)
        metadata = model.metadata_props
        model = gs.export_onnx(graph.toposort(), do_type_check=False)
        model.metadata_props.extend(metadata)
        embed(model)
    if target.bodies_hide_plugins:
        drop_bodies(model)
    return model
