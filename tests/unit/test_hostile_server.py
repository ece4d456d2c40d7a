"""Servers that answer wrongly, over gRPC and HTTP: each answer is refused in one sentence, of bounded length and size."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from test_detect import NAMES, made_info

from darktrt.errors import DarktrtError
from darktrt.metadata import HeadInfo
from darktrt.serve.client import calls
from darktrt.serve.client.client import Client
from darktrt.serve.config import PythonBackend, make_config

grpc = pytest.importorskip("grpc", reason="needs tritonclient: pip install 'darktrt[serve]'")

HEAD_INFO = HeadInfo("head", 1, ((9.0, 9.0),), (0,), len(NAMES), 1.0, False, 4, 5)
INFO = made_info(input="uint8", head="nms", max_detections=5, batch=(1, 2, 2), heads=(HEAD_INFO,))
IMAGE = np.zeros((20, 30, 3), np.uint8)
MOST = 1 << 20


@dataclass
class Tensor:
    kind: str
    shape: list[Any]
    content: bytes


def tensors(count: int = 2) -> dict[str, Tensor]:
    """A good answer for one image."""
    boxes, scores = np.zeros((1, 5, 4), np.float32), np.full((1, 5), 0.5, np.float32)
    boxes[0, :count] = (1, 2, 9, 8)
    return {
        "num_detections": Tensor("INT32", [1, 1], np.array([[count]], np.int32).tobytes()),
        "boxes": Tensor("FP32", [1, 5, 4], boxes.tobytes()),
        "scores": Tensor("FP32", [1, 5], scores.tobytes()),
        "classes": Tensor("INT32", [1, 5], np.zeros((1, 5), np.int32).tobytes()),
    }


@dataclass
class Http:
    """An answer of the HTTP server, from parts that a test may replace."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    announced: int | None = None
    """The length of the body, where it is another one."""


def inference(answer: dict[str, Tensor]) -> Http:
    outputs = [
        {"name": name, "datatype": one.kind, "shape": one.shape, "parameters": {"binary_data_size": len(one.content)}}
        for name, one in answer.items()
    ]
    head = json.dumps({"model_name": "made", "outputs": outputs}).encode()
    return Http(
        headers={"Inference-Header-Content-Length": str(len(head))}, body=head + b"".join(t.content for t in answer.values())
    )


def config_json() -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    made: dict[str, Any] = MessageToDict(
        make_config("made", INFO, PythonBackend(warmup=False)), preserving_proto_field_name=True
    )
    return made


def as_json(values: Any) -> Http:
    return Http(body=json.dumps(values).encode())


def usual() -> dict[str, Http]:
    """By the end of the path."""
    return {
        "index": as_json([{"name": "made", "version": "1", "state": "READY"}]),
        "config": as_json(config_json()),
        "infer": inference(tensors()),
        "stats": as_json({"model_stats": [{"name": "made", "version": "1", "inference_count": 3}]}),
    }


@contextmanager
def http_server(answers: dict[str, Http]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer = answers[self.path.rpartition("/")[2]]
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(answer.status)
            length = len(answer.body) if answer.announced is None else answer.announced
            for name, value in {"Content-Length": str(length), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)
            self.close_connection = answer.announced is not None

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def grpc_server(answer: dict[str, Tensor], contents: list[bytes] | None = None) -> Iterator[str]:
    """One whose inferences have this answer; or these contents, whatever the outputs say."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    def config(*_: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=make_config("made", INFO, PythonBackend(warmup=False)))

    def infer(*_: Any) -> Any:
        response = service_pb2.ModelInferResponse(model_name="made")
        for name, one in answer.items():
            response.outputs.add(name=name, datatype=one.kind, shape=one.shape)
        response.raw_output_contents.extend(contents or [one.content for one in answer.values()])
        return response

    servicer = service_pb2_grpc.GRPCInferenceServiceServicer()
    servicer.ModelConfig, servicer.ModelInfer = config, infer
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def refusal(call: Callable[[], object]) -> str:
    """What is said of an answer: one line, which can be shown."""
    with pytest.raises(DarktrtError) as caught:
        call()
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1000
    return text


def detect(url: str) -> list[dict[str, Any]]:
    with Client(url, "made", retry_seconds=0) as client:
        return client.detect(IMAGE).to_list()


def test_good_answers_are_read() -> None:
    """The stand-ins answer as Triton does, so that the tests below are of what they change."""
    with http_server(usual()) as url:
        found = detect(url)
        with Client(url) as client:
            assert client.statistics()[0].inferences == 3
    assert [one["box"] for one in found] == 2 * [[pytest.approx(v) for v in found[0]["box"]]]
    with grpc_server(tensors()) as url:
        assert detect(url) == found
    with http_server({**usual(), "infer": inference(tensors(0))}) as url:
        assert detect(url) == []


def changed(name: str, **changes: Any) -> dict[str, Tensor]:
    whole = tensors()
    return {**whole, name: replace(whole[name], **changes)}


NOTHING = np.zeros(0, np.float32).tobytes()
WRONG_OUTPUTS = {
    "missing": ({name: one for name, one in tensors().items() if name != "boxes"}, "it has no output 'boxes', not float32"),
    "none": ({}, "it has no output 'num_detections'"),
    "more rows": (
        changed("boxes", shape=[2, 5, 4], content=bytes(160)),
        r"float32 \[2, 5, 4\] as output 'boxes', not float32 \[1",
    ),
    "fewer rows": (
        changed("scores", shape=[1, 4], content=bytes(16)),
        r"float32 \[1, 4\] as output 'scores', not float32 \[1, 5\]",
    ),
    "no rows": (changed("boxes", shape=[0, 5, 4], content=NOTHING), r"float32 \[0, 5, 4\] as output 'boxes'"),
    "flat": (changed("boxes", shape=[20]), r"float32 \[20\] as output 'boxes'"),
    "scalar": (changed("num_detections", shape=[]), r"int32 \[\] as output 'num_detections'"),
    "type": (changed("classes", kind="FP32"), r"float32 \[1, 5\] as output 'classes', not int32"),
    "unknown type": (changed("classes", kind="FP64\x1b[2J"), r"output 'classes' is FP64\\x1b\[2J, which was not asked for"),
    "text": (changed("classes", kind="BYTES"), "output 'classes' is BYTES, which was not asked for"),
    "bytes too few": (changed("boxes", content=bytes(79)), r"output 'boxes' has the shape \[1, 5, 4\] of FP32, and 79 bytes"),
    "bytes too many": (changed("boxes", content=bytes(81)), "and 81 bytes"),
    "negative": (changed("boxes", shape=[-1, -5, 4]), r"has the shape \[-1, -5, 4\]"),
    "huge": (changed("boxes", shape=[2**62, 2**62, 4]), r"has the shape \[4611686018427387904, 4611"),
    "huge and empty": (changed("boxes", shape=[2**62, 2**62, 0], content=NOTHING), "has the shape"),
    "many dimensions": (changed("boxes", shape=[1] * 70, content=bytes(4)), "output 'boxes'"),
    "count too large": (changed("num_detections", content=np.int32(6).tobytes()), "num_detections"),
    "count negative": (changed("num_detections", content=np.int32(-1).tobytes()), "num_detections"),
    "no numbers": (changed("boxes", content=np.full(20, np.nan, np.float32).tobytes()), "boxes must be finite"),
    "other classes": (changed("classes", content=np.full(5, 99, np.int32).tobytes()), "class"),
}


@pytest.mark.parametrize("name", WRONG_OUTPUTS)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_outputs_that_are_not_those_of_the_model(name: str, protocol: str) -> None:
    answer, said = WRONG_OUTPUTS[name]
    server = grpc_server(answer) if protocol == "grpc" else http_server({**usual(), "infer": inference(answer)})
    with server as url:
        assert_said(refusal(lambda: detect(url)), said)


def assert_said(text: str, said: str) -> None:
    with pytest.raises(DarktrtError, match=said):
        raise DarktrtError(text)


def test_outputs_without_content() -> None:
    with grpc_server(tensors(), [b""]) as url:
        assert_said(refusal(lambda: detect(url)), "it has no output 'num_detections'")


GOOD = inference(tensors())
HEAD = int(GOOD.headers["Inference-Header-Content-Length"])


def with_head(old: bytes, new: bytes) -> Http:
    head = GOOD.body[:HEAD].replace(old, new)
    return Http(headers={"Inference-Header-Content-Length": str(len(head))}, body=head + GOOD.body[HEAD:])


DEEP = b"[" * 100_000
WRONG_BODIES = {
    "nothing": (Http(), "is damaged or no JSON"),
    "no JSON": (Http(body=b"<html>\x1b[2J"), "is damaged or no JSON"),
    "deep": (Http(body=DEEP), "nested too deeply"),
    "no object": (as_json([1]), r"\[1\] is no object"),
    "no outputs": (as_json({}), "None is no list"),
    "outputs of numbers": (as_json({"outputs": [1]}), "1 is no object"),
    "no length of the head": (replace(GOOD, headers={}), "is damaged or no JSON"),
    "a length of nonsense": (replace(GOOD, headers={"Inference-Header-Content-Length": "-5"}), "is damaged or no JSON"),
    "a huge length": (replace(GOOD, headers={"Inference-Header-Content-Length": "9" * 30}), "is damaged or no JSON"),
    "a short length": (replace(GOOD, headers={"Inference-Header-Content-Length": "5"}), "is damaged or no JSON"),
    "huge size": (with_head(b'size": 80', b'size": 8000000000'), "an output has 8000000000 bytes, and 120 are left"),
    "negative size": (with_head(b'size": 80', b'size": -80'), "an output has -80 bytes"),
    "size of text": (with_head(b'size": 80', b'size": "80"'), "an output has '80' bytes"),
    "size of a list": (with_head(b'size": 80', b'size": [80]'), r"an output has \[80\] bytes"),
    "no size": (with_head(b'{"binary_data_size": 80}', b"7"), "it has no output 'boxes'"),
    "beyond 64 bits": (with_head(b'size": 80', b'size": ' + b"9" * 5000), "beyond 64 bits"),
    "shape of text": (with_head(b"[1, 5, 4]", b'"ab"'), "has the shape 'ab'"),
    "sizes of text": (with_head(b"[1, 5, 4]", b'["1", 5, 4]'), r"has the shape \['1', 5, 4\]"),
    "no shape": (with_head(b'"shape": [1, 5, 4],', b""), "has the shape None"),
    "cut off": (replace(GOOD, announced=len(GOOD.body) + 9), "cannot be reached"),
    "too long": (replace(GOOD, body=GOOD.body + bytes(2 * MOST)), f"it has more than {MOST:,} bytes"),
    "elsewhere": (Http(307, {"Location": "/v2/models/made/infer"}), "307"),
    "an error of nonsense": (Http(400, body=b'{"error": 7}'), "7"),
    "an error without JSON": (Http(418, body=b"\x1b[2J" + b"x" * 100_000), r"\\x1b\[2Jxxx"),
    "an error without a word": (Http(418), "418 I'm a Teapot"),
    "compressed": (
        replace(GOOD, headers={**GOOD.headers, "Content-Encoding": "gzip"}, body=b"\x1f\x8b"),
        "is damaged or no JSON",
    ),
}


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_bodies_that_are_no_inference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, said = WRONG_BODIES[name]
    monkeypatch.setattr(calls, "LARGEST_ANSWER", MOST)
    with http_server({**usual(), "infer": answer}) as url:
        assert_said(refusal(lambda: detect(url)), said)


def changed_config(**changes: Any) -> Http:
    return as_json({**config_json(), **changes})


def metadata(**changes: Any) -> Http:
    values = config_json()
    info = json.loads(values["parameters"]["darktrt"]["string_value"])
    values["parameters"]["darktrt"]["string_value"] = json.dumps(info | changes)
    return as_json(values)


IMAGES = {"name": "images", "data_type": "TYPE_UINT8", "dims": [20, 30, 3]}
WRONG_CONFIGS = {
    "list": (as_json([]), r"\[\] is no object"),
    "null": (as_json(None), "None is no object"),
    "no parameters": (changed_config(parameters=3), "has no darktrt metadata"),
    "text for a parameter": (changed_config(parameters={"darktrt": "x"}), "has no darktrt metadata"),
    "number for a text": (changed_config(parameters={"darktrt": {"string_value": 5}}), "has no darktrt metadata"),
    "long name": (changed_config(name="\x1b[2J" + "x" * 100_000, parameters={}), r"model '\\x1b\[2Jxxx"),
    "damaged metadata": (metadata(batch=7), "the darktrt metadata is damaged"),
    "batch": (changed_config(max_batch_size="many"), "its configuration is damaged"),
    "negative batch": (changed_config(max_batch_size=-3), "max_batch_size is -3"),
    "no tensors": (changed_config(input=None), "the tensors are None"),
    "no inputs": (changed_config(input=[]), "max_batch_size is 2, the inputs are"),
    "input of numbers": (changed_config(input=[1]), "a tensor is 1"),
    "no dims": (changed_config(input=[{**IMAGES, "dims": []}]), "a tensor is"),
    "dims of text": (changed_config(input=[{**IMAGES, "dims": ["x"]}]), "its configuration is damaged"),
    "dims of floats": (changed_config(input=[{**IMAGES, "dims": [1.5]}]), "1.5 is no whole number"),
    "huge images": (changed_config(input=[{**IMAGES, "dims": [2**40, 2**20, 3]}]), "images of its input have"),
    "huge outputs": (
        changed_config(output=[{"name": "boxes", "data_type": "TYPE_FP32", "dims": [2**60, 4]}]),
        "its outputs for a batch of 1 have",
    ),
    "unknown type": (changed_config(output=[{"name": "boxes", "data_type": "TYPE_X", "dims": [1]}]), "'boxes' is TYPE_X"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_descriptions_that_are_of_no_detector(name: str) -> None:
    answer, said = WRONG_CONFIGS[name]
    with http_server({**usual(), "config": answer}) as url:
        assert_said(refusal(lambda: Client(url, "made")), said)


WRONG_INDEXES = {
    "object": (as_json({}), r"\{\} is no list"),
    "numbers": (as_json([1]), "1 is no object"),
    "without names": (as_json([{}, {"name": "made"}]), "has the models , made; name one"),
    "many": (as_json([{"name": f"\x1b{i:099}"} for i in range(1000)]), r"has the models \\x1b000"),
}


@pytest.mark.parametrize("name", WRONG_INDEXES)
def test_lists_of_models_that_are_none(name: str) -> None:
    answer, said = WRONG_INDEXES[name]
    with http_server({**usual(), "index": answer}) as url:
        assert_said(refusal(lambda: Client(url)), said)


WRONG_STATISTICS = {
    "list": (as_json([]), r"\[\] is no object"),
    "no list": (as_json({"model_stats": {}}), r"\{\} is no list"),
    "text": (as_json({"model_stats": [{"inference_count": "x"}]}), "the answer is damaged"),
    "inner": (as_json({"model_stats": [{"inference_stats": 7}]}), "'success' is None"),
    "spent": (as_json({"model_stats": [{"inference_stats": {"fail": [1]}}]}), r"'fail' is \[1\]"),
}


@pytest.mark.parametrize("name", WRONG_STATISTICS)
def test_statistics_that_are_none(name: str) -> None:
    answer, said = WRONG_STATISTICS[name]
    with http_server({**usual(), "stats": answer}) as url, Client(url, "made") as client:
        assert_said(refusal(client.statistics), said)
