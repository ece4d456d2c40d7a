"""``darktrt doctor``: what this machine has."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands, "doctor", "say what this machine has, and what each missing thing would allow", "darktrt doctor"
    )
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from darktrt.engine.doctor import examine_machine, report

    print(report(examine_machine()))
