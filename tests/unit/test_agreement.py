"""``check compare``: differences are reported where they are, equal outputs pass, and results are saved and loaded."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import MADE_BODY, MADE_CFG, MADE_NET, Made, files_in, made_image, make, net, relative_error
from numpy.typing import NDArray
from PIL import Image

from darktrt.check import runs
from darktrt.check.agreement import Agreement, VariantAgreement, compare
from darktrt.check.runs import (
    DETECTIONS,
    InputImage,
    Thresholds,
    Variant,
    inner_tensors,
    load_image,
    load_results,
    onnx_variant,
    plan_variant,
    run,
)
from darktrt.check.simulate import session
from darktrt.check.tolerance import (
    TOLERANCES,
    Matches,
    TensorError,
    match,
    pair,
    parse_tolerance,
    tensor_error,
    tolerance_of,
    unpaired,
)
from darktrt.cli import main
from darktrt.convert.reference import TorchReference
from darktrt.engine.manifest import Manifest
from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo
from darktrt.onnx_file import load_model
from darktrt.plugins.functions import embed
from darktrt.surgery.outputs import add_outputs
from darktrt.surgery.precision import halve
from darktrt.surgery.rewrite import SurgeryOptions, import_graph, insert_plugins, save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The made network as files, with ``portable.onnx`` and three images in ``images/``."""
    folder = tmp_path_factory.mktemp("compare")
    network = make(folder, MADE_CFG)
    insert_plugins(network.plain, folder / "portable.onnx", SurgeryOptions())
    draw_images(folder / "images")
    return network


def draw_images(folder: Path, count: int = 3) -> None:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(made_image(50 + 10 * i, 70, seed=i)).save(folder / f"{i}.png")


def images_of(network: Made) -> list[InputImage]:
    return [load_image(path, network.info) for path in sorted((network.cfg.parent / "images").iterdir())]


def torch_of(network: Made, layers: bool = False) -> Variant:
    reference = TorchReference(network.cfg, network.weights, layers=layers)
    return Variant("PyTorch", reference.info, "fp32", reference.run)


LOOSE = Thresholds(score=0.05)
"""Random weights find hardly anything above 0.25."""


# --- agreement ---


@pytest.mark.parametrize("head", ["nms", "decode", "raw"])
@pytest.mark.parametrize("form", ["uint8", "float"])
def test_every_form_of_a_model_agrees_with_pytorch(made: Made, tmp_path: Path, head: Any, form: Any) -> None:
    insert_plugins(made.plain, tmp_path / "model.onnx", SurgeryOptions(head=head, input=form))
    report = compare([torch_of(made), onnx_variant(tmp_path / "model.onnx")], images_of(made), thresholds=LOOSE)
    (one,) = report.variants
    assert report.passed, report.to_table()
    decoded = {"boxes", "scores"} if head == "decode" else set()
    assert set(one.tensors) == {"head0_raw", "head1_raw"} | decoded
    if head == "raw":
        assert one.detections is None
    else:
        assert one.detections and one.detections.expected > 5 and not one.detections.missing + one.detections.extra


@pytest.mark.parametrize("batch", [(3, 3, 3), (1, 2, 4)])
def test_letterboxed_images_and_batches(tmp_path: Path, batch: tuple[int, int, int]) -> None:
    network = make(tmp_path, net(**MADE_NET, letter_box=1) + MADE_BODY, batch)
    insert_plugins(network.plain, tmp_path / "portable.onnx", SurgeryOptions())
    draw_images(tmp_path / "images")
    variants = [torch_of(network), onnx_variant(network.plain), onnx_variant(tmp_path / "portable.onnx")]
    assert variants[2].info.takes_image_size
    report = compare(variants, images_of(network), thresholds=LOOSE)
    assert report.passed, report.to_table()
    assert [one.detections and one.detections.expected > 0 for one in report.variants] == [True, True]


def test_layers_of_pytorch_and_onnx_agree(made: Made) -> None:
    portable = made.cfg.parent / "portable.onnx"
    report = compare([torch_of(made, layers=True), onnx_variant(portable, layers=True)], images_of(made), layers=True)
    assert report.passed, report.to_table()
    assert list(report.variants[0].tensors) == list(dict.fromkeys(layer.tensor for layer in made.info.layers))


def test_layers_inside_fused_nodes_are_counted(made: Made, tmp_path: Path) -> None:
    insert_plugins(made.plain, tmp_path / "fused.onnx", SurgeryOptions(mish="fused"))
    report = compare(
        [torch_of(made, layers=True), onnx_variant(tmp_path / "fused.onnx", layers=True)], images_of(made), layers=True
    )
    assert report.passed and re.search(r"^[1-9] more cfg sections have no tensor in both", report.to_table(), re.MULTILINE)


def test_fp16_is_within_its_tolerance_and_not_within_that_of_fp32(made: Made) -> None:
    model, info = load_model(made.cfg.parent / "portable.onnx")
    graph = import_graph(model)
    halve(graph, info)
    half = gs.export_onnx(graph.toposort(), do_type_check=False)
    embed(half)
    add_outputs(half, inner_tensors(info, layers=True))
    variants = [torch_of(made, layers=True), Variant("half", info, "fp16", session(half))]
    assert compare(variants, images_of(made), layers=True).passed
    assert not compare([variants[0], replace(variants[1], precision="fp32")], images_of(made), layers=True).passed


def test_results_are_copies(made: Made) -> None:
    """An engine writes its next outputs into the same memory."""
    reference, memory = torch_of(made), {}

    def reusing(inputs: Any) -> Any:
        for name, values in reference.run(inputs).items():
            memory.setdefault(name, np.empty_like(values))[...] = values
        return memory

    variants = [reference, replace(reference, name="engine", run=reusing)]
    exact, first = run(variants, images_of(made)[0], LOOSE, layers=False)
    run(variants, images_of(made)[1], LOOSE, layers=False)
    assert all(np.array_equal(values, exact[name]) for name, values in first.items())


def test_an_engine_in_fp32_has_the_tolerance_of_its_tf32(made: Made) -> None:
    for precision, tf32, expected in (
        ("fp32", True, "tf32"),
        ("fp32", False, "fp32"),
        ("fp16", True, "fp16"),
        ("int8", True, "int8"),
    ):
        manifest = Manifest("", "", "TensorRT 8.6.0", None, precision, (), 1.0, made.info, tf32=tf32)
        runner: Any = SimpleNamespace(path="x.plan", info=made.info, manifest=manifest, run=dict)
        assert plan_variant(runner).precision == expected


# --- differences ---


def broken(source: Path, target: Path, line: int) -> None:
    """The model with one filter of the convolution of this cfg line 30 % too strong."""
    model, info = load_model(source)
    index = next(layer.index for layer in info.layers if layer.line == line)
    node = next(node for node in model.graph.node if node.name == f"/layers.{index}/Conv")
    (weight,) = (constant for constant in model.graph.initializer if constant.name == node.input[1])
    values = onnx.numpy_helper.to_array(weight).copy()
    values[1] *= 1.3
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    save_model(model, info, target)


def test_a_changed_weight_is_reported_at_its_cfg_line(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convolutions = [layer for layer in made.info.layers if layer.kind == "convolutional"]
    for layer in (convolutions[0], convolutions[3], convolutions[-1]):
        broken(made.cfg.parent / "portable.onnx", tmp_path / "broken.onnx", layer.line)
        numbers = tmp_path / "numbers.json"
        data, files = str(made.cfg.parent / "images"), ["--cfg", str(made.cfg), "--weights", str(made.weights)]
        words = ["check", "compare", data, *files, "--model", str(tmp_path / "broken.onnx")]
        assert main([*words, "--layers", "--json", str(numbers)]) == 1
        assert f"\ncfg line {layer.line}: max relative error 0." in capsys.readouterr().out
        (found,) = json.loads(numbers.read_text())["variants"]
        lines = {one["tensor"]: one["line"] for one in found["tensors"]}
        assert lines[found["failures"][0]] == layer.line
        assert main(words) == 1
        assert main([*words, "--tolerance", "worst=9,cosine=0,score=1,unmatched=9"]) == 0
        assert "as asked for" in capsys.readouterr().out


def test_nan_is_beyond_every_tolerance(made: Made, tmp_path: Path) -> None:
    def damaged(inputs: Any) -> Any:
        outputs = reference.run(inputs)
        return {**outputs, "head0_raw": np.full_like(outputs["head0_raw"], np.nan)}

    reference = torch_of(made)
    report = compare([reference, Variant("damaged", reference.info, "int8", damaged)], images_of(made))
    assert report.variants[0].failures() == ["head0_raw"]
    assert json.loads(report.to_json())["variants"][0]["tensors"][0]["worst"] is None


def test_scores_that_are_nan_are_refused(made: Made) -> None:
    reference = torch_of(made)

    def blind(inputs: Any) -> Any:
        outputs = reference.run(inputs)
        return {**outputs, "scores": np.full_like(outputs["scores"], np.nan)}

    with pytest.raises(DarktrtError, match="PyTorch: its scores are not numbers"):
        run([replace(reference, run=blind)], images_of(made)[0], LOOSE, layers=False)


# --- measures ---


def test_errors_are_relative_to_the_reference() -> None:
    found = tensor_error(np.float32([1, 2, -4.5]), np.float32([1, 2, -4]), "x")
    assert found.worst == pytest.approx(0.5 / 4) and found.mean == pytest.approx(0.5 / 7)
    assert found.cosine == pytest.approx(23 / np.sqrt(21 * 25.25))
    nothing = np.zeros(3, np.float32)
    assert tensor_error(nothing, nothing, "x") == TensorError(0, 0, 1)
    assert not tensor_error(nothing + 1, nothing, "x").within(TOLERANCES["int8"])
    with pytest.raises(DarktrtError, match=re.escape("'x' is (3,), but (2,) of the reference")):
        tensor_error(nothing, nothing[:2], "x")


def rows(*detections: tuple[float, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(detections, np.float32).reshape(-1, 6)


def test_detections_match_by_class_and_overlap_once_each() -> None:
    expected = rows((0, 0, 10, 10, 0.9, 1), (0, 0, 10, 10, 0.8, 2), (50, 50, 60, 60, 0.7, 1), (0, 0, 10, 9, 0.26, 1))
    same = match(expected, expected, 0.25)
    assert (same.expected, same.score, same.iou, same.missing, same.extra) == (4, 0, 1, (), ())
    found = rows((0, 0, 10, 8, 0.85, 1), (0, 0, 10, 10, 0.8, 3), (56, 50, 66, 60, 0.7, 1))
    other = match(found, expected, 0.25)
    assert other.iou == pytest.approx(0.8) and other.score == pytest.approx(0.05)
    assert other.missing == pytest.approx((0.55, 0.45, 0.01)) and other.extra == pytest.approx((0.55, 0.45))
    assert other.unmatched(TOLERANCES["fp16"]) == 4  # 0.26 is near enough to 0.25
    assert not other.within(TOLERANCES["int8"])


def test_no_detections_match_only_no_detections() -> None:
    nothing, one = rows(), rows((0, 0, 10, 10, 0.9, 1))
    assert match(nothing, nothing, 0.25).within(TOLERANCES["fp32"])
    assert not match(nothing, one, 0.25).within(TOLERANCES["int8"])
    assert not match(one, nothing, 0.25).within(TOLERANCES["int8"])


def test_the_coarser_precision_decides_the_tolerance() -> None:
    assert tolerance_of(("fp32", "int8")) == tolerance_of(("int8", "fp16")) == TOLERANCES["int8"]
    changed = tolerance_of(("fp32", "fp32"), parse_tolerance("worst=1e-2,score=.5"))
    assert (changed.worst, changed.score, changed.cosine) == (0.01, 0.5, TOLERANCES["fp32"].cosine)
    for text in ("worst", "worst=x", "reason=1", "worst=-1", "worst=nan", ""):
        with pytest.raises(DarktrtError, match="write NAME=NUMBER"):
            parse_tolerance(text)


# --- files ---


def saved(network: Made, path: Path, variant: Variant, **options: Any) -> Agreement:
    return compare([variant], images_of(network), save=path, **options)


def test_saved_results_are_as_good_as_a_run(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    portable = onnx_variant(made.cfg.parent / "portable.onnx")
    saved(made, tmp_path / "torch.json", torch_of(made), thresholds=LOOSE)
    saved(made, tmp_path / "onnx.json", portable, thresholds=LOOSE)
    assert files_in(tmp_path) == ["onnx.json", "torch.json"]
    loaded = [one for name in ("torch", "onnx") for one in load_results(tmp_path / f"{name}.json")]
    apart = compare([], [], loaded)
    together = compare([torch_of(made), portable], images_of(made), thresholds=LOOSE)
    assert apart.passed and apart.images == 3
    for a, b in zip(apart.variants, together.variants, strict=True):
        assert (a.tensors, a.detections) == (b.tensors, b.detections)
    mixed = compare([portable], images_of(made), loaded[:1], LOOSE)
    assert mixed.passed and mixed.variants[0].name == f"PyTorch in {tmp_path / 'torch.json'}"
    assert main(["check", "compare", *(f"--load-outputs={tmp_path / name}.json" for name in ("torch", "onnx"))]) == 0
    assert "detections: " in capsys.readouterr().out


def test_saved_results_are_polygraphys(made: Made, tmp_path: Path) -> None:
    from polygraphy.comparator import RunResults

    saved(made, tmp_path / "torch.json", torch_of(made))
    ((name, iterations),) = RunResults.load(str(tmp_path / "torch.json")).items()
    assert name == "PyTorch" and len(iterations) == 3
    assert {value.dtype.name for value in iterations[0].values()} == {"float32", "uint8"}
    again = run([torch_of(made)], images_of(made)[0], Thresholds(), layers=False)[0]
    assert relative_error(iterations[0]["head0_raw"], again["head0_raw"]) < 1e-6
    assert iterations[0][DETECTIONS].shape[1] == 6


def test_results_of_other_images_or_thresholds_or_without_layers_are_refused(made: Made, tmp_path: Path) -> None:
    saved(made, tmp_path / "torch.json", torch_of(made))
    loaded = load_results(tmp_path / "torch.json")
    portable, images = onnx_variant(made.cfg.parent / "portable.onnx", layers=True), images_of(made)
    with pytest.raises(DarktrtError, match=r"torch.json: is of 3 images, 2 of them among the others' 2"):
        compare([portable], images[:2], loaded)
    other = replace(images[0], pixels=255 - images[0].pixels)
    with pytest.raises(DarktrtError, match=r"torch.json: is of 3 images, 2 of them among the others' 3"):
        compare([portable], [other, *images[1:]], loaded)
    with pytest.raises(DarktrtError, match=r"was made with score threshold 0.25 .* not with score threshold 0.05"):
        compare([portable], images, loaded, LOOSE)
    with pytest.raises(DarktrtError, match=r"torch.json: has no layers that the reference has"):
        compare([portable], images, loaded, layers=True)


def test_of_saved_results_the_first_ones_are_the_reference(made: Made, tmp_path: Path) -> None:
    """The others are named where they differ from it."""
    saved(made, tmp_path / "a.json", torch_of(made))
    saved(made, tmp_path / "b.json", replace(torch_of(made), name="B"), thresholds=LOOSE)
    a, b = (load_results(tmp_path / f"{name}.json")[0] for name in "ab")
    for one, other, scores in ((a, b, ("0.05", "0.25")), (b, a, ("0.25", "0.05"))):
        said = f"{other.name}: was made with score threshold {scores[0]} .*, not with score threshold {scores[1]}"
        with pytest.raises(DarktrtError, match=said):
            compare([], [], [one, other])


def test_files_that_are_no_results_are_refused(made: Made, tmp_path: Path) -> None:
    saved(made, tmp_path / "torch.json", torch_of(made))
    text = (tmp_path / "torch.json").read_text()
    damages = ("", "[]", "{}", text[: len(text) // 2], text.replace('"darktrt"', '"other"'), text.replace("ndarray", "nothing"))
    for damage in damages:
        (tmp_path / "damaged.json").write_text(damage)
        with pytest.raises(DarktrtError, match=r"damaged\.json: (is damaged.*|has no results); make it by saving outputs$"):
            load_results(tmp_path / "damaged.json")
    with pytest.raises(DarktrtError, match="No such file or directory; make it by saving outputs"):
        load_results(tmp_path / "missing.json")


@pytest.fixture(scope="module")
def results(made: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of saved results."""
    path = tmp_path_factory.mktemp("results") / "torch.json"
    saved(made, path, torch_of(made))
    return path.read_text()


def base64_of(array: NDArray[Any], save: Callable[..., None] = np.save) -> str:
    file = io.BytesIO()
    save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def header_only(shape: str) -> str:
    """An array that declares numbers which are not there."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return base64.b64encode(b"\x93NUMPY\x01\x00\x76\x00" + text.encode()).decode()


DAMAGES: dict[str, tuple[str, str]] = {
    "an archive": (base64_of(np.zeros(9, np.float32), np.savez_compressed), "an array is damaged: .*magic string"),
    "4 TB that are not there": (header_only("(1099511627776,)"), "holds another number of bytes than it declares"),
    "a negative side": (header_only("(-1,)"), "a negative size"),
    "objects": (base64_of(np.array([{}], object)), "Object arrays cannot be loaded|another number of bytes"),
    "double": (base64_of(np.zeros(9)), r"'head0_raw' is \(9,\) float64"),
    "text": (base64_of(np.array(["a"])), r"'head0_raw' is \(1,\) <U1"),
    "nothing": (base64_of(np.zeros((0, 4), np.float32)), r"'head0_raw' is \(0, 4\)"),
    "no base64": ("%%%", "Only base64 data is allowed"),
    "no text": ("\u00e4", "only contain ASCII|ASCII"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_tensor_that_is_none_is_refused(case: str, results: str, tmp_path: Path) -> None:
    values = json.loads(results)
    text, message = DAMAGES[case]
    values["lst"][0][1][0]["outputs"]["head0_raw"]["values"]["array"] = text
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(DarktrtError, match=rf"a\.json: is damaged \(.*({message}).*; make it by saving outputs$"):
        load_results(tmp_path / "a.json")


@pytest.mark.parametrize(
    "rows",
    [np.zeros((2, 5)), np.zeros(6), np.full((1, 6), np.nan), np.full((1, 6), np.inf)],
    ids=["five", "flat", "nan", "inf"],
)
def test_detections_that_are_none_are_refused(rows: NDArray[Any], results: str, tmp_path: Path) -> None:
    values = json.loads(results)
    values["lst"][0][1][0]["outputs"][DETECTIONS]["values"]["array"] = base64_of(rows.astype(np.float32))
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(DarktrtError, match=r"a\.json: is damaged \('detections' are "):
        load_results(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("precision", "fp4", "the precision is 'fp4'"),
        ("score_threshold", 2.0, "the score threshold is 2"),
        ("score_threshold", "x", "'score_threshold' is 'x'"),
        ("digest", 3, "'digest' is 3"),
        ("info", {}, "is missing"),
    ],
)
def test_an_origin_that_is_none_is_refused(key: str, value: Any, message: str, results: str, tmp_path: Path) -> None:
    values = json.loads(results)
    place = values["lst"][0][1][1]["outputs"][METADATA_KEY]["values"]
    origin = json.loads(np.load(io.BytesIO(base64.b64decode(place["array"]))).tobytes())
    place["array"] = base64_of(np.frombuffer(json.dumps({**origin, key: value}).encode(), np.uint8))
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(DarktrtError, match=rf"a\.json: is damaged \(.*{message}"):
        load_results(tmp_path / "a.json")


def test_results_without_images_are_refused(results: str, tmp_path: Path) -> None:
    values = json.loads(results)
    for lst, message in (([], "has no results"), ([["PyTorch", []]], "has no images"), ([["PyTorch"]], "'lst' is")):
        (tmp_path / "a.json").write_text(json.dumps({**values, "lst": lst}))
        with pytest.raises(DarktrtError, match=message):
            load_results(tmp_path / "a.json")


def test_numbers_beyond_float32_are_null(results: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(results)
    (one,), (other,) = (load_results(tmp_path / "a.json") for _ in range(2))
    for loaded, score in ((one, 3e38), (other, -3e38)):
        for iteration in loaded.iterations.values():
            iteration[DETECTIONS] = rows((0, 0, 10, 10, score, 1))
    agreement = compare([], [], [one, replace(other, name="other")])
    assert not agreement.passed
    assert json.loads(agreement.to_json())["variants"][0]["detections"]["score"] is None


# --- mistakes ---


def test_mistakes_are_one_sentence(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sentence(*words: str) -> str:
        assert main(["check", "compare", *words]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("darktrt check compare: ")
        return error

    folder = made.cfg.parent
    portable, data = str(folder / "portable.onnx"), str(folder / "images")
    files = ["--cfg", str(made.cfg), "--weights", str(made.weights)]
    other = make(tmp_path, MADE_CFG + "# another\n", name="other")
    small = make(tmp_path, MADE_CFG.replace("width=96", "width=64"), name="small")
    assert "name two variants, or results to load" in sentence(data, "--model", portable)
    assert "name two variants, or results to load" in sentence(data)
    assert "no images to run" in sentence("--model", portable, "--model", str(made.plain))
    assert "go together" in sentence(data, "--cfg", str(made.cfg), "--model", portable)
    assert "--limit 0" in sentence(data, *files, "--model", portable, "--limit", "0")
    assert "nowhere: no such file or folder" in sentence("nowhere", *files, "--model", portable)
    assert "missing.onnx: cannot read" in sentence(data, *files, "--model", "missing.onnx")
    assert "missing.cfg: cannot read" in sentence(data, "--cfg", "missing.cfg", "--weights", "x", "--model", portable)
    assert "missing.json: cannot read" in sentence(data, "--plan", "missing.plan", "--model", portable)
    assert "is given twice" in sentence(data, "--model", portable, "--model", portable)
    assert "other.onnx: was made from another cfg file" in sentence(data, "--model", portable, "--model", str(other.plain))
    assert "another cfg file" in sentence(data, *files, "--model", str(small.plain))
    assert "its input is 96x64x3, that of PyTorch 32x32x3" in sentence(data, *files, "--model", portable, "--size", "32")
    assert "the score threshold is 2" in sentence(data, *files, "--model", portable, "--score-threshold", "2")
    assert "is given twice" in sentence(data, *files, "--model", portable, "--json", portable)
    assert "cannot write" in sentence(data, *files, "--model", portable, "--save-outputs", f"{tmp_path}/no/x.json")


def test_a_missing_gpu_is_reported(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DarktrtError, match="cannot use a GPU"):
        TorchReference(made.cfg, made.weights, device="cuda")


def test_an_interrupt_while_polygraphy_imports_libraries_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C would be lost, and the process would crash at its end with half of PyTorch."""
    import polygraphy.json

    def imports(_: object) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(polygraphy.json, "to_json", imports)
    runs._import_whole.cache_clear()
    with pytest.raises(KeyboardInterrupt), runs.quiet():
        pytest.fail("the work goes on")


# --- limits ---

LIMITS = {
    "fp32": (1e-4, 0.999999, 0.001, 0.0),
    "tf32": (0.03, 0.9998, 0.02, 0.02),
    "fp16": (0.03, 0.9998, 0.02, 0.02),
    "int8": (0.4, 0.97, 0.3, 0.25),
}
"""By precision: the worst error, the least cosine, the largest difference of scores, the share of unmatched detections."""


@pytest.mark.parametrize("precision", LIMITS)
def test_a_result_at_the_limits_is_within_them_and_one_beyond_is_not(precision: str) -> None:
    worst, cosine, score, share = LIMITS[precision]
    tolerance = tolerance_of((precision, "fp32"))
    assert TensorError(worst, 9.0, cosine).within(tolerance)
    assert not TensorError(worst * 1.001, 0, 1).within(tolerance)
    assert not TensorError(0, 0, cosine - 1e-7).within(tolerance)
    assert not TensorError(float("nan"), 0, 1).within(tolerance) and not TensorError(0, 0, float("nan")).within(tolerance)
    missing, extra = (0.5,) * round(100 * share), (0.9,) * round(100 * share)
    assert Matches(200, score, 0, missing, extra).within(tolerance)
    assert not Matches(200, score * 1.001, 1, (), ()).within(tolerance)
    assert not Matches(200, 0, 1, (*missing, 0.5), extra).within(tolerance)
    assert not Matches(200, 0, 1, missing, (*extra, 0.5)).within(tolerance)


def test_a_detection_near_the_threshold_may_be_missing() -> None:
    """The other one may lie just below it; a score that is no number is not near."""
    tolerance = tolerance_of(("fp16", "fp32"))
    assert Matches(0, 0, 1, (0.02, 0.0), (0.02,)).unmatched(tolerance) == 0
    assert Matches(0, 0, 1, (0.021,), (0.5, float("nan"))).unmatched(tolerance) == 3


def test_half_an_overlap_is_the_least() -> None:
    expected = rows((0, 0, 10, 10, 0.9, 1))
    for height, iou in ((5.0, 0.5), (4.9, None), (20.0, 0.5), (20.5, None)):
        (found,) = pair(rows((0, 0, 10, height, 0.9, 1)), expected)
        assert (found and found[1]) == (iou and pytest.approx(iou))


def test_the_best_expected_detection_chooses_first() -> None:
    """Of its class the free one that overlaps it most; the others are unpaired."""
    expected = rows((0, 0, 10, 10, 0.9, 1), (0, 0, 10, 10, 0.8, 1), (0, 0, 10, 10, 0.7, 1), (0, 0, 10, 10, 0.6, 2))
    actual = rows((0, 0, 10, 8, 0.5, 1), (90, 0, 99, 9, 0.5, 1), (0, 0, 10, 9, 0.4, 1), (0, 0, 10, 10, 0.3, 3))
    pairs = pair(actual, expected)
    assert pairs == [(2, pytest.approx(0.9)), (0, pytest.approx(0.8)), None, None]
    assert unpaired(pairs, 4) == [1, 3]
    assert pair(rows(), expected) == [None] * 4 and pair(actual, rows()) == []
    assert pair(rows((5, 5, 5, 5, 0.9, 1)), rows((5, 5, 5, 5, 0.9, 1))) == [None]  # without area


def test_the_measures_of_several_detections() -> None:
    """The largest difference of scores, the least IoU, and what is missing or extra by its distance from the threshold."""
    expected = rows((0, 0, 10, 10, 0.9, 1), (50, 0, 60, 10, 0.75, 1), (0, 50, 10, 60, 0.5, 1))
    found = match(rows((0, 0, 10, 9, 1.0, 1), (50, 0, 60, 8, 0.5, 1), (90, 90, 99, 99, 0.375, 1)), expected, 0.25)
    assert (found.expected, found.score, found.missing, found.extra) == (3, pytest.approx(0.25), (0.25,), (0.125,))
    assert found.iou == pytest.approx(0.8)


# --- the table ---


def errors(info: DetectorInfo, *worst: float) -> dict[str, TensorError]:
    """Of the first layers, in order."""
    names = dict.fromkeys(layer.tensor for layer in info.layers)
    return {name: TensorError(error, error / 4, 1 - error / 64) for name, error in zip(names, worst, strict=False)}


FP16 = tolerance_of(("fp32", "fp16"))


def agreement(made: Made, layers: bool, *variants: VariantAgreement) -> Agreement:
    return Agreement("PyTorch", "fp32", made.info, 3, variants, layers)


def test_the_table_marks_what_is_beyond_and_where_it_begins(made: Made) -> None:
    matches = Matches(12, 0.0312, 0.7654, (0.01, 0.5), (0.02,))
    variant = VariantAgreement("half", "fp16", FP16, errors(made.info, 0.001, 0.25, 0.002, 0.5), matches)
    table = agreement(made, True, variant).to_table().splitlines()
    lines = [layer.line for layer in made.info.layers]
    sections = len({layer.tensor for layer in made.info.layers})
    limits = f"worst 0.03, cosine 0.9998, score 0.02, unmatched 0.02 ({FP16.reason})"
    assert table[0] == "half (fp16) against PyTorch (fp32): made, 96x64, 3 images"
    width = len(table[2].partition("     0.001")[0])
    assert table[1] == f"{'':{width}}     worst      mean     cosine"
    assert table[2:6] == [
        f"{f'cfg line {lines[0]:4}  [convolutional] layer0':{width}}     0.001   0.00025  0.9999844",
        f"{f'cfg line {lines[1]:4}  [convolutional] layer1':{width}}      0.25     0.062  0.9960938  beyond, the first",
        f"{f'cfg line {lines[2]:4}  [route] layer2':{width}}     0.002    0.0005  0.9999687",
        f"{f'cfg line {lines[3]:4}  [convolutional] layer3':{width}}       0.5      0.12  0.9921875  beyond",
    ]
    assert table[6:] == [
        f"{sections - 4} more cfg sections have no tensor in both, as inside a node that computes several",
        "detections: 10 of 12 matched, 2 missing, 1 extra (2 of these near the threshold), "
        "largest score difference 0.031, least IoU 0.7654  beyond",
        f"cfg line {lines[1]}: max relative error 0.25, beyond the tolerance: {limits}",
    ]


def test_the_table_of_heads_alone(made: Made) -> None:
    """Within the tolerance; detections beyond it; nothing but detections. A blank line stands between variants."""
    good, bad = Matches(2, 0.001, 0.99, (), ()), Matches(2, 0.5, 0.99, (), ())
    heads = {"head0_raw": TensorError(0.001, 0.001, 1.0), "boxes": TensorError(0.01, 0.001, 1.0)}
    found = agreement(
        made,
        False,
        VariantAgreement("good", "fp16", FP16, heads, good),
        VariantAgreement("bad", "fp16", FP16, heads, bad),
        VariantAgreement("bare", "fp16", FP16, {}, bad),
        VariantAgreement("raw", "fp16", FP16, heads, None),
    )
    limits = f"worst 0.03, cosine 0.9998, score 0.02, unmatched 0.02 ({FP16.reason})"
    parts = [part.splitlines() for part in found.to_table().split("\n\n")]
    assert parts[0] == [
        "good (fp16) against PyTorch (fp32): made, 96x64, 3 images",
        "              worst      mean     cosine",
        "head0_raw     0.001     0.001  1.0000000",
        "boxes          0.01     0.001  1.0000000",
        "detections: 2 of 2 matched, 0 missing, 0 extra, largest score difference 0.001, least IoU 0.9900",
        f"within the tolerance: {limits}",
    ]
    assert parts[1][-1] == f"detections beyond the tolerance: {limits}" and parts[1][-2].endswith("least IoU 0.9900  beyond")
    assert len(parts[2]) == 3 and len(parts[3]) == 5
    assert [one.failures() for one in found.variants] == [[], [DETECTIONS], [DETECTIONS], []]
    assert not found.passed and replace(found, variants=found.variants[:1]).passed


def test_json_has_the_cfg_line_of_each_tensor(made: Made) -> None:
    """The first of several sections that pass one tensor on; null for what is of no section, or no number."""
    tensors = {**errors(made.info, 0.5), "boxes": TensorError(float("nan"), 0, 0)}
    text = agreement(made, True, VariantAgreement("half", "fp16", FP16, tensors, None)).to_json()
    assert text.startswith('{\n  "network": "made",\n') and text.endswith("\n}\n")
    values = json.loads(text)
    assert {name: values[name] for name in ("network", "reference", "images", "passed")} == {
        "network": "made", "reference": "PyTorch", "images": 3, "passed": False,
    }  # fmt: skip
    (one,) = values["variants"]
    assert one["tensors"] == [
        {"tensor": "layer0", "line": made.info.layers[0].line, "worst": 0.5, "mean": 0.125, "cosine": 1 - 0.5 / 64},
        {"tensor": "boxes", "line": None, "worst": None, "mean": 0, "cosine": 0},
    ]
    assert one["failures"] == ["layer0", "boxes"] and one["detections"] is None
    assert (one["name"], one["precision"], one["tolerance"]["worst"]) == ("half", "fp16", 0.03)


def test_several_images_are_one_error(made: Made, tmp_path: Path) -> None:
    """The worst, the mean of means and the least cosine; detections add up."""
    images, reference = images_of(made), torch_of(made)
    factors = iter((1.5, 1.25, 1.125))

    def louder(inputs: Any) -> Any:
        outputs, factor = reference.run(inputs), next(factors)
        return {**outputs, "head0_raw": outputs["head0_raw"] * np.float32(factor)}

    (one,) = compare([reference, replace(reference, name="louder", run=louder)], images, thresholds=LOOSE).variants
    error = one.tensors["head0_raw"]
    assert (error.worst, error.mean, error.cosine) == pytest.approx((0.5, (0.5 + 0.25 + 0.125) / 3, 1), abs=1e-6)
    expected = sum(len(run([reference], image, LOOSE, layers=False)[0][DETECTIONS]) for image in images)
    assert one.detections == Matches(expected, 0, 1, (), ())
