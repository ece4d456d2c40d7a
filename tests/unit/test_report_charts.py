"""The charts of a report: every number is where it belongs, in the colour of its variant, and the worst ones have names."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from darktrt.check import report_charts as charts
from darktrt.vision.charts import make_figure

COLOURS = {"FP32": "#3b3f46", "INT8": "#2f6fb3"}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures behind the charts of a test; each is legible at the size it has in the page."""
    figures: list[Figure] = []

    def keep(width: float, height: float) -> tuple[Figure, list[Axes]]:
        figure, axes = make_figure(width, height)
        figures.append(figure)
        return figure, axes

    monkeypatch.setattr(charts, "make_figure", keep)
    yield figures
    for figure in figures:
        sizes = {text.get_fontsize() for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))}
        assert sizes <= {9.5, 10, 11, 13.2}


def size_of(figure: Figure) -> tuple[float, float]:
    width, height = figure.get_size_inches()
    return round(float(width) * 72), round(float(height) * 72)


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = (one for one in axes.lines if one.get_label() == label)
    assert to_hex(line.get_color()) == COLOURS[label]
    assert 1 <= line.get_linewidth() < 2 and line.get_markersize() <= 6
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def legend(axes: Axes) -> list[str]:
    assert {text.get_fontsize() for text in axes.get_legend().get_texts()} == {10}
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_precision_is_drawn_over_recall(drawn: list[Figure]) -> None:
    """From recall 0 to 1, of the IoU that the title names."""
    values = {"FP32": {"0.50": (1.0, 0.9, 0.5), "0.75": (0.0, 0.0, 0.0)}, "INT8": {"0.50": (0.8, 0.4, 0.0)}}
    svg = charts.precision_recall(values, COLOURS, "0.50")
    (figure,) = drawn
    (axes,) = figure.axes
    assert points(axes, "FP32") == [(0, 1), (0.5, 0.9), (1, 0.5)]
    assert points(axes, "INT8") == [(0, 0.8), (0.5, 0.4), (1, 0)]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1), (0, 1.02))
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("recall", "precision", "IoU 0.50")
    assert legend(axes) == ["FP32", "INT8"]
    assert size_of(figure) == (430, 320)
    assert "<title>Precision over recall at IoU 0.50</title>" in svg


def rows(*means: float | None, first: int = 10) -> list[dict[str, Any]]:
    """Tensors of cfg lines 10, 20, ..., and an output of no line."""
    return [*({"line": first + 10 * i, "mean": mean} for i, mean in enumerate(means)), {"line": None, "mean": 9.0}]


def names(axes: Axes) -> dict[str, tuple[float, float]]:
    assert {(text.get_fontsize(), text.xyann) for text in axes.texts} == {(9.5, (0, 7))}  # type: ignore[attr-defined]
    return {text.get_text(): text.xy for text in axes.texts}  # type: ignore[attr-defined]


def test_errors_are_drawn_layer_by_layer(drawn: list[Figure]) -> None:
    """In the order of the cfg, on a logarithmic scale; a layer without an error has no point."""
    half = rows(0.5, 0.25, None, 0.0, 0.125)
    variants = [{"name": "FP32", "tensors": rows(1e-6)}, {"name": "INT8", "tensors": half[::-1]}]
    svg = charts.layer_errors(variants, COLOURS)
    (figure,) = drawn
    (axes,) = figure.axes
    assert points(axes, "FP32") == [(0, 1e-6)]
    assert points(axes, "INT8") == [(0, 0.5), (1, 0.25), (4, 0.125)]
    assert [one.get_text() for one in axes.get_xticklabels()] == ["10", "20", "30", "40", "50"]
    assert axes.get_xticks().tolist() == [0, 1, 2, 3, 4]
    assert {one.get_fontsize() for one in axes.get_xticklabels()} == {9.5} and axes.margins()[1] == 0.12
    assert (axes.get_xlim(), axes.get_yscale()) == ((-0.8, 4.8), "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("cfg line of the section", "mean error / mean |x|")
    assert legend(axes) == ["FP32", "INT8"] and size_of(figure) == (900, 340)
    beside = axes.get_legend().get_bbox_to_anchor().transformed(axes.transAxes.inverted())
    assert (beside.x0, beside.y0) == pytest.approx((1, 0.5))  # no curve is behind the legend
    assert "<title>Error of every layer</title>" in svg


def test_the_chart_of_a_deep_network_is_wider_and_names_some_lines_only(drawn: list[Figure]) -> None:
    charts.layer_errors([{"name": "INT8", "tensors": rows(*[0.1] * 160)}], COLOURS)
    (figure,) = drawn
    (axes,) = figure.axes
    assert size_of(figure) == (9 * 160, 340)
    assert axes.get_xticks().tolist() == list(range(0, 160, 6))
    assert [one.get_text() for one in axes.get_xticklabels()] == [str(10 + 60 * i) for i in range(27)]


def test_the_worst_layers_of_the_worst_variant_are_named(drawn: list[Figure]) -> None:
    """The four worst, and of neighbours only the worst, for names would overlap."""
    errors = [0.1, 0.9, 0.2, 0.3, 0.8, 0.2, 0.5, 0.7, 0.1, 0.1, 0.6, 0.1, 0.1, 0.4, 0.1]
    variants = [{"name": "FP32", "tensors": rows(*[0.01] * 15)}, {"name": "INT8", "tensors": rows(*errors)}]
    charts.layer_errors(variants, COLOURS)
    (axes,) = drawn[0].axes
    assert names(axes) == {"line 20": (1, 0.9), "line 50": (4, 0.8), "line 80": (7, 0.7), "line 110": (10, 0.6)}
    marked = [line for line in axes.lines if to_hex(line.get_color()) == charts.MARK]
    assert [tuple(line.get_xydata()[0]) for line in marked] == list(names(axes).values())
    assert {line.get_markersize() for line in marked} == {5}
    charts.layer_errors(variants[:1], COLOURS)
    assert list(names(drawn[1].axes[0])) == ["line 10", "line 40", "line 70", "line 100"]


def bars(axes: Axes) -> list[Any]:
    return list(axes.patches)


def test_the_cost_of_each_convolution_is_a_bar(drawn: list[Figure]) -> None:
    """The first one on top; those in floating point are gray."""
    layers = [{"node": name, "line": 10 + i, "scores": 0.5 / (i + 1)} for i, name in enumerate("abc")]
    svg = charts.sensitivity_bars(layers, ["b"])
    (figure,) = drawn
    (axes,) = figure.axes
    assert [bar.get_width() for bar in bars(axes)] == [0.5, 0.25, 0.5 / 3]
    assert [to_hex(bar.get_facecolor()) for bar in bars(axes)] == [charts.BAR, charts.FP_LAYER, charts.BAR]
    assert [one.get_text() for one in axes.get_yticklabels()] == ["a  (line 10)", "b  (line 11)", "c  (line 12)"]
    assert {one.get_fontsize() for one in axes.get_yticklabels()} == {9.5}
    tops = [bar.get_y() + bar.get_height() / 2 for bar in bars(axes)]
    assert tops == pytest.approx([0, 1, 2]) and {round(bar.get_height(), 6) for bar in bars(axes)} == {0.72}
    assert axes.get_ylim() == (2.6, -0.6) and axes.get_xlabel() == "change of the scores (RMS)"
    assert size_of(figure) == (430, 46 + 21 * 3)
    assert len(axes.get_xticks()) <= 5 and {tick.tick1line.get_markersize() for tick in axes.yaxis.majorTicks} == {0}
    assert "<title>Change by quantizing each convolution</title>" in svg


@pytest.mark.parametrize(("threshold", "right"), [(2.0, 4.0), (5.0, 5.0)])
def test_a_histogram_ends_at_amax_and_marks_the_threshold(drawn: list[Figure], threshold: float, right: float) -> None:
    tensor = {"tensor": "layer<3>", "amax": 4.0, "threshold": threshold, "bars": (1.0, 0.5, 0.25, 0.0)}
    svg = charts.histogram(tensor)
    (figure,) = drawn
    (axes,) = figure.axes
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in bars(axes)] == [
        (0, 1, 1), (1, 1, 0.5), (2, 1, 0.25), (3, 1, 0),
    ]  # fmt: skip
    (mark,) = axes.lines
    assert list(mark.get_xdata()) == [threshold] * 2 and to_hex(mark.get_color()) == charts.MARK
    assert axes.get_xlim() == pytest.approx((0, right * 1.02)) and axes.get_ylim() == (0, 1.05)
    assert mark.get_linewidth() < 2 and axes.xaxis.label.get_fontsize() == axes.yaxis.label.get_fontsize() == 10
    assert not len(axes.get_yticks()) and not axes.spines["left"].get_visible()
    assert (axes.get_xlabel(), axes.get_ylabel(), size_of(figure)) == ("|x|", "log count", (300, 170))
    assert "<title>Histogram of layer&lt;3&gt;</title>" in svg


CHARTS: dict[str, Callable[[], str]] = {
    "curves": lambda: charts.precision_recall({"FP32": {"0.50": (1.0, 0.5)}}, COLOURS, "0.50"),
    "layers": lambda: charts.layer_errors([{"name": "INT8", "tensors": rows(0.1, 0.2)}], COLOURS),
    "bars": lambda: charts.sensitivity_bars([{"node": "a", "line": 1, "scores": 0.5}], []),
    "histogram": lambda: charts.histogram({"tensor": "a", "amax": 1.0, "threshold": 0.5, "bars": (1.0, 0.5)}),
}


@pytest.mark.parametrize("kind", CHARTS)
def test_a_chart_is_one_element_of_a_page(kind: str, drawn: list[Figure]) -> None:
    """As wide as its place, text as text, without a date, a style for the whole page, or ids of another chart; the same at
    every run."""
    svg = CHARTS[kind]()
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("role") == "img" and root.get("viewBox", "").startswith("0 0 ")
    assert "width" not in root.attrib and "height" not in root.attrib and svg.count("<title>") == 1
    assert "<metadata" not in svg and "<style" not in svg and "<text" in svg
    title = root.findtext("{*}title") or ""
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids and all(one.startswith(f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}") for one in ids)
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    assert used <= set(ids)
    assert CHARTS[kind]() == svg


def test_grids_and_frames_do_not_compete_with_the_data(drawn: list[Figure]) -> None:
    """No frame above and to the right; a grid behind the curves, one of vertical lines behind bars, none in histograms."""
    for chart in CHARTS.values():
        chart()
    curves, layers, costs, histogram = (figure.axes[0] for figure in drawn)
    for axes in (curves, layers, costs, histogram):
        assert not axes.spines["top"].get_visible() and not axes.spines["right"].get_visible()
        assert axes.get_axisbelow() is True
    shown = [tuple(any(line.get_visible() for line in lines) for lines in (axes.get_xgridlines(), axes.get_ygridlines()))
             for axes in (curves, layers, costs, histogram)]  # fmt: skip
    assert shown == [(True, True), (True, True), (True, False), (False, False)]
    assert not curves.get_legend().get_frame_on()
