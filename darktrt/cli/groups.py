"""What several commands share: their parsers' form, and groups of options, each with what reads it."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from darktrt.errors import DarktrtError
from darktrt.metadata import IMAGE_SIZES, IOU_THRESHOLD, SCORE_THRESHOLD, ImageSizes, Thresholds

if TYPE_CHECKING:
    from darktrt.cluster.cluster import Cluster
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
        "--calibration", metavar="CALIB", help="a calibration of 'darktrt calib run' (.calib), or a TensorRT calibration cache"
    )
    fp_layers = (
        "convolutions to keep in floating point, by node name (default: those that 'darktrt calib run' found; "
        "for a TensorRT cache the first, and those of the heads)"
    )
    parser.add_argument("--fp-layers", metavar="NAME,...", help=fp_layers)


def add_calibration_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="CALIB", help="calibration to write, such as NAME.calib")


def calibration(path: str, fp_layers: str | None = None) -> Calibration:
    """A calibration of darktrt, or a TensorRT calibration cache."""
    from darktrt.pipeline import load_calibration

    return load_calibration(path, names(fp_layers))


def print_calibration(path: str) -> None:
    """Print the summary of a calibration that was just written."""
    from darktrt.calib.file import read_calibration
    from darktrt.calib.summary import summary

    contents = read_calibration(path)
    print(summary(contents))
    print(f"{path}: scales of {len(contents.choices)} tensors")


def names(fp_layers: str | None) -> tuple[str, ...] | None:
    """``A,B``, or None where nothing was said."""
    return None if fp_layers is None else tuple(name for name in fp_layers.split(",") if name)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Options that spread work over the machines of a cluster; read by :func:`cluster`."""
    same = "With Ray (extra 'cluster'); results are bit for bit those of one machine."
    group = parser.add_argument_group("on a cluster", same)
    ray = (
        "run on the Ray cluster with its head at HOST:PORT; without ADDRESS on the one that this machine is part of, else on a "
        "new one on this machine"
    )
    group.add_argument("--ray", metavar="ADDRESS", nargs="?", const="", help=ray)
    cpus = "cores of a worker, which holds the model once and is at so many images at the same time (default: 1)"
    group.add_argument("--num-cpus-per-worker", type=int, default=1, metavar="N", help=cpus)
    ship = "send images along with the work (default: all machines read them under the same paths)"
    group.add_argument("--ship-images", action="store_true", help=ship)


def cluster(args: argparse.Namespace) -> Cluster | None:
    """The cluster to run on; None for this machine."""
    if args.ray is None:
        if args.ship_images or args.num_cpus_per_worker != 1:
            raise DarktrtError("--ship-images and --num-cpus-per-worker belong to --ray")
        return None
    if os.path.exists(args.ray):
        raise DarktrtError(f"--ray {args.ray}: is a file; write --ray behind the data, or --ray=HOST:PORT")
    from darktrt.cluster.cluster import Cluster

    return Cluster(args.ray or None, num_cpus_per_worker=args.num_cpus_per_worker, ship_images=args.ship_images)


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
