"""The wheel as a user meets it: in a bare environment, in a folder whose own modules have the names of darktrt's rooms, with no
checkout on any path, from cfg and weights to a real Triton server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from helpers import ROOT, SHARED, files_in, free_ports
from kernels import has_compiler
from packaging.requirements import Requirement

HERE = Path(__file__).parent
HIS_OWN = ("engine.py", "serve.py", "cli.py", "gpu.py", "convert.py", "plugins.py", "vision/__init__.py", "check/__init__.py")
NEEDS_WEIGHTS = pytest.mark.skipif(
    not (SHARED / "zoo/yolov4-tiny.weights").is_file() and "DARKTRT_ZOO" not in os.environ,
    reason="needs the weights of yolov4-tiny in shared/ or DARKTRT_ZOO",
)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, as ``make wheel`` builds them, without a change of this environment."""
    folder = tmp_path_factory.mktemp("dist")
    command = ["make", "--no-print-directory", f"--old-file={sys.prefix}/.installed-dev"]
    command += ["wheel", f"DIST={folder}", f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    (found,) = distributions.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.partition("/")[0] for name in names} == {"darktrt", f"darktrt-{wheel.name.split('-')[1]}.dist-info"}
    for name in (
        "py.typed",
        "convert/data/coco.names",
        "check/templates/page.html",
        "selftest/data/selftest.onnx",
        "selftest/data/selftest.outputs.json",
        "plugins/csrc/Makefile",
        "serve/requirements/server.txt",
    ):
        assert f"darktrt/{name}" in names
    sources = {path.relative_to(ROOT / "darktrt").as_posix() for room in ROOT.glob("darktrt/*") for path in room.rglob("*.py")}
    packaged = {name.removeprefix("darktrt/") for name in names if name.endswith(".py")}
    assert sources <= packaged
    assert ("darktrt/vision/libdarktrt_fit.so" in names) == has_compiler()
    assert wheel.name.partition("-py3-none-linux_")[2]
    csrc = {
        path.name for path in (ROOT / "plugins/csrc").rglob("*") if path.suffix in (".h", ".cu", ".cpp", ".sh", ".map", ".txt")
    }
    assert csrc <= {name.rpartition("/")[2] for name in names}


NUMPY_DOES_IT = """
import numpy as np
from darktrt.vision import images, native
print(native.__file__)
print(native.library_path(), images.preprocess(np.full((9, 9, 3), 51, np.uint8), 4, 5, 3, "stretch", "uint8")[0].mean())
"""


def test_a_machine_without_a_compiler(distributions: Path, wheel: Path, tmp_path: Path) -> None:
    """The sdist gives it what the wheel has but for the compiled resize, for which NumPy stands in."""
    (sdist,) = distributions.glob("*.tar.gz")
    without = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "LDSHARED", "LDCXXSHARED")}
    without["PATH"] = str(tmp_path)
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(sdist)]
    done = subprocess.run(words, env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(wheel) as file:
        packaged = {name for name in file.namelist() if name.startswith("darktrt/") and not name.endswith(".so")}
    assert packaged <= set(files_in(tmp_path / "site"))
    path = {**without, "PYTHONPATH": str(tmp_path / "site")}
    code = [sys.executable, "-c", NUMPY_DOES_IT]
    printed = subprocess.run(code, env=path, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [str(tmp_path / "site/darktrt/vision/native.py"), "None 51.0"]


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a bare environment with the wheel and its extras ``rtx`` and ``serve``.

    What these need is linked from this environment, and nothing more; pip finds it complete without an index."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    link_distributions(required_by(wheel, {"rtx", "serve"}), next(folder.glob("lib/python*/site-packages")))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    command += ["-c", str(ROOT / "constraints.txt"), f"{wheel}[rtx,serve]"]
    done = subprocess.run(command, env=environment(python), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


def required_by(wheel: Path, extras: set[str]) -> dict[str, Distribution]:
    """The installed distributions that a wheel with these extras needs, and those that they need, by name."""
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        stated = message_from_bytes(file.read(metadata)).get_all("Requires-Dist", [])
    found: dict[str, Distribution] = {}
    done, rest = set(), [(text, extras) for text in stated]
    while rest:
        text, extras = rest.pop()
        requirement = Requirement(text)
        needed = not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if not needed or (key := (requirement.name, *sorted(requirement.extras))) in done:
            continue
        done.add(key)
        found[requirement.name] = one = distribution(requirement.name)
        rest += [(text, requirement.extras) for text in one.requires or ()]
    return found


def link_distributions(distributions: dict[str, Distribution], site: Path) -> None:
    """Link their packages into ``site``, and each file that is in none."""
    links: dict[str, Path] = {}
    for one in distributions.values():
        files = [file for file in one.files or () if ".." not in file.parts]
        packages = {file.parts[0] for file in files if len(file.parts) == 2 and file.name == "__init__.py"}
        links |= {name: Path(str(one.locate_file(name))) for name in packages}
        links |= {str(file): Path(str(file.locate())) for file in files if file.parts[0] not in packages}
    for name, source in links.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).symlink_to(source)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: his own modules, which no part of darktrt may import, and his images."""
    folder = tmp_path_factory.mktemp("project")
    for name in HIS_OWN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'raise RuntimeError("{name} of the user was imported")\n')
    (folder / "images").mkdir()
    shutil.copy(ROOT / "docs/astronaut.jpg", folder / "dog.jpg")
    for name in ("astronaut.jpg", "astronaut.txt"):
        shutil.copy(ROOT / "docs" / name, folder / "images")
    shutil.copy(HERE / "his_program.py", folder)
    return folder


def environment(python: Path) -> dict[str, str]:
    """Without anything that leads to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "MAKE"))}
    kept["PATH"] = f"{python.parent}:{kept['PATH']}"
    if "DARKTRT_ZOO" not in kept and (SHARED / "zoo").is_dir():
        kept["DARKTRT_ZOO"] = str(SHARED / "zoo")
    return kept


def run(python: Path, project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=project, env=environment(python), capture_output=True, text=True, check=False, timeout=900)


def darktrt(python: Path, project: Path, command: str) -> str:
    """What ``darktrt`` prints; it ends well and tells nobody to run make."""
    done = run(python, project, "darktrt", *command.split())
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert not re.search(r"\bmake [a-z]+", done.stdout + done.stderr), done.stdout + done.stderr
    return done.stdout


def test_importing_it_takes_no_time(python: Path, project: Path) -> None:
    code = "import sys, time; start = time.process_time(); import darktrt; print(time.process_time() - start, *sys.modules)"
    seconds, modules = [], ""
    for _ in range(3):
        done = run(python, project, str(python), "-c", code)
        assert done.returncode == 0, done.stderr
        first, _, modules = done.stdout.partition(" ")
        seconds.append(float(first))
    assert min(seconds) < 0.05
    assert not {"torch", "numpy", "onnx", "PIL"} & set(modules.split())


def test_every_public_name_loads_and_has_a_docstring(python: Path, project: Path) -> None:
    code = "import darktrt; print(*[n for n in darktrt.__all__ if n != '__version__' and not getattr(darktrt, n).__doc__])"
    done = run(python, project, str(python), "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


STAGES = (
    "fetch yolov4-tiny -o networks",
    "convert networks/yolov4-tiny.cfg networks/yolov4-tiny.weights -o plain.onnx --size 416",
    "surgery plain.onnx -o portable.onnx",
    "calib run portable.onnx images -o calibration.calib --bias-images 1 --fp-layer-images 1",
    "engine portable.onnx -o int8.plan --precision int8 --calibration calibration.calib",
    "detect dog.jpg --model portable.onnx -o detected.jpg",
    "check report images --cfg networks/yolov4-tiny.cfg --weights networks/yolov4-tiny.weights --model ONNX=portable.onnx "
    "--simulate fp16 -o report --compare-images 1 --sensitivity-images 0 --show-images 1",
    "inspect int8.plan",
    "doctor",
    "serve repository portable.onnx -o repository",
)


@pytest.fixture(scope="session")
def outputs(python: Path, project: Path) -> dict[str, str]:
    """What each stage prints, run in order."""
    return {command: darktrt(python, project, command) for command in STAGES}


@pytest.mark.skipif(not has_compiler(), reason="needs make and a C++ compiler")
def test_the_compiled_resize_is_used(python: Path, project: Path) -> None:
    (line,) = [line for line in darktrt(python, project, "doctor").splitlines() if "compiled resize" in line]
    assert line.startswith("ok  ") and Path(line.split()[-1]).is_relative_to(python.parent.parent)


@NEEDS_WEIGHTS
def test_every_stage(outputs: dict[str, str], project: Path) -> None:
    assert "person" in outputs[STAGES[5]]
    assert (project / "report/index.html").stat().st_size > 10_000
    assert (project / "int8.plan").stat().st_size > 1_000_000
    modules = zipfile.ZipFile(next((project / "repository").rglob("darktrt.zip"))).namelist()
    assert all(name.startswith("darktrt/") for name in modules)


@contextmanager
def server_of(python: Path, project: Path) -> Iterator[str]:
    """The gRPC address of ``darktrt serve start``, until the block ends."""
    http, grpc, metrics = map(str, free_ports(3))
    words = ["darktrt", "serve", "start", "repository", "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    with subprocess.Popen(
        words, cwd=project, env=environment(python), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout and server.stderr
            line = server.stdout.readline()
            assert line.startswith("ready: "), line + server.stderr.read()
            yield f"localhost:{grpc}"
        finally:
            server.terminate()
            server.communicate()


@NEEDS_WEIGHTS
def test_a_real_server_and_his_program(outputs: dict[str, str], python: Path, project: Path) -> None:
    with server_of(python, project) as server:
        drawn = darktrt(python, project, f"client detect dog.jpg -o answer.jpg --server {server}")
        assert "person" in drawn
        done = run(python, project, str(python), "his_program.py", server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("person") == 2
    assert "refused: none.onnx: " in done.stdout
    assert done.stderr == "", "the library prints nothing that was not asked for"
    assert (project / "answer.jpg").read_bytes() == (project / "detected.jpg").read_bytes()


def test_compiling_the_plugins(python: Path, project: Path, tmp_path: Path) -> None:
    include = os.environ.get("TENSORRT_INCLUDE")
    if not shutil.which("nvcc") and not Path("/usr/local/cuda/bin/nvcc").is_file():
        pytest.skip("needs nvcc: the CUDA toolkit")
    if not include:
        pytest.skip("needs TensorRT's headers: set TENSORRT_INCLUDE to the folder of NvInfer.h")
    version = re.search(
        r"NV_TENSORRT_MAJOR (\d+).*?MINOR (\d+).*?PATCH (\d+)", Path(include, "NvInferVersion.h").read_text(), re.S
    )
    assert version
    cache = {**environment(python), "XDG_CACHE_HOME": str(tmp_path)}
    words = ["darktrt", "plugins", "--tensorrt", ".".join(version.groups()), "--sm", "90", "--include", include]
    done = subprocess.run(words, cwd=project, env=cache, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    code = f"from darktrt.plugins.library import find_library; print(find_library(None, '{'.'.join(version.groups())}'))"
    found = subprocess.run([str(python), "-c", code], cwd=project, env=cache, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_file() and Path(found.strip()).is_relative_to(tmp_path)


MYPY_CONFIG = """[mypy]
strict = true
[mypy-torch.*]  # 1,400 modules, of whose types his program has none
follow_imports = skip
"""


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_his_program_is_typed(checker: str, python: Path, project: Path, tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(MYPY_CONFIG)
    words = {
        "mypy": [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", "/dev/null"],
        "pyright": [sys.executable, "-m", "pyright"],
    }[checker]
    his_python = {"mypy": "--python-executable", "pyright": "--pythonpath"}[checker]
    done = run(python, project, *words, his_python, str(python), "his_program.py")
    assert done.returncode == 0, done.stdout + done.stderr
