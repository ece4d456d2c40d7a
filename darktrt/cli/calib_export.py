"""``darktrt calib export``: the scales of a calibration as TensorRT's calibration cache."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "export",
        "write the scales of a calibration as a TensorRT calibration cache, for trtexec --calib and other tools",
        "darktrt calib export calibration.calib -o calibration.cache",
    )
    parser.set_defaults(command="calib export", run=_export)
    parser.add_argument("calibration", metavar="CALIB", help="calibration of 'darktrt calib run'")
    parser.add_argument("-o", "--output", required=True, metavar="CACHE", help="TensorRT calibration cache to write")


def _export(args: argparse.Namespace) -> None:
    from darktrt.calib.table import CACHE_VERSION, CalibrationTable
    from darktrt.files import check_outputs

    check_outputs([args.output], [args.calibration])
    scales = dict(groups.calibration(args.calibration).scales)
    CalibrationTable(scales, CACHE_VERSION).save(args.output)
    print(f"{args.output}: scales of {len(scales)} tensors")
