"""What serve doctor says of repositories: each thing that would go wrong on a server, in one sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MADE_CFG, Made, made_image, make
from PIL import Image
from test_repository import write_library, write_plan

from darktrt.cli import main
from darktrt.errors import DarktrtError
from darktrt.metadata import Thresholds
from darktrt.serve import doctor
from darktrt.serve.config import BACKENDS, OnnxRuntimeBackend, PythonBackend
from darktrt.serve.containers import NEWEST
from darktrt.serve.doctor import Finding, diagnose_repository
from darktrt.serve.program import Program
from darktrt.serve.repository import publish, read_config
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

pytest.importorskip("tritonclient", reason="config.pbtxt is made with Triton's protobuf: pip install 'darktrt[serve]'")


@pytest.fixture(scope="module")
def portable(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "portable.onnx"
    insert_plugins(made.plain, path, SurgeryOptions())
    return path


@pytest.fixture
def models(portable: Path, tmp_path: Path) -> Path:
    """A repository with one model of the Python kind, which is as it should be."""
    publish(portable, tmp_path / "models", PythonBackend(input="jpeg"), "made")
    return tmp_path / "models"


def bad(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.bad]


def test_what_is_right(models: Path, portable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(portable, models, OnnxRuntimeBackend(), "other")
    Image.fromarray(made_image(90, 120, 1)).save(tmp_path / "image.png")
    words = ["serve", "doctor", str(models), "--reference", str(portable), "--image", str(tmp_path / "image.png")]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" agrees ")[0] for line in lines] == [
        "ok  made/1: made, kind python, input jpeg, max_batch_size 3",
        "ok  made/1: a first inference",
        "ok  other/1: made, kind onnxruntime, input tensor, max_batch_size 0",
        "ok  other/1: a first inference",
        f"ok  shared memory: /dev/shm has {lines[-1].split()[5]} MB free, and a full batch in each instance takes 7 MB",
    ]


def test_a_model_that_computes_something_else(models: Path, portable: Path, tmp_path: Path) -> None:
    """The reference claims to be of the same sources; its last convolution is another."""
    model = onnx.load(str(portable))
    for constant in model.graph.initializer:
        if constant.data_type == onnx.TensorProto.FLOAT and len(constant.dims) == 1 and constant.dims[0] > 4:
            values = onnx.numpy_helper.to_array(constant)
            constant.CopyFrom(onnx.numpy_helper.from_array(values + np.float32(0.5), constant.name))
    onnx.save(model, str(tmp_path / "other.onnx"))
    (text,) = bad(diagnose_repository(models, tmp_path / "other.onnx"))
    assert text.startswith("a first inference differs from ONNX Runtime: ")


def test_a_reference_of_another_network_is_not_held_against_it(models: Path, tmp_path: Path) -> None:
    other = make(tmp_path, MADE_CFG, batch=(1, 3, 3), seed=2, name="plain")
    insert_plugins(other.plain, tmp_path / "other.onnx", SurgeryOptions())
    assert diagnose_repository(models, tmp_path / "other.onnx")[1].text.startswith("a first inference detects ")


def test_thresholds_that_surgery_fixed_are_those_of_the_comparison(made: Made, portable: Path, tmp_path: Path) -> None:
    """Others would find other objects, in the model or in the reference."""
    for name, fixed in (("high", Thresholds(0.3)), ("low", Thresholds(0.001)), ("overlap", Thresholds(0.001, 0.2))):
        insert_plugins(made.plain, tmp_path / f"{name}.onnx", SurgeryOptions(thresholds=fixed))
        publish(tmp_path / f"{name}.onnx", tmp_path / "models", OnnxRuntimeBackend(), name)
    publish(portable, tmp_path / "models", name="open")
    files = {name: tmp_path / f"{name}.onnx" for name in ("high", "low", "overlap")} | {"open": portable}
    for reference in files.values():
        assert not bad(diagnose_repository(tmp_path / "models", reference))
    texts = {finding.model: finding.text for finding in diagnose_repository(tmp_path / "models", files["low"])}
    assert texts["overlap/1"].endswith("objects; the reference has another IoU threshold and is not compared")
    for name in ("high/1", "low/1", "open/1"):
        assert texts[name].startswith("a first inference agrees with ONNX Runtime: ")


def change(path: Path, edit: Callable[[Any], object]) -> None:
    from google.protobuf import text_format

    config = read_config(path)
    edit(config)
    path.write_text(text_format.MessageToString(config))


def drop(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).unlink()


def edit(function: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda model: change(model / "config.pbtxt", function)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop("1/model.onnx"), "has neither model.plan nor model.onnx"),
        (drop("1/model.py"), "model.py is missing; write the model again"),
        (drop("1/darktrt.zip"), "darktrt.zip is missing"),
        (drop("labels.txt"), "labels.txt has 0 labels, not the 3 names"),
        (lambda model: (model / "labels.txt").write_text("a\nb\nc\n"), "labels.txt has 3 labels, not the 3 names"),
        (lambda model: shutil.rmtree(model / "1"), "has no version that Triton would load"),
        (lambda model: (model / "config.pbtxt").write_text("x"), "is no config of Triton"),
        (lambda model: (model / "config.pbtxt").write_text(""), "model '' has no darktrt metadata"),
        (lambda model: (model / "1/model.onnx").write_bytes(b"x"), "is no ONNX file, or a damaged one"),
        (
            edit(lambda config: config.input.pop()),
            r"score_threshold FP32 \[1\] optional, the model image STRING",
        ),
        (edit(lambda config: config.input[0].dims.append(2)), r"has the inputs image STRING \[1, 2\]"),
        (edit(lambda config: config.output[1].dims.__setitem__(0, 299)), r"has the outputs .* boxes FP32 \[299, 4\]"),
        (edit(lambda config: setattr(config, "max_batch_size", 0)), "has max_batch_size 0, but the model needs 3"),
        (edit(lambda config: setattr(config, "backend", "pytorch")), "backend is 'pytorch', not one of"),
    ],
    ids="onnx model.py zip labels names versions config empty damaged inputs dims outputs batch backend".split(),
)
def test_what_a_server_would_stumble_over(models: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(models / "made")
    found = bad(diagnose_repository(models))
    assert found
    with pytest.raises(DarktrtError, match=said):
        raise DarktrtError(" | ".join(found))
    assert main(["serve", "doctor", str(models)]) == 1


def test_a_model_of_another_network_than_its_config(models: Path, tmp_path: Path) -> None:
    other = make(tmp_path, MADE_CFG, batch=(1, 3, 3), seed=2, name="plain")
    insert_plugins(other.plain, tmp_path / "other.onnx", SurgeryOptions())
    shutil.copy(tmp_path / "other.onnx", models / "made/1/model.onnx")
    assert bad(diagnose_repository(models)) == [
        "config.pbtxt describes another network than the model's file; write the model again"
    ]


def test_one_bad_model_does_not_hide_the_others(models: Path, portable: Path) -> None:
    publish(portable, models, name="better")
    (models / "made/config.pbtxt").write_text("x")
    found = diagnose_repository(models)
    assert {finding.model for finding in found if finding.bad} == {"made"}
    assert {finding.model for finding in found if not finding.bad} == {"better/1", "shared memory"}


POOL = 1 << 20
IMAGE = 64 * 96 * 3
ANSWER = 2 * 4 + 4 + 300 * 6 * 4
"""The thresholds, the number of detections, and 300 boxes, scores and classes."""


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (PythonBackend(), POOL + 3 * (IMAGE + ANSWER)),
        (PythonBackend(instances=4), 4 * (POOL + 3 * (IMAGE + ANSWER))),
        (PythonBackend(instances=2, gpus=(0, 1, 3)), 6 * (POOL + 3 * (IMAGE + ANSWER))),
        (PythonBackend(max_batch=16), POOL + 16 * (IMAGE + ANSWER)),
        (PythonBackend(input="jpeg"), POOL + 3 * (2 * POOL + ANSWER)),
    ],
)
def test_a_full_batch_in_each_instance_fits_into_shared_memory(
    portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: PythonBackend, needed: int
) -> None:
    publish(portable, tmp_path / "models", options, "made")
    free = needed
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert diagnose_repository(tmp_path / "models")[-1] == Finding(
        "shared memory",
        f"/dev/shm has {free / 1e6:,.0f} MB free, and a full batch in each instance takes {needed / 1e6:,.0f} MB",
    )
    free = needed - 1
    found = diagnose_repository(tmp_path / "models")[-1]
    assert found.bad and found.text.endswith(
        "; make it larger, or write the models with fewer instances or a smaller max_batch"
    )


def test_images_of_any_size_need_the_room_of_the_usual_one(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.onnx"
    insert_plugins(made.plain, model, SurgeryOptions(input="image", image_sizes=((8, 8), (640, 480), (2000, 2000))))
    publish(model, tmp_path / "models", PythonBackend(max_batch=2), "made")
    needed = POOL + 2 * (640 * 480 * 3 + ANSWER)
    for free, bad in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert diagnose_repository(tmp_path / "models")[-1].bad == bad


def test_folders_that_keep_a_server_from_starting_are_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(models / "made", models / ".made.90ebb18a")
    (models / "lost+found").mkdir()
    (models / "of-others" / "1").mkdir(parents=True)
    (models / "readme.txt").touch()
    found = {finding.model: finding.text for finding in diagnose_repository(models) if finding.bad}
    assert found == {
        ".made.90ebb18a": "is a folder that Triton takes for a model, and may be left of a run that was killed; remove "
        f"{models}/.made.90ebb18a",
        "lost+found": "is a folder that Triton takes for a model, and has neither config.pbtxt nor a version; remove "
        f"{models}/lost+found",
    }
    assert main(["serve", "doctor", str(models)]) == 1
    assert "--  lost+found: is a folder" in capsys.readouterr().out


def test_what_a_killed_writer_left_beside_the_repository_is_named_and_harms_nothing(models: Path) -> None:
    (models.parent / ".models+made.darktrt-0").mkdir()
    first, *_ = diagnose_repository(models)
    assert str(first) == (
        "ok  .models+made.darktrt-0: was left of a run that was killed, and no server reads it; remove "
        f"{models.parent}/.models+made.darktrt-0"
    )
    assert main(["serve", "doctor", str(models)]) == 0


@pytest.fixture
def plans(made: Made, tmp_path: Path) -> Callable[..., Path]:
    """Writes a repository with a plan for Triton's own TensorRT."""

    def write(target: str, kind: str = "tensorrt_plan") -> Path:
        info = replace(made.info, head="nms", input="uint8", max_detections=20)
        plan = write_plan(tmp_path, info, ("MishPlugin:1",), target)
        library = write_library(tmp_path, "MishPlugin:1", target.split()[-1])
        return publish(plan, tmp_path / "models", BACKENDS[kind](), "made", plugins=library)

    return write


NO_GPU = "an engine runs on an NVIDIA GPU, and none is usable here"


def test_plans_by_their_tensorrt(plans: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "first_gpu", lambda: None)
    monkeypatch.setattr("darktrt.engine.runtime.find_target", lambda _: None)
    monkeypatch.setattr("darktrt.engine.runtime.first_gpu", lambda: None)
    model = plans("TensorRT 10.3.0")
    found = [finding.text for finding in diagnose_repository(model.parent)]
    image = "nvcr.io/nvidia/tritonserver:24.08-py3"
    assert found[1:3] == [f"the TensorRT of {image} loads plans of TensorRT 10.3.0", "plugins MishPlugin:1 are there"]
    assert NO_GPU in found[3] and len(found) == 4
    plans("TensorRT 8.6.0")
    first, second = bad(diagnose_repository(model.parent))
    assert first.startswith(f"no container up to {NEWEST} carries TensorRT 8.6.0; nearest is") and NO_GPU in second


def test_plans_for_another_gpu(plans: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "first_gpu", lambda: ("NVIDIA L4", 89))
    found = bad(diagnose_repository(plans("TensorRT 10.3.0").parent))
    assert found[0].startswith(
        "model.plan: built for NVIDIA H200, compute capability 9.0, here is NVIDIA L4, 8.9; build it again"
    )


def test_plugins_that_are_not_there(plans: Callable[..., Path], tmp_path: Path) -> None:
    model = plans("TensorRT 10.3.0")
    library = model / "1/libdarktrt_plugins.so"
    write_library(model / "1", "OtherPlugin:1", "10.3.0")
    assert "needs MishPlugin:1, which" in bad(diagnose_repository(model.parent))[0]
    write_library(model / "1", "MishPlugin:1", "8.6.1")
    assert "is for TensorRT 8.6.1, the plan is of TensorRT 10.3.0" in bad(diagnose_repository(model.parent))[0]
    library.unlink()
    assert "libdarktrt_plugins.so is missing; write the model again with it" in bad(diagnose_repository(model.parent))[0]


def test_a_plan_that_was_changed(plans: Callable[..., Path]) -> None:
    model = plans("TensorRT 10.3.0")
    (model / "1/model.plan").write_bytes(b"another")
    assert any("is not the plan that" in text for text in bad(diagnose_repository(model.parent)))


def test_a_server_whose_python_lacks_something(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tritonserver on PATH: its Python backend runs the python3 there."""
    monkeypatch.setattr(doctor, "program_on_path", lambda: Program("tritonserver"))
    fails = 'case "$2" in *onnxruntime*) echo "ModuleNotFoundError" >&2; exit 1;; esac'
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{fails}\n")
    (tmp_path / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert bad(diagnose_repository(models)) == [
        f"{tmp_path}/python3, which the server's Python backend uses, cannot import onnxruntime (ModuleNotFoundError)"
    ]
    (tmp_path / "python3").write_text("#!/bin/sh\n")
    assert f"{tmp_path}/python3 has numpy, onnxruntime, PIL" in [finding.text for finding in diagnose_repository(models)]
