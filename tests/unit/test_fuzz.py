"""Files that once ended in a trace, and some new damaged ones of every kind, end in a result or in a sentence."""

from pathlib import Path

import pytest
from fuzz import cases
from fuzz.cases import CORPUS, check, fuzz
from fuzz.mutations import of_bytes
from fuzz.targets import TARGETS, Target, make_files

from darktrt.errors import DarktrtError

_KEPT = sorted(str(path.relative_to(CORPUS)) for path in CORPUS.glob("*/*"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_files(folder)
    return folder


@pytest.mark.parametrize("case", _KEPT)
def test_what_once_failed(files: Path, case: str) -> None:
    check(Path(case).parent.name, (CORPUS / case).read_bytes(), files)


@pytest.mark.parametrize("target", TARGETS)
def test_whole_files_are_accepted_and_damaged_ones_end_well(files: Path, target: str) -> None:
    assert check(target, (files / TARGETS[target].file).read_bytes(), files)
    outcome = fuzz(target, files, seconds=60, first_seed=1, most=20)
    assert not outcome.failures
    assert outcome.cases >= 20


def _faulty(path: Path) -> None:
    content = path.read_bytes()
    if content.startswith(b"ab"):
        return
    if content.startswith(b"a"):
        raise DarktrtError(f"{path}: is damaged")
    raise KeyError("first byte")


def test_a_fault_is_reported_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    monkeypatch.setitem(TARGETS, "faulty", Target("file", of_bytes, _faulty))
    monkeypatch.setattr(cases, "CORPUS", tmp_path / "corpus")
    outcome = fuzz("faulty", tmp_path, seconds=60, first_seed=1, most=300)
    assert len(outcome.failures) == 1
    ((place, trace),) = outcome.failures.items()
    assert place.startswith("KeyError test_fuzz.py:")
    assert "first byte" in trace
    assert outcome.refused > 0
    assert outcome.accepted > 0
    (kept,) = (tmp_path / "corpus" / "faulty").iterdir()
    assert not kept.read_bytes().startswith(b"a")
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_a_file_that_a_refused_run_leaves_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> None:
        (path.parent / "half").write_text("")
        raise DarktrtError("is damaged")

    (tmp_path / "file").write_bytes(b"abc")
    monkeypatch.setitem(TARGETS, "faulty", Target("file", of_bytes, read))
    with pytest.raises(AssertionError, match="left files"):
        check("faulty", b"", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
