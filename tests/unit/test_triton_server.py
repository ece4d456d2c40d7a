"""Finding, starting, watching and stopping a server, with a stand-in for tritonserver; the real one is in tests/serve."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, Made, files_in, free_ports
from test_repository import write_library, write_plan

from darktrt.cli import main
from darktrt.engine.manifest import read_plan_manifest
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.serve import install, server
from darktrt.serve.config import TensorRTBackend
from darktrt.serve.containers import NEWEST, TENSORRT, container_for, docker_command
from darktrt.serve.program import Program
from darktrt.serve.repository import publish
from darktrt.serve.server import StartOptions, relevant_lines, running, server_command

STAND_IN = """#!{python}
import http.server, os, signal, sys, time
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
open({folder!r} + "/started", "a").write(" ".join(sys.argv[1:]) + "\\n")
print("I1125 07:00:00.000000 1 main.cc:1] \\"loading\\"", flush=True)
if {fails!r}:
    print("E1125 07:00:00.000000 1 model_lifecycle.cc:642] \\"failed to load 'made' version 1: {fails}\\"", flush=True)
    print("I1125 07:00:01.000000 1 server.cc:304] \\"Waiting for in-flight requests to complete.\\"", flush=True)
    sys.exit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.time() > began + 0.3 else 400)
        self.end_headers()
    def log_message(self, *_):
        pass
def stop(*_):
    print("stopping", flush=True)
    open({folder!r} + "/stopped", "w").close()
    sys.exit(0)
began = time.time()
signal.signal(signal.SIGTERM, {stop})
http.server.HTTPServer((options["http-address"], int(options["http-port"])), Handler).serve_forever()
"""

MakeProgram = Callable[..., Program]


@pytest.fixture
def stand_in(tmp_path: Path) -> MakeProgram:
    """Writes a program that answers as tritonserver does, or fails, or does not stop."""

    def write(fails: str = "", stop: str = "stop") -> Program:
        path = tmp_path / "tritonserver"
        path.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path), fails=fails, stop=stop))
        path.chmod(0o755)
        return Program(str(path))

    return write


@pytest.fixture
def options() -> StartOptions:
    """On ports that are free."""
    return StartOptions("127.0.0.1", *free_ports(3))


@pytest.fixture(scope="module")
def repository(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a plan and an ONNX file, which a stand-in does not load."""
    folder = tmp_path_factory.mktemp("repository")
    publish(write_plan(folder, nms_info(made)), folder / "models", name="made")
    return folder / "models"


def nms_info(made: Made) -> DetectorInfo:
    return replace(made.info, head="nms", input="uint8", max_detections=20)


# --- starting and stopping ---


def test_a_server_is_ready_inside_the_block_and_gone_behind_it(
    stand_in: MakeProgram, options: StartOptions, repository: Path, tmp_path: Path
) -> None:
    with open(tmp_path / "log", "w") as log, running(repository, options, stand_in(), log) as one:
        assert one.http == f"127.0.0.1:{options.http_port}" and one.ready()
    assert one.process.poll() == 0 and (tmp_path / "stopped").exists()
    assert "loading" in (tmp_path / "log").read_text() and "stopping" in (tmp_path / "log").read_text()


def test_only_the_server_has_large_stacks(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_STACK)
    with running(repository, options, stand_in()) as one:
        soft, hard = resource.prlimit(one.process.pid, resource.RLIMIT_STACK)
        assert resource.getrlimit(resource.RLIMIT_STACK) == before
    assert hard == before[1] and soft == min(server.STACK_BYTES, hard if hard >= 0 else server.STACK_BYTES)


def test_a_server_that_does_not_stop_is_killed(
    stand_in: MakeProgram, options: StartOptions, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "EXIT_SECONDS", -4.5)
    with running(repository, options, stand_in(stop="signal.SIG_IGN")) as one:
        pass
    assert one.process.poll() == -signal.SIGKILL


def test_a_model_that_does_not_load_is_reported(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DarktrtError) as caught, running(repository, options, stand_in(fails="Internal: no GPU")):
        pass
    assert "failed to load 'made' version 1: Internal: no GPU" in str(caught.value)
    assert "loading" not in str(caught.value) and time.monotonic() - began < 20


def test_a_server_that_is_never_ready(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    one = server.start(repository, options, stand_in())
    try:
        with pytest.raises(DarktrtError, match=r"not ready after 0.1 s:\n(.*loading|\(it wrote nothing)"):
            server.wait_until_ready(one, 0.1)
    finally:
        one.kill()


def test_a_server_that_ends_by_itself(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    with running(repository, options, stand_in()) as one:
        one.kill()
        with pytest.raises(DarktrtError, match="tritonserver ended with status -9"):
            one.watch()


@pytest.mark.parametrize("which", ["http_port", "grpc_port", "metrics_port"])
def test_ports_that_are_taken(
    stand_in: MakeProgram, options: StartOptions, repository: Path, tmp_path: Path, which: str
) -> None:
    with (
        socket.create_server(("127.0.0.1", getattr(options, which))),
        pytest.raises(DarktrtError, match=f"cannot listen at 127.0.0.1:{getattr(options, which)}: Address already in use"),
        running(repository, options, stand_in()),
    ):
        pass
    assert not (tmp_path / "started").exists()


def test_what_a_killed_server_left_is_removed(
    stand_in: MakeProgram, options: StartOptions, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server at these ports, and nothing else."""
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(server, "_SHARED_MEMORY", memory)
    for name in (f"darktrt_{options.http_port}_abc", f"darktrt_{options.http_port + 1}_abc", "other"):
        (memory / name).touch()
    with running(repository, options, stand_in()):
        assert files_in(memory) == sorted([f"darktrt_{options.http_port + 1}_abc", "other"])
        (memory / f"darktrt_{options.http_port}_def").touch()
    assert files_in(memory) == sorted([f"darktrt_{options.http_port + 1}_abc", "other"])


def test_the_command(repository: Path, tmp_path: Path) -> None:
    program = tmp_path / "tritonserver"
    program.write_bytes(b"... --http-max-input-size ...")
    options = StartOptions(models=("a", "b"), max_request_bytes=1000, cache_bytes=5000, arguments=("--log-verbose=1",))
    words = server_command(repository, options, Program(str(program), backends=tmp_path / "backends"))
    assert words == [
        str(program),
        f"--model-repository={repository}",
        "--http-address=127.0.0.1",
        "--http-port=8000",
        "--grpc-address=127.0.0.1",
        "--grpc-port=8001",
        "--metrics-address=127.0.0.1",
        "--metrics-port=8002",
        "--exit-timeout-secs=10",
        "--model-control-mode=explicit",
        "--load-model=a",
        "--load-model=b",
        "--cache-config=local,size=5000",
        "--backend-config=python,shm-region-prefix-name=darktrt_8000_",
        f"--backend-directory={tmp_path / 'backends'}",
        f"--cache-directory={tmp_path / 'caches'}",
        "--http-max-input-size=1000",
        "--log-verbose=1",
    ]
    program.write_bytes(b"an older one")
    plain = server_command(repository, StartOptions(), Program(str(program)))
    assert "--model-control-mode=none" in plain and not any("max-input" in word or "cache" in word for word in plain)


def test_the_environment_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/theirs")
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    given = Program("tritonserver", ("/a", "/b"), tmp_path).environment()
    assert given["LD_LIBRARY_PATH"] == "/a:/b:/theirs" and given["PATH"].startswith(f"{tmp_path}/bin:")
    assert "PYTHONPATH" not in given and Program("tritonserver").environment() == dict(os.environ)


def test_triton_s_own_tensorrt_gets_its_plugins_without_docker_too(made: Made, tmp_path: Path) -> None:
    """Of the versions that Triton loads, by the path of the server; the Python backend loads its own library."""
    program = tmp_path / "tritonserver"
    program.touch()
    plan = write_plan(tmp_path, nms_info(made), ("MishPlugin:1",), "TensorRT 8.6.0", version_compatible=True)
    library = write_library(tmp_path, "MishPlugin:1", "8.6.0")
    for version in (1, 2):
        publish(plan, tmp_path / "models", TensorRTBackend(), "made", version, library)
    publish(plan, tmp_path / "models", name="python", plugins=library)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    words = server_command(tmp_path / "link", StartOptions(arguments=("--log-verbose=1",)), Program(str(program)))
    assert words[-3:] == [
        "--log-verbose=1",
        f"--backend-config=tensorrt,plugins={tmp_path}/models/made/2/libdarktrt_plugins.so",
        "--backend-config=tensorrt,version-compatible=true",
    ]
    shutil.rmtree(tmp_path / "models/made")
    assert not [
        word for word in server_command(tmp_path / "link", StartOptions(), Program(str(program))) if "config=tensorrt" in word
    ]


def test_a_server_without_the_backend_is_not_started(
    stand_in: MakeProgram, options: StartOptions, made: Made, tmp_path: Path
) -> None:
    publish(write_plan(tmp_path, nms_info(made)), tmp_path / "models", TensorRTBackend(), "made")
    program = replace(stand_in(), backends=tmp_path / "backends")
    (tmp_path / "backends/python").mkdir(parents=True)
    with (
        pytest.raises(DarktrtError, match=r"made: needs Triton's backend 'tensorrt', and nvidia-pytriton has: python; put"),
        running(tmp_path / "models", options, program),
    ):
        pass
    assert not (tmp_path / "started").exists()
    (tmp_path / "backends/tensorrt").mkdir()
    with running(tmp_path / "models", options, program):
        pass


def test_relevant_lines_of_a_log() -> None:
    lines = [f"I1125 07:00:00 1 a.cc:1] line {i}" for i in range(30)]
    assert relevant_lines(deque(lines)).splitlines() == lines[-12:]
    assert relevant_lines([*lines, "E1125 07:00:00 1 a.cc:1] bad", *lines]) == "E1125 07:00:00 1 a.cc:1] bad"
    reason = "E1125 07:00:00 1 a.cc:1] failed to load 'x' version 1: no GPU"
    assert relevant_lines([*lines, "E1125 other", reason, *lines]) == reason
    reasons = [f"E1125 07:00:00 1 a.cc:1] \"failed to load 'x{i}' version 1: no GPU\"" for i in range(12)]
    again = [f"I1125 07:00:00 1 a.cc:1] \"failed to load 'x{i}'\"" for i in range(12)]
    assert relevant_lines([*reasons, *again]).splitlines() == reasons
    assert relevant_lines([]) == "(it wrote nothing)"


# --- the command line ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "onnxruntime", "--input", "jpeg"], "the backend onnxruntime has no 'input' [--input]"),
        (["--kind", "onnxruntime", "--cuda-graph"], "the backend onnxruntime has no 'cuda_graph' [--cuda-graph]"),
        (["--instances", "0"], "instances is 0; it must be 1 or more [--instances]"),
        (["--score-threshold", "2"], "the score threshold is 2; it must be between 0 and 1"),
    ],
)
def test_options_that_are_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "repository", "model.onnx", "-o", "repository", *options]) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_stops_it_in_order(stand_in: MakeProgram, options: StartOptions, repository: Path, tmp_path: Path) -> None:
    stand_in()
    words = ["serve", "start", str(repository), f"--http-port={options.http_port}", f"--grpc-port={options.grpc_port}"]
    words += [f"--metrics-port={options.metrics_port}", "--log", str(tmp_path / "log"), "--argument=--log-verbose=1"]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    # as a shell starts a background job, that is with SIGINT ignored
    command = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "darktrt", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert command.stdout
    assert command.stdout.readline() == (
        f"ready: http://127.0.0.1:{options.http_port} and gRPC at 127.0.0.1:{options.grpc_port}; Ctrl-C stops it\n"
    )
    command.send_signal(signal.SIGINT)
    assert command.communicate(timeout=30)[0] == "stopped\n" and command.returncode == 0
    assert (tmp_path / "stopped").exists() and "--log-verbose=1" in (tmp_path / "started").read_text()


def test_the_command_of_docker_is_printed(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "program_on_path", lambda: None)
    monkeypatch.setattr(install, "docker_runs", lambda: True)
    assert main(["serve", "start", str(repository)]) == 0
    assert capsys.readouterr().out.startswith(
        "docker run --rm --gpus all --shm-size=1g --ulimit=stack=1073741824 -p=127.0.0.1:8000:8000 "
    )


def test_programs_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "installed_program", lambda: Program("pip"))
    for on_path, docker, choice, expected in [
        ("/bin/tritonserver", True, "auto", "/bin/tritonserver"),
        (None, True, "auto", None),
        (None, False, "auto", "pip"),
        ("/bin/tritonserver", True, "docker", None),
        ("/bin/tritonserver", True, "pip", "pip"),
        ("/bin/tritonserver", False, "path", "/bin/tritonserver"),
    ]:
        monkeypatch.setattr(install.shutil, "which", lambda _, found=on_path: found)
        monkeypatch.setattr(install, "docker_runs", lambda runs=docker: runs)
        found = install.choose_program(choice)  # type: ignore[arg-type]
        assert (found.path if found else None) == expected, (on_path, docker, choice)
    monkeypatch.setattr(install.shutil, "which", lambda _: None)
    with pytest.raises(DarktrtError, match="no tritonserver on PATH"):
        install.choose_program("path")


@pytest.mark.parametrize("file", [install.SERVER_REQUIREMENTS, install.BACKEND_REQUIREMENTS])
def test_everything_that_is_installed_has_one_version_and_hashes(file: Path) -> None:
    """For each Python that may run the backend, in containers too."""
    requirements = re.split(r"\n(?=\w)", re.sub(r"(?m)^#.*\n", "", file.read_text()))
    names = []
    for requirement in requirements:
        first, *hashes = requirement.replace("\\", "").split("\n")
        assert re.fullmatch(r"[\w-]+==[\d.]+( ; python_full_version [<>]=? '3\.\d+')?\s*", first)
        assert hashes and all(re.fullmatch(r"\s*--hash=sha256:[0-9a-f]{64}\s*", line) for line in hashes if line)
        names.append(first.partition("==")[0])
    wanted = {"server.txt": {"numpy", "nvidia-pytriton"}, "backend.txt": {"onnxruntime", "pillow"}}
    assert set(names) == wanted[file.name]


def test_other_wheels_go_into_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was installed before from other versions is not taken for them, and a server that runs from it keeps its files."""
    python = install.Interpreter("python3.11", "3.11", "")
    before = python.folder
    other = tmp_path / "backend.txt"
    other.write_text(install.BACKEND_REQUIREMENTS.read_text() + "# other\n")
    monkeypatch.setattr(install, "BACKEND_REQUIREMENTS", other)
    assert python.folder != before and python.folder.parent == before.parent


def test_a_package_that_cannot_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed = tmp_path / "server.txt"
    listed.write_text(f"no-package-of-this-name-darktrt==1 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(install, "SERVER_REQUIREMENTS", listed)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(
        DarktrtError,
        match=r"cannot install nvidia-pytriton \(ERROR: No .* no-package.*; put a tritonserver on",
    ):
        install.installed_program()
    assert not list(tmp_path.glob("darktrt/*/.complete"))


# --- containers ---


@pytest.mark.parametrize(
    ("target", "release", "loads", "loads_compatible"),
    [
        ("TensorRT 8.6.1", "24.01", True, True),
        ("TensorRT 8.6.0", "24.01", False, True),
        ("TensorRT 8.6.2", "24.04", False, True),
        ("TensorRT 8.6.9", "24.04", False, False),
        ("TensorRT 10.3.0", "24.08", True, True),
        ("TensorRT 10.12.0", "25.08", False, True),
        ("TensorRT 10.99.0", "26.05", False, False),
    ],
)
def test_the_container_with_a_tensorrt_or_the_nearest(
    made: Made, tmp_path: Path, target: str, release: str, loads: bool, loads_compatible: bool
) -> None:
    manifest = read_plan_manifest(write_plan(tmp_path, nms_info(made), target=target))
    found = container_for(manifest)
    assert (found.release, found.loads, found.tag) == (release, loads, f"nvcr.io/nvidia/tritonserver:{release}-py3")
    assert container_for(replace(manifest, version_compatible=True)).loads == loads_compatible


def test_the_table_of_containers_goes_up() -> None:
    assert list(TENSORRT) == sorted(TENSORRT) and list(TENSORRT.values()) == sorted(TENSORRT.values())


def test_plans_that_no_triton_loads(made: Made, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, nms_info(made), target="TensorRT for RTX 1.3.0")
    with pytest.raises(DarktrtError, match=r"of TensorRT for RTX 1\.3\.0, which no Triton loads; serve its ONNX file"):
        container_for(read_plan_manifest(plan))
    with pytest.raises(DarktrtError, match="which no Triton loads"):
        publish(plan, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_docker_commands(made: Made, tmp_path: Path) -> None:
    info = replace(nms_info(made), fixed_thresholds=(0.25, 0.45))
    plan = write_plan(tmp_path, info, ("MishPlugin:1",), "TensorRT 10.3.0")
    library = write_library(tmp_path, "MishPlugin:1", "10.3.0")
    models = tmp_path / "my models"
    for name in ("a", "b"):
        publish(plan, models, TensorRTBackend(), name, plugins=library)
    command = docker_command(models, StartOptions(address="10.0.0.1"))
    assert command.warnings == () and str(command) == (
        "docker run --rm --gpus all --shm-size=1g --ulimit=stack=1073741824 "
        "-p=10.0.0.1:8000:8000 -p=10.0.0.1:8001:8001 -p=10.0.0.1:8002:8002 "
        f"-v='{models}:/models:ro' nvcr.io/nvidia/tritonserver:24.08-py3 tritonserver --model-repository=/models "
        "--http-address=0.0.0.0 --http-port=8000 --grpc-address=0.0.0.0 --grpc-port=8001 --metrics-address=0.0.0.0 "
        "--metrics-port=8002 --exit-timeout-secs=10 --model-control-mode=none "
        "'--backend-config=tensorrt,plugins=/models/a/1/libdarktrt_plugins.so;/models/b/1/libdarktrt_plugins.so'"
    ).replace(f"-v='{models}:/models:ro'", f"'-v={models}:/models:ro'")


def test_docker_commands_of_the_python_backend(made: Made, tmp_path: Path) -> None:
    """The container's Python gets what it lacks, and a plan of 8.6.0 comes with a warning."""
    publish(write_plan(tmp_path, nms_info(made), target="TensorRT 8.6.0"), tmp_path / "models", name="made")
    command = docker_command(tmp_path / "models", StartOptions())
    assert f"-v={install.BACKEND_REQUIREMENTS}:/requirements.txt:ro" in command.words
    assert (
        "nvcr.io/nvidia/tritonserver:24.01-py3 bash -c 'pip install --no-deps --only-binary=:all: --require-hashes --quiet "
        "--disable-pip-version-check --requirement=/requirements.txt && pip install tensorrt==8.6.0 && exec tritonserver "
    ) in str(command)
    assert command.warnings == (
        f"made: no container up to {NEWEST} carries TensorRT 8.6.0; nearest is nvcr.io/nvidia/tritonserver:24.01-py3 with "
        "TensorRT 8.6.1, in which the plan must be built again, because TensorRT loads only plans of its own version",
    )


def test_plans_for_later_versions_need_an_option(made: Made, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, nms_info(made), target="TensorRT 10.12.0", version_compatible=True)
    publish(plan, tmp_path / "models", TensorRTBackend(), "made")
    command = docker_command(tmp_path / "models", StartOptions())
    assert command.words[-1] == "--backend-config=tensorrt,version-compatible=true" and not command.warnings


def test_plans_of_two_tensorrts_need_two_servers(made: Made, tmp_path: Path) -> None:
    for version in ("8.6.1", "10.3.0"):
        plan = write_plan(tmp_path, nms_info(made), target=f"TensorRT {version}")
        publish(plan, tmp_path / "models", name=f"of-{version}")
    with pytest.raises(DarktrtError, match=r"of TensorRT 10.3.0 and TensorRT 8.6.1; one server loads those of one TensorRT"):
        docker_command(tmp_path / "models", StartOptions())


@pytest.mark.parametrize("models", [(), ("a",), ("a", "b")])
def test_the_server_of_docker_compose_gets_the_plugins_of_all_models(tmp_path: Path, models: tuple[str, ...]) -> None:
    (tmp_path / "tritonserver").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "tritonserver").chmod(0o755)
    libraries = [tmp_path / "models" / name / "1/libdarktrt_plugins.so" for name in models]
    for library in libraries:
        library.parent.mkdir(parents=True)
        library.touch()
    text = (ROOT / "docker/compose.yaml").read_text()
    script = textwrap.dedent(text.partition("      - |\n")[2].partition("    ports:")[0])
    script = script.replace("$$", "$").replace("/models", f"{tmp_path}/models")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    plugins = [f"--backend-config=tensorrt,plugins={';'.join(map(str, libraries))}"] if models else []
    assert done.stdout.splitlines() == [f"--model-repository={tmp_path}/models", *plugins]
