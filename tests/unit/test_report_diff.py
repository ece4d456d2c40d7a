"""``check diff``: the drop from one report or model to the other, and the budget for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import made_detections

from darktrt.check.detections import save_detections
from darktrt.check.ground_truth import load_ground_truth
from darktrt.check.report_diff import DiffInput, Figures, diff_reports, read_report
from darktrt.cli import main
from darktrt.errors import DarktrtError

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def before(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with the variants ``exact``, which found the labels, and ``random``, which found hardly any."""
    folder = tmp_path_factory.mktemp("diff")
    save_detections([replace(made_detections(labelled), name="random")], folder / "found.json")
    model = ["--model", f"exact={labelled}/net.onnx", "--load-detections", str(folder / "found.json")]
    quick = ["--compare-images", "0", "--sensitivity-images", "0"]
    assert main(["check", "report", str(labelled / "photos"), *model, *quick, "-o", str(folder / "report")]) == 0
    return folder / "report"


def changed(before: Path, folder: Path, change: Change, name: str = "after") -> Path:
    """The report with its figures changed, in a folder of this name."""
    values = json.loads((before / "report.json").read_text())
    change(values)
    (folder / name).mkdir()
    (folder / name / "report.json").write_text(json.dumps(values))
    return folder / name


def lower(by: float, variant: int = 0) -> Change:
    def change(values: dict[str, Any]) -> None:
        one = values["variants"][variant]
        one["accuracy"]["ap"] -= by
        classes = [c for c in one["classes"] if c["objects"]]
        classes[0]["ap"] -= 2 * by

    return change


def test_a_drop_within_the_budget_passes(before: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = changed(before, folder, lower(0.01))
    assert main(["check", "diff", str(before), str(after), "--max-drop", "0.011"]) == 0
    out = capsys.readouterr().out
    assert "largest drop of AP 0.0100, within the 0.011 allowed" in out
    exact = json.loads((before / "report.json").read_text())["variants"][0]["accuracy"]["ap"]
    assert f"AP         {exact:.4f}   {exact - 0.01:.4f}  -0.0100" in out
    assert "lose most: " in out and "-0.020" in out
    assert main(["check", "diff", str(before), f"{after}/report.json"]) == 0


@pytest.mark.parametrize("variant", [0, 1])
def test_a_drop_beyond_the_budget_fails(before: Path, folder: Path, variant: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of any variant; a gain of another one does not compensate it."""

    def change(values: dict[str, Any]) -> None:
        lower(0.01, variant)(values)
        lower(-0.05, 1 - variant)(values)

    after = changed(before, folder, change)
    assert main(["check", "diff", str(before), str(after), "--max-drop", "0.009"]) == 1
    assert "largest drop of AP 0.0100, beyond the 0.009 allowed" in capsys.readouterr().out
    assert main(["check", "diff", str(before), str(after)]) == 0
    assert main(["check", "diff", str(after), str(before), "--max-drop", "0.06"]) == 0


def test_two_variants_of_one_report(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "diff", f"{before}:exact", f"{before}:random", "--max-drop", "0.1"]) == 1
    assert capsys.readouterr().out.startswith("exact → random\n")
    assert main(["check", "diff", f"{before}:random", f"{before}:exact", "--max-drop", "0"]) == 0


def test_variants_of_only_one_report_are_named(before: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = changed(before, folder, lambda values: values["variants"].pop())
    assert main(["check", "diff", str(before), str(after), "--max-drop", "0"]) == 0
    assert f"only in {before}: random" in capsys.readouterr().out


def test_models_are_measured(labelled: Path, before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the same images a model can be compared with a report too."""
    net, photos = str(labelled / "net.onnx"), str(labelled / "photos")
    assert main(["check", "diff", net, net, "--data", photos, "--max-drop", "0"]) == 0
    assert "largest drop of AP 0.0000" in capsys.readouterr().out
    assert main(["check", "diff", f"{before}:random", net, "--data", photos, "--max-drop", "0"]) == 0
    assert main(["check", "diff", net, f"{before}:random", "--data", photos, "--max-drop", "0.1"]) == 1


def test_the_classes_that_lose_most_are_listed() -> None:
    """The five worst of those that lose; one that the other report does not have is no loss."""
    before = dict.fromkeys("abcdefghij", 0.5)
    after = {**before, "a": 0.45, "b": 0.2, "c": 0.4, "d": 0.49, "e": 0.3, "f": 0.1, "g": 0.6, "h": None}
    del after["j"]
    first, second = (
        DiffInput(
            name,
            {"v": Figures("v", dict.fromkeys(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), 0.5), classes)},
            "digest",
        )
        for name, classes in (("A", before), ("B", after))
    )
    lines = diff_reports(first, second).to_table().splitlines()
    assert lines[-1] == "lose most: f -0.400, b -0.300, e -0.200, c -0.100, a -0.050"
    assert "lose most" not in diff_reports(first, replace(first, name="B")).to_table()


def test_the_digest_is_of_images_and_labels(labelled: Path) -> None:
    truth = load_ground_truth([str(labelled / "photos")], ("a", "b", "c"))
    other = replace(truth, images=truth.images[::-1])
    fewer = replace(truth, images=(*truth.images[:4], truth.images[4]._replace(objects=())))
    (labels, *rest) = (image.objects for image in truth.images)
    swapped = replace(truth, images=tuple(i._replace(objects=o) for i, o in zip(truth.images, (*rest, labels), strict=True)))
    assert truth.digest == other.digest
    assert len({truth.digest, fewer.digest, swapped.digest}) == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("variants", [], "it has no variants"),
        ("variants", [{}], "'name' is missing"),
        ("variants", {"name": "A"}, "'variants' is {'name': 'A'}"),
        ("evaluation", {"digest": 3}, "'digest' is 3"),
        ("format", "darktrt report 1", "its format is 'darktrt report 1', not 'darktrt report 2'"),
        ("accuracy", {"ap": "x"}, "'ap' is 'x'"),
        ("accuracy", {"ap75": 5.0}, "an AP is 5"),
        ("accuracy", {"ap_large": -0.5}, "an AP is -0.5"),
        ("classes", [{"name": "a", "objects": "many", "ap": 0.5}], "'objects' is 'many'"),
        ("classes", [{"name": ["a"], "objects": 1, "ap": 0.5}], "'name' is ['a']"),
    ],
)
def test_a_damaged_report_is_refused(before: Path, folder: Path, key: str, value: Any, message: str) -> None:
    def change(values: dict[str, Any]) -> None:
        first = values["variants"][0]
        if key == "accuracy":
            first["accuracy"] |= value
        else:
            (first if key in first else values)[key] = value

    with pytest.raises(DarktrtError, match=f"{re.escape(message)}.*; make it with 'darktrt check report'$"):
        read_report(str(changed(before, folder, change)))


BAD: dict[str, tuple[list[str], str]] = {
    "nothing there": (["{before}", "none"], "none: cannot read: No such file"),
    "no report": (["{before}", "{net}.json"], "net.onnx.json: is damaged ('evaluation' is missing)"),
    "no such variant": (["{before}:exakt", "{before}"], "has no variant 'exakt', only exact, random"),
    "nothing in common": (["{before}:exact", "{after}"], "has the variants exact, {after} has a, b; name one of each"),
    "other images": (["{before}", "{elsewhere}"], "were measured on different images or labels"),
    "a model without data": (["{net}", "{net}"], "net.onnx: is measured on images with labels; name them by --data"),
    "a budget above 1": (["{before}", "{before}", "--max-drop", "5"], "--max-drop 5: it must be 0 or more and below 1"),
    "a negative budget": (["{before}", "{before}", "--max-drop", "-1"], "--max-drop -1: it must be 0 or more"),
    "no AP": (["{unlabelled}", "{unlabelled}", "--max-drop", "0.1"], "a variant has no AP, for no object is labelled"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_reported_in_one_sentence(
    case: str, before: Path, labelled: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(values: dict[str, Any]) -> None:
        for one, name in zip(values["variants"], "ab", strict=True):
            one["name"] = name

    def move(values: dict[str, Any]) -> None:
        values["evaluation"]["digest"] = "other"

    def blank(values: dict[str, Any]) -> None:
        values["variants"][0]["accuracy"]["ap"] = None

    (folder / "net.onnx").symlink_to(labelled / "net.onnx")
    Path("net.onnx.json").write_text('{"format": "darktrt report 2", "variants": [1]}')
    names = {"before": before, "net": "net.onnx"}
    for name, change in (("after", rename), ("elsewhere", move), ("unlabelled", blank)):
        names[name] = changed(before, folder, change, name)
    arguments, message = BAD[case]
    assert main(["check", "diff", *(text.format(**names) for text in arguments)]) == 2
    assert message.format(**names) in capsys.readouterr().err


def figures(name: str, *numbers: float | None, **classes: float | None) -> Figures:
    return Figures(name, dict(zip(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), numbers, strict=True)), classes)


def test_the_table_of_a_pair() -> None:
    """Every number with its change; a dash where one of the two is not known."""
    a = DiffInput("A", {"exact": figures("exact", 0.5, 0.75, 0.25, None, 0.5, 0.25, cat=0.5, dog=0.5)}, "digest")
    b = DiffInput("B", {"int8": figures("int8", 0.4766, 0.76, 0.25, 0.5, None, 0.125, cat=0.5, dog=0.25)}, "digest")
    diff = diff_reports(a, b)
    assert diff.to_table().splitlines() == [
        "exact → int8",
        "                A        B   change",
        "AP         0.5000   0.4766  -0.0234",
        "AP50       0.7500   0.7600  +0.0100",
        "AP75       0.2500   0.2500  +0.0000",
        "small           -   0.5000        -",
        "medium     0.5000        -        -",
        "large      0.2500   0.1250  -0.1250",
        "lose most: dog -0.250",
    ]
    assert diff.worst_drop() == pytest.approx(0.0234)
    assert diff_reports(b, a).worst_drop() == pytest.approx(-0.0234)


def test_several_variants_are_paired_by_name() -> None:
    """What only one of the two has is named below; of several drops the largest counts."""
    first = DiffInput("A", {name: figures(name, *[0.5] * 6) for name in "abc"}, "digest")
    others = {name: figures(name, ap, *[0.5] * 5) for name, ap in (("b", 0.25), ("a", 0.625), ("x", 0.5))}
    diff = diff_reports(first, DiffInput("B", others, "digest"))
    assert [(one.name, other.name) for one, other in diff.pairs] == [("a", "a"), ("b", "b")]
    assert diff.worst_drop() == 0.25
    parts = diff.to_table().split("\n\n")
    assert [part.splitlines()[0] for part in parts] == ["a", "b", "only in A: c", "only in B: x"]
    one_of_two = diff_reports(replace(first, variants={"a": first.variants["a"]}), DiffInput("B", others, "digest"))
    assert [other.name for _, other in one_of_two.pairs] == ["a"]


def test_a_path_may_have_colons(before: Path, folder: Path) -> None:
    """What is there as it stands is no variant."""
    odd = folder / "a:exact"
    odd.mkdir()
    (odd / "report.json").write_text((before / "report.json").read_text())
    assert set(read_report("a:exact").variants) == {"exact", "random"}
    assert set(read_report("a:exact:random").variants) == {"random"}
    with pytest.raises(DarktrtError, match="a:other: cannot read: No such file"):
        read_report("a:other")


def test_an_ap_is_between_0_and_1(before: Path, folder: Path) -> None:
    """Both included; not known is null, and not zero."""

    def extreme(values: dict[str, Any]) -> None:
        values["variants"][0]["accuracy"] |= {"ap": 1.0, "ap50": 0.0, "ap_small": None}

    found = read_report(str(changed(before, folder, extreme))).variants["exact"]
    assert (found.numbers["ap"], found.numbers["ap50"], found.numbers["ap_small"]) == (1, 0, None)
    classes = json.loads((before / "report.json").read_text())["variants"][0]["classes"]
    assert set(found.classes) == {one["name"] for one in classes if one["objects"]}
