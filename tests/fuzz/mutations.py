"""Hypothesis strategies of damaged files: edits of bytes, of JSON, of archives and of ONNX graphs."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray

Draw = Callable[[st.SearchStrategy[Any]], Any]
Path = tuple[Any, ...]

_TEXTS = ("", "x" * 300, "a\0b", "\x1b[31m", "\ud800", "../../x", "/dev/zero", "$x^$", "<script>", "NaN", "ä" * 90, "\n")
_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 5e-324, float("inf"), float("nan"))
_VALUES = st.one_of(
    st.sampled_from(_NUMBERS),
    st.sampled_from(_TEXTS),
    st.sampled_from(["null", "true", "[]", "{}", "[[]]", "[null]", '{"": null}', "[1, 2, 3, 4]"]).map(json.loads),
    st.integers(-(1 << 65), 1 << 65),
    st.floats(),
    st.text(max_size=8),
)
_DEPTH = 100_000


class Whole(bytes):
    """A content that Hypothesis does not print in full."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


# --- bytes ---


@st.composite
def of_bytes(draw: Draw, content: bytes) -> bytes:
    """One to four edits of bytes: some changed, cut out, repeated or put in, or the end cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        _edit_bytes(draw, data)
    return bytes(data)


def _edit_bytes(draw: Draw, data: bytearray) -> None:
    start = draw(st.integers(0, max(len(data) - 1, 0)))
    size = draw(st.sampled_from([1, 1, 2, 4, 8, 64]))
    match draw(st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut"])):
        case "flip" if data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        case "set":
            data[start : start + size] = bytes([draw(st.sampled_from([0, 0xFF, 0x7F, 0x80]))]) * size
        case "insert":
            data[start:start] = draw(st.binary(min_size=1, max_size=8))
        case "delete":
            del data[start : start + size]
        case "repeat":
            data[start:start] = data[start : start + size] * draw(st.sampled_from([1, 3, 1000]))
        case _:
            del data[start:]


# --- JSON ---


@st.composite
def of_json(draw: Draw, content: bytes) -> bytes:
    """One to three values of a JSON text replaced, renamed, removed or repeated; sometimes deep nesting or damaged bytes."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):  # it was damaged before
        return draw(of_bytes(content))
    if draw(st.integers(0, 7)) == 0:
        return draw(of_bytes(content))
    for _ in range(draw(st.integers(1, 3))):
        values = _edit_json(draw, values)
    text = json.dumps(values)
    if draw(st.integers(0, 30)) == 0:
        text = text.replace(": ", ": " + "[" * _DEPTH, 1)
    return text.encode()


def _edit_json(draw: Draw, values: Any) -> Any:
    paths = list(_paths(values))
    *parents, key = paths[draw(st.integers(0, len(paths) - 1))] or (None,)
    if key is None:
        return draw(_VALUES)
    place = values
    for step in parents:
        place = place[step]
    match draw(st.sampled_from(["replace", "replace", "remove", "repeat", "rename"])):
        case "remove":
            del place[key]
        case "repeat" if isinstance(place, list):
            place.insert(key, place[key])
        case "rename" if isinstance(place, dict):
            place[str(draw(st.sampled_from(_TEXTS)))] = place.pop(key)
        case _:
            place[key] = draw(_VALUES)
    return values


def _paths(values: Any, above: Path = ()) -> Iterator[Path]:
    """Of every value; of a long list only the first and last three."""
    yield above
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _paths(value, (*above, key))
    elif isinstance(values, list):
        for i in sorted({*range(len(values))[:3], *range(len(values))[-3:]}):
            yield from _paths(values[i], (*above, i))


# --- archives of JSON and arrays ---


@st.composite
def of_archive(draw: Draw, content: bytes) -> bytes:
    """An archive with a member that is damaged, changed in type, shape or values, or missing, or with damaged bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(of_bytes(content))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    text, *arrays = sorted(members, key=lambda name: (not name.endswith(".json"), name))
    name = draw(st.sampled_from(arrays))
    match draw(st.sampled_from(["text", "text", "text", "bytes", "array", "array", "remove", "bomb"])):
        case "text":
            members[text] = draw(of_json(members[text]))
        case "bytes":
            members[name] = draw(of_bytes(members[name]))
        case "remove":
            del members[name]
        case "bomb":
            members[name] = _bomb(members[name])
        case _:
            members[name] = _npy(_changed(draw, _array(members[name])))
    return _archive(members, draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2])))


def _changed(draw: Draw, array: NDArray[Any]) -> NDArray[Any]:
    match draw(st.sampled_from(["dtype", "shape", "values", "values", "less"])):
        case "dtype":
            return array.astype(draw(st.sampled_from(["<f4", ">f8", "<i1", "<U3", "<c16", "?"])))
        case "shape":
            return array.reshape(draw(st.sampled_from([(-1,), (1, -1), (-1, 1), array.shape[::-1]])))
        case "less":
            return array[: draw(st.integers(0, 3))]
        case _:
            changed = array.copy()
            value = draw(st.sampled_from([0, 1, 127, -1, 5000, 2**62, np.inf, -np.inf, np.nan]))
            with np.errstate(all="ignore"):
                changed.reshape(-1)[: draw(st.integers(1, 3))] = np.array(value).astype(array.dtype)
            return changed


def _bomb(member: bytes) -> bytes:
    """An array that declares 4 GB of numbers that are not there."""
    shape = b"(536870912,)"
    start = member.find(b"'shape': (") + 9
    end = member.find(b")", start) + 1
    return member[:start] + shape + member[end + len(shape) - (end - start) :]


def _array(member: bytes) -> NDArray[Any]:
    return np.asarray(np.load(io.BytesIO(member), allow_pickle=False))


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _archive(members: dict[str, bytes], compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return file.getvalue()


# --- ONNX ---


@st.composite
def of_onnx(draw: Draw, content: bytes) -> bytes:
    """A model with a node, attribute, shape, name or metadata changed, or with damaged bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(of_bytes(content))
    model = onnx.ModelProto.FromString(content)
    for _ in range(draw(st.integers(1, 3))):
        _edit_onnx(draw, model)
    return model.SerializeToString()


def _edit_onnx(draw: Draw, model: onnx.ModelProto) -> None:
    graph = draw(st.sampled_from([model.graph, *model.functions]))
    node = graph.node[draw(st.integers(0, len(graph.node) - 1))] if graph.node else onnx.NodeProto()
    match draw(st.sampled_from(["attribute", "attribute", "node", "metadata", "shape", "tensor", "order"])):
        case "attribute" if node.attribute:
            _edit_attribute(draw, node.attribute[draw(st.integers(0, len(node.attribute) - 1))])
        case "metadata" if model.metadata_props:
            entry = model.metadata_props[draw(st.integers(0, len(model.metadata_props) - 1))]
            entry.value = draw(of_json(entry.value.encode())).decode(errors="replace")
        case "shape":
            _edit_shape(draw, draw(st.sampled_from([*model.graph.input, *model.graph.output, *model.graph.value_info])))
        case "tensor" if model.graph.initializer:
            _edit_tensor(draw, model.graph.initializer[draw(st.integers(0, len(model.graph.initializer) - 1))])
        case "order" if len(graph.node) > 1:
            graph.node.append(graph.node[0])
            del graph.node[0]
        case _:
            _edit_node(draw, node)


def _edit_node(draw: Draw, node: onnx.NodeProto) -> None:
    ops = ("Mul", "Cos", "Reshape", "Expand", "Identity", "Loop", "MishPlugin", "ConstantOfShape", "Nothing")
    match draw(st.sampled_from(["op", "name", "domain", "input", "drop"])):
        case "op":
            node.op_type = draw(st.sampled_from(ops))
        case "name":
            node.name = draw(st.sampled_from([text for text in _TEXTS if text != "\ud800"]))
        case "domain":
            node.domain = draw(st.sampled_from(["", "darktrt", "com.microsoft"]))
        case "input" if node.input:
            node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from(["", "images", "nothing"]))
        case _ if node.input:
            del node.input[-1]


_INTEGERS = st.sampled_from([0, -1, 1, 2, 2**31, 2**62, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)


def _edit_attribute(draw: Draw, attribute: onnx.AttributeProto) -> None:
    if attribute.type == onnx.AttributeProto.INTS and attribute.ints:
        attribute.ints[draw(st.integers(0, len(attribute.ints) - 1))] = draw(_INTEGERS)
    elif attribute.type == onnx.AttributeProto.FLOATS and attribute.floats:
        attribute.floats[0] = draw(st.floats(width=32))
    elif attribute.type == onnx.AttributeProto.TENSOR:
        _edit_tensor(draw, attribute.t)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = draw(st.binary(max_size=8))
    else:
        attribute.i, attribute.f = draw(_INTEGERS), draw(st.floats(width=32))


def _edit_shape(draw: Draw, value: onnx.ValueInfoProto) -> None:
    shape = value.type.tensor_type.shape
    match draw(st.sampled_from(["side", "type", "name", "less"])):
        case "side" if shape.dim:
            shape.dim[draw(st.integers(0, len(shape.dim) - 1))].dim_value = draw(_INTEGERS)
        case "type":
            value.type.tensor_type.elem_type = draw(st.integers(0, 20))
        case "name":
            value.name = "other"
        case _ if shape.dim:
            del shape.dim[-1]


def _edit_tensor(draw: Draw, tensor: onnx.TensorProto) -> None:
    match draw(st.sampled_from(["side", "bytes", "type", "external"])):
        case "side" if tensor.dims:
            tensor.dims[draw(st.integers(0, len(tensor.dims) - 1))] = draw(_INTEGERS)
        case "bytes" if tensor.raw_data:
            tensor.raw_data = draw(of_bytes(tensor.raw_data))
        case "external":
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", draw(st.sampled_from(["secret.bin", "../x", "/dev/zero", ""]))
        case _:
            tensor.data_type = draw(st.integers(0, 20))
