"""Model repositories of Triton: a plan or an ONNX file becomes a folder that a server can start from.

A model of the Python backend carries the modules of darktrt that it runs, as one zip file beside it: a stock container needs no
darktrt, and models of several versions of darktrt can lie side by side. The zip file holds no other packages; the server's
Python has numpy and onnxruntime or tensorrt of its own. Beside the zip file lies the compiled resize of images, if this machine
has it; a server of another machine type leaves it, and NumPy resizes.
"""

from __future__ import annotations

import ast
import glob
import os
import re
import shutil
import struct
import zipfile
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import darktrt
from darktrt.errors import DarktrtError, quote
from darktrt.files import abandoned, atomic_folder, read_text
from darktrt.metadata import DetectorInfo
from darktrt.serve.backend import ONNX_NAME, PLAN_NAME, PLUGINS_NAME
from darktrt.serve.config import (
    CONFIG_NAME,
    LABELS_NAME,
    WARMUP_FOLDER,
    WARMUP_IMAGE,
    BackendOptions,
    PythonBackend,
    make_config,
)
from darktrt.serve.model_info import ModelInfo
from darktrt.vision.native import library_path

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from darktrt.engine.manifest import Manifest

PACKAGE = Path(darktrt.__file__).parent
"""The folder of the package darktrt, in a checkout or in site-packages."""

BACKEND_MODULE = "darktrt.serve.backend"
MODULES_NAME = "darktrt.zip"
"""The zip file of the modules that a model of the Python backend runs."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Of a model: a folder, a part of the server's URLs, and a word of its command line."""

_VERSION = re.compile(r"[1-9][0-9]{0,17}")
"""Of the folders that Triton takes for versions."""

MODEL_PY = '''"""darktrt's model for Triton's Python backend; the code is in darktrt.zip."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("darktrt.zip")))

from darktrt.serve.backend import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class ModelFile:
    """The model file of a repository's model."""

    path: Path
    info: DetectorInfo
    manifest: Path | None
    """Of a plan."""
    plugins: Path | None
    """The library of the plan's plugins."""


def publish(
    source: str | Path,
    repository: str | Path,
    options: BackendOptions | None = None,
    name: str | None = None,
    version: int = 1,
    plugins: str | Path | None = None,
) -> Path:
    """Put a model into a repository, which is made if there is none; return the model's folder.

    An existing version of that number is replaced, others stay. The folder appears, or changes, only when it is complete. Until
    then it lies beside the repository, because Triton takes every folder in there for a model.

    Args:
        source: an engine (``.plan``) or an ONNX file that ends in NMS.
        options: those of a backend of Triton (default: of the Python backend, which runs either file).
        name: of the model in Triton (default: the network's).
        version: of the model, counted from 1.
        plugins: the library of a plan's plugins (default: as for building the engine).

    Raises:
        DarktrtError: the backend cannot run the model, or the folder cannot be written.
    """
    options = options or PythonBackend()
    file = read_source(source, options, plugins)
    if file.manifest and not options.gpus:
        options = replace(options, gpus=(0,))
    name = file.info.name if name is None else name
    _check_name(name)
    if version < 1:
        raise DarktrtError(f"version {version}: Triton counts versions from 1", "version")
    config = make_config(name, file.info, options)
    target = Path(repository) / name
    _check_other_versions(target, version, config)
    with atomic_folder(target, _unfinished(repository, name)) as folder:
        _link_versions(target, folder, version)
        _write_version(folder / str(version), file, options)
        _write_beside(folder, file.info, config)
    return target


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise DarktrtError(
            f"'{quote(name)}' cannot be a model's name in Triton; choose one of at most 100 letters, digits, '_', '-' and '.' "
            "that begins with a letter or digit",
            "name",
        )


def _unfinished(repository: str | Path, model: str) -> Path:
    """What an unfinished model lies beside; no model's name has a '+'.

    Raises:
        DarktrtError: models cannot be moved from there into the repository.
    """
    real = Path(os.path.realpath(repository))
    if os.path.ismount(real):
        raise DarktrtError(
            f"{repository}: is the root of a file system; a model is finished beside its repository and then moved into it, so "
            "name a folder inside this one"
        )
    return real.with_name(f"{real.name}+{model}")


def unfinished_models(repository: str | Path) -> list[Path]:
    """What writers that were killed left beside a repository; the next writer of a model removes what is left of that."""
    real = Path(os.path.realpath(repository))
    left = abandoned(real.parent / f"{glob.escape(real.name)}+*")
    return [path for path in left if path.name.count("+") == real.name.count("+") + 1]


def no_models(repository: str | Path) -> list[Path]:
    """The folders of a repository that are no models; Triton takes them for models, and they keep it from starting."""
    folders = sorted(path for path in Path(repository).iterdir() if path.is_dir())
    return [
        path for path in folders if path.name.startswith(".") or not ((path / CONFIG_NAME).is_file() or version_numbers(path))
    ]


def read_source(path: str | Path, options: BackendOptions, plugins: str | Path | None = None) -> ModelFile:
    """The plan or ONNX file, which must be of a kind that the backend runs.

    Raises:
        DarktrtError: it is not, cannot be read, or a plan's plugins are missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in options.suffixes:
        raise DarktrtError(f"{path}: the backend {options.backend} runs files that end in {' '.join(options.suffixes)}", "kind")
    if suffix == ".onnx":
        from darktrt.onnx_file import load_model

        return ModelFile(Path(path), load_model(path)[1], None, None)
    from darktrt.engine.manifest import manifest_path, read_plan_manifest
    from darktrt.engine.target import version_of

    manifest = read_plan_manifest(path)
    check_target(manifest)
    library = _library(path, plugins, version_of(manifest.target)) if manifest.plugins else None
    return ModelFile(Path(path), manifest.info, manifest_path(path), library)


def check_target(manifest: Manifest) -> None:
    """See that some Triton loads plans of this TensorRT.

    Raises:
        DarktrtError: none does.
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
    """Versions of a model share one config: other inputs or outputs need another model."""
    if not os.path.exists(target):
        return
    if not (target / CONFIG_NAME).is_file():
        raise DarktrtError(f"{target}: exists already and is no model of Triton; choose another name or folder", "name")
    others = [number for number in version_numbers(target) if number != version]
    old = read_config(target / CONFIG_NAME)
    if others and (list(old.input) != list(config.input) or list(old.output) != list(config.output)):
        raise DarktrtError(
            f"{target}: version {others[0]} has other inputs or outputs, and versions share them; choose another name", "name"
        )


def read_config(path: str | Path) -> ModelConfig:
    """A config.pbtxt.

    Raises:
        DarktrtError: it cannot be read, or is none.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    text = read_text(path, advice="is this a model repository?")
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise DarktrtError(f"{path}: is no config of Triton ({quote(str(error))})") from error


def model_info(config: ModelConfig, where: str | Path) -> ModelInfo:
    """The model that a config describes.

    Args:
        where: the file of the config, for errors.

    Raises:
        DarktrtError: it was not made by darktrt.
    """
    from google.protobuf.json_format import MessageToDict

    return ModelInfo.from_config(MessageToDict(config, preserving_proto_field_name=True), str(where))


def _link_versions(target: Path, folder: Path, version: int) -> None:
    for other in map(str, version_numbers(target)):
        if other != str(version):
            shutil.copytree(target / other, folder / other, copy_function=os.link)


def _write_version(folder: Path, source: ModelFile, options: BackendOptions) -> None:
    folder.mkdir()
    if source.manifest is None:
        _write_onnx(source.path, folder / ONNX_NAME, options)
    else:
        shutil.copyfile(source.path, folder / PLAN_NAME)
        shutil.copyfile(source.manifest, (folder / PLAN_NAME).with_suffix(".json"))
    if source.plugins:
        shutil.copyfile(source.plugins, folder / PLUGINS_NAME)
    if isinstance(options, PythonBackend):
        (folder / options.file).write_text(MODEL_PY, encoding="utf-8")
        write_modules(folder / MODULES_NAME)
        if library := library_path():
            shutil.copyfile(library, folder / library.name)


def _write_onnx(source: Path, target: Path, options: BackendOptions) -> None:
    """The model as it was checked; for Triton's ONNX Runtime without functions, which old versions do not know."""
    import onnx

    from darktrt.onnx_file import load_model
    from darktrt.plugins.functions import inline_bodies

    model, _ = load_model(source)
    onnx.save(model if isinstance(options, PythonBackend) else inline_bodies(model), str(target))


def write_modules(path: Path) -> None:
    """Write the zip file of the modules that the Python backend runs; the same modules make the same bytes."""
    with zipfile.ZipFile(path, "w") as file:
        for source in modules_of(BACKEND_MODULE):
            entry = zipfile.ZipInfo(str(source.relative_to(PACKAGE.parent)))  # with one date for all
            file.writestr(entry, source.read_bytes(), zipfile.ZIP_DEFLATED)


def modules_of(name: str) -> list[Path]:
    """The files of a module of darktrt and of all modules of darktrt that it imports, sorted.

    Import statements count, in functions too; those under ``TYPE_CHECKING`` do not.

    Args:
        name: with its package, such as ``darktrt.serve.backend``.
    """
    files: set[Path] = set()
    names = [name]
    while names:
        name = names.pop()
        path = PACKAGE.parent.joinpath(*name.split("."))
        file = next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)
        if file and file not in files:
            files.add(file)
            names += [name.rpartition(".")[0] or name, *imported_modules(file)]
    return sorted(files)


def imported_modules(file: Path) -> list[str]:
    """The names inside darktrt that a file imports, of modules and of what they define."""
    imports = _Imports()
    imports.visit(ast.parse(file.read_text(encoding="utf-8")))
    return [name for name in imports.names if name.partition(".")[0] == PACKAGE.name]


class _Imports(ast.NodeVisitor):
    """Collects the names that a module imports when it runs."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def visit_If(self, node: ast.If) -> None:  # ast prescribes the name
        for statement in node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else [*node.body, *node.orelse]:
            self.visit(statement)

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
        (folder / WARMUP_FOLDER / WARMUP_IMAGE).write_bytes(_serialized(_gray_png(*info.usual_image)))


def _gray_png(width: int, height: int) -> bytes:
    """A gray image, encoded."""
    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (width, height), (127, 127, 127)).save(file, "PNG")
    return file.getvalue()


def _serialized(value: bytes) -> bytes:
    """Triton's form of an element of type BYTES: the length, then the bytes."""
    return struct.pack("<I", len(value)) + value


def models_of(repository: str | Path) -> list[Path]:
    """The folders of the models, sorted.

    Raises:
        DarktrtError: there is no such folder, or there are no models in it.
    """
    folder = Path(repository)
    if not os.path.isdir(folder):
        raise DarktrtError(f"{repository}: no such folder; make a repository with 'darktrt serve repository'")
    models = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}") if not path.parent.name.startswith("."))
    if not models:
        raise DarktrtError(f"{repository}: has no models; write one with 'darktrt serve repository'")
    return models


def find_model(repository: str | Path, name: str | None) -> Path:
    """The folder of the model of this name, or of the only one.

    Raises:
        DarktrtError: there is no such model, or there are several and no name.
    """
    folders = {folder.name: folder for folder in models_of(repository)}
    if name is None and len(folders) == 1:
        return next(iter(folders.values()))
    if name not in folders:
        problem = f"has no model '{name}'" if name else "has several models"
        raise DarktrtError(f"{repository}: {problem}; name one of {', '.join(folders)}", "model")
    return folders[name]


def tensorrt_arguments(repository: str | Path, root: str | Path) -> list[str]:
    """The options of Triton's TensorRT backend for the plans of a repository, which the server sees at ``root``."""
    from darktrt.engine.manifest import manifest_path, read_manifest

    libraries, compatible = [], False
    for model in models_of(repository):
        config = read_config(model / CONFIG_NAME)
        if config.backend != "tensorrt":
            continue
        for version in map(str, loaded_versions(model, config)):
            if (model / version / PLUGINS_NAME).is_file():
                libraries.append(f"{root}/{model.name}/{version}/{PLUGINS_NAME}")
            plan = model / version / PLAN_NAME
            compatible |= plan.is_file() and read_manifest(manifest_path(plan)).version_compatible
    words = [f"--backend-config=tensorrt,plugins={';'.join(libraries)}"] if libraries else []
    return [*words, "--backend-config=tensorrt,version-compatible=true"] if compatible else words


def version_numbers(model: Path) -> list[int]:
    """The versions in a model's folder, the newest last; none where there is no such folder."""
    return sorted(int(path.name) for path in model.glob("[1-9]*") if path.is_dir() and _VERSION.fullmatch(path.name))


def loaded_versions(model: Path, config: ModelConfig) -> list[int]:
    """The versions that Triton loads by the model's config, the newest last."""
    numbers, policy = version_numbers(model), config.version_policy
    if policy.HasField("latest"):
        return numbers[-policy.latest.num_versions :]
    return [number for number in numbers if number in policy.specific.versions] if policy.HasField("specific") else numbers
