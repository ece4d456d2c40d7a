"""Every layer against loops in double written from darknet's documented behaviour, as torch module and as ONNX."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import (
    EXPORT_TOLERANCE,
    LAYER_TOLERANCE,
    MADE_CFG,
    Array,
    Made,
    as_float,
    batch_of_images,
    conv,
    deep_cfg,
    gaussian,
    head,
    made_image,
    net,
    region,
    relative_error,
    run,
    section,
    with_outputs,
    yolo,
)
from micro import (
    NORMALIZING,
    OF_ACTIVATIONS,
    OF_CHANNELS,
    OF_LAYERS,
    OF_ODD_SIZES,
    SCALAR,
    WITH_ACTIVATIONS,
    Case,
    activate,
    case_of,
)

from darktrt.convert.cfg import Implicit, Network, Yolo, read_cfg
from darktrt.convert.export import convert_darknet
from darktrt.convert.layers import ACTIVATIONS, Convolution
from darktrt.convert.model import Darknet, _noise, _shrunk, load_darknet, random_weights
from darktrt.convert.weights import initial_weights
from darktrt.errors import DarktrtError

POINTS = [-1e4, -700, -104, -88.8, -50, -20.1, -19.9, -6.5, -4.1, -3.9, -2.1, -1.9, -1, -0.3, -1e-3, 0, 1e-3, 0.7, 1.1, 2.5]
POINTS += [3.5, 4.1, 5.9, 6.1, 19.9, 20.1, 60, 89, 700, 1e4]


@pytest.mark.parametrize("name", SCALAR)
def test_an_activation_is_darknets_at_every_size_of_number(name: str) -> None:
    points = np.array(POINTS, np.float32)
    found = ACTIVATIONS[name](torch.from_numpy(points)).numpy()
    np.testing.assert_allclose(found, activate(name, points.astype(np.float64)), rtol=2e-5, atol=1e-6)


def test_every_activation_has_a_reference() -> None:
    assert set(ACTIVATIONS) == {*SCALAR, *NORMALIZING}


def torch_outputs(case: Case) -> tuple[list[Array], Array, Array]:
    model = load_darknet(case.cfg, case.weights)
    with torch.inference_mode():
        image = torch.from_numpy(case.image)
        layers = model.run(image, set(range(len(model.layers))))
        boxes, scores = model(image)
    return [layers[i].numpy() for i in range(len(model.layers))], boxes.numpy(), scores.numpy()


def onnx_outputs(case: Case) -> tuple[dict[int, Array], Array, Array]:
    """Of the layers by their tensor in the exported file."""
    file = case.cfg.with_suffix(".onnx")
    info = convert_darknet(case.cfg, case.weights, file)
    model = onnx.load(str(file))
    names = {layer.index: layer.tensor for layer in info.layers if layer.tensor != "layer-1" and layer.kind != "implicit"}
    outputs = run(with_outputs(model, dict.fromkeys(names.values())), {"images": case.image})
    return {i: outputs[name] for i, name in names.items()}, outputs["boxes"], outputs["scores"]


def check(case: Case, decoded: bool = True) -> None:
    """Torch and ONNX against the loops, layer by layer, then the decoded boxes and scores; ONNX against torch."""
    layers, boxes, scores = torch_outputs(case)
    exported, exported_boxes, exported_scores = onnx_outputs(case)
    for i, expected in enumerate(case.loops.outputs):
        if i in case_heads(case):
            continue
        assert layers[i].shape == (1, *expected.shape)
        if isinstance(read_cfg(case.cfg).layers[i], Implicit):
            continue  # the file has them as a constant
        assert exported[i].shape == (1, *expected.shape)
        assert relative_error(layers[i][0], expected) <= LAYER_TOLERANCE, f"layer {i} in torch"
        assert relative_error(exported[i][0], expected) <= LAYER_TOLERANCE, f"layer {i} in ONNX Runtime"
        assert relative_error(exported[i], layers[i]) <= EXPORT_TOLERANCE, f"layer {i}, ONNX Runtime against torch"
    for found in (boxes, exported_boxes) if decoded else ():
        assert relative_error(found[0], np.array(case.loops.boxes)) <= LAYER_TOLERANCE
    for found in (scores, exported_scores) if decoded else ():
        assert relative_error(found[0], np.array(case.loops.scores)) <= LAYER_TOLERANCE


def case_heads(case: Case) -> set[int]:
    return {layer.index for layer in read_cfg(case.cfg).layers if isinstance(layer, Yolo)}


@pytest.mark.parametrize("name", OF_LAYERS)
def test_layers_equal_the_loops(tmp_path: Path, name: str) -> None:
    check(case_of(tmp_path, OF_LAYERS[name]))


@pytest.mark.parametrize("name", OF_ODD_SIZES)
def test_pools_of_odd_sizes_equal_the_loops(tmp_path: Path, name: str) -> None:
    check(case_of(tmp_path, OF_ODD_SIZES[name]))


@pytest.mark.parametrize("name", OF_ACTIVATIONS)
def test_activations_equal_the_loops(tmp_path: Path, name: str) -> None:
    case = case_of(tmp_path, OF_ACTIVATIONS[name])
    assert np.ptp(case.loops.outputs[0]) > 0.5
    check(case, decoded=name == "normalize_channels_softmax")


@pytest.mark.parametrize("name", WITH_ACTIVATIONS)
def test_every_layer_with_an_activation_takes_every_activation(tmp_path: Path, name: str) -> None:
    check(case_of(tmp_path, WITH_ACTIVATIONS[name]))


@pytest.mark.parametrize("name", OF_CHANNELS)
def test_other_channel_counts(tmp_path: Path, name: str) -> None:
    check(case_of(tmp_path, OF_CHANNELS[name]))


# --- the module ---


def test_images_of_a_batch_do_not_meet(made: Made) -> None:
    model = load_darknet(made.cfg, made.weights)
    images = torch.from_numpy(as_float(batch_of_images(made.info, 3)))
    with torch.inference_mode():
        together = [output.numpy() for output in model(images)]
        alone = [[output.numpy() for output in model(image[None])] for image in images]
    for i, outputs in enumerate(alone):
        for found, expected in zip(together, outputs, strict=True):
            assert relative_error(found[i], expected[0]) <= EXPORT_TOLERANCE
    assert not np.allclose(together[0][0], together[0][1], atol=1e-2)


def test_another_size_takes_the_same_weights(made: Made) -> None:
    model = load_darknet(made.cfg, made.weights, size=(64, 128))
    with torch.inference_mode():
        boxes, scores = model(torch.zeros(1, 3, 128, 64))
    anchors = 3 * (4 * 8 + 8 * 16)
    assert boxes.shape == (1, anchors, 4)
    assert scores.shape == (1, anchors, 3)


def test_heads_with_different_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text(net() + conv(8) + head(2) + section("route", layers=0) + head(3))
    with pytest.raises(DarktrtError, match=r"a\.cfg:\d+: \[yolo\] heads have different class counts \[2, 3\]"):
        Darknet(read_cfg(tmp_path / "a.cfg"))


# --- random weights ---


def network_of(folder: Path, text: str) -> Network:
    (folder / "net.cfg").write_text(text)
    return read_cfg(folder / "net.cfg")


def flat(network: Network, seed: int) -> bytes:
    return b"".join(array.tobytes() for values in random_weights(network, seed) for array in values.values())


def test_one_seed_gives_the_same_bits_and_another_others(tmp_path: Path) -> None:
    network = network_of(tmp_path, MADE_CFG)
    assert flat(network, 5) == flat(network, 5)
    assert flat(network, 5) != flat(network, 6)


def test_random_weights_do_not_depend_on_the_size_of_the_input(tmp_path: Path) -> None:
    """They are fitted on four cells of the coarsest head, and 64 pixels at least."""
    network = network_of(tmp_path, net(416, 416) + "".join(conv(4, stride=2) for _ in range(5)) + head())
    assert flat(network, 0) == flat(network.resized(608, 160), 0) == flat(network.resized(128, 128), 0)
    assert flat(network, 0) != flat(network.resized(96, 128), 0)
    for stride, side in ((1, 64), (8, 64), (16, 64), (32, 128)):
        for size in ((640, 320), (side, side)):
            one = network_of(tmp_path, net(*size) + conv(4, stride=stride) + head())
            assert (_shrunk(one).width, _shrunk(one).height) == (side, side)
    unpadded = section("convolutional", filters=4, size=7, activation="leaky") + section("reorg3d", stride=4)
    whole = network_of(tmp_path, net(102, 102) + unpadded + head())
    assert _shrunk(whole) is whole


def test_objectness_of_random_weights_is_lowered(tmp_path: Path) -> None:
    body = conv(8, stride=2) + head(3) + section("route", layers=0) + head(3, "3,4") + section("route", layers=0)
    network = network_of(tmp_path, net() + body + region(3) + section("route", layers=0) + gaussian(3))
    fitted, drawn = random_weights(network, 2), list(initial_weights(network, 2))
    for index, objectness, channels in ((1, 4, 8), (4, 4, 8), (7, 4, 8), (10, 8, 12)):
        lowered = drawn[index]["bias"] - fitted[index]["bias"]
        expected = np.zeros(len(lowered))
        expected[objectness::channels] = 3
        np.testing.assert_allclose(lowered, expected, atol=1e-6)
    np.testing.assert_array_equal(fitted[0]["bias"], drawn[0]["bias"])


def spreads(network: Network, seed: int) -> dict[str, list[float]]:
    """Root mean square of each layer's output by the image shown: noise, and one with shades and rectangles."""
    model = Darknet(network).eval()
    model.load(random_weights(network, seed))
    shape = network.channels, network.height, network.width
    noise = np.random.default_rng(1).uniform(0, 1, shape).astype(np.float32)
    drawn = made_image(network.height, network.width)[:, :, : network.channels].transpose(2, 0, 1) / np.float32(255)
    found = {}
    for name, image in (("noise", noise), ("drawn", drawn)):
        squares: list[float] = []
        with torch.inference_mode():
            model.run(
                torch.from_numpy(np.ascontiguousarray(image))[None],
                set(),
                lambda _, inputs, squares=squares: squares.extend(float(x.square().mean().sqrt()) for x in inputs),
            )
        found[name] = squares[1:]
    return found


def assert_alive(network: Network) -> None:
    for name, squares in spreads(network, 0).items():
        assert all(math.isfinite(value) for value in squares), name
        assert 0.02 < min(squares), name
        assert max(squares) < 50, name


def test_activations_neither_die_nor_explode_in_a_deep_mish_network(tmp_path: Path) -> None:
    assert_alive(network_of(tmp_path, deep_cfg(40)))


@pytest.mark.parametrize("activation", ["leaky", "relu", "swish", "logistic", "linear"])
def test_activations_live_with_every_usual_activation(tmp_path: Path, activation: str) -> None:
    text = net() + "".join(conv(12, activation=activation, normalize=i % 2) for i in range(30)) + head()
    assert_alive(network_of(tmp_path, text))


def test_activations_live_in_a_network_of_one_cell_and_one_channel(tmp_path: Path) -> None:
    assert_alive(network_of(tmp_path, net(32, 32, 1) + "".join(conv(8, stride=2) for _ in range(5)) + head(1)))


def test_few_objects_are_seen_with_random_weights(made: Made) -> None:
    found = run(made.plain, {"images": as_float(batch_of_images(made.info, 3))})["scores"]
    assert found.max() > 0.02
    assert (found > 0.25).mean() < 0.02


def test_random_weights_are_finite_where_a_layer_sees_only_zeros(tmp_path: Path) -> None:
    zeros = section("upsample", stride=1, scale=0)
    network = network_of(tmp_path, net(32, 32) + conv(8) + zeros + conv(8, normalize=0) + conv(8) + head())
    for values in random_weights(network, 0):
        assert all(np.isfinite(array).all() for array in values.values())
        assert (values.get("variance", np.ones(1)) > 0).all()


@pytest.mark.parametrize("normalize", [0, 1])
def test_random_weights_make_the_mean_square_of_each_filter_one(tmp_path: Path, normalize: int) -> None:
    """Over the images of the fit; half of it where a filter answers so weakly that it is not trusted."""
    network = network_of(tmp_path, net() + conv(16) + conv(64, stride=2, normalize=normalize) + conv(8) + head())
    weights = random_weights(network, 3)
    model = Darknet(network).eval()
    model.load(weights)
    seen: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        model.run(_noise(network, 3), set(), lambda layer, inputs: seen.setdefault(layer.index, inputs[0]))
        convolution = model.layers[1]
        assert isinstance(convolution, Convolution)
        values = weights[1]
        plain = {"weight": values["weight"], "bias": np.zeros(64, np.float32)}
        convolution.load(plain)
        square = convolution.convolve(seen[1]).square().mean((0, 2, 3)).numpy()
    square = square / values["variance"] if normalize else square
    assert square.max() == pytest.approx(1, rel=1e-4)
    assert (np.abs(square - 1) < 1e-4).sum() > 20


def test_the_images_of_the_fit_are_smooth_and_white(tmp_path: Path) -> None:
    network = network_of(tmp_path, net(48, 40, 2) + conv(8, stride=8) + head())
    images = _noise(network, 1)
    assert images.shape == (8, 2, 40, 48)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, _noise(network, 1)) and not torch.equal(images, _noise(network, 2))
    steps = (images[..., 1:] - images[..., :-1]).square().mean((1, 2, 3)) / images.var((1, 2, 3))
    assert steps[:4].max() < 0.8 * steps[4:].min()
    assert steps[4:].min() > 1.7  # neighbours of white noise have nothing in common
    for i in range(8):
        assert (images[i, 0] - images[i, 1]).abs().mean() > 0.01, "two channels are the same"


def test_no_variance_is_far_below_those_of_a_layers_other_filters(tmp_path: Path) -> None:
    """A filter that hardly answers to the noise of the fit may answer to images, and would explode."""
    network = network_of(tmp_path, net(32, 32, 1) + conv(64, 1) + head())
    variance = random_weights(network, 0)[0]["variance"]
    assert variance.min() >= variance.mean() / 3
    assert (variance == variance.min()).sum() > 10


def test_random_weights_of_a_made_head_alone(tmp_path: Path) -> None:
    network = network_of(tmp_path, net(32, 32) + section("convolutional", filters=24, size=1) + yolo())
    assert len(random_weights(network, 0)[0]["bias"]) == 24
