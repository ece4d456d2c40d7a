"""A report as files: ``index.html``, one page that needs nothing else, ``report.md`` for pull requests, and ``report.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darktrt.check import report_charts as charts
from darktrt.check.report import Report
from darktrt.check.report_diff import REPORT
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_writable

PAGE, MARKDOWN = "index.html", "report.md"
FILES = (PAGE, REPORT, MARKDOWN)

KEPT_AP, LITTLE_AP = 0.005, 0.02
"""Drops of AP up to the one are called none and shown green, up to the other amber; beyond, red."""

NOTHING = "\N{EN DASH}"
"""For a number that does not exist."""

_TEMPLATES = Path(__file__).parent / "templates"
_ABOUT = ("runs in", "on", "sha256", "not in INT8")
"""What may be known of a variant."""
_LAYERS, _CLASSES, _CONVOLUTIONS = 5, 8, 15
"""The worst ones that are named, or drawn."""


def check_folder(folder: str | Path) -> None:
    """See, before any work, that a report can be written into a folder, which need not exist yet.

    Raises:
        DarktrtError: it cannot.
    """
    path = Path(folder).absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise DarktrtError(f"{folder}: cannot make this folder in {there}; name another by --output")
    for name in FILES if there == path else ():
        check_writable(path / name)


def write_report(report: Report, folder: str | Path) -> None:
    """Write all files of a report, each whole or not at all, into a folder that is made where there is none.

    Raises:
        DarktrtError: one cannot be written.
    """
    values = page_values(report)
    texts = {PAGE: render("page.html", values), REPORT: report.to_json(), MARKDOWN: render("report.md", values)}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DarktrtError(f"{folder}: cannot make this folder ({error.strerror}); name another by --output") from error
    for name, text in texts.items():
        with atomic_output(Path(folder) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of this room with these values; in a page names and numbers are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(ap=_ap, signed=_signed, grade=_grade, small=_small, share=_share, cell=_cell)
    return environment.get_template(template).render(values)


def page_values(report: Report) -> dict[str, Any]:
    """What the templates speak of: the figures of ``report.json``, what is derived from them, images and charts."""
    values = report.to_dict()
    names = [one["name"] for one in values["variants"]]
    first = names.index(report.reference)
    order = [report.reference, *names[:first], *names[first + 1 :]]
    colours = {name: charts.COLOURS[i % len(charts.COLOURS)] for i, name in enumerate(order)}
    for one in values["variants"]:
        one["about"] = {**dict.fromkeys(_ABOUT, ""), **one["about"]}
    return {
        **values,
        "colours": colours,
        "verdicts": _verdicts(values["variants"], values["variants"][first]),
        "class_rows": _class_rows(values),
        "outputs": _outputs(values, report),
        "shown": report.shown,
        "charts": _charts(values, colours),
        "worst_classes": [row for row in _class_rows(values) if row["drop"] and row["drop"] > 0][:_CLASSES],
    }


def _verdicts(variants: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> list[str]:
    """Sentences about what becomes of the reference's AP; none where there is no AP."""
    name, ap = reference["name"], reference["accuracy"]["ap"]
    others = [one for one in variants if one["drop"] is not None]
    keep = [one for one in others if abs(one["drop"]) <= KEPT_AP]
    found = []
    if keep:
        most = max(abs(one["drop"]) for one in keep)
        verb = "keep" if len(keep) > 1 else "keeps"
        found.append(f"{_listed([one['name'] for one in keep])} {verb} the AP of {name}, {ap:.4f}, to within {most:.4f}.")
    for one in others:
        if one["drop"] < -KEPT_AP:
            found.append(f"{one['name']} has {-one['drop']:.4f} AP more than {name}.")
        elif one["drop"] > KEPT_AP:
            found.append(f"{one['name']} loses {one['drop']:.4f} AP, {one['drop'] / ap:.1%} of what {name} has.")
    return found


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _class_rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each class with labelled objects: its AP by variant, and the largest drop; those that lose most first."""
    variants = values["variants"]
    reference = next(i for i, one in enumerate(variants) if one["name"] == values["reference"])
    rows = []
    for classes in zip(*(one["classes"] for one in variants), strict=True):
        if classes[0]["objects"]:
            aps = [one["ap"] for one in classes]
            drops = [aps[reference] - ap for i, ap in enumerate(aps) if i != reference]
            rows.append({**classes[0], "aps": aps, "drop": max(drops, default=None)})
    return sorted(rows, key=lambda row: -(row["drop"] or 0))


def _outputs(values: Mapping[str, Any], report: Report) -> list[dict[str, Any]]:
    """Each comparison with its outputs (heads, boxes, scores) apart from its layers, of which the worst are named."""
    if not values["comparison"]:
        return []
    kinds = {layer.tensor: layer.kind for layer in reversed(report.info.layers)}
    heads = {head.tensor for head in report.info.heads} | {"boxes", "scores"}
    found = []
    for one in values["comparison"]["comparisons"]:
        layers = [{**row, "kind": kinds.get(row["tensor"], "")} for row in one["tensors"] if row["line"] is not None]
        worst = sorted(layers, key=lambda row: -(row["mean"] or 0))[:_LAYERS] if len(layers) > len(heads) else []
        found.append({**one, "outputs": [row for row in one["tensors"] if row["tensor"] in heads], "worst": worst})
    return found


def _charts(values: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    """The charts; empty where there are no figures for one."""
    from markupsafe import Markup

    found: dict[str, Any] = {"curves": [], "layers": "", "sensitivity": "", "histograms": []}
    curves = {one["name"]: one["curves"] for one in values["variants"]}
    if all(curves.values()):
        found["curves"] = [Markup(charts.precision_recall(curves, colours, overlap)) for overlap in ("0.50", "0.75")]
    comparison = values["comparison"]
    if comparison and any(row["line"] is not None for one in comparison["comparisons"] for row in one["tensors"]):
        found["layers"] = Markup(charts.layer_errors(comparison["comparisons"], colours))
    if values["sensitivity"]:
        layers = values["sensitivity"]["layers"][:_CONVOLUTIONS]
        found["sensitivity"] = Markup(charts.sensitivity_bars(layers, values["kept"]))
    if values["calibration"]:
        found["histograms"] = [Markup(charts.histogram(one)) for one in values["calibration"]["tensors"]]
    return found


# --- how numbers are written ---


def _ap(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _signed(drop: float | None) -> str:
    """A drop as the change that it is, with a real minus sign."""
    if drop is None:
        return NOTHING
    change = round(-drop, 4) + 0.0
    return f"{change:+.4f}".replace("-", "\N{MINUS SIGN}") if change else "±0"


def _grade(drop: float | None) -> str:
    """How bad a drop is: the name of a colour."""
    if drop is None:
        return "none"
    return "good" if drop <= KEPT_AP else "fair" if drop <= LITTLE_AP else "poor"


def _small(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2g}"


def _share(value: float) -> str:
    """A percentage of two digits, however small."""
    return f"{100 * value:.2g}%"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
