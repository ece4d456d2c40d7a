"""Reading an ONNX file of darktrt, with every check that a damaged or foreign file needs: one loader for all rooms.

Like ``darktrt`` it stands below the rooms; onnx itself is imported only when a file is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.errors import DarktrtError
from darktrt.files import open_input
from darktrt.metadata import METADATA_KEY, DetectorInfo

if TYPE_CHECKING:
    import onnx


def load_model(path: str | Path) -> tuple[onnx.ModelProto, DetectorInfo]:
    """An ONNX file of darktrt and its metadata.

    Raises:
        DarktrtError: the file cannot be read, is no ONNX, or was not made by darktrt.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        with open_input(path) as file:
            model = onnx.load(file, format="protobuf", load_external_data=False)  # all that darktrt writes
    except DecodeError as error:
        raise DarktrtError(f"{path}: is no ONNX file, or a damaged one; make it with 'darktrt convert'") from error
    try:
        properties = {p.key: p.value for p in model.metadata_props}
        if METADATA_KEY in properties:
            onnx.checker.check_model(model, full_check=True)
            _check_names(model)
    except Exception as error:  # the checker's exceptions share no base class
        reason = str(error).strip().partition("\n")[0]
        raise DarktrtError(f"{path}: is a damaged ONNX file ({reason}); make it with 'darktrt convert'") from error
    if METADATA_KEY not in properties:
        raise DarktrtError(f"{path}: has no darktrt metadata; make it with 'darktrt convert'")
    info = DetectorInfo.from_json(properties[METADATA_KEY], str(path))
    _check_input(model, info, path)
    return model, info


def _check_names(model: onnx.ModelProto) -> None:
    """Names must be text: protobuf hands out damaged ones as bytes, or raises when they are read."""
    nodes = model.graph.node
    names = [
        name
        for node in nodes
        for name in (node.name, node.op_type, *node.input, *node.output, *(a.name for a in node.attribute))
    ]
    names += [constant.name for constant in model.graph.initializer]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        names += [value.name, value.doc_string, *(dim.dim_param for dim in value.type.tensor_type.shape.dim)]
    names += [model.graph.name, model.graph.doc_string, model.producer_name, model.producer_version]
    if any(not isinstance(name, str) for name in names):
        raise ValueError("a name is not UTF-8")


def _check_input(model: onnx.ModelProto, info: DetectorInfo, path: str | Path) -> None:
    """The first input must be the images that the metadata announces."""
    shape = list(info.input_shape)
    names = [value.name for value in model.graph.input]
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] if names else []
    if names[:1] != ["images"] or dims[1:] != [max(size, 0) for size in shape]:  # 0 is an open dimension
        raise DarktrtError(f"{path}: its input is not the {shape} images of its metadata; make it with 'darktrt convert'")
