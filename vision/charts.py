"""Charts by matplotlib, without a window system and without global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from darktrt.errors import DarktrtError, quote
from darktrt.files import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREEN, ORANGE, GRAY = "#6c94be", "#78ac78", "#de9454", "#bebebe"
FORMATS = (".png", ".webp", ".jpg", ".jpeg")

DPI = 72
"""Makes a point of a font a pixel."""
_INK, _FAINT = "#222222", "#828282"
_WIDTH, _ROW, _MARGIN = 1000, 18, 90
"""Of bar charts, in pixels."""


class Bar(NamedTuple):
    """A row of a bar chart: ``label``, a bar of length ``value``, and ``text`` behind it."""

    label: str
    value: float
    text: str
    colour: str = BLUE


def check_drawable(path: str | Path) -> None:
    """Refuse a file that no chart can be written to.

    Raises:
        DarktrtError: its suffix is no image format.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise DarktrtError(f"{path}: cannot draw to that format; name a .png file")


def literal(text: str) -> str:
    """A name for a chart; matplotlib would read what is between dollars as mathematics, and leave ``_x`` out of the legend."""
    shown = quote(text).replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown


def make_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of this size in pixels, and its panels."""
    from matplotlib.figure import Figure

    figure = Figure((width / DPI, height / DPI), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as an image in the format of the suffix.

    Raises:
        DarktrtError: the file cannot be written, or its suffix is no image format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    check_drawable(path)
    canvas = FigureCanvasAgg(figure)
    with atomic_output(path) as temporary:
        canvas.print_figure(temporary, format=Path(path).suffix[1:].lower())


def draw_bars(title: str, bars: Sequence[Bar], path: str | Path, legend: Mapping[str, str] | None = None) -> None:
    """Write a chart of horizontal bars, one below the other; gray bars have a faint label.

    Args:
        title: of the chart.
        bars: the rows, from top to bottom.
        path: the image file to write.
        legend: colours by their meaning.

    Raises:
        DarktrtError: the file cannot be written, or its suffix is no image format.
    """
    check_drawable(path)
    figure, (axes,) = make_figure(_WIDTH, _MARGIN + _ROW * len(bars))
    rows = range(len(bars))
    axes.barh(rows, [bar.value for bar in bars], color=[bar.colour for bar in bars], height=0.75)
    axes.set_yticks(rows, [literal(bar.label) for bar in bars])
    axes.set(
        title=literal(title), xlim=(0, 1.2 * max([bar.value for bar in bars], default=0) or 1), ylim=(len(bars) - 0.4, -0.6)
    )
    for row, (bar, label) in enumerate(zip(bars, axes.get_yticklabels(), strict=True)):
        ink = _FAINT if bar.colour == GRAY else _INK
        label.set_color(ink)
        axes.annotate(literal(bar.text), (bar.value, row), (6, 0), textcoords="offset points", va="center", color=ink)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        _add_legend(figure, legend)
    save_figure(figure, path)


def _add_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
