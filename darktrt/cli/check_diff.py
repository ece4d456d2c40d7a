"""``darktrt check diff``: two reports, or two models, against each other."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.errors import DarktrtError

if TYPE_CHECKING:
    from darktrt.check.report_diff import Side


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "diff",
        "hold two reports, or two models, against each other; status 1 if more AP is lost than --max-drop allows",
        "darktrt check diff before/report after/report --max-drop 0.005",
        "darktrt check diff report:ONNX 'report:ONNX as INT8' --max-drop 0.02",
        "darktrt check diff fp32.onnx int8.plan --data val.json --max-drop 0.02",
    )
    parser.set_defaults(command="check diff", run=_diff)
    side = "a report's folder or report.json, REPORT:VARIANT for one variant of it, or with --data an .onnx or .plan file"
    parser.add_argument("a", metavar="A", help=side)
    parser.add_argument("b", metavar="B", help="likewise: what may be worse")
    parser.add_argument("--max-drop", type=float, metavar="X", help="the most AP that any variant may lose, such as 0.005")
    groups.add_labelled(parser, "--data")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines, as 'darktrt engine' takes it")


def _diff(args: argparse.Namespace) -> int:
    from darktrt.check.report_diff import diff

    if args.max_drop is not None and not 0 <= args.max_drop < 1:
        raise DarktrtError(
            f"--max-drop {args.max_drop:g}: it must be 0 or more and below 1, such as 0.005 for half a point of mAP"
        )
    found = diff(_side(args, args.a), _side(args, args.b))
    print(found.to_table())
    if args.max_drop is None:
        return 0
    worst = found.worst_drop()
    holds = worst <= args.max_drop
    print(f"\nlargest drop of AP {worst:.4f}, {'within' if holds else 'beyond'} the {args.max_drop:g} allowed")
    return 0 if holds else 1


def _side(args: argparse.Namespace, text: str) -> Side:
    """A report, or a model that is run over the data."""
    from darktrt.check.report_diff import measured_side, read_side

    path = Path(text)
    if path.suffix.lower() not in (".onnx", ".plan", ".engine"):
        return read_side(text)
    if not args.data:
        raise DarktrtError(f"{text}: is measured on images with labels; name them by --data")
    from darktrt.check.detections import digests_of, find, judge_all
    from darktrt.check.report import evaluation_digest
    from darktrt.check.runs import onnx_variant, plan_variant
    from darktrt.engine.runtime import PlanRunner

    notes: list[str] = []
    with ExitStack() as stack:
        is_onnx = path.suffix.lower() == ".onnx"
        variant = onnx_variant(text) if is_onnx else plan_variant(stack.enter_context(PlanRunner(text, args.plugins)))
        truth = groups.truth(args, variant.info.class_names, notes)
        digests = digests_of(truth)
        found = find(variant, truth, digests)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return measured_side(judge_all([found], truth, digests)[0], evaluation_digest(truth, digests))
