"""The nodes of a Ray cluster: their names, how many workers they have room for, and whether they compute the same bits."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from darktrt.cluster import probe
from darktrt.errors import DarktrtError
from darktrt.progress import LOGGER

WORKER_BYTES = 1 << 29
"""Of the libraries of a worker's process, besides its work."""

MOST_DEATHS = 3
"""A node gets no more workers where so many died before they had loaded the model."""

_PROBE_SECONDS = 120.0
"""In which a node must have started a process that tells its versions."""


@dataclass(frozen=True)
class Need:
    """What one worker takes of a node."""

    cpus: float
    gpus: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that is alive."""

    id: str
    name: str
    room: int
    """How many workers fit, 0 where it lacks CPUs or GPUs."""


def living_nodes(ray: Any, need: Need) -> list[Node]:
    """The nodes that are alive, by name; two of one host get part of their ids behind it."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = [_name(node) for node in alive]
    count = Counter(names)
    nodes = [
        Node(node["NodeID"], name if count[name] == 1 else f"{name}/{node['NodeID'][:6]}", _room(node["Resources"], need))
        for node, name in zip(alive, names, strict=True)
    ]
    return sorted(nodes, key=lambda node: node.name)


def _name(node: dict[str, Any]) -> str:
    """The name that ``ray start --node-name`` gave it, else that of its host."""
    given = str(node.get("NodeName") or "")
    return given if given and given != node.get("NodeManagerAddress") else str(node["NodeManagerHostname"])


def _room(resources: dict[str, float], need: Need) -> int:
    wanted = {"CPU": need.cpus, "GPU": need.gpus}
    fit = min(int(resources.get(name, 0) / amount) for name, amount in wanted.items() if amount)
    memory = int(resources.get("memory", 0) // (need.bytes + WORKER_BYTES))
    return min(fit, max(memory, 1))


class VersionCheck:
    """Compares each node once with this machine; nodes are known by their ids from then on."""

    _known: ClassVar[dict[str, str]] = {}
    """By the node's id what keeps it from working with this machine; empty where nothing does."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def differences(self, nodes: Sequence[Node]) -> dict[str, str]:
        """By the id of each node that answers a sentence on why it would compute other bits; empty where it would not."""
        new = [node for node in nodes if node.id not in self._known]
        here = probe.node_versions() if new else {}
        for node, there in zip(new, self._asked(new), strict=True):
            if there is None:  # it died, or is only starting
                continue
            self._known[node.id] = _difference(node.name, there, here)
            if not self._known[node.id] and there["processor"] != here["processor"]:
                LOGGER.warning(
                    f"node {node.name}: has another kind of processor than this machine, for which ONNX Runtime may choose "
                    "other kernels; its numbers can differ in their last bits"
                )
        return {node.id: self._known[node.id] for node in nodes if node.id in self._known}

    def _asked(self, nodes: Sequence[Node]) -> list[dict[str, str] | None]:
        """What each node has; None for one that does not answer."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray.cloudpickle.register_pickle_by_value(probe)
        ask, asked = self._ray.remote(probe.node_versions), []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            asked.append(ask.options(num_cpus=0, max_retries=1, scheduling_strategy=there).remote())
        self._ray.cloudpickle.unregister_pickle_by_value(probe)
        if asked:
            self._ray.wait(asked, num_returns=len(asked), timeout=_PROBE_SECONDS)
        answers: list[dict[str, str] | None] = []
        for answer in asked:
            answers.append(None)
            with contextlib.suppress(self._ray.exceptions.RayError):
                answers[-1] = self._ray.get(answer, timeout=0.1)
        return answers


def _difference(name: str, there: dict[str, str], here: dict[str, str]) -> str:
    for package in probe.EXACT:
        if there[package] == here[package]:
            continue
        if package == "sources":
            return f"node {name}: has darktrt {there['darktrt']} with other source files than here; install the same one"
        has = f"has {package} {there[package]}" if there[package] else f"has no {package}"
        return f"node {name}: {has}, and here is {here[package] or 'none'}; install the same version on every node"
    return ""


class Staff:
    """Which nodes may have workers, and how many."""

    def __init__(self, ray: Any, need: Need) -> None:
        self._ray, self._need = ray, need
        self._check = VersionCheck(ray)
        self._deaths: Counter[str] = Counter()
        """Of workers that had not loaded the model yet, by the id of their node."""
        self._exhausted: Counter[str] = Counter()
        """Of workers that the node's memory did not suffice for."""
        self._warned: set[str] = set()
        self._reason = ""
        """Of the last death."""

    def usable(self, nodes: Sequence[Node], first: bool) -> list[Node]:
        """The nodes with room that compute the same bits and on which workers stay alive.

        Raises:
            DarktrtError: at the ``first`` look a node would compute other bits; one that joins later is only left out.
        """
        fit = [node for node in nodes if node.room]
        differences = self._check.differences(fit)
        for node, sentence in differences.items():
            if sentence and first:
                raise DarktrtError(sentence)
            if sentence and node not in self._warned:
                LOGGER.warning(f"{sentence}; it gets no work")
                self._warned.add(node)
        return [node for node in fit if differences.get(node.id) == "" and self._deaths[node.id] < MOST_DEATHS]

    def check_room(self, nodes: Sequence[Node]) -> None:
        """See that a worker fits somewhere.

        Raises:
            DarktrtError: no node has what a worker takes, or workers die on all of them.
        """
        if any(node.room and self._deaths[node.id] < MOST_DEATHS for node in nodes):
            return
        if self._reason:
            raise DarktrtError(f"no node is left that a worker stays alive on; the last one died because {self._reason}")
        names = ", ".join(node.name for node in nodes) or "there is none"
        argument = "num_gpus_per_worker" if self._need.gpus else "num_cpus_per_worker"
        raise DarktrtError(f"a worker takes {self._need}, and no node of the cluster has them ({names})", argument)

    def vacancies(self, nodes: Sequence[Node], staff: Counter[str]) -> Iterator[Node]:
        """The nodes to start workers on, those with the fewest first; ``staff`` has their numbers now, by the nodes' ids."""
        here = staff.copy()
        while free := [node for node in nodes if here[node.id] < self._most(node)]:
            node = min(free, key=lambda one: here[one.id])
            here[node.id] += 1
            yield node

    def _most(self, node: Node) -> int:
        return max(node.room - self._exhausted[node.id], min(node.room, 1))

    def note_death(self, node: Node, error: BaseException, opened: bool) -> str:
        """Remember that a worker died; the reason in words."""
        self._deaths[node.id] += not opened
        if isinstance(error, MemoryError | self._ray.exceptions.OutOfMemoryError):
            self._exhausted[node.id] += 1
            self._reason = "its node ran out of memory"
        else:
            self._reason = "its node died" if "node has died" in str(error) else "its process ended"
        return self._reason
