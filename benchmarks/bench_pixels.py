"""Times of the whole way from images to detections, and of each part of it alone; a line of JSON for each measurement.

Run it from the repository's root; MODEL is a plan, or a portable ONNX file on the CPU:

    python3 benchmarks/bench_pixels.py frames MODEL images/ --size 1920x1080 --batch 8    # frames in host memory
    python3 benchmarks/bench_pixels.py latency MODEL images/ --size 1920x1080             # one frame at a time
    python3 benchmarks/bench_pixels.py files MODEL images/ --batch 8                      # image files
    python3 benchmarks/bench_pixels.py video MODEL street.mp4
    python3 benchmarks/bench_pixels.py first MODEL dog.jpg                                # a fresh process
    python3 benchmarks/bench_pixels.py decoders MODEL images/                             # Pillow against nvImageCodec

``--ways`` chooses what runs. ``detector`` is ``darktrt.Detector``. ``plain`` fits images on the CPU and runs one batch after
another; with an earlier darktrt on PYTHONPATH that is the earlier way. ``opencv`` is what a user would write: OpenCV in threads
in front of the same engine, which must have the input form uint8 or float. ``nvimgcodec``, ``dali``, ``ffmpeg`` and ``nvdec``
only decode, and ``dali`` resizes too: the ceiling. OpenCV and DALI are needed only for their ways.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Stages = dict[str, float]
"""Milliseconds an image of each part of the way, measured alone."""

WARM_UP = 6
"""Batches."""
FRAMES = 24
"""Different frames, which are used in turns."""
CALLS = 30
"""Of each part that is measured alone."""
DECODE_BATCH = 64
SUFFIXES = (".jpg", ".jpeg")


def report(what: str, way: str, **values: Any) -> None:
    print(json.dumps({"what": what, "way": way, **values}), flush=True)


# The machine


class Load:
    """How busy the GPU is in a block, by nvidia-smi, and how many cores this process uses."""

    _QUERY = "utilization.gpu,utilization.decoder,utilization.jpeg"

    def __enter__(self) -> Load:
        self._lines: list[str] = []
        self._smi: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={self._QUERY}", "--format=csv,noheader,nounits", "--id=0", "-lms", "100"]
            self._smi = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._reader = Thread(target=self._read, args=[self._smi], daemon=True)
            self._reader.start()
        self._started = time.perf_counter(), time.process_time()
        return self

    def _read(self, smi: subprocess.Popen[str]) -> None:
        self._lines.extend(smi.stdout or ())

    def __exit__(self, *_: object) -> None:
        elapsed = time.perf_counter() - self._started[0]
        self.values: dict[str, float] = {"cores": round((time.process_time() - self._started[1]) / elapsed, 2)}
        if self._smi:
            self._smi.terminate()
            self._reader.join()
            rows = [line.split(",") for line in self._lines[1:]]  # the first is of the time before
            for name, column in zip(("gpu_busy", "nvdec_busy", "nvjpg_busy"), zip(*rows, strict=True), strict=False):
                numbers = [float(text) for text in column if text.strip().isdigit()]
                if numbers:
                    self.values[name] = round(float(np.mean(numbers)), 1)


def median_ms(work: Callable[[], object], calls: int = CALLS) -> float:
    """Median milliseconds of a call, after two for warming up."""
    times = []
    for _ in range(calls + 2):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return float(np.median(times[2:]))


def rate(batches: Iterator[Sequence[object]], seconds: float) -> dict[str, float]:
    """Images a second of an endless iterator of finished batches, and what it keeps busy."""
    for _ in range(WARM_UP):
        next(batches)
    count, started = 0, time.perf_counter()
    with Load() as load:
        while time.perf_counter() - started < seconds:
            count += len(next(batches))
        elapsed = time.perf_counter() - started
    return {"images_per_second": round(count / elapsed, 1), "ms_per_image": round(1e3 * elapsed / count, 4), **load.values}


# Models and images


@contextmanager
def runner_of(model: str) -> Iterator[Any]:
    """A runner of a plan or an ONNX file."""
    from darktrt.engine.runtime import OnnxRunner, PlanRunner

    with OnnxRunner(model) if model.endswith(".onnx") else PlanRunner(model, cuda_graph=True) as runner:
        yield runner


def one_by_one(runner: Any) -> Callable[[dict[str, NDArray[Any]]], Any]:
    """A runner as a function that runs a batch at a time, on inputs fitted by the CPU."""

    def run(inputs: dict[str, NDArray[Any]]) -> Any:
        return runner.run(inputs)

    return run


def network_ms(runner: Any, batch: int, image: Image | None = None) -> float:
    """Median milliseconds of the network alone for a batch, without copies; of such images, where it fits them itself."""
    from darktrt.engine.bench import random_inputs

    inputs = random_inputs(runner.info, batch)
    if image is not None and runner.info.input == "image":
        inputs["images"] = np.stack([image] * batch)
    if not hasattr(runner, "time_network"):
        return median_ms(lambda: runner.run(inputs), 5)
    for _ in range(3):
        runner.run(inputs)
    return float(np.median(runner.time_network(5 * CALLS, True)[CALLS:]))


def image_files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)


def frames_of(folder: str, size: str) -> list[Image]:
    """Frames of one size, made of the images of a folder."""
    from PIL import Image as Pillow

    width, height = map(int, size.split("x"))
    return [np.array(Pillow.open(path).convert("RGB").resize((width, height))) for path in image_files(folder)[:FRAMES]]


def endless(items: Sequence[Any], batch: int) -> Iterator[list[Any]]:
    """Batches of the items, again and again."""
    items = itertools.cycle(items)  # type: ignore[assignment]
    while True:
        yield list(itertools.islice(items, batch))


# The ways; each yields the detections of a batch after the other


def by_detector(model: str, batches: Iterable[list[Any]], decoder: str) -> Generator[Sequence[object], None, None]:
    from darktrt.pipeline import Detector

    options: Any = {} if model.endswith(".onnx") else {"decoder": decoder}
    with Detector.open(model, **options) as detector, closing(detector.detect_batches(batches)) as results:
        yield from results


def plain(model: str, batches: Iterable[list[Any]]) -> Generator[Sequence[object], None, None]:
    from darktrt.vision.detector import NetworkDetector

    with runner_of(model) as runner:
        detector = NetworkDetector(one_by_one(runner), runner.info)
        for batch in batches:
            yield detector.detect(batch)


def by_opencv(model: str, batches: Iterable[list[Any]], threads: int) -> Generator[Sequence[object], None, None]:
    """The next batch is read and resized in threads while the engine runs."""
    cv2: Any = import_module("cv2")
    cv2.setNumThreads(1)
    with runner_of(model) as runner, ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as ahead:
        info = runner.info

        def load(source: Any) -> tuple[NDArray[Any], tuple[int, int]]:
            image = cv2.cvtColor(cv2.imread(str(source)), cv2.COLOR_BGR2RGB) if isinstance(source, Path) else source
            fitted = cv2.resize(image, (info.width, info.height))
            if info.input == "float":
                fitted = np.ascontiguousarray((fitted.astype(np.float32) / 255).transpose(2, 0, 1))
            return fitted, (image.shape[1], image.shape[0])

        def prepare(batch: list[Any]) -> tuple[NDArray[Any], list[tuple[int, int]]]:
            loaded = list(pool.map(load, batch))
            return np.stack([fitted for fitted, _ in loaded]), [size for _, size in loaded]

        batches = iter(batches)
        waiting = ahead.submit(prepare, next(batches))
        for batch in batches:
            images, sizes = waiting.result()
            waiting = ahead.submit(prepare, batch)
            yield _opencv_detections(runner, images, sizes)


def _opencv_detections(runner: Any, images: NDArray[Any], sizes: list[tuple[int, int]]) -> list[NDArray[np.float32]]:
    from darktrt.metadata import Thresholds

    info = runner.info
    outputs = runner.run(info.model_inputs(images, [(info.width, info.height)] * len(images), Thresholds()))
    detections = []
    for i, (width, height) in enumerate(sizes):
        count = int(outputs["num_detections"][i].item())
        scale = np.array([width / info.width, height / info.height] * 2, np.float32)
        rows = [outputs["boxes"][i, :count] * scale, outputs["scores"][i, :count, None], outputs["classes"][i, :count, None]]
        detections.append(np.concatenate(rows, 1, dtype=np.float32))
    return detections


def by_nvimgcodec(paths: Sequence[Path]) -> Generator[Sequence[object], None, None]:
    """JPEGs decoded on the GPU, and nothing else; files are read in threads meanwhile."""
    nvimgcodec: Any = import_module("nvidia.nvimgcodec")
    kinds = nvimgcodec.BackendKind.HW_GPU_ONLY, nvimgcodec.BackendKind.GPU_ONLY, nvimgcodec.BackendKind.HYBRID_CPU_GPU
    decoder = nvimgcodec.Decoder(backends=[nvimgcodec.Backend(kind) for kind in kinds], options=":fancy_upsampling=1")
    with ThreadPoolExecutor(8) as pool, ThreadPoolExecutor(1) as ahead:

        def read(batch: list[Path]) -> list[bytes]:
            return list(pool.map(Path.read_bytes, batch))

        batches = endless(paths, DECODE_BATCH)
        waiting = ahead.submit(read, next(batches))
        for batch in batches:
            files = waiting.result()
            waiting = ahead.submit(read, batch)
            images = decoder.decode([nvimgcodec.CodeStream(file) for file in files])
            images[-1].cpu()  # waits for the GPU
            yield images


def by_dali(paths: Sequence[Path], size: tuple[int, int]) -> Generator[Sequence[object], None, None]:
    """JPEGs decoded and resized by DALI on the GPU, and nothing else."""
    dali: Any = import_module("nvidia.dali")
    fn, types = import_module("nvidia.dali.fn"), import_module("nvidia.dali.types")

    width, height = size

    @dali.pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=DECODE_BATCH, num_threads=min(16, os.cpu_count() or 1), device_id=0
    )
    def pixels() -> Any:
        files, _ = fn.readers.file(files=[str(path) for path in paths], prefetch_queue_depth=2)
        images = fn.decoders.image(files, device="mixed", output_type=types.RGB, hw_decoder_load=0.9)
        return fn.resize(images, resize_x=width, resize_y=height, antialias=False, dtype=types.FLOAT)

    pipeline = pixels()
    pipeline.build()
    while True:
        (images,) = pipeline.run()
        images[-1].as_cpu()  # waits for the GPU
        yield range(DECODE_BATCH)


def by_ffmpeg(path: str, rgb: bool) -> Generator[Sequence[object], None, None]:
    """Frames decoded by FFmpeg, with its conversion to RGB in the same thread or without, and nothing else."""
    import av

    while True:
        with av.open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                yield [frame.to_ndarray(format="rgb24") if rgb else frame]


def by_nvdec(path: str) -> Generator[Sequence[object], None, None]:
    """Frames decoded by NVDEC, in its own format, and nothing else."""
    video_codec: Any = import_module("PyNvVideoCodec")
    while True:
        decoder = video_codec.SimpleDecoder(path, use_device_memory=True)
        while frames := decoder.get_batch_frames(16):
            yield frames


def video_by_detector(model: str, path: str, decoder: str) -> Generator[Sequence[object], None, None]:
    """A video from file to detections, as ``darktrt detect`` does it."""
    from darktrt.pipeline import Detector
    from darktrt.vision.files import detect_files

    options: Any = {} if decoder == "cpu" else {"decoder": decoder}  # an earlier darktrt knows no other
    with Detector.open(model, **options) as detector:
        while True:
            for result in detect_files(detector, [path]):
                yield [result]


# The parts alone


def stages_on_cpu(model: str, sources: Sequence[Any], batch: int) -> Stages:
    """Of the way ``plain``, whose parts follow each other."""
    from darktrt.metadata import Thresholds
    from darktrt.vision.detector import fit
    from darktrt.vision.images import read_image

    def each(function: Callable[[Any], object], items: Sequence[Any]) -> float:
        return median_ms(lambda: [function(item) for item in items], 5) / len(items)

    stages: Stages = {}
    few = list(itertools.islice(itertools.cycle(sources), batch))
    if isinstance(few[0], Path):
        stages["decode"] = each(read_image, few)
        few = [read_image(path) for path in few]
    with runner_of(model) as runner:
        info = runner.info
        if info.input == "image":  # a batch has one size
            few = few[:1] * batch
        stages["resize"] = each(lambda image: fit(image, info), few)
        arrays, placements = zip(*(fit(image, info) for image in few), strict=True)
        stages["stack"] = median_ms(lambda: np.stack(arrays)) / batch
        inputs = info.model_inputs(np.stack(arrays), [placement.inner_size for placement in placements], Thresholds())
        stages["network"] = network_ms(runner, batch) / batch
        stages["copies"] = max(median_ms(lambda: runner.run(inputs)) / batch - stages["network"], 0)
        stages["results"] = _results_ms(runner.run(inputs), info, placements) / batch
    return stages


def _results_ms(outputs: dict[str, NDArray[Any]], info: Any, placements: Sequence[Any]) -> float:
    """Of reading detections from a batch's outputs in host memory."""
    from darktrt.metadata import Thresholds
    from darktrt.vision.boxes import place_detections
    from darktrt.vision.detector import read_outputs

    def results() -> None:
        for i, placement in enumerate(placements):
            of_image = {name: values[i] for name, values in outputs.items()}
            rows = read_outputs(of_image, info, Thresholds(), placement.inner_size, info.name)
            place_detections(*rows, placement, info.class_names)

    return median_ms(results)


def stages_on_gpu(model: str, frames: Sequence[Image], batch: int) -> Stages:
    """Of the way ``detector`` with an engine, whose parts overlap, for frames in host memory.

    ``upload`` has the copy into pinned memory by several threads, ``link`` the copy from there alone.
    """
    from darktrt.cuda import Buffer, Driver, Event
    from darktrt.engine.frames import Uploader, host_offsets, load_kernels
    from darktrt.metadata import Thresholds
    from darktrt.plugins.library import find_library
    from darktrt.vision.detector import placement_in

    with runner_of(model) as runner, ExitStack() as stack:
        one_size = frames[:1] if runner.info.input == "image" else frames
        few = list(itertools.islice(itertools.cycle(one_size), batch))
        driver = Driver()
        stack.callback(driver.close)
        *offsets, end = host_offsets(few)
        buffer, done, uploader = Buffer(driver, end), Event(driver), Uploader(driver, load_kernels(find_library()))
        for part in (buffer, done, uploader):
            stack.callback(part.close)
        pinned = buffer.array((buffer.size,), np.dtype(np.uint8))

        def upload() -> None:
            uploader.upload(few, offsets, buffer, done)
            done.synchronize()

        def link() -> None:
            runner.stream.upload(buffer.address, pinned)
            runner.stream.synchronize()

        stages = {"upload": median_ms(upload), "link": median_ms(link)}
        stages["fit"] = _fit_ms(runner, uploader.upload(few, offsets, buffer, done), few)
        stages["network"] = network_ms(runner, batch, few[0])
        placements = [placement_in(frame, runner.info) for frame in few]
        sizes = [placement.inner_size for placement in placements]
        runner.submit(few, runner.info.other_inputs(batch, sizes, Thresholds()))
        stages["results"] = _results_ms(runner.collect(), runner.info, placements)
    return {name: milliseconds / batch for name, milliseconds in stages.items()}


def _fit_ms(runner: Any, addresses: Sequence[int], frames: Sequence[Image]) -> float:
    """Of the kernel that fits frames into the input; 0 for an engine that fits them itself."""
    from darktrt.cuda import Buffer, Driver
    from darktrt.engine.frames import FitKernel, load_kernels
    from darktrt.plugins.library import find_library

    library = load_kernels(find_library())
    if library is None or runner.info.input == "image":
        return 0.0
    kernel = FitKernel(library, runner.info)
    driver = Driver()
    target = Buffer(driver, int(np.prod(runner.info.input_shape)) * np.dtype(runner.info.input_dtype).itemsize * len(frames))
    images = [(address, frame.shape[1], frame.shape[0]) for address, frame in zip(addresses, frames, strict=True)]
    times = []
    for _ in range(CALLS):
        begin = runner.stream.event()
        with driver.current():
            kernel.enqueue(images, target.address, runner.stream)
        times.append((begin, runner.stream.event()))
    runner.stream.synchronize()
    milliseconds = [runner.stream.elapsed(*pair) for pair in times]
    target.close()
    driver.close()
    return float(np.median(milliseconds[2:]))


def decode_ms(paths: Sequence[Path], device: Any) -> float:
    """Milliseconds an image of reading and decoding files alone, many at a time."""
    from darktrt.vision.decode import Decoder, read_ahead

    with Decoder(device=device) as decoder, closing(read_ahead(endless(paths, 8), decoder)) as batches:
        return rate(batches, 2)["ms_per_image"]


def stages_of(args: argparse.Namespace, way: str, sources: Sequence[Any]) -> Stages:
    """The parts of a way alone, rounded."""
    if way == "opencv":
        return {}
    if way == "plain" or args.model.endswith(".onnx"):
        stages = stages_on_cpu(args.model, sources, args.batch)
    elif isinstance(sources[0], Path):
        from darktrt.vision.images import read_image

        decoded = {"decode": decode_ms(sources, args.decoder)}
        stages = {**decoded, **stages_on_gpu(args.model, [read_image(path) for path in sources[:FRAMES]], args.batch)}
        if args.decoder == "gpu":  # pixels are on the GPU already
            del stages["upload"], stages["link"]
    else:
        stages = stages_on_gpu(args.model, sources, args.batch)
    return {name: round(milliseconds, 4) for name, milliseconds in stages.items()}


# What can be measured


def results_of(args: argparse.Namespace, way: str, sources: Sequence[Any]) -> Generator[Sequence[object], None, None]:
    batches = endless(sources, args.batch)
    if way == "plain":
        return plain(args.model, batches)
    if way == "opencv":
        return by_opencv(args.model, batches, args.threads)
    if way == "nvimgcodec":
        return by_nvimgcodec(sources)
    if way == "dali":
        width, height = map(int, args.network.split("x"))
        return by_dali(sources, (width, height))
    return by_detector(args.model, batches, args.decoder)


def throughput(args: argparse.Namespace, sources: Sequence[Any]) -> None:
    for way in args.ways:
        with closing(results_of(args, way, sources)) as results:
            values: dict[str, Any] = rate(results, args.seconds)
        if way not in ("nvimgcodec", "dali"):
            with runner_of(args.model) as runner:
                network = network_ms(runner, args.batch, None if isinstance(sources[0], Path) else sources[0]) / args.batch
            stages = stages_of(args, way, sources)
            share = network * values["images_per_second"] / 1e3
            values |= {"batch": args.batch, "network_ms_per_image": round(network, 4), "of_network": round(share, 3)}
            values |= {"slowest": max(stages.items(), key=lambda item: item[1])[0], "stages": stages} if stages else {}
        report(args.what, args.label or way, model=Path(args.model).name, images=args.images, **values)


def measure_frames(args: argparse.Namespace) -> None:
    throughput(args, frames_of(args.source, args.size))


def measure_files(args: argparse.Namespace) -> None:
    throughput(args, image_files(args.source))


def measure_latency(args: argparse.Namespace) -> None:
    """One frame at a time, from host memory to its detections."""
    frames = frames_of(args.source, args.size)
    with runner_of(args.model) as runner:
        network = network_ms(runner, 1, frames[0])
    for way in args.ways:
        times = []
        with closing(_one_by_one(args, way)) as detect:
            next(detect)
            for frame in itertools.islice(itertools.cycle(frames), WARM_UP + args.calls):
                started = time.perf_counter()
                detect.send(frame)
                times.append(1e3 * (time.perf_counter() - started))
        p50, p90, p99 = (round(float(value), 4) for value in np.percentile(times[WARM_UP:], (50, 90, 99)))
        values: dict[str, Any] = {"p50": p50, "p90": p90, "p99": p99, "network_ms": round(network, 4)}
        args.batch = 1
        values |= {"besides_network_ms": round(p50 - network, 4), "stages": stages_of(args, way, frames)}
        report("latency", args.label or way, model=Path(args.model).name, images=args.images, **values)


def _one_by_one(args: argparse.Namespace, way: str) -> Generator[object, Image, None]:
    """Detects in the frame that is sent; what it yields is done."""
    from darktrt.vision.detector import NetworkDetector

    if way == "detector":
        from darktrt.pipeline import Detector

        with Detector.open(args.model) as detector:
            result: object = None
            while True:
                result = detector.detect([(yield result)])
    with runner_of(args.model) as runner, ThreadPoolExecutor(1) as pool:
        network = NetworkDetector(one_by_one(runner), runner.info)
        result = None
        while True:
            frame = yield result
            result = network.detect([frame]) if way == "plain" else _opencv_frame(runner, frame, pool)


def _opencv_frame(runner: Any, frame: Image, _: object) -> object:
    cv2: Any = import_module("cv2")
    info = runner.info
    fitted = cv2.resize(frame, (info.width, info.height))
    if info.input == "float":
        fitted = np.ascontiguousarray((fitted.astype(np.float32) / 255).transpose(2, 0, 1))
    return _opencv_detections(runner, fitted[np.newaxis], [(frame.shape[1], frame.shape[0])])


def measure_video(args: argparse.Namespace) -> None:
    """Frames a second of decoding alone, and of the whole way."""
    ways: dict[str, Callable[[], Generator[Sequence[object], None, None]]] = {
        "ffmpeg": lambda: by_ffmpeg(args.source, False),
        "ffmpeg-rgb": lambda: by_ffmpeg(args.source, True),
        "nvdec": lambda: by_nvdec(args.source),
        "detector": lambda: video_by_detector(args.model, args.source, args.decoder),
    }
    for way in args.ways:
        with closing(ways[way]()) as frames:
            for _ in range(64):
                next(frames)
            report("video", args.label or way, model=Path(args.model).name, **rate(frames, args.seconds))


def measure_first(args: argparse.Namespace) -> None:
    """From the start of a process to its first detections: as a whole, then part by part in another process."""
    for way in args.ways:
        for run in range(args.calls):
            command = [sys.executable, __file__, "process", args.model, args.source, "--ways", way, "--label", str(time.time())]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            name = f"{args.label} {way}" if args.label else way
            times = json.loads(done.stdout.splitlines()[-1])
            report("first", name, model=Path(args.model).name, run=run, **times)


def measure_process(args: argparse.Namespace) -> None:
    """What :func:`measure_first` starts; ``--label`` is the time of the start."""
    marks = [("Python and NumPy", time.time())]

    def mark(name: str) -> None:
        marks.append((name, time.time()))

    if "parts" in args.ways:
        _part_by_part(args.model, mark)
    from darktrt.pipeline import Detector

    mark("import of darktrt")
    with Detector.open(args.model) as detector:
        mark("model")
        detector.detect([args.source])
        mark("first detections")
        detector.detect([args.source])
        mark("second detections")
    times = dict(zip([name for name, _ in marks], np.diff([float(args.label), *(at for _, at in marks)]), strict=True))
    second = times.pop("second detections")
    seconds = {name: round(float(value), 4) for name, value in times.items()}
    print(json.dumps({"seconds": round(sum(seconds.values()), 4), "parts": seconds, "second_seconds": round(float(second), 4)}))


def _part_by_part(model: str, mark: Callable[[str], None]) -> None:
    """What opening an engine does first, so that it has it already."""
    import darktrt.engine.runtime  # noqa: F401

    mark("import of the runtime")
    if model.endswith(".onnx"):
        return
    from darktrt.cuda import Driver
    from darktrt.engine.manifest import read_plan_manifest
    from darktrt.engine.target import find_target, flavour_of
    from darktrt.plugins.library import find_library, load_plugins

    target = find_target(flavour_of(read_plan_manifest(model).target))
    tensorrt = target.load()
    mark("import of TensorRT")
    Driver()
    mark("CUDA context")
    library = find_library(None, target.version_text)
    if library:
        load_plugins(tensorrt, library)
    mark("plugin library")


def measure_decoders(args: argparse.Namespace) -> None:
    """How far pixels and detections of nvImageCodec differ from Pillow's."""
    from darktrt.check.tolerance import pair
    from darktrt.cuda import host_pixels
    from darktrt.pipeline import Detector
    from darktrt.vision.decode import Decoder

    paths = image_files(args.source)
    pixels, detections = [], []
    for device in ("cpu", "gpu"):
        with Decoder(device=device) as decoder:
            pixels.append([host_pixels(frame) for frame in decoder.read(paths)])
        with Detector.open(args.model, decoder=device) as detector:
            detections.append([found.to_rows() for found in detector.detect(paths)])
    errors = np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in zip(*pixels, strict=True)])
    rows = [(old, new, pair(new, old)) for old, new in zip(*detections, strict=True)]
    matched = [(old[i], new[match[0]], match[1]) for old, new, found in rows for i, match in enumerate(found) if match]
    scores = [abs(float(old[4] - new[4])) for old, new, _ in matched]
    report(
        "decoders",
        "nvImageCodec against Pillow",
        images=len(paths),
        mean_level=round(float(errors.mean()), 4),
        largest_level=int(errors.max()),
        equal_values=round(float((errors == 0).mean()), 4),
        within_one=round(float((errors <= 1).mean()), 4),
        detections=[sum(map(len, side)) for side in detections],
        pairs=len(matched),
        largest_score=round(max(scores, default=0.0), 4),
        mean_score=round(float(np.mean(scores)), 5) if scores else 0.0,
        least_iou=round(min((iou for *_, iou in matched), default=1.0), 4),
    )


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], str, list[str]]] = {
    "frames": (measure_frames, "a folder of images", ["plain", "opencv", "detector"]),
    "latency": (measure_latency, "a folder of images", ["plain", "opencv", "detector"]),
    "files": (measure_files, "a folder of JPEGs", ["plain", "opencv", "nvimgcodec", "detector"]),
    "video": (measure_video, "a video file", ["ffmpeg", "ffmpeg-rgb", "nvdec", "detector"]),
    "first": (measure_first, "an image file", ["whole", "parts"]),
    "process": (measure_process, "an image file", ["whole"]),
    "decoders": (measure_decoders, "a folder of JPEGs", []),
}
"""What each measures, its second argument, and its default ways."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the way from images to detections.")
    commands = parser.add_subparsers(dest="what", required=True)
    for name, (function, source, ways) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument("model", help="a plan, or a portable ONNX file")
        command.add_argument("source", help=source)
        command.add_argument("--ways", nargs="+", default=ways)
        command.add_argument("--size", default="1920x1080", help="of frames")
        command.add_argument("--batch", type=int, default=8)
        command.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1), help="of OpenCV")
        command.add_argument("--decoder", default="cpu", help="of files, for the way detector: cpu, gpu or auto")
        command.add_argument("--network", default="416x416", help="what DALI resizes to")
        command.add_argument("--seconds", type=float, default=4.0, help="of each measurement of throughput")
        command.add_argument("--calls", type=int, default=200 if name == "latency" else 3, help="of a latency; processes")
        command.add_argument("--label", help="name the way so")
        command.set_defaults(function=function)
    args = parser.parse_args()
    args.images = args.size if args.what in ("frames", "latency") else Path(args.source).name
    args.function(args)


if __name__ == "__main__":
    main()
