"""The words of a report: verdicts, signs and grades of numbers, what comes first, and its protocol and notes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Made

from darktrt.check import report_page
from darktrt.check.agreement import Agreement, VariantAgreement
from darktrt.check.coco import Accuracy, ClassAccuracy, CocoMetrics
from darktrt.check.detections import VariantDetections
from darktrt.check.evaluation import EvaluatedVariant, Evaluation
from darktrt.check.ground_truth import GroundTruth, LabelledImage, LabelledObject
from darktrt.check.report import FORMAT, Latency, Parts, Report, make_report
from darktrt.check.report_page import NOTHING, check_folder, page_values, render
from darktrt.check.sensitivity import LayerCost, Sensitivity
from darktrt.check.simulate import Change, Convolution
from darktrt.check.tolerance import TensorError, tolerance_of
from darktrt.errors import DarktrtError
from darktrt.metadata import IMAGE_SIZES, Thresholds
from darktrt.vision.boxes import Detections


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A value as the pages print it, through a filter."""
    monkeypatch.setattr(report_page, "_TEMPLATES", tmp_path)

    def show(value: object, by: str) -> str:
        (tmp_path / "a.md").write_text("{{ value | " + by + " }}")
        return render("a.md", {"value": value})

    return show


@pytest.mark.parametrize(
    ("by", "texts"),
    [
        ("ap", {0.51236: "0.5124", 0.0: "0.0000", None: NOTHING}),
        (
            "signed",
            {0.01234: "\N{MINUS SIGN}0.0123", -0.01234: "+0.0123", 0.00004: "±0", -0.00004: "±0", 0.0: "±0", None: NOTHING},
        ),
        ("grade", {-0.5: "good", 0.005: "good", 0.0051: "fair", 0.02: "fair", 0.0201: "poor", None: "none"}),
        ("small", {0.012345: "0.012", 1.0: "1", None: NOTHING}),
        ("share", {0.012345: "1.2%", 0.00001: "0.001%", 1.0: "1e+02%", 0.0: "0%"}),
    ],
)
def test_numbers_are_printed_for_people(shown: Any, by: str, texts: dict[float | None, str]) -> None:
    assert NOTHING == "\N{EN DASH}"
    assert {value: shown(value, by) for value in texts} == texts


def test_code_is_between_backticks_that_it_does_not_have(shown: Any) -> None:
    texts = {"a": "`a`", "a`b": "``a`b``", "`a": "`` `a ``", "a`": "`` a` ``", "a``b`c": "```a``b`c```"}
    assert {text: shown(text, "code") for text in texts} == texts


@pytest.mark.parametrize(("length", "shown_as"), [(1000, 1000), (1001, 1000), (5000, 1000)])
def test_the_longest_name_has_a_thousand_characters(shown: Any, length: int, shown_as: int) -> None:
    assert len(shown("x" * length, "text")) == shown_as and len(shown("x" * length, "code")) == shown_as + 2
    assert shown("x" * length, "text").endswith("...") == (length > 1000)


# --- reports of made figures ---


def metrics(ap: float, *classes: float) -> CocoMetrics:
    """The accuracy ``ap`` and classes of these APs; NaN for one that is not labelled."""
    rows = tuple(ClassAccuracy(f"class {i}", 0 if math.isnan(c) else 10 + i, c, c) for i, c in enumerate(classes))
    curves = {} if math.isnan(ap) else dict.fromkeys(("0.50", "0.75"), (1.0, ap))
    return CocoMetrics(Accuracy(ap, ap, ap, ap, ap, ap), rows, curves)


def found(made: Made, *scores: float) -> Detections:
    boxes = np.array([[20 * i, 0, 20 * i + 9, 9] for i in range(len(scores))], np.float32).reshape(-1, 4)
    ids = np.zeros(len(scores), np.int32)
    return Detections(boxes, np.array(scores, np.float32), ids, made.info.class_names)


@pytest.fixture
def truth(made: Made, tmp_path: Path) -> GroundTruth:
    """Two images of one object each; the files are no images, for none is drawn."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text(name)
    labels = (LabelledObject(0, (0, 0, 9, 9), 81, False),)
    images = tuple(LabelledImage(tmp_path / name, None, labels) for name in ("a.png", "b.png"))
    return GroundTruth("photos", made.info.class_names, images, ("a note on labels",))


def report_of(
    made: Made,
    truth: GroundTruth,
    variants: Mapping[str, CocoMetrics],
    precision: Mapping[str, str] | None = None,
    scores: Mapping[str, tuple[float, ...]] | None = None,
    about: Mapping[str, Mapping[str, str]] | None = None,
    **parts: Any,
) -> Report:
    """Of variants by name, each with its metrics, and with detections of these scores in both images."""
    evaluated = []
    for name, measured in variants.items():
        detections = dict.fromkeys(truth.digests, found(made, *(scores or {}).get(name, (0.9,))))
        kind = (precision or {}).get(name, "fp16")
        one = VariantDetections(name, made.info, kind, Thresholds(0.001, 0.45), detections, (about or {}).get(name, {}))
        evaluated.append(EvaluatedVariant(one, measured))
    evaluation = Evaluation(truth.name, len(truth.images), truth.count, tuple(evaluated))
    return make_report(Parts(truth, evaluation, **parts), 0)


def verdicts(made: Made, truth: GroundTruth, **aps: float) -> list[str]:
    report = report_of(made, truth, {name: metrics(ap) for name, ap in aps.items()}, {"R": "fp32"})
    return list(page_values(report)["verdicts"])


def test_a_verdict_on_every_variant(made: Made, truth: GroundTruth) -> None:
    """Differences up to half a point of AP, gains too, count as none."""
    assert verdicts(made, truth, R=0.5, A=0.4951) == ["A keeps the AP of R, 0.5000, to within 0.0049."]
    assert verdicts(made, truth, R=0.5, A=0.4951, B=0.502, C=0.5) == ["A, B and C keep the AP of R, 0.5000, to within 0.0049."]
    assert verdicts(made, truth, A=0.49, R=0.5) == ["A loses 0.0100 AP, 2.0% of that of R."]
    assert verdicts(made, truth, A=0.5062, R=0.5) == ["A has 0.0062 more AP than R."]
    assert verdicts(made, truth, R=0.5, A=0.501, B=0.4, C=0.6) == [
        "A keeps the AP of R, 0.5000, to within 0.0010.",
        "B loses 0.1000 AP, 20.0% of that of R.",
        "C has 0.1000 more AP than R.",
    ]
    assert verdicts(made, truth, R=0.5) == [] and verdicts(made, truth, R=math.nan, A=math.nan) == []


def test_the_reference_is_the_first_in_fp32_or_else_the_first(made: Made, truth: GroundTruth) -> None:
    variants = {name: metrics(0.5) for name in "ABC"}
    for precision, reference in (({"B": "fp32", "C": "fp32"}, "B"), ({"C": "fp32"}, "C"), ({}, "A"), ({"A": "tf32"}, "A")):
        report = report_of(made, truth, variants, precision)
        assert report.reference == reference
        assert [one.drop for one in report.variants] == [None if name == reference else 0 for name in "ABC"]
        colours = page_values(report)["colours"]
        assert colours[reference] == "#3b3f46"  # the first of all colours
        others = [name for name in "ABC" if name != reference]
        assert [colours[name] for name in others] == ["#2f6fb3", "#d1622b"]


def test_of_more_variants_than_colours_the_first_colours_serve_again(made: Made, truth: GroundTruth) -> None:
    colours = page_values(report_of(made, truth, {f"v{i}": metrics(0.5) for i in range(10)}))["colours"]
    assert len(set(colours.values())) == 8
    assert (colours["v8"], colours["v9"]) == (colours["v0"], colours["v1"])


def test_classes_with_the_largest_drop_come_first(made: Made, truth: GroundTruth) -> None:
    """The largest of all variants; a class without labels is left out; at most eight are named among those that lose."""
    none = math.nan
    variants = {
        "A": metrics(0.5, 0.5, 0.25, none, 0.5),
        "R": metrics(0.5, 0.5, 0.5, none, 0.5),
        "B": metrics(0.5, 0.375, 0.5, none, 0.75),
    }
    values = page_values(report_of(made, truth, variants, {"R": "fp32"}))
    assert [(row["name"], row["objects"], row["aps"], row["drop"]) for row in values["class_rows"]] == [
        ("class 1", 11, [0.25, 0.5, 0.5], 0.25),
        ("class 0", 10, [0.5, 0.5, 0.375], 0.125),
        ("class 3", 13, [0.5, 0.5, 0.75], 0),
    ]
    assert [row["name"] for row in values["worst_classes"]] == ["class 1", "class 0"]
    many = {"R": metrics(0.5, *[0.5] * 10), "B": metrics(0.5, *(0.4 - 0.01 * i for i in range(10)))}
    worst = page_values(report_of(made, truth, many, {"R": "fp32"}))["worst_classes"]
    assert [row["name"] for row in worst] == [f"class {i}" for i in range(9, 1, -1)]
    alone = page_values(report_of(made, truth, {"R": metrics(0.5, 0.5)}))
    assert alone["class_rows"][0]["drop"] is None and alone["worst_classes"] == []


def test_what_a_report_was_made_by(made: Made, truth: GroundTruth) -> None:
    protocol = report_of(made, truth, {"A": metrics(0.5)}).protocol
    assert protocol["INT8 calibrated on"].startswith("nothing: ")
    assert protocol == {
        "images": "2, with 2 labelled objects, of photos",
        "resize": "stretched to the network's input, 96 x 64, by darknet's bilinear filter",
        "score threshold": "0.001 for AP; 0.25 where detections are counted, compared and shown",
        "NMS": "greedynms, IoU 0.45, for each class",
        "detections": "the best 100 of an image, as COCO counts; a network that ends in NMS outputs at most as many",
        "AP": "COCO's, by pycocotools: mean over IoU .50:.05:.95 and over the classes that are labelled",
        "INT8 calibrated on": protocol["INT8 calibrated on"],
    }
    other = replace(made, info=replace(made.info, resize="letterbox", head="nms", max_detections=300))
    protocol = report_of(other, truth, {"A": metrics(0.5)}).protocol
    assert protocol["resize"] == "letterboxed into the network's input, 96 x 64, by darknet's bilinear filter"
    assert protocol["detections"].endswith("a network that ends in NMS outputs at most 300")


@pytest.mark.parametrize(("count", "few"), [(2, True), (499, True), (500, False)])
def test_chance_is_noted_below_500_images(made: Made, truth: GroundTruth, count: int, few: bool) -> None:
    many = replace(truth, images=(truth.images * 250)[:count])
    report = report_of(made, many, {"A": metrics(0.5)})
    note = f"{count} images are few: differences of AP of some thousandths may be chance."
    assert list(report.notes) == ["a note on labels", *[note] * few]


def test_notes_on_labels_and_detections_that_are_missing(made: Made, truth: GroundTruth) -> None:
    unlabelled = replace(truth, notes=(), images=tuple(image._replace(objects=()) for image in truth.images))
    report = report_of(made, unlabelled, {"A": metrics(0.5), "B": metrics(0.5)}, scores={"B": (0.25, 0.1)})
    assert list(report.notes) == [
        "No object is labelled, so there is no AP; the report only compares the variants with each other.",
        "B has no detection above a score of 0.25 in any image.",
    ]
    assert [one.detections for one in report.variants] == [2, 0]


def test_inputs_of_two_kinds_are_noted(made: Made, truth: GroundTruth) -> None:
    """Bytes, and pixels that are not rounded, as those of float inputs and of images of any size."""
    detections, sizes = dict.fromkeys(truth.digests, found(made, 0.9)), {"image": IMAGE_SIZES}
    for forms, noted in ((("uint8", "uint8"), False), (("float", "image"), False), (("uint8", "image"), True)):
        infos = [replace(made.info, input=form, image_sizes=sizes.get(form)) for form in forms]  # type: ignore[arg-type]
        variants = tuple(
            EvaluatedVariant(VariantDetections(f"v{i}", info, "fp16", Thresholds(), detections), metrics(0.5))
            for i, info in enumerate(infos)
        )
        notes = make_report(Parts(truth, Evaluation("photos", 2, 2, variants)), 0).notes
        assert any("are rounded to bytes" in note for note in notes) == noted


def test_latencies_belong_to_the_plan_or_else_to_the_name(made: Made, truth: GroundTruth) -> None:
    times = {name: Latency(ms, 1, True, 1000, "L4") for name, ms in (("ab", 1.0), ("A", 2.0), ("b", 3.0))}
    variants = {name: metrics(0.5) for name in ("A", "plans/b.plan", "C")}
    report = report_of(made, truth, variants, about={"A": {"sha256": "ab"}}, timings=times)
    assert [one.latency and one.latency.milliseconds for one in report.variants] == [1.0, 3.0, None]
    report = report_of(made, truth, {"A": metrics(0.5)}, timings=times)
    assert report.variants[0].latency == times["A"]


def test_figures_are_a_file_for_people_too(made: Made, truth: GroundTruth) -> None:
    """Numbers that do not exist are null."""
    text = report_of(made, truth, {"A": metrics(math.nan)}).to_json()
    assert text.startswith(f'{{\n "format": "{FORMAT}",\n') and text.endswith("\n}\n") and "NaN" not in text


# --- where errors come from ---


def compared(made: Made, errors: Mapping[str, float], layers: bool = True) -> Agreement:
    """Of one variant, by tensor the mean error."""
    tensors = {name: TensorError(4 * mean, mean, 1.0) for name, mean in errors.items()}
    variant = VariantAgreement("A", "fp16", tolerance_of(("fp16", "fp32")), tensors, None)
    return Agreement("R", "fp32", made.info, 3, (variant,), layers)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The charts that a page asks for, each with its first argument, in place of drawing them."""
    asked: dict[str, list[Any]] = {}
    for name in ("precision_recall", "layer_errors", "sensitivity_bars", "histogram"):

        def chart(figures: Any, *more: Any, name: str = name) -> str:
            asked.setdefault(name, []).append((figures, *more))
            return f"<svg>{name}</svg>"

        monkeypatch.setattr(report_page.charts, name, chart)
    return asked


def test_the_five_worst_layers_are_named(made: Made, truth: GroundTruth, drawn: dict[str, list[Any]]) -> None:
    """Apart from the heads and what follows them, each with its line and kind."""
    layers = list(dict.fromkeys(layer.tensor for layer in made.info.layers))
    errors = {name: 0.5 / (i + 2) for i, name in enumerate(layers)} | {"boxes": 9.0, "scores": 0.0}
    report = report_of(made, truth, {"R": metrics(0.5), "A": metrics(0.5)}, {"R": "fp32"}, agreement=compared(made, errors))
    (outputs,) = page_values(report)["outputs"]
    assert [row["tensor"] for row in outputs["worst"]] == layers[:5]
    first = made.info.layers[0]
    assert (outputs["worst"][0]["line"], outputs["worst"][0]["kind"]) == (first.line, first.kind)
    assert {row["tensor"] for row in outputs["outputs"]} == {"head0_raw", "head1_raw", "boxes", "scores"}
    assert len(drawn["layer_errors"]) == 1


def test_of_heads_alone_none_is_the_worst_layer(made: Made, truth: GroundTruth, drawn: dict[str, list[Any]]) -> None:
    heads = {head.tensor: 0.5 for head in made.info.heads}
    report = report_of(made, truth, {"R": metrics(0.5)}, agreement=compared(made, heads, layers=False))
    (outputs,) = page_values(report)["outputs"]
    assert outputs["worst"] == [] and len(outputs["outputs"]) == 2
    nothing = report_of(made, truth, {"R": metrics(0.5)})
    assert page_values(nothing)["outputs"] == []
    boxes = report_of(made, truth, {"R": metrics(0.5)}, agreement=compared(made, {"boxes": 0.5}))
    drawn.clear()
    assert page_values(boxes)["charts"]["layers"] == "" and "layer_errors" not in drawn


def test_curves_need_labels(made: Made, truth: GroundTruth, drawn: dict[str, list[Any]]) -> None:
    """At the IoUs .50 and .75; none where a variant has none."""
    charts = page_values(report_of(made, truth, {"R": metrics(0.5), "A": metrics(0.25)}))["charts"]
    assert [asked[2] for asked in drawn["precision_recall"]] == ["0.50", "0.75"]
    assert set(drawn["precision_recall"][0][0]) == {"R", "A"} and len(charts["curves"]) == 2
    assert page_values(report_of(made, truth, {"R": metrics(0.5), "A": metrics(math.nan)}))["charts"]["curves"] == []


def test_the_fifteen_most_costly_convolutions_are_drawn(made: Made, truth: GroundTruth, drawn: dict[str, list[Any]]) -> None:
    costs = [LayerCost(Convolution(f"c{i}", i, 10 * i), Change(i / 64, 0.1), False) for i in range(20)]
    plain = report_of(made, truth, {"R": metrics(0.5)})
    report = replace(plain, sensitivity=Sensitivity("made", 3, tuple(costs), Change(0.5, 0.25)), fp_layers=("c0", "c1"))
    assert "sensitivity_bars" in page_values(report)["charts"]["sensitivity"]
    ((layers, fp_layers),) = drawn["sensitivity_bars"]
    assert [one["node"] for one in layers] == [f"c{i}" for i in range(19, 4, -1)] and list(fp_layers) == ["c0", "c1"]
    charts = page_values(plain)["charts"]
    assert (charts["sensitivity"], charts["histograms"]) == ("", []) and len(drawn["sensitivity_bars"]) == 1


# --- the folder ---


def test_a_folder_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    for folder in ("there", "new", "new/deep/er", "."):
        check_folder(folder)
    assert not Path("new").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, above it, or a folder in place of a file; before any work."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("report/index.html").mkdir(parents=True)
    for folder, said in (
        ("file", f"file: cannot make this folder in {tmp_path}/file; choose another output"),
        ("file/below", "file/below: cannot make this folder: Not a directory; choose another"),
        ("report", f"{tmp_path}/report/index.html: is a folder; name a file to write"),
    ):
        with pytest.raises(DarktrtError) as caught:
            check_folder(folder)
        assert str(caught.value).startswith(said)
