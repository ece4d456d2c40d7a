"""PyTorch to ONNX: opset 17, heads between named tensors, everything later stages need in the metadata."""

from __future__ import annotations

import io
import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from darktrt.convert.cfg import Implicit, Network, Yolo, read_cfg
from darktrt.convert.model import Darknet
from darktrt.convert.model import random_weights as draw_weights
from darktrt.convert.shapes import gflops
from darktrt.convert.weights import LayerWeights, dump_weights, parameter_count, read_weights
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, keep_inputs, read_text, sha256_of
from darktrt.metadata import METADATA_KEY, DetectorInfo, HeadInfo, LayerInfo, NmsInfo

OPSET = 17


def convert_darknet(
    cfg: str | Path,
    weights: str | Path | None,
    output: str | Path,
    *,
    size: tuple[int, int] | None = None,
    batch: int | tuple[int, int, int] = 1,
    names: str | Path | None = None,
    random_weights: int | None = None,
    save_weights: str | Path | None = None,
) -> DetectorInfo:
    """Convert darknet files to a plain ONNX file of standard ops.

    The model's input is ``images`` float32 ``(N, 3, H, W)``, RGB in 0..1. Its outputs are ``boxes (N, A, 4)`` as x1 y1 x2 y2 in
    pixels of the network input and ``scores (N, A, classes)``, both float32, for A anchors.

    Args:
        cfg: the network description.
        weights: the ``.weights`` file, or None with ``random_weights``.
        output: the ONNX file to write.
        size: (width, height) of the network input; by default that of the cfg.
        batch: the batch size, or the smallest, usual and largest of a dynamic batch.
        names: a file with a class name a line; by default COCO's names for 80 classes, else "class 0", "class 1", ...
        random_weights: the seed of random weights, which try out a cfg without a weights file.
        save_weights: a file to write the weights to as well, in darknet's format.

    Returns:
        The metadata that the ONNX file carries.

    Raises:
        DarktrtError: an input cannot be read or does not fit, or an output cannot be written.
    """
    batch = batch if isinstance(batch, tuple) else (batch, batch, batch)
    keep_inputs(output, cfg, weights, names)
    if save_weights:
        keep_inputs(save_weights, cfg, weights, names, output)
    original = read_cfg(cfg)
    network = original.resized(*size) if size else original
    # both before the weights, which take a while: what does not fit is reported at once
    model = Darknet(network)
    info = detector_info(network, batch, class_names(network, names), {"cfg": sha256_of(cfg)})
    values = _weights(network, original, weights, random_weights)
    model.load(values)
    origin = sha256_of(weights) if weights else f"random, seed {random_weights}"
    info = replace(info, sources={**info.sources, "weights": origin})
    with ExitStack() as outputs:
        if save_weights:
            dump_weights(outputs.enter_context(atomic_output(save_weights)), network, values)
        del values  # as large as the file
        export_onnx(model.eval(), info, output)
    return info


def _weights(network: Network, original: Network, path: str | Path | None, seed: int | None) -> list[LayerWeights]:
    if path is not None and seed is not None:
        raise DarktrtError(f"{path}: has the weights; leave out the weights file or the seed of random ones", "random_weights")
    if path is not None:
        return read_weights(path, network)
    if seed is None:
        raise DarktrtError(
            f"{network.path}: needs its weights; name the .weights file, or a seed of random weights to try it out",
            "random_weights",
        )
    if not 0 <= seed < 2**32:
        raise DarktrtError(f"the seed of random weights is {seed}; it must lie in 0..{2**32 - 1}", "random_weights")
    # where the cfg's own size fits, the same weights whatever the size that was asked for
    return draw_weights(original if _fits(original) else network, seed)


def _fits(network: Network) -> bool:
    try:
        _ = network.shapes
    except DarktrtError:
        return False
    return True


def class_names(network: Network, path: str | Path | None) -> tuple[str, ...]:
    """One name per class, from a file or by default.

    Raises:
        DarktrtError: the file cannot be read, or its count of names is not the cfg's count of classes.
    """
    classes = next(layer.classes for layer in network.layers if isinstance(layer, Yolo))
    if path is None:
        coco = (Path(__file__).parent / "data" / "coco.names").read_text().split("\n")
        return tuple(coco[:80]) if classes == 80 else tuple(f"class {i}" for i in range(classes))
    text = read_text(path, advice="write one class name a line")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if len(names) != classes:
        raise DarktrtError(f"{path}: has {len(names)} names, but {network.path} has {classes} classes; write one name a line")
    return names


def detector_info(
    network: Network, batch: tuple[int, int, int], names: tuple[str, ...], sources: dict[str, str]
) -> DetectorInfo:
    """The metadata of a network that :func:`export_onnx` is to write."""
    yolos = [layer for layer in network.layers if isinstance(layer, Yolo)]
    shapes = network.shapes
    tensors = tensor_names(network)
    heads = tuple(
        HeadInfo(
            tensor=tensors[layer.sources[0]],
            line=layer.line,
            anchors=network.anchors(layer),
            mask=layer.mask,
            classes=layer.classes,
            scale_x_y=layer.scale_x_y,
            new_coords=layer.new_coords,
            rows=shapes[layer.index].height,
            columns=shapes[layer.index].width,
            kind=layer.head_kind,
        )
        for layer in yolos
    )
    return DetectorInfo(
        name=os.fsencode(Path(network.path).stem).decode(errors="replace"),
        width=network.width,
        height=network.height,
        channels=network.channels,
        batch=batch,
        resize="letterbox" if network.letter_box else "stretch",
        mish_count=sum(getattr(layer, "activation", None) == "mish" for layer in network.layers),
        heads=heads,
        nms=NmsInfo(yolos[-1].nms_kind, yolos[-1].beta_nms),
        class_names=names,
        parameters=parameter_count(network),
        gflops=round(gflops(network), 3),
        sources=sources,
        layers=tuple(LayerInfo(layer.index, layer.kind, layer.line, tensors[layer.index]) for layer in network.layers),
    )


def tensor_names(network: Network) -> dict[int, str]:
    """The ONNX tensor that holds each layer's output, by index.

    What a head reads is ``head0_raw``, ``head1_raw``, ... in cfg order, and the head itself goes by that name too; any
    other layer is ``layer{index}``, and one that only passes its input on has its source's name.

    Raises:
        DarktrtError: two heads read one tensor, or a head reads the network's input.
    """
    roots = {-1: -1}
    for layer in network.layers:
        roots[layer.index] = roots[layer.sources[0]] if layer.passes_on or isinstance(layer, Yolo) else layer.index
    names = {root: f"layer{root}" for root in roots.values()}
    heads = [layer for layer in network.layers if isinstance(layer, Yolo)]
    for i, head in enumerate(heads):
        root = roots[head.sources[0]]
        if root < 0 or names[root].startswith("head"):
            raise network.error(head, "needs a tensor of its own to read; put a [convolutional] before it")
        names[root] = f"head{i}_raw"
    return {layer.index: names[roots[layer.index]] for layer in network.layers}


def tensor_makers(network: Network) -> dict[str, int]:
    """The layer that makes each tensor of :func:`tensor_names`, but for numbers that are the same for every image."""
    names = {i: name for i, name in tensor_names(network).items() if not isinstance(network.layers[i], Implicit)}
    return {name: index for index, name in reversed(names.items())}


class _Exported(nn.Module):
    """The outputs of all layers under their tensors' names, then boxes and scores: names survive as names of outputs."""

    def __init__(self, model: Darknet) -> None:
        super().__init__()
        self.model = model
        makers = tensor_makers(model.network)
        self.names, self.indices = zip(*sorted(makers.items(), key=lambda item: item[1]), strict=True)
        self.constants = {layer.index for layer in model.network.layers if isinstance(layer, Implicit)}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model.run(images, keep={*self.indices, *self.model.heads}, after=self._free)
        return *(outputs[i] for i in self.indices), *self.model.join(outputs)

    def _free(self, outputs: dict[int, Tensor], read: set[int]) -> None:
        """Free the numbers of outputs that no later layer reads: in the traced graph they need only a name."""
        memory = {index: tensor.untyped_storage() for index, tensor in outputs.items()}
        used = {memory[index].data_ptr() for index in outputs.keys() - (read - {-1, *self.model.heads})}
        for index in read - self.constants:
            if memory[index].data_ptr() not in used:
                memory[index].resize_(0)


def export_onnx(model: Darknet, info: DetectorInfo, output: str | Path) -> None:
    """Write ``plain.onnx``: input ``images``, outputs ``boxes`` and ``scores``; the batch is that of ``info.batch``.

    Raises:
        DarktrtError: the file cannot be written.
    """
    exported = _Exported(model)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode():
        # the TorchScript exporter: it writes opset 17 itself and needs no onnxscript; torch calls it the legacy one
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(
            exported,
            (torch.zeros(1, info.channels, info.height, info.width),),
            buffer,  # type: ignore[arg-type]  # documented to take a file object too
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[*exported.names, "boxes", "scores"],
        )
    graph_model = onnx.load_from_string(buffer.getvalue())
    del buffer
    _finish(graph_model, info)
    with atomic_output(output) as temporary:
        onnx.save(graph_model, str(temporary))


def _share_initializers(graph: onnx.GraphProto) -> None:
    """Let nodes read initializers themselves, where the exporter found equal ones and gives all but one by an Identity."""
    initializers = {tensor.name for tensor in graph.initializer}
    same: dict[str, str] = {}
    for node in list(graph.node):
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Identity" and node.input[0] in initializers:
            same[node.output[0]] = node.input[0]
            graph.node.remove(node)


def _finish(model: onnx.ModelProto, info: DetectorInfo) -> None:
    """Leave boxes and scores as the only outputs, constants as initializers, the batch as asked for; write the metadata."""
    graph = model.graph
    graph.name = info.name
    for value in [value for value in graph.output if value.name not in ("boxes", "scores")]:
        graph.output.remove(value)
        graph.value_info.append(value)
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        graph.node.remove(node)
        constant = onnx.TensorProto()
        constant.CopyFrom(node.attribute[0].t)
        constant.name = node.output[0]
        graph.initializer.append(constant)
    _share_initializers(graph)
    low, _, high = info.batch
    for value in (*graph.input, *graph.output, *graph.value_info):
        # no operation above looks at the batch: traced with one image, the graph is that of any number
        batch = value.type.tensor_type.shape.dim[0]
        batch.Clear()
        if low < high:
            batch.dim_param = "batch"
        else:
            batch.dim_value = low
    onnx.helper.set_model_props(model, {METADATA_KEY: info.to_json()})
