"""Darknet detectors to TensorRT engines: convert, insert plugins, calibrate, build, evaluate and serve."""

__version__ = "0.1.0"
