"""Detections drawn into an image: a box and a filled label each, in a colour of its class."""

from __future__ import annotations

import colorsys
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from darktrt.vision.boxes import Detections

Colour = tuple[int, int, int]
Area = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw(image: NDArray[np.uint8], detections: Detections, scores: bool = True) -> NDArray[np.uint8]:
    """A copy of the RGB image ``(H, W, 3)`` uint8 with the detections drawn in; line width and font follow its size.

    With ``scores`` the labels have the score beside the class.

    The best detection is drawn last, and all labels after all boxes, so that what matters most stays readable.
    """
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    mean_side = (canvas.width + canvas.height) / 2
    line_width = max(1, round(mean_side * 0.004))
    font = _font(max(10, round(mean_side * 0.024)))
    best_first = np.argsort(-detections.scores, kind="stable")
    names = detections.names
    labels: dict[int, _Label] = {}
    for i in best_first:
        outline = _outline(detections.boxes[i], canvas.size)
        text = f"{names[i]} {detections.scores[i]:.2f}" if scores else names[i]
        labels[i] = _label(pen, text, outline, font, [x.area for x in labels.values()])
    for i in reversed(best_first):
        pen.rectangle(_outline(detections.boxes[i], canvas.size), outline=colour(detections.class_ids[i]), width=line_width)
    for i in reversed(best_first):
        fill = colour(detections.class_ids[i])
        pen.rectangle(labels[i].area, fill=fill)
        pen.text(labels[i].start, labels[i].text, fill=_ink(fill), font=font)
    return np.array(canvas)


@lru_cache(maxsize=1024)
def colour(class_id: int) -> Colour:
    """The class's RGB colour, the same in every image: hues a golden angle apart, in changing strength."""
    hue = (0.02 + class_id * 0.381966) % 1
    saturation, value = ((0.90, 0.95), (0.65, 1.00), (0.85, 0.78))[class_id // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


@lru_cache(maxsize=16)
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _outline(box: NDArray[np.float32], size: tuple[int, int]) -> Area:
    """First and last column and row of a box's rectangle inside the image: x1 y1 x2 y2."""
    last = np.array([size[0] - 1, size[1] - 1] * 2)
    x1, y1, x2, y2 = np.clip(np.rint(box), 0, last).tolist()
    return x1, y1, x2, y2


class _Label(NamedTuple):
    text: str
    area: Area
    start: tuple[float, float]
    """The position at which Pillow starts the text."""


def _label(pen: ImageDraw.ImageDraw, text: str, outline: Area, font: Font, others: list[Area]) -> _Label:
    """The label above its box, or inside where the image has no room above; below where it would cover another one."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    _, line_top, _, line_bottom = pen.textbbox((0, 0), "Ag|", font=font)  # all labels have the same height
    top, bottom = min(top, line_top), max(bottom, line_bottom)
    margin = (bottom - top) / 5
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    columns, rows = pen.im.size
    x = max(0.0, min(outline[0], columns - width))
    first = outline[1] - height if outline[1] >= height else outline[1]
    tops = [max(0.0, min(y, rows - height)) for y in (first, outline[3], outline[1], outline[3] - height)]
    areas = [(x, y, x + width, y + height) for y in tops]
    area = next((a for a in areas if not any(_overlap(a, other) for other in others)), areas[0])
    return _Label(text, area, (x + margin - left, area[1] + margin - top))


def _overlap(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(fill: Colour) -> Colour:
    """Black or white, whichever has the higher contrast on ``fill`` (relative luminance of WCAG 2)."""
    linear = ((np.array(fill) / 255 + 0.055) / 1.055) ** 2.4
    return (0, 0, 0) if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else (255, 255, 255)
