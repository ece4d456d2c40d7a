"""What calibration writes: the table and the files beside it, their guards, the summary and the drawn page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import files_in
from matplotlib.figure import Figure
from PIL import Image

from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.calib.summary import Outputs, bar_heights, coarse_counts, plot, save, summary, summary_table
from darktrt.calib.table import CalibrationTable
from darktrt.calib.threshold import Choice, choose_amax
from darktrt.errors import DarktrtError


@pytest.fixture
def counted() -> tuple[HistogramSet, dict[str, Choice]]:
    random = np.random.default_rng(0)
    histograms = HistogramSet("model")
    activations = {
        "layer0": random.laplace(0, 1, 9000),
        "a/very/long/name" * 9: random.uniform(0, 1, 50),
        "one": np.ones(4),
        "off": np.zeros(9),
        "last": random.normal(size=2),
    }
    histograms.add({name: values.astype(np.float32) for name, values in activations.items()}, {"digest": "x.jpg"})
    return histograms, {name: choose_amax(h, "percentile", 99) for name, h in histograms.histograms.items()}


def test_table_has_a_line_a_tensor(counted: tuple[HistogramSet, dict[str, Choice]]) -> None:
    header, *lines = summary_table(*counted).splitlines()
    assert header.split() == ["tensor", "amax", "chosen", "scale", "clipped", "method"]
    assert len({len(line.split("%")[0]) for line in lines}) == 1
    histograms, choices = counted
    first = [f"{histograms.histograms['layer0'].amax:.4g}", f"{choices['layer0'].amax:.4g}", f"{choices['layer0'].scale:.4g}"]
    assert lines[0].split()[:4] == ["layer0", *first]
    assert lines[0].split()[5] == "percentile"
    assert float(lines[0].split()[4].rstrip("%")) == pytest.approx(1, abs=0.05)
    assert lines[3].endswith("always zero")
    assert "-0 " not in lines[3]


def test_plot_marks_the_threshold_of_every_tensor(counted: tuple[HistogramSet, dict[str, Choice]], tmp_path: Path) -> None:
    plot(*counted, tmp_path / "page.png")
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert page.shape == (380, 1600, 3)
    red = (page[..., 0] > 150) & (page[..., 1:] < 120).all(2)
    panels = [red[190 * (i // 4) :][50:160, 400 * (i % 4) :][:, :400] for i in range(5)]
    marked = [np.flatnonzero(panel.sum(0) > 60) for panel in panels]
    assert [0 < len(columns) < 4 for columns in marked] == [True, True, True, False, True]  # "off" is always zero
    histograms, choices = counted
    share = choices["layer0"].amax / histograms.histograms["layer0"].amax
    assert marked[0].mean() == pytest.approx(16 + 375 * share / 1.01, abs=2)


def test_plot_of_a_page_draws_every_histogram(counted: tuple[HistogramSet, dict[str, Choice]], tmp_path: Path) -> None:
    """A Laplacian tensor is high at zero and low at its tail; one that is always zero has a single bar, at zero."""
    plot(*counted, tmp_path / "page.png")
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    filled = (np.abs(page - (108, 148, 190)).sum(2) < 30)[50:166]
    laplace, zero = filled[:, :400].sum(0), filled[:, 1200:].sum(0)
    assert laplace[20:30].mean() > 3 * laplace[300:380].mean()
    assert zero[:30].max() > 60
    assert zero[30:].max() == 0


def test_a_panel_names_its_tensor_and_its_method_and_ends_at_amax(
    counted: tuple[HistogramSet, dict[str, Choice]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("darktrt.calib.summary.save_figure", lambda figure, _: drawn.append(figure))
    plot(*counted, tmp_path / "page.png")
    (figure,) = drawn
    assert (figure.dpi, *figure.get_size_inches()) == (100, 16, 3.8)
    panels = figure.axes
    histograms, choices = counted
    assert len(panels) == len(choices) == 5
    for panel, (name, choice) in zip(panels, choices.items(), strict=True):
        amax = histograms.histograms[name].amax
        title, method = (text.get_text() for text in panel.texts)
        assert title == (name if len(name) <= 56 else f"…{name[-55:]}") and len(title) <= 56
        assert [text.get_position() for text in panel.texts] == [(0, 1.18), (0, 1.04)]
        assert all(text.get_transform() == panel.transAxes and text.get_fontsize() == 8 for text in panel.texts)
        assert [text.get_color() for text in panel.texts] == ["black", "#c83228"]
        assert method.startswith("always zero" if choice.dead else f"percentile {choice.amax:.4g}, ")
        assert panel.get_yscale() == "log" and panel.get_ylim()[0] == 0.5
        assert panel.get_xlim() == (0, pytest.approx(1.01 * (amax or 1)))
        assert [label.get_text() for label in panel.get_xticklabels()] == ["0", f"{amax + 0.0:.4g}"]
        assert [label.get_horizontalalignment() for label in panel.get_xticklabels()] == ["left", "right"]
        assert [line.get_xdata()[0] for line in panel.lines] == ([] if choice.dead else [choice.amax])
        assert not any(panel.spines[side].get_visible() for side in ("left", "right", "top"))
        assert panel.spines["bottom"].get_visible()
        assert all(line.get_color() == "#c83228" and line.get_linewidth() == 1.5 for line in panel.lines)
        assert all(label.get_fontsize() == 8 and label.get_color() == "#828282" for label in panel.get_xticklabels())
    edges = [panel.get_position() for panel in panels]
    assert [(round(1600 * e.x0), round(380 * (1 - e.y1))) for e in edges[::4]] == [(16, 42), (16, 234)]
    assert [(round(1600 * e.x1), round(380 * e.y0)) for e in edges[3:]] == [(1584, 214), (391, 22)]
    assert round(1600 * (edges[1].x0 - edges[0].x1)) == 23


def test_the_names_of_a_page_that_fit_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("darktrt.calib.summary.save_figure", lambda figure, _: drawn.append(figure))
    histograms = HistogramSet("model")
    histograms.add({"x" * 56: np.ones(4, np.float32), "y" * 57: np.ones(4, np.float32)}, {"digest": "x.jpg"})
    plot(histograms, {name: choose_amax(h, "minmax") for name, h in histograms.histograms.items()}, tmp_path / "page.png")
    assert [panel.texts[0].get_text() for panel in drawn[0].axes] == ["x" * 56, "…" + "y" * 55]


def test_bars_are_even_steps_up_to_amax() -> None:
    histogram = Histogram()
    histogram.add(np.array([0, 0, 0.1, 0.3, 0.3, 0.3, 0.9, 1.0], np.float32))
    assert coarse_counts(histogram, 4).tolist() == [3, 3, 0, 2]
    heights = bar_heights(histogram, 4)
    assert heights == pytest.approx([1, 1, 0, np.log10(3) / np.log10(4)])
    histogram.merge(histogram_of_one(3.0))
    assert coarse_counts(histogram, 3).tolist() == [7, 1, 1]
    assert bar_heights(Histogram(), 3) == [0, 0, 0]


def histogram_of_one(value: float) -> Histogram:
    histogram = Histogram()
    histogram.add(np.array([value], np.float32))
    return histogram


def test_plot_refuses_what_it_cannot_write(counted: tuple[HistogramSet, dict[str, Choice]], tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"page\.svg: cannot draw"):
        plot(*counted, tmp_path / "page.svg")
    with pytest.raises(DarktrtError, match="cannot write"):
        plot(*counted, tmp_path / "none" / "page.png")


def test_files_beside_the_table(counted: tuple[HistogramSet, dict[str, Choice]], tmp_path: Path) -> None:
    histograms, choices = counted
    histograms.skipped = ["x.jpg: is empty"]
    outputs = Outputs(tmp_path / "my.table")
    outputs.check([])
    assert files_in(tmp_path) == []
    save(histograms, choices, outputs, {"network": "my"})
    assert files_in(tmp_path) == ["my.cache", "my.table", "my.txt"]
    assert outputs.cache.read_bytes() == outputs.table.read_bytes()
    assert CalibrationTable.load(outputs.cache).scales == {name: choice.scale for name, choice in choices.items()}
    text = outputs.summary.read_text()
    assert text == summary(histograms, choices, {"network": "my"})
    assert text.splitlines()[:5] == [
        "network:   my",
        "SHA-256:   model",
        "images:    1",
        "skipped:   x.jpg: is empty",
        "",
    ]
    assert text.endswith(f"\n\n{summary_table(histograms, choices)}\n")


def test_the_table_may_be_named_as_a_cache(counted: tuple[HistogramSet, dict[str, Choice]], tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "my.cache")
    outputs.check([])
    save(*counted, outputs, {})
    assert files_in(tmp_path) == ["my.cache", "my.txt"]


@pytest.mark.parametrize(
    ("table", "plot_to", "message"),
    [
        ("a.txt", None, r"a\.txt: is given twice and would be overwritten: .*name the table like a\.table"),
        ("a.npz", None, "is given twice"),
        ("list.table", None, r"list\.txt: is given twice"),
        ("model.onnx", None, r"model\.onnx: is given twice"),
        ("a.png", "a.png", "is given twice"),
        ("a.table", "model.onnx", "is given twice"),
        ("a.table", "a.svg", "cannot draw to that format"),
        ("a.table", "none/a.png", "cannot write: No such file or directory"),
        ("none/a.table", None, "cannot write: No such file or directory"),
        ("sub", None, "sub: is a folder"),
        ("taken.table", None, r"taken\.txt: is a folder"),
        (".", None, "is a folder"),
        (f"{'a' * 249}.table", None, r"\.means\.npz: cannot write: File name too long"),
        ("held.table", None, r"held\.npz: is a folder"),
        ("kept.table", None, r"kept\.means\.npz: is a folder"),
    ],
)
def test_outputs_are_refused_before_the_work(folder: Path, table: str, plot_to: str | None, message: str) -> None:
    for name in ("model.onnx", "list.txt"):
        Path(name).touch()
    for name in ("sub", "taken.txt", "held.npz", "kept.means.npz"):
        Path(name).mkdir()
    before = files_in(folder)
    with pytest.raises(DarktrtError, match=message):
        Outputs(Path(table), Path(plot_to) if plot_to else None).check(["model.onnx", "list.txt"])
    assert files_in(folder) == before
