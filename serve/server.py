"""A real ``tritonserver`` on this machine: found or installed, started, watched until it is ready, and stopped."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO

from darktrt import DarktrtError
from serve.repository import models_of

PACKAGE = "nvidia-pytriton"
PACKAGE_VERSION = "0.7.0"
"""The pip package whose ``tritonserver`` is taken; it has the Python backend alone."""
_BACKEND_NEEDS = ("numpy<2", "onnxruntime>=1.18", "pillow>=10.1")
"""What the Python kind imports; that package's backend is of NumPy 1."""

READY_SECONDS = 300
EXIT_SECONDS = 10
"""What requests in flight get to finish."""

_SHARED_MEMORY = Path("/dev/shm")
_LINES_KEPT = 400


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
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

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
        program: what to start (default: :func:`find_program`).
        log: where the server's log goes.

    Raises:
        DarktrtError: the server or a model does not start; the message has the lines of its log that matter.
    """
    options = options or StartOptions()
    server = start(repository, options, program or find_program(), log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.stop()
        _remove_shared_memory(options)


def start(repository: str | Path, options: StartOptions, program: Program, log: IO[str] | None = None) -> Server:
    """Start a server, which is not ready yet.

    Raises:
        DarktrtError: the repository has no models, or a port is taken.
    """
    models_of(repository)
    for port in (options.http_port, options.grpc_port, options.metrics_port):
        _check_free(options.address, port)
    _remove_shared_memory(options)
    command = server_command(Path(repository), options, program)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    environment = program.environment()
    # a session of its own: Ctrl-C reaches darktrt alone, which then stops it in order
    process = subprocess.Popen(command, env=environment, text=True, errors="replace", start_new_session=True, **pipes)  # type: ignore[call-overload]
    host = "127.0.0.1" if options.address == "0.0.0.0" else options.address
    server = Server(process, *(f"{host}:{port}" for port in (options.http_port, options.grpc_port, options.metrics_port)))
    Thread(target=_keep_lines, args=(server, log), daemon=True).start()
    return server


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
    return [*words, *options.arguments]


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
            return "\n".join(list(dict.fromkeys(found))[-12:])
    return "(it wrote nothing)"


def _keep_lines(server: Server, log: IO[str] | None) -> None:
    assert server.process.stdout
    for line in server.process.stdout:
        server.lines.append(line.rstrip("\n"))
        if log:
            log.write(line)
            log.flush()


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


def find_program(install: Callable[[Path], None] | None = None) -> Program:
    """The ``tritonserver`` on PATH, else that of the pip package, which is installed on first use.

    Raises:
        DarktrtError: there is none, and none can be installed.
    """
    on_path = shutil.which("tritonserver")
    if on_path:
        return Program(on_path)
    folder = environment_folder()
    if not (folder / ".complete").is_file():
        (install or install_package)(folder)
    return package_program(folder)


def docker_runs() -> bool:
    """Whether there is Docker here, and its daemon answers."""
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0


def environment_folder() -> Path:
    """The virtual environment of the pip package, for this Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "darktrt" / f"triton-{PACKAGE_VERSION}-{sys.implementation.cache_tag}"


def install_package(folder: Path) -> None:
    """Make the virtual environment.

    Raises:
        DarktrtError: pip cannot install the package.
    """
    print(f"installing {PACKAGE} {PACKAGE_VERSION} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "--no-deps", f"{PACKAGE}=={PACKAGE_VERSION}"],  # what it depends on is of its own Python API
        [*pip, *_BACKEND_NEEDS],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DarktrtError(f"cannot install {PACKAGE} ({reason}); put a tritonserver on PATH, or use Docker")
    _place_backend(folder)
    (folder / ".complete").touch()


def _place_backend(folder: Path) -> None:
    """The Python backend with the stub of this Python, as the server looks for it."""
    package = _site_packages(folder) / "pytriton" / "tritonserver"
    stub = package / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not stub.is_file():
        raise DarktrtError(f"{PACKAGE} {PACKAGE_VERSION} has no backend for this Python; use Python 3.10 to 3.13")
    shutil.copytree(package / "backends", folder / "backends")
    shutil.copytree(package / "caches", folder / "caches")
    shutil.copy(stub, folder / "backends" / "python")


def package_program(folder: Path) -> Program:
    """The server in an environment that :func:`install_package` made.

    Raises:
        DarktrtError: this Python has no shared library, which the backend needs.
    """
    packages = _site_packages(folder)
    libraries = (str(packages / "nvidia_pytriton.libs"), _python_library())
    server = packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    return Program(str(server), libraries, folder, folder / "backends")


def _site_packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _python_library() -> str:
    """The folder of this Python's shared library."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR") or "", f"{sys.base_prefix}/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    for folder in folders:
        if (Path(folder) / name).is_file():
            return folder
    raise DarktrtError(f"Triton's Python backend needs {name}; on Debian and Ubuntu: apt install {name.split('.so')[0]}")
