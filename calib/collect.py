"""The first pass of a calibration: histograms of a network's activations over images, in memory that does not grow."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from darktrt.calib.graph import head_inputs, mish_outputs, passing_groups, tensors_to_calibrate, value_sources
from darktrt.calib.histogram import BINS, Histogram, HistogramSet
from darktrt.calib.trunk import OpenTrunk, Trunk, as_text, read_input, trunk_of
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.onnx_file import load_model
from darktrt.parallel import Done, Threads, Worker, Workers
from darktrt.progress import Progress, progress

Save = Callable[[HistogramSet], None]

SAVE_EVERY = 32
_MOST_SAVING = 0.05
"""The largest share of the time that goes into saving what was counted."""


def collect(
    model_path: str | Path,
    images: Sequence[Path],
    *,
    tensors: Sequence[str] | None = None,
    resume: HistogramSet | None = None,
    skip_bad: bool = False,
    save: Save | None = None,
    workers: Workers | None = None,
) -> HistogramSet:
    """Histograms of a network's activations over images; an image counts once, by the SHA-256 of its file.

    The result is the same, bit for bit, whatever the order of the images and whoever counts which of them.

    Args:
        model_path: a plain or portable ONNX file of darktrt.
        images: image files; those that ``resume`` has are not counted again.
        tensors: the tensors to count; default: :func:`darktrt.calib.graph.tensors_to_calibrate`.
        resume: histograms of an earlier run on the same model, which are added to.
        skip_bad: continue after an image that cannot be read, and list it in ``skipped`` of the result.
        save: is called with what is counted about every :data:`SAVE_EVERY` images, at the end and on Ctrl-C.
        workers: who counts; by default the threads of this process.

    Raises:
        DarktrtError: there are no images, one cannot be read (without ``skip_bad``), the model is not one of darktrt or
            not that of ``resume``, an activation is NaN or infinite, or the file cannot be written.
        KeyboardInterrupt: Ctrl-C, after the groups that were begun; a second Ctrl-C waits only for those that threads are at.
    """
    if not images:
        raise DarktrtError("there are no images; name a folder, list, COCO json or pattern", argument="images")
    counter, histograms = _prepared(model_path, tensors, resume)
    with progress(len(images), "images") as bar, _ctrl_c_as_event() as stop:
        run = _Run(histograms, bar, stop, skip_bad, _Saves(histograms, save))
        run.count(counter, images, workers or Threads())
    if not histograms.images:
        raise DarktrtError(f"none of the {len(images)} images can be read; first: {next(iter(histograms.skipped.values()))}")
    return histograms


def _prepared(
    model_path: str | Path, tensors: Sequence[str] | None, resume: HistogramSet | None
) -> tuple[_Counter, HistogramSet]:
    """How a worker counts, and what to add its counts to."""
    model, info = load_model(model_path)
    names = tensors_to_calibrate(model, info) if tensors is None else list(tensors)
    origins = value_sources(model, info)
    sources = {name: origins.get(name, name) for name in names}
    histograms = HistogramSet(
        sha256_of(model_path),
        {name: Histogram() for name in names},
        groups=passing_groups(model, info, names),
        head_inputs=[name for name in head_inputs(model, info) if name in names],
        mish=mish_outputs(model, names),
    )
    trunk = trunk_of(model_path, model, info, list(dict.fromkeys(sources.values())))
    if resume is not None and resume.model != histograms.model:
        raise DarktrtError(f"{model_path}: is not the model of the calibration to resume; start afresh", argument="resume")
    if resume is not None and list(resume.histograms) != names:
        raise DarktrtError(f"{model_path}: the calibration to resume is of other tensors; start afresh", argument="resume")
    return _Counter(trunk, sources, histograms.model), histograms if resume is None else resume


@dataclass(frozen=True)
class _Counted:
    """What a group of images came to."""

    histograms: HistogramSet
    digests: dict[str, str]
    """The SHA-256 of each image that was read, by its path."""
    failed: dict[str, str]
    """A sentence by the path of each image that cannot be read."""


@dataclass(frozen=True)
class _Counter:
    """Makes a worker that counts.

    Args:
        sources: maps each tensor to count to the one of the network that its values come from.
        model: SHA-256 of the ONNX file.
    """

    trunk: Trunk
    sources: Mapping[str, str]
    model: str

    def __call__(self) -> Worker[Path, _Counted]:
        opened = self.trunk.open()
        return lambda group: self._count(opened, group)

    def _count(self, network: OpenTrunk, group: Sequence[Path]) -> _Counted:
        counted = _Counted(HistogramSet(self.model), {}, {})
        for path in group:
            try:
                digest, image = read_input(path, self.trunk.info)
            except DarktrtError as error:
                counted.failed[str(path)] = str(error)
                continue
            counted.digests[str(path)] = digest
            values, weights = network.run(image)
            activations = {name: values[source] for name, source in self.sources.items()}
            counted.histograms.add(activations, {digest: as_text(path)}, weights)
        return counted

    @property
    def bytes_each(self) -> int:
        return self.trunk.bytes_each + len(self.sources) * BINS * 2 * 8


@dataclass
class _Run:
    """Counts images, and adds what is counted as it comes."""

    histograms: HistogramSet
    bar: Progress
    stop: threading.Event
    skip_bad: bool
    saves: _Saves
    files: dict[str, Path] = field(default_factory=dict)
    """The file of each image of this run, by SHA-256: the first one of equal files."""
    digests: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of the images under way, by path."""
    failed: list[str] = field(default_factory=list)

    def count(self, counter: _Counter, images: Sequence[Path], workers: Workers) -> None:
        """Count every new image."""
        for path in images:
            self.histograms.skipped.pop(as_text(path), None)
        try:
            groups = self._groups(images, workers.group_size)
            with closing(workers.results(counter, groups, bytes_each=counter.bytes_each)) as results:
                for done in results:
                    self._add(done)
                    self.saves.after(len(done.group))
        except DarktrtError:
            self.saves.now()  # the images counted before the one that failed
            raise
        self.saves.now()
        if self.failed and not self.skip_bad:
            raise DarktrtError(f"{self.failed[0]} (skip such images, or mend this one and resume)", argument="skip_bad")
        if self.stop.is_set():
            raise KeyboardInterrupt

    def _groups(self, images: Sequence[Path], size: int) -> Iterator[list[Path]]:
        """The new images in groups; the others are taken off the bar's total."""
        group: list[Path] = []
        for path in images:
            if self.stop.is_set() or (self.failed and not self.skip_bad):
                return
            if self._is_new(path):
                group.append(path)
            else:
                self.bar.total = (self.bar.total or 1) - 1
            if len(group) == size:
                yield group
                group = []
        if group:
            yield group

    def _is_new(self, path: Path) -> bool:
        try:
            digest = sha256_of(path)
        except DarktrtError as error:
            self._fail(path, str(error))
            return False
        if digest in self.files:
            return False
        self.files[digest] = path
        if digest in self.histograms.images:
            self.histograms.files[digest] = path
            return False
        self.digests[str(path)] = digest
        return True

    def _fail(self, path: str | Path, sentence: str) -> None:
        self.failed.append(sentence)
        self.histograms.skipped[as_text(path)] = as_text(sentence)

    def _add(self, done: Done[Path, _Counted]) -> None:
        counted = done.result
        for path, digest in counted.digests.items():
            if digest != self.digests.pop(path):
                where = f" on {done.node}" if done.node else ""
                raise DarktrtError(
                    f"{path}: is another file{where} than it was at first; calibrate on files that do not change"
                )
            self.histograms.files[digest] = self.files[digest]
        for path, sentence in counted.failed.items():
            self._fail(path, f"{sentence} (on {done.node})" if done.node else sentence)
        self.histograms.merge([counted.histograms])
        self.bar.total = (self.bar.total or 0) - len(counted.failed)
        self.bar.update(len(counted.digests), done.node)


class _Saves:
    """Saves the histograms as they grow, where ``save`` is given."""

    def __init__(self, histograms: HistogramSet, save: Save | None) -> None:
        self.histograms = histograms
        self.save = save
        self.unsaved = 0
        self.earliest = 0.0
        """The time before which no save is due, for the last one took long."""

    def after(self, images: int) -> None:
        """Save if it is time, now that this number of images more is counted."""
        self.unsaved += images
        if self.unsaved >= SAVE_EVERY and time.monotonic() >= self.earliest:
            self.now()

    def now(self) -> None:
        if self.save and self.histograms.images:
            start = time.monotonic()
            self.save(self.histograms)
            end = time.monotonic()
            self.earliest = end + (end - start) / _MOST_SAVING
        self.unsaved = 0


@contextmanager
def _ctrl_c_as_event() -> Iterator[threading.Event]:
    """Inside the block, the first Ctrl-C sets the event and the second one interrupts.

    Nothing changes outside the main thread, or where the signal is handled or ignored by others.
    """
    stop = threading.Event()

    def note(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
