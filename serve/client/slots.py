"""One request at a time: how a model's tensors travel to the server and back, in messages or in shared memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.serve.client.model_info import ModelInfo, TensorInfo
from darktrt.serve.client.shared_memory import Memory, layout, make_memory
from darktrt.serve.client.transport import Place, RegionLostError, TimedOutError, Transport
from darktrt.vision.detector import Arrays

SharedMemory = Literal["none", "system", "cuda"]


@dataclass(frozen=True)
class Prepared:
    """A request that can be sent, any number of times; its inputs lie in shared memory where that is on."""

    batch: int
    inputs: list[Any]
    outputs: list[Any]
    places: dict[str, Place]
    """Of the tensors in shared memory."""


class Slot:
    """What one request after the other uses: with shared memory, places for the images and for outputs of known size."""

    def __init__(self, model: ModelInfo, batch: int, kind: SharedMemory) -> None:
        self._model, self._kind = model, kind
        self._memories: list[Memory] = []
        """The last one is in use; the server may still write into those before."""
        self._places: dict[str, Place] = {}
        tensors = [*([model.inputs["images"]] if "images" in model.inputs else []), *model.outputs.values()]
        self._sizes = {one.name: size for one in tensors if (size := model.size(one, batch))}

    async def take_memory(self, transport: Transport) -> None:
        """Take a region, where shared memory is on, and make it known to the server."""
        if self._kind == "none":
            return
        memory = make_memory(self._kind, transport.endpoint, layout("", self._sizes)[1])
        self._memories.append(memory)
        self._places, _ = layout(memory.name, self._sizes)
        await memory.register(transport)

    async def close(self, transport: Transport) -> None:
        """Take the memory back; a server that is gone or was started anew does not know it any more, which is as good."""
        for memory in self._memories:
            with suppress(DarktrtError):
                await memory.unregister(transport)
            memory.close()
        self._memories.clear()

    async def run(self, transport: Transport, inputs: Arrays) -> Arrays:
        """All outputs by name, but texts, which say what the others say."""
        prepared = self.prepare(transport, inputs)
        result = await self.send(transport, prepared)
        return {
            one.name: self._read(one, prepared.batch) if one.name in prepared.places else result.as_numpy(one.name)
            for one in self._asked()
        }

    def prepare(self, transport: Transport, inputs: Arrays) -> Prepared:
        """A request of these inputs, without those that the model does not have; what has no place goes in the message."""
        batch = len(next(iter(inputs.values())))
        inputs = {name: array for name, array in inputs.items() if name in self._model.inputs}
        outputs = [(one.name, self._model.size(one, batch)) for one in self._asked()]
        sizes = {**{name: array.nbytes for name, array in inputs.items()}, **{name: size or 0 for name, size in outputs}}
        fits = [name for name, place in self._places.items() if 0 < sizes.get(name, 0) <= place.size]
        places = {name: replace(self._places[name], size=sizes[name]) for name in fits}
        for name in inputs.keys() & places.keys():
            self._memories[-1].write(places[name].offset, inputs[name])
        sent = [transport.input(name, array, places.get(name)) for name, array in self._batched(inputs, batch).items()]
        return Prepared(batch, sent, [transport.output(name, places.get(name)) for name, _ in outputs], places)

    async def send(self, transport: Transport, prepared: Prepared) -> Any:
        """tritonclient's ``InferResult``; memory that a late answer could still write into is used no more."""
        model, version = self._model.name, self._model.version
        try:
            try:
                return await transport.infer(model, version, prepared.inputs, prepared.outputs)
            except RegionLostError:
                await self._memories[-1].register(transport)
                return await transport.infer(model, version, prepared.inputs, prepared.outputs)
        except TimedOutError:
            await self.take_memory(transport)
            raise

    def _asked(self) -> list[TensorInfo]:
        return [one for one in self._model.outputs.values() if one.dtype != object]

    def _batched(self, inputs: Arrays, batch: int) -> Arrays:
        """Where Triton has a batch, every input has it in front; the thresholds have none of their own."""
        if not self._model.max_batch:
            return inputs
        return {name: np.repeat(array[np.newaxis], batch, 0) if array.ndim == 1 else array for name, array in inputs.items()}

    def _read(self, output: TensorInfo, batch: int) -> NDArray[Any]:
        array = np.empty(self._model.shape(output, batch), output.dtype)
        self._memories[-1].read(self._places[output.name].offset, array)
        return array
