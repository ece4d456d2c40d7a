"""``darktrt check map``: average precision, and its drop against the first variant."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from darktrt.cli import check_options, groups
from darktrt.files import check_outputs


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "map",
        "measure the average precision, as COCO does, of a network's variants, and its drop against the first",
        "darktrt check map val.json --model portable.onnx --simulate fp16,int8 --calibration calibration.calib",
        "darktrt check map photos/ --model portable.onnx --plan fp16.plan",
        "darktrt check map val.json:val2017 --plan FP16=fp16.plan --plan INT8=int8.plan --save-detections gpu.json",
        "darktrt check map val.json --model portable.onnx --load-detections gpu.json",
        "darktrt check map val.json:val2017 --plan int8.plan --ray",
    )
    parser.set_defaults(command="check map", run=_map)
    check_options.add_labelled(parser)
    check_options.add_variants(parser)
    saved = "save the detections, to evaluate them elsewhere, instead of measuring here"
    parser.add_argument("--save-detections", metavar="JSON", help=saved)
    check_options.add_detections(parser)
    groups.add_cluster(parser)


def _map(args: argparse.Namespace) -> None:
    from darktrt.check.detections import detect_variant, save_detections
    from darktrt.check.evaluation import check_comparable, evaluate_detections
    from darktrt.vision.sources import path_of

    files = [*args.load_detections, *map(path_of, args.data), args.names, args.class_map]
    check_outputs([args.save_detections], [*check_options.variant_files(args), *files])
    loaded, cluster = check_options.loaded_detections(args), groups.cluster(args)
    with ExitStack() as stack:
        variants = check_options.variants(args, stack, loaded=[one.info for one in loaded], on_cluster=cluster is not None)
        check_options.check_any(variants, loaded)
        ground_truth = check_options.ground_truth(args, (variants or loaded)[0].info.class_names)
        check_comparable(variants, ground_truth, loaded)
        detections = [*(detect_variant(variant, ground_truth, cluster) for variant in variants), *loaded]
    if args.save_detections:
        save_detections(detections, args.save_detections)
        images = len(ground_truth.images)
        print(f"{args.save_detections}: detections of {len(detections)} variants in {images} images; see --load-detections")
        return
    evaluation = evaluate_detections(detections, ground_truth)
    print(f"{evaluation.ground_truth}: {evaluation.images} images, {evaluation.objects} objects")
    print(evaluation.to_table())
