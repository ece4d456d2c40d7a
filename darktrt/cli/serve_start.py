"""``darktrt serve start``: a Triton server on this machine."""

from __future__ import annotations

import argparse
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    from darktrt.serve.server import StartOptions


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "start",
        "start a Triton server on this machine, keep it serving, and stop it at Ctrl-C",
        "darktrt serve start model_repository",
        "darktrt serve start model_repository --address 0.0.0.0 --http-port 9000 --grpc-port 9001 --metrics-port 9002",
        "darktrt serve start model_repository --load yolov4-tiny --log triton.log",
        "darktrt serve start model_repository --argument=--log-verbose=1",
    )
    parser.set_defaults(command="serve start", run=_start)
    parser.add_argument("repository", metavar="FOLDER", help="a model repository of 'darktrt serve repository'")
    programs = (
        "path: the tritonserver on PATH; docker: print the command of a container; pip: that of nvidia-pytriton; auto: the "
        "first of these that runs here (default: auto)"
    )
    parser.add_argument("--program", choices=["auto", "path", "docker", "pip"], default="auto", help=programs)
    address = "address to listen at (default: 127.0.0.1, for clients on this machine only)"
    parser.add_argument("--address", default="127.0.0.1", metavar="IP", help=address)
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(f"--{name}-port", type=int, default=port, metavar="N", help=f"(default: {port})")
    load = "load only these models, and let clients load and unload models"
    parser.add_argument("--load", nargs="+", metavar="NAME", help=load)
    parser.add_argument(
        "--shared-memory", action="store_true", help="let clients register shared memory, for --shared-memory of theirs"
    )
    insecure = "let other machines reach a server that is too old to have its security holes mended"
    parser.add_argument("--insecure", action="store_true", help=insecure)
    silent = "start the server again when a model answers no inference for this long (default: 60)"
    parser.add_argument("--silent-seconds", type=groups.above_zero, default=60.0, metavar="S", help=silent)
    request = "largest request over HTTP, where the server has such a limit (default: 64)"
    parser.add_argument("--max-request-mb", type=int, default=64, metavar="MB", help=request)
    cache = "size of the response cache, for models written with --cache (default: 0, no cache)"
    parser.add_argument("--cache-mb", type=int, default=0, metavar="MB", help=cache)
    parser.add_argument("--log", metavar="FILE", help="write the server's log there")
    more = "an option of tritonserver itself, written as --argument=--NAME=VALUE; may be repeated"
    parser.add_argument("--argument", metavar="WORD", action="append", default=[], dest="arguments", help=more)


def _start(args: argparse.Namespace) -> None:
    from darktrt.serve.install import choose_program
    from darktrt.serve.server import caveats, running
    from darktrt.serve.supervisor import supervise

    options = _options(args)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job has switched off
    program = choose_program(args.program)
    if program is None:
        _print_docker_command(args.repository, options)
        return
    with running(args.repository, options, program, args.log) as server, suppress(KeyboardInterrupt):
        for sentence in caveats(server):
            LOGGER.warning(sentence)
        print(f"ready: http://{server.http} and gRPC at {server.grpc}; Ctrl-C stops it", flush=True)
        supervise(server, args.silent_seconds)
    print("stopped", flush=True)


def _options(args: argparse.Namespace) -> StartOptions:
    from darktrt.serve.server import StartOptions

    return StartOptions(
        args.address,
        args.http_port,
        args.grpc_port,
        args.metrics_port,
        None if args.load is None else tuple(args.load),
        args.shared_memory,
        args.insecure,
        args.max_request_mb << 20,
        args.cache_mb << 20,
        tuple(args.arguments),
    )


def _print_docker_command(repository: str, options: StartOptions) -> None:
    from darktrt.serve.containers import docker_command

    start = docker_command(repository, options)
    for warning in start.warnings:
        LOGGER.warning(warning)
    print(start)
