"""A ``tritonserver`` process on this machine: started, watched until it is ready, and stopped."""

from __future__ import annotations

import glob
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from itertools import takewhile
from pathlib import Path

from darktrt.errors import DarktrtError
from darktrt.files import scratch_folder
from darktrt.serve.access import RESERVED_PREFIX, caveat, closed_protocols, exposure_error, is_loopback, is_mended
from darktrt.serve.config import CONFIG_NAME
from darktrt.serve.install import PACKAGE, installed_program
from darktrt.serve.program import Program, program_on_path
from darktrt.serve.repository import models_of, no_models, read_config, tensorrt_arguments
from darktrt.serve.server_log import ServerLog

READY_SECONDS = 300
ANSWER_SECONDS = 5
"""How long a server may take to answer about itself."""

EXIT_SECONDS = 10
"""How long a server that stops waits for requests in flight."""

STACK_BYTES = 1 << 30
"""Address space of the stack of each of the server's threads. Its HTTP library puts twice the body of a form on the stack, and
curl and Python's urllib send bodies as forms by default: with the usual 8 MiB, a body of 4 MiB ends the server."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Ignores the proxies of the environment."""

_SHARED_MEMORY = Path("/dev/shm")
_LINES_SHOWN, _WORDS_SHOWN = 12, 3
_LOGGED, _FRAME = re.compile(r"[IWEF]\d{4} "), re.compile(r"[|+]|\s*\d+# ")
_ANSWER_BYTES = 1 << 20
_LARGEST_PORT = 65535
_SHELL = """\
ulimit -S -s "$0"
exec 3<&0
(trap '' INT TERM; read -r _ <&3; kill -s KILL 0) </dev/null >/dev/null 2>&1 &
exec "$@" 3<&- </dev/null
"""
"""The process in the background waits for the end of the standard input, and is of the server's process group."""

_RESERVES = b"reserved prefix"
"""In the programs that let no client register the memory of the Python backend."""

_NO_REASON = re.compile(r"failed to load '[^']*'\"?$")


@dataclass(frozen=True)
class StartOptions:
    """How to start a server.

    Raises:
        DarktrtError: a port is none.
    """

    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    models: tuple[str, ...] | None = None
    """Load only these, and let clients load and unload models; None loads all and lets clients do neither."""
    shared_memory: bool = False
    """Let clients register shared memory. Each of them may then list, use and release the memory of all."""
    insecure: bool = False
    """Let other machines reach a server with known security holes."""
    max_request_bytes: int = 64 << 20
    """Of a request over HTTP, where the server has such a limit."""
    cache_bytes: int = 0
    """Of the response cache; 0 for none."""
    arguments: tuple[str, ...] = ()
    """More options of tritonserver itself."""

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port", "metrics_port"):
            if not 1 <= (port := getattr(self, name)) <= _LARGEST_PORT:
                raise DarktrtError(f"{name} is {port}; ports are 1 to {_LARGEST_PORT}", name)


class Server:
    """A server process, which can be started again in its place; ``http``, ``grpc`` and ``metrics`` are its addresses, as
    ``host:port``.

    Args:
        command: the words that start the program.
    """

    process: subprocess.Popen[str]
    """The latest."""

    def __init__(self, repository: Path, options: StartOptions, program: Program, command: Sequence[str]) -> None:
        self.repository, self.options, self.program = repository, options, program
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.address, options.address)
        host = f"[{host}]" if ":" in host else host
        ports = options.http_port, options.grpc_port, options.metrics_port
        self.http, self.grpc, self.metrics = (f"{host}:{port}" for port in ports)
        self._command = _in_its_shell(command)

    def start(self, log: ServerLog) -> None:
        """Start the process, which is not ready yet.

        Raises:
            DarktrtError: a port is in use.
        """
        for name in ("http_port", "grpc_port", "metrics_port"):
            _check_free(self.options.address, getattr(self.options, name), name)
        _remove_shared_memory(self.options)
        self.log = log
        self.process = subprocess.Popen(
            self._command,
            env=self.program.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server in order
        )
        assert self.process.stdout
        log.follow(self.process.stdout)

    def settle(self) -> None:
        """Return once the process that was started is ready, and its memory guarded.

        Raises:
            DarktrtError: as :func:`wait_until_ready`.
        """
        wait_until_ready(self)
        self.guard_memory()
        if _RESERVES not in Path(self.program.path).read_bytes():
            _remove_shared_memory(self.options)  # the processes that use it have it open, and nobody else can name it any more

    def guard_memory(self) -> None:
        """Keep the Python backend's memory, which has the images of requests, from other users of the machine."""
        for region in _regions(self.options):
            with suppress(FileNotFoundError, PermissionError):  # it is gone, or of another user
                region.chmod(0o600)

    def ready(self) -> bool:
        """Whether all of its models are ready."""
        try:
            self.get("v2/health/ready")
        except OSError:
            return False
        return True

    def version(self) -> str:
        """Of Triton, such as ``2.51.0``.

        Raises:
            OSError: the server does not answer.
        """
        return str(json.loads(self.get("v2"))["version"])

    @property
    def limits_requests(self) -> bool:
        """Whether the server refuses requests over HTTP that are larger than its limit."""
        return any(word.startswith("--http-max-input-size=") for word in self._command)

    def get(self, path: str, body: bytes | None = None) -> bytes:
        """The answer over HTTP, at most a megabyte of it; with a body, to a request of the method POST.

        Raises:
            OSError: there is none within some seconds, or it reports an error.
        """
        try:
            with _DIRECT.open(f"http://{self.http}/{path}", body, ANSWER_SECONDS) as answer:
                return bytes(answer.read(_ANSWER_BYTES))
        except HTTPException as error:
            raise OSError(f"no answer of HTTP: {error!r}") from error

    def stop(self) -> None:
        """End the server after the requests in flight, and what it started; may be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_SECONDS + 5)
        self.kill()

    def kill(self) -> None:
        """End the server, its Python backends and all else that it started at once, also where it has ended before them."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin
        self.process.stdin.close()
        _remove_shared_memory(self.options)


@contextmanager
def running(
    repository: str | Path,
    options: StartOptions | None = None,
    program: Program | None = None,
    log: str | os.PathLike[str] | None = None,
) -> Iterator[Server]:
    """A server of the repository's models, ready; it stops when the block ends.

    Args:
        program: the server to start (default: the one on PATH, else that of the pip package).
        log: the file for the server's log.

    Raises:
        DarktrtError: the server or a model does not start; the message has the relevant lines of its log. Or the server has
            security holes, and other machines would reach it.
    """
    options, program = options or StartOptions(), program or program_on_path() or installed_program()
    server = make_server(repository, options, program)
    if not options.insecure and not is_loopback(options.address) and not is_mended(version := program_version(program)):
        raise exposure_error(f"tritonserver {version}", options.address)
    with closing(ServerLog(log)) as kept:
        server.start(kept)
        try:
            server.settle()
            yield server
        finally:
            server.stop()


@contextmanager
def running_on_free_ports(
    repository: str | Path, options: StartOptions | None = None, program: Program | None = None
) -> Iterator[Server]:
    """As :func:`running`, on ports of 127.0.0.1 that are free."""
    with running(repository, _on_free_ports(options or StartOptions()), program) as server:
        yield server


def _on_free_ports(options: StartOptions) -> StartOptions:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        http, grpc, metrics = (int(free.getsockname()[1]) for free in sockets)
    return replace(options, http_port=http, grpc_port=grpc, metrics_port=metrics)


def make_server(repository: str | Path, options: StartOptions, program: Program) -> Server:
    """A server that is not started yet.

    Raises:
        DarktrtError: the repository has no models, or other folders, or the server lacks the backend of a model.
    """
    for model in models_of(repository):
        _check_backend(model, program)
    if options.models is None and (others := no_models(repository)):
        raise DarktrtError(
            f"{others[0]}: is no model, and Triton takes every folder of a repository for one; remove it, or move it elsewhere"
        )
    return Server(Path(repository), options, program, server_command(Path(repository), options, program))


def program_version(program: Program) -> str:
    """The version of Triton that a program is, which it reports when it runs: here without models, and for this machine only.

    Raises:
        DarktrtError: it does not start.
    """
    options = _on_free_ports(StartOptions())
    with scratch_folder() as empty, closing(ServerLog()) as log:
        words = [program.path, f"--model-repository={empty}", *listen_arguments(options)]
        server = Server(empty, options, program, words)
        server.start(log)
        try:
            wait_until_ready(server)
            return server.version()
        finally:
            server.kill()


def caveats(server: Server) -> list[str]:
    """What a user should know of a server that is ready: sentences."""
    version = server.version()
    name = f"tritonserver {version}"
    sentences = [] if is_mended(version) else [caveat(name)]
    if not server.limits_requests:
        sentences.append(
            f"{name} has no limit for the size of a request over HTTP: it reads all of one into memory before it refuses it"
        )
    return sentences


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
    binary = Path(program.path).read_bytes()
    words = [
        program.path,
        f"--model-repository={repository.resolve()}",
        *listen_arguments(options),
        f"--backend-config=python,shm-region-prefix-name={_prefix(options)}",
    ]
    if b"http-restricted-api" in binary:  # from 2.40 on
        words += closed_protocols(options.shared_memory, options.arguments)
    if options.shared_memory and b"allow-client-shm" in binary:  # from 2.68 on
        words.append("--allow-client-shm=true")
    if program.backends:
        words += [f"--backend-directory={program.backends}", f"--cache-directory={program.backends.with_name('caches')}"]
    if b"http-max-input-size" in binary:  # from 2.59.1 on
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
            raise DarktrtError(f"tritonserver does not start:\n{relevant_lines(server.log.lines)}")
        if time.monotonic() > end:
            raise DarktrtError(f"tritonserver is not ready after {seconds:g} s:\n{relevant_lines(server.log.lines)}")
        time.sleep(0.1)


def relevant_lines(lines: Sequence[str]) -> str:
    """The lines of a log that report models that did not load, else its errors, else its last lines."""
    for marks in (("failed to load '",), ("error:", "E1", "E0"), ("",)):
        if matches := [line for line in lines if line.startswith(marks) or (marks[0] in line and marks[0])]:
            reasons = [line for line in matches if not _NO_REASON.search(line)]  # Triton repeats the line without its reason
            return "\n".join(list(dict.fromkeys(reasons or matches))[-_LINES_SHOWN:])
    return "(it wrote nothing)"


def last_words(lines: Sequence[str]) -> str:
    """What a program that ended wrote after the last line of Triton's log, without tables and the frames of a stack."""
    last = takewhile(lambda line: not _LOGGED.match(line), reversed(lines))
    return " ".join([line.strip() for line in reversed(list(last)) if line.strip() and not _FRAME.match(line)][-_WORDS_SHOWN:])


def _in_its_shell(command: Sequence[str]) -> list[str]:
    """The command in a process of its own kind; this process's limits stay.

    - Its threads have stacks for the bodies of requests: the C library reads the limit when a program starts, so that a shell
      sets it and then becomes the server.
    - It ends, with all that it started, when this process has ended however that came about, and its standard input with it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    size = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    return ["sh", "-c", _SHELL, str(size >> 10), *command]


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
    """Of the names of the Python backend's shared memory; an address and a port belong to one server."""
    return f"{RESERVED_PREFIX}darktrt_{options.address}_{options.http_port}_"


def _remove_shared_memory(options: StartOptions) -> None:
    """Remove the names of the shared memory of a server at these ports, of one that was killed among others."""
    for region in _regions(options):
        with suppress(FileNotFoundError, PermissionError):  # it is gone, or of another user
            region.unlink()


def _regions(options: StartOptions) -> Iterator[Path]:
    return _SHARED_MEMORY.glob(f"{glob.escape(_prefix(options))}*")
