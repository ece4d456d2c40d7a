"""The command ``darktrt``: each sub-command is a thin call of one function, whose room is imported only then."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt import DarktrtError, __version__, keep_inputs

if TYPE_CHECKING:
    import numpy as np

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_SWAPS = ("leaky", "relu", "relu6", "swish", "hardswish")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; users' errors become one sentence on stderr and exit status 2."""
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as with Ctrl-C, so that no half-written file stays
    try:
        args.run(args)
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
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darktrt",
        description="Turn a darknet detector (.cfg + .weights) into a TensorRT engine, stage by stage.",
        epilog="Each command has examples in its own help: darktrt convert --help",
    )
    parser.add_argument("--version", action="version", version=f"darktrt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_fetch, _add_convert, _add_surgery, _add_calib, _add_engine, _add_detect, _add_inspect, _add_doctor):
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
        "get cfg, weights and class names of a pretrained network",
        "darktrt fetch yolov4-tiny -o networks",
        "DARKTRT_ZOO=/media/usb/networks darktrt fetch yolov4 -o networks",
    )
    parser.add_argument("model", metavar="MODEL", help="yolov4-tiny or yolov4")
    parser.add_argument("-o", "--output", default=".", metavar="FOLDER", help="where the files go (default: here)")
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    from convert.zoo import fetch

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
    from convert.shapes import parse_batch, parse_size

    size, batch = parse_size(args.size) if args.size else None, parse_batch(args.batch)
    from convert.export import convert

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
        choices=["plugin", "native"],
        default="plugin",
        help="Mish as one plugin node or as standard ops (default: plugin)",
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
    parser.add_argument("--qdq", action="store_true", help="quantize with Q/DQ nodes, by the scales of --table")
    _add_calibration(parser)
    parser.set_defaults(run=_surgery)


def _surgery(args: argparse.Namespace) -> None:
    from surgery.rewrite import SurgeryOptions, operate_file

    if args.qdq != bool(args.table):
        raise DarktrtError("--qdq and --table TABLE go together")
    options = SurgeryOptions(
        args.head,
        args.input,
        args.mish,
        args.activation,
        args.max_candidates,
        args.max_detections,
        _scales(args.table) if args.qdq else None,
        _names(args.keep),
    )
    report = operate_file(args.source, args.output, options)
    mish = f"{report.mish} Mish replaced{f' by {args.activation}' if args.activation else ''}"
    print(f"{args.output}: {mish}, {report.heads} heads decoded by one node, {report.functions} function bodies")
    if report.int8:
        kept = ", ".join(report.int8.kept) or "none"
        print(f"{len(report.int8.quantized)} convolutions in INT8; kept in floating point: {kept}")


def _add_calib(commands: _Commands) -> None:
    parser = _command(
        commands,
        "calib",
        "run a network over pictures and choose INT8 scales; or merge what several runs have counted",
        "darktrt calib portable.onnx photos/ -o calibration.table",
        "darktrt calib portable.onnx train.txt --limit 500 --plot histograms.png -o calibration.table",
        "darktrt calib merge shard1.npz shard2.npz -o calibration.table",
    )
    parser.add_argument("model", metavar="ONNX", help="what 'darktrt surgery' wrote; or the word merge")
    parser.add_argument(
        "data", metavar="DATA", nargs="+", help="folders, lists, COCO json files, patterns; with merge: .npz files"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="TABLE", help="table to write; its histograms go beside it, as .npz"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use a random sample of N pictures")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that sample (default: 0)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="pictures at a time (default: 1)")
    methods = ["auto", "entropy", "mse", "percentile", "minmax"]
    parser.add_argument("--method", choices=methods, default="auto", help="how to choose (default: auto, least expected error)")
    parser.add_argument("--percentile", type=float, default=99.99, metavar="P", help="for that method (default: 99.99)")
    parser.add_argument("--resume", action="store_true", help="go on from the histograms that an interrupted run left")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read, and list them")
    parser.add_argument("--plot", metavar="PNG", help="draw the histograms with their thresholds")
    parser.set_defaults(run=_calib)


def _calib(args: argparse.Namespace) -> None:
    from calib.collect import histograms_of
    from calib.entropy import choose_amax
    from calib.histogram import merged
    from calib.report import plot, summary_table
    from calib.table import table_of

    keep_inputs(args.output, *args.data)
    if args.plot:
        keep_inputs(args.plot, args.model, args.output, *args.data)
    if args.model == "merge":
        histograms = merged(args.data)
    else:
        histograms = histograms_of(
            args.model, args.data, args.output, args.limit, args.seed, args.batch, resume=args.resume, skip_bad=args.skip_bad
        )
    choices = {name: choose_amax(h, args.method, args.percentile) for name, h in histograms.histograms.items()}
    table_of(choices).save(args.output)
    print(summary_table(histograms, choices))
    for skipped in histograms.skipped:
        print(f"skipped: {skipped}", file=sys.stderr)
    if args.plot:
        plot(histograms, choices, args.plot)
    print(f"{args.output}: scales of {len(choices)} tensors from {len(histograms.images)} pictures")


def _add_engine(commands: _Commands) -> None:
    parser = _command(
        commands,
        "engine",
        "build a TensorRT engine and its manifest",
        "darktrt engine portable.onnx -o model.plan --precision fp16",
        "darktrt engine portable.onnx -o model.plan --precision fp32 --target rtx",
        "darktrt engine portable.onnx -o model.plan --precision int8 --table calibration.table",
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
    parser.set_defaults(run=_engine)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", metavar="TABLE", help="calibration table of 'darktrt calib', or a TensorRT calibration cache"
    )
    keep = "convolutions to keep in floating point, by node name (default: the first, and those of the heads)"
    parser.add_argument("--keep", metavar="NAME,...", help=keep)


def _engine(args: argparse.Namespace) -> None:
    from engine.build import build_file
    from engine.lower import Calibration

    calibration = Calibration(_scales(args.table), _names(args.keep)) if args.table else None
    manifest = build_file(args.source, args.output, args.precision, args.target, calibration)
    size = Path(args.output).stat().st_size / 2**20
    print(
        f"{args.output}: {args.precision.upper()} for {manifest.target}, {size:.1f} MiB, built in {manifest.build_seconds:g} s"
    )


def _scales(path: str) -> dict[str, np.float32]:
    from calib.table import CalibrationTable

    return CalibrationTable.load(path).scales


def _names(text: str | None) -> tuple[str, ...] | None:
    """``A,B`` as names; None where nothing was said."""
    return None if text is None else tuple(name for name in text.split(",") if name)


def _add_detect(commands: _Commands) -> None:
    parser = _command(
        commands,
        "detect",
        "find objects in pictures and videos, on the CPU",
        "darktrt detect dog.jpg --model portable.onnx -o out.jpg",
        "darktrt detect holiday/ street.mp4 --model portable.onnx -o found/ --json > found.jsonl",
    )
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="pictures, videos, folders or patterns")
    parser.add_argument("--model", required=True, metavar="ONNX", help="what 'darktrt surgery' wrote")
    parser.add_argument("-o", "--output", metavar="PATH", help="write copies with the detections drawn in: a file, or a folder")
    parser.add_argument("--json", action="store_true", help="print a line of JSON a picture or frame instead of tables")
    parser.add_argument("--score-threshold", type=float, default=0.25, metavar="X", help="(default: 0.25)")
    parser.add_argument("--iou-threshold", type=float, default=0.45, metavar="X", help="(default: 0.45)")
    parser.set_defaults(run=_detect)


def _detect(args: argparse.Namespace) -> None:
    from engine.runtime import OnnxRunner
    from vision.detect import Detector, detect_files

    if args.output:
        keep_inputs(args.output, args.model)
    with OnnxRunner(args.model) as runner:
        detector = Detector(runner.run, runner.info, args.score_threshold, args.iou_threshold)
        with closing(detect_files(detector, args.sources, args.output)) as results:
            for result in results:
                if args.json:
                    print(json.dumps(result.to_dict(), ensure_ascii=False), flush=True)
                    continue
                frame = "" if result.frame is None else f", frame {result.frame}"
                print(f"{result.path}{frame}\n{result.detections.to_table()}\n")
    if args.output:
        print(f"drawn: {args.output}", file=sys.stderr)


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
        from convert.inspect import describe_cfg, describe_weights

        print(describe_cfg(args.file) if suffix == ".cfg" else describe_weights(args.file))
    elif suffix == ".json":
        from engine.inspect import describe_manifest
        from engine.manifest import read_manifest

        print(describe_manifest(args.file, read_manifest(args.file)))
    elif suffix in (".onnx", ".plan", ".engine"):
        from engine.inspect import describe_onnx, describe_plan

        print(describe_onnx(args.file) if suffix == ".onnx" else describe_plan(args.file))
    else:
        raise DarktrtError(f"{args.file}: cannot tell what it is; it should end in .cfg .weights .onnx .plan .engine or .json")


def _add_doctor(commands: _Commands) -> None:
    parser = _command(
        commands, "doctor", "say what this machine has, and what each missing thing would allow", "darktrt doctor"
    )
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from engine.doctor import examine, report

    print(report(examine()))


if __name__ == "__main__":
    sys.exit(main())
