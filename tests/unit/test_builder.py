"""The parts of a build: its options, the timing cache, what TensorRT calls meanwhile, and its words where it refuses."""

from __future__ import annotations

import signal
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import Config, FakeTensorRT, Network
from helpers import Made

from darktrt.calib.table import CalibrationTable
from darktrt.calib.trt_calibrator import TableSource
from darktrt.engine import timing_cache
from darktrt.engine.callbacks import build_logger, deferred_interrupt, progress_monitor
from darktrt.engine.options import NONE, BuildOptions
from darktrt.engine.target import Target
from darktrt.engine.timing_cache import default_timing_cache, load_timing_cache, save_timing_cache
from darktrt.engine.trt_builder import build, configure
from darktrt.engine.weak_typing import Calibrated, NetworkMap
from darktrt.errors import DarktrtError
from darktrt.progress import set_progress

TRT, RTX = Target("trt", (8, 6, 0)), Target("rtx", (1, 7))


# --- options ---


def test_all_options_but_the_precision_default_to_tensorrts_own() -> None:
    assert BuildOptions() == BuildOptions(
        "fp16", "auto", None, None, None, None, None, True, False, None, None, False, False, False
    )  # fmt: skip
    config = Config()
    configure(FakeTensorRT("8.6.0"), config, BuildOptions(timing_cache=NONE), TRT)
    assert (config.asked, config.cleared, config.pools, config.sources) == ([], [], {}, 0b11111)


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": 0},
        {"optimization_level": 5},
        {"workspace": 1},
        {"batch": (1, 1, 1)},
        {"batch": (1, 4, 4)},
        {"batch": (4, 4, 9)},
        {"image_sizes": ((1, 1), (1, 1), (1, 1))},
    ],
)
def test_possible_options(options: dict[str, Any]) -> None:
    BuildOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"optimization_level": -1},
        {"optimization_level": 6},
        {"workspace": 0},
        {"workspace": -1},
        {"batch": (0, 1, 1)},
        {"batch": (1, 4, 2)},
        {"batch": (4, 1, 8)},
        {"batch": (1, 2)},
        {"batch": (1, 2, 3, 4)},
        {"image_sizes": ((2, 2), (1, 1), (3, 3))},
    ],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(DarktrtError) as caught:
        BuildOptions(**options)
    assert caught.value.argument == next(iter(options))


@pytest.mark.parametrize("option", ["hardware_compatible", "version_compatible"])
def test_an_engine_for_other_machines(option: str) -> None:
    """Full TensorRT is asked for just what was asked for; TensorRT for RTX refuses the option, for it always builds so."""
    trt, config = FakeTensorRT("8.6.0"), Config()
    options = BuildOptions(timing_cache=NONE, **{option: True})  # type: ignore[arg-type]
    configure(trt, config, options, TRT)
    assert ("VERSION_COMPATIBLE" in config.asked) == (option == "version_compatible")
    assert hasattr(config, "hardware_compatibility_level") == (option == "hardware_compatible")
    with pytest.raises(
        DarktrtError, match=r"TensorRT for RTX 1\.7 always builds for many GPUs .*; leave the option out"
    ) as caught:
        configure(trt, Config(), options, RTX)
    assert caught.value.argument == option


def test_tactic_sources_that_tensorrt_itself_refuses() -> None:
    config = Config()
    config.set_tactic_sources = lambda mask: False  # type: ignore[method-assign]
    with pytest.raises(DarktrtError, match=r"^TensorRT 8\.6\.0 refuses the tactic sources '-CUDNN'$") as caught:
        configure(FakeTensorRT("8.6.0"), config, BuildOptions(tactic_sources="-CUDNN"), TRT)
    assert caught.value.argument == "tactic_sources"


# --- the timing cache ---


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(timing_cache, "gpu_name", lambda: "NVIDIA A/B 80GB")


def test_each_tensorrt_and_gpu_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Whatever is in the GPU's name, its file is in the folder."""
    file = default_timing_cache(TRT)
    assert file == tmp_path / "home/.cache/darktrt/timing/TensorRT-8.6.0-NVIDIA-A-B-80GB.cache"
    assert default_timing_cache(Target("trt", (8, 6, 1))) != file


def test_times_come_from_where_they_are_asked_for(tmp_path: Path) -> None:
    """From an earlier build, else from the file, else from nowhere; ``none`` reads and writes no file."""
    (tmp_path / "named").write_bytes(b"named")
    default_timing_cache(TRT).parent.mkdir(parents=True)
    default_timing_cache(TRT).write_bytes(b"default")
    for named, times, expected in (
        (tmp_path / "named", b"", b"named"),
        (str(tmp_path / "named"), b"earlier", b"earlier"),
        (None, b"", b"default"),
        (None, b"earlier", b"earlier"),
        (NONE, b"", b""),
        (NONE, b"earlier", b"earlier"),
        (tmp_path / "new", b"", b""),
    ):
        config = Config()
        load_timing_cache(config, named, TRT, times)
        assert config.timing_cache == expected
        before = default_timing_cache(TRT).read_bytes(), (tmp_path / "named").read_bytes()
        assert save_timing_cache(config, named, TRT) == expected + b"+measured"
        written = {None: default_timing_cache(TRT), NONE: None}.get(named, named)  # type: ignore[call-overload]
        if written is None:
            assert before == (default_timing_cache(TRT).read_bytes(), (tmp_path / "named").read_bytes())
        else:
            assert Path(written).read_bytes() == expected + b"+measured"
        default_timing_cache(TRT).write_bytes(b"default")
        (tmp_path / "named").write_bytes(b"named")
        (tmp_path / "new").unlink(missing_ok=True)
    assert not (tmp_path / NONE).exists() and not Path(NONE).exists()


def test_what_measures_nothing_has_no_times(tmp_path: Path) -> None:
    """TensorRT for RTX: it refuses a file, and reads and writes none."""
    config: Any = object()
    for named in (None, NONE):
        load_timing_cache(config, named, RTX)
        assert save_timing_cache(config, named, RTX) == b""
    with pytest.raises(DarktrtError, match="measures nothing while it builds; leave the timing cache out") as caught:
        load_timing_cache(config, tmp_path / "x", RTX)
    assert caught.value.argument == "timing_cache"


def test_a_file_that_is_too_large_to_be_one(tmp_path: Path) -> None:
    """Beyond 1 GiB nothing is read."""
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(64 << 30)  # takes no room
    with pytest.raises(DarktrtError, match=r"huge: has .* bytes, .* may have 1,073,741,824; .*; delete it or name") as caught:
        load_timing_cache(Config(), tmp_path / "huge", TRT)
    assert caught.value.argument == "timing_cache"


def test_a_named_file_that_cannot_be_written_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After hours of measuring, the default one is only a warning."""
    config = Config()
    config.timing_cache = b"times"
    with pytest.raises(DarktrtError, match="no/such/file: cannot write"):
        save_timing_cache(config, tmp_path / "no/such/file", TRT)
    default_timing_cache(TRT).mkdir(parents=True)
    assert save_timing_cache(config, None, TRT) == b"times+measured"
    assert caplog.messages[0].startswith("the measured times cannot be kept: ") and len(caplog.messages) == 1


# --- what TensorRT calls while it builds ---


def test_the_last_error_is_kept_and_warnings_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    """Severity 0 is an internal error, 1 an error, 2 a warning."""
    logger = build_logger(FakeTensorRT("8.6.0"))
    assert (logger.last_error, logger.layers) == ("", "")
    logger.log(1, "no implementation")
    logger.log(2, "a warning")
    assert logger.last_error == "no implementation"
    logger.log(0, "assertion failed")
    logger.log(4, "Layers:\nName: a")
    logger.log(4, "more words")
    assert (logger.last_error, logger.layers) == ("assertion failed", "Layers:\nName: a")
    assert capsys.readouterr() == ("", "")


def test_a_build_in_another_thread_leaves_signals_alone() -> None:
    """Only the main thread may set handlers."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    inside: list[list[Any]] = []

    def build() -> None:
        with deferred_interrupt(Event()):
            inside.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])

    thread = Thread(target=build)
    thread.start()
    thread.join()
    assert inside == [handlers]


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    interrupted, after = Event(), False
    with pytest.raises(KeyboardInterrupt), deferred_interrupt(interrupted):
        signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
        after = True
    assert after


def test_phases_of_a_build_are_shown_until_they_end() -> None:
    shown: list[tuple[str, int, int | None]] = []
    set_progress(lambda *step: shown.append(step))
    with progress_monitor(FakeTensorRT("10.3.0"), Event(), Event()) as monitor:
        monitor.phase_start("Build", None, 2)
        monitor.phase_start("Tactics", "Build", 3)
        assert all(monitor.step_complete("Tactics", i) for i in range(3))
        monitor.phase_finish("Tactics")
        assert monitor.step_complete("Build", 0)
    set_progress(None)
    assert [step for step in shown if step[0] == "Tactics"][-3:] == [("Tactics", i, 3) for i in (1, 2, 3)]
    assert ("Build", 1, 2) in shown


@pytest.mark.parametrize("stop", [0, 1])
def test_any_of_several_reasons_stops_a_build(stop: int) -> None:
    stops = Event(), Event()
    with progress_monitor(FakeTensorRT("10.3.0"), *stops) as monitor:
        monitor.phase_start("Build", None, 2)
        assert monitor.step_complete("Build", 0)
        stops[stop].set()
        assert not monitor.step_complete("Build", 1)


def test_the_first_error_of_showing_progress_is_raised_after_the_build() -> None:
    """TensorRT's callbacks must not raise; the build is stopped."""
    errors = iter([ZeroDivisionError("first"), ValueError("second")])

    def show(*_: object) -> None:
        raise next(errors, RuntimeError("later"))

    with pytest.raises(ZeroDivisionError, match="first"):
        with progress_monitor(FakeTensorRT("10.3.0"), Event()) as monitor:
            monitor.phase_start("Build", None, 2)
            set_progress(show)
            assert not monitor.step_complete("Build", 0)
            assert not monitor.step_complete("Build", 1)
            set_progress(None)


# --- refusals, in TensorRT's words where it has some ---


def refused(trt: FakeTensorRT, target: Target, made: Made, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Target, "load", lambda _: trt)
    with pytest.raises(DarktrtError) as caught:
        build(made.plain.read_bytes(), made.info, target, BuildOptions("fp32", timing_cache=NONE))
    return str(caught.value)


def test_a_builder_that_cannot_start(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The binding makes a TypeError of the null pointer that TensorRT returns without a GPU."""
    for said, words in (("", "it needs an NVIDIA GPU"), ("CUDA initialization failure", "CUDA initialization failure")):

        def start(logger: Any, said: str = said) -> None:
            if said:
                logger.log(1, said)
            raise TypeError("factory function returned nullptr")

        trt = FakeTensorRT("8.6.0")
        trt.Builder = start
        assert refused(trt, TRT, made, monkeypatch) == f"TensorRT 8.6.0 cannot start here: {words}"


def test_a_builder_that_builds_nothing(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for said, words in (("", "it reported no reason"), ("no implementation for a", "no implementation for a")):
        trt = FakeTensorRT("8.6.0")
        builder = trt.Builder

        def start(logger: Any, said: str = said, builder: Any = builder) -> Any:
            made = builder(logger)
            made.build_serialized_network = lambda *_: logger.log(1, said) if said else None
            return made

        trt.Builder = start
        assert refused(trt, TRT, made, monkeypatch) == f"TensorRT 8.6.0 cannot build the engine: {words}"


@pytest.mark.parametrize(
    ("target", "count", "words"),
    [
        (TRT, 0, "it reported no reason"),
        (TRT, 2, "node number 0: no importer; node number 1: no importer"),
        (Target("trt", (10, 3, 0)), 2, "node 'node 0' (Op0): no importer; node 'node 1' (Op1): no importer"),
    ],
)
def test_a_parser_that_refuses(made: Made, monkeypatch: pytest.MonkeyPatch, target: Target, count: int, words: str) -> None:
    def error(i: int) -> Any:
        texts = {"node": i, "desc": "no importer", "node_name": f"node {i}", "node_operator": f"Op{i}"}
        return SimpleNamespace(**{name: lambda value=value: value for name, value in texts.items()})

    trt = FakeTensorRT(target.version_text)
    trt.OnnxParser = lambda *_: SimpleNamespace(parse=lambda _: False, num_errors=count, get_error=error)
    assert refused(trt, target, made, monkeypatch) == f"{target} cannot parse the network: {words}"


@pytest.mark.parametrize("count", [1, 3, 4])
def test_up_to_three_tensors_are_named(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """Of those that the table has and the network does not."""
    trt = FakeTensorRT("8.6.0")
    monkeypatch.setattr(Target, "load", lambda _: trt)
    names = [f"other_{i}" for i in range(count)]
    network = Network()
    network.add(made.model())
    known = NetworkMap(network, made.info).activations()
    table = CalibrationTable(dict.fromkeys([*known, *names], np.float32(1)), "8600")
    calibrated = Calibrated(TableSource(table, 1))
    build(made.plain.read_bytes(), made.info, TRT, BuildOptions("int8", timing_cache=NONE), calibrated)
    shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
    (message,) = caplog.messages
    assert message.startswith(f"{count} tensors of the ") and message.endswith(f" are not in the network: {shown}")
