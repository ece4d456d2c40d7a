"""ONNX to ONNX: Mish and the heads become custom nodes, which carry their meaning as functions."""
