"""Serving detectors with NVIDIA's Triton Inference Server: model repositories, the server, clients, load."""
