"""``darktrt check report``: a page about the accuracy of a network's variants."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import check_options, groups
from darktrt.errors import DarktrtError
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    from darktrt.check.agreement import Agreement
    from darktrt.check.ground_truth import GroundTruth
    from darktrt.check.report import Int8Parts, Parts
    from darktrt.metadata import DetectorInfo
    from darktrt.surgery.qdq import Calibration


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "report",
        "write a page about the accuracy of a network's variants and the origin of their errors",
        "darktrt check report val.json --model portable.onnx --simulate fp16,int8 --calibration calibration.calib -o report",
        "darktrt check report photos/ --cfg my.cfg --weights my.weights --model portable.onnx --plan fp16.plan",
        "darktrt check report val.json --model ONNX=portable.onnx --load-detections gpu.json --bench times.json",
    )
    parser.set_defaults(command="check report", run=_report)
    check_options.add_labelled(parser)
    check_options.add_variants(parser)
    check_options.add_detections(parser)
    groups.add_cluster(parser)
    output = "folder to write index.html, report.json and report.md into (default: build/NETWORK/report)"
    parser.add_argument("-o", "--output", metavar="FOLDER", help=output)
    times = "latencies of the engines, from 'darktrt bench --json'; may be repeated"
    parser.add_argument("--bench", metavar="JSON", action="append", default=[], help=times)
    compared = "images that tensors and layers are compared on; 0 leaves that out (default: 8)"
    parser.add_argument("--compare-images", type=int, default=8, metavar="N", help=compared)
    ranked = "images that the cost of INT8 is measured on, for each convolution; 0 leaves that out (default: 8)"
    parser.add_argument("--sensitivity-images", type=int, default=8, metavar="N", help=ranked)
    shown = "images to show, of those on which variants disagree most (default: 8)"
    parser.add_argument("--show-images", type=int, default=8, metavar="N", help=shown)


def _report(args: argparse.Namespace) -> None:
    from darktrt.check.report import make_report
    from darktrt.check.report_page import PAGE, check_folder, write_report

    for option in ("compare_images", "sensitivity_images", "show_images"):
        if getattr(args, option) < 0:
            raise DarktrtError(f"--{option.replace('_', '-')} {getattr(args, option)}: it must be at least 0")
    if args.output:
        check_folder(args.output)
    parts = _measure(args)
    folder = _folder(args, parts.evaluation.variants[0].detections.info)
    report = make_report(parts, args.show_images)
    write_report(report, folder)
    for note in report.notes:
        if note not in parts.ground_truth.notes:  # those were warnings
            LOGGER.info("note: %s", note)
    print(parts.evaluation.to_table())
    print(f"{folder / PAGE}: the report")


def _folder(args: argparse.Namespace, info: DetectorInfo) -> Path:
    return Path(args.output or Path("build", info.name, "report"))


def _measure(args: argparse.Namespace) -> Parts:
    """All measurements; what cannot be compared is refused before the first image."""
    from darktrt.check.agreement import check_same_network
    from darktrt.check.evaluation import check_comparable, evaluate
    from darktrt.check.report import Parts, read_timings
    from darktrt.check.report_page import check_folder

    timings = read_timings(args.bench)
    loaded, cluster = check_options.loaded_detections(args), groups.cluster(args)
    with ExitStack() as stack:
        variants = check_options.variants(args, stack, loaded=[one.info for one in loaded], on_cluster=cluster is not None)
        check_options.check_any(variants, loaded)
        info = (variants or loaded)[0].info
        check_folder(_folder(args, info))
        ground_truth = check_options.ground_truth(args, info.class_names)
        check_comparable(variants, ground_truth, loaded)
        compared = args.compare_images > 0 and sum(variant.here for variant in variants) > 1
        if compared:
            check_same_network(variants)
        calibration = check_options.calibration(args) if args.model else None
        int8 = _int8_parts(args, calibration, ground_truth) if calibration else None
        agreement = _agreement(args, ground_truth) if compared else None
        return Parts(ground_truth, evaluate(variants, ground_truth, loaded, cluster), agreement, int8, timings)


def _agreement(args: argparse.Namespace, ground_truth: GroundTruth) -> Agreement:
    """The variants' tensors against the first's, by layer where they are outputs."""
    from darktrt.check.agreement import compare
    from darktrt.check.runs import load_image

    with ExitStack() as stack:
        variants = check_options.variants(args, stack, layers=True, on_cluster=args.ray is not None)
        variants = [variant for variant in variants if variant.here]
        paths = [image.path for image in ground_truth.images[: args.compare_images]]
        images = [load_image(path, variants[0].info) for path in paths]
        return compare(variants, images, layers=True, partly=True)


def _int8_parts(args: argparse.Namespace, calibration: Calibration, ground_truth: GroundTruth) -> Int8Parts:
    from darktrt.check.report import int8_parts

    source = check_options.split_name(args.model[0])[1]
    return int8_parts(source, calibration, args.calibration, ground_truth, args.sensitivity_images)
