"""Options that the commands of ``darktrt check`` share, each group with the function that reads it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.errors import DarktrtError

if TYPE_CHECKING:
    from darktrt.check.detections import VariantDetections
    from darktrt.check.ground_truth import GroundTruth
    from darktrt.check.runs import Variant
    from darktrt.metadata import DetectorInfo
    from darktrt.surgery.qdq import Calibration


# --- variants ---


def add_variants(parser: argparse.ArgumentParser) -> None:
    """Options that name variants of a network; read by :func:`variants`."""
    named = "; NAME=FILE gives it a name"
    parser.add_argument("--cfg", metavar="CFG", help="run the network in PyTorch, as the reference: with --weights")
    parser.add_argument("--weights", metavar="WEIGHTS", help="darknet weights")
    parser.add_argument("--size", metavar="SIZE", help="of PyTorch's input (default: that of the models, else the cfg's)")
    class_names = "names of PyTorch's classes, one a line (default: those of the models, else those that convert uses)"
    parser.add_argument("--class-names", metavar="FILE", help=class_names)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where PyTorch runs (default: cpu)")
    onnx = f"run this ONNX file in ONNX Runtime; may be repeated{named}"
    parser.add_argument("--model", metavar="ONNX", action="append", default=[], help=onnx)
    simulate = "fp16, int8 or fp16,int8: also run each ONNX file with the rounding of such engines; int8 needs --calibration"
    parser.add_argument("--simulate", metavar="PRECISION,...", default="", help=simulate)
    groups.add_calibration(parser)
    plan = f"run this engine; may be repeated{named}"
    parser.add_argument("--plan", metavar="PLAN", action="append", default=[], help=plan)
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines")
    triton = "run this model of a Triton server, such as localhost:8001/yolov4@fp16 (without @: fp32); may be repeated"
    triton += "; NAME=SERVER/MODEL gives it a name"
    parser.add_argument("--triton", metavar="SERVER/MODEL[@PRECISION]", action="append", default=[], help=triton)


def variants(
    args: argparse.Namespace,
    stack: ExitStack,
    layers: bool = False,
    loaded: Sequence[DetectorInfo] = (),
    on_cluster: bool = False,
) -> list[Variant]:
    """The variants to run, the reference first; engines live as long as ``stack``.

    Args:
        args: the command line.
        stack: closes what the variants use.
        layers: with the outputs of all cfg sections.
        loaded: the metadata of loaded results, for PyTorch's size and class names where there is no model.
        on_cluster: engines run there, so they are not opened here.
    """
    from darktrt.check.runs import engine_variant, onnx_variant

    if (args.cfg is None) != (args.weights is None):
        raise DarktrtError("--cfg CFG and --weights WEIGHTS go together")
    models = [onnx_variant(path, layers, name) for name, path in map(split_name, args.model)]
    models += _simulated(args, layers)
    for name, path in map(split_name, args.plan):
        models.append(engine_variant(path, args.plugins, name, None if on_cluster else stack))
    models += [_triton_variant(text, stack) for text in args.triton]
    if args.cfg is None:
        return models
    return [_pytorch_variant(args, layers, [*(model.info for model in models), *loaded]), *models]


def _pytorch_variant(args: argparse.Namespace, layers: bool, models: Sequence[DetectorInfo]) -> Variant:
    """The network in PyTorch, with the input size and class names of the models that it is compared with."""
    from darktrt.check.runs import Variant
    from darktrt.convert.reference import TorchReference

    size = groups.parse_size(args.size) if args.size else None
    if size is None and models:
        size = models[0].width, models[0].height
    reference = TorchReference(args.cfg, args.weights, size, layers, args.device, args.class_names, models)
    return Variant("PyTorch", reference.info, "fp32", reference.run, {"runs in": "PyTorch", "on": args.device})


def variant_files(args: argparse.Namespace) -> list[str | None]:
    """The files that :func:`variants` reads."""
    models = [path for _, path in map(split_name, args.model + args.plan)]
    return [args.cfg, args.weights, args.class_names, args.calibration, *models]


def calibration(args: argparse.Namespace) -> Calibration | None:
    """The calibration that the options name; it is read once, since what it lacks is a warning."""
    if args.calibration and "scales" not in args:
        args.scales = groups.calibration(args.calibration, args.fp_layers)
    return args.scales if args.calibration else None


def split_name(text: str) -> tuple[str, str]:
    """Name and path of ``[NAME=]PATH``; without a name it is empty."""
    name, _, path = text.rpartition("=")
    return name, path


def _triton_variant(text: str, stack: ExitStack) -> Variant:
    """A model of a Triton server, ``[NAME=]SERVER/MODEL[@PRECISION]``, for a server does not report the precision."""
    from darktrt.check.runs import Variant
    from darktrt.check.tolerance import TOLERANCES
    from darktrt.serve.client.client import triton_run

    name, address = split_name(text)
    address, _, precision = address.partition("@")
    server, _, model = address.rpartition("/")
    if not model or not server or server.endswith("/") or precision not in ("", *TOLERANCES):
        raise DarktrtError(f"--triton {text}: name SERVER/MODEL, such as localhost:8001/yolov4, or SERVER/MODEL@fp16")
    run, info = stack.enter_context(triton_run(server, model))
    stated = precision or ("int8" if info.int8_convolutions else "fp32")
    return Variant(name or address, info, stated, run, {"runs in": "Triton", "on": server})


def _simulated(args: argparse.Namespace, layers: bool) -> list[Variant]:
    precisions = [precision for precision in args.simulate.split(",") if precision]
    if not precisions:
        return []
    from darktrt.check.runs import simulated_variant

    if odd := [precision for precision in precisions if precision not in ("fp16", "int8")]:
        raise DarktrtError(f"--simulate {args.simulate}: '{odd[0]}' is neither fp16 nor int8")
    if not args.model:
        raise DarktrtError("--simulate rounds what an ONNX file computes; name one by --model")
    scales = calibration(args)
    files = [(name, path, precision) for name, path in map(split_name, args.model) for precision in precisions]
    return [simulated_variant(path, precision, scales, layers, name) for name, path, precision in files]


# --- labels and detections ---


def add_labelled(parser: argparse.ArgumentParser, name: str = "data") -> None:
    """Options that name labelled images; read by :func:`ground_truth`."""
    data = "a COCO json with annotations, or FILE.json:FOLDER; or images with darknet's label files: folders, lists, patterns"
    parser.add_argument(name, metavar="DATA", nargs="+", help=data)
    parser.add_argument("--limit", type=int, metavar="N", help="use a random sample of N images")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    names = "names of the classes in darknet's label files, one a line (default: the network's class names)"
    parser.add_argument("--names", metavar="FILE", help=names)
    mapped = "lines CLASS OF THE LABELS = CLASS OF THE NETWORK, for classes whose names differ"
    parser.add_argument("--class-map", metavar="FILE", help=mapped)


def ground_truth(args: argparse.Namespace, class_names: Sequence[str]) -> GroundTruth:
    """The labelled images; what is wrong with them is warned of and left out."""
    from darktrt.check.ground_truth import LabelClasses, load_ground_truth, read_class_map, read_names

    names = read_names(args.names) if args.names else None
    mapped = read_class_map(args.class_map) if args.class_map else None
    return load_ground_truth(args.data, class_names, args.limit, args.seed, LabelClasses(names, mapped), strict=False)


def add_detections(parser: argparse.ArgumentParser) -> None:
    """The option that names saved detections; read by :func:`loaded_detections`."""
    loaded = "also evaluate detections that 'check map --save-detections' saved, here or elsewhere; may be repeated"
    parser.add_argument("--load-detections", metavar="JSON", action="append", default=[], help=loaded)


def loaded_detections(args: argparse.Namespace) -> list[VariantDetections]:
    """The saved detections of all files."""
    from darktrt.check.detections import load_detections

    return [variant for path in args.load_detections for variant in load_detections(path)]


def check_any(*variants: Sequence[Variant] | Sequence[VariantDetections]) -> None:
    """See that a variant is named."""
    if not any(variants):
        raise DarktrtError("nothing to measure; name --cfg and --weights, --model, --plan, --triton or --load-detections")
