"""Floating-point layers: measured, chosen by their costs, and read by surgery, sensitivity and budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Made, made_image, run
from onnx import numpy_helper
from PIL import Image

from darktrt.calib.file import in_order, read_calibration, write_calibration
from darktrt.calib.fp_layers import Cost, FpLayers, NoiseSums
from darktrt.check.sensitivity import measure_noise, sensitivity
from darktrt.check.simulate import (
    FloatReference,
    OnnxNetwork,
    chosen_fp_layers,
    convolutions,
    load_network,
    operations,
    quantized,
    up_to_boxes,
)
from darktrt.cli import main
from darktrt.files import sha256_of
from darktrt.onnx_file import load_model
from darktrt.parallel import Threads
from darktrt.pipeline import load_calibration
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.detector import fit
from darktrt.vision.images import read_image
from darktrt.vision.sources import find_images

ALWAYS = ("first", "head")


def chosen(*costs: tuple[str, float, float]) -> list[str]:
    layers = FpLayers(ALWAYS, tuple(Cost((name,), noise, operations) for name, noise, operations in costs))
    assert layers.names[:2] == ALWAYS
    return list(layers.names[2:])


def test_thrice_the_share_of_the_operations_is_worth_it() -> None:
    assert chosen(("a", 0.149, 0.05), ("c", 0.01, 0.001), ("d", 0.841, 0.949)) == ["c", "a"]
    assert chosen(("a", 0.03, 0.01), ("b", 0.0284, 0.01), ("c", 0.9416, 0.98)) == ["a"]  # b would fit, but is not worth it


def test_the_noise_counts_that_the_layers_before_have_left() -> None:
    """One layer has nine tenths of all noise; behind it, three times a share of the tenth that is left is enough."""
    assert chosen(("a", 0.9, 0.01), ("b", 0.02, 0.06), ("c", 0.03, 0.09), ("d", 0.05, 0.84)) == ["a", "b"]
    assert chosen(("a", 0.9, 0.01), ("b", 0.0179, 0.06), ("d", 0.0821, 0.93)) == ["a"]


def test_no_more_than_a_tenth_of_the_operations_is_given_up() -> None:
    """Best ratios first; what does not fit makes room for the next that does."""
    assert chosen(("a", 0.4, 0.06), ("b", 0.3, 0.05), ("c", 0.1, 0.04), ("d", 0.2, 0.85)) == ["a", "c"]
    assert chosen(("a", 0.9, 0.11), ("b", 0.1, 0.89)) == []


def test_noise_without_operations_comes_first() -> None:
    assert chosen(("a", 0.9, 0.1), ("b", 0.0001, 0.0), ("c", 0.0999, 0.9)) == ["b", "a"]


def test_no_layer_is_chosen_where_nothing_is_lost() -> None:
    assert chosen(("a", 0.0, 0.0), ("b", 0.0, 1.0)) == []


def test_layers_in_words() -> None:
    layers = FpLayers(ALWAYS, (Cost(("a", "b"), 0.25, 0.0512), Cost(("c",), 0.75, 0.9)))
    assert str(layers).splitlines() == [
        "in floating point: first, head (the first convolution and those of the heads)",
        "in floating point: a, b (25.0% of the noise of all others for 5.12% of the operations)",
    ]


def test_costs_follow_from_sums_over_images() -> None:
    """Of each group the mean of two shares, of sum w |s' - s|^2 and of sum w |d|^2, both over sum w; no scores, no noise."""
    sums = {
        "x": np.array([[3.0, 4, 9, 9, 1], [1, 8, 9, 9, 5], [0, 0, 9, 9, 7]]),
        "y": np.array([[3.0, 8, 9, 9, 2], [1, 8, 9, 9, 7], [0, 0, 9, 9, 7]]),
    }
    layers = NoiseSums(ALWAYS, (("a", "b"), ("c",), ("d",)), (0.5, 0.25, 0.25), sums).fp_layers()
    assert layers == FpLayers(ALWAYS, (Cost(("a", "b"), 0.525, 0.5), Cost(("c",), 0.475, 0.25), Cost(("d",), 0.0, 0.25)))
    silent = NoiseSums(ALWAYS, (("a",),), (1.0,), {"x": np.zeros((1, 5))}).fp_layers()
    assert silent.costs == (Cost(("a",), 0.0, 1.0),)


@pytest.mark.parametrize("values", [{"nodes": ()}, {"noise": 1.5}, {"noise": -0.5}, {"operations": 1.5}, {"operations": -0.5}])
def test_what_is_no_cost_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"has no nodes|is no share"):
        replace(Cost(("a",), 0.25, 0.05), **values)  # type: ignore[arg-type]


# --- the measurement ---


@pytest.fixture(scope="module")
def files(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made network after surgery, images, and a calibration's files."""
    folder = tmp_path_factory.mktemp("fp_layers")
    for head in ("nms", "raw"):
        insert_plugins(made.plain, folder / f"{head}.onnx", SurgeryOptions(head=head))  # type: ignore[arg-type]
    (folder / "photos").mkdir()
    for i in range(4):
        Image.fromarray(made_image(64, 96, seed=i)).save(folder / f"photos/{i}.png")
    assert main(["calib", "run", str(folder / "nms.onnx"), str(folder / "photos"), "-o", str(folder / "my.calib")]) == 0
    return folder


def test_shares_of_operations_are_those_of_the_shapes(files: Path, made: Made) -> None:
    """By hand: weights times positions of the output, whose sizes follow from the network's metadata and strides."""
    result = operations(load_network(files / "nms.onnx"))
    model = made.model()
    weights = {i.name: numpy_helper.to_array(i).size for i in model.graph.initializer}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    section_output = {f"/layers.{layer.index}/Conv": layer.tensor for layer in made.info.layers}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    counts = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and section_output[node.name] in shapes:
            counts[node.name] = weights[node.input[1]] * int(np.prod(shapes[section_output[node.name]][2:]))
    assert len(counts) >= 4
    assert sum(result.values()) == pytest.approx(1)
    first = next(iter(counts))
    for name, count in counts.items():
        assert result[name] / result[first] == pytest.approx(count / counts[first])


def images(files: Path, count: int) -> dict[str, Path]:
    return {sha256_of(path): path for path in find_images([str(files / "photos")], count, 0)}


def noise_of(
    network: OnnxNetwork, calibration: Calibration, group: Sequence[str], paths: Iterable[Path]
) -> tuple[float, float]:
    """How quantizing a group of convolutions changes scores and boxes, from the network with Q/DQ nodes, image by image."""
    cut = up_to_boxes(network)
    changed = quantized(cut, calibration, [one.node for one in convolutions(cut) if one.node not in group])
    scores = boxes = weights = 0.0
    for path in paths:
        image = fit(read_image(path), cut.info)[0][np.newaxis]
        exact, moved = run(cut.model, {"images": image}), run(changed, {"images": image})
        weight = exact["scores"][0].max(1).astype(np.float64)
        size = np.tile(exact["boxes"][0, :, 2:] - exact["boxes"][0, :, :2], 2)
        edges = np.minimum(np.abs(moved["boxes"][0] - exact["boxes"][0]) / size, 1)
        scores += (weight * np.square(moved["scores"][0] - exact["scores"][0]).sum(1)).sum()
        boxes += (weight * np.square(edges).sum(1)).sum()
        weights += weight.sum()
    return scores / weights, boxes / weights


def test_variants_in_one_graph_are_the_networks_that_they_stand_for(files: Path) -> None:
    """Groups of one and of several convolutions, those behind one another among them, all of them, and none."""
    calibration = Calibration(load_calibration(files / "my.calib").scales)
    network = load_network(files / "nms.onnx")
    every = [one.node for one in convolutions(network)]
    groups = [[every[0]], [every[2], every[3]], every[1::2], [every[-1]], every, []]
    paths = list(images(files, 2).values())
    sums = FloatReference(network, paths).sums(calibration, groups).sum(0)
    for group, (scores, weight, _, _, boxes) in zip(groups, sums.tolist(), strict=True):
        assert (scores / weight, boxes / weight) == pytest.approx(noise_of(network, calibration, group, paths), rel=1e-4)


def test_each_convolution_is_measured_by_itself(files: Path) -> None:
    calibration = Calibration(load_calibration(files / "my.calib").scales)
    result = measure_noise(files / "nms.onnx", images(files, 2), calibration).fp_layers()
    network = load_network(files / "nms.onnx")
    assert list(result.always) == chosen_fp_layers(network)
    others = [one.node for one in convolutions(network) if one.node not in result.always]
    assert [cost.nodes for cost in result.costs] == [(name,) for name in others]
    noise = {name: noise_of(network, calibration, [name], images(files, 2).values()) for name in others}
    scores, boxes = (sum(noise[name][i] for name in others) for i in range(2))
    assert [cost.noise for cost in result.costs] == pytest.approx(
        [(noise[name][0] / scores + noise[name][1] / boxes) / 2 for name in others], rel=1e-4
    )


def test_the_noise_of_an_image_depends_on_no_other_image_and_no_thread(files: Path) -> None:
    calibration = load_calibration(files / "my.calib")
    whole = measure_noise(files / "nms.onnx", images(files, 4), calibration)
    for digest, path in images(files, 4).items():
        alone = measure_noise(files / "nms.onnx", {digest: path}, calibration, Threads(1))
        assert alone.images[digest].tolist() == whole.images[digest].tolist()
    stored = read_calibration(files / "my.calib")
    assert [stored.noise_images[digest].tolist() for digest in stored.noise_sample] == [
        whole.images[digest].tolist() for digest in in_order(stored.histograms.images)
    ]


def test_a_deep_network_is_measured_in_groups_of_neighbours(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darktrt.check.sensitivity.MOST_GROUPS", 3)
    calibration = Calibration(load_calibration(files / "my.calib").scales)
    result = measure_noise(files / "nms.onnx", images(files, 1), calibration).fp_layers()
    network = load_network(files / "nms.onnx")
    others = [one.node for one in convolutions(network) if one.node not in result.always]
    assert len(result.costs) == 3
    assert [name for cost in result.costs for name in cost.nodes] == others
    assert sum(cost.noise for cost in result.costs) == pytest.approx(1)


# --- its readers ---


def test_surgery_uses_it_unless_layers_are_named(
    files: Path, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = tmp_path / "a.calib"
    calibration.write_bytes((files / "my.calib").read_bytes())
    names = [one.node for one in convolutions(load_network(files / "nms.onnx"))]
    one = names[len(names) // 2]

    def in_floating_point(*options: str) -> str:
        words = ["surgery", str(made.plain), "-o", str(tmp_path / "q.onnx"), "--qdq", "--calibration", str(calibration)]
        assert main([*words, *options]) == 0
        return capsys.readouterr().out.strip().rpartition(": ")[2]

    usual = in_floating_point()
    contents = read_calibration(calibration)
    noise = NoiseSums((), ((one,),), (0.05,), {digest: sums[:1] for digest, sums in contents.noise_images.items()})
    write_calibration(replace(contents, noise=noise), calibration)
    assert in_floating_point() == one != usual
    assert in_floating_point("--fp-layers", names[0]) == names[0]
    assert in_floating_point("--fp-layers", "") == "none"


def test_no_layers_are_named_where_nothing_was_measured(files: Path, tmp_path: Path) -> None:
    for name, *options in (("nms", "--fp-layer-images", "0"), ("raw",)):
        path = tmp_path / f"{name}.calib"
        assert main(["calib", "run", str(files / f"{name}.onnx"), str(files / "photos"), "-o", str(path), *options]) == 0
        assert load_calibration(path).fp_layers is None
        assert read_calibration(path).is_measured
    assert load_model(files / "raw.onnx")[1].head == "raw"


def test_ranking_and_budget_start_from_the_layers(files: Path) -> None:
    network = load_network(files / "nms.onnx")
    names = [one.node for one in convolutions(network)]
    calibration = Calibration(load_calibration(files / "my.calib").scales, (names[2],))
    assert chosen_fp_layers(network, calibration) == [names[2]]
    assert chosen_fp_layers(network) == chosen_fp_layers(network, Calibration(calibration.scales)) != [names[2]]
    ranked = sensitivity(files / "nms.onnx", [str(files / "photos")], calibration, 1)
    assert [layer.convolution.node for layer in ranked.layers if layer.in_fp] == [names[2]]
