"""Workers that are threads, files that were sent along, and progress by node; tests/cluster has workers on a cluster."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from darktrt import parallel, progress
from darktrt.check import model
from darktrt.check.evaluation import evaluate
from darktrt.check.ground_truth import load_ground_truth
from darktrt.check.model import detect_by_workers
from darktrt.check.runs import onnx_variant
from darktrt.cli import main
from darktrt.cluster.cluster import Cluster
from darktrt.errors import DarktrtError
from darktrt.files import open_input, read_bytes, sent_files, sha256_of
from darktrt.memory import available_bytes
from darktrt.onnx_session import OnnxSession
from darktrt.parallel import Threads, images_of, in_groups


def doubled(group: Sequence[int]) -> list[int]:
    return [2 * item for item in group]


def make_doubled() -> Callable[[Sequence[int]], list[int]]:
    return doubled


def test_every_group_has_its_result_once() -> None:
    for threads in (Threads(), Threads(1), Threads(3)):
        results = list(threads.results(make_doubled, in_groups(range(25), 4), bytes_each=1))
        assert sorted(item for done in results for item in done.group) == list(range(25))
        assert all(done.result == doubled(done.group) and done.node == "" for done in results)
    assert not list(Threads().results(make_doubled, [], bytes_each=1))


def test_groups_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def groups() -> Iterator[list[int]]:
        for i in range(100):
            taken.append(i)
            yield [i]

    with closing(Threads(1).results(make_doubled, groups(), bytes_each=1)) as results:
        for _ in range(5):
            next(results)
        assert len(taken) <= 8


def test_threads_work_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three groups that wait for one another."""
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0, 1, 2})
    barrier = threading.Barrier(3, timeout=20)
    assert len(list(Threads().results(lambda: lambda _: barrier.wait(), [[1], [2], [3]], bytes_each=1))) == 3


def test_a_gpu_is_at_one_group_at_a_time() -> None:
    at_once, most = threading.Semaphore(1), []

    def work(group: Sequence[int]) -> None:
        most.append(at_once.acquire(blocking=False))
        time.sleep(0.005)
        at_once.release()

    assert len(list(Threads(3).results(lambda: work, in_groups(range(8), 1), bytes_each=1, gpu=True))) == 8
    assert most == [True] * 8


def test_there_are_as_many_threads_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.os, "sched_getaffinity", {0: set(range(16))}.__getitem__)  # of this process
    monkeypatch.setattr(parallel, "available_bytes", lambda: 10 << 30)
    assert [Threads().count(size) for size in (1, 1 << 30, 2 << 30, 100 << 30)] == [16, 5, 2, 1]
    assert Threads(4).count(1) == 4
    assert 1 << 20 < available_bytes() < 1 << 50


def test_an_error_ends_the_rest() -> None:
    begun: list[int] = []

    def work(group: Sequence[int]) -> None:
        begun.append(group[0])
        time.sleep(0.01)
        if group[0] == 3:
            raise DarktrtError("3 is wrong", "skip_bad")

    with pytest.raises(DarktrtError, match="3 is wrong"):
        list(Threads(1).results(lambda: work, in_groups(range(100), 1), bytes_each=1))
    assert len(begun) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker")]


def test_groups_that_have_not_begun_are_left_when_no_more_are_wanted() -> None:
    begun: list[int] = []

    def work(group: Sequence[int]) -> None:
        begun.append(group[0])
        time.sleep(0.1 if group[0] else 0)

    results = Threads(1).results(lambda: work, in_groups(range(9), 1), bytes_each=1)
    next(results)
    results.close()
    assert begun in ([0], [0, 1])


def test_images_of_a_group() -> None:
    assert images_of([Path("a"), (1, Path("b")), "name", 3]) == [Path("a"), Path("b")]


# --- files that were sent along ---


def test_a_file_that_was_sent_is_read_in_place_of_the_disks(tmp_path: Path) -> None:
    path, absent = tmp_path / "a.bin", tmp_path / "absent"
    path.write_bytes(b"disk")
    with sent_files({str(path): b"sent", str(absent): b""}):
        assert read_bytes(path, 10) == b"sent" and read_bytes(absent, 10) == b""
        with sent_files({str(path): b"sent"}):
            pass
        assert sha256_of(path) == hashlib.sha256(b"sent").hexdigest()
        with pytest.raises(DarktrtError, match=r"a\.bin: has 4 bytes, and such a file may have 3"), open_input(path, 3):
            pass
    assert read_bytes(path, 10) == b"disk"
    with pytest.raises(DarktrtError, match="absent: cannot read"):
        read_bytes(absent, 10)


# --- progress and options ---


def test_a_bar_has_the_rate_of_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 14.0, 15.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with progress.progress(20, "images") as bar:
        bar.update(8, "two")
        bar.update(2, "one")
        assert bar.rates() == "one 0.5/s, two 2.0/s"
        assert bar.done == 10


def test_a_cluster_has_positive_numbers() -> None:
    for name, value in (("num_cpus_per_worker", 0), ("workers", -1), ("group_size", 0), ("num_gpus_per_worker", float("nan"))):
        with pytest.raises(DarktrtError, match=name) as raised:
            Cluster(**{name: value})
        assert raised.value.argument == name


def test_without_ray_a_cluster_is_refused(
    monkeypatch: pytest.MonkeyPatch, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["check", "map", str(labelled / "photos"), "--model", f"{labelled}/net.onnx"]
    assert main([*command, "--ray"]) == 2
    assert "Ray is not installed; install it with: pip install 'darktrt[cluster]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ray", "{0}/net.onnx"], "is a file; write --ray behind the data, or --ray=HOST:PORT"),
        (["--ship-images"], "--ship-images and --num-cpus-per-worker belong to --ray"),
        (["--ray", "--num-cpus-per-worker", "0"], "num_cpus_per_worker is 0; it must be above 0 [--num-cpus-per-worker]"),
    ],
)
def test_options_that_do_not_fit(words: list[str], said: str, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", "map", str(labelled / "photos"), "--model", f"{labelled}/net.onnx"]
    assert main([*command, *(word.format(labelled) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_average_precision_is_measured_in_one_thread_an_image(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's cores: another number of threads would move the last bits of a Softplus."""
    opened: list[int] = []

    def session(*arguments: Any, **more: Any) -> OnnxSession:
        opened.append(arguments[2])
        return OnnxSession(*arguments, **more)

    monkeypatch.setattr(model, "OnnxSession", session)
    ground_truth = load_ground_truth([str(labelled / "photos")], onnx_variant(labelled / "net.onnx").info.class_names)
    assert evaluate([onnx_variant(labelled / "net.onnx")], ground_truth).variants[0].metrics.accuracy.ap > 0.8
    assert opened == [1]


def test_batches_do_not_depend_on_the_size_of_groups() -> None:
    """Each has a multiple of the model's batch."""
    seen: list[int] = []

    class Model:
        info, bytes_each, files, gpu, batch = None, 1, (), False, 3

        def make_worker(self) -> Callable[[Sequence[Path]], list[Path]]:
            return lambda group: seen.append(len(group)) or list(group)  # type: ignore[func-returns-value]

    class Four(Threads):
        group_size = 4

    paths = [Path(f"{i}") for i in range(14)]
    assert detect_by_workers(Model(), paths, workers=Four(1)) == paths  # type: ignore[arg-type, comparison-overlap]
    assert seen == [6, 6, 2]
