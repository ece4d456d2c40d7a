"""Putting together what several runs counted and measured: the file of one run over all their images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.channel_means import MeasuredMeans
from darktrt.calib.file import CalibrationFile, read_calibration
from darktrt.calib.fp_layers import NoiseSums
from darktrt.calib.histogram import HistogramSet
from darktrt.calib.options import CalibrationSettings
from darktrt.calib.threshold import choose_thresholds
from darktrt.errors import DarktrtError

_OF_THE_DATA = ("limit", "seed")
"""Settings of single runs, which a merge has only where they all agree."""


def merged(paths: Sequence[str | Path], **chosen: Any) -> CalibrationFile:
    """The calibration that one run over the images of several runs makes, as far as they have measured.

    Files of the same images are put together by what was measured; files of different images must have none in common.

    Args:
        paths: calibration files, and those of runs that have not ended.
        chosen: settings by name, in place of those of the files.

    Raises:
        DarktrtError: a file cannot be read, the files are of different models, share only some images, or have different
            settings of which none was chosen.
    """
    first, *others = paths
    whole = read_calibration(first)
    files = [_without_counts(whole)]
    for path in others:  # one at a time in memory
        file = read_calibration(path)
        files.append(_without_counts(file))
        if not any(_images(file) == _images(earlier) for earlier in files[:-1]):
            whole.histograms.merge([file.histograms])
    settings = _common_settings(files, paths, chosen)
    warnings = tuple(sorted({sentence for file in files for sentence in file.warnings}))
    measured = [file for file in files if _images(file) == _images(whole)]
    return with_thresholds(replace(whole, settings=settings, warnings=warnings), measured)


def _without_counts(file: CalibrationFile) -> CalibrationFile:
    return replace(file, histograms=HistogramSet(file.histograms.model, images=dict(file.histograms.images)))


def _images(file: CalibrationFile) -> Set[str]:
    return file.histograms.images.keys()


def _common_settings(
    files: Sequence[CalibrationFile], paths: Sequence[str | Path], chosen: dict[str, Any]
) -> CalibrationSettings:
    values = dict(chosen)
    for name in (one.name for one in fields(CalibrationSettings) if one.name not in chosen):
        found = [getattr(file.settings, name) for file in files]
        odd = next((i for i, value in enumerate(found) if value != found[0]), None)
        if odd is None:
            values[name] = found[0]
        elif name not in _OF_THE_DATA:
            where = f"{paths[0]} was made with {found[0]}, {paths[odd]} with {found[odd]}"
            raise DarktrtError(f"the calibrations have different settings: of {name}, {where}; choose one", argument=name)
    return CalibrationSettings(**values)


def with_thresholds(counted: CalibrationFile, measured: Iterable[CalibrationFile] = ()) -> CalibrationFile:
    """The calibration with the thresholds of what was counted, and with what is known already of the measurements.

    Args:
        measured: calibrations of the same images; those with other thresholds have measured something else and are left out.

    Raises:
        DarktrtError: there is nothing counted.
    """
    settings = counted.settings
    choices = choose_thresholds(counted.histograms, settings.method, settings.percentile)
    result = replace(counted, choices=choices, means=MeasuredMeans(), noise=None)
    fitting = [file for file in measured if file.choices == choices]
    result = replace(result, means=_joined_means(fitting, result.means_sample))
    return replace(result, noise=_joined_noise(fitting, result))


def _joined_means(files: Iterable[CalibrationFile], sample: Sequence[str]) -> MeasuredMeans:
    """What was measured on images of the sample, each once. Of measurements that overlap the larger one is kept."""
    result = MeasuredMeans()
    for file in sorted(files, key=lambda file: (-len(file.means.images), sorted(file.means.images))):
        if file.means.images <= set(sample) and not file.means.images & result.images:
            result += file.means
    return result


def _joined_noise(files: Iterable[CalibrationFile], result: CalibrationFile) -> NoiseSums | None:
    """What was measured with the same corrected biases."""
    joined: dict[str, NDArray[np.float64]] = {}
    noise = None
    for file in files:
        if file.noise and file.means.images == frozenset(result.means_sample):
            noise = noise or file.noise
            joined |= file.noise.images
    return add_noise(result, noise, joined) if noise else None


def add_noise(file: CalibrationFile, noise: NoiseSums, images: dict[str, NDArray[np.float64]]) -> NoiseSums:
    """The noise with these measurements besides, in the order in which they are summed up."""
    every = {**noise.images, **images}
    return replace(noise, images={digest: every[digest] for digest in file.noise_sample if digest in every})
