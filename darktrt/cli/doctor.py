"""``darktrt doctor``: the state of this machine."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands, "doctor", "show what this machine has for darktrt, and the use of each missing thing", "darktrt doctor"
    )
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from darktrt.engine.doctor import examine_machine, report

    print(report(examine_machine()))
