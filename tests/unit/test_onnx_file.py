"""ONNX files that were made to do harm, or belong to nothing: each is refused in one sentence, before anything of it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import Made, batch_of_images, conv, make, net, thresholds, yolo
from onnx import TensorProto, helper, numpy_helper

from darktrt import memory, onnx_cost
from darktrt.check.runs import onnx_variant
from darktrt.check.simulate import load_network
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo
from darktrt.onnx_cost import cost_of, limit_batch
from darktrt.onnx_file import load_info, load_model
from darktrt.plugins.functions import inline_bodies
from darktrt.plugins.ops import DOMAIN
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

Change = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def portable(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "net.onnx"
    insert_plugins(made.plain, path, SurgeryOptions())
    return path


def changed(source: Path, folder: Path, change: Change) -> Path:
    """A file with a change in its graph."""
    model = onnx.load(str(source))
    change(model)
    path = folder / "bad.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DarktrtError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message and len(message) < 500
    return message.removeprefix(f"{path}: ")


def add(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Put nodes before all others."""
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def constant(model: onnx.ModelProto, name: str, values: object, kind: type = np.int64) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(values, kind), name))


def inflate(model: onnx.ModelProto) -> None:
    """A tensor of 8 GB from eight bytes."""
    constant(model, "length", [2_000_000_000])
    add(model, helper.make_node("ConstantOfShape", ["length"], ["zeros"]), helper.make_node("ReduceSum", ["zeros"], ["sum"]))


def loop(model: onnx.ModelProto) -> None:
    """A loop that stacks a tensor a thousand million times."""
    number, go, out = (
        helper.make_tensor_value_info(name, kind, [])
        for name, kind in (("i", TensorProto.INT64), ("go", TensorProto.BOOL), ("out", TensorProto.INT64))
    )
    on = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["i"], ["out"])]
    body = helper.make_graph(nodes, "body", [number, go], [on, out])
    constant(model, "trips", 10**9)
    constant(model, "begin", True, np.bool_)
    add(model, helper.make_node("Loop", ["trips", "begin"], ["all"], name="bomb", body=body))


def pad(model: onnx.ModelProto) -> None:
    constant(model, "pads", [0, 0, 30000, 30000, 0, 0, 30000, 30000])
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    add_before = helper.make_node("Pad", [first.input[0], "pads"], ["padded"])
    index = list(model.graph.node).index(first)
    first.input[0] = "padded"
    model.graph.node.insert(index, add_before)
    del model.graph.value_info[:]  # which would contradict it


def by_value(model: onnx.ModelProto) -> None:
    """A size that depends on the pixels."""
    add(
        model,
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.INT64),
        helper.make_node("NonZero", ["numbers"], ["places"]),
        helper.make_node("ReduceMax", ["places"], ["most"], keepdims=0),
        helper.make_node("Range", ["most", "most", "most"], ["range"]),
    )


def outer_product(model: onnx.ModelProto) -> None:
    constant(model, "row", np.ones((1, 60_000)), np.float32)
    constant(model, "column", np.ones((60_000, 1)), np.float32)
    add(model, helper.make_node("Mul", ["row", "column"], ["square"]))


def multiply(model: onnx.ModelProto) -> None:
    """Matrices of 256 MB that take a million million multiply-adds each."""
    constant(model, "line", np.ones((1, 9000)), np.float32)
    constant(model, "column", np.ones((9000, 1)), np.float32)
    names = ["square", *(f"power{i}" for i in range(4))]
    products = [helper.make_node("MatMul", [a, "square"], [b]) for a, b in pairwise(names)]
    add(model, helper.make_node("Mul", ["line", "column"], ["square"]), *products)


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")


def external_attribute(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="inside", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    add(model, helper.make_node("Constant", [], ["value"], value=tensor))


def foreign_function(model: onnx.ModelProto) -> None:
    add(model, helper.make_node("Identity", ["images"], ["copy"], domain="others", name="odd"))
    model.opset_import.append(helper.make_opsetid("others", 1))


def wide_preprocess(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "PreprocessPlugin")
    for attribute in node.attribute:
        if attribute.name == "input_size":
            attribute.ints[:] = [100_000, 100_000]


def below_zero(model: onnx.ModelProto) -> None:
    model.graph.value_info.append(helper.make_tensor_value_info("line", TensorProto.FLOAT, [1, -18]))


def slice_of_less_than_nothing(model: onnx.ModelProto) -> None:
    """At such a slice onnx's shape inference ends the process."""
    constant(model, "line", np.zeros((1, 9)), np.float32)
    for name, value in (("first", 0), ("last", 3), ("axis", 1)):
        constant(model, name, [value])
    constant(model, "cut", [0, 0, 0, -29])
    cut = helper.make_node("Pad", ["part", "cut"], ["less"], name="cut")
    slices = [
        helper.make_node("Slice", [data, "first", "last", "axis"], [part], name=part)
        for data, part in (("line", "part"), ("less", "end"))
    ]
    add(model, slices[0], cut, slices[1])


def chain_of_slices(model: onnx.ModelProto) -> None:
    for name in ("first", "axis"):
        constant(model, name, [0])
    names = ["images", *(f"part{i}" for i in range(300))]
    add(model, *(helper.make_node("Slice", [a, "first", "axis", "axis"], [b]) for a, b in pairwise(names)))


CASES: dict[str, tuple[Change, str]] = {
    "a size below zero": (below_zero, "is a damaged ONNX file ('line' has a size below 0); make it with"),
    "a slice of less than nothing": (slice_of_less_than_nothing, "is a damaged ONNX file ('less' has a size below 0)"),
    "a chain of slices": (chain_of_slices, "is a damaged ONNX file (300 slices follow on each other)"),
    "a large tensor": (inflate, "would take 14.9 GiB of memory for an image, more than 6.0 GiB; convert the network for"),
    "a product of vectors": (outer_product, "would take 26.8 GiB of memory for an image"),
    "wide borders": (pad, "would take 215.1 GiB of memory for an image"),
    "a loop": (loop, "'bomb' is a Loop, which only files for a server have; name the file that 'darktrt surgery' wrote"),
    "a size that nobody knows": (
        by_value,
        "is a damaged ONNX file (the size of 'places', which NonZero outputs, is not stated",
    ),
    "much work": (multiply, "would take 5,8"),
    "weights elsewhere": (
        external,
        "in another file, which darktrt does not read; make it with 'darktrt convert', whose files",
    ),
    "a constant elsewhere": (external_attribute, "keeps 'inside' in another file, which darktrt does not read"),
    "an operator of others": (foreign_function, "is a damaged ONNX file ('odd' is an operator of others)"),
    "a node of another version": (
        lambda model: add(model, helper.make_node("SoftPlugin", ["images"], ["x"], domain=DOMAIN, name="soft")),
        "node 'soft': darktrt has no op SoftPlugin; it was made by another version of darktrt",
    ),
    "weights of another size": (
        lambda model: next(one for one in model.graph.initializer if len(one.dims) == 4).dims.__setitem__(1, 1),
        "is a damaged ONNX file (cannot reshape array of size",
    ),
    "sparse weights": (
        lambda model: model.graph.sparse_initializer.add(dims=[3]),
        "is a damaged ONNX file (it has sparse weights or training)",
    ),
    "training": (lambda model: model.training_info.add(), "is a damaged ONNX file (it has sparse weights or training)"),
    "a reshape that does not fit": (
        lambda model: model.graph.node[0].output.__setitem__(0, "elsewhere"),
        "is a damaged ONNX file (",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_graph(portable: Path, tmp_path: Path, name: str) -> None:
    change, said = CASES[name]
    assert said in refusal(changed(portable, tmp_path, change))


@pytest.mark.parametrize("name", ["a large tensor", "a loop"])
def test_every_way_to_run_a_model_refuses_it(portable: Path, tmp_path: Path, name: str) -> None:
    change, said = CASES[name]
    path = changed(portable, tmp_path, change)
    for use in (OnnxRunner, load_network, onnx_variant, lambda one: insert_plugins(one, tmp_path / "out.onnx")):
        with pytest.raises(DarktrtError, match=r"bad\.onnx") as caught:
            use(path)
        assert said in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_a_preprocess_node_must_fit_the_network(made: Made, tmp_path: Path) -> None:
    insert_plugins(made.plain, tmp_path / "image.onnx", SurgeryOptions(input="image"))
    said = refusal(changed(tmp_path / "image.onnx", tmp_path, wide_preprocess))
    assert "'preprocess' fits images into (100000, 100000), not into the network's input" in said


def test_a_body_is_what_its_node_says_whatever_the_file_has(portable: Path, tmp_path: Path) -> None:
    """A file of another version of darktrt, or one whose body was made to do harm, runs as this version defines its nodes."""

    def change(model: onnx.ModelProto) -> None:
        for function in model.functions:
            del function.node[:]
            function.node.append(helper.make_node("Identity", [function.input[0]], [function.output[0]]))

    path = changed(portable, tmp_path, change)
    assert load_model(path)[0] == load_model(portable)[0]
    with OnnxRunner(path) as harmed, OnnxRunner(portable) as whole:
        inputs = {"images": batch_of_images(whole.info, 1), **thresholds(0.01)}
        for name, values in whole.run(inputs).items():
            assert np.array_equal(values, harmed.run(inputs)[name])


def test_a_file_for_a_server_shows_its_metadata_and_is_not_run(portable: Path, tmp_path: Path) -> None:
    path = tmp_path / "inlined.onnx"
    path.write_bytes(inline_bodies(load_model(portable)[0]).SerializeToString())
    assert "is a Loop, which only files for a server have" in refusal(path)
    assert load_info(path) == load_model(portable)[1]
    with OnnxRunner(path, trusted=True) as runner, OnnxRunner(portable) as checked:
        assert runner.info == checked.info


# --- costs ---


def test_the_cost_of_a_small_graph(tmp_path: Path) -> None:
    """Weights, the tensors in use at once, and multiply-adds, counted by hand; batch and image size are open."""
    made = make(tmp_path, net(8, 4) + conv(24, activation="linear", normalize=0) + yolo(), batch=(1, 2, 4))
    raw = tmp_path / "raw.onnx"
    insert_plugins(made.plain, raw, SurgeryOptions(head="raw", input="float"))
    cost = cost_of(*load_model(raw))
    assert cost.weights == 4 * (24 * 3 * 9 + 24)
    assert cost.tensors == 4 * (3 * 32 + 24 * 32)
    assert cost.operations == 2 * 24 * 3 * 9 * 32


def test_the_work_of_each_kind_of_node(made: Made) -> None:
    """Two operations a multiply-add, and the numbers that a pool reads."""
    weights = {"conv": (5, 3, 3, 2), "back": (5, 2, 2, 4), "square": (24, 7), "gemm": (7, 3)}
    nodes = [
        helper.make_node("Conv", ["images", "conv"], ["a"]),  # 5 x 6 x 8
        helper.make_node("ConvTranspose", ["a", "back"], ["b"]),  # 2 x 7 x 11
        helper.make_node("MaxPool", ["a"], ["c"], kernel_shape=[2, 3]),  # 5 x 5 x 6
        helper.make_node("Reshape", ["a", "shape"], ["d"]),  # 10 x 24
        helper.make_node("MatMul", ["d", "square"], ["e"]),  # 10 x 7
        helper.make_node("Gemm", ["e", "gemm"], ["f"]),  # 10 x 3
        helper.make_node("Relu", ["f"], ["g"]),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 9])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("b", "c", "g")]
    constants = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()]
    constants.append(numpy_helper.from_array(np.array([10, 24], np.int64), "shape"))
    model = helper.make_model(helper.make_graph(nodes, "net", inputs, outputs, constants))
    cost = cost_of(model, made.info)
    convolutions = 2 * (5 * 6 * 8) * (3 * 3 * 2) + 2 * (2 * 7 * 11) * (2 * 2 * 4)
    assert cost.operations == convolutions + (5 * 5 * 6) * (2 * 3) + 2 * (10 * 7) * 24 + 2 * (10 * 3) * 10
    assert cost.weights == 4 * (5 * 3 * 3 * 2 + 5 * 2 * 2 * 4 + 24 * 7 + 7 * 3) + 8 * 2


def test_a_model_for_images_of_any_size_costs_what_its_largest_image_costs(made: Made, tmp_path: Path) -> None:
    costs = []
    for largest in ((64, 64), (4096, 4096)):
        path = tmp_path / "image.onnx"
        insert_plugins(made.plain, path, SurgeryOptions(input="image", image_sizes=((32, 32), (64, 64), largest)))
        costs.append(cost_of(*load_model(path)).tensors)
    assert costs[1] == 4096 * 4096 * 3 * 5 + 8  # bytes, levels as floats, and the thresholds
    assert costs[0] < costs[1] / 5


def test_a_batch_on_the_cpu_is_as_large_as_its_memory(portable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, info = load_model(portable)
    cost = cost_of(model, info)
    monkeypatch.setattr(onnx_cost, "MOST_BATCH_BYTES", memory.network_bytes(cost.weights, 0) + 5 * cost.tensors)
    monkeypatch.setattr(onnx_cost, "_machine_bytes", lambda: 16 * cost.tensors)
    assert limit_batch(model, replace(info, batch=(1, 2, 3)), "x").batch == (1, 2, 3)
    assert limit_batch(model, replace(info, batch=(1, 5, 5)), "x").batch == (1, 5, 5)
    assert limit_batch(model, replace(info, batch=(1, 8, 9)), "x").batch == (1, 5, 5)
    assert limit_batch(model, replace(info, batch=(7, 8, 9)), "x").batch == (7, 7, 7)  # it can run no fewer
    with pytest.raises(DarktrtError, match=r"x: a batch of 9 images takes .* make the model for smaller batches") as caught:
        limit_batch(model, replace(info, batch=(9, 9, 9)), "x")
    assert caught.value.argument == "batch"


def test_a_network_may_take_what_the_limits_state(portable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a batch half of the machine's memory."""
    model, info = load_model(portable)
    cost = cost_of(model, info)
    needed = memory.network_bytes(cost.weights, cost.tensors)
    for name, most in (("MOST_NETWORK_BYTES", needed), ("MOST_OPERATIONS", cost.operations)):
        with monkeypatch.context() as patch:
            patch.setattr(onnx_cost, name, most)
            load_model(portable)
            patch.setattr(onnx_cost, name, most - 1)
            assert "for an image, more than" in refusal(portable)
    batch = memory.network_bytes(cost.weights, 0) + 9 * cost.tensors
    monkeypatch.setattr(onnx_cost, "MOST_BATCH_BYTES", 1)
    for machine, runs in ((2 * batch, True), (2 * batch - 1, False)):
        monkeypatch.setattr(onnx_cost, "_machine_bytes", lambda machine=machine: machine)
        if runs:
            assert limit_batch(model, replace(info, batch=(9, 9, 9)), "x").batch == (9, 9, 9)
        else:
            with pytest.raises(DarktrtError, match="a batch of 9 images takes"):
                limit_batch(model, replace(info, batch=(9, 9, 9)), "x")


def test_a_batch_beyond_memory_is_refused_by_all_that_run_it(portable: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        info = DetectorInfo.from_json({p.key: p.value for p in model.metadata_props}[METADATA_KEY], "x")
        helper.set_model_props(model, {METADATA_KEY: replace(info, batch=(2**62, 2**62, 2**62)).to_json()})
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            if len(value.type.tensor_type.shape.dim) > 1:
                value.type.tensor_type.shape.dim[0].dim_value = 2**62

    path = changed(portable, tmp_path, change)
    for use in (OnnxRunner, load_network, onnx_variant):
        with pytest.raises(DarktrtError, match=r"bad.onnx: a batch of 4611686018427387904 images takes"):
            use(path)


def test_the_memory_of_this_machine() -> None:
    assert 2**28 < onnx_cost._machine_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
