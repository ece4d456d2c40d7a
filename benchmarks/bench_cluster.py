"""What a cluster makes of a network's speed, and what the process that puts its results together can keep up with.

    python3 benchmarks/bench_cluster.py rate val.json:val2017 --model portable.onnx --workers 1 2 4
    python3 benchmarks/bench_cluster.py rate val.json:val2017 --plan int8.plan --workers 1 2 --cpus 8
    python3 benchmarks/bench_cluster.py driver calibration.calib -o many.calib

``rate`` evaluates the network on this machine and then by workers of a Ray cluster, which it starts or joins: images a second
from the first result to the last, the seconds until the first, and a digest of all detections. ``driver`` adds the counts of
groups to a calibration, as the driver does, with the counts of the calibration that it is given. Each line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import resource
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from darktrt.calib.histogram import HistogramSet
from darktrt.check.detections import VariantDetections, detect_variant
from darktrt.check.ground_truth import GroundTruth, load_ground_truth
from darktrt.check.runs import engine_variant, onnx_variant
from darktrt.cluster.cluster import Cluster, connected
from darktrt.parallel import Threads, Workers
from darktrt.progress import set_progress


def digest(found: VariantDetections, truth: GroundTruth) -> str:
    """SHA-256 of the detections in all images."""
    whole = hashlib.sha256()
    for one in found.in_order(truth.digests):
        whole.update(one.boxes.tobytes() + one.scores.tobytes() + one.class_ids.tobytes())
    return whole.hexdigest()[:16]


def measured(args: argparse.Namespace, label: str, workers: Workers | None) -> dict[str, object]:
    """One evaluation; without workers an engine runs as without a cluster."""
    steps: list[tuple[float, int]] = []
    set_progress(lambda _, done, __: steps.append((time.perf_counter(), done)))
    with ExitStack() as stack:
        if args.plan:
            variant = engine_variant(args.plan, args.plugins, "", None if isinstance(workers, Cluster) else stack)
        else:
            variant = onnx_variant(args.model)
        truth = load_ground_truth([args.data], variant.info.class_names, args.limit)
        truth.check_sizes()
        start = time.perf_counter()
        found = detect_variant(variant, truth, workers)
    (first, before), (last, images) = steps[0], steps[-1]
    return {
        "run": label,
        "images": images,
        "first_result_s": round(first - start, 2),
        "images_per_second": round((images - before) / max(last - first, 1e-9), 2),
        "whole_s": round(last - start, 2),
        "detections": digest(found, truth),
    }


def rate(args: argparse.Namespace) -> None:
    runs: list[tuple[str, Workers | None]] = [("this machine", None)]
    runs += [(f"{number} threads", Threads(number)) for number in args.threads]
    for number in args.workers:
        cluster = Cluster(args.ray, num_cpus_per_worker=args.cpus, workers=number, group_size=args.group)
        runs.append((f"{number} workers of {args.cpus} CPUs", cluster))
    if args.cores:
        import ray

        ray.init("local", num_cpus=args.cores, include_dashboard=False, log_to_driver=False)
    elif args.workers:
        connected(args.ray)
    for _ in range(args.repeat):
        for label, workers in runs:
            print(json.dumps(measured(args, label, workers)), flush=True)


def driver(args: argparse.Namespace) -> None:
    """Merge the same counts again and again, each time as those of other images, through pickle as they come from workers."""
    from darktrt.calib.file import read_calibration, write_calibration

    contents = read_calibration(args.calibration)
    own = replace(contents.histograms, images={}, skipped={}, files={})
    total, sent = replace(own, histograms={}), pickle.dumps(own, protocol=5)
    seconds, started = list[float](), time.perf_counter()
    for first in range(0, args.images, args.group):
        numbers = range(first, min(first + args.group, args.images))
        images = {hashlib.sha256(str(number).encode()).hexdigest(): f"/data/train2017/{number:012}.jpg" for number in numbers}
        begun = time.perf_counter()
        counts: HistogramSet = pickle.loads(sent)
        counts.images = images
        total.merge([counts])
        seconds.append(time.perf_counter() - begun)
    merged = time.perf_counter()
    write_calibration(replace(contents, histograms=total), args.output)
    print(
        json.dumps(
            {
                "images": len(total.images),
                "group": args.group,
                "tensors": len(total.histograms),
                "bytes_of_a_group": len(sent),
                "merge_ms_of_a_group": round(1e3 * sorted(seconds)[len(seconds) // 2], 2),
                "merging_s": round(sum(seconds), 1),
                "whole_s": round(merged - started, 1),
                "saving_s": round(time.perf_counter() - merged, 1),
                "saved_MB": round(os.path.getsize(args.output) / 1e6, 1),
                "most_memory_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            }
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    rates = commands.add_parser("rate")
    rates.set_defaults(run=rate)
    rates.add_argument("data")
    rates.add_argument("--model")
    rates.add_argument("--plan")
    rates.add_argument("--plugins")
    rates.add_argument("--limit", type=int)
    rates.add_argument("--threads", type=int, nargs="*", default=[])
    rates.add_argument("--workers", type=int, nargs="*", default=[])
    rates.add_argument("--cpus", type=int, default=1)
    rates.add_argument("--group", type=int, default=32)
    rates.add_argument("--ray")
    rates.add_argument("--cores", type=int, help="start a cluster here that claims so many cores")
    rates.add_argument("--repeat", type=int, default=1)
    drivers = commands.add_parser("driver")
    drivers.set_defaults(run=driver)
    drivers.add_argument("calibration")
    drivers.add_argument("-o", "--output", required=True)
    drivers.add_argument("--images", type=int, default=1_000_000)
    drivers.add_argument("--group", type=int, default=32)
    args = parser.parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    main()
