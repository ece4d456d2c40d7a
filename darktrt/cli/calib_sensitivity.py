"""``darktrt calib sensitivity``: what quantizing each convolution alone costs."""

from __future__ import annotations

import argparse

from darktrt.cli import groups
from darktrt.files import check_outputs


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "sensitivity",
        "rank convolutions by what quantizing each alone costs",
        "darktrt calib sensitivity portable.onnx photos/ --calibration calibration.calib",
        "darktrt calib sensitivity portable.onnx photos/ --calibration calibration.calib --plot layers.png --json layers.json",
        "darktrt calib sensitivity portable.onnx val.json --calibration calibration.calib --map val.json:val2017",
    )
    parser.add_argument("model", metavar="ONNX", help="portable ONNX file of 'darktrt surgery', not quantized")
    parser.add_argument("data", metavar="DATA", nargs="+", help="folders, lists, COCO json files, patterns")
    scales = "a calibration of 'darktrt calib run' (.calib), or a TensorRT calibration cache"
    parser.add_argument("--calibration", required=True, metavar="CALIB", help=scales)
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="use a random sample of N images (default: 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    truth = "also measure mAP with each layer quantized, and rank by it: slow; TRUTH is a COCO json, or FILE.json:FOLDER"
    parser.add_argument("--map", metavar="TRUTH", help=truth)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--plot", metavar="PNG", help="draw a bar for each layer")
    groups.add_cluster(parser)
    parser.set_defaults(command="calib sensitivity", run=_sensitivity)


def _sensitivity(args: argparse.Namespace) -> None:
    from darktrt.check.sensitivity import plot, save_json, sensitivity
    from darktrt.vision.charts import check_drawable
    from darktrt.vision.sources import path_of

    inputs = [args.model, args.calibration, *map(path_of, args.data), *([path_of(args.map)] if args.map else [])]
    check_outputs([args.json, args.plot], inputs)
    if args.plot:
        check_drawable(args.plot)
    calibration, cluster = groups.calibration(args.calibration), groups.cluster(args)
    ranking = sensitivity(args.model, args.data, calibration, args.limit, args.seed, args.map, cluster)
    print(ranking.to_table(), flush=True)
    if args.json:
        save_json(ranking, args.json)
    if args.plot:
        plot(ranking, args.plot)
    print(ranking.summary())
