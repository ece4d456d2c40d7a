"""Who may import whom, and when: design.md section 3, held by walking the imports of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

ROOMS: dict[str, set[str]] = {
    "darktrt": set(),
    "onnx_file": set(),
    "gpu": set(),
    "plugins": set(),
    "convert": set(),
    "vision": set(),
    "calib": {"vision"},
    "surgery": {"plugins.ops", "calib.shifts", "calib.table"},
    "engine": {"surgery", "calib.table", "calib.trt", "plugins"},
    "check": {"engine", "surgery", "calib", "vision"},
    "serve": {
        "check.difference",
        "engine.manifest",
        "engine.runtime",
        "engine.target",
        "plugins.library",
        "surgery.bodies",
        "vision",
    },
    "cli": {"serve", "check", "engine", "calib", "surgery", "convert", "vision"},
}
"""What each room may import of the others; every room may import itself, ``darktrt``, ``gpu`` and ``onnx_file``."""

HOMES: dict[str, set[str]] = {
    "torch": {"convert"},
    "onnx": {"onnx_file", "convert", "plugins", "surgery", "engine", "calib", "check", "serve"},
    "onnx_graphsurgeon": {"surgery", "engine", "check"},
    "onnxruntime": {"engine", "calib", "check"},
    "tensorrt": {"engine", "calib.trt"},
    "tensorrt_rtx": {"engine"},
    "polygraphy": {"engine", "calib.trt", "check"},
    "PIL": {"vision", "calib", "check", "serve"},
    "av": {"vision"},
    "pycocotools": {"check"},
    "matplotlib": {"check"},
    "jinja2": {"check"},
    "tritonclient": {"serve"},
}
"""Rooms or modules that may import a large or optional library at all."""

INSIDE_FUNCTIONS = {"tensorrt", "tensorrt_rtx", "polygraphy", "av", "tritonclient", "pycocotools", "matplotlib", "jinja2"}
"""Never imported by importing a module."""


@dataclass(frozen=True)
class Import:
    importer: str
    """A module, such as ``engine.build``."""
    imported: str
    inside: bool
    """In a function, so that it happens only when that is called."""
    where: str


def modules() -> dict[str, Path]:
    """Every module of the rooms that exist, by name."""
    files = [ROOT / f"{room}.py" for room in ROOMS] + [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    found = {file: file.relative_to(ROOT).with_suffix("").parts for file in files if file.is_file()}
    return {".".join(parts).removesuffix(".__init__"): file for file, parts in found.items()}


def imports_of(name: str, file: Path) -> Iterator[Import]:
    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            line = getattr(child, "lineno", 0)
            yield from (Import(name, imported, inside, f"{file.relative_to(ROOT)}:{line}") for imported in names)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, inside or function)

    return walk(ast.parse(file.read_text()), False)


IMPORTS = [found for name, file in modules().items() for found in imports_of(name, file)]


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_part_of(module: str, whole: str) -> bool:
    return module == whole or module.startswith(f"{whole}.")


def test_every_room_is_walked() -> None:
    present = {room_of(name) for name in modules()}
    assert {"cli", "darktrt", "gpu", "onnx_file", "convert", "plugins", "surgery", "engine", "vision"} <= present
    assert {file.name for file in ROOT.iterdir() if (file / "__init__.py").is_file()} <= set(ROOMS)
    assert sum(room_of(found.imported) in ROOMS for found in IMPORTS) > 60


def test_rooms_import_only_whom_they_may() -> None:
    wrong = [
        f"{found.where}: {found.importer} imports {found.imported}"
        for found in IMPORTS
        if room_of(found.imported) in ROOMS
        and room_of(found.imported) not in (room_of(found.importer), "darktrt", "gpu", "onnx_file")
        and not any(is_part_of(found.imported, allowed) for allowed in ROOMS[room_of(found.importer)])
    ]
    assert not wrong


def test_libraries_are_imported_only_at_home() -> None:
    wrong = [
        f"{found.where}: {found.importer} imports {found.imported}"
        for found in IMPORTS
        for library, homes in HOMES.items()
        if is_part_of(found.imported, library) and not any(is_part_of(found.importer, home) for home in homes)
    ]
    assert not wrong


def test_what_is_optional_is_imported_inside_functions() -> None:
    wrong = [f.where for f in IMPORTS if room_of(f.imported) in INSIDE_FUNCTIONS and not f.inside]
    assert not wrong


def test_the_command_line_imports_rooms_inside_functions() -> None:
    early = {f.imported for f in IMPORTS if f.importer == "cli" and not f.inside and room_of(f.imported) in ROOMS}
    names = ("DarktrtError", "__version__", "atomic_output", "check_outputs", "check_writable", "keep_inputs")
    assert early == {f"darktrt.{name}" for name in names}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = "torch onnx onnxruntime onnx_graphsurgeon numpy PIL av tqdm tensorrt tensorrt_rtx polygraphy matplotlib jinja2".split()


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    return set(run_python(code).split())


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_by("import cli") == set()


def test_torch_comes_with_convert_alone() -> None:
    everything = "; ".join(f"import {name}" for name in modules() if room_of(name) not in ("convert", "check", "cli"))
    assert not {"torch", "tensorrt", "tensorrt_rtx", "polygraphy", "av"} & loaded_by(everything)


def test_reading_cfgs_and_weights_needs_no_torch_nor_onnx() -> None:
    assert not {"torch", "onnx"} & loaded_by(
        "import convert.cfg, convert.shapes, convert.weights, convert.zoo, convert.inspect"
    )


def test_running_engines_needs_neither_torch_nor_onnx() -> None:
    """A deployment host has neither, nor has a CPython 3.10 with TensorRT 8.6."""
    assert not {"torch", "onnx", "onnxruntime"} & loaded_by(
        "import engine.runtime, engine.manifest, vision.detect, check.compare, check.found"
    )


def test_every_module_imports_alone() -> None:
    """No cycle that works in one order only, and nothing printed on import."""
    code = f"""
import importlib, sys
for name in {sorted(modules())}:
    importlib.import_module(name)
    for loaded in [n for n in sys.modules if n.partition(".")[0] in {set(ROOMS)}]:
        del sys.modules[loaded]
"""
    assert run_python(code) == ""


def test_help_starts_in_three_tenths_of_a_second() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "cli.py"), "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3
