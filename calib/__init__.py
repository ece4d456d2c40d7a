"""Images to INT8 scales: histograms of a network's activations, thresholds on them, and the calibration file."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
