"""The routes from the network to results: which a machine has, and why it lacks the others."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from darktrt.engine.options import NONE, Precision
from darktrt.engine.target import Flavour, Target
from darktrt.errors import DarktrtError

Nodes = Literal["standard ops", "bodies", "plugins"]
"""What runs Mish, decoding and NMS: a model without custom nodes, which ends before NMS; the nodes' bodies; or the plugins."""

Scales = Literal["none", "calibration", "own", "file"]
"""Where INT8 comes from: a calibration of darktrt, TensorRT's own calibration, or Q/DQ nodes that the ONNX file has."""

Stage = Literal["models", "load", "build", "run", "compare", "time"]
RunsIn = Literal["surgery", "PyTorch", "ONNX Runtime", "rtx", "trt"]


_ON_CPU: tuple[Stage, ...] = ("run", "compare")


@dataclass(frozen=True)
class Route:
    """One way to run the network."""

    runs_in: RunsIn
    name: str
    stages: tuple[Stage, ...]
    nodes: Nodes = "standard ops"
    precision: Precision = "fp32"
    scales: Scales = "none"
    any_size: bool = False
    """With a model that takes images of any size, and fits them itself."""
    strongly_typed: bool = False
    """With types by the ONNX file where TensorRT could also choose them."""

    @property
    def flavour(self) -> Flavour | None:
        """The TensorRT that builds; None for what runs an ONNX file or PyTorch on the CPU."""
        return self.runs_in if self.runs_in in ("rtx", "trt") else None

    @property
    def model(self) -> str:
        """The name of the ONNX file."""
        if self.nodes == "standard ops":
            return "plain.onnx"
        return "quantized.onnx" if self.scales == "file" else "image.onnx" if self.any_size else "portable.onnx"

    @property
    def plugins(self) -> str | None:
        """As :attr:`darktrt.engine.options.BuildOptions.plugins`, where no library is named."""
        return NONE if self.nodes == "bodies" else None


@dataclass(frozen=True)
class Routes:
    """What a machine has, and the reasons for what it lacks."""

    possible: tuple[Route, ...]
    impossible: dict[str, str]


def cpu_routes() -> Routes:
    """The routes without TensorRT."""
    routes = {
        "torch": (Route("PyTorch", "FP32", _ON_CPU),),
        "onnxruntime": (
            Route("ONNX Runtime", "FP32, standard ops", _ON_CPU),
            Route("ONNX Runtime", "FP32, bodies", _ON_CPU, "bodies"),
            Route("ONNX Runtime", "FP32, images of any size, bodies", _ON_CPU, "bodies", any_size=True),
            Route("ONNX Runtime", "INT8, Q/DQ nodes of the file, bodies", _ON_CPU, "bodies", "int8", "file"),
        ),
    }
    missing = [package for package in routes if importlib.util.find_spec(package) is None]
    possible = tuple(route for package, those in routes.items() if package not in missing for route in those)
    return Routes(
        possible, {f"{those[0].runs_in} on the CPU": "is not installed" for name, those in routes.items() if name in missing}
    )


def surgery() -> Route:
    """The first route of all, which writes the ONNX files of the others."""
    return Route("surgery", "ONNX files", ("models",))


def loading(flavour: Flavour) -> Route:
    """The first route of a TensorRT: its library loads and states its version."""
    return Route(flavour, "loads", ("load",))


def engine_routes(target: Target, library: bool) -> Routes:
    """The routes of a TensorRT.

    Args:
        target: as it is without options.
        library: there is a plugin library for it.
    """
    forms, impossible = _forms(target, library)
    best = forms[-1]
    routes = [route for nodes in forms for route in _usual(target, nodes)]
    if best != "standard ops":
        routes.append(_engine(target, "FP16, images of any size", best, "fp16", any_size=True))
    if target.weakly_typed:
        routes.append(_engine(target, "INT8, TensorRT's own calibration", best, "int8", "own"))
        if best != "standard ops":
            routes.append(_engine(target, "INT8, Q/DQ nodes of the file", best, "int8", "file"))
        routes += _strongly_typed(target, best, impossible)
    else:
        impossible[f"INT8 by a calibration cache in {target}"] = "types come from the ONNX file, so scales are Q/DQ nodes"
    return Routes(tuple(routes), impossible)


def _forms(target: Target, library: bool) -> tuple[Sequence[Nodes], dict[str, str]]:
    """The forms of custom nodes that it runs, the fastest last, and the reasons for the others."""
    forms: list[Nodes] = ["standard ops"]
    impossible = {}
    try:
        target.without_plugins()
        forms.append("bodies")
    except DarktrtError as error:
        impossible[f"bodies in {target}"] = str(error)
    if target.has_plugins and library:
        forms.append("plugins")
    else:
        reason = "there is no plugin library for it; compile one with 'darktrt plugins'" if target.has_plugins else "has none"
        impossible[f"plugins in {target}"] = reason
    return forms, impossible


def _usual(target: Target, nodes: Nodes) -> list[Route]:
    """FP32, FP16, and INT8 by the calibration."""
    int8 = "INT8, calibration cache" if target.weakly_typed else "INT8, Q/DQ nodes"
    return [
        _engine(target, "FP32", nodes, "fp32"),
        _engine(target, "FP16", nodes, "fp16"),
        _engine(target, int8, nodes, "int8", "calibration"),
    ]


def _strongly_typed(target: Target, best: Nodes, impossible: dict[str, str]) -> list[Route]:
    try:
        target.typed_strongly()
    except DarktrtError as error:
        impossible[f"strong typing in {target}"] = str(error)
        return []
    return [
        _engine(target, "FP16, strongly typed", best, "fp16", strongly_typed=True),
        _engine(target, "INT8, Q/DQ nodes, strongly typed", best, "int8", "calibration", strongly_typed=True),
    ]


def _engine(
    target: Target,
    name: str,
    nodes: Nodes,
    precision: Precision,
    scales: Scales = "none",
    any_size: bool = False,
    strongly_typed: bool = False,
) -> Route:
    stages: tuple[Stage, ...] = ("build", "run", "compare", "time")
    return Route(target.flavour, f"{name}, {nodes}", stages, nodes, precision, scales, any_size, strongly_typed)
