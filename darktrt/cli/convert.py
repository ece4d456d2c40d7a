"""``darktrt convert``: darknet files to a plain ONNX file."""

from __future__ import annotations

import argparse
import time

from darktrt.cli import groups


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "convert",
        "convert darknet files to a plain ONNX file",
        "darktrt convert yolov4-tiny.cfg yolov4-tiny.weights -o plain.onnx",
        "darktrt convert my.cfg my.weights --names my.names --size 640x384 --batch 1..8 -o plain.onnx",
        "darktrt convert yolov4.cfg --random-weights 0 --save-weights random.weights -o plain.onnx",
    )
    parser.add_argument("cfg", metavar="CFG", help="darknet network description")
    parser.add_argument("weights", metavar="WEIGHTS", nargs="?", help="darknet weights; not with --random-weights")
    parser.add_argument("-o", "--output", required=True, metavar="ONNX", help="file to write")
    parser.add_argument("--size", metavar="SIZE", help="network input, 416 or WIDTHxHEIGHT (default: the cfg's)")
    parser.add_argument(
        "--batch", default="1", metavar="BATCH", help="4 for a static batch, 1..8 for a dynamic one (default: 1)"
    )
    parser.add_argument("--names", metavar="FILE", help="class names, a line each (default: COCO's for 80 classes)")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="draw weights instead of reading them")
    parser.add_argument("--save-weights", metavar="FILE", help="also write the weights as a darknet file")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:

    size, batch = groups.parse_size(args.size) if args.size else None, groups.parse_batch(args.batch)
    from darktrt.convert.export import convert_darknet

    started = time.monotonic()
    info = convert_darknet(
        args.cfg,
        args.weights,
        args.output,
        size=size,
        batch=batch,
        names=args.names,
        random_weights=args.random_weights,
        save_weights=args.save_weights,
    )
    print(
        f"{args.output}: {info.name}, {info.width}x{info.height}, {info.parameters:,} parameters, {info.mish_count} Mish, "
        f"{len(info.heads)} heads, {info.heads[0].classes} classes; {time.monotonic() - started:.1f} s"
    )
