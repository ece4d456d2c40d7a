"""Finding, starting, watching and stopping a server, with a stand-in for tritonserver; the real one is in tests/serve."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, Made, files_in, free_ports
from test_repository import write_library, write_plan

from darktrt.cli import main
from darktrt.engine.manifest import read_plan_manifest
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.serve import install, server, server_log, supervisor
from darktrt.serve.access import MENDED_RELEASE, caveat, is_loopback, is_mended
from darktrt.serve.config import TensorRTBackend
from darktrt.serve.containers import NEWEST, TENSORRT, container_for, docker_command
from darktrt.serve.program import Program
from darktrt.serve.repository import publish
from darktrt.serve.server import Server, StartOptions, last_words, relevant_lines, running, server_command
from darktrt.serve.server_log import ServerLog

STAND_IN = """#!{python}
import http.server, os, signal, subprocess, sys, time
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
open({folder!r} + "/started", "a").write(" ".join(sys.argv[1:]) + "\\n")
print("I1125 07:00:00.000000 1 main.cc:1] \\"loading\\"", flush=True)
if {fails!r}:
    print("E1125 07:00:00.000000 1 model_lifecycle.cc:642] \\"failed to load 'made' version 1: {fails}\\"", flush=True)
    print("I1125 07:00:01.000000 1 server.cc:304] \\"Waiting for in-flight requests to complete.\\"", flush=True)
    sys.exit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path in ("/v2", "/v2/health/ready")
        self.send_response(404 if not known else 200 if time.time() > began + 0.3 else 400)
        self.end_headers()
        if known:
            self.wfile.write(b'{{"name": "triton", "version": "{version}"}}')
    def log_message(self, *_):
        pass
def stop(*_):
    print("stopping", flush=True)
    open({folder!r} + "/stopped", "w").close()
    sys.exit(0)
began = time.time()
signal.signal(signal.SIGTERM, {stop})
if {helper}:
    subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
http.server.HTTPServer((options["http-address"], int(options["http-port"])), Handler).serve_forever()
"""

MakeProgram = Callable[..., Program]


@pytest.fixture
def stand_in(tmp_path: Path) -> MakeProgram:
    """Writes a program that answers as tritonserver does, or fails, or does not stop; ``helper`` gives it a child process."""

    def write(fails: str = "", stop: str = "stop", version: str = "2.51.0", helper: bool = False) -> Program:
        path = tmp_path / "tritonserver"
        values = {"fails": fails, "stop": stop, "version": version, "helper": helper}
        path.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path), **values))
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
    with running(repository, options, stand_in(), tmp_path / "log") as one:
        assert one.http == f"127.0.0.1:{options.http_port}" and one.ready()
    assert one.process.poll() == 0 and (tmp_path / "stopped").exists()
    assert "loading" in (tmp_path / "log").read_text() and "stopping" in (tmp_path / "log").read_text()


def test_only_the_server_has_large_stacks(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_STACK)
    with running(repository, options, stand_in()) as one:
        soft, hard = resource.prlimit(one.process.pid, resource.RLIMIT_STACK)
        assert resource.getrlimit(resource.RLIMIT_STACK) == before
    assert hard == before[1] and soft == min(server.STACK_BYTES, hard if hard >= 0 else server.STACK_BYTES)


@pytest.mark.parametrize(
    ("hard", "kibibytes"), [(resource.RLIM_INFINITY, 1 << 20), (4 << 30, 1 << 20), (1 << 30, 1 << 20), (16 << 20, 16 << 10)]
)
def test_stacks_are_of_a_gibibyte_or_as_large_as_this_machine_allows(
    monkeypatch: pytest.MonkeyPatch, hard: int, kibibytes: int
) -> None:
    monkeypatch.setattr(server.resource, "getrlimit", lambda _: (8 << 20, hard))
    shell, _, script, size, *command = server._in_its_shell(["tritonserver", "--x"])
    assert (shell, size, command) == ("sh", str(kibibytes), ["tritonserver", "--x"]) and 'ulimit -S -s "$0"' in script


def test_a_server_that_does_not_stop_is_killed(
    stand_in: MakeProgram, options: StartOptions, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "EXIT_SECONDS", -4.5)
    with running(repository, options, stand_in(stop="signal.SIG_IGN")) as one:
        pass
    assert one.process.poll() == -signal.SIGKILL


def test_requests_in_flight_have_time_to_end(
    stand_in: MakeProgram, options: StartOptions, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the server itself waits for them, and some seconds more."""
    monkeypatch.setattr(server, "EXIT_SECONDS", 0)
    with running(repository, options, stand_in(stop="lambda *_: (time.sleep(0.8), stop())")) as one:
        pass
    assert one.process.poll() == 0
    one.stop()


@pytest.mark.parametrize(
    ("address", "host"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.1", "10.0.0.1")]
)
def test_a_server_is_reached_at_its_address(repository: Path, tmp_path: Path, address: str, host: str) -> None:
    (tmp_path / "tritonserver").touch()
    one = server.make_server(repository, StartOptions(address), Program(str(tmp_path / "tritonserver")))
    assert (one.http, one.grpc, one.metrics) == (f"{host}:8000", f"{host}:8001", f"{host}:8002")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_a_port_that_is_taken_in_ipv6(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    with (
        socket.create_server(("::1", options.http_port), family=socket.AF_INET6),
        pytest.raises(DarktrtError, match=f"cannot listen at ::1:{options.http_port}: Address already in use"),
        running(repository, replace(options, address="::1"), stand_in()),
    ):
        pass


def test_a_server_on_free_ports(stand_in: MakeProgram, repository: Path, tmp_path: Path) -> None:
    """Of its own, so that another server on the usual ones goes on."""
    with server.running_on_free_ports(repository, StartOptions(cache_bytes=1000), stand_in()) as one:
        assert one.ready() and len({one.http, one.grpc, one.metrics}) == 3
    assert "--cache-config=local,size=1000" in (tmp_path / "started").read_text()


def test_a_server_is_as_open_as_is_asked_for() -> None:
    """By default to this machine, without shared memory, and to requests of 64 MiB."""
    options = StartOptions()
    assert (options.address, options.shared_memory, options.insecure) == ("127.0.0.1", False, False)
    assert options.max_request_bytes == 64 * 1024 * 1024


def test_answers_about_a_server_are_bounded(repository: Path, options: StartOptions) -> None:
    """What listens at its port may be another program."""
    one = server.make_server(repository, options, Program("/bin/true"))
    content = b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * (3 << 20)
    with socket.create_server(("127.0.0.1", options.http_port)) as listener:
        thread = threading.Thread(target=answer, args=(listener, content))
        thread.start()
        assert one.get("v2") == b"x" * (1 << 20)
        thread.join()


def answer(listener: socket.socket, content: bytes) -> None:
    """Answer one request, whose sender may not want all of it."""
    connection = listener.accept()[0]
    with connection, suppress(OSError):
        connection.recv(1 << 16)
        connection.sendall(content)


def test_a_model_that_does_not_load_is_reported(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DarktrtError) as caught, running(repository, options, stand_in(fails="Internal: no GPU")):
        pass
    assert "failed to load 'made' version 1: Internal: no GPU" in str(caught.value)
    assert "loading" not in str(caught.value) and time.monotonic() - began < 20


def test_a_server_that_is_never_ready(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    one = server.make_server(repository, options, stand_in())
    one.start(ServerLog())
    try:
        with pytest.raises(DarktrtError, match=r"not ready after 0.1 s:\n(.*loading|\(it wrote nothing)"):
            server.wait_until_ready(one, 0.1)
    finally:
        one.kill()


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


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the system's shared memory."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(server, "_SHARED_MEMORY", folder)
    return folder


def test_what_a_killed_server_left_is_removed(
    stand_in: MakeProgram, options: StartOptions, repository: Path, memory: Path
) -> None:
    """Of a server at this address and these ports, and nothing else."""
    names = {
        f"triton_python_backend_shm_region_darktrt_{address}_{options.http_port + further}_abc"
        for address in ("127.0.0.1", "127.0.0.2")
        for further in (0, 1)
    }
    own = f"triton_python_backend_shm_region_darktrt_127.0.0.1_{options.http_port}_abc"
    for name in {*names, "other"}:
        (memory / name).touch()
    with running(repository, options, stand_in()):
        assert files_in(memory) == sorted({*names, "other"} - {own})
        (memory / own).touch()
    assert files_in(memory) == sorted({*names, "other"} - {own})


def test_the_command(repository: Path, tmp_path: Path) -> None:
    program = tmp_path / "tritonserver"
    program.write_bytes(b"... --http-max-input-size --http-restricted-api ...")
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
        "--backend-config=python,shm-region-prefix-name=triton_python_backend_shm_region_darktrt_127.0.0.1_8000_",
        "--http-restricted-api=trace,logging,shared-memory:closed:=nobody",
        "--grpc-restricted-protocol=trace,logging,shared-memory:closed:=nobody",
        f"--backend-directory={tmp_path / 'backends'}",
        f"--cache-directory={tmp_path / 'caches'}",
        "--http-max-input-size=1000",
        "--log-verbose=1",
    ]
    program.write_bytes(b"an older one")
    plain = server_command(repository, StartOptions(), Program(str(program)))
    assert "--model-control-mode=none" in plain
    assert not any("max-input" in word or "cache" in word or "restricted" in word for word in plain)


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


def test_folders_that_are_no_models_are_named_before_a_start(
    stand_in: MakeProgram, options: StartOptions, repository: Path
) -> None:
    """Triton would end with a message about one of its backends; it loads only what is asked for with --load."""
    stray = repository / ".made.90ebb18a"
    stray.mkdir()
    with pytest.raises(
        DarktrtError, match=r"\.made\.90ebb18a: is no model, and Triton takes every folder of a repository for one"
    ):
        server.make_server(repository, options, stand_in())
    server.make_server(repository, replace(options, models=("made",)), stand_in())
    stray.rmdir()


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


def test_what_answers_no_http_is_not_ready(repository: Path, options: StartOptions) -> None:
    """Another program at the port, say."""
    one = server.make_server(repository, options, Program("/bin/true"))
    with socket.create_server(("127.0.0.1", options.http_port)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].sendall(b"what?\r\n\r\n"))
        thread.start()
        assert not one.ready()
        thread.join()
    assert not one.ready()


# --- keeping it serving ---


@contextmanager
def supervised(one: Server, silent_seconds: float = 60.0) -> Iterator[None]:
    """In a thread while the block lasts."""
    done = threading.Event()
    thread = threading.Thread(target=supervisor.supervise, args=(one, silent_seconds, done))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(20)


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def wait_for_starts(caplog: pytest.LogCaptureFixture, count: int) -> None:
    wait_for(lambda: sum("serves again" in text for text in told(caplog)) == count)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_server_that_ends_is_started_again_with_longer_and_longer_pauses(
    stand_in: MakeProgram,
    options: StartOptions,
    repository: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "PAUSES", (0.0, 0.2, 0.4))
    with running(repository, options, stand_in()) as one, supervised(one):
        for number in range(1, 5):
            assert one.ready()
            one.process.kill()
            wait_for_starts(caplog, number)
        assert one.ready() and one.process.poll() is None
    failures = [text for text in told(caplog) if "ended" in text]
    said = "tritonserver ended with signal 9, SIGKILL; it is started again"
    assert failures == [said, f"{said} in 0.2 s", f"{said} in 0.4 s", f"{said} in 0.4 s"]


def test_after_steady_service_the_pauses_begin_anew(
    stand_in: MakeProgram,
    options: StartOptions,
    repository: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.5)
    with running(repository, options, stand_in()) as one, supervised(one):
        for number, how in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
            time.sleep(0.8)
            one.process.send_signal(how)
            wait_for_starts(caplog, number)
    assert told(caplog)[::2] == [
        "tritonserver ended with signal 9, SIGKILL; it is started again",
        "tritonserver ended with status 0 (stopping); it is started again",
    ]


def test_a_server_whose_model_is_silent_is_started_again(
    stand_in: MakeProgram, options: StartOptions, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is ready all the while: the stand-in answers no inference."""
    with running(repository, options, stand_in()) as one, supervised(one, 1.0):
        first = one.process
        wait_for_starts(caplog, 1)
        assert first.poll() == -signal.SIGKILL and one.process is not first
    assert told(caplog)[0] == "model 'made' answered no inference for 1 s; it is started again"


def test_a_model_that_a_client_unloaded_is_not_silent(
    stand_in: MakeProgram, options: StartOptions, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The stand-in reports that it is not ready, which is no failure where clients unload models."""
    with running(repository, replace(options, models=("made",)), stand_in()) as one, supervised(one, 1.0):
        time.sleep(2.5)
        assert one.process.poll() is None
    assert told(caplog) == []


def test_a_start_that_fails_is_tried_again(
    stand_in: MakeProgram,
    options: StartOptions,
    repository: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "PAUSES", (0.1,))
    with running(repository, options, stand_in()) as one, supervised(one):
        stand_in(fails="Internal: no GPU")
        one.process.kill()
        wait_for(lambda: any("no GPU" in text for text in told(caplog)))
        stand_in()
        wait_for_starts(caplog, 1)


def group_of(one: Server) -> set[int]:
    """The living processes of the server's group."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == one.process.pid and state != "Z":
                found.add(int(stat.parent.name))
    return found


def test_what_a_server_started_is_gone_with_it(stand_in: MakeProgram, options: StartOptions, repository: Path) -> None:
    """Also where the server itself has ended before, by an abort or for want of memory."""
    with running(repository, options, stand_in(helper=True)) as one:
        wait_for(lambda: len(group_of(one)) == 3)  # with the process that waits for the end of this one
        one.process.kill()
        one.process.wait()
        assert len(group_of(one)) == 2
    wait_for(lambda: not group_of(one), 5)


OWNER = """
import sys, time
from darktrt.serve.program import Program
from darktrt.serve.server import StartOptions, running
with running(sys.argv[1], StartOptions("127.0.0.1", *map(int, sys.argv[3:])), Program(sys.argv[2])) as one:
    print(one.process.pid, flush=True)
    time.sleep(600)
"""


def test_a_server_is_gone_with_the_process_that_started_it(
    stand_in: MakeProgram, options: StartOptions, repository: Path
) -> None:
    """However that ended: here by SIGKILL, so that it could not stop the server."""
    ports = [str(port) for port in (options.http_port, options.grpc_port, options.metrics_port)]
    words = [sys.executable, "-c", OWNER, str(repository), stand_in(helper=True).path, *ports]
    owner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert owner.stdout
    server_process = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    wait_for(lambda: not Path(f"/proc/{server_process}").exists() or " Z " in Path(f"/proc/{server_process}/stat").read_text())


# --- its log ---


def written_by(log: ServerLog, text: str) -> None:
    """Let the log follow a process that writes the text."""
    process = subprocess.Popen(["printf", "%s", text], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    log.follow(process.stdout)
    process.wait()


def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit of the file's size stands for the disk."""
    path, (soft, hard) = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    log = ServerLog(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        written_by(log, "".join(f"line {i:04}\n" for i in range(200)))
        wait_for(lambda: log.lines and log.lines[-1] == "line 0199")
        wait_for(lambda: log._lost == 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    written_by(log, "after\n")
    wait_for(lambda: "after" in path.read_text())
    assert list(log.lines) == ["after"], "of the latest process"
    log.close()
    kept = path.read_text().splitlines()
    assert kept == [*(f"line {i:04}" for i in range(100)), "(100 lines were lost here)", "after"]
    assert told(caplog) == [f"{path}: cannot write the log: File too large; the server goes on, and lines are lost"]


def test_a_file_that_holds_up_its_writer_does_not_hold_up_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_log, "_WAITING", 5)
    goes_on = threading.Event()
    monkeypatch.setattr(ServerLog, "_write", lambda *_: goes_on.wait(30))
    log = ServerLog(tmp_path / "log")
    written_by(log, "line\n" * 50)
    wait_for(lambda: len(log.lines) == 50)
    assert log._lost >= 44
    goes_on.set()
    log.close()


def test_a_long_line_of_the_log_is_cut(tmp_path: Path) -> None:
    log = ServerLog()
    written_by(log, "x" * 100_000)
    wait_for(lambda: sum(map(len, log.lines)) == 100_000)
    assert max(map(len, log.lines)) <= 1 << 14


def open_files() -> list[str]:
    """The files that this process has open."""
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            names.append(os.readlink(descriptor))
    return names


def test_a_closed_log_is_whole_and_no_longer_open(tmp_path: Path) -> None:
    """And it is no program: it has the mode of any new file."""
    log, other = ServerLog(tmp_path / "log"), tmp_path / "other"
    written_by(log, "line\n" * 1000)
    wait_for(lambda: log._waiting.qsize() == 0 and len(log.lines) == 400)
    assert str(tmp_path / "log") in open_files()
    log.close()
    assert (tmp_path / "log").read_text() == "line\n" * 1000
    assert str(tmp_path / "log") not in open_files()
    other.touch()
    assert (tmp_path / "log").stat().st_mode == other.stat().st_mode
    ServerLog().close()


def test_a_log_that_is_held_up_is_closed_within_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file did not take stays with its thread, which may yet write it."""
    taken, goes_on = threading.Event(), threading.Event()

    def held_up(*_: object) -> bool:
        taken.set()
        return goes_on.wait(30)

    monkeypatch.setattr(ServerLog, "_write", held_up)
    log = ServerLog(tmp_path / "log")
    written_by(log, "line\n")
    assert taken.wait(10)
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 2.9 and str(tmp_path / "log") in open_files()
    goes_on.set()
    log._writer.join(10)


LOGS = """
import subprocess, sys
from darktrt.serve.server_log import ServerLog
log = ServerLog(sys.argv[1])
log.follow(subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True).stdout)
"""


def test_a_process_ends_though_its_log_goes_on(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LOGS, str(tmp_path / "log")]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True) as one:
        try:
            assert one.wait(20) == 0
        finally:
            os.killpg(one.pid, signal.SIGKILL)


def test_each_failure_of_the_log_s_file_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second one too, after lines were written again."""
    log, (soft, hard) = ServerLog(tmp_path / "log"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(1, 3):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            written_by(log, "line\n" * 3)
            wait_for(lambda: log._lost == 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        written_by(log, "after\n")
        wait_for(lambda number=number: (tmp_path / "log").read_text().count("(3 lines were lost here)\nafter\n") == number)
        assert log._lost == 0 and len(told(caplog)) == number
    log.close()


def test_a_log_may_be_shortened_while_it_is_written(tmp_path: Path) -> None:
    """By a program that rotates logs; what was in it before the server started is gone."""
    path = tmp_path / "log"
    path.write_text("of an earlier server\n")
    log = ServerLog(path)
    written_by(log, "first\n")
    wait_for(lambda: path.read_text() == "first\n")
    os.truncate(path, 0)
    written_by(log, "second\n")
    wait_for(lambda: path.read_text() == "second\n")
    log.close()


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(DarktrtError, match="log: cannot write the log: No such device or address"):
        ServerLog(tmp_path / "log")


@pytest.mark.parametrize("kind", ["folder", "fifo", "missing", "long"])
def test_files_that_are_no_log(kind: str, tmp_path: Path) -> None:
    path = tmp_path / {"missing": "missing/log", "long": "x" * 300}.get(kind, "log")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    said = {"folder": "Is a directory", "fifo": "is a pipe or device", "missing": "No such file", "long": "File name too long"}
    with pytest.raises(DarktrtError, match=f"log.*{said[kind]}|x: cannot write the log: {said[kind]}"):
        ServerLog(path)
    if kind == "fifo":
        os.close(reader)


def test_the_last_words_of_a_server() -> None:
    log = [
        "before it",
        "I1125 07:00:00 1 a.cc:1] ready",
        "+----+",
        "| id |",
        "terminate called",
        "  what():  too long",
        "Signal (6) received.",
        " 0# 0x1 in a",
        "",
    ]
    assert last_words(log) == "terminate called what():  too long Signal (6) received."
    assert last_words(["I1125 07:00:00 1 a.cc:1] ready", *"abcde"]) == "c d e"
    assert last_words(log[:4]) == last_words([]) == ""


# --- who may reach it ---


@pytest.mark.parametrize(("address", "alone"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)])
def test_addresses_of_this_machine_alone(address: str, alone: bool) -> None:
    assert is_loopback(address) is alone
    with pytest.raises(DarktrtError, match="'no such' is no address to listen at"):
        is_loopback("no such")


@pytest.mark.parametrize(
    ("version", "mended"),
    [("2.51.0", False), ("2.66.9", False), ("2.67.0", True), ("2.100.0dev", True), ("3.0.0", True), ("unknown", False)],
)
def test_versions_with_holes(version: str, mended: bool) -> None:
    assert is_mended(version) is mended


def test_other_machines_reach_only_a_server_without_holes(
    stand_in: MakeProgram, options: StartOptions, repository: Path, tmp_path: Path
) -> None:
    wide = replace(options, address="0.0.0.0")
    said = r"tritonserver 2.51.0 has security holes that Triton 2.67 \(container 26.03\) mends, so it is not started at 0.0.0.0"
    with pytest.raises(DarktrtError, match=said) as caught, running(repository, wide, stand_in()):
        pass
    assert caught.value.argument == "insecure" and (tmp_path / "started").read_text().count("address=127.0.0.1") == 3
    with running(repository, replace(wide, insecure=True), stand_in()) as one:
        assert one.ready() and len(server.caveats(one)) == 2
    program = stand_in(version="2.67.0")
    with running(repository, wide, program) as one:
        (caveat_of_size,) = server.caveats(one)
        assert one.ready() and "has no limit for the size of a request over HTTP" in caveat_of_size
    Path(program.path).write_text(Path(program.path).read_text() + "# it has the option http-max-input-size\n")
    with running(repository, wide, program) as one:
        assert server.caveats(one) == []


def test_shared_memory_is_opened_to_clients_by_an_option(repository: Path, tmp_path: Path) -> None:
    """In the way of the server's version; what a user closes himself is left to him."""
    program = tmp_path / "tritonserver"
    program.write_bytes(b"http-restricted-api allow-client-shm")
    words = server_command(repository, StartOptions(shared_memory=True), Program(str(program)))
    assert "--http-restricted-api=trace,logging:closed:=nobody" in words and "--allow-client-shm=true" in words
    own = ("--http-restricted-api=statistics:a=b",)
    words = server_command(repository, StartOptions(arguments=own), Program(str(program)))
    assert [word for word in words if "restricted" in word] == [
        "--grpc-restricted-protocol=trace,logging,shared-memory:closed:=nobody",
        *own,
    ]
    assert "--allow-client-shm=true" not in words


@pytest.mark.parametrize("port", [0, -1, 65536, 70000])
def test_numbers_that_are_no_ports(port: int) -> None:
    with pytest.raises(DarktrtError, match=f"grpc_port is {port}; ports are 1 to 65535") as caught:
        StartOptions(grpc_port=port)
    assert caught.value.argument == "grpc_port"
    assert StartOptions(grpc_port=1, http_port=65535).grpc_port == 1


def test_memory_of_the_backend_is_its_user_s_alone(
    stand_in: MakeProgram, options: StartOptions, repository: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its mode; in versions whose clients could register it, it has no name any more once the models are ready."""
    own = memory / f"triton_python_backend_shm_region_darktrt_127.0.0.1_{options.http_port}_abc"
    program = stand_in()
    with monkeypatch.context() as patch:
        patch.setattr(server, "wait_until_ready", lambda _: own.touch(0o644))
        with running(repository, options, program):
            assert not own.exists()
        Path(program.path).write_text(Path(program.path).read_text() + "# the key contains the reserved prefix\n")
        with running(repository, options, program):
            assert own.stat().st_mode & 0o777 == 0o600
    assert not own.exists()


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


CONTAINERS = """
23.03 8.5.3, 24.01 8.6.1, 24.04 8.6.3, 24.05 10.0.1, 24.06 10.1.0, 24.07 10.2.0, 24.08 10.3.0, 24.09 10.4.0, 24.10 10.5.0,
24.11 10.6.0, 24.12 10.7.0, 25.02 10.8.0, 25.04 10.9.0, 25.05 10.10.0, 25.07 10.11.0, 25.08 10.13.2, 25.10 10.13.3,
26.01 10.14.1, 26.02 10.15.1, 26.03 10.16.0, 26.05 10.16.1, 26.06 11.0.0, 26.07 11.1.0, 26.08 11.2.1
"""
"""Releases and their TensorRT, of NVIDIA's support matrix."""


def test_each_plan_gets_the_container_of_its_tensorrt(made: Made, tmp_path: Path) -> None:
    manifest = read_plan_manifest(write_plan(tmp_path, nms_info(made)))
    for release, version in (pair.split() for pair in CONTAINERS.replace("\n", " ").split(",")):
        found = container_for(replace(manifest, target=f"TensorRT {version}"))
        assert (found.release, found.loads) == (release, True)
    assert NEWEST == release


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
    wide = StartOptions(address="10.0.0.1")
    with pytest.raises(
        DarktrtError, match=r"tritonserver:24\.08-py3 has security holes .* not started at 10\.0\.0\.1, where other"
    ):
        docker_command(models, wide)
    command = docker_command(models, replace(wide, insecure=True))
    assert command.warnings == (caveat("nvcr.io/nvidia/tritonserver:24.08-py3"),) and str(command) == (
        "docker run --rm --gpus all --shm-size=1g --ulimit=stack=1073741824 "
        "-p=10.0.0.1:8000:8000 -p=10.0.0.1:8001:8001 -p=10.0.0.1:8002:8002 "
        f"-v='{models}:/models:ro' nvcr.io/nvidia/tritonserver:24.08-py3 tritonserver --model-repository=/models "
        "--http-address=0.0.0.0 --http-port=8000 --grpc-address=0.0.0.0 --grpc-port=8001 --metrics-address=0.0.0.0 "
        "--metrics-port=8002 --exit-timeout-secs=10 --model-control-mode=none "
        "--http-restricted-api=trace,logging,shared-memory:closed:=nobody "
        "--grpc-restricted-protocol=trace,logging,shared-memory:closed:=nobody "
        "'--backend-config=tensorrt,plugins=/models/a/1/libdarktrt_plugins.so;/models/b/1/libdarktrt_plugins.so'"
    ).replace(f"-v='{models}:/models:ro'", f"'-v={models}:/models:ro'")


def test_docker_commands_of_the_python_backend(made: Made, tmp_path: Path) -> None:
    """The container's Python gets what it lacks, and a plan of 8.6.0 comes with a warning."""
    publish(write_plan(tmp_path, nms_info(made), target="TensorRT 8.6.0"), tmp_path / "models", name="made")
    command = docker_command(tmp_path / "models", StartOptions())
    assert f"-v={install.BACKEND_REQUIREMENTS}:/requirements.txt:ro" in command.words
    tag, *shell, script = command.words[-4:]
    assert (tag, *shell) == ("nvcr.io/nvidia/tritonserver:24.01-py3", "bash", "-c")
    assert script.startswith(
        "pip install --no-deps --only-binary=:all: --require-hashes --quiet --disable-pip-version-check "
        "--requirement=/requirements.txt && pip install 'tensorrt==8.6.0.*' && exec tritonserver "
    )
    assert shlex.split(str(command))[-1] == script
    assert command.warnings == (
        f"made: no container up to {NEWEST} carries TensorRT 8.6.0; nearest is nvcr.io/nvidia/tritonserver:24.01-py3 with "
        "TensorRT 8.6.1, in which the plan must be built again, because TensorRT loads only plans of its own version",
        caveat("nvcr.io/nvidia/tritonserver:24.01-py3"),
    )


def test_a_container_without_holes_may_be_reached_and_limits_requests(made: Made, tmp_path: Path) -> None:
    publish(write_plan(tmp_path, nms_info(made), target="TensorRT 10.16.0"), tmp_path / "models", name="made")
    command = docker_command(tmp_path / "models", StartOptions(address="10.0.0.1", max_request_bytes=1000))
    assert "tritonserver:26.03-py3 " in str(command) and "--http-max-input-size=1000" in str(command)
    assert command.warnings == ()
    with pytest.raises(DarktrtError, match="a container shares no memory with clients outside it") as caught:
        docker_command(tmp_path / "models", StartOptions(shared_memory=True))
    assert caught.value.argument == "shared_memory"


@pytest.mark.parametrize(
    ("target", "release", "closes", "limits"),
    [
        ("8.5.3", "23.03", False, False),
        ("8.6.1", "24.01", True, False),
        ("10.10.0", "25.05", True, False),
        ("10.11.0", "25.07", True, True),
    ],
)
def test_a_container_gets_the_options_that_it_knows(
    made: Made, tmp_path: Path, target: str, release: str, closes: bool, limits: bool
) -> None:
    """It would not start with others; none of these releases is without holes."""
    publish(write_plan(tmp_path, nms_info(made), target=f"TensorRT {target}"), tmp_path / "models", name="made")
    command = docker_command(tmp_path / "models", StartOptions())
    assert f"tritonserver:{release}-py3" in str(command) and len(command.warnings) == 1
    assert ("--http-restricted-api" in str(command), "--http-max-input-size" in str(command)) == (closes, limits)


def test_plans_for_later_versions_need_an_option(made: Made, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, nms_info(made), target="TensorRT 10.12.0", version_compatible=True)
    publish(plan, tmp_path / "models", TensorRTBackend(), "made")
    command = docker_command(tmp_path / "models", StartOptions())
    assert command.words[-1] == "--backend-config=tensorrt,version-compatible=true"
    assert command.warnings == (caveat("nvcr.io/nvidia/tritonserver:25.08-py3"),)


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
    nobody = "trace,logging,shared-memory:closed:=nobody"
    closed = [f"--http-restricted-api={nobody}", f"--grpc-restricted-protocol={nobody}"]
    limit = f"--http-max-input-size={StartOptions().max_request_bytes}"
    assert done.stdout.splitlines() == [f"--model-repository={tmp_path}/models", limit, *closed, *plugins]


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml"])
def test_the_images_are_fixed_by_their_digests_and_carry_one_tensorrt(name: str) -> None:
    text = (ROOT / "docker" / name).read_text()
    images = re.findall(r"nvcr\.io/nvidia/(?:tensorrt|tritonserver):([0-9.]+)-py3(@sha256:[0-9a-f]{64})?", text)
    assert images and {release for release, _ in images} == {"26.06"} and all(digest for _, digest in images)
    assert "26.06" >= MENDED_RELEASE and ".".join(map(str, TENSORRT["26.06"])) in text
