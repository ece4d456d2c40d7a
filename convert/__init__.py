"""Darknet to PyTorch to ONNX: the only room that imports torch."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
