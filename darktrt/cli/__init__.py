"""The command ``darktrt``: each sub-command is a thin call of one function, whose room is imported only then."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt import __version__
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_outputs, check_writable, keep_inputs

if TYPE_CHECKING:
    import numpy as np

    from darktrt.calib.histogram import HistogramSet
    from darktrt.calib.summary import Outputs
    from darktrt.check.agreement import Agreement
    from darktrt.check.budget import Trade
    from darktrt.check.detections import VariantDetections
    from darktrt.check.ground_truth import Truth
    from darktrt.check.report_diff import Side
    from darktrt.check.runs import Variant
    from darktrt.engine.build import BuildOptions
    from darktrt.engine.profile import LayerReport
    from darktrt.engine.weak_typing import GpuCalibration
    from darktrt.serve.client.client import Client
    from darktrt.serve.client.transport import Endpoint
    from darktrt.serve.load.measure import LoadOptions, LoadReport
    from darktrt.surgery.qdq import Calibration
    from darktrt.vision.detector import FileResult

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_SENSITIVITY, _ENGINE_INSPECT = "calib sensitivity", "engine inspect"
_SWAPS = ("leaky", "relu", "relu6", "swish", "hardswish")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; users' errors become one sentence on stderr and exit status 2."""
    args = _parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as with Ctrl-C, so that no half-written file stays
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"darktrt {args.command}: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2
    except DarktrtError as error:
        print(f"darktrt {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"darktrt {args.command}: interrupted", file=sys.stderr)
        return 130
    return status or 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments; some commands are of two words, with options of their own."""
    words = list(arguments)
    if " ".join(words[:2]) in (_SENSITIVITY, _ENGINE_INSPECT):
        words[:2] = [" ".join(words[:2])]
    return _parser().parse_args(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darktrt",
        description="Turn a darknet detector (.cfg + .weights) into a TensorRT engine, stage by stage.",
        epilog="Each command has examples in its own help: darktrt convert --help",
    )
    parser.add_argument("--version", action="version", version=f"darktrt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    stages = (_add_fetch, _add_convert, _add_surgery, _add_calib, _add_sensitivity, _add_engine, _add_engine_inspect)
    serving = (_add_serve, _add_client, _add_load)
    for add in (*stages, _add_check, _add_detect, *serving, _add_bench, _add_rival, _add_inspect, _add_doctor):
        add(commands)
    return parser


def _command(commands: _Commands, name: str, help_: str, *examples: str) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    raw = argparse.RawDescriptionHelpFormatter
    description = f"{help_[0].upper()}{help_[1:]}."
    return commands.add_parser(name, help=help_, description=description, epilog=epilog, formatter_class=raw)


def _add_fetch(commands: _Commands) -> None:
    parser = _command(
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


def _add_convert(commands: _Commands) -> None:
    parser = _command(
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
    from darktrt.convert.shapes import parse_batch, parse_size

    size, batch = parse_size(args.size) if args.size else None, parse_batch(args.batch)
    from darktrt.convert.export import convert

    started = time.monotonic()
    info = convert(
        args.cfg,
        args.weights,
        args.output,
        size=size,
        batch=batch,
        names=args.names,
        seed=args.random_weights,
        save_weights=args.save_weights,
    )
    print(
        f"{args.output}: {info.name}, {info.width}x{info.height}, {info.parameters:,} parameters, {info.mish_count} Mish, "
        f"{len(info.heads)} heads, {info.heads[0].classes} classes; {time.monotonic() - started:.1f} s"
    )


def _add_surgery(commands: _Commands) -> None:
    parser = _command(
        commands,
        "surgery",
        "put plugin nodes for Mish, decoding and NMS into a plain ONNX file",
        "darktrt surgery plain.onnx -o portable.onnx",
        "darktrt surgery plain.onnx -o portable.onnx --head decode --input float",
        "darktrt surgery plain.onnx -o portable.onnx --activation leaky",
        "darktrt surgery plain.onnx -o int8.onnx --qdq --table calibration.table",
    )
    parser.add_argument("source", metavar="ONNX", help="what 'darktrt convert' wrote")
    parser.add_argument("-o", "--output", required=True, metavar="ONNX", help="file to write")
    parser.add_argument("--head", choices=["nms", "decode", "raw"], default="nms", help="where the model ends (default: nms)")
    parser.add_argument(
        "--input",
        choices=["uint8", "float"],
        default="uint8",
        help="uint8 (N,H,W,C) or float32 (N,C,H,W) in 0..1 (default: uint8)",
    )
    parser.add_argument(
        "--mish",
        choices=["plugin", "fused", "native", "auto"],
        default="auto",
        help="plugin: a node each; fused: the nodes take the adds and concats behind them in; native: standard ops; "
        "auto: what suits the engine, decided as it is built (default: auto)",
    )
    parser.add_argument("--activation", choices=_SWAPS, help="put this in the place of Mish, for a network retrained so")
    parser.add_argument(
        "--max-detections", type=int, default=300, metavar="K", help="rows of the padded outputs (default: 300)"
    )
    parser.add_argument(
        "--max-candidates",
        type=int,
        default=1000,
        metavar="K",
        help="best boxes that NMS looks at (default: 1000, at most 3840)",
    )
    fixed = "fix both in the model, say 0.25 0.45, as Triton's batching of TensorRT and ONNX Runtime needs (default: inputs)"
    parser.add_argument("--thresholds", type=float, nargs=2, metavar=("SCORE", "IOU"), help=fixed)
    parser.add_argument("--qdq", action="store_true", help="quantize with Q/DQ nodes, by the scales of --table")
    _add_calibration(parser)
    parser.set_defaults(run=_surgery)


def _surgery(args: argparse.Namespace) -> None:
    from darktrt.surgery.rewrite import SurgeryOptions, transform_file

    if args.qdq != bool(args.table):
        raise DarktrtError("--qdq and --table TABLE go together")
    options = SurgeryOptions(
        args.head,
        args.input,
        args.mish,
        args.activation,
        args.max_candidates,
        args.max_detections,
        _calibration(args.table, args.fp_layers) if args.qdq else None,
        tuple(args.thresholds) if args.thresholds else None,
    )
    report = transform_file(args.source, args.output, options)
    mish = f"{report.mish} Mish replaced{f' by {args.activation}' if args.activation else ''}"
    if any(report.fused):
        mish += f", {report.fused.adds} adds and {report.fused.concats} concats took theirs in"
    print(f"{args.output}: {mish}, {report.heads} heads decoded by one node, {report.functions} function bodies")
    if report.int8:
        kept = ", ".join(report.int8.fp_layers) or "none"
        print(f"{len(report.int8.quantized)} convolutions in INT8; kept in floating point: {kept}")


def _add_calib(commands: _Commands) -> None:
    parser = _command(
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
    from darktrt.calib.data import path_of
    from darktrt.calib.summary import Outputs, save, summary_table
    from darktrt.calib.threshold import before_mish, choose_amax, joined

    if not 0 < args.percentile <= 100:
        raise DarktrtError(f"--percentile {args.percentile:g}: it must be above 0 and at most 100")
    for option, number in (("--bias-images", args.bias_images), ("--fp-layer-images", args.fp_layer_images)):
        if number < 0:
            raise DarktrtError(f"{option} {number}: it must be at least 0")
    outputs = Outputs(Path(args.output), Path(args.plot) if args.plot else None)
    outputs.check([args.model, *map(path_of, args.data)])
    histograms, about = (_merge if args.model == "merge" else _calibrate)(args, outputs)
    about["method"] = f"percentile {args.percentile:g}" if args.method == "percentile" else args.method
    choices = {
        name: choose_amax(h, args.method, args.percentile, for_head=name in histograms.head_inputs)
        for name, h in histograms.histograms.items()
    }
    choices = before_mish(joined(choices, histograms.groups), histograms.histograms, histograms.mish)
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
    from darktrt.calib.data import find_images
    from darktrt.calib.fp_layers import save_fp_layers
    from darktrt.calib.summary import add_to_summary
    from darktrt.check.sensitivity import find_fp_layers
    from darktrt.onnx_file import load_model

    counted = [path for path in map(Path, histograms.images.values()) if path.is_file()]
    paths = counted or find_images(args.data, args.limit, args.seed)  # merged histograms name the paths of other machines
    if args.bias_images:
        save_channel_means(measure_channel_means(args.model, _some(paths, args.bias_images), scales, args.batch), args.output)
    if args.fp_layer_images and load_model(args.model)[1].head != "raw":
        kept = find_fp_layers(args.model, _some(paths, args.fp_layer_images), _calibration(args.output))
        save_fp_layers(kept, args.output)
        add_to_summary(str(kept), outputs)
        print(f"\n{kept}")


def _some(paths: list[Path], number: int) -> list[Path]:
    return paths[:: -(-len(paths) // number)]


def _samples(folder: Path) -> list[Path]:
    from darktrt.calib.data import flips_and_crops
    from darktrt.convert.zoo import SAMPLES, fetch

    return flips_and_crops(fetch(SAMPLES, folder), folder)


def _warn_of_samples() -> None:
    from darktrt.calib.data import SAMPLES_WARNING

    print(SAMPLES_WARNING, file=sys.stderr)


def _add_sensitivity(commands: _Commands) -> None:
    parser = _command(
        commands,
        _SENSITIVITY,
        "rank convolutions by what quantizing each alone costs",
        "darktrt calib sensitivity portable.onnx photos/ --table calibration.table",
        "darktrt calib sensitivity portable.onnx photos/ --table calibration.table --plot layers.png --json layers.json",
        "darktrt calib sensitivity portable.onnx val.json --table calibration.table --map val.json:val2017",
    )
    parser.add_argument("model", metavar="ONNX", help="what 'darktrt surgery' wrote, not quantized")
    parser.add_argument("data", metavar="DATA", nargs="+", help="folders, lists, COCO json files, patterns")
    parser.add_argument("--table", required=True, metavar="TABLE", help="calibration table of 'darktrt calib'")
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="use a random sample of N images (default: 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    truth = "also measure mAP with each layer quantized, and rank by it: slow; TRUTH is a COCO json, or FILE.json:FOLDER"
    parser.add_argument("--map", metavar="TRUTH", help=truth)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--plot", metavar="PNG", help="draw a bar for each layer")
    parser.set_defaults(run=_sensitivity)


def _sensitivity(args: argparse.Namespace) -> None:
    from darktrt.calib.data import path_of
    from darktrt.check.sensitivity import plot, save_json, sensitivity
    from darktrt.vision.charts import check_drawable

    inputs = [args.model, args.table, *map(path_of, args.data), *([path_of(args.map)] if args.map else [])]
    check_outputs([args.json, args.plot], inputs)
    if args.plot:
        check_drawable(args.plot)
    found = sensitivity(args.model, args.data, _calibration(args.table), args.limit, args.seed, args.map)
    print(found.to_table(), flush=True)
    if args.json:
        save_json(found, args.json)
    if args.plot:
        plot(found, args.plot)
    print(found.summary())


def _add_engine(commands: _Commands) -> None:
    parser = _command(
        commands,
        "engine",
        "build a TensorRT engine and its manifest",
        "darktrt engine portable.onnx -o model.plan --precision fp16",
        "darktrt engine portable.onnx -o model.plan --precision fp32 --target rtx",
        "darktrt engine portable.onnx -o model.plan --precision int8 --table calibration.table",
        "darktrt engine portable.onnx -o model.plan --precision int8 --table my.table --max-drop 0.005 --eval val.json",
        "darktrt engine portable.onnx -o model.plan --precision int8 --calibrate-on gpu --data photos/",
        "darktrt engine portable.onnx -o model.plan --batch 1,4,16 --workspace 2048 --optimization-level 5",
        "darktrt engine inspect --help",
    )
    parser.add_argument("source", metavar="ONNX", help="what 'darktrt surgery' wrote")
    parser.add_argument(
        "-o", "--output", required=True, metavar="PLAN", help="file to write; its manifest goes beside it, as .json"
    )
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp16", help="(default: fp16)")
    parser.add_argument(
        "--target",
        choices=["auto", "rtx", "trt"],
        default="auto",
        help="rtx: TensorRT for RTX; trt: full TensorRT; auto: full where a GPU can use it (default)",
    )
    _add_calibration(parser)
    budget = "largest loss of mAP, such as 0.005: the worst layers stay in FP16 until --eval shows no more"
    parser.add_argument("--max-drop", type=float, metavar="X", help=budget)
    labels = "a COCO json with annotations, or FILE.json:FOLDER; of images without labels the change of the scores counts"
    parser.add_argument("--eval", nargs="+", metavar="DATA", help=labels)
    parser.add_argument("--eval-limit", type=int, metavar="N", help="use a random sample of N images of it")
    parser.add_argument(
        "--optimization-level", type=int, choices=range(6), metavar="N", help="0 to 5: how long to look for fast kernels"
    )
    gpu = "table: scales of --table; gpu: TensorRT's own entropy calibration on --data, full TensorRT to 10 (default: table)"
    parser.add_argument("--calibrate-on", choices=["table", "gpu"], default="table", help=gpu)
    images = "with --calibrate-on gpu: folders, lists, COCO json files, patterns"
    parser.add_argument("--data", nargs="+", metavar="DATA", help=images)
    parser.add_argument("--data-limit", type=int, metavar="N", help="use a random sample of N images of it")
    batch = "least, usual and largest batch of a model with a dynamic one (default: the model's)"
    parser.add_argument("--batch", metavar="MIN,OPT,MAX", help=batch)
    workspace = "most GPU memory for intermediate results of a layer (default: all there is)"
    parser.add_argument("--workspace", type=int, metavar="MIB", help=workspace)
    cache = (
        "keep measured times here, which makes later builds shorter; none for nowhere (default: a file under ~/.cache/darktrt)"
    )
    parser.add_argument("--timing-cache", metavar="FILE", help=cache)
    parser.add_argument("--no-tf32", action="store_true", help="FP32 with all its 24 bits, slower on GPUs that have TF32")
    strong = "TensorRT 10: types and Q/DQ nodes in the file decide, as in TensorRT 11, and not the builder"
    parser.add_argument("--strongly-typed", action="store_true", help=strong)
    ampere = "an engine for every GPU of compute capability 8.0 or more, slower"
    parser.add_argument("--hardware-compatible", action="store_true", help=ampere)
    versions = "an engine for later versions of the same major version of TensorRT too"
    parser.add_argument("--version-compatible", action="store_true", help=versions)
    verbosity = (
        "what the engine tells of its layers, for 'engine inspect', the count of INT8 convolutions and, of a table served to "
        "TensorRT 8.6 to 10, corrected biases (default: detailed)"
    )
    levels = ["detailed", "layer_names_only", "none"]
    parser.add_argument("--verbosity", choices=levels, default="detailed", help=verbosity)
    parser.add_argument(
        "--tactic-sources",
        metavar="+LIB,-LIB",
        help="libraries to add or leave out, as trtexec has it: --tactic-sources=-CUDNN,-CUBLAS,-CUBLAS_LT",
    )
    library = (
        "plugin library (default: what DARKTRT_PLUGINS names, else what 'make plugins' built, if custom nodes need one); "
        "none for standard ops in place of custom nodes"
    )
    parser.add_argument("--plugins", metavar="LIBRARY", help=library)
    parser.set_defaults(run=_engine)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", metavar="TABLE", help="calibration table of 'darktrt calib', or a TensorRT calibration cache"
    )
    fp_layers = (
        "convolutions to keep in floating point, by node name (default: those that 'darktrt calib' left beside the table; "
        "without such a file the first, and those of the heads)"
    )
    parser.add_argument("--fp-layers", metavar="NAME,...", help=fp_layers)


def _engine(args: argparse.Namespace) -> None:
    from darktrt.calib.data import path_of
    from darktrt.engine.build import build_file, cache_path, check_files
    from darktrt.engine.layer_list import summary

    budget_options = args.max_drop is not None, args.eval is not None
    if any(budget_options) and not (all(budget_options) and args.table and args.precision == "int8"):
        raise DarktrtError("--max-drop X, --eval DATA, --table TABLE and --precision int8 go together; give all of them")
    on_gpu = args.calibrate_on == "gpu"
    if on_gpu != bool(args.data) or (on_gpu and (args.table or args.precision != "int8")):
        raise DarktrtError("--calibrate-on gpu, --data DATA and --precision int8 go together, without --table")
    if args.fp_layers is not None and args.precision != "int8":
        raise DarktrtError("--fp-layers names convolutions that INT8 leaves in FP16; give --precision int8, or leave it out")
    options = _build_options(args)
    files = args.source, args.table, args.plugins, *map(path_of, (*(args.eval or ()), *(args.data or ())))
    check_files(args.output, options, *files, calibrates=on_gpu)
    calibration = _calibration(args.table, args.fp_layers) if args.table else None
    trade = _trade(args, calibration) if calibration and args.eval else None
    if calibration and trade:
        calibration = replace(calibration, fp_layers=trade.chosen.fp_layers)
    cost = trade.cost(", ".join(args.eval)) if trade else None
    with _gpu_calibration(args) if on_gpu else nullcontext(calibration) as scales:
        chosen = args.source, args.output, args.precision, args.target, scales, options, cost, args.plugins, args.table
        manifest = build_file(*chosen)
    if on_gpu:
        print(f"{cache_path(args.output)}: the scales that TensorRT found, as a table for another build")
    size = Path(args.output).stat().st_size / 2**20
    print(
        f"{args.output}: {args.precision.upper()} for {manifest.target}, {size:.1f} MiB, built in {manifest.build_seconds:g} s"
    )
    if args.precision == "int8":
        print(f"{args.output}: {summary(manifest.int8_convolutions, manifest.other_convolutions)}")
    if trade:
        print(f"{args.output}: {trade}")


def _build_options(args: argparse.Namespace) -> BuildOptions:
    from darktrt.engine.build import BuildOptions

    if args.workspace is not None and args.workspace < 1:
        raise DarktrtError(f"--workspace {args.workspace}: it must be at least 1 MiB")
    return BuildOptions(
        tactic_sources=args.tactic_sources,
        optimization_level=args.optimization_level,
        timing_cache=args.timing_cache,
        workspace=args.workspace,
        tf32=not args.no_tf32,
        strongly_typed=args.strongly_typed,
        batch=_batch_range(args.batch) if args.batch else None,
        hardware_compatible=args.hardware_compatible,
        version_compatible=args.version_compatible,
        verbosity=args.verbosity,
    )


def _batch_range(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if (
        len(parts) != 3
        or not all(part.isdecimal() for part in parts)
        or not 1 <= int(parts[0]) <= int(parts[1]) <= int(parts[2])
    ):
        raise DarktrtError(
            f"--batch {text}: write least, usual and largest batch, each not below the one before: --batch 1,4,16"
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


@contextmanager
def _gpu_calibration(args: argparse.Namespace) -> Iterator[GpuCalibration]:
    """TensorRT's own calibration on the images of --data; they leave the GPU's memory at the end."""
    from darktrt.calib.data import batch_of, batches, find_images
    from darktrt.calib.trt_calibrator import BatchSource
    from darktrt.engine.weak_typing import GpuCalibration
    from darktrt.onnx_file import load_model

    info = load_model(args.source)[1]
    images = find_images(args.data, args.data_limit, 0)
    with BatchSource(batches(images, info), batch_of(info)) as source:
        yield GpuCalibration(source, _names(args.fp_layers))


def _names(fp_layers: str | None) -> tuple[str, ...] | None:
    """``A,B``, or None where nothing was said."""
    return None if fp_layers is None else tuple(name for name in fp_layers.split(",") if name)


def _trade(args: argparse.Namespace, calibration: Calibration) -> Trade:
    """What INT8 must keep in floating point; what would stop the build later is told before this long work."""
    from darktrt.check.budget import Evaluation, within_budget
    from darktrt.engine.target import find_target

    find_target(args.target)
    evaluation = Evaluation(args.eval, args.eval_limit)
    return within_budget(args.source, calibration, args.max_drop, evaluation, args.table)


def _calibration(table: str, fp_layers: str | None = None) -> Calibration:
    """A table and what lies beside it."""
    from darktrt.calib.bias_correction import load_channel_means
    from darktrt.calib.fp_layers import load_fp_layers
    from darktrt.calib.table import CalibrationTable
    from darktrt.surgery.qdq import Calibration

    return Calibration(
        CalibrationTable.load(table).scales,
        load_fp_layers(table) if fp_layers is None else _names(fp_layers),
        load_channel_means(table),
    )


def _add_engine_inspect(commands: _Commands) -> None:
    parser = _command(
        commands,
        _ENGINE_INSPECT,
        "tell what TensorRT made of each layer: type, precision, layout, cfg lines and, on the GPU, time",
        "darktrt engine inspect model.plan",
        "darktrt engine inspect model.plan --profile --plot layers.png --json layers.json",
    )
    parser.add_argument("plan", metavar="PLAN", help="what 'darktrt engine' wrote")
    parser.add_argument("--profile", action="store_true", help="run it on the GPU and measure each layer")
    parser.add_argument("--batch", type=int, metavar="N", help="to measure with (default: the engine's usual one)")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engine, as 'darktrt engine' takes it")
    parser.add_argument("--json", metavar="FILE", help="write all that is known there")
    parser.add_argument("--plot", metavar="PNG", help="draw the times by cfg line; with --profile")
    parser.set_defaults(run=_engine_inspect)


def _engine_inspect(args: argparse.Namespace) -> None:
    from darktrt.engine.profile import layers_of, profile
    from darktrt.vision.charts import check_drawable

    if args.plot and not args.profile:
        raise DarktrtError("--plot draws times; give --profile too, on a machine with the engine's GPU")
    check_outputs([args.json, args.plot], [args.plan])
    if args.plot:
        check_drawable(args.plot)
    report = profile(args.plan, args.batch, args.plugins) if args.profile else layers_of(args.plan)
    print(report.to_table())
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(report.to_json())
    if args.plot:
        _plot_layers(report, args.plot)


def _plot_layers(report: LayerReport, path: str) -> None:
    from darktrt.vision.charts import BLUE, GRAY, GREEN, ORANGE, Bar, draw_bars

    colours = {"INT8": GREEN, "FP16": BLUE, "FP32": ORANGE, "": GRAY}
    bars = [Bar(one.label, one.milliseconds, f"{one.milliseconds:.4f} ms", colours[one.precision]) for one in report.by_lines()]
    legend = {name or "other": colour for name, colour in colours.items() if any(one.colour == colour for one in bars)}
    draw_bars(report.title(), bars, path, legend)


def _add_check(commands: _Commands) -> None:
    parser = _command(
        commands,
        "check",
        "hold an ONNX file or an engine against PyTorch and against labels: check compare, map, report, diff, mark",
        "darktrt check compare --help",
        "darktrt check map --help",
        "darktrt check report --help",
        "darktrt check diff --help",
        "darktrt check mark --help",
    )
    checks = parser.add_subparsers(metavar="CHECK", required=True)
    _add_compare(checks)
    _add_map(checks)
    _add_report(checks)
    _add_diff(checks)
    _add_mark(checks)


def _add_compare(commands: _Commands) -> None:
    parser = _command(
        commands,
        "compare",
        "run one network by different means over images and hold the results against the first; status 1 if they differ",
        "darktrt check compare photos/ --cfg my.cfg --weights my.weights --model portable.onnx --plan fp16.plan",
        "darktrt check compare photos/ --cfg my.cfg --weights my.weights --model portable.onnx --layers",
        "darktrt check compare photos/ --plan fp16.plan --save-outputs trt.json",
        "darktrt check compare photos/ --model portable.onnx --load-outputs trt.json --tolerance worst=0.01,score=0.05",
    )
    parser.set_defaults(command="check compare", run=_compare)
    parser.add_argument("data", metavar="DATA", nargs="*", help="images: folders, lists, COCO json files, patterns")
    _add_variants(parser)
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="use a random sample of N images (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    parser.add_argument("--layers", action="store_true", help="compare every cfg section, and name the first that differs")
    parser.add_argument("--save-outputs", metavar="JSON", help="keep the results, to compare them with others elsewhere")
    saved = "compare with results that were kept; may be repeated"
    parser.add_argument("--load-outputs", metavar="JSON", action="append", default=[], help=saved)
    parser.add_argument("--score-threshold", type=float, default=0.25, metavar="X", help="of detections (default: 0.25)")
    parser.add_argument("--iou-threshold", type=float, default=0.45, metavar="X", help="of NMS (default: 0.45)")
    limits = "other limits than the precision's: NAME=X,... with worst, cosine, score, unmatched"
    parser.add_argument("--tolerance", metavar="NAME=X,...", help=limits)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")


def _add_variants(parser: argparse.ArgumentParser) -> None:
    """What runs the network; :func:`_subjects` makes it."""
    named = "; NAME=FILE calls it so"
    parser.add_argument("--cfg", metavar="CFG", help="the network in PyTorch, the reference: with --weights")
    parser.add_argument("--weights", metavar="WEIGHTS", help="darknet weights")
    parser.add_argument("--size", metavar="SIZE", help="of its input (default: that of the models, else the cfg's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where PyTorch runs (default: cpu)")
    onnx = f"run it in ONNX Runtime; may be repeated{named}"
    parser.add_argument("--model", metavar="ONNX", action="append", default=[], help=onnx)
    simulate = "fp16, int8 or fp16,int8: also run each ONNX rounding so, as engines do; int8 needs --table"
    parser.add_argument("--simulate", metavar="PRECISION,...", default="", help=simulate)
    _add_calibration(parser)
    plan = f"run this engine; may be repeated{named}"
    parser.add_argument("--plan", metavar="PLAN", action="append", default=[], help=plan)
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines, as 'darktrt engine' takes it")
    served = f"ask this model of a Triton server, such as localhost:8001/yolov4@fp16 (without @: fp32); may be repeated{named}"
    parser.add_argument("--triton", metavar="SERVER/MODEL[@PRECISION]", action="append", default=[], help=served)


def _compare(args: argparse.Namespace) -> int:
    from darktrt.calib.data import find_images, path_of
    from darktrt.check.agreement import compare
    from darktrt.check.runs import load_image, load_results
    from darktrt.check.tolerance import parse_tolerance
    from darktrt.metadata import Thresholds

    check_outputs([args.save_outputs, args.json], [*_variant_files(args), *args.load_outputs, *map(path_of, args.data)])
    tolerance = parse_tolerance(args.tolerance) if args.tolerance else {}
    thresholds = Thresholds(args.score_threshold, args.iou_threshold)
    loaded = [one for path in args.load_outputs for one in load_results(path)]
    with ExitStack() as stack:
        variants = _variants(args, stack, args.layers)
        if variants and not args.data:
            raise DarktrtError("no images to run the network on; name DATA: folders, lists, COCO json files, patterns")
        if args.limit < 1:
            raise DarktrtError(f"--limit {args.limit}: compare on at least 1 image")
        paths = find_images(args.data, args.limit, args.seed) if variants else []
        images = [load_image(path, variants[0].info) for path in paths]
        report = compare(variants, images, loaded, thresholds, args.layers, tolerance, args.save_outputs)
    if report.comparisons:
        print(report.to_table())
    if args.save_outputs:
        print(f"{args.save_outputs}: results of {report.images} images; compare with them by --load-outputs")
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(report.to_json(), encoding="utf-8")
    return 0 if report.passed else 1


def _variant_files(args: argparse.Namespace) -> list[str | None]:
    return [args.cfg, args.weights, args.table, *(path for _, path in map(_named, args.model + args.plan))]


def _named(text: str) -> tuple[str, str]:
    """Name and path of ``[NAME=]PATH``; the name is empty where none is given."""
    name, _, path = text.rpartition("=")
    return name, path


def _variants(args: argparse.Namespace, stack: ExitStack, layers: bool = False) -> list[Variant]:
    """What is to be run, the reference first; engines live as long as ``stack``."""
    from darktrt.check.runs import Variant, onnx_variant, plan_variant
    from darktrt.convert.shapes import parse_size
    from darktrt.engine.runtime import PlanRunner

    if (args.cfg is None) != (args.weights is None):
        raise DarktrtError("--cfg CFG and --weights WEIGHTS go together")
    others = [onnx_variant(path, layers, name) for name, path in map(_named, args.model)]
    others += _simulated(args, layers)
    for name, path in map(_named, args.plan):
        others.append(plan_variant(stack.enter_context(PlanRunner(path, args.plugins)), name))
    others += [_served(text, stack) for text in args.triton]
    if args.cfg is None:
        return others
    from darktrt.convert.reference import TorchReference

    size = parse_size(args.size) if args.size else (others[0].info.width, others[0].info.height) if others else None
    reference = TorchReference(args.cfg, args.weights, size, layers, args.device)
    about = {"runs in": "PyTorch", "on": args.device}
    return [Variant("PyTorch", reference.info, "fp32", reference.run, about), *others]


def _served(text: str, stack: ExitStack) -> Variant:
    """A model of a Triton server, ``[NAME=]SERVER/MODEL[@PRECISION]``, for the server does not tell the precision."""
    from darktrt.check.runs import Variant
    from darktrt.check.tolerance import TOLERANCES
    from darktrt.serve.client.client import triton_run

    name, address = _named(text)
    address, _, precision = address.partition("@")
    server, _, model = address.rpartition("/")
    if not model or not server or server.endswith("/") or precision not in ("", *TOLERANCES):
        raise DarktrtError(f"--triton {text}: name SERVER/MODEL, such as localhost:8001/yolov4, or SERVER/MODEL@fp16")
    run, info = stack.enter_context(triton_run(server, model))
    stated = precision or ("int8" if info.int8_convolutions else "fp32")
    return Variant(name or address, info, stated, run, {"runs in": "Triton", "on": server})


def _simulated(args: argparse.Namespace, layers: bool) -> list[Variant]:
    wanted = [precision for precision in args.simulate.split(",") if precision]
    if not wanted:
        return []
    from darktrt.check.runs import simulated_variant

    if odd := [precision for precision in wanted if precision not in ("fp16", "int8")]:
        raise DarktrtError(f"--simulate {args.simulate}: '{odd[0]}' is neither fp16 nor int8")
    if not args.model:
        raise DarktrtError("--simulate rounds what an ONNX file computes; name one by --model")
    calibration = _calibration(args.table, args.fp_layers) if args.table else None
    files = [(name, path, precision) for name, path in map(_named, args.model) for precision in wanted]
    return [simulated_variant(path, precision, calibration, layers, name) for name, path, precision in files]


def _add_map(commands: _Commands) -> None:
    parser = _command(
        commands,
        "map",
        "measure average precision, as COCO does, of a network run by different means, and what is lost against the first",
        "darktrt check map val.json --model portable.onnx --simulate fp16,int8 --table calibration.table",
        "darktrt check map photos/ --model portable.onnx --plan fp16.plan",
        "darktrt check map val.json:val2017 --plan FP16=fp16.plan --plan INT8=int8.plan --save-detections gpu.json",
        "darktrt check map val.json --model portable.onnx --load-detections gpu.json",
    )
    parser.set_defaults(command="check map", run=_map)
    _add_labelled(parser)
    _add_variants(parser)
    kept = "keep what was found, to be judged and reported elsewhere; nothing is judged here then"
    parser.add_argument("--save-detections", metavar="JSON", help=kept)
    _add_detections(parser)


def _add_labelled(parser: argparse.ArgumentParser, name: str = "data") -> None:
    """The images to judge on; :func:`_truth` loads them."""
    data = "a COCO json with annotations, or FILE.json:FOLDER; or images with darknet's label files: folders, lists, patterns"
    parser.add_argument(name, metavar="DATA", nargs="+", help=data)
    parser.add_argument("--limit", type=int, metavar="N", help="use a random sample of N images")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    names = "names of the classes in darknet's label files, a line each (default: they are the network's)"
    parser.add_argument("--names", metavar="FILE", help=names)
    mapped = "lines CLASS OF THE LABELS = CLASS OF THE NETWORK, where the names do not tell"
    parser.add_argument("--class-map", metavar="FILE", help=mapped)


def _add_detections(parser: argparse.ArgumentParser) -> None:
    loaded = "also what was kept by 'check map --save-detections', here or on another machine; may be repeated"
    parser.add_argument("--load-detections", metavar="JSON", action="append", default=[], help=loaded)


def _map(args: argparse.Namespace) -> None:
    from darktrt.calib.data import path_of
    from darktrt.check.detections import judge_all, save_detections, to_table

    inputs = [*_variant_files(args), *args.load_detections, *map(path_of, args.data), args.names, args.class_map]
    check_outputs([args.save_detections], inputs)
    notes: list[str] = []
    truth, digests, found = _found(args, notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if args.save_detections:
        save_detections(found, args.save_detections)
        print(f"{args.save_detections}: what {len(found)} variants found in {len(digests)} images; see --load-detections")
        return
    judged = judge_all(found, truth, digests)
    print(f"{truth.name}: {len(digests)} images, {truth.count} objects")
    print(to_table(judged))


def _found(args: argparse.Namespace, notes: list[str]) -> tuple[Truth, list[str], list[VariantDetections]]:
    """The labels, the images' SHA-256, and what every variant finds; what is odd about the labels goes to ``notes``."""
    from darktrt.check.detections import digests_of, find, load_detections

    loaded = [one for path in args.load_detections for one in load_detections(path)]
    with ExitStack() as stack:
        variants = _variants(args, stack)
        if not variants and not loaded:
            raise DarktrtError("nothing to measure; name --cfg and --weights, --model, --plan, --triton or --load-detections")
        truth = _truth(args, (variants or loaded)[0].info.class_names, notes)
        digests = digests_of(truth)
        return truth, digests, [find(variant, truth, digests) for variant in variants] + loaded


def _truth(args: argparse.Namespace, class_names: Sequence[str], notes: list[str]) -> Truth:
    from darktrt.check.ground_truth import LabelClasses, load_truth, read_class_map, read_names

    names = read_names(args.names) if args.names else None
    mapped = read_class_map(args.class_map) if args.class_map else None
    return load_truth(args.data, class_names, args.limit, args.seed, LabelClasses(names, mapped), notes)


def _add_report(commands: _Commands) -> None:
    parser = _command(
        commands,
        "report",
        "write a page about how good a network's variants are and where their errors come from",
        "darktrt check report val.json --model portable.onnx --simulate fp16,int8 --table calibration.table -o report",
        "darktrt check report photos/ --cfg my.cfg --weights my.weights --model portable.onnx --plan fp16.plan",
        "darktrt check report val.json --model ONNX=portable.onnx --load-detections gpu.json --bench times.json",
    )
    parser.set_defaults(command="check report", run=_report)
    _add_labelled(parser)
    _add_variants(parser)
    _add_detections(parser)
    output = "folder to write index.html, report.json and report.md into (default: build/NETWORK/report)"
    parser.add_argument("-o", "--output", metavar="FOLDER", help=output)
    times = "latencies of the engines, from 'darktrt bench --json'; may be repeated"
    parser.add_argument("--bench", metavar="JSON", action="append", default=[], help=times)
    compared = "images that tensors and layers are compared on; 0 leaves that out (default: 8)"
    parser.add_argument("--compare-images", type=int, default=8, metavar="N", help=compared)
    ranked = "images that INT8's cost is measured on, convolution by convolution; 0 leaves that out (default: 8)"
    parser.add_argument("--sensitivity-images", type=int, default=8, metavar="N", help=ranked)
    shown = "images to show of those on which variants disagree most (default: 8)"
    parser.add_argument("--show-images", type=int, default=8, metavar="N", help=shown)


def _report(args: argparse.Namespace) -> None:
    from darktrt.check.detections import judge_all, to_table
    from darktrt.check.report import Parts, int8_parts, make_report, read_timings
    from darktrt.check.report_page import PAGE, check_folder, write_report

    for option in ("compare_images", "sensitivity_images", "show_images"):
        if getattr(args, option) < 0:
            raise DarktrtError(f"--{option.replace('_', '-')} {getattr(args, option)}: it must be at least 0")
    if args.output:
        check_folder(args.output)
    timings = read_timings(args.bench)
    notes: list[str] = []
    truth, digests, found = _found(args, notes)
    folder = Path(args.output or Path("build", found[0].info.name, "report"))
    check_folder(folder)
    judged = judge_all(found, truth, digests)
    int8 = None
    if args.table and args.model:
        source, calibration = _named(args.model[0])[1], _calibration(args.table, args.fp_layers)
        int8 = int8_parts(source, calibration, args.table, truth, digests, args.sensitivity_images)
    comparison = _compared_outputs(args, truth)
    report = make_report(Parts(truth, digests, judged, notes, comparison, int8, timings), args.show_images)
    write_report(report, folder)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(to_table(judged))
    print(f"{folder / PAGE}: the report")


def _compared_outputs(args: argparse.Namespace, truth: Truth) -> Agreement | None:
    """The variants' tensors against the first's, layer by layer where they give them; None where there is but one."""
    from darktrt.check.agreement import compare
    from darktrt.check.runs import load_image

    with ExitStack() as stack:
        variants = _variants(args, stack, layers=True) if args.compare_images else []
        if len(variants) < 2:
            return None
        paths = [image.path for image in truth.images[: args.compare_images]]
        images = [load_image(path, variants[0].info) for path in paths]
        return compare(variants, images, layers=True, partly=True)


def _add_diff(commands: _Commands) -> None:
    parser = _command(
        commands,
        "diff",
        "hold two reports, or two models, against each other; status 1 if more AP is lost than --max-drop allows",
        "darktrt check diff before/report after/report --max-drop 0.005",
        "darktrt check diff report:ONNX 'report:ONNX as INT8' --max-drop 0.02",
        "darktrt check diff fp32.onnx int8.plan --data val.json --max-drop 0.02",
    )
    parser.set_defaults(command="check diff", run=_diff)
    side = "a report's folder or report.json, REPORT:VARIANT for one variant of it, or with --data an .onnx or .plan file"
    parser.add_argument("a", metavar="A", help=side)
    parser.add_argument("b", metavar="B", help="likewise: what may be worse")
    parser.add_argument("--max-drop", type=float, metavar="X", help="the most AP that any variant may lose, such as 0.005")
    _add_labelled(parser, "--data")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines, as 'darktrt engine' takes it")


def _diff(args: argparse.Namespace) -> int:
    from darktrt.check.report_diff import diff

    if args.max_drop is not None and not 0 <= args.max_drop < 1:
        raise DarktrtError(
            f"--max-drop {args.max_drop:g}: it must be 0 or more and below 1, such as 0.005 for half a point of mAP"
        )
    found = diff(_side(args, args.a), _side(args, args.b))
    print(found.to_table())
    if args.max_drop is None:
        return 0
    worst = found.worst_drop()
    holds = worst <= args.max_drop
    print(f"\nlargest drop of AP {worst:.4f}, {'within' if holds else 'beyond'} the {args.max_drop:g} allowed")
    return 0 if holds else 1


def _side(args: argparse.Namespace, text: str) -> Side:
    """A report, or a model that is run over the data."""
    from darktrt.check.report_diff import measured_side, read_side

    path = Path(text)
    if path.suffix.lower() not in (".onnx", ".plan", ".engine"):
        return read_side(text)
    if not args.data:
        raise DarktrtError(f"{text}: is measured on images with labels; name them by --data")
    from darktrt.check.detections import digests_of, find, judge_all
    from darktrt.check.report import evaluation_digest
    from darktrt.check.runs import onnx_variant, plan_variant
    from darktrt.engine.runtime import PlanRunner

    notes: list[str] = []
    with ExitStack() as stack:
        is_onnx = path.suffix.lower() == ".onnx"
        variant = onnx_variant(text) if is_onnx else plan_variant(stack.enter_context(PlanRunner(text, args.plugins)))
        truth = _truth(args, variant.info.class_names, notes)
        digests = digests_of(truth)
        found = find(variant, truth, digests)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return measured_side(judge_all([found], truth, digests)[0], evaluation_digest(truth, digests))


def _add_mark(commands: _Commands) -> None:
    parser = _command(
        commands,
        "mark",
        "make the output of every cfg section an output of the model, for 'check compare --layers' with its engine",
        "darktrt check mark portable.onnx -o marked.onnx",
    )
    parser.set_defaults(command="check mark", run=_mark)
    parser.add_argument("source", metavar="ONNX", help="what 'darktrt convert' or 'darktrt surgery' wrote")
    parser.add_argument("-o", "--output", required=True, metavar="ONNX", help="file to write")


def _mark(args: argparse.Namespace) -> None:
    from darktrt.check.runs import mark_file

    print(f"{args.output}: {mark_file(args.source, args.output)} further outputs")


def _add_detect(commands: _Commands) -> None:
    parser = _command(
        commands,
        "detect",
        "find objects in images and videos, with an ONNX file on the CPU or an engine on the GPU",
        "darktrt detect dog.jpg --model portable.onnx -o out.jpg",
        "darktrt detect dog.jpg --engine fp16.plan -o out.jpg",
        "darktrt detect holiday/ street.mp4 --model portable.onnx -o found/ --json > found.jsonl",
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="images, videos, folders or patterns")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--model", metavar="ONNX", help="what 'darktrt surgery' wrote, in ONNX Runtime on the CPU")
    network.add_argument("--engine", metavar="PLAN", help="what 'darktrt engine' wrote, on the GPU")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engine, as 'darktrt engine' takes it")
    parser.add_argument("-o", "--output", metavar="PATH", help="write copies with the detections drawn in: a file, or a folder")
    parser.add_argument("--json", action="store_true", help="print a line of JSON an image or frame instead of tables")
    parser.add_argument("--score-threshold", type=float, default=0.25, metavar="X", help="(default: 0.25)")
    parser.add_argument("--iou-threshold", type=float, default=0.45, metavar="X", help="(default: 0.45)")
    parser.set_defaults(run=_detect)


def _detect(args: argparse.Namespace) -> None:
    from darktrt.engine.runtime import OnnxRunner, PlanRunner
    from darktrt.vision.detector import Detector, detect_files

    if args.output:
        keep_inputs(args.output, args.model, args.engine)
    with PlanRunner(args.engine, args.plugins) if args.engine else OnnxRunner(args.model) as runner:
        detector = Detector(runner.run, runner.info, args.score_threshold, args.iou_threshold)
        with closing(detect_files(detector, args.sources, args.output)) as results:
            _print_results(args, results)


def _print_results(args: argparse.Namespace, results: Iterable[FileResult]) -> None:
    for result in results:
        if args.json:
            print(json.dumps(result.to_dict(), ensure_ascii=False), flush=True)
            continue
        frame = "" if result.frame is None else f", frame {result.frame}"
        print(f"{result.path}{frame}\n{result.detections.to_table()}\n")
    if args.output:
        print(f"drawn: {args.output}", file=sys.stderr)


def _add_serve(commands: _Commands) -> None:
    parser = _command(
        commands,
        "serve",
        "serve models by Triton: serve repository, serve start, serve doctor",
        "darktrt serve repository --help",
        "darktrt serve start --help",
        "darktrt serve doctor --help",
    )
    serves = parser.add_subparsers(metavar="STEP", required=True)
    _add_repository(serves)
    _add_start(serves)
    _add_serve_doctor(serves)


def _add_repository(commands: _Commands) -> None:
    parser = _command(
        commands,
        "repository",
        "put a plan or an ONNX file into a model repository of Triton",
        "darktrt serve repository portable.onnx -o model_repository",
        "darktrt serve repository portable.onnx -o model_repository --name photos --input jpeg",
        "darktrt serve repository fp16.plan -o model_repository --kind tensorrt_plan",
        "darktrt serve repository fp16.plan -o model_repository --instances 2 --gpus 0 1 --preferred 4 8 --delay 100",
    )
    parser.set_defaults(command="serve repository", run=_repository)
    parser.add_argument("model", metavar="MODEL", help="what 'darktrt engine' or 'darktrt surgery' wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the repository; other models in it stay")
    parser.add_argument("--name", metavar="NAME", help="of the model in Triton (default: the network's)")
    kinds = "python: our backend, everywhere; tensorrt_plan, onnxruntime: Triton's own, in its containers (default: python)"
    parser.add_argument("--kind", choices=["python", "tensorrt_plan", "onnxruntime"], default="python", help=kinds)
    forms = "tensor: images of the network's size; jpeg: files of any size, and JSON back (default: tensor)"
    parser.add_argument("--input", choices=["tensor", "jpeg"], default="tensor", help=forms)
    parser.add_argument("--version", type=int, default=1, metavar="N", help="of the model; others stay (default: 1)")
    parser.add_argument("--versions", type=int, default=1, metavar="N", help="serve the N latest; 0 for all (default: 1)")
    parser.add_argument("--max-batch", type=int, metavar="N", help="images that Triton may batch (default: as the model takes)")
    parser.add_argument("--preferred", type=int, nargs="+", default=[], metavar="N", help="batch sizes that wait for no more")
    delay = "microseconds that a request may wait to be batched (default: 0)"
    parser.add_argument("--delay", type=int, default=0, metavar="US", help=delay)
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="on each GPU, or on the CPU (default: 1)")
    gpus = "GPUs to run on (default: 0 for a plan, none for an ONNX file)"
    parser.add_argument("--gpus", type=int, nargs="*", default=[], metavar="GPU", help=gpus)
    parser.add_argument("--cuda-graph", action="store_true", help="record and replay the GPU's work of each batch size")
    parser.add_argument("--cache", action="store_true", help="answer what came before from the server's cache")
    parser.add_argument("--no-warmup", dest="warmup", action="store_false", help="be ready before the first inference")
    parser.add_argument("--score-threshold", type=float, default=0.25, metavar="X", help="of requests without (default: 0.25)")
    parser.add_argument("--iou-threshold", type=float, default=0.45, metavar="X", help="of requests without (default: 0.45)")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the plan, as 'darktrt engine' takes it")


def _repository(args: argparse.Namespace) -> None:
    from darktrt.serve.config import ConfigOptions
    from darktrt.serve.containers import docker_command
    from darktrt.serve.repository import write_repository
    from darktrt.serve.server import StartOptions

    names = "kind input max_batch delay instances cuda_graph cache versions warmup score_threshold iou_threshold".split()
    given = {name: getattr(args, name) for name in names}
    options = ConfigOptions(**given, preferred=tuple(args.preferred), gpus=tuple(args.gpus))
    folder = write_repository(args.model, args.output, options, args.name, args.version, args.plugins)
    print(f"{folder}: version {args.version}, kind {args.kind}, input {args.input}")
    if args.kind == "python":
        print(f"start:  darktrt serve start {args.output}")
    start = docker_command(args.output, StartOptions())
    for warning in start.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"Docker: {start}")


def _add_start(commands: _Commands) -> None:
    parser = _command(
        commands,
        "start",
        "start a Triton server on this machine, and stop it at Ctrl-C",
        "darktrt serve start model_repository",
        "darktrt serve start model_repository --address 0.0.0.0 --http-port 9000 --grpc-port 9001 --metrics-port 9002",
        "darktrt serve start model_repository --load yolov4-tiny --log triton.log",
        "darktrt serve start model_repository --argument=--log-verbose=1",
    )
    parser.set_defaults(command="serve start", run=_start)
    parser.add_argument("repository", metavar="FOLDER", help="what 'darktrt serve repository' wrote")
    programs = (
        "path: the tritonserver on PATH; docker: print its command; pip: that of nvidia-pytriton (default: the first of these)"
    )
    parser.add_argument(
        "--program", choices=["auto", "path", "docker", "pip"], default="auto", help=f"{programs} (default: auto)"
    )
    parser.add_argument(
        "--address", default="127.0.0.1", metavar="IP", help="to listen at (default: 127.0.0.1, this machine alone)"
    )
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        parser.add_argument(f"--{name}-port", type=int, default=port, metavar="N", help=f"(default: {port})")
    load = "start with these models alone, and let clients load and unload models"
    parser.add_argument("--load", nargs="+", metavar="NAME", help=load)
    parser.add_argument("--most-mb", type=int, default=64, metavar="MB", help="of a request over HTTP (default: 64)")
    parser.add_argument(
        "--cache-mb", type=int, default=0, metavar="MB", help="of the cache of models with --cache (default: 0, none)"
    )
    parser.add_argument("--log", metavar="FILE", help="write the server's log there")
    more = "one more for tritonserver itself, written with =; may be repeated"
    parser.add_argument("--argument", metavar="WORD", action="append", default=[], dest="arguments", help=more)


def _start(args: argparse.Namespace) -> None:
    from darktrt.serve.containers import docker_command
    from darktrt.serve.server import StartOptions, choose_program, running

    options = StartOptions(
        args.address,
        args.http_port,
        args.grpc_port,
        args.metrics_port,
        None if args.load is None else tuple(args.load),
        args.most_mb << 20,
        args.cache_mb << 20,
        tuple(args.arguments),
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job has switched off
    program = choose_program(args.program)
    if program is None:
        start = docker_command(args.repository, options)
        for warning in start.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(start)
        return
    with ExitStack() as stack:
        log = stack.enter_context(open(args.log, "w", encoding="utf-8")) if args.log else None
        server = stack.enter_context(running(args.repository, options, program, log))
        with suppress(KeyboardInterrupt):  # around the line too, which a reader may answer at once
            print(f"ready: http://{server.http} and gRPC at {server.grpc}; Ctrl-C stops it", flush=True)
            server.watch()
    print("stopped", flush=True)


def _add_serve_doctor(commands: _Commands) -> None:
    parser = _command(
        commands,
        "doctor",
        "check a model repository before the server does; status 1 if something would fail",
        "darktrt serve doctor model_repository",
        "darktrt serve doctor model_repository --reference portable.onnx --image dog.jpg",
    )
    parser.set_defaults(command="serve doctor", run=_serve_doctor)
    parser.add_argument("repository", metavar="FOLDER", help="what 'darktrt serve repository' wrote")
    parser.add_argument("--reference", metavar="ONNX", help="hold the models of this network against it, in ONNX Runtime")
    parser.add_argument("--image", metavar="FILE", help="to detect in (default: noise)")


def _serve_doctor(args: argparse.Namespace) -> int:
    from darktrt.serve.doctor import examine_repository

    findings = examine_repository(args.repository, args.reference, args.image)
    for finding in findings:
        print(finding)
    return 1 if any(finding.bad for finding in findings) else 0


def _add_server(parser: argparse.ArgumentParser) -> None:
    """Options of whoever talks to a server."""
    url = "HOST:PORT for gRPC, or http://HOST:PORT; with TLS grpcs:// or https:// (default: localhost:8001)"
    parser.add_argument("--server", default="localhost:8001", metavar="URL", help=url)
    parser.add_argument("--version", default="", metavar="N", help="of the model (default: the server's choice)")
    parser.add_argument("--root-certificates", metavar="PEM", help="authorities to trust instead of the system's")
    parser.add_argument("--certificate", metavar="PEM", help="to show to a server that asks for one, with --key")
    parser.add_argument("--key", metavar="PEM", help="of that certificate")
    parser.add_argument(
        "--timeout", type=_above_zero, default=60.0, metavar="S", help="of one request, in seconds (default: 60)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images a request (default: 1)")
    shared = "how images get to a server on this machine (default: none, by the socket)"
    parser.add_argument("--shared-memory", choices=["none", "system", "cuda"], default="none", help=shared)


def _above_zero(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")


def _endpoint(args: argparse.Namespace) -> Endpoint:
    from darktrt.serve.client.transport import Endpoint

    return Endpoint.parse(args.server, args.root_certificates, args.certificate, args.key)


_CLIENT_KINDS = {
    "image": "images; like folder and video it takes any files, which their suffixes tell apart",
    "folder": "folders, to any depth",
    "video": "videos",
    "camera": "a camera of this machine: its number or device file",
    "rtsp-url": "a stream of the network: its URL",
    "dummy": "no image at all: noise, to see whether the model answers",
    "info": "what the server says of the model",
    "statistics": "what it counted",
}


def _add_client(commands: _Commands) -> None:
    parser = _command(
        commands,
        "client",
        "find objects in images, videos, cameras and streams by a model on a Triton server",
        "darktrt client image dog.jpg -o out.jpg",
        "darktrt client folder holiday/ -o found/ --json > found.jsonl",
        "darktrt client video street.mp4 -o out.mp4 --server http://gpu-box:8000 --model yolov4",
        "darktrt client camera 0 -o out.mp4 --frames 500",
        "darktrt client rtsp-url rtsp://user:password@camera/stream1 --json",
        "darktrt client dummy --shared-memory system",
        "darktrt client statistics",
    )
    kinds = "\n".join(f"  {name:<11}{text}" for name, text in _CLIENT_KINDS.items())
    parser.epilog = f"what can be WHAT:\n{kinds}\n\n{parser.epilog}"
    parser.add_argument("what", metavar="WHAT", choices=_CLIENT_KINDS, help="one of the words below")
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="files, folders or patterns; or one device or URL")
    _add_server(parser)
    parser.add_argument("--model", metavar="NAME", help="may be left out where the server has one model")
    parser.add_argument("-o", "--output", metavar="PATH", help="write copies with the detections drawn in: a file, or a folder")
    parser.add_argument("--json", action="store_true", help="print a line of JSON an image or frame instead of tables")
    parser.add_argument("--score-threshold", type=float, default=0.25, metavar="X", help="(default: 0.25)")
    parser.add_argument("--iou-threshold", type=float, default=0.45, metavar="X", help="(default: 0.45)")
    parser.add_argument("--in-flight", type=int, default=4, metavar="N", help="most requests under way at once (default: 4)")
    retry = "how long to repeat a request while the server is away, in seconds (default: 30; 0: not at all)"
    parser.add_argument("--retry-seconds", type=float, default=30.0, metavar="S", help=retry)
    parser.add_argument(
        "--frames", type=int, metavar="N", help="of a camera or stream, stop after so many (default: at Ctrl-C)"
    )
    parser.set_defaults(run=_client)


def _client(args: argparse.Namespace) -> None:
    from darktrt.serve.client.client import Client

    one = {"camera": 1, "rtsp-url": 1, "dummy": 0, "info": 0, "statistics": 0}.get(args.what)
    if (one is None and not args.sources) or (one is not None and len(args.sources) != one):
        raise DarktrtError(
            f"{args.what} takes {'one SOURCE or more' if one is None else f'{one} SOURCE'}, not {len(args.sources)}"
        )
    client = Client(
        _endpoint(args),
        args.model,
        args.version,
        score_threshold=args.score_threshold,
        iou_threshold=args.iou_threshold,
        batch=args.batch,
        in_flight=args.in_flight,
        timeout=args.timeout,
        retry_seconds=args.retry_seconds,
        shared_memory=args.shared_memory,
    )
    with client:
        run = {"camera": _client_live, "rtsp-url": _client_live, "dummy": _client_dummy}
        run |= {"info": _client_info, "statistics": _client_info}
        run.get(args.what, _client_files)(args, client)
        if client.retries:
            print(f"the server was away; {client.retries} requests were repeated", file=sys.stderr)


def _client_files(args: argparse.Namespace, client: Client) -> None:
    with closing(client.detect_files(args.sources, args.output)) as results:
        _print_results(args, results)


def _client_live(args: argparse.Namespace, client: Client) -> None:
    from darktrt.vision.live import camera, detect_live, stream

    source = (camera if args.what == "camera" else stream)(args.sources[0])
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())  # the video so far is kept
    output = Path(args.output) if args.output else None
    with closing(detect_live(client.detector, source, output, args.in_flight, args.frames, stop)) as results:
        _print_results(args, results)


def _client_dummy(args: argparse.Namespace, client: Client) -> None:
    import numpy as np

    image = np.random.default_rng(0).integers(0, 256, (client.info.height, client.info.width, 3), np.uint8)
    started = time.monotonic()
    found = client.detect_all([image] * args.batch)
    taken = 1e3 * (time.monotonic() - started)
    print(f"{client.endpoint}: model '{client.model.name}' answered noise in {taken:.1f} ms, {args.batch} a request")
    print(found[0].to_table())


def _client_info(args: argparse.Namespace, client: Client) -> None:
    if args.what == "info":
        print(json.dumps(client.model.to_dict(), indent=2) if args.json else client.model.to_text())
    elif args.json:
        print(json.dumps([asdict(one) for one in client.statistics()]))
    else:
        from darktrt.serve.client.statistics import to_table

        print(to_table(client.statistics(), client.model.max_batch > 0))


def _add_load(commands: _Commands) -> None:
    parser = _command(
        commands,
        "load",
        "measure how much a Triton server takes: throughput, latency, and where the time goes",
        "darktrt load",
        "darktrt load --model yolov4 --model yolov4-tiny --shared-memory system --json load.json",
        "darktrt load --repository model_repository --concurrency 1 4 16",
        "darktrt load --repository model_repository --latency-budget-ms 50 --delay 0 500 2000 --instances 1 2",
    )
    _add_server(parser)
    models = "may be left out where there is one model; may be repeated"
    parser.add_argument("--model", metavar="NAME", action="append", default=[], help=models)
    repository = "measure a server of this model repository, started for it, instead of --server"
    parser.add_argument("--repository", metavar="FOLDER", help=repository)
    concurrency = "requests at once, a level each (default: 1 2 4 8 16)"
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help=concurrency)
    parser.add_argument("--seconds", type=_above_zero, default=5.0, metavar="S", help="of each level (default: 5)")
    processes = "that ask, without perf_analyzer (default: half of the processors, at most 8)"
    parser.add_argument("--processes", type=int, default=0, metavar="N", help=processes)
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="to ask about; may be repeated (default: made ones)"
    )
    tool = "who asks: auto is perf_analyzer where it is installed, else darktrt itself (default: auto)"
    parser.add_argument("--tool", choices=["auto", "perf_analyzer", "own"], default="auto", help=tool)
    parser.add_argument("--metrics", metavar="URL", help="of the server's metrics (default: http://HOST:8002/metrics)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    budget = "with --repository: try every --delay with all --instances; the fastest whose p99 is lower goes into its config"
    parser.add_argument("--latency-budget-ms", type=_above_zero, metavar="MS", help=budget)
    delays = "batching delays to try, in microseconds (default: 0 500 2000; 0 for a model without batches)"
    parser.add_argument("--delay", type=int, nargs="+", metavar="US", help=delays)
    instances = "numbers of instances to try (default: 1 2 4)"
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 4], metavar="N", help=instances)
    parser.set_defaults(run=_load)


def _load(args: argparse.Namespace) -> None:
    from darktrt.serve.load.measure import LoadOptions, side_by_side
    from darktrt.serve.load.sweep import delays_of, load_repository, settings_of, sweep

    if args.json:
        keep_inputs(args.json, *args.image)
        check_writable(args.json)
    options = LoadOptions(
        tuple(args.concurrency),
        args.batch,
        args.seconds,
        args.processes,
        args.shared_memory,
        args.timeout,
        tuple(map(Path, args.image)),
        args.tool,
        args.metrics,
    )
    if args.latency_budget_ms:
        if not args.repository or len(args.model) > 1:
            raise DarktrtError("--latency-budget-ms needs --repository, and one --model at most")
        model = next(iter(args.model), None)
        settings = settings_of(args.delay or delays_of(args.repository, model), args.instances)
        swept = sweep(args.repository, model, settings, args.latency_budget_ms, options)
        text, values = swept.to_markdown(), swept.to_json()
    else:
        reports = load_repository(args.repository, args.model, options) if args.repository else _load_server(args, options)
        text = "\n".join([*(report.to_markdown() for report in reports), side_by_side(reports)])
        values = json.dumps([asdict(report) for report in reports], indent=2) + "\n"
    print(text, end="")
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(values)


def _load_server(args: argparse.Namespace, options: LoadOptions) -> list[LoadReport]:
    from darktrt.serve.load.measure import measure_load

    return [measure_load(_endpoint(args), name, args.version, options) for name in args.model or [None]]


def _add_bench(commands: _Commands) -> None:
    parser = _command(
        commands,
        "bench",
        "time engines on the GPU, and their rivals, in turns: latency, throughput, with and without CUDA graph",
        "darktrt bench fp16.plan int8.plan",
        "darktrt bench fused=a.plan native=b.plan --batch 1 8 --json times.json",
        "darktrt bench fp16.plan --torch my.cfg my.weights --python python3.12",
    )
    parser.add_argument(
        "plans", metavar="[NAME=]PLAN", nargs="+", help="engines, and what to call them (default: their files' names)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="batch sizes (default: 1)")
    parser.add_argument("--turns", type=int, default=20, metavar="N", help="turns of 20 calls of each engine (default: 20)")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engines, as 'darktrt engine' takes it")
    rival = "also time the network in PyTorch, FP16, eager and by torch.compile; needs torchvision"
    parser.add_argument("--torch", metavar=("CFG", "WEIGHTS"), nargs=2, help=rival)
    cuda = "also time this ONNX file in ONNX Runtime's CUDA provider; may be repeated"
    parser.add_argument("--onnx", metavar="[NAME=]ONNX", action="append", default=[], help=cuda)
    parser.add_argument("--python", metavar="PYTHON", help="that runs PyTorch and ONNX Runtime (default: this one)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    from darktrt.engine.bench import bench_files

    if args.json:
        keep_inputs(args.json, *(entry.rpartition("=")[2] for entry in (*args.plans, *args.onnx, *(args.torch or ()))))
        check_writable(args.json)
    torch = (args.torch[0], args.torch[1]) if args.torch else None
    report = bench_files(args.plans, args.batch, args.turns, args.plugins, args.onnx, torch, args.python)
    print(report.to_markdown())
    if args.json:
        with atomic_output(args.json) as temporary:
            temporary.write_text(report.to_json())
    for one in report.failures:
        print(f"failed: {one}", file=sys.stderr)
    return 1 if report.failures else 0


def _add_rival(commands: _Commands) -> None:
    """The other end of ``bench --torch`` and ``--onnx``; of no use to people, so it has no help."""
    parser = commands.add_parser("rival")
    parser.add_argument("kind", choices=["onnx", "eager", "compile", "graph"])
    parser.add_argument("files", nargs="+")
    parser.set_defaults(run=_rival)


def _rival(args: argparse.Namespace) -> None:
    from darktrt.engine.bench import OnnxRival, Rival, answer

    if args.kind == "onnx":
        rival: Rival = OnnxRival(args.files[0])
    else:
        from darktrt.convert.rival import TorchRival
        from darktrt.convert.shapes import parse_size

        cfg, weights, size = args.files
        rival = TorchRival(cfg, weights, parse_size(size), args.kind != "eager", args.kind == "graph")
    answer(rival, sys.stdin, sys.stdout)


def _add_inspect(commands: _Commands) -> None:
    parser = _command(
        commands,
        "inspect",
        "tell what a cfg, weights, ONNX, engine or manifest file contains",
        "darktrt inspect yolov4.cfg",
        "darktrt inspect portable.onnx",
        "darktrt inspect model.plan",
    )
    parser.add_argument("file", metavar="FILE", help="told apart by its suffix: .cfg .weights .onnx .plan .engine .json")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    suffix = Path(args.file).suffix.lower()
    if suffix in (".cfg", ".weights"):
        from darktrt.convert.describe import describe_cfg, describe_weights

        print(describe_cfg(args.file) if suffix == ".cfg" else describe_weights(args.file))
    elif suffix == ".json":
        from darktrt.engine.describe import describe_manifest
        from darktrt.engine.manifest import read_manifest

        print(describe_manifest(args.file, read_manifest(args.file)))
    elif suffix in (".onnx", ".plan", ".engine"):
        from darktrt.engine.describe import describe_onnx, describe_plan

        print(describe_onnx(args.file) if suffix == ".onnx" else describe_plan(args.file))
    else:
        raise DarktrtError(f"{args.file}: cannot tell what it is; it should end in .cfg .weights .onnx .plan .engine or .json")


def _add_doctor(commands: _Commands) -> None:
    parser = _command(
        commands, "doctor", "say what this machine has, and what each missing thing would allow", "darktrt doctor"
    )
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from darktrt.engine.doctor import examine_machine, report

    print(report(examine_machine()))
