"""A ``tritonserver`` process on this machine: started, watched until it is ready, and stopped."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import IO

from darktrt.errors import DarktrtError
from darktrt.serve.config import CONFIG_NAME
from darktrt.serve.install import PACKAGE, installed_program
from darktrt.serve.program import Program, program_on_path
from darktrt.serve.repository import models_of, read_config, tensorrt_arguments

READY_SECONDS = 300
EXIT_SECONDS = 10
"""How long a server that stops waits for requests in flight."""

STACK_BYTES = 1 << 30
"""Address space of the stack of each of the server's threads. Its HTTP library puts twice the body of a form on the stack, and
curl and Python's urllib send bodies as forms by default: with the usual 8 MiB, a body of 4 MiB ends the server."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Ignores the proxies of the environment."""

_SHARED_MEMORY = Path("/dev/shm")
_LINES_KEPT, _LINES_SHOWN = 400, 12
_NO_REASON = re.compile(r"failed to load '[^']*'\"?$")


@dataclass(frozen=True)
class StartOptions:
    """How to start a server."""

    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    models: tuple[str, ...] | None = None
    """Load only these, and let clients load and unload models; None loads all and lets clients do neither."""
    max_request_bytes: int = 64 << 20
    """Of a request over HTTP, where the server has such a limit."""
    cache_bytes: int = 0
    """Of the response cache; 0 for none."""
    arguments: tuple[str, ...] = ()
    """More options of tritonserver itself."""


@dataclass
class Server:
    """A server process; ``http``, ``grpc`` and ``metrics`` are its addresses, as ``host:port``."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    metrics: str
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))
    """The last of its log."""

    def ready(self) -> bool:
        """Whether all of its models are ready."""
        try:
            with _DIRECT.open(f"http://{self.http}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def watch(self) -> None:
        """Wait until the server ends by itself.

        Raises:
            DarktrtError: it did; the message has the relevant lines of its log.
        """
        status = self.process.wait()
        raise DarktrtError(f"tritonserver ended with status {status}:\n{relevant_lines(self.lines)}")

    def stop(self) -> None:
        """End the server after the requests in flight; may be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(EXIT_SECONDS + 5)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End the server and its child processes at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(
    repository: str | Path, options: StartOptions | None = None, program: Program | None = None, log: IO[str] | None = None
) -> Iterator[Server]:
    """A server of the repository's models, ready; it stops when the block ends.

    Args:
        program: the server to start (default: the one on PATH, else that of the pip package).
        log: where the server's log goes.

    Raises:
        DarktrtError: the server or a model does not start; the message has the relevant lines of its log.
    """
    options = options or StartOptions()
    server = start(repository, options, program or program_on_path() or installed_program(), log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.stop()
        _remove_shared_memory(options)


@contextmanager
def running_on_free_ports(
    repository: str | Path, options: StartOptions | None = None, program: Program | None = None
) -> Iterator[Server]:
    """As :func:`running`, on ports of 127.0.0.1 that are free."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        http, grpc, metrics = (int(free.getsockname()[1]) for free in sockets)
    options = replace(options or StartOptions(), http_port=http, grpc_port=grpc, metrics_port=metrics)
    with running(repository, options, program) as server:
        yield server


def start(repository: str | Path, options: StartOptions, program: Program, log: IO[str] | None = None) -> Server:
    """Start a server, which is not ready yet.

    Raises:
        DarktrtError: the repository has no models, the server lacks the backend of one, or a port is in use.
    """
    for model in models_of(repository):
        _check_backend(model, program)
    for name in ("http_port", "grpc_port", "metrics_port"):
        _check_free(options.address, getattr(options, name), name)
    _remove_shared_memory(options)
    process = subprocess.Popen(
        _with_large_stacks(server_command(Path(repository), options, program)),
        env=program.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server in order
    )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.address, options.address)
    host = f"[{host}]" if ":" in host else host
    http, grpc, metrics = (f"{host}:{port}" for port in (options.http_port, options.grpc_port, options.metrics_port))
    server = Server(process, http, grpc, metrics)
    Thread(target=_keep_lines, args=(server, log), daemon=True).start()
    return server


def _check_backend(model: Path, program: Program) -> None:
    """See that the server has the model's backend, where its backends are known."""
    backend = read_config(model / CONFIG_NAME).backend
    if program.backends and not (program.backends / backend).is_dir():
        have = ", ".join(sorted(path.name for path in program.backends.iterdir()))
        raise DarktrtError(
            f"{model.name}: needs Triton's backend '{backend}', and {PACKAGE} has: {have}; put another tritonserver on "
            "PATH, use Docker, or write the model for the Python backend"
        )


def server_command(repository: Path, options: StartOptions, program: Program) -> list[str]:
    """The command line of a server."""
    words = [
        program.path,
        f"--model-repository={repository.resolve()}",
        *listen_arguments(options),
        f"--backend-config=python,shm-region-prefix-name={_prefix(options)}",
    ]
    if program.backends:
        words += [f"--backend-directory={program.backends}", f"--cache-directory={program.backends.with_name('caches')}"]
    if b"http-max-input-size" in Path(program.path).read_bytes():  # from 2.60 on
        words.append(f"--http-max-input-size={options.max_request_bytes}")
    return [*words, *options.arguments, *tensorrt_arguments(repository, repository.resolve())]


def listen_arguments(options: StartOptions) -> list[str]:
    """The options of any server, in a container too."""
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
        DarktrtError: it ends before, or is not ready in time; the message has the relevant lines of its log.
    """
    end = time.monotonic() + seconds
    while not server.ready():
        if server.process.poll() is not None:
            time.sleep(0.2)  # until its last lines are read
            raise DarktrtError(f"tritonserver does not start:\n{relevant_lines(server.lines)}")
        if time.monotonic() > end:
            raise DarktrtError(f"tritonserver is not ready after {seconds:g} s:\n{relevant_lines(server.lines)}")
        time.sleep(0.1)


def relevant_lines(lines: Sequence[str]) -> str:
    """The lines of a log that report models that did not load, else its errors, else its last lines."""
    for marks in (("failed to load '",), ("error:", "E1", "E0"), ("",)):
        if matches := [line for line in lines if line.startswith(marks) or (marks[0] in line and marks[0])]:
            reasons = [line for line in matches if not _NO_REASON.search(line)]  # Triton repeats the line without its reason
            return "\n".join(list(dict.fromkeys(reasons or matches))[-_LINES_SHOWN:])
    return "(it wrote nothing)"


def _keep_lines(server: Server, log: IO[str] | None) -> None:
    assert server.process.stdout
    for line in server.process.stdout:
        server.lines.append(line.rstrip("\n"))
        if log:
            log.write(line)
            log.flush()


def _with_large_stacks(command: Sequence[str]) -> list[str]:
    """The command in a process whose threads have stacks for the bodies of requests; this process's limit stays.

    The C library reads the limit when a program starts, so that a shell sets it and then becomes the server.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    size = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    return ["sh", "-c", 'ulimit -S -s "$0" && exec "$@"', str(size >> 10), *command]


def _check_free(address: str, port: int, argument: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            raise DarktrtError(
                f"cannot listen at {address}:{port}: {error.strerror}; choose another address or port", argument
            ) from error


def _prefix(options: StartOptions) -> str:
    """Of the names of the Python backend's shared memory; a port belongs to one server."""
    return f"darktrt_{options.http_port}_"


def _remove_shared_memory(options: StartOptions) -> None:
    """Remove the shared memory that a killed server at these ports left."""
    for left in _SHARED_MEMORY.glob(f"{_prefix(options)}*"):
        left.unlink(missing_ok=True)
