"""Progress and warnings: where they go, and how a program silences or catches them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from darktrt.progress import LOGGER, progress, set_progress, show_on_stderr


@pytest.fixture(autouse=True)
def as_in_a_program() -> Iterator[None]:
    """The state of a process that has only imported darktrt; what other tests have set comes back."""
    from darktrt import progress as module

    before, handlers, level = module._shown, list(LOGGER.handlers), LOGGER.level
    set_progress(None)
    LOGGER.handlers.clear()
    LOGGER.setLevel(logging.NOTSET)
    yield
    set_progress(before)
    LOGGER.handlers[:] = handlers
    LOGGER.setLevel(level)


def work(steps: int = 3) -> None:
    with progress(steps, "images", "reading") as bar:
        for _ in range(steps):
            bar.update()


def test_a_program_sees_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    assert capsys.readouterr() == ("", "")


def test_a_program_may_follow_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[tuple[str, int, int | None]] = []
    set_progress(lambda description, done, total: steps.append((description, done, total)))
    work()
    assert steps == [("reading", 1, 3), ("reading", 2, 3), ("reading", 3, 3)]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_progress("bar")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    work()
    assert "reading:   0%" in capsys.readouterr().err


def test_a_log_file_sees_nothing_of_short_work(capsys: pytest.CaptureFixture[str]) -> None:
    set_progress("bar")
    work()
    assert capsys.readouterr() == ("", "")


def test_warnings_can_be_caught(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    LOGGER.warning("%s: is odd", "a.png")
    assert [record.getMessage() for record in caplog.records] == ["a.png: is odd"]
    assert capsys.readouterr() == ("", "")


def test_warnings_can_be_silenced(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("darktrt").setLevel(logging.ERROR)
    LOGGER.warning("a.png: is odd")
    assert not caplog.records


def test_the_command_line_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    show_on_stderr()
    show_on_stderr()
    LOGGER.warning("a.png: is odd")
    LOGGER.info("reading")
    assert capsys.readouterr() == ("", "warning: a.png: is odd\nreading\n")
