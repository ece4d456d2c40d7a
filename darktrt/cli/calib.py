"""``darktrt calib``: the parser of its sub-commands, a file each."""

from __future__ import annotations

from darktrt.cli import calib_export, calib_merge, calib_run, calib_sensitivity, calib_show, groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "calib",
        "choose INT8 scales from images: calib run, show, merge, export, sensitivity",
        "darktrt calib run portable.onnx photos/ -o calibration.calib",
        "darktrt calib show calibration.calib --plot histograms.png",
        "darktrt calib merge shard1.calib shard2.calib -o all.calib --model portable.onnx",
        "darktrt calib export calibration.calib -o calibration.cache",
        "darktrt calib sensitivity portable.onnx photos/ --calibration calibration.calib",
        "darktrt calib run --help",
    )
    calibs = parser.add_subparsers(metavar="STEP", required=True)
    for module in (calib_run, calib_show, calib_merge, calib_export, calib_sensitivity):
        module.add(calibs)
