"""Histograms: exact against counting by hand, the same whatever the order or grouping."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from helpers import Array

from darktrt.calib.histogram import BINS, LEAST_EXPONENT, Histogram, HistogramSet, Limits, checked_histogram
from darktrt.errors import DarktrtError

RANDOM = np.random.default_rng(3)
CHUNKS: list[Array] = [
    np.zeros((2, 3), np.float32),
    RANDOM.normal(0, 1e-6, (3, 50)).astype(np.float32),
    RANDOM.normal(0, 3, (1, 4, 30, 30)).astype(np.float32),
    np.maximum(RANDOM.normal(0, 1, 100_000), 0).astype(np.float32),
    np.array([-700.5, 0, 1e-42, 2.0**-30], np.float32),
    RANDOM.laplace(0, 20, 500).astype(np.float32),
]
"""Values that make the range grow by different steps, depending on the order."""


def counted(chunks: Sequence[Array]) -> Histogram:
    histogram = Histogram()
    for chunk in chunks:
        histogram.add(chunk)
    return histogram


def same(first: Histogram, second: Histogram) -> bool:
    """Whether two histograms agree in every field, bit for bit."""
    rest = [(h.exponent, h.minimum, h.maximum, h.zeros) for h in (first, second)]
    return (
        rest[0] == rest[1] and np.array_equal(first.counts, second.counts) and np.array_equal(first.weighted, second.weighted)
    )


def same_sets(first: HistogramSet, second: HistogramSet) -> bool:
    """Whether two sets agree in the model, the images (whatever their order) and every histogram."""
    return (
        (first.model, first.images, list(first.histograms), first.groups, first.head_inputs, first.mish)
        == (second.model, second.images, list(second.histograms), second.groups, second.head_inputs, second.mish)
    ) and all(same(first.histograms[name], second.histograms[name]) for name in first.histograms)


@pytest.mark.parametrize("chunk", CHUNKS, ids=range(len(CHUNKS)))
def test_counts_are_those_of_the_definition(chunk: Array) -> None:
    histogram = counted([chunk])
    bins = np.floor(np.abs(chunk.astype(np.float64)) / histogram.bin_width).astype(int)
    assert np.array_equal(histogram.counts, np.bincount(bins.ravel(), minlength=BINS))
    assert histogram.count == chunk.size
    assert histogram.amax == np.abs(chunk).max()
    assert (histogram.minimum, histogram.maximum) == (chunk.min(), chunk.max())
    assert histogram.zeros == np.sum(chunk == 0)


@pytest.mark.parametrize("amax", [2**-100, 1e-20, 0.3, 0.999, 1, 1.001, 127, 128, 3e38, 3.4028235e38])
def test_range_is_the_power_of_two_above_amax(amax: float) -> None:
    histogram = counted([np.array([amax], np.float32)])
    used = np.flatnonzero(histogram.counts)
    assert list(used) == [int(histogram.amax / histogram.bin_width)]
    assert 2048 <= BINS // 2 <= used[0] < BINS


def test_signal_below_every_float_of_use_keeps_the_least_range() -> None:
    histogram = counted([np.array([1e-45, 1e-35, 0], np.float32)])
    assert histogram.exponent == LEAST_EXPONENT
    assert histogram.counts[0] == 3
    assert histogram.zeros == 1


@pytest.mark.parametrize("seed", range(8))
def test_neither_order_nor_grouping_matters(seed: int) -> None:
    random = np.random.default_rng(seed)
    order = random.permutation(len(CHUNKS))
    cut = random.integers(0, len(CHUNKS) + 1)
    first, second = (counted([CHUNKS[i] for i in part]) for part in (order[:cut], order[cut:]))
    whole = counted([np.concatenate([chunk.ravel() for chunk in CHUNKS])])
    one_by_one = counted([CHUNKS[i] for i in order])
    assert same(one_by_one, whole)
    first.merge(second)
    assert same(first, whole)


# --- weights ---


def test_values_without_weights_have_the_weight_one() -> None:
    histogram = counted(CHUNKS)
    assert np.array_equal(histogram.weighted, histogram.counts)


def test_a_value_counts_as_often_as_the_weight_of_its_position() -> None:
    values = RANDOM.normal(0, 3, (2, 5, 6, 8)).astype(np.float32)
    weights = RANDOM.integers(0, 256, (2, 3, 4)).astype(np.uint8)
    weights[0, 1:] = 0
    histogram = Histogram()
    histogram.add(values, weights)
    times = weights.repeat(2, 1).repeat(2, 2)[:, np.newaxis].repeat(5, 1)
    bins = np.floor(np.abs(values.astype(np.float64)) / histogram.bin_width).astype(int)
    assert np.array_equal(histogram.weighted, np.bincount(bins.ravel(), times.ravel(), BINS))
    assert np.array_equal(histogram.counts, np.bincount(bins.ravel(), minlength=BINS))


@pytest.mark.parametrize(
    ("shape", "grid"), [((1, 9, 128, 160), (64, 80)), ((2, 3, 300, 300), (300, 300)), ((1, 70_000, 1, 1), (1, 1))]
)
def test_weights_count_once_in_tensors_of_many_blocks(shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    """Real networks have tensors of a million values, which are counted block by block."""
    values = RANDOM.normal(0, 3, shape).astype(np.float32)
    weights = RANDOM.integers(1, 21, (shape[0], *grid)).astype(np.uint8)
    histogram = Histogram()
    histogram.add(values, weights)
    times = weights.repeat(shape[2] // grid[0], 1).repeat(shape[3] // grid[1], 2)[:, np.newaxis].repeat(shape[1], 1)
    bins = np.floor(np.abs(values.astype(np.float64)) / histogram.bin_width).astype(int)
    assert np.array_equal(histogram.weighted, np.bincount(bins.ravel(), times.ravel(), BINS))
    assert np.array_equal(histogram.counts, np.bincount(bins.ravel(), minlength=BINS))


def test_weighted_shards_merge_to_one_run() -> None:
    """The second shard has larger values, so bins are joined on the way."""
    values = [RANDOM.normal(0, 3 * 20**i, (3, 4, 8, 8)).astype(np.float32) for i in range(2)]
    weights = [RANDOM.integers(0, 256, (3, 2, 2)).astype(np.uint8) for _ in range(2)]
    whole, first, second = Histogram(), Histogram(), Histogram()
    whole.add(np.concatenate(values), np.concatenate(weights))
    first.add(values[0], weights[0])
    second.add(values[1], weights[1])
    first.merge(second)
    assert same(first, whole)


def test_merging_does_not_change_the_other() -> None:
    small, large = counted(CHUNKS[1:2]), counted(CHUNKS[4:5])
    before = copy.deepcopy(small)
    large.merge(small)
    large.add(CHUNKS[2])
    assert same(small, before)


def test_empty_arrays_and_odd_layouts() -> None:
    histogram = counted([np.zeros((0, 3), np.float32)])
    assert (histogram.count, histogram.amax) == (0, 0)
    values = RANDOM.normal(size=(6, 8)).astype(np.float32)
    assert same(counted([values[::2, ::-1], values[1::2]]), counted([values]))
    assert same(counted([np.float32(2.5)]), counted([np.array([[2.5]], np.float16)]))
    histogram.merge(counted([values]))
    histogram.merge(Histogram())
    assert same(histogram, counted([values]))


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_no_number_is_refused_and_nothing_counted(value: float, word: str) -> None:
    histogram = counted(CHUNKS[:3])
    before = copy.deepcopy(histogram)
    with pytest.raises(ValueError, match=word):
        histogram.add(np.array([1e9, value, 2], np.float32))
    assert same(histogram, before)


# --- sets ---


def made_set(chunks: Sequence[Array] = CHUNKS, model: str = "aa", start: int = 0) -> HistogramSet:
    made = HistogramSet(model, groups=[["a: b", "größe"]], head_inputs=["größe"], mish={"größe": "a: b"})
    for i, chunk in enumerate(chunks, start):
        made.add({"a: b": chunk, "größe": chunk * 2}, {f"digest{i}": f"images/{i} x.jpg"})
    return made


def test_shards_merge_to_one_run() -> None:
    parts = [made_set(CHUNKS[:2]), made_set(CHUNKS[2:3], start=2), made_set(CHUNKS[3:], start=3)]
    parts[0].merge(parts[1:])
    assert same_sets(parts[0], made_set())
    empty = HistogramSet("aa")
    empty.merge([parts[0]])
    assert same_sets(empty, made_set())


def test_merging_refuses_another_model() -> None:
    with pytest.raises(DarktrtError, match="different models"):
        made_set().merge([made_set(model="bb", start=10)])


def test_merging_refuses_an_image_counted_twice_and_changes_nothing() -> None:
    first = made_set()
    with pytest.raises(DarktrtError, match=r"2 images were counted on both sides, first 'images/4 x\.jpg'"):
        first.merge([made_set(start=4)])
    assert same_sets(first, made_set())


def test_merging_refuses_other_tensors() -> None:
    other = HistogramSet("aa")
    other.add({"a: b": CHUNKS[0]}, {"digest": "x.jpg"})
    with pytest.raises(DarktrtError, match="'größe' is only in one of them"):
        made_set().merge([other])


def test_no_number_names_tensor_and_image_and_counts_nothing() -> None:
    first = made_set()
    bad = {"a: b": CHUNKS[2], "größe": np.array([np.nan], np.float32)}
    with pytest.raises(DarktrtError, match=r"tensor 'größe' is NaN or infinite for bad\.jpg"):
        first.add(bad, {"new": "bad.jpg"})
    assert same_sets(first, made_set())


def test_zero_has_no_sign_whichever_came_first() -> None:
    """A rectifier makes -0 of a negative number times 0; files of the same values are the same bytes."""
    chunks = [np.array(values, np.float32) for values in ([0.0, 1.0], [-0.0, 0.5], [-0.0])]
    for order in permutations(chunks):
        assert str(counted(order).minimum) == "0.0"
    assert str(counted(chunks[2:]).maximum) == "0.0"


# --- what a file says of one ---


def checked(histogram: Histogram, **changed: object) -> Histogram:
    values = {name: getattr(histogram, name) for name in ("exponent", "minimum", "maximum", "zeros")} | changed
    counts = [values.pop(name, getattr(histogram, name)) for name in ("counts", "weighted")]
    return checked_histogram(Limits(**values), *counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, 1e-40, 2.0**-100, 3.4028235e38])
def test_histograms_of_numbers_at_the_ends_are_histograms(value: float) -> None:
    for made in (counted([np.full((2, 2), value, np.float32)]), counted([np.full(3, -value, np.float32)])):
        assert same(checked(made), made)


def _at(array: Array, index: int, value: int) -> Array:
    changed = array.copy()
    changed[index] = value
    return changed


def test_what_is_no_histogram_is_refused() -> None:
    made = counted(CHUNKS[2:3])
    damaged: list[tuple[dict[str, object], str]] = [
        ({"exponent": made.exponent + 1}, "range"),
        ({"exponent": 5000}, "range"),
        ({"exponent": -5000}, "range"),
        ({"maximum": np.inf}, "range"),
        ({"minimum": -np.inf}, "range"),
        ({"minimum": np.nan}, "range"),
        ({"maximum": 1e300}, "range"),
        ({"minimum": made.maximum, "maximum": made.minimum}, "range"),
        ({"counts": _at(made.counts, 0, -1)}, "negative or too large"),
        ({"counts": _at(made.counts, 0, 2**62)}, "negative or too large"),
        ({"weighted": _at(made.weighted, 0, -1)}, "negative or too large"),
        ({"weighted": _at(made.weighted, 0, 2**62)}, "negative or too large"),
        ({"counts": np.zeros(BINS, np.int64)}, "do not fit its values"),
        ({"counts": _at(made.counts, BINS - 1, 1)}, "do not fit its values"),
        ({"counts": made.counts[::-1]}, "do not fit its values"),
        ({"weighted": _at(made.weighted, BINS - 1, 1)}, "do not fit its values"),
        ({"zeros": -1}, "more zeros"),
        ({"zeros": 2**53}, "more zeros"),
        ({"zeros": int(made.counts[0]) + 1}, "more zeros"),
    ]
    for change, sentence in damaged:
        with pytest.raises(ValueError, match=sentence):
            checked(made, **change)
    assert checked(made, zeros=int(made.counts[0])).zeros == made.counts[0]
    rest = int(made.counts[1:].sum())
    assert checked(made, counts=_at(made.counts, 0, 2**53 - rest)).count == 2**53
    with pytest.raises(ValueError, match="too large"):
        checked(made, counts=_at(made.counts, 0, 2**54 - rest))
