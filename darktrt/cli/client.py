"""``darktrt client``: a model on Triton servers detects objects, answers a request of noise, or is described."""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darktrt.cli import groups
from darktrt.errors import DarktrtError
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    from darktrt.serve.client.client import Client
    from darktrt.serve.client.transport import Endpoint
    from darktrt.vision.video import LiveSource


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "client",
        "use a model on one or several Triton servers: client detect, client ping, client info, client statistics",
        "darktrt client detect dog.jpg -o out.jpg",
        "darktrt client ping",
        "darktrt client info --json",
        "darktrt client statistics",
        "darktrt client detect --help",
    )
    steps = parser.add_subparsers(metavar="STEP", required=True)
    _add_detect(steps)
    _add_ping(steps)
    _add_info(steps)
    _add_statistics(steps)


def _add_client(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`_client`."""
    groups.add_server(parser)
    parser.add_argument("--model", metavar="NAME", help="name of the model; optional where the server has only one")
    retry = "how long to repeat a request while no server is there, in seconds (default: 30; 0: not at all)"
    parser.add_argument("--retry-seconds", type=float, default=30.0, metavar="S", help=retry)


@contextmanager
def _client(args: argparse.Namespace, servers: Sequence[Endpoint] = (), **options: Any) -> Iterator[Client]:
    """A client of the model and the servers of the arguments, or of some; a warning counts the requests that it repeated."""
    from darktrt.serve.client.client import Client

    with Client(
        servers or groups.endpoints(args),
        args.model,
        args.version,
        batch=args.batch,
        timeout=args.timeout,
        retry_seconds=args.retry_seconds,
        shared_memory=args.shared_memory,
        **options,
    ) as client:
        yield client
        if client.retries:
            away = ", ".join(one.server for one in client.servers if one.failed)
            LOGGER.warning(f"{away}: away for a time; {client.retries} requests were repeated")


# --- client detect ---


def _add_detect(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "detect",
        "detect objects in images, videos, a camera or a stream",
        "darktrt client detect dog.jpg -o out.jpg",
        "darktrt client detect holiday/ 'shots/*.png' -o drawn/ --json > detections.jsonl",
        "darktrt client detect street.mp4 -o out.mp4 --server http://gpu-box:8000 --model yolov4",
        "darktrt client detect holiday/ --server gpu-a:8001 --server gpu-b:8001 --json > detections.jsonl",
        "darktrt client detect camera:0 -o out.mp4 --frames 500",
        "darktrt client detect rtsp://user:password@camera/stream1 --json",
    )
    parser.set_defaults(command="client detect", run=_detect)
    sources = "images, videos, folders or patterns; or one camera (camera:0 or /dev/video0) or stream (rtsp://HOST/PATH)"
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help=sources)
    _add_client(parser)
    parser.add_argument("-o", "--output", metavar="PATH", help="write copies with the detections drawn in: a file, or a folder")
    parser.add_argument("--json", action="store_true", help="print a line of JSON an image or frame instead of tables")
    groups.add_thresholds(parser)
    in_flight = "most requests under way at once at each server (default: 4)"
    parser.add_argument("--in-flight", type=int, default=4, metavar="N", help=in_flight)
    frames = "number of frames of a camera or stream (default: until Ctrl-C)"
    parser.add_argument("--frames", type=int, metavar="N", help=frames)


def _detect(args: argparse.Namespace) -> None:
    live = [source for source in map(_live_source, args.sources) if source]
    if live and len(args.sources) > 1:
        raise DarktrtError(f"{live[0]}: a camera or stream must be the only source")
    if args.frames is not None and not live:
        raise DarktrtError("images and videos are detected whole; only cameras and streams have a number of frames", "frames")
    options = {name: getattr(args, name) for name in ("score_threshold", "iou_threshold", "in_flight")}
    with _client(args, **options) as client:
        if live:
            _detect_live(args, client, live[0])
        else:
            with closing(client.detect_files(args.sources, args.output)) as results:
                groups.print_results(args, results)


def _live_source(source: str) -> LiveSource | None:
    """The camera or stream that a source names; None for files."""
    from darktrt.vision.live import camera, stream

    if "://" in source:
        return stream(source)
    if source.startswith(("camera:", "/dev/")):
        return camera(source.removeprefix("camera:"))
    return None


def _detect_live(args: argparse.Namespace, client: Client, source: LiveSource) -> None:
    from darktrt.vision.live import detect_live

    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())  # the video so far is kept
    output = Path(args.output) if args.output else None
    with closing(detect_live(client.detector, source, output, client.in_flight, args.frames, stop)) as results:
        groups.print_results(args, results)


# --- client ping, info, statistics ---


def _add_ping(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "ping",
        "send one request of noise to each server: does the model answer, and how fast",
        "darktrt client ping",
        "darktrt client ping --server http://gpu-box:8000 --model yolov4 --shared-memory system",
    )
    parser.set_defaults(command="client ping", run=_ping)
    _add_client(parser)


def _ping(args: argparse.Namespace) -> None:
    import numpy as np

    for endpoint in groups.endpoints(args):
        with _client(args, [endpoint]) as client:
            width, height = client.info.usual_image
            image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
            started = time.monotonic()
            detections = client.detect_all([image] * args.batch)
            taken = 1e3 * (time.monotonic() - started)
            print(f"{endpoint}: model '{client.model.name}' answered noise in {taken:.1f} ms, {args.batch} a request")
            print(detections[0].to_table())


def _add_info(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "info",
        "print the server's description of the model: tensors, batches, classes",
        "darktrt client info",
        "darktrt client info --model yolov4 --json",
    )
    parser.set_defaults(command="client info", run=_info)
    _add_client(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with the whole metadata of the detector")


def _info(args: argparse.Namespace) -> None:
    with _client(args) as client:
        print(json.dumps(client.model.to_dict(), indent=2) if args.json else client.model.to_text())


def _add_statistics(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "statistics",
        "print each server's counts of the model: requests, failures, and the time of their parts",
        "darktrt client statistics",
        "darktrt client statistics --server gpu-a:8001 --server gpu-b:8001",
        "darktrt client statistics --model yolov4 --json",
    )
    parser.set_defaults(command="client statistics", run=_statistics)
    _add_client(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _statistics(args: argparse.Namespace) -> None:
    from darktrt.serve.client.statistics import to_table

    with _client(args) as client:
        counts = client.statistics()
        table = to_table(counts, batches=client.model.max_batch > 0)
    print(json.dumps([asdict(version) for version in counts]) if args.json else table)
