"""A real ``tritonserver`` on this machine: found or installed, started, watched until it is ready, and stopped."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO, Literal

from darktrt.errors import DarktrtError
from darktrt.serve.config import CONFIG_NAME
from darktrt.serve.repository import models_of, read_config, tensorrt_arguments

_FACTS = """\
import sys, sysconfig
print("%d.%d" % sys.version_info[:2], sysconfig.get_config_var("LIBDIR"), sys.base_prefix + "/lib", sep="\\n")
"""
"""Prints a Python's version, and where its shared library may be."""

PACKAGE = "nvidia-pytriton"
PACKAGE_VERSION = "0.7.0"
"""The pip package whose ``tritonserver`` is taken; it has the Python backend alone."""
_BACKEND_NEEDS = ("numpy<2", "onnxruntime>=1.18", "pillow>=10.1")
"""What the Python kind imports. The package's backend is of NumPy 1: with 2 it crashes on encoded images."""

READY_SECONDS = 300
EXIT_SECONDS = 10
"""What requests in flight get to finish."""

_PYTHONS = ("3.12", "3.11", "3.10")
"""For which there are NumPy 1 and a stub of the Python backend."""
STACK_BYTES = 1 << 30
"""Of each of the server's threads, as address space. Its HTTP library puts twice the body of a form on the stack, and curl and
Python's urllib send every body as a form unless told otherwise: with the usual 8 MiB, one of 4 MiB ends the server."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The server is asked itself, whatever proxy the environment names."""

_SHARED_MEMORY = Path("/dev/shm")
_LINES_KEPT = 400
_NO_REASON = re.compile(r"failed to load '[^']*'\"?$")


@dataclass(frozen=True)
class Program:
    """A ``tritonserver`` to start."""

    path: str
    libraries: tuple[str, ...] = ()
    """Folders to look for its libraries in."""
    python: Path | None = None
    """The virtual environment that the Python backend runs in."""
    backends: Path | None = None

    def environment(self) -> dict[str, str]:
        """This process's, with what the server needs."""
        result = dict(os.environ)
        if self.libraries:
            result["LD_LIBRARY_PATH"] = os.pathsep.join([*self.libraries, *filter(None, [result.get("LD_LIBRARY_PATH")])])
        if self.python:
            result["PATH"] = os.pathsep.join([str(self.python / "bin"), result.get("PATH", "")])
            result["VIRTUAL_ENV"] = str(self.python)
            result.pop("PYTHONPATH", None)
            result.pop("PYTHONHOME", None)
        return result


@dataclass(frozen=True)
class StartOptions:
    """How to start a server; the defaults are the command's."""

    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    models: tuple[str, ...] | None = None
    """Load these alone, and let clients load and unload models; None for all, for good."""
    most_bytes: int = 64 << 20
    """Of a request over HTTP, where the server can limit it."""
    cache_bytes: int = 0
    """Of the response cache; 0 for none."""
    arguments: tuple[str, ...] = ()
    """More of tritonserver's own."""


@dataclass
class Server:
    """A server that was started; ``http`` and ``grpc`` are its addresses, as ``host:port``."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    metrics: str
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))
    """The last of its log."""

    def ready(self) -> bool:
        """Whether it answers that all of its models are ready."""
        try:
            with _DIRECT.open(f"http://{self.http}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def watch(self) -> None:
        """Return only when the server ends by itself.

        Raises:
            DarktrtError: it did, with the lines of its log that matter.
        """
        status = self.process.wait()
        raise DarktrtError(f"tritonserver ended with status {status}:\n{what_matters(self.lines)}")

    def stop(self) -> None:
        """End it, after the requests in flight; may be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(EXIT_SECONDS + 5)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it and its helpers at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(
    repository: str | Path, options: StartOptions | None = None, program: Program | None = None, log: IO[str] | None = None
) -> Iterator[Server]:
    """A server of the repository's models, ready; it is stopped as the block ends.

    Args:
        program: what to start (default: the one on PATH, else that of the pip package).
        log: where the server's log goes.

    Raises:
        DarktrtError: the server or a model does not start; the message has the lines of its log that matter.
    """
    options = options or StartOptions()
    server = start(repository, options, program or program_on_path() or installed_program(), log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.stop()
        _remove_shared_memory(options)


def start(repository: str | Path, options: StartOptions, program: Program, log: IO[str] | None = None) -> Server:
    """Start a server, which is not ready yet.

    Raises:
        DarktrtError: the repository has no models, the server lacks the backend of one, or a port is taken.
    """
    for model in models_of(repository):
        _check_backend(model, program)
    for port in (options.http_port, options.grpc_port, options.metrics_port):
        _check_free(options.address, port)
    _remove_shared_memory(options)
    command = server_command(Path(repository), options, program)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    environment = program.environment()
    # a session of its own: Ctrl-C reaches darktrt alone, which then stops it in order
    with _large_stacks():
        process = subprocess.Popen(command, env=environment, text=True, errors="replace", start_new_session=True, **pipes)  # type: ignore[call-overload]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.address, options.address)
    host = f"[{host}]" if ":" in host else host
    http, grpc, metrics = (f"{host}:{port}" for port in (options.http_port, options.grpc_port, options.metrics_port))
    server = Server(process, http, grpc, metrics)
    Thread(target=_keep_lines, args=(server, log), daemon=True).start()
    return server


def _check_backend(model: Path, program: Program) -> None:
    """That the server has the model's backend, where it is known which it has."""
    backend = read_config(model / CONFIG_NAME).backend
    if program.backends and not (program.backends / backend).is_dir():
        have = ", ".join(sorted(path.name for path in program.backends.iterdir()))
        raise DarktrtError(
            f"{model.name}: needs Triton's backend '{backend}', and {PACKAGE} has: {have}; put another tritonserver on "
            "PATH, use Docker, or serve it by 'darktrt serve repository --kind python'"
        )


def server_command(repository: Path, options: StartOptions, program: Program) -> list[str]:
    """The words that start it."""
    words = [
        program.path,
        f"--model-repository={repository.resolve()}",
        *listen_arguments(options),
        f"--backend-config=python,shm-region-prefix-name={_prefix(options)}",
    ]
    if program.backends:
        words += [f"--backend-directory={program.backends}", f"--cache-directory={program.backends.with_name('caches')}"]
    if b"http-max-input-size" in Path(program.path).read_bytes():  # not before 2.60
        words.append(f"--http-max-input-size={options.most_bytes}")
    return [*words, *options.arguments, *tensorrt_arguments(repository, repository.resolve())]


def listen_arguments(options: StartOptions) -> list[str]:
    """Of any server, in a container too."""
    words = [
        f"--http-address={options.address}",
        f"--http-port={options.http_port}",
        f"--grpc-address={options.address}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-address={options.address}",
        f"--metrics-port={options.metrics_port}",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        f"--model-control-mode={'none' if options.models is None else 'explicit'}",
    ]
    words += [f"--load-model={name}" for name in options.models or ()]
    if options.cache_bytes:
        words.append(f"--cache-config=local,size={options.cache_bytes}")
    return words


def wait_until_ready(server: Server, seconds: float = READY_SECONDS) -> None:
    """Return once the server and all its models are ready.

    Raises:
        DarktrtError: it ends before, or takes longer; with the lines of its log that matter.
    """
    end = time.monotonic() + seconds
    while not server.ready():
        if server.process.poll() is not None:
            time.sleep(0.2)  # until its last lines are read
            raise DarktrtError(f"tritonserver does not start:\n{what_matters(server.lines)}")
        if time.monotonic() > end:
            raise DarktrtError(f"tritonserver is not ready after {seconds:g} s:\n{what_matters(server.lines)}")
        time.sleep(0.1)


def what_matters(lines: Sequence[str]) -> str:
    """Of a log: the reasons why models were left out, else errors, else its end."""
    for marks in (("failed to load '",), ("error:", "E1", "E0"), ("",)):
        if found := [line for line in lines if line.startswith(marks) or (marks[0] in line and marks[0])]:
            reasons = [line for line in found if not _NO_REASON.search(line)]  # which Triton repeats without
            return "\n".join(list(dict.fromkeys(reasons or found))[-12:])
    return "(it wrote nothing)"


def _keep_lines(server: Server, log: IO[str] | None) -> None:
    assert server.process.stdout
    for line in server.process.stdout:
        server.lines.append(line.rstrip("\n"))
        if log:
            log.write(line)
            log.flush()


@contextmanager
def _large_stacks() -> Iterator[None]:
    """What is started meanwhile has threads with room for the bodies of requests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _check_free(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((address, port))
        except OSError as error:
            raise DarktrtError(
                f"cannot listen at {address}:{port}: {error.strerror}; choose others by --address, --http-port, --grpc-port "
                "and --metrics-port"
            ) from error


def _prefix(options: StartOptions) -> str:
    """Of the Python backend's shared memory; a port belongs to one server."""
    return f"darktrt_{options.http_port}_"


def _remove_shared_memory(options: StartOptions) -> None:
    """What a server at these ports left when it was killed."""
    for left in _SHARED_MEMORY.glob(f"{_prefix(options)}*"):
        left.unlink(missing_ok=True)


# --- finding a server ---


Choice = Literal["auto", "path", "docker", "pip"]


def choose_program(choice: Choice) -> Program | None:
    """What is to be started; None for Docker. ``auto`` is what is on PATH, else Docker where it runs, else the pip package.

    Raises:
        DarktrtError: it is not there, or cannot be installed.
    """
    program = program_on_path() if choice in ("auto", "path") else None
    if choice == "path" and program is None:
        raise DarktrtError("there is no tritonserver on PATH; --program pip installs one")
    if program or choice == "docker" or (choice == "auto" and docker_runs()):
        return program
    return installed_program()


def program_on_path() -> Program | None:
    """The ``tritonserver`` that the user has, if there is one."""
    found = shutil.which("tritonserver")
    return Program(found) if found else None


def installed_program() -> Program:
    """That of the pip package, which is installed on first use, for all that is of this user.

    Raises:
        DarktrtError: it cannot be installed.
    """
    python = find_interpreter()
    python.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{python.folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (python.folder / ".complete").is_file():
            install_package(python)
    return package_program(python)


def docker_runs() -> bool:
    """Whether there is Docker here, and its daemon answers."""
    docker = shutil.which("docker")
    if docker is None:
        return False
    try:
        return subprocess.run([docker, "info"], capture_output=True, check=False, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@dataclass(frozen=True)
class Interpreter:
    """A Python that the backend of the pip package can run in."""

    path: str
    version: str
    """Such as 3.11."""
    libraries: str
    """The folder of its shared library."""

    @property
    def folder(self) -> Path:
        """The virtual environment of the package for it."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "darktrt" / f"triton-{PACKAGE_VERSION}-python{self.version}"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{self.version}" / "site-packages"


def find_interpreter() -> Interpreter:
    """This Python, or, where it is newer than NumPy 1, another one on PATH.

    Raises:
        DarktrtError: there is none, or it has no shared library.
    """
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = [sys.executable] if own in _PYTHONS else [f"python{version}" for version in _PYTHONS]
    for path in filter(None, map(shutil.which, names)):
        done = subprocess.run([path, "-c", _FACTS], capture_output=True, text=True, check=False)
        if done.returncode == 0:  # not so a name on PATH that stands for no Python
            version, *folders = done.stdout.split("\n")
            return Interpreter(path, version, _library_folder(version, folders[:2]))
    raise DarktrtError(
        f"{PACKAGE} needs Python {_PYTHONS[-1]} to {_PYTHONS[0]}, and none is on PATH; install one, or use Docker"
    )


def _library_folder(version: str, folders: list[str]) -> str:
    name = f"libpython{version}.so.1.0"
    for folder in (*folders, "/usr/lib/x86_64-linux-gnu", "/usr/lib64"):
        if (Path(folder) / name).is_file():
            return folder
    raise DarktrtError(f"Triton's Python backend needs {name}; on Debian and Ubuntu: apt install libpython{version}")


def install_package(python: Interpreter) -> None:
    """Make the virtual environment.

    Raises:
        DarktrtError: pip cannot install the package.
    """
    folder = python.folder
    print(f"installing {PACKAGE} {PACKAGE_VERSION} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [python.path, "-m", "venv", str(folder)],
        [*pip, "--no-deps", f"{PACKAGE}=={PACKAGE_VERSION}"],  # what it depends on is of its own Python API
        [*pip, *_BACKEND_NEEDS],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = ([line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"])[-1]
            raise DarktrtError(f"cannot install {PACKAGE} ({reason}); put a tritonserver on PATH, or use Docker")
    package = python.packages / "pytriton" / "tritonserver"
    for name in ("backends", "caches"):
        shutil.copytree(package / name, folder / name)
    shutil.copy(
        package / "python_backend_stubs" / python.version / "triton_python_backend_stub", folder / "backends" / "python"
    )
    (folder / ".complete").touch()


def package_program(python: Interpreter) -> Program:
    """The server that :func:`install_package` made."""
    server = python.packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    libraries = str(python.packages / "nvidia_pytriton.libs"), python.libraries
    return Program(str(server), libraries, python.folder, python.folder / "backends")
