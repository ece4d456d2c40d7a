"""INT8 within a budget: the layers that lose most stay in floating point until the rest costs no more than agreed."""

from __future__ import annotations

import math
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from darktrt.calib.histogram import HistogramSet
from darktrt.calib.summary import Outputs
from darktrt.check.coco import Accuracy, evaluate
from darktrt.check.ground_truth import Truth, has_labels, load_truth
from darktrt.check.sensitivity import LIMIT, each_alone
from darktrt.check.simulate import OnnxNetwork, Yardstick, chosen_fp_layers, convolutions, load_network, quantized, session
from darktrt.engine.manifest import Int8Cost
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.surgery.qdq import Calibration
from darktrt.vision.sources import find_images


@dataclass(frozen=True)
class Evaluation:
    """What to judge INT8 on."""

    data: Sequence[str]
    """A COCO file with labels, images with darknet's label files, or images without labels, as
    :func:`darktrt.vision.sources.find_images` takes them."""
    limit: int | None = None
    """A sample of so many images; None for all that have labels, else :data:`darktrt.check.sensitivity.LIMIT` of them."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DarktrtError(f"the limit is {self.limit}; evaluate on at least 1 image")


@dataclass(frozen=True)
class Trial:
    """INT8 with these convolutions in floating point, and what it costs."""

    fp_layers: tuple[str, ...]
    drop: float
    """Of the average precision, against FP32; without labels that of the scores (:class:`darktrt.check.simulate.Change`)."""
    accuracy: Accuracy | None = None
    """None without labels."""


@dataclass(frozen=True)
class Trade:
    """What was tried, in order; the last trial is within the budget."""

    budget: float
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial:
        return self.trials[-1]

    def cost(self, data: str) -> Int8Cost:
        """What was chosen, for the manifest; ``data`` names what it was judged on."""
        drop, found = self.chosen.drop, self.chosen.accuracy
        if found is None:
            return Int8Cost("scores", drop, self.budget, data)
        return Int8Cost("AP", drop, self.budget, data, found.ap, found.ap50)

    def __str__(self) -> str:
        what = "AP drop" if self.chosen.accuracy else "change of the scores"
        return (
            f"{len(self.chosen.fp_layers)} convolutions stay in FP16, {what} {self.chosen.drop:.4f} (at most {self.budget:g})"
        )


def check_budget(budget: float) -> None:
    """Refuse what cannot be a largest drop.

    Raises:
        DarktrtError: it is negative, infinite or NaN.
    """
    if not (math.isfinite(budget) and budget >= 0):
        raise DarktrtError(f"the largest drop is {budget:g}; it must be 0 or more, such as 0.005 for half a point of mAP")


def within_budget(
    source: str | Path,
    calibration: Calibration,
    budget: float,
    evaluation: Evaluation,
    table: str | Path | None = None,
    show: Callable[[str], None] = print,
) -> Trade:
    """Find how many more convolutions must stay in floating point for INT8 to lose no more than ``budget``.

    Begins with ``calibration.fp_layers``, then adds 1, 2, 3, 4, 6, 8, 12, ... of the others, first those that cost most when
    quantized alone. ONNX Runtime runs the network with the engine's own Q/DQ nodes: its arithmetic up to rounding.
    (TensorRT up to 10, which takes the scales themselves, may put further layers than convolutions into INT8.)

    Args:
        source: an ONNX file with decoded heads or NMS, not quantized.
        table: the scales' file; the histograms beside it, if any, tell whether calibration has seen the images.
        show: takes the lines of the trade as they come.

    Raises:
        DarktrtError: the budget is none, or no less than the whole AP in float, or a file cannot be used.
    """
    check_budget(budget)
    network = load_network(source)
    truth = _labels(network, evaluation)
    images = _images(truth, evaluation)
    if table:
        _warn_of_overlap([one.path for one in truth.images] if truth else images, table)
    fp_layers = tuple(chosen_fp_layers(network, calibration))
    quantized(network, calibration, fp_layers)  # refuses the table of another network before the work begins
    yardstick = cache(lambda: Yardstick(network, images))
    judge = _AccuracyJudge(network, calibration, truth) if truth else _ScoreJudge(yardstick(), calibration)
    for line in judge.introduce(budget):
        show(line)
    trials = []
    for names, added in _candidates(fp_layers, calibration, yardstick):
        trials.append(judge.trial(names))
        show(judge.line(trials[-1], added))
        if trials[-1].drop <= budget:
            break
    if len(trials[-1].fp_layers) == len(convolutions(network)):
        print("warning: nothing is left in INT8; --precision fp16 makes the same engine", file=sys.stderr)
    return Trade(budget, tuple(trials))


def _candidates(
    fp_layers: tuple[str, ...], calibration: Calibration, yardstick: Callable[[], Yardstick]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """More and more to keep, and what is new; the layers are ranked only if the first is not enough."""
    yield fp_layers, "to begin with" if fp_layers else "none"
    changes = each_alone(yardstick(), calibration)
    worst = [one.node for one in sorted(changes, key=lambda one: -changes[one].scores) if one.node not in fp_layers]
    before = 0
    for count in _counts(len(worst)):
        yield (*fp_layers, *worst[:count]), ", ".join(worst[before:count])
        before = count


def _counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... below ``most``, and ``most``."""
    steps = sorted({factor << i for factor in (1, 3) for i in range(most.bit_length())})
    return [step for step in steps if step < most] + [most] * (most > 0)


class _Judge(ABC):
    """Says what INT8 costs, and how to print that."""

    @abstractmethod
    def introduce(self, budget: float) -> list[str]:
        """The lines above the trials."""

    @abstractmethod
    def trial(self, fp_layers: tuple[str, ...]) -> Trial:
        """Judge INT8 with these convolutions in floating point."""

    @abstractmethod
    def line(self, trial: Trial, added: str) -> str:
        """A line for people."""


class _AccuracyJudge(_Judge):
    """By the drop of the average precision."""

    def __init__(self, network: OnnxNetwork, calibration: Calibration, truth: Truth) -> None:
        self.network, self.calibration, self.truth = network, calibration, truth

    def introduce(self, budget: float) -> list[str]:
        self.exact = exact = evaluate(session(self.network.model), self.network.info, self.truth, "FP32")
        images = f"{len(self.truth.images)} images of {self.truth.name}"
        if exact.ap <= budget:
            raise DarktrtError(
                f"FP32 has AP {exact.ap:.4f} on {images}, so any INT8 would pass a largest drop of {budget:g}; "
                "are these labels the network's, and is the drop in parts of 1?"
            )
        title = f"FP32: AP {exact.ap:.4f}, AP50 {exact.ap50:.4f} on {images}"
        return [title, f"{'kept in FP16':>12}  {'AP':>6}  {'drop':>7}  {'AP50':>6}  {'drop':>7}  added"]

    def trial(self, fp_layers: tuple[str, ...]) -> Trial:
        run = session(quantized(self.network, self.calibration, fp_layers))
        found = evaluate(run, self.network.info, self.truth, f"INT8, {len(fp_layers)} kept")
        return Trial(fp_layers, self.exact.ap - found.ap, found)

    def line(self, trial: Trial, added: str) -> str:
        found, exact = trial.accuracy or self.exact, self.exact
        drops = f"{found.ap:6.4f}  {trial.drop:7.4f}  {found.ap50:6.4f}  {exact.ap50 - found.ap50:7.4f}"
        return f"{len(trial.fp_layers):12}  {drops}  {added}"


class _ScoreJudge(_Judge):
    """By the change of the scores, which needs no labels."""

    def __init__(self, yardstick: Yardstick, calibration: Calibration) -> None:
        self.yardstick, self.calibration = yardstick, calibration

    def introduce(self, budget: float) -> list[str]:
        print(
            f"warning: there are no labels to measure mAP on, so the budget of {budget:g} bounds the change of the scores: "
            "how far scores (0 to 1) move from FP32's, as RMS, by how sure FP32 is; it is often ten times the drop of mAP, "
            "for which you name a COCO json with annotations",
            file=sys.stderr,
        )
        return [f"{'kept in FP16':>12}  {'scores':>7}  {'heads':>7}  added"]

    def trial(self, fp_layers: tuple[str, ...]) -> Trial:
        self.change = self.yardstick.change(self.calibration, fp_layers)
        return Trial(fp_layers, self.change.scores)

    def line(self, trial: Trial, added: str) -> str:
        return f"{len(trial.fp_layers):12}  {trial.drop:7.4f}  {self.change.heads:7.4f}  {added}"


def _labels(network: OnnxNetwork, evaluation: Evaluation) -> Truth | None:
    labelled = [entry for entry in evaluation.data if has_labels(entry)]
    return load_truth(labelled, network.info.class_names, evaluation.limit, evaluation.seed) if labelled else None


def _images(truth: Truth | None, evaluation: Evaluation) -> list[Path]:
    """Those that changes of scores are measured on."""
    if truth is None:
        return find_images(evaluation.data, LIMIT if evaluation.limit is None else evaluation.limit, evaluation.seed)
    paths = sorted(image.path for image in truth.images)
    return paths if len(paths) <= LIMIT else random.Random(evaluation.seed).sample(paths, LIMIT)


def _warn_of_overlap(images: Sequence[Path], table: str | Path) -> None:
    """Say on stderr how many of the images calibration has seen, where the histograms beside the table tell."""
    histograms = Outputs(Path(table)).histograms
    if not histograms.is_file():
        return
    calibrated = HistogramSet.load(histograms).images
    seen = sum(sha256_of(path) in calibrated for path in images)
    if seen:
        print(
            f"warning: INT8 was calibrated on {seen} of the {len(images)} images that it is judged on; "
            "on others it may lose more",
            file=sys.stderr,
        )
