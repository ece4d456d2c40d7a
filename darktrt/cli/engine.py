"""``darktrt engine``: a TensorRT engine and its manifest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.errors import DarktrtError

if TYPE_CHECKING:
    from darktrt.engine.options import BuildOptions


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "engine",
        "build a TensorRT engine and its manifest",
        "darktrt engine portable.onnx -o model.plan --precision fp16",
        "darktrt engine portable.onnx -o model.plan --precision fp32 --target rtx",
        "darktrt engine portable.onnx -o model.plan --precision int8 --calibration calibration.calib",
        "darktrt engine portable.onnx -o model.plan --precision int8 --calibration my.calib --max-drop 0.005 --eval val.json",
        "darktrt engine portable.onnx -o forced.plan --precision int8 --calibration my.calib --force-int8",
        "darktrt engine portable.onnx -o model.plan --precision int8 --calibrate-on gpu --data photos/",
        "darktrt engine portable.onnx -o model.plan --batch 1,4,16 --workspace 2048 --optimization-level 5",
    )
    parser.add_argument("source", metavar="ONNX", help="portable ONNX file of 'darktrt surgery'")
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
    _add_int8(parser)
    _add_build_options(parser)
    parser.set_defaults(run=_engine)


def _add_int8(parser: argparse.ArgumentParser) -> None:
    groups.add_calibration(parser)
    force = (
        "compute in INT8 all convolutions but the floating-point layers, where TensorRT up to 10 takes FP16 if that is faster; "
        "'darktrt bench' shows whether it pays"
    )
    parser.add_argument("--force-int8", action="store_true", help=force)
    budget = "largest loss of mAP, such as 0.005: the worst layers stay in FP16 until --eval shows no more"
    parser.add_argument("--max-drop", type=float, metavar="X", help=budget)
    labels = "a COCO json with annotations, or FILE.json:FOLDER; for images without labels X bounds the change of the scores"
    parser.add_argument("--eval", nargs="+", metavar="DATA", help=labels)
    parser.add_argument("--eval-limit", type=int, metavar="N", help="use a random sample of N images of it")
    gpu = "file: scales of --calibration; gpu: TensorRT's own entropy calibration on --data, up to TensorRT 10 (default: file)"
    parser.add_argument("--calibrate-on", choices=["file", "gpu"], default="file", help=gpu)
    images = "with --calibrate-on gpu: folders, lists, COCO json files, patterns"
    parser.add_argument("--data", nargs="+", metavar="DATA", help=images)
    parser.add_argument("--data-limit", type=int, metavar="N", help="use a random sample of N images of it")


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimization-level", type=int, choices=range(6), metavar="N", help="0 to 5: how long to look for fast kernels"
    )
    batch = "smallest, usual and largest batch of a model with a dynamic batch (default: the model's)"
    parser.add_argument("--batch", metavar="MIN,OPT,MAX", help=batch)
    sizes = "smallest, usual and largest image, WxH, of a model made with surgery's --input image"
    groups.add_image_sizes(parser, sizes, "the model's")
    workspace = "largest amount of GPU memory for intermediate results of a layer (default: all there is)"
    parser.add_argument("--workspace", type=int, metavar="MIB", help=workspace)
    cache = "file of measured times, which shortens later builds; none for no file (default: a file under ~/.cache/darktrt)"
    parser.add_argument("--timing-cache", metavar="FILE", help=cache)
    parser.add_argument("--no-tf32", action="store_true", help="FP32 with all its 24 bits, slower on GPUs with TF32")
    strong = "TensorRT 10: take the precision from types and Q/DQ nodes in the file, as TensorRT 11 does"
    parser.add_argument("--strongly-typed", action="store_true", help=strong)
    ampere = "an engine for every GPU of compute capability 8.0 or more, slower"
    parser.add_argument("--hardware-compatible", action="store_true", help=ampere)
    versions = "an engine for later versions of the same major version of TensorRT too"
    parser.add_argument("--version-compatible", action="store_true", help=versions)
    parser.add_argument(
        "--tactic-sources",
        metavar="+LIB,-LIB",
        help="libraries of kernels to add or leave out, as for trtexec: --tactic-sources=-CUDNN,-CUBLAS,-CUBLAS_LT",
    )
    library = (
        "plugin library (default: what DARKTRT_PLUGINS names, else what 'darktrt plugins' compiled, if custom nodes need it); "
        "none for standard ops in place of custom nodes"
    )
    parser.add_argument("--plugins", metavar="LIBRARY", help=library)


def _engine(args: argparse.Namespace) -> None:
    from darktrt.engine.build import cache_path
    from darktrt.engine.layer_list import summary
    from darktrt.pipeline import DropBudget, build_engine
    from darktrt.vision.sources import find_images

    _check_together(args)
    manifest = build_engine(
        args.source,
        args.output,
        _build_options(args),
        calibration=args.calibration,
        calibration_images=find_images(args.data, args.data_limit, 0) if args.data else (),
        fp_layers=groups.names(args.fp_layers),
        budget=DropBudget(args.max_drop, args.eval, args.eval_limit) if args.eval else None,
    )
    if args.data:
        print(f"{cache_path(args.output)}: the scales that TensorRT found, a calibration for other builds")
    size = Path(args.output).stat().st_size / 2**20
    print(
        f"{args.output}: {args.precision.upper()} for {manifest.target}, {size:.1f} MiB, built in {manifest.build_seconds:g} s"
    )
    if args.precision == "int8":
        print(f"{args.output}: {summary(manifest.int8_convolutions, manifest.other_convolutions)}")
    if manifest.int8_cost:
        print(f"{args.output}: {manifest.int8_cost}")


def _check_together(args: argparse.Namespace) -> None:
    """Check the options that need one another."""
    budget = args.max_drop is not None, args.eval is not None
    if any(budget) and not (all(budget) and args.calibration and args.precision == "int8"):
        raise DarktrtError("--max-drop X, --eval DATA, --calibration CALIB and --precision int8 go together; give all of them")
    on_gpu = args.calibrate_on == "gpu"
    if on_gpu != bool(args.data) or (on_gpu and (args.calibration or args.precision != "int8")):
        raise DarktrtError("--calibrate-on gpu, --data DATA and --precision int8 go together, without --calibration")
    if args.fp_layers is not None and args.precision != "int8":
        raise DarktrtError("--fp-layers names convolutions that INT8 leaves in FP16; give --precision int8, or leave it out")


def _build_options(args: argparse.Namespace) -> BuildOptions:
    from darktrt.engine.options import BuildOptions

    return BuildOptions(
        precision=args.precision,
        target=args.target,
        plugins=args.plugins,
        tactic_sources=args.tactic_sources,
        optimization_level=args.optimization_level,
        timing_cache=args.timing_cache,
        workspace=args.workspace,
        tf32=not args.no_tf32,
        strongly_typed=args.strongly_typed,
        force_int8=args.force_int8,
        batch=_batch_range(args.batch) if args.batch else None,
        image_sizes=groups.image_sizes(args),
        hardware_compatible=args.hardware_compatible,
        version_compatible=args.version_compatible,
    )


def _batch_range(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise DarktrtError(f"--batch {text}: write smallest, usual and largest batch, such as 1,4,16")
    return int(parts[0]), int(parts[1]), int(parts[2])
