"""The text rules of cfg files, the records they become, and every refusal with its line."""

from __future__ import annotations

import codecs
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import MADE_CFG, conv, head, net, section, yolo

from darktrt.convert.cfg import (
    ACTIVATIONS,
    Activation,
    BatchNorm,
    ChannelPool,
    Convolutional,
    Dropout,
    GlobalAverage,
    Implicit,
    Network,
    Pool,
    Reorg,
    Route,
    Sam,
    ScaleChannels,
    Shortcut,
    Unread,
    Upsample,
    Yolo,
    read_cfg,
)
from darktrt.errors import DarktrtError


def parsed(folder: Path, text: str | bytes) -> Network:
    file = folder / "net.cfg"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_cfg(file)


def without_path(network: Network) -> Network:
    return dataclasses.replace(network, path="")


def refused(folder: Path, text: str | bytes) -> str:
    """The message, which names the file; its path is cut off."""
    with pytest.raises(DarktrtError) as caught:
        parsed(folder, text)
    message = str(caught.value)
    assert message.startswith(f"{folder}/net.cfg:")
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


def body(text: str) -> str:
    """A cfg of one section and a head behind a convolution."""
    return net() + text + head()


# --- text ---


def test_a_cfg_becomes_records_with_line_numbers(tmp_path: Path) -> None:
    network = parsed(tmp_path, MADE_CFG)
    assert (network.width, network.height, network.channels, network.letter_box) == (96, 64, 3, False)
    lines = MADE_CFG.splitlines()
    assert [lines[layer.line - 1] for layer in network.layers] == [f"[{layer.kind}]" for layer in network.layers]
    assert [layer.index for layer in network.layers] == list(range(20))
    with pytest.raises(dataclasses.FrozenInstanceError):
        network.width = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        network.layers[0].line = 1  # type: ignore[misc]


SAME = {
    "CRLF": MADE_CFG.replace("\n", "\r\n").encode(),
    "BOM": codecs.BOM_UTF8 + MADE_CFG.encode(),
    "no newline at the end": MADE_CFG.rstrip().encode(),
    "spaces": MADE_CFG.replace("=", " = ").replace("[", " [ ").replace("]", " ]\t").replace("filters", "fil ters").encode(),
    "spaces in values": MADE_CFG.replace("leaky", "le aky").replace("64", "6 4").encode(),
    "comments": MADE_CFG.replace("\n\n", "\n# a comment = 1\n").encode(),
    "other comments": MADE_CFG.replace("\n\n", "\n ; [yolo]\n").encode(),
    "Latin-1 in comments": MADE_CFG.replace("\n\n", "\n# größe\n").encode("latin-1"),
    "comments behind numbers": MADE_CFG.replace("size=3", "size=3 # pixels").replace("stride=2", "stride=2;px").encode(),
    "comments behind lists": MADE_CFG.replace("mask=0,1,2", "mask=0,1,2 # 3,4").replace("50,44", "50,44#,1").encode(),
    "network": MADE_CFG.replace("[net]", "[network]").encode(),
    "plus signs and zeros": MADE_CFG.replace("=2", "=+2").replace("=8", "=08").encode(),
    "training keys": MADE_CFG.replace(
        "channels=3", "channels=3\nlearning_rate=.001\nsteps=1,2\nscales=.1,.1\nbatch=64"
    ).encode(),
}


@pytest.mark.parametrize("name", SAME)
def test_other_spellings_give_the_same_records(tmp_path: Path, name: str) -> None:
    def plain(network: Network) -> list[object]:
        return [dataclasses.replace(layer, line=0) for layer in without_path(network).layers]

    assert plain(parsed(tmp_path, SAME[name])) == plain(parsed(tmp_path, MADE_CFG))


def test_aliases_of_sections(tmp_path: Path) -> None:
    text = "[conv]\nsize=1\n[max]\nsize=2\n[local_avg]\nsize=2\n[avg]\n"
    layers = parsed(tmp_path, body(text)).layers
    assert [layer.kind for layer in layers[:4]] == ["convolutional", "maxpool", "local_avgpool", "avgpool"]


def test_the_first_of_duplicate_keys_wins(tmp_path: Path) -> None:
    first = parsed(tmp_path, body("[convolutional]\nfilters=4\nfilters=9\nsize=1\n")).layers[0]
    assert isinstance(first, Convolutional)
    assert first.filters == 4


# --- records ---


def layer(folder: Path, text: str) -> object:
    return parsed(folder, net() + conv(4) + conv(4) + text + head()).layers[2]


def test_convolutional(tmp_path: Path) -> None:
    assert layer(tmp_path, "[convolutional]\n") == Convolutional(
        2, 22, "convolutional", (1,), 1, 1, 1, 1, 0, 1, 1, batch_normalize=False, activation="logistic"
    )
    options = "filters=6 size=5 stride=2 stride_y=3 pad=1 padding=7 dilation=2 groups=2 batch_normalize=1 activation=swish"
    record = layer(tmp_path, "[convolutional]\n" + options.replace(" ", "\n") + "\n")
    assert record == Convolutional(2, 22, "convolutional", (1,), 6, 5, 2, 3, 2, 2, 2, batch_normalize=True, activation="swish")
    assert layer(tmp_path, "[convolutional]\nsize=3\npadding=2\n").padding == 2  # type: ignore[attr-defined]
    assert layer(tmp_path, "[convolutional]\ndilation=4\n").dilation == 1  # type: ignore[attr-defined]
    assert layer(tmp_path, "[convolutional]\ncbn=1\n").batch_normalize  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(tmp_path: Path, name: str) -> None:
    assert layer(tmp_path, f"[convolutional]\nactivation={name}\n").activation == name  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["[convolutional]\n", "[shortcut]\nfrom=-2\n", "[sam]\nfrom=-2\n"])
def test_silu_is_swish_and_not_selu(tmp_path: Path, text: str) -> None:
    assert layer(tmp_path, text + "activation=silu\n").activation == "swish"  # type: ignore[attr-defined]
    message = refused(tmp_path, body("[convolutional]\nactivation=silu # x\n"))
    assert "did you mean 'silu'?" in message
    assert "selu" not in message


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("[maxpool]\nsize=3\nstride=2\n", Pool(2, 22, "maxpool", (1,), 3, 2, 2, 2)),
        ("[maxpool]\nstride=2\n", Pool(2, 22, "maxpool", (1,), 2, 2, 2, 1)),
        ("[maxpool]\nsize=2\nstride_x=3\npadding=0\n", Pool(2, 22, "maxpool", (1,), 2, 3, 1, 0)),
        ("[local_avgpool]\nsize=5\n", Pool(2, 22, "local_avgpool", (1,), 5, 1, 1, 4)),
        ("[avgpool]\n", GlobalAverage(2, 22, "avgpool", (1,))),
        ("[upsample]\n", Upsample(2, 22, "upsample", (1,), 2, 1.0)),
        ("[upsample]\nstride=4\nscale=.5\n", Upsample(2, 22, "upsample", (1,), 4, 0.5)),
        ("[route]\nlayers=-1,0\n", Route(2, 22, "route", (1, 0), 1, 0)),
        ("[route]\nlayers=-2,1,\ngroups=2\ngroup_id=1\n", Route(2, 22, "route", (0, 1), 2, 1)),
        ("[shortcut]\nfrom=-2\n", Shortcut(2, 22, "shortcut", (1, 0), "linear", "none", "none")),
        (
            "[shortcut]\nfrom=0,-1\nactivation=leaky\nweights_type=per_layer\nweights_normalization=avg_relu\n",
            Shortcut(2, 22, "shortcut", (1, 0, 1), "leaky", "per_feature", "relu"),
        ),
        ("[sam]\nfrom=-2\nactivation=mish\n", Sam(2, 22, "sam", (1, 0), "mish")),
        ("[scale_channels]\nfrom=-2\nscale_wh=1\n", ScaleChannels(2, 22, "scale_channels", (1, 0), True, "linear")),
        ("[dropout]\nprobability=.5\n", Dropout(2, 22, "dropout", (1,))),
        ("[empty]\n", Dropout(2, 22, "empty", (1,))),
        ("[silence]\n", Dropout(2, 22, "empty", (1,))),
        ("[implicit]\nmean=1\nstd=.02\n", Implicit(2, 22, "implicit", (), 128, 1)),
        ("[implicit]\nfilters=4\natoms=3\n", Implicit(2, 22, "implicit", (), 4, 3)),
        ("[softmax]\ngroups=2\ntemperature=3\n", Unread(2, 22, "softmax", (1,))),
        ("[soft]\n", Unread(2, 22, "softmax", (1,))),
        ("[cost]\ntype=sse\n", Unread(2, 22, "cost", (1,))),
        ("[contrastive]\nclasses=1\nyolo_layer=-2\n", Unread(2, 22, "contrastive", (1,))),
        ("[batchnorm]\n", BatchNorm(2, 22, "batchnorm", (1,))),
        ("[activation]\n", Activation(2, 22, "activation", (1,), "linear")),
        ("[activation]\nactivation=silu\n", Activation(2, 22, "activation", (1,), "swish")),
        ("[maxpool]\nmaxpool_depth=1\nout_channels=3\n", ChannelPool(2, 22, "maxpool", (1,), 3)),
        ("[maxpool]\nmaxpool_depth=1\nsize=2\n", ChannelPool(2, 22, "maxpool", (1,), 1)),
        ("[maxpool]\nsize=2\nstride=2\nantialiasing=1\n", Pool(2, 22, "maxpool", (1,), 2, 2, 2, 1, 3)),
        ("[maxpool]\nsize=2\nstride=2\nantialiasing=2\n", Pool(2, 22, "maxpool", (1,), 2, 2, 2, 1, 2)),
        ("[upsample]\nstride=-2\n", Upsample(2, 22, "upsample", (1,), 2, 1.0, True)),
        ("[route_lhalf]\nlayers=-1,0\n", Route(2, 22, "route_lhalf", (1, 0), 2, 0)),
        ("[reorg]\n", Reorg(2, 22, "reorg", (1,), 1, False)),
        ("[reorg]\nstride=2\n", Reorg(2, 22, "reorg", (1,), 2, False)),
        ("[reorg3d]\nstride=2\nreverse=1\n", Reorg(2, 22, "reorg3d", (1,), 2, True)),
    ],
)
def test_layers(tmp_path: Path, text: str, record: object) -> None:
    assert layer(tmp_path, text) == record


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("share_index=0\n", {"shares": 0}),
        ("share_index=-1\n", {"shares": 1}),
        ("antialiasing=1\n", {"blur": 3}),
        ("antialiasing=2\n", {"blur": 2}),
        ("antialiasing=7\n", {"blur": 3}),
        ("binary=1\ngroups=2\n", {"binary_weights": True, "groups": 2}),
        ("xnor=1\ngroups=2\n", {"binary_weights": True, "binary_inputs": True, "groups": 1}),
        ("bin_output=1\n", {"binary_outputs": True}),
    ],
)
def test_options_of_a_convolution(tmp_path: Path, text: str, fields: dict[str, object]) -> None:
    record = layer(tmp_path, f"[convolutional]\n{text}")
    assert {name: getattr(record, name) for name in fields} == fields
    assert record.activation == "logistic"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("behind", "linear"),
    [
        (conv(4), True),
        ("[maxpool]\nsize=2\n", True),
        ("[route]\nlayers=0\n", True),
        ("[route]\nlayers=0,1\n", False),
        ("[shortcut]\nfrom=0\n", False),
        (conv(4) + "[shortcut]\nfrom=1\n", False),
        (conv(4) + "[shortcut]\nfrom=0,1\n", True),
        ("[sam]\nfrom=0\n", False),
        ("[avgpool]\n[scale_channels]\nfrom=1\n", False),
    ],
)
def test_bin_output_has_no_activation_unless_more_than_signs_is_read(tmp_path: Path, behind: str, linear: bool) -> None:
    """As darknet switches it off: of a [shortcut] from several layers it looks at the first."""
    binary = conv(4, activation="leaky", xnor=1, bin_output=1)
    layers = parsed(tmp_path, net() + conv(4) + binary + behind + head()).layers
    assert layers[1].activation == ("linear" if linear else "leaky")  # type: ignore[attr-defined]


def test_yolo(tmp_path: Path) -> None:
    anchors = ((6.0, 9.0), (11.0, 8.0), (14.0, 20.0), (22.0, 16.0), (30.0, 35.0), (50.0, 44.0))
    options = {"scale_x_y": 1.05, "new_coords": 1, "nms_kind": "diounms", "beta_nms": 0.8, "iou_thresh": 0.2}
    record = parsed(tmp_path, net() + conv(8, 1) + yolo(3, "4,1", **options)).layers[1]
    assert record == Yolo(1, 14, "yolo", (0,), (4, 1), anchors, 3, 1.05, True, "diounms", 0.8, 0.2)


def test_yolo_defaults(tmp_path: Path) -> None:
    record = parsed(tmp_path, net() + conv(8, 1) + "[yolo]\nanchors=1,2, 3.5,4, 5,6\nnum=2\n").layers[1]
    assert record == Yolo(1, 14, "yolo", (0,), (0, 1), ((1.0, 2.0), (3.5, 4.0)), 20, 1.0, False, "plain", 0.6, 1.0)


def gaussian(**options: object) -> str:
    anchors = {"anchors": "6,9, 11,8, 14,20, 22,16, 30,35, 50,44", "num": 6}
    return section("Gaussian_yolo", **{**anchors, "mask": "4,1", "classes": 3, **options})


def test_gaussian_yolo(tmp_path: Path) -> None:
    """As a [yolo]; what only training reads is ignored, as Gaussian_yolov3_BDD.cfg has it."""
    anchors = ((6.0, 9.0), (11.0, 8.0), (14.0, 20.0), (22.0, 16.0), (30.0, 35.0), (50.0, 44.0))
    options: dict[str, object] = {"scale_x_y": 1.1, "nms_kind": "diounms", "beta_nms": 0.8, "iou_thresh": 0.2}
    training = dict.fromkeys("jitter ignore_thresh truth_thresh uc_normalizer cls_normalizer iou_normalizer random".split(), 1)
    text = gaussian(**options, **training, iou_loss="giou", yolo_point="center")
    record = parsed(tmp_path, net() + conv(8, 1) + text).layers[1]
    assert record == Yolo(1, 14, "Gaussian_yolo", (0,), (4, 1), anchors, 3, 1.1, False, "diounms", 0.8, 0.2, "Gaussian_yolo")
    assert (record.box_channels, record.anchor_channels) == (8, 12)
    plain = parsed(tmp_path, net() + conv(8, 1) + gaussian(nms_kind="cornersnms")).layers[1]
    assert isinstance(plain, Yolo) and plain.nms_kind == "plain"


def region(**options: object) -> str:
    return section("region", **{"anchors": "1,2, 3.5,4", "num": 2, "classes": 3, "softmax": 1, **options})


def test_region(tmp_path: Path) -> None:
    """Its anchors are in cells; what only training reads is ignored, as yolov2.cfg has it and parse_region knows it."""
    record = parsed(tmp_path, net() + conv(8, 1) + region()).layers[1]
    anchors = ((1.0, 2.0), (3.5, 4.0))
    assert record == Yolo(1, 14, "region", (0,), (0, 1), anchors, 3, 1.0, False, "plain", 0.6, 1.0, "region")
    training = dict.fromkeys("bias_match rescore absolute random focal_loss log sqrt max".split(), 1)
    training |= dict.fromkeys([*(f"{name}_scale" for name in ("coord", "object", "noobject", "mask", "class")), "jitter"], 0.6)
    training |= {"resize": 0.6, "thresh": 0.6}
    others = {"coords": 4, "background": 0, "classfix": 2, "map": "coco9k.map"}
    assert parsed(tmp_path, net() + conv(8, 1) + region(**training, **others)).layers[1] == record


def test_anchors_of_a_region_in_pixels(tmp_path: Path) -> None:
    """By the cells along each side, whatever size the network is asked for; darknet's default is 20 classes."""
    text = net(96, 64) + conv(16, stride=2) + conv(50, 1) + section("region", anchors="1,2, 3.5,4", num=2, softmax=1)
    network = parsed(tmp_path, text)
    (head,) = (layer for layer in network.layers if isinstance(layer, Yolo))
    assert head.classes == 20
    assert network.anchors(head) == network.resized(32, 320).anchors(head) == ((2, 4), (7, 8))
    assert network.resized(33, 64).anchors(head) == pytest.approx(np.array([[33 / 17, 4], [3.5 * 33 / 17, 8]]))


def test_one_anchor_is_the_default(tmp_path: Path) -> None:
    record = parsed(tmp_path, net() + conv(8, 1) + "[yolo]\nanchors=3,4\n").layers[1]
    assert (record.mask, record.anchors) == ((0,), ((3.0, 4.0),))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("value", "on"), [(0, False), (1, True), (2, True)])
def test_letter_box(tmp_path: Path, value: int, on: bool) -> None:
    assert parsed(tmp_path, net(letter_box=value) + conv(8) + head()).letter_box is on


def test_a_resized_network_keeps_its_layers(tmp_path: Path) -> None:
    network = parsed(tmp_path, MADE_CFG)
    other = network.resized(320, 192)
    assert (other.width, other.height) == (320, 192)
    assert other.layers is network.layers


def test_what_passes_its_input_on_says_so(tmp_path: Path) -> None:
    text = "[dropout]\n[route]\nlayers=0\n[reorg]\nstride=1\n[route]\nlayers=0,1\n[route]\nlayers=0\ngroups=2\n"
    layers = parsed(tmp_path, net() + conv(8) + text + head()).layers
    assert [layer.passes_on for layer in layers[:6]] == [False, True, True, True, False, False]


@pytest.mark.parametrize(
    "keys",
    [
        "[net]\nwidth=64\nheight=64\nchannels=3\nmax_batches=500200\npolicy=steps\nmosaic=1\nsubdivisions=8\nburn_in=1000\n",
        net() + "[convolutional]\nantialiasing=0\nbinary=0\nxnor=0\nlearning_rate=1\nstopbackward=800\n",
        net() + "[maxpool]\nsize=2\nantialiasing=0\nmaxpool_depth=0\n",
        net() + "[convolutional]\ndontload=0\ndontloadscales=0\nsway=0\ncoordconv=0\n",
        net(input_calibration="15.7,2.1") + "[convolutional]\nsize=3\nrotate=1\nstretch=1\nstretch_sway=1\nsway=1\n",
    ],
)
def test_keys_for_training_and_switched_off_ones_are_passed_over(tmp_path: Path, keys: str) -> None:
    parsed(tmp_path, keys + head())


def test_yolo_keys_for_training_are_passed_over(tmp_path: Path) -> None:
    options = {"jitter": 0.3, "ignore_thresh": 0.7, "truth_thresh": 1, "iou_loss": "ciou", "random": 1, "max_delta": 5}
    parsed(tmp_path, net() + conv(8) + head(**options))


# --- refusals ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # keys
        (body("[convolutional]\nfitlers=4\n"), "net.cfg:7: [convolutional] has no 'fitlers'; did you mean 'filters'?"),
        (body("[maxpool]\nsize=2\nsizes=2\n"), "net.cfg:8: [maxpool] has no 'sizes'; did you mean 'size'?"),
        (
            net() + conv(24, 1) + section("yolo", mask="0,1,2", anchor="1,2,3,4,5,6", classes=3, num=3),
            "net.cfg:14: [yolo] needs 'anchors='; is 'anchor' a misspelling?",
        ),
        (net(letterbox=1) + head(), "net.cfg:5: [net] has no 'letterbox'; did you mean 'letter_box'?"),
        (
            body("[convolutional]\nwobble=1\n"),
            "net.cfg:7: [convolutional] has no 'wobble'; remove it if it only matters for training",
        ),
        # sections
        (body("[dense]\n"), "net.cfg:6: [dense] is not supported; darktrt knows activation, avgpool, batchnorm, contrastive"),
        (body("[region]\n"), "net.cfg:6: [region] needs 'softmax=1': without it the scores of classes are raw numbers"),
        (body("[region]\nnum=1\nsoftmax=0\n"), "net.cfg:8: [region] needs 'softmax=1'"),
        (body(region(classfix=-1)), "[region] 'classfix=-1' drops every box with an objectness below .5"),
        (body(region(coords=5)), "[region] 'coords=5' changes what the network computes and is not supported: the head of"),
        (body(region(background=1)), "'background=1' changes what the network computes and is not supported: it takes"),
        (body(region(mask="0,1")), "[region] has no 'mask'"),
        (body(region(scale_x_y=1.1)), "[region] has no 'scale_x_y'"),
        (body(region(num=3)), "'anchors' has 4 numbers, but 'num=3' needs 6; darknet would take 0.5 cells for each that lacks"),
        (body(region(anchors="1,2,0,4")), "'anchors' must be greater than 0 (width, height in cells of the network input)"),
        (body("[Gaussian_yolo]\n"), "net.cfg:6: [Gaussian_yolo] needs 'anchors='"),
        (body(gaussian(yolo_point="left_top")), "[Gaussian_yolo] 'yolo_point=left_top' makes x and y a corner"),
        (body(gaussian(new_coords=1)), "[Gaussian_yolo] has no 'new_coords'"),
        (body(gaussian(mask="0,6")), "[Gaussian_yolo] 'mask' names anchor 6, but 'num=6' allows 0..5"),
        *(
            (body(f"[{kind}]\n"), f"net.cfg:6: [{kind}] carries a state from one frame of a video to the next, and darktrt")
            for kind in ("rnn", "gru", "lstm", "crnn", "conv_lstm", "history")
        ),
        *(
            (
                body(f"[{kind}]\n"),
                f"net.cfg:6: [{kind}] is of pjreddie's darknet; AlexeyAB's, whose numbers are those of darktrt",
            )
            for kind in ("deconvolutional", "l2norm", "logistic", "iseg")
        ),
        (body("[crop]\n"), "net.cfg:6: [crop] cuts the middle out of the image, as in YOLOv1"),
        (body("[normalization]\n"), "net.cfg:6: [normalization] normalises over neighbouring channels, as in AlexNet"),
        (body("[lrn]\n"), "net.cfg:6: [lrn] normalises over neighbouring channels, as in AlexNet"),
        (body("[conv-extract]\n"), "net.cfg:6: [conv-extract] is not supported; darktrt knows activation"),
        (body("[region]\ntree=9k.tree\n"), "net.cfg:7: [region] with 'tree=' is the head of YOLO9000, whose tree of classes"),
        (
            "[net]\nrubbish=1\n[local]\n[connected]\n[detection]\nside=7\n",
            "net.cfg:5: [detection] is the head of YOLOv1, which darktrt does not decode; convert a network with [yolo]",
        ),
        (body("[local]\n"), "net.cfg:6: [local] has weights of its own for every position, as in YOLOv1"),
        (body("[connected]\n"), "net.cfg:6: [connected] ties the network to one input size, as in YOLOv1"),
        (body("[conn]\n"), "net.cfg:6: [conn] ties the network to one input size"),
        (
            body("[implicit_add]\n"),
            "[implicit_add] is of YOLOR's PyTorch code, not of darknet, and darktrt lacks it: it outputs",
        ),
        (
            body("[implicit_mul]\n"),
            "[implicit_mul] is of YOLOR's PyTorch code, not of darknet, and darktrt lacks it: it outputs",
        ),
        (
            body("[shift_channels]\n"),
            "[shift_channels] is of YOLOR's PyTorch code, not of darknet, and darktrt lacks it: it adds",
        ),
        (body("[control_channels]\n"), "[control_channels] is of YOLOR's PyTorch code, not of darknet, and darktrt lacks it"),
        (body("[maxpool] # x\n"), "net.cfg:6: '[maxpool] # x' is no section header; write [name] alone on its line"),
        (body("[maxpool\n"), "net.cfg:6: '[maxpool' is no section header"),
        (conv(4) + head(), "net.cfg:1: [convolutional] the first section must be [net]"),
        ("width=4\n" + net() + head(), "net.cfg:1: 'width' precedes the first section; a cfg begins with [net]"),
        (net() + conv(4), "net.cfg: has no [yolo], [region] or [Gaussian_yolo] section"),
        (net(), "net.cfg: has no [yolo], [region] or [Gaussian_yolo] section"),
        # lines
        (body("[maxpool]\nsize 3\n"), "net.cfg:7: 'size 3' is neither a [section] nor key=value"),
        (body("[maxpool]\npadding=\n"), "net.cfg:7: 'padding=' is neither a [section] nor key=value"),
        (body("[maxpool]\n=3\n"), "net.cfg:7: '=3' is neither a [section] nor key=value"),
        # numbers
        (body("[maxpool]\nsize=two\n"), "net.cfg:7: [maxpool] 'size=two' is not a whole number"),
        (body("[maxpool]\nsize=3.5\n"), "net.cfg:7: [maxpool] 'size=3.5' is not a whole number"),
        (body("[maxpool]\nsize=0\n"), "net.cfg:7: [maxpool] 'size=0' must be at least 1"),
        (body("[maxpool]\nsize=" + 5000 * "9" + "\n"), "net.cfg:7: [maxpool] 'size=99999"),
        (body("[convolutional]\nfilters=-3\n"), "net.cfg:7: [convolutional] 'filters=-3' must be at least 1"),
        (body("[convolutional]\npadding=-1\n"), "net.cfg:7: [convolutional] 'padding=-1' must not be negative"),
        (body("[convolutional]\ngroups=0\n"), "net.cfg:7: [convolutional] 'groups=0' must be at least 1"),
        (body("[maxpool]\nsize=3\npadding=6\n"), "net.cfg:8: [maxpool] 'padding=6' for size 3 must lie in 0..4"),
        (body("[upsample]\nscale=x\n"), "net.cfg:7: [upsample] 'scale=x' is not a number"),
        (body("[upsample]\nscale=1e999\n"), "net.cfg:7: [upsample] 'scale=1e999' is not a number"),
        (body("[upsample]\nscale=nan\n"), "net.cfg:7: [upsample] 'scale=nan' is not a number"),
        ("[net]\nwidth=64\nheight=64\n" + head(), "net.cfg:1: [net] needs 'channels='"),
        ("[net]\nwidth=64\nheight=-64\nchannels=3\n" + head(), "net.cfg:3: [net] 'height=-64' must be at least 1"),
        # names
        (
            body("[convolutional]\nactivation=laeky\n"),
            "net.cfg:7: [convolutional] 'activation=laeky' is not known; did you mean 'leaky'?",
        ),
        (
            body("[convolutional]\nactivation=leaky # x\n"),
            "net.cfg:7: [convolutional] 'activation=leaky#x' is not known; did you mean 'leaky'?",
        ),
        (body("[convolutional]\nactivation=norm_chan\n"), "net.cfg:7: [convolutional] 'activation=norm_chan' is not known; "),
        (
            body("[shortcut]\nfrom=-1\n").replace("[shortcut]", conv(4) + "[shortcut]\nweights_type=per_image"),
            "'weights_type=per_image' is not known",
        ),
        (
            net() + conv(4) + head(nms_kind="cornersnms"),
            "'nms_kind=cornersnms' is not known; use one of default, greedynms, diounms",
        ),
        # sources
        (
            body("[route]\nlayers=-1\n"),
            "net.cfg:7: [route] 'layers' names layer -1, which is not before layer 0; no layer precedes it",
        ),
        (
            body(conv(4) + "[route]\nlayers=1\n"),
            "net.cfg:15: [route] 'layers' names layer 1, which is not before layer 1; layers 0 to 0",
        ),
        (body(conv(4) + "[route]\nlayers=7\n"), "[route] 'layers' names layer 7, which is not before layer 1"),
        (body(conv(4) + "[route]\nlayers=-5\n"), "[route] 'layers' names layer -5"),
        (body(conv(4) + "[route]\n"), "net.cfg:14: [route] needs 'layers='"),
        (body(conv(4) + "[route]\nlayers=0\ngroups=2\ngroup_id=2\n"), "net.cfg:17: [route] 'group_id=2' must lie in 0..1"),
        (body(conv(4) + "[route]\nlayers=0\ngroup_id=-1\n"), "net.cfg:16: [route] 'group_id=-1' must lie in 0..0"),
        (body(conv(4) + "[shortcut]\nfrom=x\n"), "net.cfg:15: [shortcut] 'from=x' is not a whole number"),
        (body(conv(4) + "[sam]\nfrom=0,0\n"), "net.cfg:15: [sam] 'from' names 2 layers; it accepts one"),
        (body(conv(4) + "[scale_channels]\n"), "net.cfg:14: [scale_channels] needs 'from='"),
        # switched on, not supported
        (
            body("[convolutional]\nxnor=1\nsize=3\ndilation=2\n"),
            "net.cfg:7: [convolutional] has 'xnor=1' with 'dilation', which darknet computes in one way when it trains",
        ),
        (body("[convolutional]\nxnor=1\nstride_x=2\n"), "[convolutional] has 'xnor=1' with 'stride_x', which darknet computes"),
        (body("[convolutional]\nxnor=1\nantialiasing=1\n"), "has 'xnor=1' with 'antialiasing', which darknet computes in one"),
        (
            body("[maxpool]\nsize=2\nantialiasing=1\nmaxpool_depth=1\n"),
            "net.cfg:8: [maxpool] has 'maxpool_depth' with 'antialiasing', and darknet does not compute the blur",
        ),
        (
            body("[convolutional]\nshare_index=0\n"),
            "net.cfg:7: [convolutional] 'share_index' names layer 0, which is not before layer 0; no layer precedes it",
        ),
        (body("[upsample]\nstride=0\n"), "net.cfg:7: [upsample] 'stride=0' must not be 0"),
        (
            body("[convolutional]\nflipped=1\n"),
            "'flipped=1' changes what the network computes and is not supported: its weights are stored transposed",
        ),
        (
            body("[convolutional]\ncoordconv=1\n"),
            "'coordconv=1' changes what the network computes and is not supported: darknet writes coordinates over its outputs",
        ),
        (
            net() + conv(4) + head(representation="lin"),
            "[yolo] 'representation=lin' changes what the network computes and is not supported: the fork g-darknet decodes",
        ),
        *(
            (body(f"[{kind}]\n"), f"[{kind}] is of PyTorch code after ultralytics' YOLOv3; darknet does not know it")
            for kind in ("depthwise", "se", "ca", "sa", "eca", "shuffleUnit", "BatchNorm2d")
        ),
        *(
            (
                body(f"[convolutional]\nactivation={value}\n"),
                "net.cfg:7: [convolutional] 'activation=h_swish' is hard swish, not swish, and is of PyTorch code after",
            )
            for value in ("h_swish", "h_swish # x")
        ),
        (
            body("[softmax]\ntree=9k.tree\n"),
            "'tree=9k.tree' changes what the network computes and is not supported: it is of YOLO9000",
        ),
        (
            net() + conv(4) + head(**{"from": "1,2"}),
            "[yolo] 'from=1,2' changes what the network computes and is not supported: the",
        ),
        (
            body("[convolutional]\ndontload=1\n"),
            "'dontload=1' changes what the network computes and is not supported: its weights are not in the .weights file",
        ),
        (
            body("[maxpool]\nsize=2\ndontloadscales=1\n"),
            "'dontloadscales=1' changes what the network computes and is not supported: its batch normalisation is not in",
        ),
        # heads
        (
            net() + conv(4) + head(mask="0,6"),
            "[yolo] 'mask' names anchor 6, but 'num=6' allows 0..5; darknet would decode with what "
            "lies in memory beside its anchors; "
            "write the 'num' of the training",
        ),
        (net() + conv(4) + head(num=9), "[yolo] 'anchors' has 12 numbers, but 'num=9' needs 18"),
        (net() + conv(4) + head(anchors="1,2,3", num=2), "[yolo] 'anchors' has 3 numbers, but 'num=2' needs 4"),
        (net() + conv(4) + head(anchors="1,2,0,4", num=2), "[yolo] 'anchors' must be greater than 0"),
        (net() + conv(4) + head(anchors="1,2,x,4", num=2), "[yolo] 'anchors=x' is not a number"),
        (net() + conv(4) + head(mask="-1,0"), "[yolo] 'mask' names anchor -1, but 'num=6' allows 0..5"),
        (net() + conv(4) + head(scale_x_y=0), "[yolo] 'scale_x_y=0' must be greater than 0"),
        (net() + conv(4) + head(scale_x_y=-1.5), "[yolo] 'scale_x_y=-1.5' must be greater than 0"),
        (net() + conv(4) + head(classes=0), "[yolo] 'classes=0' must be at least 1"),
        # a missing comma
        (
            net() + conv(4) + head(mask="0,1 2"),
            "[yolo] 'mask' names anchor 12, but 'num=6' allows 0..5; is a comma missing in '1 2'? "
            "darknet removes the space and "
            "reads one number",
        ),
        (
            net() + conv(4) + head(anchors="10,14 23,27", num=2),
            "[yolo] 'anchors' has 3 numbers, but 'num=2' needs 4; darknet would take 0.5 pixels for "
            "each that lacks, which is hardly "
            "meant; write all; is a comma missing in '14 23'? darknet removes",
        ),
        (
            body(conv(4) + "[route]\nlayers=-1 -4\n"),
            "net.cfg:15: [route] 'layers=-1-4' is not a whole number; darknet would read -1 and "
            "nothing of the rest, which is hardly "
            "meant; is a comma missing in '-1 -4'?",
        ),
        (
            body(conv(4) + "[route]\nlayers=-1 61\n"),
            "[route] 'layers' names layer -161, which is not before layer 1; layers 0 to 0 precede "
            "it; is a comma missing in '-1 61'?",
        ),
        (
            net() + conv(4) + head(anchors="1,2.3.4", num=1),
            "'anchors=2.3.4' is not a number; darknet would read 2.3 and nothing of",
        ),
        (body(conv(4) + "[shortcut]\nfrom=x\n"), "'from=x' is not a whole number; darknet would read 0, which is hardly meant"),
        # files
        ("", "net.cfg: is empty; a cfg begins with [net]"),
        ("# nothing\n\n", "net.cfg: is empty"),
        (b"\0\0\0\0\x02\0\0\0", "net.cfg: is a binary file, not a cfg; are cfg and weights swapped?"),
        ("\n<!DOCTYPE html><html>", "net.cfg: is an HTML page, not a cfg; download the raw file"),
    ],
)
def test_refusals_name_the_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in refused(tmp_path, text)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"none\.cfg: cannot read: No such file"):
        read_cfg(tmp_path / "none.cfg")
    with pytest.raises(DarktrtError, match="is a folder; name a file"):
        read_cfg(tmp_path)
