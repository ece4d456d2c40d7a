"""Micro networks with every section and activation that darktrt converts, and darknet's forward pass over them in loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers import Array, net, section, weights_bytes

# --- activations, one number at a time ---


def softplus(x: float) -> float:
    """darknet's, with its thresholds of 20."""
    if x > 20:
        return x
    return math.exp(x) if x < -20 else math.log1p(math.exp(x))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def stair(x: float) -> float:
    n = math.floor(x)
    return math.floor(x / 2) if n % 2 == 0 else (x - n) + math.floor(x / 2)


def plse(x: float) -> float:
    if x < -4:
        return 0.01 * (x + 4)
    return 0.01 * (x - 4) + 1 if x > 4 else 0.125 * x + 0.5


def lhtan(x: float) -> float:
    if x < 0:
        return 0.001 * x
    return 0.001 * (x - 1) + 1 if x > 1 else x


def hard_mish(x: float) -> float:
    if x > 0:
        return x
    return x * x / 2 + x if x > -2 else 0.0


SCALAR: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "logistic": logistic,
    "loggy": lambda x: 2 * logistic(x) - 1,
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "elu": lambda x: x if x >= 0 else math.exp(x) - 1,
    "selu": lambda x: 1.0507 * (x if x >= 0 else 1.6732 * (math.exp(x) - 1)),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(0.797885 * x + 0.035677 * x**3)),
    "relie": lambda x: x if x > 0 else 0.01 * x,
    "ramp": lambda x: x * (x > 0) + 0.1 * x,
    "leaky": lambda x: x if x > 0 else 0.1 * x,
    "revleaky": lambda x: x if x > 0 else 0.1 * x,
    "tanh": math.tanh,
    "stair": stair,
    "plse": plse,
    "hardtan": lambda x: max(-1.0, min(1.0, x)),
    "lhtan": lhtan,
    "swish": lambda x: x * logistic(x),
    "mish": lambda x: x * math.tanh(softplus(x)),
    "hard_mish": hard_mish,
}


def normalize_channels(name: str, pixel: list[float]) -> list[float]:
    """Of one pixel's channels; the 0.0001 keeps the sums below 1."""
    if name == "normalize_channels":
        parts = [max(v, 0.0) for v in pixel]
    else:
        top = max(pixel) if name.endswith("maxval") else 0.0
        parts = [math.exp(v - top) for v in pixel]
    return [part / (0.0001 + sum(parts)) for part in parts]


NORMALIZING = ("normalize_channels", "normalize_channels_softmax", "normalize_channels_softmax_maxval")


def activate(name: str, x: Array) -> Array:
    name = {"silu": "swish"}.get(name, name)
    if name not in SCALAR:
        return np.apply_along_axis(lambda pixel: np.array(normalize_channels(name, pixel.tolist())), 0, x)
    return np.array([SCALAR[name](v) for v in x.ravel().tolist()]).reshape(x.shape)


# --- layers, in loops ---

Options = dict[str, Any]
Section = tuple[str, Options]


def numbers(value: object) -> list[int]:
    return [int(part) for part in str(value).split(",")]


@dataclass
class Loops:
    """darknet's forward pass over sections, in double, drawing the weights on its way in the order of the weights file."""

    seed: int
    gain: float = 1.0
    """Of the first layer's weights."""
    floats: list[Array] = field(default_factory=list)
    weights: dict[int, tuple[Array, ...]] = field(default_factory=dict)
    """Of each convolution so far: bias, scale, mean, variance, weight; without normalisation those that change nothing."""
    outputs: list[Array] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def forward(self, sections: list[Section], image: Array) -> None:
        self.size = image.shape[2], image.shape[1]
        for i, (kind, _) in enumerate(sections):
            x = self.outputs[-1] if self.outputs else image
            self.outputs.append(getattr(self, kind.lower())(self.without_activation(sections, i), x))

    def without_activation(self, sections: list[Section], i: int) -> Options:
        """The options of a section; with ``bin_output``, if nothing needs more than signs, the activation is linear."""
        options = sections[i][1]
        if not int(options.get("xnor", 0)) * int(options.get("bin_output", 0)):
            return options
        for k, (kind, other) in enumerate(sections):
            named = numbers(other["layers"]) if kind == "route" else [-1, *numbers(other.get("from", -1))[:1]]
            named = named if kind in ("route", "shortcut", "sam", "scale_channels") else []
            if i in [k + number if number < 0 else number for number in named]:
                return options
        return {**options, "activation": "linear"}

    def take(self, values: Array) -> Array:
        """The next numbers of the weights file, as float32 holds them."""
        self.floats.append(values.astype(np.float32).ravel())
        return values.astype(np.float32).astype(np.float64)

    def normal(self, *shape: int, deviation: float = 0.5) -> Array:
        return self.take(self.random.normal(0, deviation, shape))

    def uniform(self, *shape: int) -> Array:
        return self.take(self.random.uniform(0.3, 1.8, shape))

    def source(self, number: int) -> Array:
        return self.outputs[len(self.outputs) + number if number < 0 else number]

    def convolutional(self, o: Options, x: Array) -> Array:
        c = x.shape[0]
        n, size, xnor = int(o.get("filters", 1)), int(o.get("size", 1)), int(o.get("xnor", 0))
        groups = 1 if xnor else int(o.get("groups", 1))
        step_x, step_y = (int(o.get(key, o.get("stride", 1))) for key in ("stride_x", "stride_y"))
        blur = {0: 0, 2: 2}.get(int(o.get("antialiasing", 0)), 3)
        steps = (1, 1) if blur else (step_y, step_x)
        if "share_index" in o:
            number = int(o["share_index"])
            drawn = self.weights[len(self.outputs) + number if number < 0 else number]
        else:
            drawn = self.drawn(n, (n, c // groups, size, size), int(o.get("batch_normalize", 0)))
        self.weights[len(self.outputs)] = drawn
        bias, scale, mean, variance, weight = drawn
        factor = scale / np.sqrt(variance + 0.00001)
        weight = weight * factor[:, None, None, None]
        if xnor or int(o.get("binary", 0)):
            magnitude = np.abs(weight).mean((1, 2, 3), keepdims=True)
            weight = np.where(weight > 0, magnitude, -magnitude)
        padding = size // 2 if int(o.get("pad", 0)) else int(o.get("padding", 0))
        dilation = 1 if size == 1 else int(o.get("dilation", 1))
        x = np.where(x > 0, 1.0, -1.0) if xnor else x
        out = self.correlate(x, weight, groups, padding, dilation, steps, outside=-1.0 if xnor else 0.0)
        out = activate(str(o.get("activation", "logistic")), out + (bias - factor * mean)[:, None, None])
        return self.blurred(out, blur, (step_y, step_x)) if blur else out

    def drawn(self, n: int, shape: tuple[int, ...], normalize: int) -> tuple[Array, ...]:
        bias = self.normal(n)
        statistics = (
            (self.uniform(n), self.normal(n), self.uniform(n)) if normalize else (np.ones(n), 0 * bias, np.ones(n) - 1e-5)
        )
        gain = 1.0 if self.outputs else self.gain
        return bias, *statistics, self.normal(*shape, deviation=gain / math.sqrt(np.prod(shape[1:])))

    def correlate(
        self, x: Array, weight: Array, groups: int, padding: int, dilation: int, steps: tuple[int, int], outside: float = 0.0
    ) -> Array:
        """The convolution alone; ``outside`` of the input are numbers too."""
        c, h, w = x.shape
        n, _, size, _ = weight.shape
        step_y, step_x = steps
        edge = dilation * (size + 2 * padding)
        wide = np.pad(x, ((0, 0), (edge, edge), (edge, edge)), constant_values=outside)
        out = np.zeros((n, (h + 2 * padding - size) // step_y + 1, (w + 2 * padding - size) // step_x + 1))
        rows, columns = (np.arange(count) * step + edge for count, step in zip(out.shape[1:], steps, strict=True))
        for k, i, ky, kx in np.ndindex(*weight.shape):
            channel = k // (n // groups) * (c // groups) + i
            window = np.ix_(rows + (ky - padding) * dilation, columns + (kx - padding) * dilation)
            out[k] += weight[k, i, ky, kx] * wide[channel][window]
        return out

    def blurred(self, x: Array, size: int, steps: tuple[int, int]) -> Array:
        """The convolution that darknet appends for ``antialiasing``."""
        kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16 if size == 3 else np.full((2, 2), 0.25)
        weight = np.broadcast_to(kernel, (len(x), 1, size, size))
        return self.correlate(x, weight, len(x), 1 if size == 3 else 0, 1, steps)

    def batchnorm(self, o: Options, x: Array) -> Array:
        c = len(x)
        bias, scale, mean, variance = self.normal(c), self.uniform(c), self.normal(c), self.uniform(c)
        out = np.zeros_like(x)
        for k in range(c):
            out[k] = (x[k] - mean[k]) / math.sqrt(variance[k] + 0.00001) * scale[k] + bias[k]
        return out

    def activation(self, o: Options, x: Array) -> Array:
        return activate(str(o.get("activation", "linear")), x)

    def windows(self, o: Options, x: Array, reduce: Callable[[Array], Any]) -> Array:
        """``reduce`` over the cells of each window that lie inside: padding / 2 left and top, size - 1 in all by default."""
        c, h, w = x.shape
        size = int(o.get("size", o.get("stride", 1)))
        step_x, step_y = (int(o.get(key, o.get("stride", 1))) for key in ("stride_x", "stride_y"))
        if blur := {0: 0, 2: 2}.get(int(o.get("antialiasing", 0)), 3):
            inner = self.windows({**o, "stride": 1, "stride_x": 1, "stride_y": 1, "size": size, "antialiasing": 0}, x, reduce)
            return self.blurred(inner, blur, (step_y, step_x))
        padding = int(o.get("padding", size - 1))
        out = np.zeros((c, (h + padding - size) // step_y + 1, (w + padding - size) // step_x + 1))
        for k, y, z in np.ndindex(*out.shape):
            top, left = y * step_y - padding // 2, z * step_x - padding // 2
            out[k, y, z] = reduce(x[k, max(top, 0) : top + size, max(left, 0) : left + size])
        return out

    def maxpool(self, o: Options, x: Array) -> Array:
        if not int(o.get("maxpool_depth", 0)):
            return self.windows(o, x, np.max)
        n = int(o.get("out_channels", 1))
        return np.stack([x[g::n].max(0) for g in range(n)])

    def local_avgpool(self, o: Options, x: Array) -> Array:
        return self.windows(o, x, np.mean)

    def avgpool(self, o: Options, x: Array) -> Array:
        return x.mean((1, 2)).reshape(-1, 1, 1)

    def upsample(self, o: Options, x: Array) -> Array:
        stride = int(o.get("stride", 2))
        if stride < 0:
            out = np.zeros((x.shape[0], x.shape[1] // -stride, x.shape[2] // -stride))
            for k, y, z in np.ndindex(*x.shape):
                out[k, y // -stride, z // -stride] += float(o.get("scale", 1)) * x[k, y, z]
            return out
        out = np.zeros((x.shape[0], x.shape[1] * stride, x.shape[2] * stride))
        for k, y, z in np.ndindex(*out.shape):
            out[k, y, z] = float(o.get("scale", 1)) * x[k, y // stride, z // stride]
        return out

    def dropout(self, o: Options, x: Array) -> Array:
        return x

    def implicit(self, o: Options, x: Array) -> Array:
        return self.normal(int(o.get("filters", 128)), int(o.get("atoms", 1)), 1)

    empty = softmax = cost = contrastive = dropout

    def route_lhalf(self, o: Options, x: Array) -> Array:
        """FeatureConcat_l of WongKinYiu's PyTorch code."""
        return np.concatenate([source[: len(source) // 2] for source in map(self.source, numbers(o["layers"]))])

    def route(self, o: Options, x: Array) -> Array:
        groups, group = int(o.get("groups", 1)), int(o.get("group_id", 0))
        cuts = []
        for source in map(self.source, numbers(o["layers"])):
            part = source.size // groups
            cuts.append(source.ravel()[part * group : part * (group + 1)])
        rows, columns = self.source(numbers(o["layers"])[0]).shape[1:]
        return np.concatenate(cuts).reshape(-1, rows, columns)

    def shortcut(self, o: Options, x: Array) -> Array:
        sources = map(self.source, numbers(o["from"]))
        terms = [x, *(t[:, :: t.shape[1] // x.shape[1], :: t.shape[2] // x.shape[2]] for t in sources)]
        c, kind = x.shape[0], o.get("weights_type", "none")
        weight = np.ones((len(terms), c))
        if kind != "none":
            weight = self.normal(len(terms), c if kind == "per_channel" else 1) * np.ones((1, c))
            weight = self.normalized(weight, str(o["weights_normalization"]))
        out = np.zeros_like(x)
        for k, y, z in np.ndindex(*out.shape):
            out[k, y, z] = sum(w[k] * t[k, y, z] for w, t in zip(weight, terms, strict=True) if k < t.shape[0])
        return activate(str(o.get("activation", "linear")), out)

    def normalized(self, weight: Array, rule: str) -> Array:
        """As fusing does it: column by column, relu cut at 0.001, 0.0001 added to the sum."""
        out = np.zeros_like(weight)
        for k in range(weight.shape[1]):
            column = weight[:, k].tolist()
            parts = [max(v, 0.001) for v in column] if rule == "relu" else [math.exp(v - max(column)) for v in column]
            out[:, k] = [part / (0.0001 + sum(parts)) for part in parts]
        return out

    def sam(self, o: Options, x: Array) -> Array:
        return activate(str(o.get("activation", "linear")), x * self.source(int(o["from"])))

    def scale_channels(self, o: Options, x: Array) -> Array:
        source = self.source(int(o["from"]))
        out = np.zeros_like(source)
        for k, y, z in np.ndindex(*out.shape):
            out[k, y, z] = source[k, y, z] * (x[0, y, z] if int(o.get("scale_wh", 0)) else x[k, 0, 0])
        return activate(str(o.get("activation", "linear")), out)

    def reorg3d(self, o: Options, x: Array) -> Array:
        c, h, w = x.shape
        s = int(o["stride"])
        out = np.zeros((c * s * s, h // s, w // s))
        for k, j, i in np.ndindex(*out.shape):
            out[k, j, i] = x[k % c, j * s + k // c // s, i * s + k // c % s]
        return out

    def reorg(self, o: Options, x: Array) -> Array:
        """The old one: it uses the sizes of the input as those of the output."""
        c, h, w = x.shape
        s, flat, out = int(o["stride"]), x.ravel(), np.zeros(x.size)
        c4 = c // (s * s)
        for k, j, i in np.ndindex(c, h, w):
            here = i + w * (j + h * k)
            there = i * s + k // c4 % s + w * s * (j * s + k // c4 // s + h * s * (k % c4))
            if int(o.get("reverse", 0)):
                out[there] = flat[here]
            else:
                out[here] = flat[there]
        return out.reshape((c4, h * s, w * s) if int(o.get("reverse", 0)) else (c * s * s, h // s, w // s))

    def yolo(self, o: Options, x: Array) -> Array:
        """get_yolo_box: relative centre and size, here as corners in pixels of the network input."""
        rows, columns = x.shape[1:]
        mask, classes, s = numbers(o["mask"]), int(o["classes"]), float(o.get("scale_x_y", 1))
        sides = [float(v) for v in str(o["anchors"]).split(",")]
        for n, row, column in np.ndindex(len(mask), rows, columns):
            raw = x[n * (5 + classes) : (n + 1) * (5 + classes), row, column].tolist()
            new = int(o.get("new_coords", 0))
            v = raw if new else [logistic(t) for t in raw]
            centre_x = (column + v[0] * s - 0.5 * (s - 1)) / columns
            centre_y = (row + v[1] * s - 0.5 * (s - 1)) / rows
            w, h = (
                (raw[k] * raw[k] * 4 if new else math.exp(raw[k])) * sides[2 * mask[n] + k - 2] / self.size[k - 2]
                for k in (2, 3)
            )
            corners = (centre_x - w / 2, centre_y - h / 2, centre_x + w / 2, centre_y + h / 2)
            self.boxes.append([corner * self.size[i % 2] for i, corner in enumerate(corners)])
            self.scores.append([v[4] * t for t in v[5:]])
        return x

    def gaussian_yolo(self, o: Options, x: Array) -> Array:
        """get_gaussian_yolo_box and get_gaussian_yolo_detections: an uncertainty behind each of x, y, w and h."""
        rows, columns = x.shape[1:]
        mask, classes, s = numbers(o["mask"]), int(o["classes"]), float(o.get("scale_x_y", 1))
        sides = [float(v) for v in str(o["anchors"]).split(",")]
        for n, row, column in np.ndindex(len(mask), rows, columns):
            raw = x[n * (9 + classes) : (n + 1) * (9 + classes), row, column].tolist()
            centre_x = (column + logistic(raw[0]) * s - 0.5 * (s - 1)) / columns
            centre_y = (row + logistic(raw[2]) * s - 0.5 * (s - 1)) / rows
            w = math.exp(raw[4]) * sides[2 * mask[n]] / self.size[0]
            h = math.exp(raw[6]) * sides[2 * mask[n] + 1] / self.size[1]
            corners = (centre_x - w / 2, centre_y - h / 2, centre_x + w / 2, centre_y + h / 2)
            self.boxes.append([corner * self.size[i % 2] for i, corner in enumerate(corners)])
            uncertainty = sum(logistic(raw[i]) for i in (1, 3, 5, 7)) / 4
            self.scores.append([logistic(raw[8]) * logistic(t) * (1 - uncertainty) for t in raw[9:]])
        return x

    def region(self, o: Options, x: Array) -> Array:
        """get_region_box, with anchors in cells, and the softmax of forward_region_layer."""
        rows, columns = x.shape[1:]
        classes, sides = int(o["classes"]), [float(v) for v in str(o["anchors"]).split(",")]
        for n, row, column in np.ndindex(int(o["num"]), rows, columns):
            raw = x[n * (5 + classes) : (n + 1) * (5 + classes), row, column].tolist()
            centre_x, centre_y = (column + logistic(raw[0])) / columns, (row + logistic(raw[1])) / rows
            w, h = math.exp(raw[2]) * sides[2 * n] / columns, math.exp(raw[3]) * sides[2 * n + 1] / rows
            corners = (centre_x - w / 2, centre_y - h / 2, centre_x + w / 2, centre_y + h / 2)
            self.boxes.append([corner * self.size[i % 2] for i, corner in enumerate(corners)])
            powers = [math.exp(t - max(raw[5:])) for t in raw[5:]]
            self.scores.append([logistic(raw[4]) * power / sum(powers) for power in powers])
        return x


ANCHORS = {"anchors": "6,9, 11,8, 14,20, 22,16, 30,35, 50,44", "num": 6}


def c(filters: int = 6, size: int = 3, activation: str = "leaky", **options: Any) -> Section:
    return "convolutional", {"filters": filters, "size": size, "pad": 1, "activation": activation, **options}


def y(mask: str = "0,1,2", classes: int = 2, **options: Any) -> Section:
    return "yolo", {**ANCHORS, "mask": mask, "classes": classes, **options}


def headed(mask: str = "0,1,2", classes: int = 2, activation: str = "linear", **options: Any) -> list[Section]:
    return [c(len(mask.split(",")) * (5 + classes), 1, activation), y(mask, classes, **options)]


def gaussian(mask: str = "0,1,2", classes: int = 2, **options: Any) -> list[Section]:
    channels = len(mask.split(",")) * (9 + classes)
    return [c(channels, 1, "linear"), ("Gaussian_yolo", {**ANCHORS, "mask": mask, "classes": classes, **options})]


def region(classes: int = 2) -> list[Section]:
    options = {"anchors": "0.57,0.68, 1.87,2.06, 3.34,5.47", "num": 3, "classes": classes, "softmax": 1}
    return [c(3 * (5 + classes), 1, "linear"), ("region", options)]


WEIGHTED = {"weights_type": "per_feature", "weights_normalization": "relu"}
LAYERS: dict[str, list[Section]] = {
    "bn": [c(batch_normalize=1), c(batch_normalize=1, activation="mish"), c(4, 1, batch_normalize=1)],
    "no pad": [("convolutional", {"filters": 5, "size": 3, "activation": "relu"})],
    "padding 2 without pad": [("convolutional", {"filters": 5, "size": 3, "padding": 2, "activation": "relu"})],
    "pad beats padding": [c(5, 5, padding=0), c(5, 1)],
    "even kernels": [c(5, 2), c(5, 4, stride=2)],
    "default activation and size": [("convolutional", {"filters": 4})],
    "stride 2": [c(stride=2), c(stride=2)],
    "stride_x, stride_y": [c(stride_x=2), c(stride_y=3, stride=1), c(stride_x=1, stride=2)],
    "groups": [c(8), c(12, groups=4), c(12, groups=12, batch_normalize=1)],
    "dilation": [c(dilation=2), c(5, 5, dilation=2), c(4, 1, dilation=3), c(stride=2, dilation=3)],
    "maxpool 2/2": [c(), ("maxpool", {"size": 2, "stride": 2})],
    "maxpool 2/1": [c(), ("maxpool", {"size": 2, "stride": 1})],
    "maxpool 3/2": [c(), ("maxpool", {"size": 3, "stride": 2}), ("maxpool", {"size": 3, "stride": 2})],
    "spp": [c(), ("maxpool", {"size": 5, "stride": 1}), ("maxpool", {"size": 9, "stride": 1}), ("maxpool", {"size": 13})],
    "maxpool padding": [
        c(activation="linear"),
        ("maxpool", {"size": 3, "stride": 2, "padding": 0}),
        ("maxpool", {"size": 2, "stride": 1, "padding": 2}),
        ("maxpool", {"size": 4, "stride": 3, "padding": 5}),
    ],
    "maxpool size from stride": [c(), ("maxpool", {"stride": 3})],
    "maxpool strides": [c(), ("maxpool", {"size": 3, "stride": 2, "stride_y": 1})],
    "local_avgpool": [c(), ("local_avgpool", {"size": 3, "stride": 1}), ("local_avgpool", {"size": 2, "stride": 2})],
    "local_avgpool padding": [c(), ("local_avgpool", {"size": 4, "stride": 3, "padding": 5})],
    "upsample": [c(stride=2), ("upsample", {"stride": 2}), ("upsample", {"scale": 0.5, "stride": 3})],
    "dropout": [c(), ("dropout", {"probability": 0.5})],
    "empty": [c(), ("empty", {}), c(activation="silu")],
    "route": [c(4), c(6), c(8), ("route", {"layers": "-1,0,-2"}), ("route", {"layers": -4})],
    "route twice the same": [c(4), ("route", {"layers": "-1,-1,0"})],
    "route groups": [
        c(8),
        c(4),
        ("route", {"layers": "-1,-2", "groups": 2, "group_id": 1}),
        ("route", {"layers": "-3,1", "groups": 4, "group_id": 2}),
    ],
    "shortcut": [c(), c(), ("shortcut", {"from": -2}), ("shortcut", {"from": 0, "activation": "leaky"})],
    "shortcut of several": [c(), c(), c(), ("shortcut", {"from": "-2,-3", "activation": "mish"})],
    "shortcut from fewer channels": [c(4), c(9), c(6), ("shortcut", {"from": "-2,-3", "activation": "swish"})],
    "shortcut of itself": [c(), ("shortcut", {"from": -1})],
    "shortcut of larger layers": [
        c(4),
        c(6, stride=2),
        ("shortcut", {"from": 0, "activation": "leaky"}),
        c(3, stride=2),
        ("shortcut", {"from": 0}),
    ],
    "shortcut per_feature relu": [c(), c(), c(), ("shortcut", {"from": "-2,-3", **WEIGHTED})],
    "shortcut per_channel relu": [c(), c(), ("shortcut", {"from": -2, **WEIGHTED, "weights_type": "per_channel"})],
    "shortcut per_feature softmax": [c(), c(), ("shortcut", {"from": -2, **WEIGHTED, "weights_normalization": "softmax"})],
    "shortcut per_channel softmax, fewer channels": [
        c(4),
        c(8),
        c(6),
        (
            "shortcut",
            {"from": "-2,-3", "weights_type": "per_channel", "weights_normalization": "softmax", "activation": "relu"},
        ),
    ],
    "sam": [c(), c(activation="logistic"), ("sam", {"from": -2, "activation": "leaky"})],
    "squeeze and excite": [c(), ("avgpool", {}), c(3, 1, "relu6"), c(6, 1, "logistic"), ("scale_channels", {"from": 0})],
    "scale_channels with activation": [c(), ("avgpool", {}), c(6, 1), ("scale_channels", {"from": -3, "activation": "relu"})],
    "scale_wh": [c(), c(1, activation="logistic"), ("scale_channels", {"from": -2, "scale_wh": 1})],
    "reorg3d": [c(5), ("reorg3d", {"stride": 2})],
    "reorg": [c(8), ("reorg", {"stride": 2})],
    "reorg reverse": [c(8), ("reorg", {"stride": 2, "reverse": 1})],
    "reorg of stride 1": [c(4), ("reorg", {"stride": 1})],
    "two heads, mask order": [c(), *headed("4,3,5"), ("route", {"layers": 0}), c(stride=2), *headed("2,0")],
    "scale_x_y": [c(stride=2), *headed(scale_x_y=1.2)],
    "new_coords": [c(stride=2), *headed(activation="logistic", new_coords=1, scale_x_y=2.0)],
    "new_coords of a linear convolution": [c(stride=2), *headed(new_coords=1, scale_x_y=2.0)],
    "both kinds of head": [c(), *headed(), ("route", {"layers": 0}), *headed("3,4", activation="logistic", new_coords=1)],
    "one class": [c(), *headed(classes=1)],
    "one anchor": [c(), *headed("5")],
    "region": [c(stride=2), *region(classes=5)],
    "region of one class": [c(), *region(classes=1)],
    "region beside a yolo": [c(), *region(), ("route", {"layers": 0}), c(stride=2), *headed("1,4", scale_x_y=1.1)],
    "region of uneven strides": [c(stride=2), ("maxpool", {"size": 2, "stride": 2}), c(stride_x=2), *region()],
    "Gaussian": [c(stride=2), *gaussian(scale_x_y=1.2), ("route", {"layers": 0}), *gaussian("5,3", 2)],
    "Gaussian of one class beside a yolo": [c(), *headed(classes=1), ("route", {"layers": 0}), *gaussian("4", 1)],
    "YOLOv2": [
        c(4),
        ("maxpool", {"size": 2, "stride": 2}),
        c(8),
        ("route", {"layers": 0}),
        ("reorg", {"stride": 2}),
        ("route", {"layers": "-1,2"}),
        *region(3),
    ],
    "batchnorm": [c(activation="linear"), ("batchnorm", {}), c(), ("batchnorm", {}), ("activation", {"activation": "leaky"})],
    "activation": [c(activation="linear"), ("activation", {"activation": "elu"}), c(), ("activation", {})],
    "maxpool_depth": [
        c(8),
        ("maxpool", {"maxpool_depth": 1, "out_channels": 4}),
        c(7),
        ("maxpool", {"maxpool_depth": 1, "out_channels": 3}),
        c(5),
        ("maxpool", {"maxpool_depth": 1, "size": 3, "stride": 2}),
    ],
    "antialiasing": [
        c(stride=2, antialiasing=1, batch_normalize=1),
        c(activation="mish", antialiasing=1),
        c(5, 1, stride_x=2, antialiasing=2),
    ],
    "maxpool antialiasing": [
        c(),
        ("maxpool", {"size": 2, "stride": 2, "antialiasing": 1}),
        ("maxpool", {"size": 3, "stride": 1, "stride_x": 2, "antialiasing": 2}),
    ],
    "share_index": [
        c(batch_normalize=1),
        c(batch_normalize=1),
        c(batch_normalize=1, share_index=-1, activation="mish"),
        c(batch_normalize=1, share_index=2, dilation=2),
        c(7),
        ("route", {"layers": -2}),
        c(7, share_index=4, stride=2),
    ],
    "xnor": [c(8, batch_normalize=1), c(12, batch_normalize=1, xnor=1, groups=4), c(6, xnor=1, activation="relu")],
    "xnor of 32 channels": [c(32, batch_normalize=1), c(32, xnor=1, batch_normalize=1, stride=2), c(8, 1, xnor=1)],
    "bin_output": [
        c(8, batch_normalize=1),
        c(8, xnor=1, bin_output=1, batch_normalize=1),
        ("maxpool", {"size": 2, "stride": 2}),
        c(8, xnor=1, bin_output=1, batch_normalize=1),
        c(8, xnor=1, bin_output=1, activation="mish"),
        ("shortcut", {"from": -2}),
        ("route", {"layers": "-1,3"}),
        c(8, xnor=1, bin_output=1, activation="relu"),
    ],
    "binary": [c(), c(12, binary=1, groups=3, batch_normalize=1), c(binary=1)],
    "upsample by a negative stride": [c(), ("upsample", {"stride": -2}), ("upsample", {"stride": -2, "scale": 0.5})],
    "route_lhalf": [c(8), c(4), ("route_lhalf", {"layers": -1}), c(6), ("route_lhalf", {"layers": "-1,0"})],
    "layers that nobody reads": [
        c(8),
        ("softmax", {"groups": 2}),
        ("route", {"layers": 0}),
        ("cost", {"type": "sse"}),
        ("route", {"layers": 0}),
        c(),
        *headed(embedding_layer=5),
        ("route", {"layers": 5}),
        ("contrastive", {"classes": 1, "yolo_layer": -2}),
        ("route", {"layers": 5}),
        *headed("3,4,5"),
    ],
    "implicit": [c(6), ("implicit", {"filters": 6, "mean": 1, "std": 0.02}), ("scale_channels", {"from": 0}), c()],
    "keys that count in training": [c(sway=1), c(rotate=1), c(stretch=1), c(stretch_sway=1, bin_output=1)],
    "head behind a shortcut": [c(), c(21, 1, "linear"), c(21), ("shortcut", {"from": -2}), y()],
}
WIDTH, HEIGHT = 12, 8
"""Not square; 12 and 8 make odd and even sizes on the way down."""


@dataclass(frozen=True)
class Case:
    """A network, its image and what loops compute as its outputs."""

    cfg: Path
    weights: Path
    image: Array
    loops: Loops


def case_of(folder: Path, micro: Micro) -> Case:
    """Ends the sections in a head if they have none; writes cfg and weights."""
    sections, gain, shape = micro
    sections = sections if sections[-1][0] in ("yolo", "region", "Gaussian_yolo") else [*sections, *headed()]
    image = np.random.default_rng(3).uniform(0, 1, shape).astype(np.float32)
    loops = Loops(seed=7, gain=gain)
    loops.forward(sections, image.astype(np.float64))
    channels, height, width = shape
    (folder / "case.cfg").write_text(net(width, height, channels) + "".join(section(kind, **o) for kind, o in sections))
    (folder / "case.weights").write_bytes(weights_bytes(np.concatenate(loops.floats)))
    return Case(folder / "case.cfg", folder / "case.weights", image[np.newaxis], loops)


# --- the networks ---


class Micro(NamedTuple):
    """A network's sections, the gain of its first layer's weights and the shape of its image."""

    sections: list[Section]
    gain: float = 1.0
    shape: tuple[int, int, int] = (3, HEIGHT, WIDTH)


def _every_activation(name: str) -> list[Section]:
    return [
        c(),
        c(activation=name),
        ("shortcut", {"from": -2, "activation": name}),
        ("sam", {"from": -2, "activation": name}),
        ("avgpool", {}),
        ("scale_channels", {"from": 0, "activation": name}),
        ("activation", {"activation": name}),
    ]


_POOLS = ("maxpool 2/2", "maxpool 2/1", "maxpool 3/2", "spp", "maxpool padding", "local_avgpool")
OF_LAYERS = {name: Micro(sections) for name, sections in LAYERS.items()}
OF_ODD_SIZES = {f"{name}, odd sizes": Micro(LAYERS[name], shape=(2, 13, 11)) for name in _POOLS}
OF_ACTIVATIONS = {
    # the one that takes no maximum off overflows earlier
    name: Micro([c(activation=name)], gain=4.0 if name == "normalize_channels_softmax" else 60.0)
    for name in (*SCALAR, *NORMALIZING)
}
"""Driven far beyond the range in which activations bend; boxes from such numbers are astronomic."""
WITH_ACTIVATIONS = {
    f"every layer with {name}": Micro(_every_activation(name)) for name in ("mish", "swish", "hard_mish", "relu6", "tanh")
}
"""Where darknet's own code gives zeros (hard_mish of a shortcut, mish of sam and [activation]), it is what was meant."""
OF_CHANNELS = {f"{channels} channels": Micro([c()], shape=(channels, 7, 9)) for channels in (1, 4)}
MICRO = {**OF_LAYERS, **OF_ODD_SIZES, **OF_ACTIVATIONS, **WITH_ACTIVATIONS, **OF_CHANNELS}
