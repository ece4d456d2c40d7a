"""``darktrt serve doctor``: checks of a model repository before a server loads it."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "doctor",
        "check a model repository before a server loads it; status 1 if something would fail",
        "darktrt serve doctor model_repository",
        "darktrt serve doctor model_repository --reference portable.onnx --image dog.jpg",
    )
    parser.set_defaults(command="serve doctor", run=_serve_doctor)
    parser.add_argument("repository", metavar="FOLDER", help="a model repository of 'darktrt serve repository'")
    parser.add_argument("--reference", metavar="ONNX", help="compare models of the same network with this file in ONNX Runtime")
    parser.add_argument("--image", metavar="FILE", help="image of the first inference (default: noise)")


def _serve_doctor(args: argparse.Namespace) -> int:
    from darktrt.serve.doctor import diagnose_repository

    findings = diagnose_repository(args.repository, args.reference, args.image)
    for finding in findings:
        print(finding)
    return 1 if any(finding.bad for finding in findings) else 0
