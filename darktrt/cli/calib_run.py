"""``darktrt calib run``: INT8 scales from images."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "run",
        "run a network over images and choose INT8 scales",
        "darktrt calib run portable.onnx photos/ -o calibration.calib",
        "darktrt calib run portable.onnx train.txt --limit 500 -o calibration.calib",
        "darktrt calib run portable.onnx photos/ -o calibration.calib --resume",
    )
    parser.set_defaults(command="calib run", run=_run)
    parser.usage = "%(prog)s ONNX [DATA ...] -o CALIB [options]"
    parser.add_argument("model", metavar="ONNX", help="portable ONNX file of 'darktrt surgery'")
    data = "folders, images, lists, COCO json files, patterns (default: two sample images, for trying it out)"
    # nargs="*" would accept no DATA in 'calib run ONNX -o CALIB DATA'
    parser.add_argument("data", metavar="DATA", nargs="+", default=[], help=data).required = False
    groups.add_calibration_output(parser)
    methods = ["auto", "entropy", "weighted", "mse", "percentile", "minmax"]
    method = "how to choose (default: auto, the least error where objects are found)"
    parser.add_argument("--method", choices=methods, default="auto", help=method)
    parser.add_argument("--percentile", type=float, default=99.99, metavar="P", help="for that method (default: 99.99)")
    parser.add_argument("--limit", type=int, metavar="N", help="use a random sample of N images")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    bias = "images of a second pass, which measures how to correct biases; 0 leaves the biases (default: 64)"
    parser.add_argument("--bias-images", type=int, default=64, metavar="N", help=bias)
    layers = (
        "images of a third pass, which measures which convolutions would add three times their share of INT8's noise or more, "
        "to leave them in floating point; 0 leaves only the first one and those of the heads there (default: 8)"
    )
    parser.add_argument("--fp-layer-images", type=int, default=8, metavar="N", help=layers)
    resume = "go on with a run that was interrupted (CALIB.partial), or add images and measurements to CALIB"
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and list them")
    groups.add_cluster(parser)


def _run(args: argparse.Namespace) -> None:
    from darktrt.calib.options import CalibrationOptions
    from darktrt.pipeline import calibrate

    options = CalibrationOptions(
        limit=args.limit,
        seed=args.seed,
        method=args.method,
        percentile=args.percentile,
        bias_images=args.bias_images,
        fp_layer_images=args.fp_layer_images,
        resume=args.resume,
        skip_bad=args.skip_bad,
    )
    calibrate(args.model, args.data, args.output, options, cluster=groups.cluster(args))
    groups.print_calibration(args.output)
