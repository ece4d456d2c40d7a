"""INT8 with corrected biases where TensorRT chooses what runs in INT8, in a build that shows its choice and one more; or where
INT8 is forced."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import onnx

from darktrt.engine.layer_list import ConvolutionPrecision, convolution_precisions
from darktrt.engine.options import BuildOptions
from darktrt.engine.target import Target
from darktrt.engine.trt_builder import Built, build
from darktrt.engine.weak_typing import Calibrated
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.progress import LOGGER
from darktrt.surgery.qdq import correct_biases

if TYPE_CHECKING:
    from darktrt.calib.bias_correction import ChannelMeans


class Lowered(NamedTuple):
    """A model lowered for a target, and what is asked of its convolutions."""

    model: bytes
    calibrated: Calibrated | None
    """INT8 by a calibrator."""
    asked: dict[str, bool]
    """For INT8, every convolution by node name, and whether it is to be INT8."""
    channel_means: dict[str, ChannelMeans]
    """The measured effect of quantizing the inputs of convolutions that are to be INT8, by node name."""


class Corrected(NamedTuple):
    """An engine, the precision of its convolutions, and the names of those with corrected biases."""

    engine: Built
    convolutions: tuple[ConvolutionPrecision, ...]
    names: tuple[str, ...]


def build_corrected(lowered: Lowered, info: DetectorInfo, target: Target, options: BuildOptions) -> Corrected:
    """Build; where TensorRT chooses what runs in INT8, build again with the biases of just those convolutions corrected.

    Q/DQ nodes state what is INT8, and lowering has corrected for it. A weakly typed TensorRT with a calibration shows its
    choice only in the built engine, and the corrected bias of a convolution in FP16 would be wrong. The second build is pinned
    to the choice of the first, for TensorRT chooses anew in each build, and reuses the times that the first one measured.
    Where INT8 is forced, the choice is known, and one build is pinned to it.

    Raises:
        DarktrtError: as :func:`darktrt.engine.trt_builder.build`; or INT8 is forced in a model with Q/DQ nodes.
    """
    if options.force_int8:
        meant = [ConvolutionPrecision(name, int8) for name, int8 in lowered.asked.items()]
        return _build_pinned(lowered, info, target, options, meant)
    engine = build(lowered.model, info, target, options, lowered.calibrated)
    convolutions = convolution_precisions(engine.layers, lowered.asked, target)
    if lowered.calibrated is None:
        return Corrected(engine, convolutions, tuple(lowered.channel_means))
    if any(c.int8 and c.node in lowered.channel_means for c in convolutions):
        return _build_pinned(lowered, info, target, options, convolutions, engine)
    _report_biases(lowered, convolutions, ())
    return Corrected(engine, convolutions, ())


def _build_pinned(
    lowered: Lowered,
    info: DetectorInfo,
    target: Target,
    options: BuildOptions,
    choice: Collection[ConvolutionPrecision],
    earlier: Built | None = None,
) -> Corrected:
    """Build with every convolution pinned to its precision in ``choice``, and the biases of those in INT8 corrected.

    Raises:
        DarktrtError: as :func:`build_corrected`.
    """
    if lowered.calibrated is None:
        raise DarktrtError(
            "the model has Q/DQ nodes, which state what is INT8; to force it, build the model without them, with a calibration",
            "force_int8",
        )
    names = tuple(c.node for c in choice if c.int8 and c.node in lowered.channel_means)
    model = onnx.load_from_string(lowered.model)
    correct_biases(model, {name: lowered.channel_means[name] for name in names})
    pinned = _pinned(model, lowered.calibrated, choice)
    engine = build(model.SerializeToString(), info, target, options, pinned, earlier)
    convolutions = convolution_precisions(engine.layers, lowered.asked, target)
    _report_biases(lowered, convolutions, names)
    return Corrected(engine, convolutions, names)


def _pinned(model: onnx.ModelProto, calibrated: Calibrated, convolutions: Collection[ConvolutionPrecision]) -> Calibrated:
    """``calibrated`` with the precision of every convolution that is known."""
    outputs = {node.name: node.output[0] for node in model.graph.node}
    fp_layers = [outputs[c.node] for c in convolutions if c.int8 is False]
    int8 = tuple(outputs[c.node] for c in convolutions if c.int8)
    return replace(calibrated, fp_layers=tuple(dict.fromkeys([*calibrated.fp_layers, *fp_layers])), int8=int8)


def _report_biases(lowered: Lowered, convolutions: Collection[ConvolutionPrecision], corrected: Collection[str]) -> None:
    """Warn of biases that do not fit the precision of their convolutions, or may not."""
    measured = [c for c in convolutions if c.node in lowered.channel_means]
    unknown = [c.node for c in measured if c.int8 is None and c.node not in corrected]
    odd = [c.node for c in measured if c.int8 not in (None, c.node in corrected)]
    if unknown:
        LOGGER.warning(
            f"biases of {len(unknown)} convolutions are not corrected, for TensorRT does not report whether they run in INT8"
        )
    if odd:
        LOGGER.warning(
            f"TensorRT did not keep to the convolutions that had to be in INT8, and the biases of {len(odd)} do not fit: "
            + ", ".join(odd)
        )
