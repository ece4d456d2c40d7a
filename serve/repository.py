"""Model repositories of Triton: a plan or an ONNX file, made into a folder that a server starts from the first time.

The Python kind carries darktrt's own modules beside the model, as one zip file, so that a stock container needs no darktrt, and
models of several versions of it can stand side by side.
"""

from __future__ import annotations

import ast
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

import darktrt
from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo
from darktrt.serve.backend import ONNX_NAME, PLAN_NAME, PLUGINS_NAME
from darktrt.serve.config import CONFIG_NAME, LABELS_NAME, WARMUP_FOLDER, WARMUP_IMAGE, ConfigOptions, make_config

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from darktrt.engine.manifest import Manifest

PACKAGE = Path(darktrt.__file__).parent
"""The folder of darktrt's own modules."""

MODEL_PY = '''"""darktrt's model for Triton's Python backend; the code is in darktrt.zip."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("darktrt.zip")))

from darktrt.serve.backend import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class ModelFile:
    """What is to be served."""

    path: Path
    info: DetectorInfo
    manifest: Path | None
    """Of a plan."""
    plugins: Path | None
    """The library that the plan needs."""


def write_repository(
    source: str | Path,
    repository: str | Path,
    options: ConfigOptions | None = None,
    name: str | None = None,
    version: int = 1,
    plugins: str | Path | None = None,
) -> Path:
    """Put a model into a repository, which is made if there is none; return the model's folder.

    A version that the model has already is replaced, others stay. The folder appears, or changes, only when it is complete.

    Args:
        source: what 'darktrt engine' or 'darktrt surgery' wrote.
        name: of the model in Triton (default: the network's).
        plugins: the library of a plan with plugins (default: as 'darktrt engine' finds it).

    Raises:
        DarktrtError: the model cannot be served so, or the folder cannot be written.
    """
    options = options or ConfigOptions()
    found = read_source(source, options, plugins)
    if found.manifest and not options.gpus:
        options = replace(options, gpus=(0,))
    name = name or found.info.name
    if not name or set(name) & set("/\\ ") or name.startswith("."):
        raise DarktrtError(f"'{name}' cannot be a model's name in Triton; choose another with --name")
    if version < 1:
        raise DarktrtError(f"version {version}: Triton counts versions from 1")
    config = make_config(name, found.info, options)
    target = Path(repository) / name
    _check_other_versions(target, version, config)
    with _replaced_folder(target) as folder:
        _keep_versions(target, folder, version)
        _write_version(folder / str(version), found, options)
        _write_beside(folder, found.info, config)
    return target


def read_source(path: str | Path, options: ConfigOptions, plugins: str | Path | None = None) -> ModelFile:
    """The plan or ONNX file, which must be of the sort that the kind serves.

    Raises:
        DarktrtError: it is not, cannot be read, or a plan's plugins are missing.
    """
    suffix = Path(path).suffix.lower()
    wanted = {"tensorrt_plan": (".plan", ".engine"), "onnxruntime": (".onnx",), "python": (".plan", ".engine", ".onnx")}
    if suffix not in wanted[options.kind]:
        raise DarktrtError(f"{path}: the kind {options.kind} serves files that end in {' '.join(wanted[options.kind])}")
    if suffix == ".onnx":
        from darktrt.onnx_file import load_model

        return ModelFile(Path(path), load_model(path)[1], None, None)
    from darktrt.engine.manifest import manifest_path, read_plan_manifest
    from darktrt.engine.target import version_of

    manifest = read_plan_manifest(path)
    check_served(manifest)
    library = _library(path, plugins, version_of(manifest.target)) if manifest.plugins else None
    return ModelFile(Path(path), manifest.info, manifest_path(path), library)


def check_served(manifest: Manifest) -> None:
    """That there is a Triton for such plans.

    Raises:
        DarktrtError: there is none.
    """
    from darktrt.engine.target import flavour_of

    if flavour_of(manifest.target) != "trt":
        raise DarktrtError(f"the plan is of {manifest.target}, which no Triton loads; serve its ONNX file instead")


def _library(plan: str | Path, plugins: str | Path | None, tensorrt: str) -> Path:
    from darktrt.plugins.library import find_library, read_library

    file = find_library(plugins, tensorrt)
    if file is None:
        raise DarktrtError(
            f"{plan}: needs plugins; compile their library with 'darktrt plugins --tensorrt {tensorrt}', or name one by "
            "DARKTRT_PLUGINS",
            "plugins",
        )
    return read_library(file).path


def _check_other_versions(target: Path, version: int, config: ModelConfig) -> None:
    """Versions of a model have one config: another shape of inputs or outputs is another model."""
    if not target.exists():
        return
    if not (target / CONFIG_NAME).is_file():
        raise DarktrtError(f"{target}: is there already and is no model of Triton; choose another --name or folder")
    others = [number for number in version_numbers(target) if number != version]
    old = read_config(target / CONFIG_NAME)
    if others and (list(old.input) != list(config.input) or list(old.output) != list(config.output)):
        raise DarktrtError(
            f"{target}: version {others[0]} has other inputs or outputs, and versions share them; choose another --name"
        )


def read_config(path: str | Path) -> ModelConfig:
    """A config.pbtxt.

    Raises:
        DarktrtError: it cannot be read, or is none.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(Path(path).read_text(encoding="utf-8"), ModelConfig())
    except OSError as error:
        raise DarktrtError(f"{path}: cannot read: {error.strerror}; is this a model repository?") from error
    except (UnicodeDecodeError, text_format.ParseError) as error:
        raise DarktrtError(f"{path}: is no config of Triton ({error})") from error


def config_info(config: ModelConfig, where: str | Path) -> DetectorInfo:
    """The metadata of the network behind a config.

    Raises:
        DarktrtError: it has none.
    """
    if METADATA_KEY not in config.parameters:
        raise DarktrtError(f"{where}: was not made by darktrt; make it with 'darktrt serve repository'")
    return DetectorInfo.from_json(config.parameters[METADATA_KEY].string_value, str(where))


@contextmanager
def _replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder, which takes the place of ``target`` when the block ends well and vanishes otherwise."""
    new = target.parent / f".{target.name}.{token_hex(4)}"
    old = new.with_name(f"{new.name}.old")
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError as error:
        raise DarktrtError(f"{target}: cannot write: {error.strerror or error}; nothing was kept") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)


def _keep_versions(target: Path, folder: Path, version: int) -> None:
    for other in map(str, version_numbers(target)):
        if other != str(version):
            shutil.copytree(target / other, folder / other, copy_function=os.link)


def _write_version(folder: Path, source: ModelFile, options: ConfigOptions) -> None:
    folder.mkdir()
    if source.manifest is None:
        _write_onnx(source.path, folder / ONNX_NAME, options)
    else:
        shutil.copyfile(source.path, folder / PLAN_NAME)
        shutil.copyfile(source.manifest, (folder / PLAN_NAME).with_suffix(".json"))
    if source.plugins:
        shutil.copyfile(source.plugins, folder / PLUGINS_NAME)
    if options.kind == "python":
        (folder / "model.py").write_text(MODEL_PY, encoding="utf-8")
        _write_modules(folder / "darktrt.zip")


def _write_onnx(source: Path, target: Path, options: ConfigOptions) -> None:
    """As it is; for Triton's own ONNX Runtime without functions, which old ones do not know."""
    if options.kind == "python":
        shutil.copyfile(source, target)
        return
    import onnx

    from darktrt.onnx_file import load_model
    from darktrt.surgery.functions import inline_bodies

    onnx.save(inline_bodies(load_model(source)[0]), str(target))


def _write_modules(path: Path) -> None:
    """What the backend needs of darktrt, with one date, so that the same modules give the same file."""
    with zipfile.ZipFile(path, "w") as file:
        for source in modules_of("darktrt.serve.backend"):
            file.writestr(zipfile.ZipInfo(str(source.relative_to(PACKAGE.parent))), source.read_bytes(), zipfile.ZIP_DEFLATED)


def modules_of(name: str) -> list[Path]:
    """The files of a module of darktrt and of all those that it imports, sorted."""
    found: set[Path] = set()
    names = [name]
    while names:
        name = names.pop()
        path = PACKAGE.parent.joinpath(*name.split("."))
        file = next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)
        if file and file not in found:
            found.add(file)
            names += [name.rpartition(".")[0] or name, *_imported(file)]
    return sorted(found)


def _imported(file: Path) -> list[str]:
    """Names of darktrt's modules in the import statements of a file, and of what may be one; not those for type checkers."""
    collector = _Imports()
    collector.visit(ast.parse(file.read_text(encoding="utf-8")))
    return [name for name in collector.names if name.partition(".")[0] == PACKAGE.name]


class _Imports(ast.NodeVisitor):
    def __init__(self) -> None:
        self.names: list[str] = []

    def visit_If(self, node: ast.If) -> None:  # the visitor's own name
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]


def _write_beside(folder: Path, info: DetectorInfo, config: ModelConfig) -> None:
    from google.protobuf import text_format

    (folder / CONFIG_NAME).write_text(text_format.MessageToString(config), encoding="utf-8")
    (folder / LABELS_NAME).write_text("".join(f"{name}\n" for name in info.class_names), encoding="utf-8")
    if any(value.input_data_file for warmup in config.model_warmup for value in warmup.inputs.values()):
        (folder / WARMUP_FOLDER).mkdir()
        (folder / WARMUP_FOLDER / WARMUP_IMAGE).write_bytes(_serialized(_image(info)))


def _image(info: DetectorInfo) -> bytes:
    """A gray one, as PNG."""
    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (info.width, info.height), (127, 127, 127)).save(file, "PNG")
    return file.getvalue()


def _serialized(value: bytes) -> bytes:
    """As Triton has an element of type BYTES."""
    return struct.pack("<I", len(value)) + value


def models_of(repository: str | Path) -> list[Path]:
    """The folders of the models, sorted.

    Raises:
        DarktrtError: there is no such folder, or there are no models in it.
    """
    folder = Path(repository)
    if not folder.is_dir():
        raise DarktrtError(f"{repository}: no such folder; make a repository with 'darktrt serve repository'")
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}") if not path.parent.name.startswith("."))
    if not found:
        raise DarktrtError(f"{repository}: has no models; put one in with 'darktrt serve repository'")
    return found


def tensorrt_arguments(repository: str | Path, root: str | Path) -> list[str]:
    """What Triton's own TensorRT is to be started with for the plans of a repository, which the server sees at ``root``."""
    from darktrt.engine.manifest import manifest_path, read_manifest

    libraries, compatible = [], False
    for model in models_of(repository):
        config = read_config(model / CONFIG_NAME)
        if config.backend != "tensorrt":
            continue
        for version in map(str, served_versions(model, config)):
            if (model / version / PLUGINS_NAME).is_file():
                libraries.append(f"{root}/{model.name}/{version}/{PLUGINS_NAME}")
            plan = model / version / PLAN_NAME
            compatible |= plan.is_file() and read_manifest(manifest_path(plan)).version_compatible
    words = [f"--backend-config=tensorrt,plugins={';'.join(libraries)}"] if libraries else []
    return [*words, "--backend-config=tensorrt,version-compatible=true"] if compatible else words


def version_numbers(model: Path) -> list[int]:
    """The versions in a model's folder, which may be missing, the newest last."""
    return sorted(int(path.name) for path in model.glob("[0-9]*") if path.is_dir() and path.name.isdigit())


def served_versions(model: Path, config: ModelConfig) -> list[int]:
    """Those that its config lets Triton serve."""
    found, policy = version_numbers(model), config.version_policy
    if policy.HasField("latest"):
        return found[-policy.latest.num_versions :]
    return [one for one in found if one in policy.specific.versions] if policy.HasField("specific") else found
