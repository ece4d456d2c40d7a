"""``darktrt check report``: a page about how good a network's variants are."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.errors import DarktrtError

if TYPE_CHECKING:
    from darktrt.check.agreement import Agreement
    from darktrt.check.ground_truth import Truth


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "report",
        "write a page about how good a network's variants are and where their errors come from",
        "darktrt check report val.json --model portable.onnx --simulate fp16,int8 --table calibration.table -o report",
        "darktrt check report photos/ --cfg my.cfg --weights my.weights --model portable.onnx --plan fp16.plan",
        "darktrt check report val.json --model ONNX=portable.onnx --load-detections gpu.json --bench times.json",
    )
    parser.set_defaults(command="check report", run=_report)
    groups.add_labelled(parser)
    groups.add_variants(parser)
    groups.add_detections(parser)
    output = "folder to write index.html, report.json and report.md into (default: build/NETWORK/report)"
    parser.add_argument("-o", "--output", metavar="FOLDER", help=output)
    times = "latencies of the engines, from 'darktrt bench --json'; may be repeated"
    parser.add_argument("--bench", metavar="JSON", action="append", default=[], help=times)
    compared = "images that tensors and layers are compared on; 0 leaves that out (default: 8)"
    parser.add_argument("--compare-images", type=int, default=8, metavar="N", help=compared)
    ranked = "images that INT8's cost is measured on, convolution by convolution; 0 leaves that out (default: 8)"
    parser.add_argument("--sensitivity-images", type=int, default=8, metavar="N", help=ranked)
    shown = "images to show of those on which variants disagree most (default: 8)"
    parser.add_argument("--show-images", type=int, default=8, metavar="N", help=shown)


def _report(args: argparse.Namespace) -> None:
    from darktrt.check.detections import judge_all, to_table
    from darktrt.check.report import Parts, int8_parts, make_report, read_timings
    from darktrt.check.report_page import PAGE, check_folder, write_report

    for option in ("compare_images", "sensitivity_images", "show_images"):
        if getattr(args, option) < 0:
            raise DarktrtError(f"--{option.replace('_', '-')} {getattr(args, option)}: it must be at least 0")
    if args.output:
        check_folder(args.output)
    timings = read_timings(args.bench)
    notes: list[str] = []
    truth, digests, found = groups.found(args, notes)
    folder = Path(args.output or Path("build", found[0].info.name, "report"))
    check_folder(folder)
    judged = judge_all(found, truth, digests)
    int8 = None
    if args.table and args.model:
        source, calibration = groups.named(args.model[0])[1], groups.calibration(args.table, args.fp_layers)
        int8 = int8_parts(source, calibration, args.table, truth, digests, args.sensitivity_images)
    comparison = _compared_outputs(args, truth)
    report = make_report(Parts(truth, digests, judged, notes, comparison, int8, timings), args.show_images)
    write_report(report, folder)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(to_table(judged))
    print(f"{folder / PAGE}: the report")


def _compared_outputs(args: argparse.Namespace, truth: Truth) -> Agreement | None:
    """The variants' tensors against the first's, layer by layer where they give them; None where there is but one."""
    from darktrt.check.agreement import compare
    from darktrt.check.runs import load_image

    with ExitStack() as stack:
        variants = groups.variants(args, stack, layers=True) if args.compare_images else []
        if len(variants) < 2:
            return None
        paths = [image.path for image in truth.images[: args.compare_images]]
        images = [load_image(path, variants[0].info) for path in paths]
        return compare(variants, images, layers=True, partly=True)
