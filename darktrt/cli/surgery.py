"""``darktrt surgery``: insert plugin nodes and Q/DQ nodes into a plain ONNX file."""

from __future__ import annotations

import argparse

from darktrt.cli import groups
from darktrt.errors import DarktrtError
from darktrt.metadata import Thresholds


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "surgery",
        "insert plugin nodes for Mish, decoding and NMS into a plain ONNX file",
        "darktrt surgery plain.onnx -o portable.onnx",
        "darktrt surgery plain.onnx -o portable.onnx --head decode --input float",
        "darktrt surgery plain.onnx -o portable.onnx --input image --image-sizes 32x32 1920x1080 4096x4096",
        "darktrt surgery plain.onnx -o openvino.onnx --inline",
        "darktrt surgery plain.onnx -o layers.onnx --mark-layers",
        "darktrt surgery plain.onnx -o int8.onnx --qdq --calibration calibration.calib",
    )
    parser.add_argument("source", metavar="ONNX", help="plain ONNX file of 'darktrt convert'")
    parser.add_argument("-o", "--output", required=True, metavar="ONNX", help="file to write")
    parser.add_argument("--head", choices=["nms", "decode", "raw"], default="nms", help="where the model ends (default: nms)")
    parser.add_argument(
        "--input",
        choices=["uint8", "float", "image"],
        default="uint8",
        help="images fitted to the network, as uint8 (N,H,W,C) or float32 (N,C,H,W) in 0..1; or image: uint8 (N,H,W,3) of any "
        "size, which the model fits itself, with boxes in pixels of the image (default: uint8)",
    )
    groups.add_image_sizes(parser, "with --input image: smallest, usual and largest image of an engine, WxH")
    parser.add_argument(
        "--mish",
        choices=["plugin", "fused", "native", "auto"],
        default="auto",
        help="plugin: a plugin node for each; fused: plugin nodes that also compute the adds and concats behind it; native: "
        "standard ops; auto: the form that suits the engine, chosen when it is built (default: auto)",
    )
    parser.add_argument(
        "--max-detections", type=int, default=300, metavar="K", help="rows of the padded outputs (default: 300)"
    )
    parser.add_argument(
        "--max-candidates",
        type=int,
        default=1000,
        metavar="K",
        help="number of best boxes that enter NMS (default: 1000, at most 3840)",
    )
    fixed = "fix both in the model, say 0.25 0.45, as Triton's batching of TensorRT and ONNX Runtime needs (default: inputs)"
    parser.add_argument("--thresholds", type=float, nargs=2, metavar=("SCORE", "IOU"), help=fixed)
    parser.add_argument("--qdq", action="store_true", help="quantize with Q/DQ nodes, by the scales of --calibration")
    groups.add_calibration(parser)
    layers = "make the output of every cfg section an output of the model too, for 'check compare --layers' with its engine"
    parser.add_argument("--mark-layers", action="store_true", help=layers)
    inline = "write standard ops in place of plugin nodes, for runtimes that know no ONNX functions, such as OpenVINO"
    parser.add_argument("--inline", action="store_true", help=inline)
    parser.set_defaults(run=_surgery)


def _surgery(args: argparse.Namespace) -> None:
    from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

    if args.qdq != bool(args.calibration):
        raise DarktrtError("--qdq and --calibration CALIB go together")
    options = SurgeryOptions(
        head=args.head,
        input=args.input,
        image_sizes=groups.image_sizes(args),
        mish=args.mish,
        max_candidates=args.max_candidates,
        max_detections=args.max_detections,
        calibration=groups.calibration(args.calibration, args.fp_layers) if args.qdq else None,
        thresholds=Thresholds(*args.thresholds) if args.thresholds else None,
        mark_layers=args.mark_layers,
        inline=args.inline,
    )
    report = insert_plugins(args.source, args.output, options)
    mish = f"{report.mish} Mish replaced"
    if any(report.fused):
        mish += f", {report.fused.adds} adds and {report.fused.concats} concats fused with theirs"
    outputs = f", {report.layer_outputs} outputs added" if args.mark_layers else ""
    bodies = "bodies inlined" if args.inline else f"{report.functions} function bodies"
    print(f"{args.output}: {mish}, {report.heads} heads decoded by one node, {bodies}{outputs}")
    if report.int8:
        fp_layers = ", ".join(report.int8.fp_layers) or "none"
        print(f"{len(report.int8.quantized)} convolutions in INT8; in floating point: {fp_layers}")
