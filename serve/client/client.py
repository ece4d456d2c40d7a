"""A client of detectors on Triton servers: ``with Client("localhost:8001") as client: client.detect("dog.jpg")``."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import Frame, host_pixels
from darktrt.errors import DarktrtError
from darktrt.metadata import IOU_THRESHOLD, SCORE_THRESHOLD, DetectorInfo
from darktrt.serve.client.calls import LARGEST_ANSWER
from darktrt.serve.client.requests import as_png, file_request
from darktrt.serve.client.servers import Servers, ServerState
from darktrt.serve.client.slots import SharedMemory
from darktrt.serve.client.statistics import ModelStatistics
from darktrt.serve.client.transport import Endpoint
from darktrt.serve.model_info import ModelInfo
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import Arrays, ImageLike, NetworkDetector, Run, checked_outputs, warn_at_limit
from darktrt.vision.files import FileResult, ahead, detect_files
from darktrt.vision.images import read_image

_Value = TypeVar("_Value")


class Client:
    """A connection to one model of a server, to be used as a context; several threads may call its methods.

    Several servers of the same model share its requests: each goes to the server with the fewest under way. A server that fails
    or stops gets none until it has the model again and answers; its requests go to the others.

    Args:
        server: ``HOST:PORT`` for gRPC, ``http://HOST:PORT``, either with TLS as ``grpcs://`` or ``https://``, or an
            :class:`~darktrt.serve.client.transport.Endpoint` with certificates; or several of these.
        model: its name; optional where the server has one model.
        version: a number as text (default: the server chooses by its policy).
        score_threshold: detections must exceed it; sent with every request.
        iou_threshold: the overlap above which NMS suppresses the lesser of two detections; sent with every request.
        batch: most images of one request; :meth:`detect_files` and :meth:`detect_all` fill requests up to it.
        in_flight: most requests under way at once at each server.
        timeout: seconds that a request may last.
        retry_seconds: how long to repeat a request while no server can be reached, such as during a restart.
        shared_memory: ``system`` or ``cuda`` memory for images to a server on this machine, or ``none`` to send them by the
            socket. Of several servers, those that cannot use it get images by the socket.

    Raises:
        DarktrtError: no server can be reached, one has no such model or another one than the first, or the model was not made
            by darktrt.
    """

    def __init__(
        self,
        server: str | Endpoint | Sequence[str | Endpoint] = "localhost:8001",
        model: str | None = None,
        version: str = "",
        *,
        score_threshold: float = SCORE_THRESHOLD,
        iou_threshold: float = IOU_THRESHOLD,
        batch: int = 1,
        in_flight: int = 4,
        timeout: float | None = 60.0,
        retry_seconds: float = 30.0,
        shared_memory: SharedMemory = "none",
    ) -> None:
        if batch < 1 or in_flight < 1 or not retry_seconds >= 0:
            raise DarktrtError("a client needs at least 1 image a request, 1 request in flight, and 0 seconds to retry")
        self.endpoints = _endpoints(server)
        self.in_flight = in_flight * len(self.endpoints)
        """Most requests under way at once, at all servers together."""
        self._stack = ExitStack()
        self._servers = _wait(Servers.open(self.endpoints, timeout, retry_seconds))
        self._stack.callback(lambda: _wait(self._servers.close()))
        try:
            self.model = _wait(self._servers.find(model, version))
            self.info = _client_info(self.model, batch)
            _wait(self._servers.make_slots(self.model, self.info.batch[2], in_flight, shared_memory))
            kind = EncodedDetector if self.model.encoded else NetworkDetector
            self.detector = self._stack.enter_context(kind(self.run, self.info, score_threshold, iou_threshold))
        except BaseException:
            self.close()
            raise

    @property
    def retries(self) -> int:
        """How many requests were repeated so far because a server was away."""
        return self._servers.retries

    @property
    def servers(self) -> list[ServerState]:
        """The state of each server: whether it gets requests, and how many it answered."""
        return self._servers.states()

    def detect(self, image: ImageLike) -> Detections:
        """The detections in one image, in pixels of the image, best first.

        Args:
            image: an RGB array ``(H, W, 3)`` uint8, or the path of an image file.

        Raises:
            DarktrtError: it is no image, or the server does not answer.
        """
        return self.detect_all([image])[0]

    def detect_all(self, images: Sequence[ImageLike]) -> list[Detections]:
        """The detections of each image, in requests of up to ``batch`` images, ``in_flight`` of them under way at once."""
        size = self.info.batch[2]
        groups = [images[first : first + size] for first in range(0, len(images), size)]
        with closing(ahead(self.detector.detect, groups, min(self.in_flight, max(len(groups), 1)))) as results:
            return [detections for _, group in results for detections in group]

    def detect_files(
        self, sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
    ) -> Generator[FileResult, None, None]:
        """:func:`darktrt.vision.files.detect_files` with up to ``in_flight`` requests at once; results keep their order."""
        return detect_files(self.detector, sources, output, self.in_flight)

    def run(self, inputs: Arrays) -> Arrays:
        """The model as a function, named arrays in and named arrays out, as ONNX Runtime or an engine would run it.

        Raises:
            DarktrtError: the server refuses the request, does not answer in time, or stays away too long.
        """
        return _wait(self._servers.run(inputs))

    def statistics(self) -> list[ModelStatistics]:
        """The counts of the model, one record a server and version; those of servers that are away are missing."""
        return _wait(self._servers.statistics())

    def close(self) -> None:
        """Cancel requests under way, and release the shared memory; may be called twice."""
        self._stack.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _endpoints(server: str | Endpoint | Sequence[str | Endpoint]) -> list[Endpoint]:
    servers = [server] if isinstance(server, str | Endpoint) else server
    endpoints = [Endpoint.parse(one) if isinstance(one, str) else one for one in servers]
    if not endpoints:
        raise DarktrtError("a client needs at least one server", "server")
    for number, endpoint in enumerate(endpoints):
        if endpoint in endpoints[:number]:
            raise DarktrtError(f"{endpoint}: is named twice; name each server once", "server")
    return endpoints


@contextmanager
def triton_run(server: str | Endpoint, model: str | None = None, **options: Any) -> Iterator[tuple[Run, DetectorInfo]]:
    """A model on a server as a function with its metadata, the form of evaluators; ``options`` are :class:`Client`'s.

    Raises:
        DarktrtError: as :class:`Client`, or the model accepts only encoded images.
    """
    with Client(server, model, **options) as client:
        if client.model.encoded:
            raise DarktrtError(
                f"{client.endpoints[0]}: model '{client.model.name}' accepts image files, not tensors; publish it for tensors"
            )
        yield client.run, client.info


def _client_info(model: ModelInfo, batch: int) -> DetectorInfo:
    """The metadata with the batches of requests, those of Triton and of the client, instead of the network's own."""
    smallest, _, largest = model.info.batch
    if model.max_batch:
        smallest, largest = 1, model.max_batch
    if not smallest <= batch <= largest and batch != 1:
        raise DarktrtError(f"model '{model.name}' accepts {smallest} to {largest} images a request, not {batch}", "batch")
    most = max(batch, smallest)
    if (size := (model.size(model.inputs["images"], most) if "images" in model.inputs else 0) or 0) > 4 * LARGEST_ANSWER:
        raise DarktrtError(f"model '{model.name}': {most} images of its input have {size:,} bytes; ask for fewer", "batch")
    return replace(model.info, batch=(smallest, most, most))


class EncodedDetector(NetworkDetector):
    """A model that accepts encoded images and outputs boxes in their pixels."""

    def __init__(self, run: Run, info: DetectorInfo, score_threshold: float, iou_threshold: float) -> None:
        super().__init__(run, info, score_threshold, iou_threshold)
        self._request = run

    def detect_batches(self, batches: Iterable[Sequence[ImageLike]]) -> Generator[list[Detections], None, None]:
        """The detections of each batch; files are sent unchanged, arrays as PNG."""
        for batch in batches:
            yield self._detect_encoded([_encoded(image) for image in batch])

    def detect_frames(
        self, batches: Iterable[Sequence[ImageLike]]
    ) -> Generator[tuple[list[Frame], list[Detections]], None, None]:
        for batch in batches:
            (detections,) = self.detect_batches([batch])
            yield [read_image(image) if isinstance(image, str | os.PathLike) else image for image in batch], detections

    def detect_images(
        self, paths: Sequence[Path], pixels: bool = True
    ) -> tuple[Sequence[NDArray[np.uint8] | None], list[Detections]]:
        return [read_image(path) if pixels else None for path in paths], self.detect(paths)

    def _detect_encoded(self, encoded: list[bytes]) -> list[Detections]:
        outputs = self._request(file_request(self.info, encoded, self.thresholds))
        outputs = checked_outputs(outputs, self.info, len(encoded))
        parts = zip(*(outputs[name] for name in ("num_detections", "boxes", "scores", "classes")), strict=True)
        return [self._cut(*arrays) for arrays in parts]

    def _cut(self, count: NDArray[Any], boxes: NDArray[Any], scores: NDArray[Any], classes: NDArray[Any]) -> Detections:
        n = int(count.item())
        warn_at_limit(n, self.info, self.info.name)
        return Detections(boxes[:n], scores[:n], classes[:n], self.info.class_names)


def _encoded(image: ImageLike) -> bytes:
    if isinstance(image, str | os.PathLike):
        return read_encoded(image)
    return as_png(host_pixels(image))


def read_encoded(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        DarktrtError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DarktrtError(f"{path}: cannot be read: {error.strerror}") from error


# --- the event loop ---


_ONE_LOOP = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all clients of this process, in a thread of its own: gRPC for Python does not support a second one."""
    with _ONE_LOOP:  # with only the cache, two threads could start one each
        return _start_loop()


@lru_cache(maxsize=1)
def _start_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="darktrt client", daemon=True).start()
    return loop


def _wait(work: Coroutine[Any, Any, _Value]) -> _Value:
    """Run the coroutine in the event loop and wait for it; Ctrl-C cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
