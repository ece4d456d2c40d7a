"""Handing groups to workers on the nodes of a cluster, again where a worker or a node dies, and taking their results."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from darktrt.cluster.actor import Actor, Job, Outcome
from darktrt.cluster.nodes import Need, Node, Staff, living_nodes
from darktrt.errors import DarktrtError, quote
from darktrt.files import read_bytes
from darktrt.parallel import Done, images_of
from darktrt.progress import LOGGER
from darktrt.vision.images import MOST_FILE_BYTES

MOST_ATTEMPTS = 3
"""A group that was under way when this many workers died is not tried again."""

MOST_SENT_BYTES = 1 << 28
"""Of images that are sent along and whose results have not come; beyond it a worker gets one group at a time."""

_LOOK_SECONDS = 2.0
"""How often the nodes are looked at."""


@dataclass(eq=False)
class _Task:
    """A group that has no result yet."""

    group: Sequence[Any]
    deaths: int = 0
    """Of workers that were at it."""
    sent_bytes: int = 0


@dataclass(eq=False)
class _Hand:
    """A worker's process, and the tasks that it has, oldest first."""

    actor: Any
    node: Node
    opened: bool = False
    tasks: dict[Any, _Task] = field(default_factory=dict)
    """By the references of their results."""


class Dispatch:
    """One piece of work on the nodes of a cluster.

    Args:
        ray: the module, connected.
        job: what every worker needs.
        groups: the work.
        need: what a worker takes of its node.
        threads: how many groups a worker is at, at the same time.
        most: no more workers than so many.
    """

    def __init__(self, ray: Any, job: Job, groups: Iterable[Sequence[Any]], need: Need, threads: int, most: int | None) -> None:
        self._ray, self._need, self._threads, self._most = ray, need, threads, most or sys.maxsize
        self._sends_images = job.images_are_sent
        self._groups, self._waiting = iter(groups), deque[_Task]()
        self._job = ray.put(job)
        self._staff = Staff(ray, need)
        self._hands: list[_Hand] = []
        self._awaited: dict[Any, _Hand] = {}
        """By the references of what they are at."""
        self._sent_bytes = 0
        self._error: BaseException = RuntimeError()
        self._looked = -math.inf

    def results(self) -> Generator[Done[Any, Any], None, None]:
        """As :meth:`darktrt.parallel.Workers.results`."""
        try:
            while self._hand_out():
                ready, _ = self._ray.wait(list(self._awaited), timeout=_LOOK_SECONDS) if self._awaited else ([], [])
                for reference in ready:
                    yield from self._take(reference)
                if not self._awaited:
                    time.sleep(0.1)  # until it is time to look for nodes again
        finally:
            for hand in self._hands:
                self._dismiss(hand)

    # --- workers ---

    def _hire(self) -> None:
        """Start workers for the tasks that wait, where there is room."""
        if time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        first, self._looked = self._looked < 0, time.monotonic()
        alive = living_nodes(self._ray, self._need)
        if not self._hands:
            self._staff.check_room(alive)
        nodes = self._staff.usable(alive, first)
        vacancies = self._staff.vacancies(nodes, Counter(hand.node.id for hand in self._hands))
        free = list(islice(vacancies, max(self._most - len(self._hands), 0)))
        starting = sum(not hand.opened for hand in self._hands)
        waiting = self._draw((len(free) + starting) * self._threads)
        for node in free[: max(math.ceil(waiting / self._threads) - starting, 0)]:
            self._start(node)

    def _start(self, node: Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": self._need.cpus,
            "num_gpus": self._need.gpus,
            "max_concurrency": self._threads,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        }
        hand = _Hand(self._ray.remote(Actor).options(**options).remote(self._job), node)
        self._hands.append(hand)
        self._awaited[hand.actor.open.remote()] = hand

    def _dismiss(self, hand: _Hand) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(hand.actor)

    # --- tasks ---

    def _hand_out(self) -> bool:
        """Give workers what they have room for; whether anything is left to wait for."""
        while self._draw(1) and (hand := self._idlest(self._waiting[0])):
            self._give(hand, self._waiting.popleft())
        if self._draw(1):
            self._hire()
        return bool(self._waiting or any(hand.tasks for hand in self._hands))

    def _draw(self, number: int) -> int:
        """See that so many tasks wait, if there are any more; no sooner than needed, for Ctrl-C ends them. How many do."""
        self._waiting.extend(_Task(group) for group in islice(self._groups, max(number - len(self._waiting), 0)))
        return len(self._waiting)

    def _idlest(self, task: _Task) -> _Hand | None:
        """The worker with the fewest tasks that may get one more; it has one to begin with when another is done.

        A task that a worker died at has its next one for itself, so that no other is blamed for it.
        """
        depth = self._threads + (self._sent_bytes < MOST_SENT_BYTES)
        free = [hand for hand in self._hands if hand.opened and len(hand.tasks) < (1 if task.deaths else depth)]
        alone = [hand for hand in free if not any(other.deaths for other in hand.tasks.values())]
        return min(alone, key=lambda hand: len(hand.tasks), default=None)

    def _give(self, hand: _Hand, task: _Task) -> None:
        contents = _contents(task.group) if self._sends_images else {}
        task.sent_bytes = sum(map(len, contents.values()))
        self._sent_bytes += task.sent_bytes
        reference = hand.actor.work.remote(task.group, contents)
        hand.tasks[reference] = task
        self._awaited[reference] = hand

    def _take(self, reference: Any) -> Iterator[Done[Any, Any]]:
        """What a worker returned; what follows where it died."""
        hand = self._awaited.get(reference)
        if hand is None:  # it was one of several of a worker that died
            return
        if (outcome := self._outcome(reference)) is not None:
            yield from self._finish(hand, reference, outcome)
            return
        error = self._error
        for finished in list(hand.tasks):  # before it died
            if (outcome := self._outcome(finished)) is not None:
                yield from self._finish(hand, finished, outcome)
        self._lose(hand, error)

    def _outcome(self, reference: Any) -> Outcome | None:
        """What a worker returned; None where it died, for the reason ``_error``."""
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except errors.RayError as error:
            if isinstance(error, errors.RayTaskError) and not isinstance(error, MemoryError):
                raise  # a bug
            self._error = error
            return None
        return outcome

    def _finish(self, hand: _Hand, reference: Any, outcome: Outcome) -> Iterator[Done[Any, Any]]:
        del self._awaited[reference]
        for level, text in outcome.notes:
            LOGGER.log(level, f"node {hand.node.name}: {text}")
        if outcome.failed:
            sentence, argument = outcome.result
            raise DarktrtError(f"node {hand.node.name}: {sentence}", argument)
        if reference not in hand.tasks:
            hand.opened = True
            return
        task = hand.tasks.pop(reference)
        self._sent_bytes -= task.sent_bytes
        yield Done(task.group, outcome.result, hand.node.name)

    def _lose(self, hand: _Hand, error: BaseException) -> None:
        """Give the tasks of a worker that died to others."""
        reason = self._staff.note_death(hand.node, error, hand.opened)
        self._hands.remove(hand)
        self._dismiss(hand)
        self._awaited = {reference: other for reference, other in self._awaited.items() if other is not hand}
        tasks = list(hand.tasks.values())
        LOGGER.warning(f"node {hand.node.name}: a worker died because {reason}; others do its {len(tasks)} groups")
        for task in tasks[: self._threads]:
            task.deaths += 1
            if task.deaths == MOST_ATTEMPTS:
                first, others = quote(str(task.group[0])), len(task.group) - 1
                last = f"the last on node {hand.node.name}, because {reason}"
                raise DarktrtError(
                    f"{first}: {MOST_ATTEMPTS} workers died at it or at the {others} items behind it, {last}; leave them out, "
                    "or give a worker more of its node",
                    "num_cpus_per_worker",
                )
        self._sent_bytes -= sum(task.sent_bytes for task in tasks)
        self._waiting.extendleft(reversed(tasks))


def _contents(group: Sequence[Any]) -> Mapping[str, bytes]:
    """The images of a group that can be read, by their paths; a worker says what is wrong with the others."""
    contents = {}
    for path in images_of(group):
        with suppress(DarktrtError):
            contents[str(path)] = read_bytes(path, MOST_FILE_BYTES)
    return contents
