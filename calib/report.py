"""What calibration found, for people: a table of thresholds, and the histograms drawn with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from calib.entropy import Choice
from calib.histogram import Histogram, HistogramSet
from darktrt import DarktrtError, atomic_output

_COLUMNS, _WIDTH, _HEIGHT = 4, 400, 190
_MARGIN, _TITLE, _AXIS = 14, 40, 20
_INK, _FAINT, _BAR, _MARK = (34, 34, 34), (130, 130, 130), (108, 148, 190), (200, 50, 40)
_BARS = 186


def summary_table(histograms: HistogramSet, choices: Mapping[str, Choice]) -> str:
    """A line a tensor: the largest |x| seen, the amax chosen, the scale, the share of values clipped, and by which method."""
    width = max([len(name) for name in choices] + [len("tensor")])
    lines = [f"{'tensor':{width}}  {'amax':>10}  {'chosen':>10}  {'scale':>10}  {'clipped':>9}  method"]
    for name, choice in choices.items():
        amax = histograms.histograms[name].amax
        method = "always zero" if choice.dead else choice.method
        lines.append(
            f"{name:{width}}  {amax:10.4g}  {choice.amax:10.4g}  {choice.scale:10.4g}  {choice.clipped_share:9.4%}  {method}"
        )
    return "\n".join(lines)


def plot(histograms: HistogramSet, choices: Mapping[str, Choice], path: str | Path) -> None:
    """Draw a page with every tensor's histogram of |x|, counts on a log scale, the chosen amax marked in red.

    Raises:
        DarktrtError: the file cannot be written, or its suffix is no picture format.
    """
    if Path(path).suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise DarktrtError(f"{path}: cannot draw to that format; name a .png file")
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
    for i, level in enumerate(_bar_heights(histogram)):
        if level > 0:
            draw.rectangle((x + 2 * i, bottom - round(level * height), x + 2 * i + 1, bottom), _BAR)
    draw.line((x, bottom, x + width, bottom), _FAINT)
    draw.text((x, bottom + 3), "0", _FAINT, font)
    end = f"{histogram.amax:.4g}"
    draw.text((x + width - font.getlength(end), bottom + 3), end, _FAINT, font)
    if 0 < choice.amax <= histogram.amax * 1.01:
        mark = x + min(round(choice.amax / histogram.amax * width), width)
        draw.line((mark, top, mark, bottom), _MARK, 2)


def _bar_heights(histogram: Histogram) -> list[float]:
    """Log counts in even steps of |x| up to amax, as shares of the largest; empty ones are 0, single values stand out a bit."""
    used = max(int(np.ceil(histogram.amax / histogram.bin_width)), _BARS)
    edges = np.linspace(0, min(used, len(histogram.counts)), _BARS + 1).astype(int)
    heights = np.log10(1 + np.add.reduceat(histogram.counts, edges[:-1]).astype(np.float64))
    return [float(height) for height in heights / max(heights.max(), 1e-9)]


def _shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The name, its front cut where it is too long for the panel."""
    while font.getlength(name) > width:
        name = f"…{name[2:]}"
    return name
