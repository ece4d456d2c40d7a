"""Shapes, costs and misfits of networks; sizes and batches as written on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import MADE_CFG, conv, head, net, section, yolo

from darktrt.cli.groups import parse_batch, parse_size
from darktrt.convert import shapes
from darktrt.convert.cfg import Network, read_cfg
from darktrt.convert.shapes import Shape, gflops, infer_shapes, weight_arrays
from darktrt.convert.weights import parameter_count
from darktrt.errors import DarktrtError


def network_of(folder: Path, text: str) -> Network:
    (folder / "net.cfg").write_text(text)
    return read_cfg(folder / "net.cfg")


def shapes_of(folder: Path, text: str) -> list[str]:
    return [str(shape) for shape in infer_shapes(network_of(folder, text))]


def test_shapes_of_the_made_network(tmp_path: Path) -> None:
    assert shapes_of(tmp_path, MADE_CFG) == [
        *("8 x 32 x 48", "16 x 16 x 24", "8 x 16 x 24", "8 x 16 x 24", "8 x 16 x 24", "24 x 16 x 24", "24 x 8 x 12"),
        *("24 x 8 x 12", "24 x 8 x 12", "48 x 8 x 12", "32 x 4 x 6", "24 x 4 x 6", "24 x 4 x 6", "32 x 4 x 6"),
        *("16 x 4 x 6", "16 x 8 x 12", "40 x 8 x 12", "16 x 8 x 12", "24 x 8 x 12", "24 x 8 x 12"),
    ]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (conv(4, 3, 2), "4 x 5 x 7"),
        (conv(4, 2), "4 x 10 x 14"),
        (conv(4, 1, 3), "4 x 3 x 5"),
        (conv(4, 3, dilation=2), "4 x 9 x 13"),
        (section("convolutional", filters=4, size=3), "4 x 7 x 11"),
        (section("convolutional", filters=4, size=3, padding=2, stride_y=2), "4 x 6 x 15"),
        (section("maxpool", size=2, stride=2), "3 x 5 x 7"),
        (section("maxpool", size=2, stride=1), "3 x 9 x 13"),
        (section("maxpool", size=3, stride=2, padding=0), "3 x 4 x 6"),
        (section("maxpool", size=13, stride=1), "3 x 9 x 13"),
        (section("local_avgpool", size=2, stride_x=2), "3 x 9 x 7"),
        (section("avgpool"), "3 x 1 x 1"),
        (section("upsample", stride=3), "3 x 27 x 39"),
        (section("dropout"), "3 x 9 x 13"),
        (section("batchnorm"), "3 x 9 x 13"),
        (section("activation"), "3 x 9 x 13"),
        (conv(4, 3, 2, antialiasing=1), "4 x 5 x 7"),
        (conv(4, 3, 2, antialiasing=2), "4 x 4 x 6"),
        (section("maxpool", size=2, stride=2, antialiasing=1), "3 x 5 x 7"),
        (section("maxpool", size=3, stride=2, antialiasing=2), "3 x 4 x 6"),
        (section("maxpool", size=2, stride=2, maxpool_depth=1, out_channels=2), "2 x 9 x 13"),
    ],
)
def test_a_layer_on_9_rows_and_13_columns(tmp_path: Path, text: str, shape: str) -> None:
    assert shapes_of(tmp_path, net(13, 9) + text + head())[0] == shape


@pytest.mark.parametrize(
    ("text", "numbers", "said"),
    [
        (
            net(8, 4, 30) + head(),
            30 * 8 * 4,
            "net.cfg: an input of 30 x 4 x 8 is more than 2 GiB; is a number in [net] mistyped?",
        ),
        (net(8, 4) + head(), 24 * 8 * 4, "would output 24 x 4 x 8, more than 2 GiB for one image; is a number here mistyped?"),
        (net(8, 4) + conv(10, 9) + head(), 10 * 3 * 9 * 9, "with 10 filters of size 9 has 2 GiB of weights; is a number"),
        (net(8, 4) + conv(12, 9, groups=3) + head(), 12 * 1 * 9 * 9, "with 12 filters of size 9 has 2 GiB of weights"),
        (
            net(8, 4) + conv(12, 3, 2, antialiasing=1) + head(),
            12 * 8 * 4,
            "would blur 12 x 4 x 8, more than 2 GiB for one image; is a number here mistyped?",
        ),
        (
            net(8, 4) + section("maxpool", size=13, stride=1) + head(),
            3 * 20 * 16,
            "of size 13 pads 3 x 4 x 8 to more than 2 GiB",
        ),
    ],
)
def test_the_largest_tensor_is_accepted_and_a_larger_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, numbers: int, said: str
) -> None:
    assert shapes.LARGEST * 4 == 2 << 30
    monkeypatch.setattr(shapes, "LARGEST", numbers)
    assert shapes_of(tmp_path, text)
    monkeypatch.setattr(shapes, "LARGEST", numbers - 1)
    with pytest.raises(DarktrtError) as caught:
        shapes_of(tmp_path, text)
    assert said in str(caught.value)


def test_reorganizations(tmp_path: Path) -> None:
    text = net(8, 4) + conv(8) + section("reorg", stride=2) + section("reorg", stride=2, reverse=1)
    text += section("reorg3d", stride=2) + section("reorg3d", stride=4, reverse=1)
    assert shapes_of(tmp_path, text + head())[1:5] == ["32 x 2 x 4", "8 x 4 x 8", "32 x 2 x 4", "2 x 8 x 16"]


MISFITS = [
    (conv(6) + conv(4, groups=4), "[convolutional] 'groups=4' divides not both its 6 input channels and 4 filters"),
    (conv(8) + conv(6, groups=4), "'groups=4' divides not both its 8 input channels and 6 filters"),
    (
        conv(4) + conv(4, stride=2) + section("route", layers="0,1"),
        "[route] joins layers of different sizes (layer 0: 64x64, layer 1: 32x32)",
    ),
    (conv(6) + section("route", layers=0, groups=4), "[route] cannot cut 6 channels into 'groups=4'"),
    (
        conv(4, stride=2) + section("upsample", stride=2) + section("shortcut", **{"from": 0}),
        "[shortcut] adds layers of different sizes (layer 1: 64x64, layer 0: 32x32)",
    ),
    (
        conv(4) + conv(4, stride_x=2) + section("shortcut", **{"from": 0}),
        "[shortcut] adds layers of different sizes (layer 1: 32x64, layer 0: 64x64)",
    ),
    (
        conv(4) + conv(4, stride=3) + section("shortcut", **{"from": 0}),
        "[shortcut] adds layers of different sizes (layer 1: 22x22, layer 0: 64x64)",
    ),
    (
        conv(4) + conv(4, stride=2) + conv(4) + section("shortcut", **{"from": "0,1"}),
        "[shortcut] adds layers of different sizes (layer 2: 32x32, layer 0: 64x64, layer 1: 32x32)",
    ),
    (
        conv(4)
        + conv(4, stride=2)
        + section("shortcut", **{"from": 0, "weights_type": "per_feature", "weights_normalization": "relu"}),
        "[shortcut] adds layers of different sizes (layer 1: 32x32, layer 0: 64x64)",
    ),
    (
        conv(4) + conv(6) + section("sam", **{"from": 0}),
        "[sam] multiplies 6 x 64 x 64 by 4 x 64 x 64; both must have one shape",
    ),
    (
        conv(4) + conv(4) + section("scale_channels", **{"from": 0}),
        "[scale_channels] scales 4 x 64 x 64 by 4 x 64 x 64; it needs factors of 4 x 1 x 1",
    ),
    (conv(4) + conv(2) + section("scale_channels", **{"from": 0, "scale_wh": 1}), "it needs factors of 1 x 64 x 64"),
    (conv(6) + section("reorg", stride=2), "[reorg] needs channels that 4 divides, not 6"),
    (conv(4) + section("reorg3d", stride=5), "[reorg3d] needs rows and columns that 5 divides, not 4 x 64 x 64"),
    (section("convolutional", size=65), "[convolutional] would output 1 x 0 x 0; is the size 64x64 too small?"),
    (section("maxpool", size=70, stride=1, padding=1), "[maxpool] would output 3 x -4 x -4"),
    (conv(500_000), "[convolutional] would output 500000 x 64 x 64, more than 2 GiB for one image"),
    (conv(4, 99_999), "[convolutional] with 4 filters of size 99999 has 2 GiB of weights; is a number mistyped?"),
    (section("maxpool", size=99_999), "[maxpool] of size 99999 pads 3 x 64 x 64 to more than 2 GiB"),
    (
        conv(4) + conv(6, share_index=0),
        "[convolutional] has 6 filters of 4 channels, size 3, groups 1, but layer 0, whose weights",
    ),
    (
        conv(4) + conv(4) + conv(4, 1, share_index=1),
        "has 4 filters of 4 channels, size 1, groups 1, but layer 1, whose weights",
    ),
    (section("maxpool", size=2) + conv(4, share_index=0), "shares the weights of layer 0, a [maxpool]; they must be a"),
    (
        section("softmax") + conv(4),
        "reads layer 0, a [softmax], whose output is no image in darknet; put a [route] to an earlier",
    ),
    (
        section("implicit", filters=3) + conv(4),
        "reads layer 0, an [implicit], which only a [scale_channels] behind it may read",
    ),
    (
        conv(4) + section("implicit", filters=4) + section("route", layers=0) + section("scale_channels", **{"from": 1}),
        "reads layer 1, an [implicit], which only a [scale_channels]",
    ),
    (
        section("implicit", filters=4) + section("scale_channels", **{"from": 0}),
        "reads layer 0, an [implicit], which only a [scale_channels]",
    ),
    (
        conv(4) + section("implicit", filters=3) + section("scale_channels", **{"from": 0}),
        "scales 4 x 64 x 64 by 3 x 1 x 1; it needs factors of 4 x 1 x 1",
    ),
    (section("maxpool", size=2, maxpool_depth=1, out_channels=4), "pools 3 channels to 'out_channels=4'"),
    (section("upsample", stride=-3), "[upsample] with 'stride=-3' needs rows and columns that 3 divides, not 3 x 64 x 64"),
    (section("upsample", stride=9_999), "[upsample] would output 3 x 639936 x 639936, more than 2 GiB for one image"),
]


@pytest.mark.parametrize(("text", "message"), MISFITS)
def test_layers_that_do_not_fit_are_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    cfg = net() + text
    line = 1 + cfg[: cfg.rindex("[")].count("\n")
    with pytest.raises(DarktrtError) as caught:
        shapes_of(tmp_path, cfg + head())
    assert f"net.cfg:{line}: [" in str(caught.value)
    assert message in str(caught.value)


def test_a_head_needs_its_channels(tmp_path: Path) -> None:
    message = r"\[yolo\] reads 27 channels, but 3 anchors x \(5 \+ 3 classes\) need 24; set 'filters' of the \[convolutional\]"
    with pytest.raises(DarktrtError, match=message):
        shapes_of(tmp_path, net() + conv(27, 1) + yolo(3))


def test_nothing_reads_a_head(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"net\.cfg:\d+: \[convolutional\] reads layer 2, a \[yolo\] head; put a \[route\]"):
        shapes_of(tmp_path, net() + conv(4) + head() + conv(4) + head())


def test_weights_in_file_order(tmp_path: Path) -> None:
    text = (
        conv(6, normalize=1)
        + conv(6, groups=3, normalize=0)
        + section("shortcut", **{"from": "-2,-2", "weights_type": "per_channel", "weights_normalization": "relu"})
    )
    network = network_of(tmp_path, net() + text + head())
    shapes = infer_shapes(network)
    arrays = [[(a.role, a.shape) for a in weight_arrays(network, shapes, layer)] for layer in network.layers[:3]]
    assert arrays == [
        [("bias", (6,)), ("scale", (6,)), ("mean", (6,)), ("variance", (6,)), ("weight", (6, 3, 3, 3))],
        [("bias", (6,)), ("weight", (6, 2, 3, 3))],
        [("weight", (3, 6))],
    ]
    assert parameter_count(network) == 24 + 162 + 6 + 108 + 18 + 24 + 24 * 6


def test_weights_of_other_layers_and_of_batchnorm(tmp_path: Path) -> None:
    text = conv(6) + conv(6) + conv(6, share_index=1) + conv(6, normalize=0, share_index=-1) + section("batchnorm")
    network = network_of(tmp_path, net() + text + section("softmax") + section("route", layers=4) + head())
    shapes = infer_shapes(network)
    arrays = [[(a.role, a.shape) for a in weight_arrays(network, shapes, layer)] for layer in network.layers[:6]]
    normalization = [("bias", (6,)), ("scale", (6,)), ("mean", (6,)), ("variance", (6,))]
    assert arrays[1] == [*normalization, ("weight", (6, 6, 3, 3))]
    assert arrays[2:] == [[], [], normalization, []]
    assert [network.owner(layer).index for layer in network.layers[:5]] == [0, 1, 1, 1, 4]


def test_a_network_is_charged_for_what_a_blur_reads_and_for_shared_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bytes_of(text: str) -> int:
        network, found = network_of(tmp_path, net() + text + head()), []
        monkeypatch.setattr(shapes, "network_bytes", lambda weights, tensors: found.append((weights, tensors)) or 0)
        infer_shapes(network)
        return found[0]

    blurred, strided = bytes_of(conv(64, 3, 4, antialiasing=1)), bytes_of(conv(64, 3, 4))
    assert blurred[0] == strided[0]
    assert blurred[1] == 4 * 64 * (64 * 64 + 16 * 16) + 4 * 3 * 64 * 64 - 4 * 3 * 64 * 64
    assert bytes_of(2 * conv(3) + conv(3, share_index=1))[0] == bytes_of(3 * conv(3))[0]


def test_gflops_of_a_blurred_convolution_are_those_before_its_blur(tmp_path: Path) -> None:
    counts = [gflops(network_of(tmp_path, net() + text + head())) for text in (conv(8, antialiasing=1), conv(8))]
    assert counts[0] == counts[1]
    strided = gflops(network_of(tmp_path, net() + conv(8, stride=2, antialiasing=1) + head()))
    assert strided == pytest.approx((2 * 8 * 27 * 64 * 64 + 2 * 24 * 8 * 32 * 32) / 1e9)


def test_gflops_count_two_a_multiplication(tmp_path: Path) -> None:
    network = network_of(tmp_path, net(64, 32) + conv(8, 3, 2, groups=1) + conv(8, groups=8) + head(classes=1))
    assert gflops(network) * 1e9 == 2 * (8 * 3 * 9 + 8 * 9 + 18 * 8) * 16 * 32
    assert infer_shapes(network)[0] == Shape(8, 16, 32)


@pytest.mark.parametrize(("text", "size"), [("416", (416, 416)), ("640x384", (640, 384)), ("32X64", (32, 64))])
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


WRONG_SIZES = [
    "",
    "0",
    "-416",
    "416x",
    "x416",
    "abc",
    "416x0",
    "416 x 416",
    "416x416x3",
    "4.5",
    "²",
    "\uff14\uff11\uff16",
    "1e3",
    "9" * 5000,
]


@pytest.mark.parametrize("text", WRONG_SIZES)
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(DarktrtError, match=r"--size .*: write a side like 416, or WIDTHxHEIGHT like 640x384"):
        parse_size(text)


@pytest.mark.parametrize(("text", "batch"), [("1", (1, 1, 1)), ("4", (4, 4, 4)), ("1..8", (1, 8, 8)), ("3..3", (3, 3, 3))])
def test_batches(text: str, batch: tuple[int, int, int]) -> None:
    assert parse_batch(text) == batch


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "3..1", "1..", "..4", "0..2", "1.5", "1...4", "four", "²", "1..8..9", "9" * 30]
)
def test_wrong_batches(text: str) -> None:
    with pytest.raises(DarktrtError, match=r"--batch .*: write a number like 4, or a range like 1\.\.8"):
        parse_batch(text)
