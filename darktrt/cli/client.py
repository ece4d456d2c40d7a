"""``darktrt client``: objects found by a model on a Triton server."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.errors import DarktrtError

if TYPE_CHECKING:
    from darktrt.serve.client.client import Client

_CLIENT_KINDS = {
    "image": "images; like folder and video it takes any files, which their suffixes tell apart",
    "folder": "folders, to any depth",
    "video": "videos",
    "camera": "a camera of this machine: its number or device file",
    "rtsp-url": "a stream of the network: its URL",
    "dummy": "no image at all: noise, to see whether the model answers",
    "info": "what the server says of the model",
    "statistics": "what it counted",
}


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "client",
        "find objects in images, videos, cameras and streams by a model on a Triton server",
        "darktrt client image dog.jpg -o out.jpg",
        "darktrt client folder holiday/ -o found/ --json > found.jsonl",
        "darktrt client video street.mp4 -o out.mp4 --server http://gpu-box:8000 --model yolov4",
        "darktrt client camera 0 -o out.mp4 --frames 500",
        "darktrt client rtsp-url rtsp://user:password@camera/stream1 --json",
        "darktrt client dummy --shared-memory system",
        "darktrt client statistics",
    )
    kinds = "\n".join(f"  {name:<11}{text}" for name, text in _CLIENT_KINDS.items())
    parser.epilog = f"what can be WHAT:\n{kinds}\n\n{parser.epilog}"
    parser.add_argument("what", metavar="WHAT", choices=_CLIENT_KINDS, help="one of the words below")
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="files, folders or patterns; or one device or URL")
    groups.add_server(parser)
    parser.add_argument("--model", metavar="NAME", help="may be left out where the server has one model")
    parser.add_argument("-o", "--output", metavar="PATH", help="write copies with the detections drawn in: a file, or a folder")
    parser.add_argument("--json", action="store_true", help="print a line of JSON an image or frame instead of tables")
    parser.add_argument("--score-threshold", type=float, default=0.25, metavar="X", help="(default: 0.25)")
    parser.add_argument("--iou-threshold", type=float, default=0.45, metavar="X", help="(default: 0.45)")
    parser.add_argument("--in-flight", type=int, default=4, metavar="N", help="most requests under way at once (default: 4)")
    retry = "how long to repeat a request while the server is away, in seconds (default: 30; 0: not at all)"
    parser.add_argument("--retry-seconds", type=float, default=30.0, metavar="S", help=retry)
    parser.add_argument(
        "--frames", type=int, metavar="N", help="of a camera or stream, stop after so many (default: at Ctrl-C)"
    )
    parser.set_defaults(run=_client)


def _client(args: argparse.Namespace) -> None:
    from darktrt.serve.client.client import Client

    one = {"camera": 1, "rtsp-url": 1, "dummy": 0, "info": 0, "statistics": 0}.get(args.what)
    if (one is None and not args.sources) or (one is not None and len(args.sources) != one):
        raise DarktrtError(
            f"{args.what} takes {'one SOURCE or more' if one is None else f'{one} SOURCE'}, not {len(args.sources)}"
        )
    client = Client(
        groups.endpoint(args),
        args.model,
        args.version,
        score_threshold=args.score_threshold,
        iou_threshold=args.iou_threshold,
        batch=args.batch,
        in_flight=args.in_flight,
        timeout=args.timeout,
        retry_seconds=args.retry_seconds,
        shared_memory=args.shared_memory,
    )
    with client:
        run = {"camera": _client_live, "rtsp-url": _client_live, "dummy": _client_dummy}
        run |= {"info": _client_info, "statistics": _client_info}
        run.get(args.what, _client_files)(args, client)
        if client.retries:
            print(f"the server was away; {client.retries} requests were repeated", file=sys.stderr)


def _client_files(args: argparse.Namespace, client: Client) -> None:
    with closing(client.detect_files(args.sources, args.output)) as results:
        groups.print_results(args, results)


def _client_live(args: argparse.Namespace, client: Client) -> None:
    from darktrt.vision.live import camera, detect_live, stream

    source = (camera if args.what == "camera" else stream)(args.sources[0])
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())  # the video so far is kept
    output = Path(args.output) if args.output else None
    with closing(detect_live(client.detector, source, output, args.in_flight, args.frames, stop)) as results:
        groups.print_results(args, results)


def _client_dummy(args: argparse.Namespace, client: Client) -> None:
    import numpy as np

    image = np.random.default_rng(0).integers(0, 256, (client.info.height, client.info.width, 3), np.uint8)
    started = time.monotonic()
    found = client.detect_all([image] * args.batch)
    taken = 1e3 * (time.monotonic() - started)
    print(f"{client.endpoint}: model '{client.model.name}' answered noise in {taken:.1f} ms, {args.batch} a request")
    print(found[0].to_table())


def _client_info(args: argparse.Namespace, client: Client) -> None:
    if args.what == "info":
        print(json.dumps(client.model.to_dict(), indent=2) if args.json else client.model.to_text())
    elif args.json:
        print(json.dumps([asdict(one) for one in client.statistics()]))
    else:
        from darktrt.serve.client.statistics import to_table

        print(to_table(client.statistics(), client.model.max_batch > 0))
