"""The sub-commands of ``darktrt``: each, a file here, is a thin call of one function, whose room is imported only then."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise

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
    interrupted,
    layers,
    load,
    plugins,
    selftest,
    serve,
    surgery,
)
from darktrt.cli.streams import ReaderGoneError, readable_streams
from darktrt.errors import DarktrtError
from darktrt.progress import show_on_stderr

_OPTIONS = {"calibration_images": "data", "address": "ray"}
"""Arguments whose option has another name."""

_MAY_BE_EMPTY = ("--fp-layers", "--simulate", "--version")


def run(arguments: Sequence[str]) -> int:
    """Run the command of these words; the exit status."""
    args = argparse.Namespace(command="")
    with readable_streams():
        try:
            status = _run(arguments, args)
        except ReaderGoneError:
            return 0
        except DarktrtError as error:
            print(f"{_name(args)}: {error}{_option(args, error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return interrupted(_name(args))
    return status or 0


def _run(arguments: Sequence[str], args: argparse.Namespace) -> int | None:
    try:
        parser().parse_args(arguments, args)
        _refuse_empty(arguments)
        show_on_stderr()
        return args.run(args)  # type: ignore[no-any-return]
    finally:
        sys.stdout.flush()  # also where argparse ends the process, after --help


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse the empty name, which would be the current folder or no file at all."""
    for before, word in pairwise(["darktrt", *arguments]):
        option, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        if equals and not value and option not in _MAY_BE_EMPTY:
            raise DarktrtError(f"the word behind '{option}' is empty; is a variable of the shell not set?")


def _name(args: argparse.Namespace) -> str:
    return f"darktrt {args.command}".rstrip()


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
