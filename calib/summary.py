"""What calibration leaves behind: the table and what lies beside it, a summary for people, and the histograms drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from darktrt.calib.bias_correction import channel_means_path
from darktrt.calib.fp_layers import fp_layers_path
from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.calib.table import table_of
from darktrt.calib.threshold import Choice
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_writable, keep_inputs
from darktrt.vision.charts import check_drawable

_COLUMNS, _WIDTH, _HEIGHT = 4, 400, 190
_MARGIN, _TITLE, _AXIS = 14, 40, 20
_INK, _FAINT, _BAR, _MARK = (34, 34, 34), (130, 130, 130), (108, 148, 190), (200, 50, 40)
_BARS = 186


@dataclass(frozen=True)
class Outputs:
    """The files that a calibration writes: the table, and beside it, under the same name, all others."""

    table: Path
    plot: Path | None = None
    """The page of histograms: where the user wants it, if at all."""

    @property
    def cache(self) -> Path:
        """The table once more, under the suffix by which TensorRT's users know such a file: for trtexec --calib."""
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
    def kept(self) -> Path:
        return fp_layers_path(self.table)

    @property
    def samples(self) -> Path:
        """The folder of the images to calibrate on where the user names none."""
        return self.table.with_suffix(".samples")

    @property
    def files(self) -> list[Path]:
        """What is written at the end; the histograms are written on the way there."""
        return [path for path in (self.table, self.cache, self.summary, self.plot) if path]

    def discard(self) -> None:
        """Delete all but the histograms, from which ``--resume`` goes on."""
        for path in (*self.files, self.channel_means, self.kept):
            path.unlink(missing_ok=True)

    def check(self, inputs: Iterable[str | Path]) -> None:
        """See, before any work, that every file can be written and that none of them is an input or two things at once.

        Raises:
            DarktrtError: one is, or cannot be written.
        """
        check_writable(self.table)
        kept = list(inputs)
        for path in self.files:
            keep_inputs(path, *kept)
        if self.table in (self.summary, self.histograms, self.channel_means, self.kept, self.samples):
            raise DarktrtError(
                f"{self.table}: is given twice and would be overwritten: a file beside the table has this name; "
                f"name the table like {self.table.with_suffix('.table').name}"
            )
        if self.plot:
            keep_inputs(self.plot, self.table, self.cache, self.summary, self.histograms, self.channel_means, self.kept)
            check_drawable(self.plot)
        for path in self.files:
            check_writable(path)


def save(histograms: HistogramSet, choices: Mapping[str, Choice], outputs: Outputs, about: Mapping[str, str]) -> None:
    """Write the table, the cache, the summary, and the page of histograms if one is wanted; what an earlier table had goes.

    Raises:
        DarktrtError: one of them cannot be written.
    """
    table = table_of(choices)
    for of_earlier_table in (outputs.channel_means, outputs.kept):
        with suppress(FileNotFoundError):
            of_earlier_table.unlink()
    table.save(outputs.table)
    table.save(outputs.cache)
    with atomic_output(outputs.summary) as temporary:
        temporary.write_text(summary(histograms, choices, about), encoding="utf-8")
    if outputs.plot:
        plot(histograms, choices, outputs.plot)


def add_to_summary(text: str, outputs: Outputs) -> None:
    """Put what was found later below the summary.

    Raises:
        DarktrtError: it cannot be written.
    """
    with atomic_output(outputs.summary) as temporary:
        temporary.write_text(f"{outputs.summary.read_text(encoding='utf-8')}\n{text}\n", encoding="utf-8")


def summary(histograms: HistogramSet, choices: Mapping[str, Choice], about: Mapping[str, str]) -> str:
    """What the scales come from (``about`` adds lines of its own), the images left out, and :func:`summary_table`."""
    lines = {**about, "SHA-256": histograms.model[:12], "images": str(len(histograms.images))}
    heading = [f"{name + ':':10} {value}" for name, value in lines.items()]
    skipped = [f"{'skipped:':10} {sentence}" for sentence in histograms.skipped]
    return "\n".join([*heading, *skipped, "", summary_table(histograms, choices), ""])


def summary_table(histograms: HistogramSet, choices: Mapping[str, Choice]) -> str:
    """A line a tensor: the largest |x| seen, the amax chosen, the scale, the share of values clipped, and by which method."""
    width = max([len(name) for name in choices] + [len("tensor")])
    lines = [f"{'tensor':{width}}  {'amax':>10}  {'chosen':>10}  {'scale':>10}  {'clipped':>9}  method"]
    for name, choice in choices.items():
        amax = histograms.histograms[name].amax + 0.0  # -0 is 0 here
        method = "always zero" if choice.dead else choice.method + (", joined" if choice.joined else "")
        lines.append(
            f"{name:{width}}  {amax:10.4g}  {choice.amax:10.4g}  {choice.scale:10.4g}  {choice.clipped_share:9.4%}  {method}"
        )
    return "\n".join(lines)


def plot(histograms: HistogramSet, choices: Mapping[str, Choice], path: str | Path) -> None:
    """Draw a page with every tensor's histogram of |x|, counts on a log scale, the chosen amax marked in red.

    Raises:
        DarktrtError: the file cannot be written, or its suffix is no image format.
    """
    check_drawable(path)
    rows = -(-len(choices) // _COLUMNS)
    page = Image.new("RGB", (_COLUMNS * _WIDTH, rows * _HEIGHT), "white")
    for i, (name, choice) in enumerate(choices.items()):
        corner = (i % _COLUMNS * _WIDTH + _MARGIN, i // _COLUMNS * _HEIGHT + _MARGIN)
        _draw(ImageDraw.Draw(page), corner, name, histograms.histograms[name], choice)
    with atomic_output(path) as temporary:
        page.save(temporary)


def _draw(draw: ImageDraw.ImageDraw, corner: tuple[int, int], name: str, histogram: Histogram, choice: Choice) -> None:
    x, y = corner
    width, height = 2 * _BARS, _HEIGHT - 2 * _MARGIN - _TITLE - _AXIS
    top, bottom = y + _TITLE, y + _TITLE + height
    font = ImageFont.load_default(13)
    draw.text((x, y), _shortened(name, font, width), _INK, font)
    method = "always zero" if choice.dead else f"{choice.method} {choice.amax:.4g}, {choice.clipped_share:.3%} clipped"
    draw.text((x, y + 17), method, _MARK, font)
    for i, level in enumerate(bar_heights(histogram, _BARS)):
        if level > 0:
            draw.rectangle((x + 2 * i, bottom - round(level * height), x + 2 * i + 1, bottom), _BAR)
    draw.line((x, bottom, x + width, bottom), _FAINT)
    draw.text((x, bottom + 3), "0", _FAINT, font)
    end = f"{histogram.amax:.4g}"
    draw.text((x + width - font.getlength(end), bottom + 3), end, _FAINT, font)
    if 0 < choice.amax <= histogram.amax * 1.01:
        mark = x + min(round(choice.amax / histogram.amax * width), width)
        draw.line((mark, top, mark, bottom), _MARK, 2)


def bar_heights(histogram: Histogram, count: int) -> list[float]:
    """Log counts in so many even steps of |x| up to amax, as shares of the largest; empty ones are 0, single values stand out
    a bit."""
    used = max(int(np.ceil(histogram.amax / histogram.bin_width)), count)
    edges = np.linspace(0, min(used, len(histogram.counts)), count + 1).astype(int)
    heights = np.log10(1 + np.add.reduceat(histogram.counts, edges[:-1]).astype(np.float64))
    return [float(height) for height in heights / max(heights.max(), 1e-9)]


def _shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The name, its front cut where it is too long for the panel."""
    while font.getlength(name) > width:
        name = f"…{name[2:]}"
    return name
