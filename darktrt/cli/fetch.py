"""``darktrt fetch``: files of pretrained networks, or sample images."""

from __future__ import annotations

import argparse

from darktrt.cli import groups
from darktrt.errors import DarktrtError


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "fetch",
        "get cfg, weights and class names of a pretrained network; or two sample images",
        "darktrt fetch --list",
        "darktrt fetch yolov4-tiny -o networks",
        "darktrt fetch samples -o images",
        "DARKTRT_ZOO=/media/usb/networks darktrt fetch yolov4 -o networks",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a network of --list, or samples: two images")
    listed = (
        "show the networks: input, classes, size, AP on 80 COCO images where it was measured, AP or AP50 on COCO that the "
        "network's repository reports, licence and SHA-256"
    )
    parser.add_argument("--list", action="store_true", help=listed)
    parser.add_argument("-o", "--output", default=".", metavar="FOLDER", help="where the files go (default: here)")
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    if args.list == bool(args.model):
        raise DarktrtError("name one network, or samples, or ask for --list")
    if args.list:
        from darktrt.convert.describe import describe_zoo

        print(describe_zoo())
        return
    from darktrt.convert.zoo import fetch

    for path in fetch(args.model, args.output):
        print(path)
