"""``darktrt calib``: INT8 scales from images, or from what several runs have counted."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.errors import DarktrtError
from darktrt.files import keep_inputs

if TYPE_CHECKING:
    import numpy as np

    from darktrt.calib.histogram import HistogramSet
    from darktrt.calib.summary import Outputs


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "calib",
        "run a network over images and choose INT8 scales; or merge what several runs have counted",
        "darktrt calib portable.onnx photos/ -o calibration.table",
        "darktrt calib portable.onnx train.txt --limit 500 --plot histograms.png -o calibration.table",
        "darktrt calib merge shard1.npz shard2.npz -o calibration.table",
        "darktrt calib sensitivity --help",
    )
    parser.add_argument("model", metavar="ONNX", help="what 'darktrt surgery' wrote; or the word merge")
    parser.usage = "%(prog)s ONNX [DATA ...] -o TABLE [options]"
    data = "folders, lists, COCO json files, patterns (default: two sample images, to try it out); with merge: .npz files"
    # nargs="*" would take no DATA in 'calib ONNX -o TABLE DATA'
    parser.add_argument("data", metavar="DATA", nargs="+", default=[], help=data).required = False
    beside = (
        "table to write; beside it go a summary (.txt), .cache for trtexec, histograms (.npz), means (.means.npz) and what to "
        "keep in floating point (.fp_layers.json)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="TABLE", help=beside)
    parser.add_argument("--limit", type=int, metavar="N", help="use a random sample of N images")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="images at a time (default: 1)")
    methods = ["auto", "entropy", "weighted", "mse", "percentile", "minmax"]
    parser.add_argument(
        "--method", choices=methods, default="auto", help="how to choose (default: auto, least error where objects are found)"
    )
    parser.add_argument("--percentile", type=float, default=99.99, metavar="P", help="for that method (default: 99.99)")
    bias = "images on which a second pass measures how to correct biases; 0 leaves them (default: 64)"
    parser.add_argument("--bias-images", type=int, default=64, metavar="N", help=bias)
    kept = (
        "images on which a third pass measures which convolutions to keep in floating point, for they would add twice their "
        "share of INT8's noise or more; 0 keeps the first and those of the heads alone (default: 8)"
    )
    parser.add_argument("--fp-layer-images", type=int, default=8, metavar="N", help=kept)
    parser.add_argument("--resume", action="store_true", help="go on from the histograms that an interrupted run left")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and list them")
    parser.add_argument("--plot", metavar="PNG", help="draw the histograms with their thresholds")
    parser.set_defaults(run=_calib)


def _calib(args: argparse.Namespace) -> None:
    from darktrt.calib.summary import Outputs, save, summary_table
    from darktrt.calib.threshold import choose_thresholds
    from darktrt.vision.sources import path_of

    if not 0 < args.percentile <= 100:
        raise DarktrtError(f"--percentile {args.percentile:g}: it must be above 0 and at most 100")
    for option, number in (("--bias-images", args.bias_images), ("--fp-layer-images", args.fp_layer_images)):
        if number < 0:
            raise DarktrtError(f"{option} {number}: it must be at least 0")
    outputs = Outputs(Path(args.output), Path(args.plot) if args.plot else None)
    outputs.check([args.model, *map(path_of, args.data)])
    histograms, about = (_merge if args.model == "merge" else _calibrate)(args, outputs)
    about["method"] = f"percentile {args.percentile:g}" if args.method == "percentile" else args.method
    choices = choose_thresholds(histograms, args.method, args.percentile)
    save(histograms, choices, outputs, about)
    print(summary_table(histograms, choices))
    if args.model != "merge":
        try:
            _measure_more(args, histograms, {name: choice.scale for name, choice in choices.items()}, outputs)
        except BaseException:  # Ctrl-C too: a table is whole, or there is none
            outputs.discard()
            raise
    for skipped in histograms.skipped:
        print(f"skipped: {skipped}", file=sys.stderr)
    print(f"{args.output}: scales of {len(choices)} tensors from {len(histograms.images)} images")
    if "warning" in about:
        _warn_of_samples()


def _merge(args: argparse.Namespace, outputs: Outputs) -> tuple[HistogramSet, dict[str, str]]:
    """The histograms, kept beside the table too, unless they are those of one file that lies there already."""
    from darktrt.calib.histogram import merged

    if not args.data:
        raise DarktrtError("nothing to merge; name the .npz files that several runs of 'darktrt calib' left")
    histograms = merged(args.data)
    if [Path(path).resolve() for path in args.data] != [outputs.histograms.resolve()]:
        keep_inputs(outputs.histograms, *args.data)
        histograms.save(outputs.histograms)
    return histograms, {"merged": ", ".join(args.data)}


def _calibrate(args: argparse.Namespace, outputs: Outputs) -> tuple[HistogramSet, dict[str, str]]:
    """The histograms, and what the summary should say of them."""
    from darktrt.calib.collect import histograms_of
    from darktrt.onnx_file import load_model

    about = {"network": f"{load_model(args.model)[1].name}, {args.model}"}
    data = args.data
    if not data:
        _warn_of_samples()
        data, about["warning"] = _samples(outputs.samples), "made of two sample images, for trying out only"
    histograms = histograms_of(
        args.model, data, outputs, args.limit, args.seed, args.batch, resume=args.resume, skip_bad=args.skip_bad
    )
    return histograms, about


def _measure_more(args: argparse.Namespace, histograms: HistogramSet, scales: dict[str, np.float32], outputs: Outputs) -> None:
    """What is measured with the table: how to correct biases, and what to keep in floating point."""
    from darktrt.calib.bias_correction import save_channel_means
    from darktrt.calib.collect import measure_channel_means
    from darktrt.calib.fp_layers import save_fp_layers
    from darktrt.calib.summary import add_to_summary
    from darktrt.check.sensitivity import find_fp_layers
    from darktrt.onnx_file import load_model
    from darktrt.vision.sources import find_images

    counted = [path for path in map(Path, histograms.images.values()) if path.is_file()]
    paths = counted or find_images(args.data, args.limit, args.seed)  # merged histograms name the paths of other machines
    if args.bias_images:
        save_channel_means(measure_channel_means(args.model, _some(paths, args.bias_images), scales, args.batch), args.output)
    if args.fp_layer_images and load_model(args.model)[1].head != "raw":
        kept = find_fp_layers(args.model, _some(paths, args.fp_layer_images), groups.calibration(args.output))
        save_fp_layers(kept, args.output)
        add_to_summary(str(kept), outputs)
        print(f"\n{kept}")


def _some(paths: list[Path], number: int) -> list[Path]:
    return paths[:: -(-len(paths) // number)]


def _samples(folder: Path) -> list[Path]:
    from darktrt.calib.samples import flips_and_crops
    from darktrt.convert.zoo import SAMPLES, fetch

    return flips_and_crops(fetch(SAMPLES, folder), folder)


def _warn_of_samples() -> None:
    from darktrt.calib.samples import SAMPLES_WARNING

    print(SAMPLES_WARNING, file=sys.stderr)
