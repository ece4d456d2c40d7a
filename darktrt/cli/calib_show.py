"""``darktrt calib show``: what a calibration says."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "show",
        "print what a calibration says, and draw its histograms",
        "darktrt calib show calibration.calib",
        "darktrt calib show calibration.calib --plot histograms.png",
        "darktrt calib show calibration.calib --json",
    )
    parser.set_defaults(command="calib show", run=_show)
    parser.add_argument("calibration", metavar="CALIB", help="calibration of 'darktrt calib run', also of one under way")
    parser.add_argument("--plot", metavar="PNG", help="draw the histograms with their thresholds")
    parser.add_argument("--json", action="store_true", help="print all that is not an array, as it stands in the file")


def _show(args: argparse.Namespace) -> None:
    from darktrt.calib.file import read_calibration, to_json
    from darktrt.calib.summary import plot, summary
    from darktrt.files import check_outputs
    from darktrt.vision.charts import check_drawable

    check_outputs([args.plot], [args.calibration])
    if args.plot:
        check_drawable(args.plot)
    contents = read_calibration(args.calibration)
    print(to_json(contents) if args.json else summary(contents), flush=True)
    if args.plot:
        plot(contents, args.plot)
