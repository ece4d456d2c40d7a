"""``darktrt selftest``: every way to build an engine on this machine, tried out."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "selftest",
        "try every way to build and run an engine on this machine; the report fits into an issue; status 1 if one fails",
        "darktrt selftest",
        "darktrt selftest -o jetson.json --plugins libdarktrt_plugins.so",
    )
    report = "report to write; the same as Markdown goes beside it, as .md (default: selftest.json)"
    parser.add_argument("-o", "--output", default="selftest.json", metavar="JSON", help=report)
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of full TensorRT, as for 'darktrt engine'")
    parser.add_argument("--tactic-sources", metavar="+LIB,-LIB", help="for full TensorRT, as for 'darktrt engine'")
    minutes = "limit of all of it; what would begin later is not tried (default: 10)"
    parser.add_argument("--minutes", type=groups.above_zero, default=10.0, metavar="N", help=minutes)
    parser.set_defaults(run=_selftest)


def _selftest(args: argparse.Namespace) -> int:
    from darktrt.selftest.run import markdown_path, run_selftest

    report = run_selftest(args.output, plugins=args.plugins, tactic_sources=args.tactic_sources, minutes=args.minutes)
    print(report.to_markdown())
    print(f"{args.output}, {markdown_path(args.output)}: the report; the second fits into an issue")
    return 0 if report.passed else 1
