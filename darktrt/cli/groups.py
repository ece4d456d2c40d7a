"""What several commands share: their parsers' form, and groups of options, each with what reads it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.errors import DarktrtError
from darktrt.metadata import IMAGE_SIZES, IOU_THRESHOLD, SCORE_THRESHOLD, ImageSizes, Thresholds

if TYPE_CHECKING:
    from darktrt.serve.client.transport import Endpoint
    from darktrt.surgery.qdq import Calibration
    from darktrt.vision.files import FileResult

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def command(commands: Commands, name: str, help_: str, *examples: str) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    raw = argparse.RawDescriptionHelpFormatter
    description = f"{help_[0].upper()}{help_[1:]}."
    return commands.add_parser(name, help=help_, description=description, epilog=epilog, formatter_class=raw)


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """``416`` or ``WxH`` to (width, height).

    Raises:
        DarktrtError: neither form, or not positive.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text.lower())
    if not match:
        raise DarktrtError(f"{option} {text}: write a side like 416, or WIDTHxHEIGHT like 640x384")
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


def add_image_sizes(parser: argparse.ArgumentParser, help_: str, default: str = "") -> None:
    """Sizes of images for models that take any; :func:`image_sizes` reads them."""
    usual = default or " ".join(f"{width}x{height}" for width, height in IMAGE_SIZES)
    metavar = ("MIN", "USUAL", "MAX")
    parser.add_argument("--image-sizes", nargs=3, metavar=metavar, help=f"{help_} (default: {usual})")


def image_sizes(args: argparse.Namespace) -> ImageSizes | None:
    if args.image_sizes is None:
        return None
    least, usual, most = (parse_size(text, "--image-sizes") for text in args.image_sizes)
    return least, usual, most


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """The thresholds of detections; :func:`thresholds` reads them."""
    score = f"detections must exceed this score (default: {SCORE_THRESHOLD:g})"
    parser.add_argument("--score-threshold", type=float, default=SCORE_THRESHOLD, metavar="X", help=score)
    iou = f"overlap above which NMS suppresses the lesser of two detections (default: {IOU_THRESHOLD:g})"
    parser.add_argument("--iou-threshold", type=float, default=IOU_THRESHOLD, metavar="X", help=iou)


def thresholds(args: argparse.Namespace) -> Thresholds:
    return Thresholds(args.score_threshold, args.iou_threshold)


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
    from darktrt.pipeline import load_calibration

    return load_calibration(table, names(fp_layers))


def print_calibration(table: str, calibration: Calibration) -> None:
    """Print the summary beside a table that was just written, and the number of its scales."""
    from darktrt.calib.summary import Outputs

    print(Outputs(Path(table)).summary.read_text(encoding="utf-8"), end="")
    print(f"{table}: scales of {len(calibration.scales)} tensors")


def names(fp_layers: str | None) -> tuple[str, ...] | None:
    """``A,B``, or None where nothing was said."""
    return None if fp_layers is None else tuple(name for name in fp_layers.split(",") if name)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Options of whoever talks to a server."""
    url = (
        "HOST:PORT for gRPC, or http://HOST:PORT; with TLS grpcs:// or https:// (default: localhost:8001); may be repeated: "
        "servers of the same model share the requests"
    )
    parser.add_argument("--server", action="append", metavar="URL", help=url)
    parser.add_argument("--version", default="", metavar="N", help="of the model (default: the server's choice)")
    parser.add_argument("--root-certificates", metavar="PEM", help="authorities to trust instead of the system's")
    parser.add_argument("--certificate", metavar="PEM", help="to show to a server that asks for one, with --key")
    parser.add_argument("--key", metavar="PEM", help="of that certificate")
    parser.add_argument(
        "--timeout", type=above_zero, default=60.0, metavar="S", help="of one request, in seconds (default: 60)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images a request (default: 1)")
    shared = "how images get to servers on this machine (default: none, by the socket)"
    parser.add_argument("--shared-memory", choices=["none", "system", "cuda"], default="none", help=shared)


def endpoints(args: argparse.Namespace) -> list[Endpoint]:
    from darktrt.serve.client.transport import Endpoint

    servers = args.server or ["localhost:8001"]
    return [Endpoint.parse(server, args.root_certificates, args.certificate, args.key) for server in servers]


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
