"""How much load a Triton server takes."""
