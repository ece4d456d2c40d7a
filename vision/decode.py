"""Decoding image files in threads, ahead of use, in order and in bounded memory: by Pillow, or JPEGs on the GPU."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, TypeVar

from darktrt.cuda import Frame
from darktrt.errors import DarktrtError
from darktrt.files import read_bytes
from darktrt.vision.gpu_jpeg import GpuJpegDecoder, JpegHeader, read_header
from darktrt.vision.images import MOST_FILE_BYTES, QUIET, Admit, load_image

Device = Literal["cpu", "gpu", "auto"]

_Value = TypeVar("_Value")

MOST_THREADS = 8
MOST_IMAGES, MOST_BYTES = 64, 2**29
"""How far :func:`read_ahead` reads by default: images, and bytes of their pixels."""

MOST_BATCH_BYTES = 2**29
"""Of the pixels of images that :func:`read_ahead` yields together: about those of the largest image that is read at all."""

_GPU_BATCH = 64


class Decoder:
    """Decodes images, many at a time; to be used as a context.

    Args:
        threads: how many threads run Pillow; by default one for each core, up to 8.
        device: ``"cpu"`` decodes by Pillow, to the bits of :func:`~darktrt.vision.images.read_image`. ``"gpu"`` decodes JPEGs
            on the GPU by nvImageCodec, to :class:`~darktrt.cuda.DeviceImage`, with pixels that may differ by some levels, and
            by Pillow what nvImageCodec cannot or may not decode. ``"auto"`` is ``"gpu"`` where there are a GPU and
            nvImageCodec.

    Raises:
        DarktrtError: ``device`` is ``"gpu"``, and there is no GPU or no nvImageCodec.
    """

    def __init__(self, threads: int | None = None, device: Device = "cpu") -> None:
        if threads is not None and threads < 1:
            raise DarktrtError(f"{threads} threads cannot decode; at least 1 is needed", argument="threads")
        self._gpu = _open_gpu(device)
        self._pool = ThreadPoolExecutor(threads or min(len(os.sched_getaffinity(0)), MOST_THREADS), "decode")
        self._jpegs = _JpegThread(self._gpu, self._pool) if self._gpu else None

    def close(self) -> None:
        """Stop: images not yet begun are cancelled. May be called twice."""
        if self._jpegs:
            self._jpegs.close()
            self._jpegs = None
        self._pool.shutdown(cancel_futures=True)
        if self._gpu:
            self._gpu.close()
            self._gpu = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def submit(self, source: Path | bytes, name: str, admit: Admit | None = None) -> Future[Frame]:
        """Begin to decode an image.

        Args:
            source: the file, or its bytes.
            name: names the image in errors.
            admit: is called in a thread with width and height before the pixels are decoded; what it raises is the result.
        """
        if not self._jpegs:
            return self._pool.submit(load_image, source, name, admit)
        return self._jpegs.submit(_Image(source, name, admit))

    def read(self, paths: Sequence[Path]) -> list[Frame]:
        """Decode image files.

        Raises:
            DarktrtError: the first that cannot be read, as :func:`~darktrt.vision.images.read_image` says it.
        """
        with QUIET:
            return _results([self.submit(path, str(path)) for path in paths])


def _open_gpu(device: Device) -> GpuJpegDecoder | None:
    if device == "cpu":
        return None
    try:
        return GpuJpegDecoder()
    except DarktrtError:
        if device == "gpu":
            raise
        return None


def _results(futures: Sequence[Future[Frame]]) -> list[Frame]:
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def read_ahead(
    batches: Iterable[Sequence[Path]],
    decoder: Decoder,
    most_images: int = MOST_IMAGES,
    most_bytes: int = MOST_BYTES,
    most_batch_bytes: int = MOST_BATCH_BYTES,
) -> Generator[list[Frame], None, None]:
    """Yield the images of each batch of files, in order; those of later batches are decoded meanwhile.

    Args:
        batches: image files; they are taken from the iterable as they are needed.
        decoder: decodes them.
        most_images: how many images are decoded or being decoded besides those yielded last.
        most_bytes: how many bytes their pixels may have. A batch that has more is decoded when its turn comes.
        most_batch_bytes: how many bytes the images that are yielded together may have. A batch that has more comes in parts.

    Raises:
        DarktrtError: a file cannot be read, when the turn of its batch comes. Close the generator if you stop before its end.
    """
    with QUIET, closing(Ahead(decoder, most_bytes)) as ahead:
        waiting: deque[list[Ticket]] = deque()
        for batch in batches:
            while waiting and sum(map(len, waiting)) + len(batch) > most_images:
                yield from _in_parts(ahead, waiting.popleft(), most_batch_bytes)
            waiting.append([ahead.start(path, str(path)) for path in batch])
        while waiting:
            yield from _in_parts(ahead, waiting.popleft(), most_batch_bytes)


def _in_parts(ahead: Ahead, tickets: list[Ticket], most_bytes: int) -> Iterator[list[Frame]]:
    """The images in as few parts as have no more bytes; one image is a part whatever it has."""
    while (count := ahead.count_within(tickets, most_bytes)) < len(tickets):
        yield ahead.finish(tickets[:count])
        tickets = tickets[count:]
    yield ahead.finish(tickets)


@dataclass(eq=False)
class Ticket:
    """An image that is decoded ahead."""

    source: Path | bytes
    name: str
    admit: Admit | None = None
    future: Future[Frame] = field(default_factory=Future)
    size: int = 0
    """Bytes of its pixels, once they are known."""
    admitted: bool = False
    awaited: bool = False
    """Its turn has come, so it need not wait for memory."""


class _Parked(BaseException):
    """There is no memory for an image yet; its ticket is in the list of those that wait for it."""


class Ahead:
    """Images that are decoded ahead. Those there is no memory for wait in a list and hold up no thread.

    Args:
        decoder: decodes them.
        most_bytes: how many bytes the pixels may have of images that nobody has asked for yet.
    """

    def __init__(self, decoder: Decoder, most_bytes: int = MOST_BYTES) -> None:
        self._decoder = decoder
        self._lock = threading.Lock()
        self._sized = threading.Condition(self._lock)
        self._free = most_bytes
        self._parked: list[Ticket] = []
        self._running: set[Future[Frame]] = set()
        self._closed = False

    def start(self, source: Path | bytes, name: str, admit: Admit | None = None) -> Ticket:
        """Decode an image when there is memory for it; arguments as those of :meth:`Decoder.submit`."""
        ticket = Ticket(source, name, admit)
        self._submit([ticket])
        return ticket

    def count_within(self, tickets: Sequence[Ticket], most_bytes: int) -> int:
        """Wait for the sizes of images: how many of the first have no more bytes together, but one at least."""
        total = 0
        for count, ticket in enumerate(tickets):
            with self._sized:
                self._sized.wait_for(lambda one=ticket: one.size or one.future.done())  # type: ignore[misc]  # a default
            total += ticket.size
            if count and total > most_bytes:
                return count
        return len(tickets)

    def finish(self, tickets: list[Ticket]) -> list[Frame]:
        """Wait for images; their memory is the caller's from now on.

        Raises:
            DarktrtError: the first that cannot be decoded.
        """
        for ticket in tickets:
            ticket.awaited = True
        self._submit(self._admissible())
        for ticket in tickets:
            with suppress(CancelledError):
                ticket.future.exception()  # the memory of all is known when all are done
        with self._lock:
            self._free += sum(ticket.size for ticket in tickets)
        self._submit(self._admissible())
        return [ticket.future.result() for ticket in tickets]

    def close(self) -> None:
        """Cancel what is not yet begun."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for future in running:
            future.cancel()

    def _submit(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            future = self._decoder.submit(ticket.source, ticket.name, partial(self._admit, ticket))
            with self._lock:
                self._running.add(future)
            future.add_done_callback(partial(self._done, ticket))

    def _admit(self, ticket: Ticket, width: int, height: int) -> None:
        if ticket.admit:
            ticket.admit(width, height)
        with self._lock:
            if self._closed:
                raise _Parked
            if not ticket.admitted:
                ticket.size = 3 * width * height
                self._sized.notify_all()
                if not self._take(ticket):
                    self._parked.append(ticket)
                    raise _Parked

    def _take(self, ticket: Ticket) -> bool:
        ticket.admitted = ticket.awaited or ticket.size <= self._free
        if ticket.admitted:
            self._free -= ticket.size
        return ticket.admitted

    def _admissible(self) -> list[Ticket]:
        """Take those tickets out of the list that there is memory for now."""
        with self._lock:
            admitted = [ticket for ticket in self._parked if self._take(ticket)]
            self._parked = [ticket for ticket in self._parked if not ticket.admitted]
        return admitted

    def _done(self, ticket: Ticket, future: Future[Frame]) -> None:
        with self._lock:
            self._running.discard(future)
        if future.cancelled():
            ticket.future.cancel()
        elif not isinstance(future.exception(), _Parked):
            settle(ticket.future, future.result)
        with self._lock:
            self._sized.notify_all()


def settle(future: Future[_Value], function: Callable[[], _Value]) -> None:
    """Make what the function returns or raises the result of a future."""
    try:
        value = function()
    except BaseException as error:  # is raised in the thread that waits for the future
        future.set_exception(error)
    else:
        future.set_result(value)


@dataclass(eq=False)
class _Image:
    """An image that may be decoded on the GPU."""

    source: Path | bytes
    name: str
    admit: Admit | None
    future: Future[Frame] = field(default_factory=Future)

    def cancel_with(self, work: Future[None]) -> None:
        """End without a result if the work on the image was cancelled."""
        if work.cancelled() and not self.future.cancel():
            self.future.set_exception(CancelledError())


class _Jpeg(NamedTuple):
    """An image that is decoded on the GPU."""

    image: _Image
    data: bytes
    header: JpegHeader


class _JpegThread:
    """A thread that decodes on the GPU, in one call, the JPEGs that were loaded while the last call ran.

    Another thread loads them. Several would be slower: they would take Python's lock from the thread that decodes.
    """

    def __init__(self, gpu: GpuJpegDecoder, pool: ThreadPoolExecutor) -> None:
        self._gpu, self._pool = gpu, pool
        self._reader = ThreadPoolExecutor(1, "read")
        self._loaded: queue.SimpleQueue[_Jpeg | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="jpegs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Decode what is loaded, and end."""
        self._reader.shutdown(cancel_futures=True)
        self._loaded.put(None)
        self._thread.join()

    def submit(self, image: _Image) -> Future[Frame]:
        """Begin to read and decode an image."""
        self._reader.submit(self._load, image).add_done_callback(image.cancel_with)
        return image.future

    def _load(self, image: _Image) -> None:
        """Read a file and its header; leave it to Pillow if the GPU may not decode it."""
        if not image.future.set_running_or_notify_cancel():
            return
        if jpeg := self._jpeg(image):
            self._loaded.put(jpeg)
        elif not image.future.done():
            self._by_pillow(image, partial(load_image, image.source, image.name, image.admit))

    def _by_pillow(self, image: _Image, load: Callable[[], Frame]) -> None:
        self._pool.submit(settle, image.future, load).add_done_callback(image.cancel_with)

    def _jpeg(self, image: _Image) -> _Jpeg | None:
        try:
            data = image.source if isinstance(image.source, bytes) else read_bytes(image.source, MOST_FILE_BYTES)
        except DarktrtError:
            return None  # Pillow fails too, and its words count
        header = read_header(data)
        if header is None:
            return None
        try:
            if image.admit:
                image.admit(header.width, header.height)
        except DarktrtError:
            return None  # is raised again, with the name
        except BaseException as error:  # the wish of the caller
            image.future.set_exception(error)
            return None
        return _Jpeg(image, data, header)

    def _run(self) -> None:
        while jpegs := self._next():
            try:
                frames = self._gpu.decode([(jpeg.data, jpeg.header) for jpeg in jpegs])
            except BaseException as error:  # is raised in the threads that wait for the images
                for jpeg in jpegs:
                    jpeg.image.future.set_exception(error)
                continue
            for (image, data, _), frame in zip(jpegs, frames, strict=True):
                if frame is None:
                    self._by_pillow(image, partial(load_image, data, image.name))
                else:
                    image.future.set_result(frame)

    def _next(self) -> list[_Jpeg]:
        """All that is loaded, at least one; none at the end."""
        jpegs: list[_Jpeg] = []
        waiting = self._loaded.get()
        while waiting is not None:
            jpegs.append(waiting)
            if self._loaded.empty() or len(jpegs) == _GPU_BATCH:
                return jpegs
            waiting = self._loaded.get()
        if jpegs:
            self._loaded.put(None)
        return jpegs
