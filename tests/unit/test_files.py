"""Inputs are regular files of a stated size; outputs are whole or not there, and what killed runs left is removed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from darktrt.errors import DarktrtError, quote
from darktrt.files import (
    abandoned,
    atomic_folder,
    atomic_output,
    check_input,
    check_outputs,
    keep_inputs,
    one_process_at_a_time,
    open_input,
    read_bytes,
    read_text,
    scratch_folder,
    unfinished_folder,
)

_DIES = """
import os, signal, sys
from pathlib import Path
from darktrt.files import atomic_folder, atomic_output, scratch_folder
block = scratch_folder() if sys.argv[1] == "scratch_folder" else globals()[sys.argv[1]](sys.argv[2])
with block as temporary:
    (temporary if temporary.is_file() else temporary / "part").write_text("half")
    print("inside", flush=True)
    if sys.argv[3] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def _killed(kind: str, target: Path, temporary: Path | None = None) -> None:
    env = os.environ | {"TMPDIR": str(temporary or target.parent)}
    done = subprocess.run([sys.executable, "-c", _DIES, kind, target, "die"], stdin=subprocess.DEVNULL, env=env, check=False)
    assert done.returncode == -signal.SIGKILL


def test_the_next_run_removes_the_temporary_file_of_a_killed_one(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    target.write_text("whole")
    _killed("atomic_output", target)
    assert len(_names(tmp_path)) == 2
    assert target.read_text() == "whole"
    with atomic_output(target) as temporary:
        temporary.write_text("new")
    assert _names(tmp_path) == ["out.onnx"]
    assert target.read_text() == "new"


def test_the_next_run_removes_the_temporary_folder_of_a_killed_one(tmp_path: Path) -> None:
    target = tmp_path / "report"
    _killed("atomic_folder", target)
    assert not target.exists()
    assert len(_names(tmp_path)) == 1
    with atomic_folder(target) as temporary:
        (temporary / "index.html").write_text("new")
    assert _names(tmp_path) == ["report"]
    assert _names(target) == ["index.html"]


def test_the_next_run_removes_the_scratch_folder_of_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _killed("scratch_folder", tmp_path / "unused")
    (left,) = _names(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as folder:
        assert _names(tmp_path) == [folder.name]
        assert folder.name == left
        assert _names(folder) == []
    assert _names(tmp_path) == []


def test_what_killed_runs_left_is_listed(tmp_path: Path) -> None:
    """Not what a run that lives holds, nor what others put under such a name."""
    _killed("atomic_folder", tmp_path / "b")
    _killed("atomic_output", tmp_path / "a")
    (left_of_a,), (left_of_b,) = ([name for name in _names(tmp_path) if name.startswith(f".{one}.")] for one in "ab")
    (tmp_path / ".c.darktrt-0").symlink_to(left_of_a)
    with atomic_output(tmp_path / "d"):
        assert [path.name for path in abandoned(tmp_path / "*")] == [left_of_a, left_of_b]
    assert [path.name for path in abandoned(tmp_path / "b")] == [left_of_b]


def test_a_run_that_lives_keeps_its_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "out.plan"
    command = [sys.executable, "-c", _DIES, "atomic_output", target, "live"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdin
        assert other.stdout.readline() == "inside\n"
        with atomic_output(target) as temporary:
            temporary.write_text("mine")
        assert len(_names(tmp_path)) == 2
        other.stdin.close()
    assert _names(tmp_path) == ["out.plan"]
    assert target.read_text() == "half"  # whoever ends last


def test_sixteen_runs_may_write_one_output_at_once(tmp_path: Path) -> None:
    with ExitStack() as runs:
        names = {runs.enter_context(atomic_output(tmp_path / "out.plan")) for _ in range(16)}
        assert len(names) == 16
        with pytest.raises(
            DarktrtError, match=r"16 other runs write it; if there are none, remove .*\.out\.plan\.darktrt-0\.plan"
        ):
            runs.enter_context(atomic_output(tmp_path / "out.plan"))
        assert len(_names(tmp_path)) == 16
    assert _names(tmp_path) == ["out.plan"]


def test_an_interrupt_at_the_creation_takes_no_file_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_output(tmp_path / "out.plan") as others:
        monkeypatch.setattr("darktrt.files._new_file", _interrupted)
        with pytest.raises(KeyboardInterrupt), atomic_output(tmp_path / "out.plan"):
            pass
        assert _names(tmp_path) == [others.name]


def _interrupted(path: Path) -> int:
    if not path.exists():
        path.touch()
        raise KeyboardInterrupt
    raise FileExistsError


def test_an_interrupt_at_the_removal_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink, interrupts = Path.unlink, [KeyboardInterrupt()]

    def interrupted(path: Path) -> None:
        if interrupts:
            raise interrupts.pop()
        unlink(path)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_output(tmp_path / "out.plan"):
        raise ZeroDivisionError
    assert _names(tmp_path) == []


def test_a_new_file_that_another_run_takes_for_a_stray_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its creation and its lock nobody seems to hold it."""
    flock, taken = fcntl.flock, []

    def lock(descriptor: int, operation: int) -> None:
        if not taken:
            taken.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            taken[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", lock)
    with atomic_output(tmp_path / "out.plan") as temporary:
        assert temporary != taken[0] and temporary.exists() and not taken[0].exists()
        temporary.write_text("mine")
    assert _names(tmp_path) == ["out.plan"]


def test_a_file_system_without_locks_keeps_what_may_be_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    (tmp_path / ".out.plan.darktrt-0.plan").write_text("of a run that may live")
    monkeypatch.setattr("fcntl.flock", refuse)
    with atomic_output(tmp_path / "out.plan") as temporary:
        temporary.write_text("mine")
    assert _names(tmp_path) == [".out.plan.darktrt-0.plan", "out.plan"]


def test_what_others_put_under_a_temporary_name_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".out.plan.darktrt-0.plan")
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".out.plan.darktrt-1.plan").symlink_to("elsewhere")
    with atomic_output(tmp_path / "out.plan") as temporary:
        temporary.write_text("mine")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert (tmp_path / "out.plan").read_text() == "mine"


def test_files_of_others_stay(tmp_path: Path) -> None:
    for name in (
        ".out.onnx",
        ".out.onnx.darktrt-0",
        ".other.onnx.darktrt-0.onnx",
        "out.onnx.darktrt-0.onnx",
    ):
        (tmp_path / name).write_text("")
    before = _names(tmp_path)
    with atomic_output(tmp_path / "out.onnx"):
        pass
    assert _names(tmp_path) == sorted([*before, "out.onnx"])


def test_a_folder_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".report.darktrt-3.old"
    aside.mkdir()
    (aside / "index.html").write_text("before")
    with pytest.raises(DarktrtError, match="nothing was kept"), atomic_folder(tmp_path / "report"):
        raise OSError(28, "No space left on device")
    assert _names(tmp_path) == ["report"]
    assert (tmp_path / "report" / "index.html").read_text() == "before"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "report"
    for content in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
    assert _names(target) == ["second"]
    assert _names(target.parent) == ["report"]
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as temporary:
        raise ZeroDivisionError
    assert _names(target) == ["second"]
    assert _names(target.parent) == ["report"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DarktrtError, match="is a file; name a folder"), atomic_folder(tmp_path / "file"):
        pass


@pytest.mark.parametrize("name", ["x" * 255, "x" * 250 + ".onnx", "ä" * 120 + ".onnx", "a." + "b" * 250, "line\nbreak.onnx"])
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        with atomic_output(tmp_path / name) as temporary:
            temporary.write_text("content")
        assert _names(tmp_path) == [name]


def test_a_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DarktrtError, match="File name too long"), atomic_output(tmp_path / ("x" * 256)):
        pass
    assert _names(tmp_path) == []


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def _link(folder: Path) -> Path:
    (folder / "link").symlink_to("/dev/zero")
    return folder / "link"


def _loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (_fifo, "is a pipe or device"),
        (_link, "is a pipe or device"),
        (_loop, "cannot read: Too many levels of symbolic links; make it again"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: folder / "missing", "cannot read: No such file or directory; make it again"),
        (lambda folder: folder / ("x" * 300), "cannot read: File name too long; make it again"),
        (lambda folder: folder / "null\0byte", "cannot read: embedded null byte; make it again"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, made: Callable[[Path], Path], reason: str) -> None:
    path = made(tmp_path)
    start = time.monotonic()
    for read in (lambda: check_input(path, advice="make it again"), lambda: read_bytes(path, 10, "make it again")):
        with pytest.raises(DarktrtError, match=reason):
            read()
    assert time.monotonic() - start < 1


def test_an_error_of_another_file_is_not_of_the_one_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"a")
    with (
        pytest.raises(DarktrtError, match=r"a\.bin: cannot read: .*Input/output error; copy it again"),
        open_input(path, 9, "copy it again"),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(FileNotFoundError), open_input(path, 9):
        os.stat(tmp_path / "other")


def test_sizes_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf\xc3\xa4")
    assert read_text(path) == "ä"
    assert len(read_bytes(path, 5)) == 5
    with pytest.raises(DarktrtError, match="text: has 5 bytes, and such a file may have 4"):
        read_bytes(path, 4)
    path.write_bytes(b"ab\xff")
    with pytest.raises(DarktrtError, match=r"text: is no UTF-8 text \(byte 2\); save it as UTF-8"):
        read_text(path)


def test_a_text_may_have_64_mebibytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.touch()
    os.truncate(path, (64 << 20) + 1)
    with pytest.raises(DarktrtError, match="text: has 67,108,865 bytes, and such a file may have 67,108,864; is it the right"):
        read_text(path)


def test_outputs_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    """Scratch folders are their user's alone."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with atomic_output(tmp_path / "out.onnx") as temporary:
        temporary.write_text("")
    with atomic_folder(tmp_path / "report"):
        pass
    with one_process_at_a_time(tmp_path / "lock"):
        pass
    for made, usual in (("out.onnx", "file"), ("lock", "file"), ("report", "folder")):
        assert (tmp_path / made).stat().st_mode == (tmp_path / usual).stat().st_mode
    with scratch_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_for_several_files_vanishes(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path and folder.is_dir()
        (folder / "a").write_text("whole")
        (folder / "a").replace(tmp_path / "a")
    assert _names(tmp_path) == ["a"]


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    """What is there stays; one that is an input, or another output, is refused, and None is none."""
    (tmp_path / "a").write_text("before")
    check_outputs([tmp_path / "a", None, tmp_path / "b"], [tmp_path / "c", None])
    assert _names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"
    for outputs in ([tmp_path / "b", tmp_path / "c"], [tmp_path / "b", None, tmp_path / "b"]):
        with pytest.raises(DarktrtError, match="is given twice and would be overwritten; choose another output"):
            check_outputs(outputs, [tmp_path / "c"])
    with pytest.raises(DarktrtError, match="missing/b: cannot write: No such file or directory"):
        check_outputs([tmp_path / "b", tmp_path / "missing" / "b"], [])


def test_a_loop_of_links_as_an_output_is_a_sentence(tmp_path: Path) -> None:
    keep_inputs(_loop(tmp_path), tmp_path / "other")
    with pytest.raises(DarktrtError, match="given twice"):
        keep_inputs(tmp_path / "loop", tmp_path / "loop")


def test_quotes_are_a_line_without_control_characters() -> None:
    assert quote("a" * 80) == "a" * 80
    assert quote("a" * 81) == "a" * 77 + "..."
    assert quote("\x1b[31mred\n") == r"\x1b[31mred\n"
    assert quote([1, None]) == "[1, None]"
    assert quote("bücher 图") == "bücher 图"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    code = f"""
from darktrt.files import one_process_at_a_time
print("asks", flush=True)
with one_process_at_a_time({str(lock)!r}):
    print("inside", flush=True)
"""
    with one_process_at_a_time(lock):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert other.stdout
        assert other.stdout.readline() == "asks\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
    assert other.communicate(timeout=30)[0] == "inside\n"
    with (
        pytest.raises(DarktrtError, match="lock: cannot make this folder"),
        one_process_at_a_time(lock / "lock"),
    ):
        pass
    with pytest.raises(DarktrtError, match="new: cannot write: Is a directory"), one_process_at_a_time(tmp_path / "new"):
        pass
