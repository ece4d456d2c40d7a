"""``darktrt rival``: the process that ``darktrt bench`` times PyTorch and ONNX Runtime in."""

from __future__ import annotations

import argparse
import sys

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    """The other end of ``bench --torch`` and ``--onnx``; of no use to people, so it has no help."""
    parser = commands.add_parser("rival")
    parser.add_argument("kind", choices=["onnx", "eager", "compile", "graph"])
    parser.add_argument("files", nargs="+")
    parser.set_defaults(run=_rival)


def _rival(args: argparse.Namespace) -> None:
    from darktrt.engine.bench import OnnxRival, Rival, answer

    if args.kind == "onnx":
        rival: Rival = OnnxRival(args.files[0])
    else:
        from darktrt.cli.groups import parse_size
        from darktrt.convert.rival import TorchRival

        cfg, weights, size = args.files
        rival = TorchRival(cfg, weights, parse_size(size), args.kind != "eager", args.kind == "graph")
    answer(rival, sys.stdin, sys.stdout)
