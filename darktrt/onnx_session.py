"""Models in ONNX Runtime: one way to open and to run them, for all rooms.

It needs onnxruntime and numpy alone, which is what a server has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from darktrt.errors import DarktrtError, quote

Provider = str | tuple[str, dict[str, Any]]


class OnnxSession:
    """A model as a function of its named inputs.

    Args:
        model: the model's bytes, or the path of its file.
        name: of the model, in errors.
        threads: the number of threads; by default that of the variable ``OMP_NUM_THREADS``, which torch and NumPy heed too,
            else one for each core.
        providers: where it runs, by ONNX Runtime's names.
        dequantize_weights: dequantize INT8 weights once, not in every run, and leave nothing to integer kernels, of which some
            saturate.

    Raises:
        DarktrtError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: bytes | str,
        name: str,
        threads: int = 0,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
        dequantize_weights: bool = False,
    ) -> None:
        import onnxruntime

        self.name = name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        options.intra_op_num_threads = threads or _stated_threads()
        if dequantize_weights:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=list(providers))
        except Exception as error:  # its exceptions share no base class
            raise DarktrtError(
                f"{name}: ONNX Runtime cannot load it ({_first_line(error)}); make it with 'darktrt convert'"
            ) from error
        self.outputs = [output.name for output in self._session.get_outputs()]

    @property
    def metadata(self) -> dict[str, str]:
        """Of the model's file.

        Raises:
            DarktrtError: it is no text.
        """
        try:
            return dict(self._session.get_modelmeta().custom_metadata_map)
        except UnicodeDecodeError as error:
            raise DarktrtError(f"{self.name}: its metadata is damaged; make it with 'darktrt surgery'") from error

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name.

        Raises:
            DarktrtError: ONNX Runtime refuses the inputs, or fails inside a damaged model.
        """
        try:
            values = self._session.run(self.outputs, dict(inputs))
        except Exception as error:  # its exceptions share no base class
            raise DarktrtError(f"{self.name}: ONNX Runtime fails: {_first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))


def available_providers() -> list[str]:
    """Where this ONNX Runtime can run models, the fastest first."""
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _stated_threads() -> int:
    """Of the environment; 0 if there are none. ONNX Runtime without OpenMP does not look there."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _first_line(error: Exception) -> str:
    return quote(str(error).strip().partition("\n")[0], 300)
