"""The report's charts, as SVG inside a page: text stays text, and colours are those of the variants."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from darktrt.vision.charts import DPI, literal, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b3f46", "#2f6fb3", "#d1622b", "#3f8f5f", "#8a5fb0", "#b8902a", "#b5487f", "#4a9aa8")
"""Of variants, the reference first."""
MARK, BAR, FP_LAYER = "#c0392b", "#7f9fc4", "#c9ced6"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "darktrt",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": "#b4bac4",
    "axes.labelcolor": "#4a505c",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ee",
    "text.color": "#24282f",
    "xtick.color": "#4a505c",
    "ytick.color": "#4a505c",
    "legend.frameon": False,
    "figure.dpi": DPI,
}

_LABELLED, _APART = 4, 3
"""Number of layers that are named in the chart of layers, and their least distance, so that names do not overlap."""


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page, as wide as its place there; the title is for screen readers."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)  # it is global to the page
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)  # ids of several charts would collide
    view = re.search(r'viewBox="[^"]*"', text)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"<svg .*?>", f'<svg {names} role="img" {view and view[0]}><title>{escape(title)}</title>', text, count=1)


def precision_recall(curves: Mapping[str, Mapping[str, Sequence[float]]], colours: Mapping[str, str], overlap: str) -> str:
    """Precision over recall of every variant at one IoU."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = make_figure(430, 320)
        for name, points in curves.items():
            values = points[overlap]
            recall = [i / (len(values) - 1) for i in range(len(values))]
            axes.plot(recall, values, color=colours[name], label=literal(name), linewidth=1.8)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=f"IoU {overlap}")
        axes.legend(loc="upper right", fontsize=10)
        return _svg(figure, f"Precision over recall at IoU {overlap}")


def layer_errors(variants: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """Mean relative error over the cfg sections in order, a curve for each variant; the worst sections are named."""
    import matplotlib

    lines = list(dict.fromkeys(row["line"] for variant in variants for row in variant["tensors"] if row["line"] is not None))
    lines.sort()
    index = {line: i for i, line in enumerate(lines)}
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = make_figure(max(900, 9 * len(lines)), 340)
        for variant in variants:
            points = sorted((index[r["line"]], r["mean"]) for r in variant["tensors"] if r["line"] is not None and r["mean"])
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(
                    xs, ys, "o-", color=colours[variant["name"]], label=literal(variant["name"]), linewidth=1.2, markersize=3.5
                )
        _name_worst(axes, variants, index)
        axes.set_yscale("log")
        step = max(1, len(lines) // 24)
        axes.set_xticks(range(0, len(lines), step), [str(line) for line in lines[::step]], fontsize=9.5)
        axes.set(xlabel="cfg line of the section", ylabel="mean error / mean |x|", xlim=(-0.8, len(lines) - 0.2))
        axes.margins(y=0.12)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10)
        return _svg(figure, "Error of every layer")


def _name_worst(axes: Axes, variants: Sequence[Mapping[str, Any]], index: Mapping[int, int]) -> None:
    """Name the sections with the largest errors of the worst variant."""
    rows = [
        (row["mean"] or 0, variant["name"], row)
        for variant in variants
        for row in variant["tensors"]
        if row["line"] is not None
    ]
    worst_variant = max(rows, key=lambda row: row[0])[1]
    named: list[int] = []
    for mean, _, row in sorted((row for row in rows if row[1] == worst_variant), key=lambda row: -row[0]):
        where = (index[row["line"]], mean)
        if len(named) == _LABELLED or any(abs(where[0] - other) < _APART for other in named):
            continue
        named.append(where[0])
        axes.annotate(f"line {row['line']}", where, (0, 7), textcoords="offset points", ha="center", fontsize=9.5, color=MARK)
        axes.plot(*where, "o", color=MARK, markersize=5)


def sensitivity_bars(layers: Sequence[Mapping[str, Any]], fp_layers: Sequence[str]) -> str:
    """A bar for each convolution, worst first, for the change by quantizing only it; gray for those in floating point."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, (axes,) = make_figure(430, 46 + 21 * len(layers))
        names = [literal(f"{one['node']}  (line {one['line']})") for one in layers]
        colours = [FP_LAYER if one["node"] in fp_layers else BAR for one in layers]
        axes.barh(range(len(layers)), [one["scores"] for one in layers], color=colours, height=0.72)
        axes.set_yticks(range(len(layers)), names, fontsize=9.5)
        axes.set(xlabel="change of the scores (RMS)", ylim=(len(layers) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        return _svg(figure, "Change by quantizing each convolution")


def histogram(tensor: Mapping[str, Any]) -> str:
    """The histogram of a tensor's values in calibration, with the threshold."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure, (axes,) = make_figure(300, 170)
        width = tensor["amax"] / len(tensor["bars"])
        axes.bar([(i + 0.5) * width for i in range(len(tensor["bars"]))], tensor["bars"], width=width, color=BAR)
        axes.axvline(tensor["threshold"], color=MARK, linewidth=1.6)
        axes.set(xlim=(0, max(tensor["amax"], tensor["threshold"]) * 1.02), ylim=(0, 1.05), yticks=[])
        axes.set_xlabel("|x|", fontsize=10)
        axes.set_ylabel("log count", fontsize=10)
        axes.spines["left"].set_visible(False)
        return _svg(figure, f"Histogram of {tensor['tensor']}")
