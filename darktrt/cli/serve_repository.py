"""``darktrt serve repository``: a model is written into a model repository of Triton."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from darktrt.cli import groups
from darktrt.errors import DarktrtError
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    from darktrt.serve.config import BackendOptions


def add(commands: groups.Commands) -> None:
    from darktrt.metadata import IOU_THRESHOLD, SCORE_THRESHOLD

    parser = groups.command(
        commands,
        "repository",
        "write a plan or an ONNX file into a model repository of Triton",
        "darktrt serve repository portable.onnx -o model_repository",
        "darktrt serve repository portable.onnx -o model_repository --name photos --input jpeg",
        "darktrt serve repository fp16.plan -o model_repository --kind tensorrt_plan",
        "darktrt serve repository fp16.plan -o model_repository --instances 2 --gpus 0 1 --preferred 4 8 --delay 100",
    )
    parser.set_defaults(command="serve repository", run=_repository)
    parser.add_argument("model", metavar="MODEL", help="an engine of 'darktrt engine' or an ONNX file of 'darktrt surgery'")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the repository; other models in it stay")
    parser.add_argument("--name", metavar="NAME", help="name of the model in Triton (default: the network's)")
    kinds = "python: darktrt's own, everywhere; tensorrt_plan, onnxruntime: Triton's, in its containers (default: python)"
    parser.add_argument("--kind", choices=["python", "tensorrt_plan", "onnxruntime"], default="python", help=kinds)
    forms = "tensor: arrays of the model's input; jpeg: image files of any size, and JSON in return (default: tensor)"
    _add(parser, "--input", choices=["tensor", "jpeg"], help=forms)
    parser.add_argument("--version", type=int, default=1, metavar="N", help="of the model; others stay (default: 1)")
    _add(parser, "--versions", type=int, metavar="N", help="load the N latest versions; 0 for all (default: 1)")
    _add(parser, "--max-batch", type=int, metavar="N", help="images that Triton may batch (default: the model's largest batch)")
    _add(parser, "--preferred", type=int, nargs="+", metavar="N", help="batch sizes that do not wait for more requests")
    delay = "microseconds that a request may wait to be batched (default: 0)"
    _add(parser, "--delay", type=int, metavar="US", help=delay)
    _add(parser, "--instances", type=int, metavar="N", help="on each GPU, or on the CPU (default: 1)")
    gpus = "GPUs to run on (default: 0 for a plan, none for an ONNX file)"
    _add(parser, "--gpus", type=int, nargs="*", metavar="GPU", help=gpus)
    _add(parser, "--cuda-graph", action="store_true", help="record and replay the GPU's work of each batch size")
    _add(parser, "--cache", action="store_true", help="answer repeated requests from the server's cache")
    _add(parser, "--no-warmup", dest="warmup", action="store_false", help="be ready before the first inference")
    score = f"of requests without one (default: {SCORE_THRESHOLD})"
    _add(parser, "--score-threshold", type=float, metavar="X", help=score)
    _add(parser, "--iou-threshold", type=float, metavar="X", help=f"of requests without one (default: {IOU_THRESHOLD})")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the plan, as for 'darktrt engine'")


def _add(parser: argparse.ArgumentParser, option: str, **about: Any) -> None:
    """An option that is a field of the backend's record, whose default holds where the option is absent."""
    parser.add_argument(option, default=argparse.SUPPRESS, **about)


def _options(args: argparse.Namespace) -> BackendOptions:
    """The record of the backend from the options of the command line."""
    from darktrt.serve.config import BACKENDS

    backend, values = BACKENDS[args.kind], vars(args)
    names = {field.name for kind in BACKENDS.values() for field in fields(kind)} & values.keys()
    options: dict[str, Any] = {name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in names}
    if unknown := sorted(options.keys() - {field.name for field in fields(backend)}):
        raise DarktrtError(f"the backend {args.kind} has no '{unknown[0]}'", unknown[0])
    return backend(**options)


def _repository(args: argparse.Namespace) -> None:
    from darktrt.serve.containers import docker_command
    from darktrt.serve.repository import publish
    from darktrt.serve.server import StartOptions

    folder = publish(args.model, args.output, _options(args), args.name, args.version, args.plugins)
    print(f"{folder}: version {args.version}, kind {args.kind}")
    if args.kind == "python":
        print(f"start:  darktrt serve start {args.output}")
    start = docker_command(args.output, StartOptions())
    for warning in start.warnings:
        LOGGER.warning(warning)
    print(f"Docker: {start}")
