"""``check map``: average precision of variants, from detections made here or on another machine."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, Made, made_detections, made_image
from PIL import Image

from darktrt.calib.table import CalibrationTable
from darktrt.check.coco import Accuracy, CocoMetrics
from darktrt.check.detections import VariantDetections, detect_variant, load_detections, save_detections
from darktrt.check.evaluation import EvaluatedVariant, Evaluation, evaluate_detections
from darktrt.check.ground_truth import load_ground_truth
from darktrt.check.runs import load_results, onnx_variant
from darktrt.cli import main
from darktrt.convert.export import convert_darknet
from darktrt.convert.reference import TorchReference
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.parallel import Done
from darktrt.pipeline import load_calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.boxes import Detections


def numbers(text: str, name: str) -> list[float]:
    """AP, AP50, ..., drop of a variant in the printed table."""
    line = next(line for line in text.splitlines() if re.match(rf"{re.escape(name)}  +(fp32|tf32|fp16|int8) ", line))
    return [math.nan if word == "-" else float(word) for word in line[len(name) :].split()[1:]]


def test_precisions_side_by_side(labelled: Path, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """The labels are detections of FP32; PyTorch has the same; INT8 with all scales times a hundred has none of them."""
    scales = load_calibration(labelled / "my.calib").scales
    CalibrationTable({name: scale * np.float32(100) for name, scale in scales.items()}, "8600").save(labelled / "bad.cache")
    variants = ["--model", f"ONNX={labelled}/net.onnx", "--cfg", str(made.cfg), "--weights", str(made.weights)]
    command = ["check", "map", str(labelled / "photos"), *variants, "--simulate", "fp16,int8"]
    assert main([*command, "--calibration", str(labelled / "bad.cache")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{labelled}/photos: 5 images, 30 objects\n")
    exact = numbers(out, "ONNX")[0]
    assert exact > 0.8 and numbers(out, "PyTorch")[0] == pytest.approx(exact, abs=0.02)
    assert abs(numbers(out, "ONNX as FP16")[0] - exact) < 0.1
    ap, *_, drop = numbers(out, "ONNX as INT8")
    assert ap < 0.1 and drop == pytest.approx(numbers(out, "PyTorch")[0] - ap, abs=2e-4)
    assert main([*command, "--calibration", str(labelled / "my.calib")]) == 0
    assert numbers(capsys.readouterr().out, "ONNX as INT8")[0] > ap + 0.2


def test_saved_detections_have_the_same_ap(labelled: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", f"there={labelled}/net.onnx"]
    assert main(["check", "map", str(labelled / "photos"), *model, "--save-detections", "gpu.json"]) == 0
    assert "AP" not in capsys.readouterr().out
    here = ["--model", f"here={labelled}/net.onnx"]
    assert main(["check", "map", str(labelled / "photos"), *here, "--load-detections", "gpu.json"]) == 0
    out = capsys.readouterr().out
    assert numbers(out, "here") == pytest.approx(numbers(out, "there"), abs=0, nan_ok=True) and numbers(out, "here")[0] > 0.8
    assert main(["check", "map", str(labelled / "photos"), "--load-detections", "gpu.json"]) == 0
    assert numbers(capsys.readouterr().out, "there") == pytest.approx(numbers(out, "there"), abs=0, nan_ok=True)


def test_saving_needs_no_more_than_a_gpu_host_has(labelled: Path, folder: Path) -> None:
    """Only NumPy, Pillow and tqdm can be imported; a function stands in for TensorRT's engine."""
    code = f"""
import sys
for name in "torch onnx onnxruntime onnx_graphsurgeon polygraphy pycocotools matplotlib jinja2 av".split():
    sys.modules[name] = None
import json, numpy as np, darktrt.cli, darktrt.engine.runtime
from darktrt.metadata import DetectorInfo
from darktrt.engine.manifest import Manifest
counts = []
class Fake:
    fits_frames, depth, run = True, 3, None
    path, info = "x.plan", DetectorInfo.from_json(open("info.json").read(), "")
    manifest = Manifest("0" * 64, "", "TensorRT 8.6.0", "H200", "fp16", (), 1.0, info)
    def __init__(self, *_): pass
    __enter__ = lambda self: self
    __exit__ = lambda *_: None
    def submit(self, images, inputs):
        counts.append(len(images))
    def collect(self):
        boxes = np.array([[[24, 16, 72, 48]]], np.float32).repeat(counts.pop(0), 0)
        scores, classes = np.full(boxes.shape[:2], 0.5, np.float32), np.zeros(boxes.shape[:2], np.int32)
        return dict(boxes=boxes, scores=scores, classes=classes, num_detections=np.ones((len(boxes), 1), np.int32))
darktrt.engine.runtime.PlanRunner = Fake
sys.exit(darktrt.cli.main(["check", "map", {str(labelled / "photos")!r}, "--plan", "x.plan", "--save-detections", "gpu.json"]))
"""
    with OnnxRunner(labelled / "net.onnx") as runner:
        Path("info.json").write_text(runner.info.to_json())
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = load_detections("gpu.json")
    assert found.precision == "fp16" and found.about["runs in"] == "TensorRT 8.6.0" and found.about["sha256"] == "0" * 64
    assert found.thresholds == Thresholds(0.001, 0.45) and len(found.images) == 5
    assert next(iter(found.images.values())).boxes.tolist() == [[48, 32, 144, 96]]


@dataclass
class Elsewhere:
    """Workers whose warnings are printed on other machines: they find two objects in every image."""

    info: DetectorInfo
    group_size: int = 2

    def results(self, _: Any, groups: Any, **options: Any) -> Any:
        two = Detections(np.zeros((2, 4), np.float32), np.ones(2, np.float32), np.zeros(2, np.int32), self.info.class_names)
        yield from (Done(group, [two] * len(group)) for group in groups)


@pytest.mark.parametrize("limit", [2, 3])
def test_images_at_the_limit_of_detections_are_told_here(labelled: Path, limit: int, caplog: pytest.LogCaptureFixture) -> None:
    variant = onnx_variant(labelled / "net.onnx")
    variant = replace(variant, info=replace(variant.info, max_detections=limit))
    truth = load_ground_truth([str(labelled / "photos")], variant.info.class_names)
    detect_variant(variant, truth, Elsewhere(variant.info))
    expected = [f"{variant.info.name}: an image has 2 detections"] if limit == 2 else []
    assert [message.partition(",")[0] for message in caplog.messages] == expected


def test_files_keep_every_bit(labelled: Path, folder: Path) -> None:
    found = made_detections(labelled)
    digests = list(found.images)
    save_detections([found, replace(found, name="B", images={})], "found.json")
    again, empty = load_detections("found.json")
    assert (again.name, again.info, again.precision, again.thresholds) == ("A", found.info, "tf32", found.thresholds)
    for one, other in zip(again.in_order(digests), found.in_order(digests), strict=True):
        assert np.array_equal(one.boxes, other.boxes) and np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.class_ids, other.class_ids)
    assert empty.name == "B" and not empty.images
    assert np.array_equal(again.in_order(digests[::-1])[0].boxes, again.images[digests[-1]].boxes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classes", [10**12], "classes are 1000000000000 to 1000000000000, and there are 3"),
        ("classes", [-1], "classes are -1 to -1"),
        ("classes", [3], "classes are 3 to 3"),
        ("classes", [1.5], "are no numbers"),
        ("classes", ["1"], "are no numbers"),
        ("classes", [float("inf")], "Infinity is no finite number"),
        ("scores", ["0.5"], "are no numbers"),
        ("scores", [0.5, 0.4], "boxes must be"),
        ("scores", {"a": 1}, "are no numbers"),
        ("boxes", [[1, 2, 3]], "cannot reshape"),
        ("boxes", [[1, 2, 3, 4], [5]], "inhomogeneous"),
        ("boxes", [[1, 2, 1e300, 4]], "boxes must be finite"),
        ("boxes", [[5, 2, 3, 4]], "ends before it begins"),
        ("precision", "fp4", "'precision' is 'fp4'"),
        ("thresholds", {"score": 7.0}, "the score threshold is 7"),
        ("about", {"on": 3}, "'on' is 3|'about' is 3"),
        ("info", {}, "is missing"),
        ("images", [], r"'images' is \[\]"),
    ],
)
def test_damaged_detections_are_refused(labelled: Path, folder: Path, key: str, value: Any, message: str) -> None:
    found = made_detections(labelled)
    box, (digest, *_) = np.array([[1, 2, 3, 4]], np.float32), found.images
    one = Detections(box, np.array([0.5], np.float32), np.array([0], np.int32), found.info.class_names)
    save_detections([replace(found, images={digest: one})], "found.json")
    values = json.loads(Path("found.json").read_text())
    (variant,) = values["variants"]
    (variant if key in variant else variant["images"][digest])[key] = value
    Path("found.json").write_text(json.dumps(values))
    with pytest.raises(DarktrtError, match=rf"^found\.json: is damaged.*\(.*({message}).*\); make it by saving detections$"):
        load_detections("found.json")


def test_the_mean_of_the_classes_is_the_ap(labelled: Path) -> None:
    found = made_detections(labelled)
    truth = load_ground_truth([str(labelled / "photos")], found.info.class_names)
    evaluation = evaluate_detections([found], truth)
    (evaluated,) = evaluation.variants
    classes = [one for one in evaluated.metrics.classes if one.objects]
    assert sum(one.objects for one in classes) == truth.count == evaluation.objects == 30
    whole = evaluated.metrics.accuracy
    assert 0.1 < whole.ap75 < whole.ap50 - 0.02
    assert np.mean([one.ap for one in classes]) == pytest.approx(whole.ap)
    assert np.mean([one.ap50 for one in classes]) == pytest.approx(whole.ap50)
    assert np.mean(evaluated.metrics.curves["0.50"]) == pytest.approx(whole.ap50)
    assert np.mean(evaluated.metrics.curves["0.75"]) == pytest.approx(whole.ap75)


BAD = {
    "photos": "nothing to measure; name --cfg and --weights, --model, --plan, --triton or --load-detections",
    "photos --model net.onnx --simulate int4": "--simulate int4: 'int4' is neither fp16 nor int8",
    "photos --model net.onnx --simulate int8": "simulating INT8 needs a calibration [--calibration]",
    "photos --simulate fp16": "--simulate rounds what an ONNX file computes; name one by --model",
    "photos --model net.onnx --model net.onnx": "net.onnx: is given twice; name each variant once",
    "photos --load-detections none.json": "none.json: cannot read: No such file",
    "photos --load-detections broken.json": "broken.json: is damaged (",
    "photos --load-detections classes.json --model net.onnx": "A: has other classes than net.onnx",
    "photos --load-detections thresholds.json --model net.onnx": "A: was made with score threshold 0.5",
    "photos/0.png --load-detections good.json --save-detections good.json": "good.json: is given twice",
    "more --load-detections good.json": "A: has detections of 5 of the 6 images; make it from the same images",
    "photos --model net.onnx --limit 0": "the limit is 0; evaluate on at least 1 image",
    "none --model net.onnx": "none: no such file or folder",
    "photos --model net.onnx --class-map bad.map": "bad.map:1: write CLASS OF THE LABELS = CLASS OF THE NETWORK",
}


@pytest.mark.parametrize("arguments", BAD)
def test_mistakes_are_reported_in_one_sentence(
    arguments: str, labelled: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("net.onnx", "photos"):
        (folder / name).symlink_to(labelled / name)
    Path("bad.map").write_text("TRT-8600\n")
    Path("more").mkdir()
    for path in sorted((labelled / "photos").iterdir()):
        (folder / "more" / path.name).symlink_to(path)
    Image.fromarray(made_image(128, 192, seed=9)).save("more/9.png")
    found = made_detections(labelled)
    save_detections([found], "good.json")
    save_detections([replace(found, info=replace(found.info, class_names=("a", "b", "c")))], "classes.json")
    save_detections([replace(found, thresholds=Thresholds(0.5, 0.45))], "thresholds.json")
    values = json.loads(Path("good.json").read_text())
    next(iter(values["variants"][0]["images"].values()))["classes"][0] = 9
    Path("broken.json").write_text(json.dumps(values))
    assert main(["check", "map", *arguments.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"darktrt check map: {BAD[arguments]}")


def test_detections_of_other_images_are_refused(labelled: Path) -> None:
    found = made_detections(labelled)
    with pytest.raises(DarktrtError, match="A: has detections of 5 of the 6 images"):
        found.in_order([*found.images, "0" * 64])


# --- class names and what cannot be compared ---


@pytest.fixture(scope="module")
def renamed(labelled: Path, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled images, and the made network converted with class names of its own; ``other.names`` has as many others."""
    folder = tmp_path_factory.mktemp("renamed")
    (folder / "my.names").write_text("ape\nbee\ncat\n")
    (folder / "other.names").write_text("ant\nbat\ncow\n")
    convert_darknet(made.cfg, made.weights, folder / "plain.onnx", names=folder / "my.names")
    insert_plugins(folder / "plain.onnx", folder / "net.onnx", SurgeryOptions())
    (folder / "photos").symlink_to(labelled / "photos")
    (folder / "my.calib").symlink_to(labelled / "my.calib")
    return folder


@pytest.mark.parametrize("command", ["map", "report", "compare"])
def test_pytorch_has_the_class_names_of_the_models(
    command: str, renamed: Path, made: Made, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", command, f"{renamed}/photos", "--cfg", str(made.cfg), "--weights", str(made.weights)]
    words += ["--model", f"ONNX={renamed}/net.onnx"]
    words += ["-o", "report", "--sensitivity-images", "0"] if command == "report" else []
    assert main(words) == 0, capsys.readouterr().err
    assert main([*words, "--class-names", f"{renamed}/my.names"]) == 0, capsys.readouterr().err


def test_pytorch_has_the_class_names_of_saved_detections(renamed: Path, made: Made, folder: Path) -> None:
    photos = f"{renamed}/photos"
    assert main(["check", "map", photos, "--model", f"{renamed}/net.onnx", "--save-detections", "onnx.json"]) == 0
    pytorch = ["--cfg", str(made.cfg), "--weights", str(made.weights)]
    assert main(["check", "map", photos, *pytorch, "--load-detections", "onnx.json"]) == 0


def test_class_names_of_another_count_are_ignored(made: Made) -> None:
    more = replace(made.info, heads=(), class_names=("a", "b", "c", "d"))
    fits = replace(made.info, class_names=("x", "y", "z"))
    assert TorchReference(made.cfg, made.weights, models=[more]).info.class_names == made.info.class_names
    assert TorchReference(made.cfg, made.weights, models=[more, fits]).info.class_names == ("x", "y", "z")


EARLY = {
    "other classes": ("map report", "--class-names {0}/other.names", "net.onnx: has other classes than PyTorch"),
    "two of a name": ("map report compare", "--model {0}/net.onnx", "net.onnx: is given twice"),
    "another size": ("report compare", "--size 64", "net.onnx: its input is 96x64x3, that of PyTorch 64x64x3"),
    "other thresholds": ("map report", "--load-detections thresholds.json", "A: was made with score threshold 0.5"),
    "other images": ("map report", "--load-detections images.json", "A: has detections of 1 of the 5 images"),
    "classes of saved detections": ("map report", "--load-detections classes.json", "A: has other classes than PyTorch"),
    "another network's": ("report", "--calibration other.cache", "the calibration has no scale for 6 tensors of this network"),
    "raw heads": ("map report", "--model {0}/raw.onnx", "ends at its raw heads"),
    "images of another size": ("map report", "--limit 1", "0.png: is 192x128, but val.json has labels for 99x99"),
    "fixed thresholds": ("map report", "--model {0}/fixed.onnx", "its thresholds are fixed at 0.25 and 0.45"),
}


@pytest.mark.parametrize(("command", "case"), [(command, case) for case in EARLY for command in EARLY[case][0].split()])
def test_what_cannot_be_compared_is_refused_before_the_first_image(
    command: str, case: str, renamed: Path, labelled: Path, made: Made, folder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fails(*_: object) -> None:
        raise AssertionError("an image is run")

    insert_plugins(renamed / "plain.onnx", renamed / "raw.onnx", SurgeryOptions(head="raw"))
    insert_plugins(renamed / "plain.onnx", renamed / "fixed.onnx", SurgeryOptions(thresholds=Thresholds()))
    CalibrationTable({"another": np.float32(1)}, "8600").save("other.cache")
    found = made_detections(labelled)
    found = replace(found, info=replace(found.info, class_names=("ape", "bee", "cat")))
    some = dict(list(found.images.items())[:1])
    save_detections([replace(found, thresholds=Thresholds(0.5, 0.45))], "thresholds.json")
    save_detections([replace(found, images=some)], "images.json")
    save_detections([made_detections(labelled)], "classes.json")
    for function in ("agreement.run", "coco.NetworkDetector.detect", "simulate.FloatReference"):
        monkeypatch.setattr(f"darktrt.check.{function}", fails)
    image = {"id": 0, "file_name": "0.png", "width": 99, "height": 99}
    label = {"image_id": 0, "category_id": 0, "bbox": [0, 0, 9, 9]}
    values = {"images": [image], "annotations": [label], "categories": [{"id": 0, "name": "ape"}]}
    Path("val.json").write_text(json.dumps(values))
    data = f"val.json:{renamed}/photos" if case == "images of another size" else f"{renamed}/photos"
    words = ["check", command, data, "--cfg", str(made.cfg), "--weights", str(made.weights)]
    words += ["--model", f"{renamed}/net.onnx", *EARLY[case][1].format(renamed).split()]
    words += ["-o", "report"] if command == "report" else []
    assert main(words) == 2
    assert EARLY[case][2] in capsys.readouterr().err


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    """Detections beyond 1 GiB, and results beyond 4."""
    with Path("huge.json").open("wb") as file:
        file.truncate(64 << 30)  # takes no room
    for load, most in ((load_detections, "1,073,741,824"), (load_results, "4,294,967,296")):
        with pytest.raises(DarktrtError, match=rf"^huge\.json: has 68,719,476,736 bytes, and such a file may have {most};"):
            load("huge.json")


# --- the table ---


def test_the_table_has_a_line_a_variant(made: Made) -> None:
    """Numbers to four digits, a dash for one that does not exist, and the drop against the first; no minus before a zero."""
    nothing = float("nan")
    rows = {
        "exact": ("fp32", Accuracy(0.5, 0.75, 0.625, nothing, 0.25, 0.125)),
        "a longer name": ("int8", Accuracy(0.4766, 0.7, 0.6, nothing, 0.2, 0.1)),
        "alike": ("fp16", Accuracy(0.50000001, 0.75, 0.6, nothing, 0.2, 0.1)),
        "better": ("tf32", Accuracy(0.5625, 1.0, 0.6, 0.0, 0.2, 0.1)),
        "blind": ("fp16", Accuracy(*[nothing] * 6)),
    }
    variants = tuple(
        EvaluatedVariant(VariantDetections(name, made.info, precision, Thresholds(), {}), CocoMetrics(accuracy, (), {}))
        for name, (precision, accuracy) in rows.items()
    )
    assert Evaluation("val.json", 5, 30, variants).to_table().splitlines() == [
        "               precision      AP    AP50    AP75   small  medium   large     drop",
        "exact          fp32       0.5000  0.7500  0.6250       -  0.2500  0.1250   0.0000",
        "a longer name  int8       0.4766  0.7000  0.6000       -  0.2000  0.1000   0.0234",
        "alike          fp16       0.5000  0.7500  0.6000       -  0.2000  0.1000   0.0000",
        "better         tf32       0.5625  1.0000  0.6000  0.0000  0.2000  0.1000  -0.0625",
        "blind          fp16            -       -       -       -       -       -        -",
    ]


def test_nothing_to_evaluate_is_refused(labelled: Path) -> None:
    truth = load_ground_truth([str(labelled / "photos")], made_detections(labelled).info.class_names)
    with pytest.raises(DarktrtError, match="there is no variant to evaluate"):
        evaluate_detections([], truth)


def test_a_record_of_many_images_prints_in_a_line(labelled: Path) -> None:
    """In a Python session; boxes are left out."""
    found = made_detections(labelled)
    assert "boxes" not in repr(found) and "array" not in repr(found) and found.name in repr(found)
