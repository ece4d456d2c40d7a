"""``darktrt check``: the parser of its sub-commands, a file each."""

from __future__ import annotations

from darktrt.cli import check_compare, check_diff, check_map, check_report, groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "check",
        "compare models with PyTorch, and evaluate them on labelled images: check compare, map, report, diff",
        "darktrt check compare --help",
        "darktrt check map --help",
        "darktrt check report --help",
        "darktrt check diff --help",
    )
    checks = parser.add_subparsers(metavar="CHECK", required=True)
    check_compare.add(checks)
    check_map.add(checks)
    check_report.add(checks)
    check_diff.add(checks)
