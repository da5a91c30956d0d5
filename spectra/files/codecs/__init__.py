"""Weights that are stored as codes: one file per format, which finds them by name and decodes them."""
