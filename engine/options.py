"""How an engine is built: everything that ``darktrt engine`` offers beyond the files and the INT8 scales."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from darktrt.errors import DarktrtError
from darktrt.metadata import ImageSizes, check_image_sizes

Precision = Literal["fp32", "fp16", "int8"]
TargetChoice = Literal["auto", "rtx", "trt"]

NONE = "none"
"""In place of the file of a timing cache, or of a plugin library: use none."""


@dataclass(frozen=True)
class BuildOptions:
    """Options of one build; all but the precision and the timing cache default to TensorRT's own.

    Raises:
        DarktrtError: an option has an impossible value.
    """

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
    image_sizes: ImageSizes | None = None
    """Smallest, usual and largest width and height of images for a model that takes images of any size; by default the model's
    own."""
    hardware_compatible: bool = False
    """Build an engine for every GPU of compute capability 8.0 or more; slower."""
    version_compatible: bool = False
    """Build an engine that later versions of the same major version of TensorRT run too."""
    force_int8: bool = False
    """Compute in INT8 every convolution that is no floating-point layer, where TensorRT 8.6 to 10 would take FP16 if it found
    that faster."""

    def __post_init__(self) -> None:
        for name, choices in (("precision", get_args(Precision)), ("target", get_args(TargetChoice))):
            if getattr(self, name) not in choices:
                raise DarktrtError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}", name)
        if self.force_int8 and self.precision != "int8":
            raise DarktrtError(f"an engine in {self.precision} has no INT8 to force; give precision int8", "force_int8")
        if self.optimization_level not in (None, *range(6)):
            raise DarktrtError(f"the optimization level is {self.optimization_level}, not 0 to 5", "optimization_level")
        if self.workspace is not None and self.workspace < 1:
            raise DarktrtError(f"a workspace of {self.workspace} MiB; it must be at least 1 MiB", "workspace")
        if self.batch is not None and not (len(self.batch) == 3 and 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]):
            batch = ",".join(map(str, self.batch))
            raise DarktrtError(
                f"{batch}: write smallest, usual and largest batch, each not below the one before, such as 1,4,16", "batch"
            )
        if self.image_sizes:
            check_image_sizes(self.image_sizes)
