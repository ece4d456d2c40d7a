"""``darktrt bench``: engines and their rivals timed on the GPU."""

from __future__ import annotations

import argparse
import sys

from darktrt.cli import groups
from darktrt.files import atomic_output, check_writable, keep_inputs


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "bench",
        "time engines on the GPU, and their rivals, in turns: latency, throughput, with and without CUDA graph",
        "darktrt bench fp16.plan int8.plan",
        "darktrt bench fused=a.plan native=b.plan --batch 1 8 --json times.json",
        "darktrt bench fp16.plan --torch my.cfg my.weights --python python3.12",
    )
    parser.add_argument(
        "plans", metavar="[NAME=]PLAN", nargs="+", help="engines, and what to call them (default: their files' names)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="batch sizes (default: 1)")
    parser.add_argument("--turns", type=int, default=20, metavar="N", help="turns of 20 calls of each engine (default: 20)")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines, as 'darktrt engine' takes it")
    rival = "also time the network in PyTorch, FP16, eager and by torch.compile; needs torchvision"
    parser.add_argument("--torch", metavar=("CFG", "WEIGHTS"), nargs=2, help=rival)
    cuda = "also time this ONNX file in ONNX Runtime's CUDA provider; may be repeated"
    parser.add_argument("--onnx", metavar="[NAME=]ONNX", action="append", default=[], help=cuda)
    parser.add_argument("--python", metavar="PYTHON", help="that runs PyTorch and ONNX Runtime (default: this one)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from darktrt.engine.bench import bench_files

    if args.json:
        keep_inputs(args.json, *(entry.rpartition("=")[2] for entry in (*args.plans, *args.onnx, *(args.torch or ()))))
        check_writable(args.json)
    torch = (args.torch[0], args.torch[1]) if args.torch else None
    report = bench_files(args.plans, args.batch, args.turns, args.plugins, args.onnx, torch, args.python)
    print(report.to_markdown())
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(report.to_json())
    for one in report.failures:
        print(f"failed: {one}", file=sys.stderr)
    return 1 if report.failures else 0
