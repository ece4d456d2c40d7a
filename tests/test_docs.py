"""The README and the guides: their commands and programs run as they stand there, and what they refer to exists.

The language of a code block says who runs it; CONTRIBUTING.md has the table.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from helpers import syntax_tree
from test_layers import ROOMS

import darktrt
from darktrt.cli import main
from darktrt.cli.commands import parser
from darktrt.progress import LOGGER

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GUIDES = {
    "getting-started": "",
    "int8": "getting-started",
    "reports": "int8",
    "engines-and-plugins": "getting-started",
    "python-api": "int8",
}
"""Guides whose commands run here, in this order, and the guide that makes their files."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *DOCS.glob("reference/*.md")]
LANGUAGES = {"sh", "python", "console", "shell", "py", "bash", "python3"}


def page(name: str) -> str:
    """A guide by its name, or another page by its path."""
    path = ROOT / name if name.endswith(".md") else DOCS / f"{name}.md"
    return path.read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks in these languages, in their order."""
    return [block for block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if block[0] in languages]


def commands(text: str, *languages: str) -> list[str]:
    """The lines of the code blocks in these languages, without their comments."""
    lines = "".join(block for _, block in blocks(text, *languages)).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def zoo() -> dict[str, str]:
    """Where the weights are, as a variable of the environment."""
    shared = ROOT.parent / "shared" / "zoo"
    return {"DARKTRT_ZOO": str(shared)} if "DARKTRT_ZOO" not in os.environ and shared.is_dir() else {}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **zoo()}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)


def run_here(words: list[str], folder: Path, command: Callable[[], int]) -> subprocess.CompletedProcess[str]:
    """As a process of its own would, but that nothing is imported again."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        for name, value in zoo().items():
            patch.setenv(name, value)
        status = command()
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def run_program(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    def program() -> int:
        level = LOGGER.level
        try:
            exec(compile(text, "program.py", "exec"), {"__name__": "__main__"})
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            LOGGER.setLevel(level)  # a guide shows how to silence it
        return 0

    return run_here(["python", "-c", text], folder, program)


def copy_images(folder: Path, *others: str) -> None:
    """A labelled image, and others of ``docs/``, where the commands of the guides look for them: all that is there counts."""
    (folder / "docs").mkdir()
    for name in ("astronaut.jpg", "astronaut.txt", *others):
        shutil.copy(DOCS / name, folder / "docs")


# --- commands and programs ---


class Workshop:
    """A folder in which the guides' commands run, each guide once and after the one that makes its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        copy_images(folder, "report.png")
        self.printed = ""
        self.run = functools.cache(self._run)

    def _run(self, guide: str) -> str:
        """Run a guide up to its first failure, which is the result; empty if all is well."""
        if GUIDES[guide] and self.run(GUIDES[guide]):
            return f"{GUIDES[guide]} has failed"
        for language, group in itertools.groupby(blocks(page(guide), "sh", "python"), lambda block: block[0]):
            text = "".join(block for _, block in group)
            for done in self.results(language, text):
                self.printed += done.stdout
                if done.returncode:
                    return f"{shlex.join(done.args)}: {done.stderr or done.stdout}"
        return ""

    def results(self, language: str, text: str) -> Iterator[subprocess.CompletedProcess[str]]:
        """Of each command, or of a program."""
        if language == "python":
            yield run_program(text, self.folder)
            return
        for line in commands(f"```sh\n{text}```", "sh"):
            program, *words = shlex.split(line)
            assert program == "darktrt"
            yield run_here(["darktrt", *words], self.folder, functools.partial(main, words))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    pytest.importorskip("tensorrt_rtx", reason="building an engine needs tensorrt-rtx: pip install 'darktrt[rtx]'")
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    if "available nowhere" in (problem := workshop.run("getting-started")):
        pytest.skip(f"needs the weights of yolov4-tiny: {problem}")
    return workshop


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide(workshop: Workshop, guide: str) -> None:
    assert workshop.run(guide) == ""


def test_what_the_guides_make(workshop: Workshop) -> None:
    assert not workshop.run("int8")
    assert "person" in workshop.printed
    assert (workshop.folder / "out.jpg").stat().st_size > 10_000
    assert (workshop.folder / "model.plan").stat().st_size > 10_000_000


def test_the_readmes_program(workshop: Workshop) -> None:
    """In a folder of its own, for it makes files of the guides' names anew."""
    folder = workshop.folder / "readme"
    folder.mkdir()
    copy_images(folder)
    shutil.copytree(workshop.folder / "networks", folder / "networks")
    [(_, program)] = blocks(page("README.md"), "python")
    done = run_program(program, folder)
    assert done.returncode == 0, done.stderr
    assert "person" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("line", sorted({line for path in PAGES for line in commands(path.read_text(), "console")}))
def test_make_knows_what_to_do(line: str, tmp_path: Path) -> None:
    """A dry run: what ``make engine`` builds is built by :func:`test_a_guide`, stage by stage."""
    if line.startswith("pip install"):
        pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(f"\n{extra} = [" in pyproject for extra in re.findall(r"[a-z]+", line.partition("[")[2]))
        return
    for name in ("my.cfg", "my.weights", "my.names"):
        (tmp_path / name).touch()
    words = [word.replace("my.", f"{tmp_path}/my.") for word in shlex.split(line)]
    done = run(["make", "--dry-run", "--no-print-directory", f"OUT={tmp_path}/build", *words[1:]], ROOT)
    assert done.returncode == 0, done.stderr
    does = {
        "test": "pytest",
        "lint": "ruff check",
        "docs": "mkdocs build --strict",
        "calib": "darktrt calib run",
        "check": "check compare",
        "report": "check report",
        "engine": "darktrt engine",
        "fuzz": "-m fuzz --seconds 600",
        "load": "darktrt load",
        "plugins": "darktrt plugins",
        "serve": "serve start",
        "triton": "serve repository",
        "wheel": "-m build",
    }
    assert does[words[1]] in done.stdout


# --- commands and names that are not run ---


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


PARSERS = {parser.prog: parser for parser in parsers(parser())}
OPTIONS = {name: set(parser._option_string_actions) for name, parser in PARSERS.items()}
"""The options of every command, by its words."""

GROUPS = {name for name, parser in PARSERS.items() if parser._subparsers}
"""Commands that do nothing without a second or third word."""

FOREIGN = {
    "--calib",
    "--ipc",
    "--dynamicPlugins",
    "--data",
    "--json",
    "--http-max-input-size",
    "--timing-cache",
    "--strict",
    "--backend-config",
}
"""Options of other programs that the pages speak of, besides those that darktrt has too."""


def command_of(line: str) -> str:
    """The longest command of darktrt that a line begins with; a group only where no word follows."""
    words = line.split()
    name = next(name for n in (3, 2, 1) if (name := " ".join(words[:n])) in OPTIONS)
    following = words[len(name.split()) :]
    assert name not in GROUPS or not following or following[0].startswith("-"), line
    return name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_and_options_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = [line for line in commands(text, "sh", "shell", "bash") if line.startswith("darktrt")]
    lines += re.findall(r"`(darktrt [a-z][^`]*)`", text)
    for line in lines:
        used = set(re.findall(r"(?<= )--?[a-z][a-z0-9-]*", line))
        assert used <= OPTIONS[command_of(line)], line
    mentioned = set(re.findall(r"`(--[a-z][a-z0-9-]*)", text))
    assert mentioned <= set().union(*OPTIONS.values()) | FOREIGN


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_blocks_say_who_runs_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"^ *```(\w+)$", text, re.MULTILINE)) <= LANGUAGES
    for _, program in blocks(text, "py", "python", "python3"):
        tree = syntax_tree(program)
        used = {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "darktrt"
        }
        assert used <= set(darktrt.__all__)
    for name in re.findall(r"`darktrt\.([A-Za-z][A-Za-z_]*)(?:\(\)|`)", text):
        assert name in darktrt.__all__ or (ROOT / "darktrt" / name).exists() or (ROOT / f"darktrt/{name}.py").exists(), name


def test_every_command_has_an_example() -> None:
    lines = [line for path in PAGES for line in commands(path.read_text(), "sh", "shell", "bash") if line.startswith("darktrt")]
    assert set(OPTIONS) - GROUPS <= {command_of(line) for line in lines}


def test_every_public_name_is_in_the_reference() -> None:
    assert set(re.findall(r"^::: darktrt\.(?:[a-z_]+\.)*(\w+)$", page("reference/python"), re.MULTILINE)) == {
        name for name in darktrt.__all__ if name != "__version__"
    }


# --- links, sentences, tables ---


def headings(text: str) -> set[str]:
    """As GitHub names them in links."""
    return {re.sub(r"[^a-z0-9 _-]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)}


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / "benchmarks").glob("*.md")], ids=lambda path: path.stem)
def test_images_and_links_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if heading:
            assert heading in headings(file.read_text(encoding="utf-8")), target


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(page("README.md").splitlines()) <= 200


def test_what_it_stands_on_is_what_it_installs() -> None:
    """Every dependency, also those of the extras, has a line that says why."""
    pyproject = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project]")[2].partition("[project.scripts]")[0]
    )
    lists = re.findall(r"^(?:dependencies|[a-z]+) = \[(.*?)\]$", pyproject, re.DOTALL | re.MULTILINE)
    table = page("architecture").partition("## What it stands on")[2]
    named = set(re.findall(r"[A-Za-z0-9-]+", " ".join(re.findall(r"^\| (.*?)(?: \(.*?\))? \|", table, re.MULTILINE))))
    packages = {package for text in lists for package in re.findall(r'"([A-Za-z0-9-]+)(?:\[.*?\])?>=', text)}
    assert {"torch", "tensorrt-rtx", "mkdocs-material", "PyNvVideoCodec"} <= packages <= named


def test_who_may_import_whom_is_what_a_test_holds() -> None:
    rows = dict(re.findall(r"^\| `([a-z]+)` \| (.*) \|$", page("architecture").partition("| may import |")[2], re.MULTILINE))
    named = {room: set(re.findall(r"`([a-z_.]+)`", cell)) for room, cell in rows.items()}
    assert named == {room: allowed for room, allowed in ROOMS.items() if room not in ("", "__main__")}


def sentences() -> str:
    """Every text in the code, joined from its pieces; a value in it is written as …."""
    rooms = [file for room in (ROOT / "darktrt").iterdir() if room.is_dir() for file in room.rglob("*.py")]
    found = []
    for file in [*(ROOT / "darktrt").glob("*.py"), *rooms]:
        for node in ast.walk(syntax_tree(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = [piece.value if isinstance(piece, ast.Constant) else "…" for piece in node.values]
                found.append("".join(map(str, pieces)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_the_code() -> None:
    text = re.sub(r"\s+", " ", sentences())
    quoted = re.findall(r"^#+ `(.+)`$", page("troubleshooting"), re.MULTILINE)
    assert len(quoted) > 40
    assert [line for line in quoted if line not in text] == []
