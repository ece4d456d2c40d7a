"""A report as files: ``index.html``, one self-contained page, ``report.md`` for pull requests, and ``report.json``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from darktrt.check import report_charts as charts
from darktrt.check.report import Report
from darktrt.check.report_diff import REPORT
from darktrt.errors import DarktrtError, quote
from darktrt.files import atomic_output, check_writable, make_folder

PAGE, MARKDOWN = "index.html", "report.md"
FILES = (PAGE, REPORT, MARKDOWN)

NO_DROP, SMALL_DROP = 0.005, 0.02
"""Largest drops of AP that count as none, shown green, and as small, shown amber; larger ones are red."""

NOTHING = "\N{EN DASH}"
"""Printed for a number that does not exist."""

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = 1000
"""The most characters of a name or sentence in Markdown."""
_ABOUT = ("runs in", "on", "sha256", "not in INT8")
"""Keys of :attr:`darktrt.check.runs.Variant.about`."""
_LAYERS, _CLASSES, _CONVOLUTIONS = 5, 8, 15
"""Numbers of the worst ones that are named or drawn."""


def check_folder(folder: str | Path) -> None:
    """See, before any work, that a report can be written into a folder, which is made where it does not exist.

    Raises:
        DarktrtError: it cannot.
    """
    path = Path(folder).absolute()
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DarktrtError(f"{folder}: cannot make this folder: {error.strerror}; choose another", "output") from error
    existing = next(one for one in (path, *path.parents) if os.path.exists(one))
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise DarktrtError(f"{folder}: cannot make this folder in {existing}; choose another output", "output")
    for name in FILES if existing == path else ():
        check_writable(path / name)


def write_report(report: Report, folder: str | Path) -> None:
    """Write all files of a report, or none, into a folder, which is made where it does not exist.

    Raises:
        DarktrtError: one cannot be written.
    """
    values = page_values(report)
    texts = {PAGE: render("page.html", values), REPORT: report.to_json(), MARKDOWN: render("report.md", values)}
    make_folder(folder)
    with ExitStack() as outputs:  # all are written before the first is renamed
        for name, text in texts.items():
            temporary = outputs.enter_context(atomic_output(Path(folder) / name))
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no UTF-8


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of this room with these values; HTML is escaped, Markdown where the filters ``text`` and ``code`` stand."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(ap=_ap, signed=_signed, grade=_grade, small=_small, share=_share, text=_text, code=_code)
    return environment.get_template(template).render(values)


def page_values(report: Report) -> dict[str, Any]:
    """The values of the templates: the figures of ``report.json``, others derived from them, images and charts."""
    values = report.to_dict()
    names = [one["name"] for one in values["variants"]]
    first = names.index(report.reference)
    order = [report.reference, *names[:first], *names[first + 1 :]]
    colours = {name: charts.COLOURS[i % len(charts.COLOURS)] for i, name in enumerate(order)}
    for variant in values["variants"]:
        variant["about"] = {**dict.fromkeys(_ABOUT, ""), **variant["about"]}
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
    """Sentences about the variants' AP against the reference's; none where there is no AP."""
    name, ap = reference["name"], reference["accuracy"]["ap"]
    others = [one for one in variants if one["drop"] is not None]
    equal = [one for one in others if abs(one["drop"]) <= NO_DROP]
    sentences = []
    if equal:
        most = max(abs(one["drop"]) for one in equal)
        verb = "keep" if len(equal) > 1 else "keeps"
        sentences.append(f"{_listed([one['name'] for one in equal])} {verb} the AP of {name}, {ap:.4f}, to within {most:.4f}.")
    for variant in others:
        drop = variant["drop"]
        if drop < -NO_DROP:
            sentences.append(f"{variant['name']} has {-drop:.4f} more AP than {name}.")
        elif drop > NO_DROP:
            sentences.append(f"{variant['name']} loses {drop:.4f} AP, {drop / ap:.1%} of that of {name}.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _class_rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each class with labelled objects: its AP by variant, and the largest drop; largest drops first."""
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
    """Each variant's agreement, with its outputs (heads, boxes, scores) and its worst layers apart."""
    if not values["agreement"]:
        return []
    kinds = {layer.tensor: layer.kind for layer in reversed(report.info.layers)}
    heads = {head.tensor for head in report.info.heads} | {"boxes", "scores"}
    outputs = []
    for variant in values["agreement"]["variants"]:
        layers = [{**row, "kind": kinds.get(row["tensor"], "")} for row in variant["tensors"] if row["line"] is not None]
        worst = sorted(layers, key=lambda row: -(row["mean"] or 0))[:_LAYERS] if len(layers) > len(heads) else []
        outputs.append({**variant, "outputs": [row for row in variant["tensors"] if row["tensor"] in heads], "worst": worst})
    return outputs


def _charts(values: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    """The charts; empty where there are no figures for them."""
    from markupsafe import Markup

    drawn: dict[str, Any] = {"curves": [], "layers": "", "sensitivity": "", "histograms": []}
    curves = {one["name"]: one["curves"] for one in values["variants"]}
    if all(curves.values()):
        drawn["curves"] = [Markup(charts.precision_recall(curves, colours, overlap)) for overlap in ("0.50", "0.75")]
    compared = values["agreement"]["variants"] if values["agreement"] else []
    if any(row["line"] is not None for variant in compared for row in variant["tensors"]):
        drawn["layers"] = Markup(charts.layer_errors(compared, colours))
    if values["sensitivity"]:
        layers = values["sensitivity"]["layers"][:_CONVOLUTIONS]
        drawn["sensitivity"] = Markup(charts.sensitivity_bars(layers, values["fp_layers"]))
    if values["calibration"]:
        drawn["histograms"] = [Markup(charts.histogram(one)) for one in values["calibration"]["tensors"]]
    return drawn


# --- how numbers are printed ---


def _ap(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _signed(drop: float | None) -> str:
    """A drop as a change, with a minus sign."""
    if drop is None:
        return NOTHING
    change = round(-drop, 4) + 0.0
    return f"{change:+.4f}".replace("-", "\N{MINUS SIGN}") if change else "±0"


def _grade(drop: float | None) -> str:
    """The style of a drop."""
    if drop is None:
        return "none"
    return "good" if drop <= NO_DROP else "fair" if drop <= SMALL_DROP else "poor"


def _small(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2g}"


def _share(value: float) -> str:
    """A percentage of two digits, however small."""
    return f"{100 * value:.2g}%"


# --- how names are printed in Markdown ---

_MARKS = str.maketrans({**{mark: f"\\{mark}" for mark in "\\`*[]|~"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"})


def _text(name: str) -> str:
    """A name that is neither HTML nor a link, and fits into a cell of a table."""
    return quote(name, _NAME).translate(_MARKS)


def _code(name: str) -> str:
    """A name as code, between more backticks than it has itself."""
    shown = quote(name, _NAME)
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    room = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{room}{shown}{room}{fence}"
