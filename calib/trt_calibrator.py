"""TensorRT's own INT8 calibrator (8.6 to 10), fed with a ready table or with batches of images.

TensorRT's callbacks must not raise, and the answer "nothing" means "no more data" to it: it then builds an engine from the
data so far. So an exception is stored, the callback answers "nothing", and the exception is raised once the build has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.table import CalibrationTable, parse_table
from darktrt.cuda import DeviceMemory, host_pixels
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.progress import progress

T = TypeVar("T")
Batch = Mapping[str, NDArray[Any]]
"""An array for each input of the network, by name."""

DTYPES = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?"}
"""NumPy's types by TensorRT's names; ``tensorrt.nptype`` of 8.6.0 fails with NumPy 1.24 and later."""


class Input(NamedTuple):
    """Shape, batch included, and type of an input of the network."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Source(Protocol):
    """The origin of TensorRT's scales; these methods may raise."""

    batch: int
    """Images at a time."""

    def begin(self, inputs: Mapping[str, Input]) -> None:
        """Receive the network's inputs; called first."""

    def next_batch(self, names: Sequence[str]) -> list[int] | None:
        """Addresses in GPU memory of the next batch's inputs, in the order of ``names``; None after the last batch."""

    def read_cache(self) -> bytes | None:
        """A calibration cache, the same object at every call, as TensorRT keeps a pointer into it; None if there is none."""

    def write_cache(self, cache: bytes) -> None:
        """Receive the cache that TensorRT has made."""


@contextmanager
def calibrator(
    trt: Any, source: Source, network: Any, failed: Event | None = None, size: tuple[int, int] | None = None
) -> Iterator[Any]:
    """An ``IInt8EntropyCalibrator2`` for ``config.int8_calibrator``; leaving the context raises a callback's exception.

    Args:
        trt: the module tensorrt.
        source: the origin of the scales.
        network: the parsed network, whose inputs the batches must fit.
        failed: set on such an exception, for a progress monitor to stop the build, which continues otherwise.
        size: width and height of the images in the batches, where the network takes images of any size.
    """
    source.begin(network_inputs(network, source.batch, size))
    adapter = _adapter(trt, source, failed or Event())
    try:
        yield adapter
    finally:
        if adapter.error is not None:
            raise adapter.error


def network_inputs(network: Any, batch: int, size: tuple[int, int] | None = None) -> dict[str, Input]:
    """The inputs of a TensorRT network, by name; open dimensions become the batch and, of images of any size, this size."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    chosen = (batch, *(size or ())[::-1])
    return {
        tensor.name: Input(
            tuple(chosen[i] if n == -1 else n for i, n in enumerate(tensor.shape)), np.dtype(DTYPES[tensor.dtype.name])
        )
        for tensor in tensors
    }


def _adapter(trt: Any, source: Source, failed: Event) -> Any:
    class Calibrator(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        error: BaseException | None = None

        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return source.batch

        def get_batch(self, names: Sequence[str]) -> list[int] | None:
            return self._keep(lambda: source.next_batch(names))

        def read_calibration_cache(self) -> bytes | None:
            return self._keep(source.read_cache)

        def write_calibration_cache(self, cache: Any) -> None:
            self._keep(lambda: source.write_cache(bytes(cache)))

        def _keep(self, act: Callable[[], T]) -> T | None:
            if self.error is not None:
                return None
            try:
                return act()
            except BaseException as error:  # Ctrl-C too, which TensorRT would swallow
                self.error = error
                failed.set()
                return None

    return Calibrator()


class TableSource:
    """A table as the calibration cache: no image is read and no calibration runs on the GPU.

    ``table.version`` should be that of the installed TensorRT. TensorRT 8.6.0 accepts a cache of any other version too
    (measured), but NVIDIA guarantees that for none.
    """

    def __init__(self, table: CalibrationTable, batch: int = 1) -> None:
        self.table = table
        self.batch = batch
        self._text = table.text().encode()

    def begin(self, inputs: Mapping[str, Input]) -> None:
        pass

    def next_batch(self, names: Sequence[str]) -> list[int] | None:
        """Raises:
        DarktrtError: always; TensorRT asks for images only where it has rejected the table.
        """
        header = self._text.partition(b"\n")[0].decode()
        raise DarktrtError(
            f"this TensorRT does not accept the calibration cache ('{header}') and asks for images, of which there are none"
        )

    def read_cache(self) -> bytes:
        return self._text

    def write_cache(self, cache: bytes) -> None:
        pass  # the same cache


class BatchSource:
    """Batches for TensorRT's own calibration. All must be whole, of the network's shapes and types, and finite.

    ``batches`` may be a generator: one batch is in memory at a time, and one on the GPU. With a TensorRT network and config::

        with BatchSource(batches, batch=8) as source, calibrator(trt, source, network) as config.int8_calibrator:
            plan = builder.build_serialized_network(network, config)
        source.table().save("calibration.cache")

    Leaving the context frees the GPU's memory. ``cache`` is the cache that TensorRT has written, byte for byte, and ``count``
    the number of batches that it has read.
    """

    def __init__(self, batches: Iterable[Batch], batch: int) -> None:
        self.batch = batch
        self.count = 0
        self.cache = b""
        self._batches = iter(batches)
        self._inputs: Mapping[str, Input] = {}
        self._memory = DeviceMemory()

    def __enter__(self) -> BatchSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memory.free()

    def begin(self, inputs: Mapping[str, Input]) -> None:
        self._inputs = inputs

    def next_batch(self, names: Sequence[str]) -> list[int] | None:
        """Raises:
        DarktrtError: there is no batch at all, reading one failed, or an array does not fit; the message names the batch.
        """
        batch = self._next()
        if batch is None:
            return None
        if odd := sorted(set(batch) ^ set(names)):
            raise DarktrtError(
                f"calibration batch {self.count} {'has' if odd[0] in batch else 'lacks'} '{odd[0]}'; "
                f"the inputs of the network are {', '.join(names)}"
            )
        return [self._memory.upload(name, self._checked(name, batch[name])) for name in names]

    def _next(self) -> Batch | None:
        try:
            batch = next(self._batches, None)
        except DarktrtError:
            raise
        except Exception as error:  # of any code that reads images
            raise DarktrtError(f"calibration batch {self.count + 1} cannot be read: {error!r}") from error
        if batch is None and not self.count:
            raise DarktrtError("there is no batch of images to calibrate on")
        self.count += batch is not None
        return batch

    def _checked(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        shape, dtype = self._inputs[name]
        if array.shape != shape or array.dtype != dtype:
            short = array.shape[1:] == shape[1:] and array.shape[:1] < shape[:1] and array.dtype == dtype
            raise DarktrtError(
                f"calibration batch {self.count}: '{name}' is {array.shape} {array.dtype}, not {shape} {dtype}"
                + (f"; the images must fill their batches of {shape[0]}" if short else "")
            )
        if dtype.kind == "f" and not np.isfinite(array).all():
            raise DarktrtError(f"calibration batch {self.count}: '{name}' has values that are NaN or infinite")
        return array

    def read_cache(self) -> None:
        return None

    def write_cache(self, cache: bytes) -> None:
        self.cache = cache

    def table(self) -> CalibrationTable:
        """The table that TensorRT has written.

        Raises:
            DarktrtError: it has not calibrated, or a scale is not positive and finite.
        """
        if not self.cache:
            raise DarktrtError("TensorRT has written no calibration cache; was the engine built, and in INT8?")
        return parse_table(self.cache.decode(), "TensorRT's calibration cache")


def image_source(images: Sequence[Path], info: DetectorInfo) -> BatchSource:
    """Image files as batches of all inputs of a model: of its one size where the batch is static, of one image otherwise.

    The last batch is filled up with the first images. Images are read ahead of their batch; one that cannot be read raises
    :class:`DarktrtError` when its batch is due. A model that takes images of any size gets them fitted and rounded to bytes,
    since TensorRT calibrates with one size.
    """
    size = info.batch[0] if info.batch[0] == info.batch[2] else 1
    return BatchSource(_image_batches(images, info, size), size)


def _image_batches(images: Sequence[Path], info: DetectorInfo, size: int) -> Iterator[Batch]:
    from darktrt.vision.decode import Decoder, read_ahead
    from darktrt.vision.detector import fit

    filled = [*images, *islice(cycle(images), -len(images) % size)]
    batches = [filled[first : first + size] for first in range(0, len(filled), size)]
    of_bytes = info.input == "image"
    fitted_info = replace(info, input="uint8", image_sizes=None) if of_bytes else info
    with (
        progress(len(batches), "batches", "calibrating") as bar,
        Decoder() as decoder,
        closing(read_ahead(batches, decoder)) as decoded,
    ):
        every = (fit(host_pixels(frame), fitted_info) for frames in decoded for frame in frames)
        while fitted := list(islice(every, size)):
            arrays = np.stack([array for array, _ in fitted])
            arrays = info.images_of_bytes(arrays) if of_bytes else arrays
            yield info.model_inputs(arrays, [placement.inner_size for _, placement in fitted], Thresholds(0.5, 0.5))
            bar.update()
