"""The manifests of ``deploy/``: valid by Kubernetes' schemas, whole in themselves, and in agreement with ``serve start``.

No cluster ever ran them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from darktrt.serve.access import MENDED_RELEASE, closed_protocols
from darktrt.serve.containers import IMAGE, TENSORRT
from darktrt.serve.install import BACKEND_REQUIREMENTS
from darktrt.serve.server import EXIT_SECONDS, READY_SECONDS, STACK_BYTES, StartOptions, listen_arguments
from darktrt.wheels import PINNED

yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install 'darktrt[dev]'")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: pip install 'darktrt[dev]'")

Resource = dict[str, Any]
DEPLOY = ROOT / "deploy"
KUSTOMIZATIONS = sorted(DEPLOY.glob("**/kustomization.yaml"))
WHOLE = sorted([*(DEPLOY / "base").glob("*.yaml"), DEPLOY / "overlays/volume/claim.yaml"])
"""Files of manifests that are no patches."""

VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the oldest that the guide states, because of the sleep before a stop, and the newest with schemas."""


def documents(text: str) -> list[Resource]:
    return list(yaml.safe_load_all(text))


def read(path: str) -> list[Resource]:
    return documents((DEPLOY / path).read_text(encoding="utf-8"))


def kustomize() -> list[str]:
    """The command that prints what a kustomization makes."""
    for words in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(words[0]):
            return words
    pytest.skip("needs kustomize or kubectl")


@pytest.fixture(scope="module", params=["volume", "object-store"])
def overlay(request: pytest.FixtureRequest) -> list[Resource]:
    """The manifests that an overlay makes."""
    command = [*kustomize(), str(DEPLOY / "overlays" / request.param)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return documents(done.stdout)


def of_kind(manifests: list[Resource], kind: str) -> list[Resource]:
    return [one for one in manifests if one["kind"] == kind]


def pod(manifests: list[Resource]) -> Resource:
    (deployment,) = of_kind(manifests, "Deployment")
    return dict(deployment["spec"]["template"])


def containers(manifests: list[Resource]) -> list[Resource]:
    spec = pod(manifests)["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def triton(manifests: list[Resource]) -> Resource:
    return next(one for one in containers(manifests) if one["name"] == "triton")


def values(value: Any, key: str) -> Iterator[Any]:
    """What stands under a key, at any depth."""
    if isinstance(value, dict):
        yield from ([value[key]] if key in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from values(one, key)


# --- valid ---


def problem(manifest: Resource, version: str) -> str:
    """What a version of Kubernetes would refuse, if anything."""
    try:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version
    except kubernetes_validate.ValidationError as error:
        return f"{manifest['kind']}: {'.'.join(map(str, error.path))}: {error.message}"
    return ""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_manifests_are_valid(path: Path, version: str) -> None:
    manifests = [one for one in documents(path.read_text(encoding="utf-8")) if one["kind"] != "Kustomization"]
    assert not [text for one in manifests if (text := problem(one, version))]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_overlays_make_is_valid(overlay: list[Resource], version: str) -> None:
    assert not [text for one in overlay if (text := problem(one, version))]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"replica": 2}, "Additional properties .*'replica'"),
        ({"minReadySeconds": "5"}, "'5' is not of type"),
        ({}, "'template' is"),
    ],
)
def test_mistakes_are_found(change: Resource, expected: str) -> None:
    """A field of another name, one of another type, and one that is missing."""
    (deployment,) = read("base/deployment.yaml")
    deployment["spec"].update(change)
    if not change:
        del deployment["spec"]["template"]
    assert re.search(expected, problem(deployment, VERSIONS[-1]))


def test_every_file_is_part_of_a_kustomization() -> None:
    used = set(KUSTOMIZATIONS)
    for path in KUSTOMIZATIONS:
        (one,) = documents(path.read_text(encoding="utf-8"))
        names = [*one["resources"], *values(one, "path")]
        names += [
            name for made in one.get("configMapGenerator", []) for name in (*made.get("files", []), *made.get("envs", []))
        ]
        used |= {(path.parent / name).resolve() for name in names}
    assert all(path.exists() for path in used)
    assert {path for folder in ("base", "overlays") for path in (DEPLOY / folder).rglob("*.*")} <= used


# --- whole ---


def test_selectors_select_the_pods(overlay: list[Resource]) -> None:
    labels = pod(overlay)["metadata"]["labels"].items()
    services = [one["spec"]["selector"] for one in of_kind(overlay, "Service")]
    others = [one["spec"]["podSelector"]["matchLabels"] for one in of_kind(overlay, "NetworkPolicy")]
    for kind in ("Deployment", "PodDisruptionBudget"):
        others += [one["spec"]["selector"]["matchLabels"] for one in of_kind(overlay, kind)]
    spread = [one["labelSelector"]["matchLabels"] for one in pod(overlay)["spec"]["topologySpreadConstraints"]]
    assert (len(services), len(others), len(spread)) == (2, 3, 1)
    assert all(one and one.items() <= labels for one in [*services, *others, *spread])


def test_names_are_those_of_something(overlay: list[Resource]) -> None:
    names = {(one["kind"], one["metadata"]["name"]) for one in overlay}
    spec = pod(overlay)["spec"]
    maps = [*values(spec, "configMapRef"), *values(spec, "configMap")]
    assert {("ConfigMap", one["name"]) for one in maps} == {one for one in names if one[0] == "ConfigMap"}
    assert {("PersistentVolumeClaim", one) for one in values(spec, "claimName")} <= names
    volumes = {one["name"] for one in spec["volumes"]}
    assert {one["name"] for container in containers(overlay) for one in container["volumeMounts"]} == volumes
    (scaler,) = of_kind(overlay, "HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in names and "replicas" not in of_kind(overlay, "Deployment")[0]["spec"]


def test_ports_are_those_of_the_server(overlay: list[Resource]) -> None:
    ports = {one["name"]: one["containerPort"] for one in triton(overlay)["ports"]}
    options = StartOptions()
    assert ports == {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
    for service in of_kind(overlay, "Service"):
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
    (policy,) = of_kind(overlay, "NetworkPolicy")
    assert [one["port"] for rule in policy["spec"]["ingress"] for one in rule["ports"]] == ["http", "grpc", "metrics"]
    probes = [triton(overlay)[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert all(probe == {"path": "/v2/health/ready", "port": "http"} for probe in probes)
    assert pod(overlay)["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])


# --- as serve start does it ---


def test_the_server_has_the_options_of_serve_start(overlay: list[Resource]) -> None:
    options = StartOptions(address="0.0.0.0")
    expected = [*listen_arguments(options), *closed_protocols(False), f"--http-max-input-size={options.max_request_bytes}"]
    assert triton(overlay)["args"] == ["bash", "/etc/triton/start.sh", *expected]


def test_the_container_may_be_reached_by_others(overlay: list[Resource]) -> None:
    assert all(re.search(r":[0-9.]+(-py3)?@sha256:[0-9a-f]{64}$", one["image"]) for one in containers(overlay))
    image = triton(overlay)["image"]
    release = image.removeprefix(f"{IMAGE}:").partition("-py3@")[0]
    assert release in TENSORRT and release >= MENDED_RELEASE
    assert image in (ROOT / "docker/compose.yaml").read_text(encoding="utf-8"), "its plans would be of another TensorRT"
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG IMAGE={image}\n" in dockerfile
    assert f"COPY {BACKEND_REQUIREMENTS.resolve().relative_to(ROOT)} " in dockerfile
    assert {*PINNED} - {"--quiet", "--disable-pip-version-check"} <= set(dockerfile.split())
    tensorrt = ".".join(map(str, TENSORRT[release]))
    for text in (dockerfile, (DEPLOY / "base/deployment.yaml").read_text(), (ROOT / "docs/kubernetes.md").read_text()):
        assert set(re.findall(r"TensorRT\D{,12}(\d+\.\d+\.\d+)", text, re.IGNORECASE)) == {tensorrt}


def test_a_stop_and_a_start_have_their_time(overlay: list[Resource]) -> None:
    pause = triton(overlay)["lifecycle"]["preStop"]["sleep"]["seconds"]
    ready = triton(overlay)["readinessProbe"]
    assert pause >= ready["periodSeconds"]
    assert pod(overlay)["spec"]["terminationGracePeriodSeconds"] >= pause + 2 * EXIT_SECONDS
    start = triton(overlay)["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= READY_SECONDS


def test_pods_meet_the_restricted_standard(overlay: list[Resource]) -> None:
    """That of Kubernetes' Pod Security Standards; and no token, and no file of the image that can be written."""
    spec = pod(overlay)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for one in containers(overlay):
        context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
        assert one["securityContext"] == context
        assert one["resources"]["limits"]["memory"] == one["resources"]["requests"]["memory"]
    assert not any(list(values(spec, key)) for key in ("hostPath", "hostNetwork", "hostPort", "privileged"))
    models = [one for one in triton(overlay)["volumeMounts"] if one["name"] == "models"]
    assert [(one["mountPath"], one["readOnly"]) for one in models] == [("/models", True)]


@pytest.mark.parametrize("models", [(), ("a",), ("a", "b")])
def test_the_server_gets_the_plugins_of_all_models(tmp_path: Path, models: tuple[str, ...]) -> None:
    (tmp_path / "tritonserver").write_text('#!/bin/sh\nprintf "%s\\n" "$(ulimit -S -s)" "$@"\n')
    (tmp_path / "tritonserver").chmod(0o755)
    libraries = [tmp_path / "models" / name / "1/libdarktrt_plugins.so" for name in models]
    for library in libraries:
        library.parent.mkdir(parents=True)
        library.touch()
    script = (DEPLOY / "base/start.sh").read_text(encoding="utf-8").replace("/models", f"{tmp_path}/models")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-c", script, "start.sh", "--http-port=8000", "--grpc-port=8001"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    stack, *words = done.stdout.splitlines()
    plugins = [f"--backend-config=tensorrt,plugins={';'.join(map(str, libraries))}"] if models else []
    assert words == [f"--model-repository={tmp_path}/models", "--http-port=8000", "--grpc-port=8001", *plugins]
    assert stack == str(STACK_BYTES >> 10)


# --- the autoscaler's metric; tests/serve reads its counters from a real server ---


def test_the_autoscaler_s_metric_is_the_adapter_s(overlay: list[Resource]) -> None:
    (adapter,) = read("prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["custom"]
    (scaler,) = of_kind(overlay, "HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"] == "triton_queue_time_ms"
    series = rule["seriesQuery"].partition("{")[0]
    assert re.fullmatch(rule["name"]["matches"], series)
    assert rule["metricsQuery"].split("\n")[0].startswith(f"sum(rate({series}{{<<.LabelMatchers>>}}[2m])) by (<<.GroupBy>>) / ")
    assert {name for one in rule["resources"]["overrides"].values() for name in one.values()} == {"namespace", "pod"}
