"""Milliseconds to fit an image into a network's input on one core: compiled, by NumPy, and by ``cv2.resize`` where OpenCV is.

    python3 benchmarks/bench_resize.py

A row is an image size, a network size and an input form: the median and the least of CALLS calls, in turns, as CPU time of the
thread. NumPy and the compiled library compute the same bits; OpenCV's are others, and bytes. Then images a second by threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from darktrt.metadata import InputForm
from darktrt.vision import images
from darktrt.vision.native import load_fit

CASES = ((640, 480, 416), (1920, 1080, 416), (1920, 1080, 608), (3840, 2160, 608))
CALLS = 40
SECONDS = 3.0
"""For each count of threads."""


def ways(image: np.ndarray[Any, Any], size: int, form: InputForm) -> dict[str, Callable[[], object]]:
    functions: dict[str, Callable[[], object]] = {}
    if compiled := load_fit():
        functions["compiled"] = lambda: compiled(image, size, size, 3, "stretch", form)
    functions["numpy"] = lambda: images.numpy_fit(image, size, size, 3, "stretch", form)
    try:
        import cv2
    except ImportError:
        return functions
    cv2.setNumThreads(1)
    functions["cv2.resize"] = lambda: cv2.resize(image, (size, size))
    return functions


def milliseconds(functions: dict[str, Callable[[], object]]) -> dict[str, np.ndarray[Any, Any]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(CALLS):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            times[name].append((time.thread_time() - start) * 1e3)
    return {name: np.array(taken) for name, taken in times.items()}


def rate(function: Callable[[], object], threads: int) -> float:
    """Images a second of so many threads."""
    end = time.perf_counter() + SECONDS

    def work() -> int:
        count = 0
        while time.perf_counter() < end:
            function()
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: work(), range(threads))) / SECONDS


def main() -> None:
    print("| image | network | input | " + " | ".join(ways(np.zeros((1, 1, 3), np.uint8), 8, "uint8")) + " |")
    for width, height, size in CASES:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for form in ("uint8", "float"):
            times = milliseconds(ways(image, size, form))
            row = " | ".join(f"{np.median(taken):.2f} ({taken.min():.2f})" for taken in times.values())
            print(f"| {width}x{height} | {size} | {form} | {row} |", flush=True)
    image = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    for name, function in ways(image, 608, "float").items():
        rates = " ".join(f"{threads} threads {rate(function, threads):.0f}" for threads in (1, 2, 4))
        print(f"{name}, 1920x1080 to 608, float, images/s: {rates}", flush=True)


if __name__ == "__main__":
    main()
