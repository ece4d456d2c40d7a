"""The differences in average precision between two reports, or two models: for people, and for CI with a budget."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darktrt.check.evaluation import EvaluatedVariant
from darktrt.check.report import FORMAT
from darktrt.errors import DarktrtError

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
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
        variants = {one["name"]: _figures(one) for one in values["variants"]}
        digest = str(values["evaluation"]["digest"])
    except OSError as error:
        raise DarktrtError(f"{file}: cannot read: {error.strerror}; make it with 'darktrt check report'") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DarktrtError(f"{file}: is no report of 'darktrt check report' or a damaged one; make it again") from error
    if variant and variant not in variants:
        raise DarktrtError(f"{file}: has no variant '{variant}', only {', '.join(variants)}")
    return DiffInput(text, {variant: variants[variant]} if variant else variants, digest)


def _split(text: str) -> tuple[Path, str]:
    """Path and variant of ``PATH[:VARIANT]``; the path may have colons too."""
    if os.path.exists(text):
        return Path(text), ""
    path, _, variant = text.rpartition(":")
    return (Path(path), variant) if path and os.path.exists(path) else (Path(text), "")


def _figures(values: Mapping[str, Any]) -> Figures:
    numbers = {name: values["accuracy"][name] for name in _NUMBERS}
    return Figures(str(values["name"]), numbers, {one["name"]: one["ap"] for one in values["classes"] if one["objects"]})


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
        raise DarktrtError(
            f"{a.name} has the variants {', '.join(a.variants)}, {b.name} has {', '.join(b.variants)}; name one of each: "
            f"{a.name}:{next(iter(a.variants))}"
        )
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
