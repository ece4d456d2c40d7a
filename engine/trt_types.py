"""Types of the used part of the module tensorrt, for the type checker, where NVIDIA's stubs of TensorRT 10 are installed.

``TensorRT`` is the type of the module, the same for versions 8.6 to 11 and TensorRT for RTX; calls that only some versions have
are behind a property of :class:`darktrt.engine.target.Target`. Base classes of Python classes (loggers, calibrators) are left
out, for a type checker cannot follow them through a variable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import tensorrt

    class TensorRT(Protocol):
        """The module."""

        __version__: str
        Builder: type[tensorrt.Builder]
        BuilderFlag: type[tensorrt.BuilderFlag]
        DataType: type[tensorrt.DataType]
        HardwareCompatibilityLevel: type[tensorrt.HardwareCompatibilityLevel]
        LayerInformationFormat: type[tensorrt.LayerInformationFormat]
        Logger: type[tensorrt.Logger]
        MemoryPoolType: type[tensorrt.MemoryPoolType]
        NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
        OnnxParser: type[tensorrt.OnnxParser]
        ProfilingVerbosity: type[tensorrt.ProfilingVerbosity]
        Runtime: type[tensorrt.Runtime]
        TacticSource: type[tensorrt.TacticSource]
        TensorIOMode: type[tensorrt.TensorIOMode]

        def get_plugin_registry(self) -> tensorrt.IPluginRegistry: ...

    Builder: TypeAlias = tensorrt.Builder
    Config: TypeAlias = tensorrt.IBuilderConfig
    Context: TypeAlias = tensorrt.IExecutionContext
    Dims: TypeAlias = tensorrt.Dims
    Engine: TypeAlias = tensorrt.ICudaEngine
    TrtLayer: TypeAlias = tensorrt.ILayer
    TrtNetwork: TypeAlias = tensorrt.INetworkDefinition
    Parser: TypeAlias = tensorrt.OnnxParser
    Tensor: TypeAlias = tensorrt.ITensor


def shape_of(dims: Dims) -> tuple[int, ...]:
    """A tensor's shape as a tuple, -1 for a dynamic dimension."""
    return tuple(dims[i] for i in range(len(dims)))
