"""``darktrt check map``: average precision, and what is lost against the first variant."""

from __future__ import annotations

import argparse
import sys

from darktrt.cli import groups
from darktrt.files import check_outputs


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "map",
        "measure average precision, as COCO does, of a network run by different means, and what is lost against the first",
        "darktrt check map val.json --model portable.onnx --simulate fp16,int8 --table calibration.table",
        "darktrt check map photos/ --model portable.onnx --plan fp16.plan",
        "darktrt check map val.json:val2017 --plan FP16=fp16.plan --plan INT8=int8.plan --save-detections gpu.json",
        "darktrt check map val.json --model portable.onnx --load-detections gpu.json",
    )
    parser.set_defaults(command="check map", run=_map)
    groups.add_labelled(parser)
    groups.add_variants(parser)
    kept = "keep what was found, to be judged and reported elsewhere; nothing is judged here then"
    parser.add_argument("--save-detections", metavar="JSON", help=kept)
    groups.add_detections(parser)


def _map(args: argparse.Namespace) -> None:
    from darktrt.check.detections import judge_all, save_detections, to_table
    from darktrt.vision.sources import path_of

    inputs = [*groups.variant_files(args), *args.load_detections, *map(path_of, args.data), args.names, args.class_map]
    check_outputs([args.save_detections], inputs)
    notes: list[str] = []
    truth, digests, found = groups.found(args, notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if args.save_detections:
        save_detections(found, args.save_detections)
        print(f"{args.save_detections}: what {len(found)} variants found in {len(digests)} images; see --load-detections")
        return
    judged = judge_all(found, truth, digests)
    print(f"{truth.name}: {len(digests)} images, {truth.count} objects")
    print(to_table(judged))
