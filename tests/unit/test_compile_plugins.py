"""``darktrt plugins``: with a make that only writes down what it is asked for, and once with the CUDA compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_library import compiled

from darktrt import __version__
from darktrt.cli import main
from darktrt.errors import DarktrtError
from darktrt.plugins import build as build_module
from darktrt.plugins.build import compile_plugins
from darktrt.plugins.library import FILE_NAME, VARIABLE, find_library

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

MAKE = """#!/bin/sh
printf '%s\\n' "$@" "MAKEFLAGS=${MAKEFLAGS:-}" > "$LOG"
for word; do case $word in OUT=*) cp "$LIBRARY" "${word#OUT=}/libdarktrt_plugins.so";; esac; done
[ -z "${FAILS:-}" ] || { seq 1 40; echo 'mish.cu(3): error: no'; exit 2; }
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a fake make, whose library is for TensorRT 8.6.0, an nvcc and headers; returns the folder of caches."""
    programs, headers = tmp_path / "bin", tmp_path / "include"
    for folder in (programs, headers):
        folder.mkdir()
    (headers / "NvInfer.h").touch()
    for name, text in (("make", MAKE), ("nvcc", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("LIBRARY", str(compiled(tmp_path / "made.so")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TENSORRT_INCLUDE", str(headers))
    monkeypatch.setenv("MAKEFLAGS", "OUT=elsewhere")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(build_module, "installed_tensorrt", lambda: None)
    return tmp_path / "cache" / "darktrt" / "plugins"


def asked(tmp_path: Path) -> list[str]:
    """The words that make was given."""
    return (tmp_path / "log").read_text().splitlines()


def test_the_library_goes_where_it_is_found(machine: Path, tmp_path: Path) -> None:
    library = compile_plugins("8.6.1")
    assert library.path == machine / "8.6.1" / FILE_NAME == find_library(tensorrt="8.6.1")
    words = asked(tmp_path)
    assert words[words.index("-C") + 1] == str(Path(build_module.__file__).resolve().parent / "csrc")
    assert f"OUT={machine.parent / 'objects' / __version__}" in words
    assert f"NVCC={tmp_path / 'bin' / 'nvcc'}" in words
    assert f"TENSORRT_INCLUDE={tmp_path / 'include'}" in words
    assert f"VERSION={__version__}" in words
    assert words[-1] == "MAKEFLAGS="
    assert not [word for word in words if word.startswith("SM=")]


def test_without_a_version_the_library_says_it(machine: Path) -> None:
    assert compile_plugins().path == machine / "8.6.0" / FILE_NAME


def test_the_installed_tensorrt_is_the_default(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "installed_tensorrt", lambda: "8.6.1.6")
    assert compile_plugins().path == machine / "8.6.1.6" / FILE_NAME


def test_headers_of_another_tensorrt_are_refused(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DarktrtError, match=r"include: has the headers of TensorRT 8\.6\.0, not 10\.3\.0$"):
        compile_plugins("10.3.0")
    assert find_library(tensorrt="10.3.0") is None
    monkeypatch.setattr(build_module, "installed_tensorrt", lambda: "10.3.0")
    assert compile_plugins(include=tmp_path / "include").path == machine / "8.6.0" / FILE_NAME


def test_everything_can_be_named(machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "NvInfer.h").touch()
    output, nvcc = tmp_path / "my.so", shutil.which("true")
    words = ["--tensorrt", "8.6.0", "--sm", "90 75", "--nvcc", str(nvcc), "--include", str(other), "-o", str(output)]
    assert main(["plugins", *words]) == 0
    assert capsys.readouterr().out == f"{output} (for TensorRT 8.6.0, compute capability 8.0 9.0)\n"
    assert {f"NVCC={nvcc}", f"TENSORRT_INCLUDE={other}", "SM=75 90"} <= set(asked(tmp_path))
    assert not (machine / "8.6.0").exists()


def test_the_same_library_is_not_written_again(machine: Path, tmp_path: Path) -> None:
    """An engine that make builds from it stays up to date."""
    output = tmp_path / "my.so"
    compile_plugins(output=output)
    os.utime(output, (0, 0))
    compile_plugins(output=output)
    assert output.stat().st_mtime == 0
    compiled(tmp_path / "made.so", sms="75")
    assert compile_plugins(output=output).sms == (75,)
    assert output.stat().st_mtime > 0


def test_what_is_missing_is_named(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DarktrtError, match=r"/nowhere/nvcc: there is no such CUDA compiler; install the CUDA toolkit"):
        compile_plugins(nvcc="/nowhere/nvcc")
    with pytest.raises(DarktrtError, match=r"TENSORRT_INCLUDE=/nowhere has no NvInfer\.h"):
        compile_plugins(include="/nowhere")
    with pytest.raises(DarktrtError, match=r"/nowhere/my\.so: cannot write"):
        compile_plugins(output="/nowhere/my.so")
    monkeypatch.setattr(build_module.shutil, "which", lambda name: name if name == "make" else None)
    with pytest.raises(DarktrtError, match="nvcc: there is no such CUDA compiler"):
        compile_plugins()
    monkeypatch.setattr(build_module.shutil, "which", lambda _: None)
    with pytest.raises(DarktrtError, match="needs make and a C\\+\\+ compiler; on Debian and Ubuntu: apt install"):
        compile_plugins()


def test_a_failure_shows_the_end_of_the_compilers_output(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(DarktrtError) as caught:
        compile_plugins("8.6.0")
    assert str(caught.value).splitlines()[0] == "the plugins do not compile:"
    assert str(caught.value).splitlines()[-2:] == ["40", "mish.cu(3): error: no"]
    assert find_library(tensorrt="8.6.0") is None


@pytest.mark.parametrize("words", ["--sm x", "--sm", "--sm 8.6"])
def test_odd_compute_capabilities_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plugins", *words.split(" ", 1)])
    assert "--sm" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no CUDA compiler")
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_sources_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one GPU, outside the package, whose folder may not be writable."""
    csrc = Path(build_module.__file__).resolve().parent / "csrc"
    before = sorted(csrc.rglob("*"))
    command = ["timeout", "20", "sh", str(csrc / "trt" / "headers.sh")]
    environment = {**os.environ, "TENSORRT_VERSION": "8.6.0", "GIT_TERMINAL_PROMPT": "0"}
    headers = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if headers.returncode:
        pytest.skip(f"TensorRT's headers are not available: {headers.stderr.strip() or 'it takes too long'}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("STRICT", "1")
    library = compile_plugins("8.6.0", [90], include=headers.stdout.strip())
    assert (library.tensorrt, library.sms, library.darktrt) == ("8.6.0", (90,), __version__)
    assert "YoloDetectPlugin:1" in library.plugins
    assert sorted(csrc.rglob("*")) == before


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_a_warning_of_an_unknown_compiler_is_no_error(tmp_path: Path) -> None:
    """But in the tests it is one, in all that is compiled."""
    csrc = Path(build_module.__file__).resolve().parent / "csrc"
    command = ["make", "--dry-run", "-C", str(csrc), "host", "plugins", f"OUT={tmp_path}", "NVCC=true", "SM=90"]
    for word, errors in (("STRICT=", 0), ("STRICT=1", 6)):
        steps = subprocess.run([*command, word], capture_output=True, text=True, check=True).stdout.splitlines()
        compiling = [step for step in steps if "-Wall" in step and " -o " in step]
        assert len(compiling) == 6  # the host library, four kernels, the adapters
        assert sum("-Werror" in step for step in compiling) == errors
