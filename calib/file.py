"""The calibration file (``.calib``): everything of a calibration in one zip file, as JSON and arrays.

It holds what was counted, the thresholds chosen by that, and what was measured with them. While a run is under way there is a
file of the same form without thresholds, under the name with ``.partial`` behind it. The same images, model and settings make
the same bytes, in whatever order and groups and by however many runs they were counted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import darktrt
from darktrt.archives import Archive, open_archive, write_archive
from darktrt.calib.bias_correction import UNIT_BITS, ChannelSums
from darktrt.calib.channel_means import MeasuredMeans, Range
from darktrt.calib.fp_layers import FpLayers, NoiseSums
from darktrt.calib.histogram import BINS, HistogramSet, Limits, checked_histogram
from darktrt.calib.options import CalibrationSettings
from darktrt.calib.threshold import Choice
from darktrt.errors import DarktrtError, quote
from darktrt.files import check_writable, keep_inputs, open_input
from darktrt.metadata import DetectorInfo
from darktrt.records import parse_json, record

_NAME, _VERSION = "darktrt calibration", 2
_TEXT = "calibration.json"
_ARRAYS = ("counts", "weighted", "mean_sums", "level_sums", "noise_sums")
_MOST_BYTES = 768 << 20
"""Of the arrays of a file: the histograms of 2,000 tensors, four times what the largest networks have, and the rest."""
_MOST_TEXT = 512 << 20
"""Of the JSON, which names every image; a million of them take some 150 MB."""
_CACHE = b"TRT-"
"""How a TensorRT calibration cache begins."""
_ADVICE = "name a calibration (.calib) of 'darktrt calib run', or calibrate again"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_POSITIONS = 1 << 30
_MOST_FLOAT = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class CalibratedNetwork:
    """What is known of the network besides its ONNX file's hash."""

    name: str
    width: int
    height: int
    head: str
    sources: dict[str, str]
    """The hashes of cfg and weights, from the metadata."""

    @staticmethod
    def of(info: DetectorInfo) -> CalibratedNetwork:
        """The network of this metadata."""
        return CalibratedNetwork(info.name, info.width, info.height, info.head, dict(info.sources))


@dataclass(frozen=True, eq=False)
class CalibrationFile:
    """What a calibration file holds."""

    network: CalibratedNetwork
    settings: CalibrationSettings
    histograms: HistogramSet
    warnings: tuple[str, ...] = ()
    """Sentences about its origin."""
    choices: Mapping[str, Choice] = field(default_factory=dict)
    """The thresholds by tensor; empty where images were only counted yet."""
    means: MeasuredMeans = field(default_factory=MeasuredMeans)
    noise: NoiseSums | None = None

    @property
    def scales(self) -> dict[str, np.float32]:
        """The INT8 scale of each tensor."""
        return {name: choice.scale for name, choice in self.choices.items()}

    @cached_property
    def means_sample(self) -> list[str]:
        """The images to measure channel means on, by their SHA-256."""
        return _every_nth(in_order(self.histograms.images), self.settings.bias_images)

    @cached_property
    def noise_sample(self) -> list[str]:
        """The images to measure floating-point layers on; none for a network that ends at its raw heads."""
        number = self.settings.fp_layer_images if self.network.head != "raw" else 0
        return _every_nth(in_order(self.histograms.images), number)

    @property
    def noise_images(self) -> Mapping[str, NDArray[np.float64]]:
        """What was measured on each image of :attr:`noise_sample`."""
        return self.noise.images if self.noise else {}

    @property
    def ranges(self) -> dict[str, Range]:
        """How each tensor is quantized."""
        histograms = self.histograms.histograms
        return {name: Range(choice.scale, histograms[name].exponent) for name, choice in self.choices.items()}

    def fp_layers(self) -> FpLayers | None:
        """The convolutions to leave in floating point; None where that was not measured."""
        return self.noise.fp_layers() if self.noise and self.noise.images else None

    def measured(self) -> list[str]:
        """A line for each measurement: on how many images."""
        return [
            f"{what}: measured on {done} of {wanted} images"
            for what, done, wanted in (
                ("biases", len(self.means.images), len(self.means_sample)),
                ("floating-point layers", len(self.noise_images), len(self.noise_sample)),
            )
            if wanted
        ]

    @property
    def is_measured(self) -> bool:
        """Whether every measurement is whole."""
        return len(self.means.images) == len(self.means_sample) and len(self.noise_images) == len(self.noise_sample)


def in_order(images: Mapping[str, str]) -> list[str]:
    """The SHA-256 of images, ordered by file name, whatever their folders are and in which order they were counted.

    Args:
        images: paths by SHA-256.
    """
    return sorted(images, key=lambda digest: (os.path.basename(images[digest]), digest))


def _every_nth(images: Sequence[str], number: int) -> list[str]:
    """At most so many of the images, spread evenly over them."""
    return list(images[:: -(-len(images) // number)]) if number else []


def partial_path(calibration: str | Path) -> Path:
    """The file of a run that is under way."""
    return Path(f"{calibration}.partial")


def check_calibration_output(output: str | Path, inputs: Sequence[str | Path]) -> None:
    """See, before any work, that a calibration can be written and is none of the inputs.

    Raises:
        DarktrtError: it cannot, or is one.
    """
    for path in (output, partial_path(output)):
        keep_inputs(path, *inputs)
        check_writable(path)


# --- writing ---


def write_calibration(contents: CalibrationFile, path: str | Path) -> None:
    """Write a calibration file, whole or not at all.

    Raises:
        DarktrtError: it cannot be written.
    """
    histograms = list(contents.histograms.histograms.values())
    sums, noise = contents.means.sums.values(), contents.noise_images
    arrays = {
        "counts": np.array([one.counts for one in histograms], np.int64).reshape(-1, BINS),
        "weighted": np.array([one.weighted for one in histograms], np.int64).reshape(-1, BINS),
    }
    if sums:
        arrays["mean_sums"] = np.concatenate([one.means for one in sums])
        arrays["level_sums"] = np.concatenate([one.levels for one in sums])
    if noise:
        arrays["noise_sums"] = np.stack([noise[digest] for digest in in_order(contents.histograms.images) if digest in noise])
    write_archive(path, _TEXT, to_json(contents), arrays)


def to_json(contents: CalibrationFile) -> str:
    """All that is no array, as it stands in the file."""
    return json.dumps(_values(contents), indent=1, ensure_ascii=False, allow_nan=False)


def _values(contents: CalibrationFile) -> dict[str, Any]:
    histograms = contents.histograms
    order = in_order(histograms.images)
    return {
        "format": f"{_NAME} {_VERSION}",
        "darktrt": darktrt.__version__,
        "network": {**asdict(contents.network), "onnx": histograms.model},
        "settings": asdict(contents.settings),
        "warnings": list(contents.warnings),
        "images": {digest: histograms.images[digest] for digest in order},
        "skipped": dict(sorted(histograms.skipped.items())),
        "tensors": {
            name: asdict(Limits(one.exponent, one.minimum, one.maximum, one.zeros))
            for name, one in histograms.histograms.items()
        },
        "groups": histograms.groups,
        "head_inputs": histograms.head_inputs,
        "mish": histograms.mish,
        "thresholds": {name: {**asdict(one), "scale": float(one.scale)} for name, one in contents.choices.items()} or None,
        "channel_means": _means_text(contents.means, order),
        "fp_layers": _noise_text(contents.noise, order),
    }


def _means_text(means: MeasuredMeans, order: Sequence[str]) -> dict[str, Any] | None:
    if not means.images:
        return None
    tensors = {name: {"channels": len(sums.means), "positions": sums.positions} for name, sums in means.sums.items()}
    return {"images": [digest for digest in order if digest in means.images], "tensors": tensors}


def _noise_text(noise: NoiseSums | None, order: Sequence[str]) -> dict[str, Any] | None:
    if not noise or not noise.images:
        return None
    layers = noise.fp_layers()
    images = [digest for digest in order if digest in noise.images]
    costs = [{**asdict(cost), "in_floating_point": cost in layers.chosen} for cost in layers.costs]
    return {"images": images, "always": layers.always, "costs": costs}


# --- reading ---


def is_cache(path: str | Path) -> bool:
    """Whether a file is a TensorRT calibration cache, and not a calibration of darktrt.

    Raises:
        DarktrtError: it cannot be read, or is neither.
    """
    advice = "name a calibration (.calib) of 'darktrt calib run', or a TensorRT calibration cache"
    start = _start(path, advice)
    if not start.startswith((_CACHE, b"PK")):
        raise DarktrtError(f"{path}: is neither a calibration of darktrt nor a TensorRT calibration cache; {advice}")
    return start.startswith(_CACHE)


def _start(path: str | Path, advice: str) -> bytes:
    with open_input(path, advice=advice) as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()


def read_calibration(path: str | Path) -> CalibrationFile:
    """Read what :func:`write_calibration` wrote.

    Raises:
        DarktrtError: the file cannot be read, is no such file or one of a later version, or is damaged.
    """
    if _start(path, _ADVICE).startswith(_CACHE):
        raise DarktrtError(f"{path}: is a TensorRT calibration cache, which has scales only; {_ADVICE}")
    with open_archive(path, _TEXT, _ARRAYS, _MOST_BYTES, _MOST_TEXT, _ADVICE) as archive:
        values = parse_json(archive.text, str(path), _ADVICE)
        _check_version(values, path)
        try:
            text = record(_Text, values)
        except DarktrtError as error:  # of the settings
            raise ValueError(str(error)) from error
        return _contents(text, archive)


def _check_version(values: Any, path: str | Path) -> None:
    found = str(values.get("format")) if isinstance(values, dict) else ""
    match = re.fullmatch(rf"{_NAME} ([0-9]{{1,6}})", found)
    if match and int(match[1]) > _VERSION:
        raise DarktrtError(
            f"{path}: is of version {match[1]} of calibration files, and this darktrt ({darktrt.__version__}) reads version "
            f"{_VERSION}; update darktrt"
        )
    if not match or int(match[1]) < _VERSION:
        raise DarktrtError(f"{path}: is no calibration (its format is '{quote(found, 40)}'); {_ADVICE}")


@dataclass(frozen=True)
class _Network(CalibratedNetwork):
    onnx: str
    """SHA-256 of the ONNX file."""


@dataclass(frozen=True)
class _Threshold:
    """A :class:`Choice` and its scale."""

    amax: float
    method: str
    clipped_share: float
    errors: dict[str, float]
    dead: bool
    joined: bool
    scale: float

    def choice(self) -> Choice:
        choice = Choice(self.amax, self.method, self.clipped_share, self.errors, self.dead, self.joined)
        if not (0 < self.amax <= _MOST_FLOAT and 0 < self.scale == float(choice.scale)):
            raise ValueError(f"the scale {self.scale} does not fit its threshold")
        return choice


@dataclass(frozen=True)
class _Shape:
    channels: int
    positions: int

    def __post_init__(self) -> None:
        if self.channels < 1 or not 1 <= self.positions <= _MOST_POSITIONS:
            raise ValueError("a tensor has no channels, or more positions than fit into memory")


@dataclass(frozen=True)
class _Means:
    images: tuple[str, ...]
    tensors: dict[str, _Shape]


@dataclass(frozen=True)
class _Cost:
    nodes: tuple[str, ...]
    noise: float
    operations: float
    in_floating_point: bool


@dataclass(frozen=True)
class _Noise:
    images: tuple[str, ...]
    always: tuple[str, ...]
    costs: tuple[_Cost, ...]


@dataclass(frozen=True)
class _Text:
    """What a calibration file says in JSON."""

    format: str
    darktrt: str
    network: _Network
    settings: CalibrationSettings
    warnings: tuple[str, ...]
    images: dict[str, str]
    skipped: dict[str, str]
    tensors: dict[str, Limits]
    groups: tuple[tuple[str, ...], ...]
    head_inputs: tuple[str, ...]
    mish: dict[str, str]
    thresholds: dict[str, _Threshold] | None
    channel_means: _Means | None
    fp_layers: _Noise | None

    def __post_init__(self) -> None:
        if not self.images or not self.tensors or not all(map(_DIGEST.fullmatch, self.images)):
            raise ValueError("it has no images or no tensors, or an image without its SHA-256")
        named = {*self.head_inputs, *self.mish, *self.mish.values(), *(name for group in self.groups for name in group)}
        if not named <= set(self.tensors):
            raise ValueError("it names a tensor that has no histogram")
        if self.thresholds is not None and list(self.thresholds) != list(self.tensors):
            raise ValueError("its thresholds are not those of its tensors")
        if self.thresholds is None and (self.channel_means or self.fp_layers):
            raise ValueError("something was measured without thresholds")


def _contents(text: _Text, archive: Archive) -> CalibrationFile:
    network = CalibratedNetwork(*(getattr(text.network, one.name) for one in fields(CalibratedNetwork)))
    contents = CalibrationFile(
        network,
        text.settings,
        _histograms(text, archive),
        text.warnings,
        {name: one.choice() for name, one in (text.thresholds or {}).items()},
    )
    if text.channel_means:
        contents = replace(contents, means=_means(text.channel_means, contents, archive))
    if text.fp_layers:
        contents = replace(contents, noise=_noise(text.fp_layers, contents, archive))
    return contents


def _histograms(text: _Text, archive: Archive) -> HistogramSet:
    shape = (len(text.tensors), BINS)
    columns = (archive.array("counts", np.int64, shape), archive.array("weighted", np.int64, shape))
    rows = zip(text.tensors.items(), *columns, strict=True)
    return HistogramSet(
        text.network.onnx,
        {name: checked_histogram(limits, *counts) for (name, limits), *counts in rows},
        text.images,
        text.skipped,
        {},
        [list(group) for group in text.groups],
        list(text.head_inputs),
        text.mish,
    )


def _means(text: _Means, contents: CalibrationFile, archive: Archive) -> MeasuredMeans:
    if not text.tensors.keys() <= contents.choices.keys():
        raise ValueError("channel means are of a tensor without a threshold")
    images = _measured_images(text.images, contents.means_sample)
    shapes = list(text.tensors.values())
    total = sum(shape.channels for shape in shapes)
    means, levels = (archive.array(name, np.int64, (total,)) for name in ("mean_sums", "level_sums"))
    ends = np.cumsum([shape.channels for shape in shapes])[:-1]
    sums = {
        name: ChannelSums(shape.positions, *parts)
        for (name, shape), *parts in zip(text.tensors.items(), np.split(means, ends), np.split(levels, ends), strict=True)
    }
    for one in sums.values():
        _check_sums(one.means, len(images) << UNIT_BITS + 1)
        _check_sums(one.levels, 128 * one.positions * len(images))
    return MeasuredMeans(images, sums)


def _check_sums(sums: NDArray[np.int64], most: int) -> None:
    if max(-int(sums.min()), int(sums.max())) > most:
        raise ValueError("a sum over a channel is larger than any of its values allow")


def _measured_images(images: Sequence[str], sample: Sequence[str]) -> frozenset[str]:
    if not images or len(set(images)) < len(images) or not set(images) <= set(sample):
        raise ValueError("something was measured on images that were not to be measured on")
    return frozenset(images)


def _noise(text: _Noise, contents: CalibrationFile, archive: Archive) -> NoiseSums:
    images = _measured_images(text.images, contents.noise_sample)
    if len(contents.means.images) < len(contents.means_sample):
        raise ValueError("floating-point layers were measured before the biases were")
    sums = archive.array("noise_sums", np.float64, (len(images), len(text.costs), 5))
    if not (np.isfinite(sums).all() and (sums >= 0).all()):
        raise ValueError("a sum of noise is negative or not finite")
    groups, operations = tuple(cost.nodes for cost in text.costs), tuple(cost.operations for cost in text.costs)
    noise = NoiseSums(text.always, groups, operations, dict(zip(text.images, sums, strict=True)))
    layers = noise.fp_layers()
    if [(cost.noise, cost in layers.chosen) for cost in layers.costs] != [
        (cost.noise, cost.in_floating_point) for cost in text.costs
    ]:
        raise ValueError("the costs of layers do not fit what was measured")
    return noise
