"""What a real server must refuse, each with one sentence, and serve the next request as if nothing had been."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import made_image
from PIL import Image
from triton_models import Models, ask, encoded, post

from darktrt.serve.rows import MOST_BYTES, MOST_PIXELS
from darktrt.serve.server import Server

grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient: pip install 'darktrt[serve]'")

IMAGES = np.zeros((1, 64, 96, 3), np.uint8)


@pytest.fixture(autouse=True)
def _goes_on(triton: Server) -> Iterator[None]:
    """After each test the server is ready, its processes are the same ones, and both models answer as before."""
    images, file = made_image(64, 96, 3)[None], np.array([[encoded(made_image(50, 70, 1))]], object)
    before, processes = (ask(triton, "made", images=images), ask(triton, "files", image=file)), children(triton.process.pid)
    assert len(processes) >= 3  # a helper a model
    yield
    after = ask(triton, "made", images=images), ask(triton, "files", image=file)
    for one, other in zip(before, after, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(other[name], array)
    assert triton.ready() and children(triton.process.pid) == processes


def children(process_id: int) -> set[int]:
    return {int(one) for task in Path(f"/proc/{process_id}/task").glob("*/children") for one in task.read_text().split()}


def peak(process_id: int) -> int:
    """Most bytes of memory that a process has had."""
    status = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"images": IMAGES[0]}, "batch-size must be <= 3"),
        ({"images": IMAGES[:, :, :50]}, r"Expected \[-1,64,96,3\], got \[1,64,50,3\]"),
        ({"images": np.zeros((0, 64, 96, 3), np.uint8)}, "batch|shape|size"),
        ({"images": np.zeros((4, 64, 96, 3), np.uint8)}, "batch-size must be <= 3"),
        ({"images": np.zeros((1, 64, 96, 3), np.float32)}, "data-type is 'FP32', but model 'made' expects 'UINT8'"),
        ({"images": np.array([[b"text"]], object)}, "expects 'UINT8'"),
        ({"pixels": IMAGES}, "'images'|'pixels'"),
        ({}, "expected number of inputs|inputs"),
        ({"images": IMAGES, "more": IMAGES}, "unexpected inference input 'more'"),
        ({"images": IMAGES, "score_threshold": np.full((1, 2), 0.5, np.float32)}, r"Expected \[-1,1\], got \[1,2\]"),
        ({"images": IMAGES, "score_threshold": np.full((2, 1), 0.5, np.float32)}, "batch size does not match"),
        (
            {"images": IMAGES, "score_threshold": np.full((1, 1), 7, np.float32)},
            "the score threshold is 7; it must be",
        ),
        ({"images": IMAGES, "iou_threshold": np.full((1, 1), np.nan, np.float32)}, "the IoU threshold is nan; it must be"),
    ],
    ids="flat narrow empty batch type text name none more threshold-shape threshold-batch threshold-value nan".split(),
)
def test_tensors_that_do_not_fit(triton: Server, inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(grpc.InferenceServerException, match=said):
        ask(triton, "made", **inputs)


def test_models_and_versions_that_there_are_not(triton: Server) -> None:
    with pytest.raises(grpc.InferenceServerException, match="unknown model: 'nothing'"):
        ask(triton, "nothing", images=IMAGES)
    status, body = post(triton, "models/made/versions/9/infer", b"{}")
    assert status in (400, 404) and b"'made'" in body and b"version 9" in body


def infer_json(**changes: Any) -> bytes:
    tensor = {"name": "images", "shape": [1, 64, 96, 3], "datatype": "UINT8", "data": [0] * IMAGES.size, **changes}
    return json.dumps({"inputs": [tensor]}).encode()


BODIES: dict[str, tuple[bytes, dict[str, str], str]] = {
    "nothing": (b"", {}, "must only have 1 input"),
    "cut": (b"{", {}, "parse"),
    "list": (b"[]", {}, "inputs"),
    "no-list": (b'{"inputs": 5}', {}, "array"),
    "no-text": (b"\xff\xfe\x00" * 50, {}, "parse"),
    "deep": (b"[" * 100_000, {}, "parse"),
    "short": (infer_json(data=[0]), {}, "shape does not match"),
    "letters": (infer_json(data=["a"] * IMAGES.size), {}, "parse"),
    "negative": (infer_json(shape=[1, -64, 96, 3]), {}, "shape"),
    "huge": (infer_json(shape=[2**62, 64, 96, 3]), {}, "size mismatch"),
    "type": (infer_json(datatype="COMPLEX"), {}, "type"),
    "header-long": (infer_json(), {"Inference_Header_Content_Length": "999999999"}, "header size should be in range"),
    "header-negative": (infer_json(), {"Inference_Header_Content_Length": "-5"}, "header"),
    "header-text": (infer_json(), {"Inference_Header_Content_Length": "some"}, "must only have 1 input"),
    "no-gzip": (b"x" * 500, {"Content_Encoding": "gzip"}, "must only have 1 input"),
}


@pytest.mark.parametrize("name", BODIES)
def test_requests_that_are_none(triton: Server, name: str) -> None:
    body, headers, said = BODIES[name]
    status, answer = post(triton, "models/made/infer", body, **headers)
    assert status >= 400, answer
    assert said in json.loads(answer)["error"].lower(), answer


def binary(claimed: int, given: bytes) -> tuple[bytes, dict[str, str]]:
    """A request of binary data that claims so many bytes."""
    tensor = {"name": "images", "shape": [1, 64, 96, 3], "datatype": "UINT8", "parameters": {"binary_data_size": claimed}}
    header = json.dumps({"inputs": [tensor]}).encode()
    return header + given, {"Inference_Header_Content_Length": str(len(header))}


LARGE = 80 << 20


@pytest.mark.parametrize("content_type", ["application/octet-stream", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize(
    ("claimed", "given"),
    [(18432, 100), (100, 100), (100, 18432), (10**12, 18432), (18432, LARGE), (LARGE, LARGE)],
)
def test_requests_of_other_sizes_than_they_claim(triton: Server, content_type: str, claimed: int, given: int) -> None:
    """As curl and urllib send bodies too, of which a server of usual stacks dies."""
    body, headers = binary(claimed, bytes(given))
    status, answer = post(triton, "models/made/infer", body, Content_Type=content_type, **headers)
    assert status == 400 and json.loads(answer)["error"], answer


def jpeg(length: int) -> bytes:
    """Of few bytes, which says it has so many columns and rows."""
    file = bytearray(encoded(np.zeros((8, 8, 3), np.uint8), "JPEG"))
    frame = file.index(b"\xff\xc0")
    file[frame + 5 : frame + 9] = length.to_bytes(2, "big") * 2
    return bytes(file)


def png(length: int) -> bytes:
    """Likewise; its data is missing."""
    file = bytearray(encoded(np.zeros((8, 8, 3), np.uint8)))
    file[16:24] = struct.pack(">II", length, length)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    return bytes(file)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"", "image 0: is empty"),
        (b"no image at all", "image 0: is not an image in a format read here"),
        (bytes(range(256)) * 100, "image 0: is not an image"),
        (encoded(made_image(64, 64), "JPEG")[:700], "image 0: cannot be decoded"),
        (encoded(made_image(64, 64), "JPEG")[:-9000:-1], "image 0: is not an image"),
        (b"\xff\xd8\xff\xe0" + bytes(5000), "image 0: "),
        (jpeg(60_000), "image 0: has too many pixels to be safe"),
        (jpeg(10_000), f"image 0: has 10000x10000 pixels, more than {MOST_PIXELS:,}"),
        (png(2**31 - 1), "image 0: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image 0: is not an image"),
        (bytes(MOST_BYTES + 1), f"the image has {MOST_BYTES + 1:,} bytes, more than {MOST_BYTES:,}"),
    ],
    ids="empty text bytes cut reversed head bomb large png postscript file".split(),
)
def test_files_that_are_no_images(triton: Server, file: bytes, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(grpc.InferenceServerException, match=said):
        ask(triton, "files", image=np.array([[file]], object))
    assert time.monotonic() - began < 10


def test_a_bad_file_among_good_ones_is_named(triton: Server) -> None:
    files = [encoded(made_image(40, 60)), b"no image", encoded(made_image(60, 40))]
    with pytest.raises(grpc.InferenceServerException, match="image 1: is not an image"):
        ask(triton, "files", image=np.array(files, object)[:, None])


def test_bombs_take_no_memory(triton: Server) -> None:
    """60,000 x 60,000 pixels would be 10 GB; a hundred of them cost nothing."""
    helpers = children(triton.process.pid)
    before = {one: peak(one) for one in helpers}
    for _ in range(100):
        with pytest.raises(grpc.InferenceServerException, match="too many pixels"):
            ask(triton, "files", image=np.array([[jpeg(60_000)]], object))
    grown = max(peak(one) - before[one] for one in helpers)
    print(f"bombs: the helper with the highest peak grew by {grown / 2**20:.1f} MiB")
    assert grown < 32 << 20


def test_the_largest_image_is_still_served(triton: Server, models: Models) -> None:
    """Just below the limit of pixels, so that the limit is not what refuses ordinary ones."""
    length = int(MOST_PIXELS**0.5)
    file = encoded(np.asarray(Image.new("RGB", (length, length), (90, 120, 60))), "JPEG")
    assert ask(triton, "files", image=np.array([[file]], object))["num_detections"].shape == (1, 1)


def test_elements_of_bytes_that_lie_about_their_length(triton: Server) -> None:
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": 8}}
    header = json.dumps({"inputs": [tensor]}).encode()
    body = header + struct.pack("<I", 2**31) + b"data"
    status, answer = post(triton, "models/files/infer", body, Inference_Header_Content_Length=str(len(header)))
    assert status == 400 and json.loads(answer)["error"], answer
