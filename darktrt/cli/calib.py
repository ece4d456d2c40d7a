"""``darktrt calib``: the parser of its sub-commands, a file each."""

from __future__ import annotations

from darktrt.cli import calib_merge, calib_run, calib_sensitivity, groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "calib",
        "choose INT8 scales from images: calib run, merge, sensitivity",
        "darktrt calib run portable.onnx photos/ -o calibration.table",
        "darktrt calib merge shard1.npz shard2.npz -o calibration.table",
        "darktrt calib sensitivity portable.onnx photos/ --calibration calibration.calib",
        "darktrt calib run --help",
    )
    calibs = parser.add_subparsers(metavar="STEP", required=True)
    calib_run.add(calibs)
    calib_merge.add(calibs)
    calib_sensitivity.add(calibs)
