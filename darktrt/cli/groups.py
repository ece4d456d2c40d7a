"""What several commands share: their parsers' form, and groups of options, each with what reads it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from darktrt.errors import DarktrtError

if TYPE_CHECKING:
    from darktrt.check.detections import VariantDetections
    from darktrt.check.ground_truth import Truth
    from darktrt.check.runs import Variant
    from darktrt.serve.client.transport import Endpoint
    from darktrt.surgery.qdq import Calibration
    from darktrt.vision.detector import FileResult

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def command(commands: Commands, name: str, help_: str, *examples: str) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    raw = argparse.RawDescriptionHelpFormatter
    description = f"{help_[0].upper()}{help_[1:]}."
    return commands.add_parser(name, help=help_, description=description, epilog=epilog, formatter_class=raw)


def parse_size(text: str) -> tuple[int, int]:
    """``416`` or ``WxH`` to (width, height).

    Raises:
        DarktrtError: neither form, or not positive.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text.lower())
    if not match:
        raise DarktrtError(f"--size {text}: write a side like 416, or WIDTHxHEIGHT like 640x384")
    return int(match[1]), int(match[2] or match[1])


def parse_batch(text: str) -> tuple[int, int, int]:
    """``4`` to a static batch (4, 4, 4), ``1..8`` to a dynamic one (1, 8, 8): smallest, usual and largest.

    Raises:
        DarktrtError: neither form, or the range is empty.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})(?:\.\.([1-9][0-9]{0,4}))?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise DarktrtError(f"--batch {text}: write a number like 4, or a range like 1..8")
    low, high = int(match[1]), int(match[2] or match[1])
    return low, high, high


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", metavar="TABLE", help="calibration table of 'darktrt calib run', or a TensorRT calibration cache"
    )
    fp_layers = (
        "convolutions to keep in floating point, by node name (default: those that 'darktrt calib run' left beside the table; "
        "without such a file the first, and those of the heads)"
    )
    parser.add_argument("--fp-layers", metavar="NAME,...", help=fp_layers)


def add_calibration_outputs(parser: argparse.ArgumentParser) -> None:
    """What choosing scales writes, and how it chooses."""
    beside = (
        "table to write; beside it go a summary (.txt), TensorRT's cache (.cache), histograms (.npz), channel means "
        "(.means.npz) and floating-point layers (.fp_layers.json)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="TABLE", help=beside)
    methods = ["auto", "entropy", "weighted", "mse", "percentile", "minmax"]
    method = "how to choose (default: auto, the least error where objects are found)"
    parser.add_argument("--method", choices=methods, default="auto", help=method)
    parser.add_argument("--percentile", type=float, default=99.99, metavar="P", help="for that method (default: 99.99)")
    parser.add_argument("--plot", metavar="PNG", help="draw the histograms with their thresholds")


def calibration(table: str, fp_layers: str | None = None) -> Calibration:
    """A table and what lies beside it."""
    from darktrt.calib.bias_correction import load_channel_means
    from darktrt.calib.fp_layers import load_fp_layers
    from darktrt.calib.table import CalibrationTable
    from darktrt.files import sha256_of
    from darktrt.surgery.qdq import Calibration

    return Calibration(
        CalibrationTable.load(table).scales,
        load_fp_layers(table) if fp_layers is None else names(fp_layers),
        load_channel_means(table),
        sha256_of(table),
    )


def names(fp_layers: str | None) -> tuple[str, ...] | None:
    """``A,B``, or None where nothing was said."""
    return None if fp_layers is None else tuple(name for name in fp_layers.split(",") if name)


def add_variants(parser: argparse.ArgumentParser) -> None:
    """What runs the network; :func:`variants` makes it."""
    called = "; NAME=FILE calls it so"
    parser.add_argument("--cfg", metavar="CFG", help="the network in PyTorch, the reference: with --weights")
    parser.add_argument("--weights", metavar="WEIGHTS", help="darknet weights")
    parser.add_argument("--size", metavar="SIZE", help="of its input (default: that of the models, else the cfg's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where PyTorch runs (default: cpu)")
    onnx = f"run it in ONNX Runtime; may be repeated{called}"
    parser.add_argument("--model", metavar="ONNX", action="append", default=[], help=onnx)
    simulate = "fp16, int8 or fp16,int8: also run each ONNX rounding so, as engines do; int8 needs --table"
    parser.add_argument("--simulate", metavar="PRECISION,...", default="", help=simulate)
    add_calibration(parser)
    plan = f"run this engine; may be repeated{called}"
    parser.add_argument("--plan", metavar="PLAN", action="append", default=[], help=plan)
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines, as 'darktrt engine' takes it")
    served = f"ask this model of a Triton server, such as localhost:8001/yolov4@fp16 (without @: fp32); may be repeated{called}"
    parser.add_argument("--triton", metavar="SERVER/MODEL[@PRECISION]", action="append", default=[], help=served)


def variants(args: argparse.Namespace, stack: ExitStack, layers: bool = False) -> list[Variant]:
    """What is to be run, the reference first; engines live as long as ``stack``."""
    from darktrt.check.runs import Variant, onnx_variant, plan_variant
    from darktrt.engine.runtime import PlanRunner

    if (args.cfg is None) != (args.weights is None):
        raise DarktrtError("--cfg CFG and --weights WEIGHTS go together")
    others = [onnx_variant(path, layers, name) for name, path in map(named, args.model)]
    others += _simulated(args, layers)
    for name, path in map(named, args.plan):
        others.append(plan_variant(stack.enter_context(PlanRunner(path, args.plugins)), name))
    others += [_served(text, stack) for text in args.triton]
    if args.cfg is None:
        return others
    from darktrt.convert.reference import TorchReference

    size = parse_size(args.size) if args.size else (others[0].info.width, others[0].info.height) if others else None
    reference = TorchReference(args.cfg, args.weights, size, layers, args.device)
    about = {"runs in": "PyTorch", "on": args.device}
    return [Variant("PyTorch", reference.info, "fp32", reference.run, about), *others]


def variant_files(args: argparse.Namespace) -> list[str | None]:
    return [args.cfg, args.weights, args.table, *(path for _, path in map(named, args.model + args.plan))]


def named(text: str) -> tuple[str, str]:
    """Name and path of ``[NAME=]PATH``; the name is empty where none is given."""
    name, _, path = text.rpartition("=")
    return name, path


def _served(text: str, stack: ExitStack) -> Variant:
    """A model of a Triton server, ``[NAME=]SERVER/MODEL[@PRECISION]``, for the server does not tell the precision."""
    from darktrt.check.runs import Variant
    from darktrt.check.tolerance import TOLERANCES
    from darktrt.serve.client.client import triton_run

    name, address = named(text)
    address, _, precision = address.partition("@")
    server, _, model = address.rpartition("/")
    if not model or not server or server.endswith("/") or precision not in ("", *TOLERANCES):
        raise DarktrtError(f"--triton {text}: name SERVER/MODEL, such as localhost:8001/yolov4, or SERVER/MODEL@fp16")
    run, info = stack.enter_context(triton_run(server, model))
    stated = precision or ("int8" if info.int8_convolutions else "fp32")
    return Variant(name or address, info, stated, run, {"runs in": "Triton", "on": server})


def _simulated(args: argparse.Namespace, layers: bool) -> list[Variant]:
    wanted = [precision for precision in args.simulate.split(",") if precision]
    if not wanted:
        return []
    from darktrt.check.runs import simulated_variant

    if odd := [precision for precision in wanted if precision not in ("fp16", "int8")]:
        raise DarktrtError(f"--simulate {args.simulate}: '{odd[0]}' is neither fp16 nor int8")
    if not args.model:
        raise DarktrtError("--simulate rounds what an ONNX file computes; name one by --model")
    scales = calibration(args.table, args.fp_layers) if args.table else None
    files = [(name, path, precision) for name, path in map(named, args.model) for precision in wanted]
    return [simulated_variant(path, precision, scales, layers, name) for name, path, precision in files]


def add_labelled(parser: argparse.ArgumentParser, name: str = "data") -> None:
    """The images to judge on; :func:`truth` loads them."""
    data = "a COCO json with annotations, or FILE.json:FOLDER; or images with darknet's label files: folders, lists, patterns"
    parser.add_argument(name, metavar="DATA", nargs="+", help=data)
    parser.add_argument("--limit", type=int, metavar="N", help="use a random sample of N images")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    names = "names of the classes in darknet's label files, a line each (default: they are the network's)"
    parser.add_argument("--names", metavar="FILE", help=names)
    mapped = "lines CLASS OF THE LABELS = CLASS OF THE NETWORK, where the names do not tell"
    parser.add_argument("--class-map", metavar="FILE", help=mapped)


def truth(args: argparse.Namespace, class_names: Sequence[str], notes: list[str]) -> Truth:
    from darktrt.check.ground_truth import LabelClasses, load_truth, read_class_map, read_names

    of_labels = read_names(args.names) if args.names else None
    mapped = read_class_map(args.class_map) if args.class_map else None
    return load_truth(args.data, class_names, args.limit, args.seed, LabelClasses(of_labels, mapped), notes)


def add_detections(parser: argparse.ArgumentParser) -> None:
    loaded = "also what was kept by 'check map --save-detections', here or on another machine; may be repeated"
    parser.add_argument("--load-detections", metavar="JSON", action="append", default=[], help=loaded)


def found(args: argparse.Namespace, notes: list[str]) -> tuple[Truth, list[str], list[VariantDetections]]:
    """The labels, the images' SHA-256, and what every variant finds; what is odd about the labels goes to ``notes``."""
    from darktrt.check.detections import digests_of, find, load_detections

    loaded = [one for path in args.load_detections for one in load_detections(path)]
    with ExitStack() as stack:
        runnable = variants(args, stack)
        if not runnable and not loaded:
            raise DarktrtError("nothing to measure; name --cfg and --weights, --model, --plan, --triton or --load-detections")
        labels = truth(args, (runnable or loaded)[0].info.class_names, notes)
        digests = digests_of(labels)
        return labels, digests, [find(variant, labels, digests) for variant in runnable] + loaded


def add_server(parser: argparse.ArgumentParser) -> None:
    """Options of whoever talks to a server."""
    url = "HOST:PORT for gRPC, or http://HOST:PORT; with TLS grpcs:// or https:// (default: localhost:8001)"
    parser.add_argument("--server", default="localhost:8001", metavar="URL", help=url)
    parser.add_argument("--version", default="", metavar="N", help="of the model (default: the server's choice)")
    parser.add_argument("--root-certificates", metavar="PEM", help="authorities to trust instead of the system's")
    parser.add_argument("--certificate", metavar="PEM", help="to show to a server that asks for one, with --key")
    parser.add_argument("--key", metavar="PEM", help="of that certificate")
    parser.add_argument(
        "--timeout", type=above_zero, default=60.0, metavar="S", help="of one request, in seconds (default: 60)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images a request (default: 1)")
    shared = "how images get to a server on this machine (default: none, by the socket)"
    parser.add_argument("--shared-memory", choices=["none", "system", "cuda"], default="none", help=shared)


def endpoint(args: argparse.Namespace) -> Endpoint:
    from darktrt.serve.client.transport import Endpoint

    return Endpoint.parse(args.server, args.root_certificates, args.certificate, args.key)


def above_zero(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")


def print_results(args: argparse.Namespace, results: Iterable[FileResult]) -> None:
    for result in results:
        if args.json:
            print(json.dumps(result.to_dict(), ensure_ascii=False), flush=True)
            continue
        frame = "" if result.frame is None else f", frame {result.frame}"
        print(f"{result.path}{frame}\n{result.detections.to_table()}\n")
    if args.output:
        print(f"drawn: {args.output}", file=sys.stderr)
