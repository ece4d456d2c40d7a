"""One network run by different means, held against each other: tensor by tensor, detection by detection, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from darktrt.check.coco import progress_bar
from darktrt.check.runs import (
    DETECTIONS,
    InputImage,
    Origin,
    Results,
    Variant,
    inner_tensors,
    quiet,
    run,
    save_results,
)
from darktrt.check.tolerance import Difference, Matches, Tolerance, difference, match, tolerance_of
from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo, LayerInfo, Thresholds

_ALL = ""
"""No tensor's name: for a tensor Polygraphy would compute statistics, only to log them, in as much time as comparing takes."""


@dataclass(frozen=True)
class Comparison:
    """One subject's results against the reference's, over all images."""

    name: str
    precision: str
    tolerance: Tolerance
    tensors: dict[str, Difference]
    """Of those that both have, in the order of the network."""
    detections: Matches | None
    """None where one of the two ends at its raw heads."""

    def failures(self) -> list[str]:
        """What is beyond the tolerance: names of tensors, in order, and of the detections."""
        beyond = [name for name, difference in self.tensors.items() if not difference.within(self.tolerance)]
        fails = self.detections is not None and not self.detections.within(self.tolerance)
        return beyond + [DETECTIONS] * fails


@dataclass(frozen=True)
class Agreement:
    """Everything against the reference."""

    reference: str
    precision: str
    info: DetectorInfo
    images: int
    comparisons: tuple[Comparison, ...]
    layers: bool
    """Whether layers were compared, and not the heads alone."""

    @property
    def passed(self) -> bool:
        """Whether all tolerances hold."""
        return not any(comparison.failures() for comparison in self.comparisons)

    def to_table(self) -> str:
        """Text for people: a part for each comparison."""
        return "\n\n".join("\n".join(self._part(comparison)) for comparison in self.comparisons)

    def _part(self, one: Comparison) -> list[str]:
        info, failures = self.info, one.failures()
        lines = [
            f"{one.name} ({one.precision}) against {self.reference} ({self.precision}): {info.name}, "
            f"{info.width}x{info.height}, {self.images} images"
        ]
        rows = [(self._label(name), name, difference) for name, difference in one.tensors.items()]
        width = max(len(label) for label, _, _ in rows) if rows else 0
        if rows:
            lines.append(f"{'':{width}}  {'worst':>8}  {'mean':>8}  {'cosine':>9}")
        for label, name, d in rows:
            mark = "" if name not in failures else "  beyond" if name != failures[0] else "  beyond, the first"
            lines.append(f"{label:<{width}}  {d.worst:8.2g}  {d.mean:8.2g}  {d.cosine:9.7f}{mark}")
        if lacking := self._lacking(one):
            lines.append(f"{lacking} cfg sections more have no tensor in both, as inside a node that computes several")
        if one.detections:
            lines.append(f"{_detections_line(one.detections, one.tolerance)}{'  beyond' if DETECTIONS in failures else ''}")
        return [*lines, self._verdict(one, failures)]

    def _lacking(self, one: Comparison) -> int:
        """Layers that were not compared."""
        wanted = {layer.tensor for layer in self.info.layers} if self.layers else set()
        return len(wanted - one.tensors.keys())

    def _label(self, tensor: str) -> str:
        layer = self._layer(tensor) if self.layers else None
        return f"cfg line {layer.line:4}  [{layer.kind}] {tensor}" if layer else tensor

    def _layer(self, tensor: str) -> LayerInfo | None:
        return next((layer for layer in self.info.layers if layer.tensor == tensor), None)

    def _verdict(self, one: Comparison, failures: list[str]) -> str:
        t = one.tolerance
        limits = f"worst {t.worst:g}, cosine {t.cosine:g}, score {t.score:g}, unmatched {t.unmatched:g} ({t.reason})"
        if not failures:
            return f"within the tolerance: {limits}"
        layer = self._layer(failures[0]) if self.layers else None
        if layer is None:
            return f"{failures[0]} beyond the tolerance: {limits}"
        return f"cfg line {layer.line}: max relative error {one.tensors[failures[0]].worst:.2g}, beyond the tolerance: {limits}"

    def to_json(self) -> str:
        """All numbers; those that do not exist are null."""
        about = {"network": self.info.name, "reference": self.reference, "images": self.images, "passed": self.passed}
        lines = {layer.tensor: layer.line for layer in reversed(self.info.layers)}
        comparisons = [
            {
                **asdict(one),
                "tensors": [{"tensor": name, "line": lines.get(name), **_numbers(d)} for name, d in one.tensors.items()],
                "failures": one.failures(),
            }
            for one in self.comparisons
        ]
        return json.dumps({**about, "comparisons": comparisons}, indent=2, allow_nan=False) + "\n"


def _numbers(difference: Difference) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(difference).items()}


def _detections_line(matches: Matches, tolerance: Tolerance) -> str:
    near = len(matches.missing + matches.extra) - matches.unmatched(tolerance)
    return (
        f"detections: {matches.expected - len(matches.missing)} of {matches.expected} matched, {len(matches.missing)} missing, "
        f"{len(matches.extra)} too many{f' ({near} of these near the threshold)' if near else ''}, "
        f"largest score difference {matches.score:.2g}, least IoU {matches.iou:.4f}"
    )


# --- comparing ---


def compare(
    variants: Sequence[Variant],
    images: Sequence[InputImage],
    loaded: Sequence[Results] = (),
    thresholds: Thresholds = Thresholds(),  # noqa: B008  # frozen
    layers: bool = False,
    tolerance: Mapping[str, float] = MappingProxyType({}),
    save: str | Path | None = None,
    partly: bool = False,
) -> Agreement:
    """Run the subjects over the images and hold all results, loaded ones too, against the first; a bar on stderr.

    Args:
        subjects: may be none, when results are loaded.
        images: fitted to the input that all subjects have.
        layers: compare the outputs of all cfg sections.
        tolerance: limits to change, by the names of :class:`Tolerance`.
        save: a file for the results of the subjects.
        partly: with ``layers``, let those that give no more than the heads take part too, as most engines.

    Raises:
        DarktrtError: they are not results of one network on the same images, or there is nothing to hold against them.
    """
    everyone: list[Variant | Results] = [*variants, *loaded]
    if len(everyone) < 2 and not (variants and save):
        raise DarktrtError("there are not two results to compare; name two of --cfg, --model, --plan and --load-outputs")
    reference, *others = everyone
    _check_same_network(everyone)
    digests = [image.digest for image in images] if variants else list(loaded[0].iterations)
    _check_same_input(loaded, digests, thresholds if variants else loaded[0].origin.thresholds)
    made: list[list[Any]] = []
    found: list[list[dict[str, Difference | Matches]]] = []
    with progress_bar(len(digests), "images") as bar:
        for i, digest in enumerate(digests):
            own = run(variants, images[i], thresholds, layers) if variants else []
            made += [own] if save else []
            found.append(_held([*own, *(one.iterations[digest] for one in loaded)], _tensors(reference.info, layers)))
            bar.update()
    if save:
        save_results({one.name: its for one, its in zip(variants, zip(*made, strict=True), strict=True)}, save)
    comparisons = tuple(
        _comparison(one, tolerance_of((reference.precision, one.precision), tolerance), [pairs[i] for pairs in found])
        for i, one in enumerate(others)
    )
    if layers and not partly:
        _check_layers(reference.info, comparisons)
    return Agreement(reference.name, reference.precision, reference.info, len(digests), comparisons, layers)


def _held(results: Sequence[Any], tensors: Sequence[str]) -> list[dict[str, Difference | Matches]]:
    """What each of one image's results is to the first of them, by tensor."""
    from polygraphy.comparator import Comparator, RunResults

    def judge(reference: Any, result: Any) -> dict[str, dict[str, Difference | Matches]]:
        common = [name for name in tensors if name in reference and name in result]
        found: dict[str, Difference | Matches] = {name: difference(result[name], reference[name], name) for name in common}
        if DETECTIONS in reference and DETECTIONS in result:
            threshold = Origin.from_array(reference[METADATA_KEY]).score_threshold
            found[DETECTIONS] = match(result[DETECTIONS], reference[DETECTIONS], threshold)
        return {_ALL: found}

    pairs = [(0, i) for i in range(1, len(results))]
    with quiet():
        numbered = RunResults([(str(i), [result]) for i, result in enumerate(results)])
        judged = Comparator.compare_accuracy(numbered, comparisons=pairs, compare_func=judge)[0]
    return [judged["0", str(i)][0][_ALL] for _, i in pairs]


def _tensors(info: DetectorInfo, layers: bool) -> list[str]:
    """What may be compared, in the order of the network."""
    inner = inner_tensors(info, layers)
    return [name for name in dict.fromkeys(layer.tensor for layer in info.layers) if name in inner] + ["boxes", "scores"]


def _comparison(
    one: Variant | Results, tolerance: Tolerance, images: Sequence[Mapping[str, Difference | Matches]]
) -> Comparison:
    """The sum of all images.

    Raises:
        DarktrtError: there is nothing that both have.
    """
    if not images[0]:
        raise DarktrtError(f"{one.name}: gives nothing that the reference gives too; make both with --head nms or decode")
    differences: dict[str, list[Difference]] = {}
    matches: list[Matches] = []
    for image in images:
        for tensor, value in image.items():
            if isinstance(value, Matches):
                matches.append(value)
            else:
                differences.setdefault(tensor, []).append(value)
    tensors = {tensor: _worst(values) for tensor, values in differences.items()}
    return Comparison(one.name, one.precision, tolerance, tensors, _sum(matches) if matches else None)


def _worst(values: Sequence[Difference]) -> Difference:
    worst, mean, cosine = np.array([astuple(value) for value in values]).T  # NumPy's max and min keep NaN
    return Difference(float(worst.max()), float(mean.mean()), float(cosine.min()))


def _sum(matches: Sequence[Matches]) -> Matches:
    return Matches(
        expected=sum(one.expected for one in matches),
        score=max(one.score for one in matches),
        iou=min(one.iou for one in matches),
        missing=tuple(chain.from_iterable(one.missing for one in matches)),
        extra=tuple(chain.from_iterable(one.extra for one in matches)),
    )


# --- what cannot be compared ---


def _check_same_network(everyone: Sequence[Variant | Results]) -> None:
    names = [one.name for one in everyone]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DarktrtError(f"{twice[0]}: is given twice; name each result once")
    first, reference = everyone[0].name, everyone[0].info
    for name, info in [(one.name, one.info) for one in everyone[1:]]:
        for part, one in info.sources.items():
            other = reference.sources.get(part, one)
            if one != other and not any(origin.startswith("random") for origin in (one, other)):
                raise DarktrtError(f"{name}: was made from another {part} file than {first}; convert the network again")
        sizes = [f"{i.width}x{i.height}x{i.channels}" for i in (info, reference)]
        if sizes[0] != sizes[1]:
            raise DarktrtError(f"{name}: takes {sizes[0]} images, {first} {sizes[1]}; convert both with one --size")


def _check_same_input(loaded: Sequence[Results], digests: Sequence[str], thresholds: Thresholds) -> None:
    for one in loaded:
        common = len(one.iterations.keys() & set(digests))
        if not common == len(one.iterations) == len(set(digests)):
            raise DarktrtError(
                f"{one.name}: is of {len(one.iterations)} images, {common} of them among the others' {len(digests)}; "
                "make all from the same DATA with the same --limit and --seed"
            )
        if one.origin.thresholds != thresholds:
            raise DarktrtError(f"{one.name}: was made with {one.origin.thresholds}, not with {thresholds}; give the same")


def _check_layers(info: DetectorInfo, comparisons: Sequence[Comparison]) -> None:
    for one in comparisons:
        if not one.tensors.keys() - inner_tensors(info, layers=False):
            raise DarktrtError(
                f"{one.name}: has no layers that the reference has; save results with layers, and build engines for it from a "
                "model that surgery made with mark_layers"
            )
