"""Darknet to PyTorch to ONNX: the only room that imports torch."""
