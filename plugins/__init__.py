"""The custom ops: what they compute, as ONNX bodies in standard ops, and (in ``csrc``) as CUDA plugins."""
