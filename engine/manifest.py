"""``engine.json``, the manifest beside every plan: what the plan is, what it was made of, and where it runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from darktrt.engine.layer_list import EngineLayer
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import DetectorInfo
from darktrt.records import record

FORMAT = 1


@dataclass(frozen=True)
class Int8Cost:
    """What INT8 costs the network, measured before the build in ONNX Runtime with the Q/DQ nodes of this calibration."""

    measure: str
    """``AP``, or ``scores`` where there were no labels."""
    drop: float
    """Of the AP, 0..1, against FP32; or the change of the scores."""
    budget: float
    """The most that was allowed."""
    data: str
    """What it was measured on, as it was named."""
    ap: float | None = None
    """The AP that is left, and AP50."""
    ap50: float | None = None

    def __str__(self) -> str:
        name = "AP drop" if self.measure == "AP" else "change of the scores"
        left = f"; AP {self.ap:.4f}, AP50 {self.ap50:.4f}" if self.ap is not None and self.ap50 is not None else ""
        return f"{name} {self.drop:.4f} (at most {self.budget:g}){left}, in ONNX Runtime on {self.data}"


@dataclass(frozen=True)
class Manifest:
    """Everything but the plan's bytes."""

    plan_sha256: str
    onnx_sha256: str
    target: str
    """Flavour and version that built the plan; no other version loads it."""
    gpu: str | None
    """The GPU it was built on; None for a plan built without one, which runs on many."""
    precision: str
    plugins: tuple[str, ...]
    """Custom ops that the plan takes from the plugin library, as name:version."""
    build_seconds: float
    info: DetectorInfo
    int8_convolutions: tuple[str, ...] = ()
    """Those that the engine computes in INT8, by the names of their ONNX nodes."""
    other_convolutions: dict[str, str] = field(default_factory=dict)
    """Of an INT8 engine those that are not, or not known to be, in INT8, and why."""
    corrected_biases: tuple[str, ...] = ()
    """The convolutions whose biases the build has corrected for what quantizing shifts."""
    int8_cost: Int8Cost | None = None
    """Where a largest drop was asked for."""
    plugin_library: dict[str, str] = field(default_factory=dict)
    """Of the library that the plugins come from: its ``sha256``, and the version of TensorRT's headers as ``tensorrt``."""
    compute_capability: int = 0
    """Of the GPU, times ten; 0 where it is not known or does not matter."""
    hardware_compatible: bool = False
    """It runs on every GPU of compute capability 8.0 or more."""
    version_compatible: bool = False
    """It runs with later versions of the same major version of TensorRT."""
    tf32: bool = True
    """Whether FP32 convolutions may round to 11 bits."""
    table_sha256: str = ""
    """Of the calibration table or cache that the scales come from."""
    engine_layers: tuple[EngineLayer, ...] = ()
    """What TensorRT made of the network; none where it was told not to say."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        names = (
            *self.plugins,
            *self.int8_convolutions,
            *self.other_convolutions,
            *self.other_convolutions.values(),
            *self.corrected_biases,
        )
        if odd := [name for name in names if not isinstance(name, str)]:
            raise ValueError(f"{odd[0]!r:.40} stands where a name should")

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def manifest_path(plan: str | Path) -> Path:
    """Where the manifest of ``plan`` stands: the same name, ending in ``.json``."""
    return Path(plan).with_suffix(".json")


def read_manifest(path: str | Path) -> Manifest:
    """A manifest from its own file.

    Raises:
        DarktrtError: the file cannot be read, or is no manifest of this version of darktrt.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DarktrtError(f"{path}: cannot read the manifest: {error.strerror}; keep it beside its plan") from error
    except (ValueError, RecursionError) as error:
        raise DarktrtError(f"{path}: is no manifest ({error}); build the engine again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DarktrtError(f"{path}: is no manifest of this version of darktrt; build the engine again")
    try:
        manifest = record(Manifest, values)
    except (ValueError, TypeError) as error:
        raise DarktrtError(f"{path}: the manifest is damaged ({error}); build the engine again") from error
    return manifest


def read_plan_manifest(plan: str | Path) -> Manifest:
    """The manifest beside ``plan``, which must be the plan that it speaks of.

    Raises:
        DarktrtError: it cannot be read, or the plan has changed since.
    """
    manifest = read_manifest(manifest_path(plan))
    try:
        found = sha256_of(plan)
    except OSError as error:
        raise DarktrtError(f"{plan}: cannot read: {error.strerror}") from error
    if found != manifest.plan_sha256:
        raise DarktrtError(f"{plan}: is not the plan that {manifest_path(plan)} describes; build the engine again")
    return manifest
