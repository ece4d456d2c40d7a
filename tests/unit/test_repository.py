"""Model repositories: what is written for which kind, what config.pbtxt says, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Made, batch_of_images, files_in, made_image, run, thresholds

from darktrt.engine.manifest import Manifest, manifest_path
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import METADATA_KEY, DetectorInfo, Thresholds
from darktrt.plugins.library import _MARK
from darktrt.serve.config import (
    BACKENDS,
    BackendOptions,
    OnnxRuntimeBackend,
    PythonBackend,
    TensorRTBackend,
    make_config,
)
from darktrt.serve.repository import (
    PACKAGE,
    imported_modules,
    loaded_versions,
    model_info,
    models_of,
    modules_of,
    no_models,
    publish,
    read_config,
    unfinished_models,
    version_numbers,
)
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.images import decode_image
from darktrt.vision.native import library_path

pytest.importorskip("tritonclient", reason="config.pbtxt is made with Triton's protobuf: pip install 'darktrt[serve]'")

GOLDEN = Path(__file__).parent / "golden"
COMPILED = [path.name] if (path := library_path()) else []
"""The compiled resize, where this checkout has it."""


@pytest.fixture(scope="module")
def portable(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "portable.onnx"
    insert_plugins(made.plain, path, SurgeryOptions(max_detections=50))
    return path


@pytest.fixture(scope="module")
def info(portable: Path) -> DetectorInfo:
    """Of the portable model: uint8, 96 x 64, batch 1 to 3, thresholds as inputs."""
    return DetectorInfo.from_json(onnx.load(str(portable)).metadata_props[0].value, "portable")


def write_plan(
    folder: Path, info: DetectorInfo, plugins: tuple[str, ...] = (), target: str = "TensorRT 8.6.1", **more: Any
) -> Path:
    plan = folder / "fp16.plan"
    plan.write_bytes(b"plan")
    manifest = Manifest(
        sha256_of(plan), "0" * 64, target, "NVIDIA H200", "fp16", plugins, 1.0, info, compute_capability=90, **more
    )
    manifest_path(plan).write_text(manifest.to_json())
    return plan


def write_library(folder: Path, plugins: str, tensorrt: str = "8.6.1") -> Path:
    facts = {"darktrt": "0.1.0", "tensorrt": tensorrt, "sms": "80 90", "plugins": plugins}
    path = folder / "libdarktrt_plugins.so"
    path.write_bytes(b"\x7fELF" + _MARK + json.dumps(facts).encode() + b"\0")
    return path


# --- config.pbtxt ---

FIXED = (0.5, 0.4)
IMAGE = {"input": "image", "image_sizes": ((40, 30), (640, 480), (2000, 1000))}
GOLDENS: dict[str, tuple[BackendOptions, dict[str, Any]]] = {
    "python": (PythonBackend(delay=100, preferred=(2,), score_threshold=0.3), {}),
    "python-jpeg": (PythonBackend(input="jpeg", instances=2, cache=True, versions=0), {}),
    "python-letterbox": (
        PythonBackend(gpus=(0, 1), cuda_graph=True, warmup=False),
        {"resize": "letterbox", "input": "float", "batch": (4, 4, 4)},
    ),
    "tensorrt-plan": (TensorRTBackend(gpus=(0,)), {}),
    "tensorrt-plan-fixed": (
        TensorRTBackend(gpus=(0, 1), instances=2, delay=200, preferred=(2,), cuda_graph=True, versions=2),
        {"fixed_thresholds": FIXED},
    ),
    "onnxruntime": (OnnxRuntimeBackend(), {"batch": (2, 2, 2)}),
    "onnxruntime-fixed": (OnnxRuntimeBackend(max_batch=2), {"fixed_thresholds": FIXED}),
    "python-image": (PythonBackend(), IMAGE),
    "python-image-jpeg": (PythonBackend(input="jpeg"), IMAGE),
    "tensorrt-plan-image": (TensorRTBackend(gpus=(0,)), IMAGE),
    "onnxruntime-image-fixed": (OnnxRuntimeBackend(preferred=(2,)), {**IMAGE, "fixed_thresholds": FIXED}),
    "onnxruntime-one": (OnnxRuntimeBackend(), {"fixed_thresholds": FIXED, "batch": (1, 1, 1)}),
}
"""By the name of the golden file: options, and what the network is otherwise than the made one."""


@pytest.mark.parametrize("name", GOLDENS)
def test_config_is_the_golden_one(info: DetectorInfo, name: str) -> None:
    """The files were read by a person against Triton's documents; the metadata, which is tested elsewhere, is left out."""
    from google.protobuf import text_format

    options, changes = GOLDENS[name]
    config = make_config("made", replace(info, **changes), options)
    assert model_info(config, "config").info == replace(info, **changes, layers=())
    config.parameters[METADATA_KEY].string_value = "metadata"
    assert text_format.MessageToString(config) == (GOLDEN / f"{name}.pbtxt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"instances": 0}, {}, "instances is 0; it must be 1 or more"),
        ({"delay": -1}, {}, "delay is -1; it must be 0 or more"),
        ({"versions": -1}, {}, "versions is -1; it must be 0 or more"),
        ({"score_threshold": 1.5}, {}, "score threshold is 1.5"),
        ({}, {"head": "decode"}, "ends at 'decode'; to serve it"),
        ({"kind": "onnxruntime", "preferred": (2,)}, {}, "cannot batch it .* surgery --thresholds"),
        ({"kind": "tensorrt_plan", "max_batch": 4}, {"fixed_thresholds": FIXED}, "batches of 1 to 3, not of 4"),
        ({"max_batch": 0}, {}, "batches of 1 to 3, not of 0"),
        (
            {"kind": "tensorrt_plan", "delay": 9},
            {"fixed_thresholds": FIXED, "batch": (1, 1, 1)},
            "cannot batch it .* --batch 1..8",
        ),
        ({"kind": "tensorrt_plan", "cuda_graph": True}, IMAGE, "records no CUDA graphs for images that differ in size"),
        ({"preferred": (1, 5)}, {}, "preferred batch of 5 is not between 1 and the largest, 3"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_configs_that_cannot_be(info: DetectorInfo, options: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DarktrtError, match=said):
        make_config("made", replace(info, **changes), BACKENDS[options.pop("kind", "python")](**options))


def test_the_python_kind_may_batch_more_than_the_model_takes(info: DetectorInfo) -> None:
    assert make_config("made", info, PythonBackend(max_batch=16)).max_batch_size == 16


def test_what_is_just_allowed(info: DetectorInfo) -> None:
    """The largest batch of the model, and batches that do not wait, of one image and of the largest batch."""
    fixed = replace(info, fixed_thresholds=FIXED)
    config = make_config("made", fixed, TensorRTBackend(max_batch=3, preferred=(1, 3)))
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (3, [1, 3])
    assert make_config("made", info, PythonBackend(max_batch=1)).max_batch_size == 1
    with pytest.raises(DarktrtError, match="preferred batch of 0 is not between 1 and the largest, 3"):
        make_config("made", info, PythonBackend(preferred=(0,)))


def test_a_batch_that_begins_above_one_is_the_clients_own(info: DetectorInfo) -> None:
    """Triton's backends would run one image alone."""
    config = make_config("made", replace(info, fixed_thresholds=FIXED, batch=(2, 3, 4)), OnnxRuntimeBackend())
    assert config.max_batch_size == 0 and list(config.input[0].dims) == [-1, 64, 96, 3]


# --- folders ---


def test_the_files_of_the_python_backend(portable: Path, info: DetectorInfo, tmp_path: Path) -> None:
    folder = publish(portable, tmp_path / "repository", PythonBackend(input="jpeg"), name="photos")
    assert files_in(tmp_path) == [
        "repository",
        "repository/photos",
        "repository/photos/1",
        "repository/photos/1/darktrt.zip",
        *(f"repository/photos/1/{name}" for name in COMPILED),
        "repository/photos/1/model.onnx",
        "repository/photos/1/model.py",
        "repository/photos/config.pbtxt",
        "repository/photos/labels.txt",
        "repository/photos/warmup",
        "repository/photos/warmup/image",
    ]
    assert (folder / "1/model.onnx").read_bytes() == portable.read_bytes()
    assert tuple((folder / "labels.txt").read_text().split("\n")[:-1]) == info.class_names
    config = read_config(folder / "config.pbtxt")
    assert (config.name, config.backend, model_info(config, folder).info) == ("photos", "python", replace(info, layers=()))
    image = (folder / "warmup/image").read_bytes()
    assert int.from_bytes(image[:4], "little") == len(image) - 4 and image[4:8] == b"\x89PNG"
    assert decode_image(image[4:], "warmup", 10**6).shape == (64, 96, 3)


def test_modules_in_the_zip_run_alone(portable: Path, tmp_path: Path) -> None:
    """With numpy, pillow and onnxruntime, as on a server; and nothing is taken along that is not needed."""
    folder = publish(portable, tmp_path, PythonBackend(warmup=False), name="made") / "1"
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
exec(open({str(folder / "model.py")!r}).read().replace("__file__", repr({str(folder / "model.py")!r})))
import numpy as np, darktrt.vision.boxes, darktrt.vision.images
from pathlib import Path
from darktrt.metadata import DetectorInfo
from darktrt.metadata import Thresholds
from darktrt.serve.backend import make_runner
from darktrt.serve.rows import Row, RowRunner
runner = make_runner(Path({str(folder)!r}), 1)
print(darktrt.vision.images.compiled_fit() is not None)
print(RowRunner(runner).run([Row(np.zeros((64, 96, 3), np.uint8), Thresholds())])[0].outputs["boxes"].shape)
print(*sorted(name for name, module in sys.modules.items() if "darktrt.zip" in str(getattr(module, "__file__", ""))))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled, shape, loaded = done.stdout.splitlines()
    assert compiled == str(bool(COMPILED))
    assert shape == "(1, 50, 4)"
    with zipfile.ZipFile(folder / "darktrt.zip") as file:
        taken = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in file.namelist()}
    assert set(loaded.split()) <= taken and "darktrt.engine.runtime" in taken
    assert all(name.startswith("darktrt") for name in taken)
    assert {name.rpartition(".")[0] for name in taken} - {""} <= taken, "each package itself"
    assert not {name.split(".")[1] for name in taken if "." in name} & {"convert", "surgery", "check", "cli"}


def test_an_installed_darktrt_takes_only_its_own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it in site-packages lie other packages, and none of the modules are links."""
    expected = [path.relative_to(PACKAGE.parent) for path in modules_of("darktrt.serve.backend")]
    site = tmp_path / "site-packages"
    shutil.copytree(PACKAGE, site / "darktrt", ignore=shutil.ignore_patterns("__pycache__", "csrc", "cli"))
    for name in ("numpy", "onnxruntime", "google/protobuf"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
    monkeypatch.setattr("darktrt.serve.repository.PACKAGE", site / "darktrt")
    assert [path.relative_to(site) for path in modules_of("darktrt.serve.backend")] == expected


def test_imports_that_run_are_followed(tmp_path: Path) -> None:
    """In functions too, and not those for type checkers."""
    (tmp_path / "module.py").write_text(
        "import numpy, darktrt.files\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from darktrt.check import runs\nelse:\n    import darktrt.cuda\n"
        "def late():\n    from darktrt.vision import boxes\n"
        "def dynamic(name):\n    return __import__('importlib').import_module('darktrt.surgery')\n"
    )
    names = ["darktrt.files", "darktrt.cuda", "darktrt.vision", "darktrt.vision.boxes"]
    assert imported_modules(tmp_path / "module.py") == names


def test_the_same_modules_give_the_same_file(portable: Path, tmp_path: Path) -> None:
    first, second = (publish(portable, tmp_path, name=name) / "1/darktrt.zip" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_onnx_for_tritons_own_backend_has_no_functions(portable: Path, info: DetectorInfo, tmp_path: Path) -> None:
    folder = publish(portable, tmp_path, OnnxRuntimeBackend())
    model = onnx.load(str(folder / "1/model.onnx"))
    assert not model.functions and {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    inputs = {"images": batch_of_images(info, 2), **thresholds(0.01)}
    found, expected = run(folder / "1/model.onnx", inputs), run(portable, inputs)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-4)
    assert files_in(folder / "1") == ["model.onnx"]


def test_onnx_for_tritons_own_backend_takes_images_of_any_size(made: Made, tmp_path: Path) -> None:
    """And boxes are in pixels of the image, with standard ops alone."""
    path = tmp_path / "image.onnx"
    insert_plugins(made.plain, path, SurgeryOptions(input="image", max_detections=50))
    folder = publish(path, tmp_path / "repository", OnnxRuntimeBackend(), "cameras")
    model = onnx.load(str(folder / "1/model.onnx"))
    assert not model.functions and {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    image = made_image(150, 210, 1)
    found = run(folder / "1/model.onnx", {"images": image[None], **thresholds(0.05)})
    with OnnxRunner(path) as runner:
        expected = NetworkDetector(runner.run, runner.info, 0.05).detect([image])[0]
    assert len(expected) > 3 and found["num_detections"].item() == len(expected)
    np.testing.assert_allclose(found["boxes"][0, : len(expected)], expected.boxes, atol=1e-3)


def test_thresholds_that_surgery_fixed(made: Made, portable: Path, info: DetectorInfo, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.onnx"
    insert_plugins(made.plain, fixed, SurgeryOptions(max_detections=50, thresholds=Thresholds(0.01, 0.3)))
    folder = publish(fixed, tmp_path / "repository", OnnxRuntimeBackend())
    config = read_config(folder / "config.pbtxt")
    assert ([tensor.name for tensor in config.input], config.max_batch_size) == (["images"], 3)
    images = {"images": batch_of_images(info, 3)}
    found, expected = run(folder / "1/model.onnx", images), run(portable, {**images, **thresholds(0.01, 0.3)})
    assert expected["num_detections"].min() > 0
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-4)


def test_what_a_plan_gets(info: DetectorInfo, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, info, ("MishPlugin:1",))
    library = write_library(tmp_path, "MishPlugin:1 YoloDetectPlugin:1")
    for kind, more in (("tensorrt_plan", []), ("python", ["darktrt.zip", "model.py", *COMPILED])):
        options = BACKENDS[kind](gpus=(1,))
        folder = publish(plan, tmp_path / "repository", options, kind, plugins=library)
        assert files_in(folder / "1") == sorted(["model.json", "model.plan", library.name, *more])
        assert (folder / "1/model.json").read_text() == manifest_path(plan).read_text()
        group = read_config(folder / "config.pbtxt").instance_group[0]
        assert (group.kind, list(group.gpus)) == (group.KIND_GPU, [1])


def test_versions_are_counted_from_one(portable: Path, tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match="version 0: Triton counts versions from 1") as caught:
        publish(portable, tmp_path / "repository", version=0)
    assert caught.value.argument == "version" and files_in(tmp_path) == []


def test_a_plan_runs_on_the_first_gpu_where_none_is_named(info: DetectorInfo, tmp_path: Path) -> None:
    folder = publish(write_plan(tmp_path, info), tmp_path / "repository")
    assert list(read_config(folder / "config.pbtxt").instance_group[0].gpus) == [0]


def test_versions(portable: Path, info: DetectorInfo, tmp_path: Path) -> None:
    options = PythonBackend(versions=2)
    for version in (1, 2, 3, 10):
        folder = publish(portable, tmp_path, options, "made", version)
    assert loaded_versions(folder, read_config(folder / "config.pbtxt")) == [3, 10]
    (folder / "2/model.onnx").write_bytes(b"changed")
    publish(portable, tmp_path, PythonBackend(versions=0), "made", 2)
    assert (folder / "2/model.onnx").read_bytes() == portable.read_bytes()
    assert loaded_versions(folder, read_config(folder / "config.pbtxt")) == [1, 2, 3, 10]
    with pytest.raises(DarktrtError, match="version 1 has other inputs or outputs"):
        publish(portable, tmp_path, PythonBackend(input="jpeg"), "made", 2)
    assert [path.name for path in models_of(tmp_path)] == ["made"] and files_in(tmp_path)[0] == "made"


def test_models_of_other_classes_stand_side_by_side(made: Made, portable: Path, info: DetectorInfo, tmp_path: Path) -> None:
    other = write_plan(
        tmp_path, replace(info, heads=tuple(replace(head, classes=2) for head in info.heads), class_names=("a", "b"))
    )
    publish(portable, tmp_path / "repository", name="one")
    publish(other, tmp_path / "repository", name="two")
    infos = [model_info(read_config(folder / "config.pbtxt"), folder).info for folder in models_of(tmp_path / "repository")]
    assert [len(one.class_names) for one in infos] == [3, 2]


WRONG_NAMES = ["", "a/b", ".hidden", "-v", "a b", "a\nb", "a\n", "a\x1b[2J", "a?b", "a#b", "a%2fb", "a+b", "größe", "a" * 101]


@pytest.mark.parametrize(
    ("source", "options", "name", "said"),
    [
        ("fp16.plan", {"kind": "onnxruntime"}, None, "the backend onnxruntime runs files that end in .onnx"),
        ("portable.onnx", {"kind": "tensorrt_plan"}, None, "the backend tensorrt runs files that end in .plan .engine"),
        ("missing.onnx", {}, None, "cannot read"),
        ("missing.plan", {}, None, "cannot read: No such file"),
        *(("portable.onnx", {}, name, "cannot be a model's name") for name in WRONG_NAMES),
        ("plugins.plan", {}, None, "needs plugins; compile their library with 'darktrt plugins --tensorrt 8.6.1'"),
    ],
)
def test_sources_and_names_that_are_refused(
    portable: Path,
    info: DetectorInfo,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    options: dict[str, Any],
    name: str | None,
    said: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("DARKTRT_PLUGINS", raising=False)
    os.link(portable, folder / "portable.onnx")
    write_plan(folder, info, ("MishPlugin:1",)).rename("plugins.plan")
    Path("fp16.json").rename("plugins.json")
    write_plan(folder, info)
    before = files_in(folder)
    with pytest.raises(DarktrtError, match=said) as caught:
        publish(source, folder / "repository", BACKENDS[options.pop("kind", "python")](**options), name)
    assert str(caught.value).isprintable()
    assert files_in(folder) == before


@pytest.mark.parametrize("name", ["7", "Yolo_v4-tiny.2", "a" * 100])
def test_names_of_models(portable: Path, tmp_path: Path, name: str) -> None:
    assert publish(portable, tmp_path / "repository", name=name) == tmp_path / "repository" / name


def test_a_repository_that_models_cannot_be_moved_into(portable: Path) -> None:
    with pytest.raises(DarktrtError, match=r"/dev/shm: is the root of a file system; .* name a folder inside this one"):
        publish(portable, "/dev/shm", name="made")


def test_a_folder_that_is_no_model_stays(portable: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/precious").touch()
    with pytest.raises(DarktrtError, match="exists already and is no model of Triton"):
        publish(portable, tmp_path, name="made")
    assert files_in(tmp_path) == ["made", "made/precious"]


def test_what_fails_half_way_leaves_the_old_model(portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(portable, tmp_path, name="made")
    before = {name: (tmp_path / name).stat().st_ino for name in files_in(tmp_path)}
    monkeypatch.setattr(
        "darktrt.serve.repository._write_beside", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(DarktrtError, match="No space left on device; nothing was kept"):
        publish(portable, tmp_path, name="made")
    assert {name: (tmp_path / name).stat().st_ino for name in files_in(tmp_path)} == before


KILLED = """
import os, signal, sys
from darktrt.serve import repository
setattr(repository, sys.argv[4], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
repository.publish(sys.argv[1], sys.argv[2], name=sys.argv[3])
"""


@pytest.mark.parametrize("moment", ["_link_versions", "_write_beside"])
@pytest.mark.parametrize("name", ["made", "other"])
def test_a_writer_that_is_killed_leaves_nothing_that_a_server_reads(
    portable: Path, tmp_path: Path, name: str, moment: str
) -> None:
    """Triton takes each folder of a repository for a model, hidden ones too, so that unfinished ones lie beside it."""
    repository = tmp_path / "models"
    publish(portable, repository, name="made")
    before = {file: (repository / file).stat().st_ino for file in files_in(repository)}
    words = [sys.executable, "-c", KILLED, str(portable), str(repository), name, moment]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert {file: (repository / file).stat().st_ino for file in files_in(repository)} == before
    (left,) = unfinished_models(repository)
    assert {path.name for path in tmp_path.iterdir()} == {"models", left.name}
    publish(portable, repository, name=name, version=2)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    assert version_numbers(repository / name) == ([1, 2] if name == "made" else [2])
    assert no_models(repository) == []


def test_what_a_writer_at_work_has_is_not_left_over(portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    monkeypatch.setattr("darktrt.serve.repository._write_beside", lambda *_: seen.append(unfinished_models(tmp_path / "a")))
    publish(portable, tmp_path / "a", name="made")
    assert seen == [[]]


def test_unfinished_models_are_of_their_own_repository(portable: Path, tmp_path: Path) -> None:
    """Whatever the names of repositories that lie side by side; links are followed."""
    for name in ("a", "a+b", "[a]"):
        publish(portable, tmp_path / name, name="made")
        (tmp_path / f".{name}+made.darktrt-3").mkdir()
    (tmp_path / "link").symlink_to("[a]")
    assert [path.name for path in unfinished_models(tmp_path / "a")] == [".a+made.darktrt-3"]
    assert [path.name for path in unfinished_models(tmp_path / "link")] == [".[a]+made.darktrt-3"]
    publish(portable, tmp_path / "link", name="made")
    assert unfinished_models(tmp_path / "link") == []
    assert len(unfinished_models(tmp_path / "a+b")) == 1


def test_only_numbers_are_versions(tmp_path: Path) -> None:
    for name in ("1", "12", "02", "1²", "3x", "1٣", "warmup", "9" * 30):
        (tmp_path / name).mkdir()
    (tmp_path / "4").touch()
    assert version_numbers(tmp_path) == [1, 12]


@pytest.mark.parametrize(
    ("text", "said"), [("max_batch_size: many", "is no config of Triton"), ("name: 'x'", "model 'x' has no darktrt metadata")]
)
def test_configs_of_others(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.pbtxt").write_text(text)
    with pytest.raises(DarktrtError, match=said):
        model_info(read_config(tmp_path / "config.pbtxt"), tmp_path)


def test_folders_that_are_no_repository(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match="has no models"):
        models_of(tmp_path)
    with pytest.raises(DarktrtError, match="no such folder"):
        models_of(tmp_path / "missing")
