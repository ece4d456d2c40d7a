"""Flips and crops of sample images in place of a user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers import files_in, made_image
from PIL import Image

from darktrt.calib.samples import flips_and_crops
from darktrt.vision.images import read_image


def test_flips_and_crops_are_twelve_of_each_image(folder: Path) -> None:
    for i, name in enumerate(("a.png", "b.png")):
        Image.fromarray(made_image(90, 121, seed=i)).save(name)
    Path("out").mkdir()
    made = flips_and_crops([Path("a.png"), Path("b.png")], Path("out"))
    assert len(made) == 24
    assert sorted(str(path.relative_to("out")) for path in made) == files_in(folder / "out")
    assert len({path.read_bytes() for path in made}) == 24
    image, whole, mirrored, corner = (
        read_image(path).astype(int)
        for path in ("a.png", "out/a-whole.jpg", "out/a-whole-mirrored.jpg", "out/a-se-mirrored.jpg")
    )
    for result, expected in ((whole, image), (mirrored, image[:, ::-1]), (corner, image[-60:, -81:][:, ::-1])):
        assert result.shape == expected.shape
        assert np.abs(result - expected).mean() < 3  # what JPEG loses


def test_crops_are_the_corners_and_the_middle(folder: Path) -> None:
    """Two thirds of each side."""
    Image.fromarray(made_image(90, 121)).save("a.png")
    flips_and_crops([Path("a.png")], Path())
    image = read_image("a.png").astype(int)
    for name, x, y in (("middle", 20, 15), ("nw", 0, 0), ("ne", 40, 0), ("sw", 0, 30), ("se", 40, 30)):
        expected = image[y : y + 60, x : x + 81]
        for suffix, turned in (("", expected), ("-mirrored", expected[:, ::-1])):
            result = read_image(f"a-{name}{suffix}.jpg").astype(int)
            assert result.shape == turned.shape
            assert np.abs(result - turned).mean() < 3


def test_flips_and_crops_are_the_same_each_time(folder: Path) -> None:
    Image.fromarray(made_image(64, 80)).save("a.png")
    contents = []
    for _ in range(2):
        contents.append([path.read_bytes() for path in flips_and_crops([Path("a.png")], Path())])
    assert contents[0] == contents[1]
