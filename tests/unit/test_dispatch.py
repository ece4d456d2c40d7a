"""The nodes and workers of a cluster, with a stand-in for Ray; tests/cluster has a real one."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from darktrt.cluster import cluster as cluster_module
from darktrt.cluster import dispatch, nodes, probe
from darktrt.cluster.actor import Actor, Job, Outcome
from darktrt.cluster.cluster import Cluster, connected
from darktrt.cluster.dispatch import Dispatch
from darktrt.cluster.nodes import WORKER_BYTES, Need, Node, Staff, VersionCheck, living_nodes
from darktrt.errors import DarktrtError
from darktrt.files import read_bytes
from darktrt.progress import LOGGER

GIB = 1 << 30
VERSIONS = {"darktrt": "1", "sources": "ab", "onnxruntime": "1.2", "numpy": "2", "pillow": "11", "processor": "avx"}


class RayError(Exception):
    """Ray's own, of any kind."""


class RayTaskError(RayError):
    """The worker's function raised."""


class OutOfMemoryError(RayError):
    """Ray ended the worker, for its node had no more memory."""


class Reference:
    """Of a result to come, which is computed when it is first asked for."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute, self._value = compute, None

    @property
    def known(self) -> bool:
        return self._value is not None

    def value(self) -> Any:
        if self._value is None:
            try:
                self._value = self._compute()
            except RayError as error:
                self._value = error
        if isinstance(self._value, RayError):
            raise self._value
        return self._value


def remote(function: Callable[..., Any]) -> Any:
    return SimpleNamespace(remote=lambda *arguments: Reference(lambda: function(*arguments)))


def machine(name: str = "one", cpus: float = 2, gpus: float = 0, memory: float = 64 * GIB, **more: Any) -> dict[str, Any]:
    """A node, as ``ray.nodes()`` has it."""
    resources = {"CPU": cpus, "GPU": gpus, "memory": memory}
    words = {"NodeID": f"{name}-0123456789", "NodeName": name, "NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "host"}
    return {"Alive": True, "Resources": resources, **words, **more}


@dataclass
class Ray:
    """The module, connected: everything is computed as it is taken, the latest first."""

    alive: list[dict[str, Any]] = field(default_factory=lambda: [machine()])
    work: Callable[..., Any] = lambda group, _: [2 * item for item in group]
    versions: dict[str, Any] = field(default_factory=dict)
    """By the id of a node, where they are not those here."""
    asked: list[str] = field(default_factory=list)
    hired: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    killed: list[Any] = field(default_factory=list)
    given: list[tuple[str, Any, Any]] = field(default_factory=list)
    """The node, group and contents of every task that was done."""
    handed_out: list[tuple[Any, list[Any]]] = field(default_factory=list)
    """Every group, and the others that its worker had then."""
    most_under_way: int = 0
    waited: set[Any] = field(default_factory=set)
    timeouts: list[float] = field(default_factory=list)
    exceptions: Any = field(
        default_factory=lambda: SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, OutOfMemoryError=OutOfMemoryError)
    )
    cloudpickle: Any = field(
        default_factory=lambda: SimpleNamespace(
            register_pickle_by_value=lambda _: None, unregister_pickle_by_value=lambda _: None
        )
    )

    def nodes(self) -> list[dict[str, Any]]:
        return self.alive

    def put(self, value: Any) -> Any:
        return value

    def remote(self, what: Any) -> Any:
        return SimpleNamespace(options=self._hire if what is Actor else self._ask)

    def _ask(self, **options: Any) -> Any:
        where = options.pop("scheduling_strategy").node_id
        assert options == {"num_cpus": 0, "max_retries": 1}  # also a node whose cores are all in use answers
        self.asked.append(where)
        return remote(lambda: self._result(lambda: self.versions.get(where, VERSIONS)))

    def _hire(self, **options: Any) -> Any:
        where = options.pop("scheduling_strategy").node_id
        self.hired.append((where, options))

        def start(group: Any, contents: Any) -> Any:
            self.given.append((where, group, contents))
            return self._result(lambda: self.work(group, contents))

        references: list[tuple[Any, Reference]] = []

        def hand_out(group: Any, contents: Any) -> Reference:
            self.handed_out.append((group, [other for other, reference in references if not reference.known]))
            references.append((group, Reference(lambda: start(group, contents))))
            return references[-1][1]

        actor = SimpleNamespace(open=remote(lambda: Outcome(None, False, [])), work=SimpleNamespace(remote=hand_out))
        return SimpleNamespace(remote=lambda job: actor if job else None)

    @staticmethod
    def _result(function: Callable[[], Any]) -> Any:
        value = function()
        if isinstance(value, BaseException):
            raise value
        return value if isinstance(value, Outcome | dict) else Outcome(value, False, [])

    def wait(self, references: list[Any], num_returns: int = 1, timeout: float = 0) -> Any:
        assert references and num_returns
        self.timeouts.append(timeout)
        self.waited.update(references)
        self.most_under_way = max(self.most_under_way, len(references))
        return references[-num_returns:], references[:-num_returns]

    def get(self, reference: Reference, timeout: float = 0) -> Any:
        if reference not in self.waited:
            raise RayError("it is not ready")
        return reference.value()

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The strategy that names a node, no waiting, and no node known from another test."""
    strategies: Any = ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node_id, soft: SimpleNamespace(node_id=node_id) if not soft else None
    for name in ("ray", "ray.util"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, strategies.__name__, strategies)
    monkeypatch.setattr(VersionCheck, "_known", {})
    monkeypatch.setattr(probe, "node_versions", lambda: VERSIONS)
    sleeps: list[float] = []
    clock = iter(range(0, 10**6, 3))  # the nodes are looked at every time
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=sleeps.append))
    return sleeps


# --- nodes ---


def test_living_nodes_have_names_and_room() -> None:
    """By name; that of the host where none was given, with a part of the id where two would be alike."""
    other = {"NodeName": "10.0.0.1", "NodeID": "ffffffff"}
    ray = Ray([machine("two", cpus=5), machine("one"), machine("dead", Alive=False), machine(**other), machine(NodeName="")])
    found = living_nodes(ray, Need(2, 0, 0))
    assert [(node.name, node.room) for node in found] == [("host/ffffff", 1), ("host/one-01", 1), ("one", 1), ("two", 2)]
    assert found[3].id == "two-0123456789"


@pytest.mark.parametrize(
    ("resources", "need", "room"),
    [
        ({"CPU": 7, "memory": 64 * GIB}, Need(2, 0, 0), 3),
        ({"CPU": 7, "GPU": 2, "memory": 64 * GIB}, Need(1, 0.5, 0), 4),
        ({"CPU": 7, "memory": 64 * GIB}, Need(1, 1, 0), 0),
        ({"GPU": 1, "memory": 64 * GIB}, Need(1, 0, 0), 0),
        ({"CPU": 7, "memory": 4.0 * (GIB + WORKER_BYTES)}, Need(1, 0, GIB), 4),
        ({"CPU": 7, "memory": 4.0 * (GIB + WORKER_BYTES) - 1}, Need(1, 0, GIB), 3),
        ({"CPU": 7, "memory": 1}, Need(1, 0, GIB), 1),  # it is tried at least
        ({"CPU": 7}, Need(1, 0, GIB), 1),
    ],
)
def test_room_is_what_cpus_gpus_and_memory_suffice_for(resources: dict[str, float], need: Need, room: int) -> None:
    """A worker's libraries take half a GiB besides its work."""
    assert WORKER_BYTES == GIB // 2
    (found,) = living_nodes(Ray([machine(Resources=resources)]), need)
    assert found.room == room


def test_a_need_in_words() -> None:
    assert str(Need(2, 0, 5)) == "2 CPUs" and str(Need(1, 0.5, 5)) == "1 CPUs and 0.5 GPUs"


ONE, TWO = Node("one-id", "one", 2), Node("two-id", "two", 3)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({}, ""),
        ({"onnxruntime": "1.3"}, "node one: has onnxruntime 1.3, and here is 1.2; install the same version on every node"),
        ({"pillow": ""}, "node one: has no pillow, and here is 11; install the same version on every node"),
        ({"sources": "cd"}, "node one: has darktrt 1 with other source files than here; install the same one"),
        ({"darktrt": "2", "sources": "cd"}, "node one: has darktrt 2, and here is 1; install the same version on every node"),
    ],
)
def test_nodes_must_compute_the_same_bits(there: dict[str, str], said: str) -> None:
    ray = Ray(versions={"one-id": {**VERSIONS, **there}})
    for _ in range(2):
        assert VersionCheck(ray).differences([ONE, TWO]) == {"one-id": said, "two-id": ""}
    assert ray.asked == ["one-id", "two-id"]  # once
    assert ray.timeouts == [120]


def test_a_package_that_is_missing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "node_versions", lambda: {**VERSIONS, "numpy": ""})
    (said,) = VersionCheck(Ray(versions={"one-id": VERSIONS})).differences([ONE]).values()
    assert said == "node one: has numpy 2, and here is none; install the same version on every node"


def test_another_kind_of_processor_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    ray = Ray(versions={"one-id": {**VERSIONS, "processor": "avx avx2"}})
    for _ in range(2):
        assert VersionCheck(ray).differences([ONE, TWO]) == {"one-id": "", "two-id": ""}
    (message,) = caplog.messages
    assert message.startswith("node one: has another kind of processor than this machine")


def test_a_node_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    ray = Ray(versions={"one-id": RayError("gone")})
    assert VersionCheck(ray).differences([ONE, TWO]) == {"two-id": ""}
    ray.versions.clear()
    assert VersionCheck(ray).differences([ONE]) == {"one-id": ""}
    assert ray.asked == ["one-id", "two-id", "one-id"]


def test_an_unfit_node_is_refused_at_first_and_left_out_later(caplog: pytest.LogCaptureFixture) -> None:
    ray = Ray(versions={"one-id": {**VERSIONS, "numpy": "1"}})
    staff = Staff(ray, Need(1, 0, 0))
    with pytest.raises(DarktrtError, match="node one: has numpy 1, and here is 2"):
        staff.usable([ONE, TWO], True)
    for _ in range(2):
        assert staff.usable([ONE, TWO, replace(TWO, id="full", room=0)], False) == [TWO]
    assert caplog.messages == ["node one: has numpy 1, and here is 2; install the same version on every node; it gets no work"]
    assert "full" not in ray.asked


def test_a_node_where_workers_do_not_begin_gets_no_more() -> None:
    """After three deaths; workers that had loaded the model do not count."""
    staff = Staff(Ray(), Need(1, 0, 0))
    for opened, left in ((False, [ONE, TWO]), (True, [ONE, TWO]), (False, [ONE, TWO]), (False, [TWO])):
        staff.note_death(ONE, RayError(), opened)
        assert staff.usable([ONE, TWO], False) == left
    staff.check_room([ONE, TWO])
    with pytest.raises(DarktrtError, match="no node is left that a worker stays alive on; the last one died because its proc"):
        staff.check_room([ONE])


@pytest.mark.parametrize(
    ("need", "argument", "words"),
    [(Need(3, 0, 0), "num_cpus_per_worker", "3 CPUs"), (Need(1, 2, 0), "num_gpus_per_worker", "1 CPUs and 2 GPUs")],
)
def test_a_worker_that_fits_nowhere_is_refused(need: Need, argument: str, words: str) -> None:
    full = [replace(ONE, room=0), replace(TWO, room=0)]
    for alive, listed in ((full, "one, two"), ([], "there is none")):
        with pytest.raises(DarktrtError) as caught:
            Staff(Ray(), need).check_room(alive)
        assert str(caught.value) == f"a worker takes {words}, and no node of the cluster has them ({listed})"
        assert caught.value.argument == argument
    Staff(Ray(), need).check_room([*full, ONE])


def test_workers_start_where_there_are_fewest() -> None:
    staff = Staff(Ray(), Need(1, 0, 0))
    counts = Counter({"two-id": 1})
    assert [node.name for node in staff.vacancies([ONE, TWO], counts)] == ["one", "one", "two", "two"]
    assert counts == {"two-id": 1}
    assert list(staff.vacancies([ONE], Counter({"one-id": 2}))) == []


def test_a_node_whose_memory_did_not_suffice_has_room_for_fewer() -> None:
    """But for one, as long as one stays alive."""
    staff = Staff(Ray(), Need(1, 0, 0))
    for error, left in ((OutOfMemoryError(), 2), (MemoryError(), 1), (OutOfMemoryError(), 1), (RayError(), 1)):
        said = staff.note_death(TWO, error, True)
        assert len(list(staff.vacancies([TWO], Counter()))) == left
        assert said == ("its process ended" if type(error) is RayError else "its node ran out of memory")
    assert list(staff.vacancies([replace(TWO, room=0)], Counter())) == []
    assert staff.note_death(TWO, RayError("the node has died"), True) == "its node died"


# --- work ---


def job(sent: bool = False) -> Job:
    return Job(lambda: lambda _: None, {}, sent, os.getcwd())


def work(ray: Ray, groups: Any, threads: int = 1, most: int | None = None, sent: bool = False, cpus: int = 1) -> list[Any]:
    """The groups that are done, by the order of their results."""
    return list(Dispatch(ray, job(sent), iter(groups), Need(cpus, 0, 0), threads, most).results())


GROUPS = [[2 * i, 2 * i + 1] for i in range(12)]


@pytest.mark.parametrize(
    ("number", "threads", "most", "workers"),
    [
        (12, 1, None, 5),
        (3, 1, None, 3),
        (3, 2, None, 2),
        (4, 2, None, 2),
        (12, 1, 2, 2),
        (12, 4, None, 3),
        (1, 4, None, 1),
        (0, 1, None, 0),
    ],
)
def test_there_are_as_many_workers_as_needed(number: int, threads: int, most: int | None, workers: int) -> None:
    """As many as fit, as are wanted, and as have work; all are ended."""
    ray = Ray([machine("one", cpus=2), machine("two", cpus=3)])
    done = work(ray, GROUPS[:number], threads, most)
    assert sorted(one.group for one in done) == GROUPS[:number]
    assert all(one.result == [2 * item for item in one.group] for one in done)
    assert len(ray.hired) == len(ray.killed) == workers
    assert {one.node for one in done} <= {"one", "two"}
    assert all(options == {"num_cpus": 1, "num_gpus": 0, "max_concurrency": threads} for _, options in ray.hired)


def test_work_that_no_node_has_room_for_is_refused() -> None:
    ray = Ray([machine("one", cpus=2)])
    with pytest.raises(DarktrtError, match=r"a worker takes 3 CPUs, and no node of the cluster has them \(one\)"):
        work(ray, GROUPS, cpus=3)
    assert ray.hired == []


def test_groups_are_drawn_as_they_are_needed() -> None:
    """A worker has one more than it is at; there is no result yet when the first are drawn."""
    drawn: list[int] = []

    def groups() -> Iterator[list[int]]:
        for group in GROUPS:
            drawn.append(group[0])
            yield group

    results = Dispatch(Ray([machine(cpus=1)]), job(), groups(), Need(1, 0, 0), 2, None).results()
    next(results)
    assert len(drawn) <= 4
    results.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_worker_has_one_group_to_begin_with_when_another_is_done(threads: int) -> None:
    ray = Ray([machine(cpus=1)])
    work(ray, GROUPS, threads)
    assert ray.most_under_way == threads + 1


def test_the_groups_of_a_worker_that_died_are_done_by_others(caplog: pytest.LogCaptureFixture) -> None:
    deaths = iter([RayError("it ended"), RayError("it ended")])

    def dies(group: Sequence[int], _: Any) -> Any:
        return next(deaths, group) if group[0] == 4 else group

    ray = Ray([machine("one", cpus=2)], dies)
    done = work(ray, GROUPS)
    assert sorted(one.group for one in done) == GROUPS
    assert len(ray.hired) == 4 and len(ray.killed) == 4
    assert all(
        message.startswith("node one: a worker died because its process ended; others do its ") for message in caplog.messages
    )
    assert len(caplog.messages) == 2


def test_a_group_at_which_three_workers_died_is_given_up() -> None:
    ray = Ray([machine("one", cpus=1)], lambda group, _: OutOfMemoryError() if group[0] == 4 else group)
    with pytest.raises(DarktrtError) as caught:
        work(ray, GROUPS)
    assert str(caught.value) == (
        "4: 3 workers died at it or at the 1 items behind it, the last on node one, because its node ran out of memory; leave "
        "them out, or give a worker more of its node"
    )
    assert caught.value.argument == "num_cpus_per_worker" and len(ray.hired) == len(ray.killed) == 3
    tried = [group for _, group, _ in ray.given if group[0] == 4]
    assert len(tried) == 3


def test_a_group_that_a_worker_died_at_has_the_next_for_itself() -> None:
    """So that no other is blamed."""
    deaths = iter([RayError()])

    def dies(group: Sequence[int], _: Any) -> Any:
        return next(deaths, group) if group[0] == 0 else group

    ray = Ray([machine("one", cpus=1)], dies)
    assert sorted(one.group for one in work(ray, GROUPS[:6], 2)) == GROUPS[:6]
    first, again = (i for i, (group, _) in enumerate(ray.handed_out) if group == GROUPS[0])
    assert any(others for _, others in ray.handed_out[first:again])
    assert not ray.handed_out[again][1]
    assert all(GROUPS[0] not in others for _, others in ray.handed_out[again:])


def test_what_a_worker_refuses_names_its_node() -> None:
    failed = Outcome(("a.png: is broken", "skip_bad"), True, [])
    ray = Ray(work=lambda group, _: failed)
    with pytest.raises(DarktrtError, match=r"^node one: a\.png: is broken$") as caught:
        work(ray, GROUPS)
    assert caught.value.argument == "skip_bad" and len(ray.killed) == len(ray.hired) > 0


def test_what_a_worker_logs_is_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ray = Ray(work=lambda group, _: Outcome(group, False, [(logging.WARNING, "small"), (logging.INFO, "blue")]))
    work(ray, GROUPS[:1])
    assert caplog.record_tuples == [
        ("darktrt", logging.WARNING, "node one: small"),
        ("darktrt", logging.INFO, "node one: blue"),
    ]


def test_a_bug_in_a_worker_shows_its_trace() -> None:
    ray = Ray(work=lambda group, _: RayTaskError("its trace"))
    with pytest.raises(RayTaskError, match="its trace"):
        work(ray, GROUPS)
    assert len(ray.killed) == len(ray.hired)


def test_images_are_sent_along_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 256 MiB of them under way, a worker gets one group at a time."""
    assert dispatch.MOST_SENT_BYTES == 1 << 28
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths[:5]:
        path.write_bytes(b"x" * 10)
    for most, under_way in ((100, 2), (10, 1)):
        monkeypatch.setattr(dispatch, "MOST_SENT_BYTES", most)
        ray = Ray([machine(cpus=1)], lambda group, contents: len(contents))
        done = work(ray, [[path] for path in paths], sent=True)
        assert {one.group[0]: one.result for one in done} == dict.fromkeys(paths, 1) | {paths[5]: 0}
        assert ray.most_under_way == under_way
        assert all(contents == {str(path): b"x" * 10} for _, (path,), contents in ray.given if path != paths[5])
    ray = Ray([machine(cpus=1)], lambda group, contents: len(contents))
    assert {one.result for one in work(ray, [[path] for path in paths])} == {0}


def test_nodes_that_do_not_answer_yet_are_waited_for_without_haste(slept: list[float]) -> None:
    """A tenth of a second a time; where there is work to wait for, that is waited for, and the nodes looked at every 2 s."""
    ray = Ray()
    silent = iter([RayError()] * 3)
    ray.versions = SimpleNamespace(get=lambda *_: next(silent, VERSIONS))  # type: ignore[assignment]
    assert sorted(one.group for one in work(ray, GROUPS)) == GROUPS
    assert slept == [0.1] * 3
    assert set(ray.timeouts) == {120, 2}


def test_an_unfit_node_stops_the_work_only_if_it_is_there_at_first(caplog: pytest.LogCaptureFixture) -> None:
    unfit = {"two-0123456789": {**VERSIONS, "numpy": "1"}}
    with pytest.raises(DarktrtError, match="node two: has numpy 1, and here is 2"):
        work(Ray([machine("one"), machine("two")], versions=unfit), GROUPS)
    VersionCheck._known.clear()
    looks: list[int] = []

    class Growing(Ray):
        def nodes(self) -> list[dict[str, Any]]:
            looks.append(1)
            return self.alive[: len(looks)]

    ray = Growing([machine("one", cpus=1), machine("two")], versions=unfit)
    assert {one.node for one in work(ray, GROUPS)} == {"one"}
    assert any("it gets no work" in message for message in caplog.messages)


def test_a_node_that_joins_gets_workers_at_once() -> None:
    """As many as the groups that wait are enough for, besides workers that are starting."""
    hired: list[int] = []

    class Growing(Ray):
        def nodes(self) -> list[dict[str, Any]]:
            hired.append(len(self.hired))
            return self.alive[: len(hired)]

    ray = Growing([machine("one", cpus=2), machine("two", cpus=3)])
    assert sorted(one.group for one in work(ray, GROUPS)) == GROUPS
    assert hired[:3] == [0, 2, 5]


def test_images_that_a_dead_worker_had_are_no_longer_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MOST_SENT_BYTES", 30)
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for path in paths:
        path.write_bytes(b"x" * 10)
    deaths = iter([RayError(), RayError()])
    ray = Ray([machine(cpus=1)], lambda group, _: next(deaths, group) if group[0] in paths[1:3] else group)
    assert len(work(ray, [[path] for path in paths], sent=True)) == 8
    assert [len(others) for _, others in ray.handed_out[-3:]] == [1, 1, 1]


# --- the process on a node ---


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The logger as it was, for an actor changes that of its process."""
    before = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    monkeypatch.chdir(os.getcwd())
    yield
    LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = before


def test_an_actor_makes_a_worker_and_keeps_what_is_logged(logger: None, tmp_path: Path) -> None:
    """In the folder of the driver, with the files that were sent."""
    image, model = tmp_path / "a.png", tmp_path / "sent.onnx"

    def make() -> Any:
        LOGGER.warning(f"made of {read_bytes(model, 9).decode()}")

        def worker(group: Sequence[Any]) -> Any:
            LOGGER.info(f"at {group[0].name}")
            return read_bytes(group[0], 9) + read_bytes(model, 9)

        return worker

    actor = Actor(Job(make, {str(model): b"net"}, True, str(tmp_path)))
    assert Path.cwd() == tmp_path
    assert LOGGER.level == logging.INFO and not LOGGER.propagate  # nobody reads what is printed on a node
    assert actor.open() == Outcome(None, False, [(logging.WARNING, "made of net")])
    assert actor.work([image], {str(image): b"pixels"}) == Outcome(b"pixelsnet", False, [(logging.INFO, "at a.png")])
    assert actor.work([image], {}).failed
    Actor(Job(make, {}, True, str(tmp_path / "elsewhere")))
    assert Path.cwd() == tmp_path


def test_images_of_a_shared_folder_must_be_there(logger: None, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    actor = Actor(Job(lambda: len, {}, False, str(tmp_path)))
    actor.open()
    assert actor.work([tmp_path / "a.png", 3], {}) == Outcome(2, False, [])
    outcome = actor.work([tmp_path / "b.png"], {})
    said = f"{tmp_path}/b.png: is not on this node; name images by a path that all nodes share, or send them along"
    assert outcome == Outcome((said, "ship_images"), True, [])


# --- a cluster, and what its nodes have ---


@pytest.mark.parametrize(("gpu", "need", "threads"), [(False, Need(3, 0, 30), 3), (True, Need(3, 0.5, 10), 1)])
def test_a_worker_of_a_cluster_takes_what_its_threads_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool, need: Need, threads: int
) -> None:
    """With a GPU it is at one group at a time."""
    (tmp_path / "a.plan").write_bytes(b"plan")
    seen: list[Any] = []

    class Recorded(Dispatch):
        def __init__(self, ray: Any, job: Job, groups: Any, *numbers: Any) -> None:
            seen.extend([job.files, job.images_are_sent, job.folder, *numbers])

        def results(self) -> Iterator[Any]:  # type: ignore[override]
            yield from ()

    monkeypatch.setattr(cluster_module, "Dispatch", Recorded)
    monkeypatch.setattr(cluster_module, "connected", lambda address: Ray() if address == "head:1" else None)
    workers = Cluster("head:1", 3, 0.5, ship_images=True, workers=7)
    more = {"gpu": True} if gpu else {}
    assert list(workers.results(lambda: lambda _: None, [], bytes_each=10, files=[tmp_path / "a.plan"], **more)) == []
    assert seen == [{str(tmp_path / "a.plan"): b"plan"}, True, os.getcwd(), need, threads, 7]
    assert cluster_module.MOST_FILE_BYTES == 4 * GIB
    monkeypatch.setattr(cluster_module, "MOST_FILE_BYTES", 3)
    with pytest.raises(DarktrtError, match=r"a\.plan: has 4 bytes, and such a file may have 3"):
        list(workers.results(lambda: lambda _: None, [], bytes_each=10, files=[tmp_path / "a.plan"]))
    usual = Cluster()
    assert (usual.num_cpus_per_worker, usual.num_gpus_per_worker, usual.workers, usual.group_size) == (1, 1.0, None, 32)
    assert usual.address is None and not usual.ship_images


@pytest.mark.parametrize("name", ["num_cpus_per_worker", "num_gpus_per_worker", "workers", "group_size"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_numbers_of_a_cluster_are_above_0_and_finite(name: str, value: Any) -> None:
    with pytest.raises(DarktrtError, match=f"{name} is {value}; it must be above 0") as caught:
        Cluster(**{name: value})
    assert caught.value.argument == name
    Cluster(**{name: 1})


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray, not connected yet; it takes over the signals, as the real one does."""
    ray: Any = ModuleType("ray")
    ray.inits, ray.connected, ray.error = [], False, None

    def init(address: str | None, **options: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ray.inits.append((address, options))
        if ray.error:
            raise ray.error

    ray.init, ray.is_initialized = init, lambda: ray.connected
    ray._private = SimpleNamespace(worker=SimpleNamespace(_worker_logs_enabled=True))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")  # so that it is as before afterwards
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    return ray


@pytest.mark.parametrize("address", [None, "head:1", "local"])
def test_a_cluster_is_joined_quietly(module: Any, monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """It reports to nobody, prints nothing and leaves this program's handlers of signals."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert connected(address) is module
    assert module.inits == [(address, {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL})]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and module._private.worker._worker_logs_enabled is False


def test_a_connection_that_the_program_has_is_kept(module: Any) -> None:
    module.connected = True
    assert connected("ray://head:1") is module and module.inits == []


def test_a_cluster_that_cannot_be_joined_is_named(module: Any) -> None:
    with pytest.raises(DarktrtError, match="ray://head:1: name HOST:PORT of the head, and run this on a machine of") as caught:
        connected("ray://head:1")
    assert caught.value.argument == "address" and module.inits == []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    module.error = ConnectionError(" no head there\nand a page more")
    for address, named in (("head:1", "head:1"), (None, "the Ray cluster of this machine")):
        with pytest.raises(DarktrtError) as caught:
            connected(address)
        assert str(caught.value) == f"{named}: cannot join it (no head there); is 'ray start' run on this machine?"
        assert caught.value.argument == "address"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_cluster_is_joined_from_any_thread(module: Any) -> None:
    """Only the main thread has handlers of signals to keep."""
    module.init = lambda *_, **__: None
    joined: list[Any] = []
    thread = threading.Thread(target=lambda: joined.append(connected(None)))
    thread.start()
    thread.join()
    assert joined == [module]


def test_what_a_node_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A digest of all Python files of the package, in the order of their names, and the processor's flags."""
    monkeypatch.undo()
    package = tmp_path / "darktrt"
    (package / "b").mkdir(parents=True)
    for name, text in (("__init__.py", "__version__ = '9'"), ("z.py", "z"), ("b/a.py", "a"), ("b/notes.txt", "n")):
        (package / name).write_text(text)
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(probe, "EXACT", ("numpy", "no such package"))
    text = "processor : 0\nFlags : fpu avx2 avx sse\nflags : avx512f\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(
        probe,
        "open",
        lambda path, *more, **options: open(tmp_path / "cpuinfo" if "proc" in path else path, *more, **options),
        raising=False,
    )
    found = probe.node_versions()
    assert found["numpy"] and found["no such package"] == "" and found["darktrt"]
    assert found["sources"] == hashlib.sha256(b"__version__ = '9'" + b"z" + b"a").hexdigest()[:16]
    assert found["processor"] == "avx avx2"


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_a_node_without_darktrt(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(probe.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(probe, "EXACT", ("darktrt", "sources", "numpy"))
    monkeypatch.setattr(probe, "_version", {"darktrt": "", "sources": "", "numpy": "2"}.__getitem__)
    found = probe.node_versions()
    assert (found["darktrt"], found["sources"], found["numpy"]) == ("", "", "2")


def test_what_must_be_the_same_on_all_nodes() -> None:
    assert probe.EXACT == ("darktrt", "sources", "onnxruntime", "numpy", "pillow")
    assert (nodes.MOST_DEATHS, dispatch.MOST_ATTEMPTS) == (3, 3)
