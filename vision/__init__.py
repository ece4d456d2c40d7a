"""Images in and out: the one preprocessing contract, detections and NMS in NumPy, drawing, and files to detections."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
