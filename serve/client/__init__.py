"""A client of models that darktrt has put on a Triton server."""
