"""Reading an ONNX file of darktrt, with every check that a damaged or foreign file needs: one loader for all rooms.

Like ``darktrt`` it stands below the rooms but for ``plugins``, whose bodies it sets; onnx itself is imported only when a file
is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.errors import DarktrtError, quote
from darktrt.files import read_bytes
from darktrt.metadata import METADATA_KEY, DetectorInfo

if TYPE_CHECKING:
    import onnx

MOST_FILE_BYTES = 1 << 30
"""A network with larger weights takes more memory than :mod:`darktrt.memory` allows."""


def load_model(path: str | Path) -> tuple[onnx.ModelProto, DetectorInfo]:
    """An ONNX file of darktrt and its metadata.

    The bodies of the plugin nodes are those of this version, whatever the file has in their place. A file of
    ``surgery --inline`` gets its plugin nodes back.

    Raises:
        DarktrtError: the file cannot be read, is no ONNX, was not made by darktrt, is damaged, or needs more memory or work
            than :mod:`darktrt.memory` allows.
    """
    import onnx

    from darktrt.onnx_cost import check_cost, check_sizes
    from darktrt.plugins.functions import restore_nodes

    model, info = _parsed(path)
    try:
        _check_names(model)
        restore_nodes(model)
        _check_names(model)  # of the nodes that came back
        _check_form(model, path)
        _set_bodies(model, path)
        check_sizes(model, info)
        onnx.checker.check_model(model, full_check=True)
        _check_input(model, info, path)
        check_cost(model, info, str(path))
    except DarktrtError:
        raise
    except Exception as error:  # those of the checker and of shape inference share no base class
        raise _damaged(path, error) from error
    return model, info


def load_info(path: str | Path) -> DetectorInfo:
    """The metadata alone, of a file that this process does not run.

    Raises:
        DarktrtError: the file cannot be read, is no ONNX, or was not made by darktrt.
    """
    return _parsed(path)[1]


def is_inlined(path: str | Path) -> bool:
    """Whether a file has standard ops in place of its plugin nodes, by ``surgery --inline``.

    Raises:
        DarktrtError: as :func:`load_info`.
    """
    from darktrt.plugins.functions import INLINED_KEY

    return any(p.key == INLINED_KEY for p in _parsed(path)[0].metadata_props)


def _parsed(path: str | Path) -> tuple[onnx.ModelProto, DetectorInfo]:
    import onnx
    from google.protobuf.message import DecodeError

    content = read_bytes(path, MOST_FILE_BYTES, "make it with 'darktrt convert'")
    if not content:
        raise DarktrtError(f"{path}: is empty; make it with 'darktrt convert'")
    try:
        model = onnx.load_from_string(content, format="protobuf")
    except DecodeError as error:
        raise DarktrtError(f"{path}: is no ONNX file, or a damaged one; make it with 'darktrt convert'") from error
    try:
        properties = {p.key: p.value for p in model.metadata_props}
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from error
    if METADATA_KEY not in properties:
        raise DarktrtError(f"{path}: has no darktrt metadata; make it with 'darktrt convert'")
    return model, DetectorInfo.from_json(properties[METADATA_KEY], str(path))


def _damaged(path: str | Path, error: Exception) -> DarktrtError:
    reason = quote(str(error).strip().partition("\n")[0], 200)
    return DarktrtError(f"{path}: is a damaged ONNX file ({reason}); make it with 'darktrt convert'")


def _check_names(model: onnx.ModelProto) -> None:
    """Names must be text: protobuf hands out damaged ones as bytes, or raises when they are read."""
    names = [
        name
        for node in model.graph.node
        for name in (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
    ]
    names += [constant.name for constant in model.graph.initializer]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        names += [value.name, value.doc_string, *(dim.dim_param for dim in value.type.tensor_type.shape.dim)]
    names += [model.graph.name, model.graph.doc_string, model.producer_name, model.producer_version]
    if any(not isinstance(name, str) for name in names):
        raise ValueError("a name is not UTF-8")


def _check_form(model: onnx.ModelProto, path: str | Path) -> None:
    """Refuse what no file of darktrt has: weights in other files or of other sizes, graphs in nodes, foreign operators."""
    from onnx import TensorProto, numpy_helper

    from darktrt.plugins.ops import DOMAIN

    for tensor in _constants(model):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise DarktrtError(
                f"{path}: keeps '{quote(tensor.name)}' in another file, which darktrt does not read; make it with 'darktrt "
                "convert', whose files are whole"
            )
        numpy_helper.to_array(tensor)  # the checker accepts data that its sizes do not fit
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise DarktrtError(
                f"{path}: '{quote(node.name)}' is a {quote(node.op_type)}, which only files for a server have; name the file "
                "that 'darktrt surgery' wrote"
            )
        if node.domain not in ("", "ai.onnx", DOMAIN):
            raise ValueError(f"'{node.name}' is an operator of {node.domain}")
    if model.graph.sparse_initializer or model.training_info:
        raise ValueError("it has sparse weights or training")


def _constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _set_bodies(model: onnx.ModelProto, path: str | Path) -> None:
    """Replace the functions: a body could be anything, while its node's attributes say what it must be."""
    from darktrt.plugins.functions import embed

    del model.functions[:]
    try:
        embed(model)
    except DarktrtError as error:
        raise DarktrtError(f"{path}: {error}") from error


def _check_input(model: onnx.ModelProto, info: DetectorInfo, path: str | Path) -> None:
    """The first input must be the images that the metadata announces."""
    shape = list(info.input_shape)
    names = [value.name for value in model.graph.input]
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] if names else []
    if names[:1] != ["images"] or dims[1:] != [max(size, 0) for size in shape]:  # 0 is an open dimension
        raise DarktrtError(f"{path}: its input is not the {shape} images of its metadata; make it with 'darktrt convert'")
