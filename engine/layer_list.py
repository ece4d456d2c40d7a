"""The layers of a built engine, and which convolutions it really computes in INT8, from TensorRT's own layer list.

The list has two forms, neither of them documented. The engine inspector of full TensorRT returns JSON. TensorRT for RTX, whose
engines do not load without a driver, logs text while it builds. Both need ``ProfilingVerbosity.DETAILED``. The readers here
follow TensorRT 8.6.0 and TensorRT for RTX 1.7: a layer has the ONNX nodes that it computes in its ``Metadata``, as
``[ONNX Layer: /layers.1/Conv]``, and the types of its first input and its weights. A convolution is of unknown precision where
no layer has both types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from darktrt.engine.target import Target

if TYPE_CHECKING:
    import onnx

    from darktrt.engine.trt_types import TensorRT

UNKNOWN = "unknown, as TensorRT's list of layers does not report it"

_LEFT = "left in "
"""Begins the reason of a convolution that was not to be in INT8."""
_HEADER = "Layers:\n"
_SECTION = re.compile(r"/layers\.(\d{1,9})/", re.ASCII)
_NODES = re.compile(r"\[ONNX Layer: (.+?)\]")
_TEXT = re.compile(
    "Name: (?P<name>.*?), LayerType: (?P<type>.*?), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    "Outputs: (?P<rest>.*)"
)
_DATATYPE = re.compile(r"\bDatatype: (\w+)")
_LAYOUT = re.compile(r"\bFormat: ([^},]+)")
_TACTIC = re.compile(r"\bTacticName: ([^,]*)")
_KIND = re.compile(r"\b(int8|fp16|half|fp32|float)\b", re.IGNORECASE)
_KINDS = {"int8": "INT8", "fp16": "FP16", "half": "FP16", "fp32": "FP32", "float": "FP32"}
_DYNAMIC = "N/A due to dynamic shapes"
"""Stands for the type of an input in engines with a dynamic batch; the type of the weights is reported all the same."""
_CONVOLVES = re.compile(r"(correlation|gemm) .*|runtime_fusion .*(Corr|Fc|Gemm).*")
"""Type and name of the layers of TensorRT for RTX that convolve. Others with a convolution among their nodes round, or add its
bias."""


@dataclass(frozen=True)
class ConvolutionPrecision:
    """The precision of a convolution of the ONNX file in the engine."""

    node: str
    int8: bool | None
    """None where it is unknown."""
    reason: str = ""
    """Why it is not in INT8."""


@dataclass(frozen=True)
class EngineLayer:
    """A layer of a built engine, as TensorRT reports it."""

    name: str
    kind: str
    """TensorRT's type: CaskConvolution, Reformat, correlation and so on."""
    precision: str
    """INT8, FP16 or FP32: of the weights, else of the first output. Empty where it is unknown, as for layers without weights in
    the list of TensorRT 8.6 for an engine with a dynamic batch."""
    layout: str
    """Of the first output, in TensorRT's words; empty where there is none."""
    nodes: tuple[str, ...]
    """The ONNX nodes that it computes."""
    tactic: str = ""
    """The name of the chosen kernel, where it has one."""

    @property
    def sections(self) -> tuple[int, ...]:
        """Indices of the cfg sections that it computes a part of; for a layer without nodes, of those in its name."""
        return tuple(sorted({int(index) for index in _SECTION.findall(" ".join(self.nodes) or self.name)}))


class _Layer(NamedTuple):
    """A layer of either form of list, and the types by which to tell the precision of a convolution."""

    layer: EngineLayer
    types: frozenset[str] | None
    """Of a layer that convolves, the types of its first input and its weights; empty where the list does not report both."""


def is_layer_list(message: str) -> bool:
    """Whether a message of the builder's log is the layer list of TensorRT for RTX."""
    return message.startswith(_HEADER)


def inspected(trt: TensorRT, logger: Any, plan: Any) -> str:
    """The layer list of full TensorRT's engine inspector; empty where the engine does not load, for lack of memory say."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def engine_layers(layer_list: str, target: Target) -> tuple[EngineLayer, ...]:
    """All layers, in order, of a layer list of ``target``; none of any other text."""
    return tuple(read.layer for read in _read(layer_list, target))


def _read(layer_list: str, target: Target) -> Iterable[_Layer]:
    return _read_text(layer_list) if target.logs_layers else _read_json(layer_list)


def _read_text(text: str) -> Iterator[_Layer]:
    """The layers of the text that TensorRT for RTX logs: a header, then a line a layer."""
    if not is_layer_list(text):
        return
    for match in filter(None, map(_TEXT.match, text.split("\n"))):
        outputs, _, metadata = match["rest"].rpartition(", Metadata: ")
        inputs, constants = (_first(_DATATYPE, match[part]) for part in ("inputs", "constants"))
        layer = EngineLayer(
            name=match["name"],
            kind=match["type"],
            precision=_precision_name(constants or _first(_DATATYPE, outputs)),
            layout=_first(_LAYOUT, outputs),
            nodes=tuple(_NODES.findall(metadata)),
            tactic=_first(_TACTIC, outputs),
        )
        convolves = _CONVOLVES.fullmatch(f"{match['type']} {match['name']}")
        yield _Layer(layer, _precision_names([inputs, constants]) if convolves else None)


def _read_json(text: str) -> Iterator[_Layer]:
    """The layers of the JSON of an engine inspector."""
    for values in _json_layers(text):
        data, weights = _field(values, "Inputs", 0, "Format/Datatype"), _field(values, "Weights", "Type")
        layout = _field(values, "Outputs", 0, "Format/Datatype").replace(_DYNAMIC, "")
        layer = EngineLayer(
            name=_field(values, "Name"),
            kind=_field(values, "LayerType"),
            precision=_precision_name(weights) or _precision_name(layout),
            layout=layout,
            nodes=tuple(_NODES.findall(_field(values, "Metadata"))),
            tactic=_field(values, "TacticName"),
        )
        convolves = values.get("ParameterType") == "Convolution"
        yield _Layer(layer, _precision_names([weights] if data == _DYNAMIC else [data, weights]) if convolves else None)


def _first(pattern: re.Pattern[str], text: str) -> str:
    """The first group of the first match; empty where there is none."""
    match = pattern.search(text)
    return match[1].strip() if match else ""


def _precision_name(text: str) -> str:
    """INT8, FP16 or FP32, from TensorRT's words; empty where they name none of these."""
    match = _KIND.search(text)
    return _KINDS[match[1].lower()] if match else ""


def _precision_names(types: Iterable[str]) -> frozenset[str]:
    """The precisions of several types; empty unless all are known."""
    names = frozenset(map(_precision_name, types))
    return names if "" not in names else frozenset()


def asked_for(model: onnx.ModelProto, fp_layers: Collection[str] | None = None) -> dict[str, bool]:
    """The convolutions of a lowered model by node name, and whether they are to be INT8.

    Args:
        fp_layers: outputs of the floating-point layers, for INT8 by a calibrator; without it Q/DQ nodes state what is INT8.
    """
    nodes = model.graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    return {
        node.name: node.input[0] in dequantized if fp_layers is None else node.output[0] not in fp_layers
        for node in nodes
        if node.op_type == "Conv"
    }


def convolution_precisions(layer_list: str, asked: Mapping[str, bool], target: Target) -> tuple[ConvolutionPrecision, ...]:
    """The precision of each convolution of ``asked``, in its order, by a layer list of ``target``, else unknown."""
    types: dict[str, set[frozenset[str]]] = {name: set() for name in asked}
    for layer, of_layer in _read(layer_list, target):
        if of_layer is not None:
            for name in types.keys() & set(layer.nodes):
                types[name].add(of_layer)
    return tuple(_precision(name, asked[name], of_name, target) for name, of_name in types.items())


def _precision(name: str, asked: bool, types: Collection[frozenset[str]], target: Target) -> ConvolutionPrecision:
    """The precision of a convolution by the types of the layers that compute it."""
    if len(types) != 1 or len(of_layer := next(iter(types))) != 1:  # none, contradictions, or mixed types
        return ConvolutionPrecision(name, None, UNKNOWN)
    (precision,) = of_layer
    if precision == "INT8":
        return ConvolutionPrecision(name, True)
    if not asked:
        return ConvolutionPrecision(name, False, f"{_LEFT}{precision}")
    how = f"TensorRT chose {precision}, faster here" if target.weakly_typed else f"TensorRT computes in {precision}"
    return ConvolutionPrecision(name, False, how)


def _json_layers(text: str) -> list[dict[str, Any]]:
    try:
        layers = json.loads(text, strict=False)["Layers"]  # a raw control character separates the names in Metadata
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    # without details there are names alone
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _field(layer: Any, *path: str | int) -> str:
    """The text at a path of keys and indices; empty where there is none."""
    try:
        for step in path:
            layer = layer[step]
    except (KeyError, IndexError, TypeError):
        return ""
    return layer if isinstance(layer, str) else ""


def summary(int8: Collection[str], others: Mapping[str, str]) -> str:
    """How many convolutions run in INT8, and which do not, by their reasons.

    Args:
        others: the reason of each that does not, by node name.
    """
    grouped: dict[str, list[str]] = {}
    for name, reason in others.items():
        grouped.setdefault(reason, []).append(name)
    total = len(int8) + len(others)
    if not int8 and set(grouped) <= {UNKNOWN}:
        return f"how many convolutions run in INT8 is {UNKNOWN}"
    least = "at least " if UNKNOWN in grouped else ""
    return "; ".join(
        [f"{least}{len(int8)} of {total} convolutions run in INT8", *(f"{why}: {', '.join(n)}" for why, n in grouped.items())]
    )


def few_in_int8(int8: Collection[str], others: Mapping[str, str], batch: int) -> str:
    """A warning where fewer than half of the convolutions that were to run in INT8 do; else empty.

    Convolutions of unknown precision count as in INT8.

    Args:
        others: the reason of each that does not, by node name.
        batch: the one that TensorRT measured for.
    """
    meant = len(int8) + sum(not reason.startswith(_LEFT) for reason in others.values())
    unknown = sum(reason == UNKNOWN for reason in others.values())
    if 2 * (len(int8) + unknown) >= meant:
        return ""
    least = "at least " if unknown else ""
    return (
        f"{least}{len(int8)} of the {meant} convolutions that were to run in INT8 do, at a usual batch of {batch}; build it "
        "for a larger usual batch, in FP16, which is more exact, or with TensorRT 10 strongly typed"
    )
