"""Slots of requests under way: each sends one request at a time, with its tensors in the message or in shared memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.serve.client.shared_memory import Memory, layout, make_memory
from darktrt.serve.client.transport import MemorySlice, RegionLostError, TimedOutError, Transport
from darktrt.serve.model_info import ModelInfo, TensorInfo
from darktrt.vision.detector import Arrays

SharedMemory = Literal["none", "system", "cuda"]


@dataclass(frozen=True)
class PreparedRequest:
    """A request that can be sent any number of times; its inputs lie in shared memory where that is on."""

    batch: int
    inputs: list[Any]
    outputs: list[Any]
    slices: dict[str, MemorySlice]
    """Of the tensors in shared memory."""


class Slot:
    """Sends one request after the other; with shared memory it owns memory for the images and the outputs of known size."""

    def __init__(self, model: ModelInfo, batch: int, kind: SharedMemory) -> None:
        self._model, self._kind = model, kind
        self._memories: list[Memory] = []
        """The last one is in use; the server may still write into the others."""
        self._slices: dict[str, MemorySlice] = {}
        images = {} if model.encoded else {"images": model.size(model.inputs["images"], batch) or _usual_bytes(model, batch)}
        self._sizes = images | {one.name: size for one in model.outputs.values() if (size := model.size(one, batch))}

    async def allocate(self, transport: Transport) -> None:
        """Allocate a region and register it with the server, where shared memory is on."""
        if self._kind == "none":
            return
        memory = make_memory(self._kind, transport.endpoint, layout("", self._sizes)[1])
        self._memories.append(memory)
        self._slices, _ = layout(memory.name, self._sizes)
        await memory.register(transport)

    async def close(self, transport: Transport) -> None:
        """Release the memory; a server that is gone or was restarted does not know it any more, which is as good."""
        while self._memories:
            await self._release(transport, self._memories.pop())

    async def _release(self, transport: Transport, memory: Memory) -> None:
        with suppress(DarktrtError):
            await memory.unregister(transport)
        memory.close()

    async def run(self, transport: Transport, inputs: Arrays) -> Arrays:
        """All outputs by name, except strings, which repeat the others as text."""
        prepared = await self.prepare(transport, inputs)
        result = await self.send(transport, prepared)
        return {
            one.name: self._read(one, prepared.batch) if one.name in prepared.slices else result.as_numpy(one.name)
            for one in self._requested()
        }

    async def prepare(self, transport: Transport, inputs: Arrays) -> PreparedRequest:
        """A request with these inputs, as far as the model has them; tensors without shared memory travel in the message.

        Images of any size get a larger region where the present one is too small; there must be no request under way.
        """
        if self._model.info.input == "image" and "images" in self._slices and inputs["images"].nbytes > self._sizes["images"]:
            self._sizes["images"], self._slices = inputs["images"].nbytes, {}  # no region any more if allocating fails
            await self._release(transport, self._memories.pop())
            await self.allocate(transport)
        batch = len(next(iter(inputs.values())))
        inputs = {name: array for name, array in inputs.items() if name in self._model.inputs}
        outputs = [(one.name, self._model.size(one, batch)) for one in self._requested()]
        sizes = {**{name: array.nbytes for name, array in inputs.items()}, **{name: size or 0 for name, size in outputs}}
        fitting = [name for name, memory in self._slices.items() if 0 < sizes.get(name, 0) <= memory.size]
        slices = {name: replace(self._slices[name], size=sizes[name]) for name in fitting}
        for name in inputs.keys() & slices.keys():
            self._memories[-1].write(slices[name].offset, inputs[name])
        sent = [transport.input(name, array, slices.get(name)) for name, array in self._batched(inputs, batch).items()]
        return PreparedRequest(batch, sent, [transport.output(name, slices.get(name)) for name, _ in outputs], slices)

    async def send(self, transport: Transport, prepared: PreparedRequest) -> Any:
        """tritonclient's ``InferResult``; memory that a late answer could still write into is not used again."""
        model, version = self._model.name, self._model.version
        try:
            try:
                return await transport.infer(model, version, prepared.inputs, prepared.outputs)
            except RegionLostError:
                await self._memories[-1].register(transport)
                return await transport.infer(model, version, prepared.inputs, prepared.outputs)
        except TimedOutError:
            await self.allocate(transport)
            raise

    def _requested(self) -> list[TensorInfo]:
        return [one for one in self._model.outputs.values() if one.dtype != object]

    def _batched(self, inputs: Arrays, batch: int) -> Arrays:
        """Where Triton batches, every input has the batch as its first dimension; the thresholds are repeated for it."""
        if not self._model.max_batch:
            return inputs
        return {name: np.repeat(array[np.newaxis], batch, 0) if array.ndim == 1 else array for name, array in inputs.items()}

    def _read(self, output: TensorInfo, batch: int) -> NDArray[Any]:
        array = np.empty(self._model.shape(output, batch), output.dtype)
        self._memories[-1].read(self._slices[output.name].offset, array)
        return array


def _usual_bytes(model: ModelInfo, batch: int) -> int:
    """Of a batch of images of the usual size."""
    width, height = model.info.usual_image
    return 3 * width * height * batch
