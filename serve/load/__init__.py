"""The throughput and latency of a Triton server under load."""
