"""The memory and the work of a network, computed from what its cfg declares, and the limits on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import MADE_CFG, SHARED, conv, head, net, section

from darktrt import memory
from darktrt.convert import shapes
from darktrt.convert.cfg import Network, read_cfg
from darktrt.convert.export import _Exported
from darktrt.convert.model import Darknet, random_weights
from darktrt.convert.shapes import operations
from darktrt.errors import DarktrtError


def network_of(folder: Path, text: str) -> Network:
    (folder / "net.cfg").write_text(text)
    return read_cfg(folder / "net.cfg")


def test_a_tensor_is_in_use_from_its_step_to_its_last_reader() -> None:
    chain = [({"a": 5}, ()), ({"b": 7}, ("a",)), ({"c": 1}, ("b",)), ({"d": 2}, ("c",))]
    assert memory.most_at_once(chain) == 12
    assert memory.most_at_once([*chain, ({"e": 4}, ("a", "d"))]) == 5 + 7 + 1
    assert memory.most_at_once([({"a": 3, "b": 4}, ()), ({"c": 10}, ())]) == 10  # unread tensors are freed at once
    assert memory.most_at_once([]) == 0


@pytest.mark.parametrize(
    ("limit", "free"), [("max\n", 3 << 20), (f"{1 << 20}\n", 1 << 20), (f"{1 << 40}\n", 3 << 20), (None, 3 << 20)]
)
def test_available_memory_is_that_of_the_machine_and_of_its_container(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, free: int
) -> None:
    files = {"/proc/meminfo": "MemTotal:  9 kB\nMemAvailable:   3072 kB\n", "/sys/fs/cgroup/memory.max": limit}

    def read(path: Path, encoding: str) -> str:
        if (text := files[str(path)]) is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert memory.available_bytes() == free


def test_a_network_takes_its_weights_and_the_tensors_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = net(8, 4) + conv(4, normalize=0) + section("route", layers=-1) + head()
    # weights: 4 filters of 3 x 3 x 3 and 24 of 4 x 1 x 1, with biases; the route and the head's output at once, of 4 and 24
    weights = 4 * (4 * 3 * 9 + 4 + 24 * 4 + 24)
    needed = 4 * weights + 2 * 4 * 32 * (24 + 24)
    monkeypatch.setattr(shapes, "MOST_NETWORK_BYTES", needed)
    assert network_of(tmp_path, text).shapes
    monkeypatch.setattr(shapes, "MOST_NETWORK_BYTES", needed - 1)
    with pytest.raises(DarktrtError, match=r"net.cfg: would take 0.0 GiB of memory for an image of 8x4, more than 0.0 GiB"):
        _ = network_of(tmp_path, text).shapes


def test_random_weights_are_fitted_with_eight_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(tmp_path, net() + conv(64) + head())
    _ = network.shapes
    monkeypatch.setattr(shapes, "MOST_NETWORK_BYTES", 8 * 2**20)
    with pytest.raises(DarktrtError, match=r"would take 0.0 GiB of memory for 8 images of 64x64"):
        random_weights(network, 0)


def test_operations_are_those_of_convolutions_and_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = net(8, 4) + conv(4, groups=1) + section("maxpool", size=5, stride=1) + section("route", layers=-1) + head()
    network = network_of(tmp_path, text)
    counts = [2 * 4 * 3 * 9 * 32, 4 * 25 * 32, 4 * 32, 2 * 24 * 4 * 32, 24 * 32]
    assert list(operations(network, network.shapes)) == counts
    monkeypatch.setattr(shapes, "MOST_OPERATIONS", sum(counts))
    assert network_of(tmp_path, text).shapes
    monkeypatch.setattr(shapes, "MOST_OPERATIONS", sum(counts) - 1)
    with pytest.raises(DarktrtError, match=r"net.cfg: one image of 8x4 would take 0 billion operations, more than 0; convert"):
        _ = network_of(tmp_path, text).shapes


@pytest.mark.parametrize("name", ["wide", "large", "pooled"])
def test_a_few_lines_cannot_exhaust_a_machine(tmp_path: Path, name: str) -> None:
    text, said = {
        "wide": (net(32, 32) + 13 * conv(8000, 1, normalize=0) + head(), "would take 11.6 GiB of memory for an image of 32x32"),
        "large": (net(4096, 4096) + 3 * conv(30, 1) + head(), "would take 7.5 GiB of memory for an image of 4096x4096"),
        "pooled": (
            net(1024, 1024) + conv(64) + section("maxpool", size=1023, stride=1) + head(),
            "one image of 1024x1024 would take 70,238 billion operations, more than 4,000",
        ),
    }[name]
    with pytest.raises(DarktrtError, match=said):
        _ = network_of(tmp_path, text).shapes


@pytest.mark.skipif(not (SHARED / "zoo" / "yolov4x-mish.cfg").is_file(), reason="needs the cfgs beside this checkout")
@pytest.mark.parametrize("name", ["yolov4", "yolov4x-mish", "yolov3-spp"])
def test_published_networks_may_be_four_times_as_large(name: str) -> None:
    network = read_cfg(SHARED / "zoo" / f"{name}.cfg")
    assert network.resized(2 * network.width, 2 * network.height).shapes


def test_the_export_frees_tensors_that_are_read(tmp_path: Path) -> None:
    """Of the traced network's outputs only those of the heads are wanted; the others would be a gigabyte for a large one."""
    network = network_of(tmp_path, MADE_CFG)
    model = Darknet(network).eval()
    model.load(random_weights(network, 1))
    images = torch.rand(1, 3, network.height, network.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        *inner, boxes, scores = _Exported(model)(images)
        expected = model(images)
    assert torch.equal(boxes, expected[0]) and torch.equal(scores, expected[1])
    assert [tensor.untyped_storage().size() for tensor in inner] == [0] * len(inner)
