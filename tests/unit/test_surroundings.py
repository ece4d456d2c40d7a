"""The command line in bad surroundings: closed and full streams, odd names, terminals, signals; files that are none."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Made, made_image, net, section
from PIL import Image

from darktrt.cli import commands, main
from darktrt.cli.streams import Messages, Output, ReaderGoneError, readable_streams
from darktrt.convert.cfg import read_cfg
from darktrt.convert.export import convert_darknet
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, cache_folder, make_folder
from darktrt.progress import progress, set_progress
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.files import detect_files
from darktrt.vision.sources import find_media

DARKTRT = [sys.executable, "-m", "darktrt"]


def done(command: str, **options: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of ``darktrt`` with a shell's redirections."""
    words = f"{sys.executable} -m darktrt {command}"
    run = subprocess.run(["sh", "-c", words], capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]
    return run.returncode, run.stdout, run.stderr


# --- streams ---


def test_a_closed_standard_output_is_no_error(made: Made, folder: Path) -> None:
    assert done(f"inspect {made.cfg} >&-") == (0, "", "")
    assert done(f"convert {made.cfg} {made.weights} -o out.onnx >&-") == (0, "", "")
    assert sorted(os.listdir()) == ["out.onnx"]


def test_what_is_printed_never_gets_into_a_file_that_is_opened(made: Made, folder: Path) -> None:
    """The file would have the number of the stream that the shell closed."""
    assert done(f"convert {made.cfg} {made.weights} -o out.onnx 0<&- >&- 2>&-") == (0, "", "")
    convert_darknet(made.cfg, made.weights, "expected.onnx")
    assert Path("out.onnx").read_bytes() == Path("expected.onnx").read_bytes()


def test_errors_without_standard_error_stay_off_standard_output(folder: Path) -> None:
    assert done("inspect none.cfg 2>&-") == (2, "", "")
    assert done("inspect none.cfg 2>/dev/full") == (2, "", "")


@pytest.mark.parametrize("command", ["--help", "inspect {cfg}", "convert --help"])
def test_a_full_standard_output_is_one_sentence(made: Made, command: str) -> None:
    status, _, err = done(f"{command.format(cfg=made.cfg)} >/dev/full")
    assert status == 2 or "--help" in command
    assert err.endswith(": cannot write the output: No space left on device\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["--help", "inspect {cfg}"])
def test_a_reader_that_has_seen_enough_is_no_error(made: Made, command: str) -> None:
    status, out, err = done(f"{command.format(cfg=made.cfg)} | head -n 1")
    assert (status, out.count("\n"), err) == (0, 1, "")


class _Broken(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)


def test_a_stream_that_breaks_in_the_middle_of_work_is_the_outputs_error() -> None:
    with pytest.raises(DarktrtError, match="cannot write the output: Input/output error"):
        print("text", file=Output(_Broken(5)))
    with pytest.raises(ReaderGoneError):
        print("text", file=Output(_Broken(32)))
    print("text", file=Messages(_Broken(5)))


def test_standard_output_that_breaks_leaves_no_file_half_written(folder: Path) -> None:
    with pytest.raises(DarktrtError, match="cannot write the output"), atomic_output("out.txt"):
        print("text", file=Output(_Broken(28)))
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tab\tand\nline", "tab\tand\nline"),
        ("\x1b[31mred\x07", r"\u001b[31mred\u0007"),
        ("back\rover\x7f", r"back\u000dover\u007f"),
        ("\x9b31m", r"\u009b31m"),
        ("bücher 图 😀", "bücher 图 😀"),
        ("name\udcff", r"name\udcff"),
    ],
)
def test_control_characters_and_half_ones_are_shown_as_json_does(text: str, shown: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", newline="")
    Output(stream).write(text)
    stream.flush()
    assert stream.buffer.getvalue().decode() == shown  # type: ignore[attr-defined]


def test_what_an_encoding_lacks_stays_json() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    with readable_streams():
        Output(stream).write(json.dumps({"file": "ä\udcff😀\x7f"}, ensure_ascii=False))
    stream.flush()
    line = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert json.loads(line) == {"file": "ä\udcff😀\x7f"}


def test_a_bar_moves_the_cursor_and_names_in_it_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.StringIO()
    raw.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", Messages(raw))
    set_progress("bar")
    try:
        with progress(3, "images", "\x1b[31mname") as bar, bar.aside():
            bar.update()
    finally:
        set_progress(None)
    assert "\r" in raw.getvalue()
    assert "\x1b[31m" not in raw.getvalue()
    assert r"\x1b[31mname" in raw.getvalue()


@pytest.fixture
def odd(made: Made, folder: Path) -> Iterator[str]:
    """A name that is no UTF-8 and would colour a terminal, of a cfg with such a class."""
    name = os.fsdecode(b"\x1b[31m\xff.cfg")
    Path(name).write_bytes(made.cfg.read_bytes())
    Path("odd.names").write_text("c\x1b[2Jat\ndog\ncow\n")
    yield name


def test_names_that_no_terminal_should_see(odd: str, made: Made) -> None:
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    words = [*DARKTRT, "convert", odd, str(made.weights), "--names", "odd.names", "-o", "out.onnx"]
    first = subprocess.run(words, env=strict, capture_output=True, check=True)
    shown = [
        subprocess.run([*DARKTRT, "inspect", name], env=strict, capture_output=True, check=True) for name in ("out.onnx", odd)
    ]
    missing = subprocess.run([*DARKTRT, "inspect", odd + "x.cfg"], env=strict, capture_output=True, check=False)
    assert missing.returncode == 2
    assert missing.stderr.startswith(rb"darktrt inspect: \u001b[31m\udcff.cfgx.cfg: cannot read: ")
    for run in (first, *shown, missing):
        assert b"\x1b" not in run.stdout + run.stderr
        (run.stdout + run.stderr).decode()


def test_detect_prints_every_name(made: Made, folder: Path) -> None:
    insert_plugins(made.plain, "portable.onnx", SurgeryOptions())
    name = os.fsdecode(b"a\xff\x1b.png")
    Image.fromarray(made_image(60, 60)).save("plain.png")
    os.rename("plain.png", name)
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    words = [*DARKTRT, "detect", name, "--model", "portable.onnx"]
    table = subprocess.run(words, env=ascii_only, capture_output=True, text=True, check=True)
    assert table.stdout.startswith(r"a\udcff\u001b.png")
    lines = subprocess.run([*words, "--json"], env=ascii_only, capture_output=True, text=True, check=True)
    assert json.loads(lines.stdout)["file"] == name


# --- words ---


@pytest.mark.parametrize(
    "words",
    [
        ["detect", "", "--model", "x.onnx"],
        ["convert", "a.cfg", "a.weights", "-o", ""],
        ["convert", "a.cfg", "a.weights", "--output="],
        ["inspect", ""],
    ],
)
def test_an_empty_word_is_not_the_current_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    before = words[-1].rstrip("=") or words[-2] if words[-1] in ("", "--output=") else words[0]
    assert f"the word behind '{before}' is empty; is a variable of the shell not set?" in capsys.readouterr().err


def test_words_that_may_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.doctor, "_doctor", lambda args: 0)
    commands._refuse_empty(["engine", "x", "--fp-layers", "", "--fp-layers=", "-o", "x"])
    with pytest.raises(DarktrtError, match="behind '-o' is empty"):
        commands._refuse_empty(["engine", "x", "--fp-layers", "", "-o", ""])


def test_an_empty_source_is_not_the_current_folder(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    with pytest.raises(DarktrtError, match="a source has an empty name"):
        find_media(["a.png", ""])


def test_errors_of_a_cfg_quote_a_line_at_most(folder: Path) -> None:
    long = "k" * 100_000
    texts = [
        net() + section("convolutional", **{long: 1}),
        net() + section("convolutional", activation=long),
        net() + section(long),
        net() + f"[{long}\n",
        net() + f"{long}\n",
        net() + section("convolutional", filters=long),
        net() + section("convolutional", reverse=f"1#{long}"),
        net() + section("convolutional", filters=3) + section("maxpool", size=2, stride=2)
        + section("route", layers=",".join(["0", "1"] * 5000)),
    ]  # fmt: skip
    for text in texts:
        Path("long.cfg").write_text(text + section("yolo", anchors="1,1", classes=1))
        with pytest.raises(DarktrtError) as caught:
            read_cfg("long.cfg").shapes  # noqa: B018
        assert 20 < len(str(caught.value)) < 400, str(caught.value)[:200]


# --- files that are none ---


@pytest.mark.parametrize("suffix", ["jpg", "mp4", "cfg", "weights", "onnx", "names", "txt", "json"])
def test_a_pipe_is_refused_at_once(suffix: str, made: Made, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = f"pipe.{suffix}"
    os.mkfifo(pipe)
    insert_plugins(made.plain, "portable.onnx", SurgeryOptions())
    words = {
        "jpg": ["detect", pipe, "--model", "portable.onnx"],
        "mp4": ["detect", pipe, "--model", "portable.onnx"],
        "names": ["convert", str(made.cfg), str(made.weights), "--names", pipe, "-o", "out.onnx"],
        "txt": ["calib", "run", "portable.onnx", pipe, "-o", "out.calib"],
        "json": ["calib", "run", "portable.onnx", f"{pipe}:folder", "-o", "out.calib"],
    }.get(suffix, ["inspect", pipe])
    started = time.monotonic()
    assert main(words) == 2
    assert time.monotonic() - started < 10
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "pipe" in sentence


def test_an_endless_device_is_refused_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("zero.cfg", "zero.onnx", "zero.weights"):
        Path(name).symlink_to("/dev/zero")
        assert main(["inspect", name]) == 2
        assert f"{name}: is a pipe or device; name a file" in capsys.readouterr().err


def test_a_loop_of_links_is_one_sentence(made: Made, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("loop.png").symlink_to("loop.png")
    insert_plugins(made.plain, "portable.onnx", SurgeryOptions())
    Image.fromarray(made_image(60, 60)).save("a.png")
    assert main(["detect", "loop.png", "--model", "portable.onnx"]) == 2
    assert "loop.png: cannot read: Too many levels of symbolic links" in capsys.readouterr().err
    assert main(["detect", "a.png", "--model", "portable.onnx", "-o", "loop.png/out"]) == 2
    assert "loop.png/out: cannot make this folder: Too many levels" in capsys.readouterr().err
    assert main(["convert", str(made.cfg), str(made.weights), "-o", "loop.png"]) == 0  # as any link is replaced
    assert not Path("loop.png").is_symlink()


LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        f"detect a.png --model {LONG}",
        f"detect {LONG} --model portable.onnx",
        f"detect a.png --model portable.onnx -o {LONG}",
        f"check compare --load-outputs {LONG}",
        f"check diff {LONG} {LONG}",
        f"check report a.png --model portable.onnx -o {LONG}",
        f"convert {LONG} net.weights -o out.onnx",
        f"surgery plain.onnx -o {LONG}",
        f"fetch samples -o {LONG}",
        f"calib merge {LONG} -o out.calib",
    ],
)
def test_a_name_too_long_is_one_sentence(command: str, made: Made, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    insert_plugins(made.plain, "portable.onnx", SurgeryOptions())
    shutil.copyfile(made.plain, "plain.onnx")
    Image.fromarray(made_image(60, 60)).save("a.png")
    before = sorted(os.listdir())
    assert main(command.split()) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "too long" in sentence
    assert sorted(os.listdir()) == before


def test_outputs_are_written_whatever_their_names(made: Made, folder: Path) -> None:
    insert_plugins(made.plain, "portable.onnx", SurgeryOptions())
    from darktrt.pipeline import Detector

    Image.fromarray(made_image(60, 60)).save("a.png")
    name = "x" * 251 + ".png"
    with Detector.open("portable.onnx") as detector:
        list(detect_files(detector, ["a.png"], name))
    assert Image.open(name).size == (60, 60)


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(DarktrtError, match="no home folder to keep files in; set XDG_CACHE_HOME"):
        cache_folder()
    (tmp_path / "file").touch()
    with pytest.raises(DarktrtError, match="file/new: cannot make this folder: Not a directory; choose another"):
        make_folder(tmp_path / "file" / "new")


# --- signals ---

_HEEDED = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
"""Before a program, in case that nohup or a shell in the background has started the tests, so that signals are ignored."""

_WAITS = """
import signal, sys, time
from darktrt.cli import commands, main

def waits(args):
    print("started", flush=True)
    {body}

commands.doctor._doctor = waits
status = main({arguments})
print("status", status, flush=True)
time.sleep({after})
sys.exit(status)
"""


def interrupted(number: signal.Signals, body: str = "time.sleep(60)", arguments: str = "None") -> tuple[int, str, str]:
    code = _HEEDED + _WAITS.format(body=body, arguments=arguments, after=0)
    with subprocess.Popen([sys.executable, "-c", code, "doctor"], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_a_sentence(number: signal.Signals) -> None:
    assert interrupted(number) == (130, "status 130\n", "darktrt doctor: interrupted\n")


def test_a_signal_that_breaks_an_import_is_an_interruption() -> None:
    """C code answers KeyboardInterrupt with an error of its own."""
    body = "try: signal.raise_signal(signal.SIGTERM)\n    except KeyboardInterrupt: raise ImportError('initialization failed')"
    code = _HEEDED + _WAITS.format(body=body, arguments="None", after=0)
    run = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "started\nstatus 130\n", "darktrt: interrupted\n")


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    body = (
        "class Slow:\n        def __del__(self):\n            time.sleep(60)\n"
        "    slow = Slow()\n    del slow\n    time.sleep(60)"
    )
    status, _, err = interrupted(signal.SIGINT, body)
    assert (status, err) == (130, "darktrt doctor: interrupted\n")


def test_a_signal_while_the_process_ends_is_no_trace() -> None:
    """The work is done then; libraries that are being unloaded must not meet a KeyboardInterrupt."""
    code = _HEEDED + _WAITS.format(body="return 0", arguments="None", after=60)
    with subprocess.Popen([sys.executable, "-c", code, "doctor"], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        assert process.stdout.readline() == "status 0\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, "")


def test_signals_that_were_ignored_stay_ignored() -> None:
    """As nohup, and a shell in the background, start a program."""
    code = "import signal, os, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + _WAITS.format(
        body="signal.raise_signal(signal.SIGHUP)", arguments="None", after=0
    )
    run = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "started\nstatus 0\n", "")


def test_a_program_that_calls_main_keeps_its_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.doctor, "_doctor", lambda args: signal.raise_signal(signal.SIGTERM))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    streams = sys.stdout, sys.stderr, sys.unraisablehook
    assert main(["doctor"]) == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert (sys.stdout, sys.stderr, sys.unraisablehook) == streams
