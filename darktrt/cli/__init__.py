"""The command ``darktrt``: each sub-command, a file here, is a thin call of one function, whose room is imported only then."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence

from darktrt import __version__
from darktrt.cli import (
    bench,
    calib,
    check,
    client,
    convert,
    detect,
    doctor,
    engine,
    fetch,
    inspect,
    layers,
    load,
    plugins,
    selftest,
    serve,
    surgery,
)
from darktrt.errors import DarktrtError
from darktrt.progress import show_on_stderr

_OPTIONS = {"calibration": "table", "calibration_images": "data"}
"""Arguments whose option has another name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; users' errors become one sentence on stderr and exit status 2."""
    args = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    show_on_stderr()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as with Ctrl-C, so that no half-written file stays
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"darktrt {args.command}: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2
    except DarktrtError as error:
        print(f"darktrt {args.command}: {error}{_option(args, error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"darktrt {args.command}: interrupted", file=sys.stderr)
        exec("")  # CPython ends by SIGINT, not with this status, after one in an exec (of dataclasses, say) until the next
        return 130
    return status or 0


def _option(args: argparse.Namespace, error: DarktrtError) -> str:
    """The option of the argument that an error names, if the command has it."""
    name = _OPTIONS.get(error.argument or "", error.argument)
    return f" [--{name.replace('_', '-')}]" if name and hasattr(args, name) else ""


def parser() -> argparse.ArgumentParser:
    """The parser of the command and all its sub-commands."""
    root = argparse.ArgumentParser(
        prog="darktrt",
        description="Turn a darknet detector (.cfg + .weights) into a TensorRT engine, stage by stage.",
        epilog="Each command has examples in its own help: darktrt convert --help",
    )
    root.add_argument("--version", action="version", version=f"darktrt {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    stages = (fetch, convert, surgery, calib, engine, layers, plugins)
    for module in (*stages, check, detect, serve, client, load, bench, inspect, doctor, selftest):
        module.add(commands)
    return root
