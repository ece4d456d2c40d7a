"""The options of a model on Triton, and the config.pbtxt of a detector, made with Triton's own protobuf.

The backend decides whether Triton may batch requests. With the Python backend it always may. Triton's TensorRT and ONNX Runtime
backends need a batch of any size as the first dimension of every input, and thresholds have none: a model with thresholds as
inputs, or with a static batch, gets ``max_batch_size: 0``, its dims include the batch, and requests carry the thresholds. With
fixed thresholds and a dynamic batch Triton batches. Of images that differ in size it batches those of one size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo, Thresholds
from darktrt.serve.model_info import (
    CUDA_GRAPH_KEY,
    ENCODED_INPUT,
    IOU_THRESHOLD_KEY,
    SCORE_THRESHOLD_KEY,
    InputKind,
    ModelInfo,
)

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

Kind = Literal["tensorrt_plan", "onnxruntime", "python"]

CONFIG_NAME, LABELS_NAME = "config.pbtxt", "labels.txt"
WARMUP_FOLDER, WARMUP_IMAGE = "warmup", "image"
"""Triton's name of the folder, and the file in it with which a model of encoded images is warmed up."""


@dataclass(frozen=True)
class BackendOptions:
    """What the options of all backends share.

    Raises:
        DarktrtError: a number is out of range.
    """

    kind: ClassVar[Kind]
    backend: ClassVar[str]
    """Triton's name of the backend."""
    file: ClassVar[str]
    """The file in a version's folder that Triton loads."""
    suffixes: ClassVar[tuple[str, ...]]
    """Of the model files that the backend runs."""

    max_batch: int | None = None
    """Images that Triton may batch; None for the largest batch of the model."""
    preferred: tuple[int, ...] = ()
    """Batch sizes that run at once, without waiting for more requests."""
    delay: int = 0
    """Microseconds that a request may wait for others to be batched with."""
    instances: int = 1
    """On each GPU, or on the CPU."""
    gpus: tuple[int, ...] = ()
    """GPUs to run on; empty for GPU 0 with a plan, and for the CPU with an ONNX file."""
    cache: bool = False
    """Answer repeated requests from Triton's response cache."""
    versions: int = 1
    """How many of the latest versions to load; 0 for all."""
    warmup: bool = True
    """Run a first inference of each batch size before the model is ready."""

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise DarktrtError(f"instances is {self.instances}; it must be 1 or more", "instances")
        for name in ("delay", "versions"):
            if getattr(self, name) < 0:
                raise DarktrtError(f"{name} is {getattr(self, name)}; it must be 0 or more", name)


@dataclass(frozen=True)
class PythonBackend(BackendOptions):
    """darktrt's own backend on Triton's Python backend: it runs ONNX files and plans, and decodes encoded images."""

    kind = "python"
    backend = "python"
    file = "model.py"
    suffixes = (".plan", ".engine", ".onnx")

    input: InputKind = "tensor"
    """``tensor``: arrays of the model's input; ``jpeg``: encoded images, of the formats of :mod:`darktrt.vision.images`."""
    cuda_graph: bool = False
    """Record the GPU's work for each batch size of a plan once, and replay it."""
    score_threshold: float = Thresholds.score
    """Of requests without one."""
    iou_threshold: float = Thresholds.iou
    """Of requests without one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Thresholds(self.score_threshold, self.iou_threshold)


@dataclass(frozen=True)
class TensorRTBackend(BackendOptions):
    """Triton's TensorRT backend, which its containers have: it runs plans."""

    kind = "tensorrt_plan"
    backend = "tensorrt"
    file = "model.plan"
    suffixes = (".plan", ".engine")

    cuda_graph: bool = False
    """Record the GPU's work for each batch size once, and replay it."""


@dataclass(frozen=True)
class OnnxRuntimeBackend(BackendOptions):
    """Triton's ONNX Runtime backend, which its containers have: it runs ONNX files."""

    kind = "onnxruntime"
    backend = "onnxruntime"
    file = "model.onnx"
    suffixes = (".onnx",)


BACKENDS: dict[Kind, type[BackendOptions]] = {one.kind: one for one in (PythonBackend, TensorRTBackend, OnnxRuntimeBackend)}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of config.pbtxt."""

    name: str
    type: str
    """Triton's, without the ``TYPE_``."""
    dims: tuple[int, ...]
    """They exclude the batch where Triton batches."""
    optional: bool = False


def make_config(name: str, info: DetectorInfo, options: BackendOptions) -> ModelConfig:
    """The config of a model called ``name``.

    Raises:
        DarktrtError: the backend cannot run the model, or not in such batches.
    """
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    check_head(info)
    _check_cuda_graph(info, options)
    config = ModelConfig(name=name, backend=options.backend, default_model_filename=options.file)
    config.max_batch_size = max_batch_size(info, options)
    if isinstance(options, TensorRTBackend):
        config.platform = "tensorrt_plan"
    for spec in input_specs(info, options):
        config.input.add(name=spec.name, data_type=f"TYPE_{spec.type}", dims=spec.dims, optional=spec.optional)
    for spec in output_specs(info, options):
        config.output.add(name=spec.name, data_type=f"TYPE_{spec.type}", dims=spec.dims)
    label = next(output for output in config.output if output.name == "classes")
    label.label_filename = LABELS_NAME
    _add_batching(config, options)
    _add_instances(config, options)
    _add_versions(config, options)
    _add_parameters(config, info, options)
    if options.warmup:
        _add_warmup(config, info, options)
    if options.cache:
        config.response_cache.enable = True
    return config


def options_of(model: ModelInfo) -> BackendOptions:
    """The options that decide which tensors a model's config has.

    Raises:
        DarktrtError: darktrt writes no configs for its backend.
    """
    kinds = {kind.backend: kind for kind in BACKENDS.values()}
    if model.backend not in kinds:
        raise DarktrtError(f"its backend is '{model.backend}', not one of {', '.join(kinds)}")
    max_batch = model.max_batch or None
    return PythonBackend(max_batch, input="jpeg") if model.encoded else kinds[model.backend](max_batch)


def check_head(info: DetectorInfo) -> None:
    """See that Triton can serve the model at all.

    Raises:
        DarktrtError: it does not end in NMS.
    """
    if info.head != "nms":
        raise DarktrtError(f"{info.name}: ends at '{info.head}'; to serve it, make it with 'darktrt surgery --head nms'")


def _check_cuda_graph(info: DetectorInfo, options: BackendOptions) -> None:
    """Triton's TensorRT records a graph for one size of images."""
    if info.input == "image" and isinstance(options, TensorRTBackend) and options.cuda_graph:
        raise DarktrtError(
            f"{info.name}: Triton's TensorRT records no CUDA graphs for images that differ in size; the Python backend does",
            "cuda_graph",
        )


def batches(info: DetectorInfo, options: BackendOptions) -> bool:
    """Whether Triton may batch requests; ``dims`` exclude the batch then."""
    return isinstance(options, PythonBackend) or (not info.takes_thresholds and info.batch[0] == 1 < info.batch[2])


def max_batch_size(info: DetectorInfo, options: BackendOptions) -> int:
    """Triton's ``max_batch_size``: at most the model's largest batch, but for the Python backend, which splits larger ones.

    Raises:
        DarktrtError: the model does not accept so many images.
    """
    if not batches(info, options):
        if options.max_batch or options.preferred or options.delay:
            raise DarktrtError(
                f"{info.name}: Triton cannot batch it with the backend {options.backend}, which needs a batch of 1 or more "
                "('darktrt convert --batch 1..8') and fixed thresholds ('darktrt surgery --thresholds'); the Python backend can"
            )
        return 0
    largest = info.batch[2] if options.max_batch is None else options.max_batch
    if largest < 1 or (largest > info.batch[2] and not isinstance(options, PythonBackend)):
        raise DarktrtError(
            f"{info.name}: accepts batches of 1 to {info.batch[2]}, not of {largest}; convert it with a larger one",
            "max_batch",
        )
    if wrong := [size for size in options.preferred if not 1 <= size <= largest]:
        raise DarktrtError(f"the preferred batch of {wrong[0]} is not between 1 and the largest, {largest}", "preferred")
    return largest


def _encoded(options: BackendOptions) -> bool:
    return isinstance(options, PythonBackend) and options.input == "jpeg"


def input_specs(info: DetectorInfo, options: BackendOptions) -> list[TensorSpec]:
    """The inputs of requests."""
    if _encoded(options):
        specs = [TensorSpec(ENCODED_INPUT, "STRING", (1,))]
    else:
        specs = [TensorSpec("images", "FP32" if info.input == "float" else "UINT8", info.input_shape)]
        if info.takes_image_size:
            specs.append(TensorSpec("image_size", "FP32", (2,)))
    if not batches(info, options):
        specs = [replace(spec, dims=(_batch_dim(info), *spec.dims)) for spec in specs]
    if info.takes_thresholds:
        optional = isinstance(options, PythonBackend)
        specs += [TensorSpec(name, "FP32", (1,), optional) for name in ("score_threshold", "iou_threshold")]
    return specs


def output_specs(info: DetectorInfo, options: BackendOptions) -> list[TensorSpec]:
    """The outputs of responses."""
    rows = -1 if _encoded(options) else info.max_detections  # in JSON, zeros behind the detections would only be long
    specs = [
        TensorSpec("num_detections", "INT32", (1,)),
        TensorSpec("boxes", "FP32", (rows, 4)),
        TensorSpec("scores", "FP32", (rows,)),
        TensorSpec("classes", "INT32", (rows,)),
    ]
    if _encoded(options):
        specs.append(TensorSpec("detections", "STRING", (1,)))
    if not batches(info, options):
        specs = [replace(spec, dims=(_batch_dim(info), *spec.dims)) for spec in specs]
    return specs


def _batch_dim(info: DetectorInfo) -> int:
    return info.batch[0] if info.batch[0] == info.batch[2] else -1


def _add_batching(config: ModelConfig, options: BackendOptions) -> None:
    if config.max_batch_size > 1:
        config.dynamic_batching.max_queue_delay_microseconds = options.delay
        config.dynamic_batching.preferred_batch_size.extend(options.preferred)


def _add_instances(config: ModelConfig, options: BackendOptions) -> None:
    group = config.instance_group.add(count=options.instances)
    group.kind = group.KIND_GPU if options.gpus else group.KIND_CPU
    group.gpus.extend(options.gpus)
    if isinstance(options, TensorRTBackend) and options.cuda_graph:
        config.optimization.cuda.graphs = True


def _add_versions(config: ModelConfig, options: BackendOptions) -> None:
    if options.versions:
        config.version_policy.latest.num_versions = options.versions
    else:
        config.version_policy.all.SetInParent()


def _add_parameters(config: ModelConfig, info: DetectorInfo, options: BackendOptions) -> None:
    """The metadata, for clients, without that of the layers, which is long; and the settings of the Python backend."""
    values = {METADATA_KEY: replace(info, layers=()).to_json()}
    if isinstance(options, PythonBackend):
        score, iou = info.fixed_thresholds or (options.score_threshold, options.iou_threshold)
        values[SCORE_THRESHOLD_KEY] = f"{score:g}"
        values[IOU_THRESHOLD_KEY] = f"{iou:g}"
        values[CUDA_GRAPH_KEY] = "true" if options.cuda_graph else "false"
    for name, value in values.items():
        config.parameters[name].string_value = value


def _add_warmup(config: ModelConfig, info: DetectorInfo, options: BackendOptions) -> None:
    """A first inference of the smallest, the largest and each preferred batch size, before the model is ready."""
    sizes = {1, config.max_batch_size, *options.preferred} if config.max_batch_size else {0}
    for size in sorted(sizes):
        warmup = config.model_warmup.add(name=f"batch {size or info.batch[1]}", batch_size=size)
        for spec in input_specs(info, options):
            if spec.optional:
                continue
            value: Any = warmup.inputs[spec.name]
            value.data_type = config.input[[one.name for one in config.input].index(spec.name)].data_type
            value.dims.extend(_usual_dims(spec, info))
            if spec.type == "STRING":
                value.input_data_file = WARMUP_IMAGE
            elif spec.name == "images":
                value.random_data = True
            else:  # thresholds of 0 let the most boxes through
                value.zero_data = True


def _usual_dims(spec: TensorSpec, info: DetectorInfo) -> list[int]:
    """The dims with the usual batch and the usual size of images where they are open."""
    dims = list(spec.dims)
    if spec.name == "images" and info.input == "image":
        dims[-3:-1] = reversed(info.usual_image)
    return [info.batch[1] if dim < 0 else dim for dim in dims]
