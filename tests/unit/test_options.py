"""Options of the command line: their defaults, which belong together, and what they ask of the library."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from darktrt.cli import check_options, main
from darktrt.cli.commands import parser
from darktrt.engine.layer_list import summary
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.pipeline import DropBudget
from darktrt.serve.client.statistics import ModelStatistics
from darktrt.serve.config import PythonBackend, TensorRTBackend
from darktrt.serve.server import StartOptions
from darktrt.vision.boxes import Detections
from darktrt.vision.files import FileResult


def options_of(command: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """Every option of every command, with the command's name."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from options_of(sub, f"{name} {word}".strip())
        else:
            yield name, action


def test_help_states_the_defaults_that_hold() -> None:
    """Numbers, and choices."""
    wrong, count = [], 0
    for command, action in options_of(parser()):
        stated = re.search(r"\(default: ([^,;)]+)", action.help or "")
        default = action.default
        if not stated or default in (None, argparse.SUPPRESS, "", "."):
            continue
        if not (action.choices or stated[1][0].isdigit()):
            continue
        held = " ".join(f"{one:g}" for one in default) if isinstance(default, list) else default
        held = f"{held:g}" if isinstance(held, int | float) else held
        if action.choices and stated[1] not in action.choices:
            continue
        count += 1
        if held != stated[1]:
            wrong.append(f"darktrt {command} {action.option_strings}: {held}, not {stated[1]}")
    assert wrong == [] and count > 50


def test_defaults_of_a_model_on_triton_are_those_of_its_record() -> None:
    stated = {
        action.dest: match[1]
        for command, action in options_of(parser())
        if command == "serve repository" and (match := re.search(r"\(default: ([\w.]+)\)", action.help or ""))
    }
    record = PythonBackend()
    for name in ("input", "versions", "delay", "instances", "score_threshold", "iou_threshold"):
        value = getattr(record, name)
        assert stated[name] == (value if isinstance(value, str) else f"{value:g}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "COMMAND"),
        ("calib", "STEP"),
        ("check", "CHECK"),
        ("serve", "STEP"),
        ("client", "STEP"),
        ("surgery a.onnx", "-o/--output"),
        ("engine a.onnx", "-o/--output"),
        ("serve repository a.onnx", "-o/--output"),
        ("calib sensitivity a.onnx photos", "--"),
    ],
)
def test_words_that_are_needed(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert "required: " in (err := capsys.readouterr().err) and said in err


# --- engine ---


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """What a build was asked for, in place of which a plan of 3 MiB appears."""
    given: dict[str, Any] = {}

    def build(source: str, output: str, options: Any, **more: Any) -> Any:
        given.update(options=options, **more)
        Path(output).write_bytes(bytes(3 << 20))
        convolutions = {"int8_convolutions": ("/a",), "other_convolutions": {"/b": "kept in floating point"}}
        return SimpleNamespace(target="TensorRT 10.3.0", build_seconds=12.5, int8_cost="mAP drops by 0.1", **convolutions)

    monkeypatch.setattr("darktrt.pipeline.build_engine", build)
    Path("a.png").touch()
    return given


INT8 = "--precision int8"
TOGETHER = "--max-drop X, --eval DATA, "
ON_GPU = "--calibrate-on gpu, --data DATA and --precision int8 go together"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--max-drop 0.1", TOGETHER),
        ("--eval a.png", TOGETHER),
        (f"--max-drop 0 --eval a.png {INT8}", TOGETHER),
        ("--max-drop 0 --eval a.png CALIBRATION", TOGETHER),
        (f"--max-drop 0 CALIBRATION {INT8}", TOGETHER),
        (f"--eval a.png CALIBRATION {INT8}", TOGETHER),
        (f"--max-drop 0 --eval a.png CALIBRATION {INT8}", None),
        (f"CALIBRATION {INT8}", None),
        ("", None),
        ("--calibrate-on gpu", ON_GPU),
        (f"--calibrate-on gpu {INT8}", ON_GPU),
        (f"--data a.png {INT8}", ON_GPU),
        ("--calibrate-on gpu --data a.png", ON_GPU),
        (f"--calibrate-on gpu --data a.png {INT8} CALIBRATION", ON_GPU),
        (f"--calibrate-on gpu --data a.png {INT8}", None),
        ("--fp-layers a,b", "--fp-layers names convolutions that INT8 leaves in FP16; give --precision int8"),
        (f"--fp-layers a,b {INT8}", None),
        ("--force-int8", "an engine in fp16 has no INT8 to force; give precision int8 [--force-int8]"),
        ("--force-int8 --precision fp32", "an engine in fp32 has no INT8 to force; give precision int8 [--force-int8]"),
        (f"--force-int8 {INT8} CALIBRATION", None),
        ("--batch 1,4", "--batch 1,4: write smallest, usual and largest batch, such as 1,4,16"),
        ("--batch 1,4,x", "--batch 1,4,x: write smallest"),
        ("--batch 1,2,3,4", "--batch 1,2,3,4: write smallest"),
    ],
)
def test_options_of_an_engine_that_go_together(
    asked: dict[str, Any], options: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options.replace("CALIBRATION", "--calibration c").split()
    assert main(["engine", "a.onnx", "-o", "a.plan", *words]) == (2 if said else 0)
    assert said is None or said in capsys.readouterr().err
    assert bool(asked) == (said is None)


def test_what_is_said_of_an_engine(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", "a.onnx", "-o", "a.plan", *"--batch 1,4,16 --image-sizes 32 64x48 100x90".split()]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a.plan: FP16 for TensorRT 10.3.0, 3.0 MiB, built in 12.5 s",
        "a.plan: mAP drops by 0.1",
    ]
    options = asked["options"]
    assert (options.batch, options.image_sizes) == ((1, 4, 16), ((32, 32), (64, 48), (100, 90)))
    assert options.tf32 and not (options.strongly_typed or options.hardware_compatible or options.version_compatible)
    assert not options.force_int8
    assert asked["budget"] is None and asked["calibration_images"] == () and asked["fp_layers"] is None
    words = [INT8, "--calibration c", "--max-drop 0.01 --eval a.png --eval-limit 7 --fp-layers a,,b --no-tf32 --force-int8"]
    assert main(["engine", "a.onnx", "-o", "a.plan", *" ".join(words).split()]) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert (
        first.startswith("a.plan: INT8 for TensorRT 10.3.0")
        and second == f"a.plan: {summary(['/a'], {'/b': 'kept in floating point'})}"
    )
    assert asked["options"].force_int8 and not asked["options"].tf32 and asked["fp_layers"] == ("a", "b")
    assert asked["budget"] == DropBudget(0.01, ["a.png"], 7)
    assert main(["engine", "a.onnx", "-o", "a.plan", *f"--calibrate-on gpu --data a.png {INT8}".split()]) == 0
    assert asked["calibration_images"] == [Path("a.png")]
    assert "the scales that TensorRT found, a calibration for other builds" in capsys.readouterr().out


def test_levels_of_optimization_are_0_to_5(asked: dict[str, Any]) -> None:
    for level in range(6):
        assert main(["engine", "a.onnx", "-o", "a.plan", "--optimization-level", str(level)]) == 0
        assert asked["options"].optimization_level == level
    with pytest.raises(SystemExit):
        main(["engine", "a.onnx", "-o", "a.plan", "--optimization-level", "6"])


def test_timings_are_printed_and_kept(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def bench(*arguments: Any) -> SimpleNamespace:
        asked.append(arguments)
        return SimpleNamespace(to_markdown=lambda: "a table", to_json=lambda: "{}")

    monkeypatch.setattr("darktrt.engine.bench.bench_files", bench)
    assert main(["bench", "a.plan"]) == 0
    assert main(["bench", "b=b.plan", *"--batch 1 8 --turns 3 --plugins p.so --json t.json".split()]) == 0
    assert asked == [(["a.plan"], [1], 20, None), (["b=b.plan"], [1, 8], 3, "p.so")]
    assert capsys.readouterr().out == "a table\n" * 2 and Path("t.json").read_text() == "{}"
    assert main(["bench", "b=t.json", "--json", "t.json"]) == 2
    assert "t.json: is given twice" in capsys.readouterr().err


def test_layers_are_listed_and_drawn(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The legend has the precisions that there are."""
    asked: list[tuple[Any, ...]] = []
    drawn: list[tuple[Any, ...]] = []
    rows = [SimpleNamespace(label=name, milliseconds=0.25, precision=name) for name in ("INT8", "")]

    def report(*arguments: Any) -> SimpleNamespace:
        asked.append(arguments)
        return SimpleNamespace(to_table=lambda: "rows", to_json=lambda: "{}", by_lines=lambda: rows, title=lambda: "title")

    for name in ("layers_of", "profile"):
        monkeypatch.setattr(f"darktrt.engine.profile.{name}", report)
    monkeypatch.setattr("darktrt.vision.charts.draw_bars", lambda *arguments: drawn.append(arguments))
    assert main(["layers", "a.plan"]) == 0
    assert main(["layers", "a.plan", *"--profile --batch 4 --plugins p.so --json l.json --plot l.png".split()]) == 0
    assert asked == [("a.plan",), ("a.plan", 4, "p.so")] and capsys.readouterr().out == "rows\n" * 2
    assert Path("l.json").read_text() == "{}"
    ((title, bars, path, legend),) = drawn
    assert (title, path, list(legend)) == ("title", "l.png", ["INT8", "other"])
    assert [(bar.label, bar.value, bar.text, bar.colour) for bar in bars] == [
        (name, 0.25, "0.2500 ms", legend[name or "other"]) for name in ("INT8", "")
    ]
    for words, said in (
        ("--plot l.png", "--plot draws times; give --profile too"),
        ("--profile --plot l.svg", "l.svg: cannot draw to that format"),
        ("--json a.plan", "a.plan: is given twice"),
        ("--profile --json l.png --plot l.png", "l.png: is given twice"),
    ):
        assert main(["layers", "a.plan", *words.split()]) == 2
        assert said in capsys.readouterr().err and len(asked) == 2


# --- variants to compare ---


@pytest.mark.parametrize(
    ("text", "server", "model", "name", "precision"),
    [
        ("gpu-box:8001/made", "gpu-box:8001", "made", "gpu-box:8001/made", "fp32"),
        ("gpu-box:8001/made@fp16", "gpu-box:8001", "made", "gpu-box:8001/made", "fp16"),
        ("http://gpu-box/made@int8", "http://gpu-box", "made", "http://gpu-box/made", "int8"),
        ("mine=gpu-box/made", "gpu-box", "made", "mine", "fp32"),
    ],
)
def test_models_of_a_server_are_variants(
    monkeypatch: pytest.MonkeyPatch, text: str, server: str, model: str, name: str, precision: str
) -> None:
    """Of the stated precision, which a server does not report; Q/DQ nodes tell of INT8."""
    pytest.importorskip("tritonclient", reason="needs tritonclient: pip install 'darktrt[serve]'")
    asked: list[tuple[str, str]] = []
    info = SimpleNamespace(int8_convolutions=0)

    @contextmanager
    def connect(server: str, model: str) -> Iterator[tuple[str, Any]]:
        asked.append((server, model))
        yield "run", info

    monkeypatch.setattr("darktrt.serve.client.client.triton_run", connect)
    words = parser().parse_args(["check", "compare", "--triton", text])
    with ExitStack() as stack:
        (variant,) = check_options.variants(words, stack)
        assert (variant.name, variant.precision, asked) == (name, precision, [(server, model)])
        assert variant.about == {"runs in": "Triton", "on": server}
        info.int8_convolutions = 3
        (variant,) = check_options.variants(words, stack)
        assert variant.precision == (precision if "@" in text else "int8")


def test_a_report_compares_models_that_show_only_their_heads(
    labelled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of a server; the layers of the others are compared all the same."""
    pytest.importorskip("tritonclient", reason="needs tritonclient: pip install 'darktrt[serve]'")

    @contextmanager
    def connect(server: str, model: str) -> Iterator[tuple[Any, Any]]:
        with OnnxRunner(labelled / "net.onnx") as runner:
            yield runner.run, runner.info

    monkeypatch.setattr("darktrt.serve.client.client.triton_run", connect)
    words = ["--model", str(labelled / "net.onnx"), "--triton", "mine=gpu-box/made", "-o", "report", "--show-images", "1"]
    assert main(["check", "report", str(labelled / "photos"), "--compare-images", "1", "--limit", "2", *words]) == 0
    assert "report/index.html: the report" in capsys.readouterr().out
    assert "mine" in Path("report/report.md").read_text()


@pytest.mark.parametrize("text", ["made", "/made", "gpu-box/", "http://made", "gpu-box/made@fp8", "@fp16", "a="])
def test_what_names_no_model_of_a_server(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "compare", "a.png", "--triton", text]) == 2
    assert f"--triton {text}: name SERVER/MODEL, such as localhost:8001/yolov4, or SERVER/MODEL@fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare a.png --cfg a.cfg", "--cfg CFG and --weights WEIGHTS go together"),
        ("compare a.png --weights a.weights", "--cfg CFG and --weights WEIGHTS go together"),
        ("compare a.png --model a.onnx --simulate fp16,fp8", "--simulate fp16,fp8: 'fp8' is neither fp16 nor int8"),
        ("compare a.png --simulate fp16", "--simulate rounds what an ONNX file computes; name one by --model"),
        ("report a.png --compare-images -1", "--compare-images -1: it must be at least 0"),
        ("report a.png --sensitivity-images -1", "--sensitivity-images -1: it must be at least 0"),
        ("report a.png --show-images -1", "--show-images -1: it must be at least 0"),
        ("report a.png --compare-images 0 --sensitivity-images 0 --show-images 0", "nothing to measure; name --cfg and"),
    ],
)
def test_variants_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, folder: Path, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("darktrt.check.runs.onnx_variant", lambda *_: None)
    assert main(["check", *words.split()]) == 2
    assert said in capsys.readouterr().err


# --- a server and its clients ---


def test_what_a_start_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[StartOptions] = []

    def refuse(repository: str, options: StartOptions) -> None:
        given.append(options)
        raise DarktrtError("no Docker")

    monkeypatch.setattr("darktrt.serve.containers.docker_command", refuse)
    assert main(["serve", "start", "models", "--program", "docker"]) == 2
    words = "--address ::1 --http-port 1 --grpc-port 2 --metrics-port 3 --load a b --shared-memory --insecure"
    words += " --max-request-mb 3 --cache-mb 5 --argument=--x=1"
    assert main(["serve", "start", "models", "--program", "docker", *words.split()]) == 2
    first, second = given
    assert first == StartOptions()
    assert second == StartOptions("::1", 1, 2, 3, ("a", "b"), True, True, 3 * 2**20, 5 * 2**20, ("--x=1",))


def test_what_a_repository_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that are not given are the backend's own."""
    pytest.importorskip("tritonclient", reason="needs tritonclient: pip install 'darktrt[serve]'")
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("darktrt.serve.repository.publish", lambda *arguments: asked.append(arguments) or "models/made")

    class Start(str):
        warnings = ("an old container",)

    monkeypatch.setattr("darktrt.serve.containers.docker_command", lambda *_: Start("docker run"))
    assert main(["serve", "repository", "a.onnx", "-o", "models"]) == 0
    assert asked == [("a.onnx", "models", PythonBackend(), None, 1, None)]
    captured = capsys.readouterr()
    assert captured.err == "warning: an old container\n" and captured.out.splitlines() == [
        "models/made: version 1, kind python",
        "start:  darktrt serve start models",
        "Docker: docker run",
    ]
    shared = "--versions 0 --max-batch 4 --preferred 2 4 --delay 5 --instances 6 --gpus 0 1 --cache --no-warmup --cuda-graph"
    own = "--input jpeg --score-threshold 0.1 --iou-threshold 0.2 --name n --version 7 --plugins p.so"
    fields: dict[str, Any] = {"versions": 0, "max_batch": 4, "preferred": (2, 4), "delay": 5, "instances": 6, "gpus": (0, 1)}
    fields |= {"cache": True, "warmup": False, "cuda_graph": True}
    assert main(["serve", "repository", "a.onnx", "-o", "models", *shared.split(), *own.split()]) == 0
    options = PythonBackend(input="jpeg", score_threshold=0.1, iou_threshold=0.2, **fields)
    assert asked[1] == ("a.onnx", "models", options, "n", 7, "p.so")
    capsys.readouterr()
    assert main(["serve", "repository", "a.plan", "-o", "models", "--kind", "tensorrt_plan", *shared.split()]) == 0
    assert asked[2] == ("a.plan", "models", TensorRTBackend(**fields), None, 1, None)
    assert "start:" not in capsys.readouterr().out


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A client of a server, and what it was made with."""
    pytest.importorskip("tritonclient", reason="needs tritonclient: pip install 'darktrt[serve]'")
    found = SimpleNamespace(to_table=lambda: "nothing found")
    made = SimpleNamespace(
        options={},
        images=[],
        retries=0,
        servers=[
            SimpleNamespace(server=f"grpc://gpu-{name}:8001", failed=failed) for name, failed in (("a", 2), ("b", 0), ("c", 1))
        ],
        info=SimpleNamespace(usual_image=(40, 30)),
        model=SimpleNamespace(name="made", max_batch=8, to_dict=lambda: {"name": "made"}, to_text=lambda: "made: a model"),
        statistics=lambda: [ModelStatistics.of({"version": "1", "inference_count": 6, "execution_count": 2})],
    )

    def detect_all(images: list[Any]) -> list[Any]:
        made.images += images
        return [found] * len(images)

    class Client:
        def __init__(self, servers: list[Any], model: str | None, version: str, **options: Any) -> None:
            made.options.update(options, servers=[str(one) for one in servers], model=model, version=version)

        def __enter__(self) -> SimpleNamespace:
            return made

        def __exit__(self, *_: object) -> None:
            pass

    made.detect_all = detect_all
    monkeypatch.setattr("darktrt.serve.client.client.Client", Client)
    return made


def test_a_ping_sends_a_request_of_noise(client: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "ping", "--server", "gpu-box", "--batch", "2", "--retry-seconds", "0"]) == 0
    first, second = client.images
    assert first is second and first.shape == (30, 40, 3) and first.dtype == np.uint8 and (first.min(), first.max()) == (0, 255)
    said = r"grpc://gpu-box:8001: model 'made' answered noise in \d+\.\d ms, 2 a request\nnothing found\n"
    captured = capsys.readouterr()
    assert re.fullmatch(said, captured.out) and captured.err == ""
    assert client.options == {
        "servers": ["grpc://gpu-box:8001"],
        "model": None,
        "version": "",
        "shared_memory": "none",
        "batch": 2,
        "timeout": 60.0,
        "retry_seconds": 0.0,
    }


def test_images_are_detected_by_a_server(client: SimpleNamespace, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[Any, ...]] = []
    found = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), ())

    def detect_files(sources: list[str], output: str | None) -> Iterator[FileResult]:
        asked.append((sources, output))
        yield FileResult(Path("a.jpg"), found)
        yield FileResult(Path("a.mp4"), found, 0)

    client.detect_files = detect_files
    assert main(["client", "detect", "a.jpg", "a.mp4"]) == 0
    assert asked == [(["a.jpg", "a.mp4"], None)]
    out, err = capsys.readouterr()
    assert (out, err) == ("a.jpg\nnothing found\n\na.mp4, frame 0\nnothing found\n\n", "")
    assert [client.options[name] for name in ("score_threshold", "iou_threshold", "in_flight")] == [0.25, 0.45, 4]
    words = "--json -o out.jpg --score-threshold 0.1 --iou-threshold 0.2 --in-flight 9 --model made --version 3".split()
    assert main(["client", "detect", "a.jpg", *words]) == 0
    assert asked[1] == (["a.jpg"], "out.jpg") and client.options["in_flight"] == 9
    assert (client.options["model"], client.options["version"], client.options["score_threshold"]) == ("made", "3", 0.1)
    out, err = capsys.readouterr()
    assert [json.loads(line)["file"] for line in out.splitlines()] == ["a.jpg", "a.mp4"] and err == "drawn: out.jpg\n"


def test_a_server_that_was_away_is_told(client: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    client.retries = 3
    assert main(["client", "info"]) == 0
    said = "grpc://gpu-a:8001, grpc://gpu-c:8001: away for a time; 3 requests were repeated"
    assert capsys.readouterr() == ("made: a model\n", f"warning: {said}\n")
    assert client.options["retry_seconds"] == 30 and client.options["batch"] == 1
    assert client.options["servers"] == ["grpc://localhost:8001"]


def test_several_servers(client: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    servers = ["--server", "gpu-a", "--server", "http://gpu-b"]
    assert main(["client", "info", *servers]) == 0
    assert client.options["servers"] == ["grpc://gpu-a:8001", "http://gpu-b:8000"]
    capsys.readouterr()
    assert main(["client", "ping", *servers]) == 0
    assert re.findall(r"^(\S+): model 'made' answered", capsys.readouterr().out, re.MULTILINE) == [
        "grpc://gpu-a:8001",
        "http://gpu-b:8000",
    ]


def test_descriptions_for_people_and_for_programs(client: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "made"}
    assert main(["client", "statistics", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["inferences"] == 6
    assert main(["client", "statistics"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["1", "0", "0", "6", "3.00"]
    client.model.max_batch = 0
    assert main(["client", "statistics"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[3:5] == ["-", "-"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rtsp://user:word@camera/1 a.jpg", "rtsp://camera/1: a camera or stream must be the only source"),
        ("a.jpg rtsp://user:word@camera/1", "rtsp://camera/1: a camera or stream must be the only source"),
        ("a.jpg --frames 5", "only cameras and streams have a number of frames [--frames]"),
        ("a.jpg --frames 0", "only cameras and streams have a number of frames [--frames]"),
        ("camera:97", "/dev/video97: there is no such camera"),
        ("/dev/none", "/dev/none: there is no such camera"),
    ],
)
def test_sources_that_are_refused(client: SimpleNamespace, words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "detect", *words.split()]) == 2
    assert said in (err := capsys.readouterr().err) and "word@" not in err
    assert client.options == {}


def test_what_load_is_asked_for(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report for each model, and all side by side."""
    pytest.importorskip("tritonclient", reason="needs tritonclient: pip install 'darktrt[serve]'")
    from darktrt.serve.load.measure import Level, LoadOptions, LoadReport
    from darktrt.serve.load.worker import Latency

    asked: list[tuple[Any, ...]] = []

    def report(model: str | None) -> LoadReport:
        return LoadReport("grpc://a:1", model or "only", 1, 1, "none", (Level(1, 90.0, Latency(1, 2, 3, 4), 0, 0, 0, None),))

    def measure(servers: list[Any], model: str | None, version: str, options: LoadOptions) -> LoadReport:
        asked.append((list(map(str, servers)), model, version, options))
        return report(model)

    def measure_all(repository: str, models: list[str], options: LoadOptions) -> list[LoadReport]:
        asked.append((repository, models, options))
        return [report(model) for model in models]

    monkeypatch.setattr("darktrt.serve.load.measure.measure_load", measure)
    monkeypatch.setattr("darktrt.serve.load.measure.measure_repository", measure_all)
    assert main(["load"]) == 0
    assert asked == [(["grpc://localhost:8001"], None, "", LoadOptions())]
    assert capsys.readouterr().out.endswith("| concurrency | only |\n|---|---|\n| 1 | 90.0 infer/sec, latency 1000 usec |\n")
    options = "--concurrency 2 3 --batch 4 --seconds 5.5 --processes 6 --shared-memory system --timeout 7 --image i.png"
    words = f"--model a --model b --json out.json --metrics http://a/m {options}".split()
    expected = LoadOptions((2, 3), 4, 5.5, 6, "system", 7.0, (Path("i.png"),), ("http://a/m",))
    assert main(["load", "--server", "http://gpu-box", "--server", "b", "--version", "2", *words]) == 0
    assert asked[1:] == [(["http://gpu-box:8000", "grpc://b:8001"], name, "2", expected) for name in ("a", "b")]
    assert [one["model"] for one in json.loads(Path("out.json").read_text())] == ["a", "b"]
    assert main(["load", "--repository", "models", *words]) == 0
    assert asked[3:] == [("models", ["a", "b"], expected)]
    assert main(["load", "--image", "out.json", "--json", "out.json"]) == 2 and len(asked) == 4
    assert "out.json: is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--timeout 0", "--timeout -1", "--timeout inf", "--timeout nan", "--timeout x"])
def test_times_are_above_zero(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["client", "ping", *words.split()])
    assert f"'{words.split()[1]}' is no number above 0" in capsys.readouterr().err
