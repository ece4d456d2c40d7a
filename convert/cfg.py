"""Darknet ``.cfg`` files, parsed once into frozen records that keep their line numbers.

The reading rules are darknet's (``read_cfg`` in parser.c, option_list.c): all white space is removed, only whole-line
comments exist, the first of duplicate keys wins. Where darknet guesses silently (an unknown activation becomes ReLU, an
unknown key is ignored), this parser raises instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from darktrt.errors import DarktrtError, quote
from darktrt.files import TEXT_BYTES, read_bytes
from darktrt.metadata import HeadKind, NmsKind, box_channels

if TYPE_CHECKING:
    from darktrt.convert.shapes import Shape

ACTIVATIONS = (
    "linear logistic loggy relu relu6 elu selu gelu relie ramp leaky revleaky tanh stair plse "
    "hardtan lhtan swish mish hard_mish normalize_channels normalize_channels_softmax normalize_channels_softmax_maxval"
).split()
"""Names that darknet accepts after ``activation=`` (activations.c, ``get_activation``)."""
_ACTIVATION_ALIASES = {"silu": "swish"}
"""``silu`` is x * sigmoid(x) in the cfgs of YOLOR (models.py), which darknet calls swish."""


@dataclass(frozen=True)
class Layer:
    """One section. ``sources`` are absolute indices of the layers it reads; -1 is the network's input."""

    index: int
    line: int
    kind: str
    sources: tuple[int, ...]

    @property
    def passes_on(self) -> bool:
        """Whether the output is the input itself."""
        return False


@dataclass(frozen=True)
class Convolutional(Layer):
    """``padding`` is in pixels before it is multiplied by ``dilation``."""

    filters: int
    size: int
    stride_x: int
    stride_y: int
    padding: int
    dilation: int
    groups: int
    batch_normalize: bool
    activation: str
    blur: int = 0
    """The size of the blur that follows and has the strides (``antialiasing``); 0 for none."""
    binary_weights: bool = False
    """Whether each filter's weights are their mean magnitude with their signs (``binary``, ``xnor``)."""
    binary_inputs: bool = False
    """Whether what it reads counts as 1 above 0 and else as -1, padding included (``xnor``)."""
    binary_outputs: bool = False
    """Whether those who read it want the signs alone (``bin_output``)."""
    shares: int | None = None
    """The layer whose weights it computes with, in place of its own."""


@dataclass(frozen=True)
class BatchNorm(Layer):
    """[batchnorm]: batch normalisation by itself."""


@dataclass(frozen=True)
class Activation(Layer):
    activation: str


@dataclass(frozen=True)
class Pool(Layer):
    """[maxpool] and [local_avgpool]; ``padding`` is the total of both sides."""

    size: int
    stride_x: int
    stride_y: int
    padding: int
    blur: int = 0
    """As that of :class:`Convolutional`."""


@dataclass(frozen=True)
class ChannelPool(Layer):
    """[maxpool] with ``maxpool_depth``: the largest of every ``out_channels``-th channel."""

    out_channels: int


@dataclass(frozen=True)
class GlobalAverage(Layer):
    """[avgpool]: the mean over rows and columns."""


@dataclass(frozen=True)
class Upsample(Layer):
    """With ``reverse`` (a negative ``stride`` in the cfg) it sums squares of that side in place of repeating."""

    stride: int
    scale: float
    reverse: bool = False


@dataclass(frozen=True)
class Route(Layer):
    groups: int
    group_id: int

    @property
    def passes_on(self) -> bool:
        return len(self.sources) == 1 and self.groups == 1


@dataclass(frozen=True)
class Shortcut(Layer):
    """``sources[0]`` is the previous layer, whose shape the output has; the others are ``from``."""

    activation: str
    weights_type: Literal["none", "per_feature", "per_channel"]
    normalization: Literal["none", "relu", "softmax"]


@dataclass(frozen=True)
class Sam(Layer):
    """``sources`` are the previous layer and ``from``, multiplied element by element."""

    activation: str


@dataclass(frozen=True)
class ScaleChannels(Layer):
    """``sources``: the factors (1 x 1 per channel, or one channel over h x w with ``scale_wh``), then ``from``."""

    scale_wh: bool
    activation: str


@dataclass(frozen=True)
class Implicit(Layer):
    """[implicit]: learned numbers, ``filters`` channels of ``atoms`` rows and one column; it reads no layer."""

    filters: int
    atoms: int


@dataclass(frozen=True)
class Dropout(Layer):
    """[dropout] and [empty]: does nothing at inference."""

    @property
    def passes_on(self) -> bool:
        return True


@dataclass(frozen=True)
class Unread(Layer):
    """[softmax], [cost] and [contrastive]: their output is for training or for classifiers, and no layer may read it."""

    @property
    def passes_on(self) -> bool:
        return True


@dataclass(frozen=True)
class Reorg(Layer):
    """[reorg] is darknet's old element order, [reorg3d] a true space-to-depth; ``reverse`` goes the other way."""

    stride: int
    reverse: bool

    @property
    def passes_on(self) -> bool:
        return self.stride == 1


@dataclass(frozen=True)
class Yolo(Layer):
    """A head: [yolo], [region] or [Gaussian_yolo]."""

    mask: tuple[int, ...]
    anchors: tuple[tuple[float, float], ...]
    """All anchors (width, height), in pixels of the network input or, of a [region], in cells.

    The head uses those of ``mask``.
    """
    classes: int
    scale_x_y: float
    new_coords: bool
    nms_kind: NmsKind
    beta_nms: float
    iou_thresh: float
    head_kind: HeadKind = "yolo"

    @property
    def box_channels(self) -> int:
        """The channels of each anchor before objectness and the classes."""
        return box_channels(self.head_kind)

    @property
    def anchor_channels(self) -> int:
        """All channels of each anchor."""
        return self.box_channels + 1 + self.classes


@dataclass(frozen=True)
class Network:
    """A whole cfg. ``path`` is for error messages."""

    path: str
    width: int
    height: int
    channels: int
    letter_box: bool
    layers: tuple[Layer, ...]

    def owner(self, layer: Layer) -> Layer:
        """The layer whose weights ``layer`` computes with: itself, or the one that it shares those of."""
        while isinstance(layer, Convolutional) and layer.shares is not None:
            layer = self.layers[layer.shares]
        return layer

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The output shape of every layer, inferred once.

        Raises:
            DarktrtError: a layer cannot use what it reads; the message names the line.
        """
        from darktrt.convert.shapes import infer_shapes

        return infer_shapes(self)

    def anchors(self, head: Yolo) -> tuple[tuple[float, float], ...]:
        """The anchors (width, height) of the mask of a head, in pixels of the network input.

        Raises:
            DarktrtError: as :attr:`shapes`.
        """
        chosen = tuple(head.anchors[m] for m in head.mask)
        if head.head_kind != "region":
            return chosen
        cells = self.shapes[head.index]
        return tuple((w * self.width / cells.width, h * self.height / cells.height) for w, h in chosen)

    def resized(self, width: int, height: int) -> Network:
        """The same network for another input size."""
        return replace(self, width=width, height=height)

    def error(self, layer: Layer, message: str) -> DarktrtError:
        """An error that names the file and the line of ``layer``'s section."""
        return DarktrtError(f"{self.path}:{layer.line}: [{layer.kind}] {message}")


def read_cfg(path: str | Path) -> Network:
    """Parse a darknet cfg.

    Raises:
        DarktrtError: the file cannot be read or is no detector cfg; the message names the line.
    """
    sections = _sections(str(path), _read_text(path))
    _refuse_other_heads(str(path), sections)
    net = _Options(str(path), sections[0])
    if sections[0].kind not in ("net", "network"):
        raise net.error("the first section must be [net]")
    width, height, channels = (net.positive(key) for key in ("width", "height", "channels"))
    letter_box = net.integer("letter_box", 0) != 0
    net.finish(_NET_IGNORED)
    layers: list[Layer] = []
    for index, section in enumerate(sections[1:]):
        layers.append(_layer(_Options(str(path), section), index))
    layers = _without_needless_activations(layers)
    if not any(isinstance(layer, Yolo) for layer in layers):
        raise DarktrtError(f"{path}: has no [yolo], [region] or [Gaussian_yolo] section; darktrt converts YOLO detectors")
    return Network(str(path), width, height, channels, letter_box, tuple(layers))


def _without_needless_activations(layers: Sequence[Layer]) -> list[Layer]:
    """The layers as ``detector test`` computes them: with ``bin_output`` a binary convolution has no activation.

    A layer that needs more than signs switches that off for those that it names or follows (parser.c,
    ``calculate_binary_weights`` in network.c).
    """
    wanted: set[int] = set()
    for layer in layers:
        if isinstance(layer, Route):
            wanted.update(layer.sources)
        elif isinstance(layer, (Shortcut, Sam, ScaleChannels)):
            wanted.update(layer.sources[:2])
    return [
        replace(layer, activation="linear")
        if isinstance(layer, Convolutional) and layer.binary_inputs and layer.binary_outputs and layer.index not in wanted
        else layer
        for layer in layers
    ]


def _refuse_other_heads(path: str, sections: Sequence[_Section]) -> None:
    """Tell of a head that is not decoded before anything else: the network's other sections and keys do not matter then."""
    for section in sections:
        if section.kind == "region" and "tree" in section.options:
            raise _Options(path, section).error(_REFUSED_TREE, "tree")
        if section.kind in _REFUSED_HEADS:
            raise _Options(path, section).error(_REFUSED_HEADS[section.kind])


def _read_text(path: str | Path) -> str:
    data = read_bytes(path, TEXT_BYTES)
    if b"\0" in data:
        raise DarktrtError(f"{path}: is a binary file, not a cfg; are cfg and weights swapped?")
    text = data.decode("utf-8-sig", errors="replace")
    if text.lstrip()[:1] == "<":
        raise DarktrtError(f"{path}: is an HTML page, not a cfg; download the raw file")
    return text


@dataclass(frozen=True)
class _Section:
    kind: str
    line: int
    options: dict[str, tuple[str, int]]
    apart: dict[str, str]
    """Of the options in which white space, but no comma, parts two numbers: those two, as written."""


def _sections(path: str, text: str) -> list[_Section]:
    sections: list[_Section] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = re.sub(r"\s", "", raw)
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            if not re.fullmatch(r"\[[\w-]+\]", line):
                found = quote(raw.strip())
                raise DarktrtError(f"{path}:{number}: '{found}' is no section header; write [name] alone on its line")
            sections.append(_Section(line[1:-1], number, {}, {}))
            continue
        key, equals, value = line.partition("=")
        if not equals or not key or not value:
            raise DarktrtError(f"{path}:{number}: '{quote(raw.strip(), 60)}' is neither a [section] nor key=value")
        if not sections:
            raise DarktrtError(f"{path}:{number}: '{quote(key)}' precedes the first section; a cfg begins with [net]")
        if key not in sections[-1].options and (apart := _apart(raw.partition("=")[2])):
            sections[-1].apart[key] = apart
        sections[-1].options.setdefault(key, (value, number))
    if not sections:
        raise DarktrtError(f"{path}: is empty; a cfg begins with [net]")
    return sections


def _apart(value: str) -> str | None:
    """The first two numbers of a list that white space alone parts, as in ``10,14 23,27``."""
    for part in value.partition("#")[0].split(","):
        words = part.split()
        if len(words) > 1 and all(re.fullmatch(_REAL, word) for word in words[:2]):
            return " ".join(words[:2])
    return None


class _Options:
    """Typed access to the options of one section; records which keys were read, so that the others can be refused."""

    def __init__(self, path: str, section: _Section) -> None:
        self.path, self.section = path, section
        self.asked: set[str] = set()

    def error(self, message: str, key: str | None = None) -> DarktrtError:
        line = self.section.options[key][1] if key in self.section.options else self.section.line
        return DarktrtError(f"{self.path}:{line}: [{quote(self.section.kind)}] {message}")

    def text(self, key: str, default: str | None = None) -> str:
        self.asked.add(key)
        if key in self.section.options:
            return self.section.options[key][0]
        if default is None:
            close = get_close_matches(key, self.section.options, n=1)
            hint = f"; is '{quote(close[0])}' a misspelling?" if close else ""
            raise self.error(f"needs '{key}='{hint}")
        return default

    def integer(self, key: str, default: int | None = None) -> int:
        text = self.text(key, None if default is None else str(default))
        return self._number(key, text, _INTEGER, int, "a whole number")

    def real(self, key: str, default: float | None = None) -> float:
        text = self.text(key, None if default is None else repr(default))
        return self._number(key, text, _REAL, float, "a number")

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self.error(f"'{key}={value}' must be at least 1", key)
        return value

    def integers(self, key: str, default: str | None = None) -> list[int]:
        return [self._number(key, part, _INTEGER, int, "a whole number", self._listed) for part in self._parts(key, default)]

    def reals(self, key: str) -> list[float]:
        return [self._number(key, part, _REAL, float, "a number", self._listed) for part in self._parts(key)]

    def comma(self, key: str) -> str:
        """The question that follows an error if a comma seems to be missing between two numbers of a list."""
        if key not in self.section.apart:
            return ""
        apart = quote(self.section.apart[key], 40)
        return f"; is a comma missing in '{apart}'? darknet removes the space and reads one number"

    def _listed(self, key: str, text: str) -> str:
        """What darknet's atoi or atof makes of a faulty number of a list."""
        pattern = _INTEGER if key in ("layers", "from", "mask") else _REAL
        found = re.match(pattern, text)
        if not found:
            return "; darknet would read 0, which is hardly meant"
        asked = self.comma(key) or "; is a comma missing?"
        return f"; darknet would read {quote(found[0])} and nothing of the rest, which is hardly meant{asked}"

    def choice(self, key: str, default: str, choices: Mapping[str, _T]) -> _T:
        value = self.text(key, default)
        if value not in choices:
            close = get_close_matches(value, choices, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(choices)}"
            raise self.error(f"'{key}={quote(value)}' is not known; {hint}", key)
        return choices[value]

    def activation(self, default: str) -> str:
        if self.text("activation", default).partition("#")[0] == "h_swish":
            raise self.error(f"'activation=h_swish' is hard swish, not swish, and {_ULTRALYTICS}", "activation")
        return self.choice("activation", default, {name: name for name in ACTIVATIONS} | _ACTIVATION_ALIASES)

    def finish(self, ignored: frozenset[str], refused: Mapping[str, int | None] | None = None) -> None:
        """Refuse keys that nobody asked for, and those whose effect is not supported when they are switched on."""
        refused = refused or {}
        for key, neutral in refused.items():
            if key in self.section.options and (neutral is None or self.integer(key) != neutral):
                why = f": {_WHY[key]}" if key in _WHY else ""
                value = quote(self.text(key))
                raise self.error(f"'{key}={value}' changes what the network computes and is not supported{why}", key)
        known = self.asked | ignored | set(refused)
        for key in self.section.options:
            if key not in known:
                close = get_close_matches(key, known, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else "; remove it if it only matters for training"
                raise self.error(f"has no '{quote(key)}'{hint}", key)

    def _parts(self, key: str, default: str | None = None) -> list[str]:
        text = self.text(key, default).partition("#")[0]
        return text.removesuffix(",").split(",")

    def _number(
        self,
        key: str,
        text: str,
        pattern: str,
        kind: Callable[[str], _N],
        noun: str,
        advice: Callable[[str, str], str] = lambda key, text: "",
    ) -> _N:
        # darknet's atoi and atof stop at the first character they do not know, so `size=3 # x` is 3
        match = re.fullmatch(rf"({pattern})(?:[#;].*)?", text)
        if not match or not isfinite(value := kind(match[1])):
            raise self.error(f"'{key}={quote(text, 40)}' is not {noun}{advice(key, text)}", key)
        return value


_T = TypeVar("_T")
_N = TypeVar("_N", int, float)
_INTEGER = r"[+-]?\d{1,9}"  # darknet's are of 32 bits
_REAL = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def _layer(options: _Options, index: int) -> Layer:
    kind = _ALIASES.get(options.section.kind, options.section.kind)
    if kind not in _PARSERS:
        raise options.error(
            _REFUSED_SECTIONS.get(kind, f"is not supported; darktrt knows {', '.join(sorted(_PARSERS, key=str.lower))}")
        )
    layer = _PARSERS[kind](options, _Position(index, options.section.line, kind))
    options.finish(_IGNORED.get(kind, frozenset()) | _COMMON_IGNORED, {**_COMMON_REFUSED, **_REFUSED.get(kind, {})})
    return layer


@dataclass(frozen=True)
class _Position:
    """The position of a section; ``previous`` is the layer that it reads by default."""

    index: int
    line: int
    kind: str

    @property
    def previous(self) -> int:
        return self.index - 1

    def at(self, *sources: int) -> tuple[int, int, str, tuple[int, ...]]:
        return self.index, self.line, self.kind, sources


def _sources(options: _Options, position: _Position, key: str) -> list[int]:
    """Absolute layer indices: negative numbers count back from this layer."""
    absolute = []
    for number in options.integers(key):
        source = position.index + number if number < 0 else number
        if not 0 <= source < position.index:
            last = f"; layers 0 to {position.index - 1} precede it" if position.index else "; no layer precedes it"
            fault = f"'{key}' names layer {number}, which is not before layer {position.index}{last}"
            raise options.error(fault + options.comma(key), key)
        absolute.append(source)
    return absolute


def _strides(options: _Options) -> tuple[int, int]:
    stride = options.positive("stride", 1)
    return options.positive("stride_x", stride), options.positive("stride_y", stride)


def _convolutional(options: _Options, position: _Position) -> Convolutional:
    size = options.positive("size", 1)
    stride_x, stride_y = _strides(options)
    padding, dilation = options.integer("padding", 0), options.positive("dilation", 1)
    if padding < 0:
        raise options.error(f"'padding={padding}' must not be negative", "padding")
    normalize = options.integer("batch_normalize", 0) != 0 or options.integer("cbn", 0) != 0
    binary, groups = options.integer("xnor", 0) != 0, options.positive("groups", 1)
    layer = Convolutional(
        *position.at(position.previous),
        filters=options.positive("filters", 1),
        size=size,
        stride_x=stride_x,
        stride_y=stride_y,
        padding=size // 2 if options.integer("pad", 0) else padding,
        dilation=1 if size == 1 else dilation,
        groups=1 if binary else groups,  # as darknet has it
        batch_normalize=normalize,
        activation=options.activation("logistic"),
        blur=_blur(options),
        binary_weights=options.integer("binary", 0) != 0 or binary,
        binary_inputs=binary,
        binary_outputs=options.integer("bin_output", 0) != 0,
        shares=_shared(options, position),
    )
    if layer.binary_inputs:
        _check_binary(options, layer)
    return layer


def _blur(options: _Options) -> int:
    """The size of the blur by the value of ``antialiasing`` (``make_convolutional_layer``, ``make_maxpool_layer``)."""
    return {0: 0, 2: 2}.get(options.integer("antialiasing", 0), 3)


def _shared(options: _Options, position: _Position) -> int | None:
    return _sources(options, position, "share_index")[0] if "share_index" in options.section.options else None


def _check_binary(options: _Options, layer: Convolutional) -> None:
    """Refuse what darknet computes otherwise when it tests than when it trains."""
    wrong = {
        "dilation": layer.dilation > 1,
        "stride_x": layer.stride_x != layer.stride_y,
        "antialiasing": layer.blur > 0,
    }
    for key in (key for key, is_wrong in wrong.items() if is_wrong):
        raise options.error(
            f"has 'xnor=1' with '{key}', which darknet computes in one way when it trains and in another when it tests", "xnor"
        )


def _pool(options: _Options, position: _Position) -> Pool | ChannelPool:
    stride_x, stride_y = _strides(options)
    size = options.positive("size", options.positive("stride", 1))
    padding = options.integer("padding", size - 1)
    if not 0 <= padding <= 2 * (size - 1):
        raise options.error(f"'padding={padding}' for size {size} must lie in 0..{2 * (size - 1)}", "padding")
    blur = _blur(options) if position.kind == "maxpool" else 0
    if position.kind == "maxpool" and options.integer("maxpool_depth", 0):
        if blur:
            raise options.error(
                "has 'maxpool_depth' with 'antialiasing', and darknet does not compute the blur", "antialiasing"
            )
        return ChannelPool(*position.at(position.previous), out_channels=options.positive("out_channels", 1))
    return Pool(*position.at(position.previous), size=size, stride_x=stride_x, stride_y=stride_y, padding=padding, blur=blur)


def _batchnorm(options: _Options, position: _Position) -> BatchNorm:
    return BatchNorm(*position.at(position.previous))


def _activation(options: _Options, position: _Position) -> Activation:
    return Activation(*position.at(position.previous), activation=options.activation("linear"))


def _avgpool(options: _Options, position: _Position) -> GlobalAverage:
    return GlobalAverage(*position.at(position.previous))


def _upsample(options: _Options, position: _Position) -> Upsample:
    stride = options.integer("stride", 2)
    if stride == 0:
        raise options.error("'stride=0' must not be 0", "stride")
    return Upsample(*position.at(position.previous), stride=abs(stride), scale=options.real("scale", 1.0), reverse=stride < 0)


def _route_lhalf(options: _Options, position: _Position) -> Route:
    """The first half of each source, as ``FeatureConcat_l`` of WongKinYiu's PyTorch code cuts it."""
    return Route(*position.at(*_sources(options, position, "layers")), groups=2, group_id=0)


def _route(options: _Options, position: _Position) -> Route:
    sources = _sources(options, position, "layers")
    groups, group_id = options.positive("groups", 1), options.integer("group_id", 0)
    if not 0 <= group_id < groups:
        raise options.error(f"'group_id={group_id}' must lie in 0..{groups - 1}", "group_id")
    return Route(*position.at(*sources), groups=groups, group_id=group_id)


def _shortcut(options: _Options, position: _Position) -> Shortcut:
    return Shortcut(
        *position.at(position.previous, *_sources(options, position, "from")),
        activation=options.activation("linear"),
        weights_type=options.choice("weights_type", "none", _WEIGHTS_TYPES),
        normalization=options.choice("weights_normalization", "none", _NORMALIZATIONS),
    )


def _single_source(options: _Options, position: _Position) -> int:
    sources = _sources(options, position, "from")
    if len(sources) != 1:
        raise options.error(f"'from' names {len(sources)} layers; it accepts one", "from")
    return sources[0]


def _sam(options: _Options, position: _Position) -> Sam:
    source = _single_source(options, position)
    return Sam(*position.at(position.previous, source), activation=options.activation("linear"))


def _scale_channels(options: _Options, position: _Position) -> ScaleChannels:
    return ScaleChannels(
        *position.at(position.previous, _single_source(options, position)),
        scale_wh=options.integer("scale_wh", 0) != 0,
        activation=options.activation("linear"),
    )


def _implicit(options: _Options, position: _Position) -> Implicit:
    return Implicit(*position.at(), filters=options.positive("filters", 128), atoms=options.positive("atoms", 1))


def _dropout(options: _Options, position: _Position) -> Dropout:
    return Dropout(*position.at(position.previous))


def _unread(options: _Options, position: _Position) -> Unread:
    return Unread(*position.at(position.previous))


def _reorg(options: _Options, position: _Position) -> Reorg:
    reverse = options.integer("reverse", 0) != 0
    return Reorg(*position.at(position.previous), stride=options.positive("stride", 1), reverse=reverse)


MOST_CLASSES = 2**16
"""Each has a name that every file made of the network carries."""


def _masked(options: _Options) -> tuple[tuple[tuple[float, float], ...], tuple[int, ...]]:
    """Anchors and mask."""
    total = options.positive("num", 1)
    anchors = _anchors(options, total)
    mask = options.integers("mask", ",".join(map(str, range(total))))
    if wrong := [m for m in mask if not 0 <= m < total]:
        fault = f"'mask' names anchor {wrong[0]}, but 'num={total}' allows 0..{total - 1}"
        darknet = "darknet would decode with what lies in memory beside its anchors; write the 'num' of the training"
        raise options.error(f"{fault}; {options.comma('mask').removeprefix('; ') or darknet}", "mask")
    return anchors, tuple(mask)


def _yolo(options: _Options, position: _Position) -> Yolo:
    anchors, mask = _masked(options)
    return Yolo(
        *position.at(position.previous),
        mask=mask,
        anchors=anchors,
        classes=_classes(options),
        scale_x_y=_scale_x_y(options),
        new_coords=options.integer("new_coords", 0) != 0,
        nms_kind=options.choice("nms_kind", "default", _NMS_KINDS),
        beta_nms=options.real("beta_nms", 0.6),
        iou_thresh=options.real("iou_thresh", 1.0),
    )


def _gaussian_yolo(options: _Options, position: _Position) -> Yolo:
    """The head of Gaussian YOLOv3 (gaussian_yolo_layer.c)."""
    anchors, mask = _masked(options)
    if (point := options.text("yolo_point", "center")) in ("left_top", "right_bottom"):
        raise options.error(f"'yolo_point={point}' makes x and y a corner, and darktrt decodes centres of boxes", "yolo_point")
    return Yolo(
        *position.at(position.previous),
        mask=mask,
        anchors=anchors,
        classes=_classes(options),
        scale_x_y=_scale_x_y(options),
        new_coords=False,
        # diounms_sort in box.c suppresses by IoU alone for cornersnms
        nms_kind=options.choice("nms_kind", "default", {**_NMS_KINDS, "cornersnms": "plain"}),
        beta_nms=options.real("beta_nms", 0.6),
        iou_thresh=options.real("iou_thresh", 1.0),
        head_kind="Gaussian_yolo",
    )


def _region(options: _Options, position: _Position) -> Yolo:
    """The head of YOLOv2 (``get_region_boxes`` in region_layer.c): anchors are in cells, and NMS is plain."""
    total = options.positive("num", 1)
    if options.integer("softmax", 0) == 0:
        raise options.error(_NO_SOFTMAX, "softmax")
    if options.integer("classfix", 0) == -1:
        raise options.error("'classfix=-1' drops every box with an objectness below .5, which darktrt does not", "classfix")
    return Yolo(
        *position.at(position.previous),
        mask=tuple(range(total)),
        anchors=_anchors(options, total, "cells"),
        classes=_classes(options),
        scale_x_y=1.0,
        new_coords=False,
        nms_kind="plain",
        beta_nms=0.6,
        iou_thresh=1.0,
        head_kind="region",
    )


def _classes(options: _Options) -> int:
    value = options.positive("classes", 20)
    if value > MOST_CLASSES:
        raise options.error(f"'classes={value}' is more than {MOST_CLASSES}; is it mistyped?", "classes")
    return value


def _scale_x_y(options: _Options) -> float:
    value = options.real("scale_x_y", 1.0)
    if value <= 0:
        raise options.error(f"'scale_x_y={value:g}' must be greater than 0", "scale_x_y")
    return value


def _anchors(options: _Options, total: int, unit: str = "pixels") -> tuple[tuple[float, float], ...]:
    numbers = options.reals("anchors")
    if len(numbers) < 2 * total:
        fault = f"'anchors' has {len(numbers)} numbers, but 'num={total}' needs {2 * total}"
        darknet = f"; darknet would take 0.5 {unit} for each that lacks, which is hardly meant; write all"
        raise options.error(fault + darknet + options.comma("anchors"), "anchors")
    pairs = tuple(zip(numbers[0 : 2 * total : 2], numbers[1 : 2 * total : 2], strict=True))
    if min(map(min, pairs)) <= 0:
        raise options.error(f"'anchors' must be greater than 0 (width, height in {unit} of the network input)", "anchors")
    return pairs


_PARSERS: dict[str, Callable[[_Options, _Position], Layer]] = {
    "convolutional": _convolutional,
    "maxpool": _pool,
    "local_avgpool": _pool,
    "avgpool": _avgpool,
    "batchnorm": _batchnorm,
    "activation": _activation,
    "upsample": _upsample,
    "route": _route,
    "route_lhalf": _route_lhalf,
    "shortcut": _shortcut,
    "sam": _sam,
    "scale_channels": _scale_channels,
    "implicit": _implicit,
    "dropout": _dropout,
    "empty": _dropout,
    "softmax": _unread,
    "cost": _unread,
    "contrastive": _unread,
    "reorg": _reorg,
    "reorg3d": _reorg,
    "yolo": _yolo,
    "region": _region,
    "Gaussian_yolo": _gaussian_yolo,
}
_ALIASES = {
    "conv": "convolutional",
    "max": "maxpool",
    "avg": "avgpool",
    "conn": "connected",
    "local_avg": "local_avgpool",
    "silence": "empty",
    "soft": "softmax",
    "lrn": "normalization",
}
_ONLY_YOLO = "convert a network with [yolo], [region] or [Gaussian_yolo] heads"
_REFUSED_HEADS = {
    "detection": f"is the head of YOLOv1, which darktrt does not decode; {_ONLY_YOLO}",
}
_REFUSED_TREE = f"with 'tree=' is the head of YOLO9000, whose tree of classes darktrt does not decode; {_ONLY_YOLO}"
_NO_SOFTMAX = (
    "needs 'softmax=1': without it the scores of classes are raw numbers to AlexeyAB's darknet, and logistic ones to Redmon's"
)
_RECURRENT = "carries a state from one frame of a video to the next, and darktrt converts networks that see one image at a time"
_ULTRALYTICS = "is of PyTorch code after ultralytics' YOLOv3; darknet does not know it"
_PJREDDIE = "is of pjreddie's darknet; AlexeyAB's, whose numbers are those of darktrt, does not know it"
_YOLOR = "is of YOLOR's PyTorch code, not of darknet, and darktrt lacks it: {}"
_REFUSED_SECTIONS = {
    "local": "has weights of its own for every position, as in YOLOv1, and darktrt has no such convolution; " + _ONLY_YOLO,
    "connected": "ties the network to one input size, as in YOLOv1, and darktrt has no fully connected layers; " + _ONLY_YOLO,
    "implicit_add": _YOLOR.format("it outputs learned numbers, which .weights files do not hold"),
    "implicit_mul": _YOLOR.format("it outputs learned numbers, which .weights files do not hold"),
    "shift_channels": _YOLOR.format("it adds the numbers of an [implicit_add], which .weights files do not hold"),
    "control_channels": _YOLOR.format("it multiplies by the numbers of an [implicit_mul], which .weights files do not hold"),
    "crop": "cuts the middle out of the image, as in YOLOv1, and darktrt shows its networks the whole image; " + _ONLY_YOLO,
    "normalization": "normalises over neighbouring channels, as in AlexNet, and no detector that darktrt knows of has it",
    **dict.fromkeys(("rnn", "gru", "lstm", "crnn", "conv_lstm", "history"), _RECURRENT),
    **dict.fromkeys(("depthwise", "se", "ca", "sa", "eca", "shuffleUnit", "BatchNorm2d"), _ULTRALYTICS),
    **dict.fromkeys(("deconvolutional", "l2norm", "logistic", "iseg"), _PJREDDIE),
}
_WEIGHTS_TYPES: dict[str, Literal["none", "per_feature", "per_channel"]] = {
    "none": "none",
    "per_feature": "per_feature",
    "per_layer": "per_feature",
    "per_channel": "per_channel",
}
_NORMALIZATIONS: dict[str, Literal["none", "relu", "softmax"]] = {
    "none": "none",
    "relu": "relu",
    "avg_relu": "relu",
    "softmax": "softmax",
}
_NMS_KINDS: dict[str, NmsKind] = {
    "default": "plain",
    "greedynms": "greedynms",
    "diounms": "diounms",
}

# Keys that matter only for training, tracking or scheduling (parser.c of AlexeyAB's darknet).
_COMMON_IGNORED = frozenset(
    "clip onlyforward dont_update burnin_update stopbackward train_only_bn learning_rate stream wait_stream".split()
)
_COMMON_REFUSED: dict[str, int | None] = {"dontload": 0, "dontloadscales": 0}
"""Keys and their neutral values; None where every value is refused."""
_REFUSED: dict[str, dict[str, int | None]] = {
    "convolutional": {"flipped": 0, "coordconv": 0},
    "softmax": {"tree": None},
    "yolo": {"from": None, "representation": None},
    "region": {"coords": 4, "background": 0},
}
_WHY = {
    "dontload": "its weights are not in the .weights file, and darknet takes random ones",
    "dontloadscales": "its batch normalisation is not in the .weights file",
    "flipped": "its weights are stored transposed, and no detector that darktrt knows of has them so",
    "coordconv": "darknet writes coordinates over its outputs on a GPU and not on a CPU, so there are two results",
    "coords": "the head of a detector has x, y, width and height",
    "background": "it takes the softmax over the background too, in place of objectness",
    "from": "the PyTorch code of ultralytics fuses heads by it (ASFF), which darknet does not know",
    "representation": "the fork g-darknet decodes widths and heights by it, linearly with 'lin', which no other darknet knows",
    "tree": "it is of YOLO9000, whose tree of classes darktrt does not know",
}
_IGNORED: dict[str, frozenset[str]] = {
    "convolutional": frozenset("assisted_excitation dot angle grad_centr reverse sway rotate stretch stretch_sway".split()),
    "maxpool": frozenset("out_channels maxpool_zero_nonmax".split()),
    "softmax": frozenset("groups temperature spatial noloss".split()),
    "cost": frozenset("type scale ratio".split()),
    "contrastive": frozenset("classes temperature yolo_layer cls_normalizer max_delta contrastive_neg_max".split()),
    "implicit": frozenset("mean std".split()),
    "dropout": frozenset("probability dropblock dropblock_size_rel dropblock_size_abs".split()),
    "yolo": frozenset(
        (
            "max show_details max_delta counters_per_class label_smooth_eps objectness_smooth iou_normalizer obj_normalizer "
            "cls_normalizer delta_normalizer uc_normalizer iou_loss iou_thresh_kind jitter resize focal_loss ignore_thresh "
            "truth_thresh random track_history_size sim_thresh dets_for_track dets_for_show track_ciou_norm embedding_layer "
            "map yolo_point beta1"
        ).split()
    ),
    "Gaussian_yolo": frozenset(
        (
            "max max_delta counters_per_class label_smooth_eps objectness_smooth uc_normalizer iou_normalizer obj_normalizer "
            "cls_normalizer delta_normalizer iou_loss iou_thresh_kind jitter resize ignore_thresh truth_thresh random map"
        ).split()
    ),
    "region": frozenset(
        (
            "max log sqrt focal_loss jitter resize rescore thresh absolute random coord_scale object_scale "
            "noobject_scale mask_scale class_scale bias_match map"
        ).split()
    ),
}
_NET_IGNORED = frozenset(
    (
        "batch subdivisions time_steps track augment_speed sequential_subdivisions try_fix_nan weights_reject_freq "
        "equidistant_point badlabels_rejection_percentage num_sigmas_reject_badlabels ema_alpha use_cuda_graph loss_scale "
        "dynamic_minibatch optimized_memory workspace_size_limit_MB adam B1 B2 eps inputs max_crop min_crop flip blur "
        "gaussian_noise mixup cutmix mosaic mosaic_bound contrastive contrastive_jit_flip contrastive_color unsupervised "
        "label_smooth_eps resize_step attention adversarial_lr max_chart_loss angle aspect saturation exposure hue power "
        "policy burn_in step scale steps scales seq_scales gamma learning_rate learning_rate_min sgdr_cycle sgdr_mult momentum "
        "decay max_batches max_epochs seen show_receptive_field input_calibration"
    ).split()
)
