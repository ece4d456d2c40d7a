"""Images and detections: preprocessing, NMS in NumPy, detectors, files and videos, drawing, and charts."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
