"""``darktrt bench``: engines timed on the GPU."""

from __future__ import annotations

import argparse

from darktrt.cli import groups
from darktrt.files import atomic_output, check_outputs


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "bench",
        "time engines on the GPU, in turns: latency, throughput, with and without CUDA graph",
        "darktrt bench fp16.plan int8.plan",
        "darktrt bench fused=a.plan native=b.plan --batch 1 8 --json times.json",
    )
    parser.add_argument("plans", metavar="[NAME=]PLAN", nargs="+", help="engines and their names (default: the file names)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="batch sizes (default: 1)")
    parser.add_argument("--turns", type=int, default=20, metavar="N", help="turns of 20 calls of each engine (default: 20)")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines, as for 'darktrt engine'")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    from darktrt.engine.bench import bench_files

    check_outputs([args.json], [entry.rpartition("=")[2] for entry in args.plans])
    report = bench_files(args.plans, args.batch, args.turns, args.plugins)
    print(report.to_markdown())
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(report.to_json())
