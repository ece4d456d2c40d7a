"""Which TensorRT builds, and everything that depends on its flavour and version."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from darktrt.cuda import first_gpu
from darktrt.engine.options import TargetChoice
from darktrt.errors import DarktrtError
from darktrt.metadata import MishForm
from darktrt.plugins.library import is_registered

if TYPE_CHECKING:
    from darktrt.engine.trt_types import TensorRT

Flavour = Literal["rtx", "trt"]
MODULES: dict[Flavour, str] = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
INSTALL: dict[Flavour, str] = {
    "rtx": "pip install 'darktrt[rtx]' (TensorRT for RTX: builds without a GPU)",
    "trt": "pip install 'darktrt[trt]' (full TensorRT: needs an NVIDIA GPU)",
}
_MISH_FORMS: dict[str, MishForm] = {"fp32": "native", "fp16": "fused", "int8": "fused"}
"""The best form by precision, as benchmarks/h200.md has it: the fastest, but in INT8 the one that keeps the AP."""
_NAMES: dict[Flavour, str] = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}


@dataclass(frozen=True)
class Target:
    """A TensorRT at hand; its properties are the only place that knows versions."""

    flavour: Flavour
    version: tuple[int, ...]
    strongly_typed: bool = False
    """Asked to take types from the ONNX file where it could also choose them; see :meth:`typed_strongly`."""

    standard_ops: bool = False
    """Asked to run the bodies of custom nodes, although it could have plugins."""

    def __str__(self) -> str:
        return f"{_NAMES[self.flavour]} {self.version_text}"

    @property
    def version_text(self) -> str:
        """The version as ``8.6.0``."""
        return ".".join(map(str, self.version))

    @property
    def weakly_typed(self) -> bool:
        """Precision is chosen by builder flags; otherwise by the types in the ONNX file."""
        return self.flavour == "trt" and self.version < (11,) and not self.strongly_typed

    def typed_strongly(self) -> Target:
        """The same TensorRT, with precision by the types in the ONNX file: for INT8 Q/DQ nodes in place of a calibrator.

        Raises:
            DarktrtError: it cannot, as TensorRT before 10.
        """
        if self.flavour == "trt" and self.version < (10,):
            raise DarktrtError(
                f"{self} cannot take types from the ONNX file; leave strong typing out, or use TensorRT 10 or newer",
                "strongly_typed",
            )
        return replace(self, strongly_typed=True)

    @property
    def network_flag(self) -> str | None:
        """The flag to create networks with: 8 and 9 have networks without a batch dimension, 10 has two kinds of typing."""
        if not self.weakly_typed:
            return "STRONGLY_TYPED"
        return "EXPLICIT_BATCH" if self.version < (10,) else None

    @property
    def cache_version(self) -> str:
        """The version in the header of its calibration caches, as its ``getInferLibVersion()`` has it: 8601, 100300."""
        major, minor, patch = (*self.version, 0, 0)[:3]
        return str(major * (10000 if major >= 10 else 1000) + minor * 100 + patch)

    @property
    def has_progress_monitor(self) -> bool:
        """``IProgressMonitor``, which also is the only way to stop a build."""
        return self.flavour == "rtx" or self.version >= (10,)

    @property
    def logs_layers(self) -> bool:
        """Its builder logs the engine's layers, of which otherwise the engine inspector tells, once the engine is loaded."""
        return self.flavour == "rtx"

    @property
    def has_timing_cache(self) -> bool:
        """It measures kernels as it builds; TensorRT for RTX chooses them when an engine is first loaded."""
        return self.flavour == "trt"

    @property
    def has_compatibility(self) -> bool:
        """It can build engines that run on other GPUs or with other versions; those of TensorRT for RTX always run on many."""
        return self.flavour == "trt"

    def runs_plans_of(self, target: str) -> bool:
        """Whether it loads version-compatible plans that ``target``, as text, built: of its major version and not newer."""
        own, _, version = target.rpartition(" ")
        numbers = tuple(map(int, version.split(".")))
        return own == _NAMES[self.flavour] and numbers[0] == self.version[0] and numbers <= self.version

    @property
    def names_parser_nodes(self) -> bool:
        """Errors of its parser have the name and operator of the node, not just its number."""
        return self.flavour == "rtx" or self.version >= (10,)

    @property
    def has_plugins(self) -> bool:
        return self.flavour == "trt" and not self.standard_ops

    @property
    def runs_bodies(self) -> bool:
        """Its parser runs the body of a custom op for which there is no plugin."""
        return self.flavour == "rtx" or self.version >= (10, 7)

    def without_plugins(self) -> Target:
        """The same TensorRT, which runs the bodies of custom nodes as standard ops.

        Raises:
            DarktrtError: its parser lacks some of those: before TensorRT 10, Mod and Split into computed sizes.
        """
        if self.flavour == "trt" and self.version < (10,):
            raise DarktrtError(
                f"{self} lacks some standard ops of the custom nodes' bodies; use the plugins, or build what 'darktrt convert' "
                "wrote, which ends before NMS",
                "plugins",
            )
        return replace(self, standard_ops=True)

    def has_plugin(self, name: str, version: str, namespace: str) -> bool:
        """Whether a plugin library that is loaded has this custom op."""
        return is_registered(self.load(), name, version, namespace)

    def mish_form(self, precision: str) -> MishForm:
        """What to make of Mish where the model leaves it open and there are plugins for every form."""
        return _MISH_FORMS[precision]

    @property
    def bodies(self) -> Literal["keep", "drop", "inline"]:
        """What to do with the functions in the file.

        Inline them where there are no plugins (the parser would too, but gives the nodes of two bodies the same names); drop
        them where the parser prefers a body to a registered plugin (TensorRT 9.0 to 10.6).
        """
        if not self.has_plugins:
            return "inline"
        return "drop" if (9,) <= self.version < (10, 7) else "keep"

    @property
    def builds_without_gpu(self) -> bool:
        return self.flavour == "rtx"

    def load(self) -> TensorRT:
        """The Python module; importing it loads the library.

        Raises:
            DarktrtError: it is installed but cannot be loaded.
        """
        return _load(self.flavour)


def find_target(choice: TargetChoice = "auto") -> Target:
    """The TensorRT to build with; ``auto`` takes a full one where a GPU can use it, else TensorRT for RTX.

    Raises:
        DarktrtError: it is not installed, or cannot be loaded.
    """
    if choice != "auto":
        if installed_version(choice) is None:
            raise DarktrtError(f"{_NAMES[choice]} is not installed; {INSTALL[choice]}")
        return _target(choice)
    if installed_version("trt") and gpu_name():
        return _target("trt")
    if installed_version("rtx"):
        return _target("rtx")
    if installed_version("trt"):
        raise DarktrtError(
            f"TensorRT is installed, but builds on an NVIDIA GPU alone and none is usable here; {INSTALL['rtx']}"
        )
    raise DarktrtError(f"no TensorRT is installed; {INSTALL['rtx']}, or {INSTALL['trt']}")


def flavour_of(target: str) -> Flavour:
    """The flavour of a target that was written as text, in a manifest."""
    return "rtx" if target.startswith(_NAMES["rtx"]) else "trt"


def version_of(target: str) -> str:
    """The version of a target that was written as text, in a manifest."""
    return target.rpartition(" ")[2]


def is_installed(flavour: Flavour) -> bool:
    """Whether there is the Python package, and not its type stubs alone, which make a module without a file."""
    spec = importlib.util.find_spec(MODULES[flavour])
    return spec is not None and spec.origin is not None


def installed_version(flavour: Flavour) -> str | None:
    """Version of the installed Python package, found without loading it."""
    if not is_installed(flavour):
        return None
    try:
        return importlib.metadata.version(MODULES[flavour])
    except importlib.metadata.PackageNotFoundError:
        return str(_load(flavour).__version__)


def gpu_name() -> str | None:
    """Name of the first NVIDIA GPU, or None where no driver finds one."""
    found = first_gpu()
    return found and found[0]


def _target(flavour: Flavour) -> Target:
    parts = str(_load(flavour).__version__).split(".")
    return Target(flavour, tuple(int(part) for part in parts[:3] if part.isdigit()))


def _load(flavour: Flavour) -> TensorRT:
    try:
        module: Any = importlib.import_module(MODULES[flavour])
        return cast("TensorRT", module)
    except (ImportError, OSError) as error:
        raise DarktrtError(f"{_NAMES[flavour]} is installed but does not load ({error}); {INSTALL[flavour]}") from error
