"""The README's commands, run as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Commands of the README's code blocks in ``language``, without their comments."""
    text = "".join(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL))
    return [line.partition("  #")[0].strip() for line in text.splitlines() if line.strip()]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shared = ROOT.parent / "shared" / "zoo"
    if "DARKTRT_ZOO" not in environment and shared.is_dir():
        environment["DARKTRT_ZOO"] = str(shared)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)


def test_stages(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building an engine needs tensorrt-rtx: pip install 'darktrt[rtx]'")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    commands = [shlex.split(line) for line in blocks("sh")]
    assert [command[0] for command in commands] == ["darktrt"] * len(commands)
    for command in commands:
        done = run([sys.executable, "-m", "darktrt", *command[1:]], tmp_path)
        if command[1] == "fetch" and "to be had nowhere" in done.stderr:
            pytest.skip(f"needs the weights of yolov4-tiny: {done.stderr}")
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        if command[1] == "detect":
            assert "person" in done.stdout
    assert (tmp_path / "out.jpg").stat().st_size > 10_000
    assert (tmp_path / "model.plan").stat().st_size > 10_000_000


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("line", blocks("console"))
def test_make_knows_what_to_do(line: str, tmp_path: Path) -> None:
    """A dry run: what ``make engine`` builds is built by :func:`test_stages`, stage by stage."""
    for name in ("my.cfg", "my.weights", "my.names"):
        (tmp_path / name).touch()
    words = [word.replace("my.", f"{tmp_path}/my.") for word in shlex.split(line)]
    done = run(["make", "--dry-run", "--no-print-directory", f"OUT={tmp_path}/build", *words[1:]], ROOT)
    assert done.returncode == 0, done.stderr
    does = {
        "test": "pytest",
        "calib": "darktrt calib run",
        "check": "check compare",
        "report": "check report",
        "engine": "darktrt engine",
        "load": "darktrt load",
        "plugins": "plugins/csrc",
        "serve": "serve start",
        "triton": "serve repository",
    }
    assert does[words[1]] in done.stdout


def test_what_it_stands_on_is_what_it_installs() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"\ndependencies = \[(.*?)\]", pyproject, re.DOTALL)
    assert dependencies
    for package in re.findall(r'"([a-z0-9-]+)', dependencies[1]):
        assert f"\n| {package} |" in README


def headings(text: str) -> set[str]:
    """As GitHub names them in links."""
    return {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)}


def test_images_and_links_exist() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", README):
        name, _, heading = target.partition("#")
        assert (ROOT / (name or "README.md")).is_file(), target
        if heading:
            assert heading in headings((ROOT / (name or "README.md")).read_text(encoding="utf-8")), target


def test_version_and_help_agree_with_the_readme() -> None:
    done = run([sys.executable, "-m", "darktrt", "--help"], ROOT)
    listed = re.findall(r"^    ([a-z]+) ", done.stdout, re.MULTILINE)
    on_a_gpu, with_a_server = blocks("shell"), blocks("bash")
    assert {line.split()[1] for line in blocks("sh") + on_a_gpu + with_a_server} == set(listed)
