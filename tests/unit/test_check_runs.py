"""What is known of a variant beside its outputs, and records of many images in a Python session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import Made, made_image
from PIL import Image

from darktrt.check import detections, runs
from darktrt.check.detections import detector_of
from darktrt.check.runs import (
    InputImage,
    Origin,
    Variant,
    VariantResults,
    inner_tensors,
    load_image,
    onnx_variant,
    plan_variant,
)
from darktrt.engine.manifest import Manifest
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import Thresholds
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins


def engine_of(made: Made, precision: str = "fp16", **changes: Any) -> Any:
    """A runner of an engine, as far as a variant asks."""
    manifest = Manifest("ab" * 32, "", "TensorRT 8.6.0", None, precision, (), 1.0, made.info, **changes)
    return SimpleNamespace(path="x.plan", info=made.info, manifest=manifest, run=dict)


@pytest.mark.parametrize("gpu", ["NVIDIA L4", None])
def test_what_is_known_of_an_engine(made: Made, monkeypatch: pytest.MonkeyPatch, gpu: str | None) -> None:
    monkeypatch.setattr(runs, "gpu_name", lambda: gpu)
    variant = plan_variant(engine_of(made))
    assert variant.about == {"sha256": "ab" * 32, "runs in": "TensorRT 8.6.0", "on": gpu or ""}
    assert (variant.name, variant.precision) == ("x.plan", "fp16")
    others = plan_variant(engine_of(made, "int8", other_convolutions={"a": "left in FP16", "b": "x"}), "mine")
    assert (others.name, others.about["not in INT8"]) == ("mine", "a, b")
    assert others.about["INT8"].startswith("0 of the 1 convolutions that were to run in INT8 do")
    forced = plan_variant(engine_of(made, "int8", int8_convolutions=("a",), force_int8=True))
    assert forced.about["INT8"] == "INT8 is forced, also where TensorRT would have found FP16 faster"


def test_what_is_known_of_an_onnx_file(made: Made, tmp_path: Path) -> None:
    insert_plugins(made.plain, tmp_path / "net.onnx", SurgeryOptions())
    variant = onnx_variant(tmp_path / "net.onnx")
    assert (variant.name, variant.precision) == (str(tmp_path / "net.onnx"), "fp32")
    assert variant.about == {"runs in": "ONNX Runtime", "sha256": sha256_of(tmp_path / "net.onnx")}
    assert variant.network is None and onnx_variant(tmp_path / "net.onnx", name="mine").name == "mine"


def test_an_engine_detects_by_its_own_way_to_run_several_batches(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the thresholds for AP."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(detections, "NetworkDetector", lambda *given: asked.append(given))
    network: Any = object()
    alone = Variant("A", made.info, "fp16", dict)  # type: ignore[arg-type]
    for variant, runs_by in ((alone, dict), (replace(alone, network=network), network)):
        detector_of(variant)
        assert asked.pop() == (runs_by, made.info, 0.001, 0.45)


def test_heads_alone_or_all_layers(made: Made) -> None:
    heads = {head.tensor for head in made.info.heads}
    assert inner_tensors(made.info, layers=False) == heads
    assert inner_tensors(made.info, layers=True) == heads | {layer.tensor for layer in made.info.layers}


def test_an_image_is_told_by_what_the_network_sees(made: Made, tmp_path: Path) -> None:
    """Its digest is of the pixels, their shape and where the image lies in them."""
    Image.fromarray(made_image(50, 70)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", made.info)
    assert (image.name, image.pixels.shape, image.inner_size) == ("a.png", (64, 96, 3), (96, 64))
    same = InputImage("b.png", image.pixels.copy(), image.inner_size)
    others = [
        replace(image, inner_size=(96, 63)),
        replace(image, pixels=image.pixels.reshape(96, 64, 3)),
        replace(image, pixels=np.where(np.arange(64 * 96 * 3).reshape(64, 96, 3) == 7, 255 - image.pixels, image.pixels)),
    ]
    assert image.digest == same.digest and len({image.digest, *(one.digest for one in others)}) == 4


def test_records_of_many_images_print_in_a_line(made: Made) -> None:
    origin = Origin(made.info, "fp32", "a.png", "0" * 64, 0.25, 0.45)
    results = VariantResults("A", origin, {"digest": {"boxes": np.zeros((9, 4))}})
    assert "boxes" not in repr(results)
    assert (results.info, results.precision, results.thresholds) == (made.info, "fp32", Thresholds(0.25, 0.45))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"precision": "fp4"}, ValueError),
        ({"score_threshold": 1.1}, DarktrtError),
        ({"iou_threshold": -0.1}, DarktrtError),
    ],
)
def test_an_origin_is_of_a_run_that_can_be(made: Made, changes: dict[str, Any], error: type[Exception]) -> None:
    origin = Origin(made.info, "tf32", "a.png", "0" * 64, 0.0, 1.0)
    assert Origin.from_array(origin.to_array(), "x.json") == origin
    with pytest.raises(error):
        replace(origin, **changes)
