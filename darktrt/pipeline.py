"""The stages of darktrt as functions from files to files: what a program calls, and what the command line calls.

Each function imports the rooms that it needs when it is called. Library errors are :class:`darktrt.DarktrtError`; progress and
warnings go where :mod:`darktrt.progress` sends them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from darktrt.errors import DarktrtError
from darktrt.files import cache_folder, keep_inputs, sha256_of
from darktrt.metadata import IOU_THRESHOLD, SCORE_THRESHOLD, Thresholds
from darktrt.progress import LOGGER
from darktrt.vision.detector import NetworkDetector

if TYPE_CHECKING:
    from darktrt.calib.file import CalibrationFile
    from darktrt.calib.histogram import HistogramSet
    from darktrt.calib.options import CalibrationOptions
    from darktrt.calib.threshold import Method
    from darktrt.check.agreement import Agreement
    from darktrt.check.evaluation import Evaluation
    from darktrt.check.runs import Variant
    from darktrt.cluster.cluster import Cluster
    from darktrt.engine.manifest import Int8Cost, Manifest
    from darktrt.engine.options import BuildOptions, Precision
    from darktrt.engine.weak_typing import GpuCalibration
    from darktrt.parallel import Workers
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
    cluster: Workers | None = None,
) -> Calibration:
    """Calibrate a model for INT8 by running it over images, and write the calibration (``.calib``).

    The file has everything that later stages and later runs need: what was counted, the thresholds, the channel means by which
    biases are corrected, and the floating-point layers. What is counted so far is in a file with ``.partial`` behind its name
    until then. The same model, images and options make the same bytes.

    Args:
        model: an ONNX file of :func:`insert_plugins`.
        data: folders, image files, lists, COCO json files and patterns; if there are none, two sample images serve, under a
            warning.
        output: the calibration to write.
        cluster: who runs the network; by default the cores of this machine.

    Raises:
        DarktrtError: the model or an image cannot be read, or the calibration cannot be written. An earlier one stays then.
    """
    from darktrt.calib.file import check_calibration_output, partial_path, write_calibration
    from darktrt.calib.merge import with_thresholds
    from darktrt.calib.options import CalibrationOptions
    from darktrt.vision.sources import path_of

    options = options or CalibrationOptions()
    check_calibration_output(output, [model, *(path_of(str(entry)) for entry in data)])
    earlier = _earlier(output) if options.resume else None
    known = len(earlier.histograms.images) if earlier else 0
    counted = _counted(model, data, output, options, earlier, cluster)
    same = earlier and known == len(counted.histograms.images)
    contents = _measured(model, with_thresholds(counted, [earlier] if earlier and same else []), cluster)
    write_calibration(contents, output)
    partial_path(output).unlink(missing_ok=True)
    for sentence in contents.histograms.skipped.values():
        LOGGER.warning("skipped %s", sentence)
    return load_calibration(output)


def merge_calibrations(
    calibrations: Sequence[str | Path],
    output: str | Path,
    *,
    model: str | Path | None = None,
    method: Method | None = None,
    percentile: float | None = None,
    bias_images: int | None = None,
    fp_layer_images: int | None = None,
    cluster: Workers | None = None,
) -> Calibration:
    """Put the calibrations of several runs together, also of runs that have not ended.

    The result is that of one run over all the images, bit for bit, but for what was measured with the thresholds: the new ones
    are those of all images. With ``model``, that is measured again on the images whose files are here. Otherwise run
    :func:`calibrate` with ``resume`` where they are. Files of the same images that were measured on in different places are put
    together with all that was measured.

    Args:
        calibrations: files of :func:`calibrate`.
        output: the calibration to write.
        model: the ONNX file that was calibrated.
        method: how to choose thresholds, and so on as in :class:`CalibrationOptions`; by default as the calibrations have it.
        cluster: who runs the network; by default the cores of this machine.

    Raises:
        DarktrtError: a file cannot be read, the files are of different models or share some images only, they differ in a
            setting that was not chosen, or the calibration cannot be written.
    """
    from darktrt.calib.file import check_calibration_output, write_calibration
    from darktrt.calib.merge import merged

    if not calibrations:
        raise DarktrtError("there is nothing to merge; name the calibrations of several runs", "calibrations")
    check_calibration_output(output, [*calibrations, *([model] if model else [])])
    settings = {"method": method, "percentile": percentile, "bias_images": bias_images, "fp_layer_images": fp_layer_images}
    contents = merged(calibrations, **{name: value for name, value in settings.items() if value is not None})
    write_calibration(_measured(model, contents, cluster) if model else contents, output)
    return load_calibration(output)


def load_calibration(path: str | Path, fp_layers: tuple[str, ...] | None = None) -> Calibration:
    """The calibration in a file of :func:`calibrate`, or a TensorRT calibration cache.

    Args:
        fp_layers: node names of the convolutions to compute in floating point, in place of those of the file.

    Raises:
        DarktrtError: the file is neither, is damaged, or is that of a run that has not ended.
    """
    from darktrt.calib.file import is_cache, read_calibration
    from darktrt.calib.table import CalibrationTable
    from darktrt.surgery.qdq import Calibration

    if is_cache(path):
        return Calibration(CalibrationTable.load(path).scales, fp_layers, sha256=sha256_of(path))
    contents = read_calibration(path)
    if not contents.choices:
        raise DarktrtError(
            f"{path}: has only counts, for the run that makes it has not ended; resume that run, or merge this file",
            "calibration",
        )
    if not contents.is_measured:
        LOGGER.warning("%s: %s; resume the calibration where the images are", path, ", ".join(contents.measured()))
    return _calibration(contents, fp_layers, sha256_of(path))


def _calibration(contents: CalibrationFile, fp_layers: tuple[str, ...] | None = None, sha256: str = "") -> Calibration:
    from darktrt.surgery.qdq import Calibration

    measured = contents.fp_layers()
    return Calibration(
        contents.scales,
        measured.names if fp_layers is None and measured else fp_layers,
        contents.means.channel_means(contents.ranges),
        sha256,
        contents.histograms.model,
        contents.network.sources,
        frozenset(contents.histograms.images),
    )


def _earlier(output: str | Path) -> CalibrationFile | None:
    """What to go on with: what a run that was interrupted has left, or the calibration that is there."""
    from darktrt.calib.file import partial_path, read_calibration

    left = [path for path in (partial_path(output), Path(output)) if path.exists()]
    return read_calibration(left[0]) if left else None


def _counted(
    model: str | Path,
    data: Sequence[str | Path],
    output: str | Path,
    options: CalibrationOptions,
    earlier: CalibrationFile | None,
    cluster: Workers | None,
) -> CalibrationFile:
    """The first pass: counts, without thresholds. They are saved as they grow."""
    from darktrt.calib.collect import collect
    from darktrt.calib.file import CalibratedNetwork, CalibrationFile, partial_path, write_calibration
    from darktrt.onnx_file import load_info

    network, warnings = CalibratedNetwork.of(load_info(model)), earlier.warnings if earlier else ()
    if not data:
        data, warnings = _sample_images(), ("made of two sample images, for trying out only",)

    def contents(histograms: HistogramSet) -> CalibrationFile:
        return CalibrationFile(network, options.settings, histograms, warnings)

    return contents(
        collect(
            model,
            _images(data, output, options),
            resume=earlier.histograms if earlier else None,
            skip_bad=options.skip_bad,
            save=lambda histograms: write_calibration(contents(histograms), partial_path(output)),
            workers=cluster,
        )
    )


def _sample_images() -> Sequence[Path]:
    from darktrt.calib.samples import SAMPLES_WARNING, flips_and_crops
    from darktrt.convert.zoo import SAMPLES, fetch

    LOGGER.warning("%s", SAMPLES_WARNING)
    folder = cache_folder() / "samples"
    return flips_and_crops(fetch(SAMPLES, folder), folder)


def _images(data: Sequence[str | Path], output: str | Path, options: CalibrationOptions) -> Sequence[Path]:
    from darktrt.vision.sources import IMAGE_SUFFIXES, find_images

    images = find_images(data, options.limit, options.seed)
    if Path(output).suffix.lower() in IMAGE_SUFFIXES:  # others cannot be one of many thousand images
        keep_inputs(output, *images)
    if len(images) < _FEW:
        LOGGER.warning(f"{len(images)} images are few to calibrate on; a hundred or more are usual")
    return images


_FEW = 16
"""Fewer images than this cause a warning."""


def _measured(model: str | Path, contents: CalibrationFile, cluster: Workers | None) -> CalibrationFile:
    """The calibration with everything measured that the images at hand allow: first what biases are corrected by, and then,
    with all of these biases, which layers to leave in floating point."""
    from darktrt.calib.channel_means import measure_channel_means
    from darktrt.calib.merge import add_noise
    from darktrt.check.sensitivity import measure_noise

    if sha256_of(model) != contents.histograms.model:
        raise DarktrtError(f"{model}: is not the model that was calibrated; name that one", "model")
    missing = _at_hand(contents, set(contents.means_sample) - contents.means.images)
    if missing:
        measured = measure_channel_means(model, list(missing.values()), contents.ranges, cluster)
        if not measured.images <= missing.keys():
            raise DarktrtError("an image changed while it was measured on; calibrate on files that do not change", "data")
        contents = replace(contents, means=contents.means + measured)
    if len(contents.means.images) < len(contents.means_sample):
        return contents
    missing = _at_hand(contents, set(contents.noise_sample) - contents.noise_images.keys())
    if missing:
        noise = measure_noise(model, missing, _calibration(contents), cluster)
        contents = replace(contents, noise=add_noise(contents, noise, dict(contents.noise_images)))
    return contents


def _at_hand(contents: CalibrationFile, wanted: Set[str]) -> dict[str, Path]:
    """The files of these images, as far as they are here, in their order."""
    from darktrt.calib.file import in_order

    found = {}
    for digest in in_order({digest: contents.histograms.images[digest] for digest in wanted}):
        path = contents.histograms.files.get(digest, Path(contents.histograms.images[digest]))
        with suppress(DarktrtError):
            if sha256_of(path) == digest:
                found[digest] = path
    return found


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
        scales, cost = _within_budget(source, scales, options, budget)
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
    source: str | Path, calibration: Calibration, options: BuildOptions, budget: DropBudget
) -> tuple[Calibration, Int8Cost]:
    """The calibration with the layers in floating point that keep INT8 within the budget, and what it costs then."""
    from darktrt.check.budget import EvaluationData, within_budget
    from darktrt.engine.build import build_target

    build_target(options)  # what would stop the build later is reported before this long work
    data = [str(entry) for entry in budget.data]
    trade = within_budget(source, calibration, budget.max_drop, EvaluationData(data, budget.limit), LOGGER.info)
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
