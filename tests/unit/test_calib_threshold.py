"""Thresholds against literal loops and against the raw values that the histograms were made of."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
from helpers import Array
from oracles import mish64

from darktrt.calib import threshold
from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.calib.options import CalibrationOptions
from darktrt.calib.threshold import (
    DEAD_SCALE_AMAX,
    METHODS,
    NEAR,
    Choice,
    Floats,
    Method,
    choose_amax,
    choose_thresholds,
    entropy_amax,
    entropy_divergences,
    entropy_histogram,
    expected_error,
    join_groups,
    join_mish,
    mse_amax,
    percentile_amax,
)
from darktrt.errors import DarktrtError

RANDOM = np.random.default_rng(5)
SAMPLES: dict[str, Array] = {
    "normal": RANDOM.normal(0, 2, 300_000),
    "laplace": RANDOM.laplace(0, 1, 300_000),
    "rectified": np.maximum(RANDOM.normal(-0.5, 1, 300_000), 0),
    "uniform": RANDOM.uniform(0, 1, 300_000),
    "outlier": np.append(RANDOM.normal(0, 1, 300_000), [-60, 200, *RANDOM.laplace(0, 8, 3000)]),
    "few": RANDOM.normal(0, 1, 60),
    "sparse": np.where(RANDOM.uniform(size=200_000) < 0.995, 0, RANDOM.exponential(1, 200_000)),
}
SAMPLES = {name: values.astype(np.float32) for name, values in SAMPLES.items()}
names = pytest.mark.parametrize("name", SAMPLES)


def histogram_of(values: Array) -> Histogram:
    histogram = Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


def quantized(values: Array, amax: float) -> Floats:
    scale = amax / 127
    rounded: Floats = scale * np.clip(np.rint(values.astype(np.float64) / scale), -127, 127)
    return rounded


def raw_error(values: Array, amax: float, power: float = 2) -> float:
    return float(np.mean(np.abs(values - quantized(values, amax)) ** power))


# --- entropy ---


def literal_divergence(counts: Floats, kept: int) -> float:
    """KL(P, Q) for one candidate as the GTC talk describes it, one bin after the other."""
    p = [float(count) for count in counts[:kept]]
    q = [0.0] * kept
    for level in range(128):
        members = [b for b in range(kept) if b * 128 // kept == level]
        filled = [b for b in members if counts[b] > 0]
        for b in filled:
            q[b] = sum(float(counts[m]) for m in members) / len(filled)
    p[-1] += float(sum(counts[kept:]))
    divergence = 0.0
    for p_b, q_b in zip(p, q, strict=True):
        if p_b > 0:
            if q_b == 0:
                return float("inf")
            divergence += p_b / sum(p) * log((p_b / sum(p)) / (q_b / sum(q)))
    return divergence


@names
def test_divergences_are_those_of_the_literal_loop(name: str) -> None:
    counts = entropy_histogram(histogram_of(SAMPLES[name]))
    result = entropy_divergences(counts)
    assert len(result) == 2048 - 128 + 1
    for kept in [128, 129, 200, 255, 256, 777, 1024, 2047, 2048]:
        expected = literal_divergence(counts, kept)
        assert result[kept - 128] == pytest.approx(expected, rel=1e-6, abs=1e-9), kept


def test_divergences_of_whole_counts_with_gaps() -> None:
    counts = RANDOM.integers(0, 3, 300).astype(np.float64)
    counts[[150, 299]] = 0, 5
    expected = [literal_divergence(counts, kept) for kept in range(128, 301)]
    assert np.isinf(expected).any()
    assert entropy_divergences(counts) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_quantizing_as_in_the_talk_loses_nothing_where_levels_are_bins() -> None:
    counts = np.zeros(2048)
    counts[:128] = RANDOM.integers(1, 99, 128)
    assert entropy_divergences(counts)[0] == pytest.approx(0, abs=1e-12)


def test_entropy_bins_split_evenly_and_bin_zero_is_its_neighbour() -> None:
    histogram = histogram_of(SAMPLES["uniform"])
    counts = entropy_histogram(histogram)
    exact = np.histogram(SAMPLES["uniform"], 2048, (0, histogram.amax))[0]
    assert counts[0] == counts[1]
    assert np.abs(counts - exact)[1:].max() <= 60  # of 146 a bin; what a split bin can differ by
    assert counts[1:].sum() == pytest.approx(exact[1:].sum(), abs=60)


def test_images_get_the_threshold_of_tensorrts_own_caches() -> None:
    values = np.arange(256, dtype=np.float32) / 255
    histogram = histogram_of(np.repeat(values, RANDOM.integers(50, 100, 256)))
    assert np.float32(entropy_amax(histogram) / 127).tobytes()[::-1].hex() == "3c010a14"


def test_entropy_clips_an_outlier_and_ignores_the_share_of_zeros() -> None:
    assert entropy_amax(histogram_of(SAMPLES["outlier"])) < 30
    dense = SAMPLES["laplace"]
    assert entropy_amax(histogram_of(np.append(dense, np.zeros(10 * dense.size)))) == entropy_amax(histogram_of(dense))


# --- the others ---


@names
@pytest.mark.parametrize("percentile", [50, 99, 99.9, 99.99, 100])
def test_percentile_is_that_of_the_raw_values(name: str, percentile: float) -> None:
    values, histogram = np.abs(SAMPLES[name]), histogram_of(SAMPLES[name])
    result = percentile_amax(histogram, percentile)
    around = (np.percentile(values, percentile, method=method) for method in ("lower", "higher"))
    low, high = around
    assert low - histogram.bin_width <= result <= high + histogram.bin_width
    if percentile == 100:
        assert result == histogram.amax


@names
@pytest.mark.parametrize("power", [1, 2, 2.4, 3])
def test_expected_error_is_that_of_the_raw_values(name: str, power: float) -> None:
    histogram = histogram_of(SAMPLES[name])
    amaxes = histogram.amax * np.array([0.05, 0.3, 0.8, 1, 1.1])
    result = expected_error(histogram, amaxes, power)
    expected = [raw_error(SAMPLES[name], amax, power) for amax in amaxes]
    assert result == pytest.approx(expected, rel=0.35 if name == "few" else 0.02)


@names
def test_mse_is_as_good_as_any_threshold_tried_on_the_raw_values(name: str) -> None:
    histogram = histogram_of(SAMPLES[name])
    best = min(raw_error(SAMPLES[name], amax) for amax in np.geomspace(histogram.amax / 256, histogram.amax, 300))
    assert raw_error(SAMPLES[name], mse_amax(histogram)) <= best * (1.2 if name == "few" else 1.01)


@names
@pytest.mark.parametrize("method", METHODS)
def test_choice_says_what_it_clips(name: str, method: Method) -> None:
    values, histogram = np.abs(SAMPLES[name]), histogram_of(SAMPLES[name])
    choice = choose_amax(histogram, method, percentile=99.9)
    assert 0 < choice.amax <= histogram.amax * (1 + 1 / 4096)
    assert choice.scale == np.float32(choice.amax / 127)
    in_bin = np.mean(np.abs(values - choice.amax) < histogram.bin_width)
    assert abs(choice.clipped_share - np.mean(values > choice.amax)) <= in_bin + 1e-9
    assert choice.method == method or method == "auto"
    assert not choice.dead


@names
def test_auto_takes_the_least_error_of_all(name: str) -> None:
    histogram = histogram_of(SAMPLES[name])
    choice = choose_amax(histogram, "auto", 99.9)
    assert set(choice.errors) == {"entropy", "percentile", "minmax", "mse", "weighted"}
    assert choice.errors[choice.method] == min(choice.errors.values())
    assert choice.amax == choose_amax(histogram, choice.method, 99.9).amax  # type: ignore[arg-type]


@pytest.fixture
def objects() -> Histogram:
    """Large values at one position, where the network detects something; small ones in the background."""
    random = np.random.default_rng(0)
    values = random.laplace(0, 0.1, (1, 4, 400, 400)).astype(np.float32)
    values[:, :, 3:5, 3:5] = random.uniform(0, 5, (1, 4, 2, 2))
    weights = np.zeros((1, 400, 400), np.uint8)
    weights[:, 3:5, 3:5] = 200
    histogram = Histogram()
    histogram.add(values, weights)
    return histogram


def test_weights_move_the_threshold_to_where_objects_are(objects: Histogram) -> None:
    plain, weighted, auto = (choose_amax(objects, method).amax for method in ("mse", "weighted", "auto"))
    assert plain < 0.9 * weighted
    assert weighted == pytest.approx(objects.amax, rel=0.1)
    assert auto == weighted
    assert choose_amax(objects, "auto", for_head=True).amax == plain


def test_without_any_detection_weighted_is_mse() -> None:
    values = SAMPLES["outlier"].astype(np.float32).reshape(1, 1, 1, -1)
    histogram = Histogram()
    histogram.add(values, np.zeros((1, 1, 1), np.uint8))
    assert choose_amax(histogram, "weighted").amax == choose_amax(histogram, "mse").amax


def test_the_input_of_mish_gets_the_range_of_its_output() -> None:
    """The error of a fused Mish is smaller than with a range of the input's own, which covers large negative values."""
    x = np.append(RANDOM.normal(-2, 3, 300_000), RANDOM.uniform(-40, 0, 10_000)).astype(np.float32)
    y = mish64(x)
    histograms = {"x": histogram_of(x), "y": histogram_of(y), "other": histogram_of(x)}
    choices = {name: choose_amax(histogram, "auto") for name, histogram in histograms.items()}
    result = join_mish(choices, histograms, {"x": "y"})
    assert result["x"].amax == result["y"].amax == choices["y"].amax
    assert result["x"].joined
    assert result["x"].clipped_share == pytest.approx(np.mean(np.abs(x) > choices["y"].amax), rel=1e-2)
    assert (result["y"], result["other"]) == (choices["y"], choices["other"])
    errors = [np.mean((quantized(mish64(quantized(x, one["x"].amax)), one["y"].amax) - y) ** 2) for one in (result, choices)]
    assert errors[0] < 0.7 * errors[1]


def test_a_mish_with_output_zero_does_not_change_its_input() -> None:
    histograms = {"x": histogram_of(SAMPLES["normal"]), "y": histogram_of(np.zeros(9))}
    choices = {name: choose_amax(histogram, "auto") for name, histogram in histograms.items()}
    assert join_mish(choices, histograms, {"x": "y"}) == choices


def chosen(amax: float, dead: bool = False) -> Choice:
    return Choice(amax, "mse", 0.0, {}, dead)


def test_tensors_with_common_values_get_one_threshold_where_theirs_are_near() -> None:
    choices = {"a": chosen(4), "b": chosen(4 * NEAR), "c": chosen(5), "d": chosen(2), "e": chosen(7)}
    result = join_groups(choices, [["a", "b", "c"], ["d", "e"]])
    assert {name: choice.amax for name, choice in result.items()} == {"a": 5, "b": 5, "c": 5, "d": 2, "e": 7}
    assert [name for name, choice in result.items() if choice.joined] == ["a", "b", "c"]


def test_a_tensor_that_is_always_zero_neither_joins_nor_keeps_others_apart() -> None:
    result = join_groups({"a": chosen(1, dead=True), "b": chosen(30), "c": chosen(31)}, [["a", "b", "c"]])
    assert {name: choice.amax for name, choice in result.items()} == {"a": 1, "b": 31, "c": 31}
    assert join_groups({"a": chosen(1, dead=True)}, [["a"]]) == {"a": chosen(1, dead=True)}


def test_auto_compares_the_errors_of_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    histogram = histogram_of(SAMPLES["outlier"])
    monkeypatch.setattr(threshold, "expected_error", lambda _, amaxes: -amaxes)
    assert choose_amax(histogram, "auto").amax == histogram.amax
    monkeypatch.setattr(threshold, "expected_error", lambda _, amaxes: amaxes)
    assert choose_amax(histogram, "auto").amax < 30


def test_thresholds_of_a_network() -> None:
    """Chosen tensor by tensor, those of head inputs with equal weights, then joined in groups, then across Mish."""
    samples = {"a": 2, "b": 1.9, "x": 1, "y": 3, "head": 1}
    histograms = {name: histogram_of(factor * SAMPLES["normal"]) for name, factor in samples.items()}
    network = HistogramSet("", histograms, groups=[["a", "b"]], head_inputs=["head"], mish={"x": "y"})
    choices = choose_thresholds(network, "mse")
    plain = {name: choose_amax(histogram, "mse").amax for name, histogram in histograms.items()}
    expected = plain | {"b": plain["a"], "x": plain["y"]}
    assert {name: choice.amax for name, choice in choices.items()} == expected
    assert [name for name, choice in choices.items() if choice.joined] == ["a", "b", "x"]


def test_auto_for_a_head_in_a_network(objects: Histogram) -> None:
    choices = choose_thresholds(HistogramSet("", {"in": objects, "other": objects}, head_inputs=["in"]))
    assert choices["in"] == choose_amax(objects, "auto", for_head=True)
    assert choices["other"] == choose_amax(objects, "auto") != choices["in"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "values",
    [np.full(1000, 2.0), np.full(1000, -3.3), np.array([1e-20]), np.array([0, 0, 5.0]), np.array([3e38, -1.0, 0]), [1.0, 2.0]],
    ids=["one power of two", "one negative", "one tiny", "mostly zero", "huge", "two"],
)
def test_odd_tensors_get_a_usable_scale(method: Method, values: Array) -> None:
    choice = choose_amax(histogram_of(values), method)
    assert np.isfinite(choice.scale)
    assert 0 < choice.amax <= np.abs(values).max() * 1.001
    assert 0 <= choice.clipped_share <= 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [np.zeros(9), np.full(5, 1e-40)])
def test_all_zero_tensor_gets_a_defined_scale_and_a_flag(method: Method, values: Array) -> None:
    choice = choose_amax(histogram_of(values), method)
    assert choice.dead
    assert choice.amax == DEAD_SCALE_AMAX
    assert choice.scale > 0


def test_a_percentile_inside_the_zeros_falls_back_to_the_largest_value() -> None:
    choice = choose_amax(histogram_of(np.append(np.zeros(99_999), 5)), "percentile", 99.99)
    assert (choice.amax, choice.method) == (5, "minmax")


def test_wrong_arguments() -> None:
    histogram = histogram_of(SAMPLES["few"])
    with pytest.raises(DarktrtError, match="unknown calibration method 'kl'"):
        choose_amax(histogram, "kl")  # type: ignore[arg-type]
    for percentile in (0, -1, 100.1, float("nan")):
        with pytest.raises(DarktrtError, match="percentile is"):
            choose_amax(histogram, "percentile", percentile)
    with pytest.raises(DarktrtError, match="unknown calibration method 'kl'"):
        choose_thresholds(HistogramSet(""), "kl")  # type: ignore[arg-type]
    with pytest.raises(DarktrtError, match="percentile is 0;"):
        choose_thresholds(HistogramSet(""), percentile=0)
    with pytest.raises(DarktrtError, match="no values"):
        choose_amax(Histogram(), "entropy")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("limit", 0, "limit is 0; it must be at least 1"),
        ("bias_images", -1, "bias_images is -1; it must be at least 0"),
        ("bias_images", 2**24 + 1, "bias_images is 16777217; it must be at most 16777216"),
        ("fp_layer_images", -2, "fp_layer_images is -2; it must be at least 0"),
        ("method", "kl", "unknown calibration method 'kl'"),
        ("percentile", 101, "the percentile is 101; it must be above 0 and at most 100"),
    ],
)
def test_options_out_of_range(argument: str, value: object, message: str) -> None:
    with pytest.raises(DarktrtError, match=message) as caught:
        CalibrationOptions(**{argument: value})  # type: ignore[arg-type]
    assert caught.value.argument == argument


def test_the_defaults_of_a_calibration_are_those_of_the_guide() -> None:
    assert CalibrationOptions() == CalibrationOptions(None, 0, "auto", 99.99, 64, 8, False, False)


def test_options_at_the_ends_of_their_ranges() -> None:
    CalibrationOptions(limit=1, bias_images=0, fp_layer_images=0, percentile=100)


# --- what must not move from release to release ---

PLACES = (np.arange(60_000) * 7919 % 60_000 + 0.5) / 60_000
LAPLACE = -np.sign(PLACES - 0.5) * np.log1p(-2 * np.abs(PLACES - 0.5))
DISTRIBUTIONS = {"laplace": LAPLACE, "rectified": np.maximum(LAPLACE - 0.3, 0), "outliers": LAPLACE**3}
AMAXES = {
    "laplace": [9.908874, 9.392578, 11.0021, 9.701291, 9.071222, 9.071222],
    "rectified": [9.607329, 8.303711, 10.7021, 9.577354, 9.014981, 9.014981],
    "outliers": [250.030574, 828.625, 1331.762329, 1276.183695, 1028.069564, 1028.069564],
}
"""By method, in the order of ``METHODS``."""
WEIGHTED_ERRORS = {
    "laplace": [0.000514004, 0.000477856, 0.000625733, 0.000497478, 0.000469363],
    "rectified": [0.000183749, 0.000201167, 0.000219371, 0.000182872, 0.000176231],
    "outliers": [84.452525272, 3.518540679, 3.24988156, 3.047701176, 2.649491849],
}
"""Of these, in the same order."""


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_same_values_have_the_same_thresholds_in_every_release(name: str) -> None:
    """A table that is made again is the same table: engines, biases and floating-point layers were measured with it."""
    histogram = Histogram()
    values = DISTRIBUTIONS[name].astype(np.float32).reshape(1, -1, 6, 10)
    histogram.add(values, (np.arange(60) % 7).reshape(1, 6, 10).astype(np.uint8))
    assert [choose_amax(histogram, method).amax for method in METHODS] == pytest.approx(AMAXES[name], rel=1e-6)
    auto = choose_amax(histogram, "auto")
    assert (auto.method, choose_amax(histogram, "auto", for_head=True).method) == ("weighted", "mse")
    assert list(auto.errors.values()) == pytest.approx(WEIGHTED_ERRORS[name], rel=1e-5)
    assert choose_amax(histogram, "percentile", 99).clipped_share == pytest.approx(0.01, abs=1e-4)


def test_a_tensor_counts_as_zero_below_the_smallest_range() -> None:
    for amax, dead in ((0.99 * 2**-100, True), (2.0**-100, False)):
        choice = choose_amax(histogram_of(np.array([0, amax], np.float32)), "minmax")
        assert choice.dead is dead
        assert choice.amax == (1 if dead else amax)


def test_thresholds_join_up_to_a_quarter_apart() -> None:
    for amax, joined in ((1.25, True), (1.26, False)):
        assert join_groups({"a": chosen(1), "b": chosen(amax)}, [["a", "b"]])["a"].joined is joined
