"""Packages from pip's index, of which no unknown code runs: wheels only, each with the SHA-256 that darktrt states."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from darktrt.errors import DarktrtError

PINNED = ("--no-deps", "--only-binary=:all:", "--require-hashes", "--quiet", "--disable-pip-version-check")
"""What makes pip refuse an sdist, whose ``setup.py`` would run, and every file without the stated SHA-256. Files of
requirements list all that is needed, so nothing else is looked for."""


def new_environment(python: str, folder: Path, *requirements: Path) -> None:
    """A virtual environment of ``python``, with what files of requirements list with hashes.

    Raises:
        DarktrtError: Python's or pip's reason why not.
    """
    _run(python, "-m", "venv", str(folder))
    _run(f"{folder}/bin/python", "-m", "pip", "install", *PINNED, *(f"--requirement={file}" for file in requirements))


def download_wheel(python: str, requirement: str, sha256: str, folder: Path) -> Path:
    """The wheel of a requirement such as ``name==1.2``, downloaded into ``folder``, which must have no other.

    Raises:
        DarktrtError: pip's reason why not.
    """
    listed = folder / "requirements.txt"
    listed.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    _run(python, "-m", "pip", "download", *PINNED, f"--dest={folder}", f"--requirement={listed}")
    return next(folder.glob("*.whl"))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DarktrtError(_reason(done.stderr.splitlines()))


def _reason(lines: Sequence[str]) -> str:
    """The last error, else the last line: what follows an error about hashes only lists them."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")]
    return [*(said or ["no reason given"]), *errors][-1]
