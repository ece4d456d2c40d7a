"""The TensorRT that builds, and everything that depends on its flavour and version."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from darktrt.cuda import first_gpu
from darktrt.engine.options import TargetChoice
from darktrt.errors import DarktrtError, quote
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
"""The best form by precision, as measured in benchmarks/h200.md: the fastest, but in INT8 the most accurate."""
_NAMES: dict[Flavour, str] = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}
_TEXT = re.compile(rf"({'|'.join(_NAMES.values())}) \d{{1,6}}(\.\d{{1,6}}){{0,3}}", re.ASCII)


@dataclass(frozen=True)
class Target:
    """An installed TensorRT; version comparisons are only in its properties."""

    flavour: Flavour
    version: tuple[int, ...]
    strongly_typed: bool = False
    """Types come from the ONNX file, where TensorRT could also choose them; see :meth:`typed_strongly`."""
    standard_ops: bool = False
    """The bodies of custom nodes run, although TensorRT has plugins; see :meth:`without_plugins`."""

    def __str__(self) -> str:
        return f"{_NAMES[self.flavour]} {self.version_text}"

    @property
    def version_text(self) -> str:
        """The version as ``8.6.0``."""
        return ".".join(map(str, self.version))

    @property
    def weakly_typed(self) -> bool:
        """Builder flags choose the precision; otherwise the types in the ONNX file state it."""
        return self.flavour == "trt" and self.version < (11,) and not self.strongly_typed

    def typed_strongly(self) -> Target:
        """The same TensorRT with the precision by the types in the ONNX file, and INT8 by Q/DQ nodes in place of a calibrator.

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
        """The flag to create networks with: 8 and 9 also have an implicit batch dimension, 10 has two kinds of typing."""
        if not self.weakly_typed:
            return "STRONGLY_TYPED"
        return "EXPLICIT_BATCH" if self.version < (10,) else None

    @property
    def cache_version(self) -> str:
        """The version in the header of calibration caches, as ``getInferLibVersion()`` returns it: 8601, 100300."""
        major, minor, patch = (*self.version, 0, 0)[:3]
        return str(major * (10000 if major >= 10 else 1000) + minor * 100 + patch)

    @property
    def has_progress_monitor(self) -> bool:
        """Whether there is ``IProgressMonitor``, the only way to stop a build."""
        return self.flavour == "rtx" or self.version >= (10,)

    @property
    def logs_layers(self) -> bool:
        """Whether the builder logs the engine's layers; otherwise the inspector of a loaded engine reports them."""
        return self.flavour == "rtx"

    @property
    def has_timing_cache(self) -> bool:
        """Whether the build measures kernels; TensorRT for RTX chooses kernels when an engine is first loaded."""
        return self.flavour == "trt"

    @property
    def has_compatibility(self) -> bool:
        """Whether it can build engines for other GPUs or versions; those of TensorRT for RTX always run on many GPUs."""
        return self.flavour == "trt"

    def runs_plans_of(self, target: str) -> bool:
        """Whether it loads version-compatible plans of ``target``, as text: of its major version and not newer."""
        own, _, version = target.rpartition(" ")
        numbers = tuple(map(int, version.split(".")))
        return own == _NAMES[self.flavour] and numbers[0] == self.version[0] and numbers <= self.version

    @property
    def names_parser_nodes(self) -> bool:
        """Whether errors of the parser have the name and operator of the node, not only its number."""
        return self.flavour == "rtx" or self.version >= (10,)

    @property
    def has_plugins(self) -> bool:
        return self.flavour == "trt" and not self.standard_ops

    @property
    def runs_bodies(self) -> bool:
        """Whether the parser runs the body of a custom op without a plugin."""
        return self.flavour == "rtx" or self.version >= (10, 7)

    def without_plugins(self) -> Target:
        """The same TensorRT, with the bodies of custom nodes in place of plugins.

        Raises:
            DarktrtError: its parser lacks some standard ops: before TensorRT 10, Mod and Split into computed sizes.
        """
        if self.flavour == "trt" and self.version < (10,):
            raise DarktrtError(
                f"{self} lacks some standard ops of the custom nodes' bodies; use the plugins, or build what 'darktrt convert' "
                "wrote, which ends before NMS",
                "plugins",
            )
        return replace(self, standard_ops=True)

    def has_plugin(self, name: str, version: str, namespace: str) -> bool:
        """Whether a loaded plugin library has this custom op."""
        return is_registered(self.load(), name, version, namespace)

    def mish_form(self, precision: str) -> MishForm:
        """The form of Mish where the model leaves it open and there are plugins for every form."""
        return _MISH_FORMS[precision]

    @property
    def bodies(self) -> Literal["keep", "drop", "inline"]:
        """The treatment of function bodies.

        Without plugins they are inlined: the parser would inline them too, but with the same names for the nodes of two bodies.
        They are dropped where the parser prefers a body to a registered plugin, as in TensorRT 9.0 to 10.6.
        """
        if not self.has_plugins:
            return "inline"
        return "drop" if (9,) <= self.version < (10, 7) else "keep"

    @property
    def builds_without_gpu(self) -> bool:
        return self.flavour == "rtx"

    def runs_on(self, capability: int) -> bool:
        """Whether its engines run on a GPU of this compute capability, times ten: TensorRT for RTX leaves 9.0 to 11.x out."""
        return self.flavour == "trt" or not 90 <= capability < 120

    def load(self) -> TensorRT:
        """Import the Python module, which loads the library.

        Raises:
            DarktrtError: it is installed but cannot be loaded.
        """
        return _load(self.flavour)


def find_target(choice: TargetChoice = "auto") -> Target:
    """The TensorRT to build with; ``auto`` is full TensorRT where a GPU can use it, else TensorRT for RTX.

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
        raise DarktrtError(f"TensorRT is installed, but builds only on an NVIDIA GPU and none is usable here; {INSTALL['rtx']}")
    raise DarktrtError(f"no TensorRT is installed; {INSTALL['rtx']}, or {INSTALL['trt']}")


def check_target_text(target: str) -> None:
    """See that a text is a target as :class:`Target` writes it.

    Raises:
        ValueError: it is not.
    """
    if not _TEXT.fullmatch(target):
        raise ValueError(f"the target is '{quote(target, 40)}', not such as '{_NAMES['trt']} 8.6.0'")


def flavour_of(target: str) -> Flavour:
    """The flavour of a target that was written as text, in a manifest."""
    return "rtx" if target.startswith(_NAMES["rtx"]) else "trt"


def version_of(target: str) -> str:
    """The version of a target that was written as text, in a manifest."""
    return target.rpartition(" ")[2]


def is_installed(flavour: Flavour) -> bool:
    """Whether the Python package is installed, and not only its type stubs, which make a module without a file."""
    spec = importlib.util.find_spec(MODULES[flavour])
    return spec is not None and spec.origin is not None


def installed_version(flavour: Flavour) -> str | None:
    """The version of the installed Python package, read without loading it."""
    if not is_installed(flavour):
        return None
    try:
        return importlib.metadata.version(MODULES[flavour])
    except importlib.metadata.PackageNotFoundError:
        return str(_load(flavour).__version__)


def gpu_name() -> str | None:
    """The name of the first NVIDIA GPU; None where there is no GPU or no driver."""
    gpu = first_gpu()
    return gpu and gpu[0]


def _target(flavour: Flavour) -> Target:
    parts = str(_load(flavour).__version__).split(".")
    return Target(flavour, tuple(int(part) for part in parts[:3] if part.isdigit()))


def _load(flavour: Flavour) -> TensorRT:
    try:
        module: Any = importlib.import_module(MODULES[flavour])
        return cast("TensorRT", module)
    except (ImportError, OSError) as error:
        raise DarktrtError(f"{_NAMES[flavour]} is installed but does not load ({error}); {INSTALL[flavour]}") from error
