"""Images to INT8 scales: histograms of a network's activations, thresholds on them, and TensorRT's calibration table."""
