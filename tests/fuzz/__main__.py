"""``python -m fuzz --seconds 600``, in the folder ``tests``: damaged files for every reader, by Hypothesis."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from pathlib import Path

from tqdm import tqdm

from fuzz.cases import CORPUS, LAST_CASE, Outcome, fuzz_limited, keep
from fuzz.targets import TARGETS, make_files


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together, each on a core (default: 60)")
    parser.add_argument(
        "--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS)
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the cases (default: another each time)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time (default: the number of cores)"
    )
    args = parser.parse_args()
    print(f"seed {args.seed}; what fails goes to {CORPUS}")
    with tempfile.TemporaryDirectory() as whole:
        with redirect_stdout(sys.stderr):
            make_files(Path(whole))
        outcomes = _run(args, Path(whole))
    print(f"\n{'target':16} {'cases':>8} {'accepted':>8} {'refused':>8} {'faults':>6} {'slowest':>9}")
    for one in [*outcomes, _total(outcomes)]:
        print(f"{one.target:16} {one.cases:8} {one.accepted:8} {one.refused:8} {len(one.failures):6} {one.slowest:7.2f} s")
    for one in outcomes:
        for place, trace in one.failures.items():
            print(f"\n{one.target}: {place}\n{trace}", file=sys.stderr)
    return any(one.failures for one in outcomes)


def _run(args: argparse.Namespace, whole: Path) -> list[Outcome]:
    """Give every target its share of the time."""
    share = args.seconds * args.jobs / len(args.targets)
    with tqdm(total=len(args.targets), unit=" targets", file=sys.stderr) as bar, ThreadPoolExecutor(args.jobs) as starters:

        def run(target: str) -> Outcome:
            outcome = _fuzz(whole, target, share, args.seed)
            bar.update()
            return outcome

        return list(starters.map(run, args.targets))


def _fuzz(whole: Path, target: str, seconds: float, number: int) -> Outcome:
    """Run a target in processes of its own; one that dies is a fault, and the next goes on with other cases."""
    total, end = Outcome(target), time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(whole, folder, dirs_exist_ok=True)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                try:
                    _add(total, process.submit(fuzz_limited, target, Path(folder), rest, number).result())
                except BrokenProcessPool:
                    case = keep(target, (Path(folder) / LAST_CASE).read_bytes())
                    _add(total, Outcome(target, 1, failures={f"the process died at {case.name}": ""}))
        number += 1_000_000
    return total


def _add(total: Outcome, one: Outcome) -> None:
    total.cases += one.cases
    total.refused += one.refused
    total.slowest = max(total.slowest, one.slowest)
    total.failures |= one.failures


def _total(outcomes: list[Outcome]) -> Outcome:
    total = Outcome("all")
    for one in outcomes:
        _add(total, Outcome("all", one.cases, one.refused, one.slowest, {f"{one.target} {key}": "" for key in one.failures}))
    return total


if __name__ == "__main__":
    sys.exit(main())
