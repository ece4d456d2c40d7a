"""``darktrt fetch``: files of pretrained networks, or sample images."""

from __future__ import annotations

import argparse

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "fetch",
        "get cfg, weights and class names of a pretrained network; or two sample images",
        "darktrt fetch yolov4-tiny -o networks",
        "darktrt fetch samples -o images",
        "DARKTRT_ZOO=/media/usb/networks darktrt fetch yolov4 -o networks",
    )
    parser.add_argument("model", metavar="MODEL", help="yolov4-tiny or yolov4; or samples, two images")
    parser.add_argument("-o", "--output", default=".", metavar="FOLDER", help="where the files go (default: here)")
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    from darktrt.convert.zoo import fetch

    for path in fetch(args.model, args.output):
        print(path)
