"""The stages of darktrt as functions from files to files: what a program calls, and what the command line calls.

Each function imports the rooms that it needs when it is called. Library errors are :class:`darktrt.DarktrtError`; progress and
warnings go where :mod:`darktrt.progress` sends them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.errors import DarktrtError
from darktrt.files import keep_inputs, sha256_of
from darktrt.metadata import IOU_THRESHOLD, SCORE_THRESHOLD, Thresholds
from darktrt.progress import LOGGER
from darktrt.vision.detector import NetworkDetector

if TYPE_CHECKING:
    import numpy as np

    from darktrt.calib.histogram import HistogramSet
    from darktrt.calib.options import CalibrationOptions
    from darktrt.calib.summary import Outputs
    from darktrt.calib.threshold import Choice
    from darktrt.check.agreement import Agreement
    from darktrt.check.evaluation import Evaluation
    from darktrt.check.runs import Variant
    from darktrt.cluster.cluster import Cluster
    from darktrt.engine.manifest import Int8Cost, Manifest
    from darktrt.engine.options import BuildOptions, Precision
    from darktrt.engine.weak_typing import GpuCalibration
    from darktrt.surgery.qdq import Calibration
    from darktrt.vision.decode import Device

ENGINE_SUFFIXES = (".plan", ".engine")


# --- calibration ---


def calibrate(
    model: str | Path,
    data: Sequence[str | Path],
    output: str | Path,
    options: CalibrationOptions | None = None,
    *,
    plot: str | Path | None = None,
) -> Calibration:
    """Choose INT8 scales for a model by running it over images, and write them as a calibration table.

    Beside the table, under its name, go a summary (``.txt``), TensorRT's cache for trtexec (``.cache``), the histograms
    (``.npz``), the channel means by which biases are corrected (``.means.npz``) and the floating-point layers
    (``.fp_layers.json``).

    Args:
        model: an ONNX file of :func:`insert_plugins`.
        data: folders, image files, lists, COCO json files and patterns; if there are none, two sample images serve, under a
            warning.
        output: the table to write.
        plot: an image file to draw the histograms with their thresholds into.

    Raises:
        DarktrtError: the model or an image cannot be read, or an output cannot be written. An earlier table
            stays then, with the files beside it.
    """
    from darktrt.calib.options import CalibrationOptions
    from darktrt.calib.summary import Outputs
    from darktrt.vision.sources import path_of

    options = options or CalibrationOptions()
    outputs = Outputs(Path(output), Path(plot) if plot else None)
    outputs.check([model, *(path_of(str(entry)) for entry in data)])
    histograms, about = _count(model, data, outputs, options)
    choices = _choose(histograms, options)
    with outputs.unfinished() as new:
        _write(histograms, choices, new, options, about)
        scales = {name: choice.scale for name, choice in choices.items()}
        _measure(model, data, histograms, scales, new, options)
        _draw(histograms, choices, outputs)
    for sentence in histograms.skipped:
        LOGGER.warning("skipped %s", sentence)
    return load_calibration(output)


def merge_calibrations(
    histograms: Sequence[str | Path],
    output: str | Path,
    options: CalibrationOptions | None = None,
    *,
    plot: str | Path | None = None,
) -> Calibration:
    """Choose INT8 scales from the histograms that several runs of :func:`calibrate` have left (``.npz``).

    The scales are those of one run over all the images, bit for bit. Channel means and floating-point layers are not merged:
    run :func:`calibrate` with ``resume`` on the merged table to measure them.

    Args:
        output: the table to write; the merged histograms go beside it.

    Raises:
        DarktrtError: a file cannot be read, the files are of different models, or an output cannot be written.
    """
    from darktrt.calib.histogram import merged
    from darktrt.calib.options import CalibrationOptions
    from darktrt.calib.summary import Outputs

    if not histograms:
        raise DarktrtError("there is nothing to merge; name the .npz files that several calibrations left", "histograms")
    outputs = Outputs(Path(output), Path(plot) if plot else None)
    outputs.check(histograms)
    is_input = [os.path.realpath(path) for path in histograms] == [os.path.realpath(outputs.histograms)]
    if not is_input:
        keep_inputs(outputs.histograms, *histograms)
    options = options or CalibrationOptions()
    together = merged(histograms)
    choices = _choose(together, options)
    with outputs.unfinished() as new:
        if not is_input:
            together.save(new.histograms)
        _write(together, choices, new, options, {"merged": ", ".join(map(str, histograms))})
        _draw(together, choices, outputs)
    return load_calibration(output)


def load_calibration(table: str | Path, fp_layers: tuple[str, ...] | None = None) -> Calibration:
    """A calibration table, or TensorRT's cache, with the channel means and floating-point layers beside it.

    Args:
        fp_layers: node names of the convolutions to compute in floating point, in place of those beside the table.

    Raises:
        DarktrtError: a file is damaged, or belongs to another table.
    """
    from darktrt.calib.bias_correction import load_channel_means
    from darktrt.calib.fp_layers import load_fp_layers
    from darktrt.calib.table import CalibrationTable
    from darktrt.surgery.qdq import Calibration

    return Calibration(
        CalibrationTable.load(table).scales,
        load_fp_layers(table) if fp_layers is None else fp_layers,
        load_channel_means(table),
        sha256_of(table),
    )


def _count(
    model: str | Path, data: Sequence[str | Path], outputs: Outputs, options: CalibrationOptions
) -> tuple[HistogramSet, dict[str, str]]:
    """The histograms, and the lines of the summary about them."""
    from darktrt.calib.collect import histograms_of
    from darktrt.calib.samples import SAMPLES_WARNING, flips_and_crops
    from darktrt.onnx_file import load_model

    about = {"network": f"{load_model(model)[1].name}, {model}"}
    images: Sequence[str | Path] = data
    if not data:
        from darktrt.convert.zoo import SAMPLES, fetch

        LOGGER.warning("%s", SAMPLES_WARNING)
        about["warning"] = "made of two sample images, for trying out only"
        images = flips_and_crops(fetch(SAMPLES, outputs.samples), outputs.samples)
    return histograms_of(model, images, outputs, options), about


def _choose(histograms: HistogramSet, options: CalibrationOptions) -> dict[str, Choice]:
    from darktrt.calib.threshold import choose_thresholds

    return choose_thresholds(histograms, options.method, options.percentile)


def _write(
    histograms: HistogramSet,
    choices: Mapping[str, Choice],
    outputs: Outputs,
    options: CalibrationOptions,
    about: Mapping[str, str],
) -> None:
    """Write the table with its summary."""
    from darktrt.calib.summary import save

    method = f"percentile {options.percentile:g}" if options.method == "percentile" else options.method
    save(histograms, choices, outputs, {**about, "method": method})


def _draw(histograms: HistogramSet, choices: Mapping[str, Choice], outputs: Outputs) -> None:
    """Draw the page of histograms, where one is asked for."""
    from darktrt.calib.summary import plot

    if outputs.plot:
        plot(histograms, choices, outputs.plot)


def _measure(
    model: str | Path,
    data: Sequence[str | Path],
    histograms: HistogramSet,
    scales: Mapping[str, np.float32],
    outputs: Outputs,
    options: CalibrationOptions,
) -> None:
    """Measure with the table how to correct biases and which layers to leave in floating point, and write both."""
    from darktrt.calib.bias_correction import save_channel_means
    from darktrt.calib.collect import measure_channel_means
    from darktrt.calib.fp_layers import save_fp_layers
    from darktrt.calib.summary import add_to_summary
    from darktrt.check.sensitivity import find_fp_layers
    from darktrt.onnx_file import load_model
    from darktrt.vision.sources import find_images

    counted = [Path(path) for path in histograms.images.values() if os.path.isfile(path)]
    paths = counted or find_images(data, options.limit, options.seed)  # merged histograms name the paths of other machines
    if options.bias_images:
        sample = _every_nth(paths, options.bias_images)
        save_channel_means(measure_channel_means(model, sample, scales, options.batch), outputs.table)
    if options.fp_layer_images and load_model(model)[1].head != "raw":
        layers = find_fp_layers(model, _every_nth(paths, options.fp_layer_images), load_calibration(outputs.table))
        save_fp_layers(layers, outputs.table)
        add_to_summary(str(layers), outputs)


def _every_nth(paths: Sequence[Path], number: int) -> list[Path]:
    """At most so many of the paths, spread evenly over them."""
    return list(paths[:: -(-len(paths) // number)])


# --- engines ---


@dataclass(frozen=True)
class DropBudget:
    """A bound on what INT8 may cost: the worst layers stay in floating point until it holds."""

    max_drop: float
    """The largest drop of AP, such as 0.005; without labels it bounds the change of the scores instead."""
    data: Sequence[str | Path]
    """Images to measure it on, as :func:`evaluate` accepts them; images without labels too."""
    limit: int | None = None
    """The size of a random sample of them; by default all."""


def build_engine(
    source: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    precision: Precision | None = None,
    calibration: Calibration | str | Path | None = None,
    calibration_images: Sequence[str | Path] = (),
    fp_layers: tuple[str, ...] | None = None,
    budget: DropBudget | None = None,
) -> Manifest:
    """Build a TensorRT engine from a portable ONNX file, and write its manifest beside it (``.json``).

    Args:
        source: an ONNX file of :func:`darktrt.insert_plugins`.
        output: the engine (plan) to write.
        options: how TensorRT builds; by default as :class:`darktrt.BuildOptions` says.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``, in place of that of ``options``.
        calibration: the INT8 scales: what :func:`calibrate` returns, or the path of its file or of a TensorRT cache.
        calibration_images: images for TensorRT's own entropy calibration on the GPU, in place of ``calibration``; the scales
            that it finds go beside the plan (``.cache``).
        fp_layers: node names of the convolutions that INT8 leaves in floating point; by default those of the calibration.
            A :class:`darktrt.Calibration` has its own.
        budget: a bound on what INT8 may cost, with ``calibration``.

    Returns:
        What the engine is: its hashes, target, precision, layers and, with ``budget``, what INT8 costs.

    Raises:
        DarktrtError: the file is no ONNX file of darktrt, no TensorRT is installed, TensorRT refuses the network, the scales do
            not fit, or an output cannot be written.
    """
    from darktrt.engine.build import build_file
    from darktrt.engine.options import BuildOptions

    options = options or BuildOptions()
    options = replace(options, precision=precision) if precision else options
    _check_int8(options, calibration, calibration_images, budget)
    file = calibration if isinstance(calibration, str | Path) else None
    _check_engine_files(source, output, options, file, calibration_images, budget)
    if calibration_images:
        with _gpu_calibration(source, calibration_images, fp_layers) as on_gpu:
            return build_file(source, output, options, on_gpu)
    scales = load_calibration(calibration, fp_layers) if isinstance(calibration, str | Path) else calibration
    cost = None
    if scales and budget:
        scales, cost = _within_budget(source, scales, options, budget, file)
    return build_file(source, output, options, scales, cost)


def _check_int8(
    options: BuildOptions,
    calibration: Calibration | str | Path | None,
    calibration_images: Sequence[str | Path],
    budget: DropBudget | None,
) -> None:
    """See that what concerns INT8 goes together."""
    if options.precision != "int8" and (calibration or calibration_images or budget):
        raise DarktrtError(f"scales, and what INT8 may cost, are of no use to an engine in {options.precision}", "precision")
    if calibration and calibration_images:
        raise DarktrtError("the scales come from a calibration or from images, not from both", "calibration_images")
    if budget and not calibration:
        raise DarktrtError("what INT8 may cost is measured with the scales of a calibration; name one", "calibration")


def _check_engine_files(
    source: str | Path,
    output: str | Path,
    options: BuildOptions,
    calibration: str | Path | None,
    calibration_images: Sequence[str | Path],
    budget: DropBudget | None,
) -> None:
    """See, before any work, that the outputs can be written and are no inputs."""
    from darktrt.engine.build import check_files
    from darktrt.vision.sources import path_of

    data = [*calibration_images, *(budget.data if budget else ())]
    inputs = [source, calibration, options.plugins, *(path_of(str(entry)) for entry in data)]
    check_files(output, options, *inputs, calibrates=bool(calibration_images))


@contextmanager
def _gpu_calibration(
    source: str | Path, data: Sequence[str | Path], fp_layers: tuple[str, ...] | None
) -> Iterator[GpuCalibration]:
    """TensorRT's own calibration on these images; they leave the GPU's memory at the end."""
    from darktrt.calib.trt_calibrator import image_source
    from darktrt.engine.weak_typing import GpuCalibration
    from darktrt.onnx_file import load_model
    from darktrt.vision.sources import find_images

    with image_source(find_images(data), load_model(source)[1]) as images:
        yield GpuCalibration(images, fp_layers)


def _within_budget(
    source: str | Path, calibration: Calibration, options: BuildOptions, budget: DropBudget, file: str | Path | None
) -> tuple[Calibration, Int8Cost]:
    """The calibration with the layers in floating point that keep INT8 within the budget, and what it costs then."""
    from darktrt.check.budget import EvaluationData, within_budget
    from darktrt.engine.target import find_target

    find_target(options.target)  # what would stop the build later is reported before this long work
    data = [str(entry) for entry in budget.data]
    trade = within_budget(source, calibration, budget.max_drop, EvaluationData(data, budget.limit), file, LOGGER.info)
    return replace(calibration, fp_layers=trade.chosen.fp_layers), trade.cost(", ".join(data))


# --- running and evaluating ---


class Detector(NetworkDetector):
    """A detector that runs a model file: an ONNX file on the CPU, or an engine on the GPU."""

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        plugins: str | Path | None = None,
        score_threshold: float = SCORE_THRESHOLD,
        iou_threshold: float = IOU_THRESHOLD,
        decoder: Device = "cpu",
    ) -> Detector:
        """Open a model; use the detector as a context manager, or close it.

        Args:
            model: an ONNX file of :func:`darktrt.insert_plugins`, or an engine (``.plan``) of :func:`build_engine`.
            plugins: the plugin library of an engine; by default the one that was built for this TensorRT.
            score_threshold: detections must exceed it.
            iou_threshold: the overlap above which NMS suppresses the lesser of two detections.
            decoder: where image files are decoded: ``"cpu"``, by Pillow in threads; ``"gpu"``, JPEGs by nvImageCodec, whose
                pixels differ by some levels; or ``"auto"``, on the GPU where an engine runs and nvImageCodec is installed.

        Raises:
            DarktrtError: the model cannot be read or does not run here, a threshold is outside 0..1, or ``decoder`` is
                ``"gpu"`` for an ONNX file.
        """
        from darktrt.engine.runtime import OnnxRunner, PlanRunner

        is_engine = Path(model).suffix.lower() in ENGINE_SUFFIXES
        with ExitStack() as stack:
            if is_engine:
                engine = stack.enter_context(PlanRunner(model, plugins, cuda_graph=True))
                detector = cls(engine, engine.info, score_threshold, iou_threshold, decoder=decoder)
            else:
                session = stack.enter_context(OnnxRunner(model))
                detector = cls(session.run, session.info, score_threshold, iou_threshold, decoder=decoder)
            detector._close = stack.pop_all().close
        return detector


def evaluate(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    data: str | Path | Sequence[str | Path],
    *,
    names: str | Path | None = None,
    class_map: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    plugins: str | Path | None = None,
    cluster: Cluster | None = None,
) -> Evaluation:
    """Measure the average precision of models on labelled images, as COCO defines it, and what is lost against the first.

    Args:
        models: ONNX files and engines, or a mapping from names to them.
        data: a COCO json with annotations, ``FILE.json:FOLDER``, or images with darknet's label files.
        names: a file with the names of the classes in darknet's label files, a line each; by default those of the network.
        class_map: a file with lines ``class of the labels = class of the network``.
        limit: the size of a random sample of the images; by default all.
        seed: of that sample.
        plugins: the plugin library of engines.
        cluster: machines to run the models on.

    Raises:
        DarktrtError: a file cannot be read, the models are not variants of one network, or there is nothing labelled.
    """
    from darktrt.check import evaluation
    from darktrt.check.ground_truth import LabelClasses, load_ground_truth, read_class_map, read_names

    entries = [str(data)] if isinstance(data, str | Path) else [str(entry) for entry in data]
    classes = LabelClasses(read_names(names) if names else None, read_class_map(class_map) if class_map else None)
    with ExitStack() as stack:
        variants = _open_variants(models, stack, plugins, on_cluster=cluster is not None)
        ground_truth = load_ground_truth(entries, variants[0].info.class_names, limit, seed, classes)
        return evaluation.evaluate(variants, ground_truth, workers=cluster)


def compare(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    data: str | Path | Sequence[str | Path],
    *,
    limit: int | None = 8,
    seed: int = 0,
    layers: bool = False,
    thresholds: Thresholds | None = None,
    plugins: str | Path | None = None,
) -> Agreement:
    """Run models over images and compare their tensors and detections with those of the first.

    Args:
        models: ONNX files and engines of one network, or a mapping from names to them; the first is the reference.
        data: folders, image files, lists, COCO json files and patterns.
        limit: the size of a random sample of the images; None for all.
        seed: of that sample.
        layers: compare the output of every cfg section too, where the models have them.
        thresholds: of detections.
        plugins: the plugin library of engines.

    Returns:
        The errors of every tensor, the detections that match, and whether all are within the tolerance of the precisions.

    Raises:
        DarktrtError: a file cannot be read, or the models are not of one network.
    """
    from darktrt.check import agreement
    from darktrt.check.runs import load_image
    from darktrt.vision.sources import find_images

    entries = [data] if isinstance(data, str | Path) else data
    with ExitStack() as stack:
        variants = _open_variants(models, stack, plugins, layers)
        images = [load_image(path, variants[0].info) for path in find_images(entries, limit, seed)]
        return agreement.compare(variants, images, thresholds=thresholds or Thresholds(), layers=layers)


def _open_variants(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    stack: ExitStack,
    plugins: str | Path | None,
    layers: bool = False,
    on_cluster: bool = False,
) -> list[Variant]:
    """The models, ready to run; engines live as long as ``stack``, or are opened on a cluster alone."""
    from darktrt.check.runs import engine_variant, onnx_variant

    named = models.items() if isinstance(models, Mapping) else [("", model) for model in models]
    if not named:
        raise DarktrtError("there is no model to run; name an ONNX file or an engine", "models")
    return [
        engine_variant(path, plugins, name, None if on_cluster else stack)
        if Path(path).suffix.lower() in ENGINE_SUFFIXES
        else onnx_variant(path, layers, name)
        for name, path in named
    ]
