"""A real Ray cluster of several nodes on this machine: equal bits whatever the workers, and everything that can die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cluster_workers as made_workers
import pytest
from helpers import ROOT, Made, labelled_images, made_image
from PIL import Image

import darktrt
from darktrt.calib.file import partial_path, read_calibration
from darktrt.check.detections import VariantDetections, detect_variant
from darktrt.check.ground_truth import GroundTruth, load_ground_truth
from darktrt.check.model import detect_by_workers
from darktrt.check.runs import Variant, onnx_variant
from darktrt.check.sensitivity import sensitivity
from darktrt.cluster import dispatch
from darktrt.cluster.cluster import Cluster, connected
from darktrt.engine.manifest import Manifest, manifest_path
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.onnx_session import OnnxSession
from darktrt.parallel import Done, Threads, Workers, in_groups
from darktrt.pipeline import load_calibration
from darktrt.vision.detector import NetworkDetector

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ray'")

NODES = ("one", "two")


class Nodes:
    """The nodes of a cluster, as processes of this machine: a head without cores, and :data:`NODES` with three each, the first
    with two GPUs."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(Path(__file__).parent.parent)])
        self._ray = RayCluster()
        self._ray.add_node(num_cpus=0, node_name="head", object_store_memory=100 << 20)
        for name in NODES:
            self.add(name, gpus=2 * (name == NODES[0]))
        self.address = self._ray.address

    def add(self, name: str, cpus: int = 3, gpus: int = 0, **environment: str) -> Any:
        variables = {"TEST_NODE": name, **environment}
        memory = 100 << 20
        return self._ray.add_node(num_cpus=cpus, num_gpus=gpus, node_name=name, object_store_memory=memory, env_vars=variables)

    def kill(self, node: Any) -> None:
        self._ray.remove_node(node, allow_graceful=False)

    @contextlib.contextmanager
    def another(self, name: str, cpus: int = 2, **environment: str) -> Iterator[Any]:
        """One more node in the block."""
        node = self.add(name, cpus, **environment)
        try:
            yield node
        finally:
            if node in self._ray.list_all_nodes():
                self._ray.remove_node(node)
                self._wait_until_gone(name)

    def _wait_until_gone(self, name: str) -> None:
        import ray

        deadline = time.monotonic() + 30
        while any(node["Alive"] and node["NodeName"] == name for node in ray.nodes()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._ray.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    before = os.environ.get("PYTHONPATH", "")
    started = Nodes()
    connected(started.address)
    yield started
    started.close()
    os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def files(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``labelled``, with 24 more images in ``many``."""
    folder = labelled_images(made, tmp_path_factory.mktemp("cluster"))
    (folder / "many").mkdir()
    for i in range(24):
        Image.fromarray(made_image(96 + i, 160, seed=i)).save(folder / "many" / f"{i}.png")
    return folder


def squares_of(
    workers: Workers, make_worker: Any = None, number: int = 40, after: Callable[[list[Done[int, Any]]], None] | None = None
) -> list[Done[int, Any]]:
    """Spread numbers in twos, and see that each has its square once; ``after`` is called with the first three results."""
    results: list[Done[int, Any]] = []
    groups = in_groups(range(number), 2)
    for done in workers.results(make_worker or partial(made_workers.squares, 0.05), groups, bytes_each=1 << 20):
        results.append(done)
        if after and len(results) == 3:
            after(results)
    assert sorted(square for done in results for square, _ in done.result) == [i * i for i in range(number)]
    return results


# --- who dies ---


def test_a_worker_that_is_killed_costs_its_groups_again(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    squares_of(Cluster(nodes.address, workers=2), after=lambda results: os.kill(results[-1].result[0][1], signal.SIGKILL))
    assert "a worker died because its process ended; others do its" in caplog.text


def test_a_node_that_is_killed_costs_its_groups_again(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    with nodes.another("four", cpus=4) as four:
        results = squares_of(Cluster(nodes.address), partial(made_workers.squares, 0.3), 80, lambda _: nodes.kill(four))
    assert not {done.node for done in results} - {*NODES, "four"}


def test_a_worker_without_memory_costs_its_groups_again(nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ray kills it before the machine's memory is used up; the node's limit is somewhat above what is used now."""
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    limit = 1 - (sizes["MemAvailable"] - (3 << 20)) / sizes["MemTotal"]  # 3 GiB more
    with nodes.another("small", 1, RAY_memory_usage_threshold=f"{limit:.3f}", RAY_memory_monitor_refresh_ms="100"):
        squares_of(Cluster(nodes.address), partial(made_workers.hungry, str(tmp_path)), 200)
    assert (tmp_path / "small.took").exists()
    assert "node small: a worker died because its node ran out of memory" in caplog.text


def test_a_group_that_kills_its_workers_is_given_up(nodes: Nodes) -> None:
    with pytest.raises(DarktrtError, match=r"^14: 3 workers died at it or at the 1 items behind it, the last on "):
        squares_of(Cluster(nodes.address, workers=2), partial(made_workers.deadly, 15))


def test_what_a_worker_raises_names_its_node(nodes: Nodes) -> None:
    with pytest.raises(DarktrtError, match=r"^node (one|two): \d+: is wrong$") as raised:
        squares_of(Cluster(nodes.address, workers=1), made_workers.wrong)
    assert raised.value.argument == "skip_bad"
    with pytest.raises(ZeroDivisionError):
        squares_of(Cluster(nodes.address, workers=1), made_workers.bug)


def test_what_a_worker_warns_of_is_logged_here(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    squares_of(Cluster(nodes.address, workers=1), made_workers.warning, 8)
    said = {record.getMessage().partition(": ")[2] for record in caplog.records if record.name == "darktrt"}
    assert said == {f"item {i} is odd" for i in range(0, 8, 2)}


# --- nodes that do not fit ---


def test_an_old_darktrt_on_a_node_is_refused_by_its_name(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / "darktrt"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.0.9"\n')
    (tmp_path / "sitecustomize.py").write_text("import darktrt\n")  # Ray puts the driver's folder in front
    path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
    with nodes.another("old", PYTHONPATH=path):
        with pytest.raises(DarktrtError, match=r"^node old: has darktrt 0\.0\.9, and here is 0\.1\.0; install the"):
            squares_of(Cluster(nodes.address))


def test_an_old_node_that_joins_later_gets_no_work(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import numpy\nfrom importlib import metadata\nmetadata.version = lambda _: '1.0'\n"
    )
    monkeypatch.setattr(dispatch, "_LOOK_SECONDS", 0.2)
    with contextlib.ExitStack() as stack:
        path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
        results = squares_of(
            Cluster(nodes.address),
            partial(made_workers.squares, 0.5),
            60,
            lambda _: stack.enter_context(nodes.another("late", PYTHONPATH=path)),
        )
    assert {done.node for done in results} <= {*NODES}
    assert "node late: has onnxruntime 1.0, and here is" in caplog.text and "it gets no work" in caplog.text


def test_a_worker_must_fit_somewhere(nodes: Nodes) -> None:
    with pytest.raises(DarktrtError, match=r"a worker takes 9 CPUs, and no node of the cluster has them \(") as raised:
        squares_of(Cluster(nodes.address, num_cpus_per_worker=9))
    assert raised.value.argument == "num_cpus_per_worker"


# --- images and files ---


def test_images_and_files_are_sent_along(nodes: Nodes, tmp_path: Path) -> None:
    """A worker deletes what it is to read; what it reads then was sent."""
    paths = [tmp_path / f"{i}.bin" for i in range(12)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    (tmp_path / "model").write_bytes(b"model")
    found = {}
    cluster = Cluster(nodes.address, ship_images=True)
    make_worker = partial(made_workers.contents, [tmp_path / "model"])
    for done in cluster.results(make_worker, in_groups(paths, 3), bytes_each=1 << 20, files=[tmp_path / "model"]):
        found.update(zip(done.group, done.result, strict=False))
        assert done.result[-1] == b"model"
    assert found == {path: bytes([i]) * 1000 for i, path in enumerate(paths)}


def test_images_that_a_node_lacks_are_named(nodes: Nodes, tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match=r"node \w+: .*0\.bin: is not on this node; name images by a path that") as raised:
        list(Cluster(nodes.address).results(partial(made_workers.contents, []), [[tmp_path / "0.bin"]], bytes_each=1))
    assert raised.value.argument == "ship_images"


# --- the same bits ---


def bits(found: VariantDetections, truth: GroundTruth) -> bytes:
    rows = [(one.boxes.tobytes(), one.scores.tobytes(), one.class_ids.tobytes()) for one in found.in_order(truth.digests)]
    return repr(rows).encode()


def unlabelled(folder: Path, variant: Variant) -> GroundTruth:
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("0 0.5 0.5 0.2 0.2\n")
    return load_ground_truth([str(folder)], variant.info.class_names)


def test_detections_are_those_of_one_machine(nodes: Nodes, files: Path) -> None:
    """A network with Mish, whose last bits depend on the number of ONNX Runtime's threads."""
    variant = onnx_variant(files / "net.onnx")
    truth = unlabelled(files / "many", variant)
    plain = bits(detect_variant(variant, truth, Threads(1)), truth)
    assert plain == bits(detect_variant(variant, truth), truth)
    for workers in (1, 3):
        cluster = Cluster(nodes.address, workers=workers, group_size=3, ship_images=workers == 3)
        assert plain == bits(detect_variant(variant, truth, cluster), truth), workers
    wide = Cluster(nodes.address, num_cpus_per_worker=2, group_size=5)
    assert plain == bits(detect_variant(variant, truth, wide), truth)


def test_relative_paths_are_those_of_the_driver(nodes: Nodes, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files / "many")
    model = onnx_variant(files / "net.onnx").model
    assert model and len(detect_by_workers(model, [Path("1.png")], workers=Cluster(nodes.address))) == 1


def test_a_sensitivity_is_that_of_one_machine(nodes: Nodes, files: Path) -> None:
    calibration = load_calibration(files / "my.calib")
    arguments = (files / "net.onnx", [str(files / "photos")], calibration, 4, 0, None)
    plain = sensitivity(*arguments)
    assert sensitivity(*arguments, Cluster(nodes.address, workers=3)).to_json() == plain.to_json()


def test_average_precision_by_convolution_is_that_of_one_machine(nodes: Nodes, files: Path) -> None:
    calibration = load_calibration(files / "my.calib")
    arguments = (files / "net.onnx", [str(files / "photos")], calibration, 2, 0, str(files / "photos"))
    plain = sensitivity(*arguments)
    assert (
        plain.accuracy and sensitivity(*arguments, Cluster(nodes.address, group_size=2, workers=2)).to_json() == plain.to_json()
    )


def test_a_corrupt_image_names_its_node(nodes: Nodes, files: Path, tmp_path: Path) -> None:
    variant = onnx_variant(files / "net.onnx")
    for i in range(6):
        Image.fromarray(made_image(64, 96, seed=i)).save(tmp_path / f"{i}.png")
    truth = unlabelled(tmp_path, variant)
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:-40])
    with pytest.raises(DarktrtError, match=r"^node (one|two): .*/4\.png: "):
        detect_variant(variant, truth, Cluster(nodes.address, group_size=2))


def test_an_engine_runs_on_the_gpus(nodes: Nodes, files: Path, tmp_path: Path) -> None:
    """TensorRT is a stand-in; the plan and its manifest are sent along, and batches are those of one machine."""
    content = (files / "net.onnx").read_bytes()
    (tmp_path / "net.plan").write_bytes(content)
    info = onnx_variant(files / "net.onnx").info
    manifest = Manifest(sha256_of(tmp_path / "net.plan"), "0" * 64, "TensorRT 8.6.0", "GPU", "fp32", (), 1.0, info)
    manifest_path(tmp_path / "net.plan").write_text(manifest.to_json())
    paths = sorted((files / "many").glob("*.png"))
    detector = NetworkDetector(OnnxSession(content, "plan", threads=1).run, info, 0.001, 0.45)
    expected = [found for batch in detector.detect_batches(in_groups(paths, 3)) for found in batch]
    model = made_workers.StandInEngine(info, tmp_path / "net.plan")
    found = detect_by_workers(model, paths, workers=Cluster(nodes.address, group_size=1))
    with pytest.raises(DarktrtError, match=r"a worker takes 1 CPUs and 3 GPUs, and no node of the cluster has them"):
        detect_by_workers(model, paths, workers=Cluster(nodes.address, num_gpus_per_worker=3))
    assert [one.scores.tobytes() + one.boxes.tobytes() for one in found] == [
        one.scores.tobytes() + one.boxes.tobytes() for one in expected
    ]


# --- calibration ---


@pytest.fixture(scope="module", autouse=True)
def _several_groups_in_each_pass() -> Iterator[None]:
    """Of the network's few convolutions too, so that a worker can be killed between two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("darktrt.check.sensitivity._VARIANTS", 1)
        yield


@pytest.fixture(scope="module")
def plain(files: Path) -> bytes:
    """The calibration of one machine."""
    return calibrated(files, files / "plain.calib", None)


def calibrated(files: Path, output: Path, workers: Workers | None, resume: bool = False) -> bytes:
    options = darktrt.CalibrationOptions(bias_images=8, fp_layer_images=4, resume=resume)
    darktrt.calibrate(files / "net.onnx", [files / "many"], output, options, cluster=workers)
    return output.read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_calibration_is_that_of_one_machine(nodes: Nodes, files: Path, plain: bytes, tmp_path: Path, workers: int) -> None:
    cluster = Cluster(nodes.address, workers=workers, group_size=2, ship_images=workers == 1)
    killing = Killing(cluster, passes=3 if workers == 3 else 0)
    assert calibrated(files, tmp_path / "cluster.calib", killing) == plain
    assert killing.killed == killing.passes


class Killing:
    """A cluster of which a worker is killed in the first passes, when it has results."""

    def __init__(self, cluster: Cluster, passes: int) -> None:
        self.cluster, self.passes, self.killed, self.group_size = cluster, passes, 0, cluster.group_size

    def results(self, make_worker: Any, groups: Any, **more: Any) -> Iterator[Done[Any, Any]]:
        work = self.cluster.results(partial(made_workers.with_process, make_worker), groups, **more)
        with contextlib.closing(work):
            for i, done in enumerate(work):
                result, process = done.result
                if i == 1 and self.killed < self.passes:
                    os.kill(process, signal.SIGKILL)
                    self.killed += 1
                yield Done(done.group, result, done.node)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_goes_on(nodes: Nodes, files: Path, plain: bytes, tmp_path: Path, number: int) -> None:
    """What it counted is in the file for --resume; Ctrl-C keeps all of it."""
    output = tmp_path / "net.calib"
    arguments = [nodes.address, str(files / "net.onnx"), str(files / "many"), str(output)]
    driver = subprocess.Popen([sys.executable, str(Path(__file__).with_name("killed_driver.py")), *arguments])
    deadline = time.monotonic() + 120
    while not partial_path(output).exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(number)
    assert driver.wait(60) and not output.exists()
    counted = len(read_calibration(partial_path(output)).histograms.images)
    assert 4 <= counted < 24
    assert calibrated(files, output, Cluster(nodes.address, workers=2, group_size=4), resume=True) == plain
    assert not partial_path(output).exists()
