"""NVIDIA's Triton containers: the one with the TensorRT of a plan, and the command that starts it with a repository."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from darktrt.engine.manifest import Manifest, manifest_path, read_manifest
from darktrt.engine.target import Target
from darktrt.errors import DarktrtError
from darktrt.serve.access import MENDED_RELEASE, caveat, closed_protocols, exposure_error, is_loopback
from darktrt.serve.backend import PLAN_NAME
from darktrt.serve.config import CONFIG_NAME
from darktrt.serve.install import BACKEND_REQUIREMENTS
from darktrt.serve.repository import check_target, loaded_versions, models_of, read_config, tensorrt_arguments
from darktrt.serve.server import STACK_BYTES, StartOptions, listen_arguments
from darktrt.wheels import PINNED

IMAGE = "nvcr.io/nvidia/tritonserver"
MOUNT = "/models"
REQUIREMENTS = "/requirements.txt"
"""Where a container finds what to install for the Python backend."""

TENSORRT = {
    "23.03": (8, 5, 3),
    "24.01": (8, 6, 1),
    "24.04": (8, 6, 3),
    "24.05": (10, 0, 1),
    "24.06": (10, 1, 0),
    "24.07": (10, 2, 0),
    "24.08": (10, 3, 0),
    "24.09": (10, 4, 0),
    "24.10": (10, 5, 0),
    "24.11": (10, 6, 0),
    "24.12": (10, 7, 0),
    "25.02": (10, 8, 0),
    "25.04": (10, 9, 0),
    "25.05": (10, 10, 0),
    "25.07": (10, 11, 0),
    "25.08": (10, 13, 2),
    "25.10": (10, 13, 3),
    "26.01": (10, 14, 1),
    "26.02": (10, 15, 1),
    "26.03": (10, 16, 0),
    "26.05": (10, 16, 1),
    "26.06": (11, 0, 0),
    "26.07": (11, 1, 0),
    "26.08": (11, 2, 1),
}
"""The newest release known to carry each TensorRT: by NVIDIA's release notes, and from 26.01 on by reports of users about these
containers, or about NVIDIA's TensorRT containers of the same months."""

NEWEST = max(TENSORRT)


@dataclass(frozen=True)
class Container:
    """A container for a plan."""

    release: str
    tensorrt: tuple[int, ...]
    loads: bool
    """Whether its TensorRT loads the plan."""

    @property
    def tag(self) -> str:
        return f"{IMAGE}:{self.release}-py3"

    def advice(self, target: str) -> str:
        """What to do with a plan that the container does not load."""
        have = ".".join(map(str, self.tensorrt))
        return (
            f"no container up to {NEWEST} carries {target}; nearest is {self.tag} with TensorRT {have}, in which the plan must "
            "be built again, because TensorRT loads only plans of its own version"
        )


def container_for(manifest: Manifest) -> Container:
    """The container whose TensorRT loads a plan, or the nearest one: of the same major version, newer rather than older.

    Raises:
        DarktrtError: no Triton loads such plans.
    """
    check_target(manifest)
    target = manifest.target
    wanted = (*(int(part) for part in target.split()[-1].split(".")), 0, 0)[:3]

    def distance(release: str) -> tuple[bool, bool, tuple[int, ...]]:
        have = TENSORRT[release]
        below = have < wanted
        return have[0] != wanted[0], below, tuple(-part for part in have) if below else have

    release = min(TENSORRT, key=distance)
    own = Target("trt", TENSORRT[release])
    return Container(release, own.version, str(own) == target or (manifest.version_compatible and own.runs_plans_of(target)))


@dataclass(frozen=True)
class DockerCommand:
    """The command that starts a container with a repository, and warnings about it."""

    words: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(word if word.startswith("$(") else shlex.quote(word) for word in self.words)


@dataclass(frozen=True)
class _Needs:
    """What a version of a model needs of its server."""

    backend: str
    model: str
    manifest: Manifest | None
    """Of a plan."""


def docker_command(repository: str | Path, options: StartOptions) -> DockerCommand:
    """The command for a repository.

    Raises:
        DarktrtError: its plans are of several versions of TensorRT, or it cannot be read; clients want shared memory, which
            a container has none of with them; or its server has security holes, and other machines would reach it.
    """
    if options.shared_memory:
        raise DarktrtError(
            "a container shares no memory with clients outside it; they send images by the socket", "shared_memory"
        )
    needs = [one for model in models_of(repository) for one in _needs(model)]
    container, warnings = _container(needs)
    if container.release < MENDED_RELEASE:
        if not options.insecure and not is_loopback(options.address):
            raise exposure_error(container.tag, options.address)
        warnings.append(caveat(container.tag))
    gpus = ["--gpus", "all"] if any(one.manifest for one in needs) else []
    publish = [f"{options.address}:{port}:{port}" for port in (options.http_port, options.grpc_port, options.metrics_port)]
    listen = listen_arguments(replace(options, address="0.0.0.0"))
    server = ["tritonserver", f"--model-repository={MOUNT}", *listen, *_limits(container, options), *options.arguments]
    server += tensorrt_arguments(repository, MOUNT)
    words = [
        "docker",
        "run",
        "--rm",
        *gpus,
        "--shm-size=1g",
        f"--ulimit=stack={STACK_BYTES}",
        *(f"-p={one}" for one in publish),
    ]
    words += [f"-v={Path(repository).resolve()}:{MOUNT}:ro"]
    if installs := _installs(needs):
        words += [f"-v={BACKEND_REQUIREMENTS}:{REQUIREMENTS}:ro"]
        server = ["bash", "-c", " && ".join([*map(shlex.join, installs), f"exec {shlex.join(server)}"])]
    return DockerCommand((*words, container.tag, *server), tuple(warnings))


def _limits(container: Container, options: StartOptions) -> list[str]:
    """The options that keep clients from changing the server, and limit their requests, as far as the release has them."""
    words = closed_protocols(options.shared_memory, options.arguments) if container.release >= "23.11" else []
    return [*words, f"--http-max-input-size={options.max_request_bytes}"] if container.release >= "25.07" else words


def _needs(model: Path) -> list[_Needs]:
    config = read_config(model / CONFIG_NAME)
    plans = [model / str(version) / PLAN_NAME for version in loaded_versions(model, config)]
    manifests = [read_manifest(manifest_path(plan)) if plan.is_file() else None for plan in plans]
    return [_Needs(config.backend, model.name, manifest) for manifest in manifests]


def _container(needs: list[_Needs]) -> tuple[Container, list[str]]:
    plans = {one.model: one.manifest for one in needs if one.manifest}
    if len(targets := sorted({manifest.target for manifest in plans.values()})) > 1:
        raise DarktrtError(f"the plans are of {' and '.join(targets)}; one server loads those of one TensorRT")
    if not plans:
        return Container(NEWEST, TENSORRT[NEWEST], True), []
    name, manifest = min(plans.items(), key=lambda plan: plan[1].version_compatible)
    container = container_for(manifest)
    return container, [] if container.loads else [f"{name}: {container.advice(manifest.target)}"]


def _installs(needs: list[_Needs]) -> list[list[str]]:
    """The commands of pip for what the Python backend imports and a stock container lacks.

    TensorRT's Python package has no stated SHA-256: on pip's index it is an sdist, for most versions. From 10.8 on its versions
    have a fourth part, which a manifest does not.
    """
    python = [one for one in needs if one.backend == "python"]
    bindings = sorted({f"tensorrt=={one.manifest.target.split()[-1]}.*" for one in python if one.manifest})
    packages = [["pip", "install", *PINNED, f"--requirement={REQUIREMENTS}"]] if python else []
    return [*packages, *(["pip", "install", binding] for binding in bindings)]
