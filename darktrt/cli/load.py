"""``darktrt load``: one or several Triton servers under load."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.files import atomic_output, check_writable, keep_inputs

if TYPE_CHECKING:
    from darktrt.serve.load.measure import LoadOptions, LoadReport


_OTHER_TOOLS = """\
NVIDIA's perf_analyzer sends requests from C++, which needs less of the processor (pip install perf-analyzer):
  perf_analyzer -m yolov4 -u localhost:8001 -i grpc --async --concurrency-range 1:16 --shared-memory system
NVIDIA's Model Analyzer tries batch delays and instances for a latency budget (pip install triton-model-analyzer):
  model-analyzer profile --model-repository model_repository --profile-models yolov4 --latency-budget 50"""


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "load",
        "measure Triton servers under load: throughput, latency, and the time of their parts",
        "darktrt load",
        "darktrt load --server gpu-a:8001 --server gpu-b:8001 --concurrency 8 32",
        "darktrt load --model yolov4 --model yolov4-tiny --shared-memory system --json load.json",
        "darktrt load --repository model_repository --concurrency 1 4 16",
    )
    parser.epilog = f"{parser.epilog}\n\n{_OTHER_TOOLS}"
    groups.add_server(parser)
    models = "name of the model, optional where there is one; may be repeated"
    parser.add_argument("--model", metavar="NAME", action="append", default=[], help=models)
    repository = "start a server for this model repository and measure it, instead of --server"
    parser.add_argument("--repository", metavar="FOLDER", help=repository)
    concurrency = "concurrent requests, at all servers together, a level of load each (default: 1 2 4 8 16)"
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help=concurrency)
    seconds = "length of each level in seconds (default: 5)"
    parser.add_argument("--seconds", type=groups.above_zero, default=5.0, metavar="S", help=seconds)
    processes = "processes that send requests (default: half of the processors, at most 8)"
    parser.add_argument("--processes", type=int, default=0, metavar="N", help=processes)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image to send; may be repeated (default: made images)"
    )
    metrics = "the server's metrics (default: http://HOST:8002/metrics); repeated for each of several, in their order"
    parser.add_argument("--metrics", metavar="URL", action="append", default=[], help=metrics)
    parser.add_argument("--json", metavar="FILE", help="write the measurements there too")
    parser.set_defaults(run=_load)


def _load(args: argparse.Namespace) -> None:
    from darktrt.serve.load.measure import LoadOptions, measure_repository, side_by_side

    if args.json:
        keep_inputs(args.json, *args.image)
        check_writable(args.json)
    options = LoadOptions(
        tuple(args.concurrency),
        args.batch,
        args.seconds,
        args.processes,
        args.shared_memory,
        args.timeout,
        tuple(map(Path, args.image)),
        tuple(args.metrics),
    )
    reports = measure_repository(args.repository, args.model, options) if args.repository else _load_server(args, options)
    print("\n".join([*(report.to_markdown() for report in reports), side_by_side(reports)]), end="")
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n")


def _load_server(args: argparse.Namespace, options: LoadOptions) -> list[LoadReport]:
    from darktrt.serve.load.measure import measure_load

    return [measure_load(groups.endpoints(args), name, args.version, options) for name in args.model or [None]]
