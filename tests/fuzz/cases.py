"""Runs cases of one target: a damaged file must end in a result or in a DarktrtError, in bounded memory and time."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from darktrt.errors import DarktrtError
from fuzz.mutations import Whole
from fuzz.targets import TARGETS

MEMORY_BYTES = 6 << 30
"""Address space of the process of a target, most of which the libraries reserve."""

CASE_SECONDS = 30
SENTENCE_CHARACTERS = 2000
_BATCH = 100
_SETTINGS = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
CORPUS = Path(__file__).parent / "corpus"
LAST_CASE = ".last-case"
"""The file of the case that a killed process was at."""


@dataclass
class Outcome:
    """What the cases of a target came to."""

    target: str
    cases: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
    """The trace by the place where it was raised; the file of each lies in the corpus."""

    @property
    def accepted(self) -> int:
        return self.cases - self.refused - len(self.failures)


class SlowError(BaseException):
    """A case took too long; no handler of the code under test catches it."""


def check(target: str, content: bytes, folder: Path) -> bool:
    """Whether the reader of a target accepts a content; False where it refuses it in a sentence.

    The files around it must be as they were after a refusal.

    Args:
        folder: whole files of all kinds, of :func:`fuzz.targets.make_files`.

    Raises:
        AssertionError: the sentence is no line of text, or a file was left.
        Exception: whatever else the reader raises, which is a fault.
    """
    path = folder / TARGETS[target].file
    whole, before = path.read_bytes(), _listing(folder)
    path.write_bytes(content)
    try:
        with _time_limit(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # it would be printed beside the sentence
            warnings.simplefilter("error", UserWarning)
            TARGETS[target].read(path)
        return True
    except DarktrtError as error:
        text = str(error)
        assert text.strip(), "an empty sentence"
        assert len(text) < SENTENCE_CHARACTERS, f"a sentence of {len(text)} characters"
        assert _listing(folder) == before, "a refused run left files"
        return False
    finally:
        path.write_bytes(whole)
        for left in _listing(folder) - before:
            _remove(folder / left)


def _listing(folder: Path) -> set[str]:
    return {os.path.join(base, name)[len(str(folder)) + 1 :] for base, _, names in os.walk(folder) for name in names}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise SlowError(f"took more than {CASE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(CASE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz_limited(target: str, folder: Path, seconds: float, number: int) -> Outcome:
    """Run cases in a process that may neither take much memory nor print."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, limit))
    logging.disable()
    return fuzz(target, folder, seconds, number)


def fuzz(target: str, folder: Path, seconds: float, first_seed: int, most: int | None = None) -> Outcome:
    """Run cases of a target until the time is over; each fault goes into the corpus, shrunk, and is reported once.

    Args:
        first_seed: of Hypothesis; the same seed gives the same cases.
        most: the largest number of cases.
    """
    outcome, end, number = Outcome(target), time.monotonic() + seconds, first_seed
    while time.monotonic() < end and (most is None or outcome.cases < most):
        _batch(outcome, folder, number, _BATCH if most is None else min(_BATCH, most - outcome.cases))
        number += 1
        gc.collect()
    return outcome


def _batch(outcome: Outcome, folder: Path, number: int, most: int) -> None:
    """The cases of one seed, about ``most``."""
    failed = b""
    whole = Whole((folder / TARGETS[outcome.target].file).read_bytes())

    @seed(number)
    @settings(_SETTINGS, max_examples=most)
    @given(TARGETS[outcome.target].mutate(whole))
    def case(content: bytes) -> None:
        nonlocal failed
        start = time.monotonic()
        outcome.cases += 1
        (folder / LAST_CASE).write_bytes(content)
        try:
            outcome.refused += not check(outcome.target, content, folder)
        except (Exception, SlowError) as error:
            if _place(error) not in outcome.failures:
                failed = content
                raise AssertionError(_place(error)) from error
        finally:
            outcome.slowest = max(outcome.slowest, time.monotonic() - start)

    try:
        case()
    except Exception as error:
        cause: BaseException = error.__cause__ or error
        outcome.failures[_place(cause)] = "".join(traceback.format_exception(cause)[-6:])
        keep(outcome.target, failed)


def _place(error: BaseException) -> str:
    """The type of an exception, and the last line of darktrt in its trace."""
    frames: list[Any] = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fuzz/" not in frame.filename]
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[-1:]]
    return f"{type(error).__name__} {''.join(where) or str(error)[:60]}"


def keep(target: str, content: bytes) -> Path:
    """Put a case into the corpus."""
    path = CORPUS / target / hashlib.sha256(content).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
