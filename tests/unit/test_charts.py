"""Charts of bars: their size, lengths, colours and order, read from their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from darktrt.errors import DarktrtError
from darktrt.vision.charts import BLUE, GRAY, GREEN, ORANGE, Bar, check_drawable, draw_bars, literal


def drawn(folder: Path, *bars: Bar, **more: dict[str, str]) -> NDArray[np.uint8]:
    draw_bars("a title", bars, folder / "bars.png", **more)
    return np.asarray(Image.open(folder / "bars.png").convert("RGB"))


def filled(image: NDArray[np.uint8], colour: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The columns and rows of a colour's pixels."""
    rows, columns = np.nonzero((image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2))
    return np.unique(columns), np.unique(rows)


def test_bars_are_as_long_as_their_values_from_top_to_bottom(tmp_path: Path) -> None:
    """All begin at one column; behind the longest there is room for its text."""
    image = drawn(tmp_path, Bar("first", 1, "1 ms"), Bar("second", 4, "4 ms", GREEN), Bar("third", 2, "2 ms", ORANGE))
    assert image.shape == (90 + 3 * 18, 1000, 3)
    places = [filled(image, colour) for colour in (BLUE, GREEN, ORANGE)]
    lengths = [len(columns) for columns, _ in places]
    np.testing.assert_allclose(lengths, [lengths[1] / 4, lengths[1], lengths[1] / 2], atol=2)
    assert len({columns[0] for columns, _ in places}) == 1
    heights = [len(rows) for _, rows in places]
    assert max(heights) - min(heights) <= 1
    (_, first), (_, second), (_, third) = places
    assert first[-1] < second[0] and second[-1] < third[0]
    pitch = (third.mean() - first.mean()) / 2
    assert heights[0] < pitch and heights[0] == pytest.approx(0.75 * pitch, abs=1.5)
    right = 1000 - places[1][0][-1]
    assert 0.15 * lengths[1] < right < 0.3 * lengths[1]


def test_text_stands_behind_its_bar(tmp_path: Path) -> None:
    plain = drawn(tmp_path, Bar("a", 1, ""), Bar("b", 4, ""))
    image = drawn(tmp_path, Bar("a", 1, "|"), Bar("b", 4, ""))
    end = int(filled(plain, BLUE)[1][0])
    rows = slice(end, end + 8)
    length = np.flatnonzero((plain[rows] == (0x6C, 0x94, 0xBE)).all(axis=2).any(axis=0))[-1]
    columns = np.flatnonzero((plain != image).any(axis=2).any(axis=0))
    assert 4 <= columns[0] - length <= 10


def test_gray_bars_have_a_faint_label(tmp_path: Path) -> None:
    """They are of what was not measured, or matters less."""

    def darkest(colour: str) -> int:
        image = drawn(tmp_path, Bar("label", 1, "text", colour)).mean(axis=2)
        return int(image[40:70, : filled(drawn(tmp_path, Bar("label", 1, "text", colour)), colour)[0][0] - 8].min())

    assert darkest(BLUE) < 0x60 < 0x70 < darkest(GRAY)


def test_a_legend_says_what_colours_mean(tmp_path: Path) -> None:
    bars = Bar("a", 1, "", GREEN), Bar("b", 2, "", GREEN)
    without = filled(drawn(tmp_path, *bars), ORANGE)[0]
    legend = filled(drawn(tmp_path, *bars, legend={"INT8": GREEN, "FP16": ORANGE}), ORANGE)[0]
    assert len(without) == 0 and len(legend) > 5


@pytest.mark.parametrize("bars", [[], [Bar("a", 0, "0"), Bar("b", 0.0, "0")]])
def test_nothing_to_show_is_a_chart_too(tmp_path: Path, bars: list[Bar]) -> None:
    assert drawn(tmp_path, *bars).shape == (90 + 18 * len(bars), 1000, 3)


def test_formats(tmp_path: Path) -> None:
    for name in ("a.PNG", "a.webp", "a.jpg", "a.jpeg"):
        draw_bars("title", [Bar("a", 1, "1")], tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.size == (1000, 108)
    for name in ("a.svg", "a", "png"):
        with pytest.raises(DarktrtError, match=f"{name}: cannot draw to that format; name a .png file"):
            check_drawable(tmp_path / name)
        with pytest.raises(DarktrtError, match="cannot draw to that format"):
            draw_bars("title", [], tmp_path / name)


def test_names_are_shown_as_they_are() -> None:
    """matplotlib would read dollars as mathematics, and leave what begins with _ out of a legend."""
    assert literal("a$x$") == r"a\$x\$" and literal("b_a") == "b_a"
    assert literal("_a") == "\N{ZERO WIDTH SPACE}_a"
