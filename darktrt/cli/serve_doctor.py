"""``darktrt serve doctor``: a model repository looked at before the server does."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "doctor",
        "check a model repository before the server does; status 1 if something would fail",
        "darktrt serve doctor model_repository",
        "darktrt serve doctor model_repository --reference portable.onnx --image dog.jpg",
    )
    parser.set_defaults(command="serve doctor", run=_serve_doctor)
    parser.add_argument("repository", metavar="FOLDER", help="what 'darktrt serve repository' wrote")
    parser.add_argument("--reference", metavar="ONNX", help="hold the models of this network against it, in ONNX Runtime")
    parser.add_argument("--image", metavar="FILE", help="to detect in (default: noise)")


def _serve_doctor(args: argparse.Namespace) -> int:
    from darktrt.serve.doctor import examine_repository

    findings = examine_repository(args.repository, args.reference, args.image)
    for finding in findings:
        print(finding)
    return 1 if any(finding.bad for finding in findings) else 0
