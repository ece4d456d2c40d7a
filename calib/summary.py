"""The files that a calibration writes: the table and the files beside it, a summary in words, and a page of histograms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.bias_correction import channel_means_path
from darktrt.calib.fp_layers import fp_layers_path
from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.calib.table import table_of
from darktrt.calib.threshold import Choice
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_writable, keep_inputs, unfinished_folder
from darktrt.vision.charts import check_drawable, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS, _WIDTH, _HEIGHT, _DPI = 4, 400, 190, 100
"""Panels side by side, and the size of each in pixels."""
_BARS = 186
_NAME = 56
"""Characters of a name that fit above a panel."""
_FAINT, _BAR, _MARK = "#828282", "#6c94be", "#c83228"


@dataclass(frozen=True)
class Outputs:
    """The files that a calibration writes: the table, and the files beside it, which have its name."""

    table: Path
    plot: Path | None = None
    """The page of histograms; None for no page."""

    @property
    def cache(self) -> Path:
        """A copy of the table under the suffix of TensorRT's calibration caches, for trtexec --calib."""
        return self.table.with_suffix(".cache")

    @property
    def summary(self) -> Path:
        return self.table.with_suffix(".txt")

    @property
    def histograms(self) -> Path:
        return self.table.with_suffix(".npz")

    @property
    def channel_means(self) -> Path:
        return channel_means_path(self.table)

    @property
    def fp_layers(self) -> Path:
        return fp_layers_path(self.table)

    @property
    def samples(self) -> Path:
        """The folder of the sample images, for a calibration without images of the user."""
        return self.table.with_suffix(".samples")

    @property
    def files(self) -> list[Path]:
        """The files written at the end; the histograms are written before."""
        return [path for path in (self.table, self.cache, self.summary, self.plot) if path]

    @contextmanager
    def unfinished(self) -> Iterator[Outputs]:
        """The same files, without a page, in a folder of their own; they take these places when the block ends well.

        The table comes last, so that a run that is killed between leaves an earlier one, and the files beside it that do not
        fit are refused. Where the block fails, everything stays as it was.

        Raises:
            DarktrtError: the place is not writable, or the disk is full.
        """
        with unfinished_folder(self.table) as folder:
            yield Outputs(folder / self.table.name)
            for place in (self.channel_means, self.fp_layers):
                if not (folder / place.name).exists():  # that of an earlier table
                    place.unlink(missing_ok=True)
            for place in (self.histograms, self.channel_means, self.fp_layers, self.cache, self.summary, self.table):
                if (folder / place.name).exists():
                    (folder / place.name).replace(place)

    def check(self, inputs: Iterable[str | Path]) -> None:
        """Check before any work that every file can be written, and that none of them is an input or another output.

        Raises:
            DarktrtError: one is, or cannot be written.
        """
        check_writable(self.table)
        others = list(inputs)
        for path in self.files:
            keep_inputs(path, *others)
        beside = (self.summary, self.histograms, self.channel_means, self.fp_layers)
        if self.table in (*beside, self.samples):
            raise DarktrtError(
                f"{self.table}: is given twice and would be overwritten: a file beside the table has this name; "
                f"name the table like {self.table.with_suffix('.table').name}"
            )
        if self.plot:
            keep_inputs(self.plot, self.table, self.cache, *beside)
            check_drawable(self.plot)
        for path in (*self.files, self.histograms, self.channel_means, self.fp_layers):
            check_writable(path)


def save(histograms: HistogramSet, choices: Mapping[str, Choice], outputs: Outputs, about: Mapping[str, str]) -> None:
    """Write the table, the cache and the summary.

    Args:
        about: further lines of the summary, by name.

    Raises:
        DarktrtError: one of them cannot be written.
    """
    table = table_of(choices)
    table.save(outputs.table)
    table.save(outputs.cache)
    with atomic_output(outputs.summary) as temporary:
        temporary.write_text(summary(histograms, choices, about), encoding="utf-8")


def add_to_summary(text: str, outputs: Outputs) -> None:
    """Append a paragraph to the summary.

    Raises:
        DarktrtError: it cannot be written.
    """
    with atomic_output(outputs.summary) as temporary:
        temporary.write_text(f"{outputs.summary.read_text(encoding='utf-8')}\n{text}\n", encoding="utf-8")


def summary(histograms: HistogramSet, choices: Mapping[str, Choice], about: Mapping[str, str]) -> str:
    """The origin of the scales, the images left out, and :func:`summary_table`; ``about`` are further lines, by name."""
    lines = {**about, "SHA-256": histograms.model[:12], "images": str(len(histograms.images))}
    heading = [f"{name + ':':10} {value}" for name, value in lines.items()]
    skipped = [f"{'skipped:':10} {sentence}" for sentence in histograms.skipped]
    return "\n".join([*heading, *skipped, "", summary_table(histograms, choices), ""])


def summary_table(histograms: HistogramSet, choices: Mapping[str, Choice]) -> str:
    """A line for each tensor: the largest |x|, the amax chosen, the scale, the share of clipped values, and the method."""
    width = max([len(name) for name in choices] + [len("tensor")])
    lines = [f"{'tensor':{width}}  {'amax':>10}  {'chosen':>10}  {'scale':>10}  {'clipped':>9}  method"]
    for name, choice in choices.items():
        amax = histograms.histograms[name].amax + 0.0  # turns -0 into 0
        method = "always zero" if choice.dead else choice.method + (", joined" if choice.joined else "")
        lines.append(
            f"{name:{width}}  {amax:10.4g}  {choice.amax:10.4g}  {choice.scale:10.4g}  {choice.clipped_share:9.4%}  {method}"
        )
    return "\n".join(lines)


def plot(histograms: HistogramSet, choices: Mapping[str, Choice], path: str | Path) -> None:
    """Draw a page with the histogram of |x| of every tensor, counts on a log scale, the chosen amax marked in red.

    Raises:
        DarktrtError: the file cannot be written, or its suffix is no image format.
    """
    from matplotlib.figure import Figure

    check_drawable(path)
    rows = -(-len(choices) // _COLUMNS)
    figure = Figure((_COLUMNS * _WIDTH / _DPI, rows * _HEIGHT / _DPI), dpi=_DPI)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel().tolist()
    for axes, (name, choice) in zip(panels, choices.items(), strict=False):
        _draw(axes, name, histograms.histograms[name], choice)
    for axes in panels[len(choices) :]:
        axes.remove()
    figure.subplots_adjust(0.01, 22 / (rows * _HEIGHT), 0.99, 1 - 42 / (rows * _HEIGHT), wspace=0.06, hspace=0.55)
    save_figure(figure, path)


def _draw(axes: Axes, name: str, histogram: Histogram, choice: Choice) -> None:
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
    if 0 < choice.amax <= histogram.amax * 1.01:
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
