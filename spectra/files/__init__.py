"""Stored tensors: where they are, what their headers say, and how their bytes are read."""
