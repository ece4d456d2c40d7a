"""ONNX to ONNX: Mish and the heads become plugin nodes, whose meaning the file carries as functions."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
