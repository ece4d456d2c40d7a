"""Sample images in place of a user's own: flips and crops of a few images, for trying calibration out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from darktrt.files import atomic_output
from darktrt.vision.images import read_image

SAMPLES_WARNING = (
    "no images were named, so the scales come from flips and crops of two sample images. Such scales are for trying out "
    "only: an INT8 engine made with them may miss objects. Calibrate on images like those that the network will process, "
    "a hundred or more"
)

_CROP = 2 / 3
"""Width and height of a crop, as a share of the image's."""
_CORNERS = {"whole": None, "middle": (0.5, 0.5), "nw": (0, 0), "ne": (1, 0), "sw": (0, 1), "se": (1, 1)}
"""Offsets of the crops, as shares of the largest possible ones: to the right and down."""


def flips_and_crops(images: Sequence[Path], folder: Path) -> list[Path]:
    """Twelve images of each one, written as JPEG into ``folder``: whole and five crops, each also mirrored.

    The same images make the same files, byte for byte, so that a run on them can be resumed.

    Raises:
        DarktrtError: an image cannot be read, or a file cannot be written.
    """
    written = []
    for path in images:
        image = Image.fromarray(read_image(path))
        for name, corner in _CORNERS.items():
            crop = _cropped(image, *corner) if corner else image
            for suffix, variant in (("", crop), ("-mirrored", crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
                written.append(folder / f"{path.stem}-{name}{suffix}.jpg")
                with atomic_output(written[-1]) as temporary:
                    variant.save(temporary, quality=95)
    return written


def _cropped(image: Image.Image, right: float, down: float) -> Image.Image:
    width, height = round(image.width * _CROP), round(image.height * _CROP)
    x, y = round((image.width - width) * right), round((image.height - height) * down)
    return image.crop((x, y, x + width, y + height))
