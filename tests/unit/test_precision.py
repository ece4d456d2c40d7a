"""FP16 by the graph: what becomes half, what stays float32, and how far numbers move."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import HALF_TOLERANCE, Made, batch_of_images, relative_error, run, thresholds, with_outputs
from onnx import TensorProto, numpy_helper

from darktrt.engine.lower import lower
from darktrt.engine.target import Target
from darktrt.errors import DarktrtError
from darktrt.surgery.precision import halve

RTX = Target("rtx", (1, 7, 1))


def halved(made: Made, **options: str) -> onnx.ModelProto:
    """The portable model in FP16, its bodies inlined as for TensorRT for RTX."""
    model = lower(made.transformed(**options), made.info, RTX, "fp16")
    onnx.checker.check_model(model, full_check=True)
    return model


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}


@pytest.mark.parametrize("start", ["uint8", "float"])
def test_the_backbone_is_half_and_its_ends_are_not(made: Made, start: str) -> None:
    model = halved(made, input=start)
    types = types_of(model)
    for node in model.graph.node:
        if node.op_type in ("Conv", "MaxPool", "LeakyRelu", "Softplus", "Tanh", "Resize"):
            assert types[node.output[0]] == TensorProto.FLOAT16, node.name
    assert {types[h.tensor] for h in made.info.heads} == {TensorProto.FLOAT}
    assert {types[name] for name in ("boxes", "scores")} == {TensorProto.FLOAT}
    assert types["images"] == (TensorProto.UINT8 if start == "uint8" else TensorProto.FLOAT)
    assert types["score_threshold"] == types["iou_threshold"] == TensorProto.FLOAT
    weights = [i for i in model.graph.initializer if len(i.dims) == 4]
    assert {i.data_type for i in weights} == {TensorProto.FLOAT16}


@pytest.mark.parametrize("end", ["raw", "decode", "nms"])
def test_inputs_and_outputs_keep_their_types(made: Made, end: str) -> None:
    before, after = made.transformed(head=end), halved(made, head=end)
    assert list(before.graph.input) == list(after.graph.input)
    assert [(o.name, o.type) for o in before.graph.output] == [(o.name, o.type) for o in after.graph.output]


def test_the_count_is_the_backbones(made: Made) -> None:
    graph = gs.import_onnx(made.transformed(head="raw", input="float"))
    assert halve(graph, made.info) == len(made.transformed(head="raw", input="float").graph.node)
    assert Counter(node.op for node in graph.nodes)["Cast"] == 1 + len(made.info.heads)


def test_numbers_move_by_what_eleven_bits_allow(made: Made) -> None:
    """Raw heads within the tolerance and not equal; decoding then adds nothing of its own."""
    images = {"images": batch_of_images(made.info, 3)}
    float_heads, half_heads = (run(model, images) for model in (made.transformed(head="raw"), halved(made, head="raw")))
    for name, array in float_heads.items():
        error = relative_error(half_heads[name], array)
        assert 1e-5 < error <= HALF_TOLERANCE
        assert half_heads[name].dtype == np.float32
    decoded = run(with_outputs(halved(made, head="decode"), half_heads), images)
    for name, array in half_heads.items():
        np.testing.assert_array_equal(decoded[name], array)
    plain = run(made.transformed(head="decode"), images)
    assert relative_error(decoded["boxes"], plain["boxes"]) <= HALF_TOLERANCE
    assert relative_error(decoded["scores"], plain["scores"]) <= HALF_TOLERANCE


def test_detections_are_nearly_the_same(made: Made) -> None:
    given = {"images": batch_of_images(made.info, 3), **thresholds(0.02)}
    full, half = run(made.transformed(), given), run(halved(made), given)
    best = full["num_detections"].min()
    assert best > 3
    assert np.abs(full["num_detections"] - half["num_detections"]).max() <= 2
    np.testing.assert_allclose(half["scores"][:, :3], full["scores"][:, :3], rtol=0.05)


def with_weight(made: Made, value: float) -> onnx.ModelProto:
    model = made.transformed()
    tensor = next(i for i in model.graph.initializer if len(i.dims) == 4)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[7] = value
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def test_a_weight_too_large_for_half_is_refused(made: Made) -> None:
    lower(with_weight(made, 65504.0), made.info, RTX, "fp16")
    message = r"'.*weight.*' holds 1e\+06, too large for FP16; use fp32"
    with pytest.raises(DarktrtError, match=message):
        lower(with_weight(made, -1e6), made.info, RTX, "fp16")
    lower(with_weight(made, -1e6), made.info, RTX, "fp32")
