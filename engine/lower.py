"""A portable model, made into what one target wants: its bodies kept or dropped, its precision in flags or in the types."""

from __future__ import annotations

from typing import Literal

import onnx
import onnx_graphsurgeon as gs

from darktrt import DetectorInfo
from engine.target import Target
from surgery.bodies import drop_bodies, embed, inline_bodies
from surgery.half import halve

Precision = Literal["fp32", "fp16"]


def lower(model: onnx.ModelProto, info: DetectorInfo, target: Target, precision: Precision) -> onnx.ModelProto:
    """The model for ``target``; ``model`` itself may change.

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
    if target.bodies == "drop":
        drop_bodies(model)
    return inline_bodies(model) if target.bodies == "inline" else model
