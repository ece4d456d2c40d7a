"""Running a model: the ONNX file by ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy.typing as npt

from darktrt import METADATA_KEY, DarktrtError, DetectorInfo

Tensors = dict[str, npt.NDArray]  # type: ignore[type-arg]


class OnnxRunner:
    """An ONNX Runtime session on the CPU, to be used as a context.

    ``info`` is the model's metadata; :meth:`run` takes all inputs by name and gives all outputs by name.

    Raises:
        DarktrtError: the file cannot be read, is no ONNX, or was not made by darktrt.
    """

    def __init__(self, path: str | Path) -> None:
        import onnxruntime

        self.path = str(path)
        if not Path(path).is_file():
            raise DarktrtError(f"{path}: cannot read: no such file; make it with 'darktrt surgery'")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            first = str(error).splitlines()[0]
            raise DarktrtError(f"{path}: ONNX Runtime cannot load it ({first}); is it an ONNX file?") from error
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map
        except UnicodeDecodeError as error:
            raise DarktrtError(f"{path}: its metadata is damaged; make it with 'darktrt surgery'") from error
        if METADATA_KEY not in metadata:
            raise DarktrtError(f"{path}: has no darktrt metadata; make it with 'darktrt convert' and 'darktrt surgery'")
        self.info = DetectorInfo.from_json(metadata[METADATA_KEY], str(path))
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, npt.NDArray]) -> Tensors:  # type: ignore[type-arg]
        """All outputs by name.

        Raises:
            DarktrtError: ONNX Runtime refuses the inputs, or fails inside a damaged model.
        """
        try:
            outputs = self._session.run(self._outputs, dict(inputs))
        except Exception as error:  # its exceptions share no base class
            raise DarktrtError(f"{self.path}: ONNX Runtime fails: {str(error).splitlines()[0]}") from error
        return dict(zip(self._outputs, outputs, strict=True))

    def __enter__(self) -> OnnxRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._session
