"""What an engine computes, and which convolutions really in INT8: the built engine's own layer list, read.

Full TensorRT's engine inspector gives it as JSON, and TensorRT for RTX, whose engines do not load without a driver, logs it as
text while it builds; both only where the engine is built with ``ProfilingVerbosity.DETAILED``. Neither form is documented. They
are read as TensorRT 8.6.0 and TensorRT for RTX 1.7 write them: a layer names the ONNX nodes that it computes in its
``Metadata``, ``[ONNX Layer: /layers.1/Conv]``, and the type of its first input and of its weights. A convolution for which no
layer says both is unknown, neither INT8 nor not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from darktrt.engine.target import Target

if TYPE_CHECKING:
    import onnx

    from darktrt.engine.trt_types import TensorRT

UNKNOWN = "unknown, as TensorRT's list of layers does not tell"

_HEADER = "Layers:\n"
_SECTION = re.compile(r"/layers\.(\d+)/")
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
_CONVOLVES = re.compile(r"(correlation|gemm) .*|runtime_fusion .*(Corr|Fc|Gemm).*")
"""Type and name of the layers of TensorRT for RTX that convolve; others that name a convolution round, or add its bias."""


@dataclass(frozen=True)
class ConvolutionPrecision:
    """What a convolution of the ONNX file became."""

    node: str
    int8: bool | None
    """None where the layer list does not tell."""
    reason: str = ""
    """Why it is not in INT8."""


@dataclass(frozen=True)
class EngineLayer:
    """A layer of a built engine, as TensorRT tells of it."""

    name: str
    kind: str
    """TensorRT's type: CaskConvolution, Reformat, correlation and so on."""
    precision: str
    """INT8, FP16 or FP32: of the weights, else of the first output; empty where the list does not tell, as that of TensorRT 8.6
    for layers without weights of an engine with a dynamic batch."""
    layout: str
    """Of the first output, in TensorRT's words; empty where it has none."""
    nodes: tuple[str, ...]
    """ONNX nodes that it computes."""
    tactic: str = ""
    """The kernel that was chosen, where it has a name."""

    @property
    def sections(self) -> tuple[int, ...]:
        """Indices of the cfg sections that it computes a part of; of a layer without nodes, of those that its name tells."""
        return tuple(sorted({int(found) for found in _SECTION.findall(" ".join(self.nodes) or self.name)}))


class ConvolvingLayer(NamedTuple):
    """A layer that convolves."""

    nodes: tuple[str, ...]
    """ONNX nodes that it computes."""
    kinds: frozenset[str]
    """Types of its first input and its weights; empty where the list does not tell."""


def is_layer_list(message: str) -> bool:
    """Whether what a builder logs is the layer list of TensorRT for RTX, a single message."""
    return message.startswith(_HEADER)


def inspected(trt: TensorRT, logger: Any, plan: Any) -> str:
    """The layer list of full TensorRT's engine inspector; empty where the engine does not load, for want of memory say."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def engine_layers(layer_list: str, target: Target) -> tuple[EngineLayer, ...]:
    """All layers, in order, of a layer list of ``target``; of any other text none."""
    if target.logs_layers:
        matches = map(_TEXT.match, layer_list.split("\n") if is_layer_list(layer_list) else [])
        return tuple(_engine_layer_of_text(match) for match in matches if match)
    return tuple(_engine_layer_of_json(layer) for layer in _json_layers(layer_list))


def _engine_layer_of_text(match: re.Match[str]) -> EngineLayer:
    outputs, _, metadata = match["rest"].rpartition(", Metadata: ")
    kind = _DATATYPE.search(match["constants"]) or _DATATYPE.search(outputs)
    layout, tactic = _LAYOUT.search(outputs), _TACTIC.search(outputs)
    return EngineLayer(
        name=match["name"],
        kind=match["type"],
        precision=_precision_name(kind[1] if kind else ""),
        layout=layout[1].strip() if layout else "",
        nodes=tuple(_NODES.findall(metadata)),
        tactic=tactic[1] if tactic else "",
    )


def _engine_layer_of_json(layer: dict[str, Any]) -> EngineLayer:
    layout = _field(layer, "Outputs", 0, "Format/Datatype").replace(_DYNAMIC, "")
    return EngineLayer(
        name=_field(layer, "Name"),
        kind=_field(layer, "LayerType"),
        precision=_precision_name(_field(layer, "Weights", "Type")) or _precision_name(layout),
        layout=layout,
        nodes=tuple(_NODES.findall(_field(layer, "Metadata"))),
        tactic=_field(layer, "TacticName"),
    )


def _precision_name(text: str) -> str:
    found = _KIND.search(text)
    return _KINDS[found[1].lower()] if found else ""


def asked_for(model: onnx.ModelProto, fp_layers: Collection[str] | None = None) -> dict[str, bool]:
    """The convolutions of a lowered model by node name, and whether they were to be INT8.

    Args:
        kept: outputs of those to keep in FP16, for INT8 by a calibrator; without it Q/DQ nodes tell.
    """
    nodes = model.graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    return {
        node.name: node.input[0] in dequantized if fp_layers is None else node.output[0] not in fp_layers
        for node in nodes
        if node.op_type == "Conv"
    }


def convolution_precisions(layer_list: str, asked: Mapping[str, bool], target: Target) -> tuple[ConvolutionPrecision, ...]:
    """What each convolution of ``asked`` became, in its order, by a layer list of ``target``; any other text gives unknown."""
    layers = (layers_from_text if target.logs_layers else layers_from_json)(layer_list)
    kinds: dict[str, set[frozenset[str]]] = {name: set() for name in asked}
    for layer in layers:
        for name in kinds.keys() & set(layer.nodes):
            kinds[name].add(layer.kinds)
    return tuple(_precision(name, asked[name], found, target) for name, found in kinds.items())


def _precision(name: str, asked: bool, found: Collection[frozenset[str]], target: Target) -> ConvolutionPrecision:
    if len(found) != 1 or len(kinds := next(iter(found))) != 1:  # none, contradictions, or mixed types
        return ConvolutionPrecision(name, None, UNKNOWN)
    (kind,) = kinds
    if kind == "INT8":
        return ConvolutionPrecision(name, True)
    if not asked:
        return ConvolutionPrecision(name, False, f"kept in {kind}")
    how = f"TensorRT chose {kind}, faster here" if target.weakly_typed else f"TensorRT computes in {kind}"
    return ConvolutionPrecision(name, False, how)


def layers_from_text(text: str) -> list[ConvolvingLayer]:
    """Those that convolve, of the text that TensorRT for RTX logs: a header, then a line a layer."""
    if not is_layer_list(text):
        return []
    found = []
    for line in text.split("\n"):
        match = _TEXT.match(line)
        if match and _CONVOLVES.fullmatch(f"{match['type']} {match['name']}"):
            kinds = [_DATATYPE.search(match[part]) for part in ("inputs", "constants")]
            found.append(_layer(line.rpartition(", Metadata: ")[2], [kind[1] if kind else "" for kind in kinds]))
    return found


_DYNAMIC = "N/A due to dynamic shapes"
"""Instead of an input's type, in engines with a dynamic batch; that of the weights is told all the same."""


def layers_from_json(text: str) -> list[ConvolvingLayer]:
    """Those that convolve, of the JSON of an engine inspector."""
    found = []
    for layer in _json_layers(text):
        if layer.get("ParameterType") == "Convolution":
            kinds = [_field(layer, "Inputs", 0, "Format/Datatype"), _field(layer, "Weights", "Type")]
            if kinds[0] == _DYNAMIC:
                del kinds[0]
            found.append(_layer(_field(layer, "Metadata"), kinds))
    return found


def _json_layers(text: str) -> list[dict[str, Any]]:
    try:
        layers = json.loads(text, strict=False)["Layers"]  # a raw control character separates the names in Metadata
    except (ValueError, KeyError, TypeError):
        return []
    # without details there are names alone
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _field(layer: Any, *path: str | int) -> str:
    """What stands there; empty where nothing does."""
    try:
        for step in path:
            layer = layer[step]
    except (KeyError, IndexError, TypeError):
        return ""
    return str(layer)


def _layer(metadata: str, kinds: Iterable[str]) -> ConvolvingLayer:
    found = [_KIND.search(kind) for kind in kinds]
    names = frozenset(_KINDS[kind[1].lower()] for kind in found if kind)
    return ConvolvingLayer(tuple(_NODES.findall(metadata)), names if all(found) else frozenset())


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
