"""ONNX to ONNX: Mish and the heads become custom nodes, which carry their meaning as functions."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
