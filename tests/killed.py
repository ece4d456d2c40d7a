"""Runs a command of darktrt again and again, each time killed before another of its file operations; prints what it left.

A process of its own, without threads, which forks: the libraries are imported once. Usage: ``killed.py FIRST STEP WORD...``, in
the folder of the command's inputs. It kills before the operations FIRST, FIRST + STEP, ...
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock"}
PRELOADED = "onnx onnxruntime PIL.Image darktrt.pipeline darktrt.surgery.rewrite darktrt.check.evaluation darktrt.vision.files"


def is_change(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether an audit event is about to change a folder or to open a file for writing."""
    if event != "open":
        return event in CHANGES
    _, mode, flags = arguments
    return bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)) or any(c in str(mode or "") for c in "wx+")


def run(words: list[str], kill_before: int) -> tuple[int, int]:
    """The status of the command, killed before that operation (0: never), and how many operations it had."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        with open(reading) as pipe:
            count = len(pipe.read())
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), count
    from darktrt.cli import main

    done = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        if is_change(event, arguments):
            done += 1
            os.write(writing, b".")
            if done == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout = sys.stderr  # type: ignore[misc]
    sys.addaudithook(watch)
    os._exit(main(words))


def files() -> dict[str, int]:
    """Every path below the current folder with the size of its file."""
    return {str(path): path.stat().st_size if path.is_file() else 0 for path in sorted(Path().rglob("*"))}


def killed_runs(words: list[str], first: int, step: int) -> dict[str, object]:
    inputs = files()
    status, count = run(words, 0)
    assert status == 0
    whole = files()
    kinds: dict[str, list[int]] = {"half-written": [], "left for ever": [], "left by the killed run": []}
    kills = range(first, count + 1, step)
    for number in kills:
        for new in set(whole) - set(inputs):
            if Path(new).is_dir():
                shutil.rmtree(new, ignore_errors=True)
            else:
                Path(new).unlink(missing_ok=True)
        assert run(words, number)[0] == -signal.SIGKILL
        left = files()
        if any(size != whole[name] for name, size in left.items() if name in whole):
            kinds["half-written"].append(number)
        if set(left) - set(whole):
            kinds["left by the killed run"].append(number)
        assert run(words, 0)[0] == 0
        if files() != whole:
            kinds["left for ever"].append(number)
    return {"kills": len(kills), **kinds}


if __name__ == "__main__":
    for module in PRELOADED.split():
        importlib.import_module(module)
    print(json.dumps(killed_runs(sys.argv[3:], int(sys.argv[1]), int(sys.argv[2]))))
