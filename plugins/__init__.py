"""The custom ops: what they compute, as ONNX bodies in standard ops, and (in ``csrc``) as CUDA plugins."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
