"""Slots of requests under way: each sends one request at a time, with its tensors in the message or in shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from darktrt.errors import DarktrtError
from darktrt.serve.client.calls import LARGEST_ANSWER, damaged
from darktrt.serve.client.shared_memory import Memory, layout, make_memory
from darktrt.serve.client.transport import MemorySlice, RegionLostError, TimedOutError, Transport, UnreachableError
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
        _check_outputs(model, batch)
        images = {} if model.encoded else {"images": model.size(model.inputs["images"], batch) or _usual_bytes(model, batch)}
        self._sizes = images | {one.name: size for one in model.outputs.values() if (size := model.size(one, batch))}

    @property
    def lacks_memory(self) -> bool:
        """Whether :meth:`allocate` is still to be called; until then all tensors travel in the message."""
        return self._kind != "none" and not self._memories

    async def allocate(self, transport: Transport) -> None:
        """Allocate a region and register it with the server, where shared memory is on."""
        if self._kind != "none":
            await self._new_memory(transport).register(transport)

    def _new_memory(self, transport: Transport) -> Memory:
        assert self._kind != "none"
        memory = make_memory(self._kind, transport.endpoint, layout("", self._sizes)[1])
        self._memories.append(memory)
        self._slices, _ = layout(memory.name, self._sizes)
        return memory

    async def give_up_memory(self, transport: Transport) -> None:
        """Release the memory and use none any more: all tensors travel in the message."""
        await self.close(transport)
        self._kind, self._slices = "none", {}

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
        try:
            arrays = await self.send(transport, prepared)
            return self._outputs(transport, prepared, arrays)
        except RegionLostError:  # again and again: somebody else takes the memory away
            prepared = self._request(transport, inputs, {})
            arrays = await transport.infer(self._model.name, self._model.version, prepared.inputs, prepared.outputs)
            return self._outputs(transport, prepared, arrays)

    async def prepare(self, transport: Transport, inputs: Arrays) -> PreparedRequest:
        """A request with these inputs, as far as the model has them; tensors without shared memory travel in the message.

        Images of any size get a larger region where the present one is too small; there must be no request under way.
        """
        if self._model.info.input == "image" and "images" in self._slices and inputs["images"].nbytes > self._sizes["images"]:
            self._sizes["images"], self._slices = inputs["images"].nbytes, {}  # no region any more if allocating fails
            await self._release(transport, self._memories.pop())
            await self.allocate(transport)
        return self._request(transport, inputs, self._slices)

    def _request(self, transport: Transport, inputs: Arrays, memory: Mapping[str, MemorySlice]) -> PreparedRequest:
        """A request whose tensors lie in shared memory as far as they have some, and fit."""
        batch = len(next(iter(inputs.values())))
        inputs = {name: array for name, array in inputs.items() if name in self._model.inputs}
        outputs = [(one.name, self._model.size(one, batch)) for one in self._requested()]
        sizes = {**{name: array.nbytes for name, array in inputs.items()}, **{name: size or 0 for name, size in outputs}}
        fitting = [name for name, region in memory.items() if 0 < sizes.get(name, 0) <= region.size]
        slices = {name: replace(memory[name], size=sizes[name]) for name in fitting}
        for name in inputs.keys() & slices.keys():
            self._memories[-1].write(slices[name].offset, inputs[name])
        sent = [transport.input(name, array, slices.get(name)) for name, array in self._batched(inputs, batch).items()]
        return PreparedRequest(batch, sent, [transport.output(name, slices.get(name)) for name, _ in outputs], slices)

    async def send(self, transport: Transport, prepared: PreparedRequest) -> Arrays:
        """The outputs that are not in shared memory; memory that a late answer could still write into is not used again."""
        model, version = self._model.name, self._model.version
        try:
            try:
                return await transport.infer(model, version, prepared.inputs, prepared.outputs)
            except RegionLostError:
                await self._register_again(transport)
                return await transport.infer(model, version, prepared.inputs, prepared.outputs)
        except TimedOutError:
            if self._slices:
                self._slices = {}  # of none if there is no room for more
                self._new_memory(transport)  # which the next request registers: this server may not answer that either
            raise

    async def _register_again(self, transport: Transport) -> None:
        try:
            await self._memories[-1].register(transport)
        except UnreachableError:
            raise
        except DarktrtError as error:  # the file is gone, or the server allows no shared memory any more
            raise RegionLostError(str(error)) from error

    def _requested(self) -> list[TensorInfo]:
        return [one for one in self._model.outputs.values() if one.dtype != object]

    def _batched(self, inputs: Arrays, batch: int) -> Arrays:
        """Where Triton batches, every input has the batch as its first dimension; the thresholds are repeated for it."""
        if not self._model.max_batch:
            return inputs
        return {name: np.repeat(array[np.newaxis], batch, 0) if array.ndim == 1 else array for name, array in inputs.items()}

    def _outputs(self, transport: Transport, prepared: PreparedRequest, arrays: Arrays) -> Arrays:
        """All outputs of a request.

        Raises:
            DarktrtError: the answer lacks one, or has it in another shape or type than the model.
            RegionLostError: the memory became smaller.
        """
        found = {}
        for one in self._requested():
            shape = self._model.shape(one, prepared.batch)
            if one.name in prepared.slices:
                found[one.name] = np.empty(shape, one.dtype)
                self._memories[-1].read(self._slices[one.name].offset, found[one.name])
            elif (array := arrays.get(one.name)) is not None and array.dtype == one.dtype and _fits(array.shape, shape):
                found[one.name] = array
            else:
                has = "no" if array is None else f"{array.dtype} {list(array.shape)} as"
                raise damaged(transport.endpoint, f"it has {has} output '{one.name}', not {one.dtype} {list(shape)}")
        return found


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether a shape is one that a model declares, which may leave sizes open."""
    return len(shape) == len(declared) and all(one < 0 or size == one for one, size in zip(declared, shape, strict=True))


def _check_outputs(model: ModelInfo, batch: int) -> None:
    """See that a server declares no outputs that no detector has."""
    size = sum(model.size(one, batch) or 0 for one in model.outputs.values())
    if size > LARGEST_ANSWER:
        raise DarktrtError(
            f"model '{model.name}': its outputs for a batch of {batch} have {size:,} bytes, more than {LARGEST_ANSWER:,}",
            "batch",
        )


def _usual_bytes(model: ModelInfo, batch: int) -> int:
    """Of a batch of images of the usual size."""
    width, height = model.info.usual_image
    return 3 * width * height * batch
