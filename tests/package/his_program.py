"""A user's program beside his own modules: every stage through the Python API."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np

import darktrt


def main(server: str) -> None:
    logging.getLogger("darktrt").setLevel(logging.ERROR)
    steps: list[tuple[str, int, int | None]] = []
    darktrt.set_progress(lambda description, done, total: steps.append((description, done, total)))
    info = darktrt.convert_darknet(
        "networks/yolov4-tiny.cfg", "networks/yolov4-tiny.weights", "api-plain.onnx", size=(416, 416)
    )
    darktrt.insert_plugins("api-plain.onnx", "api.onnx")
    options = darktrt.CalibrationOptions(bias_images=2, fp_layer_images=1)
    calibration = darktrt.calibrate("api.onnx", ["images"], "api.calib", options)
    manifest = darktrt.build_engine("api.onnx", "api.plan", precision="int8", calibration=calibration)
    assert manifest.precision == "int8" and manifest.info.class_names == info.class_names
    assert steps and Path("api.plan").stat().st_size > 1_000_000

    with darktrt.Detector.open("api.onnx") as detector:
        for detections in detector.detect(["dog.jpg", np.zeros((200, 300, 3), np.uint8)]):
            print(detections.to_table())
    print(darktrt.evaluate(["api.onnx", "portable.onnx"], "images", names="networks/coco.names").to_table())
    agreement = darktrt.compare({"reference": "portable.onnx", "api": "api.onnx"}, ["dog.jpg"])
    assert agreement.passed
    folder = darktrt.publish("api.onnx", "api_repository", darktrt.PythonBackend(instances=1))
    assert (folder / "config.pbtxt").is_file()
    with darktrt.Client(server) as client:
        answer = client.detect("dog.jpg")
    print(answer.to_table())
    try:
        darktrt.calibrate("none.onnx", ["images"], "none.calib")
    except darktrt.DarktrtError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
