"""Whether one network, run in different ways, has the same outputs: by tensor, by detection and by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from darktrt.check.runs import DETECTIONS, InputImage, Variant, VariantResults, inner_tensors, quiet, run, save_results
from darktrt.check.tolerance import Matches, TensorError, Tolerance, match, tensor_error, tolerance_of
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, LayerInfo, Thresholds
from darktrt.progress import progress
from darktrt.records import finite

_ALL = ""
"""No tensor's name: for a tensor Polygraphy would compute statistics, only to log them, in as much time as comparing needs."""

_Errors = dict[str, TensorError | Matches]
"""Of one result against the reference's, by tensor."""


@dataclass(frozen=True)
class VariantAgreement:
    """One variant's results against the reference's, over all images."""

    name: str
    precision: str
    tolerance: Tolerance
    tensors: dict[str, TensorError]
    """Of the tensors that both have, in the order of the network."""
    detections: Matches | None
    """None where one of the two ends at its raw heads."""

    def failures(self) -> list[str]:
        """The names of tensors beyond the tolerance, in order, and of the detections."""
        beyond = [name for name, error in self.tensors.items() if not error.within(self.tolerance)]
        fails = self.detections is not None and not self.detections.within(self.tolerance)
        return beyond + [DETECTIONS] * fails


@dataclass(frozen=True)
class Agreement:
    """The results of all variants against the reference's."""

    reference: str
    precision: str
    info: DetectorInfo
    images: int
    variants: tuple[VariantAgreement, ...]
    """Without the reference."""
    layers: bool
    """Whether layers were compared, and not only the heads."""

    @property
    def passed(self) -> bool:
        """Whether everything is within the tolerances."""
        return not any(variant.failures() for variant in self.variants)

    def to_table(self) -> str:
        """A table for each variant."""
        return "\n\n".join("\n".join(self._part(variant)) for variant in self.variants)

    def _part(self, variant: VariantAgreement) -> list[str]:
        info, failures = self.info, variant.failures()
        lines = [
            f"{variant.name} ({variant.precision}) against {self.reference} ({self.precision}): {info.name}, "
            f"{info.width}x{info.height}, {self.images} images",
            *self._rows(variant, failures),
        ]
        if missing := self._missing_layers(variant):
            lines.append(f"{missing} more cfg sections have no tensor in both, as inside a node that computes several")
        if variant.detections:
            beyond = "  beyond" if DETECTIONS in failures else ""
            lines.append(f"{_detections_line(variant.detections, variant.tolerance)}{beyond}")
        return [*lines, self._verdict(variant, failures)]

    def _rows(self, variant: VariantAgreement, failures: list[str]) -> list[str]:
        labels = {name: self._label(name) for name in variant.tensors}
        if not labels:
            return []
        width = max(len(label) for label in labels.values())
        rows = [f"{'':{width}}  {'worst':>8}  {'mean':>8}  {'cosine':>9}"]
        for name, error in variant.tensors.items():
            mark = "" if name not in failures else "  beyond" if name != failures[0] else "  beyond, the first"
            rows.append(f"{labels[name]:<{width}}  {error.worst:8.2g}  {error.mean:8.2g}  {error.cosine:9.7f}{mark}")
        return rows

    def _missing_layers(self, variant: VariantAgreement) -> int:
        """The number of layers that were not compared."""
        wanted = {layer.tensor for layer in self.info.layers} if self.layers else set()
        return len(wanted - variant.tensors.keys())

    def _label(self, tensor: str) -> str:
        layer = self._layer(tensor) if self.layers else None
        return f"cfg line {layer.line:4}  [{layer.kind}] {tensor}" if layer else tensor

    def _layer(self, tensor: str) -> LayerInfo | None:
        return next((layer for layer in self.info.layers if layer.tensor == tensor), None)

    def _verdict(self, variant: VariantAgreement, failures: list[str]) -> str:
        t = variant.tolerance
        limits = f"worst {t.worst:g}, cosine {t.cosine:g}, score {t.score:g}, unmatched {t.unmatched:g} ({t.reason})"
        if not failures:
            return f"within the tolerance: {limits}"
        layer = self._layer(failures[0]) if self.layers else None
        if layer is None:
            return f"{failures[0]} beyond the tolerance: {limits}"
        worst = variant.tensors[failures[0]].worst
        return f"cfg line {layer.line}: max relative error {worst:.2g}, beyond the tolerance: {limits}"

    def to_json(self) -> str:
        """All numbers; those that do not exist are null."""
        about = {"network": self.info.name, "reference": self.reference, "images": self.images, "passed": self.passed}
        lines = {layer.tensor: layer.line for layer in reversed(self.info.layers)}
        variants = [
            {
                **asdict(variant),
                "tensors": [{"tensor": name, "line": lines.get(name), **asdict(e)} for name, e in variant.tensors.items()],
                "failures": variant.failures(),
            }
            for variant in self.variants
        ]
        return json.dumps(finite({**about, "variants": variants}), indent=2, allow_nan=False) + "\n"


def _detections_line(matches: Matches, tolerance: Tolerance) -> str:
    near = len(matches.missing + matches.extra) - matches.unmatched(tolerance)
    return (
        f"detections: {matches.expected - len(matches.missing)} of {matches.expected} matched, {len(matches.missing)} missing, "
        f"{len(matches.extra)} extra{f' ({near} of these near the threshold)' if near else ''}, "
        f"largest score difference {matches.score:.2g}, least IoU {matches.iou:.4f}"
    )


# --- comparing ---


def compare(
    variants: Sequence[Variant],
    images: Sequence[InputImage],
    loaded: Sequence[VariantResults] = (),
    thresholds: Thresholds = Thresholds(),  # noqa: B008  # frozen
    layers: bool = False,
    tolerance: Mapping[str, float] = MappingProxyType({}),
    save: str | Path | None = None,
    partly: bool = False,
) -> Agreement:
    """Run variants over images, and compare all results, loaded ones too, with those of the first.

    Args:
        variants: may be none, where results are loaded.
        images: fitted to the input that all variants have.
        layers: compare the outputs of all cfg sections.
        tolerance: limits to replace, by the names of :class:`~darktrt.check.tolerance.Tolerance`.
        save: a file for the results of the variants.
        partly: with ``layers``, compare variants that have only heads too, as most engines.

    Raises:
        DarktrtError: as :func:`check_comparable`, before the first image; a variant fails, or has no tensor of the reference.
    """
    everyone: list[Variant | VariantResults] = [*variants, *loaded]
    if len(everyone) < 2 and not (variants and save):
        raise DarktrtError("there are not two results to compare; name two variants, or results to load")
    check_comparable(variants, images, loaded, thresholds)
    reference, *others = everyone
    digests = [image.digest for image in images] if variants else list(loaded[0].iterations)
    tensors, threshold = _tensors(reference.info, layers), (thresholds if variants else loaded[0].thresholds).score
    results, errors = list[list[Any]](), list[list[_Errors]]()
    with progress(len(digests), "images", "comparing") as bar:
        for i, digest in enumerate(digests):
            results.append(run(variants, images[i], thresholds, layers) if variants else [])
            errors.append(_errors([*results[-1], *(one.iterations[digest] for one in loaded)], tensors, threshold))
            _check_tensors(others, errors[-1], reference.info if layers and not partly else None)
            if not save:
                results.clear()
            bar.update()
    if save:
        save_results({one.name: its for one, its in zip(variants, zip(*results, strict=True), strict=True)}, save)
    agreements = tuple(
        _agreement(one, tolerance_of((reference.precision, one.precision), tolerance), [image[i] for image in errors])
        for i, one in enumerate(others)
    )
    return Agreement(reference.name, reference.precision, reference.info, len(digests), agreements, layers)


def _errors(results: Sequence[Any], tensors: Sequence[str], threshold: float) -> list[_Errors]:
    """The errors of every result of one image against the first of them."""
    from polygraphy.comparator import Comparator, RunResults

    def compare_pair(reference: Any, result: Any) -> dict[str, _Errors]:
        common = [name for name in tensors if name in reference and name in result]
        errors: _Errors = {name: tensor_error(result[name], reference[name], name) for name in common}
        if DETECTIONS in reference and DETECTIONS in result:
            errors[DETECTIONS] = match(result[DETECTIONS], reference[DETECTIONS], threshold)
        return {_ALL: errors}

    pairs = [(0, i) for i in range(1, len(results))]
    with quiet():
        numbered = RunResults([(str(i), [result]) for i, result in enumerate(results)])
        compared = Comparator.compare_accuracy(numbered, comparisons=pairs, compare_func=compare_pair)[0]
    return [compared["0", str(i)][0][_ALL] for _, i in pairs]


def _tensors(info: DetectorInfo, layers: bool) -> list[str]:
    """What may be compared, in the order of the network."""
    inner = inner_tensors(info, layers)
    return [name for name in dict.fromkeys(layer.tensor for layer in info.layers) if name in inner] + ["boxes", "scores"]


def _agreement(
    variant: Variant | VariantResults, tolerance: Tolerance, images: Sequence[Mapping[str, TensorError | Matches]]
) -> VariantAgreement:
    """The errors of all images as one."""
    errors: dict[str, list[TensorError]] = {}
    matches: list[Matches] = []
    for image in images:
        for tensor, value in image.items():
            if isinstance(value, Matches):
                matches.append(value)
            else:
                errors.setdefault(tensor, []).append(value)
    tensors = {tensor: _worst(values) for tensor, values in errors.items()}
    return VariantAgreement(variant.name, variant.precision, tolerance, tensors, _sum(matches) if matches else None)


def _worst(values: Sequence[TensorError]) -> TensorError:
    worst, mean, cosine = np.array([astuple(value) for value in values]).T  # NumPy's max and min keep NaN
    return TensorError(float(worst.max()), float(mean.mean()), float(cosine.min()))


def _sum(matches: Sequence[Matches]) -> Matches:
    return Matches(
        expected=sum(one.expected for one in matches),
        score=max(one.score for one in matches),
        iou=min(one.iou for one in matches),
        missing=tuple(chain.from_iterable(one.missing for one in matches)),
        extra=tuple(chain.from_iterable(one.extra for one in matches)),
    )


# --- what cannot be compared ---


def check_comparable(
    variants: Sequence[Variant],
    images: Sequence[InputImage],
    loaded: Sequence[VariantResults] = (),
    thresholds: Thresholds = Thresholds(),  # noqa: B008  # frozen
) -> None:
    """See, before any image is run, that variants and loaded results can be compared.

    Raises:
        DarktrtError: two have one name, they are of different networks, input sizes or classes, loaded results are of other
            images or thresholds, or a variant has other thresholds fixed.
    """
    check_same_network([*variants, *loaded])
    for variant in variants:
        variant.info.check_thresholds(thresholds)
    digests = [image.digest for image in images] if variants else list(loaded[0].iterations)
    for results in loaded:
        _check_same_input(results, digests, thresholds if variants else loaded[0].thresholds)


def check_same_network(variants: Sequence[Variant | VariantResults]) -> None:
    """See that these are variants of one network, under different names.

    Raises:
        DarktrtError: they are not.
    """
    names = [variant.name for variant in variants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DarktrtError(f"{twice[0]}: is given twice; name each result once")
    for variant in variants[1:]:
        _check_like(variant, variants[0])


def _check_like(variant: Variant | VariantResults, reference: Variant | VariantResults) -> None:
    name, info, expected = variant.name, variant.info, reference.info
    for part, digest in info.sources.items():
        other = expected.sources.get(part, digest)
        if digest != other and not any(source.startswith("random") for source in (digest, other)):
            raise DarktrtError(f"{name}: was made from another {part} file than {reference.name}; convert the network again")
    sizes = [f"{i.width}x{i.height}x{i.channels}" for i in (info, expected)]
    if sizes[0] != sizes[1]:
        raise DarktrtError(
            f"{name}: its input is {sizes[0]}, that of {reference.name} {sizes[1]}; convert both with the same size"
        )
    classes = len(info.class_names), len(expected.class_names)
    if classes[0] != classes[1]:
        raise DarktrtError(f"{name}: has {classes[0]} classes, {reference.name} {classes[1]}; compare variants of one network")


def _check_same_input(results: VariantResults, digests: Sequence[str], thresholds: Thresholds) -> None:
    common = len(results.iterations.keys() & set(digests))
    if not common == len(results.iterations) == len(set(digests)):
        raise DarktrtError(
            f"{results.name}: is of {len(results.iterations)} images, {common} of them among the others' {len(digests)}; "
            "make all from the same images, with the same limit and seed"
        )
    if results.thresholds != thresholds:
        raise DarktrtError(f"{results.name}: was made with {results.thresholds}, not with {thresholds}; use the same")


def _check_tensors(
    others: Sequence[Variant | VariantResults], errors: Sequence[_Errors], with_layers: DetectorInfo | None
) -> None:
    """See that each variant has something to compare; layers too, where the network is given."""
    for variant, tensors in zip(others, errors, strict=True):
        if not tensors:
            raise DarktrtError(f"{variant.name}: has no output that the reference has too; make both with head nms or decode")
        if with_layers and not tensors.keys() - {DETECTIONS, "boxes", "scores"} - inner_tensors(with_layers, layers=False):
            raise DarktrtError(
                f"{variant.name}: has no layers that the reference has; save results with layers, and build engines for this "
                "from a model that surgery made with mark_layers"
            )
