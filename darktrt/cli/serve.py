"""``darktrt serve``: the parser of its sub-commands, a file each."""

from __future__ import annotations

from darktrt.cli import groups, serve_doctor, serve_repository, serve_start


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "serve",
        "serve models with Triton: serve repository, serve start, serve doctor",
        "darktrt serve repository --help",
        "darktrt serve start --help",
        "darktrt serve doctor --help",
    )
    serves = parser.add_subparsers(metavar="STEP", required=True)
    serve_repository.add(serves)
    serve_start.add(serves)
    serve_doctor.add(serves)
