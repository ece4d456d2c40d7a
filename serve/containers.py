"""NVIDIA's Triton containers: which one carries the TensorRT of a plan, and the command that starts it with a repository."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt import DarktrtError
from engine.manifest import manifest_path, read_manifest
from engine.target import flavour_of
from serve.backend import PLAN_NAME, PLUGINS_NAME
from serve.repository import models_of, read_config, served_versions
from serve.server import StartOptions, listen_arguments

if TYPE_CHECKING:
    from engine.manifest import Manifest

IMAGE = "nvcr.io/nvidia/tritonserver"
MOUNT = "/models"

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
    "25.12": (10, 14, 1),
}
"""The newest release with each TensorRT, by NVIDIA's release notes."""

NEWEST = max(TENSORRT)


@dataclass(frozen=True)
class Container:
    """A container for a plan; ``exact`` says that it carries the plan's TensorRT."""

    release: str
    tensorrt: tuple[int, ...]
    exact: bool

    @property
    def tag(self) -> str:
        return f"{IMAGE}:{self.release}-py3"

    def advice(self, target: str) -> str:
        """What to do with a plan of another TensorRT."""
        have = ".".join(map(str, self.tensorrt))
        return (
            f"no container up to {NEWEST} carries {target}; nearest is {self.tag} with TensorRT {have}, in which the plan must "
            "be built again, for TensorRT loads the plans of its own version alone"
        )


def container_for(target: str) -> Container:
    """The container that carries a plan's TensorRT, or the nearest: of its major version, above it rather than below.

    Raises:
        DarktrtError: no Triton loads such plans.
    """
    if flavour_of(target) != "trt":
        raise DarktrtError(f"the plan is of {target}, which no Triton loads; serve its ONNX file instead")
    wanted = (*(int(part) for part in target.split()[-1].split(".")), 0, 0)[:3]

    def distance(release: str) -> tuple[bool, bool, tuple[int, ...], str]:
        have = TENSORRT[release]
        apart = tuple(abs(a - b) for a, b in zip(have, wanted, strict=True))
        return have[0] != wanted[0], have < wanted, apart, release

    release = min(TENSORRT, key=distance)
    return Container(release, TENSORRT[release], TENSORRT[release] == wanted)


@dataclass(frozen=True)
class DockerCommand:
    """What starts a container with a repository, and what the user must know before."""

    words: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(word if word.startswith("$(") else shlex.quote(word) for word in self.words)


@dataclass(frozen=True)
class _Needs:
    """Of a version of a model in the repository."""

    kind: str
    name: str
    manifest: Manifest | None
    library: str | None
    """Path of the plugins inside the container."""


def docker_command(repository: str | Path, options: StartOptions) -> DockerCommand:
    """The command for a repository, all of whose plans must be of one TensorRT.

    Raises:
        DarktrtError: they are not, or the repository cannot be read.
    """
    needs = [one for model in models_of(repository) for one in _needs(model)]
    container, warnings = _container(needs)
    gpus = ["--gpus", "all"] if any(one.manifest for one in needs) else []
    publish = [f"{options.address}:{port}:{port}" for port in (options.http_port, options.grpc_port, options.metrics_port)]
    inside = StartOptions(**{**vars(options), "address": "0.0.0.0"})
    server = ["tritonserver", f"--model-repository={MOUNT}", *listen_arguments(inside), *options.arguments]
    libraries = sorted({one.library for one in needs if one.library and one.kind == "tensorrt"})
    if libraries:
        server.append(f"--backend-config=tensorrt,plugins={';'.join(libraries)}")
    packages = _packages(needs)
    words = ["docker", "run", "--rm", *gpus, "--shm-size=1g", *(f"-p={one}" for one in publish)]
    words += [f"-v={Path(repository).resolve()}:{MOUNT}:ro", container.tag]
    if packages:
        server = ["bash", "-c", f"pip install {shlex.join(packages)} && exec {shlex.join(server)}"]
    return DockerCommand((*words, *server), tuple(warnings))


def _needs(model: Path) -> list[_Needs]:
    config = read_config(model / "config.pbtxt")
    found = []
    for version in served_versions(model, config):
        folder = model / str(version)
        plan, library = folder / PLAN_NAME, folder / PLUGINS_NAME
        manifest = read_manifest(manifest_path(plan)) if plan.is_file() else None
        inside = f"{MOUNT}/{model.name}/{version}/{PLUGINS_NAME}" if library.is_file() else None
        found.append(_Needs(config.backend, model.name, manifest, inside))
    return found


def _container(needs: list[_Needs]) -> tuple[Container, list[str]]:
    plans = {one.name: one.manifest.target for one in needs if one.manifest}
    if len(targets := sorted(set(plans.values()))) > 1:
        raise DarktrtError(f"the plans are of {' and '.join(targets)}; one server loads those of one TensorRT")
    if not plans:
        return Container(NEWEST, TENSORRT[NEWEST], True), []
    name, target = next(iter(plans.items()))
    container = container_for(target)
    return container, [] if container.exact else [f"{name}: {container.advice(target)}"]


def _packages(needs: list[_Needs]) -> list[str]:
    """What the Python kind imports and a stock container does not have."""
    python = [one for one in needs if one.kind == "python"]
    packages = ["pillow"] if python else []
    if any(one.manifest is None for one in python):
        packages.append("onnxruntime")
    packages += sorted({f"tensorrt=={one.manifest.target.split()[-1]}" for one in python if one.manifest})
    return packages
