"""``darktrt layers``: what TensorRT made of each layer of an engine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from darktrt.cli import groups
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_outputs

if TYPE_CHECKING:
    from darktrt.engine.profile import LayerReport


def add(commands: groups.Commands) -> None:
    parser = groups.command(
        commands,
        "layers",
        "list the layers of an engine: type, precision, layout, cfg lines and, on the GPU, time",
        "darktrt layers model.plan",
        "darktrt layers model.plan --profile --plot layers.png --json layers.json",
    )
    parser.add_argument("plan", metavar="PLAN", help="engine of 'darktrt engine'")
    parser.add_argument("--profile", action="store_true", help="run it on the GPU and measure each layer")
    parser.add_argument("--batch", type=int, metavar="N", help="batch size to measure with (default: the engine's usual one)")
    parser.add_argument("--plugins", metavar="LIBRARY", help="plugin library of the engine, as 'darktrt engine' takes it")
    parser.add_argument("--json", metavar="FILE", help="write everything that is known there")
    parser.add_argument("--plot", metavar="PNG", help="draw the times by cfg line; with --profile")
    parser.set_defaults(run=_layers)


def _layers(args: argparse.Namespace) -> None:
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
