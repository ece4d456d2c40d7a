"""Who may import whom, and when: design.md section 3, held by walking the imports of every module."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
from helpers import ROOT, syntax_tree

from darktrt.metadata import DetectorInfo

PACKAGE = ROOT / "darktrt"

GROUND = {
    *("errors", "files", "records", "archives", "metadata", "progress", "memory", "parallel", "wheels"),
    *("onnx_file", "onnx_cost", "onnx_session", "cuda", "kernel_types"),
}
"""Modules of the package below all rooms."""

ROOMS: dict[str, set[str]] = {
    "plugins": set(),
    "convert": set(),
    "vision": set(),
    "calib": {"vision"},
    "surgery": {"plugins.functions", "plugins.ops", "calib.bias_correction", "calib.table"},
    "engine": {"surgery", "calib.table", "calib.trt_calibrator", "plugins"},
    "check": {"engine", "surgery", "calib", "plugins.functions", "vision"},
    "serve": {
        "check.tolerance",
        "engine.manifest",
        "engine.runtime",
        "engine.target",
        "plugins.library",
        "plugins.functions",
        "vision",
    },
    "pipeline": {"check", "engine", "calib", "surgery", "convert.zoo", "vision"},
    "cluster": {"vision.images"},
    "selftest": {"pipeline", "check", "engine", "calib", "surgery", "convert.reference", "plugins.library"},
    "cli": {
        "pipeline",
        "cluster",
        "selftest",
        "serve",
        "check",
        "engine",
        "calib",
        "surgery",
        "convert",
        "vision",
        "plugins.build",
    },
    "__main__": {"cli"},
    "": {"pipeline", "cluster", "selftest", "serve", "check", "engine", "calib", "surgery", "convert", "vision"},
}
"""What each room may import of the others; every room may import itself and the ground modules, which import one another."""

GROUND_MAY = {"onnx_file": {"plugins.functions", "plugins.ops"}, "onnx_cost": {"plugins.ops"}}
"""What ground modules may import of the rooms: plugins is below them in this."""

HOMES: dict[str, set[str]] = {
    "torch": {"convert"},
    "onnx": {"onnx_file", "onnx_cost", "convert", "plugins", "surgery", "engine", "calib", "check", "serve"},
    "onnx_graphsurgeon": {"surgery", "engine", "check"},
    "onnxruntime": {"onnx_session"},
    "tensorrt": {"engine", "darktrt.calib.trt_calibrator"},
    "tensorrt_rtx": {"engine"},
    "polygraphy": {"engine", "darktrt.calib.trt_calibrator", "check"},
    "PIL": {"vision", "calib", "check", "serve"},
    "av": {"vision"},
    "nvidia": {"vision"},
    "PyNvVideoCodec": {"vision"},
    "pycocotools": {"check"},
    "matplotlib": {"calib", "check", "vision"},
    "jinja2": {"check"},
    "tritonclient": {"serve"},
    "aiohttp": {"serve"},
    "ray": {"cluster"},
}
"""Rooms or modules that may import a large or optional library at all."""

INSIDE_FUNCTIONS = {
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "av",
    "nvidia",
    "PyNvVideoCodec",
    "tritonclient",
    "aiohttp",
    "pycocotools",
    "matplotlib",
    "jinja2",
    "ray",
}
"""Never imported by importing a module."""


@dataclass(frozen=True)
class Import:
    importer: str
    """A module without ``darktrt.``, such as ``engine.build``."""
    imported: str
    """As the import statement names it, such as ``darktrt.engine.lower.lower``."""
    inside: bool
    """In a function, so that it happens only when that is called."""
    where: str

    @property
    def own(self) -> str:
        """What it imports of darktrt, without ``darktrt.``; empty for another library."""
        return self.imported.removeprefix("darktrt.") if self.imported.startswith("darktrt.") else ""


def modules() -> dict[str, Path]:
    """Every module of the package by its name without ``darktrt.``; the package itself is the empty name."""
    names = {file: file.relative_to(PACKAGE).with_suffix("").parts for file in sources()}
    return {".".join(parts).removesuffix("__init__").removesuffix("."): file for file, parts in names.items()}


def sources() -> list[Path]:
    """The package's Python files; glob does not follow the links to the rooms by itself."""
    rooms = [file for room in ROOMS if room for file in (PACKAGE / room).rglob("*.py")]
    return [*PACKAGE.glob("*.py"), *rooms]


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

    return walk(syntax_tree(file.read_text()), False)


IMPORTS = [found for name, file in modules().items() for found in imports_of(name, file)]


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_part_of(module: str, whole: str) -> bool:
    return module == whole or module.startswith(f"{whole}.")


def test_every_room_is_walked() -> None:
    present = {room_of(name) for name in modules()}
    assert {*GROUND, *ROOMS} <= present
    assert {file.name for file in PACKAGE.iterdir() if (file / "__init__.py").is_file()} == set(ROOMS) - {
        "__main__",
        "pipeline",
        "",
    }
    assert sum(room_of(found.own) in ROOMS for found in IMPORTS) > 60


def test_the_wheel_has_every_package() -> None:
    listed = re.search(r"\npackages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    folders = {f"darktrt.{name}" for name, file in modules().items() if file.name == "__init__.py" and name}
    assert listed and {"darktrt", *folders} == set(re.findall(r'"(.+?)"', listed[1]))


def test_rooms_import_only_whom_they_may() -> None:
    wrong = [
        f"{found.where}: {found.importer} imports {found.imported}"
        for found in IMPORTS
        if found.own
        and room_of(found.own) not in (room_of(found.importer), *GROUND, "__version__")
        and not any(is_part_of(found.own, allowed) for allowed in {**GROUND_MAY, **ROOMS}.get(room_of(found.importer), ()))
    ]
    assert not wrong


BARE = "|".join(room for room in ROOMS if room not in ("", "__main__", "cli", "pipeline", "cluster"))
BARE_IMPORT = re.compile(rf"^\s*(from|import) ({BARE})\b(?! import\s*$)", re.MULTILINE)
BARE_MODULE = re.compile(rf"(?<![\w./])({BARE})\.([a-z_]+)")


def test_rooms_are_named_as_parts_of_the_package() -> None:
    """A bare room name, also in the string of a monkeypatch or of a program, would load a second copy of its modules."""
    known = {name for name in modules() if "." in name}
    own_names = (Path(__file__), PACKAGE / "__init__.py")
    files = [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for file in files:
        for node in ast.walk(syntax_tree(file.read_text())):
            if isinstance(node, ast.Import):
                assert not {room_of(alias.name) for alias in node.names} & set(ROOMS), f"{file}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom):
                assert room_of(str(node.module)) not in ROOMS, f"{file}:{node.lineno}"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and file not in own_names:
                named = {f"{room}.{module}" for room, module in BARE_MODULE.findall(node.value)} & known
                assert not named and not BARE_IMPORT.search(node.value), f"{file}:{node.lineno}: {named}"


def test_a_bare_room_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", "import engine"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "import darktrt.engine" in done.stderr


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
    early = {room_of(f.own) for f in IMPORTS if room_of(f.importer) == "cli" and not f.inside and f.own}
    assert early <= {"cli", "errors", "files", "metadata", "progress", "__version__"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = "torch onnx onnxruntime onnx_graphsurgeon numpy PIL av tqdm tensorrt tensorrt_rtx polygraphy matplotlib jinja2".split()


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    return set(run_python(code).split())


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_by("import darktrt, darktrt.cli") == set()


def test_torch_comes_with_convert_alone() -> None:
    everything = "; ".join(
        f"import darktrt.{name}" for name in modules() if name and room_of(name) not in ("convert", "check", "cli", "__main__")
    )
    assert not {"torch", "tensorrt", "tensorrt_rtx", "polygraphy", "av"} & loaded_by(everything)


def test_reading_cfgs_and_weights_needs_no_torch_nor_onnx() -> None:
    assert not {"torch", "onnx"} & loaded_by("from darktrt.convert import cfg, describe, shapes, weights, zoo")


def test_running_engines_needs_neither_torch_nor_onnx() -> None:
    """A deployment host has neither, nor has a CPython 3.10 with TensorRT 8.6."""
    assert not {"torch", "onnx", "onnxruntime"} & loaded_by(
        "import darktrt.engine.runtime, darktrt.engine.manifest, darktrt.vision.detector\n"
        "import darktrt.check.agreement, darktrt.check.detections"
    )


def test_every_module_imports_alone() -> None:
    """No cycle that works in one order only, and nothing printed on import."""
    code = f"""
import importlib, sys
for name in {sorted(f"darktrt.{name}" for name in modules() if name not in ("", "__main__"))}:
    importlib.import_module(name)
    for loaded in [n for n in sys.modules if n.partition(".")[0] == "darktrt"]:
        del sys.modules[loaded]
"""
    assert run_python(code) == ""


def test_help_starts_in_three_tenths_of_a_second() -> None:
    """Of a processor, whatever else runs on this machine."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "darktrt", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


CHANGING = {
    "calib.collect._Run",
    "calib.histogram.Histogram",
    "calib.histogram.HistogramSet",
    "cluster.dispatch._Hand",
    "cluster.dispatch._Task",
    "engine.runtime._Slot",
    "selftest.run._Series",
    "serve.load.worker.Counts",
    "vision.decode.Ticket",
    "vision.decode._Image",
    "vision.detector._Batch",
}
"""Records that something is collected in; all others are frozen, so that who holds one can rely on it."""

COMPARED_BY_IDENTITY = {
    "calib.bias_correction.ChannelSums",
    "calib.channel_means.MeasuredMeans",
    "calib.file.CalibrationFile",
    "calib.fp_layers.NoiseSums",
    "calib.histogram.Histogram",
    "calib.histogram.HistogramSet",
    "check.detections.VariantDetections",
    "check.evaluation.EvaluatedVariant",
    "check.evaluation.Evaluation",
    "check.model.EngineModel",
    "check.model.OnnxModel",
    "check.runs.InputImage",
    "check.runs.VariantResults",
    "check.simulate.OnnxNetwork",
    "cluster.dispatch._Hand",
    "cluster.dispatch._Task",
    "parallel.Done",
    "vision.boxes.Detections",
    "vision.decode.Ticket",
    "vision.decode._Image",
}
"""Records that hold arrays or models, for which ``==`` has no single answer, or that stand for themselves."""


def records() -> dict[str, dict[str, str]]:
    """Every dataclass by its name, with the options of its decorator."""
    found = {}
    for module, file in modules().items():
        for node in ast.walk(syntax_tree(file.read_text())):
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                name, keywords = (decorator.func, decorator.keywords) if isinstance(decorator, ast.Call) else (decorator, [])
                if isinstance(name, ast.Name) and name.id == "dataclass":
                    found[f"{module}.{node.name}"] = {str(one.arg): ast.unparse(one.value) for one in keywords}  # type: ignore[attr-defined]
    return found


def test_records_are_frozen() -> None:
    found = records()
    assert len(found) > 150
    assert {name for name, options in found.items() if options.get("frozen") != "True"} <= CHANGING
    with pytest.raises(FrozenInstanceError):
        DetectorInfo.__setattr__(object.__new__(DetectorInfo), "name", "other")


def test_records_of_arrays_are_compared_by_identity() -> None:
    found = records()
    assert {name for name, options in found.items() if options.get("eq") == "False"} == COMPARED_BY_IDENTITY
