"""``darktrt calib merge``: INT8 scales from the histograms of several runs."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "merge",
        "choose INT8 scales from the histograms of several runs, as one run over all their images would",
        "darktrt calib merge shard1.npz shard2.npz -o calibration.table",
        "darktrt calib run portable.onnx photos/ -o calibration.table --resume",
    )
    parser.set_defaults(command="calib merge", run=_merge)
    parser.add_argument("histograms", metavar="NPZ", nargs="+", help="histograms that runs of 'darktrt calib run' left")
    groups.add_calibration_outputs(parser)


def _merge(args: argparse.Namespace) -> None:
    from darktrt.calib.options import CalibrationOptions
    from darktrt.pipeline import merge_calibrations

    options = CalibrationOptions(method=args.method, percentile=args.percentile)
    calibration = merge_calibrations(args.histograms, args.output, options, plot=args.plot)
    groups.print_calibration(args.output, calibration)
