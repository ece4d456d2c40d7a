"""Bar charts as images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output

Colour = tuple[int, int, int]

BLUE, GREEN, ORANGE, GRAY = (108, 148, 190), (120, 172, 120), (222, 148, 84), (190, 190, 190)
_INK, _FAINT = (34, 34, 34), (130, 130, 130)
_ROW, _MARGIN, _TITLE, _BARS, _NUMBERS, _SWATCH = 18, 14, 44, 480, 150, 12


class Bar(NamedTuple):
    """One row: ``label``, a bar as long as ``value`` is, and ``text`` behind it."""

    label: str
    value: float
    text: str
    colour: Colour = BLUE


def check_drawable(path: str | Path) -> None:
    """Refuse a name that no image can be written to.

    Raises:
        DarktrtError: its suffix is no image format.
    """
    if Path(path).suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise DarktrtError(f"{path}: cannot draw to that format; name a .png file")


def draw_bars(title: str, bars: Sequence[Bar], path: str | Path, legend: Mapping[str, Colour] | None = None) -> None:
    """Write an image of horizontal bars, one below the other; gray ones have a faint label.

    Args:
        legend: what the colours mean.

    Raises:
        DarktrtError: the file cannot be written, or its suffix is no image format.
    """
    check_drawable(path)
    font = ImageFont.load_default(13)
    left = 2 * _MARGIN + round(max((font.getlength(bar.label) for bar in bars), default=0))
    page = Image.new("RGB", (left + _BARS + _NUMBERS, _TITLE + _ROW * len(bars) + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, _INK, font)
    x = left
    for name, colour in (legend or {}).items():
        draw.rectangle((x, _MARGIN + 24, x + _SWATCH, _MARGIN + 24 + _SWATCH), colour)
        draw.text((x + _SWATCH + 4, _MARGIN + 21), name, _INK, font)
        x += _SWATCH + 24 + round(font.getlength(name))
    longest = max((bar.value for bar in bars), default=0)
    for i, bar in enumerate(bars):
        _draw_bar(draw, (left, _MARGIN + _TITLE + _ROW * i), bar, longest)
    with atomic_output(path) as temporary:
        page.save(temporary)


def _draw_bar(draw: ImageDraw.ImageDraw, corner: tuple[int, int], bar: Bar, longest: float) -> None:
    (x, y), font = corner, ImageFont.load_default(13)
    ink = _FAINT if bar.colour == GRAY else _INK
    draw.text((x - _MARGIN - font.getlength(bar.label), y), bar.label, ink, font)
    length = round(bar.value / longest * _BARS) if longest else 0
    draw.rectangle((x, y + 2, x + length, y + _ROW - 4), bar.colour)
    draw.text((x + length + 6, y), bar.text, ink, font)
