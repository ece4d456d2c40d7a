"""``darktrt detect``: objects in images and videos."""

from __future__ import annotations

import argparse
from contextlib import closing

from darktrt.cli import groups
from darktrt.files import keep_inputs


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "detect",
        "find objects in images and videos, with an ONNX file on the CPU or an engine on the GPU",
        "darktrt detect dog.jpg --model portable.onnx -o out.jpg",
        "darktrt detect dog.jpg --engine fp16.plan -o out.jpg",
        "darktrt detect holiday/ street.mp4 --model portable.onnx -o found/ --json > found.jsonl",
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="images, videos, folders or patterns")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--model", metavar="ONNX", help="an ONNX file of 'darktrt surgery', in ONNX Runtime on the CPU")
    network.add_argument("--engine", metavar="PLAN", help="an engine of 'darktrt engine', on the GPU")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engine")
    parser.add_argument(
        "--decoder",
        choices=["auto", "cpu", "gpu"],
        default="auto",
        help="where JPEGs and videos are decoded for an engine: on the GPU by nvImageCodec and PyNvVideoCodec, whose pixels "
        "differ by some levels, or on the CPU by Pillow and FFmpeg; default: on the GPU where they are installed",
    )
    parser.add_argument("-o", "--output", metavar="PATH", help="write copies with the detections drawn in: a file, or a folder")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image or frame instead of tables")
    groups.add_thresholds(parser)
    parser.set_defaults(run=_detect)


def _detect(args: argparse.Namespace) -> None:
    from darktrt.engine.runtime import OnnxRunner, PlanRunner
    from darktrt.vision.detector import NetworkDetector
    from darktrt.vision.files import detect_files

    if args.output:
        keep_inputs(args.output, args.model, args.engine)
    with PlanRunner(args.engine, args.plugins, cuda_graph=True) if args.engine else OnnxRunner(args.model) as runner:
        network = runner if isinstance(runner, PlanRunner) else runner.run
        thresholds = args.score_threshold, args.iou_threshold
        with NetworkDetector(network, runner.info, *thresholds, decoder=args.decoder) as detector:
            with closing(detect_files(detector, args.sources, args.output)) as results:
                groups.print_results(args, results)
