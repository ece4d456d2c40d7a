"""A report on a network's variants: their accuracy, where their errors come from, and the protocol of the measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from darktrt import __version__
from darktrt.calib.file import is_cache, read_calibration
from darktrt.calib.histogram import Histogram
from darktrt.calib.summary import bar_heights
from darktrt.calib.threshold import LEVELS, expected_error
from darktrt.check.agreement import Agreement
from darktrt.check.coco import Accuracy, ClassAccuracy
from darktrt.check.detections import VariantDetections
from darktrt.check.disagreements import SHOWN_SCORE, Disagreement, disagreement, panels, shown
from darktrt.check.evaluation import EvaluatedVariant, Evaluation
from darktrt.check.ground_truth import GroundTruth
from darktrt.check.sensitivity import Sensitivity, sensitivity
from darktrt.check.simulate import chosen_fp_layers, convolutions, load_network, quantized
from darktrt.metadata import DetectorInfo
from darktrt.records import Excerpt, finite, read_record
from darktrt.surgery.qdq import Calibration
from darktrt.vision.detector import reaches_limit

FEW = 500
"""Fewer images than this get a note that differences of some thousandths may be chance."""
WORST = 6
"""Number of tensors whose histograms are shown."""

FORMAT = "darktrt report 2"
"""Of ``report.json``."""
_BARS = 64


@dataclass(frozen=True)
class Latency:
    """An engine's latency from ``darktrt bench``: of the smallest batch, with CUDA graph where that was measured."""

    milliseconds: float
    """Median of one call, from images to results in host memory."""
    batch: int
    cuda_graph: bool
    images_per_second: float
    gpu: str


@dataclass(frozen=True)
class VariantFigures:
    """The figures of one variant."""

    name: str
    precision: str
    about: Mapping[str, str]
    accuracy: Accuracy
    drop: float | None
    """Drop of the AP against the reference; None for the reference itself, and NaN where there is no AP."""
    classes: tuple[ClassAccuracy, ...]
    curves: Mapping[str, tuple[float, ...]]
    detections: int
    """Number of detections above :data:`darktrt.check.disagreements.SHOWN_SCORE`, in all images."""
    latency: Latency | None


@dataclass(frozen=True)
class TensorRange:
    """A tensor's values in calibration, and its range in INT8."""

    tensor: str
    line: int | None
    """The cfg line of the convolution that reads it."""
    amax: float
    """The largest |x| seen."""
    threshold: float
    """The largest |x| that INT8 can represent."""
    clipped: float
    """Share of the values that are larger."""
    noise: float
    """RMS of the rounding and clipping error over the RMS of the values."""
    bars: tuple[float, ...]
    """Log counts in even steps of |x| from 0 to ``amax``; the largest is 1."""


@dataclass(frozen=True)
class CalibrationSources:
    """The origin of INT8's scales."""

    file: str
    images: int
    """0 for a TensorRT cache, which does not list them."""
    folders: tuple[str, ...]
    overlap: int
    """Number of images that are both in the evaluation and in calibration, by their SHA-256."""
    tensors: tuple[TensorRange, ...]
    """Those with the most noise, worst first."""


@dataclass(frozen=True)
class ShownImage:
    """An image on which variants disagree, and its panels: labels, reference, variant."""

    about: Disagreement
    titles: tuple[str, ...]
    panels: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Report:
    """All figures, and the images to show."""

    info: DetectorInfo
    reference: str
    data: str
    images: int
    objects: int
    digest: str
    """As :attr:`darktrt.check.ground_truth.GroundTruth.digest`."""
    protocol: Mapping[str, str]
    variants: tuple[VariantFigures, ...]
    agreement: Agreement | None
    sensitivity: Sensitivity | None
    fp_layers: tuple[str, ...]
    """Convolutions that INT8 leaves in floating point."""
    calibration: CalibrationSources | None
    shown: tuple[ShownImage, ...]
    disagreements: int
    """Number of images on which a variant disagrees with the reference."""
    notes: tuple[str, ...]
    """What a reader must know: what is missing or unusual."""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-able values; those that do not exist are None."""
        values = {
            "format": FORMAT,
            "darktrt": __version__,
            "created": self.created,
            "model": _model(self.info),
            "reference": self.reference,
            "evaluation": {
                "data": self.data,
                "images": self.images,
                "objects": self.objects,
                "digest": self.digest,
                "protocol": dict(self.protocol),
            },
            "variants": [asdict(replace(one, about=dict(one.about), curves=dict(one.curves))) for one in self.variants],
            "agreement": json.loads(self.agreement.to_json()) if self.agreement else None,
            "sensitivity": json.loads(self.sensitivity.to_json()) if self.sensitivity else None,
            "fp_layers": list(self.fp_layers),
            "calibration": asdict(self.calibration) if self.calibration else None,
            "disagreements": {"images": self.disagreements, "worst": [asdict(one.about) for one in self.shown]},
            "notes": list(self.notes),
        }
        figures: dict[str, Any] = finite(values)
        return figures

    def to_json(self) -> str:
        """The text of ``report.json``."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def _model(info: DetectorInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "width": info.width,
        "height": info.height,
        "channels": info.channels,
        "layers": len(info.layers),
        "mish": info.mish_count,
        "heads": len(info.heads),
        "classes": len(info.class_names),
        "parameters": info.parameters,
        "gflops": info.gflops,
        "sources": dict(info.sources),
    }


@dataclass(frozen=True)
class Parts:
    """What a report is made from."""

    ground_truth: GroundTruth
    evaluation: Evaluation
    agreement: Agreement | None = None
    int8: Int8Parts | None = None
    timings: Mapping[str, Latency] = field(default_factory=dict)
    """By the engine's name and, where it is known, by the SHA-256 of its plan."""


def make_report(parts: Parts, images: int) -> Report:
    """The report.

    Args:
        parts: the measurements.
        images: show at most so many images on which variants disagree.
    """
    evaluation, ground_truth, int8 = parts.evaluation, parts.ground_truth, parts.int8
    reference = _reference(evaluation)
    variants = tuple(_figures(variant, reference, parts) for variant in evaluation.variants)
    disagreements = [one for one in _disagreements(reference, parts) if one.about.amount > 0]
    return Report(
        info=reference.detections.info,
        reference=reference.detections.name,
        data=ground_truth.name,
        images=evaluation.images,
        objects=evaluation.objects,
        digest=ground_truth.digest,
        protocol=_protocol(reference.detections, parts),
        variants=variants,
        agreement=parts.agreement,
        sensitivity=int8.sensitivity if int8 else None,
        fp_layers=int8.fp_layers if int8 else (),
        calibration=int8.calibration if int8 else None,
        shown=tuple(_drawn(one, reference.detections, ground_truth) for one in disagreements[:images]),
        disagreements=len(disagreements),
        notes=(*ground_truth.notes, *_notes(variants, parts)),
    )


def _reference(evaluation: Evaluation) -> EvaluatedVariant:
    """The first variant in FP32, or else the first."""
    return next((one for one in evaluation.variants if one.detections.precision == "fp32"), evaluation.variants[0])


def _figures(variant: EvaluatedVariant, reference: EvaluatedVariant, parts: Parts) -> VariantFigures:
    detections, metrics = variant.detections, variant.metrics
    keys = (detections.about.get("sha256", ""), detections.name, Path(detections.name).stem)
    return VariantFigures(
        name=detections.name,
        precision=detections.precision,
        about=dict(detections.about),
        accuracy=metrics.accuracy,
        drop=None if variant is reference else reference.metrics.accuracy.ap - metrics.accuracy.ap,
        classes=metrics.classes,
        curves=metrics.curves,
        detections=sum(len(shown(one)) for one in detections.in_order(parts.ground_truth.digests)),
        latency=next((parts.timings[key] for key in keys if key in parts.timings), None),
    )


def _protocol(reference: VariantDetections, parts: Parts) -> dict[str, str]:
    info, thresholds, ground_truth = reference.info, reference.thresholds, parts.ground_truth
    most = max(one.detections.info.max_detections for one in parts.evaluation.variants) or "as many"
    resize = {"stretch": "stretched to the network's input", "letterbox": "letterboxed into the network's input"}[info.resize]
    return {
        "images": f"{len(ground_truth.images)}, with {ground_truth.count} labelled objects, of {ground_truth.name}",
        "resize": f"{resize}, {info.width} x {info.height}, by darknet's bilinear filter",
        "score threshold": f"{thresholds.score:g} for AP; {SHOWN_SCORE:g} where detections are counted, compared and shown",
        "NMS": f"{info.nms.kind}, IoU {thresholds.iou:g}, for each class",
        "detections": f"the best 100 of an image, as COCO counts; a network that ends in NMS outputs at most {most}",
        "AP": "COCO's, by pycocotools: mean over IoU .50:.05:.95 and over the classes that are labelled",
        "INT8 calibrated on": _calibrated_on(parts.int8.calibration) if parts.int8 else "nothing: there is no calibration",
    }


def _calibrated_on(calibration: CalibrationSources) -> str:
    if not calibration.images:
        return f"unknown images: {calibration.file} has scales only"
    return f"{calibration.images} images of {', '.join(calibration.folders)}"


def _notes(variants: Sequence[VariantFigures], parts: Parts) -> list[str]:
    notes = []
    count = len(parts.ground_truth.images)
    overlap = parts.int8.calibration.overlap if parts.int8 else 0
    if overlap:
        notes.append(f"INT8 was calibrated on {overlap} of the {count} images of the evaluation; on others it may lose more.")
    if not parts.ground_truth.count:
        notes.append("No object is labelled, so there is no AP; the report only compares the variants with each other.")
    elif count < FEW:
        notes.append(f"{count} images are few: differences of AP of some thousandths may be chance.")
    if len({one.detections.info.input == "uint8" for one in parts.evaluation.variants}) > 1:
        notes.append(
            "The inputs of variants with a float input, such as PyTorch, or with images of any size are the resized pixels; "
            "those of the others are rounded to bytes. This changes AP by a thousandth or a few."
        )
    for variant in variants:
        if not variant.detections:
            notes.append(f"{variant.name} has no detection above a score of {SHOWN_SCORE:g} in any image.")
    notes += [f"{variant.name}: {variant.about['INT8']}." for variant in variants if variant.about.get("INT8")]
    return [*notes, *_limit_notes(parts)]


def _limit_notes(parts: Parts) -> Iterator[str]:
    """A sentence about each variant that may have lost detections."""
    for variant in (one.detections for one in parts.evaluation.variants):
        reached = sum(reaches_limit(len(one), variant.info) for one in variant.in_order(parts.ground_truth.digests))
        if reached:
            yield (
                f"{variant.name} outputs at most {variant.info.max_detections} detections of an image, and {reached} of the "
                f"{len(parts.ground_truth.images)} images reached that at a score threshold of {variant.thresholds.score:g}: "
                "others may be missing; run surgery again with a larger max_detections."
            )


# --- images ---


@dataclass(frozen=True)
class _Candidate:
    index: int
    """Of the image."""
    detections: VariantDetections
    about: Disagreement


def _disagreements(reference: EvaluatedVariant, parts: Parts) -> list[_Candidate]:
    """For every image the variant that disagrees most, largest disagreement first."""
    worst: dict[int, _Candidate] = {}
    expected = reference.detections.in_order(parts.ground_truth.digests)
    for other in (one.detections for one in parts.evaluation.variants if one is not reference):
        actual = other.in_order(parts.ground_truth.digests)
        for i, image in enumerate(parts.ground_truth.images):
            about = disagreement(image.path.name, other.name, actual[i], expected[i])
            if i not in worst or about.amount > worst[i].about.amount:
                worst[i] = _Candidate(i, other, about)
    return sorted(worst.values(), key=lambda one: -one.about.amount)


def _drawn(candidate: _Candidate, reference: VariantDetections, ground_truth: GroundTruth) -> ShownImage:
    digest, image = ground_truth.digests[candidate.index], ground_truth.images[candidate.index]
    drawn = panels(image, [reference.images[digest], candidate.detections.images[digest]])
    return ShownImage(candidate.about, ("labels", reference.name, candidate.detections.name), tuple(drawn))


# --- INT8 ---


@dataclass(frozen=True)
class Int8Parts:
    """What is known of INT8 before an engine is built."""

    sensitivity: Sensitivity | None
    fp_layers: tuple[str, ...]
    calibration: CalibrationSources


def int8_parts(
    source: str | Path, calibration: Calibration, file: str | Path, ground_truth: GroundTruth, limit: int
) -> Int8Parts:
    """The cost of INT8 for an ONNX file, and the origin of the scales.

    Args:
        source: the ONNX file.
        calibration: the scales and what else calibration measured.
        file: of the calibration.
        ground_truth: the images of the evaluation.
        limit: measure the cost of each convolution on so many of them; 0 leaves that out.

    Raises:
        DarktrtError: the file cannot be quantized, or the calibration is of another network.
    """
    network = load_network(source)
    fp_layers = tuple(chosen_fp_layers(network, calibration))
    quantized(network, calibration, fp_layers)  # refuses the calibration of another network
    lines = {one.node: one.line for one in convolutions(network)}
    inputs = {node.name: node.input[0] for node in network.model.graph.node if node.name in lines}
    readers = {inputs[node]: line for node, line in reversed(lines.items()) if node not in fp_layers}
    images = [str(image.path) for image in ground_truth.images]
    cost = sensitivity(source, images, calibration, limit) if limit else None
    return Int8Parts(cost, fp_layers, calibration_sources(file, calibration.scales, readers, ground_truth.digests))


def calibration_sources(
    file: str | Path, scales: Mapping[str, Any], readers: Mapping[str, int | None], digests: Iterable[str]
) -> CalibrationSources:
    """The origin of the scales, as far as the file has it.

    Args:
        file: of the calibration.
        scales: by tensor.
        readers: the cfg line of the convolution that reads each tensor that INT8 quantizes.
        digests: SHA-256 of the images of the evaluation.
    """
    if is_cache(file):
        return CalibrationSources(str(file), 0, (), 0, ())
    histograms = read_calibration(file).histograms
    folders = tuple(dict.fromkeys(str(Path(path).parent) for path in histograms.images.values()))
    ranges = [
        _range(name, readers[name], histogram, float(scales[name]))
        for name, histogram in histograms.histograms.items()
        if name in readers and name in scales and histogram.amax
    ]
    worst = sorted(ranges, key=lambda one: -one.noise)[:WORST]
    overlap = sum(digest in histograms.images for digest in digests)
    return CalibrationSources(str(file), len(histograms.images), folders, overlap, tuple(worst))


def _range(name: str, line: int | None, histogram: Histogram, scale: float) -> TensorRange:
    threshold = scale * LEVELS
    centres = (np.arange(len(histogram.counts)) + 0.5) * histogram.bin_width
    power = float(histogram.counts @ centres**2) / histogram.count
    error = float(expected_error(histogram, np.array([threshold]))[0])
    clipped = float(histogram.counts[centres > threshold].sum()) / histogram.count
    noise = math.sqrt(error / power) if power else 0.0
    return TensorRange(name, line, histogram.amax, threshold, clipped, noise, tuple(bar_heights(histogram, _BARS)))


# --- latency ---


@dataclass(frozen=True)
class _Median(Excerpt):
    median: float


@dataclass(frozen=True)
class _Timing(Excerpt):
    name: str
    batch: int
    cuda_graph: bool
    end_to_end: _Median
    images_per_second: float
    plan_sha256: str = ""


@dataclass(frozen=True)
class _Bench(Excerpt):
    """What a report shows of a :class:`darktrt.engine.bench.BenchReport`."""

    timings: tuple[_Timing, ...]
    gpu: str | None = None


def read_timings(paths: Iterable[str | Path]) -> dict[str, Latency]:
    """Latencies from files of ``darktrt bench``, by the engine's name and, where the file has it, the SHA-256 of its plan.

    Raises:
        DarktrtError: a file cannot be read, is damaged, or is something else.
    """
    timings: dict[str, Latency] = {}
    for path in paths:
        bench = read_record(_Bench, path, "make it with 'darktrt bench'")
        for timing in sorted(bench.timings, key=lambda one: (one.batch, not one.cuda_graph)):
            latency = Latency(
                timing.end_to_end.median, timing.batch, timing.cuda_graph, timing.images_per_second, bench.gpu or "unknown GPU"
            )
            for key in filter(None, (timing.name, timing.plan_sha256)):
                timings.setdefault(key, latency)
    return timings
