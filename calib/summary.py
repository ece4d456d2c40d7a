"""A calibration in words, as JSON, and as a page of histograms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.file import CalibrationFile
from darktrt.calib.histogram import Histogram
from darktrt.calib.threshold import Choice
from darktrt.vision.charts import check_drawable, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS, _WIDTH, _HEIGHT, _DPI = 4, 400, 190, 100
"""Panels side by side, and the size of each in pixels."""
_BARS = 186
_NAME = 56
"""Characters of a name that fit above a panel."""
_FAINT, _BAR, _MARK = "#828282", "#6c94be", "#c83228"


def summary(contents: CalibrationFile) -> str:
    """The origin of a calibration, the images left out, :func:`summary_table`, and the floating-point layers."""
    network, settings, histograms = contents.network, contents.settings, contents.histograms
    method = f"percentile {settings.percentile:g}" if settings.method == "percentile" else settings.method
    facts = [
        ("network", f"{network.name}, {network.width} x {network.height}"),
        *(("warning", sentence) for sentence in contents.warnings),
        ("SHA-256", histograms.model[:12]),
        ("images", str(len(histograms.images))),
        *(("skipped", sentence) for _, sentence in sorted(histograms.skipped.items())),
        ("method", method if contents.choices else "none yet: these are only counts"),
    ]
    heading = [f"{name + ':':10} {value}" for name, value in facts]
    if not contents.choices:
        return "\n".join(heading)
    layers = contents.fp_layers()
    return "\n".join([*heading, *contents.measured(), "", summary_table(contents), *(["", str(layers)] if layers else [])])


def summary_table(contents: CalibrationFile) -> str:
    """A line for each tensor: the largest |x|, the amax chosen, the scale, the share of clipped values, and the method."""
    histograms, choices = contents.histograms.histograms, contents.choices
    width = max([len(name) for name in choices] + [len("tensor")])
    lines = [f"{'tensor':{width}}  {'amax':>10}  {'chosen':>10}  {'scale':>10}  {'clipped':>9}  method"]
    for name, choice in choices.items():
        amax = histograms[name].amax
        method = "always zero" if choice.dead else choice.method + (", joined" if choice.joined else "")
        lines.append(
            f"{name:{width}}  {amax:10.4g}  {choice.amax:10.4g}  {choice.scale:10.4g}  {choice.clipped_share:9.4%}  {method}"
        )
    return "\n".join(lines)


def plot(contents: CalibrationFile, path: str | Path) -> None:
    """Draw a page with the histogram of |x| of every tensor, counts on a log scale, the chosen amax marked in red.

    Raises:
        DarktrtError: the file cannot be written, or its suffix is no image format.
    """
    from matplotlib.figure import Figure

    check_drawable(path)
    histograms, choices = contents.histograms.histograms, contents.choices
    rows = -(-len(histograms) // _COLUMNS)
    figure = Figure((_COLUMNS * _WIDTH / _DPI, rows * _HEIGHT / _DPI), dpi=_DPI)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel().tolist()
    for axes, (name, histogram) in zip(panels, histograms.items(), strict=False):
        _draw(axes, name, histogram, choices.get(name))
    for axes in panels[len(histograms) :]:
        axes.remove()
    figure.subplots_adjust(0.01, 22 / (rows * _HEIGHT), 0.99, 1 - 42 / (rows * _HEIGHT), wspace=0.06, hspace=0.55)
    save_figure(figure, path)


def _draw(axes: Axes, name: str, histogram: Histogram, choice: Choice | None) -> None:
    method = "only counted"
    if choice:
        method = "always zero" if choice.dead else f"{choice.method} {choice.amax:.4g}, {choice.clipped_share:.3%} clipped"
    title = name if len(name) <= _NAME else f"…{name[-_NAME + 1 :]}"
    axes.text(0, 1.18, title, fontsize=8, transform=axes.transAxes)
    axes.text(0, 1.04, method, fontsize=8, color=_MARK, transform=axes.transAxes)
    end = histogram.amax or 1.0
    axes.stairs(coarse_counts(histogram, _BARS), np.linspace(0, end, _BARS + 1), fill=True, color=_BAR)
    axes.set(yscale="log", xlim=(0, end * 1.01), xticks=[0, end], xticklabels=["0", f"{histogram.amax + 0.0:.4g}"], yticks=[])
    axes.set_ylim(bottom=0.5)  # so that single values stand out
    axes.minorticks_off()
    axes.tick_params(labelsize=8, labelcolor=_FAINT, length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    if choice and 0 < choice.amax <= histogram.amax * 1.01:
        axes.axvline(choice.amax, color=_MARK, linewidth=1.5)


def coarse_counts(histogram: Histogram, count: int) -> NDArray[np.int64]:
    """The counts in ``count`` even steps of |x| up to amax."""
    used = max(int(np.ceil(histogram.amax / histogram.bin_width)), count)
    edges = np.linspace(0, min(used, len(histogram.counts)), count + 1).astype(int)
    counts: NDArray[np.int64] = np.add.reduceat(histogram.counts, edges[:-1])
    return counts


def bar_heights(histogram: Histogram, count: int) -> list[float]:
    """The logarithms of ``1 + counts`` in ``count`` even steps of |x| up to amax, as shares of the largest."""
    heights = np.log10(1 + coarse_counts(histogram, count).astype(np.float64))
    return [float(height) for height in heights / max(heights.max(), 1e-9)]
