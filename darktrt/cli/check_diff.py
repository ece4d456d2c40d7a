"""``darktrt check diff``: the differences between two reports, or two models."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import check_options, groups
from darktrt.errors import DarktrtError

if TYPE_CHECKING:
    from darktrt.check.report_diff import DiffInput


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "diff",
        "compare two reports, or two models; status 1 if the AP drops by more than --max-drop",
        "darktrt check diff before/report after/report --max-drop 0.005",
        "darktrt check diff report:ONNX 'report:ONNX as INT8' --max-drop 0.02",
        "darktrt check diff fp32.onnx int8.plan --data val.json --max-drop 0.02",
    )
    parser.set_defaults(command="check diff", run=_diff)
    report = "a report's folder or report.json, REPORT:VARIANT for one variant of it, or with --data an .onnx or .plan file"
    parser.add_argument("a", metavar="A", help=report)
    parser.add_argument("b", metavar="B", help="likewise: what may be worse")
    parser.add_argument("--max-drop", type=float, metavar="X", help="the largest drop of AP of any variant, such as 0.005")
    check_options.add_labelled(parser, "--data")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines")


def _diff(args: argparse.Namespace) -> int:
    from darktrt.check.report_diff import diff_reports

    if args.max_drop is not None and not 0 <= args.max_drop < 1:
        raise DarktrtError(
            f"--max-drop {args.max_drop:g}: it must be 0 or more and below 1, such as 0.005 for half a point of mAP"
        )
    diff = diff_reports(_diff_input(args, args.a), _diff_input(args, args.b))
    print(diff.to_table())
    if args.max_drop is None:
        return 0
    worst = diff.worst_drop()
    holds = worst <= args.max_drop
    print(f"\nlargest drop of AP {worst:.4f}, {'within' if holds else 'beyond'} the {args.max_drop:g} allowed")
    return 0 if holds else 1


def _diff_input(args: argparse.Namespace, text: str) -> DiffInput:
    """A report, or a model that is run over the data."""
    from darktrt.check.report_diff import read_report

    path = Path(text)
    if path.suffix.lower() not in (".onnx", ".plan", ".engine"):
        return read_report(text)
    if not args.data:
        raise DarktrtError(f"{text}: is measured on images with labels; name them by --data")
    from darktrt.check.evaluation import evaluate
    from darktrt.check.report_diff import diff_input
    from darktrt.check.runs import onnx_variant, plan_variant
    from darktrt.engine.runtime import PlanRunner

    with ExitStack() as stack:
        is_onnx = path.suffix.lower() == ".onnx"
        variant = onnx_variant(text) if is_onnx else plan_variant(stack.enter_context(PlanRunner(text, args.plugins)))
        ground_truth = check_options.ground_truth(args, variant.info.class_names)
        evaluation = evaluate([variant], ground_truth)
    return diff_input(evaluation.variants[0], ground_truth.digest)
