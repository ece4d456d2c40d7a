"""What a real tritonserver does with the repositories: answers, model control, cache, and starting again after a kill."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import MADE_CFG, ROOT, SHARED, free_ports, head, made_image, make, net, run, thresholds
from test_docs import commands, copy_images, page, run_here
from triton_models import Models, a_program, ask, encoded, portable_model, post, server_of

from darktrt.cli import main
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.serve.config import PythonBackend
from darktrt.serve.program import program_on_path
from darktrt.serve.repository import publish
from darktrt.serve.server import Server, StartOptions, running
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.detector import NetworkDetector

grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient: pip install 'darktrt[serve]'")


def test_tensors_are_answered_as_the_model_does_it(triton: Server, models: Models) -> None:
    with OnnxRunner(models.made) as runner:
        info = runner.info
    images = np.stack([made_image(info.height, info.width, i) for i in range(3)])
    columns = {name: np.repeat(value, 3)[:, None] for name, value in thresholds(0.02).items()}
    found, expected = ask(triton, "made", images=images, **columns), run(models.made, {"images": images, **thresholds(0.02)})
    assert expected["num_detections"].min() > 0 and set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, atol=1e-3, err_msg=name)


def test_a_file_is_posted_and_json_comes_back(triton: Server, models: Models) -> None:
    """By Triton's generate extension, for which curl is enough."""
    image = made_image(150, 210, 5)
    body = json.dumps({"image": base64.b64encode(encoded(image)).decode(), "score_threshold": 0.02}).encode()
    status, answer = post(triton, "models/files/generate", body, content_type="application/json")
    assert status == 200, answer
    with OnnxRunner(models.made) as runner:
        expected = NetworkDetector(runner.run, runner.info, 0.02).detect([image])[0]
    found = json.loads(json.loads(answer)["detections"])
    assert len(found) == len(expected) > 0 and [one["class"] for one in found] == expected.names
    np.testing.assert_allclose([one["box"] for one in found], expected.boxes, atol=0.01)


def test_an_image_with_nothing_in_it(triton: Server) -> None:
    file = np.array([[encoded(np.zeros((50, 50, 3), np.uint8))]], object)
    found = ask(triton, "files", image=file, score_threshold=np.ones((1, 1), np.float32))
    assert found["boxes"].shape == (1, 0, 4) and found["num_detections"] == 0 and found["detections"][0, 0] == b"[]"


def test_a_letterboxed_network_needs_no_sizes_of_files_but_of_tensors(triton: Server) -> None:
    images = np.zeros((1, 3, 64, 96), np.float32)
    with pytest.raises(grpc.InferenceServerException, match="image_size"):
        ask(triton, "letterbox", images=images)
    assert ask(triton, "letterbox", images=images, image_size=np.array([[96, 40]], np.float32))["boxes"].shape[0] == 1


def test_the_metadata_travels_in_the_config(triton: Server, models: Models) -> None:
    with grpc.InferenceServerClient(triton.grpc) as client:
        config = client.get_model_config("made").config
        metadata = client.get_model_metadata("made")
    with OnnxRunner(models.made) as runner:
        assert json.loads(config.parameters["darktrt"].string_value) == json.loads(replace(runner.info, layers=()).to_json())
    assert (metadata.inputs[0].name, list(metadata.inputs[0].shape)) == ("images", [-1, 64, 96, 3])


def test_networks_of_other_classes_side_by_side_loaded_and_unloaded(tmp_path: Path) -> None:
    """Explicit control is off unless models are named; and a model that was not asked for is not there."""
    one = portable_model(make(tmp_path, MADE_CFG))
    cfg = net(64, 64) + "[convolutional]\nfilters=8\nsize=3\nstride=8\npad=1\nactivation=leaky\n\n" + head(classes=1)
    other = portable_model(make(tmp_path, cfg, name="other"))
    for name, path in (("one", one), ("other", other)):
        publish(path, tmp_path / "models", PythonBackend(warmup=False, input="jpeg"), name)
    files = np.array([[encoded(made_image(64, 64))]], object)
    with server_of(tmp_path / "models", StartOptions(models=("one",))) as server:
        assert ask(server, "one", image=files)["boxes"].shape[::2] == (1, 4)
        with pytest.raises(grpc.InferenceServerException, match="unknown model: 'other'"):
            ask(server, "other", image=files)
        with grpc.InferenceServerClient(server.grpc) as client:
            client.load_model("other")
            assert ask(server, "other", image=files, score_threshold=np.zeros((1, 1), np.float32))["classes"].max() == 0
            client.unload_model("one")
            while client.is_model_ready("one"):
                time.sleep(0.05)


def test_clients_may_not_load_models_by_default(triton: Server) -> None:
    with (
        grpc.InferenceServerClient(triton.grpc) as client,
        pytest.raises(grpc.InferenceServerException, match="explicit model load / unload is not allowed"),
    ):
        client.unload_model("made")
    assert ask(triton, "made", images=np.zeros((1, 64, 96, 3), np.uint8))


def test_the_counters_of_the_autoscaler_are_the_time_in_the_queue(triton: Server) -> None:
    """Those that deploy/prometheus-adapter.yaml divides, against the server's statistics."""
    ask(triton, "made", images=np.zeros((3, 64, 96, 3), np.uint8))
    names = set(re.findall(r"rate\((\w+)", (ROOT / "deploy/prometheus-adapter.yaml").read_text(encoding="utf-8")))
    assert names == {"nv_inference_queue_duration_us", "nv_inference_request_success"}
    end = time.monotonic() + 20
    with grpc.InferenceServerClient(triton.grpc) as client:
        while True:  # both lag behind answers
            with urllib.request.urlopen(f"http://{triton.metrics}/metrics", timeout=10) as answer:
                lines = re.findall(r'(?m)^(\w+)\{model="made",version="1"\} (\S+)$', answer.read().decode())
            counters = {name: float(value) for name, value in lines if name in names}
            counted = client.get_inference_statistics("made").model_stats[0].inference_stats
            if counters.get("nv_inference_request_success") == counted.success.count > 0:
                break
            assert time.monotonic() < end, f"{counters} after {counted.success.count} requests"
            time.sleep(0.1)
    rounded = counted.queue.ns / 1e3 - counters["nv_inference_queue_duration_us"]  # down, once for each request
    assert 0 <= rounded <= counted.success.count


def test_the_cache_answers_what_came_before(tmp_path: Path) -> None:
    path = portable_model(make(tmp_path, MADE_CFG))
    publish(path, tmp_path / "models", PythonBackend(cache=True, warmup=False), "made")
    images = made_image(64, 96)[None]
    with server_of(tmp_path / "models", StartOptions(cache_bytes=16 << 20)) as server:
        first, second = (ask(server, "made", images=images) for _ in range(2))
        with grpc.InferenceServerClient(server.grpc) as client:
            counted = client.get_inference_statistics("made").model_stats[0].inference_stats
    assert counted.cache_hit.count == 1 and counted.cache_miss.count == 1
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)


def test_a_server_that_was_killed_leaves_nothing_to_the_next(alone: Path) -> None:
    """Neither processes nor shared memory, and the next one starts at the same ports."""
    with server_of(alone) as server:
        prefix = f"darktrt_127.0.0.1_{server.http.rpartition(':')[2]}_"
        server.process.kill()  # not its helpers, as when memory runs out
        server.process.wait()
        options = StartOptions(
            **{f"{name}_port": int(getattr(server, name).rpartition(":")[2]) for name in ("http", "grpc", "metrics")}
        )
        with running(alone, options, a_program()) as again:
            assert ask(again, "made", images=np.zeros((1, 64, 96, 3), np.uint8))
    end = time.monotonic() + 20
    while processes_of(prefix) and time.monotonic() < end:
        time.sleep(0.2)
    assert not processes_of(prefix) and not list(Path("/dev/shm").glob(f"*{prefix}*"))


def processes_of(prefix: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if prefix in words:
            found.append(words)
    return found


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("1/model.onnx", b"no model", "model.onnx: ONNX Runtime cannot load it"),
        ("config.pbtxt", b"max_batch_size: many", "config.pbtxt: is no config of Triton"),
    ],
)
def test_a_model_that_does_not_load_is_reported(models: Models, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = publish(models.made, tmp_path / "models", PythonBackend(warmup=False), "made")
    (path / name).write_bytes(content)
    with pytest.raises(DarktrtError, match=said), server_of(tmp_path / "models"):
        pass


@pytest.mark.skipif(not (SHARED / "zoo/yolov4-tiny.weights").is_file(), reason="needs the weights of yolov4-tiny in shared/")
def test_real_weights_find_the_dog(tmp_path: Path) -> None:
    from darktrt.convert.export import convert_darknet

    zoo, plain, portable = SHARED / "zoo", tmp_path / "plain.onnx", tmp_path / "portable.onnx"
    convert_darknet(zoo / "yolov4-tiny.cfg", zoo / "yolov4-tiny.weights", plain, size=(416, 416))
    insert_plugins(plain, portable, SurgeryOptions())
    publish(portable, tmp_path / "models", PythonBackend(input="jpeg"))
    with server_of(tmp_path / "models") as server:
        file = np.array([[(SHARED / "data/dog.jpg").read_bytes()]], object)
        found = json.loads(ask(server, "yolov4-tiny", image=file)["detections"][0, 0])
    assert [one["class"] for one in found] == ["dog", "truck", "bicycle", "car"] and found[0]["score"] > 0.8


def test_the_guides_commands(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, but for the ports; and what is posted to the server."""
    copy_images(tmp_path)
    shutil.copy(models.made, tmp_path / "portable.onnx")
    shutil.copy(models.plain, tmp_path / "plain.onnx")
    lines = [shlex.split(line)[1:] for line in commands(page("serving"), "bash") if line.split()[1] in ("surgery", "serve")]
    lines.remove(last := ["serve", "start", "model_repository"])
    assert [line[1] for line in lines] == ["repository", "repository", "doctor", "plain.onnx", "repository"]
    for command in lines:
        done = run_here(command, tmp_path, partial(main, command))
        assert done.returncode == 0, done.stderr
        assert command[1] != "doctor" or done.stdout.count("agrees with ONNX Runtime") == 2
    ports = free_ports(3)
    given = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    a_program()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "darktrt", *last, *given, "--program", "path" if program_on_path() else "pip"]
    start = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert start.stdout and start.stdout.readline().startswith(f"ready: http://127.0.0.1:{ports[0]} and gRPC")
        body = json.dumps({"image": base64.b64encode((ROOT / "docs/astronaut.jpg").read_bytes()).decode()}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{ports[0]}/v2/models/photos/generate", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert isinstance(json.loads(json.loads(answer.read())["detections"]), list)
    finally:
        start.send_signal(signal.SIGINT)
    assert start.communicate(timeout=60)[0] == "stopped\n" and start.returncode == 0
