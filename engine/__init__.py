"""ONNX to a TensorRT engine, and running models."""
