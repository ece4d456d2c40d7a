"""The differences in average precision between two reports, or two models: for people, and for CI with a budget."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from darktrt.check.evaluation import EvaluatedVariant
from darktrt.check.report import FORMAT
from darktrt.errors import DarktrtError, quote
from darktrt.records import Excerpt, read_record

REPORT = "report.json"
_NUMBERS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_TITLES = ("AP", "AP50", "AP75", "small", "medium", "large")
_CLASSES = 5
"""Number of classes that lose most, to be listed."""


@dataclass(frozen=True)
class Figures:
    """The average precision of one variant; None where no such object is labelled."""

    name: str
    numbers: Mapping[str, float | None]
    classes: Mapping[str, float | None]
    """AP by class."""


@dataclass(frozen=True)
class DiffInput:
    """One of the two reports or models: its variants by name."""

    name: str
    variants: Mapping[str, Figures]
    digest: str
    """Of the images and labels that it was measured on."""


def read_report(text: str) -> DiffInput:
    """Read a report: its folder, or ``report.json``, followed by ``:VARIANT`` for only one of its variants.

    Raises:
        DarktrtError: there is none, it is damaged, or has no such variant.
    """
    path, variant = _split(text)
    file = path / REPORT if os.path.isdir(path) else path
    report = read_record(_Report, file, "make it with 'darktrt check report'", file_format=FORMAT)
    variants = {one.name: one.figures() for one in report.variants}
    if variant and variant not in variants:
        raise DarktrtError(f"{file}: has no variant '{quote(variant)}', only {quote(', '.join(variants))}")
    return DiffInput(text, {variant: variants[variant]} if variant else variants, report.evaluation.digest)


def _split(text: str) -> tuple[Path, str]:
    """Path and variant of ``PATH[:VARIANT]``; the path may have colons too."""
    if os.path.exists(text):
        return Path(text), ""
    path, _, variant = text.rpartition(":")
    return (Path(path), variant) if path and os.path.exists(path) else (Path(text), "")


@dataclass(frozen=True)
class _Accuracy(Excerpt):
    """COCO's numbers, 0..1; None where no such object is labelled."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None

    def __post_init__(self) -> None:
        if wrong := next((value for value in asdict(self).values() if value is not None and not 0 <= value <= 1), None):
            raise ValueError(f"an AP is {wrong:g}")


@dataclass(frozen=True)
class _Class(Excerpt):
    name: str
    objects: int
    ap: float | None


@dataclass(frozen=True)
class _Variant(Excerpt):
    name: str
    accuracy: _Accuracy
    classes: tuple[_Class, ...]

    def figures(self) -> Figures:
        return Figures(self.name, asdict(self.accuracy), {one.name: one.ap for one in self.classes if one.objects})


@dataclass(frozen=True)
class _Evaluation(Excerpt):
    digest: str


@dataclass(frozen=True)
class _Report(Excerpt):
    """What is compared of a :class:`darktrt.check.report.Report`."""

    evaluation: _Evaluation
    variants: tuple[_Variant, ...]

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("it has no variants")


def diff_input(variant: EvaluatedVariant, digest: str) -> DiffInput:
    """A variant that was evaluated here, on images and labels of this digest."""
    accuracy = variant.metrics.accuracy
    numbers = {name: _known(getattr(accuracy, name)) for name in _NUMBERS}
    classes = {one.name: _known(one.ap) for one in variant.metrics.classes if one.objects}
    name = variant.detections.name
    return DiffInput(name, {name: Figures(name, numbers, classes)}, digest)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class ReportDiff:
    """Pairs of variants."""

    a: DiffInput
    b: DiffInput
    pairs: tuple[tuple[Figures, Figures], ...]

    def worst_drop(self) -> float:
        """The most AP that a variant of B has lost against A's.

        Raises:
            DarktrtError: there is a pair without AP.
        """
        drops = [_difference(a.numbers["ap"], b.numbers["ap"]) for a, b in self.pairs]
        known = [drop for drop in drops if drop is not None]
        if len(known) < len(drops):
            raise DarktrtError("a variant has no AP, for no object is labelled, so there is no drop to limit", "max_drop")
        return 0.0 - min(known)

    def to_table(self) -> str:
        """A table for each pair."""
        return "\n\n".join("\n".join(_part(*pair)) for pair in self.pairs) + "".join(self._unpaired())

    def _unpaired(self) -> list[str]:
        inputs = ((self.a, {a.name for a, _ in self.pairs}), (self.b, {b.name for _, b in self.pairs}))
        return [f"\n\nonly in {one.name}: {name}" for one, paired in inputs for name in one.variants if name not in paired]


def diff_reports(a: DiffInput, b: DiffInput) -> ReportDiff:
    """Pair the variants of two reports: those of one name, or the only ones.

    Raises:
        DarktrtError: they were measured on other images, or have no variant in common.
    """
    if a.digest != b.digest:
        raise DarktrtError(f"{a.name} and {b.name} were measured on different images or labels; make both from the same data")
    if len(a.variants) == len(b.variants) == 1:
        return ReportDiff(a, b, tuple(zip(a.variants.values(), b.variants.values(), strict=True)))
    pairs = tuple((a.variants[name], b.variants[name]) for name in a.variants if name in b.variants)
    if not pairs:
        names = [quote(", ".join(one.variants)) for one in (a, b)]
        example = f"{a.name}:{next(iter(a.variants))}"
        raise DarktrtError(f"{a.name} has the variants {names[0]}, {b.name} has {names[1]}; name one of each: {example}")
    return ReportDiff(a, b, pairs)


def _part(a: Figures, b: Figures) -> list[str]:
    title = a.name if a.name == b.name else f"{a.name} → {b.name}"
    lines = [title, f"{'':8}  {'A':>7}  {'B':>7}  {'change':>7}"]
    for name, label in zip(_NUMBERS, _TITLES, strict=True):
        lines.append(
            f"{label:8}  {_cell(a.numbers[name])}  {_cell(b.numbers[name])}  {_change(a.numbers[name], b.numbers[name])}"
        )
    changes = {name: _difference(ap, b.classes.get(name)) for name, ap in a.classes.items()}
    lost = sorted((change, name) for name, change in changes.items() if change is not None and change < 0)[:_CLASSES]
    if lost:
        lines.append("lose most: " + ", ".join(f"{name} {change:+.3f}" for change, name in lost))
    return lines


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a


def _cell(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.4f}"


def _change(a: float | None, b: float | None) -> str:
    change = _difference(a, b)
    return f"{'-':>7}" if change is None else f"{change:+7.4f}"
