"""How an engine is built: everything that ``darktrt engine`` offers beyond the files and the INT8 scales."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "fp16", "int8"]
TargetChoice = Literal["auto", "rtx", "trt"]

NONE = "none"
"""In place of the file of a timing cache, or of a plugin library: use none."""


@dataclass(frozen=True)
class BuildOptions:
    """Options of one build; all but the precision and the timing cache default to TensorRT's own."""

    precision: Precision = "fp16"
    target: TargetChoice = "auto"
    """``rtx``: TensorRT for RTX; ``trt``: full TensorRT; ``auto``: full TensorRT where a GPU can use it."""
    plugins: str | Path | None = None
    """The plugin library; by default the one that :func:`darktrt.plugins.library.find_library` finds, if the model has custom
    nodes. ``none`` runs standard ops in their place."""
    tactic_sources: str | None = None
    """Libraries of kernels to add to the default ones or to leave out, written as for trtexec: ``-CUDNN,+CUBLAS``."""
    optimization_level: int | None = None
    """0 to 5: how long to look for fast kernels."""
    timing_cache: str | Path | None = None
    """A file that keeps measured times between builds. The build reads it, if it exists, and writes it. ``none`` for no file.
    The default is :func:`darktrt.engine.timing_cache.default_timing_cache`; unlike a named file, it is ignored where it does
    not fit."""
    workspace: int | None = None
    """Largest amount of GPU memory, in MiB, for the intermediate results of a layer; by default all there is."""
    tf32: bool = True
    """Let FP32 convolutions round their inputs to 11 bits, on GPUs that can."""
    strongly_typed: bool = False
    """Take types from the ONNX file, and INT8 from Q/DQ nodes, where TensorRT 10 could also choose them."""
    batch: tuple[int, int, int] | None = None
    """Smallest, usual and largest batch of a model with a dynamic batch; by default the model's own."""
    hardware_compatible: bool = False
    """Build an engine for every GPU of compute capability 8.0 or more; slower."""
    version_compatible: bool = False
    """Build an engine that later versions of the same major version of TensorRT run too."""
