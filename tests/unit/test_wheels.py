"""Packages from pip's index: wheels with the stated SHA-256 only, and no code of any other runs. The index is a folder."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.wheels import download_wheel, new_environment


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", "/dev/null"), ("NO_CACHE_DIR", "1")):
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def add_wheel(index: Path, word: str) -> str:
    """Put toy 1 into the index; its module says ``word``. The wheel's SHA-256."""
    path = index / "toy-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy.py", f"WORD = {word!r}\n")
        archive.writestr("toy-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
        archive.writestr("toy-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy-1.dist-info/RECORD", "")
    return sha256_of(path)


def add_sdist(index: Path, ran: Path) -> str:
    """Put toy 1 into the index as an sdist whose setup.py makes the file ``ran``. Its SHA-256."""
    setup = index.parent / "setup.py"
    setup.write_text(f"open({str(ran)!r}, 'w')\n")
    path = index / "toy-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(setup, "toy-1/setup.py")
    return sha256_of(path)


def test_a_wheel_with_the_stated_hash(index: Path, tmp_path: Path) -> None:
    stated = add_wheel(index, "right")
    (tmp_path / "new").mkdir()
    wheel = download_wheel(sys.executable, "toy==1", stated, tmp_path / "new")
    assert (wheel.name, sha256_of(wheel)) == ("toy-1-py3-none-any.whl", stated)


def test_another_wheel_is_refused(index: Path, tmp_path: Path) -> None:
    """The one in the index is of the same name and version, with other content."""
    stated = add_wheel(index, "right")
    add_wheel(index, "wrong")
    (tmp_path / "new").mkdir()
    with pytest.raises(DarktrtError, match=r"^ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"):
        download_wheel(sys.executable, "toy==1", stated, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.whl"))


def test_the_code_of_an_sdist_does_not_run(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where pip's settings ask for sdists, nor where the hash is the right one."""
    stated = add_sdist(index, tmp_path / "ran")
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    (tmp_path / "new").mkdir()
    with pytest.raises(DarktrtError, match=r"^ERROR: No matching distribution found for toy==1"):
        download_wheel(sys.executable, "toy==1", stated, tmp_path / "new")
    assert not (tmp_path / "ran").exists()


def test_an_environment_of_listed_wheels(index: Path, tmp_path: Path) -> None:
    (tmp_path / "listed.txt").write_text(f"toy==1 --hash=sha256:{add_wheel(index, 'right')}\n")
    (tmp_path / "unlisted.txt").write_text("toy==1\n")
    with pytest.raises(DarktrtError, match=r"require-hashes"):
        new_environment(sys.executable, tmp_path / "new", tmp_path / "unlisted.txt")
    new_environment(sys.executable, tmp_path / "new", tmp_path / "listed.txt")
    assert list((tmp_path / "new").glob("lib/python*/site-packages/toy.py"))
