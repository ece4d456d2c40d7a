"""The manifest beside every plan: what the plan was made of, what it contains, and where it runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from darktrt.engine.layer_list import EngineLayer, few_in_int8
from darktrt.engine.target import check_target_text
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import DetectorInfo
from darktrt.records import read_record

FORMAT = 1
_ADVICE = "keep the manifest of a plan beside it, or build the engine again"


@dataclass(frozen=True)
class Int8Cost:
    """The loss by INT8, measured before the build in ONNX Runtime with the Q/DQ nodes of this calibration."""

    measure: str
    """``AP``, or ``scores`` for images without labels."""
    drop: float
    """Of the AP, 0..1, against FP32; or the change of the scores."""
    budget: float
    """The largest loss allowed."""
    data: str
    """The images that it was measured on, as they were named."""
    ap: float | None = None
    """The AP in INT8; ``ap50`` likewise."""
    ap50: float | None = None

    def __str__(self) -> str:
        name = "AP drop" if self.measure == "AP" else "change of the scores"
        left = f"; AP {self.ap:.4f}, AP50 {self.ap50:.4f}" if self.ap is not None and self.ap50 is not None else ""
        return f"{name} {self.drop:.4f} (at most {self.budget:g}){left}, in ONNX Runtime on {self.data}"


@dataclass(frozen=True)
class Manifest:
    """A plan's origin and contents."""

    plan_sha256: str
    onnx_sha256: str
    target: str
    """The TensorRT that built the plan, as :class:`darktrt.engine.target.Target` writes it; no other version loads it."""
    gpu: str | None
    """The GPU that it was built on; None for a plan built without a GPU, which runs on many."""
    precision: str
    plugins: tuple[str, ...]
    """The plugins that the plan needs, as name:version."""
    build_seconds: float
    info: DetectorInfo
    int8_convolutions: tuple[str, ...] = ()
    """The convolutions in INT8, by the names of their ONNX nodes."""
    other_convolutions: dict[str, str] = field(default_factory=dict)
    """For an INT8 engine, the convolutions that are not, or not known to be, in INT8, with the reasons."""
    corrected_biases: tuple[str, ...] = ()
    """The convolutions whose biases the build has corrected for the shift of means by quantization."""
    int8_cost: Int8Cost | None = None
    """For a build with a largest loss."""
    plugin_library: dict[str, str] = field(default_factory=dict)
    """The library of the plugins: its ``sha256``, and the version of TensorRT's headers as ``tensorrt``."""
    compute_capability: int = 0
    """Of the GPU, times ten; 0 where it is unknown or does not matter."""
    hardware_compatible: bool = False
    """It runs on every GPU of compute capability 8.0 or more."""
    version_compatible: bool = False
    """It runs with later versions of the same major version of TensorRT."""
    tf32: bool = True
    """Whether FP32 convolutions may round to 11 bits."""
    force_int8: bool = False
    """Whether TensorRT had to compute in INT8 what it would have computed in FP16 where that is faster."""
    calibration_sha256: str = ""
    """Of the calibration that the scales come from."""
    engine_layers: tuple[EngineLayer, ...] = ()
    """The layers of the engine; empty where TensorRT did not report them."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_target_text(self.target)

    @property
    def int8_warning(self) -> str:
        """What to do where TensorRT computes few convolutions in INT8 of those that were to be; else empty."""
        return few_in_int8(self.int8_convolutions, self.other_convolutions, self.info.batch[1])

    def to_json(self) -> str:
        """The text of the manifest's file."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def manifest_path(plan: str | Path) -> Path:
    """The manifest of ``plan``: the same name, ending in ``.json``."""
    return Path(plan).with_suffix(".json")


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest from its file.

    Raises:
        DarktrtError: the file cannot be read, is damaged, or is no manifest of this version of darktrt.
    """
    return read_record(Manifest, path, _ADVICE, file_format=FORMAT)


def read_plan_manifest(plan: str | Path) -> Manifest:
    """Read the manifest beside ``plan``, and check that it describes this plan.

    Raises:
        DarktrtError: it cannot be read, or the plan has changed since.
    """
    manifest = read_manifest(manifest_path(plan))
    if sha256_of(plan) != manifest.plan_sha256:
        raise DarktrtError(f"{plan}: is not the plan that {manifest_path(plan)} describes; build the engine again")
    return manifest
