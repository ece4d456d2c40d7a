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
    from darktrt.engine.doctor import Finding, examine_machine, report
    from darktrt.vision.images import compiled_fit
    from darktrt.vision.native import library_path

    path, again = library_path(), "a C++ compiler, then pip install --force-reinstall --no-deps darktrt"
    unusable = f"not usable: {path} computes other bits than NumPy, or does not load; get {again}"
    state = "" if path is None else str(path) if compiled_fit() else unusable
    print(report([*examine_machine(), Finding("compiled resize", state, f"resizing images ten times as fast: {again}")]))
