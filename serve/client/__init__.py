"""A client of detectors on a Triton server."""
