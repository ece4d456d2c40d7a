"""What is fuzzed: a whole file of every kind that darktrt reads, and the functions that read and use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict
from helpers import MADE_CFG, Made, labelled_images, made_detections, made_image, make, timing
from hypothesis import strategies as st

from darktrt.calib.collect import collect
from darktrt.calib.file import read_calibration
from darktrt.calib.summary import summary
from darktrt.calib.table import CalibrationTable
from darktrt.check import agreement, evaluation
from darktrt.check.detections import load_detections, save_detections
from darktrt.check.ground_truth import load_ground_truth, read_class_map, read_names
from darktrt.check.report import read_timings
from darktrt.check.report_diff import diff_reports, read_report
from darktrt.check.runs import load_image, load_results, onnx_variant
from darktrt.check.simulate import load_network, quantized
from darktrt.cli import main
from darktrt.convert.export import convert_darknet
from darktrt.engine.describe import describe_manifest, describe_onnx
from darktrt.engine.layer_list import convolution_precisions, engine_layers
from darktrt.engine.manifest import Manifest, read_manifest
from darktrt.engine.runtime import OnnxRunner
from darktrt.engine.target import Target as EngineTarget
from darktrt.onnx_file import load_model
from darktrt.pipeline import calibrate, load_calibration, merge_calibrations
from darktrt.serve.client.calls import read_inference, read_object
from darktrt.serve.client.slots import Slot
from darktrt.serve.config import OnnxRuntimeBackend
from darktrt.serve.containers import container_for
from darktrt.serve.doctor import diagnose_repository
from darktrt.serve.model_info import ModelInfo
from darktrt.serve.repository import model_info, publish, read_config
from darktrt.surgery.rewrite import insert_plugins
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.images import read_image
from darktrt.vision.sources import find_images
from fuzz import mutations

Strategy = Callable[[bytes], st.SearchStrategy[bytes]]


@dataclass(frozen=True)
class Target:
    """A kind of file."""

    file: str
    """Its whole form below the folder of :func:`make_files`, which a case replaces."""
    mutate: Strategy
    read: Callable[[Path], object]
    """Reads the file, and uses what it read as the commands do."""


def make_files(folder: Path) -> None:
    """Write whole files of every kind; a case finds them around the one that it replaces."""
    made = make(folder, MADE_CFG, batch=(1, 3, 3))
    labelled_images(made, folder)
    calibration = calibrate(folder / "net.onnx", [folder / "others"], folder / "my.calib")
    CalibrationTable(dict(calibration.scales), "8600").save(folder / "my.cache")
    save_detections([made_detections(folder)], folder / "detections.json")
    (folder / "bench.json").write_text(json.dumps({"gpu": "NVIDIA H100", "timings": [timing("A"), timing("B", batch=8)]}))
    _write_results(made, folder)
    _write_report(folder)
    _write_coco(folder)
    manifest = Manifest("0" * 64, "0" * 64, "TensorRT 10.3.0", "NVIDIA H100", "int8", (), 1.0, made.info)
    (folder / "manifest.json").write_text(manifest.to_json())
    (folder / "layers.json").write_text(json.dumps({"Layers": _LAYERS}))
    (folder / "classes.names").write_text("\n".join(made.info.class_names))
    (folder / "classes.map").write_text(f"cat = {made.info.class_names[0]}\n# comment\n")
    publish(folder / "net.onnx", folder / "repository", OnnxRuntimeBackend(), name="net")
    config = MessageToDict(read_config(folder / "repository/net/config.pbtxt"), preserving_proto_field_name=True)
    (folder / "server-config.json").write_text(json.dumps(config))
    (folder / "server-answer").write_bytes(_answer())


def _answer() -> bytes:
    """The length of the head, and an inference over HTTP."""
    arrays = {
        "num_detections": np.array([[2]], np.int32),
        "boxes": np.float32([[[1, 2, 30, 40], [5, 6, 7, 8], [0, 0, 0, 0]]]),
        "scores": np.float32([[0.9, 0.5, 0]]),
        "classes": np.array([[1, 2, 0]], np.int32),
    }
    outputs = [
        {
            "name": name,
            "datatype": {"i": "INT32", "f": "FP32"}[array.dtype.kind],
            "shape": array.shape,
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in arrays.items()
    ]
    head = json.dumps({"outputs": outputs}).encode()
    return b"%d\n" % len(head) + head + b"".join(array.tobytes() for array in arrays.values())


def _write_results(made: Made, folder: Path) -> None:
    variant = onnx_variant(folder / "net.onnx")
    image = load_image(folder / "photos" / "0.png", variant.info)
    agreement.compare([variant], [image], save=folder / "results.json")


def _write_report(folder: Path) -> None:
    words = ["check", "report", str(folder / "photos"), "--model", f"A={folder}/net.onnx", "-o", str(folder / "report")]
    assert main([*words, "--show-images", "0"]) == 0


def _write_coco(folder: Path) -> None:
    image = {"id": 1, "file_name": "0.png", "width": 192, "height": 128}
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10.0, 20.0, 30.5, 40], "area": 1220.0, "iscrowd": 0}
    values = {"images": [image], "annotations": [box], "categories": [{"id": 3, "name": "person"}]}
    (folder / "photos" / "coco.json").write_text(json.dumps(values))


_LAYERS: list[dict[str, Any]] = [
    {
        "Name": "/layers.0/Conv + /layers.0/Relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "images", "Dimensions": [1, 3, 64, 96], "Format/Datatype": "Row major Int8 format"}],
        "Outputs": [{"Name": "out", "Dimensions": [1, 8, 32, 48], "Format/Datatype": "Row major Int8 format"}],
        "TacticName": "sm80_xmma_fprop_implicit_gemm",
        "Metadata": "[ONNX Layer: /layers.0/Conv]",
    }
]


# --- readers ---


def _merge(path: Path) -> None:
    """What was measured is joined, or, with a changed setting, left out."""
    merge_calibrations([path], path.parent / "merged.calib")
    summary(read_calibration(path))


def _quantize(path: Path) -> None:
    network = load_network(path.parent / "net.onnx")
    calibration = load_calibration(path)
    quantized(network, calibration, calibration.fp_layers or ())


def _layers(path: Path) -> None:
    target = EngineTarget("trt", (10, 3, 0))
    text = path.read_text(encoding="utf-8", errors="replace")
    engine_layers(text, target)
    convolution_precisions(text, {"/layers.0/Conv": True}, target)


def _manifest(path: Path) -> None:
    manifest = read_manifest(path)
    describe_manifest(path, manifest)
    container_for(manifest)


def _labels(path: Path) -> None:
    load_ground_truth([str(path.parent)], ("a", "b", "c"))


def _detections(path: Path) -> None:
    loaded = load_detections(path)
    class_names = loaded[0].info.class_names if loaded else ("person",)
    ground_truth = load_ground_truth([str(path.parent / "photos")], class_names)
    evaluation.check_comparable([], ground_truth, loaded)
    evaluation.evaluate_detections(loaded, ground_truth).to_table()


def _results(path: Path) -> None:
    loaded = load_results(path)
    variant = onnx_variant(path.parent / "net.onnx")
    image = load_image(path.parent / "photos" / "0.png", variant.info)
    agreement.compare([variant], [image], loaded).to_json()


def _report(path: Path) -> None:
    diff_reports(read_report(str(path)), read_report(str(path))).to_table()


def _coco(path: Path) -> None:
    find_images([path])
    load_ground_truth([str(path)], ("person",))


def _image(path: Path) -> None:
    load_ground_truth([str(path)], ("a", "b", "c"))
    read_image(path)


def _onnx(path: Path) -> None:
    describe_onnx(path)
    with OnnxRunner(path) as runner:
        NetworkDetector(runner.run, runner.info, 0.1, 0.45).detect([made_image(64, 64)])


def _calibration(path: Path) -> None:
    collect(path, [path.parent / "others" / "50.png"])


def _surgery(path: Path) -> None:
    insert_plugins(path, path.parent / "after.onnx")


def _network(path: Path) -> None:
    quantized(load_network(path), load_calibration(path.parent / "my.calib"), ())


def _config(path: Path) -> None:
    model_info(read_config(path), path)
    diagnose_repository(path.parent.parent)


def _cfg(path: Path) -> None:
    convert_darknet(path, None, path.parent / "out.onnx", random_weights=1)


def _weights(path: Path) -> None:
    convert_darknet(path.with_suffix(".cfg"), path, path.parent / "out.onnx")


def _server_config(path: Path) -> None:
    model = ModelInfo.from_config(read_object("http://server", path.read_bytes()), "http://server")
    Slot(model, 1, "none")
    model.to_text()


def _server_answer(path: Path) -> None:
    length, _, content = path.read_bytes().partition(b"\n")
    info = replace(load_model(path.parent / "net.onnx")[1], head="nms")
    arrays = read_inference("http://server", content, length.decode("latin-1"))
    NetworkDetector(lambda _: arrays, info).detect([made_image(64, 64)])


TARGETS: dict[str, Target] = {
    "calibration": Target("my.calib", mutations.of_archive, _quantize),
    "calibration-merge": Target("my.calib", mutations.of_archive, _merge),
    "cache": Target("my.cache", mutations.of_bytes, _quantize),
    "manifest": Target("manifest.json", mutations.of_json, _manifest),
    "engine-layers": Target("layers.json", mutations.of_json, _layers),
    "detections": Target("detections.json", mutations.of_json, _detections),
    "bench": Target("bench.json", mutations.of_json, lambda path: read_timings([path])),
    "report": Target("report/report.json", mutations.of_json, _report),
    "results": Target("results.json", mutations.of_json, _results),
    "coco": Target("photos/coco.json", mutations.of_json, _coco),
    "label-image": Target("photos/0.png", mutations.of_bytes, _image),
    "label-text": Target("photos/0.txt", mutations.of_bytes, _labels),
    "names": Target("classes.names", mutations.of_bytes, read_names),
    "class-map": Target("classes.map", mutations.of_bytes, read_class_map),
    "model-config": Target("repository/net/config.pbtxt", mutations.of_bytes, _config),
    "server-config": Target("server-config.json", mutations.of_json, _server_config),
    "server-answer": Target("server-answer", mutations.of_bytes, _server_answer),
    "onnx": Target("net.onnx", mutations.of_onnx, _onnx),
    "onnx-calibration": Target("net.onnx", mutations.of_onnx, _calibration),
    "onnx-surgery": Target("made.onnx", mutations.of_onnx, _surgery),
    "onnx-int8": Target("net.onnx", mutations.of_onnx, _network),
    "cfg": Target("made.cfg", mutations.of_bytes, _cfg),
    "weights": Target("made.weights", mutations.of_bytes, _weights),
}
