"""``darktrt calib merge``: the calibration of several runs."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "merge",
        "put the calibrations of several runs together, as one run over all their images would make it",
        "darktrt calib merge shard1.calib shard2.calib -o all.calib --model portable.onnx",
        "darktrt calib merge shard1.calib shard2.calib.partial -o all.calib",
    )
    parser.set_defaults(command="calib merge", run=_merge)
    parser.add_argument("calibrations", metavar="CALIB", nargs="+", help="calibrations, also of runs that have not ended")
    groups.add_calibration_output(parser)
    model = "the ONNX file that was calibrated, to measure on the images whose files are here (default: measure nothing)"
    parser.add_argument("--model", metavar="ONNX", help=model)
    methods = ["auto", "entropy", "weighted", "mse", "percentile", "minmax"]
    theirs = "(default: that of the calibrations)"
    parser.add_argument("--method", choices=methods, help=f"how to choose thresholds {theirs}")
    parser.add_argument("--percentile", type=float, metavar="P", help=f"for that method {theirs}")
    parser.add_argument("--bias-images", type=int, metavar="N", help=f"images to correct biases by {theirs}")
    layers = f"images to find the floating-point layers by {theirs}"
    parser.add_argument("--fp-layer-images", type=int, metavar="N", help=layers)


def _merge(args: argparse.Namespace) -> None:
    from darktrt.pipeline import merge_calibrations

    merge_calibrations(
        args.calibrations,
        args.output,
        model=args.model,
        method=args.method,
        percentile=args.percentile,
        bias_images=args.bias_images,
        fp_layer_images=args.fp_layer_images,
    )
    groups.print_calibration(args.output)
