"""``darktrt check mark``: the output of every cfg section as an output of the model."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "mark",
        "make the output of every cfg section an output of the model, for 'check compare --layers' with its engine",
        "darktrt check mark portable.onnx -o marked.onnx",
    )
    parser.set_defaults(command="check mark", run=_mark)
    parser.add_argument("source", metavar="ONNX", help="what 'darktrt convert' or 'darktrt surgery' wrote")
    parser.add_argument("-o", "--output", required=True, metavar="ONNX", help="file to write")


def _mark(args: argparse.Namespace) -> None:
    from darktrt.check.runs import mark_file

    print(f"{args.output}: {mark_file(args.source, args.output)} further outputs")
