"""``darktrt inspect``: the contents of a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from darktrt.cli import groups
from darktrt.errors import DarktrtError


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "inspect",
        "show the contents of a cfg, weights, ONNX, engine or manifest file",
        "darktrt inspect yolov4.cfg",
        "darktrt inspect portable.onnx",
        "darktrt inspect model.plan",
    )
    parser.add_argument("file", metavar="FILE", help="a file that ends in .cfg .weights .onnx .plan .engine or .json")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    suffix = Path(args.file).suffix.lower()
    if suffix in (".cfg", ".weights"):
        from darktrt.convert.describe import describe_cfg, describe_weights

        print(describe_cfg(args.file) if suffix == ".cfg" else describe_weights(args.file))
    elif suffix == ".json":
        from darktrt.engine.describe import describe_manifest
        from darktrt.engine.manifest import read_manifest

        print(describe_manifest(args.file, read_manifest(args.file)))
    elif suffix in (".onnx", ".plan", ".engine"):
        from darktrt.engine.describe import describe_onnx, describe_plan

        print(describe_onnx(args.file) if suffix == ".onnx" else describe_plan(args.file))
    else:
        raise DarktrtError(f"{args.file}: is of unknown type; it should end in .cfg .weights .onnx .plan .engine or .json")
