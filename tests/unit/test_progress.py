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


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of bars."""
    made = Clock()
    monkeypatch.setattr("tqdm.std.time", made)
    return made


def test_a_log_file_gets_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    """And its last line stays."""
    set_progress("bar")
    with progress(100, "images", "reading") as bar:
        seen = []
        for seconds in (9.9, 0.2, 9.7, 0.4, 3.0):
            clock.now += seconds
            bar.update(10)
            seen.append(capsys.readouterr().err)
        assert [bool(text) for text in seen] == [False, True, False, True, False]
        assert "reading:  20%" in seen[1] and "20/100" in seen[1] and "reading:  40%" in seen[3] and " images/s" in seen[3]
    assert "reading:  50%" in (last := capsys.readouterr().err) and last.endswith("\n")


def test_slow_work_has_its_rate_in_steps_a_second_too(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    set_progress("bar")
    with progress(4, "images") as bar:
        for _ in range(2):
            clock.now += 20
            bar.update()
    assert "1/4 [00:20<01:00,  0.05 images/s]" in capsys.readouterr().err


def test_a_terminal_sees_a_bar_that_moves_and_goes_away(
    capsys: pytest.CaptureFixture[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_progress("bar")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress(10, "images", "reading") as bar:
        clock.now += 0.2
        bar.update()
        assert "reading:  10%" in capsys.readouterr().err
        bar.total = 5
        clock.now += 0.2
        bar.update(2)
        assert "reading:  60%" in capsys.readouterr().err, "there are fewer steps than was thought"
    assert "\n" not in (last := capsys.readouterr().err) and last.endswith("\r")


@pytest.mark.parametrize(
    ("total", "least", "shown"), [(1, 2, False), (2, 2, True), (1, 1, True), (0, 1, False), (None, 9, True)]
)
def test_little_work_has_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int | None, least: int, shown: bool
) -> None:
    set_progress("bar")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress(total, "images", "reading", least=least) as bar:
        bar.update()
    assert ("reading" in capsys.readouterr().err) is shown


def test_work_of_unknown_length_shows_a_clock_and_bytes_are_counted_in_thousands(
    capsys: pytest.CaptureFixture[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_progress("bar")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for total, scale, expected in (
        (None, False, "reading, 01:05"),
        (None, True, "reading: 3.00k bytes ["),
        (6000, True, "3.00k/6.00k"),
    ):
        with progress(total, "bytes", "reading", scale=scale) as bar:
            clock.now += 65
            bar.update(3000)
            assert expected in capsys.readouterr().err


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
