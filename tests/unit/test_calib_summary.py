"""A calibration in words, and its drawn page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from darktrt.calib.bias_correction import ChannelSums
from darktrt.calib.channel_means import MeasuredMeans
from darktrt.calib.file import CalibratedNetwork, CalibrationFile
from darktrt.calib.fp_layers import NoiseSums
from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.calib.options import CalibrationSettings
from darktrt.calib.summary import bar_heights, coarse_counts, plot, summary, summary_table
from darktrt.calib.threshold import Choice, choose_amax
from darktrt.errors import DarktrtError

NETWORK = CalibratedNetwork("my", 96, 64, "nms", {})


@pytest.fixture
def counted() -> CalibrationFile:
    random = np.random.default_rng(0)
    histograms = HistogramSet("0123456789abcdef")
    activations = {
        "layer0": random.laplace(0, 1, 9000),
        "a/very/long/name" * 9: random.uniform(0, 1, 50),
        "one": np.ones(4),
        "off": np.zeros(9),
        "last": random.normal(size=2),
    }
    histograms.add({name: values.astype(np.float32) for name, values in activations.items()}, {"digest": "x.jpg"})
    choices = {name: choose_amax(h, "percentile", 99) for name, h in histograms.histograms.items()}
    return CalibrationFile(NETWORK, CalibrationSettings(method="percentile", percentile=99), histograms, (), choices)


def parts(contents: CalibrationFile) -> tuple[dict[str, Histogram], dict[str, Choice]]:
    return contents.histograms.histograms, dict(contents.choices)


def test_table_has_a_line_a_tensor(counted: CalibrationFile) -> None:
    header, *lines = summary_table(counted).splitlines()
    assert header.split() == ["tensor", "amax", "chosen", "scale", "clipped", "method"]
    assert len({len(line.split("%")[0]) for line in lines}) == 1
    histograms, choices = parts(counted)
    first = [f"{histograms['layer0'].amax:.4g}", f"{choices['layer0'].amax:.4g}", f"{choices['layer0'].scale:.4g}"]
    assert lines[0].split()[:4] == ["layer0", *first]
    assert lines[0].split()[5] == "percentile"
    assert float(lines[0].split()[4].rstrip("%")) == pytest.approx(1, abs=0.05)
    assert lines[3].endswith("always zero")
    assert "-0 " not in lines[3]


def test_plot_marks_the_threshold_of_every_tensor(counted: CalibrationFile, tmp_path: Path) -> None:
    plot(counted, tmp_path / "page.png")
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert page.shape == (380, 1600, 3)
    red = (page[..., 0] > 150) & (page[..., 1:] < 120).all(2)
    panels = [red[190 * (i // 4) :][50:160, 400 * (i % 4) :][:, :400] for i in range(5)]
    marked = [np.flatnonzero(panel.sum(0) > 60) for panel in panels]
    assert [0 < len(columns) < 4 for columns in marked] == [True, True, True, False, True]  # "off" is always zero
    histograms, choices = parts(counted)
    share = choices["layer0"].amax / histograms["layer0"].amax
    assert marked[0].mean() == pytest.approx(16 + 375 * share / 1.01, abs=2)


def test_plot_of_a_page_draws_every_histogram(counted: CalibrationFile, tmp_path: Path) -> None:
    """A Laplacian tensor is high at zero and low at its tail; one that is always zero has a single bar, at zero."""
    plot(counted, tmp_path / "page.png")
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    filled = (np.abs(page - (108, 148, 190)).sum(2) < 30)[50:166]
    laplace, zero = filled[:, :400].sum(0), filled[:, 1200:].sum(0)
    assert laplace[20:30].mean() > 3 * laplace[300:380].mean()
    assert zero[:30].max() > 60
    assert zero[30:].max() == 0


def test_a_panel_names_its_tensor_and_its_method_and_ends_at_amax(
    counted: CalibrationFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("darktrt.calib.summary.save_figure", lambda figure, _: drawn.append(figure))
    plot(counted, tmp_path / "page.png")
    (figure,) = drawn
    assert (figure.dpi, *figure.get_size_inches()) == (100, 16, 3.8)
    panels = figure.axes
    histograms, choices = parts(counted)
    assert len(panels) == len(choices) == 5
    for panel, (name, choice) in zip(panels, choices.items(), strict=True):
        amax = histograms[name].amax
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
    choices = {name: choose_amax(h, "minmax") for name, h in histograms.histograms.items()}
    plot(CalibrationFile(NETWORK, CalibrationSettings(), histograms, (), choices), tmp_path / "page.png")
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


def test_plot_refuses_what_it_cannot_write(counted: CalibrationFile, tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"page\.svg: cannot draw"):
        plot(counted, tmp_path / "page.svg")
    with pytest.raises(DarktrtError, match="cannot write"):
        plot(counted, tmp_path / "none" / "page.png")


def test_a_page_of_counts_has_no_thresholds(counted: CalibrationFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("darktrt.calib.summary.save_figure", lambda figure, _: drawn.append(figure))
    plot(replace(counted, choices={}), tmp_path / "page.png")
    panels = drawn[0].axes
    assert len(panels) == 5
    assert [panel.texts[1].get_text() for panel in panels] == ["only counted"] * 5
    assert not any(panel.lines for panel in panels)


def test_a_calibration_in_words(counted: CalibrationFile) -> None:
    histograms = counted.histograms
    histograms.skipped = {"x.jpg": "x.jpg: is empty"}
    sums = np.array([[3.0, 1, 0, 0, 9], [1, 1, 0, 0, 1]])  # of scores three quarters, of boxes nine tenths
    measured = replace(
        counted,
        warnings=("made of sample images",),
        means=MeasuredMeans(frozenset(["digest"]), {"one": ChannelSums(1, np.zeros(1, np.int64), np.zeros(1, np.int64))}),
        noise=NoiseSums(("first",), (("a",), ("b",)), (0.05, 0.95), {"digest": sums}),
    )
    text = summary(measured)
    assert text.splitlines()[:9] == [
        "network:   my, 96 x 64",
        "warning:   made of sample images",
        "SHA-256:   0123456789ab",
        "images:    1",
        "skipped:   x.jpg: is empty",
        "method:    percentile 99",
        "biases: measured on 1 of 1 images",
        "floating-point layers: measured on 1 of 1 images",
        "",
    ]
    assert f"\n\n{summary_table(measured)}\n" in text
    assert text.splitlines()[-2:] == [
        "in floating point: first (the first convolution and those of the heads)",
        "in floating point: a (82.5% of the noise of all others for 5.00% of the operations)",
    ]


def test_counts_in_words(counted: CalibrationFile) -> None:
    assert summary(replace(counted, choices={})).splitlines() == [
        "network:   my, 96 x 64",
        "SHA-256:   0123456789ab",
        "images:    1",
        "method:    none yet: these are only counts",
    ]
