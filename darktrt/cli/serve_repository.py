"""``darktrt serve repository``: a model into a model repository of Triton."""

from __future__ import annotations

import argparse
import sys

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "repository",
        "put a plan or an ONNX file into a model repository of Triton",
        "darktrt serve repository portable.onnx -o model_repository",
        "darktrt serve repository portable.onnx -o model_repository --name photos --input jpeg",
        "darktrt serve repository fp16.plan -o model_repository --kind tensorrt_plan",
        "darktrt serve repository fp16.plan -o model_repository --instances 2 --gpus 0 1 --preferred 4 8 --delay 100",
    )
    parser.set_defaults(command="serve repository", run=_repository)
    parser.add_argument("model", metavar="MODEL", help="what 'darktrt engine' or 'darktrt surgery' wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the repository; other models in it stay")
    parser.add_argument("--name", metavar="NAME", help="of the model in Triton (default: the network's)")
    kinds = "python: our backend, everywhere; tensorrt_plan, onnxruntime: Triton's own, in its containers (default: python)"
    parser.add_argument("--kind", choices=["python", "tensorrt_plan", "onnxruntime"], default="python", help=kinds)
    forms = "tensor: images of the network's size; jpeg: files of any size, and JSON back (default: tensor)"
    parser.add_argument("--input", choices=["tensor", "jpeg"], default="tensor", help=forms)
    parser.add_argument("--version", type=int, default=1, metavar="N", help="of the model; others stay (default: 1)")
    parser.add_argument("--versions", type=int, default=1, metavar="N", help="serve the N latest; 0 for all (default: 1)")
    parser.add_argument("--max-batch", type=int, metavar="N", help="images that Triton may batch (default: as the model takes)")
    parser.add_argument("--preferred", type=int, nargs="+", default=[], metavar="N", help="batch sizes that wait for no more")
    delay = "microseconds that a request may wait to be batched (default: 0)"
    parser.add_argument("--delay", type=int, default=0, metavar="US", help=delay)
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="on each GPU, or on the CPU (default: 1)")
    gpus = "GPUs to run on (default: 0 for a plan, none for an ONNX file)"
    parser.add_argument("--gpus", type=int, nargs="*", default=[], metavar="GPU", help=gpus)
    parser.add_argument("--cuda-graph", action="store_true", help="record and replay the GPU's work of each batch size")
    parser.add_argument("--cache", action="store_true", help="answer what came before from the server's cache")
    parser.add_argument("--no-warmup", dest="warmup", action="store_false", help="be ready before the first inference")
    parser.add_argument("--score-threshold", type=float, default=0.25, metavar="X", help="of requests without (default: 0.25)")
    parser.add_argument("--iou-threshold", type=float, default=0.45, metavar="X", help="of requests without (default: 0.45)")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the plan, as 'darktrt engine' takes it")


def _repository(args: argparse.Namespace) -> None:
    from darktrt.serve.config import ConfigOptions
    from darktrt.serve.containers import docker_command
    from darktrt.serve.repository import write_repository
    from darktrt.serve.server import StartOptions

    names = "kind input max_batch delay instances cuda_graph cache versions warmup score_threshold iou_threshold".split()
    given = {name: getattr(args, name) for name in names}
    options = ConfigOptions(**given, preferred=tuple(args.preferred), gpus=tuple(args.gpus))
    folder = write_repository(args.model, args.output, options, args.name, args.version, args.plugins)
    print(f"{folder}: version {args.version}, kind {args.kind}, input {args.input}")
    if args.kind == "python":
        print(f"start:  darktrt serve start {args.output}")
    start = docker_command(args.output, StartOptions())
    for warning in start.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"Docker: {start}")
