"""Triton's config.pbtxt of a detector, made with Triton's own protobuf.

Whether Triton may batch depends on the kind. In the Python kind it always may. Its own TensorRT and ONNX Runtime want a batch
of any size as the first dimension of every input, which thresholds do not have: a model with them, or of a static batch, gets
``max_batch_size: 0``, its dims include the batch, and requests bring the thresholds. One whose thresholds surgery has fixed,
with a dynamic batch, is batched by Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

Kind = Literal["tensorrt_plan", "onnxruntime", "python"]
Policy = Literal["latest", "all"]

CONFIG_NAME, LABELS_NAME = "config.pbtxt", "labels.txt"
WARMUP_FOLDER, WARMUP_IMAGE = "warmup", "image"
"""Triton's name of the folder, and the file in it that the network of encoded images is warmed up with."""

_BACKENDS = {"tensorrt_plan": "tensorrt", "onnxruntime": "onnxruntime", "python": "python"}
FILES = {"tensorrt_plan": "model.plan", "onnxruntime": "model.onnx", "python": "model.py"}


@dataclass(frozen=True)
class ConfigOptions:
    """How Triton is to serve the model; the defaults are the command's."""

    kind: Kind = "python"
    input: Literal["tensor", "jpeg"] = "tensor"
    """``jpeg``: encoded images of any format that :mod:`darktrt.vision.images` reads."""
    max_batch: int | None = None
    """Images that Triton may batch; None for the largest batch of the model."""
    preferred: tuple[int, ...] = ()
    """Batch sizes that Triton does not wait to enlarge."""
    delay: int = 0
    """Microseconds that a request may wait for others to be batched with."""
    instances: int = 1
    """On each GPU, or on the CPU."""
    gpus: tuple[int, ...] = ()
    """None: the CPU."""
    cuda_graph: bool = False
    cache: bool = False
    """Answer requests that came before from Triton's cache."""
    versions: int = 1
    """How many of the latest to serve; 0 for all."""
    warmup: bool = True
    score_threshold: float = 0.25
    iou_threshold: float = 0.45

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise DarktrtError(f"the kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        if self.input == "jpeg" and self.kind != "python":
            raise DarktrtError(f"encoded images are decoded by the kind python alone, not by {self.kind}")
        if self.instances < 1 or self.delay < 0 or self.versions < 0:
            raise DarktrtError("there must be 1 instance or more, and neither the delay nor the versions can be negative")
        for name, value in (("score", self.score_threshold), ("IoU", self.iou_threshold)):
            if not 0 <= value <= 1:
                raise DarktrtError(f"the {name} threshold is {value}; it must be between 0 and 1")
        if self.cuda_graph and self.kind == "onnxruntime":
            raise DarktrtError("CUDA graphs are of engines; give a plan, and another kind than onnxruntime")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as config.pbtxt has it."""

    name: str
    type: str
    """Triton's, without the ``TYPE_``."""
    dims: tuple[int, ...]
    """Without the batch, where Triton batches."""
    optional: bool = False


def make_config(name: str, info: DetectorInfo, options: ConfigOptions) -> ModelConfig:
    """The config of a model called ``name``.

    Raises:
        DarktrtError: the model cannot be served so, or not in such batches.
    """
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    check_served(info, options)
    config = ModelConfig(name=name, backend=_BACKENDS[options.kind], default_model_filename=FILES[options.kind])
    config.max_batch_size = max_batch_size(info, options)
    if options.kind == "tensorrt_plan":
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


def options_of(config: ModelConfig) -> ConfigOptions:
    """The options that decide which tensors a config has.

    Raises:
        DarktrtError: it is of a backend that darktrt does not write configs for.
    """
    kinds = [kind for kind, backend in _BACKENDS.items() if backend == config.backend]
    if not kinds:
        raise DarktrtError(f"its backend is '{config.backend}', not one of {', '.join(_BACKENDS.values())}")
    form: Any = config.parameters["input"].string_value or "tensor"
    kind: Any = kinds[0]
    return ConfigOptions(kind, form, config.max_batch_size or None)


def check_served(info: DetectorInfo, options: ConfigOptions) -> None:
    """See that the model can be served at all.

    Raises:
        DarktrtError: it does not end in NMS.
    """
    if info.head != "nms":
        raise DarktrtError(f"{info.name}: ends at '{info.head}'; to serve it, make it with 'darktrt surgery --head nms'")


def batches(info: DetectorInfo, options: ConfigOptions) -> bool:
    """Whether Triton may put requests together (and takes the batch off the dims)."""
    return options.kind == "python" or (not info.takes_thresholds and info.batch[0] == 1 < info.batch[2])


def max_batch_size(info: DetectorInfo, options: ConfigOptions) -> int:
    """Triton's ``max_batch_size``, which the model's largest batch bounds; the Python kind splits larger ones.

    Raises:
        DarktrtError: the model does not take so many.
    """
    if not batches(info, options):
        if options.max_batch or options.preferred or options.delay:
            raise DarktrtError(
                f"{info.name}: Triton cannot batch it in the kind {options.kind}, for that needs a batch of 1 or more "
                "('darktrt convert --batch 1..8') and fixed thresholds ('darktrt surgery --thresholds'); or take kind python"
            )
        return 0
    largest = info.batch[2] if options.max_batch is None else options.max_batch
    if largest < 1 or (options.kind != "python" and largest > info.batch[2]):
        raise DarktrtError(f"{info.name}: takes batches of 1 to {info.batch[2]}, not of {largest}; convert it with --batch")
    if wrong := [size for size in options.preferred if not 1 <= size <= largest]:
        raise DarktrtError(f"the preferred batch of {wrong[0]} is not between 1 and the largest, {largest}")
    return largest


def input_specs(info: DetectorInfo, options: ConfigOptions) -> list[TensorSpec]:
    """The inputs that requests bring."""
    batched = batches(info, options)
    if options.input == "jpeg":
        specs = [TensorSpec("image", "STRING", (1,))]
    else:
        specs = [TensorSpec("images", "UINT8" if info.input == "uint8" else "FP32", info.input_shape)]
        if info.takes_image_size:
            specs.append(TensorSpec("image_size", "FP32", (2,)))
    if not batched:
        specs = [replace(spec, dims=(_batch_dim(info), *spec.dims)) for spec in specs]
    if info.takes_thresholds:
        optional = options.kind == "python"
        specs += [TensorSpec(name, "FP32", (1,), optional) for name in ("score_threshold", "iou_threshold")]
    return specs


def output_specs(info: DetectorInfo, options: ConfigOptions) -> list[TensorSpec]:
    """The outputs that responses bring."""
    k = -1 if options.input == "jpeg" else info.max_detections  # as many as there are, which JSON likes better than zeros
    specs = [
        TensorSpec("num_detections", "INT32", (1,)),
        TensorSpec("boxes", "FP32", (k, 4)),
        TensorSpec("scores", "FP32", (k,)),
        TensorSpec("classes", "INT32", (k,)),
    ]
    if options.input == "jpeg":
        specs.append(TensorSpec("detections", "STRING", (1,)))
    if not batches(info, options):
        specs = [replace(spec, dims=(_batch_dim(info), *spec.dims)) for spec in specs]
    return specs


def _batch_dim(info: DetectorInfo) -> int:
    return info.batch[0] if info.batch[0] == info.batch[2] else -1


def _add_batching(config: ModelConfig, options: ConfigOptions) -> None:
    if config.max_batch_size > 1:
        config.dynamic_batching.max_queue_delay_microseconds = options.delay
        config.dynamic_batching.preferred_batch_size.extend(options.preferred)


def _add_instances(config: ModelConfig, options: ConfigOptions) -> None:
    group = config.instance_group.add(count=options.instances)
    group.kind = group.KIND_GPU if options.gpus else group.KIND_CPU
    group.gpus.extend(options.gpus)
    if options.kind == "tensorrt_plan" and options.cuda_graph:
        config.optimization.cuda.graphs = True


def _add_versions(config: ModelConfig, options: ConfigOptions) -> None:
    if options.versions:
        config.version_policy.latest.num_versions = options.versions
    else:
        config.version_policy.all.SetInParent()


def _add_parameters(config: ModelConfig, info: DetectorInfo, options: ConfigOptions) -> None:
    """What a client, and the Python backend, must know of the network; that of the layers is left out, being long."""
    score, iou = info.fixed_thresholds or (options.score_threshold, options.iou_threshold)
    values = {
        METADATA_KEY: replace(info, layers=()).to_json(),
        "input": options.input,
        "score_threshold": f"{score:g}",
        "iou_threshold": f"{iou:g}",
        "cuda_graph": "true" if options.cuda_graph else "false",
    }
    for name, value in values.items():
        config.parameters[name].string_value = value


def _add_warmup(config: ModelConfig, info: DetectorInfo, options: ConfigOptions) -> None:
    """A first inference of every batch size that Triton prefers, the smallest and the largest, before the model is ready."""
    sizes = {1, config.max_batch_size, *options.preferred} if config.max_batch_size else {0}
    for size in sorted(sizes):
        warmup = config.model_warmup.add(name=f"batch {size or info.batch[1]}", batch_size=size)
        for spec in input_specs(info, options):
            if spec.optional:
                continue
            value: Any = warmup.inputs[spec.name]
            value.data_type = config.input[[one.name for one in config.input].index(spec.name)].data_type
            value.dims.extend(info.batch[1] if side < 0 else side for side in spec.dims)
            if spec.type == "STRING":
                value.input_data_file = WARMUP_IMAGE
            elif spec.name == "images":
                value.random_data = True
            else:  # thresholds of 0, which find the most
                value.zero_data = True
