"""Corrected biases: the means they are made of, and what they do to a quantized network."""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import pytest
from helpers import Array, Made, as_float, batch_of_images, run, with_outputs

from darktrt.calib.bias_correction import (
    MOST_IMAGES,
    UNIT_BITS,
    ChannelMeans,
    ChannelSums,
    channel_sums,
    corrected_bias,
)
from darktrt.errors import DarktrtError
from darktrt.memory import MOST_NETWORK_BYTES
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, transform

RANDOM = np.random.default_rng(7)


EXPONENT = 3


def sums_of(values: Array, scale: float) -> ChannelSums:
    """Of images ``(N, C, H, W)`` below ``2 ** EXPONENT``, added one by one."""
    return reduce(add, [channel_sums(image, np.float32(scale), EXPONENT) for image in values])


def measured(values: Array, scale: float) -> ChannelMeans:
    return sums_of(values, scale).channel_means(len(values), np.float32(scale), EXPONENT)


def test_means_are_those_of_the_values_and_of_their_int8_form() -> None:
    values = RANDOM.normal(0.2, 1, (7, 4, 5, 6)).astype(np.float32)
    means = measured(values, 0.02)
    steps = np.clip(np.round(values.astype(np.float64) / np.float32(0.02)), -128, 127)
    np.testing.assert_allclose(means.mean, values.mean((0, 2, 3), dtype=np.float64), atol=2.0 ** (EXPONENT - UNIT_BITS))
    np.testing.assert_allclose(means.quantized, (steps * np.float32(0.02)).mean((0, 2, 3)), rtol=1e-12, atol=1e-15)


def test_sums_are_whole_numbers_whatever_their_order() -> None:
    values = (RANDOM.normal(0, 1, (9, 4, 5, 6)) * 10.0 ** RANDOM.integers(-9, 0, (9, 1, 1, 1))).astype(np.float32)
    first, second = (sums_of(values[order], 0.02) for order in (np.arange(9), RANDOM.permutation(9)))
    for one, other in ((first.means, second.means), (first.levels, second.levels)):
        assert one.dtype == np.int64 and one.tolist() == other.tolist()
    assert first.positions == 30


def test_no_sum_overflows_with_the_largest_images_and_the_most_of_them() -> None:
    """One image at the ends of the ranges, times as many as there may be; a tensor has at most 2**30 positions."""
    for value in (-8.0, 8.0):
        sums = channel_sums(np.full((1, 3, 5), value, np.float32), np.float32(1e-3), EXPONENT)
        assert abs(int(sums.means[0])) == 1 << UNIT_BITS
        assert abs(int(sums.means[0])) * MOST_IMAGES < 1 << 63
        assert abs(int(sums.levels[0])) <= 128 * 15
        assert 128 * (MOST_NETWORK_BYTES // 4) * MOST_IMAGES < 1 << 63
        assert float(2**UNIT_BITS) * 2.0**-UNIT_BITS == 1  # a double holds the unit of every mean


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_corrected_bias_restores_the_old_mean(groups: int) -> None:
    """For a 1x1 convolution, which has no zeros around its input, exactly."""
    values = np.abs(RANDOM.normal(0, 1, (2, 8, 9, 9))).astype(np.float32)
    weight = RANDOM.normal(size=(12, 8 // groups, 1, 1)).astype(np.float32)
    coarse = (np.round(weight * 4) / 4).astype(np.float32)
    bias = RANDOM.normal(size=12).astype(np.float32)
    steps = np.clip(np.rint(values / np.float32(0.3)), -128, 127) * np.float32(0.3)

    def means(x: Array, w: Array, b: Array) -> Array:
        channels = x.mean((0, 2, 3)).reshape(groups, -1).repeat(12 // groups, 0)
        return np.asarray((w[:, :, 0, 0] * channels).sum(1) + b)

    corrected = corrected_bias(bias, weight, coarse, measured(values, 0.3), groups)
    assert np.abs(corrected - bias).max() > 0.01
    np.testing.assert_allclose(means(steps, coarse, corrected), means(values, weight, bias), atol=1e-5)


def test_means_that_are_not_those_of_the_input_are_refused() -> None:
    weight, bias = np.ones((4, 3, 1, 1), np.float32), np.zeros(4, np.float32)
    for channels, groups in ((2, 1), (6, 1), (3, 2)):
        with pytest.raises(DarktrtError, match=f"are of {channels} channels where a convolution reads {3 * groups}; calibrate"):
            corrected_bias(bias, weight, weight, ChannelMeans(np.ones(channels), np.ones(channels)), groups)
    for mean, quantized in ((1e300, 0.0), (1e308, -1e308)):
        with pytest.raises(DarktrtError, match="make a bias that is not finite"):
            corrected_bias(bias, weight, weight, ChannelMeans(np.full(3, mean), np.full(3, quantized)))


def test_a_quantized_network_keeps_its_means(made: Made) -> None:
    """Of a convolution's outputs: with corrected biases they move less than without."""
    node = next(n for n in made.model().graph.node if n.op_type == "Conv" and n.input[0] != "images")
    tensor, output = node.input[0], node.output[0]
    inputs = {"images": as_float(batch_of_images(made.info, 4))}
    before = run(with_outputs(made.model(), [tensor, output]), inputs)
    scale = np.float32(np.abs(before[tensor]).max() / 200)  # clips too
    means = {tensor: measured(before[tensor], float(scale))}
    others = tuple(n.name for n in made.model().graph.node if n.op_type == "Conv" and n.name != node.name)

    def moved(channel_means: dict[str, ChannelMeans]) -> float:
        options = SurgeryOptions(head="raw", input="float", calibration=Calibration({tensor: scale}, others, channel_means))
        model, _ = transform(made.model(), made.info, options)
        after = run(with_outputs(model, [output]), inputs)[output]
        return float(np.abs((after - before[output]).mean((0, 2, 3))).mean())

    assert moved(means) < 0.5 * moved({})
