"""``darktrt check compare``: the agreement of a network's variants, tensor by tensor."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from darktrt.cli import check_options, groups
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_outputs


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "compare",
        "run a network's variants over images and compare their outputs with the first's; status 1 if they differ",
        "darktrt check compare photos/ --cfg my.cfg --weights my.weights --model portable.onnx --plan fp16.plan",
        "darktrt check compare photos/ --cfg my.cfg --weights my.weights --model portable.onnx --layers",
        "darktrt check compare photos/ --plan fp16.plan --save-outputs trt.json",
        "darktrt check compare photos/ --model portable.onnx --load-outputs trt.json --tolerance worst=0.01,score=0.05",
    )
    parser.set_defaults(command="check compare", run=_compare)
    parser.add_argument("data", metavar="DATA", nargs="*", help="images: folders, lists, COCO json files, patterns")
    check_options.add_variants(parser)
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="use a random sample of N images (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    parser.add_argument("--layers", action="store_true", help="compare every cfg section, and name the first that differs")
    parser.add_argument("--save-outputs", metavar="JSON", help="save the results, to compare them with others elsewhere")
    saved = "also compare saved results; may be repeated"
    parser.add_argument("--load-outputs", metavar="JSON", action="append", default=[], help=saved)
    groups.add_thresholds(parser)
    limits = "limits in place of the precision's: NAME=X,... with worst, cosine, score, unmatched"
    parser.add_argument("--tolerance", metavar="NAME=X,...", help=limits)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")


def _compare(args: argparse.Namespace) -> int:
    from darktrt.check.agreement import compare
    from darktrt.check.runs import load_image, load_results
    from darktrt.check.tolerance import parse_tolerance
    from darktrt.vision.sources import find_images, path_of

    inputs = [*check_options.variant_files(args), *args.load_outputs, *map(path_of, args.data)]
    check_outputs([args.save_outputs, args.json], inputs)
    tolerance = parse_tolerance(args.tolerance) if args.tolerance else {}
    thresholds = groups.thresholds(args)
    loaded = [one for path in args.load_outputs for one in load_results(path)]
    with ExitStack() as stack:
        variants = check_options.variants(args, stack, args.layers, [one.info for one in loaded])
        if variants and not args.data:
            raise DarktrtError("no images to run the network on; name DATA: folders, lists, COCO json files, patterns")
        if args.limit < 1:
            raise DarktrtError(f"--limit {args.limit}: compare on at least 1 image")
        paths = find_images(args.data, args.limit, args.seed) if variants else []
        images = [load_image(path, variants[0].info) for path in paths]
        agreement = compare(variants, images, loaded, thresholds, args.layers, tolerance, args.save_outputs)
    if agreement.variants:
        print(agreement.to_table())
    if args.save_outputs:
        print(f"{args.save_outputs}: results of {agreement.images} images; see --load-outputs")
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(agreement.to_json(), encoding="utf-8")
    return 0 if agreement.passed else 1
