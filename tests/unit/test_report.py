"""``check report``: figures are those of pycocotools, errors are located, and unusual labels are noted."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Made, files_in, made_detections, made_image, timing
from PIL import Image

from darktrt.calib.file import CalibratedNetwork, CalibrationFile, write_calibration
from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.calib.options import CalibrationSettings
from darktrt.calib.table import CalibrationTable
from darktrt.calib.threshold import expected_error
from darktrt.check import report_page
from darktrt.check.coco import coco_metrics
from darktrt.check.detections import VariantDetections, save_detections
from darktrt.check.disagreements import disagreement, labels_of, panels
from darktrt.check.evaluation import evaluate_detections
from darktrt.check.ground_truth import LabelledImage, LabelledObject, load_ground_truth
from darktrt.check.report import Parts, calibration_sources, make_report, read_timings
from darktrt.check.report_page import FILES, page_values, render, write_report
from darktrt.check.simulate import chosen_fp_layers, load_network
from darktrt.cli import main
from darktrt.errors import DarktrtError
from darktrt.pipeline import load_calibration
from darktrt.vision.boxes import Detections

QUICK = ["--compare-images", "0", "--sensitivity-images", "0"]


def figures(folder: Path | str = "report") -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(folder, "report.json").read_text())
    return values


def variant(values: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in values["variants"] if one["name"] == name)
    return found


# --- the figures ---


def test_all_files_have_the_same_figures(report: Path) -> None:
    values = figures(report)
    page, text = (report / "index.html").read_text(), (report / "report.md").read_text()
    assert files_in(report) == ["index.html", "report.json", "report.md"]
    assert [one["name"] for one in values["variants"]] == ["PyTorch", "ONNX", "ONNX as FP16", "ONNX as INT8", "INT8 engine"]
    for one in values["variants"]:
        for number in one["accuracy"].values():
            shown = "\N{EN DASH}" if number is None else f"{number:.4f}"
            assert f">{shown}<" in page and f"| {shown} |" in text
        assert one["name"] in page and f"| {one['name']} |" in text
    assert values["evaluation"]["images"] == 5 and values["evaluation"]["objects"] == 30
    assert "5 images" in page and "5 images" in text


def test_figures_are_those_of_pycocotools(report: Path, labelled: Path) -> None:
    values = figures(report)
    found = made_detections(labelled)
    truth = load_ground_truth([str(labelled / "photos")], found.info.class_names)
    expected = coco_metrics(found.in_order(truth.digests), truth).accuracy
    engine, reference = variant(values, "INT8 engine"), variant(values, "PyTorch")
    assert engine["accuracy"]["ap"] == expected.ap and engine["accuracy"]["ap50"] == expected.ap50
    assert engine["drop"] == reference["accuracy"]["ap"] - expected.ap > 0.1
    assert reference["drop"] is None and values["reference"] == "PyTorch"
    assert engine["detections"] == sum(int((one.scores > 0.25).sum()) for one in found.images.values())
    assert len(engine["curves"]["0.50"]) == 101
    assert sum(one["objects"] for one in engine["classes"]) == 30


def test_the_engine_has_its_details(report: Path) -> None:
    one = variant(figures(report), "INT8 engine")
    assert one["about"]["on"] == "NVIDIA H200" and one["precision"] == "int8"
    assert one["latency"] == {
        "milliseconds": 0.25, "batch": 1, "cuda_graph": True, "images_per_second": 4000, "gpu": "NVIDIA H200",
    }  # fmt: skip
    page = (report / "index.html").read_text()
    assert "0.250 ms" in page and "NVIDIA H200" in page and "TensorRT 8.6.0" in page


def test_the_error_is_traced_to_layers_and_convolutions(report: Path, labelled: Path, made: Made) -> None:
    values = figures(report)
    fp16, int8 = (
        next(one for one in values["agreement"]["variants"] if one["name"] == f"ONNX as {precision}")
        for precision in ("FP16", "INT8")
    )
    lines = {layer.line for layer in made.info.layers}
    for one in (fp16, int8):
        assert len({row["line"] for row in one["tensors"]}) > 10
        assert {row["line"] for row in one["tensors"]} <= lines
    error = {name: max(row["mean"] for row in one["tensors"]) for name, one in (("fp16", fp16), ("int8", int8))}
    assert 1e-5 < error["fp16"] < 0.01 < error["int8"]
    page = (report / "index.html").read_text()
    worst = max(int8["tensors"], key=lambda row: row["mean"])
    assert f"cfg line {worst['line']} [" in page and f">line {worst['line']}<" in page.replace("\n", "")
    costs = [one["scores"] for one in values["sensitivity"]["layers"]]
    assert costs == sorted(costs, reverse=True) and costs[0] > 0
    assert values["fp_layers"] == list(load_calibration(labelled / "my.calib").fp_layers or ())
    assert set(chosen_fp_layers(load_network(labelled / "net.onnx"))) <= set(values["fp_layers"])
    assert all(f"<code>{name}</code>" in page for name in values["fp_layers"])


def test_the_page_is_self_contained(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)|@import|<link(?! rel=\"icon\" href=\"data:,\")", page)
    assert page.count('src="data:image/jpeg;base64,') == 3 * 3
    assert page.count("<svg ") == 2 + 1 + 1 + len(figures(report)["calibration"]["tensors"])
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_names_cannot_break_the_page(labelled: Path, folder: Path) -> None:
    save_detections([made_detections(labelled, name="<script>alert(1)</script>|x", precision="fp32")], "odd.json")
    assert main(["check", "report", str(labelled / "photos"), "--load-detections", "odd.json", "-o", "report", *QUICK]) == 0
    page = Path("report/index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;|x" in page
    assert "\n| &lt;script&gt;alert(1)&lt;/script&gt;\\|x |" in Path("report/report.md").read_text()


NAMES = [
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "a | b",
    "a\nb",
    "\x1b[31mred",
    "`code`",
    r"\<b>",
    "x" * 5000,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_in_markdown(name: str) -> None:
    """Neither as text nor as code does a name become a tag, a link or another line, and backticks of its own do not end it."""
    text, code = (render_text("{{ name | " + kind + " }}", name) for kind in ("text", "code"))
    for shown in (text, code):
        assert "\n" not in shown and "\x1b" not in shown and len(shown) < 1100
    assert not re.search(r"<|(?<!\\)[\[|`]", text)
    fence = re.match("`+", code)[0]  # type: ignore[index]
    assert code.endswith(fence) and fence not in code[len(fence) : -len(fence)].strip("` ")


def render_text(template: str, name: str) -> str:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "_TEMPLATES", folder)
        Path(folder, "a.md").write_text(template)
        return render("a.md", {"name": name})


def test_dollars_in_a_name_are_no_mathematics(labelled: Path, folder: Path) -> None:
    words = ["--model", f"A$x^$={labelled}/net.onnx", "--model", f"_B={labelled}/net.onnx", "-o", "report", *QUICK]
    assert main(["check", "report", str(labelled / "photos"), *words]) == 0
    labels = re.findall(r">([^<>]*)</text>", Path("report/index.html").read_text())
    assert labels.count("A$x^$") == labels.count("\N{ZERO WIDTH SPACE}_B") == 2


def test_names_that_are_no_utf8_are_printed_all_the_same(labelled: Path, folder: Path) -> None:
    save_detections([made_detections(labelled, name="A", precision="fp32")], "odd.json")
    Path("photos").mkdir()
    for file in (labelled / "photos").iterdir():
        Path(os.fsdecode(b"photos/\xff" + file.name.encode())).write_bytes(file.read_bytes())
    words = ["--load-detections", "odd.json", "--model", f"{labelled}/net.onnx", "--show-images", "1", "-o", "report"]
    assert main(["check", "report", "photos", *words, "--compare-images", "0"]) == 0
    assert r"\udcff" in Path("report/index.html").read_text() and r"\udcff" in Path("report/report.json").read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_report_is_written_whole_or_not_at_all(
    name: str, report: Path, labelled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at one of the files: the old report stays as it was."""
    Path("report").mkdir()
    for file in FILES:
        Path("report", file).write_text("old")
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if name in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    command = ["check", "report", str(labelled / "photos"), "--model", str(labelled / "net.onnx"), "-o", "report", *QUICK]
    assert main(command) == 2
    assert "cannot write: No space left on device; nothing was kept" in capsys.readouterr().err
    assert files_in(Path("report")) == sorted(FILES)
    assert [Path("report", file).read_text() for file in FILES] == ["old"] * 3


def test_the_page_begins_with_a_verdict(report: Path) -> None:
    values = figures(report)
    reference, onnx, half, engine = (variant(values, name) for name in ("PyTorch", "ONNX", "ONNX as FP16", "INT8 engine"))
    ap, most = reference["accuracy"]["ap"], max(abs(onnx["drop"]), abs(half["drop"]))
    assert most <= 0.005 < engine["drop"]
    for name in ("index.html", "report.md"):
        text = (report / name).read_text()
        assert f"ONNX and ONNX as FP16 keep the AP of PyTorch, {ap:.4f}, to within {most:.4f}." in text
        assert f"INT8 engine loses {engine['drop']:.4f} AP, {engine['drop'] / ap:.1%} of that of PyTorch." in text


# --- calibration ---


def test_calibration_images_in_the_evaluation_are_noted(report: Path, labelled: Path, folder: Path) -> None:
    assert figures(report)["calibration"]["overlap"] == 0
    assert "5 images of" in figures(report)["evaluation"]["protocol"]["INT8 calibrated on"]
    Path("mixed").mkdir()
    for i, source in enumerate([*sorted((labelled / "photos").glob("*.png"))[:3], *(labelled / "others").iterdir()]):
        (folder / f"mixed/{i}.png").write_bytes(source.read_bytes())  # by their content, whatever they are called
    net = str(labelled / "net.onnx")
    assert main(["calib", "run", net, "mixed", "-o", "mixed.calib", "--bias-images", "0"]) == 0
    command = ["check", "report", str(labelled / "photos"), "--model", net, "--calibration", "mixed.calib", "-o", "report"]
    assert main([*command, *QUICK]) == 0
    note = "INT8 was calibrated on 3 of the 5 images of the evaluation"
    assert any(one.startswith(note) for one in figures()["notes"])
    assert note in Path("report/index.html").read_text() and note in Path("report/report.md").read_text()


def test_the_noise_of_a_tensor_is_that_of_its_values(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    histograms = HistogramSet("model", images={"0" * 64: "photos/a.png"})
    for name, factor in (("a", 1), ("b", 5), ("unread", 1)):
        histograms.histograms[name] = Histogram()
        histograms.histograms[name].add(values * np.float32(factor))
    network = CalibratedNetwork("made", 96, 64, "nms", {})
    write_calibration(CalibrationFile(network, CalibrationSettings(), histograms), tmp_path / "my.calib")
    scales = dict.fromkeys(("a", "b", "unread"), np.float32(2 / 127))
    found = calibration_sources(tmp_path / "my.calib", scales, {"a": 7, "b": 9}, [])
    assert [(one.tensor, one.line) for one in found.tensors] == [("b", 9), ("a", 7)]  # b is clipped more
    for one, factor in zip(found.tensors, (5, 1), strict=True):
        exact = values * factor
        rounded = np.clip(np.rint(exact / (2 / 127)), -127, 127) * (2 / 127)
        assert one.threshold == pytest.approx(2) and one.amax == pytest.approx(np.abs(exact).max())
        assert one.noise == pytest.approx(np.sqrt(np.square(exact - rounded).mean() / np.square(exact).mean()), rel=0.01)
        assert one.clipped == pytest.approx((np.abs(exact) > 2).mean(), rel=0.01)


def test_noise_is_relative_to_values_in_the_middle_of_their_bins(tmp_path: Path) -> None:
    """Though most values are small against one of them, and lie in a single bin."""
    counted = Histogram()
    counted.add(np.float32([1.0]))
    small = np.float32(20.5 * counted.bin_width)
    counted.add(np.full(100_000, small, np.float32))
    histograms = HistogramSet("model", images={"0" * 64: "photos/a.png"})
    histograms.histograms["a"] = counted
    settings, network = CalibrationSettings(), CalibratedNetwork("made", 96, 64, "nms", {})
    write_calibration(CalibrationFile(network, settings, histograms), tmp_path / "my.calib")
    for threshold, clipped in ((0.5, 1 / 100_001), (float(small) / 2, 1.0)):
        (found,) = calibration_sources(tmp_path / "my.calib", {"a": np.float32(threshold / 127)}, {"a": 7}, []).tensors
        error = float(expected_error(counted, np.array([found.threshold]))[0])
        power = (100_000 * float(small) ** 2 + 1) / 100_001
        assert found.noise == pytest.approx(np.sqrt(error / power), rel=1e-3)
        assert found.clipped == pytest.approx(clipped)


def test_a_tensorrt_cache_is_enough(labelled: Path, folder: Path) -> None:
    CalibrationTable(load_calibration(labelled / "my.calib").scales, "8600").save("my.cache")
    net = str(labelled / "net.onnx")
    command = ["check", "report", str(labelled / "photos"), "--model", net, "--calibration", "my.cache", "-o", "report", *QUICK]
    assert main(command) == 0
    assert figures()["evaluation"]["protocol"]["INT8 calibrated on"] == "unknown images: my.cache has scales only"


# --- unusual labels ---


def report_on(data: Sequence[str], *more: str) -> tuple[dict[str, Any], str]:
    """The figures of a quick report, and all its notes; they are in all files."""
    assert main(["check", "report", *data, "--model", "net.onnx", "-o", "report", *QUICK, *more]) == 0
    values = figures()
    for name in ("index.html", "report.md"):
        text = Path("report", name).read_text().replace("&#39;", "'")
        assert all(note in text for note in values["notes"])
    return values, "\n".join(values["notes"])


def copied(labelled: Path, folder: Path) -> None:
    """The network and the labelled images, to spoil."""
    (folder / "net.onnx").symlink_to(labelled / "net.onnx")
    Path("photos").mkdir()
    for path in (labelled / "photos").iterdir():
        Path("photos", path.name).write_bytes(path.read_bytes())


def test_images_without_labels(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    Path("photos/0.txt").unlink()
    values, notes = report_on(["photos"])
    assert "1 of 5 images have no label file, 'photos/0.png' for example" in notes
    assert values["evaluation"]["objects"] == 24 and values["variants"][0]["accuracy"]["ap"] > 0.5


def test_images_without_any_labels(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    for path in Path("photos").glob("*.txt"):
        path.unlink()
    values, notes = report_on(["photos"], "--load-detections", str(saved(labelled, folder)))
    assert "photos: no image has labels" in notes
    assert "No object is labelled, so there is no AP; the report only compares the variants with each other." in notes
    assert [one["accuracy"]["ap"] for one in values["variants"]] == [None, None]
    assert values["disagreements"]["images"] == 5
    assert "No object of the network's classes is labelled, so there is no AP." in Path("report/index.html").read_text()


def saved(labelled: Path, folder: Path) -> Path:
    save_detections([made_detections(labelled)], folder / "found.json")
    return folder / "found.json"


def test_labels_without_images(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    Path("photos/0.png").unlink()
    values, notes = report_on(["photos"])
    assert "1 label files have no image, 'photos/0.txt' for example" in notes
    assert values["evaluation"]["images"] == 4
    Path("train.txt").write_text("".join(f"photos/{i}.png\n" for i in range(5)))
    values, notes = report_on(["train.txt"])
    assert "1 of its 5 images are missing, 'photos/0.png' for example" in notes
    assert values["evaluation"]["images"] == 4


def test_unknown_classes(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    Path("photos/0.txt").write_text("7 0.5 0.5 0.5 0.5\n")
    _, notes = report_on(["photos"])
    assert "photos/0.txt:1: '7 0.5 0.5 0.5 0.5' is no label: there are 3 classes" in notes
    Path("my.names").write_text("zebra\nyak\nxerus\nhen\n")
    values, notes = report_on(["photos"], "--names", "my.names")
    assert "has 4 categories without the network's class" in notes
    assert values["evaluation"]["objects"] == 0


def test_empty_ground_truth(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    for path in Path("photos").glob("*.txt"):
        path.write_text("")
    values, notes = report_on(["photos"])
    assert "no object of the network's classes is labelled in 5 images" in notes
    assert values["variants"][0]["curves"] == {} and values["variants"][0]["drop"] is None


def test_a_variant_without_detections(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    found = made_detections(labelled)
    nothing = next(iter(found.images.values())).select(slice(0))
    save_detections([replace(found, name="blind", images=dict.fromkeys(found.images, nothing))], "blind.json")
    values, notes = report_on(["photos"], "--load-detections", "blind.json")
    assert "blind has no detection above a score of 0.25 in any image." in notes
    blind = variant(values, "blind")
    assert blind["accuracy"]["ap"] == 0 and blind["drop"] == values["variants"][0]["accuracy"]["ap"]


def test_images_at_the_limit_of_detections_are_counted(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    found = made_detections(labelled)  # four in each image
    digests = list(found.images)
    fewer = {digest: found.images[digest].select(slice(3)) for digest in digests[:3]}
    full = replace(found, name="full", info=replace(found.info, max_detections=4), images={**found.images, **fewer})
    save_detections([full, replace(found, name="roomy", info=replace(found.info, max_detections=5))], "full.json")
    _, notes = report_on(["photos"], "--load-detections", "full.json")
    assert (
        "full outputs at most 4 detections of an image, and 2 of the 5 images reached that at a score threshold of 0.001: "
        "others may be missing; run surgery again with a larger max_detections." in notes
    )
    assert "roomy outputs" not in notes


def test_an_engine_with_little_int8_is_noted(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    few = replace(made_detections(labelled, name="slow", precision="int8"), about={"INT8": "0 of the 9 run"})
    save_detections([few], "few.json")
    _, notes = report_on(["photos"], "--load-detections", "few.json")
    assert "slow: 0 of the 9 run." in notes


def test_a_single_variant(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    values, notes = report_on(["photos"])
    assert values["agreement"] is None and values["sensitivity"] is None and values["calibration"] is None
    assert "5 images are few: differences of AP of some thousandths may be chance." in notes
    assert "There is one variant only." in Path("report/index.html").read_text()


BAD = {
    "photos": "nothing to measure; name --cfg and --weights, --model, --plan, --triton or --load-detections",
    "photos --model net.onnx --bench none.json": "none.json: cannot read: No such file",
    "photos --model net.onnx --bench net.json": "net.json: is damaged ('batch' is missing); make it with 'darktrt bench'",
    "photos --model net.onnx --show-images -1": "--show-images -1: it must be at least 0",
    "photos --model net.onnx -o net.onnx/report": "net.onnx/report: cannot make this folder",
    "empty --model net.onnx": "empty: no images here",
}


@pytest.mark.parametrize("arguments", BAD)
def test_mistakes_are_reported_in_one_sentence(
    arguments: str, labelled: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied(labelled, folder)
    Path("net.json").write_text('{"timings": [{"name": "x"}]}')
    Path("empty").mkdir()
    assert main(["check", "report", *arguments.split(), *([] if "-o" in arguments else ["-o", "report"])]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"darktrt check report: {BAD[arguments]}")
    assert not Path("report").exists()


# --- latencies ---


def test_of_several_timings_the_smallest_batch_with_a_graph_counts(tmp_path: Path) -> None:
    rows = [timing("a", 9, 8), timing("a", 3, 1, graph=False), timing("a", 2, 1), timing("b", 5, 4, graph=False)]
    (tmp_path / "times.json").write_text(json.dumps({"gpu": None, "more": 1, "timings": rows}))
    found = read_timings([tmp_path / "times.json"])
    assert (found["a"].milliseconds, found["a"].batch, found["a"].gpu) == (2, 1, "unknown GPU")
    assert (found["b"].milliseconds, found["b"].cuda_graph) == (5, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "'name' is None"),
        ({"batch": 1.5}, "'batch' is 1.5"),
        ({"cuda_graph": "yes"}, "'cuda_graph' is 'yes'"),
        ({"end_to_end": {"median": "x"}}, "'median' is 'x'"),
        ({"end_to_end": {}}, "'median' is missing"),
        ({"end_to_end": []}, r"Median is \[\]"),
        ({"images_per_second": float("inf")}, "Infinity is no finite number"),
        ({"plan_sha256": [1]}, r"'plan_sha256' is \[1\]"),
    ],
)
def test_timings_that_are_none_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(json.dumps({"timings": [{**timing("a"), **change}]}))
    with pytest.raises(DarktrtError, match=rf"times\.json: is damaged.*\({message}\); make it with 'darktrt bench'$"):
        read_timings([tmp_path / "times.json"])


# --- disagreement ---


def detections(*rows: tuple[tuple[float, float, float, float], float, int]) -> Detections:
    boxes, scores, ids = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(ids, np.int32)
    return Detections(*arrays, ("cat", "dog"))


LEFT, RIGHT = (0, 0, 40, 40), (100, 0, 140, 40)


def test_missing_extra_and_changed_detections_count_by_score() -> None:
    expected = detections((LEFT, 0.9, 0), (RIGHT, 0.6, 1), ((50, 50, 60, 60), 0.2, 0))
    found = detections((LEFT, 0.5, 0), (RIGHT, 0.45, 0), ((50, 50, 60, 60), 0.1, 0))
    one = disagreement("x.png", "INT8", found, expected)
    assert one.missing == ("dog 0.60",) and one.extra == ("cat 0.45",) and one.moved == ("cat 0.90 → 0.50",)
    assert one.amount == pytest.approx(0.35 + 0.2 + 0.4, abs=1e-6)
    assert disagreement("x.png", "INT8", expected, expected).amount == 0
    near = detections((LEFT, 0.85, 0), (RIGHT, 0.6, 1))
    assert disagreement("x.png", "INT8", near, expected).amount == 0


def test_panels_are_small_images_of_labels_and_variants(tmp_path: Path) -> None:
    Image.fromarray(made_image(600, 1200)).save(tmp_path / "x.png")
    labelled_image = LabelledImage(tmp_path / "x.png", None, (LabelledObject(1, (10, 20, 30, 40), 1200, False),))
    assert labels_of(labelled_image, ("cat", "dog")).boxes.tolist() == [[10, 20, 40, 60]]
    drawn = panels(labelled_image, [detections(), detections((LEFT, 0.9, 0))])
    images = [Image.open(io.BytesIO(base64.b64decode(one.partition("base64,")[2]))) for one in drawn]
    assert [(image.format, image.size) for image in images] == [("JPEG", (480, 240))] * 3
    pixels = [np.asarray(image, np.int16) for image in images]
    assert all(np.abs(pixels[i] - pixels[1]).max() > 60 for i in (0, 2))  # a box is in them


def many(labelled: Path, folder: Path, count: int) -> tuple[list[VariantDetections], Parts]:
    """Two variants on so many images, and the parts of a report on them."""
    (folder / "many").mkdir()
    for i in range(count):
        Image.fromarray(made_image(120, 160, seed=i)).save(folder / f"many/{i:03}.jpg")
        (folder / f"many/{i:03}.txt").write_text("0 0.5 0.5 0.5 0.5")
    first = made_detections(labelled, name="FP32", precision="fp32")
    truth = load_ground_truth(["many"], first.info.class_names)
    boxes = list(first.images.values())
    variants = [
        replace(first, name=name, images={digest: boxes[(i + shift) % 5] for i, digest in enumerate(truth.digests)})
        for name, shift in (("FP32", 0), ("INT8", 1))
    ]
    return variants, Parts(truth, evaluate_detections(variants, truth))


def test_of_500_images_only_the_worst_are_in_the_page(labelled: Path, folder: Path) -> None:
    variants, parts = many(labelled, folder, 500)
    report = make_report(parts, 8)
    write_report(report, folder)
    assert Path("index.html").stat().st_size < 2_000_000
    amounts = [one.about.amount for one in report.shown]
    assert len(amounts) == 8 and amounts == sorted(amounts, reverse=True)
    everywhere = [
        disagreement("", "", variants[1].images[digest], variants[0].images[digest]).amount
        for digest in parts.ground_truth.digests
    ]
    assert amounts == sorted(everywhere, reverse=True)[:8]
    assert "few" not in render("report.md", page_values(report))


def test_a_report_on_the_same_images_has_the_same_digest(labelled: Path, folder: Path) -> None:
    copied(labelled, folder)
    digests = [report_on(data)[0]["evaluation"]["digest"] for data in (["photos"], ["photos/*.png"])]
    assert digests[0] == digests[1]
    Path("photos/0.txt").write_text("0 0.5 0.5 0.5 0.5")
    assert report_on(["photos"])[0]["evaluation"]["digest"] != digests[0]


def test_detections_of_other_images_are_refused(labelled: Path) -> None:
    found = made_detections(labelled)
    with pytest.raises(DarktrtError, match="A: has detections of 5 of the 6 images"):
        found.in_order([*found.images, "x"])
