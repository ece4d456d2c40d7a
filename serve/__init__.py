"""Serving detectors with NVIDIA's Triton Inference Server: model repositories, the server, clients, load."""

if not __name__.startswith("darktrt."):
    raise ImportError(f"import darktrt.{__name__}: this folder is a part of the package darktrt")
