"""Corrected biases: the means they are made of, what they do to a quantized network, and the file beside the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Array, Made, as_float, batch_of_images, declare, run, with_outputs

from darktrt.calib.bias_correction import (
    ChannelMeanMeter,
    ChannelMeans,
    channel_means_path,
    corrected_bias,
    load_channel_means,
    save_channel_means,
)
from darktrt.calib.table import CalibrationTable
from darktrt.errors import DarktrtError
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, transform

RANDOM = np.random.default_rng(7)


def measured(values: Array, scale: float) -> ChannelMeans:
    meter = ChannelMeanMeter({"x": np.float32(scale)})
    for part in np.array_split(values, 3):
        meter.add({"x": part})
    return meter.channel_means()["x"]


def test_means_are_those_of_the_values_and_of_their_int8_form() -> None:
    values = RANDOM.normal(0.2, 1, (7, 4, 5, 6)).astype(np.float32)
    means = measured(values, 0.02)
    steps = np.clip(np.round(values.astype(np.float64) / np.float32(0.02)), -128, 127)
    np.testing.assert_allclose(means.mean, values.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(means.quantized, (steps * np.float32(0.02)).mean((0, 2, 3)), rtol=1e-5)


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
    meter = ChannelMeanMeter({tensor: scale})
    meter.add({tensor: before[tensor]})
    others = tuple(n.name for n in made.model().graph.node if n.op_type == "Conv" and n.name != node.name)

    def moved(channel_means: dict[str, ChannelMeans]) -> float:
        options = SurgeryOptions(head="raw", input="float", calibration=Calibration({tensor: scale}, others, channel_means))
        model, _ = transform(made.model(), made.info, options)
        after = run(with_outputs(model, [output]), inputs)[output]
        return float(np.abs((after - before[output]).mean((0, 2, 3))).mean())

    assert moved(meter.channel_means()) < 0.5 * moved({})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "my.table"
    CalibrationTable({"a": np.float32(0.1), "b: c": np.float32(0.2)}, "8600").save(path)
    return path


MEANS = {
    "a": ChannelMeans(np.array([1.0, 2.5]), np.array([1.25, 2.0])),
    "b: c": ChannelMeans(np.array([3.0]), np.array([4.0])),
}


def test_channel_means_survive_the_disk(table: Path) -> None:
    assert load_channel_means(table) == {}
    save_channel_means(MEANS, table)
    result = load_channel_means(table)
    assert [(name, one.mean.tolist(), one.quantized.tolist()) for name, one in result.items()] == [
        ("a", [1.0, 2.5], [1.25, 2.0]),
        ("b: c", [3.0], [4.0]),
    ]


def test_channel_means_of_another_table_are_refused(table: Path) -> None:
    save_channel_means(MEANS, table)
    CalibrationTable({"a": np.float32(0.3)}, "8600").save(table)
    with pytest.raises(DarktrtError, match=r"my\.means\.npz: was measured with another .*my\.table; calibrate again"):
        load_channel_means(table)


def _saved(path: Path) -> dict[str, Any]:
    with np.load(path) as archive:
        return dict(archive)


def _array(name: str, value: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **{**_saved(path), name: value})


def _header(**values: Any) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        header = json.loads(_saved(path)["header"].tobytes()) | values
        _array("header", np.frombuffer(json.dumps(header).encode(), np.uint8))(path)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-90]),
        lambda path: np.savez(path.open("wb"), mean=np.zeros(2)),
        lambda path: path.write_text("x"),
        _array("header", np.frombuffer(b"[" * 100_000, np.uint8)),
        _array("header", np.frombuffer(b"{}", np.uint8)),
        _array("header", np.frombuffer(b"\xff", np.uint8)),
        _array("mean", np.zeros(2)),
        _array("quantized", np.zeros(4)),
        _array("mean", np.zeros((3, 1))),
        _array("mean", np.zeros(3, np.float32)),
        _array("mean", np.array(["a", "b", "c"])),
        _array("mean", np.array([1, np.nan, 2])),
        _array("quantized", np.array([1, 2, np.inf])),
        _header(format="darktrt channel means 2"),
        _header(table=None),
        _header(channels=[2, 1]),
        _header(channels={}),
        _header(channels={"a": 4, "b: c": -1}),
        _header(channels={"a": 3, "b: c": 0}),
        _header(channels={"a": 2, "b: c": 2}),
        _header(channels={"a": 2.5, "b: c": 0.5}),
        _header(channels={"a": "2", "b: c": 1}),
        _header(channels={"a": 2**62, "b: c": 2**62}),
    ],
)
def test_damaged_channel_means_are_named(table: Path, damage: Any) -> None:
    save_channel_means(MEANS, table)
    damage(channel_means_path(table))
    with pytest.raises(
        DarktrtError, match=r"my\.means\.npz: is damaged .*\(.+\); calibrate again, or delete the file of the means"
    ):
        load_channel_means(table)


def test_arrays_larger_than_those_of_any_network_are_refused_by_their_declared_size(table: Path) -> None:
    save_channel_means(MEANS, table)
    declare(channel_means_path(table), "mean.npy", 128 << 20)
    with pytest.raises(DarktrtError, match="its arrays have 134 MB, more than 134 MB"):
        load_channel_means(table)


def test_a_table_with_a_name_too_long_for_a_file_beside_it_has_no_means(tmp_path: Path) -> None:
    assert load_channel_means(tmp_path / f"{'a' * 249}.table") == {}
