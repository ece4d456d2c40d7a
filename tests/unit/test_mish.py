"""Mish in every form that exporters write, what only looks like it, counts, and fusing with adds and concats."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import (
    MADE_MISH,
    RESIDUAL_CFG,
    Array,
    Made,
    as_float,
    batch_of_images,
    make,
    run,
    thresholds,
    with_outputs,
)
from onnx import helper, parser

from darktrt.errors import DarktrtError
from darktrt.plugins.functions import embed, inline_bodies
from darktrt.plugins.ops import DOMAIN, Mish
from darktrt.surgery.mish import Fused, fuse_mish, mish_input, replace_mish
from darktrt.surgery.rewrite import SurgeryOptions, transform


def graph_of(statements: str, opset: int = 17) -> gs.Graph:
    """A graph over ``x`` and ``z``, giving ``y``; every node gets the name of its first output."""
    header = f'<ir_version: 8, opset_import: ["": {opset}]> g (float[1,8] x, float[1,8] z) => (float[1,8] y)'
    model = parser.parse_model(f"{header} {{ {statements} }}")
    for node in model.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    return gs.import_onnx(model)


def finished(graph: gs.Graph) -> onnx.ModelProto:
    model = gs.export_onnx(graph.cleanup().toposort(), do_type_check=False)
    embed(model)
    onnx.checker.check_model(model, full_check=True)
    return model


GATE = "s = Softplus (x) t = Tanh (s)"
FORMS = {
    "x first": (f"{GATE} y = Mul (x, t)", 17),
    "gate first": (f"{GATE} y = Mul (t, x)", 17),
    "the op Mish": ("y = Mish (x)", 18),
    "the op Mish of opset 22": ("y = Mish (x)", 22),
}


def mish(x: Array) -> Array:
    wide = x.astype(np.float64)
    return wide * np.tanh(np.logaddexp(0, wide))


def inputs() -> dict[str, Array]:
    x = np.array([[-200, -20.5, -3, -0.1, 0, 1, 20.5, 300]], np.float32)
    return {"x": x, "z": np.flip(x, 1).copy()}


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_in_either_order_become_the_plugin(name: str) -> None:
    statements, opset = FORMS[name]
    graph = graph_of(statements, opset)
    assert replace_mish(graph, 1) == 1
    model = finished(graph)
    (node,) = model.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert (node.domain, node.op_type) == (DOMAIN, "MishPlugin")
    assert attributes == {"plugin_version": b"1", "plugin_namespace": b""}
    np.testing.assert_allclose(run(model, inputs())["y"], mish(inputs()["x"]), rtol=1e-5, atol=1e-6)


def test_several_in_a_row_keep_their_order() -> None:
    text = f"{GATE} a = Mul (t, x) s2 = Softplus (a) t2 = Tanh (s2) b = Mul (a, t2) y = Add (b, z)"
    graph = graph_of(text)
    assert replace_mish(graph, 2) == 2
    model = finished(graph)
    assert [node.op_type for node in model.graph.node] == ["MishPlugin", "MishPlugin", "Add"]
    assert [function.name for function in model.functions] == ["MishPlugin"]
    expected = mish(mish(inputs()["x"])) + inputs()["z"]
    np.testing.assert_allclose(run(model, inputs())["y"], expected, rtol=1e-5, atol=1e-5)


def test_a_shared_gate_stays_for_its_other_reader() -> None:
    graph = graph_of(f"{GATE} m = Mul (x, t) y = Add (m, t)")
    assert replace_mish(graph, 1) == 1
    assert Counter(node.op_type for node in finished(graph).graph.node) == Counter(["Softplus", "Tanh", "MishPlugin", "Add"])


NOT_MISH = {
    "another x": (f"{GATE} y = Mul (z, t)", "'Mul_y' multiplies tanh(softplus(x)) by another x"),
    "another x, other order": (f"{GATE} y = Mul (t, z)", "'Mul_y' multiplies tanh(softplus(x)) by another x"),
    "Add": (f"{GATE} y = Add (x, t)", "'Add_y' is a Add of tanh(softplus(x)), not a Mul"),
    "no Tanh": ("s = Softplus (x) y = Mul (x, s)", "'Softplus_s' is a Softplus that no Tanh follows"),
    "Sigmoid for Tanh": ("s = Softplus (x) t = Sigmoid (s) y = Mul (x, t)", "'Softplus_s' is a Softplus that no Tanh follows"),
    "the wrong way round": ("t = Tanh (x) s = Softplus (t) y = Mul (x, s)", "'Softplus_s' is a Softplus that no Tanh"),
    "Tanh without Softplus": ("t = Tanh (x) y = Mul (x, t)", "the graph and the cfg it came from do not belong together"),
    "nothing like it": ("y = Relu (x)", "the graph and the cfg it came from do not belong together"),
    "Div": (f"{GATE} y = Div (t, x)", "'Div_y' is a Div of tanh(softplus(x)), not a Mul"),
}


@pytest.mark.parametrize("name", NOT_MISH)
def test_what_only_looks_like_mish_is_left_and_named(name: str) -> None:
    statements, said = NOT_MISH[name]
    graph = graph_of(statements)
    assert all(mish_input(node) is None for node in graph.nodes)
    assert replace_mish(graph, 0) == 0
    with pytest.raises(DarktrtError, match="surgery: found 0 of 1 Mish") as caught:
        replace_mish(graph, 1)
    assert said in str(caught.value)
    assert Counter(node.op for node in graph.nodes) == Counter(node.op for node in graph_of(statements).nodes)


def test_too_many_are_an_error_too() -> None:
    with pytest.raises(DarktrtError, match="found 1 of 0 Mish"):
        replace_mish(graph_of(f"{GATE} y = Mul (x, t)"), 0)


def test_a_custom_op_called_mish_is_not_ours() -> None:
    graph = graph_of("y = Relu (x)")
    graph.nodes[0].op, graph.nodes[0].domain = "Mish", "elsewhere"
    assert replace_mish(graph, 0) == 0


# --- adds and concats behind it ---


M, N = "m = darktrt.MishPlugin (x)", "n = darktrt.MishPlugin (z)"


def with_mish(statements: str, outputs: str = "y", second: str = "batch,4,3,5") -> onnx.ModelProto:
    """A model over ``x`` and ``z`` with ``MishPlugin`` nodes; the shapes of ``m, n, k`` are known, as surgery has them."""
    known = ", ".join(f"float[batch,4,3,5] {name}" for name in "mnk" if f"{name} = " in statements and name not in outputs)
    header = '<ir_version: 8, opset_import: ["": 17, "darktrt": 1]>'
    values = f"(float[batch,4,3,5] x, float[{second}] z) => ({', '.join(f'float[a,b,c,d] {name}' for name in outputs)})"
    model = parser.parse_model(f"{header} g {values} <{known}> {{ {statements} }}")
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type.removesuffix('Plugin')}"
        if node.domain:
            own = Mish().attributes()
            node.attribute.extend(helper.make_attribute(name, value) for name, value in own.items())
    embed(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def waves(second: tuple[int, ...] = (2, 4, 3, 5)) -> dict[str, Array]:
    return {
        "x": (8 * np.sin(np.arange(120))).astype(np.float32).reshape(2, 4, 3, 5),
        "z": (5 * np.cos(np.arange(np.prod(second)))).astype(np.float32).reshape(second),
    }


FUSED: dict[str, tuple[str, str, Fused, list[str]]] = {
    "an add": (f"{M} y = Add (m, z)", "y", Fused(1, 0), ["MishAddPlugin"]),
    "an add, other order": (f"{M} y = Add (z, m)", "y", Fused(1, 0), ["MishAddPlugin"]),
    "an add of two Mish is fused with one": (f"{M} {N} y = Add (m, n)", "y", Fused(1, 0), ["MishPlugin", "MishAddPlugin"]),
    "an add of two Mish is fused with the one without other readers": (
        f"{M} {N} k = Relu (m) y = Add (m, n)", "yk", Fused(1, 0), ["MishPlugin", "Relu", "MishAddPlugin"],
    ),
    "the residual may be the input of Mish": (f"{M} y = Add (m, x)", "y", Fused(1, 0), ["MishAddPlugin"]),
    "the sum may be Mish's too": (
        f"{M} k = Add (m, z) y = darktrt.MishPlugin (k)", "y", Fused(1, 0), ["MishAddPlugin", "MishPlugin"],
    ),
    "adds in a row": (
        f"{M} k = Add (z, m) n = darktrt.MishPlugin (k) y = Add (n, k)", "y", Fused(2, 0), ["MishAddPlugin"] * 2,
    ),
    "a concat": (f"{M} {N} y = Concat <axis = 1> (m, n)", "y", Fused(0, 1), ["MishConcatPlugin"]),
    "a concat, the other first": (f"{M} {N} y = Concat <axis = 1> (n, m)", "y", Fused(0, 1), ["MishConcatPlugin"]),
    "a concat of which others read the first": (
        f"{M} {N} k = Relu (m) y = Concat <axis = 1> (m, n)", "yk", Fused(0, 1), ["MishPlugin", "Relu", "MishConcatPlugin"],
    ),
    "a concat of which others read the second": (
        f"{M} {N} k = Relu (n) y = Concat <axis = 1> (m, n)", "yk", Fused(0, 1), ["MishPlugin", "Relu", "MishConcatPlugin"],
    ),
    "a concat of which one is an output": (
        f"{M} {N} y = Concat <axis = 1> (m, n)", "ym", Fused(0, 1), ["MishPlugin", "MishConcatPlugin"],
    ),
    "a concat of two Mish of one tensor": (
        f"{M} n = darktrt.MishPlugin (x) y = Concat <axis = 1> (m, n)", "y", Fused(0, 1), ["MishConcatPlugin"],
    ),
    "a Mish read by a concat and an add": (
        f"{M} {N} k = Add (m, z) y = Concat <axis = 1> (n, m)", "yk", Fused(1, 1), ["MishAddPlugin", "MishConcatPlugin"],
    ),
    "a Mish read by two concats": (
        f"{M} {N} k = darktrt.MishPlugin (n) y = Concat <axis = 1> (m, n) w = Concat <axis = 1> (m, k)", "yw", Fused(0, 2),
        ["MishPlugin", "MishConcatPlugin", "MishConcatPlugin"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_nodes_that_are_fused_with_mish(name: str) -> None:
    """In a batch of two; not a bit changes, tensors that are left keep their names, and a second time changes nothing."""
    statements, outputs, count, ops = FUSED[name]
    model = with_mish(statements, outputs)
    graph = gs.import_onnx(model)
    assert fuse_mish(graph) == count
    fused = finished(graph)
    assert sorted(node.op_type for node in fused.graph.node) == sorted(ops)
    assert {out for node in fused.graph.node for out in node.output} <= {out for n in model.graph.node for out in n.output}
    names = [node.name for node in fused.graph.node]
    assert len(set(names)) == len(names)
    for node in fused.graph.node:
        assert node.name == f"/{node.output[0]}/{node.op_type.removesuffix('Plugin')}", "called by what it is"
    assert fuse_mish(gs.import_onnx(fused)) == Fused(0, 0)
    expected, result = run(model, waves()), run(fused, waves())
    inlined = inline_bodies(fused)
    onnx.checker.check_model(inlined, full_check=True)
    for output, array in run(inlined, waves()).items():
        assert array.tobytes() == result[output].tobytes() == expected[output].tobytes()


NOT_FUSED: dict[str, tuple[str, str]] = {
    "another reads Mish": (f"{M} k = Relu (m) y = Add (m, z)", "yk"),
    "Mish is an output": (f"{M} y = Add (m, z)", "ym"),
    "Mish is added to itself": (f"{M} y = Add (m, m)", "y"),
    "another operation": (f"{M} y = Sub (m, z)", "y"),
    "a concat along rows": (f"{M} {N} y = Concat <axis = 2> (m, n)", "y"),
    "a concat with itself": (f"{M} y = Concat <axis = 1> (m, m)", "y"),
    "a concat of three": (f"{M} {N} k = darktrt.MishPlugin (n) y = Concat <axis = 1> (m, n, k)", "y"),
    "a concat of one": (f"{M} y = Concat <axis = 1> (m)", "y"),
    "a concat with another activation": (f"{M} n = Relu (z) y = Concat <axis = 1> (m, n)", "y"),
    "a concat with an input": (f"{M} y = Concat <axis = 1> (z, m)", "y"),
    "others read both": (f"{M} {N} k = Relu (m) w = Relu (n) y = Concat <axis = 1> (m, n)", "ykw"),
    "both are outputs": (f"{M} {N} y = Concat <axis = 1> (m, n)", "ymn"),
    "an operation between": (f"{M} k = Relu (m) y = Add (k, z)", "y"),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_nodes_that_are_not_fused_with_mish(name: str) -> None:
    model = with_mish(*NOT_FUSED[name])
    graph = gs.import_onnx(model)
    assert fuse_mish(graph) == Fused(0, 0)
    assert [node.op for node in graph.nodes] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("second", ["batch,4,1,1", "batch,1,3,5", "1,4,3,5", "other,4,3,5", "?,4,3,5"])
@pytest.mark.parametrize("add", ["m, z", "z, m"])
def test_an_add_that_may_broadcast_one_operand_is_not_fused(second: str, add: str) -> None:
    graph = gs.import_onnx(with_mish(f"{M} y = Add ({add})", second=second))
    assert fuse_mish(graph) == Fused(0, 0)


def test_an_add_of_unknown_shape_is_not_fused() -> None:
    for batch in ("batch", "?"):
        model = with_mish(f"{M} y = Add (m, z)")
        del model.graph.value_info[:]
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_param = batch if batch != "?" else ""
        assert fuse_mish(gs.import_onnx(model)) == Fused(0, 0)


def test_channels_of_a_concat_may_differ() -> None:
    model = with_mish(f"{M} {N} y = Concat <axis = 1> (m, n)", second="batch,7,3,5", outputs="yn")
    graph = gs.import_onnx(model)
    assert fuse_mish(graph) == Fused(0, 1)
    given = waves((2, 7, 3, 5))
    for output, array in run(finished(graph), given).items():
        assert array.tobytes() == run(model, given)[output].tobytes()


# --- in the made network ---


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def layer_names(made: Made) -> list[str]:
    return list(dict.fromkeys(layer.tensor for layer in made.info.layers))


def test_the_network_gets_one_node_a_mish_and_one_body(made: Made) -> None:
    model = made.transformed()
    result = kinds(model)
    assert result["MishPlugin"] == MADE_MISH
    assert not {"Softplus", "Tanh", "Mish"} & set(result)
    assert sorted(function.name for function in model.functions) == ["MishPlugin", "YoloDetectPlugin"]


@pytest.mark.parametrize("options", [{}, {"mish": "native"}, {"mish": "plugin"}, {"head": "raw"}])
def test_every_layer_keeps_its_bits(made: Made, options: dict[str, str]) -> None:
    """Float input; heads and everything before them."""
    images = as_float(batch_of_images(made.info, 2))
    plain = run(with_outputs(made.model(), layer_names(made)), {"images": images})
    model = with_outputs(made.transformed(input="float", **options), layer_names(made))
    given = {"images": images} | ({} if options.get("head") else thresholds())
    result = run(model, given)
    for name in layer_names(made):
        assert result[name].tobytes() == plain[name].tobytes(), name


def test_fused_in_a_network(tmp_path: Path, made: Made) -> None:
    """Every tensor that is left has its bits; the counts are those of the cfg."""
    for network, count in ((make(tmp_path, RESIDUAL_CFG, batch=(1, 2, 2)), Fused(2, 1)), (made, Fused(1, 0))):
        fused, report = transform(network.model(), network.info, SurgeryOptions(mish="fused", input="float", head="raw"))
        plugin = network.transformed(mish="plugin", input="float", head="raw")
        assert report.fused == count
        assert (report.mish, report.info.mish) == (network.info.mish_count, "fused")
        onnx.checker.check_model(fused, full_check=True)
        assert kinds(fused)["MishPlugin"] == report.mish - count.adds - 2 * count.concats
        tensors = [out for node in fused.graph.node for out in node.output]
        given = {"images": as_float(batch_of_images(network.info, 2))}
        expected = run(with_outputs(plugin, tensors), given)
        for name, array in run(with_outputs(fused, tensors), given).items():
            assert array.tobytes() == expected[name].tobytes(), name


def test_auto_is_a_node_each_for_the_build_to_decide(made: Made) -> None:
    plugin, report = transform(made.model(), made.info, SurgeryOptions(mish="plugin"))
    auto, decided_later = transform(made.model(), made.info, SurgeryOptions())
    assert plugin.graph == auto.graph
    assert (report.info.mish, decided_later.info.mish) == ("plugin", "auto")
    assert decided_later.fused == Fused(0, 0)


def test_native_leaves_mish_as_it_was_written(made: Made) -> None:
    result = kinds(made.transformed(mish="native"))
    assert result["Softplus"] == result["Tanh"] == MADE_MISH
    assert not result["MishPlugin"]


def opset_18(made: Made) -> onnx.ModelProto:
    """The made network as a newer exporter would write it: opset 18, each Mish one node."""
    model = made.model()
    nodes = list(model.graph.node)
    for node in nodes:
        if node.op_type != "Mul":
            continue
        producers = {n.output[0]: n for n in nodes}
        gates = [producers.get(name) for name in node.input]
        if any(gate is not None and gate.op_type == "Tanh" for gate in gates):
            x = next(name for name, gate in zip(node.input, gates, strict=True) if gate is None or gate.op_type != "Tanh")
            node.op_type = "Mish"
            del node.input[:]
            node.input.append(x)
    used = {name for node in nodes for name in node.input}
    for node in [n for n in nodes if n.op_type in ("Tanh", "Softplus")]:
        if node.output[0] not in used or node.op_type == "Softplus":
            model.graph.node.remove(node)
    model.opset_import[0].version = 18
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("head", ["nms", "decode", "raw"])
def test_a_model_of_opset_18_with_the_op_mish(made: Made, head: str) -> None:
    model = opset_18(made)
    assert kinds(model)["Mish"] == MADE_MISH
    portable, report = transform(model, made.info, SurgeryOptions(head=head, input="float"))  # type: ignore[arg-type]
    assert report.mish == MADE_MISH
    onnx.checker.check_model(portable, full_check=True)
    inlined = inline_bodies(portable)
    onnx.checker.check_model(inlined, full_check=True)
    given = {"images": as_float(batch_of_images(made.info, 2))} | (thresholds(0.01) if head == "nms" else {})
    expected = run(made.transformed(head=head, input="float"), given)
    for model in (portable, inlined):
        for name, array in run(model, given).items():
            np.testing.assert_array_equal(array, expected[name])


def test_a_count_that_is_not_the_cfgs_is_an_error(made: Made) -> None:
    model = made.model()
    last = next(node for node in model.graph.node if node.output[0] == "layer17")
    gate = next(name for name in last.input if any(n.op_type == "Tanh" and name in n.output for n in model.graph.node))
    del last.input[:]
    last.input.extend(["layer10", gate])
    message = (
        rf"surgery: found {MADE_MISH - 1} of {MADE_MISH} Mish; '{last.name}' multiplies tanh\(softplus\(x\)\) by another x"
    )
    with pytest.raises(DarktrtError, match=message):
        transform(model, made.info, SurgeryOptions())
