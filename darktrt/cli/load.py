"""``darktrt load``: how much a Triton server takes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_writable, keep_inputs

if TYPE_CHECKING:
    from darktrt.serve.load.measure import LoadOptions, LoadReport


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "load",
        "measure how much a Triton server takes: throughput, latency, and where the time goes",
        "darktrt load",
        "darktrt load --model yolov4 --model yolov4-tiny --shared-memory system --json load.json",
        "darktrt load --repository model_repository --concurrency 1 4 16",
        "darktrt load --repository model_repository --latency-budget-ms 50 --delay 0 500 2000 --instances 1 2",
    )
    groups.add_server(parser)
    models = "may be left out where there is one model; may be repeated"
    parser.add_argument("--model", metavar="NAME", action="append", default=[], help=models)
    repository = "measure a server of this model repository, started for it, instead of --server"
    parser.add_argument("--repository", metavar="FOLDER", help=repository)
    concurrency = "requests at once, a level each (default: 1 2 4 8 16)"
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help=concurrency)
    parser.add_argument("--seconds", type=groups.above_zero, default=5.0, metavar="S", help="of each level (default: 5)")
    processes = "that ask, without perf_analyzer (default: half of the processors, at most 8)"
    parser.add_argument("--processes", type=int, default=0, metavar="N", help=processes)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="to ask about; may be repeated (default: made ones)"
    )
    tool = "who asks: auto is perf_analyzer where it is installed, else darktrt itself (default: auto)"
    parser.add_argument("--tool", choices=["auto", "perf_analyzer", "own"], default="auto", help=tool)
    parser.add_argument("--metrics", metavar="URL", help="of the server's metrics (default: http://HOST:8002/metrics)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    budget = "with --repository: try every --delay with all --instances; the fastest whose p99 is lower goes into its config"
    parser.add_argument("--latency-budget-ms", type=groups.above_zero, metavar="MS", help=budget)
    delays = "batching delays to try, in microseconds (default: 0 500 2000; 0 for a model without batches)"
    parser.add_argument("--delay", type=int, nargs="+", metavar="US", help=delays)
    instances = "numbers of instances to try (default: 1 2 4)"
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 4], metavar="N", help=instances)
    parser.set_defaults(run=_load)


def _load(args: argparse.Namespace) -> None:
    from darktrt.serve.load.measure import LoadOptions, side_by_side
    from darktrt.serve.load.sweep import delays_of, load_repository, settings_of, sweep

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
        args.tool,
        args.metrics,
    )
    if args.latency_budget_ms:
        if not args.repository or len(args.model) > 1:
            raise DarktrtError("--latency-budget-ms needs --repository, and one --model at most")
        model = next(iter(args.model), None)
        settings = settings_of(args.delay or delays_of(args.repository, model), args.instances)
        swept = sweep(args.repository, model, settings, args.latency_budget_ms, options)
        text, values = swept.to_markdown(), swept.to_json()
    else:
        reports = load_repository(args.repository, args.model, options) if args.repository else _load_server(args, options)
        text = "\n".join([*(report.to_markdown() for report in reports), side_by_side(reports)])
        values = json.dumps([asdict(report) for report in reports], indent=2) + "\n"
    print(text, end="")
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(values)


def _load_server(args: argparse.Namespace, options: LoadOptions) -> list[LoadReport]:
    from darktrt.serve.load.measure import measure_load

    return [measure_load(groups.endpoint(args), name, args.version, options) for name in args.model or [None]]
