"""How good an engine is, all in one: every variant's accuracy, where its error comes from, and what that rests on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from darktrt import __version__
from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.calib.summary import Outputs, bar_heights
from darktrt.calib.threshold import LEVELS, expected_error
from darktrt.check.agreement import Agreement
from darktrt.check.coco import Accuracy, ClassAccuracy
from darktrt.check.detections import Judged, VariantDetections
from darktrt.check.disagreements import SHOWN_SCORE, Disagreement, disagreement, panels, shown
from darktrt.check.ground_truth import Truth
from darktrt.check.sensitivity import Sensitivity, sensitivity
from darktrt.check.simulate import chosen_fp_layers, convolutions, load_network
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.surgery.qdq import Calibration

FEW = 500
"""Images below which a difference of some thousandths is said to be chance."""
WORST = 6
"""Tensors whose histograms are shown."""

_FORMAT = "darktrt report 1"
_BARS = 64


@dataclass(frozen=True)
class Latency:
    """How fast an engine was measured to be: of ``darktrt bench``, the smallest batch, with CUDA graph where there is one."""

    milliseconds: float
    """Median of one call, from images in host memory to results there."""
    batch: int
    cuda_graph: bool
    images_per_second: float
    gpu: str


@dataclass(frozen=True)
class VariantFigures:
    """One way to run the network."""

    name: str
    precision: str
    about: Mapping[str, str]
    accuracy: Accuracy
    drop: float | None
    """Of the AP against the reference; None for the reference itself, and NaN where there is no AP."""
    classes: tuple[ClassAccuracy, ...]
    curves: Mapping[str, tuple[float, ...]]
    detections: int
    """Above :data:`darktrt.check.disagreements.SHOWN_SCORE`, in all images."""
    latency: Latency | None


@dataclass(frozen=True)
class TensorRange:
    """A tensor's values in calibration, and what INT8 makes of them."""

    tensor: str
    line: int | None
    """Of the convolution that reads it, in the cfg."""
    amax: float
    """The largest |x| seen."""
    threshold: float
    """The largest |x| that INT8 can state."""
    clipped: float
    """Share of the values that are larger."""
    noise: float
    """Root of the mean squared rounding and clipping error over that of the mean squared value."""
    bars: tuple[float, ...]
    """Log counts over |x| in even steps from 0 to ``amax``, the largest being 1."""


@dataclass(frozen=True)
class CalibrationSources:
    """What INT8's scales come from."""

    table: str
    images: int
    """0 where no histograms lie beside the table."""
    folders: tuple[str, ...]
    overlap: int
    """Images of the evaluation that calibration has seen, by their SHA-256."""
    tensors: tuple[TensorRange, ...]
    """Those that lose most, worst first."""


@dataclass(frozen=True)
class Shown:
    """An image on which variants disagree, and its panels: labels, reference, variant."""

    about: Disagreement
    titles: tuple[str, ...]
    panels: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    info: DetectorInfo
    reference: str
    data: str
    images: int
    objects: int
    digest: str
    """Of the images and their labels: reports of one digest can be compared."""
    protocol: Mapping[str, str]
    variants: tuple[VariantFigures, ...]
    comparison: Agreement | None
    sensitivity: Sensitivity | None
    kept: tuple[str, ...]
    """Convolutions that INT8 leaves in floating point here."""
    calibrated: CalibrationSources | None
    shown: tuple[Shown, ...]
    disagreements: int
    """Images on which there is any difference to be told."""
    notes: tuple[str, ...]
    """What a reader must know: what is missing or odd."""
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"))

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON has them: what does not exist is None."""
        values = {
            "format": _FORMAT,
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
            "comparison": json.loads(self.comparison.to_json()) if self.comparison else None,
            "sensitivity": json.loads(self.sensitivity.to_json()) if self.sensitivity else None,
            "kept": list(self.kept),
            "calibration": asdict(self.calibrated) if self.calibrated else None,
            "disagreements": {"images": self.disagreements, "worst": [asdict(one.about) for one in self.shown]},
            "notes": list(self.notes),
        }
        finite: dict[str, Any] = _finite(values)
        return finite

    def to_json(self) -> str:
        """The text of ``report.json``."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same, with None for NaN and infinite numbers, which JSON does not have, and lists for tuples."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    """What a report is made of, each made by a function of its own."""

    truth: Truth
    digests: Sequence[str]
    judged: Sequence[Judged]
    notes: Sequence[str] = ()
    """On the labels."""
    comparison: Agreement | None = None
    int8: Int8Parts | None = None
    timings: Mapping[str, Latency] = field(default_factory=dict)
    """By the engine's name and, where it is known, by the SHA-256 of its plan."""


def make_report(parts: Parts, images: int) -> Report:
    """The report, with panels of at most so many images on which variants disagree."""
    truth, judged = parts.truth, parts.judged
    reference = next((one for one in judged if one.found.precision == "fp32"), judged[0])
    variants = tuple(_variant(one, reference, parts) for one in judged)
    all_ = _disagreements(judged, reference, parts)
    chosen = [one for one in all_ if one.about.amount > 0][:images]
    return Report(
        info=reference.found.info,
        reference=reference.found.name,
        data=truth.name,
        images=len(truth.images),
        objects=truth.count,
        digest=evaluation_digest(truth, parts.digests),
        protocol=_protocol(reference.found, parts),
        variants=variants,
        comparison=parts.comparison,
        sensitivity=parts.int8.sensitivity if parts.int8 else None,
        kept=parts.int8.kept if parts.int8 else (),
        calibrated=parts.int8.calibrated if parts.int8 else None,
        shown=tuple(_drawn(one, reference.found, parts) for one in chosen),
        disagreements=sum(one.about.amount > 0 for one in all_),
        notes=(*parts.notes, *_notes(variants, parts)),
    )


def _variant(one: Judged, reference: Judged, parts: Parts) -> VariantFigures:
    found, judgement = one.found, one.judgement
    drop = None if one is reference else reference.judgement.accuracy.ap - judgement.accuracy.ap
    count = sum(len(shown(found.images[digest])) for digest in parts.digests)
    keys = (found.about.get("sha256", ""), found.name, Path(found.name).stem)
    latency = next((parts.timings[key] for key in keys if key in parts.timings), None)
    about = dict(found.about)
    return VariantFigures(
        found.name, found.precision, about, judgement.accuracy, drop, judgement.classes, judgement.curves, count, latency
    )


def evaluation_digest(truth: Truth, digests: Sequence[str]) -> str:
    """Of the images and their labels, in any order; what is measured on one can be compared."""
    rows = sorted(
        (digest, sorted((one.class_id, *one.box, one.crowd) for one in image.objects))
        for digest, image in zip(digests, truth.images, strict=True)
    )
    return sha256(repr(rows).encode()).hexdigest()


def _protocol(found: VariantDetections, parts: Parts) -> dict[str, str]:
    info, thresholds = found.info, found.thresholds
    most = max(one.found.info.max_detections for one in parts.judged) or "as many"
    images = f"{len(parts.truth.images)}, with {parts.truth.count} labelled objects, of {parts.truth.name}"
    resize = {"stretch": "stretched to the network's input", "letterbox": "letterboxed into the network's input"}[info.resize]
    return {
        "images": images,
        "resize": f"{resize}, {info.width} x {info.height}, by darknet's bilinear filter",
        "score threshold": f"{thresholds.score:g} for AP; {SHOWN_SCORE:g} where detections are counted, compared and shown",
        "NMS": f"{info.nms.kind}, IoU {thresholds.iou:g}, class by class",
        "detections": f"the best 100 an image, as COCO counts; a network that ends in NMS gives at most {most}",
        "AP": "COCO's, by pycocotools: mean over IoU .50:.05:.95 and over the classes that are labelled",
        "INT8 calibrated on": _calibrated_on(parts.int8.calibrated)
        if parts.int8
        else "nothing: no calibration table was given",
    }


def _calibrated_on(calibrated: CalibrationSources) -> str:
    if not calibrated.images:
        return f"unknown images: no histograms lie beside {calibrated.table}"
    return f"{calibrated.images} images of {', '.join(calibrated.folders)}"


def _notes(variants: Sequence[VariantFigures], parts: Parts) -> list[str]:
    notes = []
    count = len(parts.truth.images)
    overlap = parts.int8.calibrated.overlap if parts.int8 else 0
    if overlap:
        notes.append(
            f"INT8 was calibrated on {overlap} of the {count} images that it is judged on; on others it may lose more."
        )
    if not parts.truth.count:
        notes.append("There is nothing labelled to measure AP on; what follows compares the variants with each other alone.")
    elif count < FEW:
        notes.append(f"{count} images are few: differences of AP of some thousandths may be chance.")
    if len({one.found.info.input for one in parts.judged}) > 1:
        notes.append(
            "Variants with a float input, PyTorch among them, get the resized pixels as they are, the others rounded to bytes: "
            "that alone changes AP by a thousandth or a few."
        )
    for one in variants:
        if not one.detections:
            notes.append(f"{one.name} finds nothing above a score of {SHOWN_SCORE:g} in any image.")
    return notes


# --- images ---


@dataclass(frozen=True)
class _Candidate:
    index: int
    found: VariantDetections
    about: Disagreement


def _disagreements(judged: Sequence[Judged], reference: Judged, parts: Parts) -> list[_Candidate]:
    """For every image its worst variant, the most first."""
    worst: dict[int, _Candidate] = {}
    for other in (one.found for one in judged if one is not reference):
        for i, (digest, image) in enumerate(zip(parts.digests, parts.truth.images, strict=True)):
            expected = reference.found.images[digest]
            about = disagreement(image.path.name, other.name, other.images[digest], expected)
            if i not in worst or about.amount > worst[i].about.amount:
                worst[i] = _Candidate(i, other, about)
    return sorted(worst.values(), key=lambda one: -one.about.amount)


def _drawn(one: _Candidate, reference: VariantDetections, parts: Parts) -> Shown:
    digest, image = parts.digests[one.index], parts.truth.images[one.index]
    drawn = panels(image, [reference.images[digest], one.found.images[digest]])
    return Shown(one.about, ("labels", reference.name, one.found.name), tuple(drawn))


# --- INT8 ---


@dataclass(frozen=True)
class Int8Parts:
    """What there is to say of INT8 before any engine."""

    sensitivity: Sensitivity | None
    kept: tuple[str, ...]
    calibrated: CalibrationSources


def int8_parts(
    source: str | Path, calibration: Calibration, table: str | Path, truth: Truth, digests: Sequence[str], limit: int
) -> Int8Parts:
    """What INT8 costs an ONNX file, convolution by convolution on so many images (0: that is left out), and its scales.

    Raises:
        DarktrtError: the file cannot be quantized, or the calibration is of another network.
    """
    network = load_network(source)
    kept = tuple(chosen_fp_layers(network, calibration))
    lines = {one.node: one.line for one in convolutions(network)}
    inputs = {node.name: node.input[0] for node in network.model.graph.node if node.name in lines}
    readers = {inputs[node]: line for node, line in reversed(lines.items()) if node not in kept}
    images = [str(image.path) for image in truth.images]
    cost = sensitivity(source, images, calibration, limit) if limit else None
    return Int8Parts(cost, kept, calibrated(table, calibration.scales, readers, digests))


def calibrated(
    table: str | Path, scales: Mapping[str, Any], readers: Mapping[str, int | None], digests: Iterable[str]
) -> CalibrationSources:
    """What the table comes from, as far as the histograms beside it tell.

    Args:
        readers: the tensors that INT8 quantizes, to the cfg line of the convolution that reads each.
        digests: SHA-256 of the images of the evaluation.
    """
    file = Outputs(Path(table)).histograms
    if not file.is_file():
        return CalibrationSources(str(table), 0, (), 0, ())
    histograms = HistogramSet.load(file)
    folders = tuple(dict.fromkeys(str(Path(path).parent) for path in histograms.images.values()))
    ranges = [
        _range(name, readers[name], histogram, float(scales[name]))
        for name, histogram in histograms.histograms.items()
        if name in readers and name in scales and histogram.amax
    ]
    worst = sorted(ranges, key=lambda one: -one.noise)[:WORST]
    overlap = sum(digest in histograms.images for digest in digests)
    return CalibrationSources(str(table), len(histograms.images), folders, overlap, tuple(worst))


def _range(name: str, line: int | None, histogram: Histogram, scale: float) -> TensorRange:
    threshold = scale * LEVELS
    centres = (np.arange(len(histogram.counts)) + 0.5) * histogram.bin_width
    power = float(histogram.counts @ centres**2) / histogram.count
    error = float(expected_error(histogram, np.array([threshold]))[0])
    clipped = float(histogram.counts[centres > threshold].sum()) / histogram.count
    noise = math.sqrt(error / power) if power else 0.0
    return TensorRange(name, line, histogram.amax, threshold, clipped, noise, tuple(bar_heights(histogram, _BARS)))


# --- latency ---


def read_timings(paths: Iterable[str | Path]) -> dict[str, Latency]:
    """Latencies of files of ``darktrt bench --json``, by the engine's name and the SHA-256 of its plan where that is told.

    Raises:
        DarktrtError: a file cannot be read, or is something else.
    """
    timings: dict[str, Latency] = {}
    for path in paths:
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [(one, _latency(one, values)) for one in values["timings"]]
        except OSError as error:
            raise DarktrtError(f"{path}: cannot read: {error.strerror}; make it with 'darktrt bench --json'") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DarktrtError(f"{path}: holds no timings of 'darktrt bench --json'; make it again") from error
        for one, latency in sorted(rows, key=lambda row: (row[1].batch, not row[1].cuda_graph)):
            for key in (one["name"], one.get("plan_sha256")):
                if key:
                    timings.setdefault(key, latency)
    return timings


def _latency(timing: Mapping[str, Any], values: Mapping[str, Any]) -> Latency:
    return Latency(
        float(timing["end_to_end"]["median"]),
        int(timing["batch"]),
        bool(timing["cuda_graph"]),
        float(timing["images_per_second"]),
        str(values.get("gpu") or "unknown GPU"),
    )
