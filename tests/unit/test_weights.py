"""Weights files: their headers, exact consumption, what is no weights file, and folding of batch normalisation."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import MADE_CFG, Array, Made, conv, files_in, head, net, section, weights_bytes

from darktrt.convert.cfg import Network, read_cfg
from darktrt.convert.model import random_weights
from darktrt.convert.weights import WeightReader, binarize, fold, initial_weights, parameter_count, read_weights, write_weights
from darktrt.errors import DarktrtError

TEXT = net() + conv(4) + section("convolutional", filters=6, size=1) + head()
COUNT = (4 * 4 + 4 * 27) + (6 + 6 * 4) + (24 + 24 * 6)


@pytest.fixture
def network(tmp_path: Path) -> Network:
    (tmp_path / "net.cfg").write_text(TEXT)
    return read_cfg(tmp_path / "net.cfg")


def written(network: Network, content: bytes) -> Path:
    file = Path(network.path).with_suffix(".weights")
    file.write_bytes(content)
    return file


def refused(network: Network, content: bytes) -> str:
    with pytest.raises(DarktrtError) as caught:
        read_weights(written(network, content), network)
    assert str(caught.value).startswith(f"{Path(network.path).with_suffix('.weights')}: ")
    return str(caught.value)


@pytest.mark.parametrize("version", [(0, 1, 0), (0, 2, 0), (0, 2, 5), (1, 0, 0), (0, 0, 0), (2, 1, 7)])
def test_every_header_is_skipped(network: Network, version: tuple[int, int, int]) -> None:
    """``seen`` takes 8 bytes from version 0.2 on, else 4."""
    layers = read_weights(written(network, weights_bytes(np.arange(COUNT), version, seen=32013312)), network)
    read = np.concatenate([array.ravel() for layer in layers for array in layer.values()])
    np.testing.assert_array_equal(read, np.arange(COUNT))


def test_arrays_come_in_file_order(network: Network) -> None:
    first, second, last, yolo = read_weights(written(network, weights_bytes(np.arange(COUNT))), network)
    starts = {role: float(array.flat[0]) for role, array in first.items()}
    assert starts == {"bias": 0, "scale": 4, "mean": 8, "variance": 12, "weight": 16}
    assert first["weight"].shape == (4, 3, 3, 3)
    assert {role: float(array.flat[0]) for role, array in second.items()} == {"bias": 124, "weight": 130}
    assert {role: float(array.flat[0]) for role, array in last.items()} == {"bias": 154, "weight": 178}
    assert not yolo


@pytest.mark.parametrize(
    ("short", "message"),
    [
        (1, "ends inside layer 2 [convolutional] (net.cfg:18): its weight needs 144 floats, 143 are left"),
        (145, "ends inside layer 2 [convolutional] (net.cfg:18): its bias needs 24 floats, 23 are left"),
        (COUNT - 9, "ends inside layer 0 [convolutional] (net.cfg:6): its mean needs 4 floats, 1 are left"),
        (COUNT, "ends inside layer 0 [convolutional] (net.cfg:6): its bias needs 4 floats, 0 are left"),
    ],
)
def test_too_few_floats_are_counted(network: Network, short: int, message: str) -> None:
    found = refused(network, weights_bytes(np.zeros(COUNT - short))).replace(f"{Path(network.path).parent}/", "")
    assert message in found
    assert "is this the right cfg, or is the file truncated?" in found


@pytest.mark.parametrize("more", [1, 255])
def test_too_many_floats_are_counted(network: Network, more: int) -> None:
    message = refused(network, weights_bytes(np.zeros(COUNT + more)))
    assert f"{more} floats left after the last layer of {network.path}; is this the right cfg?" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; download it again"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "is an HTML page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 24251276\n", "is a Git LFS pointer, not the weights"),
        (TEXT.encode(), "is a cfg, not weights; are cfg and weights swapped?"),
        (b"# my network\r\n[convolutional]\r\nsize=3\r\n", "is a cfg, not weights"),
        (weights_bytes(np.zeros(COUNT))[:-3], "is truncated: 1 bytes follow the last whole float"),
        (weights_bytes([])[:7], "is truncated: 7 bytes are less than a header"),
        (weights_bytes([])[:16], "is truncated: 16 bytes are less than a header"),
        (weights_bytes([], (0, 1, 0))[:15], "is truncated: 15 bytes are less than a header"),
        (b"\x93NUMPY" + bytes(300), "which no darknet wrote; is this a .weights file?"),
        (b"PK\x03\x04" + bytes(300), "which no darknet wrote"),
        (b"\x89PNG\r\n\x1a\n" + bytes(300), "which no darknet wrote"),
    ],
)
def test_what_is_no_weights_file_is_named(network: Network, content: bytes, said: str) -> None:
    message = refused(network, content)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("version", [(999, 0, 0), (0, 999, 0), (999, 999, -1)])
def test_versions_up_to_999_are_read(network: Network, version: tuple[int, int, int]) -> None:
    assert read_weights(written(network, weights_bytes(np.zeros(COUNT), version)), network)


@pytest.mark.parametrize("version", [(1000, 0, 0), (0, 1000, 0), (-1, 0, 0), (0, -1, 0)])
def test_other_versions_are_refused(network: Network, version: tuple[int, int, int]) -> None:
    said = f"has version {version[0]}.{version[1]}, which no darknet wrote; is this a .weights file?"
    assert said in refused(network, weights_bytes(np.zeros(COUNT), version))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("place", "where"), [(13, "variance of layer 0"), (127, "bias of layer 1"), (COUNT - 1, "weight of layer 2")]
)
def test_numbers_that_are_none_are_placed(network: Network, value: float, place: int, where: str) -> None:
    floats = np.zeros(COUNT)
    floats[place] = value
    assert f"the {where} [convolutional]" in refused(network, weights_bytes(floats))


def test_unreadable_files_are_named(network: Network, tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"none\.weights: cannot read: No such file"):
        read_weights(tmp_path / "none.weights", network)
    with pytest.raises(DarktrtError, match="is a folder; name a file"):
        read_weights(tmp_path, network)


# --- writing ---


def test_written_weights_are_read_back_to_the_bit(tmp_path: Path) -> None:
    (tmp_path / "net.cfg").write_text(MADE_CFG)
    network = read_cfg(tmp_path / "net.cfg")
    values = random_weights(network, 3)
    write_weights(tmp_path / "a.weights", network, values)
    read = read_weights(tmp_path / "a.weights", network)
    for before, after in zip(values, read, strict=True):
        assert list(before) == list(after)
        for role, array in before.items():
            assert array.tobytes() == after[role].tobytes()
            assert array.shape == after[role].shape
    write_weights(tmp_path / "b.weights", network, read)
    assert (tmp_path / "a.weights").read_bytes() == (tmp_path / "b.weights").read_bytes()


def test_the_file_is_what_darknet_writes(network: Network, tmp_path: Path) -> None:
    values = random_weights(network, 0)
    write_weights(tmp_path / "a.weights", network, values)
    roles = [*("bias", "scale", "mean", "variance", "weight"), "bias", "weight", "bias", "weight"]
    layers = [0, 0, 0, 0, 0, 1, 1, 2, 2]
    floats = np.concatenate([values[i][role].ravel() for i, role in zip(layers, roles, strict=True)])
    assert (tmp_path / "a.weights").read_bytes() == weights_bytes(floats)
    assert struct.unpack("<iiiQ", (tmp_path / "a.weights").read_bytes()[:20]) == (0, 2, 5, 0)
    assert parameter_count(network) == len(floats) == COUNT
    assert WeightReader(tmp_path / "a.weights").left == COUNT


def test_a_layer_that_shares_weights_has_none_in_the_file(tmp_path: Path) -> None:
    text = conv(4) + conv(4) + conv(4, share_index=-1, activation="leaky") + section("batchnorm")
    (tmp_path / "net.cfg").write_text(net() + text + head())
    network = read_cfg(tmp_path / "net.cfg")
    count = (4 * 4 + 4 * 27) + (4 * 4 + 4 * 36) + 4 * 4 + (24 + 24 * 4)
    assert parameter_count(network) == count
    weights = read_weights(written(network, weights_bytes(np.arange(count))), network)
    assert not weights[2]
    assert {role: float(array.flat[0]) for role, array in weights[3].items()} == {
        "bias": 284,
        "scale": 288,
        "mean": 292,
        "variance": 296,
    }
    assert "1 floats left after the last layer" in refused(network, weights_bytes(np.zeros(count + 1)))
    assert "its weight needs 96 floats, 95 are left" in refused(network, weights_bytes(np.zeros(count - 1)))
    drawn = random_weights(network, 0)
    assert [len(values) for values in drawn[:4]] == [5, 5, 0, 4]
    write_weights(tmp_path / "drawn.weights", network, drawn)
    assert (tmp_path / "drawn.weights").stat().st_size == 20 + 4 * count


def test_a_missing_folder_leaves_nothing(network: Network, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    with pytest.raises(DarktrtError, match=r"a\.weights: cannot write: No such file or directory"):
        write_weights(tmp_path / "none" / "a.weights", network, random_weights(network, 0))
    assert files_in(tmp_path) == before


def test_random_weights_travel_through_a_file(made: Made) -> None:
    network = read_cfg(made.cfg)
    drawn, read = random_weights(network, 1), read_weights(made.weights, network)
    for before, after in zip(drawn, read, strict=True):
        for role, array in before.items():
            np.testing.assert_array_equal(array, after[role])


def test_initial_weights_have_unit_gain_and_biases_of_some_size(tmp_path: Path) -> None:
    (tmp_path / "net.cfg").write_text(net() + conv(300, 3) + conv(2000, 1) + conv(256, 3, groups=4) + head())
    for values, inputs in zip(initial_weights(read_cfg(tmp_path / "net.cfg"), 0), (27, 300, 4500), strict=False):
        assert values["weight"].std() == pytest.approx(inputs**-0.5, rel=0.05)
        assert values["weight"].mean() == pytest.approx(0, abs=0.1 * inputs**-0.5)
        assert values["bias"].std() == pytest.approx(0.4, rel=0.15)
        assert values["mean"].std() == pytest.approx(0.1, rel=0.15)
        assert (0.4 <= values["scale"]).all() and (values["scale"] < 0.8).all() and np.ptp(values["scale"]) > 0.35
        assert (values["variance"] == 1).all()


def test_random_weights_of_a_weighted_shortcut_halve_its_terms(tmp_path: Path) -> None:
    """Positive and below 1: a hundred such sums neither die nor explode, whatever normalises them."""
    text = net() + conv(8) + conv(8)
    for kind in ("per_feature", "per_channel"):
        weighted = {"from": -2, "weights_type": kind, "weights_normalization": "relu"}
        text += section("shortcut", activation="linear", **weighted)
    (tmp_path / "net.cfg").write_text(text + head())
    weights = random_weights(read_cfg(tmp_path / "net.cfg"), 0)
    assert [weights[i]["weight"].shape for i in (2, 3)] == [(2, 1), (2, 8)]
    for i in (2, 3):
        assert list(weights[i]) == ["weight"]
        assert (weights[i]["weight"] >= 0.4).all()
        assert (weights[i]["weight"] < 0.8).all()


# --- folding ---


def normalization(count: int, variance: Array) -> dict[str, Array]:
    random = np.random.default_rng(0)
    values = {role: random.normal(0, 1, count) for role in ("bias", "scale", "mean")}
    values |= {"weight": random.normal(0, 1, (count, 2, 3, 3)), "variance": variance}
    return {role: array.astype(np.float32) for role, array in values.items()}


@pytest.mark.parametrize("variance", [1.0, 1e-3, 1e-5, 0.0, 300.0])
def test_folding_is_normalising_with_epsilon_inside_the_root(variance: float) -> None:
    values = normalization(5, np.full(5, variance))
    weight, bias = fold(values)
    assert weight.dtype == bias.dtype == np.float32
    wide = {role: array.astype(np.float64) for role, array in values.items()}
    patch = np.random.default_rng(1).normal(0, 1, (2, 3, 3))
    for k in range(5):
        plain = (wide["weight"][k] * patch).sum()
        expected = (plain - wide["mean"][k]) / np.sqrt(wide["variance"][k] + 0.00001) * wide["scale"][k] + wide["bias"][k]
        terms = np.abs(weight[k] * patch).sum() + abs(bias[k])
        assert abs((weight[k].astype(np.float64) * patch).sum() + bias[k] - expected) < 1e-6 * terms


def test_signs_and_means_of_weights() -> None:
    signs, means = binarize(np.array([[[[1.5, -0.5]], [[0, -2]]], [[[0, 0]], [[0, 0]]]], np.float32))
    np.testing.assert_array_equal(signs, [[[[1, -1]], [[-1, -1]]], [[[-1, -1]], [[-1, -1]]]])
    np.testing.assert_array_equal(means, [1, 0])


def test_without_normalisation_nothing_changes() -> None:
    values = {role: array for role, array in normalization(3, np.ones(3)).items() if role in ("weight", "bias")}
    weight, bias = fold(values)
    np.testing.assert_array_equal(weight, values["weight"])
    np.testing.assert_array_equal(bias, values["bias"])
    weight += 1
    assert not np.array_equal(weight, values["weight"]), "a copy: the original may be a mapped file"
