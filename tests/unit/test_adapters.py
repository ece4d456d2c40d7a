"""The adapters to TensorRT's plugin interfaces, compiled for three versions and driven by ``adapters.cpp`` without TensorRT."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

SOURCES = ROOT / "plugins" / "csrc" / "trt"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
VERSIONS = ("8.6.0", "10.16", "11.1")
EXPORTED = {"8": "getPluginCreators", "10": "getCreators", "11": "getCreators"}

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not (CUDA / "cuda_runtime_api.h").is_file(), reason="there are no CUDA headers (CUDA_HOME)"),
]

FLAGS = "-std=c++17 -O0 -fPIC -fvisibility=hidden -Wall -Wextra -Werror".split()
DEFINES = ['-DDARKTRT_VERSION="0.0.0"', '-DDARKTRT_SMS="80 90"']


def compiled(folder: Path, include: str, source: Path) -> Path:
    target = folder / f"{source.stem}.o"
    command = ["c++", *FLAGS, *DEFINES, "-isystem", include, "-isystem", str(CUDA), "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def objects(version: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The adapters and their driver, warnings being errors; headers from the system, from the cache, or from a clone."""
    environment = {**os.environ, "TENSORRT_VERSION": version, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["timeout", "20", "sh", str(SOURCES / "headers.sh")], capture_output=True, text=True, env=environment, check=True
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"TensorRT's headers are not available: {error.stderr.strip() or 'it takes too long'}")
    folder = tmp_path_factory.mktemp("adapters")
    return [
        compiled(folder, done.stdout.strip(), file)
        for file in (SOURCES / "library.cpp", Path(__file__).parent / "adapters.cpp")
    ]


def test_symbols(objects: list[Path], version: str) -> None:
    """Nothing of TensorRT is linked against, and nothing but the entry points is seen."""
    library = objects[0].with_name("libdarktrt_plugins.so")
    script = f"-Wl,--version-script={SOURCES / 'exports.map'},--no-undefined"
    subprocess.run(["c++", "-shared", *map(str, objects), script, "-ldl", "-o", str(library)], check=True)
    lines = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split()[-2:] for line in lines]
    seen = {name for kind, name in symbols if kind in "TDBRVWu" and "@" not in name}
    assert seen == {"darktrt_plugins_info", "darktrt_fit", "setLoggerFinder", EXPORTED[version.partition(".")[0]]}
    assert not [name for kind, name in symbols if kind == "U" and ("nvinfer" in name or "PluginRegistry" in name)]
    assert f'"tensorrt": "{version}'.encode() in library.read_bytes()


@pytest.fixture(scope="module")
def driven(objects: list[Path]) -> tuple[dict[str, list[str]], str]:
    """What the driver prints, by section, and the log."""
    program = objects[0].with_name("driver")
    subprocess.run(["c++", *map(str, objects), "-ldl", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    sections = [part.splitlines() for part in done.stdout.split("= ")[1:]]
    return {lines[0]: lines[1:] for lines in sections}, done.stderr


LAYOUTS = {"LINEAR": "1/0", "CHW4": "4/0", "HWC8": "8/1", "CHW16": "16/0", "CHW32": "32/0", "HWC16": "16/1"}
TYPES = {"FLOAT": 0, "HALF": 1, "INT8": 2}
FORMATS = {  # by major version; HWC16 of INT8 came with TensorRT 10, scales of tensors went with 11
    "FLOAT>FLOAT": {"8": "LINEAR CHW32", "10": "LINEAR CHW32", "11": "LINEAR CHW32"},
    "HALF>HALF": dict.fromkeys(("8", "10", "11"), "LINEAR HWC8 CHW16 CHW32 HWC16"),
    "HALF>INT8": {"8": "LINEAR CHW32", "10": "LINEAR CHW32 HWC16", "11": ""},
    "INT8>INT8": {"8": "LINEAR CHW4 CHW32", "10": "LINEAR CHW4 CHW32 HWC16", "11": ""},
}


def expected_call(kernel: str, channels: int, kinds: str, layout: str) -> str:
    def written(kind: str) -> str:
        return f" {TYPES[kind]}/{LAYOUTS[layout]}" + (" x 0.25" if kind == "INT8" else "")

    taken, given = kinds.split(">")
    inputs = written(taken) * (1 if kernel == "mish" else 2) + (f" {channels}" if kernel == "mish_concat" else "")
    return f"{kinds} {layout}: {kernel} (2 {channels} 30){inputs}{written(given)}"


@pytest.mark.parametrize("channels", [64, 40])
@pytest.mark.parametrize("kernel", ["mish", "mish_add", "mish_concat"])
def test_formats_of_mish(driven: tuple[dict[str, list[str]], str], version: str, kernel: str, channels: int) -> None:
    """Every type and format on the way to the kernel; a concat supports only vector widths that divide its channels."""
    name = "".join(part.title() for part in kernel.split("_")) + "Plugin"
    lines = driven[0][name if channels == 64 else f"{name}, 40 channels"]
    wanted = []
    for kinds, layouts in FORMATS.items():
        for layout in layouts[version.partition(".")[0]].split():
            if kernel != "mish_concat" or channels % int(LAYOUTS[layout].partition("/")[0]) == 0:
                wanted.append(expected_call(kernel, channels, kinds, layout))
    assert sorted(line for line in lines if ">" in line) == sorted(wanted)
    assert lines[-1] == "mixed formats: 0"


def test_failing_kernels_fail_and_say_why(driven: tuple[dict[str, list[str]], str]) -> None:
    sections, log = driven
    assert sections["MishPlugin"].count("fails: -1") == 2
    assert "MishPlugin: no kernel supports these shapes and types\nMishPlugin: out of memory\n" in log


HEADS = "yolo 2 2 3 96x64: [1: 3 5x6 0 1.05 1 2 3 4 5 6] [0: 1 5x6 1 1.00 7 8]"
FIELDS = "anchors anchors_per_head scale_x_y new_coords head_kinds classes input_size".split()
NMS_FIELDS = "kind beta max_candidates max_detections letterbox".split()
IMAGE_FIELDS = "input_size letterbox channels".split()


def test_heads(driven: tuple[dict[str, list[str]], str]) -> None:
    sections, log = driven
    assert sections["YoloDecodePlugin"] == [
        f"FLOAT: decode 0 {HEADS}",
        "bytes: 0",
        "wrong channels: -1",
        f"HALF: decode 1 {HEADS}",
        "bytes: 0",
        *["output of FLOAT"] * 2,
        *(f"without {name}: nothing" for name in FIELDS),
        *(f"without {name}: made" for name in [*NMS_FIELDS, "channels"]),
    ]
    call = f"nms 1 0.7 100 30, inputs 2 3 4 {HEADS}"
    assert sections["YoloDetectPlugin"] == [
        f"FLOAT: detect 0 {call}",
        f"workspace 100 {HEADS}",
        "bytes: 2000",
        "wrong channels: -1",
        f"HALF: detect 1 {call}",
        f"workspace 100 {HEADS}",
        "bytes: 2000",
        *(f"output of {kind}" for kind in ("INT32", "FLOAT", "FLOAT", "INT32")),
        *(f"without {name}: nothing" for name in FIELDS + NMS_FIELDS),
        "without channels: made",
    ]
    assert "YoloDecodePlugin: input 1 must be (N, 8, rows, columns): 1 anchors of 5 + 3 channels" in log
    assert "YoloDetectPlugin: field 'letterbox' is missing" in log


def test_images(driven: tuple[dict[str, list[str]], str]) -> None:
    """Images and pixels of both types, everything else of one."""
    sections, log = driven
    sizes = "preprocess 2 images of 80x48, type {}, into 96x64, 3 channels, letterbox 1, type {}: 0 > 1 2 3"
    others = [name for name in FIELDS + NMS_FIELDS if name not in IMAGE_FIELDS]
    lines = sections["PreprocessPlugin"]
    assert sorted(line for line in lines if line.startswith("without")) == sorted(
        [f"without {name}: nothing" for name in IMAGE_FIELDS] + [f"without {name}: made" for name in others]
    )
    assert lines[:9] == [
        f"FLOAT FLOAT FLOAT FLOAT: {sizes.format(0, 0)}",
        f"HALF FLOAT FLOAT FLOAT: {sizes.format(1, 0)}",
        f"FLOAT HALF FLOAT FLOAT: {sizes.format(0, 1)}",
        f"HALF HALF FLOAT FLOAT: {sizes.format(1, 1)}",
        *["output of FLOAT"] * 3,
        "another format: 0",
        "wrong shape: -1",
    ]
    assert sections["PlaceBoxesPlugin"] == [
        "FLOAT FLOAT FLOAT: place_boxes 10: 0 1 > 2",
        "output of FLOAT",
        "another format: 0",
        "wrong shape: -1",
    ]
    assert "PreprocessPlugin: images must be (N, height, width, 3)" in log
    assert "PlaceBoxesPlugin: boxes must be (N, boxes, 4)" in log


TOTAL = "((0+(3*(5*W)))+(1*(H*6)))"
"""The anchors of two heads: 3 of 5 rows and W columns, 1 of H rows and 6 columns."""
SHAPES = {
    "MishPlugin": ["shape N 64 H W"],
    "MishAddPlugin": ["shape N 64 H W"],
    "MishConcatPlugin": ["shape N (64+C) H W", "none", "none"],
    "YoloDecodePlugin": [f"shape N {TOTAL} 4", f"shape N {TOTAL} 3"] * 2 + ["none"] * 2,
    "YoloDetectPlugin": ["shape N 1", "shape N 30 4", "shape N 30", "shape N 30"] * 2 + ["none"] * 4,
    "PreprocessPlugin": ["shape N 3 64 96", "shape N 2", "shape 3 4"] + ["none"] * 3,
    "PlaceBoxesPlugin": ["shape N K 4", "none"],
}


def test_shapes_follow_from_those_of_the_inputs(driven: tuple[dict[str, list[str]], str]) -> None:
    """Also where sizes are not known yet; none for inputs that are known to be wrong."""
    sections, _ = driven
    found = {name.removeprefix("shapes of "): lines for name, lines in sections.items() if name.startswith("shapes of ")}
    assert found == SHAPES


ACCEPTED = {
    *("anchors_per_head 1 3", "new_coords 0 0", "head_kinds 0 0", "head_kinds 2 0", "classes 1", "input_size 1 1"),
    *("kind greedynms", "max_candidates 30", "max_candidates 3840", "max_detections 1", "max_detections 100"),
    *("letterbox 0", "channels 1"),
}
"""Of the values that the driver tries in place of its own: two heads with 3 and 1 anchors, the first one a [region]."""


@pytest.mark.parametrize(
    ("op", "own"),
    [("YoloDecodePlugin", FIELDS), ("YoloDetectPlugin", FIELDS + NMS_FIELDS), ("PreprocessPlugin", IMAGE_FIELDS)],
)
def test_values_out_of_their_range_are_refused(driven: tuple[dict[str, list[str]], str], op: str, own: list[str]) -> None:
    """No plugin is made of them; fields of other plugins do not matter."""
    tried = dict(line.split(": ") for line in driven[0][f"values of {op}"])
    assert ACCEPTED < tried.keys() and {words.split()[0] for words in tried} == {*FIELDS, *NMS_FIELDS, "channels"}
    accepted = {words for words in tried if words in ACCEPTED or words.split()[0] not in own}
    assert {words for words, made in tried.items() if made == "made"} == accepted


# --- where the headers come from ---


def headers(**environment: str) -> tuple[int, str]:
    """Status of headers.sh, and what it says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TENSORRT", "XDG"))}
    command, variables = ["sh", str(SOURCES / "headers.sh")], {**clean, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


def released(folder: Path, *tags: str) -> tuple[str, str]:
    """Address of a repository with headers and these tags, and the commit that all of them name."""
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "NvInfer.h").touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a"], *(["tag", tag] for tag in tags)):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return folder.as_uri(), head.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
@pytest.mark.parametrize(
    ("asked", "tag"), [("99.1.0", "v99.1.0"), ("99.2", "v99.2"), ("99.2.0.17", "v99.2"), ("99.1", "v99.1.0"), ("98", None)]
)
def test_headers_of_a_release_are_cloned_once(tmp_path: Path, asked: str, tag: str | None) -> None:
    """Tags have two numbers or three; packages up to four."""
    url, commit = released(tmp_path / "repository", "v99.1.0", "v99.2")
    known = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TENSORRT_VERSION": asked, "TENSORRT_COMMIT": commit}
    status, said = headers(TENSORRT_OSS_URL=url, **known)
    if tag is None:
        assert status == 1
        assert said.startswith(f"no headers of TensorRT {asked}: set TENSORRT_INCLUDE to the folder of NvInfer.h, or")
        assert not list((tmp_path / "cache" / "darktrt").iterdir())
        return
    include = tmp_path / "cache" / "darktrt" / f"tensorrt-{tag}" / "include"
    assert (status, said) == (0, str(include))
    assert (include / "NvInfer.h").is_file()
    assert headers(TENSORRT_OSS_URL="file:///nowhere", **known) == (0, str(include))


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("10.16.0", "v10.16 is commit {commit} there, not 52399f555c2f80cb690a4a558b604e1a5f227e7c as NVIDIA released it"),
        ("99.1", "no headers of TensorRT 99.1: {advice}; its commit is not known: set TENSORRT_COMMIT to the one that NVIDIA"),
    ],
)
def test_headers_are_those_of_a_known_commit(tmp_path: Path, asked: str, said: str) -> None:
    """A tag can be moved, and a mirror can hold anything: nothing of another commit is compiled or kept."""
    url, commit = released(tmp_path / "repository", "v10.16", "v99.1")
    status, message = headers(TENSORRT_OSS_URL=url, TENSORRT_VERSION=asked, XDG_CACHE_HOME=str(tmp_path / "cache"))
    advice = "set TENSORRT_INCLUDE to the folder of NvInfer.h, or TENSORRT_VERSION to a release"
    assert status == 1
    assert said.format(commit=commit, advice=advice) in message
    assert not list((tmp_path / "cache" / "darktrt").iterdir())


def test_every_usual_release_has_its_commit() -> None:
    """The release that is used where no TensorRT is installed, and each that the adapters are compiled against here."""
    commits = dict(line.split() for line in (SOURCES / "commits.txt").read_text().splitlines())
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits.values())
    assert {"v8.6.0", "v8.6.1", "v10.3.0", "v10.16", "v11.1"} <= set(commits)


def test_a_folder_of_headers_can_be_named(tmp_path: Path) -> None:
    assert headers(TENSORRT_INCLUDE=str(tmp_path)) == (1, f"TENSORRT_INCLUDE={tmp_path} has no NvInfer.h")
    (tmp_path / "NvInfer.h").touch()
    assert headers(TENSORRT_INCLUDE=str(tmp_path), TENSORRT_VERSION="99") == (0, str(tmp_path))


def test_a_missing_nvcc_is_reported(tmp_path: Path) -> None:
    command = ["make", "-C", str(SOURCES.parent), "plugins", f"OUT={tmp_path}", "NVCC=/nowhere/nvcc", "SM=90"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "nvcc is missing: install the CUDA toolkit, or say where it is by NVCC=" in done.stdout
